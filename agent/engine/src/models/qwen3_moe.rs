//! `model_type` "qwen3_moe": Qwen 3 with experts in all layers or some.

use super::Args;
use super::attention::AttentionArgs;
use super::common::{Common, Defaults};
use super::fields::{Fields, bad};
use super::mlp::{FeedForwardArgs, GATED, MixtureArgs, MlpArgs, Routing, experts_per_token};
use crate::config::ConfigError;

pub(super) fn parse(config: Fields<'_>) -> Result<Args, ConfigError> {
    let defaults = Defaults { max_context: 32_768, tied: false, theta: 1_000_000.0 };
    let common = Common::parse(config, &defaults)?;
    let plain = AttentionArgs::parse(config, &common)?;
    let attention = AttentionArgs { head_norms: true, ..plain };
    let mlp = MlpArgs { inner: config.size("intermediate_size")?, bias: false };
    let count = config.parts("num_experts")?;
    let k = experts_per_token(config.size("num_experts_per_tok")?, count)?;
    let mixture = MixtureArgs {
        path: "mlp",
        names: GATED,
        count,
        inner: config.size("moe_intermediate_size")?,
        shared: None,
        routing: Routing::Softmax { k, normalize: config.flag_or("norm_topk_prob", false)? },
    };
    let only = config.list("mlp_only_layers")?.iter().map(|n| n.as_u64().map(|n| n as usize));
    let only: Option<Vec<usize>> = only.collect();
    let only = only.ok_or_else(|| bad("mlp_only_layers", "not all are layers"))?;
    let step = config.size_or("decoder_sparse_step", 1)? as usize;
    Ok(Args::grouped(common, attention, |layer| {
        if (layer + 1).is_multiple_of(step) && !only.contains(&layer) {
            FeedForwardArgs::Mixture(mixture.clone())
        } else {
            FeedForwardArgs::Dense(mlp)
        }
    }))
}
