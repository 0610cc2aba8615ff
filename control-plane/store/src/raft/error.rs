//! Why a store can't be opened, or its file not be read or written, and what people can do about it.

use std::{
    io::{self, ErrorKind},
    path::{Path, PathBuf},
};

use redb::{DatabaseError, StorageError};
use rustix::io::Errno;

use super::disk::FORMAT;

/// Why a store can't be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    #[error(transparent)]
    Disk(#[from] DiskError),
    #[error("starting Raft: {0}")]
    Raft(String),
}

impl OpenError {
    /// What is on the disk is not what was written there, so that no later try is better. Files that
    /// can't be opened or read at this moment may be as good as ever.
    pub fn is_damage(&self) -> bool {
        let Self::Disk(error) = self else { return false };
        match error {
            DiskError::Damaged { .. }
            | DiskError::Inconsistent { .. }
            | DiskError::Lost { .. }
            | DiskError::Broken { .. } => true,
            DiskError::Access { source, .. } => matches!(**source, redb::Error::Corrupted(_)),
            DiskError::Mark { source, .. } => is_other_data(source),
            DiskError::Folder { .. }
            | DiskError::Open { .. }
            | DiskError::InUse { .. }
            | DiskError::Refused { .. }
            | DiskError::Format { .. }
            | DiskError::OtherNode { .. }
            | DiskError::Thread { .. }
            | DiskError::Closed { .. } => false,
        }
    }
}

/// It was read, and is not what it should be.
fn is_other_data(error: &io::Error) -> bool {
    error.kind() == ErrorKind::InvalidData
}

/// Something is wrong with the store's file.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    #[error("making the folder {path}{}", cure(source))]
    Folder {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    /// The system refuses; of what is in the file nothing is known.
    #[error("opening {path}{}", cure(source))]
    Open {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("{path} is in use by another process")]
    InUse { path: PathBuf },
    #[error("{path} is damaged")]
    Broken {
        path: PathBuf,
        #[source]
        source: Box<DatabaseError>,
    },
    /// For a reason of redb's own.
    #[error("opening {path}")]
    Refused {
        path: PathBuf,
        #[source]
        source: Box<DatabaseError>,
    },
    #[error("reading or writing {path}")]
    Access {
        path: PathBuf,
        #[source]
        source: Box<redb::Error>,
    },
    #[error("{path} has format {found}; this version reads format {FORMAT}")]
    Format { path: PathBuf, found: String },
    #[error("{path} belongs to node {found}, not to node {expected}")]
    OtherNode { path: PathBuf, found: u64, expected: u64 },
    #[error("{path} is damaged: {what} can't be read")]
    Damaged {
        path: PathBuf,
        what: String,
        #[source]
        source: serde_json::Error,
    },
    #[error("starting the thread that writes {path}")]
    Thread {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("{path} is closed")]
    Closed { path: PathBuf },
    #[error("{path} is damaged: {what}")]
    Inconsistent { path: PathBuf, what: String },
    #[error(
        "{path} is damaged: {what} was written, and is gone (if that loss is to be accepted: \
         remove {mark})"
    )]
    Lost { path: PathBuf, mark: PathBuf, what: &'static str },
    #[error("reading or writing {path}{}", cure(source))]
    Mark {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
}

impl DiskError {
    /// Why redb doesn't open the file at `path`.
    pub(super) fn of_open(path: &Path, error: DatabaseError) -> Self {
        let path = path.to_owned();
        match error {
            // The latter is another version's lock.
            DatabaseError::DatabaseAlreadyOpen | DatabaseError::LockProtocolMismatch => {
                Self::InUse { path }
            }
            DatabaseError::Storage(StorageError::Io(source)) if !is_other_data(&source) => {
                Self::Open { path, source }
            }
            DatabaseError::Storage(StorageError::Io(_) | StorageError::Corrupted(_)) => {
                Self::Broken { path, source: Box::new(error) }
            }
            error => Self::Refused { path, source: Box::new(error) },
        }
    }
}

/// What people can do about what the system refuses, in brackets; nothing where that is unknown.
fn cure(error: &io::Error) -> &'static str {
    match error.kind() {
        ErrorKind::PermissionDenied => " (start exo as the user to whom this belongs)",
        ErrorKind::ReadOnlyFilesystem => " (its file system must be writable)",
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded => " (make room on its disk)",
        ErrorKind::IsADirectory => " (a folder is where a file should be: move it away)",
        ErrorKind::NotADirectory | ErrorKind::AlreadyExists => {
            " (a file is where a folder should be: move it away)"
        }
        _ => match Errno::from_io_error(error) {
            Some(Errno::MFILE | Errno::NFILE) => " (raise the limit of open files: `ulimit -n`)",
            Some(Errno::IO) => " (the disk fails)",
            _ => "",
        },
    }
}

#[cfg(test)]
mod tests {
    use std::{error::Error as _, fs};

    use tempfile::TempDir;

    use super::*;
    use crate::raft::disk::Disk;

    /// What people read, and whether it is said to be damage.
    fn refusal(dir: &Path) -> (String, bool) {
        let Err(error) = Disk::open(dir, 1) else { panic!("opened") };
        let cause = error.source().map(|cause| format!(": {cause}")).unwrap_or_default();
        (format!("{error}{cause}"), OpenError::from(error).is_damage())
    }

    fn check(dir: &Path, path: &Path, expect: &[&str]) {
        let (text, is_damage) = refusal(dir);
        assert!(text.contains(&path.display().to_string()), "{text}");
        for expect in expect {
            assert!(text.contains(expect), "{text}");
        }
        assert!(!is_damage && !text.contains("damaged"), "{text}");
    }

    #[test]
    fn what_the_system_refuses_is_told_as_such() {
        let dir = TempDir::new().unwrap();
        let file = dir.path().join("file");
        fs::write(&file, "").unwrap();
        let not_a_folder = "a file is where a folder should be";
        check(&file, &file, &[not_a_folder]);
        check(&file.join("raft"), &file, &[not_a_folder, "Not a directory (os error"]);
        let is_a_folder = ["a folder is where a file should be", "Is a directory (os error"];
        for name in ["store.redb", "store.mark"] {
            let store = dir.path().join(format!("with folder {name}"));
            fs::create_dir_all(store.join(name)).unwrap();
            check(&store, &store.join(name), &is_a_folder);
        }
    }

    #[test]
    fn a_file_that_another_one_has_is_in_use() {
        let dir = TempDir::new().unwrap();
        let first = Disk::open(dir.path(), 1).unwrap();
        let file = dir.path().join("store.redb");
        check(dir.path(), &file, &["is in use by another process"]);
        first.close();
        Disk::open(dir.path(), 1).unwrap();
    }

    #[test]
    fn damage_is_told_as_damage() {
        let dir = TempDir::new().unwrap();
        fs::write(dir.path().join("store.redb"), vec![7; 8192]).unwrap();
        let (text, is_damage) = refusal(dir.path());
        assert!(is_damage && text.contains("store.redb is damaged: "), "{text}");
    }

    #[test]
    fn each_refusal_has_its_cure() {
        let path = || PathBuf::from("/data/raft/store.redb");
        let of = |error: Errno| {
            let error = StorageError::Io(io::Error::from(error));
            let error = OpenError::from(DiskError::of_open(&path(), error.into()));
            assert!(!error.is_damage(), "{error}");
            error.to_string()
        };
        let checks = [
            (Errno::ACCESS, " (start exo as the user to whom this belongs)"),
            (Errno::PERM, " (start exo as the user to whom this belongs)"),
            (Errno::ROFS, " (its file system must be writable)"),
            (Errno::NOSPC, " (make room on its disk)"),
            (Errno::DQUOT, " (make room on its disk)"),
            (Errno::MFILE, " (raise the limit of open files: `ulimit -n`)"),
            (Errno::NFILE, " (raise the limit of open files: `ulimit -n`)"),
            (Errno::IO, " (the disk fails)"),
            (Errno::INTR, ""),
        ];
        for (errno, cure) in checks {
            assert_eq!(of(errno), format!("opening /data/raft/store.redb{cure}"), "{errno}");
        }
    }

    #[test]
    fn what_can_not_be_read_now_is_not_damaged() {
        use ErrorKind::{InvalidData, PermissionDenied, StorageFull};

        let path = || PathBuf::from("store.redb");
        let open = |error: DatabaseError| OpenError::from(DiskError::of_open(&path(), error));
        let kinds = [(InvalidData, true), (PermissionDenied, false), (StorageFull, false)];
        for (kind, is_damage) in kinds {
            assert_eq!(open(StorageError::Io(kind.into()).into()).is_damage(), is_damage, "{kind}");
            let mark = DiskError::Mark { path: path(), source: kind.into() };
            assert_eq!(OpenError::from(mark).is_damage(), is_damage, "{kind}");
        }
        assert!(open(StorageError::Corrupted("x".into()).into()).is_damage());
        assert!(!open(DatabaseError::DatabaseAlreadyOpen).is_damage());
    }
}
