//! Request bodies, with errors in OpenAI's form.

use std::sync::Arc;

use axum::{body::Body, extract::Request, http::header::CONTENT_LENGTH};
use bytes::Bytes;
use http_body_util::BodyExt as _;
use serde_json::Value;
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    time::Instant,
};

use crate::{Limits, error::ApiError};

/// A body, and its share of the bytes that all requests in flight may bring.
pub(super) struct Read {
    pub(super) body: Value,
    pub(super) share: Option<OwnedSemaphorePermit>,
}

/// Reads a JSON body within the limits; `arrived` is when the request did. `budget` has a permit for
/// each byte. The content type is not looked at: `curl -d` sends a wrong one.
pub(super) async fn read_json(
    request: Request,
    limits: &Limits,
    budget: &Arc<Semaphore>,
    arrived: Instant,
) -> Result<Read, ApiError> {
    let announced = request
        .headers()
        .get(CONTENT_LENGTH)
        .and_then(|value| value.to_str().ok()?.parse::<u64>().ok());
    if announced.is_some_and(|bytes| bytes > limits.body_bytes as u64) {
        return Err(ApiError::body_too_large(limits.body_bytes));
    }
    let reading = read(request.into_body(), limits, budget);
    let (bytes, share) = tokio::time::timeout_at(arrived + limits.body_wait, reading)
        .await
        .map_err(|_| ApiError::body_too_slow(limits.body_wait))??;
    let body = serde_json::from_slice(&bytes)
        .map_err(|error| ApiError::malformed(format!("the request body is not JSON: {error}")))?;
    Ok(Read { body, share })
}

/// Takes permits for what has come, not for what was announced: announcing costs a client nothing.
/// It never waits for any, since requests that each hold a part would wait for each other.
async fn read(
    mut body: Body,
    limits: &Limits,
    budget: &Arc<Semaphore>,
) -> Result<(Vec<u8>, Option<OwnedSemaphorePermit>), ApiError> {
    let mut bytes = Vec::new();
    let mut share: Option<OwnedSemaphorePermit> = None;
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|_| ApiError::malformed("the request body broke off"))?;
        let data: Bytes = frame.into_data().unwrap_or_default();
        if data.len() > limits.body_bytes - bytes.len() {
            return Err(ApiError::body_too_large(limits.body_bytes));
        }
        let permits = u32::try_from(data.len()).unwrap_or(u32::MAX);
        let more = Arc::clone(budget)
            .try_acquire_many_owned(permits)
            .map_err(|_| ApiError::too_many_bytes(limits.bodies_bytes))?;
        match &mut share {
            Some(share) => share.merge(more),
            None => share = Some(more),
        }
        bytes.extend_from_slice(&data);
    }
    Ok((bytes, share))
}
