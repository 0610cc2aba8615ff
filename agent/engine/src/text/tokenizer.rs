//! Text to token ids and back, as `tokenizer.json` says.

use std::{collections::HashSet, fmt, path::Path};

use super::{TextError, read};

/// A model's tokenizer. Cheap to share behind an `Arc`; all methods take `&self`.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    special: HashSet<u32>,
}

impl fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tokenizer").field("vocab_size", &self.vocab_size()).finish_non_exhaustive()
    }
}

impl Tokenizer {
    /// Reads `tokenizer.json` in the model's folder.
    pub fn load(dir: &Path) -> Result<Self, TextError> {
        let path = dir.join("tokenizer.json");
        let bytes = read(path.clone())?;
        Self::from_bytes(&bytes).map_err(|message| TextError::Invalid { path, message })
    }

    /// Takes the content of a `tokenizer.json`; the error is a sentence.
    fn from_bytes(bytes: &[u8]) -> Result<Self, String> {
        let mut inner =
            tokenizers::Tokenizer::from_bytes(bytes).map_err(|error| error.to_string())?;
        // Left in some files from training; a prompt is never cut or filled up behind our back.
        inner.with_truncation(None).map_err(|error| error.to_string())?;
        inner.with_padding(None);
        let special = inner
            .get_added_tokens_decoder()
            .iter()
            .filter(|(_, token)| token.special)
            .map(|(id, _)| *id)
            .collect();
        Ok(Self { inner, special })
    }

    /// Encodes text as it stands: what a chat template rendered carries its special tokens itself.
    /// Their spellings in `text` become those tokens.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, TextError> {
        self.encode_with(text, false)
    }

    /// Encodes a bare prompt, with the special tokens around it that the tokenizer asks for.
    pub fn encode_with_special(&self, text: &str) -> Result<Vec<u32>, TextError> {
        self.encode_with(text, true)
    }

    fn encode_with(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>, TextError> {
        let encoding = self
            .inner
            .encode_fast(text, add_special_tokens)
            .map_err(|error| TextError::Encode(error.to_string()))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The text of tokens, special tokens left out. Bytes that are no UTF-8 become U+FFFD; ids that
    /// the vocabulary lacks are left out.
    pub fn decode(&self, ids: &[u32]) -> Result<String, TextError> {
        self.decode_with(ids, true)
    }

    /// The text of one token by itself, special tokens included.
    pub fn token_text(&self, id: u32) -> Result<String, TextError> {
        self.decode_with(&[id], false)
    }

    fn decode_with(&self, ids: &[u32], skip_special_tokens: bool) -> Result<String, TextError> {
        self.inner
            .decode(ids, skip_special_tokens)
            .map_err(|error| TextError::Decode(error.to_string()))
    }

    /// Whether a token is left out of the text.
    pub fn is_special(&self, id: u32) -> bool {
        self.special.contains(&id)
    }

    /// Id of a token by its spelling in the vocabulary.
    pub fn token_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// Number of tokens, added ones included.
    pub fn vocab_size(&self) -> usize {
        self.inner.get_vocab_size(true)
    }

    #[cfg(test)]
    pub(super) fn from_json(json: &serde_json::Value) -> Self {
        Self::from_bytes(json.to_string().as_bytes()).expect("the test's tokenizer is valid")
    }
}

/// Small tokenizers made for the tests of this module.
#[cfg(test)]
pub(super) mod samples {
    use serde_json::{Map, Value, json};

    use super::Tokenizer;

    /// GPT-2's printable stand-ins for bytes: the printable ones stand for themselves, the others
    /// follow from U+0100 on.
    fn byte_chars() -> Vec<char> {
        let printable = |b: u32| (33..=126).contains(&b) || (161..=172).contains(&b) || b >= 174;
        let mut next = 256;
        (0..256)
            .map(|b| {
                let code = if printable(b) {
                    b
                } else {
                    next += 1;
                    next - 1
                };
                char::from_u32(code).unwrap()
            })
            .collect()
    }

    fn added(id: u32, content: &str) -> Value {
        json!({"id": id, "content": content, "single_word": false, "lstrip": false,
               "rstrip": false, "normalized": false, "special": true})
    }

    fn tokenizer(added: &[Value], decoder: &Value, pre: &Value, model: &Value) -> Tokenizer {
        Tokenizer::from_json(&json!({
            "version": "1.0", "truncation": null, "padding": null, "added_tokens": added,
            "normalizer": null, "pre_tokenizer": pre, "post_processor": null,
            "decoder": decoder, "model": model,
        }))
    }

    fn bpe(vocab: &Map<String, Value>, merges: &[&str], byte_fallback: bool) -> Value {
        json!({"type": "BPE", "dropout": null, "unk_token": null,
               "continuing_subword_prefix": null, "end_of_word_suffix": null,
               "fuse_unk": false, "byte_fallback": byte_fallback, "ignore_merges": false,
               "vocab": vocab, "merges": merges})
    }

    /// As Llama 3, Qwen and the tiny model: ids 0–255 are bytes, 256 is `he`, 257 is `Ġhe`,
    /// 258 and 259 are special.
    pub(in super::super) fn byte_level() -> Tokenizer {
        let chars = byte_chars();
        let mut vocab: Map<String, Value> =
            (chars.iter().enumerate()).map(|(id, c)| (c.to_string(), id.into())).collect();
        vocab.insert("he".to_owned(), 256.into());
        vocab.insert("Ġhe".to_owned(), 257.into());
        let byte_level = json!({"type": "ByteLevel", "add_prefix_space": false,
                                "trim_offsets": true, "use_regex": false});
        tokenizer(
            &[added(258, "<|end|>"), added(259, "<|start|>")],
            &byte_level,
            &byte_level,
            &bpe(&vocab, &["h e", "Ġ he"], false),
        )
    }

    /// As Llama 2 and Mistral: `▁` for a space, `<0xHH>` for bytes outside the vocabulary. Ids
    /// 0–255 are bytes, 256 `▁`, 257 `a`, 258 `▁a`, 259 `b`, 260 is special.
    pub(in super::super) fn byte_fallback() -> Tokenizer {
        let mut vocab: Map<String, Value> =
            (0..256).map(|b| (format!("<0x{b:02X}>"), b.into())).collect();
        for (id, token) in [(256, "▁"), (257, "a"), (258, "▁a"), (259, "b")] {
            vocab.insert(token.to_owned(), id.into());
        }
        let decoder = json!({"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ]});
        let pre = json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first",
                         "split": false});
        tokenizer(&[added(260, "</s>")], &decoder, &pre, &bpe(&vocab, &["▁ a"], true))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn byte_level_texts_come_back() {
        let tokenizer = samples::byte_level();
        assert_eq!(tokenizer.encode("he he").unwrap(), [256, 257]);
        for text in ["", " ", "the héron — 鹭 🦩", "\n\n  a\t"] {
            let ids = tokenizer.encode(text).unwrap();
            assert_eq!(tokenizer.decode(&ids).unwrap(), text);
        }
    }

    #[test]
    fn special_tokens_are_read_but_not_written() {
        let tokenizer = samples::byte_level();
        let ids = tokenizer.encode("<|start|>he<|end|>").unwrap();
        assert_eq!(ids, [259, 256, 258]);
        assert_eq!(tokenizer.decode(&ids).unwrap(), "he");
        assert_eq!(tokenizer.token_text(258).unwrap(), "<|end|>");
        assert!(tokenizer.is_special(258) && !tokenizer.is_special(256));
        assert_eq!(tokenizer.token_id("<|end|>"), Some(258));
        assert_eq!(tokenizer.vocab_size(), 260);
    }

    #[test]
    fn byte_fallback_texts_come_back() {
        let tokenizer = samples::byte_fallback();
        assert_eq!(tokenizer.encode("a a").unwrap(), [258, 258]);
        for text in ["a b", "aé鹭b"] {
            let ids = tokenizer.encode(text).unwrap();
            assert_eq!(tokenizer.decode(&ids).unwrap(), text);
        }
    }

    #[test]
    fn a_bad_file_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let missing = Tokenizer::load(dir.path()).unwrap_err();
        assert!(missing.to_string().ends_with("tokenizer.json"), "{missing}");
        std::fs::write(dir.path().join("tokenizer.json"), "{}").unwrap();
        let bad = Tokenizer::load(dir.path()).unwrap_err();
        assert!(bad.to_string().contains("tokenizer.json: "), "{bad}");
    }
}
