//! The architectures, one file per `model_type` that reads its configuration and has what is its own, and the choice
//! among them. What several have is in `decoder` (the frame), `attention`, `mlp` and `rope`.

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
mod single;

use std::ops::Range;

use mlx_rs::error::Exception;

use crate::config::{Config, ConfigError};
use crate::loader::{Home, Kind, Module, Split, Weights};
use crate::tensor::Team;
use attention::AttentionArgs;
use common::Common;
pub(crate) use decoder::Model;
use decoder::SelfAttentionArgs;
use fields::Fields;
use mlp::FeedForwardArgs;
pub use single::{NoKernels, StepPath};

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

/// The checked configuration of a model: what its layers are made of. Each architecture's file makes one.
pub(crate) struct Args {
    common: Common,
    attention: SelfAttentionArgs,
    /// Of each layer.
    feed_forward: Vec<FeedForwardArgs>,
    /// Layers behind the model's own that checkpoints may have, for predicting several tokens; not used.
    extra_layers: usize,
}

impl Args {
    pub(crate) fn parse(config: &Config) -> Result<Self, ConfigError> {
        let fields = Fields(&config.raw);
        match config.model_type.as_str() {
            "deepseek_v3" | "kimi_k2" => deepseek_v3::parse(fields),
            "llama" | "mistral" => llama::parse(fields),
            "mixtral" => mixtral::parse(fields),
            "qwen2" => qwen2::parse(fields),
            "qwen3" => qwen3::parse(fields),
            "qwen3_moe" => qwen3_moe::parse(fields),
            other => Err(ConfigError::ModelType(other.to_owned())),
        }
    }

    /// Of layers with grouped attention; `feed_forward` says what follows it in each.
    fn grouped(
        common: Common,
        attention: AttentionArgs,
        feed_forward: impl Fn(usize) -> FeedForwardArgs,
    ) -> Self {
        let feed_forward = (0..common.layers).map(feed_forward).collect();
        let attention = SelfAttentionArgs::Grouped(attention);
        Self { common, attention, feed_forward, extra_layers: 0 }
    }

    pub(crate) fn facts(&self) -> Facts {
        let common = &self.common;
        Facts {
            layers: common.layers,
            hidden_size: common.width as usize,
            vocab_size: common.vocab_size as usize,
            max_context: common.max_context,
        }
    }

    /// Every module of the whole model. `has` says whether the checkpoint has a tensor: some come in two forms.
    pub(crate) fn modules(&self, has: &dyn Fn(&str) -> bool) -> Vec<Module> {
        decoder::modules(self, has)
    }

    /// Whether a tensor that the model has no use for may be in its checkpoints.
    pub(crate) fn ignores(&self, tensor: &str) -> bool {
        // Old exports hold precomputed frequencies; some tied ones the embedding a second time.
        tensor.ends_with("self_attn.rotary_emb.inv_freq")
            || (self.common.tied && tensor.starts_with("lm_head."))
            || self.is_extra(tensor)
    }

    fn is_extra(&self, tensor: &str) -> bool {
        let layers = self.common.layers;
        let layer = tensor.strip_prefix("model.layers.").and_then(|rest| rest.split('.').next());
        let layer = layer.and_then(|number| number.parse().ok());
        layer.is_some_and(|layer: usize| (layers..layers + self.extra_layers).contains(&layer))
    }

    pub(crate) fn build(
        &self,
        part: &Part,
        team: &Team,
        weights: Weights,
    ) -> Result<Model, Exception> {
        Model::build(self, part, team, weights)
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
    fn knows_which_tensors_checkpoints_have_for_nothing() {
        let change = json!({"num_nextn_predict_layers": 2, "tie_word_embeddings": true});
        for (model_type, tensor, ignored) in [
            // Layers 0 and 1 are the model's, 2 and 3 predict further tokens.
            ("deepseek_v3", "model.layers.1.mlp.gate.weight", false),
            ("deepseek_v3", "model.layers.2.eh_proj.weight", true),
            ("deepseek_v3", "model.layers.3.mlp.experts.0.up_proj.weight", true),
            ("kimi_k2", "model.layers.4.eh_proj.weight", false),
            ("kimi_k2", "lm_head.weight", false),
            ("llama", "model.layers.2.eh_proj.weight", false),
            ("llama", "model.layers.0.self_attn.rotary_emb.inv_freq", true),
            ("llama", "lm_head.weight", true),
            ("qwen3", "lm_head.scales", true),
            ("qwen3", "lm_head_2.weight", false),
        ] {
            let args = parse(model_type, &change).unwrap();
            assert_eq!(args.ignores(tensor), ignored, "{model_type} {tensor}");
        }
    }

    #[test]
    fn experts_are_in_the_layers_that_the_configuration_names() {
        let layers = |model_type: &str, change: Value| -> Vec<bool> {
            let args = parse(model_type, &change).unwrap();
            let experts = |f: &FeedForwardArgs| matches!(f, FeedForwardArgs::Mixture(_));
            args.feed_forward.iter().map(experts).collect()
        };
        let five = |mut change: Value| {
            change["num_hidden_layers"] = json!(5);
            change
        };
        for (model_type, change, expected) in [
            ("llama", json!({}), [0, 0, 0, 0, 0]),
            ("mixtral", json!({}), [1, 1, 1, 1, 1]),
            ("qwen3_moe", json!({}), [1, 1, 1, 1, 1]),
            ("qwen3_moe", json!({"decoder_sparse_step": 2}), [0, 1, 0, 1, 0]),
            ("qwen3_moe", json!({"mlp_only_layers": [0, 3]}), [0, 1, 1, 0, 1]),
            ("deepseek_v3", json!({"first_k_dense_replace": 3}), [0, 0, 0, 1, 1]),
            (
                "deepseek_v3",
                json!({"first_k_dense_replace": 1, "moe_layer_freq": 2}),
                [0, 0, 1, 0, 1],
            ),
            ("deepseek_v3", json!({"n_routed_experts": null}), [0, 0, 0, 0, 0]),
        ] {
            let expected = expected.map(|has| has == 1);
            assert_eq!(layers(model_type, five(change.clone())), expected, "{model_type} {change}");
        }
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
