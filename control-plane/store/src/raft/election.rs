//! When this node stands for election.
//!
//! openraft stands when its own timer ends, whether anybody would vote for it or not. Each try raises
//! the term, and with it a voter that was only just started takes the office from a leader that all
//! others follow, or the time from the one voter that can win. So openraft's own timer is off. A
//! voter that hears nothing of a leader first asks the others whether they would have it
//! (Ongaro, "Consensus: Bridging Theory and Practice", 9.6), and stands when a majority would.
//!
//! None of this decides who leads: that do the votes alone, which openraft asks for and gives.
//!
//! All times but those that say how often something is looked at are multiplied by the node's
//! [`Pace`].

use std::{
    collections::BTreeSet,
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

use super::{call::Target, network::json, node::Node, pace::Pace};

/// A voter that heard nothing of a leader for a time between these, in milliseconds, looks for
/// another one. A leader is heard every 225 ms at least, so that a call of its may be lost; and
/// nobody agrees before [`LEASE`] is over.
const PATIENCE_MS: (u64, u64) = (450, 600);
/// The same for a voter that was only just started, and may be one of many, until it hears of one.
const FIRST_PATIENCE_MS: (u64, u64) = (150, 300);
/// Who heard of a leader within this time wants no other one; openraft gives no vote then either.
const LEASE: Duration = Duration::from_millis(super::ELECTION_MS.1);
/// A node looks at the clock this often. Where that is later than it should be, by more than the
/// second time, the node itself stood still, and calls of its leader may wait to be read.
const LOOK: Duration = Duration::from_millis(75);
const STOOD_STILL: Duration = Duration::from_millis(50);
/// Between two questions, in milliseconds.
const AGAIN_MS: (u64, u64) = (30, 90);
/// Answers take this long at most.
const ANSWER_LIMIT: Duration = Duration::from_millis(200);
/// An election is over after this time, in milliseconds: several disks have to be waited for.
const ELECTION_OVER_MS: (u64, u64) = (400, 600);
/// Who would have another one leads it the time for that.
const PROMISE: Duration = Duration::from_millis(250);

/// A voter whose disk is full stands so much later: one that has room is better for all.
const WITHOUT_ROOM: Duration = Duration::from_secs(2);

/// What is asked many times a second is told of again after this time.
const TOLD_AGAIN: Duration = Duration::from_secs(60);

/// A node that would stand.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Candidate {
    id: u64,
    /// The newest entry of its log.
    last: Option<LogId<u64>>,
    /// How long it waits for votes.
    #[serde(default)]
    pace: Pace,
}

impl Candidate {
    /// More of the log is better; the id settles the rest, so that two do not go on side by side.
    fn is_better_than(self, other: Self) -> bool {
        (self.last, self.id) > (other.last, other.id)
    }
}

/// What a node knows of leaders and candidates.
pub(super) struct Ear {
    known: Mutex<Known>,
    pace: Pace,
}

#[derive(Clone, Copy)]
struct Known {
    heard: Instant,
    /// Until then another one may stand.
    promised: Option<Instant>,
    /// When the promise was last one that may come too late, and a person was told.
    told: Option<Instant>,
    /// When this node, which leads, was last asked by one that lacks some of its log.
    needed: Option<Instant>,
    /// Set while this node asks.
    standing: Option<Candidate>,
}

impl Ear {
    pub(super) fn new(pace: Pace) -> Self {
        let heard = Instant::now();
        let known = Known { heard, promised: None, told: None, needed: None, standing: None };
        Self { known: Mutex::new(known), pace }
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A leader called, or a vote was given; or this node leads, and is followed.
    pub(super) fn heard(&self) {
        self.known().heard = Instant::now();
    }

    /// When that was last.
    pub(super) fn heard_at(&self) -> Instant {
        self.known().heard
    }

    /// When this node was last asked by one that can't be elected without it.
    pub(super) fn needed_at(&self) -> Option<Instant> {
        self.known().needed
    }

    /// This node stood still for so long: a leader could not be heard in that time.
    fn excuse(&self, pause: Duration, now: Instant) {
        let mut known = self.known();
        known.heard = (known.heard + pause).min(now);
    }

    /// Whether this node would have another one lead, which has `own.last` itself.
    fn would_have(&self, other: Candidate, own: Candidate, now: Instant) -> bool {
        let mut known = self.known();
        let silent = now.saturating_duration_since(known.heard);
        let hears_a_leader = silent < self.pace.times(LEASE);
        // Who has no time for another one's vote is not elected by it, and makes way for it.
        let is_better = known.standing.is_some_and(|standing| {
            standing.is_better_than(other) && standing.pace.has_time_for(other.pace)
        });
        if hears_a_leader || is_better || other.last < own.last {
            return false;
        }
        let in_time = other.pace.has_time_for(own.pace);
        // A vote that comes too late only keeps this node from standing itself, if it can.
        if !in_time && other.last == own.last {
            return false;
        }
        known.standing = None;
        known.promised = Some(now + self.pace.times(PROMISE));
        if !in_time && known.told.is_none_or(|told| now > told + TOLD_AGAIN) {
            known.told = Some(now);
            drop(known);
            tracing::warn!(
                candidate = other.id,
                "this node's disk is much slower than that of the voter that stands for election: \
                 its vote may come too late"
            );
        }
        true
    }

    /// When this node may begin to ask.
    fn due(&self, patience: Duration) -> Instant {
        let known = self.known();
        (known.heard + patience).max(known.promised.unwrap_or(known.heard))
    }
}

/// Those who decide together.
pub(super) struct Electorate {
    /// The other voters.
    pub(super) rivals: Vec<Target>,
    /// The sets of voters of which each must agree: two while the membership changes.
    configs: Vec<BTreeSet<u64>>,
}

impl Electorate {
    /// Whether these are a majority of every set.
    pub(super) fn is_majority(&self, agreed: &BTreeSet<u64>) -> bool {
        let holds = |voters: &BTreeSet<u64>| voters.intersection(agreed).count() * 2 > voters.len();
        self.configs.iter().all(holds)
    }
}

impl Node {
    fn candidate(&self) -> Candidate {
        Candidate { id: self.id, last: self.disk.newest(), pace: self.pace }
    }

    /// This node's answer to another one that would stand.
    pub(super) fn would_have(&self, other: Candidate) -> bool {
        let own = self.candidate();
        if other.last < own.last && self.leads() {
            self.ear.known().needed = Some(Instant::now());
        }
        !self.is_followed() && self.ear.would_have(other, own, Instant::now())
    }

    pub(super) fn leads(&self) -> bool {
        self.metrics().borrow().state == ServerState::Leader
    }

    /// Whether this node leads, and a majority has answered it lately.
    fn is_followed(&self) -> bool {
        let metrics = self.metrics();
        let metrics = metrics.borrow();
        let answered = metrics.millis_since_quorum_ack.map(Duration::from_millis);
        metrics.state == ServerState::Leader
            && answered.is_some_and(|since| since < self.pace.times(LEASE))
    }

    /// Whom to ask, if this node is a voter.
    pub(super) fn electorate(&self) -> Option<Electorate> {
        let metrics = self.metrics();
        let metrics = metrics.borrow();
        let membership = metrics.membership_config.membership();
        let is_other = |id: &u64| *id != self.id;
        let target = |id: u64| {
            let address = membership.get_node(&id)?.addr.clone();
            Some(Target { id, address })
        };
        membership.voter_ids().any(|id| id == self.id).then(|| Electorate {
            rivals: membership.voter_ids().filter(is_other).filter_map(target).collect(),
            configs: membership.get_joint_config().clone(),
        })
    }
}

/// Stands for election whenever it is time, until Raft stops.
pub(super) async fn keep(node: Arc<Node>) {
    let pace = node.pace;
    let mut patience = pace.times(between(FIRST_PATIENCE_MS));
    let mut is_new = true;
    let started = node.ear.heard_at();
    while node.metrics().borrow().running_state.is_ok() {
        if is_new && (node.leads() || node.ear.heard_at() > started) {
            is_new = false;
            patience = pace.times(between(PATIENCE_MS));
        }
        if node.leads() {
            if node.is_followed() {
                node.ear.heard();
            }
            rest(&node.ear, Instant::now() + between(AGAIN_MS)).await;
            continue;
        }
        let mut due = node.ear.due(patience);
        let now = Instant::now();
        if now >= due && node.is_full().is_some() {
            due += pace.times(WITHOUT_ROOM);
        }
        if now < due {
            rest(&node.ear, due.min(now + LOOK)).await;
            continue;
        }
        let Some(electorate) = node.electorate() else {
            // A learner may become a voter any time. Others may count on its vote before it knows.
            sleep(between(FIRST_PATIENCE_MS)).await;
            continue;
        };
        if !is_wanted(&node, &electorate).await {
            sleep(between(AGAIN_MS)).await;
            continue;
        }
        if node.raft.trigger().elect().await.is_err() {
            return;
        }
        election_over(&node).await;
        is_new = false;
        patience = pace.times(between(PATIENCE_MS));
    }
}

/// Waits until then, and notices when it was for longer.
async fn rest(ear: &Ear, until: Instant) {
    sleep_until(until).await;
    let late = until.elapsed();
    if late > STOOD_STILL {
        ear.excuse(late, Instant::now());
    }
}

/// Whether a majority of the voters would have this node. Asks all of them at once.
async fn is_wanted(node: &Node, electorate: &Electorate) -> bool {
    let own = node.candidate();
    let began = Instant::now();
    let limit = node.pace.times(ANSWER_LIMIT);
    {
        let mut known = node.ear.known();
        if known.promised.is_some_and(|until| until > began) {
            return false;
        }
        known.standing = Some(own);
    }
    let mut asked = JoinSet::new();
    for rival in electorate.rivals.iter().cloned() {
        let caller = node.caller.clone();
        asked.spawn(async move {
            let answer = caller.post(&rival, "would-have", json(&own), limit).await;
            answer.unwrap_or(false).then_some(rival.id)
        });
    }
    let mut agreed = BTreeSet::from([node.id]);
    while !electorate.is_majority(&agreed)
        && let Ok(Some(answer)) = timeout_at(began + limit, asked.join_next()).await
    {
        agreed.extend(answer.ok().flatten());
    }
    // Meanwhile a leader may have called, or a better candidate.
    let mut known = node.ear.known();
    let still = known.standing.take() == Some(own) && known.heard <= began;
    still && electorate.is_majority(&agreed)
}

/// Waits until this node leads, hears of a leader, or has waited long enough for either.
async fn election_over(node: &Node) {
    let began = Instant::now();
    let limit = began + node.pace.times(between(ELECTION_OVER_MS));
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
        let last = Some(LogId::new(CommittedLeaderId::new(1, 1), index));
        Candidate { id, last, pace: Pace::default() }
    }

    fn slow(candidate: Candidate) -> Candidate {
        Candidate { pace: serde_json::from_str("6").unwrap(), ..candidate }
    }

    #[tokio::test]
    async fn another_one_is_wanted_only_when_no_leader_is_heard_and_it_has_all() {
        let ear = Ear::new(Pace::default());
        let (own, now) = (candidate(2, 10), Instant::now());
        let late = now + LEASE * 2;
        assert!(!ear.would_have(candidate(1, 10), own, now), "a leader was heard");
        assert!(!ear.would_have(candidate(1, 9), own, late), "it lacks an entry");
        assert!(!ear.would_have(candidate(1, 10), slow(own), late), "its vote would be too late");
        assert!(ear.would_have(candidate(1, 11), slow(own), late), "it can't stand itself");
        assert!(ear.would_have(candidate(1, 10), own, late));
        assert_eq!(ear.due(Duration::ZERO), late + PROMISE, "it is given time");
        ear.heard();
        assert!(!ear.would_have(candidate(3, 99), own, Instant::now()));
    }

    #[tokio::test]
    async fn time_in_which_this_node_stood_still_does_not_count() {
        let (ear, patience) = (Ear::new(Pace::default()), Duration::from_millis(500));
        let due = ear.due(patience);
        let late = due + Duration::from_secs(1);
        ear.excuse(Duration::from_millis(300), late);
        assert_eq!(ear.due(patience), due + Duration::from_millis(300));
        ear.excuse(Duration::from_secs(60), late);
        assert_eq!(ear.due(patience), late + patience, "as if it was heard now");
    }

    #[tokio::test]
    async fn of_two_that_stand_the_better_one_goes_on() {
        let late = Instant::now() + LEASE * 2;
        let check = |own: Candidate, other: Candidate, gives_way: bool| {
            let ear = Ear::new(Pace::default());
            ear.known().standing = Some(own);
            assert_eq!(ear.would_have(other, own, late), gives_way, "{own:?} {other:?}");
            assert_eq!(ear.known().standing.is_none(), gives_way);
        };
        check(candidate(2, 10), candidate(3, 10), true);
        check(candidate(3, 10), candidate(2, 10), false);
        check(candidate(3, 10), candidate(2, 11), true);
        check(candidate(2, 11), candidate(3, 10), false);
        // One that the other's vote would reach too late is no better.
        check(candidate(3, 10), slow(candidate(2, 10)), true);
        check(candidate(3, 11), slow(candidate(2, 10)), false);
    }

    #[test]
    fn while_the_membership_changes_both_sets_of_voters_must_agree() {
        let check = |configs: &[&[u64]], agreed: &[u64], is_majority: bool| {
            let configs = configs.iter().map(|voters| voters.iter().copied().collect()).collect();
            let electorate = Electorate { rivals: Vec::new(), configs };
            let agreed = agreed.iter().copied().collect();
            assert_eq!(electorate.is_majority(&agreed), is_majority, "{agreed:?}");
        };
        check(&[&[1]], &[1], true);
        check(&[&[1, 2]], &[1], false);
        check(&[&[1, 2]], &[1, 2], true);
        check(&[&[1, 2, 3]], &[1], false);
        check(&[&[1, 2, 3]], &[1, 3], true);
        check(&[&[1, 2, 3, 4]], &[1, 3], false);
        // Two of four voters are enough when they are a majority of either set.
        check(&[&[1, 2, 3], &[1, 2, 4]], &[1, 2], true);
        check(&[&[1, 2, 3], &[1, 2, 4]], &[1, 3], false);
        // Most of all voters are not enough without the one that voted alone.
        check(&[&[1], &[1, 2, 3]], &[2, 3], false);
        check(&[&[1], &[1, 2, 3]], &[1, 2], true);
        check(&[&[1, 2, 3], &[3]], &[1, 2], false);
    }

    #[test]
    fn random_times_are_within_their_limits() {
        let times: Vec<_> = (0..200).map(|_| between((10, 12)).as_millis()).collect();
        assert!((10..=12).all(|ms| times.contains(&ms)) && times.iter().all(|ms| *ms <= 12));
    }
}
