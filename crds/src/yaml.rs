//! The one place that reads and writes YAML, so that the library behind it can change.

use serde::{Deserialize as _, Serialize, de::DeserializeOwned};
use serde_json::Value;

/// Larger documents are refused before parsing: no resource comes near this.
pub const MAX_BYTES: usize = 3 * 1024 * 1024;

/// A YAML text that could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum YamlError {
    #[error("the document has {0} bytes; at most {MAX_BYTES} are read")]
    TooLarge(usize),
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

/// Reads every document of `text`; empty ones are left out.
pub fn documents(text: &str) -> Result<Vec<Value>, YamlError> {
    if text.len() > MAX_BYTES {
        return Err(YamlError::TooLarge(text.len()));
    }
    let mut values = Vec::new();
    for (index, document) in serde_yaml::Deserializer::from_str(text).enumerate() {
        let value = Value::deserialize(document)
            .map_err(|source| YamlError::Syntax { document: index + 1, source })?;
        if !value.is_null() {
            values.push(value);
        }
    }
    Ok(values)
}

/// Reads a text that holds one document of a known type.
pub fn from_str<T: DeserializeOwned>(text: &str) -> Result<T, YamlError> {
    if text.len() > MAX_BYTES {
        return Err(YamlError::TooLarge(text.len()));
    }
    serde_yaml::from_str(text).map_err(|source| YamlError::Syntax { document: 1, source })
}

/// Writes one document.
pub fn to_string<T: Serialize>(value: &T) -> Result<String, YamlError> {
    serde_yaml::to_string(value).map_err(YamlError::Write)
}

#[cfg(test)]
mod tests {
    use super::*;

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
