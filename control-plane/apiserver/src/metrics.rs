//! What the server counts.

use std::time::Instant;

use axum::http::StatusCode;
use prometheus::{
    HistogramOpts, HistogramVec, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry,
};

use crate::request::Verb;

#[derive(Debug)]
pub(crate) struct Metrics {
    durations: HistogramVec,
    /// Running watches, by resource.
    pub(crate) watches: IntGaugeVec,
    /// Events sent to watches, by resource.
    pub(crate) watch_events: IntCounterVec,
    /// Requests being answered, watches not counted.
    pub(crate) in_flight: IntGauge,
    /// Requests refused for a limit, by limit.
    pub(crate) rejected: IntCounterVec,
}

/// From a read of memory to a write that waits for a slow disk.
const BUCKETS_S: [f64; 12] =
    [0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0];

impl Metrics {
    pub(crate) fn register(registry: &Registry) -> Result<Self, prometheus::Error> {
        let durations = HistogramVec::new(
            HistogramOpts::new(
                "apiserver_request_duration_seconds",
                "Time to answer requests, long lists to their end; of watches, to begin them",
            )
            .buckets(BUCKETS_S.to_vec()),
            &["verb", "resource", "code"],
        )?;
        let watches =
            IntGaugeVec::new(Opts::new("apiserver_watches", "Running watches"), &["resource"])?;
        let watch_events = IntCounterVec::new(
            Opts::new("apiserver_watch_events_total", "Events sent to watches"),
            &["resource"],
        )?;
        let in_flight = IntGauge::new(
            "apiserver_current_inflight_requests",
            "Requests being answered, watches not counted",
        )?;
        let rejected = IntCounterVec::new(
            Opts::new("apiserver_rejected_requests_total", "Requests refused with status 429"),
            &["limit"],
        )?;
        registry.register(Box::new(durations.clone()))?;
        registry.register(Box::new(watches.clone()))?;
        registry.register(Box::new(watch_events.clone()))?;
        registry.register(Box::new(in_flight.clone()))?;
        registry.register(Box::new(rejected.clone()))?;
        Ok(Self { durations, watches, watch_events, in_flight, rejected })
    }

    pub(crate) fn start(&self, verb: Verb) -> Timer {
        Timer { durations: self.durations.clone(), verb, start: Instant::now() }
    }
}

/// A request that is being answered.
pub(crate) struct Timer {
    durations: HistogramVec,
    verb: Verb,
    start: Instant,
}

impl Timer {
    pub(crate) fn observe(&self, resource: &str, code: StatusCode) {
        self.durations
            .with_label_values(&[self.verb.name(), resource, code.as_str()])
            .observe(self.start.elapsed().as_secs_f64());
    }
}
