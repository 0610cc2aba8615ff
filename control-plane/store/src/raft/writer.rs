//! Group commit: commands that arrive while entries are on their way to disk share the next entry,
//! so that one fsync serves all of them. Where another node leads, the batch goes there.
//!
//! # Guarantees
//! A command is repeated only when it is certain that nothing was done.

use std::{sync::Arc, time::Duration};

use openraft::{
    error::{ClientWriteError, RaftError},
    raft::ClientWriteResult,
};
use serde::{Deserialize, Serialize};
use tokio::{
    sync::{Semaphore, mpsc, oneshot},
    time::{Instant, timeout_at},
};

use super::{
    Request, Response, TypeConfig,
    call::Target,
    network::json,
    node::{NO_LEADER, Node, Place, Refusal, patience},
};
use crate::{
    StoreError,
    command::{Command, Outcome},
    store::now_ms,
};

/// Orders that wait for the writer; further callers wait for their place.
const QUEUE: usize = 1024;
/// Limits of one entry.
const BATCH_COMMANDS: usize = 256;
const BATCH_BYTES: usize = 4 << 20;
/// While followers write one entry, the leader writes the next, and those that come meanwhile are on
/// their way when a follower is done: each of its calls takes all that there are.
const IN_FLIGHT: usize = 4;

/// What became of the commands of one order.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Written {
    /// Their place in the log.
    pub(super) index: u64,
    pub(super) outcomes: Vec<Outcome>,
}

type Answer = Result<Written, Refusal>;

struct Order {
    commands: Vec<Command>,
    /// Sent by another node, which looks for the leader itself.
    here_only: bool,
    arrived: Instant,
    reply: oneshot::Sender<Answer>,
}

/// Hands commands to the task that writes.
pub(super) struct Writer(mpsc::Sender<Order>);

impl Writer {
    /// The task ends with the last handle.
    pub(super) fn start(node: Arc<Node>) -> Self {
        let (sender, queue) = mpsc::channel(QUEUE);
        tokio::spawn(write_batches(node, queue));
        Self(sender)
    }

    /// Returns when the command is committed and applied on this node.
    pub(super) async fn write(&self, command: Command) -> Result<Outcome, StoreError> {
        let written = self.order(vec![command], false).await?;
        let lost = || StoreError::Unknown("the store's answer is incomplete".to_owned());
        written.outcomes.into_iter().next().ok_or_else(lost)
    }

    /// The same for another node's commands, if this node leads.
    pub(super) async fn write_here(&self, commands: Vec<Command>) -> Answer {
        self.order(commands, true).await
    }

    async fn order(&self, commands: Vec<Command>, here_only: bool) -> Answer {
        let (reply, answer) = oneshot::channel();
        let order = Order { commands, here_only, arrived: Instant::now(), reply };
        if self.0.send(order).await.is_err() {
            return Err(Refusal::Unavailable("the store is shut down".to_owned()));
        }
        answer.await.unwrap_or_else(|_| Err(Refusal::Unknown("the store stopped".to_owned())))
    }
}

async fn write_batches(node: Arc<Node>, mut queue: mpsc::Receiver<Order>) {
    let permits = Arc::new(Semaphore::new(IN_FLIGHT));
    // First the permit: what comes meanwhile joins the batch.
    while let Ok(permit) = Arc::clone(&permits).acquire_owned().await {
        let Some(first) = queue.recv().await else { return };
        let batch = Batch::collect(first, &mut queue, patience(node.pace));
        if batch.waiting.is_empty() {
            continue;
        }
        // Proposed here and now, so that entries are in the order of arrival.
        let begun = match node.place() {
            Place::Here => Some(propose(&node, &batch.commands).await),
            Place::There(_) | Place::Nowhere(_) => None,
        };
        let node = Arc::clone(&node);
        tokio::spawn(async move {
            batch.finish(&node, begun).await;
            drop(permit);
        });
    }
}

/// Orders that go together.
struct Batch {
    /// Of all orders, one after the other.
    commands: Arc<[Command]>,
    waiting: Vec<Waiting>,
}

/// One order without its commands.
struct Waiting {
    commands: usize,
    here_only: bool,
    reply: oneshot::Sender<Answer>,
}

impl Batch {
    fn collect(first: Order, queue: &mut mpsc::Receiver<Order>, patience: Duration) -> Self {
        let (mut commands, mut waiting, mut bytes) = (Vec::new(), Vec::new(), 0);
        let mut next = Some(first);
        while let Some(order) = next {
            if order.arrived.elapsed() > patience {
                let refusal = Refusal::Unavailable("the store did not get to it in time".into());
                // A caller that went away needs no answer, here and below.
                let _ = order.reply.send(Err(refusal));
            } else {
                let Order { commands: ordered, here_only, reply, .. } = order;
                bytes += ordered.iter().map(Command::size).sum::<usize>();
                waiting.push(Waiting { commands: ordered.len(), here_only, reply });
                commands.extend(ordered);
            }
            let full = commands.len() >= BATCH_COMMANDS || bytes >= BATCH_BYTES;
            next = if full { None } else { queue.try_recv().ok() };
        }
        Self { commands: commands.into(), waiting }
    }

    /// Sees the batch through, with as many tries as are safe and fit into the time.
    async fn finish(mut self, node: &Node, mut begun: Option<Proposal>) {
        let deadline = node.deadline();
        while !self.waiting.is_empty() {
            let answer = match (begun.take(), node.place()) {
                // What is answered here is applied here.
                (Some(proposal), _) => proposal.outcome(node, deadline).await,
                (None, Place::Here) => {
                    propose(node, &self.commands).await.outcome(node, deadline).await
                }
                (None, Place::There(leader)) => {
                    let leads = Some(leader.address.clone());
                    self.refuse_forwarded(&Refusal::NotLeader { leader: leads });
                    if self.waiting.is_empty() {
                        return;
                    }
                    self.forward(node, &leader, deadline).await
                }
                (None, Place::Nowhere(why)) => Err(Refusal::Unavailable(why)),
            };
            match answer {
                Ok(written) => return self.answer(written),
                Err(refusal) => {
                    // Before their senders lose patience, who would have to take it for unknown.
                    self.refuse_forwarded(&refusal);
                    if self.waiting.is_empty() {
                        return;
                    }
                    let again = refusal.is_definite() && node.news(deadline).await;
                    if !again {
                        return self.refuse(&explained(node, refusal).await);
                    }
                }
            }
        }
    }

    async fn forward(&self, node: &Node, leader: &Target, deadline: Instant) -> Answer {
        let body = json(&self.commands);
        let written = node.call_leader::<Answer>(leader, "write", body, deadline).await??;
        // What this node acknowledged, it also shows; committed it is anyway. Without room it would
        // wait in vain.
        if node.is_full().is_none() {
            node.applied(written.index, deadline).await;
        }
        Ok(written)
    }

    /// Orders of other nodes go no further: their senders look for the leader, try again or explain.
    fn refuse_forwarded(&mut self, refusal: &Refusal) {
        if !self.waiting.iter().any(|order| order.here_only) {
            return;
        }
        let (mut commands, mut waiting) = (Vec::new(), Vec::new());
        let mut rest = &self.commands[..];
        for order in std::mem::take(&mut self.waiting) {
            let (ordered, further) = rest.split_at(order.commands);
            rest = further;
            if order.here_only {
                let _ = order.reply.send(Err(refusal.clone()));
            } else {
                commands.extend_from_slice(ordered);
                waiting.push(order);
            }
        }
        *self = Self { commands: commands.into(), waiting };
    }

    fn refuse(self, refusal: &Refusal) {
        for order in self.waiting {
            let _ = order.reply.send(Err(refusal.clone()));
        }
    }

    fn answer(self, written: Written) {
        let Written { index, outcomes } = written;
        let mut outcomes = outcomes.into_iter();
        for order in self.waiting {
            let outcomes = outcomes.by_ref().take(order.commands).collect();
            let _ = order.reply.send(Ok(Written { index, outcomes }));
        }
    }
}

/// The same refusal, with what a person can do about it.
async fn explained(node: &Node, refusal: Refusal) -> Refusal {
    match refusal {
        Refusal::NotLeader { .. } => Refusal::Unavailable(node.explain(NO_LEADER.to_owned()).await),
        Refusal::Unavailable(text) => Refusal::Unavailable(node.explain(text).await),
        Refusal::Unknown(text) => Refusal::Unknown(node.explain(text).await),
        Refusal::Invalid(_) | Refusal::Full(_) => refusal,
    }
}

/// A batch that was handed to Raft on this node.
enum Proposal {
    Begun { mark: u64, answer: oneshot::Receiver<ClientWriteResult<TypeConfig>> },
    Refused(Refusal),
}

async fn propose(node: &Node, commands: &Arc<[Command]>) -> Proposal {
    if let Some(problem) = node.is_full() {
        let waits = node.handing.borrow().waits();
        return Proposal::Refused(match waits {
            Some(why) => Refusal::Unavailable(why.to_owned()),
            None => Refusal::Full(problem),
        });
    }
    let mark = node.proposals.begin();
    let request = Request { time_ms: now_ms(), commands: Arc::clone(commands), mark };
    match node.raft.client_write_ff(request).await {
        Ok(answer) => Proposal::Begun { mark, answer },
        Err(error) => {
            node.proposals.end(mark);
            Proposal::Refused(Refusal::Unavailable(error.to_string()))
        }
    }
}

impl Proposal {
    async fn outcome(self, node: &Node, deadline: Instant) -> Answer {
        let (mark, answer) = match self {
            Self::Begun { mark, answer } => (mark, answer),
            Self::Refused(refusal) => return Err(refusal),
        };
        // Cancel-safe: what the other branch waits for is looked at again by whoever asks next.
        let result = tokio::select! {
            result = timeout_at(deadline, answer) => result,
            why = node.loses_quorum() => {
                node.proposals.end(mark);
                return Err(Refusal::Unknown(why));
            }
        };
        let logged = node.proposals.end(mark);
        match result {
            Ok(Ok(Ok(done))) => {
                let Response(outcomes) = done.data;
                Ok(Written { index: done.log_id.index, outcomes })
            }
            Ok(Ok(Err(ClientWriteError::ForwardToLeader(forward)))) if !logged => {
                Err(Refusal::NotLeader { leader: forward.leader_node.map(|node| node.addr) })
            }
            Ok(Ok(Err(error))) => {
                Err(Refusal::Unknown(RaftError::<u64, _>::APIError(error).to_string()))
            }
            Ok(Err(_)) => Err(Refusal::Unknown("Raft stopped".to_owned())),
            Err(_) => {
                Err(Refusal::Unknown("no majority of voters confirmed it in time".to_owned()))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Txn;

    #[test]
    fn orders_of_other_nodes_are_answered_and_the_others_stay() {
        let order = |key: &str, here_only: bool| {
            let (reply, answer) = oneshot::channel();
            (Command::Txn(Txn::create(key, "1")), Waiting { commands: 1, here_only, reply }, answer)
        };
        let (own, forwarded, own_too) = (order("/a", false), order("/b", true), order("/c", false));
        let mut batch = Batch {
            commands: [own.0.clone(), forwarded.0, own_too.0.clone()].into(),
            waiting: vec![own.1, forwarded.1, own_too.1],
        };
        let refusal = Refusal::Unavailable("no leader is known".to_owned());
        batch.refuse_forwarded(&refusal);
        let mut told = forwarded.2;
        assert_eq!(told.try_recv(), Ok(Err(refusal)));
        assert_eq!(*batch.commands, [own.0, own_too.0]);
        for mut answer in [own.2, own_too.2] {
            assert_eq!(answer.try_recv(), Err(oneshot::error::TryRecvError::Empty));
        }
    }
}
