//! What Prometheus scrapes from rank 0.

use prometheus::{
    Encoder as _, Histogram, HistogramOpts, IntCounter, IntCounterVec, IntGauge, Opts, Registry,
    TextEncoder,
};

/// From a tiny model on a CPU to a long prompt on a large one.
const FIRST_TOKEN_BUCKETS_S: [f64; 13] =
    [0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0];
const DECODE_BUCKETS_S: [f64; 12] =
    [0.000_5, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 5.0];
const BATCH_BUCKETS: [f64; 8] = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0];

/// The runner's metrics. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct Metrics {
    registry: Registry,
    pub(crate) requests: IntCounter,
    pub(crate) active_sequences: IntGauge,
    pub(crate) waiting_requests: IntGauge,
    pub(crate) prompt_tokens: IntCounter,
    pub(crate) completion_tokens: IntCounter,
    pub(crate) time_to_first_token: Histogram,
    pub(crate) decode_step: Histogram,
    pub(crate) batch: Histogram,
    pub(crate) put_off: IntCounter,
}

impl Metrics {
    pub(crate) fn new() -> Self {
        Self::register().expect("the names are valid and each is used once")
    }

    fn register() -> prometheus::Result<Self> {
        let tokens = IntCounterVec::new(
            Opts::new("exo_runner_tokens_total", "Tokens fed from prompts, and tokens drawn."),
            &["kind"],
        )?;
        let histogram = |name: &str, help: &str, buckets: &[f64]| {
            Histogram::with_opts(HistogramOpts::new(name, help).buckets(buckets.to_vec()))
        };
        let metrics = Self {
            registry: Registry::new(),
            requests: IntCounter::new("exo_runner_requests_total", "Requests accepted.")?,
            active_sequences: IntGauge::new(
                "exo_runner_active_sequences",
                "Sequences that hold a cache.",
            )?,
            waiting_requests: IntGauge::new(
                "exo_runner_waiting_requests",
                "Requests accepted that wait for a place.",
            )?,
            prompt_tokens: tokens.with_label_values(&["prompt"]),
            completion_tokens: tokens.with_label_values(&["completion"]),
            time_to_first_token: histogram(
                "exo_runner_time_to_first_token_seconds",
                "From a request's acceptance to its first token.",
                &FIRST_TOKEN_BUCKETS_S,
            )?,
            decode_step: histogram(
                "exo_runner_decode_step_seconds",
                "One decode step through all ranks, for all sequences that take part.",
                &DECODE_BUCKETS_S,
            )?,
            batch: histogram(
                "exo_runner_decode_batch_sequences",
                "Sequences that took part in a decode step.",
                &BATCH_BUCKETS,
            )?,
            put_off: IntCounter::new(
                "exo_runner_put_off_total",
                "Times that a sequence gave up its cache to others and was computed anew later.",
            )?,
        };
        let registry = &metrics.registry;
        registry.register(Box::new(tokens))?;
        registry.register(Box::new(metrics.requests.clone()))?;
        registry.register(Box::new(metrics.active_sequences.clone()))?;
        registry.register(Box::new(metrics.waiting_requests.clone()))?;
        registry.register(Box::new(metrics.time_to_first_token.clone()))?;
        registry.register(Box::new(metrics.decode_step.clone()))?;
        registry.register(Box::new(metrics.batch.clone()))?;
        registry.register(Box::new(metrics.put_off.clone()))?;
        Ok(metrics)
    }

    /// Prometheus' text format.
    pub(crate) fn render(&self) -> Vec<u8> {
        let mut text = Vec::new();
        TextEncoder::new()
            .encode(&self.registry.gather(), &mut text)
            .expect("a vector takes all writes");
        text
    }
}
