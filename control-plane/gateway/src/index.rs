//! What the gateway knows of the cluster: instances, their ready replicas, model names.
//!
//! A plain struct fed with `apply`/`delete`; never does IO and holds no clock.

use std::collections::BTreeMap;

use exo_crds::{InferenceInstance, InstancePhase, Model, REASON_WEIGHTS_NOT_FOUND, ReplicaStatus};
use kube::ResourceExt as _;

/// For so long what has no place is waited for: nodes come, and come back, and memory that was given
/// back is reported after seconds.
const PLACE_S: i64 = 20;
/// What never had one for want of something else: an instance may be created before its model.
const MODEL_S: i64 = 5;

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
    /// Since when some replica has no place.
    unplaced_since: Option<i64>,
    stuck: Option<Stuck>,
}

/// Why nothing becomes ready before somebody does something.
#[derive(Clone, Debug)]
struct Stuck {
    reason: String,
    /// Since when that is so; seconds since 1970.
    began_s: i64,
    /// Since when it is sure: what began just now may yet change.
    sure_s: i64,
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

    pub(crate) fn apply_instance(&mut self, object: &InferenceInstance, now_s: i64) {
        let before = self.instances.remove(&key_of(object));
        self.insert(object, before.as_ref(), now_s);
    }

    /// `before` is what was known of the same instance.
    fn insert(&mut self, object: &InferenceInstance, before: Option<&Instance>, now_s: i64) {
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
        let waiting_for = lack(object, "Ready").filter(|why| !why.message.is_empty()).map(|why| {
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
                unplaced_since: unplaced_since(object),
                stuck: stuck(object, before, now_s),
            },
        );
    }

    pub(crate) fn delete_instance(&mut self, object: &InferenceInstance) {
        self.instances.remove(&key_of(object));
    }

    /// A fresh list takes the place of everything known before.
    pub(crate) fn replace_instances(&mut self, objects: &[InferenceInstance], now_s: i64) {
        let before = std::mem::take(&mut self.instances);
        for object in objects {
            self.insert(object, before.get(&key_of(object)), now_s);
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

/// What a condition that is not True says.
struct Lack<'a> {
    reason: &'a str,
    message: &'a str,
    since_s: i64,
}

/// `None` where the instance has no such condition, or it is True.
fn lack<'a>(object: &'a InferenceInstance, kind: &str) -> Option<Lack<'a>> {
    let conditions = &object.status.as_ref()?.conditions;
    let condition = conditions.iter().find(|c| c.type_ == kind && c.status != "True")?;
    Some(Lack {
        reason: &condition.reason,
        message: &condition.message,
        since_s: condition.last_transition_time.0.as_second(),
    })
}

/// Since when the controller says that some replica has no place.
fn unplaced_since(object: &InferenceInstance) -> Option<i64> {
    let lack = lack(object, "Placed").or_else(|| lack(object, "Ready"))?;
    Some(lack.since_s)
}

/// Whether, and since when, nothing but somebody's doing helps. What the controller said of an
/// older spec does not count, nor what is the matter with one replica while another one is on its
/// way or tried again.
fn stuck(object: &InferenceInstance, before: Option<&Instance>, now_s: i64) -> Option<Stuck> {
    let status = object.status.as_ref()?;
    let waits = matches!(status.phase, None | Some(InstancePhase::Pending | InstancePhase::Failed));
    if !waits || status.observed_generation != object.metadata.generation {
        return None;
    }
    let reason = lack(object, "Ready")?.reason;
    let wanted = || status.replicas.iter().filter(|replica| replica.index < object.spec.replicas);
    let at_once = || Some(Stuck { reason: reason.to_owned(), began_s: 0, sure_s: 0 });
    match reason {
        "NoReplicas" => at_once(),
        REASON_WEIGHTS_NOT_FOUND if wanted().all(lacks_weights) => at_once(),
        // One that still has nodes stops, to be placed again.
        "ModelNotFound" | "NameTooLong" | "Unplaceable"
            if wanted().all(|replica| replica.nodes.is_empty()) =>
        {
            let began_s = began_s(object, reason, before, now_s)?;
            // None is placed before its pause is over.
            let pauses = wanted().filter_map(|replica| replica.retry_after.as_ref());
            let tried_s = pauses.map(|time| time.0.as_second()).fold(began_s, i64::max);
            let is_new = wanted().all(|replica| replica.epoch == 0);
            let grace_s = if is_new && reason != "Unplaceable" { MODEL_S } else { PLACE_S };
            let sure_s = tried_s.saturating_add(grace_s);
            Some(Stuck { reason: reason.to_owned(), began_s, sure_s })
        }
        _ => None,
    }
}

/// Once it has all its shards again, it tells only what was.
fn lacks_weights(replica: &ReplicaStatus) -> bool {
    replica.retry_after.is_some() && replica.last_failure_reason() == Some(REASON_WEIGHTS_NOT_FOUND)
}

/// Since when no replica has a place for that reason. The condition tells only since when some
/// replica has none, for whatever reason: if that was so before, it began now.
fn began_s(
    object: &InferenceInstance,
    reason: &str,
    before: Option<&Instance>,
    now_s: i64,
) -> Option<i64> {
    let told_s = unplaced_since(object)?;
    let Some(before) = before.filter(|before| before.unplaced_since == Some(told_s)) else {
        return Some(told_s);
    };
    let same = before.stuck.as_ref().filter(|stuck| stuck.reason == reason);
    Some(same.map_or(now_s, |stuck| stuck.began_s))
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
        let both = served.stuck_since.zip(instance.stuck.as_ref().map(|stuck| stuck.sure_s));
        served.stuck_since = both.map(|(a, b)| a.max(b));
        served.seed = served.seed.or(instance.seed);
        served.targets.extend(instance.ready.iter().cloned());
        served.waiting_for = served.waiting_for.or_else(|| instance.waiting_for.clone());
    }
    served.not_before = Some(first_try).filter(|first| *first > 0);
    served
}

#[cfg(test)]
mod tests;
