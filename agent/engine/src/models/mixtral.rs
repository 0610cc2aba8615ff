//! `model_type` "mixtral": Mixtral 8×7B and 8×22B. Every layer has experts.

use super::Args;
use super::attention::AttentionArgs;
use super::common::{Common, Defaults};
use super::fields::{Fields, parts};
use super::mlp::{FeedForwardArgs, MixtureArgs, Routing, experts_per_token};
use crate::config::ConfigError;

pub(super) fn parse(config: Fields<'_>) -> Result<Args, ConfigError> {
    let defaults = Defaults { max_context: 32_768, tied: false, theta: 1_000_000.0 };
    let common = Common::parse(config, &defaults)?;
    let attention = AttentionArgs::parse(config, &common)?;
    let count = parts("num_local_experts", config.size_or("num_local_experts", 8)?)?;
    let k = experts_per_token(config.size_or("num_experts_per_tok", 2)?, count)?;
    let mixture = MixtureArgs {
        path: "block_sparse_moe",
        names: ["w1", "w3", "w2"],
        count,
        inner: config.size("intermediate_size")?,
        shared: None,
        routing: Routing::SoftmaxOfBest { k },
    };
    Ok(Args::grouped(common, attention, |_| FeedForwardArgs::Mixture(mixture.clone())))
}
