//! One connection to a runner: sends a request, reads its events.
//!
//! Knows nothing of retries; says of each failure what kind it is.

use std::error::Error as _;

use bytes::{Bytes, BytesMut};
use exo_crds::generate::{self, ErrorCode, GenerateEvent, GenerateRequest};

/// A line that is longer than this is not an event: the largest carry 20 log probabilities.
const MAX_LINE_BYTES: usize = 1024 * 1024;
/// A refusal is one event.
const MAX_REFUSAL_BYTES: usize = 64 * 1024;

/// How runners are reached.
#[derive(Clone, Debug)]
pub(crate) struct Runners {
    pub(crate) http: reqwest::Client,
    /// `https`; `http` in tests.
    pub(crate) scheme: &'static str,
}

/// Why a connection gave no (further) events.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Break {
    #[error("no connection: {}", root_cause(.0))]
    Connect(reqwest::Error),
    #[error("the connection broke: {}", root_cause(.0))]
    Read(reqwest::Error),
    #[error("the answer ended early")]
    Ended,
    #[error("the replica was withdrawn")]
    Withdrawn,
    /// The runner's own words.
    #[error("{message}")]
    Refused { code: ErrorCode, message: String },
    #[error("the runner answered {0}")]
    Status(reqwest::StatusCode),
    #[error("the runner sent something that is not an event")]
    NotAnEvent,
}

/// What may follow a break.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Remedy {
    /// Another replica or a later epoch may do better; the request is not to blame.
    Elsewhere,
    /// The same, but the request may have caused it.
    ElsewhereSuspect,
    None,
}

impl Break {
    pub(crate) fn remedy(&self) -> Remedy {
        match self {
            Self::Connect(_) | Self::Withdrawn => Remedy::Elsewhere,
            Self::Read(_) | Self::Ended => Remedy::ElsewhereSuspect,
            Self::Refused { code, .. } if code.is_retryable() => Remedy::Elsewhere,
            Self::Status(status) if status.is_server_error() => Remedy::ElsewhereSuspect,
            Self::Refused { .. } | Self::Status(_) | Self::NotAnEvent => Remedy::None,
        }
    }
}

/// The innermost cause says more than reqwest's own sentence, which holds the URL only.
fn root_cause(error: &reqwest::Error) -> String {
    let mut cause: &dyn std::error::Error = error;
    while let Some(source) = cause.source() {
        cause = source;
    }
    if error.source().is_none() && error.is_timeout() {
        return "timed out".to_owned();
    }
    cause.to_string()
}

impl Runners {
    /// Sends `request` to the runner at `endpoint` and waits for it to be taken.
    pub(crate) async fn open(
        &self,
        endpoint: &str,
        request: &GenerateRequest,
    ) -> Result<Events, Break> {
        let url = format!("{}://{endpoint}{}", self.scheme, generate::PATH);
        let response = self.http.post(url).json(request).send().await;
        let response = response.map_err(Break::Connect)?;
        let status = response.status();
        let mut events = Events { response, lines: Lines::default() };
        if status.is_success() {
            return Ok(events);
        }
        match events.refusal().await {
            Some(GenerateEvent::Error { code, message }) => Err(Break::Refused { code, message }),
            _ => Err(Break::Status(status)),
        }
    }
}

/// The events of one connection; closing it (dropping this) cancels the request.
#[derive(Debug)]
pub(crate) struct Events {
    response: reqwest::Response,
    lines: Lines,
}

impl Events {
    /// The next event. Cancel-safe: what was read stays in the buffer.
    pub(crate) async fn next(&mut self) -> Result<GenerateEvent, Break> {
        loop {
            if let Some(line) = self.lines.next()? {
                return serde_json::from_slice(&line).map_err(|_| Break::NotAnEvent);
            }
            match self.response.chunk().await.map_err(Break::Read)? {
                Some(chunk) => self.lines.push(&chunk),
                None => return Err(Break::Ended),
            }
        }
    }

    /// The body of an error response, with or without a line break at its end.
    async fn refusal(&mut self) -> Option<GenerateEvent> {
        let mut body = BytesMut::new();
        while let Ok(Some(chunk)) = self.response.chunk().await {
            body.extend_from_slice(&chunk);
            if body.len() > MAX_REFUSAL_BYTES {
                return None;
            }
        }
        serde_json::from_slice(&body).ok()
    }
}

/// Cuts a byte stream into lines.
#[derive(Debug, Default)]
struct Lines {
    buffer: BytesMut,
    /// Bytes known to hold no line break.
    searched: usize,
}

impl Lines {
    fn push(&mut self, bytes: &[u8]) {
        self.buffer.extend_from_slice(bytes);
    }

    /// The next complete line that is not empty, without its line break.
    fn next(&mut self) -> Result<Option<Bytes>, Break> {
        while let Some(at) = self.buffer[self.searched..].iter().position(|&b| b == b'\n') {
            let mut line = self.buffer.split_to(self.searched + at + 1).freeze();
            self.searched = 0;
            line.truncate(line.trim_ascii_end().len());
            if !line.is_empty() {
                return Ok(Some(line));
            }
        }
        self.searched = self.buffer.len();
        if self.searched > MAX_LINE_BYTES {
            return Err(Break::NotAnEvent);
        }
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_whole_however_they_arrive() {
        let input = b"{\"a\":1}\r\n\n{\"b\":2}\nrest";
        for size in 1..input.len() {
            let mut lines = Lines::default();
            let mut got = Vec::new();
            for piece in input.chunks(size) {
                lines.push(piece);
                while let Some(line) = lines.next().unwrap() {
                    got.push(line);
                }
            }
            assert_eq!(got, ["{\"a\":1}", "{\"b\":2}"], "in pieces of {size}");
        }
    }

    #[test]
    fn an_endless_line_is_refused() {
        let mut lines = Lines::default();
        lines.push(&vec![b'x'; MAX_LINE_BYTES]);
        assert!(matches!(lines.next(), Ok(None)));
        lines.push(b"x");
        assert!(matches!(lines.next(), Err(Break::NotAnEvent)));
    }
}
