//! Who asks. Connections are authenticated before they come here; this insists on it, and lets those
//! who may ask in another's name.

use axum::{
    extract::{Request, State},
    http::{HeaderMap, HeaderName},
    middleware::Next,
    response::{IntoResponse as _, Response},
};

use crate::{
    authorize::Attributes,
    error::{ApiError, Subject},
    server::{ApiServer, header_text},
};

/// The client of a request, put into its extensions by whoever terminated the connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    pub name: String,
    pub groups: Vec<String>,
}

/// Paths that anyone may ask: they tell nothing about the cluster's content.
const PUBLIC: [&str; 4] = ["/healthz", "/livez", "/readyz", "/version"];

pub(crate) async fn require_identity(
    State(server): State<ApiServer>,
    mut request: Request,
    next: Next,
) -> Response {
    let Some(identity) = request.extensions().get::<Identity>() else {
        if PUBLIC.contains(&request.uri().path().trim_end_matches('/')) {
            return next.run(request).await;
        }
        return ApiError::Unauthorized.into_response();
    };
    match impersonated(&server, identity, request.headers()) {
        Ok(None) => {}
        Ok(Some(other)) => {
            request.extensions_mut().insert(other);
        }
        Err(error) => return error.into_response(),
    }
    next.run(request).await
}

const USER: HeaderName = HeaderName::from_static("impersonate-user");
const GROUP: HeaderName = HeaderName::from_static("impersonate-group");

/// In whose name the client asks (`kubectl --as`), if in another's. Who doesn't understand these
/// headers must not pass them over: the client wants fewer rights than it has.
fn impersonated(
    server: &ApiServer,
    identity: &Identity,
    headers: &HeaderMap,
) -> Result<Option<Identity>, ApiError> {
    let bad = |what: &str| ApiError::BadRequest(format!("impersonation: {what}"));
    let asked = || headers.keys().filter(|name| name.as_str().starts_with("impersonate-"));
    if let Some(other) = asked().find(|name| ![USER, GROUP].contains(name)) {
        return Err(bad(&format!("{other} is not supported")));
    }
    if asked().next().is_none() {
        return Ok(None);
    }
    let user = header_text(headers, USER).filter(|user| !user.is_empty());
    let user = user.ok_or_else(|| bad("groups are given without a user"))?;
    let may = |resource: &'static str, name: &str| {
        let asked = Attributes {
            identity,
            verb: "impersonate",
            group: "",
            resource,
            subresource: None,
            name,
            object: None,
        };
        server.policy()(&asked).map_err(|reason| {
            let message = format!(
                "{resource} \"{name}\" is forbidden: User \"{}\" cannot impersonate resource \
                 \"{resource}\": {reason}",
                identity.name
            );
            let (plural, name) = (resource.to_owned(), name.to_owned());
            let subject = Subject { group: String::new(), kind: plural.clone(), plural, name };
            ApiError::Denied { subject, message }
        })
    };
    may("users", user)?;
    let mut groups = Vec::new();
    for group in headers.get_all(GROUP) {
        let group = group.to_str().map_err(|_| bad("a group's name is not plain text"))?;
        may("groups", group)?;
        groups.push(group.to_owned());
    }
    Ok(Some(Identity { name: user.to_owned(), groups }))
}
