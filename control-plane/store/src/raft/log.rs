//! Raft's log: on disk, with its tail in memory for the entries that are about to be applied.
//!
//! One thread writes, in the order of the calls; appends that wait for it share a transaction.
//!
//! A leader sends its entries to the followers while it writes them itself: an append of its own
//! proposals is reported as done at once. openraft then counts this node among those that have the
//! entry, so an entry may be committed that is not on this disk yet. Nobody gets to know of that:
//! [`Flushing`] holds back the state machine here, and what followers are told of commits, until the
//! entry is flushed. And since another entry could take its place when this node is killed before,
//! a leader that starts again stands for election anew, in a new term, instead of going on in the
//! old one. Changes of membership, which count from the moment they are committed, are waited for.

use std::{
    collections::{BTreeMap, Bound},
    fmt::Debug,
    io,
    ops::{RangeBounds, RangeInclusive},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
        mpsc::{self, RecvTimeoutError},
    },
    time::{Duration, Instant},
};

use openraft::{
    AnyError, Entry, EntryPayload, LogId, LogState, OptionalSend, RaftLogReader, StorageError,
    StorageIOError, Vote,
    storage::{LogFlushed, RaftLogStorage},
};
use tokio::sync::{Notify, oneshot};

use super::{
    TypeConfig, call::chain, disk::Disk, error::DiskError, flushing::Flushing, node::Proposals,
};
use crate::command::Command;

/// Entries kept in memory, and their bytes; an entry is read back right after it is written.
const TAIL_ENTRIES: usize = 256;
const TAIL_BYTES: usize = 16 << 20;
/// Appends of so many entries share a transaction.
const SHARED_ENTRIES: usize = 1024;
/// A commit is noted with the next entries, or after this time.
const NOTE_AFTER: Duration = Duration::from_millis(50);
const NOTE_AT_LEAST: Duration = Duration::from_secs(2);
/// The log is cut by a snapshot after so many bytes, however few its entries.
const SNAPSHOT_BYTES: u64 = 64 << 20;

/// Handles share the log.
#[derive(Clone)]
pub(super) struct LogStore {
    disk: Arc<Disk>,
    tail: Arc<Mutex<Tail>>,
    jobs: mpsc::Sender<Job>,
    flushing: Flushing,
    proposals: Proposals,
    growth: Arc<Growth>,
}

/// What the writing thread does.
enum Job {
    Append {
        entries: Vec<Entry<TypeConfig>>,
        /// `None` when it was reported as done before.
        done: Option<LogFlushed<TypeConfig>>,
    },
    Run(DiskWork, oneshot::Sender<Outcome>),
}

type DiskWork = Box<dyn FnOnce(&Disk) -> Result<(), DiskError> + Send>;
type Outcome = Result<(), DiskError>;

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
    bytes: usize,
    last: Option<LogId<u64>>,
    purged: Option<LogId<u64>>,
    vote: Option<Vote<u64>>,
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
        // The vote for itself is no office: see above.
        let vote = disk.vote()?.map(|vote| {
            let Vote { leader_id, .. } = vote;
            let own = leader_id.node_id == disk.own_id();
            if own { Vote::new(leader_id.term, leader_id.node_id) } else { vote }
        });
        let growth = Arc::default();
        let flushing = Flushing::new(last);
        let (jobs, queue) = mpsc::channel();
        let writing = Writing {
            disk: Arc::clone(&disk),
            growth: Arc::clone(&growth),
            flushing: flushing.clone(),
        };
        std::thread::Builder::new()
            .name("store-log".to_owned())
            .spawn(move || writing.run(&queue))
            .map_err(|source| disk.no_thread(source))?;
        Ok(Self {
            tail: Arc::new(Mutex::new(Tail { last, purged, vote, ..Tail::default() })),
            disk,
            jobs,
            flushing,
            proposals: Proposals::default(),
            growth,
        })
    }

    pub(super) fn flushing(&self) -> Flushing {
        self.flushing.clone()
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

    /// Has the thread do something after all that it was given before.
    async fn blocking(
        &self,
        run: impl FnOnce(&Disk) -> Result<(), DiskError> + Send + 'static,
    ) -> Result<(), AnyError> {
        let (done, outcome) = oneshot::channel();
        self.send(Job::Run(Box::new(run), done))?;
        match outcome.await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => Err(AnyError::new(&error)),
            Err(error) => Err(AnyError::new(&error)),
        }
    }

    fn send(&self, job: Job) -> Result<(), AnyError> {
        self.jobs.send(job).map_err(|_| AnyError::error("the thread that writes the log is gone"))
    }

    /// Whether these are this leader's own proposals, and nothing but commands.
    fn are_own(&self, entries: &[Entry<TypeConfig>]) -> bool {
        let own = self.disk.own_id();
        let Some(vote) = self.with_tail(|tail| tail.vote) else { return false };
        vote.leader_id.node_id == own
            && entries.iter().all(|entry| {
                let LogId { leader_id, .. } = entry.log_id;
                leader_id.node_id == own
                    && leader_id.term == vote.leader_id.term
                    && matches!(entry.payload, EntryPayload::Normal(_))
            })
    }
}

/// The thread that writes.
struct Writing {
    disk: Arc<Disk>,
    growth: Arc<Growth>,
    flushing: Flushing,
}

impl Writing {
    /// Ends with the last handle of the log.
    fn run(&self, queue: &mpsc::Receiver<Job>) {
        let mut next = self.next(queue);
        while let Some(job) = next.take() {
            match job {
                // After a hole in the log nothing more is promised: whoever waits sees `done` go.
                Job::Run(..) if self.flushing.failure().is_some() => {}
                Job::Run(run, done) => {
                    // Who asked may be gone.
                    let _ = done.send(run(&self.disk));
                }
                Job::Append { entries, done } => {
                    let mut entries = entries;
                    let mut waiting: Vec<_> = done.into_iter().collect();
                    while entries.len() < SHARED_ENTRIES {
                        match queue.try_recv() {
                            Ok(Job::Append { entries: more, done }) => {
                                entries.extend(more);
                                waiting.extend(done);
                            }
                            Ok(other) => {
                                next = Some(other);
                                break;
                            }
                            Err(_) => break,
                        }
                    }
                    self.append(&entries, waiting);
                }
            }
            if next.is_none() {
                next = self.next(queue);
            }
        }
    }

    /// Waits for the next job. Commits that came after the last one are noted meanwhile; without a
    /// majority they may be long in coming.
    fn next(&self, queue: &mpsc::Receiver<Job>) -> Option<Job> {
        let mut wait = NOTE_AFTER;
        while self.flushing.failure().is_none() && self.disk.awaits_commits() {
            match queue.recv_timeout(wait) {
                Ok(job) => return Some(job),
                Err(RecvTimeoutError::Timeout) => self.disk.note_commits(),
                Err(RecvTimeoutError::Disconnected) => return None,
            }
            wait = NOTE_AT_LEAST.min(wait * 2);
        }
        queue.recv().ok()
    }

    fn append(&self, entries: &[Entry<TypeConfig>], waiting: Vec<LogFlushed<TypeConfig>>) {
        let result = match self.flushing.failure() {
            // What comes after a hole in the log must not be there.
            Some(failed) => Err(failed),
            None => self.disk.append(entries).map_err(|error| chain(&error)),
        };
        match result {
            Ok(bytes) => {
                self.growth.add(bytes);
                self.flushing.flushed(entries.last().map(|entry| entry.log_id), Instant::now());
                waiting.into_iter().for_each(|done| done.log_io_completed(Ok(())));
            }
            Err(failed) => {
                for done in waiting {
                    done.log_io_completed(Err(io::Error::other(failed.clone())));
                }
                self.flushing.failed(failed);
            }
        }
    }
}

impl Tail {
    /// What of a range is here, and where the rest of it ends: that lies before, and on disk.
    fn get(&self, range: &RangeInclusive<u64>) -> (Option<u64>, Vec<Entry<TypeConfig>>) {
        let found = self.entries.range(range.clone()).map(|(_, entry)| entry.clone()).collect();
        let rest = match self.entries.first_key_value() {
            Some((first, _)) if first <= range.start() => None,
            Some((first, _)) => Some((*range.end()).min(first - 1)),
            None => Some(*range.end()),
        };
        (rest, found)
    }

    /// What is not on disk yet stays here, whatever its number.
    fn push(&mut self, entry: Entry<TypeConfig>, flushing: &Flushing) {
        self.last = Some(entry.log_id);
        self.bytes += size(&entry);
        self.entries.insert(entry.log_id.index, entry);
        while (self.entries.len() > TAIL_ENTRIES || self.bytes > TAIL_BYTES)
            && let Some(first) = self.entries.first_entry()
            && flushing.is_flushed(*first.key())
        {
            self.bytes -= size(&first.remove());
        }
    }

    /// Keeps only the entries of a range.
    fn keep(&mut self, range: impl RangeBounds<u64>) {
        self.entries.retain(|index, _| range.contains(index));
        self.bytes = self.entries.values().map(size).sum();
    }
}

/// Bytes of what an entry carries.
fn size(entry: &Entry<TypeConfig>) -> usize {
    match &entry.payload {
        EntryPayload::Normal(request) => request.commands.iter().map(Command::size).sum(),
        EntryPayload::Blank | EntryPayload::Membership(_) => 0,
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
        let (rest, found) = self.with_tail(|tail| tail.get(&range));
        let Some(end) = rest else {
            return Ok(found);
        };
        let before = self.disk.entries(*range.start()..=end);
        let mut entries = before.map_err(fault(StorageIOError::read_logs))?;
        entries.extend(found);
        Ok(entries)
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
            .map_err(StorageIOError::write_vote)?;
        self.with_tail(|tail| tail.vote = Some(vote));
        Ok(())
    }

    async fn read_vote(&mut self) -> Result<Option<Vote<u64>>> {
        Ok(self.with_tail(|tail| tail.vote))
    }

    /// Not waited for: entries are committed whether that is noted or not.
    async fn save_committed(&mut self, committed: Option<LogId<u64>>) -> Result<()> {
        if let Some(committed) = committed {
            self.disk.is_committed(committed.index);
        }
        Ok(())
    }

    async fn read_committed(&mut self) -> Result<Option<LogId<u64>>> {
        self.blocking(|_| Ok(())).await.map_err(StorageIOError::read_logs)?;
        self.disk.committed().map_err(fault(StorageIOError::read_logs))
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
        if let Some(failed) = self.flushing.failure() {
            return Err(StorageIOError::write_logs(AnyError::error(failed)).into());
        }
        let now = Instant::now();
        let own = self.are_own(&entries) && !self.flushing.is_overdue(now);
        let last = entries.last().map_or(0, |entry| entry.log_id.index);
        self.with_tail(|tail| {
            for entry in &entries {
                tail.push(entry.clone(), &self.flushing);
            }
        });
        let (early, done) = if own { (Some(callback), None) } else { (None, Some(callback)) };
        if early.is_some() {
            self.flushing.reported(last, now);
        }
        self.send(Job::Append { entries, done }).map_err(StorageIOError::write_logs)?;
        if let Some(callback) = early {
            callback.log_io_completed(Ok(()));
        }
        Ok(())
    }

    async fn truncate(&mut self, log_id: LogId<u64>) -> Result<()> {
        self.blocking(move |disk| disk.truncate(log_id.index))
            .await
            .map_err(StorageIOError::write_logs)?;
        let last = self.disk.last().map_err(fault(StorageIOError::read_logs))?;
        self.with_tail(|tail| {
            tail.keep(..log_id.index);
            tail.last = last.map(|entry| entry.log_id).or(tail.purged);
            let last = tail.last;
            self.flushing.cut(log_id.index, last);
        });
        Ok(())
    }

    async fn purge(&mut self, log_id: LogId<u64>) -> Result<()> {
        self.blocking(move |disk| disk.purge(&log_id)).await.map_err(StorageIOError::write_logs)?;
        self.with_tail(|tail| {
            tail.keep(log_id.index + 1..);
            tail.purged = Some(log_id);
            tail.last = tail.last.max(Some(log_id));
        });
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use openraft::CommittedLeaderId;

    use super::*;
    use crate::{Txn, raft::Request};

    fn id(index: u64) -> LogId<u64> {
        LogId::new(CommittedLeaderId::new(1, 1), index)
    }

    #[test]
    fn what_is_on_disk_leaves_memory_when_it_is_much() {
        let put = |index: u64, bytes: usize| {
            let commands = [Command::Txn(Txn::create("", "x".repeat(bytes)))].into();
            let request = Request { time_ms: 0, commands, mark: 0 };
            Entry { log_id: id(index), payload: EntryPayload::Normal(request) }
        };
        let (mut tail, flushing) = (Tail::default(), Flushing::new(Some(id(3))));
        for index in 1..=5 {
            tail.push(put(index, TAIL_BYTES / 3), &flushing);
        }
        let here = |tail: &Tail| tail.entries.keys().copied().collect::<Vec<_>>();
        assert_eq!(here(&tail), [3, 4, 5]);
        tail.push(put(6, TAIL_BYTES), &flushing);
        assert_eq!(here(&tail), [4, 5, 6], "the others are not on disk yet");
        tail.keep(..6);
        tail.keep(5..);
        assert_eq!((here(&tail), tail.bytes), (vec![5], TAIL_BYTES / 3));
    }

    #[test]
    fn a_range_that_begins_on_disk_ends_with_what_is_here() {
        let mut tail = Tail::default();
        for index in 5..=8 {
            let log_id = LogId::new(CommittedLeaderId::new(1, 1), index);
            tail.entries.insert(index, Entry { log_id, payload: EntryPayload::Blank });
        }
        for (range, rest, here) in [
            (5..=6, None, vec![5, 6]),
            (8..=20, None, vec![8]),
            (3..=6, Some(4), vec![5, 6]),
            (1..=2, Some(2), vec![]),
        ] {
            let (found_rest, found) = tail.get(&range);
            let found: Vec<_> = found.iter().map(|entry| entry.log_id.index).collect();
            assert_eq!((found_rest, found), (rest, here), "{range:?}");
        }
        assert_eq!(Tail::default().get(&(3..=4)).0, Some(4), "all of it is on disk");
    }
}
