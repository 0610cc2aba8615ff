//! OpenAI-compatible HTTP gateway.
//!
//! Owns: the OpenAI protocol, the choice of a replica for each request, its resumption on another
//! one, admission, the gateway's metrics. It is a Kubernetes client like any other and gives
//! nobody access to the control plane. Never: placement, tokenizing, anything stored; and it never
//! logs a user's text.

mod balance;
mod error;
mod flow;
mod follow;
mod http;
mod index;
mod metrics;
mod openai;
mod progress;
mod upstream;

use std::{sync::Arc, time::Duration};

use prometheus::Registry;
use tokio::sync::{Semaphore, watch};

pub use http::app;

use crate::{balance::Balance, index::Index, metrics::Metrics, upstream::Runners};

/// Bounds on what clients can ask of one gateway.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Larger request bodies are refused.
    pub body_bytes: usize,
    /// More bytes in the bodies of all requests in flight together are refused.
    pub bodies_bytes: usize,
    /// Request bodies that take longer to arrive are refused.
    pub body_wait: Duration,
    /// More requests at a time are refused.
    pub in_flight: usize,
    /// How long a request waits for a first replica that is ready.
    pub ready_wait: Duration,
    /// How long a request whose replica broke waits for another one.
    pub resume_wait: Duration,
    /// Origins (`https://chat.example.org`) whose web pages may use the gateway, besides those of
    /// this machine and of the gateway's own host; `*` stands for every website.
    pub allowed_origins: Vec<String>,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            // Long contexts are megabytes of text; images are not taken.
            body_bytes: 10 * 1024 * 1024,
            // Twenty-five of the largest; ordinary prompts are kilobytes.
            bodies_bytes: 256 * 1024 * 1024,
            // The largest body over 3 Mbit/s; slower ones would only hold others' places.
            body_wait: Duration::from_secs(30),
            in_flight: 1024,
            // A cold start of a small model; clients usually give up after a minute.
            ready_wait: Duration::from_secs(30),
            // A node's lease, a new placement and the load of a large model.
            resume_wait: Duration::from_secs(120),
            allowed_origins: Vec::new(),
        }
    }
}

/// The gateway: a handle, cheap to clone.
#[derive(Clone, Debug)]
pub struct Gateway {
    shared: Arc<Shared>,
}

/// What all requests share.
#[derive(Debug)]
struct Shared {
    client: DebugClient,
    index: watch::Sender<Index>,
    balance: Balance,
    runners: Runners,
    metrics: Metrics,
    registry: Registry,
    limits: Limits,
    admission: Arc<Semaphore>,
    /// A permit for each byte of a body.
    bodies: Arc<Semaphore>,
}

/// kube's client has no `Debug`.
#[derive(Clone)]
struct DebugClient(kube::Client);

impl std::fmt::Debug for DebugClient {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Client")
    }
}

impl Gateway {
    /// A gateway that learns of instances through `client` and reaches runners through `http`,
    /// which must present a certificate of the cluster (`exo_trust::reqwest_client`).
    /// `registry` is what `/metrics` serves.
    ///
    /// # Errors
    /// When `registry` already holds a gateway's metrics.
    pub fn new(
        client: kube::Client,
        http: reqwest::Client,
        registry: &Registry,
        limits: Limits,
    ) -> Result<Self, prometheus::Error> {
        Ok(Self {
            shared: Arc::new(Shared {
                client: DebugClient(client),
                index: watch::Sender::new(Index::default()),
                balance: Balance::default(),
                runners: Runners { http, scheme: "https" },
                metrics: Metrics::register(registry)?,
                registry: registry.clone(),
                admission: Arc::new(Semaphore::new(limits.in_flight)),
                bodies: Arc::new(Semaphore::new(limits.bodies_bytes)),
                limits,
            }),
        })
    }

    /// Reaches runners without TLS, as scripted ones in tests are.
    ///
    /// # Panics
    /// When the gateway is already in use: call it right after [`Gateway::new`].
    #[must_use]
    pub fn with_plain_runners(mut self) -> Self {
        Arc::get_mut(&mut self.shared).expect("no clone exists yet").runners.scheme = "http";
        self
    }

    /// Follows the API server; requests are answered only while this runs. Never returns: drop
    /// the future to stop.
    pub async fn run(&self) {
        follow::follow(self.shared.client.0.clone(), &self.shared.index).await;
    }

    /// Returns once instances and models have been read.
    pub async fn ready(&self) {
        let mut index = self.shared.index.subscribe();
        // The sender lives in `self`, so waiting can't fail.
        let _ = index.wait_for(Index::is_complete).await;
    }
}
