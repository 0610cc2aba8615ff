//! One file per family of verbs.

mod admission;
mod delete;
mod read;
mod watch;
mod write;

pub(crate) use delete::{Preconditions, delete, delete_collection, remove};
pub(crate) use read::{get, list};
pub(crate) use watch::watch;
pub(crate) use write::{create, patch, update};
