//! How answers go out: as YAML or indented where the client asks for that, compressed where it can
//! read that and it is worth the time. Never touches watches: each of their lines goes out at once.

use std::{
    convert::Infallible,
    io::Write as _,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::Poll,
};

use async_stream::stream;
use axum::{
    body::{Body, HttpBody as _},
    extract::{Request, State},
    http::{HeaderValue, Method, header},
    middleware::Next,
    response::{IntoResponse as _, Response},
};
use bytes::Bytes;
use exo_crds::{transcode::JsonText, yaml};
use flate2::{Compression, write::GzEncoder};
use futures::StreamExt as _;
use http_body_util::BodyExt as _;
use tokio::{
    sync::OwnedSemaphorePermit,
    task::JoinSet,
    time::{Instant, sleep_until},
};

use crate::{
    error::ApiError,
    list::PART_BYTES,
    request::Query,
    server::{Answered, ApiServer, header_text},
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

/// A long answer that is still to be written, up to a deadline.
#[derive(Clone)]
pub(crate) struct Unwritten {
    pub(crate) answered: Arc<Answered>,
    pub(crate) deadline: Instant,
}

pub(crate) async fn present(
    State(server): State<ApiServer>,
    request: Request,
    next: Next,
) -> Response {
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
    let is_watch = request.method() == Method::GET && query.flag("watch") == Some(true);
    let mut response = next.run(request).await;
    if is_watch {
        return response;
    }
    let unwritten = response.extensions_mut().remove::<Unwritten>();
    let response = match notation {
        Notation::Indented | Notation::Yaml if is_json(&response) => {
            match rewrite(&server, response, notation).await {
                Ok(response) => response,
                Err(error) => return error.into_response(),
            }
        }
        Notation::Dense | Notation::Indented | Notation::Yaml => response,
    };
    let response = if takes_gzip { compress(response) } else { response };
    match unwritten {
        Some(unwritten) => response.map(|body| until(body, unwritten)),
        None => response,
    }
}

/// JSON that has no other form which is its own.
fn is_json(response: &Response) -> bool {
    let is_tagged = response.headers().contains_key(header::ETAG);
    header_text(response.headers(), header::CONTENT_TYPE) == Some("application/json") && !is_tagged
}

/// Long answers hold their share of the memory until they are out; the others are in memory anyway.
async fn rewrite(
    server: &ApiServer,
    response: Response,
    notation: Notation,
) -> Result<Response, ApiError> {
    let share = match response.body().size_hint().exact() {
        Some(_) => None,
        None => {
            let announced = response.extensions().get().map_or(0, |BodyBytes(bytes)| *bytes);
            let share = server.flow().rewriting(announced);
            Some(share.inspect_err(|_| {
                server.metrics().rejected.with_label_values(&["rewriting"]).inc();
            })?)
        }
    };
    let (mut parts, body) = response.into_parts();
    let internal = |error: &dyn std::error::Error| ApiError::Internal(error.to_string());
    let json = body.collect().await.map_err(|error| internal(&error))?.to_bytes();
    // Long lists take their time.
    let written = tokio::task::spawn_blocking(move || write(json, notation)).await;
    let text = written.map_err(|error| internal(&error))?;
    parts.headers.remove(header::CONTENT_LENGTH);
    if notation == Notation::Yaml {
        parts.headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(YAML));
    }
    let body = match share {
        None => text.into(),
        Some(share) => in_parts(text, share),
    };
    Ok(Response::from_parts(parts, body))
}

/// What is on its way to the client is a copy: the text goes when the body does.
fn in_parts(text: Bytes, share: OwnedSemaphorePermit) -> Body {
    Body::from_stream(stream! {
        let _until_it_is_out = share;
        for part in text.chunks(PART_BYTES) {
            yield Ok::<_, Infallible>(Bytes::copy_from_slice(part));
        }
    })
}

/// A body that ends with an error when it isn't read by the deadline. What it holds goes then, be it
/// that nobody reads any more: a connection that stands still doesn't ask for the rest.
fn until(body: Body, unwritten: Unwritten) -> Body {
    let Unwritten { answered, deadline } = unwritten;
    let slot = Arc::new(Mutex::new(Some((body.into_data_stream(), answered))));
    let emptied = Arc::downgrade(&slot);
    let mut timer = JoinSet::new();
    timer.spawn(async move {
        sleep_until(deadline).await;
        let held = emptied.upgrade().map(|slot| lock(&slot).take());
        drop(held);
    });
    Body::from_stream(futures::stream::poll_fn(move |context| {
        let _until_the_end = &timer;
        match lock(&slot).as_mut() {
            Some((parts, _)) => parts.poll_next_unpin(context),
            None => Poll::Ready(Some(Err(axum::Error::new(LateAnswer)))),
        }
    }))
}

#[derive(Debug, thiserror::Error)]
#[error("the answer was not read in time")]
struct LateAnswer;

/// Nothing panics while it is held.
fn lock<T>(slot: &Mutex<T>) -> MutexGuard<'_, T> {
    slot.lock().unwrap_or_else(PoisonError::into_inner)
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
