//! A tiny way with text for the tests of this folder: each byte is a token, 256 ends an answer.

use std::{path::Path, sync::Arc};

use exo_engine::text::{ChatTemplate, Tokenizer};
use serde_json::{Map, Value, json};

use super::request::ModelText;

pub(super) const EOS: [u32; 1] = [256];

const TEMPLATE: &str = "{%- for m in messages -%}
{%- if m.role not in ['a', 'b'] -%}{{- raise_exception('roles are a and b') -}}{%- endif -%}
{{- m.role + ':' + m.content + ';' -}}
{%- endfor -%}
b:";

/// GPT-2's printable stand-ins for bytes.
fn byte_chars() -> impl Iterator<Item = char> {
    let printable = |b: u32| (33..=126).contains(&b) || (161..=172).contains(&b) || b >= 174;
    let mut next = 255;
    (0..256).map(move |b| {
        next += u32::from(!printable(b));
        char::from_u32(if printable(b) { b } else { next }).unwrap()
    })
}

fn write(dir: &Path) {
    let vocab: Map<String, Value> =
        (byte_chars().enumerate()).map(|(id, c)| (c.to_string(), id.into())).collect();
    let byte_level = json!({"type": "ByteLevel", "add_prefix_space": false,
                            "trim_offsets": true, "use_regex": false});
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null, "normalizer": null,
        "added_tokens": [{"id": 256, "content": "<|end|>", "single_word": false, "lstrip": false,
                          "rstrip": false, "normalized": false, "special": true}],
        "pre_tokenizer": byte_level, "post_processor": null, "decoder": byte_level,
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "fuse_unk": false,
                  "continuing_subword_prefix": null, "end_of_word_suffix": null,
                  "byte_fallback": false, "ignore_merges": false, "vocab": vocab, "merges": []},
    });
    std::fs::write(dir.join("tokenizer.json"), tokenizer.to_string()).unwrap();
    std::fs::write(dir.join("chat_template.jinja"), TEMPLATE).unwrap();
}

pub(super) fn text() -> ModelText {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path());
    ModelText {
        tokenizer: Arc::new(Tokenizer::load(dir.path()).unwrap()),
        template: Some(ChatTemplate::load(dir.path()).unwrap()),
    }
}

pub(super) fn tokenizer() -> Arc<Tokenizer> {
    text().tokenizer
}
