//! What the server counts.

use std::time::Instant;

use axum::http::StatusCode;
use prometheus::{HistogramOpts, HistogramVec, IntGaugeVec, Opts, Registry};

use crate::request::Verb;

#[derive(Debug)]
pub(crate) struct Metrics {
    durations: HistogramVec,
    /// Running watches, by resource.
    pub(crate) watches: IntGaugeVec,
}

/// From a read of memory to a write that waits for a slow disk.
const BUCKETS_S: [f64; 12] =
    [0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0];

impl Metrics {
    pub(crate) fn register(registry: &Registry) -> Result<Self, prometheus::Error> {
        let durations = HistogramVec::new(
            HistogramOpts::new(
                "apiserver_request_duration_seconds",
                "Time to answer requests; of watches, to begin them",
            )
            .buckets(BUCKETS_S.to_vec()),
            &["verb", "resource", "code"],
        )?;
        let watches =
            IntGaugeVec::new(Opts::new("apiserver_watches", "Running watches"), &["resource"])?;
        registry.register(Box::new(durations.clone()))?;
        registry.register(Box::new(watches.clone()))?;
        Ok(Self { durations, watches })
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
