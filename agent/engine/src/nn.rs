//! Layers that models share: projections and embeddings, dense or quantized, and rotary positions. Own weights,
//! never sequence state.

use std::ffi::CStr;
use std::ops::Range;

use mlx_rs::error::Exception;
use mlx_rs::ops::{addmm, gather_mm, quantize};
use mlx_rs::{Array, Dtype};

use crate::batch::Offset;
use crate::mlx::{Quantized, Turn, matmul, slice};
use crate::tensor::Team;

/// How the values of a group are made from their packed form.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mode {
    /// Integers times the group's scale plus its bias.
    Affine,
    /// Four-bit floats times the group's scale, a power of two (OCP microscaling formats).
    Mxfp4,
}

/// A packed form: groups of `group_size` values along a row share a scale.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Packing {
    pub(crate) group_size: i32,
    pub(crate) bits: i32,
    pub(crate) mode: Mode,
}

impl Packing {
    /// The only sizes that the format has.
    pub(crate) const MXFP4: Self = Self { group_size: 32, bits: 4, mode: Mode::Mxfp4 };

    pub(crate) fn is_supported(self) -> bool {
        match self.mode {
            Mode::Affine => {
                [32, 64, 128].contains(&self.group_size) && [2, 3, 4, 5, 6, 8].contains(&self.bits)
            }
            Mode::Mxfp4 => self == Self::MXFP4,
        }
    }

    fn name(self) -> &'static CStr {
        match self.mode {
            Mode::Affine => c"affine",
            Mode::Mxfp4 => c"mxfp4",
        }
    }
}

/// A weight matrix `[rows, columns]`, or a stack of them, in packed form.
#[derive(Clone)]
pub(crate) struct Packed {
    pub(crate) weight: Array,
    pub(crate) scales: Array,
    pub(crate) biases: Option<Array>,
    pub(crate) packing: Packing,
}

impl Packed {
    fn view(&self) -> Quantized<'_> {
        let Packing { group_size, bits, .. } = self.packing;
        let mode = self.packing.name();
        let biases = self.biases.as_ref();
        Quantized { weight: &self.weight, scales: &self.scales, biases, group_size, bits, mode }
    }

    /// `x` of shape `[…, columns]` to `[…, rows]`.
    fn project(&self, x: &Array) -> Result<Array, Exception> {
        self.view().matmul(x, true)
    }

    /// The rows `ids` of a matrix, unpacked.
    fn rows(&self, ids: &Array) -> Result<Array, Exception> {
        let row = |matrix: &Array| matrix.take_axis(ids, 0);
        let (weight, scales) = (row(&self.weight)?, row(&self.scales)?);
        let biases = self.biases.as_ref().map(row).transpose()?;
        Packed { weight, scales, biases, packing: self.packing }.view().dequantize()
    }
}

#[derive(Clone)]
enum Matrix {
    /// Transposed once here, so that using it adds no graph node.
    Dense {
        transposed: Array,
    },
    Packed(Packed),
}

/// `x · Wᵀ (+ bias)`.
#[derive(Clone)]
pub(crate) struct Linear {
    matrix: Matrix,
    bias: Option<Array>,
}

impl Linear {
    pub(crate) fn dense(weight: &Array, bias: Option<Array>) -> Self {
        Self { matrix: Matrix::Dense { transposed: weight.t() }, bias }
    }

    pub(crate) fn quantized(packed: Packed, bias: Option<Array>) -> Self {
        Self { matrix: Matrix::Packed(packed), bias }
    }

    pub(crate) fn forward(&self, x: &Array) -> Result<Array, Exception> {
        match (&self.matrix, &self.bias) {
            (Matrix::Dense { transposed }, Some(bias)) => addmm(bias, x, transposed, None, None),
            (_, None) => self.product(x),
            (Matrix::Packed(_), Some(bias)) => self.product(x)?.add(bias),
        }
    }

    /// As [`Linear::forward`] for a matrix whose columns `team` shares: the sum of all ranks' products, to which the
    /// bias is added once.
    pub(crate) fn forward_summed(&self, x: &Array, team: &Team) -> Result<Array, Exception> {
        if team.is_alone() {
            return self.forward(x);
        }
        let sum = team.sum(&self.product(x)?)?;
        match &self.bias {
            Some(bias) => sum.add(bias),
            None => Ok(sum),
        }
    }

    /// Without the bias.
    pub(crate) fn product(&self, x: &Array) -> Result<Array, Exception> {
        match &self.matrix {
            Matrix::Dense { transposed } => matmul(x, transposed),
            Matrix::Packed(packed) => packed.project(x),
        }
    }

    /// The projection to some of the rows alone; nothing is copied.
    fn rows(&self, range: Range<i32>) -> Result<Self, Exception> {
        let cut = |x: &Array| slice(x, &[range.start, 0], &[range.end, x.dim(1)]);
        let matrix = match &self.matrix {
            Matrix::Dense { transposed } => Matrix::Dense {
                transposed: slice(transposed, &[0, range.start], &[transposed.dim(0), range.end])?,
            },
            Matrix::Packed(Packed { weight, scales, biases, packing }) => Matrix::Packed(Packed {
                weight: cut(weight)?,
                scales: cut(scales)?,
                biases: biases.as_ref().map(cut).transpose()?,
                packing: *packing,
            }),
        };
        let bias = self.bias.as_ref().map(|bias| slice(bias, &[range.start], &[range.end]));
        Ok(Self { matrix, bias: bias.transpose()? })
    }

    /// The matrix `[rows, columns]` if it is not packed and there is no bias.
    pub(crate) fn plain(&self) -> Option<Array> {
        match (&self.matrix, &self.bias) {
            (Matrix::Dense { transposed }, None) => Some(transposed.t()),
            (Matrix::Dense { .. }, Some(_)) | (Matrix::Packed(_), _) => None,
        }
    }

    /// The matrix `[rows, columns]` unpacked, and how it was packed.
    pub(crate) fn unpack(&self) -> Result<(Array, Option<Packing>), Exception> {
        match &self.matrix {
            Matrix::Dense { transposed } => Ok((transposed.t(), None)),
            Matrix::Packed(packed) => Ok((packed.view().dequantize()?, Some(packed.packing))),
        }
    }
}

/// Projections of the same input. Where their matrices lie one behind the other in one, a single product serves all.
#[derive(Clone)]
pub(crate) enum Joint {
    /// `ends` are the rows at which each part ends.
    One {
        linear: Linear,
        ends: Vec<i32>,
    },
    Apart(Vec<Linear>),
}

impl Joint {
    /// `rows` are those of each part.
    pub(crate) fn one(linear: Linear, rows: &[i32]) -> Self {
        let mut end = 0;
        let next = |rows: &i32| {
            end += rows;
            end
        };
        Self::One { linear, ends: rows.iter().map(next).collect() }
    }

    /// All of them as one projection, if they are.
    pub(crate) fn whole(&self) -> Option<&Linear> {
        match self {
            Self::One { linear, .. } => Some(linear),
            Self::Apart(_) => None,
        }
    }

    /// `x` `[batch, positions, columns]` to the result of each of the `N` parts, `[batch, positions, rows]`.
    pub(crate) fn forward<const N: usize>(&self, x: &Array) -> Result<[Array; N], Exception> {
        let results: Result<Vec<Array>, Exception> = match self {
            Self::Apart(parts) => parts.iter().map(|part| part.forward(x)).collect(),
            Self::One { linear, ends } => {
                let all = linear.forward(x)?;
                let starts = [0].iter().chain(ends);
                starts.zip(ends).map(|(&start, &end)| features(&all, start, end)).collect()
            }
        };
        Ok(results?.try_into().unwrap_or_else(|_| panic!("not {N} projections")))
    }

    /// As [`Joint::forward`], but of the first part only the result of the last `wanted` positions.
    pub(crate) fn forward_last<const N: usize>(
        &self,
        x: &Array,
        wanted: i32,
    ) -> Result<[Array; N], Exception> {
        if wanted == x.dim(1) {
            return self.forward(x);
        }
        let of_last = last(x, wanted)?;
        let results: Result<Vec<Array>, Exception> = match self {
            Self::Apart(parts) => (parts.iter().enumerate())
                .map(|(index, part)| part.forward(if index == 0 { &of_last } else { x }))
                .collect(),
            Self::One { linear, ends } => {
                let (first, end) = (ends[0], ends[ends.len() - 1]);
                let others = linear.rows(first..end)?.forward(x)?;
                let parts = ends.iter().zip(&ends[1..]);
                let parts = parts.map(|(&a, &b)| features(&others, a - first, b - first));
                [linear.rows(0..first)?.forward(&of_last)].into_iter().chain(parts).collect()
            }
        };
        Ok(results?.try_into().unwrap_or_else(|_| panic!("not {N} projections")))
    }
}

/// `start..end` of the features of `[batch, positions, features]`.
fn features(x: &Array, start: i32, end: i32) -> Result<Array, Exception> {
    slice(x, &[0, 0, start], &[x.dim(0), x.dim(1), end])
}

/// Several matrices `[rows, columns]` of one shape: one per expert, or one per head.
pub(crate) enum Stack {
    Dense { weight: Array, transposed: Array },
    Packed(Packed),
}

impl Stack {
    /// `weight` is `[count, rows, columns]`.
    pub(crate) fn dense(weight: Array) -> Result<Self, Exception> {
        let transposed = weight.swap_axes(-1, -2)?;
        Ok(Self::Dense { weight, transposed })
    }

    /// Packs `weight`, if `packing` says how.
    pub(crate) fn pack(weight: Array, packing: Option<Packing>) -> Result<Self, Exception> {
        match packing {
            Some(packing) if packing.mode == Mode::Affine => {
                let (weight, scales, biases) = quantize(&weight, packing.group_size, packing.bits)?;
                Ok(Self::Packed(Packed { weight, scales, biases: Some(biases), packing }))
            }
            Some(_) | None => Self::dense(weight),
        }
    }

    /// Some of the matrices.
    pub(crate) fn part(&self, range: &Range<i32>) -> Result<Self, Exception> {
        let cut = |x: &Array| slice(x, &[range.start, 0, 0], &[range.end, x.dim(1), x.dim(2)]);
        match self {
            Self::Dense { weight, .. } => Self::dense(cut(weight)?),
            Self::Packed(Packed { weight, scales, biases, packing }) => Ok(Self::Packed(Packed {
                weight: cut(weight)?,
                scales: cut(scales)?,
                biases: biases.as_ref().map(cut).transpose()?,
                packing: *packing,
            })),
        }
    }

    pub(crate) fn arrays(&self) -> Vec<&Array> {
        match self {
            Self::Dense { weight, .. } => vec![weight],
            Self::Packed(p) => [&p.weight, &p.scales].into_iter().chain(&p.biases).collect(),
        }
    }

    /// Each matrix on its own part: `x` `[1, count or 1, n, columns]` to `[1, count, n, rows]`.
    pub(crate) fn forward(&self, x: &Array) -> Result<Array, Exception> {
        match self {
            Self::Dense { transposed, .. } => matmul(x, transposed),
            Self::Packed(packed) => packed.project(x),
        }
    }

    /// The other way: `x` `[1, count or 1, n, rows]` to `[1, count, n, columns]`.
    pub(crate) fn forward_transposed(&self, x: &Array) -> Result<Array, Exception> {
        match self {
            Self::Dense { weight, .. } => matmul(x, weight),
            Self::Packed(packed) => packed.view().matmul(x, false),
        }
    }

    /// For each index, its matrix: `x` `[…, 1, columns]` to `[…, 1, rows]`. `sorted` promises that the indices never
    /// fall.
    pub(crate) fn gather(
        &self,
        x: &Array,
        indices: &Array,
        sorted: bool,
    ) -> Result<Array, Exception> {
        match self {
            Self::Dense { transposed, .. } => gather_mm(x, transposed, None, indices, sorted),
            Self::Packed(packed) => packed.view().gather_matmul(x, indices, sorted),
        }
    }
}

/// Rows by token id; also the output projection of models that tie the two.
pub(crate) enum Embedding {
    Dense { weight: Array, transposed: Array },
    Packed(Packed),
}

impl Embedding {
    pub(crate) fn dense(weight: Array) -> Self {
        Self::Dense { transposed: weight.t(), weight }
    }

    pub(crate) fn quantized(packed: Packed) -> Self {
        Self::Packed(packed)
    }

    /// Ids `[…]` to rows `[…, width]`.
    pub(crate) fn forward(&self, ids: &Array) -> Result<Array, Exception> {
        match self {
            Self::Dense { weight, .. } => weight.take_axis(ids, 0),
            Self::Packed(packed) => packed.rows(ids),
        }
    }

    /// `[…, width]` to logits `[…, rows]`.
    pub(crate) fn as_linear(&self, x: &Array) -> Result<Array, Exception> {
        match self {
            Self::Dense { transposed, .. } => matmul(x, transposed),
            Self::Packed(packed) => packed.project(x),
        }
    }
}

/// Rotary positions. Either frequencies from `base`, or given wave lengths `periods`.
pub(crate) struct Rope {
    pub(crate) dims: i32,
    pub(crate) traditional: bool,
    /// Of positions.
    pub(crate) scale: f32,
    /// Of the rotated values; 1 for most.
    pub(crate) magnitude: f32,
    pub(crate) frequencies: Frequencies,
}

pub(crate) enum Frequencies {
    Base(f32),
    /// Inverse frequencies, `[dims / 2]`, float32: what MLX calls `freqs`.
    Periods(Array),
}

impl Rope {
    /// Inverse frequencies, `[dims / 2]`, float32.
    pub(crate) fn periods(&self) -> Array {
        match &self.frequencies {
            Frequencies::Periods(periods) => periods.clone(),
            Frequencies::Base(base) => {
                let (base, dims) = (f64::from(*base), self.dims);
                let period = |i| base.powf(f64::from(2 * i) / f64::from(dims)) as f32;
                let periods: Vec<f32> = (0..dims / 2).map(period).collect();
                Array::from_slice(&periods, &[dims / 2])
            }
        }
    }

    /// Rotates `x` of shape `[rows, heads, positions, dims]`, whose first position is `offset`.
    pub(crate) fn forward(&self, x: &Array, offset: &Offset) -> Result<Array, Exception> {
        let (base, periods) = match &self.frequencies {
            Frequencies::Base(base) => (Some(*base), None),
            Frequencies::Periods(periods) => (None, Some(periods)),
        };
        #[expect(
            clippy::float_cmp,
            reason = "1 is set, not computed, where nothing is to be scaled"
        )]
        let scaled = if self.magnitude == 1.0 { None } else { Some(times(x, self.magnitude)?) };
        let x = scaled.as_ref().unwrap_or(x);
        let &Self { dims, traditional, scale, .. } = self;
        let turn = Turn { dims, traditional, base, scale, periods };
        match offset {
            Offset::All(offset) => turn.all(x, *offset),
            Offset::ByRow(offsets) => turn.by_row(x, offsets),
        }
    }
}

/// `x · factor` in the type of `x`.
pub(crate) fn times(x: &Array, factor: f32) -> Result<Array, Exception> {
    x.multiply(Array::from_f32(factor).as_dtype(x.dtype())?)
}

/// The least number of a float type: what hides a score from softmax.
pub(crate) fn least(dtype: Dtype) -> Result<Array, Exception> {
    let least = match dtype {
        Dtype::Float16 => -65_504.0,
        Dtype::Bfloat16 => -3.389_531_4e38,
        _ => f32::MIN,
    };
    Array::from_f32(least).as_dtype(dtype)
}

/// The last `wanted` positions of `[1, positions, features]`.
pub(crate) fn last(x: &Array, wanted: i32) -> Result<Array, Exception> {
    let (positions, width) = (x.dim(1), x.dim(2));
    if wanted == positions {
        return Ok(x.clone());
    }
    slice(x, &[0, positions - wanted, 0], &[1, positions, width])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn joined_projections_are_those_of_their_parts() {
        let matrix = |rows: i32, from: i32| {
            let values: Vec<f32> = (from..from + rows * 2).map(|v| v as f32).collect();
            Array::from_slice(&values, &[rows, 2])
        };
        let x = Array::from_slice(&[1.0_f32, 2.0, -3.0, 0.5], &[1, 2, 2]);
        // The parts' rows follow each other in the joint matrix.
        let joint = Joint::one(Linear::dense(&matrix(6, 0), None), &[3, 1, 2]);
        let parts = [(3, 0), (1, 6), (2, 8)];
        let apart = parts
            .map(|(rows, from)| Linear::dense(&matrix(rows, from), None))
            .into_iter()
            .collect();
        let joint: [Array; 3] = joint.forward(&x).unwrap();
        let apart: [Array; 3] = Joint::Apart(apart).forward(&x).unwrap();
        for ((joint, apart), (rows, _)) in joint.iter().zip(&apart).zip(parts) {
            assert_eq!(joint.shape(), [1, 2, rows]);
            let values =
                |array: &Array| -> Vec<f32> { array.contiguous().unwrap().to_vec_exact().unwrap() };
            assert_eq!(values(joint), values(apart));
        }
    }

    #[test]
    fn the_first_part_can_be_had_for_the_last_positions_alone() {
        let numbers = |shape: &[i32], from: i32| {
            let count: i32 = shape.iter().product();
            let values: Vec<f32> = (from..from + count).map(|v| (v % 17) as f32 - 8.0).collect();
            Array::from_slice(&values, shape)
        };
        let (matrix, bias, x) = (numbers(&[96, 64], 0), numbers(&[96], 3), numbers(&[1, 5, 64], 7));
        let (weight, scales, biases) = quantize(&matrix, 32, 4).unwrap();
        let packing = Packing { group_size: 32, bits: 4, mode: Mode::Affine };
        let packed = || Packed {
            weight: weight.clone(),
            scales: scales.clone(),
            biases: Some(biases.clone()),
            packing,
        };
        let values =
            |array: &Array| -> Vec<f32> { array.contiguous().unwrap().to_vec_exact().unwrap() };
        let dense = |rows: Range<i32>| {
            let cut = slice(&matrix, &[rows.start, 0], &[rows.end, 64]).unwrap();
            let bias = slice(&bias, &[rows.start], &[rows.end]).unwrap();
            Linear::dense(&cut, Some(bias))
        };
        for joint in [
            Joint::one(dense(0..96), &[32, 48, 16]),
            Joint::one(Linear::quantized(packed(), None), &[32, 48, 16]),
            Joint::one(Linear::quantized(packed(), Some(bias.clone())), &[32, 48, 16]),
            Joint::Apart(vec![dense(0..32), dense(32..80), dense(80..96)]),
        ] {
            let all: [Array; 3] = joint.forward(&x).unwrap();
            for wanted in [5, 2, 1] {
                let some: [Array; 3] = joint.forward_last(&x, wanted).unwrap();
                assert_eq!(some[0].shape(), [1, wanted, 32]);
                assert_eq!(values(&some[0]), values(&last(&all[0], wanted).unwrap()));
                assert_eq!(values(&some[1]), values(&all[1]));
                assert_eq!(values(&some[2]), values(&all[2]));
            }
        }
    }
}
