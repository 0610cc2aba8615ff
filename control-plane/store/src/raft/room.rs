//! What becomes of the office of a leader whose disk is full.
//!
//! Whoever has no room takes on nothing new, and a leader takes on everything for all. So it asks the
//! other voters whether they have room, and where a majority can go on without it, it calls nobody
//! until another one leads: openraft knows no successor, but a leader that is not heard gets one. A
//! full voter stands later than others; see [`election`](super::election).
//!
//! Nothing is lost by that: the orders that it has taken on are committed first, those that come
//! meanwhile wait for the next leader, and who leads is decided by votes as ever.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use openraft::{RaftMetrics, ServerState};
use tokio::{
    sync::watch,
    task::JoinSet,
    time::{Instant, sleep},
};

use super::{MemberNode, call::CallError, network::Silence, node::Node};

/// A leader without room looks for a successor so often.
const LOOK: Duration = Duration::from_millis(100);
const ASK_AGAIN: Duration = Duration::from_secs(1);
/// An answer takes this long at most, times the pace.
const ANSWER_LIMIT: Duration = Duration::from_millis(200);
/// What was taken on before is committed in this time, or stays with the next leader.
const SETTLE: Duration = Duration::from_millis(500);
/// Another one leads within this time, times the pace, or the old leader goes on.
const HAND_OVER: Duration = Duration::from_secs(3);
/// Then it is tried again after this time.
const TRY_AGAIN: Duration = Duration::from_secs(30);
/// A full disk is told of again after this time.
const TELL_AGAIN: Duration = Duration::from_secs(60);

/// What orders wait for, as told to those for whom it took too long.
const ASKS: &str = "this node's disk is full: it looks for another leader";
const HANDS_OVER: &str = "this node's disk is full: another one is to lead";

/// What a leader without room does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Handing {
    /// It has to find out first.
    #[default]
    Asks,
    /// It makes way.
    HandsOver,
    /// Nobody can take over: it leads on, and refuses what needs room.
    Stays,
}

impl Handing {
    /// Why an order that needs room has to wait; `None` when it is refused.
    pub(super) fn waits(self) -> Option<&'static str> {
        match self {
            Self::Asks => Some(ASKS),
            Self::HandsOver => Some(HANDS_OVER),
            Self::Stays => None,
        }
    }

    /// Why this node is not the one to ask for anything.
    pub(super) fn is_leaving(self) -> Option<&'static str> {
        (self == Self::HandsOver).then_some(HANDS_OVER)
    }
}

impl Node {
    /// What is missing for taking on more, in words that name this node; `None` when there is room.
    pub(super) fn is_full(&self) -> Option<String> {
        let lack = self.disk.lacks_room()?;
        Some(match self.name.as_str() {
            "" => format!("the disk is full: {lack}"),
            name => format!("the disk of node {name} is full: {lack}"),
        })
    }
}

/// Looks after this node's room, tells people of it, and hands over the office if it leads, until
/// Raft stops.
pub(super) async fn keep(node: Arc<Node>, handing: watch::Sender<Handing>, silence: Silence) {
    let mut told: Option<Instant> = None;
    while node.metrics().borrow().running_state.is_ok() {
        sleep(LOOK).await;
        let Some(problem) = node.is_full() else {
            if told.take().is_some() {
                tracing::info!("the disk has room again");
            }
            handing.send_replace(Handing::Asks);
            continue;
        };
        if told.is_none_or(|told| told.elapsed() > TELL_AGAIN) {
            told = Some(Instant::now());
            tracing::warn!("{problem}: this node takes on no writes");
        }
        if !node.leads() {
            handing.send_replace(Handing::Asks);
            continue;
        }
        if !others_can_go_on(&node).await {
            handing.send_replace(Handing::Stays);
            sleep(ASK_AGAIN).await;
            continue;
        }
        tracing::info!("another node is to lead: this one has no room");
        handing.send_replace(Handing::HandsOver);
        make_way(&node, &silence).await;
        if node.leads() {
            tracing::warn!("no other node leads: this one goes on without room for writes");
            handing.send_replace(Handing::Stays);
            sleep(TRY_AGAIN).await;
        }
    }
}

/// Whether the voters without this node, as far as they have room, are a majority. Fewer could commit
/// nothing, and then there would not even be reads.
async fn others_can_go_on(node: &Arc<Node>) -> bool {
    let Some(electorate) = node.electorate() else { return false };
    let mut asked = JoinSet::new();
    for rival in electorate.rivals.iter().cloned() {
        let (caller, limit) = (node.caller.clone(), node.pace.times(ANSWER_LIMIT));
        asked.spawn(async move {
            let answer: Result<bool, CallError> =
                caller.post(&rival, "room", Vec::new(), limit).await;
            answer.unwrap_or(false).then_some(rival.id)
        });
    }
    let mut with_room = BTreeSet::new();
    while let Some(answer) = asked.join_next().await {
        with_room.extend(answer.ok().flatten());
        if electorate.is_majority(&with_room) {
            return true;
        }
    }
    false
}

/// Calls nobody until another one leads, or for a while.
async fn make_way(node: &Node, silence: &Silence) {
    // In time or not, both times.
    let wait = node.raft.wait(Some(SETTLE));
    let _ = wait.metrics(|m| !is_leader(m) || is_settled(m), "all it took on is committed").await;
    silence.hand_over(true);
    let wait = node.raft.wait(Some(node.pace.times(HAND_OVER)));
    let _ = wait.metrics(|m| !is_leader(m), "another leader").await;
    silence.hand_over(false);
}

type Metrics = RaftMetrics<u64, MemberNode>;

fn is_leader(metrics: &Metrics) -> bool {
    metrics.state == ServerState::Leader
}

fn is_settled(metrics: &Metrics) -> bool {
    metrics.last_applied.map(|id| id.index) == metrics.last_log_index
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn orders_wait_until_it_is_clear_who_takes_them() {
        let waits = [Handing::Asks, Handing::HandsOver, Handing::Stays].map(Handing::waits);
        assert_eq!(waits, [Some(ASKS), Some(HANDS_OVER), None]);
        // Without room it can still be read, as long as no other one is to lead.
        let leaves = [Handing::Asks, Handing::HandsOver, Handing::Stays].map(Handing::is_leaving);
        assert_eq!(leaves, [None, Some(HANDS_OVER), None]);
    }
}
