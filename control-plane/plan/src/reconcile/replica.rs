//! What to do next about one replica: its newest epoch runs on, ends, waits, or another follows.

use std::time::Duration;

use exo_crds::{REASON_WEIGHTS_NOT_FOUND, ReplicaStatus, Shard, event::Occurrence};
use k8s_openapi::jiff::Timestamp;

use super::{
    Action, HEARSAY_DELAY_S, NAME_TOO_LONG, Observed, PERMANENT_DELAY_S, SHARD_FAILED, STABLE_S,
    State, UNPLACEABLE_RETRY, after, back_off_s, build, by_rank, delete, events, is_deleting,
    promise, status, time_left,
    verdict::{self, End, Verdict},
    whole_seconds,
};
use crate::{NodeState, Placing, place};

/// Why an epoch failed; see [`End::Failed`].
struct Failure<'a> {
    message: &'a str,
    reason: &'a str,
    permanent: bool,
    hearsay: bool,
    blameless: bool,
}

/// One replica's part of a decision.
pub(super) struct Outcome {
    pub(super) actions: Vec<Action>,
    pub(super) status: ReplicaStatus,
    pub(super) state: State,
    pub(super) requeue_after: Option<Duration>,
}

/// Decides about the replicas one after the other, each with the memory that the earlier ones left.
pub(super) struct Planner<'a> {
    pub(super) observed: &'a Observed<'a>,
    /// The instance's spec changed since the last status was written.
    pub(super) edited: bool,
    pub(super) nodes: Vec<NodeState>,
    /// What is told, of all replicas.
    pub(super) events: Vec<Occurrence>,
}

impl Planner<'_> {
    pub(super) fn replica(
        &mut self,
        index: u32,
        known: Option<&ReplicaStatus>,
        shards: &[&Shard],
    ) -> Outcome {
        let mut status = known.cloned().unwrap_or_default();
        status.index = index;
        let newest = shards.iter().map(|shard| shard.spec.epoch).max();
        if newest.is_some_and(|newest| newest > status.epoch) {
            // A status that was lost: count on from what exists.
            status = ReplicaStatus {
                index,
                epoch: newest.unwrap_or_default(),
                ..ReplicaStatus::default()
            };
        }
        let (current, old): (Vec<&Shard>, Vec<&Shard>) =
            shards.iter().partition(|shard| shard.spec.epoch == status.epoch);
        let mut actions = delete(&old);
        let mut verdict = verdict::judge(self.observed, &current);
        if asks_for_next(&status, &current, self.observed.now) {
            forget_failures(&mut status);
            if let Verdict::Ended(end @ End::Failed { .. }) = &mut verdict {
                *end = End::Deleted;
            }
        }
        if !matches!(verdict, Verdict::Live { ready: true, .. }) {
            status.ready = false;
            status.endpoint = None;
        }
        let mut outcome = match verdict {
            Verdict::Empty if old.is_empty() => self.next_epoch(status),
            Verdict::Empty => stopping(status, &old),
            Verdict::Live { ready, rendezvous } => self.live(status, &current, ready, rendezvous),
            Verdict::Ended(End::Failed { message, reason, permanent, hearsay, blameless })
                if !self.edited =>
            {
                let (message, reason) = (&message, &reason);
                let failure = Failure { message, reason, permanent, hearsay, blameless };
                self.failed(status, &current, &failure)
            }
            Verdict::Ended(end) => {
                if self.edited || end == End::Changed {
                    forget_failures(&mut status);
                }
                status.ready_since = None;
                let mut outcome = stopping(status, shards);
                // Shards that are deleted for the next try were ended by what failed before.
                let cause = match (&outcome.status.last_failure, &end) {
                    (Some(failure), End::Deleted) => failure.clone(),
                    _ => end.to_string(),
                };
                if let State::Stopping(message) = &mut outcome.state {
                    *message = format!("{cause}; {message}");
                }
                outcome.actions = delete(&current);
                if !outcome.actions.is_empty() {
                    self.events.push(events::ended(index, &end));
                }
                outcome
            }
        };
        self.events.extend(events::progress(known, &outcome.status));
        actions.append(&mut outcome.actions);
        outcome.actions = actions;
        outcome
    }

    /// All shards are there and none has failed.
    fn live(
        &self,
        mut status: ReplicaStatus,
        shards: &[&Shard],
        ready: bool,
        rendezvous: Vec<Action>,
    ) -> Outcome {
        let now = self.observed.now;
        status.nodes = by_rank(shards).iter().map(|shard| shard.spec.node.clone()).collect();
        stop_waiting(&mut status);
        let mut requeue_after = None;
        let state = if ready {
            status.ready = true;
            status.endpoint = verdict::endpoint(shards);
            let since = status.ready_since.get_or_insert_with(|| whole_seconds(now)).clone();
            let left = since.0.as_second() + STABLE_S - now.as_second();
            if left <= 0 {
                forget_failures(&mut status);
            } else if status.failures > 0 || status.last_failure.is_some() {
                requeue_after = Some(Duration::from_secs(left.unsigned_abs()));
            }
            State::Ready
        } else {
            // `ready_since` stays: an agent that is stopped stops its runners first.
            State::Starting(status::progress(shards, &status))
        };
        let mut actions = build::adopt(self.observed.instance, shards);
        actions.extend(rendezvous);
        Outcome { actions, status, state, requeue_after }
    }

    /// A shard has failed: its peers stop now, the failed ones when it is time to try again. While
    /// there is only hearsay nothing is stopped: the rank that knows the cause must be able to say
    /// so, and a broken group ends by itself.
    fn failed(
        &self,
        mut status: ReplicaStatus,
        shards: &[&Shard],
        failure: &Failure<'_>,
    ) -> Outcome {
        let &Failure { message, reason, permanent, hearsay, blameless } = failure;
        let now = self.observed.now;
        let fresh_message = status.last_failure.as_deref() != Some(message);
        let known = status.retry_after.is_some();
        // An epoch that is not counted keeps the time since when it was ready until it is over: who
        // is to blame may come to light only after a peer's words.
        let excused = blameless && status.ready_since.is_some();
        let counts = !excused && (!known || status.ready_since.is_some());
        if counts {
            let stable = status
                .ready_since
                .take()
                .is_some_and(|since| since.0.as_second() + STABLE_S <= now.as_second());
            status.failures = if stable { 1 } else { status.failures.saturating_add(1) };
        }
        // A cause that comes to light later overrules what its peers said first; one that several
        // ranks have in common is told of one of them.
        let in_common = status.last_failure_reason() == Some(reason);
        if !known || (fresh_message && !hearsay && !in_common) {
            status.last_failure = Some(message.to_owned());
        }
        if !known || counts || (fresh_message && permanent && !in_common) {
            let back_off = back_off_s(if excused { 1 } else { status.failures });
            let delay = match (permanent, hearsay) {
                (true, _) => PERMANENT_DELAY_S,
                (false, true) => back_off.max(HEARSAY_DELAY_S),
                (false, false) => back_off,
            };
            status.retry_after = Some(after(now, delay));
        }
        let wait = time_left(status.retry_after.as_ref(), now);
        status.kept_shards = kept(shards);
        let to_delete: Vec<&Shard> = shards
            .iter()
            .copied()
            .filter(|shard| wait.is_none() || !(hearsay || verdict::has_failed(shard)))
            .collect();
        Outcome {
            actions: delete(&to_delete),
            state: State::BackOff {
                reason: match reason {
                    REASON_WEIGHTS_NOT_FOUND => REASON_WEIGHTS_NOT_FOUND,
                    _ => SHARD_FAILED,
                },
                message: status::back_off(&status),
            },
            status,
            requeue_after: wait,
        }
    }

    /// No shard is left: place the replica, unless it must wait.
    fn next_epoch(&mut self, mut status: ReplicaStatus) -> Outcome {
        let observed = self.observed;
        status.nodes.clear();
        status.ready_since = None;
        if self.edited {
            forget_failures(&mut status);
        }
        if let Some(wait) = time_left(status.retry_after.as_ref(), observed.now) {
            return Outcome {
                actions: Vec::new(),
                state: State::BackOff { reason: SHARD_FAILED, message: status::back_off(&status) },
                status,
                requeue_after: Some(wait),
            };
        }
        let unplaceable = |status, reason, message| Outcome {
            actions: Vec::new(),
            status,
            state: State::Unplaceable { reason, message },
            requeue_after: Some(UNPLACEABLE_RETRY),
        };
        if let Some(message) = build::name_too_long(observed.instance) {
            // Names don't change: nothing to come back for.
            let outcome = unplaceable(status, NAME_TOO_LONG, message);
            return Outcome { requeue_after: None, ..outcome };
        }
        let wanted = &observed.instance.spec.model;
        let Some(model) = observed.models.get(wanted) else {
            let message = format!("there is no model named {wanted}");
            return unplaceable(status, "ModelNotFound", message);
        };
        let placement = match place(&Placing {
            model,
            instance: &observed.instance.spec,
            nodes: &self.nodes,
        }) {
            Ok(placement) => placement,
            Err(refusal) => return unplaceable(status, "Unplaceable", refusal.to_string()),
        };
        for rank in &placement.ranks {
            promise(&mut self.nodes, &rank.node, rank.memory_bytes);
        }
        status.epoch += 1;
        stop_waiting(&mut status);
        status.nodes = placement.ranks.iter().map(|r| r.node.clone()).collect();
        let shards = build::shards(observed.instance, model, &status, &placement);
        let references: Vec<&Shard> = shards.iter().collect();
        let state = State::Starting(status::progress(&references, &status));
        Outcome {
            actions: shards.into_iter().map(|shard| Action::Create(Box::new(shard))).collect(),
            status,
            state,
            requeue_after: None,
        }
    }
}

fn stopping(status: ReplicaStatus, left: &[&Shard]) -> Outcome {
    let names: Vec<&str> = left.iter().filter_map(|shard| shard.metadata.name.as_deref()).collect();
    Outcome {
        actions: Vec::new(),
        status,
        state: State::Stopping(format!("waiting for {} to stop", names.join(", "))),
        requeue_after: None,
    }
}

/// Failed shards that nobody has deleted, by name.
fn kept(shards: &[&Shard]) -> Vec<String> {
    by_rank(shards)
        .into_iter()
        .filter(|shard| verdict::has_failed(shard) && !is_deleting(shard))
        .filter_map(|shard| shard.metadata.name.clone())
        .collect()
}

/// Whether somebody deleted a failed shard that is kept until the next try: we don't before.
fn asks_for_next(status: &ReplicaStatus, shards: &[&Shard], now: Timestamp) -> bool {
    let is_there = |name: &String| {
        let mut there = shards.iter().filter(|shard| !is_deleting(shard));
        there.any(|shard| shard.metadata.name.as_ref() == Some(name))
    };
    time_left(status.retry_after.as_ref(), now).is_some()
        && !status.kept_shards.iter().all(is_there)
}

fn stop_waiting(status: &mut ReplicaStatus) {
    status.retry_after = None;
    status.kept_shards.clear();
}

fn forget_failures(status: &mut ReplicaStatus) {
    stop_waiting(status);
    status.failures = 0;
    status.last_failure = None;
}
