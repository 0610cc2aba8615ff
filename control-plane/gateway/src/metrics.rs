//! The gateway's Prometheus metrics. Labels are bounded: no model name or path of a client's
//! choosing ever becomes one.

use std::time::Duration;

use prometheus::{
    Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, Opts, Registry,
    core::Collector, exponential_buckets,
};

/// Handles of every metric.
#[derive(Clone, Debug)]
pub(crate) struct Metrics {
    pub(crate) in_flight: IntGauge,
    pub(crate) resumes: IntCounter,
    requests: IntCounterVec,
    duration: HistogramVec,
    first_token: Histogram,
    prompt_tokens: IntCounter,
    completion_tokens: IntCounter,
}

impl Metrics {
    /// Registers all of them.
    ///
    /// # Errors
    /// When the registry already holds one.
    pub(crate) fn register(registry: &Registry) -> Result<Self, prometheus::Error> {
        // 5 ms to about 160 s: from a cached list to a long answer.
        let buckets = exponential_buckets(0.005, 2.0, 16)?;
        let histogram =
            |name: &str, help: &str| HistogramOpts::new(name, help).buckets(buckets.clone());
        let tokens = IntCounterVec::new(
            Opts::new("exo_gateway_tokens_total", "Tokens of requests, by kind"),
            &["kind"],
        )?;
        Ok(Self {
            in_flight: registered(
                registry,
                IntGauge::new("exo_gateway_in_flight", "Requests for answers under way")?,
            )?,
            resumes: registered(
                registry,
                IntCounter::new(
                    "exo_gateway_resumes_total",
                    "Answers that broke off and were continued elsewhere",
                )?,
            )?,
            requests: registered(
                registry,
                IntCounterVec::new(
                    Opts::new(
                        "exo_gateway_requests_total",
                        "Requests answered; code 499 is a client that went away",
                    ),
                    &["route", "code"],
                )?,
            )?,
            duration: registered(
                registry,
                HistogramVec::new(
                    histogram(
                        "exo_gateway_request_duration_seconds",
                        "From a request's arrival to the end of its answer",
                    ),
                    &["route"],
                )?,
            )?,
            first_token: registered(
                registry,
                Histogram::with_opts(histogram(
                    "exo_gateway_time_to_first_token_seconds",
                    "From a request's arrival to its first token",
                ))?,
            )?,
            prompt_tokens: tokens.with_label_values(&["prompt"]),
            completion_tokens: {
                let completion = tokens.with_label_values(&["completion"]);
                registered(registry, tokens)?;
                completion
            },
        })
    }

    pub(crate) fn request_done(&self, route: &str, code: u16, took: Duration) {
        self.requests.with_label_values(&[route, &code.to_string()]).inc();
        self.duration.with_label_values(&[route]).observe(took.as_secs_f64());
    }

    pub(crate) fn prompt(&self, tokens: u32) {
        self.prompt_tokens.inc_by(u64::from(tokens));
    }

    /// One token; `since_arrival` with the first of an answer.
    pub(crate) fn token(&self, since_arrival: Option<Duration>) {
        self.completion_tokens.inc();
        if let Some(took) = since_arrival {
            self.first_token.observe(took.as_secs_f64());
        }
    }
}

fn registered<C: Collector + Clone + 'static>(
    registry: &Registry,
    metric: C,
) -> Result<C, prometheus::Error> {
    registry.register(Box::new(metric.clone()))?;
    Ok(metric)
}
