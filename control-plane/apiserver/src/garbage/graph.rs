//! Who owns whom, and what follows from that: no calls, no clock.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use serde_json::Value;

use crate::{
    builtin, object,
    resource::Resource,
    verbs::{FOREGROUND, ORPHAN},
};

/// Something to do about an object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Job {
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
pub(super) struct Graph {
    /// `apiVersion` and kind of what can be known to exist or not.
    kinds: BTreeSet<(String, String)>,
    pub(super) nodes: BTreeMap<Arc<str>, Node>,
    /// Keys of the objects that exist.
    uids: BTreeMap<String, Arc<str>>,
    /// By the owner's uid, whether or not it exists: keys of what it owns.
    pub(super) dependents: BTreeMap<String, BTreeSet<Arc<str>>>,
    /// Keys of the namespaces that are to go.
    pub(super) namespaces: BTreeSet<Arc<str>>,
}

#[derive(Debug)]
pub(super) struct Node {
    pub(super) uid: String,
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
    pub(super) fn new(resources: &[Arc<Resource>]) -> Self {
        let kinds = resources.iter().map(|r| (r.api_version(), r.kind.clone())).collect();
        Self { kinds, ..Self::default() }
    }

    /// Takes in what a key holds now. Returns where there may be something to do by it.
    pub(super) fn apply(&mut self, key: &Arc<str>, object: Option<&Value>) -> BTreeSet<Arc<str>> {
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
    pub(super) fn suspects(&self) -> BTreeSet<Arc<str>> {
        self.nodes.keys().filter(|key| !self.jobs(key).is_empty()).cloned().collect()
    }

    /// What is to be done about an object, or for its sake.
    pub(super) fn jobs(&self, key: &Arc<str>) -> Vec<Job> {
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
    pub(super) fn is_awaited(&self, key: &Arc<str>) -> bool {
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
