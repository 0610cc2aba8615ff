//! What a client may do, and who it is, as clients ask for it: `SelfSubjectAccessReview`,
//! `SelfSubjectRulesReview` and `SelfSubjectReview`.

use axum::{Extension, body::Bytes, extract::State, http::StatusCode, response::Response};
use serde_json::{Value, json};

use crate::{
    auth::Identity,
    authorize::Attributes,
    error::ApiError,
    object,
    server::{ApiServer, json_response},
};

/// Group, kind and plural of each; all are of version `v1`.
pub(crate) const REVIEWS: [(&str, &str, &str); 3] = [
    ("authorization.k8s.io", "SelfSubjectAccessReview", "selfsubjectaccessreviews"),
    ("authorization.k8s.io", "SelfSubjectRulesReview", "selfsubjectrulesreviews"),
    ("authentication.k8s.io", "SelfSubjectReview", "selfsubjectreviews"),
];
const VERBS: [&str; 8] =
    ["get", "list", "watch", "create", "update", "patch", "delete", "deletecollection"];

/// How Kubernetes' protocol buffers begin: kubectl asks with them whatever the server speaks.
const PROTOBUF_MAGIC: &[u8] = b"k8s\0";
/// Fields of `ResourceAttributes` by their number, from 1.
const RESOURCE_ATTRIBUTES: [&str; 7] =
    ["namespace", "verb", "group", "version", "resource", "subresource", "name"];

fn read(body: &[u8], kind: &str) -> Result<Value, ApiError> {
    let review = match body.strip_prefix(PROTOBUF_MAGIC) {
        Some(message) => read_protobuf(message)
            .ok_or_else(|| ApiError::BadRequest("the body can't be read".to_owned()))?,
        None => serde_json::from_slice(body)
            .map_err(|error| ApiError::BadRequest(format!("the body is not JSON: {error}")))?,
    };
    if review.get("kind").and_then(Value::as_str) == Some(kind) {
        return Ok(review);
    }
    Err(ApiError::BadRequest(format!("a {kind} is expected here")))
}

/// The envelope (1 is the type, with 1 `apiVersion` and 2 `kind`; 2 is the review) and of the review
/// 2 `spec` with 1 `resourceAttributes`: all that is asked for here.
fn read_protobuf(message: &[u8]) -> Option<Value> {
    let of_type = field(message, 1)?;
    let text = |bytes| std::str::from_utf8(bytes).ok();
    let mut review = json!({
        "apiVersion": text(field(of_type, 1)?)?,
        "kind": text(field(of_type, 2)?)?,
        "metadata": {},
        "spec": {},
    });
    let spec = field(message, 2).and_then(|review| field(review, 2)).unwrap_or_default();
    if let Some(attributes) = field(spec, 1) {
        for (number, name) in (1..).zip(RESOURCE_ATTRIBUTES) {
            if let Some(value) = field(attributes, number).and_then(text) {
                review["spec"]["resourceAttributes"][name] = json!(value);
            }
        }
    }
    Some(review)
}

/// The last length-delimited field of this number.
fn field(message: &[u8], number: u64) -> Option<&[u8]> {
    let mut rest = message;
    let mut found = None;
    while !rest.is_empty() {
        let key = varint(&mut rest)?;
        match key & 7 {
            0 => {
                varint(&mut rest)?;
            }
            2 => {
                let len = usize::try_from(varint(&mut rest)?).ok()?;
                let (value, tail) = rest.split_at_checked(len)?;
                rest = tail;
                if key >> 3 == number {
                    found = Some(value);
                }
            }
            _ => return None,
        }
    }
    found
}

fn varint(rest: &mut &[u8]) -> Option<u64> {
    let mut value = 0;
    for shift in (0..64).step_by(7) {
        let (byte, tail) = rest.split_first()?;
        *rest = tail;
        value |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Some(value);
        }
    }
    None
}

fn answer(mut review: Value, status: Value) -> Response {
    review["status"] = status;
    json_response(StatusCode::CREATED, &review)
}

pub(crate) async fn access(
    State(server): State<ApiServer>,
    Extension(identity): Extension<Identity>,
    body: Bytes,
) -> Result<Response, ApiError> {
    let review = read(&body, "SelfSubjectAccessReview")?;
    let status = match review.pointer("/spec/resourceAttributes") {
        Some(asked) => match may(&server, &identity, asked) {
            Ok(()) => json!({"allowed": true}),
            Err(reason) => json!({"allowed": false, "reason": reason}),
        },
        // Paths that are no resources tell nothing that a client may not know.
        None => json!({"allowed": true}),
    };
    Ok(answer(review, status))
}

/// Asks the policy, as it would be asked about the request itself.
fn may(server: &ApiServer, identity: &Identity, asked: &Value) -> Result<(), String> {
    let text = |field: &str| asked.get(field).and_then(Value::as_str).unwrap_or_default();
    let (group, plural, name) = (text("group"), text("resource"), text("name"));
    let namespace = Some(text("namespace")).filter(|n| !n.is_empty());
    let resource = server.resources().iter().find(|r| r.group == group && r.plural == plural);
    let entry = resource.filter(|_| !name.is_empty()).and_then(|resource| {
        let namespace = namespace.filter(|_| resource.namespaced);
        server.store().get_local(&resource.key(namespace, name))
    });
    let stored = entry.and_then(|entry| object::decode(&entry).ok());
    let wanted = text("verb");
    let mut verbs = VERBS.into_iter().filter(|verb| wanted == "*" || *verb == wanted).peekable();
    if verbs.peek().is_none() {
        return Err(format!("there is no verb \"{wanted}\" here"));
    }
    verbs.try_for_each(|verb| {
        server.policy()(&Attributes {
            identity,
            verb,
            group,
            resource: plural,
            subresource: Some(text("subresource")).filter(|s| !s.is_empty()),
            name,
            object: stored.as_ref(),
        })
    })
}

/// The policy answers questions; it is no list of rules.
pub(crate) async fn rules(body: Bytes) -> Result<Response, ApiError> {
    let review = read(&body, "SelfSubjectRulesReview")?;
    let status = json!({
        "resourceRules": [],
        "nonResourceRules": [],
        "incomplete": true,
        "evaluationError": "rules can't be listed here; ask for one access at a time",
    });
    Ok(answer(review, status))
}

pub(crate) async fn identity(
    Extension(identity): Extension<Identity>,
    body: Bytes,
) -> Result<Response, ApiError> {
    let review = read(&body, "SelfSubjectReview")?;
    let status = json!({"userInfo": {"username": identity.name, "groups": identity.groups}});
    Ok(answer(review, status))
}
