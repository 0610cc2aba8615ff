//! A multi-version key-value store with one global revision, compare-and-set transactions, lists
//! at a revision and watches: etcd's model.
//!
//! Owns: replicated state and its durability. Never: the meaning of keys or values.

mod command;
mod metrics;
mod raft;
mod shared;
mod state;
mod store;

pub use command::{Command, Compare, Entry, Meta, Op, Outcome, Txn};
pub use raft::{DiskError, OpenError, RaftConfig};
pub use shared::Watch;
pub use state::{Batch, Event, HistoryLimits, ListQuery, Listing, ReadError, State};
pub use store::{Leadership, Store, StoreError, TxnOutcome};
