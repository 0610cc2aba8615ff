//! The tensors of a model folder, over one file or several with an index. Owns where each tensor lies and reads
//! single tensors; knows nothing of models.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::error::LoadError;
use super::header::{self, Entry};

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
/// As the header of one file may have.
const INDEX_LIMIT_BYTES: u64 = 100_000_000;

pub(crate) struct Checkpoint {
    files: Vec<PathBuf>,
    tensors: BTreeMap<String, (usize, Entry)>,
    /// Tensors that the index puts into files which are not there. Not an error unless this rank needs them: it may
    /// have fetched its own files only.
    absent: BTreeMap<String, PathBuf>,
}

#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

impl Checkpoint {
    /// Reads the headers of the weights in `dir`.
    pub(crate) fn open(dir: &Path) -> Result<Self, LoadError> {
        let mut checkpoint =
            Self { files: Vec::new(), tensors: BTreeMap::new(), absent: BTreeMap::new() };
        let index_path = dir.join(INDEX);
        if index_path.exists() {
            let index = read_index(&index_path)?;
            checkpoint.open_indexed(dir, &index_path, &index)?;
        } else if dir.join(SINGLE).exists() {
            checkpoint.add_file(dir.join(SINGLE))?;
        } else {
            return Err(LoadError::NoWeights { dir: dir.to_owned() });
        }
        Ok(checkpoint)
    }

    fn open_indexed(&mut self, dir: &Path, path: &Path, index: &Index) -> Result<(), LoadError> {
        let bad = |reason: String| LoadError::BadIndex { path: path.to_owned(), reason };
        let names: BTreeSet<&String> = index.weight_map.values().collect();
        for name in names {
            // The index comes from the network: it must not lead out of the folder.
            if Path::new(name).file_name().is_none_or(|f| f != name.as_str()) {
                return Err(bad(format!("'{name}' is not a plain file name")));
            }
            if dir.join(name).exists() {
                self.add_file(dir.join(name))?;
            }
        }
        for (tensor, file) in &index.weight_map {
            let path = dir.join(file);
            match self.tensors.get(tensor) {
                Some((i, _)) if self.files[*i] == path => {}
                Some((i, _)) => {
                    let found = self.files[*i].display();
                    return Err(bad(format!("tensor '{tensor}' is in {found}, not in {file}")));
                }
                None if self.files.contains(&path) => {
                    return Err(bad(format!("tensor '{tensor}' is not in {file}")));
                }
                None => {
                    self.absent.insert(tensor.clone(), path);
                }
            }
        }
        let unlisted = self.tensors.keys().find(|t| !index.weight_map.contains_key(*t));
        match unlisted {
            Some(tensor) => Err(bad(format!("tensor '{tensor}' is not listed"))),
            None => Ok(()),
        }
    }

    fn add_file(&mut self, path: PathBuf) -> Result<(), LoadError> {
        let file = self.files.len();
        for (name, entry) in header::read(&path)? {
            if let Some((other, _)) = self.tensors.get(&name) {
                return Err(LoadError::Duplicate {
                    tensor: name,
                    first: self.files[*other].clone(),
                    second: path,
                });
            }
            self.tensors.insert(name, (file, entry));
        }
        self.files.push(path);
        Ok(())
    }

    /// Every name, also of tensors whose files are not there.
    pub(crate) fn names(&self) -> impl Iterator<Item = &String> {
        self.tensors.keys().chain(self.absent.keys())
    }

    pub(crate) fn contains(&self, name: &str) -> bool {
        self.tensors.contains_key(name) || self.absent.contains_key(name)
    }

    /// What is known of a tensor; none when its file is not there.
    pub(crate) fn entry(&self, name: &str) -> Option<&Entry> {
        self.tensors.get(name).map(|(_, entry)| entry)
    }

    pub(crate) fn absent(&self, name: &str) -> Option<&PathBuf> {
        self.absent.get(name)
    }

    /// Appends the bytes of one tensor, or of a region of it, to `out`; reads nothing else of its file.
    pub(crate) fn read(
        &self,
        name: &str,
        region: Option<&Region>,
        out: &mut Vec<u8>,
    ) -> Result<(), LoadError> {
        let (file, entry) = self.tensors.get(name).expect("the caller has checked the name");
        let path = &self.files[*file];
        let io = |source| LoadError::Io { path: path.clone(), source };
        let file = File::open(path).map_err(io)?;
        let runs = region.map_or_else(|| Runs::whole(entry), |region| region.runs(entry));
        runs.read(&file, entry.start, out).map_err(io)
    }
}

/// `start..stop` along one axis of a tensor, all of the others.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Region {
    pub(crate) axis: usize,
    pub(crate) start: i32,
    pub(crate) stop: i32,
}

impl Region {
    /// The region's shape in a tensor of `shape`.
    pub(crate) fn shape(&self, shape: &[i32]) -> Vec<i32> {
        let mut shape = shape.to_vec();
        shape[self.axis] = self.stop - self.start;
        shape
    }

    fn runs(&self, entry: &Entry) -> Runs {
        let product = |dims: &[i32]| dims.iter().map(|&n| n as u64).product::<u64>();
        let count = product(&entry.shape[..self.axis]);
        let stride = entry.length.checked_div(count).unwrap_or(0);
        let one = stride.checked_div(entry.shape[self.axis] as u64).unwrap_or(0);
        let length = (self.stop - self.start) as u64 * one;
        Runs { first: self.start as u64 * one, length, stride, count }
    }
}

/// Byte runs of one length at one distance, from the start of a tensor.
#[derive(Debug, PartialEq, Eq)]
struct Runs {
    first: u64,
    length: u64,
    stride: u64,
    count: u64,
}

/// Runs shorter than this are read with what lies between them: a call each would cost more.
const SHORT_RUN_BYTES: u64 = 16 << 10;
/// Most bytes read at a time with short runs.
const BLOCK_BYTES: u64 = 4 << 20;

impl Runs {
    fn whole(entry: &Entry) -> Self {
        Self { first: 0, length: entry.length, stride: entry.length, count: 1 }
    }

    fn read(&self, file: &File, start: u64, out: &mut Vec<u8>) -> std::io::Result<()> {
        let &Self { first, length, stride, count } = self;
        if count == 1 || length >= SHORT_RUN_BYTES {
            for run in 0..count {
                let from = out.len();
                out.resize(from + length as usize, 0);
                file.read_exact_at(&mut out[from..], start + first + run * stride)?;
            }
            return Ok(());
        }
        let per_block = (BLOCK_BYTES / stride.max(1)).clamp(1, count);
        let mut block = Vec::new();
        let mut run = 0;
        while run < count {
            let runs = per_block.min(count - run);
            block.resize(((runs - 1) * stride + length) as usize, 0);
            file.read_exact_at(&mut block, start + first + run * stride)?;
            for i in 0..runs {
                let at = (i * stride) as usize;
                out.extend_from_slice(&block[at..at + length as usize]);
            }
            run += runs;
        }
        Ok(())
    }
}

fn read_index(path: &Path) -> Result<Index, LoadError> {
    let io = |source| LoadError::Io { path: path.to_owned(), source };
    let bad = |reason| LoadError::BadIndex { path: path.to_owned(), reason };
    let length = std::fs::metadata(path).map_err(io)?.len();
    if length > INDEX_LIMIT_BYTES {
        return Err(bad(format!("{length} bytes are more than {INDEX_LIMIT_BYTES}")));
    }
    let text = std::fs::read(path).map_err(io)?;
    serde_json::from_slice(&text).map_err(|e| bad(e.to_string()))
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use mlx_rs::Dtype;

    use super::*;

    /// Elements of a `[a, b, c]` tensor of bytes that a region holds, by their indices.
    fn expect(shape: [i32; 3], region: &Region) -> Vec<u8> {
        let mut found = Vec::new();
        let [a, b, c] = shape;
        for (i, index) in (0..a)
            .flat_map(|x| (0..b).flat_map(move |y| (0..c).map(move |z| [x, y, z])))
            .enumerate()
        {
            if (region.start..region.stop).contains(&index[region.axis]) {
                found.push((i % 251) as u8);
            }
        }
        found
    }

    #[test]
    fn regions_are_read_whatever_their_axis_and_length() {
        // The first has runs of both kinds; the second more short runs than a block holds.
        for shape in [[3, 5, 20_000], [2, 70, 70_000]] {
            let length = shape.iter().product::<i32>() as usize;
            let bytes: Vec<u8> = (0..length).map(|i| (i % 251) as u8).collect();
            let mut file = tempfile::tempfile().unwrap();
            file.write_all(b"header").unwrap();
            file.write_all(&bytes).unwrap();
            let shape_vec = shape.to_vec();
            let entry =
                Entry { dtype: Dtype::Uint8, shape: shape_vec, start: 6, length: length as u64 };
            for (axis, start, stop) in
                [(0, 1, 2), (0, 0, 2), (1, 2, 4), (2, 0, 7), (2, 9_000, 9_100), (2, 10, 20_000)]
            {
                let region = Region { axis, start, stop };
                let mut out = Vec::new();
                region.runs(&entry).read(&file, 6, &mut out).unwrap();
                assert!(out == expect(shape, &region), "{region:?} of {shape:?}");
            }
        }
    }
}
