//! Calls to the other nodes of a store over HTTP: where they go, what they carry, how they fail.
//!
//! Owns: paths, headers, limits and the client's side. Never: what a call means, or who may make
//! it; the server in front of [`raft_routes`](crate::raft_routes) sees to that.

use std::{error::Error, fmt::Write as _, sync::Arc, time::Duration};

use axum::http::{Request, StatusCode, header};
use bytes::Bytes;
use http_body_util::Full;
use serde::de::DeserializeOwned;
use tokio_rustls::rustls::ClientConfig;

use super::line::Line;

/// Below this path are all calls.
pub(super) const BASE: &str = "/exo/v1/raft/";
/// Who calls; for logs, and for tests that cut connections.
pub(super) const SOURCE: &str = "x-exo-raft-source";
/// Whom the caller means: an address may belong to another node by now.
pub(super) const TARGET: &str = "x-exo-raft-target";
/// Larger calls are refused.
pub(super) const BODY_LIMIT_BYTES: usize = 64 << 20;

/// How the texts of calls begin that got no answer.
pub(super) const NO_CALL: &str = "calling node ";

/// How a node with an empty folder begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Begin {
    /// With a cluster of this one voter.
    Found,
    /// By waiting until the leader of a cluster adds it.
    Join,
}

/// How a node reaches the others.
#[derive(Clone, Debug)]
pub struct Peering {
    /// Proves who this node is, and checks who answers.
    pub client: reqwest::Client,
    /// The same for connections that are not that client's; `None` where something else protects
    /// them: both then speak plain HTTP.
    pub tls: Option<Arc<ClientConfig>>,
    pub begin: Begin,
}

/// Makes calls; clones share connections.
#[derive(Clone)]
pub(super) struct Caller {
    own_id: u64,
    /// `None` for a store that is alone for good.
    way: Option<Way>,
}

#[derive(Clone)]
struct Way {
    client: reqwest::Client,
    tls: Option<Arc<ClientConfig>>,
}

/// Whom to call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Target {
    pub(super) id: u64,
    pub(super) address: String,
}

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub(super) enum CallError {
    /// It did nothing on the other side.
    #[error("{0}")]
    NotDone(String),
    /// It may have been carried out.
    #[error("{0}")]
    Unknown(String),
}

impl Caller {
    pub(super) fn new(own_id: u64, peering: Option<&Peering>) -> Self {
        let way = |p: &Peering| Way { client: p.client.clone(), tls: p.tls.clone() };
        Self { own_id, way: peering.map(way) }
    }

    fn way(&self, to: &Target) -> Result<&Way, CallError> {
        let Target { id, address } = to;
        self.way.as_ref().ok_or_else(|| {
            CallError::NotDone(format!(
                "no way to node {id} at {address}: this store runs as a single voter"
            ))
        })
    }

    /// The same as [`post`](Self::post) by a connection of the caller's own, for a call that may be
    /// carried out twice.
    pub(super) async fn post_by<A: DeserializeOwned>(
        &self,
        line: &mut Line,
        to: &Target,
        call: &str,
        body: Vec<u8>,
        limit: Duration,
    ) -> Result<A, CallError> {
        let tls = self.way(to)?.tls.as_ref();
        let request = Request::post(format!("{BASE}{call}"))
            .header(header::HOST, &to.address)
            .header(SOURCE, self.own_id)
            .header(TARGET, to.id)
            .body(Full::new(Bytes::from(body)))
            .map_err(|error| CallError::NotDone(error.to_string()))?;
        let (status, body) = line.exchange(to, tls, request, limit).await?;
        if status != StatusCode::OK {
            return Err(refusal(to, status, &body));
        }
        serde_json::from_slice(&body).map_err(|error| unreadable(to, &error))
    }

    /// Posts a body and reads the JSON that comes back.
    pub(super) async fn post<A: DeserializeOwned>(
        &self,
        to: &Target,
        call: &str,
        body: Vec<u8>,
        limit: Duration,
    ) -> Result<A, CallError> {
        let Target { id, address } = to;
        let Way { client, tls } = self.way(to)?;
        let scheme = if tls.is_some() { "https" } else { "http" };
        let sent = client
            .post(format!("{scheme}://{address}{BASE}{call}"))
            .header(SOURCE, self.own_id)
            .header(TARGET, *id)
            .timeout(limit)
            .body(body)
            .send()
            .await;
        let response = sent.map_err(|error| {
            let text = format!("{NO_CALL}{id} at {address}: {}", bottom(&error));
            if error.is_connect() { CallError::NotDone(text) } else { CallError::Unknown(text) }
        })?;
        let status = response.status();
        let body = response.bytes().await;
        if status != StatusCode::OK {
            return Err(refusal(to, status, &body.unwrap_or_default()));
        }
        let body = body.map_err(|error| unreadable(to, &error))?;
        serde_json::from_slice(&body).map_err(|error| unreadable(to, &error))
    }
}

fn unreadable(to: &Target, error: &dyn Error) -> CallError {
    CallError::Unknown(format!("reading node {}'s answer: {}", to.id, chain(error)))
}

fn refusal(to: &Target, status: StatusCode, body: &Bytes) -> CallError {
    let text: String = String::from_utf8_lossy(body).chars().take(200).collect();
    let text = format!("node {} at {} answers {status}: {text}", to.id, to.address);
    // The routes answer only 200 once they have begun, and a client's error comes before.
    if status.is_client_error() || status == StatusCode::SERVICE_UNAVAILABLE {
        CallError::NotDone(text)
    } else {
        CallError::Unknown(text)
    }
}

/// What is at the bottom of an error: what lies above is the client's own affair.
pub(super) fn bottom(error: &dyn Error) -> String {
    let mut last = error;
    while let Some(cause) = last.source() {
        last = cause;
    }
    last.to_string()
}

/// An error with its causes, in one line.
pub(super) fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        // Writing to a string doesn't fail.
        let _ = write!(text, ": {error}");
        cause = error.source();
    }
    text
}
