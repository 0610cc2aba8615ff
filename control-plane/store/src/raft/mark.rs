//! A small file beside the store's file that says what that file must hold at least.
//!
//! redb writes a commit and makes it the current one with a single fsync. When a process is killed
//! or power fails in between, the last commit is incomplete, and the next open goes back to the one
//! before: rightly so, for nobody was told that it was there. But a last commit that was complete
//! and is damaged later looks the same. This mark tells the two apart: it is written after the
//! commit has returned, and before anything is answered. It is not flushed with every write: after
//! a loss of power it may say too little, never too much.
//!
//! # Format
//! One line of JSON, then 16 hexadecimal digits of its FNV-1a hash, then spaces up to
//! [`SIZE`] bytes: one sector, which a disk writes as a whole.

use std::{
    fs::{File, OpenOptions},
    io::{self, Read as _, Seek as _, SeekFrom, Write as _},
    path::{Path, PathBuf},
};

use openraft::{LogId, Vote};
use serde::{Deserialize, Serialize};

const FILE: &str = "store.mark";
const SIZE: usize = 512;

/// What the store's file holds at least.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Mark {
    pub(super) vote: Option<Vote<u64>>,
    /// The newest entry of the log, or the last one that was purged.
    pub(super) last: Option<LogId<u64>>,
    /// The last entry in the snapshot.
    pub(super) snapshot: Option<LogId<u64>>,
    /// The number of an entry that is known to be committed, as are those before it. A node that
    /// starts alone shows the state up to there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) committed: Option<u64>,
}

/// The open file with what is written there.
pub(super) struct MarkFile {
    path: PathBuf,
    file: File,
    mark: Mark,
}

impl MarkFile {
    /// Opens the file of `dir`, or makes it; there is nothing in a new one.
    pub(super) fn open(dir: &Path) -> io::Result<Self> {
        let path = dir.join(FILE);
        let mut file =
            OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&path)?;
        let mut text = String::new();
        file.read_to_string(&mut text)?;
        let mark = decode(&text).ok_or_else(|| {
            io::Error::new(io::ErrorKind::InvalidData, "its contents don't match their check sum")
        })?;
        if text.trim_matches('\0').is_empty() {
            file.seek(SeekFrom::Start(0))?;
            file.write_all(encode(&mark).as_bytes())?;
            file.sync_all()?;
        }
        Ok(Self { path, file, mark })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn mark(&self) -> &Mark {
        &self.mark
    }

    pub(super) fn write(&mut self, mark: Mark) -> io::Result<()> {
        if self.mark == mark {
            return Ok(());
        }
        self.file.seek(SeekFrom::Start(0))?;
        self.file.write_all(encode(&mark).as_bytes())?;
        self.mark = mark;
        Ok(())
    }

    pub(super) fn flush(&self) -> io::Result<()> {
        self.file.sync_data()
    }
}

fn encode(mark: &Mark) -> String {
    let text = serde_json::to_string(mark).expect("numbers and names only");
    let hash = hash(text.as_bytes());
    format!("{:SIZE$}", format!("{text}\n{hash:016x}"))
}

/// `None` for what [`encode`] did not write.
fn decode(text: &str) -> Option<Mark> {
    // New, or cut short while it was made: nothing was promised before its first flush.
    if text.trim_matches('\0').is_empty() {
        return Some(Mark::default());
    }
    let (json, sum) = text.trim_end().split_once('\n')?;
    (u64::from_str_radix(sum, 16).ok()? == hash(json.as_bytes())).then_some(())?;
    serde_json::from_str(json).ok()
}

/// FNV-1a, 64 bits.
fn hash(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

#[cfg(test)]
mod tests {
    use openraft::CommittedLeaderId;

    use super::*;

    #[test]
    fn a_mark_comes_back_or_is_refused() {
        let largest = LogId::new(CommittedLeaderId::new(u64::MAX, u64::MAX), u64::MAX);
        let mark = Mark {
            vote: Some(Vote::new_committed(u64::MAX, u64::MAX)),
            last: Some(largest),
            snapshot: Some(largest),
            committed: Some(u64::MAX),
        };
        let text = encode(&mark);
        assert_eq!(text.len(), SIZE, "the largest numbers fit");
        assert_eq!(decode(&text), Some(mark));
        assert_eq!(decode(""), Some(Mark::default()));
        assert_eq!(decode(&"\0".repeat(SIZE)), Some(Mark::default()));
        assert_eq!(decode(&text.replace("last", "lost")), None);
        assert_eq!(decode(&text[..100]), None);
        // FNV's published value for this text.
        assert_eq!(hash(b"foobar"), 0x8594_4171_f739_67e8);
    }

    #[test]
    fn the_form_stays() {
        let mark = Mark {
            vote: Some(Vote::new(3, 7)),
            last: Some(LogId::new(CommittedLeaderId::new(3, 7), 12)),
            snapshot: None,
            committed: None,
        };
        // As all were before entries were noted as committed.
        let text = encode(&mark);
        let literal = r#"{"vote":{"leader_id":{"term":3,"node_id":7},"committed":false},"last":{"leader_id":{"term":3,"node_id":7},"index":12},"snapshot":null}"#;
        assert_eq!(text.lines().next(), Some(literal));
        let text = encode(&Mark { committed: Some(11), ..mark });
        let literal = literal.replace("null}", "null,\"committed\":11}");
        assert_eq!(text.lines().next(), Some(&*literal));
    }
}
