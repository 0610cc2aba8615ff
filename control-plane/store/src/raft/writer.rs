//! Group commit: commands that arrive while an entry is on its way to disk share the next entry,
//! so that one fsync serves all of them.

use openraft::error::{ClientWriteError, RaftError};
use tokio::sync::{mpsc, oneshot};

use super::{NodeRaft, Request, Response};
use crate::{
    StoreError,
    command::{Command, Op, Outcome},
    store::now_ms,
};

/// Commands that wait for the writer; further callers wait for their place.
const QUEUE: usize = 1024;
/// Limits of one entry.
const BATCH_COMMANDS: usize = 256;
const BATCH_BYTES: usize = 4 << 20;

struct Pending {
    command: Command,
    reply: oneshot::Sender<Result<Outcome, StoreError>>,
}

/// Hands commands to the task that writes.
pub(super) struct Writer(mpsc::Sender<Pending>);

impl Writer {
    /// The task ends with the last handle.
    pub(super) fn start(raft: NodeRaft) -> Self {
        let (sender, queue) = mpsc::channel(QUEUE);
        tokio::spawn(write_batches(raft, queue));
        Self(sender)
    }

    /// Returns when the command is applied, and so on disk.
    pub(super) async fn write(&self, command: Command) -> Result<Outcome, StoreError> {
        let (reply, answer) = oneshot::channel();
        let pending = Pending { command, reply };
        if self.0.send(pending).await.is_err() {
            return Err(StoreError::Closed);
        }
        answer.await.unwrap_or_else(|_| Err(StoreError::Unknown("the store stopped".to_owned())))
    }
}

async fn write_batches(raft: NodeRaft, mut queue: mpsc::Receiver<Pending>) {
    while let Some(first) = queue.recv().await {
        let mut bytes = size(&first.command);
        let mut batch = vec![first];
        while batch.len() < BATCH_COMMANDS && bytes < BATCH_BYTES {
            let Ok(next) = queue.try_recv() else { break };
            bytes += size(&next.command);
            batch.push(next);
        }
        let (commands, replies): (Vec<_>, Vec<_>) =
            batch.into_iter().map(|p| (p.command, p.reply)).unzip();
        let time_ms = now_ms();
        let result = raft.client_write(Request { time_ms, commands }).await;
        // A caller that went away needs no answer.
        match result {
            Ok(done) => {
                let Response(outcomes) = done.data;
                for (reply, outcome) in replies.into_iter().zip(outcomes) {
                    let _ = reply.send(Ok(outcome));
                }
            }
            Err(error) => {
                for reply in replies {
                    let _ = reply.send(Err(refusal(&error)));
                }
            }
        }
    }
}

fn size(command: &Command) -> usize {
    match command {
        Command::Compact { .. } => 0,
        Command::Txn(txn) => txn
            .ops
            .iter()
            .map(|op| match op {
                Op::Put { key, value } => key.len() + value.len(),
                Op::Delete { key } => key.len(),
            })
            .sum(),
    }
}

type WriteError = RaftError<u64, ClientWriteError<u64, openraft::BasicNode>>;

fn refusal(error: &WriteError) -> StoreError {
    match error {
        RaftError::APIError(ClientWriteError::ForwardToLeader(forward)) => StoreError::NotLeader {
            leader: forward.leader_node.as_ref().map(|node| node.addr.clone()),
        },
        RaftError::APIError(ClientWriteError::ChangeMembershipError(error)) => {
            StoreError::Invalid(error.to_string())
        }
        // The entry may have reached the disk before Raft stopped.
        RaftError::Fatal(error) => StoreError::Unknown(error.to_string()),
    }
}
