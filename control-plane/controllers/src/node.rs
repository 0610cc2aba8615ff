//! Node controller: marks nodes whose agent is silent, and frees shards that died with them.

use std::time::Duration;

use exo_crds::{Node, Shard};
use exo_plan::{Heartbeats, heartbeat_lost, release_lost};
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
        if let Err(error) = look(&client, &leadership, &mut heartbeats, start.elapsed()).await
            && !error.is_conflict()
        {
            // Agents could not write either: every node gets a full limit again.
            heartbeats = Heartbeats::default();
            tracing::warn!(%error, cause = %error.source, "node controller will try again");
        }
    }
}

async fn look(
    client: &Client,
    leadership: &watch::Receiver<bool>,
    heartbeats: &mut Heartbeats,
    at: Duration,
) -> Result<(), WriteError> {
    let api: Api<Node> = Api::all(client.clone());
    let all = ListParams::default();
    let nodes = api.list(&all).await.map_err(|e| WriteError::new("reading nodes", e))?.items;
    let overdue = heartbeats.observe(&nodes, at);
    for node in &nodes {
        let name = node.name_any();
        if !overdue.contains(&name) || !*leadership.borrow() {
            continue;
        }
        let Some(conditions) = heartbeat_lost(node, &Time(Timestamp::now())) else {
            continue;
        };
        tracing::warn!(node = name, "no heartbeat: the node counts as lost");
        let patch = json!({
            "metadata": {"resourceVersion": node.metadata.resource_version},
            "status": {"conditions": conditions},
        });
        api.patch_status(&name, &PatchParams::default(), &Patch::Merge(patch))
            .await
            .map_err(|e| WriteError::new(format!("marking node {name}"), e))?;
    }
    let shards: Api<Shard> = Api::all(client.clone());
    let shards = shards.list(&all).await.map_err(|e| WriteError::new("reading shards", e))?.items;
    for action in release_lost(&nodes, &shards) {
        if *leadership.borrow() {
            carry_out(client, "", &action).await?;
        }
    }
    Ok(())
}
