//! When this node stands for election.
//!
//! openraft stands when its own timer ends, whether anybody would vote for it or not. Each try raises
//! the term, and with it a voter that was only just started takes the office from a leader that all
//! others follow, or the time from the one voter that can win. So openraft's own timer is off. A
//! voter that hears nothing of a leader first asks the others whether they would have it
//! (Ongaro, "Consensus: Bridging Theory and Practice", 9.6), and stands when a majority would.
//!
//! None of this decides who leads: that do the votes alone, which openraft asks for and gives.

use std::{
    hash::{BuildHasher as _, RandomState},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use openraft::{LogId, ServerState};
use serde::{Deserialize, Serialize};
use tokio::{
    task::JoinSet,
    time::{Instant, sleep, sleep_until, timeout_at},
};

use super::{call::Target, network::json, node::Node};

/// A voter that heard nothing of a leader for a time between these, in milliseconds, looks for
/// another one. A leader is heard every 225 ms at least, so that two of its calls may be lost.
const PATIENCE_MS: (u64, u64) = (600, 750);
/// The same for a voter that was only just started, and may be one of many.
const FIRST_PATIENCE_MS: (u64, u64) = (150, 300);
/// Who heard of a leader within this time wants no other one; openraft gives no vote then either.
const LEASE: Duration = Duration::from_millis(super::ELECTION_MS.1);
/// Between two questions, in milliseconds.
const AGAIN_MS: (u64, u64) = (30, 90);
/// Answers take this long at most.
const ANSWER_LIMIT: Duration = Duration::from_millis(200);
/// An election is over after this time, in milliseconds: several disks have to be waited for.
const ELECTION_OVER_MS: (u64, u64) = (400, 600);
/// Who would have another one leads it the time for that.
const PROMISE: Duration = Duration::from_millis(250);

/// A node that would stand.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Candidate {
    id: u64,
    /// The newest entry of its log.
    last: Option<LogId<u64>>,
}

impl Candidate {
    /// More of the log is better; the id settles the rest, so that two do not go on side by side.
    fn is_better_than(self, other: Self) -> bool {
        (self.last, self.id) > (other.last, other.id)
    }
}

/// What a node knows of leaders and candidates.
pub(super) struct Ear(Mutex<Known>);

#[derive(Clone, Copy)]
struct Known {
    heard: Instant,
    /// Until then another one may stand.
    promised: Option<Instant>,
    /// Set while this node asks.
    standing: Option<Candidate>,
}

impl Ear {
    pub(super) fn new() -> Self {
        Self(Mutex::new(Known { heard: Instant::now(), promised: None, standing: None }))
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A leader called, or a vote was given.
    pub(super) fn heard(&self) {
        self.known().heard = Instant::now();
    }

    /// Whether this node would have another one lead, which has `own.last` itself.
    fn would_have(&self, other: Candidate, own: Candidate, now: Instant) -> bool {
        let mut known = self.known();
        let hears_a_leader = now.saturating_duration_since(known.heard) < LEASE;
        let is_better = known.standing.is_some_and(|standing| standing.is_better_than(other));
        if hears_a_leader || is_better || other.last < own.last {
            return false;
        }
        known.standing = None;
        known.promised = Some(now + PROMISE);
        true
    }

    /// When this node may begin to ask.
    fn due(&self, patience: Duration) -> Instant {
        let known = self.known();
        (known.heard + patience).max(known.promised.unwrap_or(known.heard))
    }
}

impl Node {
    fn candidate(&self) -> Candidate {
        Candidate { id: self.id, last: self.disk.newest() }
    }

    /// This node's answer to another one that would stand.
    pub(super) fn would_have(&self, other: Candidate) -> bool {
        self.ear.would_have(other, self.candidate(), Instant::now())
    }

    fn leads(&self) -> bool {
        self.metrics().borrow().state == ServerState::Leader
    }

    /// The other voters, if this node is one.
    fn rivals(&self) -> Option<Vec<Target>> {
        let members = self.members();
        members.iter().any(|m| m.is_voter && m.id == self.id).then(|| {
            let others = members.into_iter().filter(|m| m.is_voter && m.id != self.id);
            others.map(|m| Target { id: m.id, address: m.address }).collect()
        })
    }
}

/// Stands for election whenever it is time, until Raft stops.
pub(super) async fn keep(node: Arc<Node>) {
    let mut patience = between(FIRST_PATIENCE_MS);
    while node.metrics().borrow().running_state.is_ok() {
        if node.leads() {
            node.ear.heard();
        }
        let due = node.ear.due(patience);
        if Instant::now() < due {
            sleep_until(due).await;
            continue;
        }
        let Some(rivals) = node.rivals() else {
            // A learner may become a voter any time.
            node.ear.heard();
            continue;
        };
        if !is_wanted(&node, rivals).await {
            sleep(between(AGAIN_MS)).await;
            continue;
        }
        if node.raft.trigger().elect().await.is_err() {
            return;
        }
        election_over(&node).await;
        patience = between(PATIENCE_MS);
    }
}

/// Whether a majority of the voters would have this node. Asks all of them at once.
async fn is_wanted(node: &Node, rivals: Vec<Target>) -> bool {
    let own = node.candidate();
    let needed = rivals.len().div_ceil(2);
    let began = Instant::now();
    {
        let mut known = node.ear.known();
        if known.promised.is_some_and(|until| until > began) {
            return false;
        }
        known.standing = Some(own);
    }
    let mut asked = JoinSet::new();
    for rival in rivals {
        let caller = node.caller.clone();
        asked.spawn(async move {
            caller.post::<bool>(&rival, "would-have", json(&own), ANSWER_LIMIT).await
        });
    }
    let mut votes = 0;
    while votes < needed
        && let Ok(Some(answer)) = timeout_at(began + ANSWER_LIMIT, asked.join_next()).await
    {
        votes += usize::from(matches!(answer, Ok(Ok(true))));
    }
    // Meanwhile a leader may have called, or a better candidate.
    let mut known = node.ear.known();
    let still = known.standing.take() == Some(own) && known.heard <= began;
    still && votes >= needed
}

/// Waits until this node leads, hears of a leader, or has waited long enough for either.
async fn election_over(node: &Node) {
    let began = Instant::now();
    let limit = began + between(ELECTION_OVER_MS);
    let mut metrics = node.metrics();
    loop {
        let leads = metrics.borrow_and_update().state == ServerState::Leader;
        if leads || node.ear.known().heard > began {
            return node.ear.heard();
        }
        // News are not the only thing that counts: it looks again all the same.
        let again = (Instant::now() + between(AGAIN_MS)).min(limit);
        let _ = timeout_at(again, metrics.changed()).await;
        if Instant::now() >= limit {
            return;
        }
    }
}

fn between((from, to): (u64, u64)) -> Duration {
    // The standard library's hasher takes its keys from the system's random source.
    Duration::from_millis(from + RandomState::new().hash_one(0) % (to - from + 1))
}

#[cfg(test)]
mod tests {
    use openraft::CommittedLeaderId;

    use super::*;

    fn candidate(id: u64, index: u64) -> Candidate {
        Candidate { id, last: Some(LogId::new(CommittedLeaderId::new(1, 1), index)) }
    }

    #[tokio::test]
    async fn another_one_is_wanted_only_when_no_leader_is_heard_and_it_has_all() {
        let ear = Ear::new();
        let (own, now) = (candidate(2, 10), Instant::now());
        let late = now + LEASE * 2;
        assert!(!ear.would_have(candidate(1, 10), own, now), "a leader was heard");
        assert!(!ear.would_have(candidate(1, 9), own, late), "it lacks an entry");
        assert!(ear.would_have(candidate(1, 10), own, late));
        assert_eq!(ear.due(Duration::ZERO), late + PROMISE, "it is given time");
        ear.heard();
        assert!(!ear.would_have(candidate(3, 99), own, Instant::now()));
    }

    #[tokio::test]
    async fn of_two_that_stand_the_better_one_goes_on() {
        let late = Instant::now() + LEASE * 2;
        let check = |own: Candidate, other: Candidate, gives_way: bool| {
            let ear = Ear::new();
            ear.known().standing = Some(own);
            assert_eq!(ear.would_have(other, own, late), gives_way, "{own:?} {other:?}");
            assert_eq!(ear.known().standing.is_none(), gives_way);
        };
        check(candidate(2, 10), candidate(3, 10), true);
        check(candidate(3, 10), candidate(2, 10), false);
        check(candidate(3, 10), candidate(2, 11), true);
        check(candidate(2, 11), candidate(3, 10), false);
    }

    #[test]
    fn random_times_are_within_their_limits() {
        let times: Vec<_> = (0..200).map(|_| between((10, 12)).as_millis()).collect();
        assert!((10..=12).all(|ms| times.contains(&ms)) && times.iter().all(|ms| *ms <= 12));
    }
}
