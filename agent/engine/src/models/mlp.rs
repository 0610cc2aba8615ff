//! What follows attention: one gated projection for all tokens, or experts of which each token is routed to some.

use mlx_rs::Array;
use mlx_rs::error::Exception;
use mlx_rs::ops::indexing::take_along_axis;
use mlx_rs::ops::{argpartition_axis, argsort_axis, softmax_axis};

use super::LayerModules;
use super::deepseek_v3;
use super::fields::bad;
use crate::config::ConfigError;
use crate::loader::{Kind, Split, Weights};
use crate::mlx::{gated, slice};
use crate::nn::{Joint, Linear, Stack};
use crate::tensor::Team;

/// From this many (token, expert) pairs on, sorting them by expert pays: each expert's weights are then read once.
const SORT_FROM: i32 = 64;

/// Names of a gated projection's matrices.
pub(super) const GATED: [&str; 3] = ["gate_proj", "up_proj", "down_proj"];
/// Of a gate: what is added to experts' scores when they are chosen.
const GATE_BIAS: &str = "e_score_correction_bias";

/// A gated projection.
#[derive(Clone, Copy, Debug)]
pub(super) struct MlpArgs {
    /// Features between its matrices.
    pub(super) inner: i32,
    pub(super) bias: bool,
}

impl MlpArgs {
    fn modules(self, name: &str, width: i32, out: &mut LayerModules<'_>) {
        let (Self { inner, bias }, what) = (self, "inner features of the MLP");
        let outward = Kind::Linear { input: width, output: inner, bias };
        let split = Split::output(inner, what);
        let (gate, up) = (format!("{name}.gate_proj"), format!("{name}.up_proj"));
        let parts = [(gate.as_str(), outward, split), (up.as_str(), outward, split)];
        out.add_joint(&format!("{name}.gate_up_proj"), &parts);
        let back = Kind::Linear { input: inner, output: width, bias };
        out.add(&format!("{name}.down_proj"), back, Split::input(inner, what));
    }
}

pub(super) struct Mlp {
    /// `gate_proj` and `up_proj`.
    gate_up_proj: Joint,
    down_proj: Linear,
}

impl Mlp {
    fn build(path: &str, weights: &mut Weights) -> Self {
        let parts = ["gate_proj", "up_proj"].map(|name| format!("{path}.{name}"));
        Self {
            gate_up_proj: weights.joint(&format!("{path}.gate_up_proj"), &parts),
            down_proj: weights.linear(&format!("{path}.down_proj")),
        }
    }

    fn inner(&self, x: &Array) -> Result<Array, Exception> {
        let [gate, up] = self.gate_up_proj.forward(x)?;
        gated(&gate, &up)
    }

    fn forward(&self, x: &Array, team: &Team) -> Result<Array, Exception> {
        self.down_proj.forward_summed(&self.inner(x)?, team)
    }

    /// This rank's part, to be summed by the caller; for projections without bias.
    fn forward_part(&self, x: &Array) -> Result<Array, Exception> {
        self.down_proj.product(&self.inner(x)?)
    }
}

/// A gate and the experts that it chooses among.
#[derive(Clone, Debug)]
pub(super) struct MixtureArgs {
    /// Of all that belongs to it, under the layer's path.
    pub(super) path: &'static str,
    /// What checkpoints that have each expert on its own call its `gate_proj`, `up_proj` and `down_proj`.
    pub(super) names: [&'static str; 3],
    pub(super) count: i32,
    /// Features between the matrices of an expert.
    pub(super) inner: i32,
    /// The same of what all tokens pass through beside their experts.
    pub(super) shared: Option<i32>,
    pub(super) routing: Routing,
}

/// `k` experts of `count`, if there are so many.
pub(super) fn experts_per_token(k: i32, count: i32) -> Result<i32, ConfigError> {
    let reason = || format!("{k} of {count} experts");
    (k <= count).then_some(k).ok_or_else(|| bad("num_experts_per_tok", reason()))
}

impl MixtureArgs {
    fn modules(&self, width: i32, out: &mut LayerModules<'_>) {
        let &Self { path, count, .. } = self;
        let gate = format!("{path}.gate");
        let kind = Kind::Linear { input: width, output: count, bias: false };
        out.add(&gate, kind, Split::Whole);
        if self.routing.is_biased() {
            out.add(&gate, Kind::Vector { name: GATE_BIAS, width: count }, Split::Whole);
        }
        self.expert_modules(width, out);
        if let Some(inner) = self.shared {
            let mlp = MlpArgs { inner, bias: false };
            mlp.modules(&format!("{path}.shared_experts"), width, out);
        }
    }

    fn expert_modules(&self, width: i32, out: &mut LayerModules<'_>) {
        let &Self { path, names, count, inner, .. } = self;
        let what = "inner features of an expert";
        let outward =
            (Kind::Stack { count, input: width, output: inner }, Split::output(inner, what));
        let back = (Kind::Stack { count, input: inner, output: width }, Split::input(inner, what));
        let parts = GATED.into_iter().zip([outward, outward, back]);
        for ((name, (kind, split)), single) in parts.zip(names) {
            let pieces: Vec<String> =
                (0..count).map(|i| format!("{path}.experts.{i}.{single}")).collect();
            out.add_stack(&format!("{path}.switch_mlp.{name}"), &pieces, kind, split);
        }
    }

    /// `layer` is the layer's path.
    fn build(&self, layer: &str, weights: &mut Weights) -> Result<Mixture, Exception> {
        let path = format!("{layer}.{}", self.path);
        let gate = format!("{path}.gate");
        Ok(Mixture {
            gate: weights.linear(&gate),
            gate_bias: self.routing.is_biased().then(|| weights.vector(&gate, GATE_BIAS)),
            routing: self.routing.clone(),
            experts: Experts::build(&format!("{path}.switch_mlp"), weights)?,
            shared: self.shared.map(|_| Mlp::build(&format!("{path}.shared_experts"), weights)),
        })
    }
}

/// Gated projections, one set per expert.
struct Experts {
    gate_proj: Stack,
    up_proj: Stack,
    down_proj: Stack,
}

impl Experts {
    fn build(path: &str, weights: &mut Weights) -> Result<Self, Exception> {
        let mut stack = |name: &str| weights.stack(&format!("{path}.{name}"));
        Ok(Self {
            gate_proj: stack("gate_proj")?,
            up_proj: stack("up_proj")?,
            down_proj: stack("down_proj")?,
        })
    }

    /// `x` `[1, positions, width]` and the experts of each position `[1, positions, k]` to `[1, positions, k, width]`.
    fn forward(&self, x: &Array, experts: &Array) -> Result<Array, Exception> {
        let (positions, width, k) = (x.dim(1), x.dim(2), experts.dim(2));
        let pairs = positions * k;
        if pairs < SORT_FROM {
            let x = x.reshape(&[1, positions, 1, 1, width])?;
            return self.gather(&x, experts, false)?.reshape(&[1, positions, k, width]);
        }
        let experts = experts.reshape(&[pairs])?;
        let order = argsort_axis(&experts, 0)?;
        let position = order.floor_divide(Array::from_slice(&[k as u32], &[1]))?;
        let x = x.reshape(&[positions, 1, width])?.take_axis(&position, 0)?;
        let output = self.gather(&x, &experts.take_axis(&order, 0)?, true)?;
        let output = output.take_axis(argsort_axis(&order, 0)?, 0)?;
        output.reshape(&[1, positions, k, width])
    }

    fn gather(&self, x: &Array, experts: &Array, sorted: bool) -> Result<Array, Exception> {
        let gate = self.gate_proj.gather(x, experts, sorted)?;
        let up = self.up_proj.gather(x, experts, sorted)?;
        self.down_proj.gather(&gated(&gate, &up)?, experts, sorted)
    }
}

/// How the experts of a token and their weights follow from the gate's scores `[1, positions, experts]`.
#[derive(Clone, Debug)]
pub(super) enum Routing {
    /// The likeliest `k` by softmax over all, their weights scaled to sum 1 if `normalize`.
    Softmax {
        k: i32,
        normalize: bool,
    },
    /// The `k` highest, softmax over these.
    SoftmaxOfBest {
        k: i32,
    },
    Grouped(deepseek_v3::Routing),
}

impl Routing {
    /// Whether gates have a bias beside their matrix.
    fn is_biased(&self) -> bool {
        match self {
            Self::Softmax { .. } | Self::SoftmaxOfBest { .. } => false,
            Self::Grouped(_) => true,
        }
    }

    /// Experts and weights, `[1, positions, k]` each; `bias` `[experts]` is that of the gate. The experts are the same on
    /// all ranks of `team`.
    fn route(
        &self,
        scores: &Array,
        bias: Option<&Array>,
        team: &Team,
    ) -> Result<(Array, Array), Exception> {
        match self {
            Self::Softmax { k, normalize } => {
                let scores = softmax_axis(scores, -1, true)?;
                // From above, not by negated scores: of two equal ones the other would be taken than elsewhere.
                let (positions, count) = (scores.dim(1), scores.dim(2));
                let order = argpartition_axis(&scores, count - k, -1)?;
                let experts = slice(&order, &[0, 0, count - k], &[1, positions, count])?;
                let experts = team.agreed(experts)?;
                let weights = take_along_axis(&scores, &experts, -1)?;
                if !normalize {
                    return Ok((experts, weights));
                }
                let sum = weights.sum_axis(-1, true)?;
                Ok((experts, weights.divide(sum)?))
            }
            Self::SoftmaxOfBest { k } => {
                let experts = team.agreed(best(scores, *k)?)?;
                let weights = take_along_axis(scores, &experts, -1)?;
                Ok((experts, softmax_axis(weights, -1, true)?))
            }
            Self::Grouped(routing) => routing.route(scores, bias, team),
        }
    }
}

/// Places of the `k` highest of `[1, positions, n]` along the last axis, in no order.
pub(super) fn best(scores: &Array, k: i32) -> Result<Array, Exception> {
    let order = argpartition_axis(scores.negative()?, k - 1, -1)?;
    slice(&order, &[0, 0, 0], &[1, scores.dim(1), k])
}

pub(super) struct Mixture {
    gate: Linear,
    gate_bias: Option<Array>,
    routing: Routing,
    experts: Experts,
    shared: Option<Mlp>,
}

impl Mixture {
    fn forward(&self, x: &Array, team: &Team) -> Result<Array, Exception> {
        let scores = self.gate.forward(x)?;
        let (experts, weights) = self.routing.route(&scores, self.gate_bias.as_ref(), team)?;
        let outputs = self.experts.forward(x, &experts)?;
        let shape = [1, weights.dim(1), weights.dim(2), 1];
        let output = outputs.multiply(weights.reshape(&shape)?)?.sum_axis(-2, false)?;
        let mut output = output.as_dtype(outputs.dtype())?;
        if let Some(shared) = &self.shared {
            output = output.add(shared.forward_part(x)?)?;
        }
        team.sum(&output)
    }
}

#[derive(Clone, Debug)]
pub(super) enum FeedForwardArgs {
    Dense(MlpArgs),
    Mixture(MixtureArgs),
}

impl FeedForwardArgs {
    pub(super) fn modules(&self, width: i32, out: &mut LayerModules<'_>) {
        match self {
            Self::Dense(mlp) => mlp.modules("mlp", width, out),
            Self::Mixture(mixture) => mixture.modules(width, out),
        }
    }

    /// `layer` is the layer's path.
    pub(super) fn build(
        &self,
        layer: &str,
        weights: &mut Weights,
    ) -> Result<FeedForward, Exception> {
        match self {
            Self::Dense(_) => Ok(FeedForward::Dense(Mlp::build(&format!("{layer}.mlp"), weights))),
            Self::Mixture(mixture) => {
                mixture.build(layer, weights).map(Box::new).map(FeedForward::Mixture)
            }
        }
    }
}

pub(super) enum FeedForward {
    Dense(Mlp),
    Mixture(Box<Mixture>),
}

impl FeedForward {
    /// The gate's and up's projection and the one behind them, where all positions have the same.
    pub(super) fn dense(&self) -> Option<(&Joint, &Linear)> {
        match self {
            Self::Dense(mlp) => Some((&mlp.gate_up_proj, &mlp.down_proj)),
            Self::Mixture(_) => None,
        }
    }

    pub(super) fn forward(&self, x: &Array, team: &Team) -> Result<Array, Exception> {
        match self {
            Self::Dense(mlp) => mlp.forward(x, team),
            Self::Mixture(mixture) => mixture.forward(x, team),
        }
    }
}
