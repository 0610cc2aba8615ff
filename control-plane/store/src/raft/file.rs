//! The file under redb, whose places exist on the disk before they are needed.
//!
//! Flushing a write to a hole of a sparse file, as redb leaves them when it grows, makes the file
//! system commit where the new blocks are; one over zeros that were there has nothing to add. So
//! zeros are written ahead of what redb uses, a piece at a time. It knows nothing of redb's pages.

use std::{
    fmt,
    fs::OpenOptions,
    io,
    ops::Bound,
    path::Path,
    sync::{Mutex, MutexGuard, PoisonError},
};

use redb::{BackendError, StorageBackend, backends::FileBackend};

/// Zeros are written ahead up to a multiple of this.
const PIECE_BYTES: u64 = 1 << 20;
/// A longer gap stays a hole: filling it would keep a commit waiting.
const GAP_BYTES: u64 = 4 << 20;

pub(super) struct PreparedFile {
    file: FileBackend,
    /// Nobody has written here or behind: first the length that the file has when redb, which has
    /// locked it by then, begins to write. Locked by every write, so that none is overwritten.
    end: Mutex<Option<u64>>,
}

impl PreparedFile {
    /// Opens the file at `path`, or makes it.
    pub(super) fn open(path: &Path) -> Result<Self, redb::DatabaseError> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(path)
            .map_err(|error| redb::DatabaseError::Storage(redb::StorageError::Io(error)))?;
        Ok(Self { file: FileBackend::new(file)?, end: Mutex::new(None) })
    }

    /// The end, and the lock on it.
    fn end(&self) -> io::Result<(u64, MutexGuard<'_, Option<u64>>)> {
        let end = self.end.lock().unwrap_or_else(PoisonError::into_inner);
        Ok((end.map_or_else(|| self.file.len(), Ok)?, end))
    }

    /// Zeros from `start` up to `end`. Without them the file is as good, only slower.
    fn fill(&self, start: u64, end: u64) {
        let zeros = vec![0; usize::try_from(end.saturating_sub(start)).unwrap_or(0)];
        if !zeros.is_empty()
            && let Err(error) = self.file.write(start, &zeros)
        {
            tracing::debug!(%error, "no zeros ahead");
        }
    }
}

impl fmt::Debug for PreparedFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PreparedFile").field("file", &self.file).finish_non_exhaustive()
    }
}

type Result<T, E = BackendError> = std::result::Result<T, E>;

impl StorageBackend for PreparedFile {
    fn len(&self) -> io::Result<u64> {
        self.file.len()
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        self.file.read(offset, out)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        let (end, mut locked) = self.end()?;
        *locked = Some(end.min(len));
        self.file.set_len(len)
    }

    fn sync_data(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let (mut end, mut locked) = self.end()?;
        let behind = offset + data.len() as u64;
        if behind > end {
            let ahead = behind.next_multiple_of(PIECE_BYTES).min(self.file.len()?);
            if offset.saturating_sub(end) <= GAP_BYTES {
                self.fill(end, offset);
            }
            self.fill(behind, ahead);
            end = ahead.max(behind);
        }
        *locked = Some(end);
        self.file.write(offset, data)
    }

    fn close(&self) -> io::Result<()> {
        self.file.close()
    }

    fn try_lock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<bool> {
        self.file.try_lock_range(start, end)
    }

    fn try_lock_shared_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<bool> {
        self.file.try_lock_shared_range(start, end)
    }

    fn lock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<()> {
        self.file.lock_range(start, end)
    }

    fn lock_shared_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<()> {
        self.file.lock_shared_range(start, end)
    }

    fn unlock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<()> {
        self.file.unlock_range(start, end)
    }

    fn query_lock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<bool> {
        self.file.query_lock_range(start, end)
    }
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeMap, os::unix::fs::MetadataExt as _};

    use proptest::prelude::*;

    use super::*;

    fn content(file: &PreparedFile, len: u64) -> Vec<u8> {
        let mut out = vec![1; usize::try_from(len).unwrap()];
        file.read(0, &mut out).unwrap();
        out
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]

        /// Whatever is written in whatever order, with the file opened anew between: it holds that,
        /// and zeros elsewhere.
        #[test]
        fn holds_what_was_written(writes in proptest::collection::vec(
            (0_u64..12 << 20, 1_usize..300_000, 1_u8.., any::<bool>()), 1..8,
        )) {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("file");
            let mut file = PreparedFile::open(&path).unwrap();
            let len = 13 << 20;
            file.set_len(len).unwrap();
            let mut expect = vec![0; usize::try_from(len).unwrap()];
            for (offset, length, byte, again) in writes {
                file.write(offset, &vec![byte; length]).unwrap();
                let start = usize::try_from(offset).unwrap();
                expect[start..start + length].fill(byte);
                if again {
                    drop(file);
                    file = PreparedFile::open(&path).unwrap();
                }
            }
            prop_assert!(content(&file, len) == expect);
        }
    }

    #[test]
    fn places_are_made_ahead_of_their_use() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        let file = PreparedFile::open(&path).unwrap();
        file.set_len(64 << 20).unwrap();
        let held = |file: &PreparedFile| {
            file.sync_data().unwrap();
            std::fs::metadata(&path).unwrap().blocks() * 512
        };
        file.write(0, &[1; 4096]).unwrap();
        let first = held(&file);
        assert!((PIECE_BYTES..GAP_BYTES).contains(&first), "{first}");
        file.write(PIECE_BYTES - 4096, &[1; 4096]).unwrap();
        assert_eq!(held(&file), first, "there already");
        // Far away: what is between stays a hole.
        file.write(40 << 20, &[1; 4096]).unwrap();
        assert!(held(&file) < 2 * GAP_BYTES);
        file.set_len(4096).unwrap();
        file.set_len(8192).unwrap();
        assert_eq!(content(&file, 8192)[4096..], [0; 4096]);
    }

    #[test]
    fn a_database_lives_in_it() {
        const TABLE: redb::TableDefinition<'_, u64, &[u8]> = redb::TableDefinition::new("table");
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        let mut expect = BTreeMap::new();
        for round in 0..4_u64 {
            let file = PreparedFile::open(&path).unwrap();
            let database = redb::Database::builder()
                .set_check_integrity_on_open(true)
                .create_with_backend(file)
                .unwrap();
            let txn = database.begin_write().unwrap();
            for key in 0..60 {
                let value = vec![u8::try_from(round).unwrap(); 20_000];
                txn.open_table(TABLE).unwrap().insert(round * 30 + key, &value[..]).unwrap();
                expect.insert(round * 30 + key, value);
            }
            txn.commit().unwrap();
            let txn = redb::ReadableDatabase::begin_read(&database).unwrap();
            let table = txn.open_table(TABLE).unwrap();
            for (key, value) in &expect {
                assert_eq!(table.get(key).unwrap().unwrap().value(), value);
            }
            let second = redb::Database::open(&path);
            assert!(matches!(second, Err(redb::DatabaseError::DatabaseAlreadyOpen)));
        }
    }
}
