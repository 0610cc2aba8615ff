//! What can go wrong with a request, and the `metav1.Status` that tells the client.
//!
//! One table: every refusal of this crate is a variant here, with its HTTP code and reason.

use std::{collections::BTreeMap, fmt::Display};

use axum::{
    body::Body,
    http::{HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use exo_store::{ReadError, StoreError};
use serde_json::{Value, json};

use crate::{fields::FieldConflict, request::Verb};

/// One thing wrong with an object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Cause {
    /// A constant of Kubernetes: `FieldValueInvalid`, `FieldValueRequired`, …
    pub(crate) reason: &'static str,
    /// Without the field.
    pub(crate) message: String,
    /// Path such as `spec.nodes.min`.
    pub(crate) field: String,
}

impl Cause {
    /// A value that can't be; `problem` begins with the value where it may be shown.
    pub(crate) fn invalid(field: impl Into<String>, problem: impl Display) -> Self {
        let message = format!("Invalid value: {problem}");
        Self { reason: "FieldValueInvalid", message, field: field.into() }
    }

    /// As Kubernetes has it of the bytes of maps.
    pub(crate) fn too_long(field: impl Into<String>, limit: usize) -> Self {
        let message = format!("Too long: may not be more than {limit} bytes");
        Self { reason: "FieldValueTooLong", message, field: field.into() }
    }

    pub(crate) fn required(field: impl Into<String>) -> Self {
        let message = "Required value".to_owned();
        Self { reason: "FieldValueRequired", message, field: field.into() }
    }
}

/// Which object a refusal is about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Subject {
    pub(crate) group: String,
    pub(crate) kind: String,
    pub(crate) plural: String,
    pub(crate) name: String,
}

impl Subject {
    fn resource(&self) -> String {
        qualified(&self.plural, &self.group)
    }
}

/// `shards.exo.dev`; the core group has no name.
pub(crate) fn qualified(name: &str, group: &str) -> String {
    if group.is_empty() { name.to_owned() } else { format!("{name}.{group}") }
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum ApiError {
    #[error("the server could not find the requested resource")]
    UnknownPath,
    #[error("{} \"{}\" not found", .0.resource(), .0.name)]
    NotFound(Subject),
    #[error("{} \"{}\" already exists", .0.resource(), .0.name)]
    AlreadyExists(Subject),
    #[error("Operation cannot be fulfilled on {} \"{}\": {message}", subject.resource(), subject.name)]
    Conflict { subject: Subject, message: String },
    /// An applied configuration changes what other managers hold.
    #[error("{}", apply_message(conflicts))]
    ApplyConflict { subject: Subject, conflicts: Vec<FieldConflict> },
    #[error("{}", invalid_message(subject, causes))]
    Invalid { subject: Subject, causes: Vec<Cause> },
    #[error("{0}")]
    BadRequest(String),
    /// A patch that can't be applied to the object as it is.
    #[error("the patch can't be applied: {message}")]
    Unprocessable { subject: Subject, message: String },
    #[error("{} \"{}\" is forbidden: {message}", subject.resource(), subject.name)]
    Forbidden { subject: Subject, message: String },
    /// Nothing new comes into a namespace that goes.
    #[error(
        "{} \"{}\" is forbidden: unable to create new content in namespace {namespace} because it is \
         being terminated",
        subject.resource(),
        subject.name
    )]
    Terminating { subject: Subject, namespace: String },
    #[error("Too large resource version: {wanted}, current: {current}")]
    FutureVersion { wanted: u64, current: u64 },
    /// Too much at once; of this client, or of all.
    #[error("{0}")]
    TooManyRequests(&'static str),
    #[error("Unauthorized")]
    Unauthorized,
    /// The policy on access refused; the whole sentence.
    #[error("{message}")]
    Denied { subject: Subject, message: String },
    #[error("the server does not allow this method on the requested resource")]
    MethodNotAllowed,
    #[error("only the following media types are accepted: {0}")]
    NotAcceptable(&'static str),
    #[error("the body of the request was in an unknown format - accepted media types include: {0}")]
    UnsupportedMediaType(&'static str),
    #[error("the request's body was not whole in time")]
    SlowBody,
    #[error("Request entity too large: limit is {0} bytes")]
    TooLarge(usize),
    #[error("the list has more than {0} bytes: ask for it in parts, with a limit")]
    ListTooLarge(usize),
    #[error("{0}")]
    Expired(String),
    /// The version that a list was to go on with; with the token it goes on with the newest one.
    #[error(
        "The provided continue parameter is too old to display a consistent list result. Start a \
         new list without it, or go on with the continue token of this answer: what comes then is \
         of now, so that changes since the first part may be missed or seen twice."
    )]
    ExpiredPage { go_on: String },
    /// Nothing was done. Clients are not told to come back soon, here and below: a person must do
    /// something first, and shall read this at once.
    #[error("{0}")]
    Unavailable(String),
    /// It may have been carried out all the same.
    #[error("{0}")]
    Timeout(String),
    /// The store has no room.
    #[error("{0}")]
    Full(String),
    #[error("{0}")]
    Internal(String),
}

fn invalid_message(subject: &Subject, causes: &[Cause]) -> String {
    let texts: Vec<String> =
        causes.iter().map(|cause| format!("{}: {}", cause.field, cause.message)).collect();
    let what = qualified(&subject.kind, &subject.group);
    match texts.as_slice() {
        [one] => format!("{what} \"{}\" is invalid: {one}", subject.name),
        many => format!("{what} \"{}\" is invalid: [{}]", subject.name, many.join(", ")),
    }
}

/// One line for each manager, and below it its fields.
fn apply_message(conflicts: &[FieldConflict]) -> String {
    if let [FieldConflict { manager, field }] = conflicts {
        return format!("Apply failed with 1 conflict: conflict with {manager}: {field}");
    }
    let mut by_manager: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for FieldConflict { manager, field } in conflicts {
        by_manager.entry(manager).or_default().push(field);
    }
    let mut lines = Vec::new();
    for (manager, fields) in by_manager {
        lines.push(format!("conflicts with {manager}:"));
        lines.extend(fields.iter().map(|field| format!("- {field}")));
    }
    format!("Apply failed with {} conflicts: {}", conflicts.len(), lines.join("\n"))
}

/// Clients that are told to come back wait this long.
const RETRY_AFTER_S: u32 = 1;

/// Details of a refusal: which object, and what is wrong with it.
fn about(subject: &Subject, kind: &str, causes: &[Cause]) -> Value {
    let mut details = json!({"name": subject.name, "group": subject.group, "kind": kind});
    if !causes.is_empty() {
        let causes = causes
            .iter()
            .map(|c| json!({"reason": c.reason, "message": c.message, "field": c.field}));
        details["causes"] = causes.collect();
    }
    details
}

impl ApiError {
    /// A parameter or an option of a request (`PatchOptions`, `DeleteOptions`) that can't be.
    pub(crate) fn invalid_option(
        kind: &str,
        reason: &'static str,
        field: &str,
        message: &str,
    ) -> Self {
        Self::Invalid {
            subject: Subject {
                group: "meta.k8s.io".to_owned(),
                kind: kind.to_owned(),
                plural: kind.to_owned(),
                name: String::new(),
            },
            causes: vec![Cause { reason, message: message.to_owned(), field: field.to_owned() }],
        }
    }

    /// An option has none of the values that it can have.
    pub(crate) fn unsupported_option(
        kind: &str,
        option: &str,
        value: &str,
        supported: &[&str],
    ) -> Self {
        let supported: Vec<String> =
            supported.iter().map(|value| json!(value).to_string()).collect();
        let message = format!(
            "Unsupported value: {}: supported values: {}",
            json!(value),
            supported.join(", ")
        );
        Self::invalid_option(kind, "FieldValueNotSupported", option, &message)
    }

    /// A request that took longer than it may.
    pub(crate) fn late(verb: Verb) -> Self {
        let what = match verb {
            Verb::Get | Verb::List | Verb::Watch => "",
            Verb::Create | Verb::Update | Verb::Patch | Verb::Delete => {
                "; it may have been carried out all the same"
            }
            Verb::DeleteCollection => {
                "; some of the objects are deleted, others may not be: ask again for the rest"
            }
        };
        let text = "request did not complete within the allotted timeout";
        Self::Timeout(format!("Timeout: {text}{what}"))
    }

    pub(crate) fn modified(subject: Subject) -> Self {
        Self::Conflict {
            subject,
            message: "the object has been modified; please apply your changes to the latest \
                      version and try again"
                .to_owned(),
        }
    }

    pub(crate) fn code(&self) -> StatusCode {
        match self {
            Self::UnknownPath | Self::NotFound(_) => StatusCode::NOT_FOUND,
            Self::AlreadyExists(_) | Self::Conflict { .. } | Self::ApplyConflict { .. } => {
                StatusCode::CONFLICT
            }
            Self::Invalid { .. } | Self::Unprocessable { .. } => StatusCode::UNPROCESSABLE_ENTITY,
            Self::BadRequest(_) => StatusCode::BAD_REQUEST,
            Self::Forbidden { .. } | Self::Terminating { .. } => StatusCode::FORBIDDEN,
            Self::FutureVersion { .. } => StatusCode::GATEWAY_TIMEOUT,
            Self::TooManyRequests(_) => StatusCode::TOO_MANY_REQUESTS,
            Self::Unauthorized => StatusCode::UNAUTHORIZED,
            Self::Denied { .. } => StatusCode::FORBIDDEN,
            Self::MethodNotAllowed => StatusCode::METHOD_NOT_ALLOWED,
            Self::NotAcceptable(_) => StatusCode::NOT_ACCEPTABLE,
            Self::UnsupportedMediaType(_) => StatusCode::UNSUPPORTED_MEDIA_TYPE,
            Self::SlowBody => StatusCode::REQUEST_TIMEOUT,
            Self::TooLarge(_) | Self::ListTooLarge(_) => StatusCode::PAYLOAD_TOO_LARGE,
            Self::Expired(_) | Self::ExpiredPage { .. } => StatusCode::GONE,
            Self::Unavailable(_) => StatusCode::SERVICE_UNAVAILABLE,
            Self::Timeout(_) => StatusCode::GATEWAY_TIMEOUT,
            Self::Full(_) => StatusCode::INSUFFICIENT_STORAGE,
            Self::Internal(_) => StatusCode::INTERNAL_SERVER_ERROR,
        }
    }

    fn reason(&self) -> &'static str {
        match self {
            Self::UnknownPath | Self::NotFound(_) => "NotFound",
            Self::AlreadyExists(_) => "AlreadyExists",
            Self::Conflict { .. } | Self::ApplyConflict { .. } => "Conflict",
            Self::Invalid { .. } | Self::Unprocessable { .. } => "Invalid",
            Self::BadRequest(_) => "BadRequest",
            Self::Forbidden { .. } | Self::Terminating { .. } => "Forbidden",
            Self::FutureVersion { .. } | Self::SlowBody | Self::Timeout(_) => "Timeout",
            Self::TooManyRequests(_) => "TooManyRequests",
            Self::Unauthorized => "Unauthorized",
            Self::Denied { .. } => "Forbidden",
            Self::MethodNotAllowed => "MethodNotAllowed",
            Self::NotAcceptable(_) => "NotAcceptable",
            Self::UnsupportedMediaType(_) => "UnsupportedMediaType",
            Self::TooLarge(_) | Self::ListTooLarge(_) => "RequestEntityTooLarge",
            Self::Expired(_) | Self::ExpiredPage { .. } => "Expired",
            Self::Unavailable(_) => "ServiceUnavailable",
            Self::Full(_) => "InsufficientStorage",
            Self::Internal(_) => "InternalError",
        }
    }

    fn details(&self) -> Option<Value> {
        match self {
            Self::NotFound(s)
            | Self::AlreadyExists(s)
            | Self::Conflict { subject: s, .. }
            | Self::Forbidden { subject: s, .. }
            | Self::Denied { subject: s, .. } => Some(about(s, &s.plural, &[])),
            // Controllers ask for this cause.
            Self::Terminating { subject: s, namespace } => {
                let cause = Cause {
                    reason: "NamespaceTerminating",
                    message: format!("namespace {namespace} is being terminated"),
                    field: "metadata.namespace".to_owned(),
                };
                Some(about(s, &s.plural, &[cause]))
            }
            Self::Invalid { subject: s, causes } => Some(about(s, &s.kind, causes)),
            // Old kubectl shows nothing but the causes.
            Self::Unprocessable { subject, message } => Some(json!({
                "name": subject.name, "group": subject.group, "kind": subject.kind,
                "causes": [{"reason": "FieldValueInvalid", "message": message, "field": "patch"}],
            })),
            Self::ApplyConflict { subject, conflicts } => {
                let causes: Vec<Value> = conflicts
                    .iter()
                    .map(|c| {
                        json!({
                            "reason": "FieldManagerConflict",
                            "message": format!("conflict with {}", c.manager),
                            "field": c.field,
                        })
                    })
                    .collect();
                Some(json!({
                    "name": subject.name,
                    "group": subject.group,
                    "kind": subject.plural,
                    "causes": causes,
                }))
            }
            Self::FutureVersion { .. } => Some(json!({
                "retryAfterSeconds": RETRY_AFTER_S,
                "causes": [{
                    "reason": "ResourceVersionTooLarge", "message": "Too large resource version",
                }],
            })),
            Self::TooManyRequests(_) => Some(json!({"retryAfterSeconds": RETRY_AFTER_S})),
            _ => None,
        }
    }

    /// The `metav1.Status` object.
    pub(crate) fn status(&self) -> Value {
        let metadata = match self {
            Self::ExpiredPage { go_on } => json!({"continue": go_on}),
            _ => json!({}),
        };
        let mut status = json!({
            "apiVersion": "v1",
            "kind": "Status",
            "metadata": metadata,
            "status": "Failure",
            "message": self.to_string(),
            "reason": self.reason(),
            "code": self.code().as_u16(),
        });
        if let Some(details) = self.details() {
            status["details"] = details;
        }
        status
    }
}

impl From<StoreError> for ApiError {
    fn from(error: StoreError) -> Self {
        match error {
            StoreError::Full(_) => Self::Full(error.to_string()),
            StoreError::Read(ReadError::Compacted { requested, compacted }) => {
                Self::Expired(format!("too old resource version: {requested} ({compacted})"))
            }
            StoreError::Read(ReadError::Future { .. }) | StoreError::Invalid(_) => {
                Self::BadRequest(error.to_string())
            }
            StoreError::Unknown(_) => Self::Timeout(error.to_string()),
            StoreError::NotLeader { .. } | StoreError::Unavailable(_) | StoreError::Closed => {
                Self::Unavailable(error.to_string())
            }
        }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = Response::new(Body::from(self.status().to_string()));
        *response.status_mut() = self.code();
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
        if matches!(self, Self::TooManyRequests(_) | Self::FutureVersion { .. }) {
            headers.insert(header::RETRY_AFTER, HeaderValue::from(RETRY_AFTER_S));
        }
        response
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// kubectl repeats what comes with Retry-After ten times before it shows a word of it.
    #[test]
    fn only_flow_control_tells_clients_to_come_back() {
        let check = |error: ApiError, code: u16, comes_back: bool| {
            let text = error.to_string();
            let has_delay = error.status()["details"]["retryAfterSeconds"].is_u64();
            let response = error.into_response();
            assert_eq!(response.status().as_u16(), code, "{text}");
            assert_eq!(response.headers().contains_key(header::RETRY_AFTER), comes_back, "{text}");
            assert_eq!(has_delay, comes_back, "{text}");
        };
        let lost = || "no majority of voters".to_owned();
        check(StoreError::Unavailable(lost()).into(), 503, false);
        check(StoreError::NotLeader { leader: None }.into(), 503, false);
        check(StoreError::Unknown(lost()).into(), 504, false);
        check(StoreError::Full(lost()).into(), 507, false);
        check(ApiError::TooManyRequests("too much"), 429, true);
        check(ApiError::FutureVersion { wanted: 2, current: 1 }, 504, true);
    }

    #[test]
    fn a_refusal_names_object_and_field() {
        let error = ApiError::Invalid {
            subject: Subject {
                group: "exo.dev".into(),
                kind: "Shard".into(),
                plural: "shards".into(),
                name: "a".into(),
            },
            causes: vec![Cause {
                reason: "FieldValueRequired",
                message: "Required value".into(),
                field: "spec.rank".into(),
            }],
        };
        assert_eq!(
            error.status(),
            json!({
                "apiVersion": "v1", "kind": "Status", "metadata": {}, "status": "Failure",
                "message": "Shard.exo.dev \"a\" is invalid: spec.rank: Required value",
                "reason": "Invalid", "code": 422,
                "details": {
                    "name": "a", "group": "exo.dev", "kind": "Shard",
                    "causes": [{
                        "reason": "FieldValueRequired", "message": "Required value",
                        "field": "spec.rank"
                    }]
                }
            })
        );
    }
}
