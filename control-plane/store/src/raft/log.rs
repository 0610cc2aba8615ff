//! Raft's log: on disk, with its tail in memory for the entries that are about to be applied.

use std::{
    collections::{BTreeMap, Bound},
    fmt::Debug,
    ops::{RangeBounds, RangeInclusive},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use openraft::{
    AnyError, Entry, EntryPayload, LogId, LogState, OptionalSend, RaftLogReader, StorageError,
    StorageIOError, Vote,
    storage::{LogFlushed, RaftLogStorage},
};
use tokio::sync::Notify;

use super::{
    TypeConfig,
    disk::{Disk, DiskError},
    node::Proposals,
};

/// Entries kept in memory; an entry is read back right after it is written.
const TAIL_ENTRIES: usize = 256;
/// The log is cut by a snapshot after so many bytes, however few its entries.
const SNAPSHOT_BYTES: u64 = 64 << 20;

/// Handles share the log.
#[derive(Clone)]
pub(super) struct LogStore {
    disk: Arc<Disk>,
    tail: Arc<Mutex<Tail>>,
    proposals: Proposals,
    growth: Arc<Growth>,
}

/// How much was appended since the last sign that it is enough.
#[derive(Default)]
pub(super) struct Growth {
    bytes: AtomicU64,
    enough: Notify,
}

impl Growth {
    fn add(&self, bytes: u64) {
        if self.bytes.fetch_add(bytes, Ordering::Relaxed) + bytes >= SNAPSHOT_BYTES {
            self.bytes.store(0, Ordering::Relaxed);
            self.enough.notify_one();
        }
    }

    pub(super) async fn reached_limit(&self) {
        self.enough.notified().await;
    }
}

#[derive(Default)]
struct Tail {
    entries: BTreeMap<u64, Entry<TypeConfig>>,
    last: Option<LogId<u64>>,
    purged: Option<LogId<u64>>,
}

type Result<T, E = StorageError<u64>> = std::result::Result<T, E>;

fn fault(
    make: impl FnOnce(AnyError) -> StorageIOError<u64>,
) -> impl FnOnce(DiskError) -> StorageError<u64> {
    |error| make(AnyError::new(&error)).into()
}

impl LogStore {
    pub(super) fn open(disk: Arc<Disk>) -> Result<Self, DiskError> {
        let purged = disk.purged()?;
        let last = disk.last()?.map(|entry| entry.log_id).or(purged);
        Ok(Self {
            tail: Arc::new(Mutex::new(Tail { entries: BTreeMap::new(), last, purged })),
            disk,
            proposals: Proposals::default(),
            growth: Arc::default(),
        })
    }

    pub(super) fn proposals(&self) -> Proposals {
        self.proposals.clone()
    }

    pub(super) fn growth(&self) -> Arc<Growth> {
        Arc::clone(&self.growth)
    }

    fn with_tail<T>(&self, run: impl FnOnce(&mut Tail) -> T) -> T {
        run(&mut self.tail.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Runs a write where it may block.
    async fn blocking(
        &self,
        run: impl FnOnce(&Disk) -> Result<(), DiskError> + Send + 'static,
    ) -> Result<(), AnyError> {
        let disk = Arc::clone(&self.disk);
        match tokio::task::spawn_blocking(move || run(&disk)).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => Err(AnyError::new(&error)),
            Err(error) => Err(AnyError::new(&error)),
        }
    }
}

impl Tail {
    /// The entries of a range, if all of it is here.
    fn get(&self, range: &RangeInclusive<u64>) -> Option<Vec<Entry<TypeConfig>>> {
        let (first, _) = self.entries.first_key_value()?;
        let found = || self.entries.range(range.clone()).map(|(_, e)| e.clone());
        (first <= range.start()).then(|| found().collect())
    }

    fn push(&mut self, entry: Entry<TypeConfig>) {
        self.last = Some(entry.log_id);
        self.entries.insert(entry.log_id.index, entry);
        while self.entries.len() > TAIL_ENTRIES {
            self.entries.pop_first();
        }
    }
}

/// `None` for an empty range.
fn inclusive(range: &impl RangeBounds<u64>) -> Option<RangeInclusive<u64>> {
    let start = match range.start_bound() {
        Bound::Included(start) => *start,
        Bound::Excluded(start) => start.checked_add(1)?,
        Bound::Unbounded => 0,
    };
    let end = match range.end_bound() {
        Bound::Included(end) => *end,
        Bound::Excluded(end) => end.checked_sub(1)?,
        Bound::Unbounded => u64::MAX,
    };
    (start <= end).then_some(start..=end)
}

impl RaftLogReader<TypeConfig> for LogStore {
    async fn try_get_log_entries<RB: RangeBounds<u64> + Clone + Debug + OptionalSend>(
        &mut self,
        range: RB,
    ) -> Result<Vec<Entry<TypeConfig>>> {
        let Some(range) = inclusive(&range) else {
            return Ok(Vec::new());
        };
        if let Some(entries) = self.with_tail(|tail| tail.get(&range)) {
            return Ok(entries);
        }
        self.disk.entries(range).map_err(fault(StorageIOError::read_logs))
    }
}

impl RaftLogStorage<TypeConfig> for LogStore {
    type LogReader = Self;

    async fn get_log_state(&mut self) -> Result<LogState<TypeConfig>> {
        Ok(self
            .with_tail(|tail| LogState { last_purged_log_id: tail.purged, last_log_id: tail.last }))
    }

    async fn get_log_reader(&mut self) -> Self {
        self.clone()
    }

    async fn save_vote(&mut self, vote: &Vote<u64>) -> Result<()> {
        let vote = *vote;
        self.blocking(move |disk| disk.save_vote(&vote))
            .await
            .map_err(|error| StorageIOError::write_vote(error).into())
    }

    async fn read_vote(&mut self) -> Result<Option<Vote<u64>>> {
        self.disk.vote().map_err(fault(StorageIOError::read_vote))
    }

    async fn append<I>(&mut self, entries: I, callback: LogFlushed<TypeConfig>) -> Result<()>
    where
        I: IntoIterator<Item = Entry<TypeConfig>> + OptionalSend,
        I::IntoIter: OptionalSend,
    {
        let entries: Vec<_> = entries.into_iter().collect();
        for entry in &entries {
            if let EntryPayload::Normal(request) = &entry.payload {
                self.proposals.reached_log(request.mark);
            }
        }
        let written = entries.clone();
        let growth = self.growth();
        let append = move |disk: &Disk| {
            growth.add(disk.append(&written)?);
            Ok(())
        };
        self.blocking(append).await.map_err(StorageIOError::write_logs)?;
        self.with_tail(|tail| {
            for entry in entries {
                tail.push(entry);
            }
        });
        callback.log_io_completed(Ok(()));
        Ok(())
    }

    async fn truncate(&mut self, log_id: LogId<u64>) -> Result<()> {
        self.blocking(move |disk| disk.truncate(log_id.index))
            .await
            .map_err(StorageIOError::write_logs)?;
        let last = self.disk.last().map_err(fault(StorageIOError::read_logs))?;
        self.with_tail(|tail| {
            tail.entries.split_off(&log_id.index);
            tail.last = last.map(|entry| entry.log_id).or(tail.purged);
        });
        Ok(())
    }

    async fn purge(&mut self, log_id: LogId<u64>) -> Result<()> {
        self.blocking(move |disk| disk.purge(&log_id)).await.map_err(StorageIOError::write_logs)?;
        self.with_tail(|tail| {
            tail.entries = tail.entries.split_off(&(log_id.index + 1));
            tail.purged = Some(log_id);
            tail.last = tail.last.max(Some(log_id));
        });
        Ok(())
    }
}
