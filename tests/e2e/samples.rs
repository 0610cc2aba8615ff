//! The sample manifests say what the model files say.

use std::{collections::BTreeMap, fs};

use exo_tests::root;
use serde_json::Value;

/// Bytes per tensor, from a safetensors file's header.
fn tensor_bytes(path: &std::path::Path) -> BTreeMap<String, u64> {
    let data = fs::read(path).unwrap();
    let length = u64::from_le_bytes(data[..8].try_into().unwrap()) as usize;
    let header: BTreeMap<String, Value> = serde_json::from_slice(&data[8..8 + length]).unwrap();
    let offset = |tensor: &Value, i: usize| tensor["data_offsets"][i].as_u64().unwrap();
    header
        .iter()
        .filter(|(name, _)| *name != "__metadata__")
        .map(|(name, tensor)| (name.clone(), offset(tensor, 1) - offset(tensor, 0)))
        .collect()
}

#[test]
fn the_tiny_sample_agrees_with_its_files() {
    let text = fs::read_to_string(root().join("manifests/samples/tiny.yaml")).unwrap();
    let spec = exo_crds::yaml::documents(&text).unwrap()[0]["spec"].clone();
    let folder = root().join("manifests/models").join(spec["source"]["path"].as_str().unwrap());
    let config: Value =
        serde_json::from_str(&fs::read_to_string(folder.join("config.json")).unwrap()).unwrap();
    for (ours, theirs) in [
        ("modelType", "model_type"),
        ("layers", "num_hidden_layers"),
        ("hiddenSize", "hidden_size"),
        ("heads", "num_attention_heads"),
        ("kvHeads", "num_key_value_heads"),
        ("vocabSize", "vocab_size"),
        ("contextLength", "max_position_embeddings"),
    ] {
        assert_eq!(spec["architecture"][ours], config[theirs], "{ours}");
    }
    let tensors = tensor_bytes(&folder.join("model.safetensors"));
    let sum = |prefix: &str| -> u64 {
        tensors.iter().filter(|(name, _)| name.starts_with(prefix)).map(|(_, bytes)| bytes).sum()
    };
    let layers = config["num_hidden_layers"].as_u64().unwrap();
    assert_eq!(spec["weights"]["layer"], sum("model.layers.") / layers);
    assert_eq!(spec["weights"]["embedding"], sum("model.embed_tokens."));
    assert_eq!(spec["weights"]["head"], sum("model.norm.") + sum("lm_head."));
}
