//! The replicated backend: openraft over a log on disk, with the state in memory.
//!
//! Owns: the log, votes and snapshots on disk, group commit, the calls between nodes. Never: who
//! may call; connections are made by the client and accepted by the server that it is given.

mod call;
mod commits;
mod disk;
mod election;
mod error;
mod file;
mod flushing;
mod line;
mod log;
mod machine;
mod mark;
mod members;
mod network;
mod node;
mod pace;
mod reads;
mod roll;
mod room;
mod routes;
#[cfg(test)]
mod tests;
mod voters;
mod writer;

use std::{
    collections::{BTreeMap, BTreeSet},
    hash::{BuildHasher as _, RandomState},
    io::Cursor,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use openraft::{Raft, RaftMetrics, ServerState, SnapshotPolicy, metrics::RaftServerMetrics};
use serde::{Deserialize, Serialize};
use tokio::{sync::watch, task::JoinHandle};

pub use call::{Begin, Peering};
pub use error::{DiskError, OpenError};
pub use members::Member;
pub(crate) use routes::routes;

use crate::{
    StoreError,
    command::{Command, Outcome},
    raft::{
        call::Caller,
        disk::Disk,
        election::Ear,
        log::{Growth, LogStore},
        machine::StateMachine,
        members::{Change, Changes},
        network::{Peers, Silence, Telling},
        node::{Node, Place},
        pace::Pace,
        reads::Reads,
        room::Handing,
        writer::Writer,
    },
    shared::Shared,
    store::{Leadership, RaftPosition},
};

openraft::declare_raft_types!(
    /// The types that openraft is used with.
    pub(crate) TypeConfig:
        D = Request,
        R = Response,
        NodeId = u64,
        Node = MemberNode,
);

/// What one log entry orders: commands that arrived while the entry before was on its way.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Request {
    /// The proposer's clock, milliseconds since the Unix epoch.
    time_ms: u64,
    /// Shared: log, followers and state machine look at the same ones.
    commands: Arc<[Command]>,
    /// Tells this process's proposals apart; means nothing elsewhere.
    #[serde(skip)]
    mark: u64,
}

/// One outcome for each command of the entry.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Response(Vec<Outcome>);

/// What the membership says of a node.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct MemberNode {
    /// `IP:port`.
    addr: String,
    /// Empty in what was written before nodes had names.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    name: String,
}

impl MemberNode {
    fn of(name: &str, address: &str) -> Self {
        Self { addr: address.to_owned(), name: name.to_owned() }
    }
}

type NodeRaft = Raft<TypeConfig>;

/// Where a node keeps the store, and who it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RaftConfig {
    /// Folder of the store's file; made if absent.
    pub dir: PathBuf,
    pub node_id: u64,
    /// What people call this node; tells members apart for them.
    pub name: String,
    /// Where other nodes reach this one, `IP:port`.
    pub address: String,
}

/// Followers hear from the leader this often; a call to a follower may take as long.
const HEARTBEAT_MS: u64 = 150;
/// A voter has the lower bound to write its vote to disk and to answer. A follower that heard of its
/// leader within the upper bound, which openraft wants larger, votes for no other one. When followers
/// stand themselves is in [`election`].
const ELECTION_MS: (u64, u64) = (440, 450);
/// Log entries between snapshots: replaying so many takes well under a second.
const SNAPSHOT_EVERY: u64 = 10_000;
/// Log entries kept behind a snapshot, for followers that are a little behind.
const KEEP_BEHIND_SNAPSHOT: u64 = 1_000;
/// Parts in which snapshots travel.
const CHUNK_BYTES: u64 = 1 << 20;
/// Time for one part, and for the last one with all that is written then.
const CHUNK_LIMIT_MS: u64 = 10_000;
/// A single voter leads at once; this bounds the replay of its log.
const START_LIMIT: Duration = Duration::from_secs(30);

pub(crate) struct RaftBackend {
    node: Arc<Node>,
    writer: Writer,
    reads: Reads,
    leadership: watch::Receiver<Leadership>,
    leads: watch::Receiver<bool>,
    tasks: Vec<JoinHandle<()>>,
    disk: Arc<Disk>,
    shared: Arc<Shared>,
}

/// The id of the node whose store is in this folder; for a new folder a random one, which
/// [`Store::raft`](crate::Store::raft) then writes down.
///
/// # Errors
/// When there is a file that can't be read.
pub fn node_id(dir: &Path) -> Result<u64, DiskError> {
    if let Some(id) = Disk::node_id(dir)? {
        return Ok(id);
    }
    // The standard library's hasher takes its keys from the system's random source. 48 bits stay
    // exact in every JSON reader.
    Ok((RandomState::new().hash_one(0) >> 16).max(1))
}

fn fault(error: &dyn std::error::Error) -> OpenError {
    OpenError::Raft(error.to_string())
}

fn settings(pace: Pace) -> Result<Arc<openraft::Config>, OpenError> {
    let settings = openraft::Config {
        cluster_name: "exo".to_owned(),
        heartbeat_interval: HEARTBEAT_MS,
        election_timeout_min: pace.times_ms(ELECTION_MS.0),
        election_timeout_max: pace.times_ms(ELECTION_MS.1),
        snapshot_policy: SnapshotPolicy::LogsSinceLast(SNAPSHOT_EVERY),
        max_in_snapshot_log_to_keep: KEEP_BEHIND_SNAPSHOT,
        snapshot_max_chunk_size: CHUNK_BYTES,
        install_snapshot_timeout: CHUNK_LIMIT_MS,
        enable_elect: false,
        ..openraft::Config::default()
    };
    Ok(Arc::new(settings.validate().map_err(|e| fault(&e))?))
}

impl RaftBackend {
    /// Opens what is in the folder. Where there is nothing, begins a cluster of this one voter, or
    /// waits to be added to one.
    pub(crate) async fn open(
        config: RaftConfig,
        peering: Option<Peering>,
    ) -> Result<Self, OpenError> {
        let path = config.dir.clone();
        let opening = tokio::task::spawn_blocking(move || {
            let disk = Disk::open(&path, config.node_id)?;
            // Whoever can't write to the folder hears of it where something is to be written.
            Ok::<_, DiskError>((disk, Pace::measure(&path).unwrap_or_default()))
        });
        let (disk, pace) = opening.await.map_err(|error| OpenError::Raft(error.to_string()))??;
        if pace.is_slow() {
            let folder = config.dir.display();
            tracing::warn!(%folder, "the disk is slow: a new leader will take longer to be found");
        }
        let disk = Arc::new(disk);
        let mut machine = StateMachine::load(&disk)?;
        let (shared, applied) = (Arc::clone(machine.shared()), machine.progress());
        let log = LogStore::open(Arc::clone(&disk))?;
        let (proposals, growth) = (log.proposals(), log.growth());
        machine.after(log.flushing());
        let flushing = log.flushing();
        // What failed on disk says more than that Raft has stopped.
        let fault = |error: &dyn std::error::Error| match flushing.failure() {
            Some(failed) => OpenError::Raft(failed),
            None => fault(error),
        };
        let caller = Caller::new(config.node_id, peering.as_ref());
        let (telling, silence) = (Telling::new(), Silence::default());
        let peers = Peers {
            caller: caller.clone(),
            flushing: log.flushing(),
            telling: telling.clone(),
            silence: silence.clone(),
        };
        let raft = NodeRaft::new(config.node_id, settings(pace)?, peers, log, machine)
            .await
            .map_err(|e| fault(&e))?;
        let joins = peering.is_some_and(|p| p.begin == Begin::Join);
        let is_new = !raft.is_initialized().await.map_err(|e| fault(&e))?;
        if is_new && !joins {
            let node = MemberNode::of(&config.name, &config.address);
            raft.initialize(BTreeMap::from([(config.node_id, node)]))
                .await
                .map_err(|e| fault(&e))?;
        }
        start_alone(&raft, config.node_id, is_new).await.map_err(|e| fault(&*e))?;
        let (quorum_sender, quorum_lost) = watch::channel(None);
        let (handing_sender, handing) = watch::channel(Handing::default());
        let node = Arc::new(Node {
            id: config.node_id,
            name: config.name.clone(),
            changes: Changes::new(raft.clone()),
            raft,
            caller,
            proposals,
            disk: Arc::clone(&disk),
            ear: Ear::new(pace),
            pace,
            telling,
            applied,
            quorum_lost,
            handing,
        });
        let now = leadership(&node.raft.server_metrics().borrow());
        let (leads_sender, leads) = watch::channel(now.is_leader);
        let (sender, leadership) = watch::channel(now);
        let tasks = vec![
            tokio::spawn(follow_leadership(node.raft.server_metrics(), sender, leads_sender)),
            tokio::spawn(node::watch_quorum(Arc::clone(&node), quorum_sender, silence.clone())),
            tokio::spawn(room::keep(Arc::clone(&node), handing_sender, silence)),
            tokio::spawn(election::keep(Arc::clone(&node))),
            tokio::spawn(snapshot_by_size(Arc::clone(&node), growth)),
            tokio::spawn(tell_address(Arc::clone(&node), config.name, config.address)),
        ];
        let (writer, reads) = (Writer::start(Arc::clone(&node)), Reads::start(Arc::clone(&node)));
        Ok(Self { node, writer, reads, leadership, leads, tasks, disk, shared })
    }

    pub(crate) fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    pub(crate) async fn command(&self, command: Command) -> Result<Outcome, StoreError> {
        self.writer.write(command).await
    }

    /// Waits until this node has applied everything acknowledged before the call.
    pub(crate) async fn barrier(&self) -> Result<(), StoreError> {
        self.reads.barrier().await
    }

    pub(crate) fn members(&self) -> Vec<Member> {
        self.node.members()
    }

    pub(crate) async fn add_learner(
        &self,
        id: u64,
        name: String,
        address: String,
    ) -> Result<(), StoreError> {
        self.node.change(&Change::AddLearner { id, address, name }).await
    }

    /// Promotes learners while this node leads, until the store is shut down.
    pub(crate) async fn keep_voters(&self) {
        voters::keep(&self.node).await;
    }

    /// Waits until Raft stops, and says why.
    pub(crate) async fn stopped(&self) -> String {
        let mut metrics = self.node.metrics();
        match metrics.wait_for(|m| m.running_state.is_err()).await {
            Ok(now) => match &now.running_state {
                Err(error) => error.to_string(),
                Ok(()) => "it runs".to_owned(),
            },
            Err(_) => "it was shut down".to_owned(),
        }
    }

    pub(crate) async fn set_voters(&self, ids: BTreeSet<u64>) -> Result<(), StoreError> {
        self.node.change(&Change::Voters { ids }).await
    }

    pub(crate) async fn remove(&self, id: u64) -> Result<(), StoreError> {
        self.node.change(&Change::Remove { id }).await
    }

    /// Writes a snapshot of everything applied by now, and lets go of the log behind it.
    pub(crate) async fn snapshot(&self) -> Result<(), StoreError> {
        let failed = |error: &dyn std::error::Error| StoreError::Unavailable(error.to_string());
        let applied = self.metrics().last_applied;
        self.node.raft.trigger().snapshot().await.map_err(|e| failed(&e))?;
        let reached = |m: &RaftMetrics<u64, MemberNode>| m.snapshot >= applied;
        let wait = self.node.raft.wait(Some(START_LIMIT));
        wait.metrics(reached, "a snapshot").await.map_err(|e| failed(&e))?;
        let behind = applied.map_or(0, |id| id.index);
        self.node.raft.trigger().purge_log(behind).await.map_err(|e| failed(&e))?;
        Ok(())
    }

    fn is_stopped(&self) -> bool {
        self.shared.is_closed()
    }

    pub(crate) fn leadership(&self) -> watch::Receiver<Leadership> {
        self.leadership.clone()
    }

    pub(crate) fn leads(&self) -> watch::Receiver<bool> {
        self.leads.clone()
    }

    /// What this node's disk lacks for taking on more, and what comes of it.
    pub(crate) fn is_full(&self) -> Option<String> {
        let problem = self.node.is_full()?;
        Some(match self.node.place() {
            Place::There(_) => format!("{problem}: this node does not follow what others write"),
            Place::Here | Place::Nowhere(_) => format!("writes are refused: {problem}"),
        })
    }

    pub(crate) fn metrics(&self) -> RaftMetrics<u64, MemberNode> {
        self.node.metrics().borrow().clone()
    }

    pub(crate) fn position(&self) -> RaftPosition {
        let metrics = self.metrics();
        let members = metrics.membership_config.membership();
        let name = |id| {
            members.get_node(id).map(|node| match node.name.as_str() {
                "" => node.addr.clone(),
                name => name.to_owned(),
            })
        };
        let followers = metrics.replication.iter().flatten().filter(|(id, _)| **id != metrics.id);
        RaftPosition {
            has_leader: self.node.has_leader(),
            log_index: metrics.last_log_index.unwrap_or(0),
            applied_index: metrics.last_applied.map_or(0, |id| id.index),
            voters_change: members.get_joint_config().len() > 1,
            followers: followers
                .filter_map(|(id, log)| Some((name(id)?, log.map_or(0, |id| id.index))))
                .collect(),
        }
    }

    pub(crate) async fn shutdown(&self) {
        if let Err(error) = self.node.raft.shutdown().await {
            tracing::error!(%error, "Raft did not stop cleanly");
        }
        for task in &self.tasks {
            task.abort();
        }
        // openraft's tasks may still hold the log for a moment; the file is let go of now.
        let disk = Arc::clone(&self.disk);
        if let Err(error) = tokio::task::spawn_blocking(move || disk.close()).await {
            tracing::error!(%error, "the store's file was not closed cleanly");
        }
    }
}

/// Waits until a single voter leads and has applied its log. It stands for election at once, so no
/// timeout passes here.
async fn start_alone(
    raft: &NodeRaft,
    node_id: u64,
    is_new: bool,
) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    // Asked of the core itself: the metrics may still be those of before the start.
    let alone = raft
        .with_raft_state(move |state| state.membership_state.effective().voter_ids().eq([node_id]))
        .await?;
    if !alone {
        return Ok(());
    }
    // A new one has begun to do so.
    if !is_new {
        raft.trigger().elect().await?;
    }
    raft.wait(Some(START_LIMIT))
        .metrics(
            |m| {
                let applied = m.last_applied.map(|id| id.index);
                let leads = m.state == ServerState::Leader && m.current_leader == Some(m.id);
                leads && applied == m.last_log_index
            },
            "this voter leads and has applied its log",
        )
        .await?;
    Ok(())
}

fn leadership(metrics: &RaftServerMetrics<u64, MemberNode>) -> Leadership {
    let leader = metrics.current_leader;
    let membership = metrics.membership_config.membership();
    Leadership {
        is_leader: metrics.state == ServerState::Leader && leader == Some(metrics.id),
        term: metrics.vote.leader_id.term,
        leader: leader.and_then(|id| membership.get_node(&id)).map(|node| node.addr.clone()),
    }
}

/// Tells who leads.
async fn follow_leadership(
    mut metrics: watch::Receiver<RaftServerMetrics<u64, MemberNode>>,
    leadership_sender: watch::Sender<Leadership>,
    leads: watch::Sender<bool>,
) {
    let tell = |now: Leadership| {
        if *leadership_sender.borrow() != now {
            let leader = now.leader.as_deref().unwrap_or("none");
            tracing::info!(leader, term = now.term, here = now.is_leader, "the store's leader");
        }
        set_if_changed(&leads, now.is_leader);
        set_if_changed(&leadership_sender, now);
    };
    loop {
        tell(leadership(&metrics.borrow_and_update()));
        if metrics.changed().await.is_err() {
            // Raft has stopped: nobody leads through this node, which is no news of the cluster.
            set_if_changed(&leads, false);
            set_if_changed(&leadership_sender, Leadership::default());
            return;
        }
    }
}

/// Takes a snapshot each time the log has grown by its limit of bytes.
async fn snapshot_by_size(node: Arc<Node>, growth: Arc<Growth>) {
    loop {
        growth.reached_limit().await;
        if node.raft.trigger().snapshot().await.is_err() {
            // Raft has stopped.
            return;
        }
    }
}

/// Has the others call this node where it is now, if it was elsewhere before.
async fn tell_address(node: Arc<Node>, name: String, address: String) {
    let known = node.members().into_iter().find(|member| member.id == node.id);
    if known.is_none_or(|known| known.address == address && known.name == name) {
        return;
    }
    let change = Change::Address { id: node.id, address, name };
    if let Err(error) = node.change(&change).await {
        tracing::warn!(%error, "the other voters don't know this node's new address");
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
