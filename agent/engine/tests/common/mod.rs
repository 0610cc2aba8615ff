//! A small random Llama folder, written by hand so that tests can break it.
#![allow(dead_code, clippy::unwrap_used)]

use std::fs;
use std::path::Path;

use serde_json::{Value, json};

pub(crate) const LAYERS: usize = 3;
pub(crate) const VOCAB: usize = 64;
const WIDTH: usize = 32;
const INNER: usize = 48;

/// Name, shape and float32 values.
#[derive(Clone, Debug)]
pub(crate) struct Tensor {
    pub(crate) name: String,
    pub(crate) shape: Vec<usize>,
    pub(crate) values: Vec<f32>,
}

pub(crate) fn config() -> Value {
    json!({"model_type": "llama", "hidden_size": WIDTH, "num_hidden_layers": LAYERS,
        "intermediate_size": INNER, "num_attention_heads": 4, "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5, "vocab_size": VOCAB, "max_position_embeddings": 600,
        "tie_word_embeddings": false, "eos_token_id": 1})
}

pub(crate) fn tensors() -> Vec<Tensor> {
    let mut shapes = vec![("model.embed_tokens.weight".to_owned(), vec![VOCAB, WIDTH])];
    for layer in 0..LAYERS {
        for (name, shape) in [
            ("self_attn.q_proj", vec![WIDTH, WIDTH]),
            ("self_attn.k_proj", vec![WIDTH / 2, WIDTH]),
            ("self_attn.v_proj", vec![WIDTH / 2, WIDTH]),
            ("self_attn.o_proj", vec![WIDTH, WIDTH]),
            ("mlp.gate_proj", vec![INNER, WIDTH]),
            ("mlp.up_proj", vec![INNER, WIDTH]),
            ("mlp.down_proj", vec![WIDTH, INNER]),
            ("input_layernorm", vec![WIDTH]),
            ("post_attention_layernorm", vec![WIDTH]),
        ] {
            shapes.push((format!("model.layers.{layer}.{name}.weight"), shape));
        }
    }
    shapes.push(("model.norm.weight".to_owned(), vec![WIDTH]));
    shapes.push(("lm_head.weight".to_owned(), vec![VOCAB, WIDTH]));
    let mut state = 1_u64;
    shapes
        .into_iter()
        .map(|(name, shape)| {
            let count = shape.iter().product();
            let scale = 2.0 / (*shape.last().unwrap() as f32).sqrt();
            let values = (0..count).map(|_| scale * uniform(&mut state)).collect();
            Tensor { name, shape, values }
        })
        .collect()
}

/// Evenly in -1..1, from a linear congruential generator.
fn uniform(state: &mut u64) -> f32 {
    *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
    (*state >> 40) as f32 / (1 << 23) as f32 - 1.0
}

pub(crate) fn safetensors(tensors: &[Tensor]) -> Vec<u8> {
    let (mut members, mut data) = (Vec::new(), Vec::new());
    for tensor in tensors {
        let start = data.len();
        data.extend(tensor.values.iter().flat_map(|v| v.to_le_bytes()));
        let Tensor { name, shape, .. } = tensor;
        let end = data.len();
        members.push(format!(
            r#""{name}":{{"dtype":"F32","shape":{shape:?},"data_offsets":[{start},{end}]}}"#
        ));
    }
    let header = format!("{{{}}}", members.join(","));
    [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &data].concat()
}

pub(crate) fn write(dir: &Path, config: &Value, tensors: &[Tensor]) {
    fs::write(dir.join("config.json"), config.to_string()).unwrap();
    fs::write(dir.join("model.safetensors"), safetensors(tensors)).unwrap();
}

/// The tensors over two files with an index; the second holds the last layer and the head.
pub(crate) fn write_indexed(dir: &Path, config: &Value, tensors: &[Tensor]) {
    fs::write(dir.join("config.json"), config.to_string()).unwrap();
    let last = format!("model.layers.{}.", LAYERS - 1);
    let late = |t: &Tensor| t.name.starts_with(&last) || t.name.contains("norm.weight");
    let (b, a): (Vec<Tensor>, Vec<Tensor>) = tensors.iter().cloned().partition(|t| {
        (late(t) && !t.name.contains("layers.0") && !t.name.contains("layers.1"))
            || t.name.starts_with("lm_head")
    });
    let mut map = serde_json::Map::new();
    for (file, part) in [("a.safetensors", a), ("b.safetensors", b)] {
        fs::write(dir.join(file), safetensors(&part)).unwrap();
        map.extend(part.into_iter().map(|t| (t.name, json!(file))));
    }
    let index = json!({"metadata": {}, "weight_map": map});
    fs::write(dir.join("model.safetensors.index.json"), index.to_string()).unwrap();
}
