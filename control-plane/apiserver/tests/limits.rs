//! How long a request may take, and how much memory its answer.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod support;

use std::time::Duration;

use axum::{
    Router,
    body::{Body, BodyDataStream},
    http::{HeaderMap, Method, Request, StatusCode},
};
use exo_apiserver::{ApiServer, Identity, Limits, app, in_process};
use exo_store::Store;
use futures::StreamExt as _;
use prometheus::{Registry, TextEncoder};
use serde_json::{Value, json};
use support::{NODES, node};
use tower::ServiceExt as _;

struct Limited {
    router: Router,
    registry: Registry,
}

/// A body that may still be under way.
type Answer = (u16, HeaderMap, BodyDataStream);

impl Limited {
    fn new(limits: Limits) -> Self {
        let registry = Registry::new();
        let server =
            ApiServer::with_limits(Store::memory(), &exo_crds::all(), &registry, limits).unwrap();
        let identity = Identity { name: "test".into(), groups: Vec::new() };
        Self { router: in_process(app(server), identity), registry }
    }

    async fn send(&self, method: Method, path: &str, accept: &str, body: Body) -> Answer {
        let request = Request::builder().method(method).uri(path).header("accept", accept);
        let response = self.router.clone().oneshot(request.body(body).unwrap()).await.unwrap();
        let (parts, body) = response.into_parts();
        (parts.status.as_u16(), parts.headers, body.into_data_stream())
    }

    async fn json(&self, method: Method, path: &str, body: Body) -> (u16, Value) {
        let (code, _, body) = self.send(method, path, "application/json", body).await;
        (code, serde_json::from_slice(&whole(body).await).unwrap())
    }

    /// Four nodes, of 50 kB each.
    async fn fill(&self) {
        for n in 0..4 {
            let mut node = node(&format!("n{n}"));
            node["metadata"]["annotations"] = json!({"note": "x".repeat(50_000)});
            let (code, made) = self.json(Method::POST, NODES, Body::from(node.to_string())).await;
            assert_eq!(code, 201, "{made:.300}");
        }
    }

    fn in_flight(&self) -> u32 {
        let text = TextEncoder::new().encode_to_string(&self.registry.gather()).unwrap();
        let name = "\napiserver_current_inflight_requests ";
        let (_, value) = text.split_once(name).unwrap();
        value.lines().next().unwrap().parse().unwrap()
    }
}

async fn whole(mut body: BodyDataStream) -> Vec<u8> {
    let mut bytes = Vec::new();
    while let Some(part) = body.next().await {
        bytes.extend_from_slice(&part.unwrap());
    }
    bytes
}

#[tokio::test]
async fn a_deletion_of_many_ends_in_time_and_can_go_on() {
    let server = Limited::new(Limits::default());
    for n in 0..40 {
        let body = Body::from(node(&format!("n{n:02}")).to_string());
        assert_eq!(server.json(Method::POST, NODES, body).await.0, 201);
    }
    let count = async || {
        let (_, list) = server.json(Method::GET, NODES, Body::empty()).await;
        list["items"].as_array().unwrap().len()
    };
    let path = format!("{NODES}?timeout=1ns");
    let (code, refused) = server.json(Method::DELETE, &path, Body::empty()).await;
    assert_eq!((code, &refused["reason"]), (504, &json!("Timeout")), "{refused}");
    let message = refused["message"].as_str().unwrap();
    assert!(message.starts_with("Timeout: request did not complete within the allotted timeout"));
    assert!(message.contains("some of the objects are deleted"), "{message}");
    let left = count().await;
    assert!(left > 0 && left < 40, "{left}");
    let (code, rest) = server.json(Method::DELETE, NODES, Body::empty()).await;
    assert_eq!((code, rest["items"].as_array().unwrap().len()), (200, left));
    assert_eq!(count().await, 0);
    assert_eq!(server.in_flight(), 0);
}

#[tokio::test]
async fn clients_can_ask_for_less_time() {
    let server = Limited::new(Limits::default());
    for (query, expect) in [
        ("timeout=0", 200),
        ("timeout=1m30s", 200),
        ("timeout=9999h", 200),
        ("timeout=", 200),
        ("timeout=5", 400),
        ("timeout=-1s", 400),
        ("watch=1&timeoutSeconds=1&timeout=5", 200),
    ] {
        let path = format!("{NODES}?{query}");
        let (code, _, body) = server.send(Method::GET, &path, "*/*", Body::empty()).await;
        assert_eq!(code, expect, "{query}: {:?}", String::from_utf8(whole(body).await));
    }
    let body = Body::from_stream(futures::stream::pending::<Result<Vec<u8>, std::io::Error>>());
    let path = format!("{NODES}?timeout=50ms");
    let (code, refused) = server.json(Method::POST, &path, body).await;
    assert_eq!((code, &refused["reason"]), (408, &json!("Timeout")), "{refused}");
    // Questions about access are answered in time too.
    let limits = Limits { request: Duration::from_millis(50), ..Limits::default() };
    let server = Limited::new(limits);
    let body = Body::from_stream(futures::stream::pending::<Result<Vec<u8>, std::io::Error>>());
    let path = "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews";
    assert_eq!(server.json(Method::POST, path, body).await.0, 408);
}

#[tokio::test]
async fn an_answer_that_nobody_reads_is_given_up() {
    let limits = Limits { request: Duration::from_millis(300), ..Limits::default() };
    let server = Limited::new(limits);
    server.fill().await;
    for accept in ["application/json", "application/yaml"] {
        let (code, _, mut body) = server.send(Method::GET, NODES, accept, Body::empty()).await;
        assert_eq!(code, 200, "{accept}");
        body.next().await.unwrap().unwrap();
        assert_eq!(server.in_flight(), 1, "{accept}");
        let given_up = async {
            while server.in_flight() > 0 {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(Duration::from_secs(10), given_up).await.unwrap();
        // So that the client doesn't take it for the whole.
        assert!(body.next().await.unwrap().is_err(), "{accept}");
    }
}

#[tokio::test]
async fn what_is_gathered_to_be_rewritten_has_a_limit() {
    let limits = Limits { list_bytes: 300 << 10, ..Limits::default() };
    let server = Limited::new(limits);
    server.fill().await;
    let pretty = format!("{NODES}?pretty=true");
    let forms = [(NODES, "application/yaml"), (pretty.as_str(), "application/json")];
    for (path, accept) in forms {
        let (code, _, mut held) = server.send(Method::GET, path, accept, Body::empty()).await;
        assert_eq!(code, 200);
        let mut text = held.next().await.unwrap().unwrap().to_vec();
        assert_eq!(server.in_flight(), 1, "it holds its place until it is out");
        for (path, accept) in forms {
            let (code, headers, body) = server.send(Method::GET, path, accept, Body::empty()).await;
            let body = String::from_utf8(whole(body).await).unwrap();
            assert_eq!(code, StatusCode::TOO_MANY_REQUESTS, "{body:.300}");
            assert_eq!(headers["retry-after"], "1");
        }
        // What is short, or goes out as it is, needs none of it.
        for (path, accept) in
            [(NODES, "application/json"), (&*format!("{NODES}/n0"), "application/yaml")]
        {
            let (code, _, body) = server.send(Method::GET, path, accept, Body::empty()).await;
            assert!(code == 200 && whole(body).await.len() > 50_000, "{path} {accept}");
        }
        text.extend(whole(held).await);
        let found = exo_crds::yaml::documents(std::str::from_utf8(&text).unwrap()).unwrap();
        assert_eq!(found[0]["items"].as_array().unwrap().len(), 4, "{accept}");
        assert_eq!(server.in_flight(), 0);
    }
}
