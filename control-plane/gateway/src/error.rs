//! The error body of the OpenAI protocol, and the one table from failures to what a client sees.
//! Never holds a user's text.

use std::time::Duration;

use axum::{
    Json,
    http::{HeaderValue, StatusCode, header::RETRY_AFTER},
    response::{IntoResponse, Response},
};
use exo_crds::generate::ErrorCode;
use serde_json::{Value, json};

/// A failure as a client sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ApiError {
    pub(crate) status: StatusCode,
    /// OpenAI's `type`.
    pub(crate) kind: &'static str,
    pub(crate) code: Option<&'static str>,
    /// The request's field that is at fault.
    pub(crate) param: Option<String>,
    pub(crate) message: String,
    pub(crate) retry_after_s: Option<u32>,
}

const INVALID_REQUEST: &str = "invalid_request_error";
const SERVER_ERROR: &str = "server_error";
/// A placement takes seconds, a big model's load takes longer; clients back off from here.
const RETRY_AFTER_S: u32 = 5;

impl ApiError {
    fn new(status: StatusCode, kind: &'static str, message: String) -> Self {
        Self { status, kind, code: None, param: None, message, retry_after_s: None }
    }

    /// 400, with the field at fault.
    pub(crate) fn invalid(param: impl Into<String>, message: impl Into<String>) -> Self {
        Self {
            param: Some(param.into()),
            ..Self::new(StatusCode::BAD_REQUEST, INVALID_REQUEST, message.into())
        }
    }

    /// 400 for a body that is no request at all.
    pub(crate) fn malformed(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, INVALID_REQUEST, message.into())
    }

    /// 403: a web page that may not use the gateway. The origin is a website's name, no user's
    /// text.
    pub(crate) fn foreign_page(origin: &HeaderValue) -> Self {
        Self {
            code: Some("origin_not_allowed"),
            ..Self::new(
                StatusCode::FORBIDDEN,
                INVALID_REQUEST,
                format!(
                    "web pages of {} may not use this gateway; its allowed origins say which may",
                    String::from_utf8_lossy(origin.as_bytes())
                ),
            )
        }
    }

    /// 408: the body did not come in time.
    pub(crate) fn body_too_slow(limit: Duration) -> Self {
        Self {
            code: Some("request_timeout"),
            ..Self::new(
                StatusCode::REQUEST_TIMEOUT,
                INVALID_REQUEST,
                format!("the request body was not there within {limit:?}"),
            )
        }
    }

    /// 413.
    pub(crate) fn body_too_large(limit_bytes: usize) -> Self {
        let message = format!("the request body is larger than {limit_bytes} bytes");
        Self::new(StatusCode::PAYLOAD_TOO_LARGE, INVALID_REQUEST, message)
    }

    /// 404 for a model that no instance serves.
    pub(crate) fn model_not_found(model: &str) -> Self {
        Self {
            code: Some("model_not_found"),
            param: Some("model".to_owned()),
            ..Self::new(
                StatusCode::NOT_FOUND,
                INVALID_REQUEST,
                format!("the model `{model}` does not exist: no InferenceInstance serves it"),
            )
        }
    }

    /// 404 for a model whose instances wait for somebody to do something.
    pub(crate) fn model_stuck(model: &str, why: &str) -> Self {
        Self {
            message: format!("the model `{model}` can't be served now: {why}"),
            ..Self::model_not_found(model)
        }
    }

    /// 404 for a path that is not served; `endpoints` are those that are.
    pub(crate) fn unknown_path(method: &str, path: &str, endpoints: &str) -> Self {
        // The commonest mistake.
        let base = match path.starts_with("/v1/") {
            true => "",
            false => " a client's base URL ends in /v1, and",
        };
        Self {
            code: Some("unknown_url"),
            ..Self::new(
                StatusCode::NOT_FOUND,
                INVALID_REQUEST,
                format!("unknown URL ({method} {path}):{base} what is served here is {endpoints}"),
            )
        }
    }

    /// 405.
    pub(crate) fn method_not_allowed(method: &str, path: &str) -> Self {
        Self {
            code: Some("method_not_supported"),
            ..Self::new(
                StatusCode::METHOD_NOT_ALLOWED,
                INVALID_REQUEST,
                format!("{method} is not supported on {path}"),
            )
        }
    }

    /// 429: this gateway has as many requests in flight as it takes.
    pub(crate) fn too_many_requests(limit: usize) -> Self {
        Self {
            code: Some("too_many_requests"),
            retry_after_s: Some(1),
            ..Self::new(
                StatusCode::TOO_MANY_REQUESTS,
                "rate_limit_error",
                format!("{limit} requests are in flight, which is this gateway's limit"),
            )
        }
    }

    /// 429: the bodies of the requests in flight are together as large as this gateway takes.
    pub(crate) fn too_many_bytes(limit_bytes: usize) -> Self {
        Self {
            message: format!(
                "the bodies of the requests in flight have reached {limit_bytes} bytes, which is \
                 this gateway's limit"
            ),
            ..Self::too_many_requests(0)
        }
    }

    /// 503, worth another try later.
    pub(crate) fn unavailable(message: impl Into<String>) -> Self {
        Self {
            code: Some("service_unavailable"),
            retry_after_s: Some(RETRY_AFTER_S),
            ..Self::new(StatusCode::SERVICE_UNAVAILABLE, SERVER_ERROR, message.into())
        }
    }

    /// The same where a try soon after would end alike.
    pub(crate) fn not_soon(self) -> Self {
        Self { retry_after_s: None, ..self }
    }

    /// 502: a runner spoke something else than the protocol, or breaks on this request each time.
    pub(crate) fn bad_runner(message: impl Into<String>) -> Self {
        Self {
            code: Some("runner_failed"),
            ..Self::new(StatusCode::BAD_GATEWAY, SERVER_ERROR, message.into())
        }
    }

    /// What a runner's own verdict means to the client.
    pub(crate) fn from_runner(code: ErrorCode, message: String) -> Self {
        match code {
            ErrorCode::InvalidRequest => Self::malformed(message),
            ErrorCode::ContextLengthExceeded => {
                // The prompt alone may fit.
                let asked = message.starts_with("max_tokens");
                let param = if asked { "max_tokens" } else { "messages" };
                Self { code: Some("context_length_exceeded"), ..Self::invalid(param, message) }
            }
            ErrorCode::Unavailable => Self::unavailable(message),
        }
    }

    /// `{"error": {…}}`, as in a response body and inside a stream.
    pub(crate) fn body(&self) -> Value {
        json!({"error": {
            "message": self.message,
            "type": self.kind,
            "param": self.param,
            "code": self.code,
        }})
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, Json(self.body())).into_response();
        if let Some(seconds) = self.retry_after_s {
            response.headers_mut().insert(RETRY_AFTER, HeaderValue::from(seconds));
        }
        response
    }
}
