//! A runner that does as it is told: speaks the generate protocol, computes nothing.

use std::sync::{Arc, Mutex};

use axum::{
    Json, Router,
    body::Body,
    extract::State,
    http::StatusCode,
    response::{IntoResponse, Response},
    routing::post,
};
use bytes::Bytes;
use exo_crds::generate::{self, GenerateEvent, GenerateRequest};
use tokio::{net::TcpListener, sync::mpsc};

use crate::cluster::PATIENCE;

/// One request as it reached the runner.
pub(crate) struct Arrived {
    pub(crate) request: GenerateRequest,
    events: Option<mpsc::Sender<Bytes>>,
    refusal: Option<tokio::sync::oneshot::Sender<(StatusCode, GenerateEvent)>>,
}

/// A runner; stops with its task when dropped.
pub(crate) struct Runner {
    pub(crate) endpoint: String,
    arrivals: mpsc::UnboundedReceiver<Arrived>,
    server: tokio::task::JoinHandle<()>,
    /// How many requests it has seen.
    pub(crate) seen: Arc<Mutex<usize>>,
}

impl Runner {
    pub(crate) async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let endpoint = listener.local_addr().unwrap().to_string();
        let (sender, arrivals) = mpsc::unbounded_channel();
        let seen = Arc::new(Mutex::new(0));
        let app = Router::new()
            .route(generate::PATH, post(generate))
            .with_state((sender, Arc::clone(&seen)));
        let server = tokio::spawn(async move { axum::serve(listener, app).await.unwrap() });
        Self { endpoint, arrivals, server, seen }
    }

    /// The next request that arrives.
    pub(crate) async fn next(&mut self) -> Arrived {
        let arrived = tokio::time::timeout(PATIENCE, self.arrivals.recv()).await;
        arrived.expect("a request arrives in time").expect("the runner is up")
    }

    /// Refuses connections from now on, and breaks none.
    pub(crate) fn stop_listening(&self) {
        self.server.abort();
    }
}

impl Drop for Runner {
    fn drop(&mut self) {
        self.server.abort();
    }
}

async fn generate(
    State((sender, seen)): State<(mpsc::UnboundedSender<Arrived>, Arc<Mutex<usize>>)>,
    Json(request): Json<GenerateRequest>,
) -> Response {
    *seen.lock().unwrap() += 1;
    let (events, mut lines) = mpsc::channel::<Bytes>(1);
    let (refusal, refused) = tokio::sync::oneshot::channel();
    let arrived = Arrived { request, events: Some(events), refusal: Some(refusal) };
    if sender.send(arrived).is_err() {
        return StatusCode::SERVICE_UNAVAILABLE.into_response();
    }
    // The test decides: events (it drops the refusal's sender), or a refusal.
    if let Ok((status, event)) = refused.await {
        return (status, Json(event)).into_response();
    }
    let body = async_stream::stream! {
        while let Some(line) = lines.recv().await {
            if line.is_empty() {
                // The test wants the connection cut.
                yield Err(std::io::Error::other("cut"));
                return;
            }
            yield Ok(line);
        }
    };
    Body::from_stream(body).into_response()
}

impl Arrived {
    /// Sends an event.
    pub(crate) async fn send(&mut self, event: GenerateEvent) {
        self.refusal = None;
        let mut line = serde_json::to_vec(&event).unwrap();
        line.push(b'\n');
        let events = self.events.as_ref().expect("not ended");
        events.send(line.into()).await.expect("the gateway reads");
    }

    pub(crate) async fn send_all(&mut self, events: impl IntoIterator<Item = GenerateEvent>) {
        for event in events {
            self.send(event).await;
        }
    }

    /// Ends the body properly, whatever was sent.
    pub(crate) fn end(mut self) {
        self.refusal = None;
        self.events = None;
    }

    /// Breaks the connection in the middle of the body.
    pub(crate) async fn cut(mut self) {
        self.refusal = None;
        let _: Result<(), _> = self.events.take().unwrap().send(Bytes::new()).await;
    }

    pub(crate) fn refuse(mut self, status: StatusCode, event: GenerateEvent) {
        let _ = self.refusal.take().unwrap().send((status, event));
    }

    /// Returns when the gateway has closed the connection.
    pub(crate) async fn closed(&self) {
        self.events.as_ref().expect("not ended").closed().await;
    }
}
