//! Why a model folder can't be loaded.

use std::fmt;
use std::io;
use std::path::PathBuf;

/// Names of tensors shown in one message; the rest is counted.
const NAMES_SHOWN: usize = 8;

#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    #[error("can't read {}", path.display())]
    Io {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("{} holds no model.safetensors and no model.safetensors.index.json", dir.display())]
    NoWeights { dir: PathBuf },
    #[error("{}: bad header: {reason}", path.display())]
    BadHeader { path: PathBuf, reason: String },
    #[error("{}: bad index: {reason}", path.display())]
    BadIndex { path: PathBuf, reason: String },
    #[error(
        "{}: truncated: tensor '{tensor}' ends at byte {end}, the file at byte {length}",
        path.display()
    )]
    Truncated { path: PathBuf, tensor: String, end: u64, length: u64 },
    #[error("tensor '{tensor}' is in both {} and {}", first.display(), second.display())]
    Duplicate { tensor: String, first: PathBuf, second: PathBuf },
    #[error("tensor '{tensor}' should be in {}, which is not there", path.display())]
    MissingFile { tensor: String, path: PathBuf },
    #[error("{}: tensor '{tensor}' holds NaN or infinity at {place:?}", path.display())]
    NotFinite {
        path: PathBuf,
        tensor: String,
        /// One index per axis, of a value that is.
        place: Vec<u64>,
    },
    #[error("'{module}' can't be split over {ranks} ranks: {reason}")]
    Split { module: String, ranks: i32, reason: String },
    #[error("tensor '{tensor}' could not be put on the device: {reason}")]
    Device { tensor: String, reason: String },
    #[error("the checkpoint does not fit the model: {0}")]
    Mismatch(Mismatch),
}

impl LoadError {
    /// False where another try could go better: the file system, files still on their way, the device's memory.
    pub fn is_permanent(&self) -> bool {
        !matches!(self, Self::Io { .. } | Self::MissingFile { .. } | Self::Device { .. })
    }
}

/// A tensor that has another shape or type than the configuration says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Misshaped {
    pub tensor: String,
    pub expected: String,
    pub found: String,
}

/// Everything that a checkpoint has too much, too little or otherwise than the model, in name order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Mismatch {
    pub missing: Vec<String>,
    pub unknown: Vec<String>,
    pub misshaped: Vec<Misshaped>,
}

impl Mismatch {
    pub(crate) fn is_empty(&self) -> bool {
        self.missing.is_empty() && self.unknown.is_empty() && self.misshaped.is_empty()
    }
}

impl fmt::Display for Mismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let misshaped = self.misshaped.iter();
        let misshaped: Vec<String> = misshaped
            .map(|m| format!("{} (expected {}, found {})", m.tensor, m.expected, m.found))
            .collect();
        let groups = [
            ("missing", &self.missing),
            ("unknown", &self.unknown),
            ("wrong shape or type", &misshaped),
        ];
        let mut separator = "";
        for (what, names) in groups.into_iter().filter(|(_, names)| !names.is_empty()) {
            let shown = names[..names.len().min(NAMES_SHOWN)].join(", ");
            write!(f, "{separator}{what}: {shown}")?;
            if names.len() > NAMES_SHOWN {
                write!(f, " and {} more", names.len() - NAMES_SHOWN)?;
            }
            separator = "; ";
        }
        Ok(())
    }
}
