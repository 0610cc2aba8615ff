//! Rank 0's HTTP side: takes requests from gateways, streams events back, tells its health and its
//! metrics. Never runs the model.

use std::{
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU64, Ordering},
        mpsc,
    },
    time::Instant,
};

use axum::{
    Router,
    body::{Body, Bytes},
    extract::{Request, State},
    http::{HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
    routing::{get, post},
};
use exo_crds::generate::{self, ErrorCode, GenerateEvent};
use exo_engine::{Opening, SeqId};
use futures::{Stream, StreamExt as _};
use tokio::sync::{Semaphore, mpsc as events};
use tokio_stream::wrappers::ReceiverStream;
use tracing::{debug, warn};

use super::{
    answer::{Answer, Ending},
    driver::{Order, Submission},
    metrics::Metrics,
    request::{ModelLimits, ModelText, Prepared, Refusal, prepare},
    scheduler::Job,
};

/// Requests that wait beside those that run; more are sent elsewhere.
pub(crate) const WAITING_MAX: usize = 256;
/// The longest contexts have a million tokens; as numbers in JSON they take about seven bytes each.
const BODY_BYTES_MAX: usize = 16 << 20;
/// A place is often free again after a short answer.
const RETRY_AFTER_S: &str = "1";
/// `Start`, and `End` or `Error`, beside the tokens.
const EVENTS_BESIDE_TOKENS: usize = 2;

/// What there is once the model is ready.
#[derive(Debug)]
pub(crate) struct Service {
    pub(crate) text: ModelText,
    pub(crate) limits: ModelLimits,
    pub(crate) eos_token_ids: Arc<[u32]>,
    pub(crate) orders: mpsc::Sender<Order>,
    /// Places for running and waiting requests.
    pub(crate) places: Arc<Semaphore>,
    /// The first sequence number of requests.
    pub(crate) next_seq: AtomicU64,
}

/// What handlers share.
#[derive(Clone, Debug)]
pub(crate) struct Shared {
    /// Set when the model is ready.
    pub(crate) service: Arc<OnceLock<Service>>,
    pub(crate) metrics: Metrics,
}

pub(crate) fn app(shared: Shared) -> Router {
    Router::new()
        .route(generate::PATH, post(generate))
        .route("/healthz", get(healthz))
        .route("/metrics", get(metrics))
        .with_state(shared)
}

async fn healthz(State(shared): State<Shared>) -> Response {
    match shared.service.get() {
        Some(_) => "ok\n".into_response(),
        None => (StatusCode::SERVICE_UNAVAILABLE, "the model is not ready\n").into_response(),
    }
}

async fn metrics(State(shared): State<Shared>) -> Response {
    let kind = [(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")];
    (kind, shared.metrics.render()).into_response()
}

async fn generate(State(shared): State<Shared>, request: Request) -> Response {
    match accept(shared.service, request.into_body()).await {
        Ok(stream) => {
            let kind = [(header::CONTENT_TYPE, "application/x-ndjson")];
            (kind, Body::from_stream(stream)).into_response()
        }
        Err(refusal) => refuse(refusal),
    }
}

async fn accept(
    service: Arc<OnceLock<Service>>,
    body: Body,
) -> Result<impl Stream<Item = Result<Bytes, axum::Error>> + Send + 'static, Refusal> {
    let unavailable =
        |message: &str| Refusal { code: ErrorCode::Unavailable, message: message.to_owned() };
    if service.get().is_none() {
        return Err(unavailable("the model is not ready"));
    }
    let body = axum::body::to_bytes(body, BODY_BYTES_MAX).await.map_err(|error| Refusal {
        code: ErrorCode::InvalidRequest,
        message: format!("reading the body (at most {BODY_BYTES_MAX} bytes): {error}"),
    })?;
    // Tokenizing a long prompt takes too long for a thread that others wait for.
    let entered = tokio::task::spawn_blocking(move || {
        let service = service.get().ok_or_else(|| unavailable("the model is not ready"))?;
        enter(service, &body)
    });
    let entered = entered.await.map_err(|error| {
        warn!(%error, "handling a request failed");
        unavailable("handling the request failed")
    })??;
    let Entered { events, cancel } = entered;
    Ok(ReceiverStream::new(events).map(move |event| {
        // Moved in, so that dropping the stream drops it.
        let _cancel = &cancel;
        let mut line = serde_json::to_vec(&event).map_err(axum::Error::new)?;
        line.push(b'\n');
        Ok(Bytes::from(line))
    }))
}

/// A request on its way.
#[derive(Debug)]
struct Entered {
    events: events::Receiver<GenerateEvent>,
    cancel: Cancel,
}

/// Tells the driver when the client's stream is dropped, however it ends.
#[derive(Debug)]
struct Cancel {
    seq: SeqId,
    orders: mpsc::Sender<Order>,
}

impl Drop for Cancel {
    fn drop(&mut self) {
        // The driver ignores sequences that ended; without a driver there is nothing to tell.
        let _ = self.orders.send(Order::Cancel(self.seq));
    }
}

/// Checks a request, takes a place for it and hands it to the driver.
fn enter(service: &Service, body: &[u8]) -> Result<Entered, Refusal> {
    let prepared = prepare(body, &service.text, &service.limits)?;
    let permit = service.places.clone().try_acquire_owned().map_err(|_| Refusal {
        code: ErrorCode::Unavailable,
        message: format!("{WAITING_MAX} requests are waiting already"),
    })?;
    let seq = service.next_seq.fetch_add(1, Ordering::Relaxed);
    let cancel = Cancel { seq, orders: service.orders.clone() };
    let Prepared { id, prompt: mut tokens, sampling, answer: spec } = prepared;
    let prompt = tokens.len();
    debug!(id, seq, prompt_tokens = prompt, "accepted a request");
    let tokenizer = service.text.tokenizer.clone();
    let (answer, ending) = Answer::new(tokenizer, service.eos_token_ids.clone(), &spec)?;
    let left = (spec.tokens_max as usize).saturating_sub(spec.generated.len());
    let (sender, events) = events::channel(left + EVENTS_BESIDE_TOKENS);
    let prompt_tokens = u32::try_from(prompt).unwrap_or(u32::MAX);
    let fits = "the channel has room for all events";
    sender.try_send(GenerateEvent::Start { prompt_tokens }).expect(fits);
    if let Some(ending) = ending {
        sender.try_send(whole_already(ending)).expect(fits);
        return Ok(Entered { events, cancel });
    }
    tokens.extend(&spec.generated);
    let last_draw = u64::from(spec.tokens_max).saturating_sub(1);
    let submission = Submission {
        job: Job { seq, tokens, draws: spec.generated.len() as u64 },
        opening: Opening { sampling, prompt: Some(prompt), last_draw },
        answer,
        events: sender,
        accepted: Instant::now(),
        permit,
    };
    service.orders.send(Order::Submit(Box::new(submission))).map_err(|_| Refusal {
        code: ErrorCode::Unavailable,
        message: "the runner is stopping".to_owned(),
    })?;
    Ok(Entered { events, cancel })
}

/// The end of an answer that the client had whole before it asked again.
fn whole_already(ending: Ending) -> GenerateEvent {
    GenerateEvent::End {
        finish_reason: ending.reason,
        text: ending.text,
        completion_tokens: ending.tokens,
        time_to_first_token_s: 0.0,
        decode_tokens_per_s: 0.0,
    }
}

fn refuse(refusal: Refusal) -> Response {
    let Refusal { code, message } = refusal;
    let status = match code {
        ErrorCode::InvalidRequest | ErrorCode::ContextLengthExceeded => StatusCode::BAD_REQUEST,
        ErrorCode::Unavailable => StatusCode::SERVICE_UNAVAILABLE,
    };
    let mut response = (status, axum::Json(GenerateEvent::Error { code, message })).into_response();
    if code == ErrorCode::Unavailable {
        let value = HeaderValue::from_static(RETRY_AFTER_S);
        response.headers_mut().insert(header::RETRY_AFTER, value);
    }
    response
}
