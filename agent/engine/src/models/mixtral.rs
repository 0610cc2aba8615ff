//! `model_type` "mixtral": Mixtral 8×7B and 8×22B. Every layer has experts.

use mlx_rs::error::Exception;

use super::attention::{Attention, AttentionArgs};
use super::common::{Common, Defaults};
use super::decoder::{Block, SelfAttention};
use super::fields::{Fields, bad, parts};
use super::mlp::{ExpertArgs, Experts, FeedForward, Mixture, Routing};
use super::{Architecture, LayerModules, layer_path};
use crate::config::ConfigError;
use crate::loader::{Kind, Split, Weights};
use crate::tensor::Team;

pub(super) struct Args {
    common: Common,
    attention: AttentionArgs,
    intermediate_size: i32,
    num_local_experts: i32,
    num_experts_per_tok: i32,
}

impl Args {
    pub(super) fn parse(config: Fields<'_>) -> Result<Self, ConfigError> {
        let defaults = Defaults { max_context: 32_768, tied: false, theta: 1_000_000.0 };
        let common = Common::parse(config, &defaults)?;
        let attention = AttentionArgs::parse(config, &common)?;
        let num_local_experts =
            parts("num_local_experts", config.size_or("num_local_experts", 8)?)?;
        let num_experts_per_tok = config.size_or("num_experts_per_tok", 2)?;
        if num_experts_per_tok > num_local_experts {
            let reason = format!("{num_experts_per_tok} of {num_local_experts} experts");
            return Err(bad("num_experts_per_tok", reason));
        }
        let intermediate_size = config.size("intermediate_size")?;
        Ok(Self { common, attention, intermediate_size, num_local_experts, num_experts_per_tok })
    }
}

impl Architecture for Args {
    fn common(&self) -> &Common {
        &self.common
    }

    fn layer_modules(&self, out: &mut LayerModules<'_>) {
        let (width, count) = (self.common.width, self.num_local_experts);
        self.attention.modules(width, out);
        let gate = Kind::Linear { input: width, output: count, bias: false };
        out.add("block_sparse_moe.gate", gate, Split::Whole);
        let experts = ExpertArgs {
            count,
            inner: self.intermediate_size,
            stacked: "block_sparse_moe.switch_mlp",
            single: "block_sparse_moe.experts",
            names: ["w1", "w3", "w2"],
        };
        Experts::modules(&experts, width, out);
    }

    fn block(&self, layer: usize, weights: &mut Weights, team: &Team) -> Result<Block, Exception> {
        let (path, common) = (layer_path(layer), &self.common);
        let attention = Attention::build(&self.attention, common, &path, weights, team);
        let gate = weights.linear(&format!("{path}.block_sparse_moe.gate"));
        let experts = Experts::build(&format!("{path}.block_sparse_moe.switch_mlp"), weights)?;
        let routing = Routing::SoftmaxOfBest { k: self.num_experts_per_tok };
        let mixture = FeedForward::Mixture(Box::new(Mixture::new(gate, routing, experts, None)));
        Ok(Block::build(SelfAttention::Grouped(attention), mixture, common, &path, weights, team))
    }
}
