//! The server's side of the calls between nodes.
//!
//! A call that was begun is answered with 200 and what became of it; every other status says that
//! nothing was done.

use std::{future::Future, sync::Arc};

use axum::{
    Router,
    body::Bytes,
    extract::{DefaultBodyLimit, Request as HttpRequest, State},
    http::{StatusCode, header},
    middleware::{self, Next},
    response::{IntoResponse as _, Response},
    routing::post,
};
use openraft::{
    Entry, EntryPayload,
    raft::{AppendEntriesRequest, AppendEntriesResponse},
};
use serde::{Serialize, de::DeserializeOwned};

use super::{
    RaftBackend, TypeConfig,
    call::{BASE, BODY_LIMIT_BYTES, TARGET},
    members::Change,
    network::{decode_chunk, json},
    reads::read_index,
};

type Backend = State<Arc<RaftBackend>>;

/// All routes. Whoever mounts them lets only the cluster's own nodes through.
pub(crate) fn routes(backend: Arc<RaftBackend>) -> Router {
    let path = |call: &str| format!("{BASE}{call}");
    Router::new()
        .route(&path("append"), post(append))
        .route(&path("vote"), post(vote))
        .route(&path("would-have"), post(would_have))
        .route(&path("room"), post(room))
        .route(&path("snapshot"), post(snapshot))
        .route(&path("read-index"), post(read))
        .route(&path("applied"), post(applied))
        .route(&path("write"), post(write))
        .route(&path("members"), post(members))
        .layer(middleware::from_fn_with_state(Arc::clone(&backend), check_target))
        .layer(DefaultBodyLimit::max(BODY_LIMIT_BYTES))
        .with_state(backend)
}

/// Refuses what was meant for another node, and everything once the store is shut down.
async fn check_target(State(backend): Backend, request: HttpRequest, next: Next) -> Response {
    let target = request.headers().get(TARGET).and_then(|v| v.to_str().ok());
    let own = backend.node.id;
    match target.map(str::parse::<u64>) {
        Some(Ok(id)) if id == own => {}
        _ => {
            let text = format!("this is node {own}");
            return (StatusCode::MISDIRECTED_REQUEST, text).into_response();
        }
    }
    if backend.is_stopped() {
        return (StatusCode::SERVICE_UNAVAILABLE, "the store is shut down").into_response();
    }
    next.run(request).await
}

/// Answers a call whose body is JSON.
async fn with<T: DeserializeOwned, A: Serialize, F: Future<Output = A>>(
    body: &Bytes,
    run: impl FnOnce(T) -> F,
) -> Response {
    match serde_json::from_slice(body) {
        Ok(request) => answer(&run(request).await),
        Err(error) => (StatusCode::BAD_REQUEST, error.to_string()).into_response(),
    }
}

fn answer<A: Serialize>(value: &A) -> Response {
    ([(header::CONTENT_TYPE, "application/json")], json(value)).into_response()
}

async fn append(State(backend): Backend, body: Bytes) -> Response {
    let mut request: AppendEntriesRequest<TypeConfig> = match serde_json::from_slice(&body) {
        Ok(request) => request,
        Err(error) => return (StatusCode::BAD_REQUEST, error.to_string()).into_response(),
    };
    // Signs of life need no room, nor what is here already, and an entry that only begins an office
    // little: without it there would be no reads. Without the rest this node falls behind, and catches
    // up later. Who leads, and what is committed of that which is here, it hears all the same.
    let newest = backend.node.disk.newest();
    let needs_room = |entry: &Entry<TypeConfig>| {
        Some(entry.log_id) > newest && !matches!(entry.payload, EntryPayload::Blank)
    };
    let refused = match request.entries.iter().position(needs_room) {
        Some(first) => backend.node.is_full().map(|problem| (first, problem)),
        None => None,
    };
    if let Some((first, _)) = refused {
        request.entries.truncate(first);
    }
    let answered = backend.node.raft.append_entries(request).await;
    // Whoever calls with an old vote leads no more.
    if answered.as_ref().is_ok_and(|a| !matches!(a, AppendEntriesResponse::HigherVote(_))) {
        backend.node.ear.heard();
    }
    match (refused, &answered) {
        (Some((_, problem)), Ok(AppendEntriesResponse::Success)) => {
            (StatusCode::SERVICE_UNAVAILABLE, problem).into_response()
        }
        _ => answer(&answered),
    }
}

/// Whether this node can take on more.
async fn room(State(backend): Backend) -> Response {
    answer(&backend.node.is_full().is_none())
}

async fn vote(State(backend): Backend, body: Bytes) -> Response {
    with(&body, |request| async {
        let answered = backend.node.raft.vote(request).await;
        if answered.as_ref().is_ok_and(|vote| vote.vote_granted) {
            backend.node.ear.heard();
        }
        answered
    })
    .await
}

async fn would_have(State(backend): Backend, body: Bytes) -> Response {
    with(&body, |candidate| async move { backend.node.would_have(candidate) }).await
}

async fn snapshot(State(backend): Backend, body: Bytes) -> Response {
    let Some(chunk) = decode_chunk(&body) else {
        return (StatusCode::BAD_REQUEST, "not a part of a snapshot").into_response();
    };
    let answered = backend.node.raft.install_snapshot(chunk).await;
    if answered.is_ok() {
        backend.node.ear.heard();
    }
    answer(&answered)
}

/// How far this node is; a sign of life as well.
async fn applied(State(backend): Backend) -> Response {
    answer(&backend.metrics().last_applied.map_or(0, |id| id.index))
}

async fn read(State(backend): Backend) -> Response {
    backend.node.telling.asked();
    answer(&read_index(&backend.node).await)
}

async fn write(State(backend): Backend, body: Bytes) -> Response {
    backend.node.telling.asked();
    with(&body, |commands| backend.writer.write_here(commands)).await
}

async fn members(State(backend): Backend, body: Bytes) -> Response {
    with(&body, |change: Change| async move { backend.node.change_here(&change).await }).await
}
