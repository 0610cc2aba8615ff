//! `model_type` "llama": Llama 2, 3, 3.1, 3.2, 3.3; and "mistral", whose dense models are the same.

use super::Args;
use super::attention::AttentionArgs;
use super::common::{Common, Defaults};
use super::fields::Fields;
use super::mlp::{FeedForwardArgs, MlpArgs};
use crate::config::ConfigError;

pub(super) fn parse(config: Fields<'_>) -> Result<Args, ConfigError> {
    // Files without a context are older than long ones.
    let defaults = Defaults { max_context: 2048, tied: true, theta: 10_000.0 };
    let common = Common::parse(config, &defaults)?;
    let bias = config.flag_or("attention_bias", false)?;
    let plain = AttentionArgs::parse(config, &common)?;
    let attention = AttentionArgs { input_bias: bias, output_bias: bias, ..plain };
    let bias = config.flag_or("mlp_bias", false)?;
    let mlp = MlpArgs { inner: config.size("intermediate_size")?, bias };
    Ok(Args::grouped(common, attention, |_| FeedForwardArgs::Dense(mlp)))
}
