//! `model_type` "llama": Llama 2, 3, 3.1, 3.2, 3.3; and "mistral", whose dense models are the same.

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
    mlp_bias: bool,
}

impl Args {
    pub(super) fn parse(config: Fields<'_>) -> Result<Self, ConfigError> {
        // Files without a context are older than long ones.
        let defaults = Defaults { max_context: 2048, tied: true, theta: 10_000.0 };
        let common = Common::parse(config, &defaults)?;
        let bias = config.flag_or("attention_bias", false)?;
        let attention = AttentionArgs {
            input_bias: bias,
            output_bias: bias,
            ..AttentionArgs::parse(config, &common)?
        };
        Ok(Self {
            common,
            attention,
            intermediate_size: config.size("intermediate_size")?,
            mlp_bias: config.flag_or("mlp_bias", false)?,
        })
    }
}

impl Architecture for Args {
    fn common(&self) -> &Common {
        &self.common
    }

    fn layer_modules(&self, out: &mut LayerModules<'_>) {
        let width = self.common.width;
        self.attention.modules(width, out);
        Mlp::modules("mlp", width, self.intermediate_size, self.mlp_bias, out);
    }

    fn block(&self, layer: usize, weights: &mut Weights, team: &Team) -> Result<Block, Exception> {
        let (path, common) = (layer_path(layer), &self.common);
        let attention = Attention::build(&self.attention, common, &path, weights, team);
        let mlp = Mlp::build(&format!("{path}.mlp"), weights);
        let (attention, mlp) = (SelfAttention::Grouped(attention), FeedForward::Dense(mlp));
        Ok(Block::build(attention, mlp, common, &path, weights, team))
    }
}
