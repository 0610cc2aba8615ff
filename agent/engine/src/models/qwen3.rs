//! `model_type` "qwen3": Qwen 3. Queries and keys are normalized per head.

use super::Args;
use super::attention::AttentionArgs;
use super::common::{Common, Defaults};
use super::fields::Fields;
use super::mlp::{FeedForwardArgs, MlpArgs};
use crate::config::ConfigError;

pub(super) fn parse(config: Fields<'_>) -> Result<Args, ConfigError> {
    let defaults = Defaults { max_context: 32_768, tied: false, theta: 1_000_000.0 };
    let common = Common::parse(config, &defaults)?;
    let plain = AttentionArgs::parse(config, &common)?;
    let attention = AttentionArgs { head_norms: true, ..plain };
    let mlp = MlpArgs { inner: config.size("intermediate_size")?, bias: false };
    Ok(Args::grouped(common, attention, |_| FeedForwardArgs::Dense(mlp)))
}
