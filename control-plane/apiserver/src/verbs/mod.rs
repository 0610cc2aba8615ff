//! One file per family of verbs.

mod admission;
mod delete;
mod patch;
mod read;
pub(crate) mod scale;
mod strategic;
mod watch;
mod write;

pub(crate) use admission::fill_type;
pub(crate) use delete::{
    AT_ONCE, FOREGROUND, ORPHAN, Preconditions, Propagation, Removed, delete, delete_collection,
    remove, remove_together,
};
pub(crate) use read::{get, list};
pub(crate) use watch::watch;
pub(crate) use write::{create, patch, update};
