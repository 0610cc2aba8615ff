//! What a model is made of: its modules, the tensors of each, and how ranks share them. Knows no files.

use mlx_rs::Dtype;

use super::error::LoadError;
use super::pieces::Region;
use crate::nn::{Mode, Packing};
use crate::tensor::Share;

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
    /// `[width]` floats under a name of their own.
    Vector { name: &'static str, width: i32 },
    /// Weight `[count, output, input]`.
    Stack { count: i32, input: i32, output: i32 },
}

/// How the ranks of a tensor-parallel team share a module. `units` of `what` lie one behind the other along the axis
/// that is split and are never cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Split {
    /// Every rank holds all.
    Whole,
    /// Along the outputs. With `repeat`, ranks may hold the same unit when there are fewer units than ranks.
    Output { units: i32, what: &'static str, repeat: bool },
    /// Along the inputs: the ranks' products are to be summed.
    Input { units: i32, what: &'static str },
    /// Whole matrices of a stack.
    Matrices { what: &'static str },
}

impl Split {
    pub(crate) fn output(units: i32, what: &'static str) -> Self {
        Self::Output { units, what, repeat: false }
    }

    pub(crate) fn input(units: i32, what: &'static str) -> Self {
        Self::Input { units, what }
    }
}

/// One module of a model: its path in the checkpoint, what tensors it has, who holds it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Module {
    pub(crate) path: String,
    pub(crate) kind: Kind,
    pub(crate) home: Home,
    pub(crate) split: Split,
    /// Paths of a stack's matrices where the checkpoint has each on its own; empty where it has the stack.
    pub(crate) pieces: Vec<String>,
    /// The matrix of which this one becomes a run of rows, if the others that belong to it are packed and typed alike.
    pub(crate) joint: Option<String>,
}

impl Module {
    pub(crate) fn new(path: String, kind: Kind, home: Home, split: Split) -> Self {
        Self { path, kind, home, split, pieces: Vec::new(), joint: None }
    }

    /// Where the checkpoint has the tensors.
    pub(super) fn sources(&self) -> &[String] {
        if self.pieces.is_empty() { std::slice::from_ref(&self.path) } else { &self.pieces }
    }

    /// Columns of the matrices that can be packed.
    pub(super) fn columns(&self) -> Option<i32> {
        match self.kind {
            Kind::Linear { input, .. } | Kind::Stack { input, .. } => Some(input),
            Kind::Embedding { width, .. } => Some(width),
            Kind::Norm { .. } | Kind::Vector { .. } => None,
        }
    }

    /// The module's tensors, as this rank needs them.
    pub(super) fn tensors(
        &self,
        packing: Option<Packing>,
        share: Share,
    ) -> Result<Vec<Wanted>, LoadError> {
        let one = |name: &str, width| {
            let shape = vec![width];
            let sources = vec![format!("{}.{name}", self.path)];
            vec![Wanted { sources, shape, stacked: false, r#type: Type::Float, region: None }]
        };
        let (lead, rows, columns) = match self.kind {
            Kind::Norm { width } => return Ok(one("weight", width)),
            Kind::Vector { name, width } => return Ok(one(name, width)),
            Kind::Linear { input, output, .. } => (None, output, input),
            Kind::Embedding { rows, width } => (None, rows, width),
            Kind::Stack { count, input, output } => {
                (Some(count).filter(|_| self.pieces.is_empty()), output, input)
            }
        };
        let cut = self.cut(packing, share, rows, columns)?;
        let mut wanted = Vec::new();
        let mut matrix = |name: &str, per: (i32, i32), r#type| {
            // `per` turns columns of values into columns of this tensor.
            let in_tensor =
                |column: i32| (i64::from(column) * i64::from(per.0) / i64::from(per.1)) as i32;
            let shape: Vec<i32> = lead.into_iter().chain([rows, in_tensor(columns)]).collect();
            let region = cut.as_ref().map(|cut| match cut.axis {
                Axis::Matrices => Region { axis: 0, start: cut.start, stop: cut.stop },
                Axis::Rows => Region { axis: shape.len() - 2, start: cut.start, stop: cut.stop },
                Axis::Columns => Region {
                    axis: shape.len() - 1,
                    start: in_tensor(cut.start),
                    stop: in_tensor(cut.stop),
                },
            });
            let sources = self.sources().iter().map(|path| format!("{path}.{name}")).collect();
            wanted.push(Wanted {
                sources,
                shape,
                stacked: !self.pieces.is_empty(),
                r#type,
                region,
            });
        };
        match packing {
            None => matrix("weight", (1, 1), Type::Float),
            Some(Packing { group_size, bits, mode }) => {
                matrix("weight", (bits, 32), Type::Packed);
                match mode {
                    Mode::Affine => {
                        matrix("scales", (1, group_size), Type::Float);
                        matrix("biases", (1, group_size), Type::Float);
                    }
                    Mode::Mxfp4 => matrix("scales", (1, group_size), Type::Exponent),
                }
            }
        }
        if let Kind::Linear { bias: true, .. } = self.kind {
            let mut bias = one("bias", rows);
            for tensor in &mut bias {
                let rows = cut.as_ref().filter(|cut| cut.axis == Axis::Rows);
                tensor.region =
                    rows.map(|cut| Region { axis: 0, start: cut.start, stop: cut.stop });
            }
            wanted.append(&mut bias);
        }
        Ok(wanted)
    }

    /// This rank's part of a matrix of `rows` and `columns`; none for all of it.
    fn cut(
        &self,
        packing: Option<Packing>,
        share: Share,
        rows: i32,
        columns: i32,
    ) -> Result<Option<Cut>, LoadError> {
        let fail =
            |reason| Err(LoadError::Split { module: self.path.clone(), ranks: share.size, reason });
        let (axis, length, units, what, repeat) = match (self.split, self.kind) {
            _ if share == Share::WHOLE => return Ok(None),
            (Split::Whole, _) => return Ok(None),
            (Split::Output { units, what, repeat }, _) => (Axis::Rows, rows, units, what, repeat),
            (Split::Input { units, what }, _) => (Axis::Columns, columns, units, what, false),
            (Split::Matrices { what }, Kind::Stack { count, .. }) => {
                (Axis::Matrices, count, count, what, false)
            }
            (Split::Matrices { what }, _) => return fail(format!("it is no stack of {what}")),
        };
        let Some(part) = share.of(units, repeat) else {
            return fail(format!("{units} {what} do not divide by {}", share.size));
        };
        let unit = length / units;
        let cut = Cut { axis, start: part.start * unit, stop: part.end * unit };
        if let (Axis::Columns, Some(packing)) = (axis, packing) {
            let (each, group) = (cut.stop - cut.start, packing.group_size);
            if each % group != 0 {
                return fail(format!(
                    "{each} of {columns} inputs each do not divide by the quantization's groups of {group}"
                ));
            }
        }
        Ok(Some(cut))
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Axis {
    Matrices,
    Rows,
    Columns,
}

/// A part of a matrix (or stack), counted in values.
struct Cut {
    axis: Axis,
    start: i32,
    stop: i32,
}

/// How tensors of a module may be typed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Type {
    Float,
    Packed,
    /// Powers of two, as the exponent.
    Exponent,
}

impl Type {
    pub(super) fn allows(self, dtype: Dtype) -> bool {
        match self {
            Self::Float => matches!(dtype, Dtype::Float32 | Dtype::Float16 | Dtype::Bfloat16),
            Self::Packed => dtype == Dtype::Uint32,
            Self::Exponent => dtype == Dtype::Uint8,
        }
    }

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Float => "floats",
            Self::Packed => "Uint32",
            Self::Exponent => "Uint8",
        }
    }
}

/// One parameter: the tensors of the checkpoint that make it, all of the same shape and type.
pub(super) struct Wanted {
    pub(super) sources: Vec<String>,
    /// Of each source.
    pub(super) shape: Vec<i32>,
    /// Whether the sources are joined along a new first axis, also if there is one only.
    pub(super) stacked: bool,
    pub(super) r#type: Type,
    /// What of each source this rank holds; none for all.
    pub(super) region: Option<Region>,
}

impl Wanted {
    /// The last part of its name: "weight", "bias", …
    pub(super) fn name(&self) -> &str {
        self.sources[0].rsplit('.').next().unwrap_or_default()
    }

    /// Of the parameter as this rank holds it.
    pub(super) fn own_shape(&self) -> Vec<i32> {
        let shape = self.region.as_ref().map_or(self.shape.clone(), |r| r.shape(&self.shape));
        let lead = self.stacked.then_some(self.sources.len() as i32);
        lead.into_iter().chain(shape).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn linear(split: Split) -> Module {
        let kind = Kind::Linear { input: 256, output: 96, bias: true };
        Module::new("m".to_owned(), kind, Home::Layer(0), split)
    }

    fn regions(module: &Module, packing: Option<Packing>, rank: i32, size: i32) -> Vec<String> {
        let wanted = module.tensors(packing, Share { rank, size }).unwrap();
        let text = |w: &Wanted| {
            let region = w.region.as_ref().map(|r| (r.axis, r.start, r.stop));
            format!("{} {:?} {region:?}", w.sources.join("+"), w.own_shape())
        };
        wanted.iter().map(text).collect()
    }

    #[test]
    fn a_rank_wants_its_slices_and_packed_ones_on_group_borders() {
        let packing = Some(Packing { group_size: 64, bits: 4, mode: Mode::Affine });
        assert_eq!(
            regions(&linear(Split::output(6, "heads")), packing, 1, 2),
            [
                "m.weight [48, 32] Some((0, 48, 96))",
                "m.scales [48, 4] Some((0, 48, 96))",
                "m.biases [48, 4] Some((0, 48, 96))",
                "m.bias [48] Some((0, 48, 96))"
            ]
        );
        assert_eq!(
            regions(&linear(Split::input(256, "inputs")), packing, 1, 4),
            [
                "m.weight [96, 8] Some((1, 8, 16))",
                "m.scales [96, 1] Some((1, 1, 2))",
                "m.biases [96, 1] Some((1, 1, 2))",
                "m.bias [96] None"
            ]
        );
        let repeated = Split::Output { units: 2, what: "heads", repeat: true };
        assert_eq!(
            regions(&linear(repeated), None, 2, 4),
            ["m.weight [48, 256] Some((0, 48, 96))", "m.bias [48] Some((0, 48, 96))"]
        );
        assert_eq!(
            regions(&linear(Split::output(6, "heads")), None, 0, 1),
            ["m.weight [96, 256] None", "m.bias [96] None"]
        );
    }

    #[test]
    fn stacks_come_whole_or_in_pieces() {
        let kind = Kind::Stack { count: 2, input: 8, output: 6 };
        let mut module =
            Module::new("s".to_owned(), kind, Home::Layer(0), Split::output(6, "rows"));
        assert_eq!(regions(&module, None, 1, 2), ["s.weight [2, 3, 8] Some((1, 3, 6))"]);
        module.pieces = vec!["e.0".to_owned(), "e.1".to_owned()];
        assert_eq!(
            regions(&module, None, 1, 2),
            ["e.0.weight+e.1.weight [2, 3, 8] Some((0, 3, 6))"]
        );
        module.pieces.clear();
        module.split = Split::Matrices { what: "heads" };
        assert_eq!(regions(&module, None, 1, 2), ["s.weight [1, 6, 8] Some((0, 1, 2))"]);
    }

    #[test]
    fn a_split_that_does_not_come_out_even_is_named_with_its_numbers() {
        let packing = Some(Packing { group_size: 128, bits: 4, mode: Mode::Affine });
        let check = |split, packing, size, expect: &str| {
            let error = linear(split).tensors(packing, Share { rank: 0, size }).err();
            assert_eq!(error.map(|e| e.to_string()).as_deref(), Some(expect));
        };
        check(
            Split::output(6, "attention heads"),
            None,
            4,
            "'m' can't be split over 4 ranks: 6 attention heads do not divide by 4",
        );
        check(
            Split::input(256, "inputs"),
            packing,
            4,
            "'m' can't be split over 4 ranks: 64 of 256 inputs each do not divide by the \
             quantization's groups of 128",
        );
    }
}
