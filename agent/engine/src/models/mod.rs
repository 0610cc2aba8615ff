//! The architectures, one file each, and the choice among them by `model_type`.

mod llama;

use std::ops::Range;

use mlx_rs::Array;
use mlx_rs::error::Exception;

use crate::cache::KvCache;
use crate::config::{Config, ConfigError};
use crate::loader::{Home, Module, Weights};

/// Values of `model_type` that can be run.
pub(crate) const SUPPORTED: &[&str] = &["llama"];

/// The part of a model that one rank of a pipeline holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Part {
    pub(crate) layers: Range<usize>,
    pub(crate) first: bool,
    pub(crate) last: bool,
}

impl Part {
    pub(crate) fn owns(&self, home: Home) -> bool {
        match home {
            Home::First => self.first,
            Home::Layer(layer) => self.layers.contains(&layer),
            Home::Last => self.last,
            Home::Ends => self.first || self.last,
        }
    }
}

/// What the engine needs to know of any architecture.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Facts {
    pub(crate) layers: usize,
    pub(crate) hidden_size: usize,
    pub(crate) vocab_size: usize,
    pub(crate) max_context: usize,
}

/// The checked configuration of an architecture.
pub(crate) enum Args {
    Llama(llama::Args),
}

impl Args {
    pub(crate) fn parse(config: &Config) -> Result<Self, ConfigError> {
        match config.model_type.as_str() {
            "llama" => llama::Args::parse(&config.raw).map(Self::Llama),
            other => Err(ConfigError::ModelType(other.to_owned())),
        }
    }

    pub(crate) fn facts(&self) -> Facts {
        match self {
            Self::Llama(args) => args.facts(),
        }
    }

    /// Every module of the whole model.
    pub(crate) fn modules(&self) -> Vec<Module> {
        match self {
            Self::Llama(args) => args.modules(),
        }
    }

    /// Whether a tensor that the model has no use for may be in its checkpoints.
    pub(crate) fn ignores(&self, tensor: &str) -> bool {
        match self {
            Self::Llama(args) => args.ignores(tensor),
        }
    }

    pub(crate) fn build(&self, part: &Part, weights: Weights) -> Result<Model, Exception> {
        match self {
            Self::Llama(args) => llama::Model::build(args, part, weights).map(Model::Llama),
        }
    }
}

/// One rank's part of a model. Arrays are `[1, positions, features]`.
pub(crate) enum Model {
    Llama(llama::Model),
}

impl Model {
    /// Token ids `[1, positions]` to hidden states. First rank only.
    pub(crate) fn embed(&self, tokens: &Array) -> Result<Array, Exception> {
        match self {
            Self::Llama(model) => model.embed(tokens),
        }
    }

    /// Hidden states through this rank's layers; `caches` has one entry per layer. The result is that of the last
    /// `wanted` positions.
    pub(crate) fn forward(
        &self,
        hidden: Array,
        wanted: i32,
        caches: &mut [KvCache],
    ) -> Result<Array, Exception> {
        match self {
            Self::Llama(model) => model.forward(hidden, wanted, caches),
        }
    }

    /// Hidden states to logits. Last rank only.
    pub(crate) fn head(&self, hidden: &Array) -> Result<Array, Exception> {
        match self {
            Self::Llama(model) => model.head(hidden),
        }
    }
}
