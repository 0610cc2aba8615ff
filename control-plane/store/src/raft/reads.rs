//! Linearizable reads on every node: the leader says up to where the log is committed and proves
//! that it still leads, then this node waits until it has applied so much.
//!
//! Reads that come while a question is under way share the next one.

use std::{sync::Arc, time::Duration};

use openraft::error::{CheckIsLeaderError, RaftError};
use tokio::{
    sync::{mpsc, oneshot},
    time::Instant,
};

use super::node::{NO_LEADER, Node, Place, Refusal};
use crate::StoreError;

/// Reads that wait for their question; further ones wait for their place.
const QUEUE: usize = 4096;
/// A node without room may be about to apply what it has; what it lacks does not come.
const PATIENCE_FULL: Duration = Duration::from_secs(1);

type Reply = oneshot::Sender<Result<(), Refusal>>;

/// Hands reads to the task that asks.
pub(super) struct Reads(mpsc::Sender<Reply>);

impl Reads {
    /// The task ends with the last handle.
    pub(super) fn start(node: Arc<Node>) -> Self {
        let (sender, mut queue) = mpsc::channel::<Reply>(QUEUE);
        tokio::spawn(async move {
            while let Some(first) = queue.recv().await {
                let mut waiting = vec![first];
                while let Ok(next) = queue.try_recv() {
                    waiting.push(next);
                }
                let answer = catch_up(&node).await;
                for reply in waiting {
                    // A reader that went away needs no answer.
                    let _ = reply.send(answer.clone());
                }
            }
        });
        Self(sender)
    }

    /// Returns when this node has everything that was acknowledged before the call.
    pub(super) async fn barrier(&self) -> Result<(), StoreError> {
        let (reply, answer) = oneshot::channel();
        if self.0.send(reply).await.is_err() {
            return Err(StoreError::Closed);
        }
        Ok(answer.await.map_err(|_| StoreError::Closed)??)
    }
}

async fn catch_up(node: &Node) -> Result<(), Refusal> {
    let deadline = node.deadline();
    loop {
        let asked = match node.place() {
            Place::Here => read_index(node).await,
            Place::There(leader) => {
                let answer = node.call_leader(&leader, "read-index", Vec::new(), deadline).await;
                answer.unwrap_or_else(|error| Err(error.into()))
            }
            Place::Nowhere(why) => Err(Refusal::Unavailable(why)),
        };
        match asked {
            Ok(index) => {
                let problem = node.is_full();
                let until = match problem {
                    Some(_) => deadline.min(Instant::now() + PATIENCE_FULL),
                    None => deadline,
                };
                if node.applied(index, until).await {
                    return Ok(());
                }
                let behind =
                    format!("this node is behind: it has not applied entry {index} in time");
                return Err(Refusal::Unavailable(match problem {
                    Some(problem) => format!("{behind}, for {problem}"),
                    None => behind,
                }));
            }
            // A question changes nothing, so that it may be repeated in any case.
            Err(refusal) => {
                if !node.news(deadline).await {
                    let found = match refusal {
                        Refusal::NotLeader { .. } => NO_LEADER.to_owned(),
                        Refusal::Unavailable(text)
                        | Refusal::Invalid(text)
                        | Refusal::Full(text)
                        | Refusal::Unknown(text) => text,
                    };
                    return Err(Refusal::Unavailable(node.explain(found).await));
                }
            }
        }
    }
}

/// The leader's answer: everything acknowledged by now is in the log up to this index.
pub(super) async fn read_index(node: &Node) -> Result<u64, Refusal> {
    match node.raft.get_read_log_id().await {
        Ok((id, _)) => Ok(id.map_or(0, |id| id.index)),
        Err(RaftError::APIError(CheckIsLeaderError::ForwardToLeader(forward))) => {
            Err(Refusal::NotLeader { leader: forward.leader_node.map(|node| node.addr) })
        }
        // Who is missing is told by those who explain it.
        Err(RaftError::APIError(CheckIsLeaderError::QuorumNotEnough(_))) => {
            Err(Refusal::Unavailable("no majority of voters answers the leader".to_owned()))
        }
        Err(RaftError::Fatal(error)) => Err(Refusal::Unavailable(error.to_string())),
    }
}
