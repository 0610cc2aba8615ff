//! How a node becomes part of a cluster's control plane.
//!
//! It takes three steps, each of which may be repeated. The node gets its certificate like any
//! other node (`join.rs`). With that it asks for the key of the cluster's authority, over a
//! connection on which both sides have proved to belong to the cluster, and signs itself a
//! certificate of the control plane: only callers who have one are let near the replicated store.
//! Last, when it serves the API, it has itself added to the store's members.
//!
//! Never: who votes (that is the store's matter).

use std::{net::SocketAddr, sync::Arc, time::Duration};

use anyhow::{Context as _, anyhow, bail};
use axum::{
    Json, Router,
    extract::{ConnectInfo, DefaultBodyLimit, Request, State},
    http::StatusCode,
    middleware::{self, Next},
    response::{IntoResponse, Response},
    routing::{get, post},
};
use exo_store::{Member, Store};
use exo_trust::{
    Authority, GROUP_CONTROL_PLANE, GROUP_NODES, Peer, Subject, bootstrap_client, reqwest_client,
};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use serde_json::{Value, json};
use tokio::time::sleep;
use tracing::{info, warn};

use crate::{
    config::{Config, StoreChoice, own_address},
    data_dir::{DataDir, NODE_USER_PREFIX, Standing},
    join,
    presence::{self, is_there},
    reach,
};

pub(crate) const CLUSTER_PATH: &str = "/exo/v1/cluster";
const KEY_PATH: &str = "/exo/v1/control-plane/key";
pub(crate) const MEMBERS_PATH: &str = "/exo/v1/control-plane/members";
/// A request is an id and an address.
const MAX_BODY: usize = 16 * 1024;
/// For a question to a peer that changes nothing.
const ASK_LIMIT: Duration = Duration::from_secs(5);
/// A new member gets all of the store before the answer.
const ADD_LIMIT: Duration = Duration::from_secs(75);
/// Between two rounds of asking all peers.
const ASK_AGAIN: Duration = Duration::from_secs(1);

type Groups = &'static [&'static str];
/// Nodes that hold the store.
const MEMBERS: Groups = &[GROUP_CONTROL_PLANE];
/// All nodes: a certificate names one organisation.
const NODES: Groups = &[GROUP_NODES, GROUP_CONTROL_PLANE];

/// How a node of the control plane begins.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Start {
    /// With a cluster of its own.
    Found,
    /// With what is in its data directory.
    Resume,
    /// As a part of the cluster that these peers belong to.
    Join(Vec<String>),
}

/// What the flags and the data directory come to. `known` are the other members that this node knew
/// when it was last one itself: they have the state when its own is gone, and an empty cluster in
/// their name would take their nodes away.
pub(crate) fn start(
    standing: Standing,
    peers: &[String],
    known: &[String],
) -> anyhow::Result<Start> {
    match (standing, peers) {
        (Standing::Authority, []) if !known.is_empty() => {
            warn!(
                "this node's part of the store is gone: it joins its cluster again, through {} (to \
                 begin a new cluster instead, remove the whole data directory)",
                known.join(", ")
            );
            Ok(Start::Join(known.to_vec()))
        }
        (Standing::Nothing | Standing::Authority, []) => Ok(Start::Found),
        (Standing::ControlPlane, _) => Ok(Start::Resume),
        (Standing::Joining(asked), []) => Ok(Start::Join(asked)),
        (Standing::Agent, []) => bail!(
            "the data directory belongs to a node that runs models only. Go on like that with \
             `--no-control-plane --peers HOST:8443`, take part in the control plane with `--peers \
             HOST:8443`, or begin a cluster in another --data-dir"
        ),
        (
            Standing::Nothing | Standing::Authority | Standing::Joining(_) | Standing::Agent,
            peers,
        ) => Ok(Start::Join(peers.to_vec())),
    }
}

/// Whether a node may run models only with what is in its data directory.
pub(crate) fn check_agent(standing: &Standing) -> anyhow::Result<()> {
    match standing {
        Standing::Nothing | Standing::Agent => Ok(()),
        Standing::ControlPlane | Standing::Authority | Standing::Joining(_) => bail!(
            "the data directory holds a part of a cluster's control plane: leave out \
             --no-control-plane, or use another --data-dir. (For good: `exoctl delete node` this \
             one, and remove the directory.)"
        ),
    }
}

#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct ClusterInfo {
    name: String,
    /// The authority's certificate, PEM.
    ca: String,
    /// As which address (`IP:port`) the node that answers is known to the others.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    address: Option<SocketAddr>,
    /// The id under which it is a member, where nodes hold the store.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) member: Option<u64>,
}

#[derive(Debug, Serialize, Deserialize)]
struct KeyAnswer {
    /// PEM.
    ca_key: String,
    store: StoreKind,
}

/// Where a cluster keeps its state. All of its nodes must agree.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum StoreKind {
    Raft,
    Etcd,
}

impl StoreKind {
    pub(crate) fn of(choice: &StoreChoice) -> Self {
        match choice {
            StoreChoice::Raft => Self::Raft,
            StoreChoice::Etcd(_) => Self::Etcd,
        }
    }

    /// Whether a node with this choice may join a cluster with that one.
    fn check(self, cluster: Self) -> anyhow::Result<()> {
        match (self, cluster) {
            (Self::Raft, Self::Etcd) => bail!(
                "the cluster keeps its state in etcd: start this node with the same --store as the \
                 others"
            ),
            (Self::Etcd, Self::Raft) => {
                bail!("the cluster keeps its state on its nodes: leave out --store")
            }
            (Self::Raft, Self::Raft) | (Self::Etcd, Self::Etcd) => Ok(()),
        }
    }
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct NewMember {
    id: u64,
    /// `IP:port` of its API.
    address: String,
}

#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct MemberInfo {
    pub(crate) id: u64,
    pub(crate) name: String,
    pub(crate) address: String,
    pub(crate) voter: bool,
}

/// What a node knows of the control plane.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Members {
    /// The one that answers leads the store.
    pub(crate) leads: bool,
    pub(crate) members: Vec<MemberInfo>,
}

/// What the routes need.
pub(crate) struct Host {
    pub(crate) store: Store,
    pub(crate) cluster: String,
    pub(crate) kind: StoreKind,
    pub(crate) ca: String,
    pub(crate) ca_key: String,
    /// Of this node's API, as others are told it.
    pub(crate) address: SocketAddr,
    /// Of this node, where nodes hold the store.
    pub(crate) node_id: Option<u64>,
    /// Takes answers of this cluster's nodes alone.
    pub(crate) nodes: reqwest::Client,
}

impl Host {
    pub(crate) fn new(
        (store, kind): (Store, StoreKind),
        cluster: &str,
        authority: &Authority,
        (node_id, address): (Option<u64>, SocketAddr),
        nodes: reqwest::Client,
    ) -> Self {
        Self {
            nodes,
            address,
            node_id,
            store,
            kind,
            cluster: cluster.to_owned(),
            ca: authority.certificate_pem().to_owned(),
            ca_key: authority.key_pem().to_owned(),
        }
    }
}

/// The routes, for the API port; and the store's own, for members of the control plane.
pub(crate) fn routes(host: Host) -> Router {
    let raft =
        exo_store::raft_routes(&host.store).layer(middleware::from_fn_with_state(MEMBERS, only));
    let members = Router::new()
        .route(MEMBERS_PATH, post(add_member))
        .layer(middleware::from_fn_with_state(MEMBERS, only));
    let nodes = Router::new()
        .route(KEY_PATH, post(hand_over_key))
        .route(MEMBERS_PATH, get(list_members))
        .layer(middleware::from_fn_with_state(NODES, only));
    Router::new()
        .route(CLUSTER_PATH, get(cluster))
        .merge(members)
        .merge(nodes)
        .layer(DefaultBodyLimit::max(MAX_BODY))
        .with_state(Arc::new(host))
        .merge(raft)
}

/// Refuses callers whose certificate names none of these groups.
async fn only(
    State(groups): State<Groups>,
    ConnectInfo(peer): ConnectInfo<Peer>,
    request: Request,
    next: Next,
) -> Response {
    match peer.certificate {
        None => (StatusCode::UNAUTHORIZED, "a client certificate is needed").into_response(),
        Some(subject) if subject.groups.iter().any(|g| groups.contains(&g.as_str())) => {
            next.run(request).await
        }
        Some(_) => {
            (StatusCode::FORBIDDEN, format!("only for {}", groups.join(", "))).into_response()
        }
    }
}

async fn cluster(State(host): State<Arc<Host>>) -> Json<ClusterInfo> {
    let (address, member) = (Some(host.address), host.node_id);
    Json(ClusterInfo { name: host.cluster.clone(), ca: host.ca.clone(), address, member })
}

async fn hand_over_key(
    State(host): State<Arc<Host>>,
    ConnectInfo(peer): ConnectInfo<Peer>,
) -> Json<KeyAnswer> {
    let node = node_name(peer.certificate.as_ref());
    info!(node, from = %peer.address, "node joins the control plane: it gets the authority's key");
    Json(KeyAnswer { ca_key: host.ca_key.clone(), store: host.kind })
}

async fn list_members(State(host): State<Arc<Host>>) -> Json<Members> {
    let info = |member: Member| MemberInfo {
        id: member.id,
        name: member.name,
        address: member.address,
        voter: member.is_voter,
    };
    // A leader that was cut off may believe that it still leads: the others confirm it first.
    let leads = host.store.is_leader() && host.store.current_revision().await.is_ok();
    let members = host.store.members().into_iter().map(info).collect();
    Json(Members { leads, members })
}

async fn add_member(
    State(host): State<Arc<Host>>,
    ConnectInfo(peer): ConnectInfo<Peer>,
    Json(new): Json<NewMember>,
) -> Response {
    let name = node_name(peer.certificate.as_ref());
    let mut same_name = host.store.members();
    same_name.retain(|member| member.name == name && member.id != new.id);
    for old in &same_name {
        let at = (old.id, &*old.address);
        if Some(old.id) == host.node_id || is_there(&host.nodes, at, presence::LIMIT).await {
            let body = Json(json!({"error": join::taken(&name)}));
            return (StatusCode::CONFLICT, body).into_response();
        }
    }
    let added = async {
        // A machine whose data was lost comes back under its name: what it was before is gone.
        for old in same_name {
            warn!(node = name, id = old.id, "replacing a member of the same name");
            host.store.remove_node(old.id).await?;
        }
        host.store.add_learner(new.id, &name, &new.address).await
    };
    match added.await {
        Ok(()) => {
            info!(node = name, address = new.address, "node is a member of the control plane");
            let members = host.store.members();
            let mixed = one_machine_only(members.iter().map(|m| (&*m.name, &*m.address)));
            if let Some(text) = &mixed {
                warn!("{text}");
            }
            Json(json!({"warning": mixed})).into_response()
        }
        Err(error) => {
            warn!(node = name, %error, "node could not be made a member of the control plane");
            let body = Json(json!({"error": error.to_string()}));
            (StatusCode::SERVICE_UNAVAILABLE, body).into_response()
        }
    }
}

/// What is wrong where some nodes (name and address) are known by loopback addresses and others are
/// not: on each machine such an address is that machine's own.
fn one_machine_only<'a>(nodes: impl Iterator<Item = (&'a str, &'a str)>) -> Option<String> {
    let is_loopback = |(_, address): &(&str, &str)| {
        address.parse::<SocketAddr>().is_ok_and(|address| address.ip().is_loopback())
    };
    let (here, elsewhere): (Vec<_>, Vec<_>) = nodes.partition(is_loopback);
    let ((name, address), _) = (here.first()?, elsewhere.first()?);
    Some(format!(
        "node {name} is known to the others as {address}, which no other machine reaches: start it \
         again with --listen and an address of the network"
    ))
}

fn node_name(subject: Option<&Subject>) -> String {
    let name = subject.map_or("", |subject| subject.name.as_str());
    name.strip_prefix(NODE_USER_PREFIX).unwrap_or(name).to_owned()
}

/// The first two steps: afterwards the authority is in the data directory.
pub(crate) async fn adopt(
    data: &DataDir,
    peers: &[String],
    (name, cluster): (&str, &str),
    kind: StoreKind,
) -> anyhow::Result<()> {
    let first = if data.has_current_identity(name) {
        join::first_member(&data.tls(), peers).await
    } else {
        join::join_first(data, peers, (name, cluster)).await?
    };
    let client = reqwest_client(&data.tls())?;
    let mut failures = Vec::new();
    for peer in std::iter::once(first).chain(peers.iter().map(String::as_str)) {
        let request = client.post(format!("https://{peer}{KEY_PATH}")).timeout(ASK_LIMIT);
        match ask::<KeyAnswer>(request).await {
            Ok(answer) => {
                kind.check(answer.store)?;
                data.begin_joining(peers)?;
                return data.adopt_authority(&answer.ca_key);
            }
            Err(error) => failures.push(format!("{peer}: {error:#}")),
        }
    }
    failures.dedup();
    bail!("no peer let this node into the control plane\n  {}", failures.join("\n  "))
}

/// The last step, once this node serves the API: has the store's leader add it. Peers that don't
/// answer are asked again for ever; the log says so.
///
/// # Errors
/// When this node's name is another one's.
pub(crate) async fn become_member(
    data: &DataDir,
    peers: &[String],
    (id, address): (u64, &str),
) -> anyhow::Result<()> {
    let client = reqwest_client(&data.tls())?;
    let mut complained = false;
    loop {
        for peer in peers {
            let new = NewMember { id, address: address.to_owned() };
            let url = format!("https://{peer}{MEMBERS_PATH}");
            match ask::<Value>(client.post(url).json(&new).timeout(ADD_LIMIT)).await {
                Ok(answer) => {
                    if let Some(text) = answer["warning"].as_str() {
                        warn!("{text}");
                    }
                    return data.end_joining();
                }
                Err(error) if error.is::<Conflict>() => return Err(error),
                Err(error) if !complained => {
                    warn!(peer, "can't join the control plane yet: {error:#}");
                }
                Err(_) => {}
            }
        }
        complained = true;
        sleep(ASK_AGAIN).await;
    }
}

/// Another node on this machine may be named as `localhost` to this one, but the others must be told
/// an address that works everywhere, unless the peer is known as loopback itself.
pub(crate) async fn settle_address(config: &mut Config, peers: &[String]) -> anyhow::Result<()> {
    if !std::mem::take(&mut config.is_loopback_by_peer) {
        return Ok(());
    }
    let client = bootstrap_client()?;
    for peer in peers {
        let request = client.get(format!("https://{peer}{CLUSTER_PATH}")).timeout(ASK_LIMIT);
        if let Ok(ClusterInfo { address: Some(known), .. }) = ask(request).await {
            if !known.ip().is_loopback() {
                config.address = own_address(Some(&known.to_string()));
            }
            return Ok(());
        }
    }
    config.address = own_address(None);
    Ok(())
}

/// Whether a peer belongs to the cluster whose data this node has; peers that don't answer prove
/// nothing.
pub(crate) async fn check_same_cluster(ca: &str, peers: &[String]) -> anyhow::Result<()> {
    let client = bootstrap_client()?;
    for peer in peers {
        let request = client.get(format!("https://{peer}{CLUSTER_PATH}")).timeout(ASK_LIMIT);
        match ask::<ClusterInfo>(request).await {
            Ok(info) if info.ca.trim() != ca.trim() => bail!(
                "the data directory belongs to another cluster than {peer} (`{}`): to join that \
                 one, give this node another --data-dir; to go on with its own, leave out --peers",
                info.name
            ),
            Ok(_) => return Ok(()),
            Err(_) => {}
        }
    }
    Ok(())
}

/// What a node of the control plane says of its members.
pub(crate) async fn members_at(client: &reqwest::Client, address: &str) -> anyhow::Result<Members> {
    ask(client.get(format!("https://{address}{MEMBERS_PATH}")).timeout(ASK_LIMIT)).await
}

/// Asking again can't help.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Conflict(String);

async fn ask<T: DeserializeOwned>(request: reqwest::RequestBuilder) -> anyhow::Result<T> {
    let response = request.send().await.map_err(|error| anyhow!(reach::cause(&error)))?;
    let status = response.status();
    if !status.is_success() {
        let text = response.text().await.unwrap_or_default();
        let error = serde_json::from_str::<Value>(&text)
            .ok()
            .and_then(|value| value["error"].as_str().map(str::to_owned));
        let text = error.unwrap_or_else(|| format!("answered {status} {text}"));
        match status {
            StatusCode::CONFLICT => bail!(Conflict(text)),
            _ => bail!(text),
        }
    }
    response.json().await.context("sent an unreadable answer")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_nodes_keep_the_state_in_one_place() {
        use StoreKind::{Etcd, Raft};
        Raft.check(Raft).unwrap();
        Etcd.check(Etcd).unwrap();
        assert!(Raft.check(Etcd).unwrap_err().to_string().contains("same --store"));
        assert!(Etcd.check(Raft).unwrap_err().to_string().contains("leave out --store"));
        assert_eq!(serde_json::to_string(&Etcd).unwrap(), r#""etcd""#);
    }

    #[test]
    fn loopback_and_other_addresses_do_not_mix() {
        let text = |nodes: &[(&'static str, &'static str)]| one_machine_only(nodes.iter().copied());
        let (here, lan) = (("mac-1", "127.0.0.1:8443"), ("mac-2", "192.168.1.7:8443"));
        assert_eq!(text(&[here, ("mac-2", "127.0.0.1:8444")]), None);
        assert_eq!(text(&[lan, ("mac-3", "10.0.0.1:1")]), None);
        let mixed = text(&[lan, here]).unwrap();
        assert!(
            mixed.starts_with("node mac-1 is known to the others as 127.0.0.1:8443"),
            "{mixed}"
        );
    }

    #[test]
    fn a_data_directory_is_never_used_for_something_else() {
        let start = |standing, peers: &[String]| start(standing, peers, &[]);
        let peers = ["a:1".to_owned()];
        let joining = || Standing::Joining(vec!["b:2".to_owned()]);
        assert_eq!(start(Standing::Nothing, &[]).unwrap(), Start::Found);
        assert_eq!(start(Standing::Nothing, &peers).unwrap(), Start::Join(peers.to_vec()));
        assert_eq!(start(Standing::Authority, &[]).unwrap(), Start::Found);
        let known = ["c:3".to_owned()];
        let again = super::start(Standing::Authority, &[], &known).unwrap();
        assert_eq!(again, Start::Join(known.to_vec()), "others have the state");
        assert_eq!(super::start(Standing::ControlPlane, &[], &known).unwrap(), Start::Resume);
        assert_eq!(start(Standing::Authority, &peers).unwrap(), Start::Join(peers.to_vec()));
        assert_eq!(start(Standing::ControlPlane, &[]).unwrap(), Start::Resume);
        assert_eq!(start(Standing::ControlPlane, &peers).unwrap(), Start::Resume);
        assert_eq!(start(joining(), &[]).unwrap(), Start::Join(vec!["b:2".to_owned()]));
        assert_eq!(start(joining(), &peers).unwrap(), Start::Join(peers.to_vec()));
        assert_eq!(start(Standing::Agent, &peers).unwrap(), Start::Join(peers.to_vec()));
        let error = start(Standing::Agent, &[]).unwrap_err().to_string();
        assert!(error.contains("--no-control-plane --peers"), "{error}");

        check_agent(&Standing::Nothing).unwrap();
        check_agent(&Standing::Agent).unwrap();
        check_agent(&joining()).unwrap_err();
        let error = check_agent(&Standing::ControlPlane).unwrap_err().to_string();
        assert!(error.contains("exoctl delete node"), "{error}");
    }
}
