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
use serde::{Deserialize, Serialize};
use tokio::{
    sync::watch,
    time::{Instant, timeout_at},
};

use super::{
    MemberNode, NodeRaft,
    call::{CallError, Caller, Target},
    disk::Disk,
    election::Ear,
    network::Telling,
};
use crate::StoreError;

/// An election takes less than a second and a half; who waits longer is told so.
pub(super) const PATIENCE: Duration = Duration::from_secs(5);
/// Signs of life are looked for at least this often while there is no leader.
const LOOK_AGAIN: Duration = Duration::from_millis(100);
/// A leader that no majority answered for this long takes no more writes.
const QUORUM_LOST_MS: u64 = 1_500;

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
    pub(super) raft: NodeRaft,
    pub(super) caller: Caller,
    pub(super) proposals: Proposals,
    pub(super) disk: Arc<Disk>,
    pub(super) ear: Ear,
    pub(super) telling: Telling,
    /// The newest entry that is applied here; 0 for none.
    pub(super) applied: watch::Receiver<u64>,
    /// Why this node, if it leads, can't commit anything.
    pub(super) quorum_lost: watch::Receiver<Option<String>>,
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
                match quorum_lost(&metrics) {
                    Some(why) => Place::Nowhere(why),
                    None => Place::Here,
                }
            }
            Some(id) if id != self.id => match membership.get_node(&id) {
                Some(node) => Place::There(Target { id, address: node.addr.clone() }),
                None => Place::Nowhere(format!("the leader {id} is not a member")),
            },
            _ => Place::Nowhere("no leader is known".to_owned()),
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

/// Looks whether this node leads without a majority, as often as calls to followers end.
pub(super) async fn watch_quorum(
    metrics: watch::Receiver<RaftMetrics<u64, MemberNode>>,
    lost: watch::Sender<Option<String>>,
) {
    loop {
        tokio::time::sleep(LOOK_AGAIN).await;
        let now = quorum_lost(&metrics.borrow());
        lost.send_if_modified(|known| {
            let changed = known.is_some() != now.is_some();
            *known = now;
            changed
        });
    }
}

/// Why this leader can't commit anything, if it leads and can't.
fn quorum_lost(metrics: &RaftMetrics<u64, MemberNode>) -> Option<String> {
    let several = metrics.membership_config.membership().voter_ids().count() > 1;
    let ms = metrics.millis_since_quorum_ack.filter(|ms| *ms > QUORUM_LOST_MS)?;
    (several && metrics.state == ServerState::Leader)
        .then(|| format!("no majority of voters has answered this leader for {ms} ms"))
}
