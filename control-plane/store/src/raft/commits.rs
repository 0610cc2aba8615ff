//! How far the log on disk is known to be committed, which the [mark](super::mark) tells. Only what
//! a node shows that starts without the others depends on it.
//!
//! An entry may be committed before it is on this disk, and another one may take its place there if
//! this node is killed in between. So the mark names no entry beyond the last one that it says is
//! here.

use std::sync::{
    PoisonError,
    atomic::{AtomicU64, Ordering},
};

use openraft::LogId;

use super::{call::chain, disk::Disk, error::DiskError, mark::Mark};

/// The number of the newest entry that is known to be committed, here or not yet; 0 for none.
#[derive(Default)]
pub(super) struct Commits(AtomicU64);

impl Commits {
    /// Has the mark tell it, as far as the entries are here.
    pub(super) fn tell(&self, mark: &mut Mark) {
        let committed = self.0.load(Ordering::Relaxed);
        let here = mark.last.map(|last| last.index.min(committed)).filter(|index| *index > 0);
        mark.committed = mark.committed.max(here);
    }
}

impl Disk {
    /// The entries up to `index` are committed. That is written down with the next entries or by
    /// [`note_commits`](Self::note_commits); not flushed: after a loss of power it may be forgotten.
    pub(super) fn is_committed(&self, index: u64) {
        self.commits.0.fetch_max(index, Ordering::Relaxed);
    }

    /// Writes down how far the log is committed.
    pub(super) fn note_commits(&self) {
        if let Err(error) = self.set_mark(|_| ()) {
            tracing::debug!(error = chain(&error), "not noted how far the log is committed");
        }
    }

    /// Whether there are entries here that are not noted as committed yet.
    pub(super) fn awaits_commits(&self) -> bool {
        let file = self.mark.lock().unwrap_or_else(PoisonError::into_inner);
        let mark = file.mark();
        mark.last.map(|last| last.index) > mark.committed
    }

    /// The newest entry here that is known to be committed.
    pub(super) fn committed(&self) -> Result<Option<LogId<u64>>, DiskError> {
        self.note_commits();
        let committed = self.mark.lock().unwrap_or_else(PoisonError::into_inner).mark().committed;
        let (Some(committed), Some(last)) = (committed, self.last()?) else {
            return Ok(None);
        };
        let index = committed.min(last.log_id.index);
        Ok(self.entries(index..=index)?.first().map(|entry| entry.log_id))
    }
}

#[cfg(test)]
mod tests {
    use openraft::{CommittedLeaderId, Entry, EntryPayload};

    use super::{super::TypeConfig, *};

    fn entry(term: u64, index: u64) -> Entry<TypeConfig> {
        let log_id = LogId::new(CommittedLeaderId::new(term, 1), index);
        Entry { log_id, payload: EntryPayload::Blank }
    }

    #[test]
    fn what_takes_the_place_of_a_committed_entry_that_never_was_here_is_not_committed() {
        let dir = tempfile::tempdir().unwrap();
        let committed =
            |disk: &Disk| disk.committed().unwrap().map(|id| (id.leader_id.term, id.index));
        let disk = Disk::open(dir.path(), 1).unwrap();
        assert_eq!(committed(&disk), None);
        let entries: Vec<_> = (1..=9).map(|index| entry(1, index)).collect();
        // The others have entry 10, and this node only up to 9.
        disk.is_committed(10);
        disk.append(&entries).unwrap();
        assert_eq!(committed(&disk), Some((1, 9)));
        // Killed; then another leader writes its own entry 10.
        drop(disk);
        let disk = Disk::open(dir.path(), 1).unwrap();
        disk.append(&[entry(2, 10)]).unwrap();
        assert_eq!(committed(&disk), Some((1, 9)));
        disk.is_committed(10);
        assert!(disk.awaits_commits());
        disk.note_commits();
        assert!(!disk.awaits_commits());
        drop(disk);
        assert_eq!(committed(&Disk::open(dir.path(), 1).unwrap()), Some((2, 10)));
    }
}
