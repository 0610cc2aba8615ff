//! A list on its way to a client: objects that go out as they are stored become text only when it is
//! their turn, so that a list costs no more memory than its entries, which the store has anyway.

use std::{convert::Infallible, fmt::Write as _, sync::Arc};

use axum::{
    Extension,
    body::Body,
    http::{StatusCode, header},
    response::{IntoResponse as _, Response},
};
use bytes::Bytes;
use exo_store::Entry;
use futures::stream;
use serde_json::Value;

use crate::{resource::Resource, wire::BodyBytes};

/// Long lists go out in parts of about this size; shorter ones as a whole.
pub(crate) const PART_BYTES: usize = 64 << 10;

/// A list while its items are being gathered.
pub(crate) struct ListBody {
    resource: Arc<Resource>,
    pieces: Vec<Piece>,
    /// What comes after them.
    tail: String,
    is_empty: bool,
    /// About so long are the pieces.
    bytes: usize,
}

enum Piece {
    /// Goes out as it is.
    Text(String),
    /// An item that is written as [`Resource::write_at`] does.
    Stored { comma: &'static str, entry: Entry },
}

impl ListBody {
    /// `head` comes before the first item.
    pub(crate) fn new(resource: Arc<Resource>, head: String) -> Self {
        Self { resource, pieces: Vec::new(), tail: head, is_empty: true, bytes: 0 }
    }

    pub(crate) fn push(&mut self, item: &Value) {
        let comma = self.comma();
        // Writing into a text can't fail.
        let _ = write!(self.tail, "{comma}{item}");
        if self.tail.len() >= PART_BYTES {
            self.end_text();
        }
    }

    /// The same for an entry that is plain.
    pub(crate) fn push_stored(&mut self, entry: &Entry) {
        self.end_text();
        let comma = self.comma();
        self.bytes += entry.value.len();
        self.pieces.push(Piece::Stored { comma, entry: entry.clone() });
    }

    /// What stands between the last item and the next one.
    fn comma(&mut self) -> &'static str {
        if std::mem::take(&mut self.is_empty) { "" } else { "," }
    }

    fn end_text(&mut self) {
        if !self.tail.is_empty() {
            self.bytes += self.tail.len();
            self.pieces.push(Piece::Text(std::mem::take(&mut self.tail)));
        }
    }

    /// The answer, which ends with the list's metadata.
    pub(crate) fn respond(mut self, metadata: &Value) -> Response {
        // Writing into a text can't fail.
        let _ = write!(self.tail, "],\"metadata\":{metadata}}}");
        self.end_text();
        let bytes = self.bytes;
        let is_short = bytes < PART_BYTES;
        let mut parts = Parts { resource: self.resource, pieces: self.pieces.into_iter() };
        let body = if is_short {
            parts.up_to(usize::MAX).into()
        } else {
            Body::from_stream(stream::iter(parts.map(Ok::<_, Infallible>)))
        };
        let size = BodyBytes(u64::try_from(bytes).unwrap_or(u64::MAX));
        let headers = [(header::CONTENT_TYPE, "application/json")];
        (StatusCode::OK, Extension(size), headers, body).into_response()
    }
}

/// The text of a list, part by part.
struct Parts {
    resource: Arc<Resource>,
    pieces: std::vec::IntoIter<Piece>,
}

impl Parts {
    /// The next pieces until so many bytes are reached.
    fn up_to(&mut self, bytes: usize) -> String {
        let mut text = String::new();
        while text.len() < bytes {
            match self.pieces.next() {
                Some(Piece::Text(more)) if text.is_empty() => text = more,
                Some(Piece::Text(more)) => text.push_str(&more),
                Some(Piece::Stored { comma, entry }) => {
                    text.push_str(comma);
                    let written = self.resource.write_at(&mut text, &entry, entry.mod_revision);
                    debug_assert!(written, "only such entries are pushed");
                }
                None => break,
            }
        }
        text
    }
}

impl Iterator for Parts {
    type Item = Bytes;

    fn next(&mut self) -> Option<Bytes> {
        let text = self.up_to(PART_BYTES);
        (!text.is_empty()).then(|| text.into())
    }
}
