//! A layer's work for one position of a single sequence, with as few kernels as can be: on fast GPUs such steps are
//! bound by what each costs the host. Owns which projections have a kernel, the order of all, and the words for why
//! there are none; the weights are those of the layer, and caches come from outside.

use std::fmt;
use std::rc::Rc;

use mlx_rs::error::Exception;
use mlx_rs::transforms::eval;
use mlx_rs::{Array, Dtype};

use super::attention::SingleAttention;
use crate::mlx::kernels::{self, Attend, Product, Products};
use crate::mlx::{Shapes, Traced, add, gated, reshape, rms_norm};
use crate::nn::{Joint, Linear};

/// How one position of a single sequence, as a request that is decoded alone feeds it, goes through a rank's layers.
#[derive(Clone, Debug, PartialEq)]
pub enum StepPath {
    /// By kernels of our own in so many layers; by MLX's operations in the others, if there are any.
    Kernels { layers: usize },
    /// By MLX's operations, as everything else.
    Operations(NoKernels),
}

/// Why a model is run without kernels of our own.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum NoKernels {
    #[error("MLX computes on no NVIDIA GPU here")]
    NoGpu,
    #[error("they are not made for {0}")]
    NotFor(&'static str),
    /// Numbers are of hidden states behind the first layer.
    #[error(
        "on this GPU they are off by {off:e} behind the first layer, where the largest number is {size:e} and the layer \
         changes it by up to {change:e}"
    )]
    Differ { off: f32, size: f32, change: f32 },
    #[error("they fail on this machine: {0}")]
    Fail(String),
}

impl StepPath {
    /// Why kernels that are made for this model and this kind of machine are not used.
    pub fn fallback(&self) -> Option<&NoKernels> {
        match self {
            Self::Operations(reason @ (NoKernels::Differ { .. } | NoKernels::Fail(_))) => {
                Some(reason)
            }
            Self::Operations(NoKernels::NoGpu | NoKernels::NotFor(_)) | Self::Kernels { .. } => {
                None
            }
        }
    }
}

impl fmt::Display for StepPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Kernels { layers } => write!(f, "own kernels in {layers} layers"),
            Self::Operations(reason) => write!(f, "no kernels of our own: {reason}"),
        }
    }
}

impl From<Exception> for NoKernels {
    fn from(error: Exception) -> Self {
        Self::Fail(crate::mlx::reason(error.what()).to_owned())
    }
}

/// The parts of a layer. Its attention is what [`Attend`] does.
pub(super) struct Parts<'a> {
    pub(super) input_norm: &'a Array,
    pub(super) attention: SingleAttention<'a>,
    pub(super) post_norm: &'a Array,
    /// Gate and up.
    pub(super) gate_up_proj: &'a Joint,
    pub(super) down_proj: &'a Linear,
    pub(super) eps: f32,
}

/// How the layers of a model make their steps.
pub(super) struct Steps(Rc<Products>);

impl Steps {
    /// `eps` is that of the norms.
    pub(super) fn new(eps: f32) -> Result<Self, NoKernels> {
        match kernels::can_run() {
            true => Ok(Self(Rc::new(Products::new(eps)?))),
            false => Err(NoKernels::NoGpu),
        }
    }

    /// The layer's step: a function of hidden states `[1, 1, width]`, their position `[1]` (int32)
    /// and the buffers of keys and values, as [`Attend::run`] takes them, to hidden states.
    pub(super) fn layer(&self, parts: Parts<'_>) -> Result<Traced, NoKernels> {
        let dtype = parts.input_norm.dtype();
        let SingleAttention { qkv_proj, heads, periods, o_proj } = parts.attention;
        let attend = Attend::new(heads, periods, dtype)?;
        let attend = attend.ok_or(NoKernels::NotFor("heads of this size, number or type"))?;
        let step = Step {
            input_norm: parts.input_norm.clone(),
            qkv_proj: Projection::new(qkv_proj, dtype),
            attend,
            o_proj: Projection::new(o_proj, dtype),
            post_norm: parts.post_norm.clone(),
            gate_up_proj: Gated::new(parts.gate_up_proj, parts.post_norm)?,
            down_proj: Projection::new(parts.down_proj, dtype),
            eps: parts.eps,
            products: self.0.clone(),
        };
        // What is still to be computed would be part of every step.
        eval(step.constants())?;
        let traced = Traced::new(Shapes::Same, move |inputs| step.run(inputs));
        traced.ok_or_else(|| NoKernels::Fail("MLX traces no functions".to_owned()))
    }
}

/// A matrix `[rows, columns]` that [`Products`] take as it is.
fn kernel_weight(linear: &Linear, dtype: Dtype) -> Option<Array> {
    linear.plain().filter(|weight| weight.dtype() == dtype && Products::take(weight))
}

enum Projection {
    Kernel(Array),
    Operations(Linear),
}

impl Projection {
    fn new(linear: &Linear, dtype: Dtype) -> Self {
        match kernel_weight(linear, dtype) {
            Some(weight) => Self::Kernel(weight),
            None => Self::Operations(linear.clone()),
        }
    }

    fn kernel(&self) -> Option<&Array> {
        match self {
            Self::Kernel(weight) => Some(weight),
            Self::Operations(_) => None,
        }
    }
}

enum Gated {
    /// The norm is `[1, width]`.
    Kernel {
        norm: Array,
        weight: Array,
    },
    Operations(Joint),
}

impl Gated {
    fn new(joint: &Joint, norm: &Array) -> Result<Self, Exception> {
        let weight = joint.whole().and_then(|linear| kernel_weight(linear, norm.dtype()));
        Ok(match weight {
            Some(weight) => Self::Kernel { norm: reshape(norm, &[1, norm.dim(0)])?, weight },
            None => Self::Operations(joint.clone()),
        })
    }
}

struct Step {
    input_norm: Array,
    qkv_proj: Projection,
    attend: Attend,
    o_proj: Projection,
    post_norm: Array,
    gate_up_proj: Gated,
    down_proj: Projection,
    eps: f32,
    products: Rc<Products>,
}

impl Step {
    fn constants(&self) -> impl Iterator<Item = &Array> {
        let gate_up = match &self.gate_up_proj {
            Gated::Kernel { norm, weight } => vec![norm, weight],
            Gated::Operations(_) => Vec::new(),
        };
        let projections = [&self.qkv_proj, &self.o_proj, &self.down_proj];
        projections
            .into_iter()
            .filter_map(Projection::kernel)
            .chain(gate_up)
            .chain(self.attend.constants())
    }

    fn run(&self, inputs: &[Array]) -> Result<Array, Exception> {
        let [x, position, keys, values] = inputs else {
            return Err(Exception::custom(format!("a step of {} inputs", inputs.len())));
        };
        let projected = match &self.qkv_proj {
            Projection::Kernel(weight) => {
                self.products.run(Product::Plain, [x, &self.input_norm, weight])?
            }
            Projection::Operations(linear) => {
                linear.forward(&rms_norm(x, Some(&self.input_norm), self.eps)?)?
            }
        };
        let attended = self.attend.run(&projected, [keys, values], position)?;
        let x = self.onto(x, &attended, &self.o_proj)?;
        let inner = match &self.gate_up_proj {
            Gated::Kernel { norm, weight } => {
                self.products.run(Product::Gated, [&x, norm, weight])?
            }
            Gated::Operations(joint) => {
                let normed = rms_norm(&x, Some(&self.post_norm), self.eps)?;
                let [gate, up] = joint.forward(&normed)?;
                gated(&gate, &up)?
            }
        };
        self.onto(&x, &inner, &self.down_proj)
    }

    /// `x` plus the projection of `inner`.
    fn onto(&self, x: &Array, inner: &Array, projection: &Projection) -> Result<Array, Exception> {
        match projection {
            Projection::Kernel(weight) => self.products.run(Product::Onto, [inner, x, weight]),
            Projection::Operations(linear) => add(x, &linear.forward(inner)?),
        }
    }
}
