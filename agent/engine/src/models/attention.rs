//! Attention whose keys and values are shared by groups of query heads; all architectures but DeepSeek's have it.

use mlx_rs::Array;
use mlx_rs::error::Exception;

use super::LayerModules;
use super::common::Common;
use crate::batch::LayerCache;
use crate::config::ConfigError;
use crate::loader::{Kind, Split, Weights};
use crate::mlx::kernels::Heads;
use crate::mlx::{attend, reshape, rms_norm, slice};
use crate::nn::{Joint, Linear, Rope};
use crate::tensor::Team;

use super::fields::{Fields, bad, product};

/// What attention needs to know of a configuration.
#[derive(Clone, Debug)]
pub(super) struct AttentionArgs {
    pub(super) heads: i32,
    pub(super) kv_heads: i32,
    pub(super) head_dim: i32,
    /// Of queries, keys and values.
    pub(super) input_bias: bool,
    pub(super) output_bias: bool,
    /// Whether queries and keys are normalized per head.
    pub(super) head_norms: bool,
    pub(super) rope_traditional: bool,
}

impl AttentionArgs {
    /// Without biases and norms.
    pub(super) fn parse(config: Fields<'_>, common: &Common) -> Result<Self, ConfigError> {
        let heads = config.size("num_attention_heads")?;
        let kv_heads = config.size_or("num_key_value_heads", heads)?;
        if heads % kv_heads != 0 {
            return Err(bad("num_key_value_heads", format!("{kv_heads} does not divide {heads}")));
        }
        // More heads than features leave none for each.
        let head_dim = config.size_or("head_dim", (common.width / heads).max(1))?;
        product("head_dim", [heads, head_dim])?;
        let rope_traditional = config.flag_or("rope_traditional", false)?;
        Ok(Self {
            heads,
            kv_heads,
            head_dim,
            input_bias: false,
            output_bias: false,
            head_norms: false,
            rope_traditional,
        })
    }

    pub(super) fn modules(&self, width: i32, out: &mut LayerModules<'_>) {
        let Self { heads, kv_heads, head_dim, .. } = *self;
        let queries = Split::output(heads, "attention heads");
        let keys = Split::Output { units: kv_heads, what: "key and value heads", repeat: true };
        let linear =
            |heads| Kind::Linear { input: width, output: heads * head_dim, bias: self.input_bias };
        let parts = [
            ("self_attn.q_proj", linear(heads), queries),
            ("self_attn.k_proj", linear(kv_heads), keys),
            ("self_attn.v_proj", linear(kv_heads), keys),
        ];
        out.add_joint("self_attn.qkv_proj", &parts);
        let kind = Kind::Linear { input: heads * head_dim, output: width, bias: self.output_bias };
        out.add("self_attn.o_proj", kind, Split::input(heads, "attention heads"));
        if self.head_norms {
            for name in ["self_attn.q_norm", "self_attn.k_norm"] {
                out.add(name, Kind::Norm { width: head_dim }, Split::Whole);
            }
        }
    }
}

pub(super) struct Attention {
    /// `q_proj`, `k_proj` and `v_proj`.
    qkv_proj: Joint,
    o_proj: Linear,
    /// `q_norm` and `k_norm`.
    norms: Option<(Array, Array)>,
    heads: i32,
    kv_heads: i32,
    head_dim: i32,
    rope: Rope,
    eps: f32,
    team: Team,
}

/// Attention whose queries and keys are not normalized, and whose projections are joint.
pub(super) struct SingleAttention<'a> {
    pub(super) qkv_proj: &'a Linear,
    pub(super) heads: Heads,
    /// Of the rotation, `[dim / 2]`, float32.
    pub(super) periods: Array,
    pub(super) o_proj: &'a Linear,
}

impl Attention {
    pub(super) fn build(
        args: &AttentionArgs,
        common: &Common,
        path: &str,
        weights: &mut Weights,
        team: &Team,
    ) -> Self {
        let path = |name: &str| format!("{path}.self_attn.{name}");
        let norms =
            args.head_norms.then(|| (weights.norm(&path("q_norm")), weights.norm(&path("k_norm"))));
        Self {
            qkv_proj: weights.joint(&path("qkv_proj"), &["q_proj", "k_proj", "v_proj"].map(path)),
            o_proj: weights.linear(&path("o_proj")),
            norms,
            heads: team.own(args.heads, false),
            kv_heads: team.own(args.kv_heads, true),
            head_dim: args.head_dim,
            rope: common.rope.build(args.head_dim, args.rope_traditional),
            eps: common.eps,
            team: team.clone(),
        }
    }

    /// The projections and what lies between them, if that is what one kernel does; else what it does not do.
    pub(super) fn single(&self) -> Result<SingleAttention<'_>, &'static str> {
        let Rope { dims, traditional, scale, magnitude, .. } = self.rope;
        #[expect(
            clippy::float_cmp,
            reason = "1 is set, not computed, where nothing is to be scaled"
        )]
        let is_plain = magnitude == 1.0 && dims == self.head_dim;
        if self.norms.is_some() {
            return Err("norms per head");
        }
        if !is_plain {
            return Err("rotations that scale, or turn a part of a head");
        }
        let heads = Heads {
            count: self.heads,
            kv_count: self.kv_heads,
            dim: self.head_dim,
            pairs: traditional,
            turns: scale,
            scale: (self.head_dim as f32).powf(-0.5),
        };
        let qkv_proj = self.qkv_proj.whole().ok_or("queries, keys and values of several types")?;
        Ok(SingleAttention { qkv_proj, heads, periods: self.rope.periods(), o_proj: &self.o_proj })
    }

    /// `x` `[1, positions, width]` to outputs of the last `wanted` positions; keys and values are kept of all. Where
    /// several sequences are fed, each has one of the positions.
    pub(super) fn forward(
        &self,
        x: &Array,
        wanted: i32,
        cache: &mut LayerCache<'_>,
    ) -> Result<Array, Exception> {
        // Where several sequences are fed, `[rows, 1, width]`.
        let rows = cache.rows();
        let by_row = match rows {
            1 => None,
            _ => Some(x.reshape(&[rows, x.dim(1) / rows, x.dim(2)])?),
        };
        let inputs = self.project(by_row.as_ref().unwrap_or(x), wanted / rows, cache)?;
        let scale = (self.head_dim as f32).powf(-0.5);
        let output = cache.each(inputs, |[queries, keys, values], part| {
            let (keys, values) = part.extend(&keys, &values)?;
            let mask = part.mask(queries.dim(2));
            attend(&queries, &keys, &values, scale, mask.as_ref())
        })?;
        let mut output = self.join_heads(&output)?;
        if rows > 1 {
            output = output.reshape(&[1, wanted, -1])?;
        }
        self.o_proj.forward_summed(&output, &self.team)
    }

    /// Rotated queries of the last `wanted` positions, rotated keys and values of all: `[rows, heads, positions,
    /// head_dim]` each.
    fn project(
        &self,
        x: &Array,
        wanted: i32,
        cache: &LayerCache<'_>,
    ) -> Result<[Array; 3], Exception> {
        let positions = x.dim(1);
        let (heads, both) = (self.heads, self.heads + self.kv_heads);
        if let (Joint::One { linear, .. }, None) = (&self.qkv_proj, &self.norms)
            && wanted == positions
        {
            let all = self.split_heads(&linear.forward(x)?, both + self.kv_heads)?;
            // Rotating a few values in vain costs less than leaving them out.
            let rotated = match positions {
                1 => self.rope.forward(&all, &cache.offset(0))?,
                _ => self.rope.forward(&heads_of(&all, 0, both)?, &cache.offset(0))?,
            };
            return Ok([
                heads_of(&rotated, 0, heads)?,
                heads_of(&rotated, heads, both)?,
                heads_of(&all, both, both + self.kv_heads)?,
            ]);
        }
        let [queries, keys, values] = self.qkv_proj.forward_last(x, wanted)?;
        let mut queries = self.split_heads(&queries, heads)?;
        let mut keys = self.split_heads(&keys, self.kv_heads)?;
        if let Some((q_norm, k_norm)) = &self.norms {
            queries = rms_norm(&queries, Some(q_norm), self.eps)?;
            keys = rms_norm(&keys, Some(k_norm), self.eps)?;
        }
        let queries = self.rope.forward(&queries, &cache.offset(positions - wanted))?;
        let keys = self.rope.forward(&keys, &cache.offset(0))?;
        Ok([queries, keys, self.split_heads(&values, self.kv_heads)?])
    }

    /// `[batch, positions, heads · head_dim]` to `[batch, heads, positions, head_dim]`.
    fn split_heads(&self, x: &Array, heads: i32) -> Result<Array, Exception> {
        let (batch, positions) = (x.dim(0), x.dim(1));
        if positions == 1 {
            return reshape(x, &[batch, heads, 1, self.head_dim]);
        }
        x.reshape(&[batch, positions, heads, self.head_dim])?.transpose_axes(&[0, 2, 1, 3])
    }

    /// The other way.
    fn join_heads(&self, x: &Array) -> Result<Array, Exception> {
        let (batch, heads, positions) = (x.dim(0), x.dim(1), x.dim(2));
        let shape = [batch, positions, heads * self.head_dim];
        if positions == 1 {
            return reshape(x, &shape);
        }
        x.transpose_axes(&[0, 2, 1, 3])?.reshape(&shape)
    }
}

/// `start..end` of the heads of `[batch, heads, positions, head_dim]`.
fn heads_of(x: &Array, start: i32, end: i32) -> Result<Array, Exception> {
    slice(x, &[0, start, 0, 0], &[x.dim(0), end, x.dim(2), x.dim(3)])
}
