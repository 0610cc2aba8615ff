//! The one place that reads and writes YAML, so that the library behind it can change.

mod older;

use serde::{
    Serialize,
    de::{DeserializeOwned, DeserializeSeed as _},
};
use serde_json::Value;

use crate::document::{Document, Notes};

/// Larger documents are refused before parsing: no resource comes near this.
pub const MAX_BYTES: usize = 3 * 1024 * 1024;

/// What the values of a document may take: a few lines of aliases of aliases could otherwise stand
/// for more than any memory holds. No document without aliases comes near this.
const MAX_COST: usize = 32 * 1024 * 1024;

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
    #[error("document {document}: the key `{path}` is given twice")]
    Duplicate {
        /// 1-based position of the document within the text.
        document: usize,
        path: String,
    },
    #[error("writing YAML")]
    Write(#[source] serde_yaml::Error),
}

/// Reads every document of `text`; empty ones are left out. A key that is given twice is refused.
pub fn documents(text: &str) -> Result<Vec<Value>, YamlError> {
    let documents = lenient_documents(text)?;
    for (index, document) in documents.iter().enumerate() {
        if let Some(path) = document.duplicates.first() {
            return Err(YamlError::Duplicate { document: index + 1, path: path.clone() });
        }
    }
    Ok(documents.into_iter().map(|document| document.value).filter(|v| !v.is_null()).collect())
}

/// The same for who minds keys that are given twice; empty documents are there as null.
pub fn lenient_documents(text: &str) -> Result<Vec<Document>, YamlError> {
    check_size(text)?;
    let documents = serde_yaml::Deserializer::from_str(text).enumerate();
    documents
        .map(|(index, document)| {
            let notes = Notes::new(MAX_COST);
            let value = notes.reader().deserialize(document);
            let value =
                value.map_err(|source| YamlError::Syntax { document: index + 1, source })?;
            Ok(notes.document(value))
        })
        .collect()
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

/// Reads a text that holds one document of a known type.
pub fn from_str<T: DeserializeOwned>(text: &str) -> Result<T, YamlError> {
    check_size(text)?;
    serde_yaml::from_str(text).map_err(|source| YamlError::Syntax { document: 1, source })
}

/// Writes one document, such that readers of YAML 1.1 and of 1.2 find the same in it.
pub fn to_string<T: Serialize>(value: &T) -> Result<String, YamlError> {
    serde_yaml::to_string(value).map(older::quote).map_err(YamlError::Write)
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;

    fn refusal(text: &str) -> String {
        let begin = Instant::now();
        let error = documents(text).unwrap_err();
        // Far more than it takes, far less than reading it would.
        assert!(begin.elapsed() < Duration::from_secs(60), "{:?}", begin.elapsed());
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
        assert!(refusal("a: 1\nb: [{c: 1, c: 2}]\n").contains("`b[0].c` is given twice"));
        assert!(refusal("a: .nan\n").contains("no number"));
        assert!(refusal("[a]: 1\n").contains("invalid type"));
        documents("!tag x\n").unwrap_err();
        let values = documents("{1: a, true: b, x: 0x10, t: 2026-01-01, n: ~}\n").unwrap();
        let read =
            serde_json::json!({"1": "a", "true": "b", "x": 16, "t": "2026-01-01", "n": null});
        assert_eq!(values, [read]);
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
