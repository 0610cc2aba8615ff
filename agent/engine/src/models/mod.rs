//! The architectures, one file per `model_type` with what is its own, and the choice among them. What several have is
//! in `decoder` (the frame), `attention`, `mlp` and `rope`.

mod attention;
mod common;
mod decoder;
mod deepseek_v3;
mod fields;
mod llama;
mod mixtral;
mod mlp;
mod qwen2;
mod qwen3;
mod qwen3_moe;
mod rope;

use std::ops::Range;

use mlx_rs::error::Exception;

use crate::config::{Config, ConfigError};
use crate::loader::{Home, Kind, Module, Split, Weights};
use crate::tensor::Team;
use common::Common;
use decoder::Block;
pub(crate) use decoder::Model;
use fields::Fields;

/// Values of `model_type` that can be run.
pub(crate) const SUPPORTED: &[&str] =
    &["deepseek_v3", "kimi_k2", "llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe"];

/// Missing matrices of one stack that are looked for.
const MISSING_MAX: usize = 8;

/// The part of a model that one rank holds. In a tensor-parallel team all ranks have all layers and the embedding,
/// and the first alone the head.
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

/// The checked configuration of an architecture, and what it makes of one layer.
trait Architecture {
    fn common(&self) -> &Common;

    /// Adds the modules of one layer but its two norms.
    fn layer_modules(&self, out: &mut LayerModules<'_>);

    /// Whether a tensor that this architecture has no use for may be in its checkpoints.
    fn ignores(&self, _tensor: &str) -> bool {
        false
    }

    fn block(&self, layer: usize, weights: &mut Weights, team: &Team) -> Result<Block, Exception>;
}

/// Takes the modules of one layer.
struct LayerModules<'a> {
    layer: usize,
    /// Whether the checkpoint has a tensor.
    has: &'a dyn Fn(&str) -> bool,
    list: &'a mut Vec<Module>,
}

fn layer_path(layer: usize) -> String {
    format!("model.layers.{layer}")
}

impl LayerModules<'_> {
    /// `name` is under the layer's path, here and below.
    fn add(&mut self, name: &str, kind: Kind, split: Split) {
        let path = format!("{}.{name}", layer_path(self.layer));
        self.list.push(Module::new(path, kind, Home::Layer(self.layer), split));
    }

    /// Modules that project the same input: their matrices are joined to `joint` where they are alike.
    fn add_joint(&mut self, joint: &str, parts: &[(&str, Kind, Split)]) {
        let joint = format!("{}.{joint}", layer_path(self.layer));
        for &(name, kind, split) in parts {
            self.add(name, kind, split);
            let module = self.list.last_mut().expect("it was just added");
            module.joint = Some(joint.clone());
        }
    }

    /// A stack, which the checkpoint may have as such or as single matrices, `pieces`.
    fn add_stack(&mut self, name: &str, pieces: &[String], kind: Kind, split: Split) {
        let single = !self.has(name) && pieces.first().is_some_and(|piece| self.has(piece));
        self.add(name, kind, split);
        if !single {
            return;
        }
        // Some that are missing are enough for the loader to name; the configuration may ask for any number.
        let mut missing = 0;
        let named = pieces.iter().filter(|piece| {
            missing += usize::from(!self.has(piece));
            missing <= MISSING_MAX || self.has(piece)
        });
        let layer = layer_path(self.layer);
        let named = named.map(|piece| format!("{layer}.{piece}")).collect();
        if let Some(module) = self.list.last_mut() {
            module.pieces = named;
        }
    }

    /// Whether the checkpoint has this module's weight.
    fn has(&self, name: &str) -> bool {
        (self.has)(&format!("{}.{name}.weight", layer_path(self.layer)))
    }
}

/// The checked configuration of a model.
pub(crate) struct Args(Box<dyn Architecture>);

impl Args {
    pub(crate) fn parse(config: &Config) -> Result<Self, ConfigError> {
        let fields = Fields(&config.raw);
        Ok(Self(match config.model_type.as_str() {
            "deepseek_v3" | "kimi_k2" => Box::new(deepseek_v3::Args::parse(fields)?),
            "llama" | "mistral" => Box::new(llama::Args::parse(fields)?),
            "mixtral" => Box::new(mixtral::Args::parse(fields)?),
            "qwen2" => Box::new(qwen2::Args::parse(fields)?),
            "qwen3" => Box::new(qwen3::Args::parse(fields)?),
            "qwen3_moe" => Box::new(qwen3_moe::Args::parse(fields)?),
            other => return Err(ConfigError::ModelType(other.to_owned())),
        }))
    }

    pub(crate) fn facts(&self) -> Facts {
        let common = self.0.common();
        Facts {
            layers: common.layers,
            hidden_size: common.width as usize,
            vocab_size: common.vocab_size as usize,
            max_context: common.max_context,
        }
    }

    /// Every module of the whole model. `has` says whether the checkpoint has a tensor: some come in two forms.
    pub(crate) fn modules(&self, has: &dyn Fn(&str) -> bool) -> Vec<Module> {
        decoder::modules(self.0.as_ref(), has)
    }

    /// Whether a tensor that the model has no use for may be in its checkpoints.
    pub(crate) fn ignores(&self, tensor: &str) -> bool {
        decoder::ignores(self.0.common(), tensor) || self.0.ignores(tensor)
    }

    pub(crate) fn build(
        &self,
        part: &Part,
        team: &Team,
        weights: Weights,
    ) -> Result<Model, Exception> {
        Model::build(self.0.as_ref(), part, team, weights)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn parse(model_type: &str, change: &Value) -> Result<Args, ConfigError> {
        let mut raw = json!({"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 128,
            "num_attention_heads": 4, "rms_norm_eps": 1e-5, "vocab_size": 100,
            "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
            "n_routed_experts": 8, "kv_lora_rank": 16, "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8, "v_head_dim": 8});
        raw.as_object_mut().unwrap().extend(change.as_object().unwrap().clone());
        let config = Config {
            model_type: model_type.to_owned(),
            eos_token_ids: Vec::new(),
            quantization: None,
            raw,
        };
        Args::parse(&config)
    }

    #[test]
    fn refuses_what_it_can_not_run_and_names_the_field() {
        for model_type in SUPPORTED {
            assert!(parse(model_type, &json!({})).is_ok(), "{model_type}");
        }
        for (model_type, change, field) in [
            ("llama", json!({"vocab_size": 0}), "vocab_size"),
            ("llama", json!({"vocab_size": i32::MAX}), "vocab_size"),
            ("llama", json!({"num_hidden_layers": 1_000_000}), "num_hidden_layers"),
            ("llama", json!({"head_dim": 1 << 23}), "head_dim"),
            ("mixtral", json!({"num_local_experts": 1_000_000}), "num_local_experts"),
            ("kimi_k2", json!({"v_head_dim": 1 << 23}), "v_head_dim"),
            ("deepseek_v3", json!({"n_shared_experts": 1 << 23}), "n_shared_experts"),
            ("llama", json!({"num_hidden_layers": 0}), "num_hidden_layers"),
            ("llama", json!({"num_key_value_heads": 3}), "num_key_value_heads"),
            ("llama", json!({"rope_scaling": {"type": "longrope"}}), "rope_scaling"),
            ("llama", json!({"rope_scaling": {"rope_type": "llama3"}}), "factor"),
            ("qwen2", json!({"layer_types": ["sliding_attention"]}), "layer_types"),
            ("llama", json!({"hidden_size": "wide"}), "hidden_size"),
            ("llama", json!({"attention_bias": 3}), "attention_bias"),
            ("mixtral", json!({"num_experts_per_tok": 9}), "num_experts_per_tok"),
            ("qwen3_moe", json!({"num_experts": null}), "num_experts"),
            ("deepseek_v3", json!({"topk_method": "greedy"}), "topk_method"),
            ("deepseek_v3", json!({"n_group": 3}), "n_group"),
            ("kimi_k2", json!({"topk_group": 2}), "topk_group"),
        ] {
            let error = parse(model_type, &change).err().map(|e| e.to_string()).unwrap_or_default();
            assert!(error.contains(field), "{model_type} {change}: {error}");
        }
    }
}
