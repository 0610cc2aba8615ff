//! This node's Raft, its way to the other nodes, and what travels between them besides openraft's
//! own calls.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use openraft::{RaftMetrics, ServerState};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use tokio::{
    sync::watch,
    time::{Instant, timeout_at},
};

use super::{
    MemberNode, NodeRaft,
    call::{CallError, Caller, Target},
    disk::Disk,
    election::Ear,
    members::Changes,
    network::{Silence, Telling},
    pace::Pace,
    room::Handing,
};
use crate::StoreError;

/// An election takes less than this, times the [`Pace`].
const ELECTION: Duration = Duration::from_millis(1_500);
/// Who waits so long for a leader, or longer where one election takes longer, is told that there is
/// none.
const PATIENCE: Duration = Duration::from_secs(5);
/// Where no leader was heard for all that time, one may yet come: whoever asks then waits less, but
/// for so long, times the [`Pace`].
const PATIENCE_ALONE: Duration = Duration::from_secs(1);
/// Signs of life are looked for at least this often while there is no leader.
const LOOK_AGAIN: Duration = Duration::from_millis(100);
/// A leader that no majority answered for this long takes no more writes.
const QUORUM_LOST: Duration = Duration::from_millis(1_500);
/// It goes on to call them for so long, then keeps still for as long, and so on: its followers may
/// hear it all the same, and want no other leader as long as they do. The first silence is one
/// election of this node's [`Pace`]; each is twice as long as the one before, up to the second time,
/// because followers with slower disks wait longer, and do not say so.
const SILENCE: Duration = ELECTION;
const SILENCE_MAX: Duration = Duration::from_secs(15);
/// An answer that a leader gave before another one came is on its way for no longer than this.
const LAST_ANSWER: Duration = Duration::from_millis(100);

/// What is said of an order for which there was no leader all the time.
pub(super) const NO_LEADER: &str = "no leader was found in time";

/// Why an order was not carried out, in the form in which nodes tell each other.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Refusal {
    /// Nothing was done.
    NotLeader {
        leader: Option<String>,
    },
    /// Nothing was done.
    Unavailable(String),
    /// Nothing was done, and never will be.
    Invalid(String),
    /// Nothing was done: the leader's disk has no room.
    Full(String),
    Unknown(String),
}

impl From<Refusal> for StoreError {
    fn from(refusal: Refusal) -> Self {
        match refusal {
            Refusal::NotLeader { leader } => Self::NotLeader { leader },
            Refusal::Unavailable(text) => Self::Unavailable(text),
            Refusal::Invalid(text) => Self::Invalid(text),
            Refusal::Full(text) => Self::Full(text),
            Refusal::Unknown(text) => Self::Unknown(text),
        }
    }
}

impl From<CallError> for Refusal {
    fn from(error: CallError) -> Self {
        match error {
            CallError::NotDone(text) => Self::Unavailable(text),
            CallError::Unknown(text) => Self::Unknown(text),
        }
    }
}

impl Refusal {
    /// The same order may be given again.
    pub(super) fn is_definite(&self) -> bool {
        matches!(self, Self::NotLeader { .. } | Self::Unavailable(_))
    }
}

/// Which of this node's proposals reached its log. openraft answers "not the leader" both to what
/// it never took and to what it took and lost with its leadership; only the first may be repeated.
#[derive(Clone, Default)]
pub(super) struct Proposals {
    next: Arc<AtomicU64>,
    logged: Arc<Mutex<BTreeMap<u64, bool>>>,
}

impl Proposals {
    /// A mark for one proposal, never 0.
    pub(super) fn begin(&self) -> u64 {
        let mark = self.next.fetch_add(1, Ordering::Relaxed) + 1;
        self.lock().insert(mark, false);
        mark
    }

    /// Called by the log, before the entry is written.
    pub(super) fn reached_log(&self, mark: u64) {
        if let Some(logged) = self.lock().get_mut(&mark) {
            *logged = true;
        }
    }

    /// Whether the proposal reached the log; forgets it.
    pub(super) fn end(&self, mark: u64) -> bool {
        self.lock().remove(&mark).unwrap_or(true)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<u64, bool>> {
        self.logged.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

pub(super) struct Node {
    pub(super) id: u64,
    /// May be empty.
    pub(super) name: String,
    pub(super) raft: NodeRaft,
    pub(super) changes: Changes,
    pub(super) caller: Caller,
    pub(super) proposals: Proposals,
    pub(super) disk: Arc<Disk>,
    pub(super) ear: Ear,
    pub(super) pace: Pace,
    pub(super) telling: Telling,
    /// The newest entry that is applied here; 0 for none.
    pub(super) applied: watch::Receiver<u64>,
    /// Why this node, if it leads, can't commit anything; a moment old.
    pub(super) quorum_lost: watch::Receiver<Option<String>>,
    /// What this node, if it leads, does when its disk is full; a moment old.
    pub(super) handing: watch::Receiver<Handing>,
}

/// Where an order goes now.
pub(super) enum Place {
    Here,
    There(Target),
    /// No leader is known, or no majority: why.
    Nowhere(String),
}

impl Node {
    pub(super) fn metrics(&self) -> watch::Receiver<RaftMetrics<u64, MemberNode>> {
        self.raft.metrics()
    }

    pub(super) fn place(&self) -> Place {
        let metrics = self.raft.metrics();
        let metrics = metrics.borrow();
        let membership = metrics.membership_config.membership();
        if let Err(error) = &metrics.running_state {
            return Place::Nowhere(format!("Raft has stopped: {error}"));
        }
        match metrics.current_leader {
            Some(id) if id == self.id && !membership.voter_ids().any(|voter| voter == id) => {
                Place::Nowhere("this node has lost its vote and hands over".to_owned())
            }
            Some(id) if id == self.id && metrics.state == ServerState::Leader => {
                // Who makes way is not heard by its followers, and that is what it wants.
                match (self.handing.borrow().is_leaving(), &*self.quorum_lost.borrow()) {
                    (Some(why), _) => Place::Nowhere(why.to_owned()),
                    (None, Some(why)) => Place::Nowhere(why.clone()),
                    (None, None) => Place::Here,
                }
            }
            Some(id) if id != self.id => match membership.get_node(&id) {
                Some(node) => Place::There(Target { id, address: node.addr.clone() }),
                None => Place::Nowhere(format!("the leader {id} is not a member")),
            },
            _ => Place::Nowhere("no leader is known".to_owned()),
        }
    }

    /// Until when an order that comes now is tried.
    pub(super) fn deadline(&self) -> Instant {
        let heard_at = match self.place() {
            Place::Here => None,
            Place::There(_) | Place::Nowhere(_) => Some(self.ear.heard_at()),
        };
        deadline(Instant::now(), heard_at, self.pace)
    }

    /// Calls the leader. Its answer is waited for until there is another one: a machine that stands
    /// still keeps its connections open.
    pub(super) async fn call_leader<A: DeserializeOwned>(
        &self,
        leader: &Target,
        call: &str,
        body: Vec<u8>,
        deadline: Instant,
    ) -> Result<A, CallError> {
        let limit = deadline.saturating_duration_since(Instant::now());
        tokio::select! {
            answer = self.caller.post(leader, call, body, limit) => answer,
            () = self.follows_another(leader.id) => {
                let Target { id, address } = leader;
                let text = format!("node {id} at {address} leads no longer and gave no answer");
                Err(CallError::Unknown(text))
            }
        }
    }

    async fn follows_another(&self, leader: u64) {
        let mut metrics = self.raft.metrics();
        let another = metrics.wait_for(|m| m.current_leader.is_some_and(|id| id != leader));
        if another.await.is_err() {
            // Raft has stopped: no other one will come.
            std::future::pending::<()>().await;
        }
        tokio::time::sleep(LAST_ANSWER).await;
    }

    /// Whether there is a leader that reaches this node; one that leads needs its majority.
    pub(super) fn has_leader(&self) -> bool {
        match self.place() {
            Place::Here => true,
            Place::There(_) => self.ear.heard_at().elapsed() < self.pace.times(QUORUM_LOST),
            Place::Nowhere(_) => false,
        }
    }

    /// Waits until this node leads without a majority, and says so.
    pub(super) async fn loses_quorum(&self) -> String {
        let mut lost = self.quorum_lost.clone();
        let why = lost.wait_for(Option::is_some).await.ok().and_then(|why| why.clone());
        match why {
            Some(why) => why,
            // A sender that is gone tells nothing.
            None => std::future::pending().await,
        }
    }

    /// Waits for news of the cluster, a moment at most. `false` when the deadline is over.
    pub(super) async fn news(&self, deadline: Instant) -> bool {
        let mut metrics = self.raft.metrics();
        metrics.mark_unchanged();
        let until = deadline.min(Instant::now() + LOOK_AGAIN);
        // Whatever the reason for waking: the caller looks again.
        let _ = timeout_at(until, metrics.changed()).await;
        Instant::now() < deadline
    }

    /// Waits until this node has applied the entry; `false` when the deadline is over.
    pub(super) async fn applied(&self, index: u64, deadline: Instant) -> bool {
        let mut applied = self.applied.clone();
        let reached = applied.wait_for(|applied| *applied >= index);
        matches!(timeout_at(deadline, reached).await, Ok(Ok(_)))
    }
}

/// How long an order waits for a leader.
pub(super) fn patience(pace: Pace) -> Duration {
    pace.times(ELECTION).max(PATIENCE)
}

/// `heard_at`: when a leader was heard last, where another one than this node is needed.
fn deadline(now: Instant, heard_at: Option<Instant>, pace: Pace) -> Instant {
    let (least, most) = (now + pace.times(PATIENCE_ALONE), now + patience(pace));
    heard_at.map_or(most, |heard_at| (heard_at + patience(pace)).clamp(least, most))
}

/// Looks whether this node leads without a majority. Tells it, and keeps it still then.
pub(super) async fn watch_quorum(
    node: Arc<Node>,
    lost: watch::Sender<Option<String>>,
    silence: Silence,
) {
    let metrics = node.metrics();
    let limit = node.pace.times(QUORUM_LOST);
    let mut quorum = Quorum::default();
    loop {
        tokio::time::sleep(LOOK_AGAIN).await;
        let now = Instant::now();
        let unanswered = quorum.unanswered(&metrics.borrow(), now);
        let since_lost = unanswered.and_then(|since| since.checked_sub(limit));
        let why = since_lost.map(|since| {
            let ms = (limit + since).as_millis();
            format!("no majority of voters has answered this leader for {ms} ms")
        });
        silence.without_majority(since_lost.is_some_and(|since| {
            let since_needed = node.ear.needed_at().map_or(since, |needed| needed.elapsed());
            is_silent(since.min(since_needed), node.pace.times(SILENCE))
        }));
        lost.send_if_modified(|known| {
            let changed = known.is_some() != why.is_some();
            *known = why;
            changed
        });
    }
}

/// Whether a leader keeps still, so long after it was found to have lost its majority, or was asked
/// by who can do nothing without it: it calls for `first` and keeps still in turn.
fn is_silent(since_lost: Duration, first: Duration) -> bool {
    let (mut left, mut silence) = (since_lost, first);
    while let Some(rest) = left.checked_sub(first) {
        if rest < silence {
            return true;
        }
        left = rest.saturating_sub(silence);
        silence = (silence * 2).min(first.max(SILENCE_MAX));
    }
    false
}

/// What has to be remembered about a leader's majority.
#[derive(Default)]
struct Quorum {
    /// Since when this node leads and nobody has ever answered.
    never: Option<Instant>,
}

impl Quorum {
    /// For how long no majority has answered, if this node leads others.
    fn unanswered(
        &mut self,
        metrics: &RaftMetrics<u64, MemberNode>,
        now: Instant,
    ) -> Option<Duration> {
        let several = metrics.membership_config.membership().voter_ids().count() > 1;
        if !several || metrics.state != ServerState::Leader {
            self.never = None;
            return None;
        }
        if let Some(ms) = metrics.millis_since_quorum_ack {
            self.never = None;
            return Some(Duration::from_millis(ms));
        }
        let never = *self.never.get_or_insert(now);
        Some(now.saturating_duration_since(never))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_leader_without_a_majority_keeps_still_for_longer_and_longer() {
        let changes = |first: Duration| {
            let at = |step: u64| is_silent(Duration::from_millis(step * 100), first);
            (1..500).filter(|step| at(*step) != at(step - 1)).collect::<Vec<_>>()
        };
        let usual = changes(SILENCE);
        assert_eq!(usual, [15, 30, 45, 75, 90, 150, 165, 285, 300, 450, 465]);
        assert_eq!(changes(SILENCE * 4), [60, 120, 180, 300, 360]);
        assert!(!is_silent(Duration::ZERO, SILENCE));
        // The slowest of all is heard to call again only when it would have stood long before.
        let slowest: Pace = serde_json::from_str("10").unwrap();
        assert!(SILENCE_MAX > slowest.times(Duration::from_millis(600) * 2));
        assert!(is_silent(slowest.times(SILENCE), slowest.times(SILENCE)));
    }

    #[test]
    fn an_order_outlasts_an_election() {
        let slow = |text| patience(serde_json::from_str(text).unwrap()).as_secs();
        assert_eq!(["1", "3", "4", "10"].map(slow), [5, 5, 6, 15]);
    }

    #[test]
    fn nobody_waits_long_for_a_leader_that_is_long_gone() {
        let heard = Instant::now();
        let seconds = |now: u64| {
            let now = heard + Duration::from_secs(now);
            (deadline(now, Some(heard), Pace::default()) - now).as_secs()
        };
        assert_eq!([0, 2, 4, 5, 60].map(seconds), [5, 3, 1, 1, 1]);
        assert_eq!(deadline(heard, None, Pace::default()) - heard, PATIENCE);
        let slow: Pace = serde_json::from_str("4").unwrap();
        let late = heard + Duration::from_secs(60);
        assert_eq!(deadline(late, Some(heard), slow) - late, PATIENCE_ALONE * 4);
    }

    #[test]
    fn a_leader_that_was_never_answered_knows_that_too() {
        let voters = |ids: &[u64]| {
            let ids: std::collections::BTreeSet<u64> = ids.iter().copied().collect();
            let nodes: BTreeMap<u64, MemberNode> =
                ids.iter().map(|id| (*id, MemberNode::default())).collect();
            let membership = openraft::Membership::new(vec![ids], nodes);
            Arc::new(openraft::StoredMembership::new(None, membership))
        };
        let mut metrics = RaftMetrics::new_initial(1);
        let (mut quorum, begin) = (Quorum::default(), Instant::now());
        let late = begin + Duration::from_secs(2);
        metrics.membership_config = voters(&[1, 2, 3]);
        assert_eq!(quorum.unanswered(&metrics, begin), None, "it does not lead");
        metrics.state = ServerState::Leader;
        assert_eq!(quorum.unanswered(&metrics, begin), Some(Duration::ZERO));
        assert_eq!(quorum.unanswered(&metrics, late), Some(Duration::from_secs(2)));
        metrics.millis_since_quorum_ack = Some(7);
        assert_eq!(quorum.unanswered(&metrics, late), Some(Duration::from_millis(7)));
        metrics.membership_config = voters(&[1]);
        assert_eq!(quorum.unanswered(&metrics, late), None, "it is its own majority");
    }
}
