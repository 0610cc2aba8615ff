//! The file that holds log, vote and snapshot: one redb database.
//!
//! # Guarantees
//! Every write is on disk (fsync) when it returns. A file of another format, of another node, or
//! with damaged pages is refused with an error that names it; nothing is skipped or cut. A last
//! commit that is gone is refused too, if it was complete once: see [`mark`](super::mark).
//!
//! # Format 1
//! Table `meta`: text to JSON: `format`, `node_id`, `vote`, `purged`, `snapshot` (its metadata).
//! Table `log`: index to JSON of one entry. Table `snapshot`: part number to bytes.

use std::{
    ops::RangeInclusive,
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError, RwLock},
};

use openraft::{Entry, LogId, SnapshotMeta, Vote};
use redb::{
    Database, Durability, ReadableDatabase as _, ReadableTable as _, TableDefinition,
    WriteTransaction,
};
use serde::{Serialize, de::DeserializeOwned};

use super::{
    MemberNode, TypeConfig,
    commits::Commits,
    error::DiskError,
    file::PreparedFile,
    mark::{Mark, MarkFile},
};

const FILE: &str = "store.redb";
pub(super) const FORMAT: u32 = 1;
const META: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("meta");
const LOG: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("log");
const SNAPSHOT: TableDefinition<'_, u32, &[u8]> = TableDefinition::new("snapshot");
/// The working set is the tail of the log; the state itself is in memory.
const CACHE_BYTES: usize = 32 << 20;
/// Snapshots are stored in parts of this size.
const PART_BYTES: usize = 1 << 20;

/// Below so much free space nothing new is taken on: the log grows by 64 MiB before a snapshot cuts
/// it, and that is written beside the one before. Votes and the like still find room then.
const RESERVE_BYTES: u64 = 128 << 20;

pub(super) type Meta = SnapshotMeta<u64, MemberNode>;

pub(super) struct Disk {
    path: PathBuf,
    /// 0 before the format is checked.
    node_id: u64,
    /// `None` once closed.
    database: RwLock<Option<Database>>,
    pub(super) mark: Mutex<MarkFile>,
    pub(super) commits: Commits,
}

impl Disk {
    /// Opens the file of `dir`, or makes it.
    pub(super) fn open(dir: &Path, node_id: u64) -> Result<Self, DiskError> {
        std::fs::create_dir_all(dir)
            .map_err(|source| DiskError::Folder { path: dir.to_owned(), source })?;
        let disk = Self { node_id, ..Self::open_file(dir)? };
        disk.check_format(node_id)?;
        disk.check_mark()?;
        Ok(disk)
    }

    fn open_file(dir: &Path) -> Result<Self, DiskError> {
        let path = dir.join(FILE);
        let database = PreparedFile::open(&path)
            .and_then(|file| {
                Database::builder()
                    .set_cache_size(CACHE_BYTES)
                    // Reads the whole file once: it holds no more than a snapshot and the log
                    // behind it.
                    .set_check_integrity_on_open(true)
                    .create_with_backend(file)
            })
            .map_err(|error| DiskError::of_open(&path, error))?;
        let mark = MarkFile::open(dir).map_err(|source| {
            let path = dir.join("store.mark");
            DiskError::Mark { path, source }
        })?;
        Ok(Self {
            path,
            node_id: 0,
            database: RwLock::new(Some(database)),
            mark: Mutex::new(mark),
            commits: Commits::default(),
        })
    }

    /// The node to which the file of `dir` belongs, if there is one.
    pub(super) fn node_id(dir: &Path) -> Result<Option<u64>, DiskError> {
        if !dir.join(FILE).exists() {
            return Ok(None);
        }
        Self::open_file(dir)?.meta("node_id")
    }

    fn check_format(&self, node_id: u64) -> Result<(), DiskError> {
        let tables = self.read_tables()?;
        if tables == 0 {
            return self.write(|txn| {
                let mut meta = txn.open_table(META)?;
                meta.insert("format", json(&FORMAT).as_slice())?;
                meta.insert("node_id", json(&node_id).as_slice())?;
                txn.open_table(LOG)?;
                txn.open_table(SNAPSHOT)?;
                Ok(())
            });
        }
        match self.meta::<serde_json::Value>("format")? {
            Some(format) if format == FORMAT => {}
            found => {
                return Err(DiskError::Format {
                    path: self.path.clone(),
                    found: found.map_or("unknown".to_owned(), |f| f.to_string()),
                });
            }
        }
        match self.meta::<u64>("node_id")? {
            Some(found) if found == node_id => Ok(()),
            Some(found) => {
                Err(DiskError::OtherNode { path: self.path.clone(), found, expected: node_id })
            }
            None => Err(self.inconsistent("it names no node")),
        }
    }

    pub(super) fn own_id(&self) -> u64 {
        self.node_id
    }

    pub(super) fn no_thread(&self, source: std::io::Error) -> DiskError {
        DiskError::Thread { path: self.path.clone(), source }
    }

    /// Nothing that was complete is gone. From here on the mark says what is there.
    fn check_mark(&self) -> Result<(), DiskError> {
        let last = self.last()?.map(|entry| entry.log_id);
        let snapshot = self.meta::<Meta>("snapshot")?.and_then(|meta| meta.last_log_id);
        let found =
            Mark { vote: self.vote()?, last: last.max(self.purged()?), snapshot, committed: None };
        let mut file = self.mark.lock().unwrap_or_else(PoisonError::into_inner);
        let mark = file.mark();
        // A mark of before may name an entry that was not here yet.
        let committed = mark.committed.min(found.last.map(|last| last.index));
        let found = Mark { committed, ..found };
        let what = if found.vote < mark.vote {
            "a vote"
        } else if found.snapshot < mark.snapshot {
            "a snapshot"
        } else if found.last < mark.last {
            "the end of the log"
        } else {
            return Self::put_mark(&mut file, found);
        };
        let mark = file.path().to_owned();
        Err(DiskError::Lost { path: self.path.clone(), mark, what })
    }

    fn put_mark(file: &mut MarkFile, mark: Mark) -> Result<(), DiskError> {
        let path = file.path().to_owned();
        file.write(mark).map_err(|source| DiskError::Mark { path, source })
    }

    pub(super) fn set_mark(&self, change: impl FnOnce(&mut Mark)) -> Result<(), DiskError> {
        let mut file = self.mark.lock().unwrap_or_else(PoisonError::into_inner);
        let mut mark = file.mark().clone();
        change(&mut mark);
        self.commits.tell(&mut mark);
        Self::put_mark(&mut file, mark)
    }

    /// Before what it no longer promises goes: the loss of power may keep either alone.
    fn flush_mark(&self) -> Result<(), DiskError> {
        let file = self.mark.lock().unwrap_or_else(PoisonError::into_inner);
        file.flush().map_err(|source| DiskError::Mark { path: file.path().to_owned(), source })
    }

    /// The newest entry, or the last one that was purged.
    pub(super) fn newest(&self) -> Option<LogId<u64>> {
        self.mark.lock().unwrap_or_else(PoisonError::into_inner).mark().last
    }

    /// What is missing for taking on more, in words; `None` when there is room.
    pub(super) fn lacks_room(&self) -> Option<String> {
        let volume = rustix::fs::statvfs(&self.path).ok()?;
        let free = volume.f_bavail.saturating_mul(volume.f_frsize);
        (free < RESERVE_BYTES).then(|| {
            format!(
                "{} MiB are free at {}, {} MiB are needed for writing",
                free >> 20,
                self.path.display(),
                RESERVE_BYTES >> 20
            )
        })
    }

    fn read_tables(&self) -> Result<usize, DiskError> {
        self.access(|database| {
            let txn = database.begin_read()?;
            Ok(txn.list_tables()?.count())
        })
    }

    fn access<T>(
        &self,
        run: impl FnOnce(&Database) -> Result<T, redb::Error>,
    ) -> Result<T, DiskError> {
        // redb's transactions keep the database whole whatever panics between them.
        let database = self.database.read().unwrap_or_else(PoisonError::into_inner);
        let Some(database) = database.as_ref() else {
            return Err(DiskError::Closed { path: self.path.clone() });
        };
        run(database).map_err(|source| DiskError::Access {
            path: self.path.clone(),
            source: Box::new(source),
        })
    }

    /// Waits for what is under way, and lets go of the file; later calls fail.
    pub(super) fn close(&self) {
        self.note_commits();
        let mut database = self.database.write().unwrap_or_else(PoisonError::into_inner);
        *database = None;
        let mark = self.mark.lock().unwrap_or_else(PoisonError::into_inner);
        if let Err(error) = mark.flush() {
            tracing::warn!(%error, path = %mark.path().display(), "not flushed");
        }
    }

    /// One durable transaction.
    fn write(
        &self,
        change: impl FnOnce(&WriteTransaction) -> Result<(), redb::Error>,
    ) -> Result<(), DiskError> {
        self.access(|database| {
            let mut txn = database.begin_write()?;
            txn.set_durability(Durability::Immediate)?;
            change(&txn)?;
            txn.commit()?;
            Ok(())
        })
    }

    fn inconsistent(&self, what: &str) -> DiskError {
        DiskError::Inconsistent { path: self.path.clone(), what: what.to_owned() }
    }

    pub(super) fn parse<T: DeserializeOwned>(
        &self,
        what: impl FnOnce() -> String,
        bytes: &[u8],
    ) -> Result<T, DiskError> {
        serde_json::from_slice(bytes).map_err(|source| DiskError::Damaged {
            path: self.path.clone(),
            what: what(),
            source,
        })
    }

    fn meta<T: DeserializeOwned>(&self, name: &str) -> Result<Option<T>, DiskError> {
        let bytes = self.access(|database| {
            let txn = database.begin_read()?;
            // A file of another program may have other tables only.
            let table = match txn.open_table(META) {
                Ok(table) => table,
                Err(redb::TableError::TableDoesNotExist(_)) => return Ok(None),
                Err(error) => return Err(error.into()),
            };
            Ok(table.get(name)?.map(|bytes| bytes.value().to_vec()))
        })?;
        bytes.map(|bytes| self.parse(|| format!("`{name}`"), &bytes)).transpose()
    }

    pub(super) fn vote(&self) -> Result<Option<Vote<u64>>, DiskError> {
        self.meta("vote")
    }

    pub(super) fn save_vote(&self, vote: &Vote<u64>) -> Result<(), DiskError> {
        self.write(|txn| {
            txn.open_table(META)?.insert("vote", json(vote).as_slice())?;
            Ok(())
        })?;
        self.set_mark(|mark| mark.vote = Some(*vote))
    }

    pub(super) fn purged(&self) -> Result<Option<LogId<u64>>, DiskError> {
        self.meta("purged")
    }

    /// The newest log entry.
    pub(super) fn last(&self) -> Result<Option<Entry<TypeConfig>>, DiskError> {
        let last = self.access(|database| {
            let txn = database.begin_read()?;
            let table = txn.open_table(LOG)?;
            let last = table.last()?;
            Ok(last.map(|(index, bytes)| (index.value(), bytes.value().to_vec())))
        })?;
        last.map(|(index, bytes)| self.parse(|| format!("log entry {index}"), &bytes)).transpose()
    }

    /// The entries of a range, in order.
    pub(super) fn entries(
        &self,
        range: RangeInclusive<u64>,
    ) -> Result<Vec<Entry<TypeConfig>>, DiskError> {
        let found = self.access(|database| {
            let txn = database.begin_read()?;
            let table = txn.open_table(LOG)?;
            let mut found = Vec::new();
            for entry in table.range(range)? {
                let (index, bytes) = entry?;
                found.push((index.value(), bytes.value().to_vec()));
            }
            Ok(found)
        })?;
        found
            .iter()
            .map(|(index, bytes)| self.parse(|| format!("log entry {index}"), bytes))
            .collect()
    }

    /// Adds entries in one transaction; returns their bytes.
    pub(super) fn append(&self, entries: &[Entry<TypeConfig>]) -> Result<u64, DiskError> {
        let mut bytes = 0;
        // While somebody reads what was there before, redb leaves the pages that a commit frees to
        // the next one, instead of making a second commit for them after each.
        let before = self.access(|database| Ok(database.begin_read()?))?;
        self.write(|txn| {
            let mut table = txn.open_table(LOG)?;
            for entry in entries {
                let entry_json = json(entry);
                bytes += entry_json.len() as u64;
                table.insert(entry.log_id.index, entry_json.as_slice())?;
            }
            Ok(())
        })?;
        drop(before);
        if let Some(last) = entries.last() {
            self.set_mark(|mark| mark.last = Some(last.log_id))?;
        }
        Ok(bytes)
    }

    /// Removes the entries from `index` on.
    pub(super) fn truncate(&self, index: u64) -> Result<(), DiskError> {
        // First the mark: what it promises is there whenever this is cut short.
        let before = index.checked_sub(1).map(|last| self.entries(last..=last)).transpose()?;
        let last = before.and_then(|entries| entries.last().map(|entry| entry.log_id));
        let last = last.max(self.purged()?);
        self.set_mark(|mark| mark.last = last)?;
        self.flush_mark()?;
        self.write(|txn| {
            txn.open_table(LOG)?.retain_in(index.., |_, _| false)?;
            Ok(())
        })
    }

    /// Removes the entries up to `id`, and remembers that.
    pub(super) fn purge(&self, id: &LogId<u64>) -> Result<(), DiskError> {
        self.write(|txn| {
            txn.open_table(META)?.insert("purged", json(id).as_slice())?;
            txn.open_table(LOG)?.retain_in(..=id.index, |_, _| false)?;
            Ok(())
        })?;
        self.set_mark(|mark| mark.last = mark.last.max(Some(*id)))
    }

    /// Replaces the snapshot, unless the one that is there is newer: one that was built here may
    /// be ready only after another one came from the leader.
    pub(super) fn save_snapshot(&self, meta: &Meta, data: &[u8]) -> Result<(), DiskError> {
        let mut damaged = None;
        let mut saved = false;
        self.write(|txn| {
            let present = match txn.open_table(META)?.get("snapshot")? {
                Some(bytes) => self.parse::<Meta>(|| "`snapshot`".to_owned(), bytes.value()),
                None => Ok(Meta::default()),
            };
            match present {
                Ok(present) if present.last_log_id > meta.last_log_id => return Ok(()),
                Ok(_) => {}
                Err(error) => {
                    damaged = Some(error);
                    return Ok(());
                }
            }
            saved = true;
            let mut table = txn.open_table(SNAPSHOT)?;
            table.retain(|_, _| false)?;
            for (number, part) in (0..).zip(data.chunks(PART_BYTES)) {
                table.insert(number, part)?;
            }
            txn.open_table(META)?.insert("snapshot", json(meta).as_slice())?;
            Ok(())
        })?;
        match damaged {
            Some(error) => Err(error),
            None if saved => self.set_mark(|mark| mark.snapshot = meta.last_log_id),
            None => Ok(()),
        }
    }

    pub(super) fn snapshot(&self) -> Result<Option<(Meta, Vec<u8>)>, DiskError> {
        let Some(meta) = self.meta("snapshot")? else {
            return Ok(None);
        };
        let data = self.access(|database| {
            let txn = database.begin_read()?;
            let table = txn.open_table(SNAPSHOT)?;
            let mut data = Vec::new();
            for part in table.iter()? {
                data.extend_from_slice(part?.1.value());
            }
            Ok(data)
        })?;
        Ok(Some((meta, data)))
    }
}

fn json<T: Serialize>(value: &T) -> Vec<u8> {
    serde_json::to_vec(value).expect("these types have text keys only and no failing serializers")
}
