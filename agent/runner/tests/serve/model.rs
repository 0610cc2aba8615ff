//! A small random model of the Llama architecture with the built-in tokenizer, for tests that ask
//! how tokens travel, not what they say. And addresses for who runs it.

use std::{
    fs,
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener},
    path::{Path, PathBuf},
};

use serde_json::{Map, Value, json};

/// Layers of the built-in model.
pub(crate) const BUILT_IN_LAYERS: u32 = 8;
pub(crate) const LAYERS: u32 = 4;
pub(crate) const CONTEXT: u32 = 4096;
const VOCABULARY: usize = 1280;
const HIDDEN: usize = 64;
const MLP: usize = 96;
const KV: usize = 32;

/// An address of this test process alone, so that no other can take its ports: nextest runs each
/// test in a process of its own. macOS has one loopback address only.
pub(crate) fn loopback() -> IpAddr {
    let id = std::process::id().to_be_bytes();
    let own = Ipv4Addr::new(127, 64 | id[1] & 0x3f, id[2], id[3].max(2));
    IpAddr::V4(if cfg!(target_os = "linux") { own } else { Ipv4Addr::LOCALHOST })
}

/// Addresses of which others in this process had none at the same time.
pub(crate) fn free_addresses(count: usize) -> Vec<SocketAddr> {
    let listeners: Vec<_> =
        (0..count).map(|_| TcpListener::bind((loopback(), 0)).unwrap()).collect();
    listeners.iter().map(|listener| listener.local_addr().unwrap()).collect()
}

/// The built-in model's folder.
pub(crate) fn built_in() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../manifests/models/tiny")
}

/// Writes the model into `dir`, without the tensors that `leave_out` names.
pub(crate) fn write(dir: &Path, leave_out: &[&str]) {
    write_with(dir, leave_out, |_| 0.3);
}

/// The same; matrices have values up to what `largest` says of their names.
pub(crate) fn write_with(dir: &Path, leave_out: &[&str], largest: impl Fn(&str) -> f32) {
    let built_in = built_in();
    for name in ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"] {
        fs::copy(built_in.join(name), dir.join(name)).unwrap();
    }
    let config = json!({
        "model_type": "llama", "hidden_size": HIDDEN, "intermediate_size": MLP,
        "num_hidden_layers": LAYERS, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 16, "vocab_size": VOCABULARY, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "max_position_embeddings": CONTEXT, "tie_word_embeddings": false, "hidden_act": "silu",
        // None that the random model could draw.
        "eos_token_id": [],
    });
    fs::write(dir.join("config.json"), config.to_string()).unwrap();
    let tensors: Vec<_> =
        tensors().into_iter().filter(|(name, _)| !leave_out.contains(&name.as_str())).collect();
    fs::write(dir.join("model.safetensors"), safetensors(&tensors, largest)).unwrap();
}

fn tensors() -> Vec<(String, Vec<usize>)> {
    let mut all = vec![
        ("model.embed_tokens.weight".to_owned(), vec![VOCABULARY, HIDDEN]),
        ("model.norm.weight".to_owned(), vec![HIDDEN]),
        ("lm_head.weight".to_owned(), vec![VOCABULARY, HIDDEN]),
    ];
    for layer in 0..LAYERS {
        for (name, shape) in [
            ("self_attn.q_proj", vec![HIDDEN, HIDDEN]),
            ("self_attn.k_proj", vec![KV, HIDDEN]),
            ("self_attn.v_proj", vec![KV, HIDDEN]),
            ("self_attn.o_proj", vec![HIDDEN, HIDDEN]),
            ("mlp.gate_proj", vec![MLP, HIDDEN]),
            ("mlp.up_proj", vec![MLP, HIDDEN]),
            ("mlp.down_proj", vec![HIDDEN, MLP]),
            ("input_layernorm", vec![HIDDEN]),
            ("post_attention_layernorm", vec![HIDDEN]),
        ] {
            all.push((format!("model.layers.{layer}.{name}.weight"), shape));
        }
    }
    all
}

/// The file format: length of the header, header, data.
fn safetensors(tensors: &[(String, Vec<usize>)], largest: impl Fn(&str) -> f32) -> Vec<u8> {
    let mut header = Map::new();
    let mut data = Vec::new();
    let mut random = Random(7);
    for (name, shape) in tensors {
        let start = data.len();
        for _ in 0..shape.iter().product() {
            let value = if shape.len() == 1 { 1.0 } else { random.next() * largest(name) };
            data.extend(value.to_le_bytes());
        }
        let offsets = [start, data.len()];
        header
            .insert(name.clone(), json!({"dtype": "F32", "shape": shape, "data_offsets": offsets}));
    }
    let header = Value::Object(header).to_string().into_bytes();
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header);
    file.extend(data);
    file
}

/// Marsaglia's xorshift64; the same everywhere.
struct Random(u64);

impl Random {
    /// From -1 to 1.
    fn next(&mut self) -> f32 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 40) as f32 / (1 << 23) as f32 - 1.0
    }
}
