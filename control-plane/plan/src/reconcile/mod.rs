//! What to do next about one instance.
//!
//! # Guarantees
//! - A replica gets shards of a new epoch only when none of its older shards is left.
//! - An epoch number is never used twice: the decision that takes a number also writes it into the
//!   status, and whoever acts writes the status first, on condition that nobody else did.
//! - Shards that the server would refuse for their names are never asked for; those that it refuses
//!   for something else count as a failed epoch (see [`create_refused`]), so that the next try waits.
//! - Shards of an epoch that failed stay, for their messages to be read, until the next try; their
//!   peers are stopped at once. When somebody else deletes one of those that stay, that try comes at
//!   once, and earlier failures are forgotten.
//! - An epoch that had been ready and ended because an agent or a node went away is no failure: it
//!   is not counted, and the next one waits as after a first failure. Nodes that come and go still
//!   cannot make epochs follow each other faster than models become ready: an epoch that ends
//!   before that counts, whatever ended it.
//!
//! # Assumptions
//! - What is observed was read after the last own writes, so that a shard just created is seen.

mod build;
mod events;
mod replica;
mod status;
mod verdict;

#[cfg(test)]
mod tests;

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use exo_crds::{
    InferenceInstance, InferenceInstanceStatus, Model, Node, Rendezvous, ReplicaStatus,
    SHARD_FINALIZER, Shard, ShardPhase, event::Occurrence,
};
use k8s_openapi::{
    apimachinery::pkg::apis::meta::v1::{OwnerReference, Time},
    jiff::Timestamp,
};
use serde::Serialize;

use self::replica::Planner;
use crate::{NodeState, Share, memory_needed};

/// A first failure is often a neighbour's: try again soon, then ever more slowly.
const FIRST_DELAY_S: i64 = 1;
const LONGEST_DELAY_S: i64 = 60;
/// An agent's report of its own runner's end comes within this; cut to a whole second, so it may be
/// one less.
const HEARSAY_DELAY_S: i64 = 2;
/// Bad weights don't get better by themselves, but somebody may replace the files.
const PERMANENT_DELAY_S: i64 = 300;
/// After being ready for this long, earlier failures are forgotten: an instance that answers for
/// longer than it would ever wait for its next try loses little by each.
const STABLE_S: i64 = LONGEST_DELAY_S;
/// Kubernetes' word for an object whose dependents stay when it goes.
const ORPHAN_FINALIZER: &str = "orphan";
/// Reason of a Ready condition of an instance that waits for its next try. Where it has no weights
/// it says that instead: trying again will not bring them.
const SHARD_FAILED: &str = "ShardFailed";
/// Reason of the conditions of an instance whose name does not fit into a label.
const NAME_TOO_LONG: &str = "NameTooLong";
/// Memory of nodes changes without a trigger of its own.
const UNPLACEABLE_RETRY: Duration = Duration::from_secs(5);

/// Everything that a decision rests on.
#[derive(Clone, Copy, Debug)]
pub struct Observed<'a> {
    pub instance: &'a InferenceInstance,
    /// By name.
    pub models: &'a BTreeMap<String, Model>,
    pub nodes: &'a [Node],
    /// Of all instances: the others' take memory too.
    pub shards: &'a [Shard],
    pub now: Timestamp,
}

/// What to do, and what to say about it.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Decision {
    /// To be done in this order, after the status is written.
    pub actions: Vec<Action>,
    pub status: InferenceInstanceStatus,
    /// When to look again though nothing has changed.
    pub requeue_after: Option<Duration>,
    /// What there is to tell about the instance once the status is written.
    pub events: Vec<Occurrence>,
}

/// One write. Names are of Shards in the instance's namespace.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub enum Action {
    Create(Box<Shard>),
    SetRendezvous {
        name: String,
        rendezvous: Rendezvous,
    },
    /// Makes the instance the owner of a shard that has lost its own: somebody deleted an instance
    /// of this name and let the shards run.
    Adopt {
        name: String,
        /// All that it has then.
        owners: Vec<OwnerReference>,
        /// As of [`Action::Release`].
        resource_version: Option<String>,
    },
    Delete {
        namespace: String,
        name: String,
    },
    /// Takes the agent's finalizer away: its node is lost and can't do so itself.
    Release {
        namespace: String,
        name: String,
        /// Finalizers that stay.
        finalizers: Vec<String>,
        /// Of the shard that was decided about: one that has changed since is to be looked at anew.
        resource_version: Option<String>,
    },
}

/// State of one replica, for the conditions.
#[derive(Clone, Debug, PartialEq)]
enum State {
    Ready,
    Starting(String),
    /// Old shards are not gone yet.
    Stopping(String),
    BackOff {
        reason: &'static str,
        message: String,
    },
    Unplaceable {
        reason: &'static str,
        message: String,
    },
}

/// Decides about one instance.
pub fn reconcile(observed: &Observed<'_>) -> Decision {
    let instance = observed.instance;
    let mine: Vec<&Shard> = observed
        .shards
        .iter()
        .filter(|shard| {
            shard.spec.instance == name_of(instance)
                && shard.metadata.namespace == instance.metadata.namespace
        })
        .collect();
    let deleting = instance.metadata.deletion_timestamp.is_some();
    let wanted = if deleting { 0 } else { instance.spec.replicas };
    let finalizers = instance.metadata.finalizers.as_deref().unwrap_or_default();
    // Whoever deletes it so wants the shards to run on; garbage collection takes it out of them.
    let leaves_shards = deleting && finalizers.iter().any(|f| f == ORPHAN_FINALIZER);
    let before = instance.status.clone().unwrap_or_default();
    let edited = before.observed_generation != instance.metadata.generation;

    let mut actions = release_lost(observed.nodes, mine.iter().copied());
    let (mut replicas, mut retired) = (Vec::new(), Vec::new());
    let mut requeue_after = None;
    let nodes = node_states(observed);
    let mut planner = Planner { observed, edited, nodes, events: Vec::new() };
    let indices: BTreeSet<u32> = (0..wanted)
        .chain(mine.iter().map(|shard| shard.spec.replica))
        .chain(before.replicas.iter().map(|replica| replica.index))
        .collect();
    for index in indices {
        let shards: Vec<&Shard> =
            mine.iter().copied().filter(|shard| shard.spec.replica == index).collect();
        let known = before.replicas.iter().find(|r| r.index == index);
        if index >= wanted {
            if !leaves_shards {
                actions.extend(delete(&shards));
            }
            retired.push(retire(index, known, &shards));
            continue;
        }
        let outcome = planner.replica(index, known, &shards);
        actions.extend(outcome.actions);
        replicas.push((outcome.status, outcome.state));
        requeue_after = earliest(requeue_after, outcome.requeue_after);
    }
    let status = status::summarise(instance, &before, replicas, retired, observed.now);
    let mut events = planner.events;
    events.extend(events::unplaceable(&before, &status));
    Decision { actions, status, requeue_after, events }
}

/// Finalizers to take from shards that are being deleted on nodes that are gone or not Ready.
pub fn release_lost<'a>(
    nodes: &[Node],
    shards: impl IntoIterator<Item = &'a Shard>,
) -> Vec<Action> {
    shards
        .into_iter()
        .filter_map(|shard| {
            let finalizers = shard.metadata.finalizers.as_deref().unwrap_or_default();
            let release = is_deleting(shard)
                && finalizers.iter().any(|f| f == SHARD_FINALIZER)
                && verdict::lost_node(nodes, &shard.spec.node).is_some();
            release.then(|| Action::Release {
                namespace: shard.metadata.namespace.clone().unwrap_or_default(),
                name: shard.metadata.name.clone().unwrap_or_default(),
                finalizers: finalizers.iter().filter(|f| *f != SHARD_FINALIZER).cloned().collect(),
                resource_version: shard.metadata.resource_version.clone(),
            })
        })
        .collect()
}

/// What to write into an instance's status when the server refused to create `shard`, with its
/// words: the epoch has failed, and the next one waits as after any other failure. Conditions
/// follow with the next decision.
pub fn create_refused(
    status: &mut InferenceInstanceStatus,
    shard: &Shard,
    why: &str,
    now: Timestamp,
) {
    let replica = status.replicas.iter_mut().find(|r| r.index == shard.spec.replica);
    if let Some(replica) = replica {
        let name = shard.metadata.name.as_deref().unwrap_or_default();
        replica.failures = replica.failures.saturating_add(1);
        replica.last_failure = Some(format!("the API server refused the shard {name}: {why}"));
        replica.retry_after = Some(after(now, back_off_s(replica.failures)));
    }
}

/// Nodes with the memory that is left when every shard holds what it will need.
pub(crate) fn node_states(observed: &Observed<'_>) -> Vec<NodeState> {
    let mut states: Vec<NodeState> =
        observed.nodes.iter().map(|node| NodeState::observe(node, 0)).collect();
    for shard in observed.shards {
        if is_deleting(shard) || verdict::has_failed(shard) {
            continue;
        }
        let Some(model) = observed.models.get(&shard.spec.model.name) else {
            continue;
        };
        let share = Share {
            sharding: shard.spec.sharding,
            rank: shard.spec.rank,
            world_size: shard.spec.world_size,
            layers: shard.spec.layers.range(),
        };
        let needed = memory_needed(&model.spec, shard.spec.context_length, &share);
        let held = shard.status.as_ref().and_then(|status| status.memory_bytes).unwrap_or(0);
        promise(&mut states, &shard.spec.node, needed.saturating_sub(held));
    }
    states
}

fn promise(states: &mut [NodeState], node: &str, bytes: u64) {
    let state = states.iter_mut().find(|state| state.name == node);
    if let Some(free) = state.and_then(|state| state.free_bytes.as_mut()) {
        *free = free.saturating_sub(bytes);
    }
}

/// All that stays of a replica that is no longer wanted: its epoch, so that the number is not used
/// again should the replica come back.
fn retire(index: u32, known: Option<&ReplicaStatus>, shards: &[&Shard]) -> ReplicaStatus {
    let newest = shards.iter().map(|shard| shard.spec.epoch).max();
    let epoch = known.map_or(0, |known| known.epoch);
    ReplicaStatus { index, epoch: epoch.max(newest.unwrap_or(0)), ..ReplicaStatus::default() }
}

fn delete(shards: &[&Shard]) -> Vec<Action> {
    shards
        .iter()
        .filter(|shard| !is_deleting(shard))
        .map(|shard| Action::Delete {
            namespace: shard.metadata.namespace.clone().unwrap_or_default(),
            name: shard.metadata.name.clone().unwrap_or_default(),
        })
        .collect()
}

fn name_of(instance: &InferenceInstance) -> &str {
    instance.metadata.name.as_deref().unwrap_or_default()
}

fn is_deleting(shard: &Shard) -> bool {
    shard.metadata.deletion_timestamp.is_some()
}

fn phase_of(shard: &Shard) -> ShardPhase {
    shard.status.as_ref().and_then(|status| status.phase).unwrap_or(ShardPhase::Pending)
}

fn by_rank<'a>(shards: &[&'a Shard]) -> Vec<&'a Shard> {
    let mut sorted = shards.to_vec();
    sorted.sort_by_key(|shard| shard.spec.rank);
    sorted
}

fn back_off_s(failures: u32) -> i64 {
    let doublings = failures.saturating_sub(1).min(16);
    (FIRST_DELAY_S << doublings).min(LONGEST_DELAY_S)
}

/// Times in resources have whole seconds.
fn whole_seconds(time: Timestamp) -> Time {
    Time(Timestamp::from_second(time.as_second()).unwrap_or(time))
}

/// About `delay_s` after `now`. Cut to a whole second, so up to one second early: a group of ranks
/// that broke should be back soon.
fn after(now: Timestamp, delay_s: i64) -> Time {
    let second = now.as_second().saturating_add(delay_s);
    Time(Timestamp::from_second(second).unwrap_or(Timestamp::MAX))
}

fn time_left(until: Option<&Time>, now: Timestamp) -> Option<Duration> {
    let left = until?.0.duration_since(now);
    Duration::try_from(left).ok().filter(|left| !left.is_zero())
}

fn earliest(a: Option<Duration>, b: Option<Duration>) -> Option<Duration> {
    match (a, b) {
        (Some(a), Some(b)) => Some(a.min(b)),
        (a, b) => a.or(b),
    }
}
