//! `model_type` "qwen2": Qwen 2 and 2.5. Queries, keys and values have a bias.

use super::Args;
use super::attention::AttentionArgs;
use super::common::{Common, Defaults};
use super::fields::Fields;
use super::mlp::{FeedForwardArgs, MlpArgs};
use crate::config::ConfigError;

pub(super) fn parse(config: Fields<'_>) -> Result<Args, ConfigError> {
    let defaults = Defaults { max_context: 32_768, tied: true, theta: 1_000_000.0 };
    let common = Common::parse(config, &defaults)?;
    let plain = AttentionArgs::parse(config, &common)?;
    let attention = AttentionArgs { input_bias: true, ..plain };
    let mlp = MlpArgs { inner: config.size("intermediate_size")?, bias: false };
    Ok(Args::grouped(common, attention, |_| FeedForwardArgs::Dense(mlp)))
}
