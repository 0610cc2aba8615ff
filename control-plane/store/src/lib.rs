//! A multi-version key-value store with one global revision, compare-and-set transactions, lists
//! at a revision and watches: etcd's model.
//!
//! Owns: replicated state and its durability. Never: the meaning of keys or values.

mod command;
#[cfg(feature = "etcd")]
mod etcd;
mod metrics;
mod raft;
mod shared;
mod state;
mod store;

pub use command::{Command, Compare, Entry, Meta, Op, Outcome, Txn};
#[cfg(feature = "etcd")]
pub use etcd::{EtcdConfig, EtcdError, EtcdTls};
pub use raft::{Begin, DiskError, Member, OpenError, Peering, RaftConfig, node_id};
pub use shared::Watch;
pub use state::{Batch, Event, HistoryLimits, ListQuery, Listing, ReadError, State};
pub use store::{Leadership, Store, StoreError, TxnOutcome};

/// What the nodes of a store serve to each other: mount it at the address that other nodes know,
/// for callers that have proved to be nodes of this cluster, and for nobody else. Empty for stores
/// that are not replicated.
pub fn raft_routes(store: &Store) -> axum::Router {
    store.routes()
}
