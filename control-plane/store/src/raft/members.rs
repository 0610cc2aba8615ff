//! Who belongs to the cluster: nodes join as learners, become voters, and leave.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use openraft::{
    ChangeMembers, LogId, RaftMetrics,
    error::{ChangeMembershipError, ClientWriteError, RaftError},
};
use serde::{Deserialize, Serialize};
use tokio::{
    sync::Mutex,
    time::{Instant, timeout_at},
};

use super::{
    MemberNode, NodeRaft,
    network::json,
    node::{Node, Place, Refusal},
};
use crate::StoreError;

/// A learner must catch up in this time, including a whole snapshot.
const PATIENCE: Duration = Duration::from_secs(60);

/// Several elections fit into this.
const HAND_OVER: Duration = Duration::from_secs(5);

/// A node of the cluster.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    pub id: u64,
    /// Empty for a member of which nobody has said it.
    pub name: String,
    /// `IP:port`.
    pub address: String,
    /// Decides with the others; a learner only follows.
    pub is_voter: bool,
}

/// One change of membership, in the form in which nodes tell each other.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Change {
    /// Returns when the node has caught up.
    AddLearner {
        id: u64,
        address: String,
        #[serde(default)]
        name: String,
    },
    /// Exactly these; former voters become learners.
    Voters {
        ids: BTreeSet<u64>,
    },
    /// These learners become voters too. With none of them, what another leader has begun to change
    /// is completed.
    Promote {
        ids: BTreeSet<u64>,
    },
    Remove {
        id: u64,
    },
    /// A node moved, or was given another name.
    Address {
        id: u64,
        address: String,
        #[serde(default)]
        name: String,
    },
}

impl Node {
    pub(super) fn members(&self) -> Vec<Member> {
        let metrics = self.metrics();
        let metrics = metrics.borrow();
        let membership = metrics.membership_config.membership();
        let voters: BTreeSet<u64> = membership.voter_ids().collect();
        membership
            .nodes()
            .map(|(id, node)| Member {
                id: *id,
                name: node.name.clone(),
                address: node.addr.clone(),
                is_voter: voters.contains(id),
            })
            .collect()
    }

    /// Has the leader make a change. Changes may be repeated: they say what shall be.
    pub(super) async fn change(&self, change: &Change) -> Result<(), StoreError> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let answer = match self.place() {
                Place::Here => self.change_here(change).await,
                Place::There(leader) => {
                    let limit = deadline.saturating_duration_since(Instant::now());
                    self.caller
                        .post(&leader, "members", json(change), limit)
                        .await
                        .unwrap_or_else(|error| Err(error.into()))
                }
                Place::Nowhere(why) => Err(Refusal::Unavailable(why)),
            };
            match answer {
                Ok(()) => return Ok(()),
                Err(refusal) if !refusal.is_definite() => return Err(refusal.into()),
                Err(refusal) => {
                    if !self.news(deadline).await {
                        return Err(refusal.into());
                    }
                }
            }
        }
    }

    /// The leader's part.
    pub(super) async fn change_here(&self, change: &Change) -> Result<(), Refusal> {
        let deadline = Instant::now() + PATIENCE;
        let known = self.members();
        let voters: BTreeSet<u64> = known.iter().filter(|m| m.is_voter).map(|m| m.id).collect();
        let moved = match change {
            Change::AddLearner { id, address, name } | Change::Address { id, address, name } => {
                known.iter().any(|m| m.id == *id && (m.address != *address || m.name != *name))
            }
            Change::Voters { .. } | Change::Promote { .. } | Change::Remove { .. } => false,
        };
        // A change has two steps. It goes on when the caller goes away in between.
        let work = tokio::spawn(carry_out(self.changes.clone(), change.clone(), voters, moved));
        match timeout_at(deadline, work).await {
            Ok(Ok(done)) => done,
            Ok(Err(error)) => Err(Refusal::Unknown(error.to_string())),
            Err(_) => Err(Refusal::Unknown("the change goes on, but takes long".to_owned())),
        }
    }
}

/// Makes changes of membership, one at a time: most have two steps, and what one of them leaves in
/// between is not for another one to go on with.
#[derive(Clone)]
pub(super) struct Changes {
    raft: NodeRaft,
    turn: Arc<Mutex<()>>,
}

impl Changes {
    pub(super) fn new(raft: NodeRaft) -> Self {
        Self { raft, turn: Arc::default() }
    }

    /// Both steps. Returns the entry of the last one.
    async fn make(
        &self,
        change: impl Into<ChangeMembers<u64, MemberNode>>,
        retain: bool,
    ) -> Result<LogId<u64>, Refusal> {
        let Ok(_turn) = self.turn.try_lock() else {
            let text = "another change of membership is under way".to_owned();
            return Err(Refusal::Unavailable(text));
        };
        let done = self.raft.change_membership(change, retain).await;
        done.map(|done| done.log_id).map_err(refusal)
    }
}

async fn carry_out(
    changes: Changes,
    change: Change,
    voters: BTreeSet<u64>,
    moved: bool,
) -> Result<(), Refusal> {
    if let (
        true,
        Change::AddLearner { id, address, name } | Change::Address { id, address, name },
    ) = (moved, &change)
    {
        let node = BTreeMap::from([(*id, MemberNode::of(name, address))]);
        changes.make(ChangeMembers::SetNodes(node), true).await?;
    }
    match change {
        Change::AddLearner { id, address, name } => {
            let node = BTreeMap::from([(id, MemberNode::of(&name, &address))]);
            let added = changes.make(ChangeMembers::AddNodes(node), true).await?;
            // Until it has all that came before it, or this node no longer leads.
            let caught_up = |m: &RaftMetrics<u64, MemberNode>| {
                m.replication.as_ref().is_none_or(|followers| {
                    followers.get(&id).is_some_and(|matching| *matching >= Some(added))
                })
            };
            // It fails only when Raft stops, and then the next change says so.
            let wait = changes.raft.wait(Some(PATIENCE));
            let _ = wait.metrics(caught_up, "a learner caught up").await;
        }
        Change::Voters { ids } => {
            changes.make(ids, true).await?;
        }
        Change::Promote { ids } => {
            changes.make(ChangeMembers::AddVoterIds(ids), true).await?;
        }
        Change::Remove { id } => {
            let ids = BTreeSet::from([id]);
            let change = if voters.contains(&id) {
                ChangeMembers::RemoveVoters(ids)
            } else {
                ChangeMembers::RemoveNodes(ids)
            };
            changes.make(change, false).await?;
        }
        Change::Address { .. } => {}
    }
    hand_over(&changes.raft).await;
    Ok(())
}

/// A leader that is no voter any more would lead on as long as the voters hear of it: it falls
/// silent until they have chosen another, or for a while if nobody tells it of that.
async fn hand_over(raft: &NodeRaft) {
    let own_id = raft.metrics().borrow().id;
    let leads_without_vote = |m: &RaftMetrics<u64, MemberNode>| {
        let membership = m.membership_config.membership();
        m.current_leader == Some(own_id) && !membership.voter_ids().any(|id| id == own_id)
    };
    if !leads_without_vote(&raft.metrics().borrow()) {
        return;
    }
    raft.runtime_config().heartbeat(false);
    let wait = raft.wait(Some(HAND_OVER));
    // In time or not: a heartbeat with an old vote does no harm, and tells this node the truth.
    let _ = wait.metrics(|m| !leads_without_vote(m), "another leader").await;
    raft.runtime_config().heartbeat(true);
}

type Failure = RaftError<u64, ClientWriteError<u64, MemberNode>>;

fn refusal(error: Failure) -> Refusal {
    match error {
        RaftError::APIError(ClientWriteError::ForwardToLeader(forward)) => {
            Refusal::NotLeader { leader: forward.leader_node.map(|node| node.addr) }
        }
        RaftError::APIError(ClientWriteError::ChangeMembershipError(error)) => match error {
            ChangeMembershipError::InProgress(error) => Refusal::Unavailable(error.to_string()),
            ChangeMembershipError::EmptyMembership(error) => Refusal::Invalid(error.to_string()),
            ChangeMembershipError::LearnerNotFound(error) => Refusal::Invalid(error.to_string()),
        },
        RaftError::Fatal(error) => Refusal::Unknown(error.to_string()),
    }
}
