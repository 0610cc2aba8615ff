//! What the loader refuses, and that it names what is wrong.

#![allow(clippy::unwrap_used)]

mod common;

use std::fs;
use std::path::Path;

use common::{LAYERS, config, tensors, write, write_indexed};
use exo_engine::{Engine, EngineError, LoadConfig, LoadProgress, Sharding};
use serde_json::json;

fn load(dir: &Path) -> Result<Engine, EngineError> {
    let model_dir = dir.to_owned();
    let config = LoadConfig {
        model_dir,
        layers: 0..LAYERS,
        sharding: Sharding::Pipeline,
        group: None,
        context_length: 0,
    };
    Engine::load(&config, &mut |_| {})
}

fn refused(dir: &Path) -> (String, bool) {
    let error = load(dir).err().expect("must be refused");
    (error.to_string(), error.is_permanent())
}

#[test]
fn loads_all_and_reports_progress_to_the_end() {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), &config(), &tensors());
    let model_dir = dir.path().to_owned();
    let load = LoadConfig {
        model_dir,
        layers: 0..LAYERS,
        sharding: Sharding::Pipeline,
        group: None,
        context_length: 100,
    };
    let mut reports: Vec<LoadProgress> = Vec::new();
    let engine = Engine::load(&load, &mut |p| reports.push(p)).unwrap();
    let bytes: usize = tensors().iter().map(|t| t.values.len() * 4).sum();
    assert_eq!(engine.info().weight_bytes, bytes as u64);
    assert_eq!(engine.info().max_context, 100);
    assert_eq!(engine.info().eos_token_ids, [1]);
    assert!(reports.windows(2).all(|w| w[0].bytes_done < w[1].bytes_done));
    let last = reports.last().unwrap();
    assert_eq!((last.bytes_done, last.bytes_total), (bytes as u64, bytes as u64));
}

#[test]
fn names_missing_unknown_and_misshaped_tensors_together() {
    let dir = tempfile::tempdir().unwrap();
    let mut tensors = tensors();
    tensors.retain(|t| t.name != "model.layers.1.mlp.up_proj.weight");
    tensors[0].shape.swap(0, 1);
    let mut stray = tensors.last().unwrap().clone();
    stray.name = "model.layers.7.mlp.up_proj.weight".to_owned();
    tensors.push(stray);
    write(dir.path(), &config(), &tensors);
    let (error, permanent) = refused(dir.path());
    assert_eq!(
        error,
        "the checkpoint does not fit the model: missing: model.layers.1.mlp.up_proj.weight; \
         unknown: model.layers.7.mlp.up_proj.weight; wrong shape or type: \
         model.embed_tokens.weight (expected [64, 32] of floats, found [32, 64] of Float32)"
    );
    assert!(permanent);
}

#[test]
fn knows_which_leftovers_are_harmless() {
    let dir = tempfile::tempdir().unwrap();
    let mut tensors = tensors();
    let mut stray = tensors[0].clone();
    stray.name = "model.layers.0.self_attn.rotary_emb.inv_freq".to_owned();
    tensors.push(stray);
    let tied = {
        let mut config = config();
        config["tie_word_embeddings"] = json!(true);
        config
    };
    // The output projection is there although the embedding serves as such.
    write(dir.path(), &tied, &tensors);
    let bytes: usize = tensors.iter().map(|t| t.values.len() * 4).sum();
    let unused: usize = 2 * 64 * 32 * 4;
    assert_eq!(load(dir.path()).unwrap().info().weight_bytes, (bytes - unused) as u64);
}

#[test]
fn names_the_tensor_that_a_short_file_cuts_off() {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), &config(), &tensors());
    let path = dir.path().join("model.safetensors");
    let whole = fs::read(&path).unwrap();
    fs::write(&path, &whole[..whole.len() - 1]).unwrap();
    let (error, permanent) = refused(dir.path());
    assert!(error.contains("truncated: tensor 'lm_head.weight' ends at byte"), "{error}");
    assert!(permanent);

    fs::write(&path, &whole[..100]).unwrap();
    assert!(refused(dir.path()).0.contains("bad header: its length says"));
    fs::write(&path, [0; 5]).unwrap();
    assert!(refused(dir.path()).0.contains("5 bytes"));
    fs::write(&path, [&8_u64.to_le_bytes()[..], b"notjson!"].concat()).unwrap();
    assert!(refused(dir.path()).0.contains("model.safetensors: bad header"));
}

#[test]
fn names_the_tensor_with_numbers_that_are_none_and_where() {
    for (name, place, value, text) in [
        ("model.embed_tokens.weight", 32 * 63 + 31, f32::NAN, "[63, 31]"),
        ("model.layers.1.mlp.up_proj.weight", 32 * 7, f32::INFINITY, "[7, 0]"),
        ("model.layers.2.input_layernorm.weight", 5, f32::NEG_INFINITY, "[5]"),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let mut tensors = tensors();
        tensors.iter_mut().find(|t| t.name == name).unwrap().values[place] = value;
        write(dir.path(), &config(), &tensors);
        let (error, permanent) = refused(dir.path());
        let file = dir.path().join("model.safetensors");
        let expect = format!("tensor '{name}' holds NaN or infinity at {text}");
        assert_eq!(error, format!("{}: {expect}", file.display()));
        assert!(permanent);
    }
}

#[test]
fn checks_an_index_against_its_files() {
    let dir = tempfile::tempdir().unwrap();
    let index_path = dir.path().join("model.safetensors.index.json");
    write_indexed(dir.path(), &config(), &tensors());
    load(dir.path()).unwrap();

    let text = fs::read_to_string(&index_path).unwrap();
    let index: serde_json::Value = serde_json::from_str(&text).unwrap();
    let check = |file: serde_json::Value, expect: &str| {
        let mut index = index.clone();
        index["weight_map"]["lm_head.weight"] = file;
        fs::write(&index_path, index.to_string()).unwrap();
        let (error, _) = refused(dir.path());
        assert!(error.contains(expect), "{error}");
    };
    check(json!("a.safetensors"), "tensor 'lm_head.weight' is in");
    check(json!("../b.safetensors"), "'../b.safetensors' is not a plain file name");
    check(json!(7), "bad index");
    let mut shorter = index.clone();
    shorter["weight_map"].as_object_mut().unwrap().remove("lm_head.weight");
    fs::write(&index_path, shorter.to_string()).unwrap();
    assert!(refused(dir.path()).0.contains("tensor 'lm_head.weight' is not listed"));

    fs::write(&index_path, &text).unwrap();
    fs::remove_file(dir.path().join("b.safetensors")).unwrap();
    let (error, permanent) = refused(dir.path());
    assert!(error.contains("b.safetensors, which is not there"), "{error}");
    assert!(!permanent, "the file may still be on its way");
}

#[test]
fn refuses_a_tensor_that_is_in_two_files() {
    let dir = tempfile::tempdir().unwrap();
    write_indexed(dir.path(), &config(), &tensors());
    fs::write(dir.path().join("b.safetensors"), common::safetensors(&tensors())).unwrap();
    let (error, permanent) = refused(dir.path());
    assert!(error.contains("is in both"), "{error}");
    assert!(permanent);
}

#[test]
fn names_what_is_wrong_with_the_configuration() {
    let dir = tempfile::tempdir().unwrap();
    assert!(refused(dir.path()).0.contains("config.json"));
    fs::write(dir.path().join("config.json"), "{").unwrap();
    assert!(refused(dir.path()).0.contains("config.json is not valid"));
    fs::write(dir.path().join("config.json"), r#"{"model_type": "mamba"}"#).unwrap();
    assert_eq!(
        refused(dir.path()).0,
        "config.json: model_type 'mamba' is not supported (supported: deepseek_v3, kimi_k2, llama, mistral, mixtral, qwen2, \
         qwen3, qwen3_moe)"
    );
    fs::write(dir.path().join("config.json"), config().to_string()).unwrap();
    assert!(refused(dir.path()).0.contains("no model.safetensors"));
    write(dir.path(), &config(), &tensors());
    let model_dir = dir.path().to_owned();
    let part = LoadConfig {
        model_dir,
        layers: 0..2,
        sharding: Sharding::Pipeline,
        group: None,
        context_length: 0,
    };
    let error = Engine::load(&part, &mut |_| {}).err().expect("one rank alone needs all layers");
    let told = "layers do not fit: a rank was given 0..2, but the model has 3 by its config.json";
    assert!(error.to_string().starts_with(told), "{error}");
}
