//! The replicated state: a multi-version key-value map with one global revision.
//!
//! Owns: versions, history, compaction, reads at a revision. Never: IO, clocks, locks.
//!
//! # Guarantees
//! `apply` is total and deterministic: the same commands with the same metas give the same state
//! and the same outcomes everywhere. Each transaction that changes something gets the next
//! revision; one that changes nothing gets none. What happened after the compacted revision is
//! complete: every event with the value before it.

use std::{
    collections::{BTreeMap, VecDeque},
    ops::Bound,
    sync::Arc,
};

use serde::{Deserialize, Serialize};

use crate::command::{Command, Compare, Entry, Meta, Op, Outcome, Txn};

/// How much history is kept for watches and reads of the past. The same on every replica, since
/// compaction is part of `apply`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HistoryLimits {
    pub events: usize,
    /// Of keys and values.
    pub bytes: usize,
}

impl HistoryLimits {
    /// A watcher that reconnects after two minutes finds its place among 1,000 nodes that each
    /// report every two seconds.
    pub const DEFAULT: Self = Self { events: 65_536, bytes: 64 << 20 };
}

/// Why a read can't be answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ReadError {
    #[error("revision {requested} is compacted; history begins after {compacted}")]
    Compacted { requested: u64, compacted: u64 },
    #[error("revision {requested} is not reached yet; the current one is {current}")]
    Future { requested: u64, current: u64 },
}

/// Keys to list.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ListQuery {
    /// Only keys that begin so.
    pub prefix: String,
    /// Only keys greater than this one.
    pub after: Option<String>,
    /// At most so many entries; 0 is no limit.
    pub limit: usize,
    /// The state as of this revision; the current one when absent.
    pub revision: Option<u64>,
}

/// Entries in the order of their keys.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listing {
    /// The revision that this shows.
    pub revision: u64,
    pub entries: Vec<Entry>,
    /// The limit cut off further entries.
    pub more: bool,
}

/// One change of one key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    pub revision: u64,
    pub key: Arc<str>,
    /// What the key held before.
    pub previous: Option<Entry>,
    /// What it holds now; `None` is a deletion.
    pub current: Option<Entry>,
}

/// Events in order; all of one revision are in one batch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Batch {
    pub events: Vec<Event>,
    /// Everything up to here has been seen.
    pub revision: u64,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Version {
    revision: u64,
    created: u64,
    /// `None` marks a deletion.
    value: Option<Arc<str>>,
}

impl Version {
    fn entry(&self, key: &Arc<str>) -> Option<Entry> {
        self.value.as_ref().map(|value| Entry {
            key: Arc::clone(key),
            value: Arc::clone(value),
            create_revision: self.created,
            mod_revision: self.revision,
        })
    }
}

/// The state's whole content, as snapshots keep it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct StateImage {
    revision: u64,
    compacted: u64,
    time_ms: u64,
    keys: Vec<(Arc<str>, Vec<Version>)>,
}

/// See the module's documentation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct State {
    limits: HistoryLimits,
    revision: u64,
    compacted: u64,
    time_ms: u64,
    /// Versions of each key, oldest first: the newest one at or before `compacted` (if it isn't a
    /// deletion) and all after.
    keys: BTreeMap<Arc<str>, Vec<Version>>,
    /// Every change after `compacted`, in order.
    history: VecDeque<(u64, Arc<str>)>,
    history_bytes: usize,
    live: usize,
    live_bytes: usize,
}

impl Default for State {
    fn default() -> Self {
        Self::new(HistoryLimits::DEFAULT)
    }
}

impl State {
    pub fn new(limits: HistoryLimits) -> Self {
        Self {
            limits,
            revision: 0,
            compacted: 0,
            time_ms: 0,
            keys: BTreeMap::new(),
            history: VecDeque::new(),
            history_bytes: 0,
            live: 0,
            live_bytes: 0,
        }
    }

    /// Of the last change; 0 before the first.
    pub fn revision(&self) -> u64 {
        self.revision
    }

    /// History up to and including this revision is forgotten.
    pub fn compacted(&self) -> u64 {
        self.compacted
    }

    /// Time of the latest command, never going back.
    pub fn time_ms(&self) -> u64 {
        self.time_ms
    }

    /// Number of keys that exist now.
    pub fn len(&self) -> usize {
        self.live
    }

    pub fn is_empty(&self) -> bool {
        self.live == 0
    }

    /// Bytes of the keys and values that exist now.
    pub fn live_bytes(&self) -> usize {
        self.live_bytes
    }

    /// Events kept for watches.
    pub fn history_events(&self) -> usize {
        self.history.len()
    }

    /// Carries out one command.
    pub fn apply(&mut self, meta: Meta, command: &Command) -> Outcome {
        self.time_ms = self.time_ms.max(meta.time_ms);
        match command {
            Command::Txn(txn) => self.apply_txn(txn),
            Command::Compact { revision } => {
                if *revision > self.revision {
                    return Outcome::Invalid {
                        reason: format!(
                            "can't compact at {revision}: the current revision is {}",
                            self.revision
                        ),
                    };
                }
                self.compact(*revision);
                Outcome::Committed { revision: self.revision }
            }
        }
    }

    fn apply_txn(&mut self, txn: &Txn) -> Outcome {
        if let Some(reason) = txn.flaw() {
            return Outcome::Invalid { reason };
        }
        let holds = |compare: &Compare| {
            let current = self.get(&compare.key).map_or(0, |e| e.mod_revision);
            current == compare.mod_revision
        };
        if !txn.compare.iter().all(holds) {
            return Outcome::Conflict {
                revision: self.revision,
                current: txn.compare.iter().map(|c| self.get(&c.key)).collect(),
            };
        }
        let revision = self.revision + 1;
        let mut changed = false;
        for op in &txn.ops {
            changed |= match op {
                Op::Put { key, value } => self.push(key, revision, Some(value)),
                Op::Delete { key } => self.push(key, revision, None),
            };
        }
        if changed {
            self.revision = revision;
            self.trim();
        }
        Outcome::Committed { revision: self.revision }
    }

    /// Adds a version; `false` if that changes nothing.
    fn push(&mut self, key: &Arc<str>, revision: u64, value: Option<&Arc<str>>) -> bool {
        let previous = self.keys.get(key).and_then(|versions| versions.last());
        let existed = previous.filter(|v| v.value.is_some());
        let created = existed.map_or(revision, |v| v.created);
        let old_bytes = existed.map(|v| size(key, v.value.as_ref()));
        let new_bytes = size(key, value);
        match (old_bytes, value) {
            (None, None) => return false,
            (None, Some(_)) => {
                self.live += 1;
                self.live_bytes += new_bytes;
            }
            (Some(old), None) => {
                self.live -= 1;
                self.live_bytes -= old;
            }
            (Some(old), Some(_)) => self.live_bytes = self.live_bytes - old + new_bytes,
        }
        // One allocation of the key serves the map and the history.
        let key = match self.keys.get_key_value(key) {
            Some((key, _)) => Arc::clone(key),
            None => Arc::clone(key),
        };
        self.history.push_back((revision, Arc::clone(&key)));
        self.history_bytes += new_bytes;
        self.keys.entry(key).or_default().push(Version {
            revision,
            created,
            value: value.map(Arc::clone),
        });
        true
    }

    /// Keeps history within its limits, by whole revisions.
    fn trim(&mut self) {
        while self.history.len() > self.limits.events || self.history_bytes > self.limits.bytes {
            match self.history.front() {
                // The newest revision is kept whatever its size.
                Some((oldest, _)) if *oldest < self.revision => self.compact(*oldest),
                _ => return,
            }
        }
    }

    fn compact(&mut self, revision: u64) {
        while let Some((changed, _)) = self.history.front()
            && *changed <= revision
        {
            let Some((changed, key)) = self.history.pop_front() else {
                return;
            };
            let Some(versions) = self.keys.get_mut(&key) else {
                continue;
            };
            if let Some(at) = versions.iter().position(|v| v.revision == changed) {
                self.history_bytes -= size(&key, versions[at].value.as_ref());
                // Its predecessors can't be asked for any more; nor can a deletion itself.
                let keep_from = if versions[at].value.is_some() { at } else { at + 1 };
                versions.drain(..keep_from);
            }
            if versions.is_empty() {
                self.keys.remove(&key);
            }
        }
        self.compacted = self.compacted.max(revision);
    }

    /// The current entry of a key.
    pub fn get(&self, key: &str) -> Option<Entry> {
        let (key, versions) = self.keys.get_key_value(key)?;
        versions.last()?.entry(key)
    }

    /// Entries of a range, now or at a past revision.
    pub fn list(&self, query: &ListQuery) -> Result<Listing, ReadError> {
        let revision = query.revision.unwrap_or(self.revision);
        self.check_readable(revision)?;
        let start = match &query.after {
            Some(after) if after.as_str() >= query.prefix.as_str() => {
                Bound::Excluded(after.as_str())
            }
            _ => Bound::Included(query.prefix.as_str()),
        };
        let mut entries = Vec::new();
        let mut more = false;
        let range = self
            .keys
            .range::<str, _>((start, Bound::Unbounded))
            .take_while(|(key, _)| key.starts_with(&query.prefix));
        for (key, versions) in range {
            let version = versions.iter().rfind(|v| v.revision <= revision);
            let Some(entry) = version.and_then(|v| v.entry(key)) else {
                continue;
            };
            if query.limit > 0 && entries.len() == query.limit {
                more = true;
                break;
            }
            entries.push(entry);
        }
        Ok(Listing { revision, entries, more })
    }

    fn check_readable(&self, revision: u64) -> Result<(), ReadError> {
        if revision > self.revision {
            return Err(ReadError::Future { requested: revision, current: self.revision });
        }
        if revision < self.compacted {
            return Err(ReadError::Compacted { requested: revision, compacted: self.compacted });
        }
        Ok(())
    }

    /// Events after `revision` on keys that begin with `prefix`: about `limit` of them, more only
    /// where one revision has more. A revision in the future has no events yet.
    pub fn events_after(
        &self,
        prefix: &str,
        revision: u64,
        limit: usize,
    ) -> Result<Batch, ReadError> {
        if revision < self.compacted {
            return Err(ReadError::Compacted { requested: revision, compacted: self.compacted });
        }
        let mut events: Vec<Event> = Vec::new();
        let start = self.history.partition_point(|(at, _)| *at <= revision);
        for (at, key) in self.history.range(start..) {
            if events.len() >= limit && events.last().is_some_and(|e| e.revision < *at) {
                return Ok(Batch { events, revision: at - 1 });
            }
            if key.starts_with(prefix) {
                events.push(self.event(*at, key));
            }
        }
        Ok(Batch { events, revision: self.revision.max(revision) })
    }

    fn event(&self, revision: u64, key: &Arc<str>) -> Event {
        let versions = self.keys.get(key).map_or(&[][..], Vec::as_slice);
        let at = versions.partition_point(|v| v.revision < revision);
        Event {
            revision,
            key: Arc::clone(key),
            previous: at.checked_sub(1).and_then(|i| versions[i].entry(key)),
            current: versions.get(at).and_then(|v| v.entry(key)),
        }
    }

    /// A state that another system keeps, as of `revision`; history begins there.
    #[cfg(feature = "etcd")]
    pub(crate) fn copied(limits: HistoryLimits, revision: u64, entries: Vec<Entry>) -> Self {
        let keys = entries.into_iter().map(|entry| {
            let Entry { key, value, create_revision: created, mod_revision } = entry;
            (key, vec![Version { revision: mod_revision, created, value: Some(value) }])
        });
        let keys = keys.collect();
        Self::from_image(limits, StateImage { revision, compacted: revision, time_ms: 0, keys })
    }

    /// Takes over changes that another system made, in the order of their revisions, and that
    /// nothing else happened up to `seen`. What is known already is passed over.
    #[cfg(feature = "etcd")]
    pub(crate) fn follow(
        &mut self,
        changes: impl IntoIterator<Item = (u64, Arc<str>, Option<Arc<str>>)>,
        seen: u64,
    ) {
        let known = self.revision;
        for (revision, key, value) in changes {
            if revision > known {
                self.push(&key, revision, value.as_ref());
                self.revision = revision;
            }
        }
        self.revision = self.revision.max(seen);
        self.trim();
    }

    pub(crate) fn image(&self) -> StateImage {
        StateImage {
            revision: self.revision,
            compacted: self.compacted,
            time_ms: self.time_ms,
            keys: self
                .keys
                .iter()
                .map(|(key, versions)| (Arc::clone(key), versions.clone()))
                .collect(),
        }
    }

    pub(crate) fn from_image(limits: HistoryLimits, image: StateImage) -> Self {
        let mut state = Self::new(limits);
        state.revision = image.revision;
        state.compacted = image.compacted;
        state.time_ms = image.time_ms;
        let mut history = Vec::new();
        for (key, versions) in image.keys {
            for version in &versions {
                if version.revision > image.compacted {
                    history.push((version.revision, Arc::clone(&key)));
                    state.history_bytes += size(&key, version.value.as_ref());
                }
            }
            if let Some(Version { value: Some(value), .. }) = versions.last() {
                state.live += 1;
                state.live_bytes += size(&key, Some(value));
            }
            state.keys.insert(key, versions);
        }
        history.sort();
        state.history = history.into();
        state
    }
}

fn size(key: &str, value: Option<&Arc<str>>) -> usize {
    key.len() + value.map_or(0, |v| v.len())
}
