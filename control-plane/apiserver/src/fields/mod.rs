//! Which client is responsible for which field: `metadata.managedFields`.
//!
//! Owns: field sets, their bookkeeping on every write, and the merge of server-side apply with its
//! conflicts. Never: storage, requests.

mod managers;
mod set;
mod typed;

pub(crate) use managers::{Author, FieldConflict, apply, created, updated};
pub(crate) use typed::duplicates;
