//! Node controller: marks nodes whose agent is silent, and frees shards that died with them.

use std::time::Duration;

use exo_crds::{Node, Shard, event::Occurrence};
use exo_plan::{Heartbeats, heartbeat_lost, release_lost};
use exo_recorder::Recorder;
use k8s_openapi::{apimachinery::pkg::apis::meta::v1::Time, jiff::Timestamp};
use kube::{
    Api, Client, ResourceExt as _,
    api::{ListParams, Patch, PatchParams},
};
use serde_json::json;
use tokio::{
    sync::watch,
    time::{Instant, MissedTickBehavior, interval},
};
use tokio_util::sync::CancellationToken;

use crate::write::{WriteError, carry_out};

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
    loop {
        tokio::select! {
            // Cancel-safe: nothing has been started yet in this round.
            () = shutdown.cancelled() => return,
            _ = ticks.tick() => {}
        }
        if !*leadership.borrow() {
            heartbeats = Heartbeats::default();
            continue;
        }
        for lost in look(&client, &leadership, &mut heartbeats, start.elapsed()).await {
            let note = "no sign of life from its agent: its shards are placed elsewhere";
            events.record(&lost, Occurrence::warning("NodeLost", note));
        }
    }
}

/// One round; returns the nodes that it found lost. A write that fails is the matter of its own node or shard: the next round tries it
/// again, and the others are not held up.
async fn look(
    client: &Client,
    leadership: &watch::Receiver<bool>,
    heartbeats: &mut Heartbeats,
    at: Duration,
) -> Vec<Node> {
    let all = ListParams::default();
    let api: Api<Node> = Api::all(client.clone());
    let nodes = match api.list(&all).await {
        Ok(nodes) => nodes.items,
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
    let shards: Api<Shard> = Api::all(client.clone());
    let shards = match shards.list(&all).await {
        Ok(shards) => shards.items,
        Err(error) => {
            report(&WriteError::new("reading shards", error));
            return lost;
        }
    };
    for action in release_lost(&nodes, &shards) {
        if *leadership.borrow()
            && let Err(error) = carry_out(client, "", &action).await
        {
            report(&error);
        }
    }
    lost
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
        tracing::warn!(%error, cause = %error.source, "node controller will try again");
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
    use kube::api::PostParams;

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

    /// Deleted, but held by an agent that is gone.
    async fn dying_shard(client: &Client, name: &str, node: &str) {
        let api: Api<Shard> = Api::namespaced(client.clone(), "default");
        let shard = serde_json::from_value(json!({
            "apiVersion": "exo.dev/v1alpha1", "kind": "Shard",
            "metadata": {"name": name, "finalizers": [exo_crds::SHARD_FINALIZER]},
            "spec": {"instance": "chat", "replica": 0, "epoch": 1, "node": node, "rank": 0,
                "worldSize": 1, "sharding": "Pipeline", "layers": "0-7", "transport": "ring",
                "seed": 1, "contextLength": 128, "maxConcurrency": 4, "fastSynch": true,
                "model": {"name": "m", "source": {"path": "m"}, "modelType": "llama",
                          "layers": 8}},
        }))
        .unwrap();
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
        let mut heartbeats = Heartbeats::default();
        look(&client, &leads, &mut heartbeats, Duration::ZERO).await;
        assert_eq!(ready(&client, "b").await, "True");
        look(&client, &leads, &mut heartbeats, HEARTBEAT_LIMIT).await;
        assert_eq!(ready(&client, "a-stubborn").await, "True", "its write was refused");
        assert_eq!(ready(&client, "b").await, "Unknown");

        // One that dies later is noticed in its own time, though refusals go on.
        node(&client, "c").await;
        look(&client, &leads, &mut heartbeats, HEARTBEAT_LIMIT).await;
        look(&client, &leads, &mut heartbeats, HEARTBEAT_LIMIT * 3 / 2).await;
        assert_eq!(ready(&client, "c").await, "True");
        for shard in ["x-stubborn", "y"] {
            dying_shard(&client, shard, "b").await;
        }
        look(&client, &leads, &mut heartbeats, HEARTBEAT_LIMIT * 2).await;
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
        let mut heartbeats = Heartbeats::default();
        look(&client, &leads, &mut heartbeats, Duration::ZERO).await;
        outage.send_replace(true);
        look(&client, &leads, &mut heartbeats, HEARTBEAT_LIMIT).await;
        outage.send_replace(false);
        look(&client, &leads, &mut heartbeats, HEARTBEAT_LIMIT).await;
        assert_eq!(ready(&client, "a").await, "True", "a full limit again");
        look(&client, &leads, &mut heartbeats, 2 * HEARTBEAT_LIMIT).await;
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
