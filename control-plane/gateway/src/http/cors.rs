//! Which web pages may use the gateway.
//!
//! It asks for no credentials, so whoever reaches it may use it, and a browser reaches whatever its
//! user's machine does: any website that is merely open in a tab could run prompts and read the
//! answers. So requests that a browser sends for a page are answered only where the page comes from
//! this machine, from the gateway's own host, or from an origin that was allowed. Other requests of
//! pages are refused rather than only kept from being read, for running prompts costs as well.
//! Clients that are no browsers send no `Origin`; nothing changes for them.

use std::sync::Arc;

use axum::{
    extract::{Request, State},
    http::{HeaderMap, HeaderValue, Method, StatusCode, Uri, header},
    middleware::Next,
    response::{IntoResponse as _, Response},
};

use crate::{Shared, error::ApiError};

/// For the machines that scrape it; no page is told what it says.
const NOT_FOR_PAGES: &str = "/metrics";

pub(super) async fn guard(
    State(shared): State<Arc<Shared>>,
    request: Request,
    next: Next,
) -> Response {
    if request.uri().path() == NOT_FOR_PAGES {
        return next.run(request).await;
    }
    let mut response = match request.headers().get(header::ORIGIN).cloned() {
        None => next.run(request).await,
        Some(origin) if is_allowed(&origin, &request, &shared.limits.allowed_origins) => {
            answer_page(origin, request, next).await
        }
        Some(origin) => ApiError::foreign_page(&origin).into_response(),
    };
    // The same URL is answered otherwise for another page.
    response.headers_mut().append(header::VARY, HeaderValue::from_static("origin"));
    response
}

async fn answer_page(origin: HeaderValue, request: Request, next: Next) -> Response {
    let asked = request.headers();
    let preflight = request.method() == Method::OPTIONS
        && asked.contains_key(header::ACCESS_CONTROL_REQUEST_METHOD);
    // The wildcard would not cover `Authorization`, which every client sends.
    let headers = asked.get(header::ACCESS_CONTROL_REQUEST_HEADERS).cloned();
    let mut response =
        if preflight { StatusCode::NO_CONTENT.into_response() } else { next.run(request).await };
    let answer = response.headers_mut();
    answer.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, origin);
    if preflight {
        answer.insert(
            header::ACCESS_CONTROL_ALLOW_METHODS,
            HeaderValue::from_static("GET, POST, OPTIONS"),
        );
        answer.insert(header::ACCESS_CONTROL_MAX_AGE, HeaderValue::from_static("86400"));
        if let Some(headers) = headers {
            answer.insert(header::ACCESS_CONTROL_ALLOW_HEADERS, headers);
        }
    } else {
        answer.insert(
            header::ACCESS_CONTROL_EXPOSE_HEADERS,
            HeaderValue::from_static("x-request-id, retry-after"),
        );
    }
    response
}

fn is_allowed(origin: &HeaderValue, request: &Request, allowed: &[String]) -> bool {
    let Ok(origin) = origin.to_str() else {
        return false;
    };
    if allowed.iter().any(|one| one == "*" || one.eq_ignore_ascii_case(origin)) {
        return true;
    }
    let headers = request.headers();
    // Browsers alone can set this. A proxy may have replaced the host that the page knows.
    if headers.get("sec-fetch-site").is_some_and(|site| site == "same-origin") {
        return true;
    }
    host_of_origin(origin).is_some_and(|host| {
        is_loopback(&host) || own_host(request.uri(), headers).is_some_and(|own| own == host)
    })
}

/// Host of a web page's origin, without its port. `None` for `null` and what is no website.
fn host_of_origin(origin: &str) -> Option<String> {
    let uri: Uri = origin.parse().ok()?;
    let web = matches!(uri.scheme_str(), Some("http" | "https"));
    uri.host().filter(|_| web).map(str::to_ascii_lowercase)
}

fn is_loopback(host: &str) -> bool {
    matches!(host, "localhost" | "127.0.0.1" | "[::1]")
}

/// The host that the request was sent to, without its port.
fn own_host(uri: &Uri, headers: &HeaderMap) -> Option<String> {
    // HTTP/2 has it in the URI.
    let from_uri = uri.host().map(str::to_ascii_lowercase);
    from_uri.or_else(|| {
        let host: Uri = headers.get(header::HOST)?.to_str().ok()?.parse().ok()?;
        host.host().map(str::to_ascii_lowercase)
    })
}

#[cfg(test)]
mod tests {
    use axum::body::Body;

    use super::*;

    fn check(origin: &str, host: &str, allowed: &[&str], expect: bool) {
        let request = Request::builder()
            .uri("/v1/models")
            .header(header::HOST, host)
            .body(Body::empty())
            .unwrap();
        let allowed: Vec<String> = allowed.iter().map(|&one| one.to_owned()).collect();
        let origin = HeaderValue::from_str(origin).unwrap();
        assert_eq!(is_allowed(&origin, &request, &allowed), expect, "{origin:?} at {host}");
    }

    #[test]
    fn pages_of_this_machine_and_of_the_gateways_host() {
        for origin in [
            "http://localhost",
            "http://localhost:3000",
            "https://127.0.0.1:8443",
            "http://[::1]:5173",
            "http://LocalHost:3000",
        ] {
            check(origin, "studio-1.local:8080", &[], true);
        }
        check("http://studio-1.local:3000", "studio-1.local:8080", &[], true);
        check("http://studio-1.local", "Studio-1.local:8080", &[], true);
        check("http://192.168.1.5", "192.168.1.5:8080", &[], true);
        check("http://[fd00::1]:3000", "[fd00::1]:8080", &[], true);
    }

    #[test]
    fn pages_of_everywhere_else() {
        for origin in [
            "https://example.org",
            "null",
            "http://localhost.example.org",
            "http://example.org:8080",
            "http://notlocalhost",
            "http://127.0.0.1.example.org",
            "http://localhost@example.org",
            "file://localhost",
            "",
        ] {
            check(origin, "localhost:8080", &[], false);
        }
    }

    #[test]
    fn pages_that_were_allowed() {
        let allowed = ["https://chat.example.org", "app://desk"];
        check("https://chat.example.org", "a:8080", &allowed, true);
        check("app://desk", "a:8080", &allowed, true);
        check("http://chat.example.org", "a:8080", &allowed, false);
        check("https://chat.example.org:444", "a:8080", &allowed, false);
        check("null", "a:8080", &["*"], true);
    }

    #[test]
    fn a_proxy_may_hide_the_host_but_not_the_browsers_word() {
        let request = |site: &str| {
            let request = Request::builder().uri("/v1/models").header(header::HOST, "127.0.0.1");
            request.header("sec-fetch-site", site).body(Body::empty()).unwrap()
        };
        let origin = HeaderValue::from_static("https://llm.example.org");
        assert!(is_allowed(&origin, &request("same-origin"), &[]));
        assert!(!is_allowed(&origin, &request("same-site"), &[]));
        assert!(!is_allowed(&origin, &request("cross-site"), &[]));
    }
}
