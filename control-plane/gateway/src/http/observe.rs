//! Counts requests. A streamed answer counts when its stream ends, with what became of it.

use std::sync::{
    Arc,
    atomic::{AtomicU16, Ordering},
};

use axum::{
    body::Body,
    extract::{MatchedPath, Request, State},
    http::StatusCode,
    middleware::Next,
    response::Response,
};
use futures::StreamExt as _;
use tokio::time::Instant;

use crate::Shared;

/// The client went away first: nginx's code for it.
const CLIENT_GONE: u16 = 499;

/// How a streamed answer ended; carried in the response's extensions. Until it is set, the client
/// has gone away.
#[derive(Clone, Debug)]
pub(super) struct Outcome(Arc<AtomicU16>);

impl Default for Outcome {
    fn default() -> Self {
        Self(Arc::new(AtomicU16::new(CLIENT_GONE)))
    }
}

impl Outcome {
    pub(super) fn set(&self, status: StatusCode) {
        self.0.store(status.as_u16(), Ordering::Relaxed);
    }
}

/// Records its request when dropped.
struct Observed {
    shared: Arc<Shared>,
    route: String,
    started: Instant,
    outcome: Outcome,
}

impl Drop for Observed {
    fn drop(&mut self) {
        let metrics = &self.shared.metrics;
        let code = self.outcome.0.load(Ordering::Relaxed);
        metrics.request_done(&self.route, code, self.started.elapsed());
    }
}

pub(super) async fn observe(
    State(shared): State<Arc<Shared>>,
    path: Option<MatchedPath>,
    request: Request,
    next: Next,
) -> Response {
    let mut observed = Observed {
        shared,
        // Never the path itself: clients choose it, and labels live for ever.
        route: path.map_or_else(|| "other".to_owned(), |path| path.as_str().to_owned()),
        started: Instant::now(),
        outcome: Outcome::default(),
    };
    let mut response = next.run(request).await;
    match response.extensions_mut().remove::<Outcome>() {
        None => {
            observed.outcome.set(response.status());
            response
        }
        Some(outcome) => {
            observed.outcome = outcome;
            response.map(|body| {
                Body::from_stream(body.into_data_stream().inspect(move |_| {
                    let _until_the_end = &observed;
                }))
            })
        }
    }
}
