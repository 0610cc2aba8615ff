//! Garbage collection: an object whose owners are all gone is deleted; owners that wait for their
//! dependents (foreground), or to be forgotten by them (orphan), go once they can; namespaces that
//! are deleted are emptied; events expire.
//!
//! Runs where the store is led. Owners are known by uid, and looked for among the objects of this
//! server; whether owners of kinds that it doesn't serve exist can't be known here, and what has such
//! an owner stays.

mod events;
mod graph;
mod namespaces;

use std::{collections::BTreeSet, future::Future, sync::Arc};

use exo_store::{ListQuery, StoreError, Txn};
use graph::{Graph, Job};
use serde_json::Value;
use tokio::time::{Duration, sleep};

use crate::{
    error::ApiError,
    object,
    resource::{PREFIX, Resource},
    server::ApiServer,
    verbs::{self, Preconditions, Propagation},
};

/// After a failure everything is read anew, after this long.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// Collects while this node leads, until `shutdown` is done.
pub async fn collect_garbage(server: ApiServer, shutdown: impl Future<Output = ()>) {
    tokio::select! {
        // Cancel safe: each deletion is one transaction of the store.
        () = lead_and_collect(&server) => {}
        () = shutdown => {}
    }
}

async fn lead_and_collect(server: &ApiServer) {
    let mut leadership = server.store().leadership();
    loop {
        if leadership.wait_for(|l| l.is_leader).await.is_err() {
            return;
        }
        let result = tokio::select! {
            // Cancel safe, as above.
            result = collect(server) => result,
            error = events::expire(server) => Err(error),
            changed = leadership.wait_for(|l| !l.is_leader) => {
                if changed.is_err() {
                    return;
                }
                continue;
            }
        };
        match result {
            Ok(()) => return,
            Err(error) => {
                tracing::debug!(%error, "garbage collection begins anew");
                sleep(RETRY_AFTER).await;
            }
        }
    }
}

/// Follows every object; ends when the store is shut down.
async fn collect(server: &ApiServer) -> Result<(), ApiError> {
    let store = server.store();
    let (mut graph, revision) = {
        let query = ListQuery { prefix: PREFIX.to_owned(), ..ListQuery::default() };
        let listing = store.list(&query).await?;
        let mut graph = Graph::new(server.resources());
        for entry in &listing.entries {
            graph.apply(&entry.key, Some(&object::decode(entry)?));
        }
        (graph, listing.revision)
    };
    let mut suspects = graph.suspects();
    let mut watch = store.watch(PREFIX, revision);
    loop {
        for key in suspects {
            for job in graph.jobs(&key) {
                carry_out(server, &graph, job).await?;
            }
        }
        namespaces::empty(server, &graph).await?;
        let batch = match watch.next().await {
            Ok(batch) => batch,
            Err(StoreError::Closed) => return Ok(()),
            Err(error) => return Err(error.into()),
        };
        suspects = BTreeSet::new();
        for event in &batch.events {
            let current = event.current.as_ref().map(object::decode).transpose()?;
            suspects.extend(graph.apply(&event.key, current.as_ref()));
        }
    }
}

async fn carry_out(server: &ApiServer, graph: &Graph, job: Job) -> Result<(), ApiError> {
    let key = match &job {
        Job::Delete(key) | Job::Disown { key, .. } | Job::Release { key, .. } => key,
    };
    let (Some(node), Some(resource)) = (graph.nodes.get(key), resource_of(server, key)) else {
        return Ok(());
    };
    let uid = Some(node.uid.clone());
    match &job {
        Job::Delete(key) => {
            let preconditions = Preconditions { uid, resource_version: None };
            // What it owns in turn goes first where its owner waits for it.
            let policy = if graph.is_awaited(key) && graph.dependents.contains_key(&node.uid) {
                Propagation::Foreground
            } else {
                Propagation::Background
            };
            match verbs::remove(server.store(), resource, key, &preconditions, policy).await {
                // Another one of that name is no garbage.
                Ok(_) | Err(ApiError::Conflict { .. }) => Ok(()),
                Err(error) => Err(error),
            }
        }
        Job::Disown { owner, .. } => {
            edit(server, resource, key, &node.uid, |object| {
                retain(object, "ownerReferences", |reference| {
                    reference.get("uid").and_then(Value::as_str) != Some(owner)
                });
            })
            .await
        }
        Job::Release { finalizer, .. } => {
            edit(server, resource, key, &node.uid, |object| {
                retain(object, "finalizers", |f| f.as_str() != Some(finalizer));
            })
            .await
        }
    }
}

/// Keeps of a list of the metadata what `keep` says; an empty list goes.
fn retain(object: &mut Value, field: &str, keep: impl Fn(&Value) -> bool) {
    let metadata = object::metadata_mut(object);
    if let Some(Value::Array(items)) = metadata.get_mut(field) {
        items.retain(|item| keep(item));
        if items.is_empty() {
            metadata.remove(field);
        }
    }
}

/// Changes one object, if it is still the one of that uid, and if there is anything to change. It
/// goes if nothing holds it any more. A conflict needs no further try: the other change is seen by
/// the watch and judged anew.
async fn edit(
    server: &ApiServer,
    resource: &Resource,
    key: &Arc<str>,
    uid: &str,
    change: impl Fn(&mut Value),
) -> Result<(), ApiError> {
    let store = server.store();
    let Some(entry) = store.get(key).await? else {
        return Ok(());
    };
    let mut object = resource.decode(&entry)?;
    if object::uid(&object) != Some(uid) {
        return Ok(());
    }
    let before = object.clone();
    change(&mut object);
    if object == before {
        return Ok(());
    }
    let txn = if object::is_deleting(&object) && !object::is_held(&object) {
        Txn::delete(Arc::clone(key), entry.mod_revision)
    } else {
        Txn::replace(Arc::clone(key), entry.mod_revision, resource.encode(&object)?)
    };
    store.txn(txn).await?;
    Ok(())
}

fn resource_of<'a>(server: &'a ApiServer, key: &str) -> Option<&'a Resource> {
    let mut resources = server.resources().iter();
    resources.find(|r| key.starts_with(&r.prefix(None))).map(|r| &**r)
}
