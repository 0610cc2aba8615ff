//! From text to tokens and back: tokenizers, chat templates, incremental detokenization and stop
//! texts, all read from a model folder in Hugging Face layout.
//!
//! Pure but for reading the folder. Never: MLX, sampling, or what a request may contain.

mod detokenizer;
mod json;
mod stop;
mod template;
mod tokenizer;

use std::{io, path::PathBuf};

pub use detokenizer::Detokenizer;
pub use stop::{StopMatcher, Stopped};
pub use template::{ChatInput, ChatTemplate};
pub use tokenizer::Tokenizer;

/// What went wrong with a tokenizer or a chat template.
#[derive(Debug, thiserror::Error)]
pub enum TextError {
    #[error("reading {path}")]
    Read {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("{path} is not JSON")]
    Json {
        path: PathBuf,
        #[source]
        source: serde_json::Error,
    },
    #[error("{path}: {message}")]
    Invalid { path: PathBuf, message: String },
    #[error("{dir} has no chat template (chat_template.jinja or tokenizer_config.json)")]
    NoTemplate { dir: PathBuf },
    #[error("encoding the text: {0}")]
    Encode(String),
    #[error("decoding tokens: {0}")]
    Decode(String),
    /// The template refused the conversation in its own words.
    #[error("{0}")]
    Refused(String),
    #[error("the chat template failed: {0}")]
    Render(String),
}

fn read(path: PathBuf) -> Result<Vec<u8>, TextError> {
    std::fs::read(&path).map_err(|source| TextError::Read { path, source })
}

/// The file's bytes, or `None` when there is no such file.
fn read_optional(path: PathBuf) -> Result<Option<Vec<u8>>, TextError> {
    match std::fs::read(&path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(TextError::Read { path, source }),
    }
}
