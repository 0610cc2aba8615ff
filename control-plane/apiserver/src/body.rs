//! Bodies of requests: read whole, and made into objects from JSON, YAML or protocol buffers.

use std::time::Duration;

use axum::body::Body;
use bytes::{Bytes, BytesMut};
use exo_crds::document::{self, Document};
use http_body_util::BodyExt as _;
use serde_json::Value;
use tokio::time::{Instant, timeout_at};

use crate::{
    error::ApiError,
    protobuf,
    request::Verb,
    server::{Call, Subresource},
};

/// Larger bodies are refused, as in Kubernetes; and larger objects, however they came about.
pub(crate) const MAX_BODY_BYTES: usize = 3 << 20;

/// Of a body that is too large, so much is read and forgotten: clients that are still sending when
/// the answer comes often don't see it.
const MAX_FORGOTTEN_BYTES: usize = 32 << 20;

/// Reads a body that must be whole within `limit`, and before the request's deadline.
pub(crate) async fn read(
    body: Body,
    limit: Duration,
    deadline: Instant,
) -> Result<Bytes, ApiError> {
    let until = deadline.min(Instant::now() + limit);
    timeout_at(until, collect(body)).await.map_err(|_| ApiError::SlowBody)?
}

async fn collect(mut body: Body) -> Result<Bytes, ApiError> {
    let mut whole = BytesMut::new();
    let mut bytes = 0;
    while let Some(frame) = body.frame().await {
        let frame =
            frame.map_err(|error| ApiError::BadRequest(format!("reading the body: {error}")))?;
        let Ok(part) = frame.into_data() else {
            continue;
        };
        bytes += part.len();
        if bytes <= MAX_BODY_BYTES {
            whole.extend_from_slice(&part);
        } else if bytes > MAX_FORGOTTEN_BYTES {
            break;
        }
    }
    if bytes > MAX_BODY_BYTES { Err(ApiError::TooLarge(MAX_BODY_BYTES)) } else { Ok(whole.into()) }
}

/// An object that came with a request.
pub(crate) struct Input {
    pub(crate) object: Value,
    /// `duplicate field "spec.x"` for each that was given twice.
    pub(crate) duplicates: Vec<String>,
}

impl Input {
    fn of(document: Document) -> Result<Self, ApiError> {
        if !document.value.is_object() {
            return Err(ApiError::BadRequest("the body is not an object".to_owned()));
        }
        Ok(Self { object: document.value, duplicates: duplicate_fields(&document.duplicates) })
    }
}

/// As Kubernetes words it.
pub(crate) fn duplicate_fields(paths: &[String]) -> Vec<String> {
    paths.iter().map(|path| format!("duplicate field \"{path}\"")).collect()
}

impl Call {
    /// The body as an object, in whichever form the resource takes.
    pub(crate) fn body_object(&self) -> Result<Input, ApiError> {
        match self.content_type.as_deref() {
            None | Some("application/json") => {}
            Some("application/yaml") => return self.yaml_object(),
            // As in Kubernetes, for its own types only.
            Some(protobuf::MEDIA_TYPE) if self.takes_protobuf() => {
                let object = protobuf::read(&self.body).map_err(|error| {
                    ApiError::BadRequest(format!("the body can't be read: {error}"))
                })?;
                return Ok(Input { object, duplicates: Vec::new() });
            }
            Some(_) => {
                return Err(ApiError::UnsupportedMediaType("application/json, application/yaml"));
            }
        }
        let document = document::from_json(&self.body)
            .map_err(|error| unreadable("JSON", &error.to_string()))?;
        Input::of(document)
    }

    /// Its own types, and what is not of the resource's type at all.
    fn takes_protobuf(&self) -> bool {
        let is_scale = self.subresource == Some(Subresource::Scale);
        self.resource.builtin || is_scale || self.verb == Verb::Delete
    }

    /// An applied configuration: YAML, of which JSON is the usual part.
    pub(crate) fn apply_object(&self) -> Result<Input, ApiError> {
        match document::from_json(&self.body) {
            Ok(document) => Input::of(document),
            Err(_) => self.yaml_object(),
        }
    }

    fn yaml_object(&self) -> Result<Input, ApiError> {
        let bad = |problem: &str| unreadable("YAML", problem);
        let text = std::str::from_utf8(&self.body).map_err(|e| bad(&e.to_string()))?;
        let mut documents =
            exo_crds::yaml::lenient_documents(text).map_err(|e| bad(&with_cause(&e)))?;
        documents.retain(|document| !document.value.is_null());
        match <[Document; 1]>::try_from(documents) {
            Ok([document]) => Input::of(document),
            Err(_) => Err(bad("exactly one document is expected")),
        }
    }
}

/// Says of what is nested too deeply what that means; the parsers' own word for it is their limit's.
fn unreadable(form: &str, problem: &str) -> ApiError {
    let problem = problem.replace("recursion limit exceeded", "nested deeper than 128 levels");
    ApiError::BadRequest(format!("the body can't be read as {form}: {problem}"))
}

fn with_cause(error: &dyn std::error::Error) -> String {
    match error.source() {
        Some(cause) => format!("{error}: {cause}"),
        None => error.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_nests_too_deeply_is_told_so() {
        let deep = "[".repeat(1_000);
        let json = document::from_json(deep.as_bytes()).unwrap_err().to_string();
        let yaml = exo_crds::yaml::lenient_documents(&deep).unwrap_err();
        for (form, problem) in [("JSON", json), ("YAML", with_cause(&yaml))] {
            let text = unreadable(form, &problem).to_string();
            let start = format!("the body can't be read as {form}: ");
            assert!(text.starts_with(&start), "{text}");
            assert!(text.contains("nested deeper than 128 levels"), "{text}");
        }
    }
}
