//! `exoctl cordon`, `uncordon` and `drain`.

use std::{io::Write, time::Duration};

use anyhow::{bail, ensure};
use http::Method;
use serde_json::{Value, json};
use tokio::time::{Instant, sleep};

use super::{
    change_query, dry_run_suffix,
    select::{self, Found, checked},
    wait,
};
use crate::{
    cli::{Drain, DryRun, Goal, Nodes, Select},
    error::{Collector, refused},
    server::{Form, MERGE_PATCH, Server},
};

/// Before looking again at shards that were replaced while they were being deleted.
const LOOK_AGAIN: Duration = Duration::from_millis(200);

pub(super) async fn run(
    nodes: &Nodes,
    cordoned: bool,
    server: &Server,
    out: &mut dyn Write,
) -> anyhow::Result<()> {
    let mut failures = Collector::default();
    for node in find(nodes, server).await? {
        failures.note(set(server, &node, cordoned, None, out).await)?;
    }
    failures.finish()
}

async fn find<'s>(nodes: &Nodes, server: &'s Server) -> anyhow::Result<Vec<Found<'s>>> {
    let kind = server.own_kind("Node").await?;
    let Some(labels) = &nodes.labels else {
        let found = |name: &String| {
            // `node/studio-1` is as good as `studio-1`.
            let name = name.split_once('/').map_or(name.as_str(), |(_, name)| name);
            Ok(Found { kind, namespace: String::new(), name: checked(name)? })
        };
        return nodes.names.iter().map(found).collect();
    };
    let select = Select { labels: Some(labels.clone()), ..Select::default() };
    let items = select::list(server, kind, &select).await?;
    if items.is_empty() {
        bail!("no node matches `{labels}`");
    }
    Ok(items.iter().map(|item| select::of_object(server, kind, item)).collect())
}

async fn set(
    server: &Server,
    node: &Found<'_>,
    cordoned: bool,
    dry_run: Option<DryRun>,
    out: &mut dyn Write,
) -> anyhow::Result<()> {
    let now: Value = server.get(&node.path(), &[], Form::Json).await?;
    let done = if cordoned { "cordoned" } else { "uncordoned" };
    if (now["spec"]["unschedulable"] == true) == cordoned {
        writeln!(out, "{} already {done}", node.named())?;
    } else {
        let patch = json!({"spec": {"unschedulable": cordoned.then_some(true)}});
        let query = change_query("exoctl-cordon", dry_run);
        server.patch(&node.path(), MERGE_PATCH, &query, &patch).await?;
        writeln!(out, "{} {done}{}", node.named(), dry_run_suffix(dry_run))?;
    }
    Ok(out.flush()?)
}

pub(super) async fn drain(
    args: &Drain,
    server: &Server,
    out: &mut dyn Write,
) -> anyhow::Result<()> {
    let nodes = find(&args.nodes, server).await?;
    let mut failures = Collector::default();
    let mut cordoned = Vec::new();
    // All of them first: a shard of one must not move to another.
    for node in nodes {
        let set = set(server, &node, true, args.dry_run, out).await;
        cordoned.extend(failures.note(set)?.map(|()| node));
    }
    let deadline = Instant::now() + args.timeout;
    for node in cordoned {
        let emptied = empty(args, server, &node, deadline, out).await;
        if failures.note(emptied)?.is_some() {
            writeln!(out, "{} drained{}", node.named(), dry_run_suffix(args.dry_run))?;
            out.flush()?;
        }
    }
    failures.finish()
}

/// Whether the object that was meant is not there any more, or not under its name.
fn is_gone(error: &anyhow::Error) -> bool {
    refused(error).is_some_and(|refused| refused.is_not_found() || refused.is_conflict())
}

/// Deletes the node's shards until there are none: their controllers place the replicas anew, and
/// one of them may have placed a shard here just before the node was cordoned.
async fn empty(
    args: &Drain,
    server: &Server,
    node: &Found<'_>,
    deadline: Instant,
    out: &mut dyn Write,
) -> anyhow::Result<()> {
    let kind = server.own_kind("Shard").await?;
    let select = Select {
        fields: Some(format!("spec.node={}", node.name)),
        all_namespaces: true,
        ..Select::default()
    };
    let mut query = vec![("propagationPolicy", "Background")];
    query.extend(args.dry_run.map(|_| ("dryRun", "All")));
    loop {
        let shards = select::list(server, kind, &select).await?;
        if shards.is_empty() {
            return Ok(());
        }
        let mut gone = Vec::new();
        for object in &shards {
            let shard = select::of_object(server, kind, object);
            let uid = object["metadata"]["uid"].clone();
            // Another one that took its name meanwhile is looked at anew.
            let body = json!({"preconditions": {"uid": uid}});
            let is_going = object["metadata"]["deletionTimestamp"].is_string();
            if !is_going {
                match server.send(Method::DELETE, &shard.path(), &query, Some(&body)).await {
                    Err(error) if is_gone(&error) => continue,
                    deleted => deleted?,
                };
                let suffix = dry_run_suffix(args.dry_run);
                writeln!(out, "{} evicted{suffix}", shard.named())?;
                out.flush()?;
            }
            gone.push((shard, uid));
        }
        if args.dry_run.is_some() {
            return Ok(());
        }
        ensure!(Instant::now() < deadline, "shards kept coming back for {:?}", args.timeout);
        if gone.is_empty() {
            sleep(LOOK_AGAIN).await;
        }
        for (shard, uid) in gone {
            let target = wait::Target {
                kind,
                namespace: &shard.namespace,
                name: &shard.name,
                uid: Some(&uid),
                gives_up: false,
            };
            wait::wait_for(server, &target, &Goal::Delete, deadline, args.timeout).await?;
        }
    }
}
