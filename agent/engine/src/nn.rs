//! Layers that models share: projections and embeddings, dense or quantized, and rotary positions. Own weights,
//! never sequence state.

use mlx_rs::Array;
use mlx_rs::error::Exception;
use mlx_rs::ops::{addmm, dequantize, matmul, quantized_matmul};

/// Affine quantization: groups of `group_size` values along a row share a scale and a bias.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Affine {
    pub(crate) group_size: i32,
    pub(crate) bits: i32,
}

/// A weight matrix `[rows, columns]` in packed form.
pub(crate) struct Packed {
    weight: Array,
    scales: Array,
    biases: Array,
    affine: Affine,
}

impl Packed {
    /// `x` of shape `[…, columns]` to `[…, rows]`.
    fn project(&self, x: &Array) -> Result<Array, Exception> {
        let Affine { group_size, bits } = self.affine;
        quantized_matmul(x, &self.weight, &self.scales, &self.biases, true, group_size, bits)
    }
}

enum Matrix {
    /// Transposed once here, so that using it adds no graph node.
    Dense {
        transposed: Array,
    },
    Packed(Packed),
}

/// `x · Wᵀ (+ bias)`.
pub(crate) struct Linear {
    matrix: Matrix,
    bias: Option<Array>,
}

impl Linear {
    pub(crate) fn dense(weight: &Array, bias: Option<Array>) -> Self {
        Self { matrix: Matrix::Dense { transposed: weight.t() }, bias }
    }

    pub(crate) fn quantized(
        weight: Array,
        scales: Array,
        biases: Array,
        affine: Affine,
        bias: Option<Array>,
    ) -> Self {
        Self { matrix: Matrix::Packed(Packed { weight, scales, biases, affine }), bias }
    }

    pub(crate) fn forward(&self, x: &Array) -> Result<Array, Exception> {
        match (&self.matrix, &self.bias) {
            (Matrix::Dense { transposed }, None) => matmul(x, transposed),
            (Matrix::Dense { transposed }, Some(bias)) => addmm(bias, x, transposed, None, None),
            (Matrix::Packed(packed), None) => packed.project(x),
            (Matrix::Packed(packed), Some(bias)) => packed.project(x)?.add(bias),
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

    pub(crate) fn quantized(weight: Array, scales: Array, biases: Array, affine: Affine) -> Self {
        Self::Packed(Packed { weight, scales, biases, affine })
    }

    /// Ids `[…]` to rows `[…, width]`.
    pub(crate) fn forward(&self, ids: &Array) -> Result<Array, Exception> {
        match self {
            Self::Dense { weight, .. } => weight.take_axis(ids, 0),
            Self::Packed(p) => {
                let row = |matrix: &Array| matrix.take_axis(ids, 0);
                let (weight, scales, biases) = (row(&p.weight)?, row(&p.scales)?, row(&p.biases)?);
                dequantize(&weight, &scales, &biases, p.affine.group_size, p.affine.bits)
            }
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
    pub(crate) scale: f32,
    pub(crate) frequencies: Frequencies,
}

pub(crate) enum Frequencies {
    Base(f32),
    /// Inverse frequencies, `[dims / 2]`, float32: what MLX calls `freqs`.
    Periods(Array),
}

impl Rope {
    /// Rotates `x` of shape `[batch, heads, positions, head_dim]`, whose first position is `offset`.
    pub(crate) fn forward(&self, x: &Array, offset: i32) -> Result<Array, Exception> {
        let (base, periods) = match &self.frequencies {
            Frequencies::Base(base) => (Some(*base), None),
            Frequencies::Periods(periods) => (None, Some(periods)),
        };
        mlx_rs::fast::rope(x, self.dims, self.traditional, base, self.scale, offset, periods)
    }
}
