//! What the gateway knows of the cluster: instances, their ready replicas, model names.
//!
//! A plain struct fed with `apply`/`delete`; never does IO and holds no clock.

use std::collections::BTreeMap;

use exo_crds::{InferenceInstance, InstancePhase, Model, REASON_WEIGHTS_NOT_FOUND};
use kube::ResourceExt as _;

/// Reasons of a Ready condition that time does not change: somebody has to do something.
const STUCK: [&str; 5] =
    ["NoReplicas", "ModelNotFound", "NameTooLong", UNPLACEABLE, REASON_WEIGHTS_NOT_FOUND];
const UNPLACEABLE: &str = "Unplaceable";
/// What had a place may soon have one again: memory that was given back is reported after seconds,
/// and nodes come back.
const PLACE_AGAIN_S: i64 = 20;

/// An InferenceInstance, by namespace and name.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct InstanceKey {
    pub(crate) namespace: String,
    pub(crate) name: String,
}

/// One placement of one replica; a new epoch is another one.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct ReplicaId {
    pub(crate) instance: InstanceKey,
    pub(crate) index: u32,
    pub(crate) epoch: u64,
}

/// A replica that takes requests.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Target {
    pub(crate) replica: ReplicaId,
    /// `HOST:PORT` of rank 0.
    pub(crate) endpoint: String,
}

/// What a request's `model` stands for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Served {
    /// Name of the Model: instances of another one don't continue a request's tokens.
    pub(crate) model: String,
    /// Seed of requests that bring none, of the first instance that has one.
    pub(crate) seed: Option<u64>,
    pub(crate) targets: Vec<Target>,
    /// Why nothing is ready, in the instance controller's words.
    pub(crate) waiting_for: Option<String>,
    /// Where no replica is tried before some time: seconds since 1970.
    pub(crate) not_before: Option<i64>,
    /// Where nothing becomes ready before somebody does something: since when that is sure.
    pub(crate) stuck_since: Option<i64>,
}

impl Served {
    /// Whether nothing is ready, nor will be before somebody has done something.
    pub(crate) fn is_stuck(&self, now_s: i64) -> bool {
        self.targets.is_empty() && self.stuck_since.is_some_and(|since| since <= now_s)
    }
}

/// An entry of the model list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Listed {
    pub(crate) id: String,
    /// Seconds since 1970.
    pub(crate) created: i64,
}

#[derive(Clone, Debug)]
struct Instance {
    model: String,
    seed: Option<u64>,
    created: i64,
    ready: Vec<Target>,
    waiting_for: Option<String>,
    not_before: Option<i64>,
    stuck_since: Option<i64>,
}

/// All of it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Index {
    instances: BTreeMap<InstanceKey, Instance>,
    /// Model name → repository.
    models: BTreeMap<String, Option<String>>,
    instances_listed: bool,
    models_listed: bool,
    /// Why the API server could not be read when that was last tried.
    problem: Option<String>,
}

impl Index {
    /// Whether both lists have been read once; before that, "unknown" means nothing.
    pub(crate) fn is_complete(&self) -> bool {
        self.instances_listed && self.models_listed
    }

    /// Why nothing is known yet, once that is clear.
    pub(crate) fn problem(&self) -> Option<&str> {
        self.problem.as_deref().filter(|_| !self.is_complete())
    }

    /// Reading the API server failed; returns whether that is news to those who wait.
    pub(crate) fn failed(&mut self, problem: String) -> bool {
        let known = self.problem.replace(problem);
        !self.is_complete() && known != self.problem
    }

    pub(crate) fn apply_instance(&mut self, object: &InferenceInstance) {
        let key = key_of(object);
        let status = object.status.as_ref();
        let ready = status
            .iter()
            .flat_map(|status| &status.replicas)
            .filter(|replica| replica.ready && object.metadata.deletion_timestamp.is_none())
            .filter_map(|replica| {
                Some(Target {
                    replica: ReplicaId {
                        instance: key.clone(),
                        index: replica.index,
                        epoch: replica.epoch,
                    },
                    endpoint: replica.endpoint.clone()?,
                })
            })
            .collect();
        let waiting_for = not_ready(object).filter(|why| !why.message.is_empty()).map(|why| {
            match why.message.contains(why.reason) {
                true => why.message.to_owned(),
                false => format!("{}: {}", why.reason, why.message),
            }
        });
        let created = object.creation_timestamp().map_or(0, |time| time.0.as_second());
        self.instances.insert(
            key,
            Instance {
                model: object.spec.model.clone(),
                seed: object.spec.seed,
                created,
                ready,
                waiting_for,
                not_before: not_before(object),
                stuck_since: stuck_since(object),
            },
        );
    }

    pub(crate) fn delete_instance(&mut self, object: &InferenceInstance) {
        self.instances.remove(&key_of(object));
    }

    /// A fresh list takes the place of everything known before.
    pub(crate) fn replace_instances(&mut self, objects: &[InferenceInstance]) {
        self.instances.clear();
        for object in objects {
            self.apply_instance(object);
        }
        self.instances_listed = true;
    }

    pub(crate) fn apply_model(&mut self, object: &Model) {
        self.models.insert(object.name_any(), object.spec.source.repo.clone());
    }

    pub(crate) fn delete_model(&mut self, object: &Model) {
        self.models.remove(&object.name_any());
    }

    /// A fresh list takes the place of everything known before.
    pub(crate) fn replace_models(&mut self, objects: &[Model]) {
        self.models.clear();
        for object in objects {
            self.apply_model(object);
        }
        self.models_listed = true;
    }

    /// Finds what `name` stands for: the listed id of an instance (its name, or `namespace/name`),
    /// else a Model's name, else a repository. `None`: no instance serves such a model.
    pub(crate) fn lookup(&self, name: &str) -> Option<Served> {
        let by_name = |key: &InstanceKey| {
            key.name == name
                || name.split_once('/').is_some_and(|(ns, n)| key.namespace == ns && key.name == n)
        };
        if let Some((key, instance)) = self.instances.iter().find(|(key, _)| by_name(key)) {
            return Some(served(&instance.model, [(key, instance)]));
        }
        let of_model = |model: &str| {
            let instances: Vec<_> =
                self.instances.iter().filter(|(_, instance)| instance.model == model).collect();
            (!instances.is_empty()).then(|| served(model, instances))
        };
        of_model(name).or_else(|| {
            self.models
                .iter()
                .filter(|(_, repo)| repo.as_deref() == Some(name))
                .find_map(|(model, _)| of_model(model))
        })
    }

    /// Whether exactly this placement still takes requests.
    pub(crate) fn is_ready(&self, replica: &ReplicaId) -> bool {
        self.instances
            .get(&replica.instance)
            .is_some_and(|instance| instance.ready.iter().any(|t| t.replica == *replica))
    }

    /// The model list: names of instances that are ready or on their way. A name that several
    /// namespaces use is listed plainly for the first of them and with its namespace for the others.
    pub(crate) fn list(&self, now_s: i64) -> Vec<Listed> {
        self.instances
            .iter()
            .filter(|(key, instance)| !served(&instance.model, [(*key, *instance)]).is_stuck(now_s))
            .map(|(key, instance)| {
                let first = self.instances.keys().find(|other| other.name == key.name);
                let id = if first == Some(key) {
                    key.name.clone()
                } else {
                    format!("{}/{}", key.namespace, key.name)
                };
                Listed { id, created: instance.created }
            })
            .collect()
    }
}

fn key_of(object: &InferenceInstance) -> InstanceKey {
    InstanceKey { namespace: object.namespace().unwrap_or_default(), name: object.name_any() }
}

/// What the Ready condition says of an instance that isn't.
struct NotReady<'a> {
    reason: &'a str,
    message: &'a str,
    since_s: i64,
}

fn not_ready(object: &InferenceInstance) -> Option<NotReady<'_>> {
    let conditions = &object.status.as_ref()?.conditions;
    let condition = conditions.iter().find(|c| c.type_ == "Ready" && c.status != "True")?;
    Some(NotReady {
        reason: &condition.reason,
        message: &condition.message,
        since_s: condition.last_transition_time.0.as_second(),
    })
}

/// Since when nothing but somebody's doing helps. What the controller said of an older spec does
/// not count, nor what is the matter with one replica while another one starts.
fn stuck_since(object: &InferenceInstance) -> Option<i64> {
    let status = object.status.as_ref()?;
    let waits = matches!(status.phase, None | Some(InstancePhase::Pending | InstancePhase::Failed));
    if !waits || status.observed_generation != object.metadata.generation {
        return None;
    }
    let why = not_ready(object).filter(|why| STUCK.contains(&why.reason))?;
    let had_place = status.replicas.iter().any(|replica| replica.epoch > 0);
    Some(match why.reason {
        UNPLACEABLE if had_place => why.since_s.saturating_add(PLACE_AGAIN_S),
        _ => 0,
    })
}

/// When the controller tries the first of the replicas again, if it waits with all of them. What it
/// said of an older spec does not count.
fn not_before(object: &InferenceInstance) -> Option<i64> {
    let status = object.status.as_ref()?;
    let is_current = status.observed_generation == object.metadata.generation;
    let tries = status.replicas.iter().map(|replica| match &replica.retry_after {
        Some(time) if !replica.ready => time.0.as_second(),
        Some(_) | None => 0,
    });
    tries.min().filter(|first| is_current && *first > 0)
}

fn served<'a>(
    model: &str,
    instances: impl IntoIterator<Item = (&'a InstanceKey, &'a Instance)>,
) -> Served {
    let mut served = Served {
        model: model.to_owned(),
        seed: None,
        targets: Vec::new(),
        waiting_for: None,
        not_before: None,
        stuck_since: Some(0),
    };
    let mut first_try = i64::MAX;
    for (_, instance) in instances {
        first_try = first_try.min(instance.not_before.unwrap_or(0));
        let both = served.stuck_since.zip(instance.stuck_since);
        served.stuck_since = both.map(|(a, b)| a.max(b));
        served.seed = served.seed.or(instance.seed);
        served.targets.extend(instance.ready.iter().cloned());
        served.waiting_for = served.waiting_for.or_else(|| instance.waiting_for.clone());
    }
    served.not_before = Some(first_try).filter(|first| *first > 0);
    served
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn instance(
        namespace: &str,
        name: &str,
        model: &str,
        replicas: &[(u32, u64, bool)],
    ) -> InferenceInstance {
        let replicas: Vec<_> = replicas
            .iter()
            .map(|(index, epoch, ready)| {
                json!({"index": index, "epoch": epoch, "nodes": ["a"], "ready": ready,
                       "endpoint": ready.then(|| format!("10.0.0.{index}:{epoch}"))})
            })
            .collect();
        serde_json::from_value(json!({
            "apiVersion": "exo.dev/v1alpha1", "kind": "InferenceInstance",
            "metadata": {"namespace": namespace, "name": name,
                         "creationTimestamp": "2026-01-02T03:04:05Z"},
            "spec": {"model": model, "seed": 7},
            "status": {"replicas": replicas, "conditions": [{
                "type": "Ready", "status": "False", "reason": "NoCapacity",
                "message": "no node has 19Gi free", "lastTransitionTime": "2026-01-02T03:04:05Z"}]},
        }))
        .unwrap()
    }

    fn model(name: &str, repo: Option<&str>) -> Model {
        serde_json::from_value(json!({
            "apiVersion": "exo.dev/v1alpha1", "kind": "Model", "metadata": {"name": name},
            "spec": {"source": {"repo": repo}, "weights": {"layer": 1, "embedding": 1, "head": 1},
                "architecture": {"modelType": "llama", "layers": 2, "hiddenSize": 8, "heads": 2,
                    "kvHeads": 2, "headDim": 4, "vocabSize": 16, "contextLength": 32}},
        }))
        .unwrap()
    }

    fn endpoints(index: &Index, name: &str) -> Option<Vec<String>> {
        let served = index.lookup(name)?;
        Some(served.targets.into_iter().map(|t| t.endpoint).collect())
    }

    #[test]
    fn a_name_is_an_instance_then_a_model_then_a_repository() {
        let mut index = Index::default();
        assert!(!index.is_complete());
        index.replace_instances(&[
            instance("default", "chat", "llama-70b", &[(0, 3, true), (1, 1, false)]),
            instance("default", "second", "llama-70b", &[(2, 4, true)]),
        ]);
        index.replace_models(&[
            model("llama-70b", Some("meta/llama")),
            model("unused", Some("meta/unused")),
        ]);
        assert!(index.is_complete());

        let both = || Some(vec!["10.0.0.0:3".to_owned(), "10.0.0.2:4".to_owned()]);
        assert_eq!(endpoints(&index, "chat"), Some(vec!["10.0.0.0:3".to_owned()]));
        assert_eq!(endpoints(&index, "default/chat"), endpoints(&index, "chat"));
        assert_eq!(endpoints(&index, "llama-70b"), both());
        assert_eq!(endpoints(&index, "meta/llama"), both());
        for unknown in ["", "meta/unused", "unused", "other/chat", "CHAT"] {
            assert_eq!(endpoints(&index, unknown), None, "{unknown}");
        }
        let served = index.lookup("chat").unwrap();
        assert_eq!(served.seed, Some(7));
        assert_eq!(served.waiting_for.as_deref(), Some("NoCapacity: no node has 19Gi free"));
    }

    #[test]
    fn what_is_tried_later_says_when() {
        let check = |second: Option<&str>, generation: i64, expect: Option<i64>| {
            let mut object = instance("default", "chat", "m", &[(0, 3, false), (1, 1, false)]);
            object.metadata.generation = Some(generation);
            let status = object.status.as_mut().unwrap();
            status.observed_generation = Some(1);
            let times = [Some("2026-01-02T03:04:05Z"), second];
            for (replica, time) in status.replicas.iter_mut().zip(times) {
                replica.retry_after = time.map(|time| serde_json::from_value(json!(time)).unwrap());
            }
            let mut index = Index::default();
            index.apply_instance(&object);
            assert_eq!(index.lookup("chat").unwrap().not_before, expect);
            index.apply_instance(&instance("default", "other", "m", &[(0, 1, false)]));
            assert_eq!(index.lookup("m").unwrap().not_before, None, "the other may come first");
        };
        check(Some("2026-01-02T03:00:00Z"), 1, Some(1_767_322_800));
        check(None, 1, None);
        check(Some("2026-01-02T03:00:00Z"), 2, None);
    }

    #[test]
    fn what_only_somebody_can_change_is_stuck() {
        const SAID_AT: i64 = 1_767_323_045;
        let check = |reason: &str, phase: &str, epochs: &[u64], expect: Option<i64>| {
            let replicas: Vec<_> =
                (0..).zip(epochs).map(|(index, epoch)| (index, *epoch, false)).collect();
            let mut object = instance("default", "chat", "m", &replicas);
            let status = object.status.as_mut().unwrap();
            status.phase = serde_json::from_value(json!(phase)).unwrap();
            status.conditions[0].reason = reason.to_owned();
            let mut index = Index::default();
            index.apply_instance(&object);
            assert_eq!(index.lookup("chat").unwrap().stuck_since, expect, "{reason} {phase}");
            // A verdict on an older spec is none.
            object.metadata.generation = Some(2);
            index.apply_instance(&object);
            assert_eq!(index.lookup("chat").unwrap().stuck_since, None, "{reason} {phase}");
        };
        check("Unplaceable", "Pending", &[0], Some(0));
        check("Unplaceable", "Pending", &[0, 3], Some(SAID_AT + 20));
        check("Unplaceable", "Starting", &[0, 3], None);
        check("ModelNotFound", "Pending", &[], Some(0));
        check("NoReplicas", "Pending", &[4], Some(0));
        check("WeightsNotFound", "Failed", &[1], Some(0));
        check("ShardFailed", "Failed", &[1], None);
        check("Starting", "Starting", &[1], None);
    }

    #[test]
    fn what_is_stuck_is_not_listed() {
        let mut stuck = instance("default", "stuck", "m", &[(0, 3, false)]);
        let status = stuck.status.as_mut().unwrap();
        status.conditions[0].reason = "Unplaceable".to_owned();
        let mut index = Index::default();
        index.apply_instance(&stuck);
        let ids = |index: &Index, now_s| -> Vec<String> {
            index.list(now_s).into_iter().map(|listed| listed.id).collect()
        };
        assert_eq!(ids(&index, 1_767_323_064), ["stuck"], "its nodes may come back");
        assert_eq!(ids(&index, 1_767_323_065), [""; 0]);
        assert!(index.lookup("m").unwrap().is_stuck(1_767_323_065));
        index.apply_instance(&instance("default", "starting", "m", &[(0, 1, false)]));
        assert_eq!(ids(&index, 1_767_323_065), ["starting"]);
        assert!(!index.lookup("m").unwrap().is_stuck(1_767_323_065), "the other one serves it");
        index.apply_instance(&instance("default", "stuck", "m", &[(0, 4, true)]));
        assert_eq!(ids(&index, 1_767_323_065), ["starting", "stuck"]);
    }

    #[test]
    fn a_new_epoch_is_another_replica() {
        let mut index = Index::default();
        index.apply_instance(&instance("default", "chat", "m", &[(0, 3, true)]));
        let old = index.lookup("chat").unwrap().targets[0].replica.clone();
        assert!(index.is_ready(&old));
        index.apply_instance(&instance("default", "chat", "m", &[(0, 4, true)]));
        assert!(!index.is_ready(&old));
        index.delete_instance(&instance("default", "chat", "m", &[]));
        assert_eq!(index.lookup("chat"), None);
    }

    #[test]
    fn a_name_in_two_namespaces_is_listed_twice() {
        let mut index = Index::default();
        index.apply_instance(&instance("team", "chat", "m", &[]));
        index.apply_instance(&instance("default", "chat", "n", &[]));
        let ids: Vec<_> = index.list(0).into_iter().map(|l| l.id).collect();
        assert_eq!(ids, ["chat", "team/chat"]);
        assert_eq!(index.lookup("chat").unwrap().model, "n");
        assert_eq!(index.lookup("team/chat").unwrap().model, "m");
        assert_eq!(index.list(0)[0].created, 1_767_323_045);
    }
}
