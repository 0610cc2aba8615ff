//! The replicated backend: openraft over a log on disk, with the state in memory.
//!
//! Owns: the log, votes and snapshots on disk, group commit. Never: the transport between nodes
//! (a cluster of one voter needs none).

mod disk;
mod log;
mod machine;
mod network;
#[cfg(test)]
mod tests;
mod writer;

use std::{collections::BTreeMap, io::Cursor, path::PathBuf, sync::Arc, time::Duration};

use openraft::{BasicNode, Raft, RaftMetrics, ServerState, SnapshotPolicy};
use serde::{Deserialize, Serialize};
use tokio::{sync::watch, task::JoinHandle};

pub use disk::DiskError;

use crate::{
    StoreError,
    command::{Command, Outcome},
    raft::{disk::Disk, log::LogStore, machine::StateMachine, network::Peers, writer::Writer},
    shared::Shared,
    store::Leadership,
};

openraft::declare_raft_types!(
    /// The types that openraft is used with.
    pub(crate) TypeConfig:
        D = Request,
        R = Response,
        NodeId = u64,
        Node = BasicNode,
);

/// What one log entry orders: commands that arrived while the entry before was on its way.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Request {
    /// The proposer's clock, milliseconds since the Unix epoch.
    time_ms: u64,
    commands: Vec<Command>,
}

/// One outcome for each command of the entry.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Response(Vec<Outcome>);

type NodeRaft = Raft<TypeConfig>;

/// Where a node keeps the store, and who it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RaftConfig {
    /// Folder of the store's file; made if absent.
    pub dir: PathBuf,
    pub node_id: u64,
    /// Where other nodes reach this one, `IP:port`.
    pub address: String,
}

/// Why a store can't be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    #[error(transparent)]
    Disk(#[from] DiskError),
    #[error("starting Raft: {0}")]
    Raft(String),
}

/// Followers hear from the leader this often.
const HEARTBEAT_MS: u64 = 100;
/// A leader that is not heard of for this long is replaced.
const ELECTION_MS: (u64, u64) = (400, 800);
/// Log entries between snapshots: replaying so many takes well under a second.
const SNAPSHOT_EVERY: u64 = 10_000;
/// Log entries kept behind a snapshot, for followers that are a little behind.
const KEEP_BEHIND_SNAPSHOT: u64 = 1_000;
/// A single voter leads at once; this bounds the replay of its log.
const START_LIMIT: Duration = Duration::from_secs(30);

pub(crate) struct RaftBackend {
    raft: NodeRaft,
    writer: Writer,
    leadership: watch::Receiver<Leadership>,
    leads: watch::Receiver<bool>,
    follower: JoinHandle<()>,
    disk: Arc<Disk>,
}

impl RaftBackend {
    /// Opens what is in the folder, or begins a cluster of this one voter where there is nothing.
    pub(crate) async fn open(config: RaftConfig) -> Result<(Arc<Shared>, Self), OpenError> {
        let path = config.dir.clone();
        let disk = tokio::task::spawn_blocking(move || Disk::open(&path, config.node_id))
            .await
            .map_err(|error| OpenError::Raft(error.to_string()))??;
        let disk = Arc::new(disk);
        let machine = StateMachine::load(&disk)?;
        let shared = Arc::clone(machine.shared());
        let log = LogStore::open(Arc::clone(&disk))?;
        let fault = |error: &dyn std::error::Error| OpenError::Raft(error.to_string());
        let settings = openraft::Config {
            cluster_name: "exo".to_owned(),
            heartbeat_interval: HEARTBEAT_MS,
            election_timeout_min: ELECTION_MS.0,
            election_timeout_max: ELECTION_MS.1,
            snapshot_policy: SnapshotPolicy::LogsSinceLast(SNAPSHOT_EVERY),
            max_in_snapshot_log_to_keep: KEEP_BEHIND_SNAPSHOT,
            ..openraft::Config::default()
        };
        let settings = Arc::new(settings.validate().map_err(|e| fault(&e))?);
        let raft = NodeRaft::new(config.node_id, settings, Peers, log, machine)
            .await
            .map_err(|e| fault(&e))?;
        if !raft.is_initialized().await.map_err(|e| fault(&e))? {
            let node = BasicNode::new(&config.address);
            raft.initialize(BTreeMap::from([(config.node_id, node)]))
                .await
                .map_err(|e| fault(&e))?;
        }
        start_alone(&raft, config.node_id).await?;
        let now = leadership(&raft.metrics().borrow());
        let (leads_sender, leads) = watch::channel(now.is_leader);
        let (sender, leadership) = watch::channel(now);
        let follower = tokio::spawn(follow_leadership(raft.metrics(), sender, leads_sender));
        let backend =
            Self { writer: Writer::start(raft.clone()), raft, leadership, leads, follower, disk };
        Ok((shared, backend))
    }

    pub(crate) async fn command(&self, command: Command) -> Result<Outcome, StoreError> {
        self.writer.write(command).await
    }

    /// Waits until this node has applied everything acknowledged before the call; it leads.
    pub(crate) async fn barrier(&self) -> Result<(), StoreError> {
        use openraft::error::{CheckIsLeaderError, RaftError};
        match self.raft.ensure_linearizable().await {
            Ok(_) => Ok(()),
            Err(RaftError::APIError(CheckIsLeaderError::ForwardToLeader(forward))) => {
                Err(StoreError::NotLeader { leader: forward.leader_node.map(|node| node.addr) })
            }
            Err(RaftError::APIError(CheckIsLeaderError::QuorumNotEnough(error))) => {
                Err(StoreError::Unavailable(error.to_string()))
            }
            Err(RaftError::Fatal(error)) => Err(StoreError::Unavailable(error.to_string())),
        }
    }

    pub(crate) fn leadership(&self) -> watch::Receiver<Leadership> {
        self.leadership.clone()
    }

    pub(crate) fn leads(&self) -> watch::Receiver<bool> {
        self.leads.clone()
    }

    pub(crate) fn metrics(&self) -> RaftMetrics<u64, BasicNode> {
        self.raft.metrics().borrow().clone()
    }

    pub(crate) async fn shutdown(&self) {
        if let Err(error) = self.raft.shutdown().await {
            tracing::error!(%error, "Raft did not stop cleanly");
        }
        self.follower.abort();
        // openraft's tasks may still hold the log for a moment; the file is let go of now.
        let disk = Arc::clone(&self.disk);
        if let Err(error) = tokio::task::spawn_blocking(move || disk.close()).await {
            tracing::error!(%error, "the store's file was not closed cleanly");
        }
    }
}

/// Waits until a single voter leads and has applied its log. It stands for election at once when
/// it is new, and resumes its own leadership when it restarts, so no timeout passes here.
async fn start_alone(raft: &NodeRaft, node_id: u64) -> Result<(), OpenError> {
    let fault = |error: &dyn std::error::Error| OpenError::Raft(error.to_string());
    // Asked of the core itself: the metrics may still be those of before the start.
    let alone = raft
        .with_raft_state(move |state| state.membership_state.effective().voter_ids().eq([node_id]))
        .await
        .map_err(|e| fault(&e))?;
    if !alone {
        return Ok(());
    }
    raft.wait(Some(START_LIMIT))
        .metrics(
            |m| {
                let applied = m.last_applied.map(|id| id.index);
                leadership(m).is_leader && applied == m.last_log_index
            },
            "this voter leads and has applied its log",
        )
        .await
        .map_err(|e| fault(&e))?;
    Ok(())
}

fn leadership(metrics: &RaftMetrics<u64, BasicNode>) -> Leadership {
    let leader = metrics.current_leader;
    let membership = metrics.membership_config.membership();
    Leadership {
        is_leader: metrics.state == ServerState::Leader && leader == Some(metrics.id),
        term: metrics.current_term,
        leader: leader.and_then(|id| membership.get_node(&id)).map(|node| node.addr.clone()),
    }
}

/// Copies who leads out of openraft's metrics, which change with every write.
async fn follow_leadership(
    mut metrics: watch::Receiver<RaftMetrics<u64, BasicNode>>,
    leadership_sender: watch::Sender<Leadership>,
    leads: watch::Sender<bool>,
) {
    let tell = |now: Leadership| {
        set_if_changed(&leads, now.is_leader);
        set_if_changed(&leadership_sender, now);
    };
    loop {
        tell(leadership(&metrics.borrow_and_update()));
        if metrics.changed().await.is_err() {
            // Raft has stopped: nobody leads through this node.
            tell(Leadership::default());
            return;
        }
    }
}

fn set_if_changed<T: PartialEq>(sender: &watch::Sender<T>, now: T) {
    sender.send_if_modified(|known| {
        let changed = *known != now;
        *known = now;
        changed
    });
}

/// The form in which snapshots travel.
type SnapshotData = Cursor<Vec<u8>>;
