//! Attention whose keys and values are shared by groups of query heads; all architectures but DeepSeek's have it.

use mlx_rs::Array;
use mlx_rs::error::Exception;
use mlx_rs::fast::{rms_norm, scaled_dot_product_attention};

use super::LayerModules;
use super::common::Common;
use crate::batch::LayerCache;
use crate::config::ConfigError;
use crate::loader::{Kind, Split, Weights};
use crate::nn::{Linear, Rope, last};
use crate::tensor::Team;

use super::fields::{Fields, bad};

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
        let head_dim = config.size_or("head_dim", common.width / heads)?;
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
        for (name, heads, split) in
            [("q_proj", heads, queries), ("k_proj", kv_heads, keys), ("v_proj", kv_heads, keys)]
        {
            let output = heads * head_dim;
            let kind = Kind::Linear { input: width, output, bias: self.input_bias };
            out.add(&format!("self_attn.{name}"), kind, split);
        }
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
    q_proj: Linear,
    k_proj: Linear,
    v_proj: Linear,
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

impl Attention {
    pub(super) fn build(
        args: &AttentionArgs,
        common: &Common,
        path: &str,
        weights: &mut Weights,
        team: &Team,
    ) -> Self {
        let path = |name: &str| format!("{path}.self_attn.{name}");
        let own = |units, repeat| {
            let share = team.share().of(units, repeat);
            share.map(|s| s.end - s.start).expect("the loader has checked the split")
        };
        let norms =
            args.head_norms.then(|| (weights.norm(&path("q_norm")), weights.norm(&path("k_norm"))));
        Self {
            q_proj: weights.linear(&path("q_proj")),
            k_proj: weights.linear(&path("k_proj")),
            v_proj: weights.linear(&path("v_proj")),
            o_proj: weights.linear(&path("o_proj")),
            norms,
            heads: own(args.heads, false),
            kv_heads: own(args.kv_heads, true),
            head_dim: args.head_dim,
            rope: common.rope.build(args.head_dim, args.rope_traditional),
            eps: common.eps,
            team: team.clone(),
        }
    }

    /// `x` `[1, positions, width]` to outputs of the last `wanted` positions; keys and values are kept of all. Where
    /// several sequences are fed, each has one of the positions.
    pub(super) fn forward(
        &self,
        x: &Array,
        wanted: i32,
        cache: &mut LayerCache<'_>,
    ) -> Result<Array, Exception> {
        let rows = cache.rows();
        let split = |projected: Array, heads: i32, norm: Option<&Array>| {
            let shape = [rows, projected.dim(1) / rows, heads, self.head_dim];
            let mut projected = projected.reshape(&shape)?;
            if let Some(norm) = norm {
                projected = rms_norm(&projected, Some(norm), self.eps)?;
            }
            projected.transpose_axes(&[0, 2, 1, 3])
        };
        let (q_norm, k_norm) = self.norms.as_ref().map(|(q, k)| (q, k)).unzip();
        let queries = split(self.q_proj.forward(&last(x, wanted)?)?, self.heads, q_norm)?;
        let keys = split(self.k_proj.forward(x)?, self.kv_heads, k_norm)?;
        let values = split(self.v_proj.forward(x)?, self.kv_heads, None)?;

        let queries = self.rope.forward(&queries, &cache.offset(x.dim(1) - wanted))?;
        let keys = self.rope.forward(&keys, &cache.offset(0))?;

        let scale = (self.head_dim as f32).powf(-0.5);
        let output = cache.each([queries, keys, values], |[queries, keys, values], part| {
            let (keys, values) = part.extend(&keys, &values)?;
            let mask = part.mask(queries.dim(2));
            scaled_dot_product_attention(&queries, &keys, &values, scale, mask, None)
        })?;
        let output = output.transpose_axes(&[0, 2, 1, 3])?.reshape(&[1, wanted, -1])?;
        self.o_proj.forward_summed(&output, &self.team)
    }
}
