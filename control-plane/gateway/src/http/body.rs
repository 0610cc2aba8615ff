//! Request bodies, with errors in OpenAI's form.

use axum::{body::to_bytes, extract::Request, http::header::CONTENT_LENGTH};
use serde_json::Value;

use crate::error::ApiError;

/// Reads a JSON body of at most `limit_bytes`. The content type is not looked at: `curl -d` sends
/// a wrong one.
pub(super) async fn read_json(request: Request, limit_bytes: usize) -> Result<Value, ApiError> {
    let announced = request
        .headers()
        .get(CONTENT_LENGTH)
        .and_then(|value| value.to_str().ok()?.parse::<u64>().ok());
    if announced.is_some_and(|bytes| bytes > limit_bytes as u64) {
        return Err(ApiError::body_too_large(limit_bytes));
    }
    let bytes =
        to_bytes(request.into_body(), limit_bytes).await.map_err(|error| match is_length_limit(
            &error,
        ) {
            true => ApiError::body_too_large(limit_bytes),
            false => ApiError::malformed("the request body broke off"),
        })?;
    serde_json::from_slice(&bytes)
        .map_err(|error| ApiError::malformed(format!("the request body is not JSON: {error}")))
}

fn is_length_limit(error: &axum::Error) -> bool {
    let mut cause: Option<&dyn std::error::Error> = Some(error);
    while let Some(error) = cause {
        if error.is::<http_body_util::LengthLimitError>() {
            return true;
        }
        cause = error.source();
    }
    false
}
