//! What the configurations of all architectures have.

use super::fields::{Fields, bad};
use super::rope::RopeArgs;
use crate::config::ConfigError;

#[derive(Clone, Debug)]
pub(super) struct Common {
    pub(super) layers: usize,
    /// Of hidden states.
    pub(super) width: i32,
    pub(super) vocab_size: i32,
    pub(super) max_context: usize,
    pub(super) eps: f32,
    /// The embedding serves as output projection.
    pub(super) tied: bool,
    pub(super) rope: RopeArgs,
}

/// What published files of an architecture rely on where they leave a field out.
pub(super) struct Defaults {
    pub(super) max_context: i32,
    pub(super) tied: bool,
    pub(super) theta: f32,
}

impl Common {
    pub(super) fn parse(config: Fields<'_>, defaults: &Defaults) -> Result<Self, ConfigError> {
        let other = config.list("layer_types")?.iter().find(|t| *t != "full_attention");
        if let Some(other) = other {
            return Err(bad("layer_types", format!("{other} is not supported")));
        }
        Ok(Self {
            layers: config.parts("num_hidden_layers")? as usize,
            width: config.size("hidden_size")?,
            vocab_size: config.size("vocab_size")?,
            max_context: config.size_or("max_position_embeddings", defaults.max_context)? as usize,
            eps: config.number("rms_norm_eps")?,
            tied: config.flag_or("tie_word_embeddings", defaults.tied)?,
            rope: RopeArgs::parse(config, defaults.theta)?,
        })
    }
}
