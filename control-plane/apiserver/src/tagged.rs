//! Answers with a tag of their content, so that clients which have them need not load them again.

use std::hash::{DefaultHasher, Hash as _, Hasher as _};

use axum::{
    body::Body,
    http::{HeaderMap, HeaderValue, StatusCode, header},
    response::{IntoResponse as _, Response},
};
use bytes::Bytes;

use crate::server::header_text;

/// A body and what tells it from others.
#[derive(Clone, Debug)]
pub(crate) struct Tagged {
    content_type: HeaderValue,
    hash: String,
    body: Bytes,
}

impl Tagged {
    /// # Panics
    /// When the content type can't stand in a header.
    pub(crate) fn new(content_type: &str, body: impl Into<Bytes>) -> Self {
        let body = body.into();
        // The same in all servers of one version; others may load once more.
        let mut hasher = DefaultHasher::new();
        (content_type, &body).hash(&mut hasher);
        let content_type = content_type.parse().expect("media types are plain text");
        Self { content_type, hash: format!("{:016X}", hasher.finish()), body }
    }

    pub(crate) fn hash(&self) -> &str {
        &self.hash
    }

    /// The body, or that the client has it.
    pub(crate) fn respond(&self, request: &HeaderMap) -> Response {
        let tag = format!("\"{}\"", self.hash);
        let known = header_text(request, header::IF_NONE_MATCH).unwrap_or_default();
        let is_known = known
            .split(',')
            .map(|known| known.trim().trim_start_matches("W/"))
            .any(|known| known == tag || known == "*");
        let mut response = if is_known {
            StatusCode::NOT_MODIFIED.into_response()
        } else {
            let mut response = Body::from(self.body.clone()).into_response();
            response.headers_mut().insert(header::CONTENT_TYPE, self.content_type.clone());
            response
        };
        let headers = response.headers_mut();
        headers.insert(header::ETAG, tag.parse().expect("a number is plain text"));
        // The same address answers in several forms.
        headers.insert(header::VARY, HeaderValue::from_static("Accept"));
        response
    }
}
