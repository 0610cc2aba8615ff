//! Garbage collection: an object whose owners are all gone is deleted; owners that wait for their
//! dependents (foreground), or to be forgotten by them (orphan), go once they can; namespaces that
//! are deleted are emptied; events expire.
//!
//! Runs where the store is led. Owners are known by uid, and looked for among the objects of this
//! server; whether owners of kinds that it doesn't serve exist can't be known here, and what has such
//! an owner stays.

mod namespaces;

use std::{
    collections::{BTreeMap, BTreeSet},
    future::Future,
    sync::Arc,
};

use exo_store::{ListQuery, StoreError, Txn};
use serde_json::Value;
use time::OffsetDateTime;
use tokio::time::{Duration, sleep};

use crate::{
    builtin, clock,
    error::ApiError,
    object,
    resource::{PREFIX, Resource},
    server::ApiServer,
    verbs::{self, FOREGROUND, ORPHAN, Preconditions, Propagation},
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
            error = expire_events(server) => Err(error),
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

/// Events are kept so long, as in Kubernetes.
const EVENT_LIFETIME: time::Duration = time::Duration::HOUR;
/// More than these are not kept; the oldest go.
const MAX_EVENTS: usize = 10_000;
const EXPIRY_PERIOD: Duration = Duration::from_secs(60);

/// Deletes old events; ends with an error only.
async fn expire_events(server: &ApiServer) -> ApiError {
    loop {
        if let Err(error) = expire_once(server, clock::now()).await {
            return error;
        }
        sleep(EXPIRY_PERIOD).await;
    }
}

async fn expire_once(server: &ApiServer, now: OffsetDateTime) -> Result<(), ApiError> {
    let mut resources = server.resources().iter();
    let Some(events) = resources.find(|r| r.builtin && r.kind == builtin::EVENT) else {
        return Ok(());
    };
    let query = ListQuery { prefix: events.prefix(None), ..ListQuery::default() };
    let listing = server.store().list(&query).await?;
    let mut by_age = Vec::new();
    for entry in &listing.entries {
        by_age.push((last_seen(&events.decode(entry)?), entry));
    }
    by_age.sort_by_key(|(seen, _)| *seen);
    let excess = by_age.len().saturating_sub(MAX_EVENTS);
    for (index, (seen, entry)) in by_age.iter().enumerate() {
        let is_old = seen.is_none_or(|seen| now - seen > EVENT_LIFETIME);
        if index < excess || is_old {
            let key = Arc::clone(&entry.key);
            server.store().txn(Txn::delete(key, entry.mod_revision)).await?;
        }
    }
    Ok(())
}

/// When an event happened last, as far as it says.
fn last_seen(event: &Value) -> Option<OffsetDateTime> {
    ["/series/lastObservedTime", "/lastTimestamp", "/eventTime", "/metadata/creationTimestamp"]
        .iter()
        .filter_map(|field| event.pointer(field)?.as_str().and_then(clock::parse))
        .max()
}

fn resource_of<'a>(server: &'a ApiServer, key: &str) -> Option<&'a Resource> {
    let mut resources = server.resources().iter();
    resources.find(|r| key.starts_with(&r.prefix(None))).map(|r| &**r)
}

/// Something to do about an object.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Job {
    Delete(Arc<str>),
    /// Remove one owner.
    Disown {
        key: Arc<str>,
        owner: String,
    },
    Release {
        key: Arc<str>,
        finalizer: &'static str,
    },
}

/// Who owns whom.
#[derive(Debug, Default)]
struct Graph {
    /// `apiVersion` and kind of what can be known to exist or not.
    kinds: BTreeSet<(String, String)>,
    nodes: BTreeMap<Arc<str>, Node>,
    /// Keys of the objects that exist.
    uids: BTreeMap<String, Arc<str>>,
    /// By the owner's uid, whether or not it exists: keys of what it owns.
    dependents: BTreeMap<String, BTreeSet<Arc<str>>>,
    /// Keys of the namespaces that are to go.
    namespaces: BTreeSet<Arc<str>>,
}

#[derive(Debug)]
struct Node {
    uid: String,
    /// uids, each with whether this blocks its deletion in the foreground.
    owners: BTreeMap<String, bool>,
    /// One of the owners is of a kind that is not served.
    has_unknown_owner: bool,
    deleting: bool,
    foreground: bool,
    orphan: bool,
}

impl Node {
    fn new(object: &Value, kinds: &BTreeSet<(String, String)>) -> Self {
        let deleting = object::is_deleting(object);
        let finalizers = object::finalizers(object);
        Self {
            uid: object::uid(object).unwrap_or_default().to_owned(),
            owners: object::owners(object).map(|(uid, blocks)| (uid.to_owned(), blocks)).collect(),
            has_unknown_owner: object::owner_kinds(object).any(|kind| !kinds.contains(&kind)),
            deleting,
            foreground: deleting && finalizers.contains(&FOREGROUND),
            orphan: deleting && finalizers.contains(&ORPHAN),
        }
    }
}

impl Graph {
    fn new(resources: &[Arc<Resource>]) -> Self {
        let kinds = resources.iter().map(|r| (r.api_version(), r.kind.clone())).collect();
        Self { kinds, ..Self::default() }
    }

    /// Takes in what a key holds now. Returns where there may be something to do by it.
    fn apply(&mut self, key: &Arc<str>, object: Option<&Value>) -> BTreeSet<Arc<str>> {
        let mut suspects = BTreeSet::new();
        let new = object.map(|object| Node::new(object, &self.kinds));
        if let Some(old) = self.nodes.remove(key) {
            for owner in old.owners.keys() {
                if let Some(keys) = self.dependents.get_mut(owner) {
                    keys.remove(key);
                    if keys.is_empty() {
                        self.dependents.remove(owner);
                    }
                }
                suspects.extend(self.uids.get(owner).cloned());
            }
            if new.as_ref().is_none_or(|new| new.uid != old.uid) {
                self.uids.remove(&old.uid);
                suspects.extend(self.dependents.get(&old.uid).into_iter().flatten().cloned());
            }
        }
        let is_leaving = new.as_ref().is_some_and(|new| new.deleting);
        let is_namespace = object.and_then(|o| o.get("kind")?.as_str()) == Some(builtin::NAMESPACE);
        if is_leaving && is_namespace {
            self.namespaces.insert(Arc::clone(key));
        } else {
            self.namespaces.remove(key);
        }
        if let Some(node) = new {
            for owner in node.owners.keys() {
                let keys = self.dependents.entry(owner.clone()).or_default();
                keys.insert(Arc::clone(key));
                suspects.extend(self.uids.get(owner).cloned());
            }
            self.uids.insert(node.uid.clone(), Arc::clone(key));
            self.nodes.insert(Arc::clone(key), node);
            suspects.insert(Arc::clone(key));
        }
        suspects.retain(|key| !self.jobs(key).is_empty());
        suspects
    }

    /// All keys where there is something to do.
    fn suspects(&self) -> BTreeSet<Arc<str>> {
        self.nodes.keys().filter(|key| !self.jobs(key).is_empty()).cloned().collect()
    }

    /// What is to be done about an object, or for its sake.
    fn jobs(&self, key: &Arc<str>) -> Vec<Job> {
        let Some(node) = self.nodes.get(key) else {
            return Vec::new();
        };
        let none = BTreeSet::new();
        let dependents = self.dependents.get(&node.uid).unwrap_or(&none);
        let owner = || node.uid.clone();
        if node.orphan {
            if dependents.is_empty() {
                return vec![Job::Release { key: Arc::clone(key), finalizer: ORPHAN }];
            }
            return dependents
                .iter()
                .map(|key| Job::Disown { key: Arc::clone(key), owner: owner() })
                .collect();
        }
        if node.foreground {
            return self.foreground_jobs(key, node, dependents);
        }
        self.jobs_of_dependent(key, node)
    }

    /// It goes with the last of its owners; before that, it forgets those that are gone.
    fn jobs_of_dependent(&self, key: &Arc<str>, node: &Node) -> Vec<Job> {
        if node.deleting || node.has_unknown_owner {
            return Vec::new();
        }
        let is_absent = |owner: &&String| !self.uids.contains_key(*owner);
        let absent: Vec<&String> = node.owners.keys().filter(is_absent).collect();
        if !absent.is_empty() && absent.len() == node.owners.len() {
            return vec![Job::Delete(Arc::clone(key))];
        }
        absent
            .into_iter()
            .map(|owner| Job::Disown { key: Arc::clone(key), owner: owner.clone() })
            .collect()
    }

    fn foreground_jobs(
        &self,
        key: &Arc<str>,
        node: &Node,
        dependents: &BTreeSet<Arc<str>>,
    ) -> Vec<Job> {
        let mut jobs = Vec::new();
        let mut is_blocked = false;
        for dependent_key in dependents {
            let Some(dependent) = self.nodes.get(dependent_key) else {
                continue;
            };
            is_blocked |= dependent.owners.get(&node.uid) == Some(&true);
            if dependent.deleting {
                continue;
            }
            let is_kept = dependent.has_unknown_owner
                || dependent.owners.keys().any(|owner| self.is_solid(owner));
            jobs.push(if is_kept {
                Job::Disown { key: Arc::clone(dependent_key), owner: node.uid.clone() }
            } else {
                Job::Delete(Arc::clone(dependent_key))
            });
        }
        if !is_blocked {
            jobs.push(Job::Release { key: Arc::clone(key), finalizer: FOREGROUND });
        }
        jobs
    }

    /// The owner exists and doesn't wait for its dependents to go.
    fn is_solid(&self, uid: &str) -> bool {
        let owner = self.uids.get(uid).and_then(|key| self.nodes.get(key));
        owner.is_some_and(|owner| !owner.foreground)
    }

    /// An owner waits for it to be gone.
    fn is_awaited(&self, key: &Arc<str>) -> bool {
        let node = self.nodes.get(key);
        node.is_some_and(|n| n.owners.iter().any(|(uid, blocks)| *blocks && self.is_waiting(uid)))
    }

    fn is_waiting(&self, uid: &str) -> bool {
        let owner = self.uids.get(uid).and_then(|key| self.nodes.get(key));
        owner.is_some_and(|owner| owner.foreground)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn object(uid: &str, owners: &[&str]) -> Value {
        let owner = |uid: &&str| json!({"apiVersion": "v1", "kind": "Secret", "uid": uid});
        let owners: Vec<Value> = owners.iter().map(owner).collect();
        json!({"metadata": {"uid": uid, "ownerReferences": owners}})
    }

    fn graph() -> Graph {
        Graph::new(&builtin::resources().unwrap().into_iter().map(Arc::new).collect::<Vec<_>>())
    }

    #[test]
    fn garbage_is_what_lost_its_last_owner() {
        let mut graph = graph();
        let key = |name: &str| -> Arc<str> { name.into() };
        let mut apply = |name: &str, object: Option<Value>| -> Vec<String> {
            let suspects = graph.apply(&key(name), object.as_ref());
            suspects.iter().map(ToString::to_string).collect()
        };
        assert!(apply("a", Some(object("1", &[]))).is_empty());
        assert!(apply("b", Some(object("2", &[]))).is_empty());
        assert!(apply("c", Some(object("3", &["1", "2"]))).is_empty());
        assert!(apply("d", Some(object("4", &["3"]))).is_empty());
        assert_eq!(apply("a", None), ["c"], "the other owner is left");
        assert_eq!(apply("b", None), ["c"]);
        assert_eq!(apply("c", None), ["d"]);
        assert_eq!(apply("e", Some(object("5", &["9"]))), ["e"], "an owner that never was");
        // A new object in the owner's place is another owner.
        assert!(apply("f", Some(object("6", &[]))).is_empty());
        assert!(apply("g", Some(object("7", &["6"]))).is_empty());
        assert_eq!(apply("f", Some(object("8", &[]))), ["g"]);
    }

    #[test]
    fn absent_owners_are_forgotten_and_unknown_kinds_may_exist() {
        let mut graph = graph();
        let key: Arc<str> = "x".into();
        let mut jobs = |owners: Value| {
            let object = json!({"metadata": {"uid": "x", "ownerReferences": owners}});
            graph.apply(&"a".into(), Some(&object_a()));
            graph.apply(&key, Some(&object));
            graph.jobs(&key)
        };
        fn object_a() -> Value {
            object("1", &[])
        }
        let owner = |version: &str, kind: &str, uid: &str| json!({"apiVersion": version, "kind": kind, "uid": uid});
        let (here, gone) = (owner("v1", "Secret", "1"), owner("v1", "Secret", "2"));
        let delete = [Job::Delete("x".into())];
        assert_eq!(jobs(json!([here])), []);
        assert_eq!(jobs(json!([gone])), delete);
        let disown = Job::Disown { key: "x".into(), owner: "2".into() };
        assert_eq!(jobs(json!([gone, here])), [disown]);
        for (version, kind) in
            [("apps/v1", "Deployment"), ("v2", "Secret"), ("v1", "Pod"), ("", "")]
        {
            let unknown = owner(version, kind, "3");
            assert_eq!(jobs(json!([unknown])), [], "{version} {kind}");
            assert_eq!(jobs(json!([unknown, gone])), [], "{version} {kind}");
        }
    }

    #[tokio::test]
    async fn events_expire_and_are_bounded() {
        let store = exo_store::Store::memory();
        let registry = prometheus::Registry::new();
        let server = ApiServer::new(store.clone(), &exo_crds::all(), &registry).unwrap();
        let now = clock::parse("2026-11-22T12:00:00Z").unwrap();
        let put = async |name: &str, minutes: i64| {
            let time = clock::format(now - time::Duration::minutes(minutes));
            let event =
                json!({"metadata": {"name": name, "namespace": "n"}, "lastTimestamp": time});
            let key = format!("{PREFIX}core/events/n/{name}");
            store.txn(Txn::create(key, event.to_string())).await.unwrap();
        };
        put("old", 61).await;
        put("young", 59).await;
        let names = async || {
            let query = ListQuery { prefix: format!("{PREFIX}core/"), ..ListQuery::default() };
            let entries = store.list(&query).await.unwrap().entries;
            entries.iter().map(|e| e.key.rsplit('/').next().unwrap().to_owned()).collect::<Vec<_>>()
        };
        expire_once(&server, now).await.unwrap();
        assert_eq!(names().await, ["young"]);
        for n in 0..MAX_EVENTS {
            put(&format!("e{n}"), 1).await;
        }
        expire_once(&server, now).await.unwrap();
        let left = names().await;
        assert_eq!(left.len(), MAX_EVENTS);
        assert!(!left.contains(&"young".to_owned()), "the oldest goes first");
    }

    #[test]
    fn owners_wait_for_their_dependents_or_let_them_go() {
        let mut graph = graph();
        let key = |name: &str| -> Arc<str> { name.into() };
        let dependent = |owners: &[(&str, bool)]| {
            let owners: Vec<Value> = owners
                .iter()
                .map(|(uid, blocks)| {
                    json!({
                        "apiVersion": "v1", "kind": "Secret", "uid": uid,
                        "blockOwnerDeletion": blocks,
                    })
                })
                .collect();
            json!({"metadata": {"uid": "d", "ownerReferences": owners}})
        };
        let owner = |uid: &str, finalizer: &str| {
            json!({"metadata": {
                "uid": uid, "deletionTimestamp": "t", "finalizers": [finalizer]
            }})
        };
        graph.apply(&key("a"), Some(&object("a", &[])));
        graph.apply(&key("b"), Some(&object("b", &[])));
        graph.apply(&key("d"), Some(&dependent(&[("a", true), ("b", true)])));

        graph.apply(&key("a"), Some(&owner("a", FOREGROUND)));
        let disown = Job::Disown { key: key("d"), owner: "a".into() };
        assert_eq!(graph.jobs(&key("a")), [disown], "the other owner keeps it");
        let suspects = graph.apply(&key("d"), Some(&dependent(&[("b", true)])));
        assert!(suspects.contains(&key("a")));
        let release = Job::Release { key: key("a"), finalizer: FOREGROUND };
        assert_eq!(graph.jobs(&key("a")), [release]);

        graph.apply(&key("b"), Some(&owner("b", FOREGROUND)));
        assert_eq!(graph.jobs(&key("b")), [Job::Delete(key("d"))]);
        let mut leaving = dependent(&[("b", true)]);
        leaving["metadata"]["deletionTimestamp"] = json!("t");
        graph.apply(&key("d"), Some(&leaving));
        assert_eq!(graph.jobs(&key("b")), [], "it waits");
        assert!(graph.apply(&key("d"), None).contains(&key("b")));

        // An owner that nothing can be known of keeps it, as it does in the background.
        let mut kept = dependent(&[("b", true), ("u", true)]);
        kept["metadata"]["ownerReferences"][1]["kind"] = json!("Pod");
        graph.apply(&key("d"), Some(&kept));
        let disown = Job::Disown { key: key("d"), owner: "b".into() };
        assert_eq!(graph.jobs(&key("b")), [disown]);
        kept["metadata"]["ownerReferences"].as_array_mut().unwrap().remove(0);
        graph.apply(&key("d"), Some(&kept));
        let release = Job::Release { key: key("b"), finalizer: FOREGROUND };
        assert_eq!(graph.jobs(&key("b")), [release]);
        graph.apply(&key("b"), None);
        assert_eq!(graph.jobs(&key("d")), [], "it stays");

        graph.apply(&key("d"), Some(&dependent(&[("o", true)])));
        graph.apply(&key("o"), Some(&owner("o", ORPHAN)));
        let disown = Job::Disown { key: key("d"), owner: "o".into() };
        assert_eq!(graph.jobs(&key("o")), [disown]);
        graph.apply(&key("d"), Some(&dependent(&[])));
        assert_eq!(graph.jobs(&key("o")), [Job::Release { key: key("o"), finalizer: ORPHAN }]);
    }
}
