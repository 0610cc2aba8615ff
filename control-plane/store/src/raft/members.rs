//! Who belongs to the cluster: nodes join as learners, become voters, and leave.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use openraft::{
    ChangeMembers, LogId, RaftMetrics, ServerState,
    error::{ChangeMembershipError, ClientWriteError, RaftError},
};
use serde::{Deserialize, Serialize};
use tokio::{
    sync::{Mutex, MutexGuard},
    time::{Instant, timeout_at},
};

use super::{
    MemberNode, NodeRaft,
    network::json,
    node::{Node, Place, Refusal},
    voters,
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
    Voters { ids: BTreeSet<u64> },
    /// These learners become voters too.
    Promote { ids: BTreeSet<u64> },
    /// A voter becomes a learner first, and then leaves. In between it may be made a voter again, if
    /// the leader is lost there and the node still answers, and nobody is left who knows of the order:
    /// whoever wants the node gone orders it again as long as it is a member. The only voter's vote
    /// goes to another member that is there.
    Remove { id: u64 },
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

    /// Has the leader make a change. Changes may be repeated: they say what shall be. So this one is,
    /// also when its outcome is unknown, until it is made, Raft stops here or [`PATIENCE`] is over.
    pub(super) async fn change(&self, change: &Change) -> Result<(), StoreError> {
        let deadline = Instant::now() + PATIENCE;
        let mut unknown = None;
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
                Err(refusal @ (Refusal::Invalid(_) | Refusal::Full(_))) => {
                    return Err(refusal.into());
                }
                Err(refusal) => {
                    let runs = self.metrics().borrow().running_state.is_ok();
                    if !runs || !self.news(deadline).await {
                        // One try that may have been carried out counts more than others that were not.
                        return Err(unknown.unwrap_or(refusal).into());
                    }
                    if matches!(refusal, Refusal::Unknown(_)) {
                        unknown = Some(refusal);
                    }
                }
            }
        }
    }

    /// The leader's part.
    pub(super) async fn change_here(&self, change: &Change) -> Result<(), Refusal> {
        let deadline = Instant::now() + PATIENCE;
        let known = self.members();
        if let Change::AddLearner { id, name, .. } = change
            && let Some(other) = known.iter().find(|m| m.id != *id && m.name == *name)
            && !name.is_empty()
        {
            let text = format!("node {} at {} is named `{name}`", other.id, other.address);
            return Err(Refusal::Invalid(text));
        }
        let moved = match change {
            Change::AddLearner { id, address, name } | Change::Address { id, address, name } => {
                known.iter().any(|m| m.id == *id && (m.address != *address || m.name != *name))
            }
            Change::Voters { .. } | Change::Promote { .. } | Change::Remove { .. } => false,
        };
        let heir = match change {
            Change::Remove { id } => self.heir(*id, &known).await?,
            _ => None,
        };
        // A change has two steps. It goes on when the caller goes away in between.
        let work = tokio::spawn(carry_out(self.changes.clone(), change.clone(), moved, heir));
        match timeout_at(deadline, work).await {
            Ok(Ok(done)) => done,
            Ok(Err(error)) => Err(Refusal::Unknown(error.to_string())),
            Err(_) => Err(Refusal::Unknown("the change goes on, but takes long".to_owned())),
        }
    }

    /// Who gets the vote of `id`, if that is the only one.
    async fn heir(&self, id: u64, members: &[Member]) -> Result<Option<u64>, Refusal> {
        let Some(last) = members.iter().find(|m| m.id == id && m.is_voter) else { return Ok(None) };
        if members.iter().any(|m| m.is_voter && m.id != id) {
            return Ok(None);
        }
        let heir = voters::ready(self, members).await.into_iter().next();
        heir.map(Some).ok_or_else(|| {
            let Member { name, address, .. } = last;
            Refusal::Unavailable(format!(
                "{name} at {address} has the only vote, and no other member is there to take it"
            ))
        })
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

    fn turn(&self) -> Result<MutexGuard<'_, ()>, Refusal> {
        self.turn.try_lock().map_err(|_| {
            Refusal::Unavailable("another change of membership is under way".to_owned())
        })
    }

    /// Both steps. Returns the entry of the last one.
    async fn make(
        &self,
        change: impl Into<ChangeMembers<u64, MemberNode>>,
    ) -> Result<LogId<u64>, Refusal> {
        let turn = self.turn()?;
        self.make_in(&turn, change).await
    }

    /// The same, for who has the turn. Former voters become learners.
    ///
    /// A leader that was deposed and then catches up by a snapshot never hears from openraft what
    /// became of its change: it waits only while it leads.
    async fn make_in(
        &self,
        _turn: &MutexGuard<'_, ()>,
        change: impl Into<ChangeMembers<u64, MemberNode>>,
    ) -> Result<LogId<u64>, Refusal> {
        let mut metrics = self.raft.metrics();
        let term = {
            let now = metrics.borrow();
            if now.state != ServerState::Leader {
                return Err(Refusal::NotLeader { leader: None });
            }
            now.current_term
        };
        let deposed = async {
            let leads = |m: &RaftMetrics<u64, MemberNode>| {
                m.state == ServerState::Leader && m.current_term == term
            };
            // An error says that Raft has stopped.
            let _ = metrics.wait_for(|m| !leads(m)).await;
        };
        tokio::select! {
            biased;
            done = self.raft.change_membership(change, true) => {
                done.map(|done| done.log_id).map_err(refusal)
            }
            () = deposed => {
                let text = "this node no longer leads, and can't tell whether the change was made";
                Err(Refusal::Unknown(text.to_owned()))
            }
        }
    }

    /// Takes the second step of a change of which another leader took the first. `false` when there
    /// is none: this node's own changes take both.
    pub(super) async fn complete(&self) -> Result<bool, Refusal> {
        {
            let turn = self.turn()?;
            // Whoever had the turn just now may have been what the caller saw.
            if !is_between_steps(&self.raft.metrics().borrow()) {
                return Ok(false);
            }
            self.make_in(&turn, ChangeMembers::AddVoterIds(BTreeSet::new())).await?;
        }
        hand_over(&self.raft).await;
        Ok(true)
    }

    /// Nobody else has the turn in between, and could make it a voter again.
    async fn remove(&self, id: u64, heir: Option<u64>) -> Result<(), Refusal> {
        let turn = self.turn()?;
        let ids = BTreeSet::from([id]);
        if let Some(heir) = heir {
            let heir = BTreeSet::from([heir]);
            self.make_in(&turn, ChangeMembers::AddVoterIds(heir)).await?;
        }
        // Changes nothing when it is a learner.
        self.make_in(&turn, ChangeMembers::RemoveVoters(ids.clone())).await?;
        hand_over(&self.raft).await;
        if leads_without_vote(&self.raft.metrics().borrow()) {
            let text = "this node has lost its vote and hands over".to_owned();
            return Err(Refusal::Unavailable(text));
        }
        self.make_in(&turn, ChangeMembers::RemoveNodes(ids)).await?;
        Ok(())
    }
}

/// Whether the membership is on its way from one set of voters to another.
pub(super) fn is_between_steps(metrics: &RaftMetrics<u64, MemberNode>) -> bool {
    metrics.membership_config.membership().get_joint_config().len() > 1
}

async fn carry_out(
    changes: Changes,
    change: Change,
    moved: bool,
    heir: Option<u64>,
) -> Result<(), Refusal> {
    if let (
        true,
        Change::AddLearner { id, address, name } | Change::Address { id, address, name },
    ) = (moved, &change)
    {
        let node = BTreeMap::from([(*id, MemberNode::of(name, address))]);
        changes.make(ChangeMembers::SetNodes(node)).await?;
    }
    match change {
        Change::AddLearner { id, address, name } => {
            let node = BTreeMap::from([(id, MemberNode::of(&name, &address))]);
            let added = changes.make(ChangeMembers::AddNodes(node)).await?;
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
            changes.make(ids).await?;
        }
        Change::Promote { ids } => {
            changes.make(ChangeMembers::AddVoterIds(ids)).await?;
        }
        Change::Remove { id } => changes.remove(id, heir).await?,
        Change::Address { .. } => {}
    }
    hand_over(&changes.raft).await;
    Ok(())
}

/// A leader that is no voter any more would lead on as long as the voters hear of it: it falls
/// silent until they have chosen another, or for a while if nobody tells it of that.
async fn hand_over(raft: &NodeRaft) {
    if !leads_without_vote(&raft.metrics().borrow()) {
        return;
    }
    raft.runtime_config().heartbeat(false);
    let wait = raft.wait(Some(HAND_OVER));
    // In time or not: a heartbeat with an old vote does no harm, and tells this node the truth.
    let _ = wait.metrics(|m| !leads_without_vote(m), "another leader").await;
    raft.runtime_config().heartbeat(true);
}

fn leads_without_vote(metrics: &RaftMetrics<u64, MemberNode>) -> bool {
    let membership = metrics.membership_config.membership();
    metrics.current_leader == Some(metrics.id) && !membership.voter_ids().any(|id| id == metrics.id)
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
