//! Strict loading: every parameter of the model is set exactly once from a tensor of the right name, shape and
//! type, and nothing is left over. A rank checks the whole checkpoint by its headers and reads only what it owns.
//! Never computes with weights.

mod checkpoint;
mod error;
mod header;

use std::collections::{BTreeMap, BTreeSet};

use mlx_rs::{Array, Dtype};

pub(crate) use checkpoint::Checkpoint;
pub use error::{LoadError, Mismatch, Misshaped};

use crate::config::Quantization;
use crate::nn::{Affine, Embedding, Linear};

/// Which ranks of a pipeline hold a module.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Home {
    First,
    Layer(usize),
    Last,
    /// The first and the last rank: an embedding that is also the output projection.
    Ends,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Weight `[output, input]`, and a bias `[output]` if it has one.
    Linear { input: i32, output: i32, bias: bool },
    /// Weight `[rows, width]`.
    Embedding { rows: i32, width: i32 },
    /// Weight `[width]`.
    Norm { width: i32 },
}

/// One module of a model: its path in the checkpoint, what tensors it has, who holds it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Module {
    pub(crate) path: String,
    pub(crate) kind: Kind,
    pub(crate) home: Home,
}

/// What has been read so far; the last report has `done == total`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LoadProgress {
    pub bytes_done: u64,
    pub bytes_total: u64,
}

/// How tensors of a module may be typed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Type {
    Float,
    Packed,
}

struct Wanted {
    name: String,
    shape: Vec<i32>,
    r#type: Type,
    owned: bool,
}

/// The tensors of this rank, to be taken module by module.
pub(crate) struct Weights {
    arrays: BTreeMap<String, Array>,
    affine: BTreeMap<String, Affine>,
}

/// Checks the checkpoint against `modules` and reads those that `owns` says.
///
/// Names for which `ignored` holds may be in the checkpoint and are not read.
pub(crate) fn load(
    checkpoint: &Checkpoint,
    modules: &[Module],
    quantization: Option<&Quantization>,
    ignored: impl Fn(&str) -> bool,
    owns: impl Fn(Home) -> bool,
    progress: &mut dyn FnMut(LoadProgress),
) -> Result<Weights, LoadError> {
    let mut wanted = Vec::new();
    let mut affine = BTreeMap::new();
    for module in modules {
        let path = &module.path;
        let packed = quantization
            .filter(|_| !matches!(module.kind, Kind::Norm { .. }))
            .filter(|_| checkpoint.contains(&format!("{path}.scales")))
            .map(|q| q.of(path));
        if let Some(packed) = packed {
            affine.insert(path.clone(), packed);
        }
        module.tensors(packed, owns(module.home), &mut wanted);
    }
    check(checkpoint, &wanted, ignored)?;

    let owned: Vec<&Wanted> = wanted.iter().filter(|w| w.owned).collect();
    let length = |w: &Wanted| checkpoint.entry(&w.name).map_or(0, |e| e.length);
    let bytes_total = owned.iter().map(|w| length(w)).sum();
    let mut bytes_done = 0;
    let mut arrays = BTreeMap::new();
    for tensor in owned {
        arrays.insert(tensor.name.clone(), checkpoint.read(&tensor.name)?);
        bytes_done += length(tensor);
        progress(LoadProgress { bytes_done, bytes_total });
    }
    Ok(Weights { arrays, affine })
}

fn check(
    checkpoint: &Checkpoint,
    wanted: &[Wanted],
    ignored: impl Fn(&str) -> bool,
) -> Result<(), LoadError> {
    let mut mismatch = Mismatch::default();
    for tensor in wanted {
        match checkpoint.entry(&tensor.name) {
            Some(entry) => {
                if entry.shape != tensor.shape || !tensor.r#type.allows(entry.dtype) {
                    mismatch.misshaped.push(Misshaped {
                        tensor: tensor.name.clone(),
                        expected: format!("{:?} of {}", tensor.shape, tensor.r#type.name()),
                        found: format!("{:?} of {:?}", entry.shape, entry.dtype),
                    });
                }
            }
            None => match checkpoint.absent(&tensor.name) {
                Some(path) if tensor.owned => {
                    return Err(LoadError::MissingFile {
                        tensor: tensor.name.clone(),
                        path: path.clone(),
                    });
                }
                Some(_) => {}
                None => mismatch.missing.push(tensor.name.clone()),
            },
        }
    }
    let known: BTreeSet<&str> = wanted.iter().map(|w| w.name.as_str()).collect();
    let unknown = checkpoint.names().filter(|n| !known.contains(n.as_str()) && !ignored(n));
    mismatch.unknown = unknown.cloned().collect();
    if mismatch.is_empty() { Ok(()) } else { Err(LoadError::Mismatch(mismatch)) }
}

impl Type {
    fn allows(self, dtype: Dtype) -> bool {
        match self {
            Self::Float => matches!(dtype, Dtype::Float32 | Dtype::Float16 | Dtype::Bfloat16),
            Self::Packed => dtype == Dtype::Uint32,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Float => "floats",
            Self::Packed => "Uint32",
        }
    }
}

impl Module {
    fn tensors(&self, packed: Option<Affine>, owned: bool, out: &mut Vec<Wanted>) {
        let mut push = |name: &str, shape: Vec<i32>, r#type| {
            out.push(Wanted { name: format!("{}.{name}", self.path), shape, r#type, owned });
        };
        let (rows, columns, bias) = match self.kind {
            Kind::Norm { width } => return push("weight", vec![width], Type::Float),
            Kind::Linear { input, output, bias } => (output, input, bias),
            Kind::Embedding { rows, width } => (rows, width, false),
        };
        match packed {
            None => push("weight", vec![rows, columns], Type::Float),
            Some(affine) => {
                push("weight", vec![rows, columns * affine.bits / 32], Type::Packed);
                push("scales", vec![rows, columns / affine.group_size], Type::Float);
                push("biases", vec![rows, columns / affine.group_size], Type::Float);
            }
        }
        if bias {
            push("bias", vec![rows], Type::Float);
        }
    }
}

impl Weights {
    fn take(&mut self, path: &str, name: &str) -> Array {
        let key = format!("{path}.{name}");
        self.arrays.remove(&key).unwrap_or_else(|| panic!("{key} was not loaded or taken twice"))
    }

    pub(crate) fn norm(&mut self, path: &str) -> Array {
        self.take(path, "weight")
    }

    pub(crate) fn linear(&mut self, path: &str) -> Linear {
        let bias = self.arrays.remove(&format!("{path}.bias"));
        let weight = self.take(path, "weight");
        match self.affine.get(path).copied() {
            None => Linear::dense(&weight, bias),
            Some(affine) => {
                let (scales, biases) = (self.take(path, "scales"), self.take(path, "biases"));
                Linear::quantized(weight, scales, biases, affine, bias)
            }
        }
    }

    pub(crate) fn embedding(&mut self, path: &str) -> Embedding {
        let weight = self.take(path, "weight");
        match self.affine.get(path).copied() {
            None => Embedding::dense(weight),
            Some(affine) => {
                let (scales, biases) = (self.take(path, "scales"), self.take(path, "biases"));
                Embedding::quantized(weight, scales, biases, affine)
            }
        }
    }

    /// To be called when the model is built: every tensor that was read must be in it.
    pub(crate) fn finish(self) {
        let left: Vec<&String> = self.arrays.keys().collect();
        assert!(left.is_empty(), "read but not used: {left:?}");
    }
}
