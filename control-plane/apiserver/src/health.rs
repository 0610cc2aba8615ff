//! `/healthz`, `/livez` and `/readyz`, each with `?verbose` and `?exclude=CHECK`, and every check by
//! itself below them.

use axum::{
    extract::{Path, RawQuery, State},
    http::StatusCode,
    response::{IntoResponse as _, Response},
};

use crate::{
    error::ApiError,
    request::{Query, values_of},
    server::ApiServer,
};

/// Something that may be wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Check {
    /// Holds while anything is answered at all.
    Ping,
    Store,
    /// Of this node, where the store is on it.
    Disk,
}

const LIVE: &[Check] = &[Check::Ping];
/// Ready while the store answers and this node takes on what is written.
const READY: &[Check] = &[Check::Ping, Check::Store, Check::Disk];

impl Check {
    fn name(self) -> &'static str {
        match self {
            Self::Ping => "ping",
            Self::Store => "store",
            Self::Disk => "disk",
        }
    }

    /// What is wrong.
    async fn problem(self, server: &ApiServer) -> Option<String> {
        match self {
            Self::Ping => None,
            Self::Store => server.store().get("/").await.err().map(|error| error.to_string()),
            Self::Disk => server.store().is_full(),
        }
    }
}

pub(crate) async fn live(State(server): State<ApiServer>, RawQuery(query): RawQuery) -> Response {
    report(&server, "livez", query.as_deref(), LIVE).await
}

pub(crate) async fn healthy(
    State(server): State<ApiServer>,
    RawQuery(query): RawQuery,
) -> Response {
    report(&server, "healthz", query.as_deref(), LIVE).await
}

pub(crate) async fn ready(State(server): State<ApiServer>, RawQuery(query): RawQuery) -> Response {
    report(&server, "readyz", query.as_deref(), READY).await
}

pub(crate) async fn live_check(
    State(server): State<ApiServer>,
    Path(name): Path<String>,
) -> Result<Response, ApiError> {
    one(&server, LIVE, &name).await
}

pub(crate) async fn ready_check(
    State(server): State<ApiServer>,
    Path(name): Path<String>,
) -> Result<Response, ApiError> {
    one(&server, READY, &name).await
}

async fn one(server: &ApiServer, checks: &[Check], name: &str) -> Result<Response, ApiError> {
    let check = checks.iter().find(|check| check.name() == name).ok_or(ApiError::UnknownPath)?;
    Ok(match check.problem(server).await {
        None => "ok".into_response(),
        Some(problem) => {
            (StatusCode::SERVICE_UNAVAILABLE, format!("{name} failed: {problem}\n")).into_response()
        }
    })
}

async fn report(server: &ApiServer, name: &str, query: Option<&str>, checks: &[Check]) -> Response {
    // Given at all is enough, as in Kubernetes.
    let is_verbose = Query::parse(query).has("verbose");
    let mut excluded = values_of(query, "exclude");
    let mut failed = false;
    let mut text = String::new();
    for check in checks {
        let check_name = check.name();
        let given = excluded.len();
        excluded.retain(|other| other != check_name);
        if excluded.len() < given {
            text += &format!("[+]{check_name} excluded: ok\n");
            continue;
        }
        text += &match check.problem(server).await {
            None => format!("[+]{check_name} ok\n"),
            Some(problem) => {
                failed = true;
                format!("[-]{check_name} failed: {problem}\n")
            }
        };
    }
    if !excluded.is_empty() {
        text += &format!("warn: there is no check {} to exclude\n", excluded.join(", "));
    }
    if !failed && !is_verbose {
        return "ok".into_response();
    }
    let (code, outcome) = if failed {
        (StatusCode::SERVICE_UNAVAILABLE, "failed")
    } else {
        (StatusCode::OK, "passed")
    };
    (code, format!("{text}{name} check {outcome}\n")).into_response()
}
