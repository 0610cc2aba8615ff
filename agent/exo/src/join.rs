//! How a node gets its certificate: `POST /exo/v1/join` on the API port, which needs no client
//! certificate. What a node of the control plane is given on top is the matter of `control.rs`.
//!
//! Without a join token everybody on the network may join, as the log says at start. The new node
//! trusts the first answer; from then on it trusts that cluster's authority alone. A name that
//! belongs to a live node is given again only to a caller who shows that node's certificate.

use std::{sync::Arc, time::Duration};

use anyhow::{Context as _, bail};
use axum::{
    Json, Router,
    extract::{ConnectInfo, DefaultBodyLimit, State, rejection::JsonRejection},
    http::StatusCode,
    response::{IntoResponse, Response},
    routing::post,
};
use exo_crds::Node;
use exo_store::Store;
use exo_trust::{Authority, Issued, Peer, Request, TlsPaths, bootstrap_client, reqwest_client};
use kube::{Api, Client};
use serde::{Deserialize, Serialize};
use serde_json::json;
use tracing::{info, warn};

use crate::{
    config::checked_name,
    data_dir::{DataDir, certificate_addresses, node_subject, now_s},
    presence::{self, is_there},
    reach,
};

pub(crate) const PATH: &str = "/exo/v1/join";
/// A request is one key and a few addresses.
const MAX_BODY: usize = 64 * 1024;
/// How long a peer may take to say that it is there.
const PROBE_LIMIT: Duration = Duration::from_secs(5);
/// A peer that accepts the call and never answers must not keep the others from being asked.
const ASK_LIMIT: Duration = Duration::from_secs(15);

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct JoinRequest {
    name: String,
    cluster: String,
    /// PKCS #10, PEM.
    csr: String,
}

#[derive(Debug, Serialize, Deserialize)]
struct JoinResponse {
    /// The cluster's authority, PEM.
    ca: String,
    /// The node's certificate, PEM.
    certificate: String,
}

/// What the route needs.
pub(crate) struct Host {
    pub(crate) authority: Authority,
    pub(crate) cluster: String,
    /// The node that answers; its name is never given away.
    pub(crate) own_name: String,
    pub(crate) client: Client,
    pub(crate) store: Store,
    /// Takes answers of this cluster's nodes alone.
    pub(crate) nodes: reqwest::Client,
}

/// The route, for the API port.
pub(crate) fn routes(host: Host) -> Router {
    Router::new()
        .route(PATH, post(join))
        .layer(DefaultBodyLimit::max(MAX_BODY))
        .with_state(Arc::new(host))
}

struct Refusal(StatusCode, String);

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        (self.0, Json(json!({"error": self.1}))).into_response()
    }
}

async fn join(
    State(host): State<Arc<Host>>,
    ConnectInfo(peer): ConnectInfo<Peer>,
    request: Result<Json<JoinRequest>, JsonRejection>,
) -> Result<Json<JoinResponse>, Refusal> {
    let bad = |message: String| Refusal(StatusCode::BAD_REQUEST, message);
    let Json(request) = request.map_err(|rejection| bad(rejection.body_text()))?;
    let name = checked_name(&request.name).map_err(|error| bad(format!("name: {error}")))?;
    if request.cluster != host.cluster {
        let text = format!("this is cluster `{}`, not `{}`", host.cluster, request.cluster);
        return Err(Refusal(StatusCode::CONFLICT, text));
    }
    let subject = node_subject(&name);
    let is_itself = peer.certificate.as_ref().is_some_and(|shown| shown.name == subject.name);
    if name == host.own_name {
        return Err(Refusal(StatusCode::CONFLICT, there(&name)));
    }
    let taken_by_another = !is_itself
        && (is_alive(&host.client, &name).await.map_err(internal)?
            || is_member_there(&host, &name).await);
    if taken_by_another {
        return Err(Refusal(StatusCode::CONFLICT, taken(&name)));
    }
    let certificate = host
        .authority
        // Only the address that was seen: a node must not be able to pose as another.
        .sign(&request.csr, &subject, &certificate_addresses(peer.address.ip()), now_s())
        .map_err(|error| bad(format!("csr: {error}")))?;
    info!(node = name, from = %peer.address, "node joined");
    Ok(Json(JoinResponse { ca: host.authority.certificate_pem().to_owned(), certificate }))
}

fn there(name: &str) -> String {
    format!("a node named `{name}` is already there: choose another --name")
}

/// What a node is told whose name another one has.
pub(crate) fn taken(name: &str) -> String {
    let there = there(name);
    format!("{there}; if that node is gone for good, `exoctl delete node {name}` first")
}

#[expect(clippy::needless_pass_by_value, reason = "used with map_err")]
fn internal(error: kube::Error) -> Refusal {
    warn!(%error, "a join could not be checked");
    Refusal(StatusCode::SERVICE_UNAVAILABLE, "the cluster is not ready: try again".to_owned())
}

async fn is_alive(client: &Client, name: &str) -> Result<bool, kube::Error> {
    let node = Api::<Node>::all(client.clone()).get_opt(name).await?;
    let conditions = node.and_then(|node| node.status).unwrap_or_default().conditions;
    Ok(conditions.iter().any(|c| c.type_ == "Ready" && c.status == "True"))
}

/// A member of the control plane may run no agent, and has no Node then: it is asked itself.
async fn is_member_there(host: &Host, name: &str) -> bool {
    match host.store.members().into_iter().find(|m| m.name == name) {
        Some(member) => is_there(&host.nodes, (member.id, &member.address), presence::LIMIT).await,
        None => false,
    }
}

/// The first peer that answers a member; the first of all when none does, for it may come back.
pub(crate) async fn first_member<'a>(tls: &TlsPaths, peers: &'a [String]) -> &'a str {
    let Ok(client) = reqwest_client(tls) else {
        return &peers[0];
    };
    for peer in peers {
        let probe = client.get(format!("https://{peer}/readyz")).timeout(PROBE_LIMIT);
        match probe.send().await.and_then(reqwest::Response::error_for_status) {
            Ok(_) => return peer,
            Err(error) => warn!(peer, "does not answer: {}", reach::cause(&error)),
        }
    }
    &peers[0]
}

/// Asks the peers in turn for a certificate and stores it. Returns the one that gave it.
pub(crate) async fn join_first<'a>(
    data: &DataDir,
    peers: &'a [String],
    (name, cluster): (&str, &str),
) -> anyhow::Result<&'a str> {
    let mut failures = Vec::new();
    for peer in peers {
        match join_one(data, peer, (name, cluster)).await {
            Ok(()) => {
                info!(peer, "joined the cluster");
                return Ok(peer);
            }
            Err(error) => failures.push(format!("{peer}: {error:#}")),
        }
    }
    bail!("no peer let this node join\n  {}", failures.join("\n  "))
}

async fn join_one(data: &DataDir, peer: &str, (name, cluster): (&str, &str)) -> anyhow::Result<()> {
    let request = Request::new()?;
    let body =
        JoinRequest { name: name.to_owned(), cluster: cluster.to_owned(), csr: request.csr_pem };
    // A member that renews shows who it is; a newcomer has nothing to show.
    let client =
        if data.has_usable_identity() { reqwest_client(&data.tls())? } else { bootstrap_client()? };
    let answer = ask(&client, peer, &body).await?;
    let issued = Issued { certificate_pem: answer.certificate, key_pem: request.key_pem };
    data.write_identity(&answer.ca, &issued)
}

/// A new certificate (PEM) for a member's key (PEM), from the first peer that gives one.
pub(crate) async fn renew(
    tls: &TlsPaths,
    peers: &[String],
    (name, cluster): (&str, &str),
    key_pem: String,
) -> anyhow::Result<String> {
    let client = reqwest_client(tls)?;
    let csr = Request::of_key(key_pem)?.csr_pem;
    let body = JoinRequest { name: name.to_owned(), cluster: cluster.to_owned(), csr };
    let mut failures = Vec::new();
    for peer in peers {
        match ask(&client, peer, &body).await {
            Ok(answer) => return Ok(answer.certificate),
            Err(error) => failures.push(format!("{peer}: {error:#}")),
        }
    }
    bail!("{}", failures.join("; "))
}

async fn ask(
    client: &reqwest::Client,
    peer: &str,
    body: &JoinRequest,
) -> anyhow::Result<JoinResponse> {
    let request = client.post(format!("https://{peer}{PATH}")).timeout(ASK_LIMIT).json(body);
    let response = reach::send(peer, request, ASK_LIMIT).await?;
    let status = response.status();
    if !status.is_success() {
        let value: serde_json::Value = response.json().await.unwrap_or_default();
        match value["error"].as_str() {
            Some(text) => bail!("{text}"),
            None => bail!("answered {status}: not an exo API port?"),
        }
    }
    response.json().await.context("sent an unreadable answer")
}
