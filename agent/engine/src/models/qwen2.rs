//! `model_type` "qwen2": Qwen 2 and 2.5. Queries, keys and values have a bias.

use mlx_rs::error::Exception;

use super::attention::{Attention, AttentionArgs};
use super::common::{Common, Defaults};
use super::decoder::{Block, SelfAttention};
use super::fields::Fields;
use super::mlp::{FeedForward, Mlp};
use super::{Architecture, LayerModules, layer_path};
use crate::config::ConfigError;
use crate::loader::Weights;
use crate::tensor::Team;

pub(super) struct Args {
    common: Common,
    attention: AttentionArgs,
    intermediate_size: i32,
}

impl Args {
    pub(super) fn parse(config: Fields<'_>) -> Result<Self, ConfigError> {
        let defaults = Defaults { max_context: 32_768, tied: true, theta: 1_000_000.0 };
        let common = Common::parse(config, &defaults)?;
        let attention =
            AttentionArgs { input_bias: true, ..AttentionArgs::parse(config, &common)? };
        let intermediate_size = config.size("intermediate_size")?;
        Ok(Self { common, attention, intermediate_size })
    }
}

impl Architecture for Args {
    fn common(&self) -> &Common {
        &self.common
    }

    fn layer_modules(&self, out: &mut LayerModules<'_>) {
        let width = self.common.width;
        self.attention.modules(width, out);
        Mlp::modules("mlp", width, self.intermediate_size, false, out);
    }

    fn block(&self, layer: usize, weights: &mut Weights, team: &Team) -> Result<Block, Exception> {
        let (path, common) = (layer_path(layer), &self.common);
        let attention = Attention::build(&self.attention, common, &path, weights, team);
        let mlp = Mlp::build(&format!("{path}.mlp"), weights);
        let (attention, mlp) = (SelfAttention::Grouped(attention), FeedForward::Dense(mlp));
        Ok(Block::build(attention, mlp, common, &path, weights, team))
    }
}
