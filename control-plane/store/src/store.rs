//! The handle through which everything else uses the store.

use std::{
    collections::BTreeSet,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{SystemTime, UNIX_EPOCH},
};

use tokio::sync::watch;

#[cfg(feature = "etcd")]
use crate::etcd::{EtcdBackend, EtcdConfig, EtcdError};
use crate::{
    command::{Command, Entry, Meta, Outcome, Txn},
    raft::{self, Member, OpenError, Peering, RaftBackend, RaftConfig},
    shared::{Shared, Watch},
    state::{HistoryLimits, ListQuery, Listing, ReadError, State},
};

/// Why the store did not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    #[error(transparent)]
    Read(#[from] ReadError),
    #[error("invalid transaction: {0}")]
    Invalid(String),
    /// Writes and linearizable reads go to the leader.
    #[error("this node doesn't lead the store; {}", leader_text(leader.as_deref()))]
    NotLeader {
        /// Its address, when one is known.
        leader: Option<String>,
    },
    /// Nothing was done; there must be more room on the leader's disk first, and on others'.
    #[error("writes are refused: {0}")]
    Full(String),
    /// It may have been carried out all the same: look before trying again.
    #[error("the outcome of the write is unknown: {0}")]
    Unknown(String),
    /// No answer from a majority in time.
    #[error("the store is unavailable: {0}")]
    Unavailable(String),
    #[error("the store is shut down")]
    Closed,
}

fn leader_text(leader: Option<&str>) -> String {
    match leader {
        Some(leader) => format!("the leader is {leader}"),
        None => "no leader is known".to_owned(),
    }
}

impl StoreError {
    /// The same call may work a little later, and repeating it does no harm.
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::NotLeader { .. } | Self::Unavailable(_) | Self::Full(_) => true,
            Self::Read(_) | Self::Invalid(_) | Self::Unknown(_) | Self::Closed => false,
        }
    }
}

/// What became of a transaction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TxnOutcome {
    /// Carried out. If it changed something, `revision` is the changed keys' `mod_revision`.
    Committed { revision: u64 },
    /// A comparison failed; what each compared key holds, in their order.
    Conflict { current: Vec<Option<Entry>> },
}

/// Who leads the store, as this node sees it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Leadership {
    /// This node leads.
    pub is_leader: bool,
    pub term: u64,
    /// Address of the leader, when one is known.
    pub leader: Option<String>,
}

/// A store. Clones share it.
#[derive(Clone)]
pub struct Store {
    shared: Arc<Shared>,
    backend: Backend,
}

#[derive(Clone)]
enum Backend {
    Memory(Arc<Memory>),
    Raft(Arc<RaftBackend>),
    #[cfg(feature = "etcd")]
    Etcd(Arc<EtcdBackend>),
}

/// How much the store holds.
pub(crate) struct Sizes {
    pub(crate) revision: u64,
    pub(crate) compacted: u64,
    pub(crate) objects: usize,
    pub(crate) bytes: usize,
    pub(crate) history: usize,
}

/// Where Raft's log is.
#[derive(Default)]
pub(crate) struct RaftPosition {
    /// A leader reaches this node, or is this node and reaches a majority.
    pub(crate) has_leader: bool,
    pub(crate) log_index: u64,
    pub(crate) applied_index: u64,
    /// Majorities of two sets of voters are needed.
    pub(crate) voters_change: bool,
    /// On the leader: the others' names, and how far the log is theirs too.
    pub(crate) followers: Vec<(String, u64)>,
}

struct Memory {
    index: AtomicU64,
    leads: watch::Sender<bool>,
    leadership: watch::Sender<Leadership>,
}

impl Store {
    /// A store that lives in this process only and forgets everything with it.
    pub fn memory() -> Self {
        Self::memory_with(HistoryLimits::DEFAULT)
    }

    /// The same with its own limits of history.
    pub fn memory_with(limits: HistoryLimits) -> Self {
        Self {
            shared: Shared::new(State::new(limits)),
            backend: Backend::Memory(Arc::new(Memory {
                index: AtomicU64::new(0),
                leads: watch::Sender::new(true),
                leadership: watch::Sender::new(Leadership {
                    is_leader: true,
                    term: 1,
                    leader: None,
                }),
            })),
        }
    }

    /// A store on this node's disk, replicated by Raft. A new folder begins a cluster of this one
    /// voter. When this returns, a single voter leads and has everything it ever acknowledged.
    pub async fn raft(config: RaftConfig) -> Result<Self, OpenError> {
        Self::open_raft(config, None).await
    }

    /// The same for a node among others. Serve [`raft_routes`](crate::raft_routes) at
    /// `config.address` right after this, to the cluster's own nodes only.
    ///
    /// A node with a store in its folder takes its place again; `peering.begin` is for a new one.
    pub async fn raft_with_peers(config: RaftConfig, peering: Peering) -> Result<Self, OpenError> {
        Self::open_raft(config, Some(peering)).await
    }

    async fn open_raft(config: RaftConfig, peering: Option<Peering>) -> Result<Self, OpenError> {
        let backend = Box::pin(RaftBackend::open(config, peering)).await?;
        let shared = Arc::clone(backend.shared());
        Ok(Self { shared, backend: Backend::Raft(Arc::new(backend)) })
    }

    /// A store in an etcd cluster. This node follows all of it in memory, and stands for election
    /// as the one that [leads](Self::leads).
    #[cfg(feature = "etcd")]
    pub async fn etcd(config: EtcdConfig) -> Result<Self, EtcdError> {
        let backend = Box::pin(EtcdBackend::open(config)).await?;
        let shared = Arc::clone(backend.shared());
        Ok(Self { shared, backend: Backend::Etcd(Arc::new(backend)) })
    }

    /// The nodes of the cluster as this one knows them; none where Raft is not used.
    pub fn members(&self) -> Vec<Member> {
        match &self.backend {
            Backend::Memory(_) => Vec::new(),
            #[cfg(feature = "etcd")]
            Backend::Etcd(_) => Vec::new(),
            Backend::Raft(raft) => raft.members(),
        }
    }

    /// Adds a node that follows without a vote, or tells where it is now. Returns when it has
    /// caught up. Works on every node, as do the other changes of membership.
    pub async fn add_learner(&self, id: u64, name: &str, address: &str) -> Result<(), StoreError> {
        self.replicated()?.add_learner(id, name.to_owned(), address.to_owned()).await
    }

    /// While this node leads, makes voters of learners that have caught up: an odd number of
    /// voters, five at most. Returns when the store is shut down; at once where there are no
    /// members.
    pub async fn keep_voters(&self) {
        if let Backend::Raft(raft) = &self.backend {
            raft.keep_voters().await;
        }
    }

    /// Waits until the store can't go on, and says why: its disk failed, or it was shut down. It
    /// has to be opened anew then. Never returns where that can't happen.
    pub async fn stopped(&self) -> String {
        match &self.backend {
            Backend::Raft(raft) => raft.stopped().await,
            Backend::Memory(_) => std::future::pending().await,
            #[cfg(feature = "etcd")]
            Backend::Etcd(_) => std::future::pending().await,
        }
    }

    /// Makes exactly these nodes voters: all must be members. Former voters go on as learners.
    pub async fn change_membership(&self, voters: BTreeSet<u64>) -> Result<(), StoreError> {
        self.replicated()?.set_voters(voters).await
    }

    /// Takes a node out of the cluster, whether it is a voter or not, running or not. Where this
    /// fails with [`StoreError::Unknown`], the node may still be a member, or vote again: repeat it.
    pub async fn remove_node(&self, id: u64) -> Result<(), StoreError> {
        self.replicated()?.remove(id).await
    }

    /// Writes a snapshot on this node now, and drops all of the log behind it. Snapshots are also
    /// written on their own, by the log's length; then some of the log is kept for followers that
    /// are a little behind.
    pub async fn snapshot(&self) -> Result<(), StoreError> {
        self.replicated()?.snapshot().await
    }

    fn replicated(&self) -> Result<&RaftBackend, StoreError> {
        if self.shared.is_closed() {
            return Err(StoreError::Closed);
        }
        match &self.backend {
            Backend::Memory(_) => Err(StoreError::Invalid("this store has no members".to_owned())),
            #[cfg(feature = "etcd")]
            Backend::Etcd(_) => Err(StoreError::Invalid("etcd keeps its own members".to_owned())),
            Backend::Raft(raft) => Ok(raft),
        }
    }

    pub(crate) fn routes(&self) -> axum::Router {
        match &self.backend {
            Backend::Memory(_) => axum::Router::new(),
            #[cfg(feature = "etcd")]
            Backend::Etcd(_) => axum::Router::new(),
            Backend::Raft(raft) => raft::routes(Arc::clone(raft)),
        }
    }

    /// Carries out a transaction; it is durable when this returns.
    ///
    /// # Errors
    /// After [`StoreError::Unknown`] it may or may not have been carried out.
    pub async fn txn(&self, txn: Txn) -> Result<TxnOutcome, StoreError> {
        match self.command(Command::Txn(txn)).await? {
            Outcome::Committed { revision } => Ok(TxnOutcome::Committed { revision }),
            Outcome::Conflict { current, .. } => Ok(TxnOutcome::Conflict { current }),
            Outcome::Invalid { reason } => Err(StoreError::Invalid(reason)),
        }
    }

    /// Forgets history before `revision`.
    pub async fn compact(&self, revision: u64) -> Result<(), StoreError> {
        match self.command(Command::Compact { revision }).await? {
            Outcome::Committed { .. } | Outcome::Conflict { .. } => Ok(()),
            Outcome::Invalid { reason } => Err(StoreError::Invalid(reason)),
        }
    }

    async fn command(&self, command: Command) -> Result<Outcome, StoreError> {
        if self.shared.is_closed() {
            return Err(StoreError::Closed);
        }
        match &self.backend {
            Backend::Memory(memory) => Ok(self.shared.change(|state| {
                let meta = Meta {
                    index: memory.index.fetch_add(1, Ordering::Relaxed) + 1,
                    time_ms: now_ms(),
                };
                state.apply(meta, &command)
            })),
            #[cfg(feature = "etcd")]
            Backend::Etcd(etcd) => etcd.command(command).await,
            Backend::Raft(raft) => raft.command(command).await,
        }
    }

    /// What `key` holds. Linearizable: sees every write that was acknowledged before the call.
    pub async fn get(&self, key: &str) -> Result<Option<Entry>, StoreError> {
        self.barrier().await?;
        Ok(self.shared.read().get(key))
    }

    /// What `key` holds as this node has it now, which may be a little behind.
    pub fn get_local(&self, key: &str) -> Option<Entry> {
        self.shared.read().get(key)
    }

    /// A range. Linearizable, or as of `query.revision`.
    pub async fn list(&self, query: &ListQuery) -> Result<Listing, StoreError> {
        self.barrier().await?;
        self.list_local(query)
    }

    /// A range as this node has it now, which may be a little behind.
    pub fn list_local(&self, query: &ListQuery) -> Result<Listing, StoreError> {
        Ok(self.shared.read().list(query)?)
    }

    /// Follows the changes after `revision` of keys that begin with `prefix`.
    pub fn watch(&self, prefix: &str, revision: u64) -> Watch {
        self.shared.watch(prefix, revision)
    }

    /// The newest revision of all; linearizable.
    pub async fn current_revision(&self) -> Result<u64, StoreError> {
        self.barrier().await?;
        Ok(self.revision())
    }

    /// The newest revision that this node has.
    pub fn revision(&self) -> u64 {
        self.shared.read().revision()
    }

    /// Waits until this node has everything that was acknowledged before the call.
    async fn barrier(&self) -> Result<(), StoreError> {
        if self.shared.is_closed() {
            return Err(StoreError::Closed);
        }
        match &self.backend {
            Backend::Memory(_) => Ok(()),
            #[cfg(feature = "etcd")]
            Backend::Etcd(etcd) => etcd.barrier().await,
            Backend::Raft(raft) => raft.barrier().await,
        }
    }

    /// Whether this node leads now.
    pub fn is_leader(&self) -> bool {
        self.leadership().borrow().is_leader
    }

    /// What this node's disk lacks for taking on more, and what comes of it; `None` where there is
    /// room, or where the store is not on this node's disk.
    pub fn is_full(&self) -> Option<String> {
        match &self.backend {
            Backend::Memory(_) => None,
            #[cfg(feature = "etcd")]
            Backend::Etcd(_) => None,
            Backend::Raft(raft) => raft.is_full(),
        }
    }

    /// Follows who leads.
    pub fn leadership(&self) -> watch::Receiver<Leadership> {
        match &self.backend {
            Backend::Memory(memory) => memory.leadership.subscribe(),
            #[cfg(feature = "etcd")]
            Backend::Etcd(etcd) => etcd.leadership(),
            Backend::Raft(raft) => raft.leadership(),
        }
    }

    /// Follows whether this node leads: what only one node may do runs while this is true.
    pub fn leads(&self) -> watch::Receiver<bool> {
        match &self.backend {
            Backend::Memory(memory) => memory.leads.subscribe(),
            #[cfg(feature = "etcd")]
            Backend::Etcd(etcd) => etcd.leads(),
            Backend::Raft(raft) => raft.leads(),
        }
    }

    /// Ends watches, refuses further calls, and waits until everything is on disk.
    pub async fn shutdown(&self) {
        self.shared.close();
        match &self.backend {
            Backend::Memory(_) => {}
            #[cfg(feature = "etcd")]
            Backend::Etcd(etcd) => etcd.shutdown(),
            Backend::Raft(raft) => raft.shutdown().await,
        }
    }

    #[cfg(test)]
    pub(crate) fn raft_backend(&self) -> Option<&RaftBackend> {
        match &self.backend {
            Backend::Memory(_) => None,
            #[cfg(feature = "etcd")]
            Backend::Etcd(_) => None,
            Backend::Raft(raft) => Some(raft),
        }
    }

    pub(crate) fn sizes(&self) -> Sizes {
        let state = self.shared.read();
        Sizes {
            revision: state.revision(),
            compacted: state.compacted(),
            objects: state.len(),
            bytes: state.live_bytes(),
            history: state.history_events(),
        }
    }

    pub(crate) fn raft_position(&self) -> RaftPosition {
        match &self.backend {
            Backend::Memory(memory) => {
                let index = memory.index.load(Ordering::Relaxed);
                RaftPosition {
                    has_leader: true,
                    log_index: index,
                    applied_index: index,
                    ..RaftPosition::default()
                }
            }
            #[cfg(feature = "etcd")]
            Backend::Etcd(etcd) => RaftPosition {
                has_leader: etcd.leadership().borrow().leader.is_some(),
                ..RaftPosition::default()
            },
            Backend::Raft(raft) => raft.position(),
        }
    }
}

/// The proposer's clock: goes into the log entry, and from there to every replica.
pub(crate) fn now_ms() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |d| u64::try_from(d.as_millis()).unwrap_or(u64::MAX))
}
