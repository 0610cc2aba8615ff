//! `model_type` "qwen3_moe": Qwen 3 with experts in all layers or some.

use mlx_rs::error::Exception;

use super::attention::{Attention, AttentionArgs};
use super::common::{Common, Defaults};
use super::decoder::{Block, SelfAttention};
use super::fields::{Fields, bad};
use super::mlp::{ExpertArgs, Experts, FeedForward, Mixture, Mlp, Routing};
use super::{Architecture, LayerModules, layer_path};
use crate::config::ConfigError;
use crate::loader::{Kind, Split, Weights};
use crate::tensor::Team;

pub(super) struct Args {
    common: Common,
    attention: AttentionArgs,
    intermediate_size: i32,
    num_experts: i32,
    num_experts_per_tok: i32,
    moe_intermediate_size: i32,
    norm_topk_prob: bool,
    decoder_sparse_step: i32,
    /// Layers without experts.
    mlp_only_layers: Vec<usize>,
}

impl Args {
    pub(super) fn parse(config: Fields<'_>) -> Result<Self, ConfigError> {
        let defaults = Defaults { max_context: 32_768, tied: false, theta: 1_000_000.0 };
        let common = Common::parse(config, &defaults)?;
        let attention =
            AttentionArgs { head_norms: true, ..AttentionArgs::parse(config, &common)? };
        let num_experts = config.parts("num_experts")?;
        let num_experts_per_tok = config.size("num_experts_per_tok")?;
        if num_experts_per_tok > num_experts {
            let reason = format!("{num_experts_per_tok} of {num_experts} experts");
            return Err(bad("num_experts_per_tok", reason));
        }
        let only = config.list("mlp_only_layers")?.iter().map(|n| n.as_u64().map(|n| n as usize));
        let only: Option<Vec<usize>> = only.collect();
        Ok(Self {
            common,
            attention,
            intermediate_size: config.size("intermediate_size")?,
            num_experts,
            num_experts_per_tok,
            moe_intermediate_size: config.size("moe_intermediate_size")?,
            norm_topk_prob: config.flag_or("norm_topk_prob", false)?,
            decoder_sparse_step: config.size_or("decoder_sparse_step", 1)?,
            mlp_only_layers: only.ok_or_else(|| bad("mlp_only_layers", "not all are layers"))?,
        })
    }

    fn has_experts(&self, layer: usize) -> bool {
        let step = self.decoder_sparse_step as usize;
        !self.mlp_only_layers.contains(&layer) && (layer + 1).is_multiple_of(step)
    }
}

impl Architecture for Args {
    fn common(&self) -> &Common {
        &self.common
    }

    fn layer_modules(&self, out: &mut LayerModules<'_>) {
        let (width, count) = (self.common.width, self.num_experts);
        self.attention.modules(width, out);
        if !self.has_experts(out.layer) {
            return Mlp::modules("mlp", width, self.intermediate_size, false, out);
        }
        let gate = Kind::Linear { input: width, output: count, bias: false };
        out.add("mlp.gate", gate, Split::Whole);
        let experts = ExpertArgs {
            count,
            inner: self.moe_intermediate_size,
            stacked: "mlp.switch_mlp",
            single: "mlp.experts",
            names: ["gate_proj", "up_proj", "down_proj"],
        };
        Experts::modules(&experts, width, out);
    }

    fn block(&self, layer: usize, weights: &mut Weights, team: &Team) -> Result<Block, Exception> {
        let (path, common) = (layer_path(layer), &self.common);
        let attention = Attention::build(&self.attention, common, &path, weights, team);
        let mlp = format!("{path}.mlp");
        let feed_forward = if self.has_experts(layer) {
            let (k, normalize) = (self.num_experts_per_tok, self.norm_topk_prob);
            let gate = weights.linear(&format!("{mlp}.gate"));
            let experts = Experts::build(&format!("{mlp}.switch_mlp"), weights)?;
            let routing = Routing::Softmax { k, normalize };
            FeedForward::Mixture(Box::new(Mixture::new(gate, routing, experts, None)))
        } else {
            FeedForward::Dense(Mlp::build(&mlp, weights))
        };
        let attention = SelfAttention::Grouped(attention);
        Ok(Block::build(attention, feed_forward, common, &path, weights, team))
    }
}
