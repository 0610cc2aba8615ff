//! Routes and handlers; everything that touches a socket on the client's side.

mod body;
mod cors;
mod observe;

use std::{
    convert::Infallible,
    sync::Arc,
    time::{SystemTime, UNIX_EPOCH},
};

use axum::{
    Json, Router,
    body::Body,
    extract::{Path, Request, State},
    http::{HeaderValue, Method, StatusCode, Uri, header},
    middleware,
    response::{IntoResponse, Response},
    routing::{get, post},
};
use bytes::Bytes;
use exo_crds::generate::GenerateEvent;
use futures::{Stream, StreamExt as _};
use prometheus::TextEncoder;
use serde_json::json;
use tokio::{sync::OwnedSemaphorePermit, time::Instant};

use crate::{
    Gateway, Shared,
    error::ApiError,
    flow::Flow,
    http::observe::Outcome,
    index::Index,
    openai::{
        chat::{ChatAnswer, Piece},
        request::ChatRequest,
        stream::{AnswerHead, ChunkWriter, Completion, KEEP_ALIVE},
    },
};

/// Below the 30 s after which common proxies close a silent connection.
const KEEP_ALIVE_PERIOD: std::time::Duration = std::time::Duration::from_secs(15);

/// The gateway's routes.
pub fn app(gateway: Gateway) -> Router {
    let shared = gateway.shared;
    Router::new()
        .route("/", get(pointer))
        .route("/v1/chat/completions", post(chat_completions))
        .route("/v1/models", get(models))
        // Names may hold a slash: `namespace/name`, or a repository.
        .route("/v1/models/{*id}", get(model))
        .route("/health", get(health))
        .route("/metrics", get(metrics))
        .fallback(unknown_path)
        .method_not_allowed_fallback(method_not_allowed)
        .layer(middleware::from_fn_with_state(Arc::clone(&shared), observe::observe))
        .layer(middleware::from_fn_with_state(Arc::clone(&shared), cors::guard))
        .with_state(shared)
}

/// All that clients may ask for.
const ENDPOINTS: &str = "POST /v1/chat/completions, GET /v1/models";

/// For people who open the address to see what is there.
async fn pointer() -> String {
    format!(
        "exo: the OpenAI API is at /v1 ({ENDPOINTS}), metrics at /metrics, health at /health.\n"
    )
}

async fn chat_completions(
    State(shared): State<Arc<Shared>>,
    request: Request,
) -> Result<Response, ApiError> {
    let arrived = Instant::now();
    let mut admitted = admit(&shared)?;
    let body::Read { body, share } =
        body::read_json(request, &shared.limits, &shared.bodies, arrived).await?;
    admitted.share = share;
    let request = ChatRequest::read(&body)?;
    // Free what may be megabytes before the answer, which may take minutes.
    drop(body);
    let served = find(&shared, &request.model, arrived).await?;
    let head = AnswerHead {
        id: format!("chatcmpl-{}", uuid::Uuid::new_v4().simple()),
        created: unix_time(),
        model: request.model.clone(),
    };
    let seed = request.seed.or(served.seed).unwrap_or_else(random_seed);
    let (stream, include_usage) = (request.stream, request.include_usage);
    let answer = ChatAnswer::new(request.has_tools());
    let name = request.model.clone();
    let generate = request.into_generate(head.id.clone(), seed, head.created);
    let flow = Flow::new(Arc::clone(&shared), name, served.model, generate, arrived);
    let id = head.id.clone();
    let mut response = if stream {
        let writer = ChunkWriter::new(head, include_usage);
        stream_answer(flow, answer, writer, admitted).await?
    } else {
        whole_answer(flow, answer, Completion::new(head)).await?
    };
    if let Ok(id) = HeaderValue::try_from(id) {
        response.headers_mut().insert("x-request-id", id);
    }
    Ok(response)
}

/// A request's place among those in flight; lives as long as its answer.
#[derive(Debug)]
struct Admitted {
    shared: Arc<Shared>,
    _permit: OwnedSemaphorePermit,
    /// Of the bytes of all bodies: the prompt is kept, for it may have to be sent again.
    share: Option<OwnedSemaphorePermit>,
}

impl Drop for Admitted {
    fn drop(&mut self) {
        self.shared.metrics.in_flight.dec();
    }
}

fn admit(shared: &Arc<Shared>) -> Result<Admitted, ApiError> {
    let permit = Arc::clone(&shared.admission)
        .try_acquire_owned()
        .map_err(|_| ApiError::too_many_requests(shared.limits.in_flight))?;
    shared.metrics.in_flight.inc();
    Ok(Admitted { shared: Arc::clone(shared), _permit: permit, share: None })
}

/// Looks a model up.
async fn find(
    shared: &Shared,
    name: &str,
    arrived: Instant,
) -> Result<crate::index::Served, ApiError> {
    let found = from_index(shared, arrived, |index| index.lookup(name)).await?;
    found.ok_or_else(|| ApiError::model_not_found(name))
}

/// Looks into the index. A gateway that just started waits for its first lists before it says
/// anything, and says so if there are none to be had.
async fn from_index<T>(
    shared: &Shared,
    arrived: Instant,
    look: impl FnOnce(&Index) -> T,
) -> Result<T, ApiError> {
    let mut index = shared.index.subscribe();
    let deadline = arrived + shared.limits.ready_wait;
    let known = |index: &Index| index.is_complete() || index.problem().is_some();
    match tokio::time::timeout_at(deadline, index.wait_for(known)).await {
        Ok(Ok(index)) if index.is_complete() => Ok(look(&index)),
        Ok(Ok(index)) => Err(unread(&index)),
        _ => Err(unread(&shared.index.borrow())),
    }
}

fn unread(index: &Index) -> ApiError {
    ApiError::unavailable(match index.problem() {
        Some(problem) => format!("the cluster's state can't be read: {problem}"),
        None => "the cluster's state has not been read yet".to_owned(),
    })
}

async fn whole_answer(
    flow: Flow,
    mut answer: ChatAnswer,
    mut completion: Completion,
) -> Result<Response, ApiError> {
    let mut events = std::pin::pin!(flow.into_stream());
    loop {
        let event = events.next().await;
        for piece in step(&mut answer, event) {
            if let Some(result) = completion.push(piece) {
                return result.map(|object| Json(object).into_response());
            }
        }
    }
}

/// Waits for the first event, so that a request that can't be served gets a proper status.
async fn stream_answer(
    flow: Flow,
    mut answer: ChatAnswer,
    writer: ChunkWriter,
    admitted: Admitted,
) -> Result<Response, ApiError> {
    let mut events = Box::pin(flow.into_stream());
    let first = step(&mut answer, events.next().await);
    if let Some(Piece::Failed(error)) = first.first() {
        return Err(error.clone());
    }
    let outcome = Outcome::default();
    let reported = outcome.clone();
    let body = async_stream::stream! {
        let _admitted = admitted;
        let mut pieces = first;
        loop {
            let text = write(&writer, pieces, &reported);
            if !text.is_empty() {
                yield Ok::<_, Infallible>(Bytes::from(text));
            }
            if answer.is_over() {
                return;
            }
            pieces = step(&mut answer, loop {
                // Cancel-safe: the stream keeps its state when only the wait for it is dropped.
                match tokio::time::timeout(KEEP_ALIVE_PERIOD, events.next()).await {
                    Ok(event) => break event,
                    Err(_) => yield Ok(Bytes::from_static(KEEP_ALIVE.as_bytes())),
                }
            });
        }
    };
    Ok(stream_response(body, outcome))
}

fn stream_response(
    body: impl Stream<Item = Result<Bytes, Infallible>> + Send + 'static,
    outcome: Outcome,
) -> Response {
    let mut response = Response::new(Body::from_stream(body));
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    // nginx would collect the chunks otherwise.
    headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
    response.extensions_mut().insert(outcome);
    response
}

/// Feeds what a flow gave into the protocol.
fn step(answer: &mut ChatAnswer, event: Option<Result<GenerateEvent, ApiError>>) -> Vec<Piece> {
    match event {
        Some(Ok(event)) => answer.push(event),
        Some(Err(error)) => answer.fail(error),
        None => answer.fail(ApiError::bad_runner("the answer ended early")),
    }
}

fn write(writer: &ChunkWriter, pieces: Vec<Piece>, outcome: &Outcome) -> String {
    let mut text = String::new();
    for piece in pieces {
        match &piece {
            Piece::Finish { .. } => outcome.set(StatusCode::OK),
            Piece::Failed(error) => outcome.set(error.status),
            Piece::Begin | Piece::Text { .. } | Piece::ToolCall { .. } => {}
        }
        text += &writer.write(piece);
    }
    text
}

async fn models(State(shared): State<Arc<Shared>>) -> Result<Json<serde_json::Value>, ApiError> {
    let list = from_index(&shared, Instant::now(), |index| index.list(unix_time())).await?;
    let data: Vec<_> = list.iter().map(listed).collect();
    Ok(Json(json!({"object": "list", "data": data})))
}

async fn model(
    State(shared): State<Arc<Shared>>,
    Path(id): Path<String>,
) -> Result<Json<serde_json::Value>, ApiError> {
    let look = |index: &Index| (index.list(unix_time()), index.lookup(&id));
    let (list, served) = from_index(&shared, Instant::now(), look).await?;
    match (list.iter().find(|entry| entry.id == id), served) {
        (Some(entry), _) => Ok(Json(listed(entry))),
        (None, Some(served)) if served.is_stuck(unix_time()) => {
            Err(ApiError::model_stuck(&id, served.waiting_for.as_deref().unwrap_or("not ready")))
        }
        (None, _) => Err(ApiError::model_not_found(&id)),
    }
}

fn listed(entry: &crate::index::Listed) -> serde_json::Value {
    json!({"id": entry.id, "object": "model", "created": entry.created, "owned_by": "exo"})
}

async fn health(State(shared): State<Arc<Shared>>) -> Response {
    let index = shared.index.borrow();
    match index.is_complete() {
        true => Json(json!({"status": "ok"})).into_response(),
        false => unread(&index).into_response(),
    }
}

async fn metrics(State(shared): State<Arc<Shared>>) -> Response {
    match TextEncoder::new().encode_to_string(&shared.registry.gather()) {
        Ok(text) => {
            let kind = HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");
            ([(header::CONTENT_TYPE, kind)], text).into_response()
        }
        Err(error) => {
            tracing::error!(%error, "encoding metrics");
            StatusCode::INTERNAL_SERVER_ERROR.into_response()
        }
    }
}

async fn unknown_path(method: Method, uri: Uri) -> ApiError {
    ApiError::unknown_path(method.as_str(), uri.path(), ENDPOINTS)
}

async fn method_not_allowed(method: Method, uri: Uri) -> ApiError {
    ApiError::method_not_allowed(method.as_str(), uri.path())
}

/// Seconds since 1970.
pub(crate) fn unix_time() -> i64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .ok()
        .and_then(|since| i64::try_from(since.as_secs()).ok())
        .unwrap_or(0)
}

fn random_seed() -> u64 {
    // Version 4 fixes a few bits of each half; both together leave 64 random ones.
    let (high, low) = uuid::Uuid::new_v4().as_u64_pair();
    high.rotate_left(32) ^ low
}
