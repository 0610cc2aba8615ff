//! Garbage collection by owner reference: an object whose owners are all gone is deleted.
//!
//! Runs where the store is led. Owners are known by uid only, and looked for among the objects of
//! this server.

use std::{
    collections::{BTreeMap, BTreeSet},
    future::Future,
    sync::Arc,
};

use exo_store::{Event, ListQuery, Store, StoreError};
use serde_json::Value;
use tokio::time::{Duration, sleep};

use crate::{
    error::ApiError,
    object,
    resource::{PREFIX, Resource},
    server::ApiServer,
    verbs::{self, Preconditions},
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
    let query = ListQuery { prefix: PREFIX.to_owned(), ..ListQuery::default() };
    let listing = store.list(&query).await?;
    let mut graph = Graph::default();
    for entry in &listing.entries {
        graph.apply(&entry.key, Some(&object::decode(entry)?));
    }
    for key in graph.orphans() {
        delete(server, &graph, &key).await?;
    }
    let mut watch = store.watch(PREFIX, listing.revision);
    loop {
        let batch = match watch.next().await {
            Ok(batch) => batch,
            Err(StoreError::Closed) => return Ok(()),
            Err(error) => return Err(error.into()),
        };
        let mut suspects = BTreeSet::new();
        for event in &batch.events {
            suspects.extend(observe(&mut graph, event)?);
        }
        for key in suspects {
            delete(server, &graph, &key).await?;
        }
    }
}

/// Keys of objects that may have become garbage.
fn observe(graph: &mut Graph, event: &Event) -> Result<BTreeSet<Arc<str>>, ApiError> {
    let current = event.current.as_ref().map(object::decode).transpose()?;
    Ok(graph.apply(&event.key, current.as_ref()))
}

async fn delete(server: &ApiServer, graph: &Graph, key: &Arc<str>) -> Result<(), ApiError> {
    let Some(node) = graph.nodes.get(key).filter(|_| graph.is_orphan(key)) else {
        return Ok(());
    };
    let Some(resource) = resource_of(server, key) else {
        return Ok(());
    };
    let preconditions = Preconditions { uid: Some(node.uid.clone()), resource_version: None };
    let store: &Store = server.store();
    match verbs::remove(store, resource, key, &preconditions).await {
        // Another one of that name is no garbage.
        Ok(_) | Err(ApiError::Conflict { .. }) => Ok(()),
        Err(error) => Err(error),
    }
}

fn resource_of<'a>(server: &'a ApiServer, key: &str) -> Option<&'a Resource> {
    let mut resources = server.resources().iter();
    resources.find(|r| key.starts_with(&r.prefix(None))).map(|r| &**r)
}

/// Who owns whom.
#[derive(Debug, Default)]
struct Graph {
    nodes: BTreeMap<Arc<str>, Node>,
    /// uids of the objects that exist.
    uids: BTreeSet<String>,
    /// By the owner's uid, whether or not it exists: keys of what it owns.
    dependents: BTreeMap<String, BTreeSet<Arc<str>>>,
}

#[derive(Debug)]
struct Node {
    uid: String,
    owners: BTreeSet<String>,
    deleting: bool,
}

impl Graph {
    /// Takes in what a key holds now. Returns what may have become garbage by it.
    fn apply(&mut self, key: &Arc<str>, object: Option<&Value>) -> BTreeSet<Arc<str>> {
        let mut suspects = BTreeSet::new();
        let new = object.map(|object| Node {
            uid: object::uid(object).unwrap_or_default().to_owned(),
            owners: object::owners(object).map(str::to_owned).collect(),
            deleting: object::is_deleting(object),
        });
        if let Some(old) = self.nodes.remove(key) {
            for owner in &old.owners {
                if let Some(keys) = self.dependents.get_mut(owner) {
                    keys.remove(key);
                    if keys.is_empty() {
                        self.dependents.remove(owner);
                    }
                }
            }
            if new.as_ref().is_none_or(|new| new.uid != old.uid) {
                self.uids.remove(&old.uid);
                suspects.extend(self.dependents.get(&old.uid).into_iter().flatten().cloned());
            }
        }
        if let Some(node) = new {
            for owner in &node.owners {
                let keys = self.dependents.entry(owner.clone()).or_default();
                keys.insert(Arc::clone(key));
            }
            self.uids.insert(node.uid.clone());
            self.nodes.insert(Arc::clone(key), node);
            suspects.insert(Arc::clone(key));
        }
        suspects.retain(|key| self.is_orphan(key));
        suspects
    }

    /// It has owners, none of them exists, and it isn't on its way out already.
    fn is_orphan(&self, key: &Arc<str>) -> bool {
        self.nodes.get(key).is_some_and(|node| {
            !node.deleting
                && !node.owners.is_empty()
                && node.owners.iter().all(|owner| !self.uids.contains(owner))
        })
    }

    fn orphans(&self) -> Vec<Arc<str>> {
        let keys = self.nodes.keys();
        keys.filter(|key| self.is_orphan(key)).cloned().collect()
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn object(uid: &str, owners: &[&str]) -> Value {
        let owners: Vec<Value> = owners.iter().map(|uid| json!({"uid": uid})).collect();
        json!({"metadata": {"uid": uid, "ownerReferences": owners}})
    }

    #[test]
    fn garbage_is_what_lost_its_last_owner() {
        let mut graph = Graph::default();
        let key = |name: &str| -> Arc<str> { name.into() };
        let mut apply = |name: &str, object: Option<Value>| -> Vec<String> {
            let suspects = graph.apply(&key(name), object.as_ref());
            suspects.iter().map(ToString::to_string).collect()
        };
        assert!(apply("a", Some(object("1", &[]))).is_empty());
        assert!(apply("b", Some(object("2", &[]))).is_empty());
        assert!(apply("c", Some(object("3", &["1", "2"]))).is_empty());
        assert!(apply("d", Some(object("4", &["3"]))).is_empty());
        assert!(apply("a", None).is_empty(), "the other owner is left");
        assert_eq!(apply("b", None), ["c"]);
        assert_eq!(apply("c", None), ["d"]);
        assert_eq!(apply("e", Some(object("5", &["9"]))), ["e"], "an owner that never was");
        // A new object in the owner's place is another owner.
        assert!(apply("f", Some(object("6", &[]))).is_empty());
        assert!(apply("g", Some(object("7", &["6"]))).is_empty());
        assert_eq!(apply("f", Some(object("8", &[]))), ["g"]);
    }
}
