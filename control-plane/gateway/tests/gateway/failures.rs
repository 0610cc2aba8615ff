//! Clients that leave, runners that break, replicas that come and go.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use axum::{
    Json, Router,
    extract::Request,
    http::StatusCode,
    middleware::{self, Next},
    response::IntoResponse as _,
};
use exo_crds::generate::{ErrorCode, GenerateEvent};
use exo_gateway::Limits;
use serde_json::{Value, json};

use crate::{
    cluster::{Cluster, PATIENCE, chunks, end, hello, start, text_of, token},
    runner::Runner,
};

#[tokio::test]
async fn a_client_that_leaves_stops_the_runner() {
    let mut runner = Runner::start().await;
    let cluster = Cluster::start().await;
    cluster.serving(&runner).await;

    let answer = cluster.ask(&hello(true));
    let mut arrived = runner.next().await;
    arrived.send_all([start(), token(1, "Hi")]).await;
    let mut response = answer.await.unwrap();
    response.chunk().await.unwrap().expect("the stream has begun");
    drop(response);
    tokio::time::timeout(PATIENCE, arrived.closed()).await.expect("the stream's end is noticed");

    let answer = cluster.ask(&hello(false));
    let mut arrived = runner.next().await;
    arrived.send_all([start(), token(1, "Hi")]).await;
    answer.abort();
    tokio::time::timeout(PATIENCE, arrived.closed()).await.expect("the other kind as well");

    let gone = "exo_gateway_requests_total{code=\"499\",route=\"/v1/chat/completions\"}";
    cluster.wait_for_metric(gone, 2.0).await;
    cluster.wait_for_metric("exo_gateway_in_flight", 0.0).await;
}

#[tokio::test]
async fn a_broken_answer_goes_on_with_the_next_replica() {
    let (mut first, mut second) = (Runner::start().await, Runner::start().await);
    let cluster = Cluster::start().await;
    cluster.create_instance().await;
    cluster.set_ready(&[(0, 1, &first), (1, 1, &second)]).await;

    let answer = cluster.ask(&hello(true));
    let mut arrived = first.next().await;
    let original = arrived.request.clone();
    arrived.send_all([start(), token(7, "one "), token(8, "")]).await;
    arrived.cut().await;

    let mut resumed = second.next().await;
    assert_eq!(resumed.request.generated, [7, 8]);
    let mut same = resumed.request.clone();
    same.generated.clear();
    assert_eq!(same, original, "prompt, parameters and seed stay");
    resumed.send_all([start(), token(9, "two"), end(3)]).await;
    resumed.end();

    let chunks = chunks(&answer.await.unwrap().text().await.unwrap());
    assert_eq!(text_of(&chunks), "one two");
    let roles = chunks.iter().filter(|c| c["choices"][0]["delta"]["role"].is_string());
    assert_eq!(roles.count(), 1, "one beginning");
    assert_eq!(chunks.last().unwrap(), "[DONE]");
    cluster.wait_for_metric("exo_gateway_resumes_total", 1.0).await;
}

#[tokio::test]
async fn a_broken_answer_waits_for_the_next_epoch() {
    let mut old = Runner::start().await;
    let cluster = Cluster::start().await;
    cluster.serving(&old).await;
    let answer = cluster.ask(&hello(false));
    let mut arrived = old.next().await;
    arrived.send_all([start(), token(7, "one ")]).await;
    old.stop_listening();
    let stopping =
        GenerateEvent::Error { code: ErrorCode::Unavailable, message: "a rank was lost".into() };
    arrived.send(stopping).await;
    arrived.end();
    cluster.set_status(json!({"readyReplicas": 0, "replicas": []})).await;

    let mut new = Runner::start().await;
    cluster.set_ready(&[(0, 2, &new)]).await;
    let mut resumed = new.next().await;
    assert_eq!(resumed.request.generated, [7]);
    resumed.send_all([start(), token(8, "two"), end(2)]).await;
    let object: Value = answer.await.unwrap().json().await.unwrap();
    assert_eq!(object["choices"][0]["message"]["content"], "one two");
    assert_eq!(object["usage"]["completion_tokens"], 2);
}

#[tokio::test]
async fn a_silent_runner_whose_replica_was_withdrawn_is_left() {
    let mut old = Runner::start().await;
    let cluster = Cluster::start().await;
    cluster.serving(&old).await;
    let answer = cluster.ask(&hello(false));
    let mut arrived = old.next().await;
    arrived.send_all([start(), token(7, "one ")]).await;
    // The machine loses its power: no connection is closed, nothing comes any more.
    let mut new = Runner::start().await;
    cluster.set_ready(&[(0, 2, &new)]).await;
    let mut resumed = new.next().await;
    assert_eq!(resumed.request.generated, [7]);
    tokio::time::timeout(PATIENCE, arrived.closed()).await.expect("the old connection is closed");
    resumed.send_all([start(), end(1)]).await;
    assert_eq!(answer.await.unwrap().status(), 200);
}

#[tokio::test]
async fn a_request_that_breaks_runners_is_given_up() {
    let mut runner = Runner::start().await;
    let cluster = Cluster::start().await;
    cluster.serving(&runner).await;
    let answer = cluster.ask(&hello(true));
    for attempt in 0..3 {
        let mut arrived = runner.next().await;
        assert_eq!(arrived.request.generated.len(), usize::from(attempt > 0));
        arrived.send(start()).await;
        if attempt == 0 {
            arrived.send(token(7, "one")).await;
        }
        arrived.cut().await;
    }
    let chunks = chunks(&answer.await.unwrap().text().await.unwrap());
    let last = chunks.last().unwrap();
    assert_eq!(last["error"]["code"], "runner_failed", "{last}");
    assert_eq!(text_of(&chunks), "one");
    assert_eq!(*runner.seen.lock().unwrap(), 3);
    let failed = "exo_gateway_requests_total{code=\"502\",route=\"/v1/chat/completions\"}";
    cluster.wait_for_metric(failed, 1.0).await;
}

#[tokio::test]
async fn a_request_waits_for_a_replica_as_for_a_cold_start() {
    let mut runner = Runner::start().await;
    let cluster = Cluster::start().await;
    cluster.create_instance().await;
    // Until the gateway knows the instance, it is unknown.
    let known = async { while cluster.get("/v1/models/chat").await.status() != 200 {} };
    tokio::time::timeout(PATIENCE, known).await.unwrap();
    let answer = cluster.ask(&hello(false));
    cluster.wait_for_metric("exo_gateway_in_flight", 1.0).await;
    cluster.set_ready(&[(0, 1, &runner)]).await;
    let mut arrived = runner.next().await;
    arrived.send_all([start(), end(0)]).await;
    assert_eq!(answer.await.unwrap().status(), 200);
}

#[tokio::test]
async fn waiting_ends_with_503_and_the_reason() {
    let limits = Limits { ready_wait: Duration::from_millis(100), ..Limits::default() };
    let cluster = Cluster::start_with(limits).await;
    cluster.create_instance().await;
    cluster
        .set_status(json!({"readyReplicas": 0, "conditions": [{"type": "Ready",
            "status": "False", "reason": "NoCapacity", "message": "no node has 19Gi free",
            "lastTransitionTime": "2026-01-02T03:04:05Z"}]}))
        .await;
    let known = async { while cluster.get("/v1/models/chat").await.status() != 200 {} };
    tokio::time::timeout(PATIENCE, known).await.unwrap();
    for stream in [false, true] {
        let response = cluster.post(&hello(stream)).send().await.unwrap();
        assert_eq!(response.status(), 503);
        assert!(response.headers().contains_key("retry-after"));
        let error: Value = response.json().await.unwrap();
        assert_eq!(error["error"]["type"], "server_error");
        let message = error["error"]["message"].as_str().unwrap();
        assert!(message.contains("no node has 19Gi free"), "{message}");
    }
}

#[tokio::test]
async fn a_full_replica_is_left_for_another_one() {
    let (mut first, mut second) = (Runner::start().await, Runner::start().await);
    let cluster = Cluster::start().await;
    cluster.create_instance().await;
    cluster.set_ready(&[(0, 1, &first), (1, 1, &second)]).await;
    let answer = cluster.ask(&hello(false));
    let full = GenerateEvent::Error {
        code: ErrorCode::Unavailable,
        message: "256 requests are waiting already".into(),
    };
    first.next().await.refuse(StatusCode::SERVICE_UNAVAILABLE, full);
    let mut arrived = second.next().await;
    arrived.send_all([start(), end(0)]).await;
    assert_eq!(answer.await.unwrap().status(), 200);
    cluster.wait_for_metric("exo_gateway_resumes_total", 0.0).await;
}

#[tokio::test]
async fn an_instance_that_is_deleted_ends_what_can_not_go_on() {
    let mut runner = Runner::start().await;
    let cluster = Cluster::start().await;
    cluster.serving(&runner).await;
    let answer = cluster.ask(&hello(true));
    let mut arrived = runner.next().await;
    arrived.send_all([start(), token(7, "one")]).await;
    cluster.delete_instance().await;
    let chunks = chunks(&answer.await.unwrap().text().await.unwrap());
    assert_eq!(chunks.last().unwrap()["error"]["message"], "`chat` was deleted");
}

#[tokio::test]
async fn something_that_is_no_runner_is_not_asked_twice() {
    let mut runner = Runner::start().await;
    let cluster = Cluster::start().await;
    cluster.serving(&runner).await;
    let answer = cluster.ask(&hello(false));
    let nonsense = GenerateEvent::Error { code: ErrorCode::InvalidRequest, message: "no".into() };
    runner.next().await.refuse(StatusCode::NOT_FOUND, nonsense);
    assert_eq!(answer.await.unwrap().status(), 400);
    assert_eq!(*runner.seen.lock().unwrap(), 1);
}

#[tokio::test]
async fn requests_spread_over_replicas() {
    let (mut first, mut second) = (Runner::start().await, Runner::start().await);
    let cluster = Cluster::start().await;
    cluster.create_instance().await;
    cluster.set_ready(&[(0, 1, &first), (1, 1, &second)]).await;
    let one = cluster.ask(&hello(false));
    let mut arrived_one = first.next().await;
    let two = cluster.ask(&hello(false));
    let mut arrived_two = second.next().await;
    arrived_one.send_all([start(), end(0)]).await;
    arrived_two.send_all([start(), end(0)]).await;
    assert_eq!(one.await.unwrap().status(), 200);
    assert_eq!(two.await.unwrap().status(), 200);
}

#[tokio::test]
async fn tokens_of_one_model_are_not_continued_by_another() {
    let mut runner = Runner::start().await;
    let cluster = Cluster::start().await;
    cluster.serving(&runner).await;
    let answer = cluster.ask(&hello(true));
    let mut arrived = runner.next().await;
    arrived.send_all([start(), token(7, "one")]).await;
    cluster.set_model("other").await;
    arrived.cut().await;
    let chunks = chunks(&answer.await.unwrap().text().await.unwrap());
    let error = &chunks.last().unwrap()["error"];
    assert_eq!(error["message"], "`chat` serves another model now");
    assert_eq!(*runner.seen.lock().unwrap(), 1);
}

#[tokio::test]
async fn what_only_somebody_can_change_is_said_at_once() {
    let cluster = Cluster::start().await;
    cluster.create_instance().await;
    let status = |minute: usize, epoch: u64, reason: &str, message: &str| {
        json!({
            "phase": "Pending", "observedGeneration": 1,
            "replicas": [{"index": 0, "epoch": epoch, "nodes": [], "ready": false,
                "lastFailure": message, "retryAfter": "2026-01-02T03:00:05Z"}],
            "conditions": [{"type": "Ready", "status": "False", "reason": reason,
                "message": message, "lastTransitionTime": format!("2026-01-02T03:0{minute}:05Z")}],
        })
    };
    let rows = [
        (0, "Unplaceable", "2 node(s) wanted, 1 usable"),
        (0, "ModelNotFound", "there is no model named x"),
        (3, "NoReplicas", "no replicas are wanted"),
        (3, "WeightsNotFound", "shard chat-0-a3-1 on mac-2: WeightsNotFound: no folder `x`"),
        (3, "Unplaceable", "5 node(s) wanted, 1 usable"),
    ];
    for (minute, (epoch, reason, message)) in rows.into_iter().enumerate() {
        cluster.set_status(status(minute, epoch, reason, message)).await;
        let known = async {
            while !cluster.get("/v1/models/chat").await.text().await.unwrap().contains(message) {}
        };
        tokio::time::timeout(PATIENCE, known).await.unwrap();
        for stream in [false, true] {
            let answer = cluster.post(&hello(stream)).send();
            let answer = tokio::time::timeout(PATIENCE, answer).await.unwrap().unwrap();
            assert_eq!(answer.status(), StatusCode::SERVICE_UNAVAILABLE, "{reason}");
            assert!(!answer.headers().contains_key("retry-after"), "{reason}");
            let error: Value = answer.json().await.unwrap();
            let said = error["error"]["message"].as_str().unwrap();
            assert!(said.contains(message), "{said}");
            assert_eq!(said.matches(reason).count(), 1, "{said}");
        }
        let list: Value = cluster.get("/v1/models").await.json().await.unwrap();
        assert_eq!(list["data"], json!([]), "{reason}");
        assert_eq!(cluster.get("/v1/models/chat").await.status(), StatusCode::NOT_FOUND);
    }
    // What somebody then does ends it.
    let mut runner = Runner::start().await;
    cluster.set_ready(&[(0, 4, &runner)]).await;
    let served = async { while cluster.get("/v1/models/chat").await.status() != 200 {} };
    tokio::time::timeout(PATIENCE, served).await.unwrap();
    let answer = cluster.ask(&hello(false));
    runner.next().await.send_all([start(), token(1, "Hi"), end(1)]).await;
    assert_eq!(answer.await.unwrap().status(), StatusCode::OK);
}

/// An API server that can be made to refuse everything as one without a majority does, except what
/// it answers already.
fn interruptible(down: &Arc<AtomicBool>) -> impl FnOnce(Router) -> Router + use<> {
    let is_down = Arc::clone(down);
    move |router: Router| {
        router.layer(middleware::from_fn(move |request: Request, next: Next| {
            let is_down = is_down.load(Ordering::Relaxed);
            async move {
                if !is_down {
                    return next.run(request).await;
                }
                let status = json!({"kind": "Status", "apiVersion": "v1", "metadata": {},
                    "status": "Failure", "reason": "ServiceUnavailable", "code": 503,
                    "message": NO_MAJORITY});
                (StatusCode::SERVICE_UNAVAILABLE, Json(status)).into_response()
            }
        }))
    }
}

const NO_MAJORITY: &str = "no majority of voters: 1 of 3 answers";

#[tokio::test]
async fn runners_that_are_gone_with_the_majority_are_not_called_busy() {
    let mut runner = Runner::start().await;
    let down = Arc::new(AtomicBool::new(false));
    let (cluster, gateway) = Cluster::launch(Limits::default(), interruptible(&down)).await;
    tokio::time::timeout(PATIENCE, gateway.ready()).await.unwrap();
    cluster.serving(&runner).await;
    let served = async { while cluster.get("/v1/models/chat").await.status() != 200 {} };
    tokio::time::timeout(PATIENCE, served).await.unwrap();

    let begun = cluster.ask(&hello(true));
    let mut arrived = runner.next().await;
    arrived.send_all([start(), token(7, "one")]).await;
    down.store(true, Ordering::Relaxed);
    runner.stop_listening();

    let answer = cluster.post(&hello(false)).send();
    let answer = tokio::time::timeout(PATIENCE, answer).await.expect("not the whole wait").unwrap();
    assert_eq!(answer.status(), StatusCode::SERVICE_UNAVAILABLE);
    assert!(answer.headers().contains_key("retry-after"), "a majority may be back soon");
    let error: Value = answer.json().await.unwrap();
    let said = error["error"]["message"].as_str().unwrap();
    assert!(said.contains(NO_MAJORITY) && !said.contains("busy"), "{said}");

    // An answer that was begun waits on.
    arrived.cut().await;
    down.store(false, Ordering::Relaxed);
    let mut next = Runner::start().await;
    cluster.set_ready(&[(0, 2, &next)]).await;
    let mut resumed = next.next().await;
    assert_eq!(resumed.request.generated, [7]);
    resumed.send_all([start(), end(1)]).await;
    assert_eq!(text_of(&chunks(&begun.await.unwrap().text().await.unwrap())), "one");
}

#[tokio::test]
async fn a_silent_api_server_holds_no_request_beyond_its_wait() {
    let is_silent = Arc::new(AtomicBool::new(false));
    let silent = Arc::clone(&is_silent);
    let wrap = move |router: Router| {
        router.layer(middleware::from_fn(move |request: Request, next: Next| {
            let silent = silent.load(Ordering::Relaxed);
            async move {
                match silent {
                    true => std::future::pending().await,
                    false => next.run(request).await,
                }
            }
        }))
    };
    let ready_wait = Duration::from_secs(3);
    let (cluster, gateway) =
        Cluster::launch(Limits { ready_wait, ..Limits::default() }, wrap).await;
    tokio::time::timeout(PATIENCE, gateway.ready()).await.unwrap();
    let mut runner = Runner::start().await;
    cluster.serving(&runner).await;
    let answer = cluster.ask(&hello(false));
    runner.next().await.send_all([start(), token(1, "Hi"), end(1)]).await;
    assert_eq!(answer.await.unwrap().status(), StatusCode::OK);

    is_silent.store(true, Ordering::Relaxed);
    runner.stop_listening();
    // It is asked after four failures, and again at the end.
    let answer =
        tokio::time::timeout(ready_wait + Duration::from_secs(2), cluster.ask(&hello(false))).await;
    let answer = answer.expect("a second longer, and little more").unwrap();
    assert_eq!(answer.status(), StatusCode::SERVICE_UNAVAILABLE);
}

#[tokio::test]
async fn what_is_not_tried_in_time_is_refused_at_once() {
    let cluster = Cluster::start().await;
    cluster.create_instance().await;
    let message = "shard chat-0-a1-0: BadWeights: no tensor `x`; next try in 5 min";
    let retry = |at: &str| {
        json!({
            "phase": "Failed", "observedGeneration": 1,
            "replicas": [{"index": 0, "epoch": 1, "nodes": ["a"], "ready": false,
                "failures": 1, "retryAfter": at}],
            "conditions": [{"type": "Ready", "status": "False", "reason": "ShardFailed",
                "message": message, "lastTransitionTime": "2026-01-02T03:04:05Z"}],
        })
    };
    let known = async { while cluster.get("/v1/models/chat").await.status() != 200 {} };
    tokio::time::timeout(PATIENCE, known).await.unwrap();
    cluster.set_status(retry("2999-01-02T03:04:05Z")).await;
    // Longer than this a request waits for a replica that may come.
    let answer = tokio::time::timeout(PATIENCE, cluster.ask(&hello(true))).await.unwrap().unwrap();
    assert_eq!(answer.status(), StatusCode::SERVICE_UNAVAILABLE);
    assert!(!answer.headers().contains_key("retry-after"), "there is no soon");
    let error: Value = answer.json().await.unwrap();
    let said = error["error"]["message"].as_str().unwrap();
    assert!(said.contains(message), "{said}");

    // What is tried any moment is waited for.
    let mut runner = Runner::start().await;
    cluster.set_status(retry("2026-01-02T03:04:05Z")).await;
    let answer = cluster.ask(&hello(false));
    cluster.set_ready(&[(0, 2, &runner)]).await;
    runner.next().await.send_all([start(), token(1, "Hi"), end(1)]).await;
    assert_eq!(answer.await.unwrap().status(), StatusCode::OK);
}

#[tokio::test]
async fn a_gateway_without_a_control_plane_says_why_it_can_not_answer() {
    let down = Arc::new(AtomicBool::new(true));
    let (cluster, gateway) = Cluster::launch(Limits::default(), interruptible(&down)).await;
    for path in ["/v1/models", "/v1/models/chat", "/health"] {
        let answer = tokio::time::timeout(PATIENCE, cluster.get(path)).await.unwrap();
        assert_eq!(answer.status(), StatusCode::SERVICE_UNAVAILABLE, "{path}");
        let error: Value = answer.json().await.unwrap();
        assert_eq!(error["error"]["type"], "server_error", "{path}: {error}");
        let said = error["error"]["message"].as_str().unwrap();
        assert!(said.contains(NO_MAJORITY) && !said.contains("ApiError"), "{path}: {said}");
    }
    let answer = tokio::time::timeout(PATIENCE, cluster.ask(&hello(true))).await.unwrap().unwrap();
    assert_eq!(answer.status(), StatusCode::SERVICE_UNAVAILABLE);

    down.store(false, Ordering::Relaxed);
    tokio::time::timeout(PATIENCE, gateway.ready()).await.unwrap();
    assert_eq!(cluster.get("/health").await.status(), StatusCode::OK);
    let list: Value = cluster.get("/v1/models").await.json().await.unwrap();
    assert_eq!(list["data"], json!([]));
}
