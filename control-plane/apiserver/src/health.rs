//! `/healthz`, `/livez` and `/readyz`, each with `?verbose`.

use axum::{
    extract::{RawQuery, State},
    http::StatusCode,
    response::{IntoResponse as _, Response},
};

use crate::{request::Query, server::ApiServer};

/// A check's name, and what is wrong.
type Check = (&'static str, Option<String>);

/// Alive while it answers at all.
pub(crate) async fn live(RawQuery(query): RawQuery) -> Response {
    report("livez", query.as_deref(), &[("ping", None)])
}

pub(crate) async fn healthy(RawQuery(query): RawQuery) -> Response {
    report("healthz", query.as_deref(), &[("ping", None)])
}

/// Ready while the store answers.
pub(crate) async fn ready(State(server): State<ApiServer>, RawQuery(query): RawQuery) -> Response {
    let store = server.store().get("/").await.err().map(|error| error.to_string());
    report("readyz", query.as_deref(), &[("ping", None), ("store", store)])
}

fn report(name: &str, query: Option<&str>, checks: &[Check]) -> Response {
    let failed = checks.iter().any(|(_, problem)| problem.is_some());
    // Given at all is enough, as in Kubernetes.
    let is_verbose = Query::parse(query).has("verbose");
    if !failed && !is_verbose {
        return "ok".into_response();
    }
    let mut text = String::new();
    for (check, problem) in checks {
        text += &match problem {
            None => format!("[+]{check} ok\n"),
            Some(problem) => format!("[-]{check} failed: {problem}\n"),
        };
    }
    let (code, outcome) = if failed {
        (StatusCode::SERVICE_UNAVAILABLE, "failed")
    } else {
        (StatusCode::OK, "passed")
    };
    (code, format!("{text}{name} check {outcome}\n")).into_response()
}
