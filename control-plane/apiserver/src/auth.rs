//! Who asks. Connections are authenticated before they come here; this only insists on it.

use axum::{
    extract::Request,
    middleware::Next,
    response::{IntoResponse as _, Response},
};

use crate::error::ApiError;

/// The client of a request, put into its extensions by whoever terminated the connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    pub name: String,
    pub groups: Vec<String>,
}

/// Paths that anyone may ask: they tell nothing about the cluster's content.
const PUBLIC: [&str; 4] = ["/healthz", "/livez", "/readyz", "/version"];

pub(crate) async fn require_identity(request: Request, next: Next) -> Response {
    let known = request.extensions().get::<Identity>().is_some();
    if known || PUBLIC.contains(&request.uri().path().trim_end_matches('/')) {
        next.run(request).await
    } else {
        ApiError::Unauthorized.into_response()
    }
}
