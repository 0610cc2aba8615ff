//! Node controller: marks nodes whose agent is silent, and frees shards that died with them.

use std::time::Duration;

use exo_crds::{Node, Shard, event::Occurrence};
use exo_plan::{Action, Heartbeats, heartbeat_lost, release_lost};
use exo_recorder::Recorder;
use futures::StreamExt as _;
use k8s_openapi::{apimachinery::pkg::apis::meta::v1::Time, jiff::Timestamp};
use kube::{
    Api, Client, ResourceExt as _,
    api::{Patch, PatchParams},
    runtime::{
        WatchStreamExt as _,
        watcher::{self, watcher},
    },
};
use serde_json::json;
use tokio::{
    sync::watch,
    time::{Instant, MissedTickBehavior, interval},
};
use tokio_util::sync::CancellationToken;

use crate::{
    read,
    trigger::Leaving,
    write::{WriteError, carry_out},
};

/// Short against the heartbeat limit, so that it alone decides how soon a loss is noticed.
const PERIOD: Duration = Duration::from_secs(1);

pub(crate) async fn run(
    client: Client,
    leadership: watch::Receiver<bool>,
    events: Recorder,
    shutdown: CancellationToken,
) {
    let start = Instant::now();
    let mut heartbeats = Heartbeats::default();
    let mut ticks = interval(PERIOD);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut leaving = Leaving::default();
    // There may be very many shards: all of them are never here at once.
    let shards = watcher(Api::<Shard>::all(client.clone()), watcher::Config::default());
    let mut shards = Box::pin(shards.default_backoff());
    loop {
        tokio::select! {
            // Cancel-safe: nothing has been started yet in this round.
            () = shutdown.cancelled() => return,
            // Cancel-safe: what is not taken comes again.
            Some(event) = shards.next() => {
                match event {
                    Ok(event) => leaving.see(event),
                    Err(error) => tracing::debug!(%error, "watch interrupted"),
                }
                continue;
            }
            _ = ticks.tick() => {}
        }
        if !*leadership.borrow() {
            heartbeats = Heartbeats::default();
            continue;
        }
        let at = start.elapsed();
        for lost in look(&client, &leadership, &mut heartbeats, &leaving, at).await {
            let note = "no sign of life from its agent: its shards are placed elsewhere";
            events.record(&lost, Occurrence::warning("NodeLost", note));
        }
    }
}

/// One round; returns the nodes that it found lost. A write that fails is the matter of its own node
/// or shard: the next round tries it again, and the others are not held up.
async fn look(
    client: &Client,
    leadership: &watch::Receiver<bool>,
    heartbeats: &mut Heartbeats,
    leaving: &Leaving,
    at: Duration,
) -> Vec<Node> {
    let api: Api<Node> = Api::all(client.clone());
    let nodes = match read::all(&api).await {
        Ok(nodes) => nodes,
        Err(error) => {
            // Lists are asked of a quorum: without one, agents could not write either, so every
            // node gets a full limit again.
            *heartbeats = Heartbeats::default();
            report(&WriteError::new("reading nodes", error));
            return Vec::new();
        }
    };
    let overdue = heartbeats.observe(&nodes, at);
    let mut lost = Vec::new();
    for node in nodes.iter().filter(|node| overdue.contains(&node.name_any())) {
        if *leadership.borrow() {
            match mark_lost(&api, node).await {
                Ok(true) => lost.push(node.clone()),
                Ok(false) => {}
                Err(error) => report(&error),
            }
        }
    }
    for action in release_lost(&nodes, leaving.shards()) {
        let Action::Release { namespace, name, .. } = action else { continue };
        if let Err(error) = release(client, leadership, &nodes, &namespace, &name).await {
            report(&error);
        }
    }
    lost
}

/// Releases one shard, if that is what it needs when it is read anew.
async fn release(
    client: &Client,
    leadership: &watch::Receiver<bool>,
    nodes: &[Node],
    namespace: &str,
    name: &str,
) -> Result<(), WriteError> {
    let api: Api<Shard> = Api::namespaced(client.clone(), namespace);
    let shard = api.get_opt(name).await;
    let shard = shard.map_err(|e| WriteError::new(format!("reading shard {name}"), e))?;
    for action in release_lost(nodes, &shard) {
        if *leadership.borrow() {
            carry_out(client, "", &action).await?;
        }
    }
    Ok(())
}

/// Writes that an overdue node is lost; `false` if that is known already.
async fn mark_lost(api: &Api<Node>, node: &Node) -> Result<bool, WriteError> {
    let Some(conditions) = heartbeat_lost(node, &Time(Timestamp::now())) else {
        return Ok(false);
    };
    let name = node.name_any();
    let patch = json!({
        "metadata": {"resourceVersion": node.metadata.resource_version},
        "status": {"conditions": conditions},
    });
    api.patch_status(&name, &PatchParams::default(), &Patch::Merge(patch))
        .await
        .map_err(|e| WriteError::new(format!("marking node {name}"), e))?;
    tracing::warn!(node = name, "no heartbeat: the node counts as lost");
    Ok(true)
}

/// A conflict means that somebody else was faster: the next round sees what they wrote.
fn report(error: &WriteError) {
    if !error.is_conflict() {
        let cause = exo_recorder::problem(&*error.source);
        tracing::warn!(%error, cause, "node controller will try again");
    }
}

#[cfg(test)]
mod tests {
    use axum::{
        extract::Request,
        http::{Method, StatusCode},
        middleware::{self, Next},
        response::IntoResponse as _,
    };
    use exo_apiserver::{ApiServer, Identity, app, in_process};
    use exo_plan::HEARTBEAT_LIMIT;
    use exo_store::Store;
    use kube::api::{ListParams, PostParams};

    use super::*;

    /// A client of an API server that refuses every write about `refused`, and every list while
    /// `down` is set.
    fn client(refused: &'static str, down: watch::Receiver<bool>) -> Client {
        let registry = prometheus::Registry::new();
        let server = ApiServer::new(Store::memory(), &exo_crds::all(), &registry).unwrap();
        let identity =
            Identity { name: "test".to_owned(), groups: vec!["system:masters".to_owned()] };
        let gate = move |request: Request, next: Next| {
            let about = request.uri().path().contains(refused);
            let is_list = request.uri().path().ends_with("/nodes");
            let status = match *request.method() {
                Method::PATCH if about => Some(StatusCode::UNPROCESSABLE_ENTITY),
                Method::GET if is_list && *down.borrow() => Some(StatusCode::SERVICE_UNAVAILABLE),
                _ => None,
            };
            async move {
                match status {
                    Some(status) => status.into_response(),
                    None => next.run(request).await,
                }
            }
        };
        let router = in_process(app(server), identity).layer(middleware::from_fn(gate));
        Client::new(router, "default")
    }

    /// A node that was well a while ago, and whose writes about `Ready` go past the gate.
    async fn node(client: &Client, name: &str) {
        let api: Api<Node> = Api::all(client.clone());
        let node = Node::new(name, exo_crds::NodeSpec::default());
        let mut node = api.create(&PostParams::default(), &node).await.unwrap();
        let now = Time(Timestamp::UNIX_EPOCH);
        node.status = Some(
            serde_json::from_value(json!({
                "lastHeartbeatTime": "2026-01-02T03:04:05.000000Z",
                "conditions": [exo_crds::condition("Ready", true, "AgentReady", "x", &now)],
            }))
            .unwrap(),
        );
        api.replace_status(name, &PostParams::default(), &node).await.unwrap();
    }

    async fn ready(client: &Client, name: &str) -> String {
        let node = Api::<Node>::all(client.clone()).get(name).await.unwrap();
        node.status.unwrap().conditions[0].status.clone()
    }

    /// What a watch would have told by now.
    async fn leaving(client: &Client) -> Leaving {
        let mut leaving = Leaving::default();
        let shards: Api<Shard> = Api::all(client.clone());
        for shard in shards.list(&ListParams::default()).await.unwrap() {
            leaving.see(watcher::Event::Apply(shard));
        }
        leaving
    }

    /// Deleted, but held by an agent that is gone.
    async fn dying_shard(client: &Client, name: &str, node: &str) {
        let api: Api<Shard> = Api::namespaced(client.clone(), "default");
        let mut shard = crate::testing::shard(name, node);
        shard.metadata.finalizers = Some(vec![exo_crds::SHARD_FINALIZER.to_owned()]);
        api.create(&PostParams::default(), &shard).await.unwrap();
        api.delete(name, &kube::api::DeleteParams::default()).await.unwrap();
    }

    #[tokio::test]
    async fn one_refused_write_holds_up_nobody_else() {
        let (_up, down) = watch::channel(false);
        let client = client("stubborn", down);
        let (_lead, leads) = watch::channel(true);
        for name in ["a-stubborn", "b"] {
            node(&client, name).await;
        }
        let (mut heartbeats, nobody) = (Heartbeats::default(), Leaving::default());
        look(&client, &leads, &mut heartbeats, &nobody, Duration::ZERO).await;
        assert_eq!(ready(&client, "b").await, "True");
        look(&client, &leads, &mut heartbeats, &nobody, HEARTBEAT_LIMIT).await;
        assert_eq!(ready(&client, "a-stubborn").await, "True", "its write was refused");
        assert_eq!(ready(&client, "b").await, "Unknown");

        // One that dies later is noticed in its own time, though refusals go on.
        node(&client, "c").await;
        look(&client, &leads, &mut heartbeats, &nobody, HEARTBEAT_LIMIT).await;
        look(&client, &leads, &mut heartbeats, &nobody, HEARTBEAT_LIMIT * 3 / 2).await;
        assert_eq!(ready(&client, "c").await, "True");
        for shard in ["x-stubborn", "y"] {
            dying_shard(&client, shard, "b").await;
        }
        let leaving = leaving(&client).await;
        look(&client, &leads, &mut heartbeats, &leaving, HEARTBEAT_LIMIT * 2).await;
        assert_eq!(ready(&client, "c").await, "Unknown");
        let left = Api::<Shard>::all(client.clone()).list(&ListParams::default()).await.unwrap();
        let left: Vec<String> = left.iter().map(|shard| shard.name_any()).collect();
        assert_eq!(left, ["x-stubborn"]);
    }

    #[tokio::test]
    async fn while_nothing_can_be_read_no_time_runs() {
        let (outage, down) = watch::channel(false);
        let client = client("nobody", down);
        let (_lead, leads) = watch::channel(true);
        node(&client, "a").await;
        let (mut heartbeats, nobody) = (Heartbeats::default(), Leaving::default());
        look(&client, &leads, &mut heartbeats, &nobody, Duration::ZERO).await;
        outage.send_replace(true);
        look(&client, &leads, &mut heartbeats, &nobody, HEARTBEAT_LIMIT).await;
        outage.send_replace(false);
        look(&client, &leads, &mut heartbeats, &nobody, HEARTBEAT_LIMIT).await;
        assert_eq!(ready(&client, "a").await, "True", "a full limit again");
        look(&client, &leads, &mut heartbeats, &nobody, 2 * HEARTBEAT_LIMIT).await;
        assert_eq!(ready(&client, "a").await, "Unknown");
    }

    #[tokio::test]
    async fn a_shard_that_changed_since_is_not_released() {
        let (_up, down) = watch::channel(false);
        let client = client("nobody", down);
        node(&client, "a").await;
        dying_shard(&client, "x", "a").await;
        let api: Api<Shard> = Api::namespaced(client.clone(), "default");
        let seen = api.get("x").await.unwrap();
        let decided = release_lost(&[], [&seen]);
        let patch = Patch::Merge(json!({"status": {"phase": "Stopping"}}));
        api.patch_status("x", &PatchParams::default(), &patch).await.unwrap();
        let error = carry_out(&client, "", &decided[0]).await.unwrap_err();
        assert!(error.is_conflict(), "{error:?}");
        let seen = api.get("x").await.unwrap();
        carry_out(&client, "", &release_lost(&[], [&seen])[0]).await.unwrap();
        assert!(api.get_opt("x").await.unwrap().is_none());
        carry_out(&client, "", &decided[0]).await.expect("what is gone is released");
    }
}
