//! What a client may do, and who it is, as clients ask for it: `SelfSubjectAccessReview`,
//! `SelfSubjectRulesReview` and `SelfSubjectReview`.

use std::collections::BTreeMap;

use axum::{Extension, body::Body, extract::State, http::StatusCode, response::Response};
use serde_json::{Value, json};
use tokio::time::Instant;

use crate::{
    auth::Identity,
    authorize::Attributes,
    body, discovery,
    error::ApiError,
    object, protobuf,
    server::{ApiServer, Subresource, json_response},
    verbs,
};

/// Group, kind and plural of each; all are of version `v1`.
pub(crate) const REVIEWS: [(&str, &str, &str); 3] = [
    ("authorization.k8s.io", "SelfSubjectAccessReview", "selfsubjectaccessreviews"),
    ("authorization.k8s.io", "SelfSubjectRulesReview", "selfsubjectrulesreviews"),
    ("authentication.k8s.io", "SelfSubjectReview", "selfsubjectreviews"),
];
const VERBS: [&str; 8] =
    ["get", "list", "watch", "create", "update", "patch", "delete", "deletecollection"];

/// Kubernetes' own clients ask with protocol buffers whatever the server speaks, and some of them
/// without saying so.
async fn read(server: &ApiServer, body: Body, kind: &str) -> Result<Value, ApiError> {
    let limits = server.flow().limits();
    let body = body::read(body, limits.body, Instant::now() + limits.request).await?;
    let mut review = if protobuf::is_protobuf(&body) {
        protobuf::read(&body)
            .map_err(|error| ApiError::BadRequest(format!("the body can't be read: {error}")))?
    } else {
        serde_json::from_slice(&body)
            .map_err(|error| ApiError::BadRequest(format!("the body is not JSON: {error}")))?
    };
    let (group, ..) = REVIEWS.iter().find(|(_, of, _)| *of == kind).expect("kinds are from there");
    verbs::fill_type(&mut review, &format!("{group}/v1"), kind);
    if review.get("kind").and_then(Value::as_str) == Some(kind) {
        return Ok(review);
    }
    Err(ApiError::BadRequest(format!("a {kind} is expected here")))
}

fn answer(mut review: Value, status: Value) -> Response {
    review["status"] = status;
    json_response(StatusCode::CREATED, &review)
}

pub(crate) async fn access(
    State(server): State<ApiServer>,
    Extension(identity): Extension<Identity>,
    body: Body,
) -> Result<Response, ApiError> {
    let review = read(&server, body, "SelfSubjectAccessReview").await?;
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

/// The policy answers questions and is no list of rules: it is asked about every kind and verb, of
/// no particular object.
pub(crate) async fn rules(
    State(server): State<ApiServer>,
    Extension(identity): Extension<Identity>,
    body: Body,
) -> Result<Response, ApiError> {
    let review = read(&server, body, "SelfSubjectRulesReview").await?;
    let mut allowed: BTreeMap<(&str, Vec<&'static str>), Vec<String>> = BTreeMap::new();
    let mut is_all = true;
    for resource in server.resources() {
        for (subresource, served) in discovery::served_verbs(resource) {
            let may = |&verb: &&'static str| {
                let asked = Attributes {
                    identity: &identity,
                    verb,
                    group: &resource.group,
                    resource: &resource.plural,
                    subresource: subresource.map(Subresource::name),
                    name: "",
                    object: None,
                };
                server.policy()(&asked).is_ok()
            };
            let verbs: Vec<&'static str> = served.iter().copied().filter(may).collect();
            is_all &= verbs.len() == served.len();
            if !verbs.is_empty() {
                let name = match subresource {
                    Some(subresource) => format!("{}/{}", resource.plural, subresource.name()),
                    None => resource.plural.clone(),
                };
                allowed.entry((&resource.group, verbs)).or_default().push(name);
            }
        }
    }
    for (group, _, plural) in REVIEWS {
        allowed.entry((group, vec!["create"])).or_default().push(plural.to_owned());
    }
    let rules: Vec<Value> = allowed
        .into_iter()
        .map(|((group, verbs), resources)| {
            json!({"verbs": verbs, "apiGroups": [group], "resources": resources})
        })
        .collect();
    let mut status = json!({
        "resourceRules": rules,
        "nonResourceRules": [{"verbs": ["get"], "nonResourceURLs": ["*"]}],
        "incomplete": !is_all,
    });
    if !is_all {
        status["evaluationError"] = json!("some objects may allow more than their kind does");
    }
    Ok(answer(review, status))
}

pub(crate) async fn identity(
    State(server): State<ApiServer>,
    Extension(identity): Extension<Identity>,
    body: Body,
) -> Result<Response, ApiError> {
    let review = read(&server, body, "SelfSubjectReview").await?;
    let status = json!({"userInfo": {"username": identity.name, "groups": identity.groups}});
    Ok(answer(review, status))
}
