//! Llama: Llama 2, 3, 3.1, 3.2, 3.3 and whatever has `model_type` "llama".

use std::collections::BTreeMap;

use mlx_rs::Array;
use mlx_rs::error::Exception;
use mlx_rs::fast::{ScaledDotProductAttentionMask, rms_norm, scaled_dot_product_attention};
use mlx_rs::ops::{multiply, sigmoid};
use serde::Deserialize;
use serde_json::Value;

use super::{Facts, Part};
use crate::cache::KvCache;
use crate::config::ConfigError;
use crate::loader::{Home, Kind, Module, Weights};
use crate::mlx::slice;
use crate::nn::{Embedding, Frequencies, Linear, Rope};

/// Fields of `config.json`; defaults are those that published checkpoints rely on.
#[derive(Clone, Debug, Deserialize)]
struct RawArgs {
    hidden_size: i32,
    num_hidden_layers: usize,
    intermediate_size: i32,
    num_attention_heads: i32,
    rms_norm_eps: f32,
    vocab_size: i32,
    head_dim: Option<i32>,
    max_position_embeddings: Option<usize>,
    num_key_value_heads: Option<i32>,
    #[serde(default)]
    attention_bias: bool,
    #[serde(default)]
    mlp_bias: bool,
    rope_theta: Option<f32>,
    #[serde(default)]
    rope_traditional: bool,
    rope_scaling: Option<BTreeMap<String, Value>>,
    /// Where newer files put what `rope_theta` and `rope_scaling` say.
    rope_parameters: Option<BTreeMap<String, Value>>,
    #[serde(default = "yes")]
    tie_word_embeddings: bool,
    layer_types: Option<Vec<String>>,
}

fn yes() -> bool {
    true
}

#[derive(Clone, Debug, PartialEq)]
enum Scaling {
    None,
    Linear { factor: f32 },
    Llama3 { factor: f32, low_freq_factor: f32, high_freq_factor: f32, original_context: f32 },
}

pub(crate) struct Args {
    raw: RawArgs,
    head_dim: i32,
    kv_heads: i32,
    theta: f32,
    scaling: Scaling,
}

impl Args {
    pub(super) fn parse(config: &Value) -> Result<Self, ConfigError> {
        let bad = |field, reason: String| ConfigError::Value { field, reason };
        let raw = RawArgs::deserialize(config).map_err(|e| bad("llama", e.to_string()))?;
        let sizes = [
            ("hidden_size", raw.hidden_size),
            ("intermediate_size", raw.intermediate_size),
            ("num_attention_heads", raw.num_attention_heads),
            ("vocab_size", raw.vocab_size),
            ("head_dim", raw.head_dim.unwrap_or(1)),
            ("num_key_value_heads", raw.num_key_value_heads.unwrap_or(1)),
        ];
        if let Some((field, size)) = sizes.into_iter().find(|(_, size)| *size <= 0) {
            return Err(bad(field, format!("{size} is not positive")));
        }
        if raw.num_hidden_layers == 0 {
            return Err(bad("num_hidden_layers", "0 is not positive".to_owned()));
        }
        let kv_heads = raw.num_key_value_heads.unwrap_or(raw.num_attention_heads);
        if raw.num_attention_heads % kv_heads != 0 {
            let heads = raw.num_attention_heads;
            return Err(bad("num_key_value_heads", format!("{kv_heads} does not divide {heads}")));
        }
        let other = raw.layer_types.iter().flatten().find(|t| *t != "full_attention");
        if let Some(other) = other {
            return Err(bad("layer_types", format!("'{other}' is not supported")));
        }
        let head_dim = raw.head_dim.unwrap_or(raw.hidden_size / raw.num_attention_heads);
        let parameters = raw.rope_parameters.as_ref();
        let theta = parameters.and_then(|p| p.get("rope_theta")).and_then(Value::as_f64);
        let theta = theta.map(|t| t as f32).or(raw.rope_theta).unwrap_or(10_000.0);
        let scaling = match raw.rope_scaling.as_ref().or(parameters) {
            Some(scaling) => Scaling::parse(scaling)?,
            None => Scaling::None,
        };
        Ok(Self { head_dim, kv_heads, theta, scaling, raw })
    }

    pub(super) fn facts(&self) -> Facts {
        Facts {
            layers: self.raw.num_hidden_layers,
            hidden_size: self.raw.hidden_size as usize,
            vocab_size: self.raw.vocab_size as usize,
            // Files without the field are older than long contexts.
            max_context: self.raw.max_position_embeddings.unwrap_or(2048),
        }
    }

    pub(super) fn modules(&self) -> Vec<Module> {
        let raw = &self.raw;
        let (width, inner) = (raw.hidden_size, raw.intermediate_size);
        let (heads, kv_heads) =
            (raw.num_attention_heads * self.head_dim, self.kv_heads * self.head_dim);
        let tied = raw.tie_word_embeddings;
        let mut modules = Vec::new();
        let mut add = |path: String, kind, home| modules.push(Module { path, kind, home });

        let embedding = Kind::Embedding { rows: raw.vocab_size, width };
        let home = if tied { Home::Ends } else { Home::First };
        add("model.embed_tokens".to_owned(), embedding, home);
        for layer in 0..raw.num_hidden_layers {
            let attention = raw.attention_bias;
            for (name, input, output, bias) in [
                ("self_attn.q_proj", width, heads, attention),
                ("self_attn.k_proj", width, kv_heads, attention),
                ("self_attn.v_proj", width, kv_heads, attention),
                ("self_attn.o_proj", heads, width, attention),
                ("mlp.gate_proj", width, inner, raw.mlp_bias),
                ("mlp.up_proj", width, inner, raw.mlp_bias),
                ("mlp.down_proj", inner, width, raw.mlp_bias),
            ] {
                let kind = Kind::Linear { input, output, bias };
                add(format!("model.layers.{layer}.{name}"), kind, Home::Layer(layer));
            }
            for name in ["input_layernorm", "post_attention_layernorm"] {
                let path = format!("model.layers.{layer}.{name}");
                add(path, Kind::Norm { width }, Home::Layer(layer));
            }
        }
        add("model.norm".to_owned(), Kind::Norm { width }, Home::Last);
        if !tied {
            let head = Kind::Linear { input: width, output: raw.vocab_size, bias: false };
            add("lm_head".to_owned(), head, Home::Last);
        }
        modules
    }

    pub(super) fn ignores(&self, tensor: &str) -> bool {
        // Old exports hold precomputed frequencies; some tied ones the embedding a second time.
        tensor.ends_with("self_attn.rotary_emb.inv_freq")
            || (self.raw.tie_word_embeddings && tensor.starts_with("lm_head."))
    }

    fn rope(&self) -> Result<Rope, Exception> {
        let scale = match self.scaling {
            Scaling::Linear { factor } => 1.0 / factor,
            Scaling::None | Scaling::Llama3 { .. } => 1.0,
        };
        let frequencies = match self.scaling {
            Scaling::Llama3 { .. } => {
                let periods = self.scaling.periods(self.theta, self.head_dim);
                Frequencies::Periods(Array::from_slice(&periods, &[self.head_dim / 2]))
            }
            Scaling::None | Scaling::Linear { .. } => Frequencies::Base(self.theta),
        };
        Ok(Rope { dims: self.head_dim, traditional: self.raw.rope_traditional, scale, frequencies })
    }
}

impl Scaling {
    fn parse(fields: &BTreeMap<String, Value>) -> Result<Self, ConfigError> {
        let bad = |reason: String| ConfigError::Value { field: "rope_scaling", reason };
        let number = |name: &str, default: Option<f32>| {
            let value = fields.get(name).and_then(Value::as_f64).map(|v| v as f32).or(default);
            value
                .filter(|v| *v > 0.0)
                .ok_or_else(|| bad(format!("'{name}' must be a positive number")))
        };
        let kind = fields.get("type").or_else(|| fields.get("rope_type")).and_then(Value::as_str);
        match kind.unwrap_or("default") {
            "default" => Ok(Self::None),
            "linear" => Ok(Self::Linear { factor: number("factor", None)? }),
            "llama3" => Ok(Self::Llama3 {
                factor: number("factor", None)?,
                low_freq_factor: number("low_freq_factor", Some(1.0))?,
                high_freq_factor: number("high_freq_factor", Some(4.0))?,
                original_context: number("original_max_position_embeddings", Some(8192.0))?,
            }),
            other => Err(bad(format!("type '{other}' is not supported"))),
        }
    }

    /// Inverse frequencies of all rotated pairs. Llama 3.1 slows the long waves by `factor`, leaves the short ones
    /// and blends between the two limits.
    fn periods(&self, theta: f32, dims: i32) -> Vec<f32> {
        let plain = (0..dims / 2).map(|i| theta.powf((2 * i) as f32 / dims as f32));
        let &Self::Llama3 { factor, low_freq_factor, high_freq_factor, original_context } = self
        else {
            return plain.collect();
        };
        let scaled = plain.map(|period| {
            let wave_length = 2.0 * std::f32::consts::PI * period;
            if wave_length > original_context / low_freq_factor {
                period * factor
            } else if wave_length > original_context / high_freq_factor {
                let smooth = (original_context / wave_length - low_freq_factor)
                    / (high_freq_factor - low_freq_factor);
                period / ((1.0 - smooth) / factor + smooth)
            } else {
                period
            }
        });
        scaled.collect()
    }
}

struct Attention {
    q_proj: Linear,
    k_proj: Linear,
    v_proj: Linear,
    o_proj: Linear,
    heads: i32,
    kv_heads: i32,
    head_dim: i32,
}

impl Attention {
    fn build(args: &Args, path: &str, weights: &mut Weights) -> Self {
        let mut linear = |name: &str| weights.linear(&format!("{path}.self_attn.{name}"));
        Self {
            q_proj: linear("q_proj"),
            k_proj: linear("k_proj"),
            v_proj: linear("v_proj"),
            o_proj: linear("o_proj"),
            heads: args.raw.num_attention_heads,
            kv_heads: args.kv_heads,
            head_dim: args.head_dim,
        }
    }

    /// `x` `[1, positions, width]` to outputs of the last `wanted` positions; keys and values are kept of all.
    fn forward(
        &self,
        x: &Array,
        wanted: i32,
        rope: &Rope,
        cache: &mut KvCache,
    ) -> Result<Array, Exception> {
        let split = |projected: Array, heads: i32| {
            let shape = [1, projected.dim(1), heads, self.head_dim];
            projected.reshape(&shape)?.transpose_axes(&[0, 2, 1, 3])
        };
        let queries = split(self.q_proj.forward(&last(x, wanted)?)?, self.heads)?;
        let keys = split(self.k_proj.forward(x)?, self.kv_heads)?;
        let values = split(self.v_proj.forward(x)?, self.kv_heads)?;

        let offset = cache.len();
        let queries = rope.forward(&queries, offset + x.dim(1) - wanted)?;
        let keys = rope.forward(&keys, offset)?;
        let (keys, values) = cache.extend(&keys, &values)?;

        let scale = (self.head_dim as f32).powf(-0.5);
        let mask = (wanted > 1).then_some(ScaledDotProductAttentionMask::Causal);
        let output = scaled_dot_product_attention(&queries, &keys, &values, scale, mask, None)?;
        let output = output.transpose_axes(&[0, 2, 1, 3])?.reshape(&[1, wanted, -1])?;
        self.o_proj.forward(&output)
    }
}

struct Mlp {
    gate_proj: Linear,
    up_proj: Linear,
    down_proj: Linear,
}

impl Mlp {
    fn build(path: &str, weights: &mut Weights) -> Self {
        let mut linear = |name: &str| weights.linear(&format!("{path}.mlp.{name}"));
        Self {
            gate_proj: linear("gate_proj"),
            up_proj: linear("up_proj"),
            down_proj: linear("down_proj"),
        }
    }

    fn forward(&self, x: &Array) -> Result<Array, Exception> {
        let gate = self.gate_proj.forward(x)?;
        let activated = multiply(&gate, sigmoid(&gate)?)?;
        self.down_proj.forward(&multiply(&activated, self.up_proj.forward(x)?)?)
    }
}

struct Block {
    self_attn: Attention,
    mlp: Mlp,
    input_layernorm: Array,
    post_attention_layernorm: Array,
    eps: f32,
}

impl Block {
    fn build(args: &Args, layer: usize, weights: &mut Weights) -> Self {
        let path = format!("model.layers.{layer}");
        Self {
            self_attn: Attention::build(args, &path, weights),
            mlp: Mlp::build(&path, weights),
            input_layernorm: weights.norm(&format!("{path}.input_layernorm")),
            post_attention_layernorm: weights.norm(&format!("{path}.post_attention_layernorm")),
            eps: args.raw.rms_norm_eps,
        }
    }

    /// As [`Attention::forward`].
    fn forward(
        &self,
        x: &Array,
        wanted: i32,
        rope: &Rope,
        cache: &mut KvCache,
    ) -> Result<Array, Exception> {
        let normed = rms_norm(x, Some(&self.input_layernorm), self.eps)?;
        let attended = self.self_attn.forward(&normed, wanted, rope, cache)?;
        let x = last(x, wanted)?.add(attended)?;
        let normed = rms_norm(&x, Some(&self.post_attention_layernorm), self.eps)?;
        x.add(self.mlp.forward(&normed)?)
    }
}

enum Head {
    Own(Linear),
    /// The embedding serves as output projection.
    Tied,
}

pub(crate) struct Model {
    embed_tokens: Option<Embedding>,
    layers: Vec<Block>,
    /// Norm and output projection; last rank only.
    head: Option<(Array, Head)>,
    rope: Rope,
    eps: f32,
}

impl Model {
    pub(super) fn build(args: &Args, part: &Part, mut weights: Weights) -> Result<Self, Exception> {
        let tied = args.raw.tie_word_embeddings;
        let embeds = part.owns(if tied { Home::Ends } else { Home::First });
        let embed_tokens = embeds.then(|| weights.embedding("model.embed_tokens"));
        let layers = part.layers.clone().map(|i| Block::build(args, i, &mut weights)).collect();
        let head = part.last.then(|| {
            let head = if tied { Head::Tied } else { Head::Own(weights.linear("lm_head")) };
            (weights.norm("model.norm"), head)
        });
        weights.finish();
        Ok(Self { embed_tokens, layers, head, rope: args.rope()?, eps: args.raw.rms_norm_eps })
    }

    pub(super) fn embed(&self, tokens: &Array) -> Result<Array, Exception> {
        self.embed_tokens.as_ref().expect("called on the first rank").forward(tokens)
    }

    pub(super) fn forward(
        &self,
        mut x: Array,
        wanted: i32,
        caches: &mut [KvCache],
    ) -> Result<Array, Exception> {
        assert_eq!(self.layers.len(), caches.len(), "one cache per layer");
        let count = self.layers.len();
        for (i, (layer, cache)) in self.layers.iter().zip(caches).enumerate() {
            // Later layers attend to every position; behind the last one only those that are wanted matter.
            let wanted = if i + 1 == count { wanted } else { x.dim(1) };
            x = layer.forward(&x, wanted, &self.rope, cache)?;
        }
        Ok(x)
    }

    pub(super) fn head(&self, x: &Array) -> Result<Array, Exception> {
        let (norm, head) = self.head.as_ref().expect("called on the last rank");
        let x = rms_norm(x, Some(norm), self.eps)?;
        match (head, &self.embed_tokens) {
            (Head::Own(linear), _) => linear.forward(&x),
            (Head::Tied, Some(embedding)) => embedding.as_linear(&x),
            (Head::Tied, None) => unreachable!("a tied embedding is at both ends"),
        }
    }
}

/// The last `wanted` positions of `[1, positions, features]`.
fn last(x: &Array, wanted: i32) -> Result<Array, Exception> {
    let (positions, width) = (x.dim(1), x.dim(2));
    if wanted == positions {
        return Ok(x.clone());
    }
    slice(x, &[0, positions - wanted, 0], &[1, positions, width])
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn parse(change: &Value) -> Result<Args, ConfigError> {
        let mut config = json!({"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 128,
            "num_attention_heads": 4, "rms_norm_eps": 1e-5, "vocab_size": 100});
        config.as_object_mut().unwrap().extend(change.as_object().unwrap().clone());
        Args::parse(&config)
    }

    #[test]
    fn refuses_what_it_can_not_run_and_names_the_field() {
        assert!(parse(&json!({})).is_ok());
        for (change, field) in [
            (json!({"vocab_size": 0}), "vocab_size"),
            (json!({"num_key_value_heads": 3}), "num_key_value_heads"),
            (json!({"rope_scaling": {"type": "yarn", "factor": 2.0}}), "rope_scaling"),
            (json!({"rope_scaling": {"rope_type": "llama3"}}), "factor"),
            (json!({"layer_types": ["sliding_attention", "full_attention"]}), "layer_types"),
            (json!({"hidden_size": "wide"}), "invalid type"),
        ] {
            let error = parse(&change).err().map(|e| e.to_string()).unwrap_or_default();
            assert!(error.contains(field), "{change}: {error}");
        }
    }

    #[test]
    fn llama3_scaling_leaves_short_waves_and_slows_long_ones() {
        let scaling = json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192});
        let args =
            parse(&json!({"head_dim": 128, "rope_theta": 500000.0, "rope_scaling": scaling}));
        let args = args.unwrap();
        let plain = Scaling::None.periods(args.theta, 128);
        let scaled = args.scaling.periods(args.theta, 128);
        assert_eq!(plain[..28], scaled[..28]);
        assert!((scaled[63] / plain[63] - 8.0).abs() < 1e-4);
        let ratios: Vec<f32> = scaled.iter().zip(&plain).map(|(s, p)| s / p).collect();
        assert!(ratios.windows(2).all(|r| r[0] <= r[1] + 1e-4), "{ratios:?}");
    }
}
