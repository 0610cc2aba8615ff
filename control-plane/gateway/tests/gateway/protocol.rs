//! What clients see when all goes well, and when they ask for something wrong.

use std::time::Duration;

use axum::http::StatusCode;
use exo_crds::generate::{ErrorCode, GenerateEvent};
use exo_gateway::Limits;
use futures::StreamExt as _;
use serde_json::{Value, json};

use crate::{
    cluster::{Cluster, chunks, end, hello, start, text_of, token},
    runner::Runner,
};

#[tokio::test]
async fn answers_whole_and_streamed() {
    let mut runner = Runner::start().await;
    let cluster = Cluster::start().await;
    cluster.serving(&runner).await;

    let answer = cluster.ask(&hello(false));
    let mut arrived = runner.next().await;
    assert_eq!(arrived.request.sampling.seed, 11, "the instance's seed");
    assert!(arrived.request.id.starts_with("chatcmpl-"));
    arrived.send_all([start(), token(1, "Hi"), token(2, " there"), end(2)]).await;
    arrived.end();
    let response = answer.await.unwrap();
    assert_eq!(response.status(), 200);
    assert!(response.headers().contains_key("x-request-id"));
    let object: Value = response.json().await.unwrap();
    assert_eq!(object["object"], "chat.completion");
    assert_eq!(object["model"], "chat");
    assert_eq!(object["choices"][0]["message"]["content"], "Hi there");
    assert_eq!(object["usage"]["total_tokens"], 7);

    let mut body = hello(true);
    body["stream_options"] = json!({"include_usage": true});
    body["seed"] = json!(3);
    let answer = cluster.ask(&body);
    let mut arrived = runner.next().await;
    assert_eq!(arrived.request.sampling.seed, 3, "the client's seed");
    arrived.send_all([start(), token(1, "Hi")]).await;
    // Tokens reach the client while the answer is being made.
    let mut response = answer.await.unwrap();
    assert_eq!(response.headers()["content-type"], "text/event-stream");
    let mut text = String::new();
    while !text.contains("Hi") {
        text += std::str::from_utf8(&response.chunk().await.unwrap().unwrap()).unwrap();
    }
    arrived.send_all([token(2, "!"), end(2)]).await;
    arrived.end();
    text += &response.text().await.unwrap();
    let chunks = chunks(&text);
    assert_eq!(text_of(&chunks), "Hi!");
    assert_eq!(chunks.last().unwrap(), "[DONE]");
    assert_eq!(chunks[chunks.len() - 2]["usage"]["total_tokens"], 7);

    let route = "exo_gateway_requests_total{code=\"200\",route=\"/v1/chat/completions\"}";
    cluster.wait_for_metric(route, 2.0).await;
    cluster.wait_for_metric("exo_gateway_tokens_total{kind=\"completion\"}", 4.0).await;
    cluster.wait_for_metric("exo_gateway_tokens_total{kind=\"prompt\"}", 10.0).await;
    cluster.wait_for_metric("exo_gateway_in_flight", 0.0).await;
    cluster.wait_for_metric("exo_gateway_resumes_total", 0.0).await;
}

#[tokio::test]
async fn lists_instances_as_models() {
    let cluster = Cluster::start().await;
    let list = || async { cluster.get("/v1/models").await.json::<Value>().await.unwrap() };
    assert_eq!(list().await, json!({"object": "list", "data": []}));
    cluster.create_instance().await;
    let found = tokio::time::timeout(crate::cluster::PATIENCE, async {
        loop {
            let list = list().await;
            if list["data"][0]["id"] == "chat" {
                return list["data"][0].clone();
            }
        }
    });
    let entry = found.await.unwrap();
    assert_eq!(entry["object"], "model");
    assert_eq!(entry["owned_by"], "exo");
    assert!(entry["created"].as_i64().unwrap() > 1_700_000_000);
    let one: Value = cluster.get("/v1/models/chat").await.json().await.unwrap();
    assert_eq!(one, entry);
    let none = cluster.get("/v1/models/owner/name").await;
    assert_eq!(none.status(), 404);
    let error: Value = none.json().await.unwrap();
    assert_eq!(error["error"]["code"], "model_not_found");
    assert_eq!(cluster.get("/health").await.status(), 200);
}

/// Sends it as a page of this machine does, which must be able to read the refusal.
async fn refused(
    cluster: &Cluster,
    request: reqwest::RequestBuilder,
    status: u16,
) -> serde_json::Map<String, Value> {
    const PAGE: &str = "http://localhost:3000";
    let response = request.header("origin", PAGE).send().await.unwrap();
    assert_eq!(response.status(), status);
    assert_eq!(response.headers()["access-control-allow-origin"], PAGE, "{}", cluster.url);
    let mut body: Value = response.json().await.unwrap();
    let error = body["error"].take();
    assert!(error["message"].as_str().is_some_and(|m| !m.is_empty()), "{error}");
    error.as_object().unwrap().clone()
}

#[tokio::test]
async fn mistakes_get_openais_error_form() {
    let limits = Limits { body_bytes: 1000, ..Limits::default() };
    let cluster = Cluster::start_with(limits).await;

    let unknown = refused(&cluster, cluster.post(&hello(false)), 404).await;
    assert_eq!(unknown["code"], "model_not_found");
    assert_eq!(unknown["type"], "invalid_request_error");
    assert_eq!(unknown["param"], "model");

    let mut body = hello(true);
    body["n"] = json!(2);
    let error = refused(&cluster, cluster.post(&body), 400).await;
    assert_eq!(error["param"], "n");

    let url = format!("{}/v1/chat/completions", cluster.url);
    let error = refused(&cluster, cluster.http.post(&url).body("{\"model\": "), 400).await;
    assert_eq!(error["param"], Value::Null);
    refused(&cluster, cluster.http.post(&url).body("x".repeat(1001)), 413).await;
    // Without an announced length, too.
    let pieces = futures::stream::iter([(); 2].map(|()| Ok::<_, std::io::Error>("x".repeat(600))));
    let endless = cluster.http.post(&url).body(reqwest::Body::wrap_stream(pieces));
    refused(&cluster, endless, 413).await;
    refused(&cluster, cluster.http.get(&url), 405).await;
    for (path, hint) in [("/v1/nothing", "POST /v1/chat/completions"), ("/chat/completions", "/v1")]
    {
        let unknown = cluster.http.post(format!("{}{path}", cluster.url));
        let error = refused(&cluster, unknown, 404).await;
        assert!(error["message"].as_str().unwrap().contains(hint), "{error:?}");
        assert_eq!(error["code"], "unknown_url");
    }

    let codes = "exo_gateway_requests_total{code=\"413\",route=\"/v1/chat/completions\"}";
    cluster.wait_for_metric(codes, 2.0).await;
    cluster.wait_for_metric("exo_gateway_requests_total{code=\"404\",route=\"other\"}", 2.0).await;
}

fn preflight(cluster: &Cluster, path: &str, origin: &str) -> reqwest::RequestBuilder {
    cluster
        .http
        .request(reqwest::Method::OPTIONS, format!("{}{path}", cluster.url))
        .header("origin", origin)
        .header("access-control-request-method", "POST")
        .header("access-control-request-headers", "authorization,content-type")
}

#[tokio::test]
async fn only_pages_of_this_machine_and_allowed_ones_may_ask() {
    let allowed = "https://chat.example.org";
    let limits = Limits { allowed_origins: vec![allowed.to_owned()], ..Limits::default() };
    let cluster = Cluster::start_with(limits).await;
    let path = "/v1/chat/completions";
    for origin in ["http://localhost:3000", "https://127.0.0.1", allowed, cluster.url.as_str()] {
        let response = preflight(&cluster, path, origin).send().await.unwrap();
        assert_eq!(response.status(), 204, "{origin}");
        let headers = response.headers();
        assert_eq!(headers["access-control-allow-origin"], origin);
        assert_eq!(headers["access-control-allow-headers"], "authorization,content-type");
        assert_eq!(headers["vary"], "origin");
    }
    for origin in ["https://example.org", "null"] {
        // A page needs no preflight for a body that it calls plain text, as the gateway takes it.
        let plain = cluster.post(&hello(false)).header("origin", origin);
        let listing = cluster.http.get(format!("{}/v1/models", cluster.url));
        for request in [preflight(&cluster, path, origin), plain, listing.header("origin", origin)]
        {
            let response = request.send().await.unwrap();
            assert_eq!(response.status(), 403, "{origin}");
            assert!(!response.headers().contains_key("access-control-allow-origin"));
            let error: Value = response.json().await.unwrap();
            assert_eq!(error["error"]["code"], "origin_not_allowed");
            assert!(error["error"]["message"].as_str().unwrap().contains(origin));
        }
    }
    // Clients that are no pages ask as ever.
    assert_eq!(cluster.get("/v1/models").await.status(), 200);
}

#[tokio::test]
async fn no_page_reads_the_metrics() {
    let limits = Limits { allowed_origins: vec!["*".to_owned()], ..Limits::default() };
    let cluster = Cluster::start_with(limits).await;
    for origin in ["http://localhost:3000", "https://example.org"] {
        let url = format!("{}/metrics", cluster.url);
        let got = cluster.http.get(url).header("origin", origin).send().await.unwrap();
        let asked = preflight(&cluster, "/metrics", origin).send().await.unwrap();
        assert_eq!((got.status().as_u16(), asked.status().as_u16()), (200, 405));
        for response in [got, asked] {
            let headers = response.headers();
            assert!(
                !headers.keys().any(|h| h.as_str().starts_with("access-control")),
                "{headers:?}"
            );
        }
        let models = cluster.http.get(format!("{}/v1/models", cluster.url));
        let models = models.header("origin", origin).send().await.unwrap();
        assert_eq!(models.headers()["access-control-allow-origin"], origin);
    }
}

#[tokio::test]
async fn a_body_that_does_not_come_gives_its_place_back() {
    let limits =
        Limits { body_wait: Duration::from_millis(200), in_flight: 1, ..Limits::default() };
    let cluster = Cluster::start_with(limits).await;
    let url = format!("{}/v1/chat/completions", cluster.url);
    let first = futures::stream::iter([Ok::<_, std::io::Error>("{\"model\": ")]);
    let endless = first.chain(futures::stream::pending());
    let slow = cluster.http.post(&url).body(reqwest::Body::wrap_stream(endless));
    let error = refused(&cluster, slow, 408).await;
    assert_eq!(error["code"], "request_timeout");
    cluster.wait_for_metric("exo_gateway_in_flight", 0.0).await;
    refused(&cluster, cluster.post(&hello(false)), 404).await;
}

#[tokio::test]
async fn bytes_of_all_bodies_together_are_bounded() {
    let mut runner = Runner::start().await;
    let cluster = Cluster::start_with(Limits { bodies_bytes: 1000, ..Limits::default() }).await;
    cluster.serving(&runner).await;
    let mut long = hello(false);
    long["messages"][0]["content"] = json!("x".repeat(800));
    let answer = cluster.ask(&long);
    let mut arrived = runner.next().await;
    let error = refused(&cluster, cluster.post(&long), 429).await;
    assert!(error["message"].as_str().unwrap().contains("1000 bytes"), "{error:?}");
    // There is room for a short one, and for a long one once the first is answered.
    let short = cluster.ask(&hello(false));
    let mut arrived_short = runner.next().await;
    for arrived in [&mut arrived, &mut arrived_short] {
        arrived.send_all([start(), end(0)]).await;
    }
    assert_eq!(answer.await.unwrap().status(), 200);
    assert_eq!(short.await.unwrap().status(), 200);
    cluster.wait_for_metric("exo_gateway_in_flight", 0.0).await;
    let answer = cluster.ask(&long);
    runner.next().await.send_all([start(), end(0)]).await;
    assert_eq!(answer.await.unwrap().status(), 200);
}

#[tokio::test]
async fn a_runners_verdict_on_the_request_is_passed_on() {
    let mut runner = Runner::start().await;
    let cluster = Cluster::start().await;
    cluster.serving(&runner).await;
    let verdict = || GenerateEvent::Error {
        code: ErrorCode::ContextLengthExceeded,
        message: "the prompt has 3000 tokens; the context holds 2048".into(),
    };
    for stream in [false, true] {
        // As a refusal, and as the first event.
        let answer = cluster.ask(&hello(stream));
        runner.next().await.refuse(StatusCode::BAD_REQUEST, verdict());
        let response = answer.await.unwrap();
        assert_eq!(response.status(), 400);
        let error: Value = response.json().await.unwrap();
        assert_eq!(error["error"]["code"], "context_length_exceeded");
        assert!(error["error"]["message"].as_str().unwrap().contains("3000"));

        let answer = cluster.ask(&hello(stream));
        runner.next().await.send(verdict()).await;
        assert_eq!(answer.await.unwrap().status(), 400);
    }
    assert_eq!(*runner.seen.lock().unwrap(), 4, "nothing is tried twice");
    let answer = cluster.ask(&hello(false));
    let message = "max_tokens asks for 9: 8 are left";
    let verdict =
        GenerateEvent::Error { code: ErrorCode::ContextLengthExceeded, message: message.into() };
    runner.next().await.refuse(StatusCode::BAD_REQUEST, verdict);
    let error: Value = answer.await.unwrap().json().await.unwrap();
    assert_eq!(error["error"]["param"], "max_tokens");
}

#[tokio::test]
async fn admission_is_bounded_and_counts_whole_streams() {
    let mut runner = Runner::start().await;
    let cluster = Cluster::start_with(Limits { in_flight: 1, ..Limits::default() }).await;
    cluster.serving(&runner).await;
    let answer = cluster.ask(&hello(true));
    let mut arrived = runner.next().await;
    arrived.send(start()).await;
    let response = answer.await.unwrap();
    let error = refused(&cluster, cluster.post(&hello(false)), 429).await;
    assert_eq!(error["type"], "rate_limit_error");
    arrived.send(end(0)).await;
    arrived.end();
    response.text().await.unwrap();
    let answer = cluster.ask(&hello(false));
    let mut arrived = runner.next().await;
    arrived.send_all([start(), end(0)]).await;
    assert_eq!(answer.await.unwrap().status(), 200);
}
