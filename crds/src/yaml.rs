//! The one place that reads and writes YAML, so that the library behind it can change.

use std::{cell::Cell, fmt};

use serde::{
    Deserializer, Serialize,
    de::{self, DeserializeOwned, DeserializeSeed, MapAccess, SeqAccess, Visitor},
};
use serde_json::{Map, Number, Value};

/// Larger documents are refused before parsing: no resource comes near this.
pub const MAX_BYTES: usize = 3 * 1024 * 1024;

/// What the values of a document may take: a few lines of aliases of aliases could otherwise stand
/// for more than any memory holds. No document without aliases comes near this.
const MAX_COST: usize = 32 * 1024 * 1024;
/// Cost of each value beside its text.
const VALUE_COST: usize = 16;

/// Lists and maps in brackets within each other: the parser's time grows with their depth, long
/// before it finds that nothing nests so deeply. Brackets in texts are counted too, so that this is
/// far above what documents have.
const MAX_OPEN_BRACKETS: usize = 2_000;

/// A YAML text that could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum YamlError {
    #[error("the document has {0} bytes; at most {MAX_BYTES} are read")]
    TooLarge(usize),
    #[error("more than {MAX_OPEN_BRACKETS} brackets are open at once")]
    TooDeep,
    #[error("document {document}")]
    Syntax {
        /// 1-based position of the document within the text.
        document: usize,
        #[source]
        source: serde_yaml::Error,
    },
    #[error("writing YAML")]
    Write(#[source] serde_yaml::Error),
}

/// Reads every document of `text`; empty ones are left out. A key that is given twice is refused.
pub fn documents(text: &str) -> Result<Vec<Value>, YamlError> {
    check_size(text)?;
    let mut values = Vec::new();
    for (index, document) in serde_yaml::Deserializer::from_str(text).enumerate() {
        let left = Cell::new(MAX_COST);
        let value = Reader { left: &left }
            .deserialize(document)
            .map_err(|source| YamlError::Syntax { document: index + 1, source })?;
        if !value.is_null() {
            values.push(value);
        }
    }
    Ok(values)
}

fn check_size(text: &str) -> Result<(), YamlError> {
    if text.len() > MAX_BYTES {
        return Err(YamlError::TooLarge(text.len()));
    }
    let mut open = 0_usize;
    for byte in text.bytes() {
        match byte {
            b'[' | b'{' => open += 1,
            b']' | b'}' => open = open.saturating_sub(1),
            _ => continue,
        }
        if open > MAX_OPEN_BRACKETS {
            return Err(YamlError::TooDeep);
        }
    }
    Ok(())
}

/// Reads a value as long as there is something left for it.
#[derive(Clone, Copy)]
struct Reader<'a> {
    left: &'a Cell<usize>,
}

impl Reader<'_> {
    fn pay<E: de::Error>(self, text_bytes: usize) -> Result<(), E> {
        let left = self.left.get().checked_sub(VALUE_COST + text_bytes);
        let left = left.ok_or_else(|| E::custom("the aliases in it make it too large"))?;
        self.left.set(left);
        Ok(())
    }
}

impl<'de> DeserializeSeed<'de> for Reader<'_> {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Reader<'_> {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a value that JSON has too")
    }

    fn visit_bool<E: de::Error>(self, value: bool) -> Result<Value, E> {
        self.pay(0).map(|()| Value::Bool(value))
    }

    fn visit_i64<E: de::Error>(self, value: i64) -> Result<Value, E> {
        self.pay(0).map(|()| value.into())
    }

    fn visit_u64<E: de::Error>(self, value: u64) -> Result<Value, E> {
        self.pay(0).map(|()| value.into())
    }

    fn visit_f64<E: de::Error>(self, value: f64) -> Result<Value, E> {
        self.pay(0)?;
        let number = Number::from_f64(value);
        number.map(Value::Number).ok_or_else(|| E::custom(format!("{value} is no number in JSON")))
    }

    fn visit_str<E: de::Error>(self, value: &str) -> Result<Value, E> {
        self.pay(value.len()).map(|()| value.into())
    }

    fn visit_unit<E: de::Error>(self) -> Result<Value, E> {
        self.pay(0).map(|()| Value::Null)
    }

    fn visit_none<E: de::Error>(self) -> Result<Value, E> {
        self.visit_unit()
    }

    fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        self.deserialize(deserializer)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Value, A::Error> {
        self.pay(0)?;
        let mut list = Vec::new();
        while let Some(item) = items.next_element_seed(self)? {
            list.push(item);
        }
        Ok(Value::Array(list))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Value, A::Error> {
        self.pay(0)?;
        let mut map = Map::new();
        while let Some(key) = entries.next_key::<String>()? {
            self.pay(key.len())?;
            let value = entries.next_value_seed(self)?;
            if map.contains_key(&key) {
                return Err(de::Error::custom(format!("the key {key:?} is given twice")));
            }
            map.insert(key, value);
        }
        Ok(Value::Object(map))
    }
}

/// Reads a text that holds one document of a known type.
pub fn from_str<T: DeserializeOwned>(text: &str) -> Result<T, YamlError> {
    check_size(text)?;
    serde_yaml::from_str(text).map_err(|source| YamlError::Syntax { document: 1, source })
}

/// Writes one document.
pub fn to_string<T: Serialize>(value: &T) -> Result<String, YamlError> {
    serde_yaml::to_string(value).map_err(YamlError::Write)
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use proptest::prelude::*;

    use super::*;

    fn refusal(text: &str) -> String {
        let begin = Instant::now();
        let error = documents(text).unwrap_err();
        // Far more than it takes, far less than reading it would.
        assert!(begin.elapsed() < Duration::from_secs(10), "{:?}", begin.elapsed());
        match std::error::Error::source(&error) {
            Some(source) => source.to_string(),
            None => error.to_string(),
        }
    }

    #[test]
    fn what_would_grow_or_nest_without_end_is_refused_early() {
        let mut bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n".to_owned();
        for n in 1..30 {
            let inner = vec![format!("*a{}", n - 1); 10].join(", ");
            bomb.push_str(&format!("a{n}: &a{n} [{inner}]\n"));
        }
        // Whichever is noticed first.
        let bomb = refusal(&bomb);
        assert!(bomb.contains("aliases") || bomb.contains("repetition limit"), "{bomb}");
        let wide = format!("a: &a [{}]\nb: [{}]\n", "x,".repeat(50_000), "*a,".repeat(50_000));
        let wide = refusal(&wide);
        assert!(wide.contains("aliases"), "{wide}");
        for (open, close) in [("[", "]"), ("{a: ", "}"), ("- ", "")] {
            for depth in [200, 200_000] {
                let deep = format!("{}x{}", open.repeat(depth), close.repeat(depth));
                let why = refusal(&deep);
                let is_deep = why.contains("recursion limit") || why.contains("open at once");
                assert!(is_deep, "{open} {depth}: {why}");
            }
        }
        assert!(refusal(&"- x\n".repeat(MAX_BYTES / 4 + 1)).contains("at most"));
        // The largest plain document is read.
        assert_eq!(documents(&"- 1\n".repeat(MAX_BYTES / 4)).unwrap().len(), 1);
    }

    #[test]
    fn what_json_does_not_have_is_refused() {
        assert!(refusal("a: 1\na: 2\n").contains("given twice"));
        assert!(refusal("a: .nan\n").contains("no number"));
        assert!(refusal("[a]: 1\n").contains("invalid type"));
        documents("!tag x\n").unwrap_err();
        let values = documents("{1: a, true: b, x: 0x10, t: 2026-01-01, n: ~}\n").unwrap();
        let read =
            serde_json::json!({"1": "a", "true": "b", "x": 16, "t": "2026-01-01", "n": null});
        assert_eq!(values, [read]);
    }

    const SAMPLE: &str = include_str!("../../manifests/samples/tiny.yaml");

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(500))]

        #[test]
        fn damaged_documents_are_read_or_refused(
            edits in prop::collection::vec((0..SAMPLE.len(), 0..4u8, any::<char>()), 1..8),
        ) {
            let mut chars: Vec<char> = SAMPLE.chars().collect();
            for (at, kind, c) in edits {
                let at = at % chars.len().max(1);
                match kind {
                    0 => chars.truncate(at),
                    1 if !chars.is_empty() => { chars.remove(at); }
                    2 if !chars.is_empty() => chars[at] = c,
                    _ => chars.insert(at, c),
                }
            }
            let text: String = chars.into_iter().collect();
            // What is read is JSON, and reads the same again.
            if let Ok(values) = documents(&text) {
                for value in values {
                    let again = documents(&to_string(&value).unwrap()).unwrap();
                    prop_assert_eq!(again, [value]);
                }
            }
        }

        #[test]
        fn any_text_is_read_or_refused(text in "[ -~\n\t&*!|>%@`é]{0,80}") {
            let _ = documents(&text);
        }
    }

    #[test]
    fn reads_several_documents_and_skips_empty_ones() {
        let values = documents("a: 1\n---\n---\nb: [x]\n").unwrap();
        assert_eq!(values, [serde_json::json!({"a": 1}), serde_json::json!({"b": ["x"]})]);
    }

    #[test]
    fn names_the_document_with_the_error() {
        let error = documents("a: 1\n---\nb: [x\n").unwrap_err();
        assert!(matches!(error, YamlError::Syntax { document: 2, .. }), "{error}");
    }
}
