//! Strict loading: every parameter of the model is set exactly once from a tensor of the right name, shape and
//! type, and nothing is left over. A rank checks the whole checkpoint by its headers and reads only what it owns:
//! its layers, or its slices of every tensor. Never computes with weights.

mod checkpoint;
mod error;
mod finite;
mod header;
mod module;
mod pieces;

use std::collections::{BTreeMap, BTreeSet};
use std::mem::MaybeUninit;
use std::sync::{Arc, Mutex, PoisonError};

use mlx_rs::Array;
use mlx_rs::error::Exception;

pub(crate) use checkpoint::Checkpoint;
pub use error::{LoadError, Mismatch, Misshaped};
use module::Wanted;
pub(crate) use module::{Home, Kind, Module, Split};

use crate::config::Quantization;
use crate::mlx::read_array;
use crate::nn::{Embedding, Joint, Linear, Mode, Packed, Packing, Stack};
use crate::tensor::Share;

/// What has been read so far; the last report has `done == total`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LoadProgress {
    pub bytes_done: u64,
    pub bytes_total: u64,
}

/// What of a checkpoint a rank wants.
pub(crate) struct Selection<'a> {
    /// Of the whole model.
    pub(crate) modules: &'a [Module],
    pub(crate) quantization: Option<&'a Quantization>,
    /// Names that may be in the checkpoint and are not read.
    pub(crate) ignored: &'a dyn Fn(&str) -> bool,
    pub(crate) owns: &'a dyn Fn(Home) -> bool,
    pub(crate) share: Share,
}

/// The tensors of this rank, to be taken module by module.
pub(crate) struct Weights {
    arrays: BTreeMap<String, Array>,
    packings: BTreeMap<String, Packing>,
    /// For each joint matrix the rows of its parts.
    joints: BTreeMap<String, Vec<i32>>,
}

/// A module's tensor, and whether this rank holds it.
type Listed<'a> = (&'a Module, bool, Wanted);

/// What becomes one array: a tensor, or those of joined matrices one behind the other.
struct Parameter<'a> {
    key: String,
    parts: Vec<&'a Wanted>,
}

/// Checks the checkpoint against the whole model and reads what is selected.
pub(crate) fn load(
    checkpoint: &Checkpoint,
    selection: &Selection<'_>,
    progress: &mut dyn FnMut(LoadProgress),
) -> Result<Weights, LoadError> {
    let mut packings = BTreeMap::new();
    let mut wanted = Vec::new();
    for module in selection.modules {
        let packing = packing(checkpoint, module, selection.quantization);
        if let Some(packing) = packing {
            packings.insert(module.path.clone(), packing);
        }
        let owned = (selection.owns)(module.home);
        let tensors = module.tensors(packing, selection.share)?;
        wanted.extend(tensors.into_iter().map(|tensor| (module, owned, tensor)));
    }
    check(checkpoint, &wanted, selection.ignored)?;

    let joints = fitting_joints(checkpoint, &wanted, &packings);
    let parameters = parameters(&wanted, &joints);
    let bytes = |parameter: &Parameter<'_>| -> u64 {
        parameter.parts.iter().map(|tensor| length(checkpoint, tensor)).sum()
    };
    let bytes_total = parameters.iter().map(bytes).sum();
    let mut bytes_done = 0;
    let mut arrays = BTreeMap::new();
    for parameter in parameters {
        bytes_done += bytes(&parameter);
        let array = read(checkpoint, &parameter.parts)?;
        arrays.insert(parameter.key, array);
        progress(LoadProgress { bytes_done, bytes_total });
    }
    let joints: BTreeMap<_, _> = joints.into_iter().map(|(k, rows)| (k.to_owned(), rows)).collect();
    for module in selection.modules {
        let joint = module.joint.as_ref().filter(|joint| joints.contains_key(*joint));
        if let (Some(joint), Some(&packing)) = (joint, packings.get(&module.path)) {
            packings.insert(joint.clone(), packing);
        }
    }
    Ok(Weights { arrays, packings, joints })
}

/// Joint matrices all of whose parts have the same tensors, packed and typed alike; with the rows of each part.
fn fitting_joints<'a>(
    checkpoint: &Checkpoint,
    wanted: &'a [Listed<'a>],
    packings: &BTreeMap<String, Packing>,
) -> BTreeMap<&'a str, Vec<i32>> {
    let mut forms: BTreeMap<&str, BTreeMap<&str, Vec<_>>> = BTreeMap::new();
    let mut rows: BTreeMap<&str, Vec<i32>> = BTreeMap::new();
    for (module, _, tensor) in wanted.iter().filter(|(_, owned, _)| *owned) {
        let Some(joint) = module.joint.as_deref() else { continue };
        let dtype = checkpoint.entry(&tensor.sources[0]).map(|entry| entry.dtype);
        let form = (tensor.name(), dtype, packings.get(&module.path).copied());
        forms.entry(joint).or_default().entry(&module.path).or_default().push(form);
        if tensor.name() == "weight" {
            rows.entry(joint).or_default().push(tensor.own_shape()[0]);
        }
    }
    let alike = |joint: &str| {
        let mut parts = forms.get(joint).into_iter().flat_map(BTreeMap::values);
        let first = parts.next();
        parts.all(|part| Some(part) == first)
    };
    rows.retain(|&joint, _| alike(joint));
    rows
}

/// What this rank reads, in the order of the modules.
fn parameters<'a>(
    wanted: &'a [Listed<'a>],
    joints: &BTreeMap<&str, Vec<i32>>,
) -> Vec<Parameter<'a>> {
    let mut list: Vec<Parameter<'a>> = Vec::new();
    let mut places: BTreeMap<String, usize> = BTreeMap::new();
    for (module, _, tensor) in wanted.iter().filter(|(_, owned, _)| *owned) {
        let joint = module.joint.as_deref().filter(|joint| joints.contains_key(joint));
        let key = format!("{}.{}", joint.unwrap_or(&module.path), tensor.name());
        match places.get(&key) {
            Some(&place) => list[place].parts.push(tensor),
            None => {
                places.insert(key.clone(), list.len());
                list.push(Parameter { key, parts: vec![tensor] });
            }
        }
    }
    list
}

/// How a module is packed, if the checkpoint has it packed. Without a setting of its own the tensors' shapes tell, as
/// converters do not list all modules; if they do not, the default holds and the shapes are refused later.
fn packing(
    checkpoint: &Checkpoint,
    module: &Module,
    quantization: Option<&Quantization>,
) -> Option<Packing> {
    let (columns, quantization) = (module.columns()?, quantization?);
    let source = module.sources().first()?;
    let scales = format!("{source}.scales");
    if !checkpoint.contains(&scales) {
        return None;
    }
    let default = quantization.default();
    let inferred = || {
        let width = |name: &str| checkpoint.entry(name)?.shape.last().copied();
        let (scales, weight) = (width(&scales)?, width(&format!("{source}.weight"))?);
        let bits = (i64::from(weight) * 32).checked_div(i64::from(columns))?;
        let (group_size, bits) = (columns.checked_div(scales)?, i32::try_from(bits).ok()?);
        let biased = checkpoint.contains(&format!("{source}.biases"));
        let mode = if biased { Mode::Affine } else { Mode::Mxfp4 };
        Some(Packing { group_size, bits, mode }).filter(|packing| packing.is_supported())
    };
    Some(quantization.exception(&module.path).or_else(inferred).unwrap_or(default))
}

/// Bytes that this rank reads of a parameter.
fn length(checkpoint: &Checkpoint, tensor: &Wanted) -> u64 {
    let whole = |source: &String| checkpoint.entry(source).map_or(0, |entry| entry.length);
    let bytes: u64 = tensor.sources.iter().map(whole).sum();
    match &tensor.region {
        None => bytes,
        Some(region) => {
            let all = u64::try_from(tensor.shape[region.axis]).unwrap_or(0);
            let own = u64::try_from(region.stop - region.start).unwrap_or(0);
            (bytes * own).checked_div(all).unwrap_or(0)
        }
    }
}

/// One array of `parts`, which differ in their number of rows alone.
fn read(checkpoint: &Checkpoint, parts: &[&Wanted]) -> Result<Array, LoadError> {
    let mut shape = parts[0].own_shape();
    shape[0] = parts.iter().map(|tensor| tensor.own_shape()[0]).sum();
    let wanted = parts.iter().flat_map(|tensor| {
        tensor.sources.iter().map(|source| (source.as_str(), tensor.region.as_ref()))
    });
    let pieces = checkpoint.pieces(&wanted.collect::<Vec<_>>())?;
    let name = &parts[0].sources[0];
    let dtype = checkpoint.entry(name).map(|entry| entry.dtype).expect("`check` has seen it");
    let failure = Arc::new(Mutex::new(None));
    let told = failure.clone();
    // safetensors is little-endian, and so is every machine that MLX runs on.
    let fill = move |out: &mut [MaybeUninit<u8>]| {
        let read = pieces.read(out);
        *told.lock().unwrap_or_else(PoisonError::into_inner) = read.err();
        told.lock().unwrap_or_else(PoisonError::into_inner).is_none()
    };
    read_array(&shape, dtype, Box::new(fill)).map_err(|error| {
        let read = failure.lock().unwrap_or_else(PoisonError::into_inner).take();
        read.unwrap_or_else(|| LoadError::Device {
            tensor: name.clone(),
            reason: crate::mlx::reason(error.what()).to_owned(),
        })
    })
}

fn check(
    checkpoint: &Checkpoint,
    wanted: &[Listed<'_>],
    ignored: &dyn Fn(&str) -> bool,
) -> Result<(), LoadError> {
    let mut mismatch = Mismatch::default();
    for (_, owned, tensor) in wanted {
        let mut dtype = None;
        for source in &tensor.sources {
            let Some(entry) = checkpoint.entry(source) else {
                match checkpoint.absent(source) {
                    Some(path) if *owned => {
                        let (tensor, path) = (source.clone(), path.clone());
                        return Err(LoadError::MissingFile { tensor, path });
                    }
                    Some(_) => {}
                    None => mismatch.missing.push(source.clone()),
                }
                continue;
            };
            let same = dtype.is_none_or(|dtype| dtype == entry.dtype);
            dtype = Some(entry.dtype);
            if entry.shape != tensor.shape || !tensor.r#type.allows(entry.dtype) || !same {
                mismatch.misshaped.push(Misshaped {
                    tensor: source.clone(),
                    expected: format!("{:?} of {}", tensor.shape, tensor.r#type.name()),
                    found: format!("{:?} of {:?}", entry.shape, entry.dtype),
                });
            }
        }
    }
    let sources = wanted.iter().flat_map(|(.., tensor)| &tensor.sources);
    let known: BTreeSet<&str> = sources.map(String::as_str).collect();
    let unknown = checkpoint.names().filter(|n| !known.contains(n.as_str()) && !ignored(n));
    mismatch.unknown = unknown.cloned().collect();
    if mismatch.is_empty() { Ok(()) } else { Err(LoadError::Mismatch(mismatch)) }
}

impl Weights {
    fn take(&mut self, path: &str, name: &str) -> Array {
        let key = format!("{path}.{name}");
        self.arrays.remove(&key).unwrap_or_else(|| panic!("{key} was not loaded or taken twice"))
    }

    fn packed(&mut self, path: &str, weight: Array) -> Result<Packed, Array> {
        let Some(&packing) = self.packings.get(path) else { return Err(weight) };
        let biases = match packing.mode {
            Mode::Affine => Some(self.take(path, "biases")),
            Mode::Mxfp4 => None,
        };
        Ok(Packed { weight, scales: self.take(path, "scales"), biases, packing })
    }

    pub(crate) fn norm(&mut self, path: &str) -> Array {
        self.vector(path, "weight")
    }

    pub(crate) fn vector(&mut self, path: &str, name: &str) -> Array {
        self.take(path, name)
    }

    pub(crate) fn has(&self, path: &str) -> bool {
        self.arrays.contains_key(&format!("{path}.weight"))
    }

    pub(crate) fn linear(&mut self, path: &str) -> Linear {
        let bias = self.arrays.remove(&format!("{path}.bias"));
        let weight = self.take(path, "weight");
        match self.packed(path, weight) {
            Ok(packed) => Linear::quantized(packed, bias),
            Err(weight) => Linear::dense(&weight, bias),
        }
    }

    /// The projections `parts` of the joint matrix `path`, as one where they could be joined.
    pub(crate) fn joint(&mut self, path: &str, parts: &[String]) -> Joint {
        match self.joints.remove(path) {
            Some(rows) => Joint::one(self.linear(path), &rows),
            None => Joint::Apart(parts.iter().map(|part| self.linear(part)).collect()),
        }
    }

    pub(crate) fn embedding(&mut self, path: &str) -> Embedding {
        let weight = self.take(path, "weight");
        match self.packed(path, weight) {
            Ok(packed) => Embedding::quantized(packed),
            Err(weight) => Embedding::dense(weight),
        }
    }

    pub(crate) fn stack(&mut self, path: &str) -> Result<Stack, Exception> {
        let weight = self.take(path, "weight");
        match self.packed(path, weight) {
            Ok(packed) => Ok(Stack::Packed(packed)),
            Err(weight) => Stack::dense(weight),
        }
    }

    /// To be called when the model is built: every tensor that was read must be in it.
    pub(crate) fn finish(self) {
        let left: Vec<&String> = self.arrays.keys().collect();
        assert!(left.is_empty(), "read but not used: {left:?}");
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    /// A checkpoint of three matrices of two columns, filled with numbers from 0 on; `other` is the type of the last.
    fn checkpoint(rows: [i32; 3], other: &str) -> (tempfile::TempDir, Checkpoint) {
        let dir = tempfile::tempdir().unwrap();
        let (mut header, mut data) = (serde_json::Map::new(), Vec::new());
        for (name, rows) in ["a", "b", "c"].into_iter().zip(rows) {
            let (start, dtype) = (data.len(), if name == "c" { other } else { "F32" });
            for _ in 0..rows * 2 {
                let number = data.len() as f32;
                let bytes = number.to_le_bytes();
                data.extend_from_slice(if dtype == "F32" { &bytes } else { &bytes[..2] });
            }
            let offsets = [start, data.len()];
            let entry =
                serde_json::json!({"dtype": dtype, "shape": [rows, 2], "data_offsets": offsets});
            header.insert(format!("{name}.weight"), entry);
        }
        let header = serde_json::to_vec(&header).unwrap();
        let mut file = (header.len() as u64).to_le_bytes().to_vec();
        file.extend(header);
        file.extend(data);
        fs::write(dir.path().join("model.safetensors"), file).unwrap();
        let checkpoint = Checkpoint::open(dir.path()).unwrap();
        (dir, checkpoint)
    }

    fn load_joint(rows: [i32; 3], other: &str, share: Share) -> Joint {
        let (_dir, checkpoint) = checkpoint(rows, other);
        let module = |(name, output): (&str, i32)| Module {
            joint: Some("all".to_owned()),
            ..Module::new(
                name.to_owned(),
                Kind::Linear { input: 2, output, bias: false },
                Home::Layer(0),
                Split::output(output, "rows"),
            )
        };
        let parts = ["a", "b", "c"];
        let modules: Vec<Module> = parts.into_iter().zip(rows).map(module).collect();
        let selection = Selection {
            modules: &modules,
            quantization: None,
            ignored: &|_| false,
            owns: &|_| true,
            share,
        };
        let mut weights = load(&checkpoint, &selection, &mut |_| {}).unwrap();
        let joint = weights.joint("all", &parts.map(str::to_owned));
        weights.finish();
        joint
    }

    fn rows_of(joint: &Joint) -> [Vec<f32>; 3] {
        let first_column = Array::from_slice(&[1.0_f32, 0.0], &[1, 1, 2]);
        let parts: [Array; 3] = joint.forward(&first_column).unwrap();
        parts.map(|part| {
            part.as_dtype(mlx_rs::Dtype::Float32)
                .unwrap()
                .contiguous()
                .unwrap()
                .to_vec_exact()
                .unwrap()
        })
    }

    #[test]
    fn matrices_that_are_alike_are_joined() {
        let joint = load_joint([1, 2, 1], "F32", Share::WHOLE);
        assert!(matches!(&joint, Joint::One { ends, .. } if *ends == [1, 3, 4]));
        assert_eq!(rows_of(&joint), [vec![0.0], vec![8.0, 16.0], vec![24.0]]);
        // Each rank joins its own rows of each.
        let joint = load_joint([2, 4, 2], "F32", Share { rank: 1, size: 2 });
        assert!(matches!(&joint, Joint::One { ends, .. } if *ends == [1, 3, 4]));
        assert_eq!(rows_of(&joint), [vec![8.0], vec![32.0, 40.0], vec![56.0]]);
    }

    #[test]
    fn matrices_of_several_types_stay_apart() {
        let joint = load_joint([1, 2, 1], "BF16", Share::WHOLE);
        assert!(matches!(&joint, Joint::Apart(parts) if parts.len() == 3));
        assert_eq!(rows_of(&joint)[..2], [vec![0.0], vec![8.0, 16.0]]);
    }
}
