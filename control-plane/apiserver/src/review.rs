//! What a client may do, and who it is, as clients ask for it: `SelfSubjectAccessReview`,
//! `SelfSubjectRulesReview` and `SelfSubjectReview`.
//!
//! There is one permission: whoever is authenticated may do everything.

use axum::{Extension, body::Bytes, http::StatusCode, response::Response};
use serde_json::{Value, json};

use crate::{auth::Identity, error::ApiError, server::json_response};

/// Group, kind and plural of each; all are of version `v1`.
pub(crate) const REVIEWS: [(&str, &str, &str); 3] = [
    ("authorization.k8s.io", "SelfSubjectAccessReview", "selfsubjectaccessreviews"),
    ("authorization.k8s.io", "SelfSubjectRulesReview", "selfsubjectrulesreviews"),
    ("authentication.k8s.io", "SelfSubjectReview", "selfsubjectreviews"),
];

/// How Kubernetes' protocol buffers begin. Some clients ask with them whatever the server is; the
/// answer doesn't depend on what is in them.
const PROTOBUF_MAGIC: &[u8] = b"k8s\0";

fn answer(body: &[u8], kind: &str, status: &Value) -> Result<Response, ApiError> {
    let group = REVIEWS.iter().find(|(_, of, _)| *of == kind).map_or("", |(group, ..)| group);
    let mut review = if body.starts_with(PROTOBUF_MAGIC) {
        json!({"apiVersion": format!("{group}/v1"), "kind": kind, "metadata": {}, "spec": {}})
    } else {
        serde_json::from_slice(body)
            .map_err(|error| ApiError::BadRequest(format!("the body is not JSON: {error}")))?
    };
    if review.get("kind").and_then(Value::as_str) != Some(kind) {
        return Err(ApiError::BadRequest(format!("a {kind} is expected here")));
    }
    review["status"] = status.clone();
    Ok(json_response(StatusCode::CREATED, &review))
}

pub(crate) async fn access(body: Bytes) -> Result<Response, ApiError> {
    let status = json!({"allowed": true, "reason": "every authenticated client may do everything"});
    answer(&body, "SelfSubjectAccessReview", &status)
}

pub(crate) async fn rules(body: Bytes) -> Result<Response, ApiError> {
    let status = json!({
        "incomplete": false,
        "resourceRules": [{"verbs": ["*"], "apiGroups": ["*"], "resources": ["*"]}],
        "nonResourceRules": [{"verbs": ["*"], "nonResourceURLs": ["*"]}],
    });
    answer(&body, "SelfSubjectRulesReview", &status)
}

pub(crate) async fn identity(
    Extension(identity): Extension<Identity>,
    body: Bytes,
) -> Result<Response, ApiError> {
    let status = json!({"userInfo": {"username": identity.name, "groups": identity.groups}});
    answer(&body, "SelfSubjectReview", &status)
}
