//! Small valid model folders, one for each way in which checkpoints lie: dense, in two files, packed, experts on their
//! own, latent attention as published. Owns what is in them; breaks nothing.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

use crate::random::Random;

pub(crate) const LAYERS: usize = 2;
const WIDTH: usize = 32;
const INNER: usize = 64;
const VOCAB: usize = 48;

pub(crate) const WEIGHTS: &str = "model.safetensors";
pub(crate) const INDEX: &str = "model.safetensors.index.json";
pub(crate) const CONFIG: &str = "config.json";

/// The files of a folder by name.
pub(crate) type Folder = BTreeMap<String, Vec<u8>>;

struct Tensor {
    name: String,
    dtype: &'static str,
    shape: Vec<usize>,
}

/// Tensors of one model, in the order of their data.
#[derive(Default)]
struct List(Vec<Tensor>);

impl List {
    fn add(&mut self, name: &str, shape: &[usize]) {
        self.0.push(Tensor { name: name.to_owned(), dtype: "F32", shape: shape.to_vec() });
    }

    fn linear(&mut self, path: &str, output: usize, input: usize) {
        self.add(&format!("{path}.weight"), &[output, input]);
    }

    /// Affine, 4 bit in groups of 32.
    fn packed(&mut self, path: &str, output: usize, input: usize) {
        let (name, dtype) = (format!("{path}.weight"), "U32");
        self.0.push(Tensor { name, dtype, shape: vec![output, input / 8] });
        for part in ["scales", "biases"] {
            self.add(&format!("{path}.{part}"), &[output, input / 32]);
        }
    }

    fn norm(&mut self, path: &str, width: usize) {
        self.add(&format!("{path}.weight"), &[width]);
    }
}

fn config(model_type: &str, change: &Value) -> Value {
    let mut config = json!({"model_type": model_type, "hidden_size": WIDTH,
        "num_hidden_layers": LAYERS, "intermediate_size": INNER, "num_attention_heads": 4,
        "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "vocab_size": VOCAB,
        "max_position_embeddings": 600, "tie_word_embeddings": false, "eos_token_id": [1],
        "rope_theta": 10000.0});
    config.as_object_mut().unwrap().extend(change.as_object().unwrap().clone());
    config
}

type AddLinear = fn(&mut List, &str, usize, usize);

fn attention(list: &mut List, layer: &str, linear: AddLinear) {
    let path = |name: &str| format!("{layer}.self_attn.{name}");
    linear(list, &path("q_proj"), WIDTH, WIDTH);
    linear(list, &path("k_proj"), WIDTH / 2, WIDTH);
    linear(list, &path("v_proj"), WIDTH / 2, WIDTH);
    linear(list, &path("o_proj"), WIDTH, WIDTH);
}

fn latent_attention(list: &mut List, layer: &str) {
    let path = |name: &str| format!("{layer}.self_attn.{name}");
    // Two heads of 8 + 8 for queries and keys, 8 for values, out of a latent of 16.
    list.linear(&path("q_a_proj"), 16, WIDTH);
    list.norm(&path("q_a_layernorm"), 16);
    list.linear(&path("q_b_proj"), 2 * 16, 16);
    list.linear(&path("kv_a_proj_with_mqa"), 16 + 8, WIDTH);
    list.norm(&path("kv_a_layernorm"), 16);
    list.linear(&path("kv_b_proj"), 2 * 16, 16);
    list.linear(&path("o_proj"), WIDTH, 2 * 8);
}

fn mlp(list: &mut List, path: &str, inner: usize, linear: AddLinear) {
    linear(list, &format!("{path}.gate_proj"), inner, WIDTH);
    linear(list, &format!("{path}.up_proj"), inner, WIDTH);
    linear(list, &format!("{path}.down_proj"), WIDTH, inner);
}

fn frame(layer: impl Fn(&mut List, &str), linear: AddLinear) -> List {
    let mut list = List::default();
    linear(&mut list, "model.embed_tokens", VOCAB, WIDTH);
    for i in 0..LAYERS {
        let path = format!("model.layers.{i}");
        list.norm(&format!("{path}.input_layernorm"), WIDTH);
        list.norm(&format!("{path}.post_attention_layernorm"), WIDTH);
        layer(&mut list, &path);
    }
    list.norm("model.norm", WIDTH);
    linear(&mut list, "lm_head", VOCAB, WIDTH);
    list
}

fn dense() -> (Value, List) {
    let layer = |list: &mut List, path: &str| {
        attention(list, path, List::linear);
        mlp(list, &format!("{path}.mlp"), INNER, List::linear);
    };
    let scaling = json!({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}});
    (config("llama", &scaling), frame(layer, List::linear))
}

fn packed() -> (Value, List) {
    let layer = |list: &mut List, path: &str| {
        attention(list, path, List::packed);
        mlp(list, &format!("{path}.mlp"), INNER, List::packed);
    };
    let quantization = json!({"quantization": {"group_size": 32, "bits": 4,
        "lm_head": {"group_size": 32, "bits": 4}}});
    (config("llama", &quantization), frame(layer, List::packed))
}

fn experts() -> (Value, List) {
    let layer = |list: &mut List, path: &str| {
        attention(list, path, List::linear);
        for name in ["q_norm", "k_norm"] {
            list.norm(&format!("{path}.self_attn.{name}"), 8);
        }
        list.linear(&format!("{path}.mlp.gate"), 4, WIDTH);
        for i in 0..4 {
            mlp(list, &format!("{path}.mlp.experts.{i}"), 16, List::linear);
        }
    };
    let change = json!({"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
        "norm_topk_prob": true, "decoder_sparse_step": 1, "mlp_only_layers": [], "head_dim": 8});
    (config("qwen3_moe", &change), frame(layer, List::linear))
}

fn latent() -> (Value, List) {
    let layer = |list: &mut List, path: &str| {
        latent_attention(list, path);
        if path.ends_with('0') {
            return mlp(list, &format!("{path}.mlp"), INNER, List::linear);
        }
        list.linear(&format!("{path}.mlp.gate"), 4, WIDTH);
        list.add(&format!("{path}.mlp.gate.e_score_correction_bias"), &[4]);
        for i in 0..4 {
            mlp(list, &format!("{path}.mlp.experts.{i}"), 16, List::linear);
        }
        mlp(list, &format!("{path}.mlp.shared_experts"), 16, List::linear);
    };
    let yarn = json!({"type": "yarn", "factor": 4.0, "mscale": 1.0, "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 128});
    let change = json!({"num_attention_heads": 2, "n_routed_experts": 4, "n_shared_experts": 1,
        "num_experts_per_tok": 2, "moe_intermediate_size": 16, "first_k_dense_replace": 1,
        "n_group": 2, "topk_group": 1, "q_lora_rank": 16, "kv_lora_rank": 16,
        "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "rope_scaling": yarn});
    (config("deepseek_v3", &change), frame(layer, List::linear))
}

/// The file format: length of the header, header, data.
pub(crate) fn join(header: &[u8], data: &[u8]) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes()[..], header, data].concat()
}

fn safetensors(tensors: &[Tensor], random: &mut Random) -> Vec<u8> {
    let (mut header, mut data) = (Map::new(), Vec::new());
    header.insert("__metadata__".to_owned(), json!({"format": "mlx"}));
    for Tensor { name, dtype, shape } in tensors {
        let start = data.len();
        for _ in 0..shape.iter().product() {
            // Any packed number will do; other values are small.
            let bits = random.next() as u32;
            let value = (bits >> 8) as f32 / (1 << 24) as f32 - 0.5;
            let bytes = if *dtype == "U32" { bits.to_le_bytes() } else { value.to_le_bytes() };
            data.extend(bytes);
        }
        let offsets = [start, data.len()];
        let entry = json!({"dtype": dtype, "shape": shape, "data_offsets": offsets});
        header.insert(name.clone(), entry);
    }
    join(Value::Object(header).to_string().as_bytes(), &data)
}

fn folder(config: &Value, weights: Vec<u8>) -> Folder {
    let config = config.to_string().into_bytes();
    Folder::from([(CONFIG.to_owned(), config), (WEIGHTS.to_owned(), weights)])
}

fn indexed(config: &Value, list: &List, random: &mut Random) -> Folder {
    let (first, second) = list.0.split_at(list.0.len() / 2);
    let mut folder = Folder::from([(CONFIG.to_owned(), config.to_string().into_bytes())]);
    let mut map = Map::new();
    for (part, name) in [(first, "a.safetensors"), (second, "b.safetensors")] {
        map.extend(part.iter().map(|tensor| (tensor.name.clone(), json!(name))));
        folder.insert(name.to_owned(), safetensors(part, random));
    }
    let index = json!({"metadata": {"total_size": 1}, "weight_map": map});
    folder.insert(INDEX.to_owned(), index.to_string().into_bytes());
    folder
}

/// Every kind with its name.
pub(crate) fn all() -> Vec<(&'static str, Folder)> {
    let random = &mut Random::new(1);
    let mut single = |(config, list): (Value, List)| folder(&config, safetensors(&list.0, random));
    let (dense_one, packed, experts, latent) =
        (single(dense()), single(packed()), single(experts()), single(latent()));
    let (config, list) = dense();
    let indexed = indexed(&config, &list, random);
    vec![
        ("dense", dense_one),
        ("indexed", indexed),
        ("packed", packed),
        ("experts", experts),
        ("latent", latent),
    ]
}
