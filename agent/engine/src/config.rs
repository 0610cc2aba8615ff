//! `config.json` and `generation_config.json` of a model folder: what every architecture has. The rest is read by the
//! architecture's own file.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::Value;

use crate::nn::{Mode, Packing};
use crate::text::Tokenizer;

/// Why a configuration can't be used. Always permanent.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("can't read {}", path.display())]
    Io {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("{} is not valid", path.display())]
    Json {
        path: PathBuf,
        #[source]
        source: serde_json::Error,
    },
    #[error("config.json: model_type '{0}' is not supported (supported: {supported})", supported = crate::models::SUPPORTED.join(", "))]
    ModelType(String),
    #[error("config.json: {field}: {reason}")]
    Value { field: &'static str, reason: String },
}

/// How the checkpoint is quantized: one setting, and exceptions by module path.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Quantization {
    default: Packing,
    exceptions: BTreeMap<String, Packing>,
}

impl Quantization {
    /// The setting of modules that have none of their own.
    pub(crate) fn default(&self) -> Packing {
        self.default
    }

    /// The setting that the module at `path` has of its own.
    pub(crate) fn exception(&self, path: &str) -> Option<Packing> {
        self.exceptions.get(path).copied()
    }
}

#[derive(Deserialize)]
struct RawPacking {
    group_size: i32,
    bits: i32,
    #[serde(default)]
    mode: Option<String>,
}

/// What is common to all architectures; `raw` is the whole of `config.json`.
pub(crate) struct Config {
    pub(crate) model_type: String,
    pub(crate) eos_token_ids: Vec<u32>,
    pub(crate) quantization: Option<Quantization>,
    pub(crate) raw: Value,
}

impl Config {
    pub(crate) fn read(dir: &Path) -> Result<Self, ConfigError> {
        let path = dir.join("config.json");
        let raw = read_json(&path)?
            .ok_or_else(|| ConfigError::Io { path, source: io::ErrorKind::NotFound.into() })?;
        let generation = read_json(&dir.join("generation_config.json"))?;
        let (mut config, eos_is_known) = Self::parse(raw, generation.as_ref())?;
        // An architecture that is not supported is refused for that.
        if !eos_is_known && crate::models::SUPPORTED.contains(&config.model_type.as_str()) {
            config.eos_token_ids = vec![eos_of_tokenizer(dir)?];
        }
        Ok(config)
    }

    /// Also tells whether the ends of sequences are known.
    fn parse(raw: Value, generation: Option<&Value>) -> Result<(Self, bool), ConfigError> {
        let model_type = raw.get("model_type").and_then(Value::as_str);
        let model_type = model_type.map(str::to_owned).ok_or_else(|| ConfigError::Value {
            field: "model_type",
            reason: "missing or not a string".to_owned(),
        })?;
        // The generation file is the newer place and wins where it says something.
        let eos = generation.and_then(|g| g.get("eos_token_id")).filter(|v| !v.is_null());
        let eos_token_ids = token_ids(eos.or_else(|| raw.get("eos_token_id")))?;
        let eos_is_known = eos_token_ids.is_some();
        let eos_token_ids = eos_token_ids.unwrap_or_default();
        let quantization = raw
            .get("quantization")
            .or_else(|| raw.get("quantization_config"))
            .filter(|v| !v.is_null())
            .map(quantization)
            .transpose()?;
        Ok((Self { model_type, eos_token_ids, quantization, raw }, eos_is_known))
    }
}

fn read_json(path: &Path) -> Result<Option<Value>, ConfigError> {
    match std::fs::read(path) {
        Ok(text) => serde_json::from_slice(&text)
            .map(Some)
            .map_err(|source| ConfigError::Json { path: path.to_owned(), source }),
        Err(source) if source.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(ConfigError::Io { path: path.to_owned(), source }),
    }
}

/// The token that `tokenizer_config.json` says ends a sequence. Without any, each answer would go on
/// until the context is full: that is refused.
fn eos_of_tokenizer(dir: &Path) -> Result<u32, ConfigError> {
    let bad = |reason: String| ConfigError::Value { field: "eos_token_id", reason };
    let config = read_json(&dir.join("tokenizer_config.json"))?.unwrap_or_default();
    // Either the token's text, or an object that holds it.
    let token = &config["eos_token"];
    let token = token.as_str().or_else(|| token["content"].as_str()).ok_or_else(|| {
        bad("missing, and tokenizer_config.json has no eos_token either".to_owned())
    })?;
    let tokenizer = Tokenizer::load(dir)
        .map_err(|error| bad(format!("missing, and so is the tokenizer ({error})")))?;
    tokenizer.token_id(token).ok_or_else(|| {
        bad(format!("missing, and the tokenizer does not know its eos_token '{token}'"))
    })
}

/// None where nothing is said; an empty list says that no token ends a sequence.
fn token_ids(value: Option<&Value>) -> Result<Option<Vec<u32>>, ConfigError> {
    let bad = |value: &Value| ConfigError::Value {
        field: "eos_token_id",
        reason: format!("{value} is not a token id or a list of them"),
    };
    match value {
        None | Some(Value::Null) => Ok(None),
        Some(list @ Value::Array(_)) => {
            serde_json::from_value(list.clone()).map(Some).map_err(|_| bad(list))
        }
        Some(one) => {
            serde_json::from_value(one.clone()).map(|id| Some(vec![id])).map_err(|_| bad(one))
        }
    }
}

fn quantization(value: &Value) -> Result<Quantization, ConfigError> {
    let default = match value.get("quant_method").and_then(Value::as_str) {
        // What mlx-lm writes has sizes beside the method, other tools' files have not.
        Some("mxfp4") => Packing::MXFP4,
        Some(method) if value.get("group_size").is_none() => {
            let reason = format!("method '{method}' is not supported");
            return Err(ConfigError::Value { field: "quantization_config", reason });
        }
        Some(_) | None => packing(value)?,
    };
    let mut exceptions = BTreeMap::new();
    for (path, value) in value.as_object().into_iter().flatten() {
        // Other tools list modules that they leave alone as an object of another kind.
        if value.get("bits").is_some() {
            exceptions.insert(path.clone(), packing(value)?);
        }
    }
    Ok(Quantization { default, exceptions })
}

fn packing(value: &Value) -> Result<Packing, ConfigError> {
    let bad = |reason: String| ConfigError::Value { field: "quantization", reason };
    let raw = RawPacking::deserialize(value).map_err(|e| bad(e.to_string()))?;
    let RawPacking { group_size, bits, mode } = raw;
    let mode = match mode.as_deref() {
        None | Some("affine") => Mode::Affine,
        Some("mxfp4") => Mode::Mxfp4,
        Some(other) => return Err(bad(format!("mode '{other}' is not supported"))),
    };
    let packing = Packing { group_size, bits, mode };
    if !packing.is_supported() {
        return Err(bad(format!("{bits} bits in groups of {group_size} are not supported")));
    }
    Ok(packing)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn reads_token_ids_in_all_their_forms() {
        let read = |raw: Value, generation: Option<Value>| {
            let raw = json!({"model_type": "llama", "eos_token_id": raw});
            let parsed = Config::parse(raw, generation.as_ref());
            parsed.map(|(config, known)| known.then_some(config.eos_token_ids))
        };
        let some = |ids: &[u32]| Some(ids.to_vec());
        assert_eq!(read(json!(2), None).unwrap(), some(&[2]));
        assert_eq!(read(json!([2, 3]), None).unwrap(), some(&[2, 3]));
        assert_eq!(read(json!([]), None).unwrap(), some(&[]));
        assert_eq!(read(json!(null), None).unwrap(), None);
        assert_eq!(read(json!(2), Some(json!({"eos_token_id": [7]}))).unwrap(), some(&[7]));
        assert_eq!(read(json!(2), Some(json!({"eos_token_id": null}))).unwrap(), some(&[2]));
        assert!(read(json!(-1), None).is_err());
        assert!(read(json!("x"), None).is_err());
    }

    #[test]
    fn the_end_token_is_the_tokenizers_where_no_config_names_one() {
        let built_in = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../manifests/models/tiny");
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, value: &Value| {
            std::fs::write(dir.path().join(name), value.to_string()).unwrap();
        };
        let refusal = || match Config::read(dir.path()) {
            Ok(config) => panic!("loaded with {:?}", config.eos_token_ids),
            Err(error) => error.to_string(),
        };
        write("config.json", &json!({"model_type": "llama"}));
        assert!(refusal().contains("eos_token_id: missing"), "{}", refusal());
        write("tokenizer_config.json", &json!({"eos_token": {"content": "<|im_end|>"}}));
        assert!(refusal().contains("tokenizer.json"), "{}", refusal());
        std::fs::copy(built_in.join("tokenizer.json"), dir.path().join("tokenizer.json")).unwrap();
        // As the built-in model's own config says.
        assert_eq!(Config::read(dir.path()).unwrap().eos_token_ids, [2]);
        write("tokenizer_config.json", &json!({"eos_token": "</never>"}));
        assert!(refusal().contains("</never>"), "{}", refusal());
    }

    #[test]
    fn reads_quantization_with_exceptions_and_refuses_what_it_does_not_know() {
        let value = json!({"group_size": 64, "bits": 4, "mode": "affine",
            "lm_head": {"group_size": 32, "bits": 8}, "model.norm": false,
            "x": {"group_size": 32, "bits": 4, "mode": "mxfp4"}});
        let quantization = super::quantization(&value).unwrap();
        let affine = |group_size, bits| Packing { group_size, bits, mode: Mode::Affine };
        assert_eq!(quantization.default(), affine(64, 4));
        assert_eq!(quantization.exception("lm_head"), Some(affine(32, 8)));
        assert_eq!(quantization.exception("model.norm"), None);
        assert_eq!(quantization.exception("x"), Some(Packing::MXFP4));
        let method = super::quantization(&json!({"quant_method": "mxfp4"})).unwrap();
        assert_eq!(method.default(), Packing::MXFP4);
        for bad in [
            json!({"quant_method": "gptq"}),
            json!({"group_size": 64, "bits": 4, "mode": "mxfp4"}),
            json!({"group_size": 16, "bits": 4, "mode": "nvfp4"}),
            json!({"group_size": 64, "bits": 4, "lm_head": {"group_size": 64, "bits": 7}}),
            json!({"group_size": 48, "bits": 4}),
            json!({"group_size": 64, "bits": 1}),
        ] {
            assert!(super::quantization(&bad).is_err(), "{bad}");
        }
    }
}
