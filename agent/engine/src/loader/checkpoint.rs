//! The tensors of a model folder, over one file or several with an index. Owns where each tensor lies; knows nothing
//! of models.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::Deserialize;

use super::error::LoadError;
use super::header::{self, Entry};
use super::pieces::{Piece, Pieces, Region, Source};

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

    /// The bytes of several tensors one behind the other, each whole or a region of it.
    pub(crate) fn pieces(&self, wanted: &[(&str, Option<&Region>)]) -> Result<Pieces, LoadError> {
        let mut opened: BTreeMap<usize, Arc<Source>> = BTreeMap::new();
        let mut list = Vec::with_capacity(wanted.len());
        for &(name, region) in wanted {
            let (index, entry) = self.tensors.get(name).expect("the caller has checked the name");
            let source = match opened.get(index) {
                Some(source) => source.clone(),
                None => {
                    let source = Arc::new(Source::open(&self.files[*index])?);
                    opened.insert(*index, source.clone());
                    source
                }
            };
            list.push(Piece::new(source, name, entry, region));
        }
        Ok(Pieces::new(list))
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
