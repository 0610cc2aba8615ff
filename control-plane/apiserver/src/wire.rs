//! How answers go out: as YAML or indented where the client asks for that, compressed where it can
//! read that and it is worth the time. Never touches watches: each of their lines goes out at once.

use std::io::Write as _;

use async_stream::stream;
use axum::{
    body::{Body, HttpBody as _},
    extract::Request,
    http::{HeaderValue, header},
    middleware::Next,
    response::{IntoResponse as _, Response},
};
use bytes::Bytes;
use exo_crds::{transcode::JsonText, yaml};
use flate2::{Compression, write::GzEncoder};
use futures::StreamExt as _;
use http_body_util::BodyExt as _;

use crate::{
    error::ApiError,
    request::Query,
    server::header_text,
    table::{YAML, wants_yaml},
};

/// Shorter answers are not compressed, and longer ones fast rather than well, as in Kubernetes.
const MIN_GZIP_BYTES: u64 = 128 << 10;
const GZIP_LEVEL: u32 = 1;

/// About how long a body is that is still to be written.
#[derive(Clone, Copy, Debug)]
pub(crate) struct BodyBytes(pub(crate) u64);

/// How JSON can be written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Notation {
    Dense,
    Indented,
    Yaml,
}

pub(crate) async fn present(request: Request, next: Next) -> Response {
    let query = Query::parse(request.uri().query());
    let headers = request.headers();
    let notation = if header_text(headers, header::ACCEPT).is_some_and(wants_yaml) {
        Notation::Yaml
    } else if query.flag("pretty") == Some(true) {
        Notation::Indented
    } else {
        Notation::Dense
    };
    let takes_gzip = header_text(headers, header::ACCEPT_ENCODING).is_some_and(takes_gzip);
    let response = next.run(request).await;
    if query.flag("watch") == Some(true) {
        return response;
    }
    let response = match notation {
        Notation::Indented | Notation::Yaml if is_json(&response) => {
            rewrite(response, notation).await
        }
        Notation::Dense | Notation::Indented | Notation::Yaml => response,
    };
    if takes_gzip { compress(response) } else { response }
}

/// JSON that has no other form which is its own.
fn is_json(response: &Response) -> bool {
    let is_tagged = response.headers().contains_key(header::ETAG);
    header_text(response.headers(), header::CONTENT_TYPE) == Some("application/json") && !is_tagged
}

async fn rewrite(response: Response, notation: Notation) -> Response {
    let (mut parts, body) = response.into_parts();
    let json = match body.collect().await {
        Ok(body) => body.to_bytes(),
        Err(error) => return ApiError::Internal(error.to_string()).into_response(),
    };
    // Long lists take their time.
    let written = tokio::task::spawn_blocking(move || write(json, notation)).await;
    let text = match written {
        Ok(text) => text,
        Err(error) => return ApiError::Internal(error.to_string()).into_response(),
    };
    parts.headers.remove(header::CONTENT_LENGTH);
    if notation == Notation::Yaml {
        parts.headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(YAML));
    }
    Response::from_parts(parts, text.into())
}

fn write(json: Bytes, notation: Notation) -> Bytes {
    let text = JsonText(&json);
    let text = match notation {
        Notation::Dense => None,
        Notation::Indented => serde_json::to_string_pretty(&text).ok().map(|text| text + "\n"),
        Notation::Yaml => yaml::to_string(&text).ok(),
    };
    // What nests too deeply stays as it is: all JSON is YAML.
    text.map_or(json, Bytes::from)
}

/// Whether `Accept-Encoding` names gzip, and doesn't rule it out.
fn takes_gzip(accepted: &str) -> bool {
    accepted.split(',').any(|coding| {
        let mut parts = coding.split(';').map(str::trim);
        let is_gzip = parts.next().is_some_and(|name| name.eq_ignore_ascii_case("gzip"));
        let quality = parts.find_map(|parameter| parameter.strip_prefix("q="));
        is_gzip && quality.is_none_or(|q| q.parse::<f32>().is_ok_and(|q| q > 0.0))
    })
}

fn compress(mut response: Response) -> Response {
    let announced = response.extensions().get().map(|BodyBytes(bytes)| *bytes);
    let bytes = response.body().size_hint().exact().or(announced);
    let is_worth_it = bytes.is_some_and(|bytes| bytes >= MIN_GZIP_BYTES);
    if !is_worth_it || response.headers().contains_key(header::CONTENT_ENCODING) {
        return response;
    }
    let headers = response.headers_mut();
    headers.remove(header::CONTENT_LENGTH);
    headers.insert(header::CONTENT_ENCODING, HeaderValue::from_static("gzip"));
    headers.append(header::VARY, HeaderValue::from_static("Accept-Encoding"));
    response.map(gzip)
}

/// Compresses part by part, as the parts come.
fn gzip(body: Body) -> Body {
    let mut parts = body.into_data_stream();
    Body::from_stream(stream! {
        let mut encoder = GzEncoder::new(Vec::new(), Compression::new(GZIP_LEVEL));
        while let Some(part) = parts.next().await {
            let written = match part {
                Ok(part) => encoder.write_all(&part),
                Err(error) => Err(std::io::Error::other(error)),
            };
            if let Err(error) = written {
                yield Err(error);
                return;
            }
            let out = std::mem::take(encoder.get_mut());
            if !out.is_empty() {
                yield Ok(Bytes::from(out));
            }
        }
        yield encoder.finish().map(Bytes::from);
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn compression_is_for_who_takes_it() {
        for (accepted, expect) in [
            ("gzip", true),
            ("deflate, GZIP;q=0.5", true),
            ("gzip;q=0", false),
            ("gzip;q=much", false),
            ("br, deflate", false),
            ("", false),
        ] {
            assert_eq!(takes_gzip(accepted), expect, "{accepted}");
        }
    }

    #[test]
    fn what_nests_too_deeply_stays_json() {
        let deep = format!("{}1{}", "[".repeat(300), "]".repeat(300));
        let written = write(Bytes::from(deep.clone()), Notation::Yaml);
        assert_eq!(written, deep.as_bytes());
        assert_eq!(write("{\"a\":[1]}".into(), Notation::Yaml), "a:\n- 1\n");
    }
}
