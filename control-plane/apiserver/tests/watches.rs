//! Watches in all their forms, what the limits refuse, and the metrics.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod support;

use axum::{
    Router,
    body::{Body, BodyDataStream},
    http::{Method, Request, StatusCode},
};
use exo_apiserver::{ApiServer, Identity, Limits, app, in_process};
use exo_store::{HistoryLimits, Store};
use exo_test_support::metrics;
use futures::StreamExt as _;
use prometheus::TextEncoder;
use serde_json::{Value, json};
use support::{INSTANCES, NODES, SHARDS, Server, instance, node, shard};
use tower::ServiceExt as _;

/// Everything that a watch which ends says, line by line.
async fn watch(server: &Server, path: &str) -> Vec<Value> {
    let request = Request::get(path).body(Body::empty()).unwrap();
    let response = server.router.clone().oneshot(request).await.unwrap();
    assert_eq!(response.status(), StatusCode::OK, "{path}");
    lines(response.into_body().into_data_stream()).await
}

async fn lines(mut body: BodyDataStream) -> Vec<Value> {
    let mut text = Vec::new();
    while let Some(part) = body.next().await {
        text.extend_from_slice(&part.unwrap());
    }
    let text = String::from_utf8(text).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// What the lines are and whom they concern.
fn told(lines: &[Value]) -> Vec<String> {
    lines
        .iter()
        .map(|line| {
            let name = line["object"]["metadata"]["name"].as_str().unwrap_or("-");
            format!("{} {name}", line["type"].as_str().unwrap())
        })
        .collect()
}

#[tokio::test]
async fn bookmarks_tell_of_progress_elsewhere() {
    let server = support::start();
    server.call(Method::POST, INSTANCES, Some(instance("a"))).await;
    let since = server.store.revision();
    for n in 0..5 {
        server.call(Method::POST, NODES, Some(node(&format!("n{n}")))).await;
    }
    let path = format!(
        "{INSTANCES}?watch=1&allowWatchBookmarks=true&timeoutSeconds=1&resourceVersion={since}"
    );
    let lines = watch(&server, &path).await;
    assert_eq!(told(&lines), ["BOOKMARK -"]);
    let version = lines[0]["object"]["metadata"]["resourceVersion"].as_str().unwrap();
    assert_eq!(version, server.store.revision().to_string());
    assert_eq!(lines[0]["object"]["kind"], "InferenceInstance");
    // From there on nothing was missed.
    server.call(Method::POST, INSTANCES, Some(instance("b"))).await;
    let path = format!("{INSTANCES}?watch=1&timeoutSeconds=1&resourceVersion={version}");
    assert_eq!(told(&watch(&server, &path).await), ["ADDED b"], "no bookmark unasked");
}

/// However an object was written, in whatever order of its fields.
#[tokio::test]
async fn lists_and_watches_show_what_get_shows() {
    let server = support::start();
    let odd = r#"{"spec": {"model": "m", "environment": {"metadata": "\"metadata\":{"}},
        "metadata": {"annotations": {"a": "{\"metadata\":{"}, "name": "odd"},
        "kind": "InferenceInstance", "apiVersion": "exo.dev/v1alpha1"}"#;
    let request = Request::post(INSTANCES).body(Body::from(odd)).unwrap();
    assert_eq!(server.send(request).await.0, StatusCode::CREATED);
    server.call(Method::POST, INSTANCES, Some(instance("plain"))).await;
    let events = "/apis/events.k8s.io/v1/namespaces/default/events";
    let event = json!({
        "apiVersion": "events.k8s.io/v1", "kind": "Event", "metadata": {"name": "e"}, "note": "n",
        "type": "Normal", "reason": "Told", "action": "Tell", "reportingController": "c",
        "reportingInstance": "i", "eventTime": "2026-01-01T00:00:00.000000Z",
    });
    assert_eq!(server.call(Method::POST, events, Some(event)).await.0, StatusCode::CREATED);
    for (collection, names) in [(INSTANCES, &["odd", "plain"][..]), (events, &["e"])] {
        let mut objects = Vec::new();
        for name in names {
            objects.push(server.get(&format!("{collection}/{name}")).await.1);
        }
        assert_eq!(server.get(collection).await.1["items"], json!(objects));
        let lines = watch(&server, &format!("{collection}?watch=1&timeoutSeconds=1")).await;
        let told: Vec<Value> = lines.iter().map(|line| line["object"].clone()).collect();
        assert_eq!(json!(told), json!(objects));
        // The same by a selector, for which every object is looked into.
        let some = format!("{collection}?labelSelector=!none");
        assert_eq!(server.get(&some).await.1["items"], json!(objects));
    }
    let since = server.store.revision();
    let path = format!("{INSTANCES}/odd");
    let patch = json!({"metadata": {"labels": {"a": "b"}}});
    let (_, patched) = server.call(Method::PATCH, &path, Some(patch)).await;
    server.call(Method::DELETE, &path, None).await;
    let query = format!("{INSTANCES}?watch=1&timeoutSeconds=1&resourceVersion={since}");
    let lines = watch(&server, &query).await;
    assert_eq!(told(&lines), ["MODIFIED odd", "DELETED odd"]);
    assert_eq!(lines[0]["object"], patched);
    let mut gone = patched;
    gone["metadata"]["resourceVersion"] = json!(server.store.revision().to_string());
    assert_eq!(lines[1]["object"], gone);
}

#[tokio::test]
async fn initial_events_come_as_asked() {
    let server = support::start();
    server.call(Method::POST, INSTANCES, Some(instance("a"))).await;
    let since = server.store.revision();
    server.call(Method::POST, INSTANCES, Some(instance("b"))).await;
    let check = async |query: &str, expect: &[&str]| {
        let path = format!("{INSTANCES}?watch=1&timeoutSeconds=1&{query}");
        let lines = watch(&server, &path).await;
        assert_eq!(told(&lines), expect, "{query}");
        lines
    };
    check("", &["ADDED a", "ADDED b"]).await;
    check("resourceVersion=0", &["ADDED a", "ADDED b"]).await;
    check(&format!("resourceVersion={since}"), &["ADDED b"]).await;
    check("sendInitialEvents=false&resourceVersionMatch=NotOlderThan", &[]).await;
    let streamed = "sendInitialEvents=true&resourceVersionMatch=NotOlderThan";
    check(streamed, &["ADDED a", "ADDED b"]).await;
    let marked = check(
        &format!("{streamed}&allowWatchBookmarks=true"),
        &["ADDED a", "ADDED b", "BOOKMARK -", "BOOKMARK -"],
    )
    .await;
    let mark = &marked[2]["object"]["metadata"];
    assert_eq!(mark["annotations"]["k8s.io/initial-events-end"], "true");
    assert_eq!(mark["resourceVersion"], server.store.revision().to_string());
    assert_eq!(marked[3]["object"]["metadata"].get("annotations"), None);
    // The position is a lower bound here, so there is more than happened after it.
    let bounded = format!("{streamed}&resourceVersion={since}");
    check(&bounded, &["ADDED a", "ADDED b"]).await;
    for (bad, code) in [
        ("sendInitialEvents=true", 422),
        ("sendInitialEvents=true&resourceVersionMatch=Exact", 422),
        ("resourceVersionMatch=NotOlderThan", 422),
        (format!("{streamed}&resourceVersion=999").as_str(), 504),
    ] {
        assert_eq!(server.get(&format!("{INSTANCES}?watch=True&{bad}")).await.0.as_u16(), code);
    }
}

#[tokio::test]
async fn objects_come_and_go_by_the_selector() {
    let server = support::start();
    server.call(Method::POST, SHARDS, Some(shard("a", "m1", 0))).await;
    let since = server.store.revision();
    let label = |value: Value| json!({"metadata": {"labels": {"team": value}}});
    let a = format!("{SHARDS}/a");
    for value in [json!("x"), json!("x2"), json!("x"), Value::Null] {
        server.call(Method::PATCH, &a, Some(label(value))).await;
    }
    server.call(Method::DELETE, &a, None).await;
    let path =
        format!("{SHARDS}?watch=1&timeoutSeconds=1&labelSelector=team%3Dx&resourceVersion={since}");
    let lines = watch(&server, &path).await;
    assert_eq!(told(&lines), ["ADDED a", "DELETED a", "ADDED a", "DELETED a"]);
}

fn gauge(server: &Server, name: &str) -> f64 {
    let families = server.registry.gather();
    let family = families.iter().find(|family| family.name() == name);
    family.map_or(0.0, |family| family.get_metric()[0].get_gauge().get_value())
}

/// A watcher that does not read costs nothing: the server keeps no events for it, and tells it in
/// the end that it has missed some.
#[tokio::test]
async fn a_watcher_that_does_not_read_is_cut_off() {
    const HISTORY: usize = 64;
    let limits = HistoryLimits { events: HISTORY, ..HistoryLimits::DEFAULT };
    let server = support::start_on(Store::memory_with(limits));
    server.store.register_metrics(&server.registry).unwrap();
    server.call(Method::POST, INSTANCES, Some(instance("a"))).await;
    let open = async |since: u64| {
        let path = format!("{INSTANCES}?watch=1&resourceVersion={since}");
        let request = Request::get(path).body(Body::empty()).unwrap();
        let response = server.router.clone().oneshot(request).await.unwrap();
        assert_eq!(response.status(), StatusCode::OK);
        response.into_body().into_data_stream()
    };
    let since = server.store.revision();
    let (slow, mut quick) = (open(since).await, open(since).await);
    let mut seen = 0;
    for n in 0..10 * HISTORY {
        let patch = json!({"metadata": {"annotations": {"n": format!("{n:04}")}}});
        let path = format!("{INSTANCES}/a");
        assert_eq!(server.call(Method::PATCH, &path, Some(patch)).await.0, StatusCode::OK);
        let told = quick.next().await.unwrap().unwrap();
        seen += told.iter().filter(|byte| **byte == b'\n').count();
    }
    assert_eq!(seen, 10 * HISTORY, "who reads misses nothing");
    assert!(gauge(&server, "exo_store_history_events") <= HISTORY as f64);
    let last = lines(slow).await;
    assert_eq!(told(&last), ["ERROR -"]);
    let status = &last[0]["object"];
    assert_eq!((&status["code"], &status["reason"]), (&json!(410), &json!("Expired")));
    drop(quick);
    assert_eq!(gauge(&server, "apiserver_watches"), 0.0);
}

fn limited(limits: Limits) -> Router {
    let registry = prometheus::Registry::new();
    let server =
        ApiServer::with_limits(Store::memory(), &exo_crds::all(), &registry, limits).unwrap();
    in_process(app(server), Identity { name: "test".into(), groups: Vec::new() })
}

/// As whole objects, tables and metadata; with and without a selector, which has each object read.
#[tokio::test]
async fn long_lists_go_out_bit_by_bit() {
    let router = limited(Limits::default());
    let long = "x".repeat(1_000);
    for n in 0..200 {
        let mut shard = shard(&format!("s{n:03}"), "mac-1", 0);
        shard["metadata"]["annotations"] = json!({"note": long});
        let request = Request::builder().method(Method::POST).uri(SHARDS);
        let request = request.body(Body::from(shard.to_string())).unwrap();
        assert_eq!(router.clone().oneshot(request).await.unwrap().status(), StatusCode::CREATED);
    }
    let as_kind = |kind: &str| format!("application/json;as={kind};v=v1;g=meta.k8s.io");
    let forms = [
        ("application/json".to_owned(), "ShardList", "/items"),
        (as_kind("Table"), "Table", "/rows"),
        (as_kind("PartialObjectMetadataList"), "PartialObjectMetadataList", "/items"),
    ];
    for (accept, kind, items) in &forms {
        for query in ["includeObject=Object", "includeObject=Object&labelSelector=exo.dev/instance"]
        {
            let request = Request::builder().uri(format!("{SHARDS}?{query}"));
            let request = request.header("accept", accept).body(Body::empty()).unwrap();
            let body = router.clone().oneshot(request).await.unwrap().into_body();
            let (mut body, mut text, mut parts) = (body.into_data_stream(), Vec::new(), 0);
            while let Some(part) = body.next().await {
                let part = part.unwrap();
                assert!((1..100_000).contains(&part.len()), "{}", part.len());
                parts += 1;
                text.extend_from_slice(&part);
            }
            assert!(parts > 3, "{parts}");
            let list: Value = serde_json::from_slice(&text).unwrap();
            assert_eq!(list["kind"], *kind);
            let items = list.pointer(items).unwrap().as_array().unwrap();
            let name = |item: &Value| {
                let object = item.get("object").unwrap_or(item);
                object["metadata"]["name"].as_str().unwrap().to_owned()
            };
            let wanted: Vec<String> = (0..200).map(|n| format!("s{n:03}")).collect();
            assert_eq!(items.iter().map(name).collect::<Vec<_>>(), wanted);
            let version = list["metadata"]["resourceVersion"].as_str().unwrap();
            assert!(version.parse::<u64>().unwrap() >= 200, "{version}");
        }
    }
}

#[tokio::test]
async fn a_long_list_holds_its_place_until_it_is_read() {
    let registry = prometheus::Registry::new();
    let limits = Limits { in_flight: 1, ..Limits::default() };
    let server =
        ApiServer::with_limits(Store::memory(), &exo_crds::all(), &registry, limits).unwrap();
    let router = in_process(app(server), Identity { name: "test".into(), groups: Vec::new() });
    let send = async |method: Method, body: Body| {
        let request = Request::builder().method(method).uri(NODES).body(body).unwrap();
        router.clone().oneshot(request).await.unwrap()
    };
    for n in 0..4 {
        let mut node = node(&format!("n{n}"));
        node["metadata"]["annotations"] = json!({"note": "x".repeat(50_000)});
        let made = send(Method::POST, Body::from(node.to_string())).await;
        assert_eq!(made.status(), StatusCode::CREATED);
    }
    let told = |series: &str, value: u32| {
        let text = TextEncoder::new().encode_to_string(&registry.gather()).unwrap();
        text.contains(&format!("\n{series} {value}\n"))
    };
    let in_flight = "apiserver_current_inflight_requests";
    let labels = "{code=\"200\",resource=\"nodes\",verb=\"LIST\"}";
    let answered = format!("apiserver_request_duration_seconds_count{labels}");
    assert!(told(in_flight, 0));
    for (lists, reads_all) in [(1, true), (2, false)] {
        let list = send(Method::GET, Body::empty()).await;
        assert_eq!(list.status(), StatusCode::OK);
        let mut body = list.into_body().into_data_stream();
        body.next().await.unwrap().unwrap();
        assert!(told(in_flight, 1) && !told(&answered, lists));
        let refused = send(Method::GET, Body::empty()).await;
        assert_eq!(refused.status(), StatusCode::TOO_MANY_REQUESTS);
        if reads_all {
            while let Some(part) = body.next().await {
                part.unwrap();
            }
        }
        drop(body);
        assert!(told(in_flight, 0) && told(&answered, lists));
    }
}

#[tokio::test]
async fn lists_that_are_too_large_come_in_parts() {
    let router = limited(Limits { list_bytes: 2_000, ..Limits::default() });
    let call = async |method: Method, path: String, body: Option<Value>| {
        let body = body.map_or_else(Body::empty, |body| Body::from(body.to_string()));
        let request = Request::builder().method(method).uri(path).body(body).unwrap();
        let response = router.clone().oneshot(request).await.unwrap();
        let code = response.status();
        let bytes = axum::body::to_bytes(response.into_body(), usize::MAX).await.unwrap();
        (code.as_u16(), serde_json::from_slice::<Value>(&bytes).unwrap())
    };
    for n in 0..20 {
        let made = call(Method::POST, NODES.into(), Some(node(&format!("n{n:02}")))).await;
        assert_eq!(made.0, 201, "{}", made.1);
    }
    let (code, refusal) = call(Method::GET, NODES.into(), None).await;
    assert_eq!((code, &refusal["reason"]), (413, &json!("RequestEntityTooLarge")));
    let mut names = Vec::new();
    let (mut token, mut pages) = (String::new(), 0);
    loop {
        let path = format!("{NODES}?limit=1000&continue={token}");
        let (code, page) = call(Method::GET, path, None).await;
        assert_eq!(code, 200, "{page}");
        let items = page["items"].as_array().unwrap();
        names.extend(items.iter().map(|n| n["metadata"]["name"].as_str().unwrap().to_owned()));
        pages += 1;
        match page["metadata"]["continue"].as_str() {
            Some(next) => token = next.to_owned(),
            None => break,
        }
    }
    assert!(pages > 2, "{pages}");
    assert_eq!(names, (0..20).map(|n| format!("n{n:02}")).collect::<Vec<_>>());
    // A few of them fit.
    let few = format!("{NODES}?fieldSelector=metadata.name%3Dn07");
    assert_eq!(call(Method::GET, few, None).await.0, 200);
}

#[tokio::test]
async fn a_limit_that_ends_with_a_page_of_the_store_goes_on() {
    // The server reads so many at a time.
    const PAGE: usize = 1000;
    let router = limited(Limits::default());
    let call = async |method: Method, path: String, body: Body| {
        let request = Request::builder().method(method).uri(path).body(body).unwrap();
        let response = router.clone().oneshot(request).await.unwrap();
        let code = response.status().as_u16();
        let bytes = axum::body::to_bytes(response.into_body(), usize::MAX).await.unwrap();
        let answer = serde_json::from_slice::<Value>(&bytes).unwrap();
        assert!(code < 300, "{answer}");
        answer
    };
    for n in 0..=PAGE {
        let body = Body::from(node(&format!("n{n:04}")).to_string());
        call(Method::POST, NODES.into(), body).await;
    }
    let first = call(Method::GET, format!("{NODES}?limit={PAGE}"), Body::empty()).await;
    assert_eq!(first["items"].as_array().unwrap().len(), PAGE);
    let token = first["metadata"]["continue"].as_str().unwrap();
    let path = format!("{NODES}?limit={PAGE}&continue={token}");
    let rest = call(Method::GET, path, Body::empty()).await;
    assert_eq!(rest["items"][0]["metadata"]["name"], "n1000");
    assert_eq!(rest["items"].as_array().unwrap().len(), 1);
}

#[tokio::test]
async fn metrics_are_well_formed() {
    let server = support::start();
    server.store.register_metrics(&server.registry).unwrap();
    server.call(Method::POST, INSTANCES, Some(instance("a"))).await;
    watch(&server, &format!("{INSTANCES}?watch=1&timeoutSeconds=1")).await;
    server.get(&format!("{INSTANCES}/absent")).await;
    let text = TextEncoder::new().encode_to_string(&server.registry.gather()).unwrap();
    let types = metrics::check(&text);
    for wanted in [
        "apiserver_request_duration_seconds",
        "apiserver_current_inflight_requests",
        "apiserver_watches",
        "apiserver_watch_events_total",
        "exo_store_objects",
        "exo_store_bytes",
        "exo_raft_term",
        "exo_raft_is_leader",
        "exo_raft_has_leader",
        "exo_raft_log_index",
        "exo_raft_applied_index",
        "exo_raft_apply_lag_entries",
        "exo_raft_voters_changing",
    ] {
        assert!(types.contains_key(wanted), "{wanted} in {text}");
    }
    assert!(text.contains("apiserver_watch_events_total{resource=\"inferenceinstances\"} 1\n"));
}

#[tokio::test]
async fn refusals_are_counted() {
    let registry = prometheus::Registry::new();
    let limits = Limits { in_flight: 0, watches_per_client: 0, ..Limits::default() };
    let server =
        ApiServer::with_limits(Store::memory(), &exo_crds::all(), &registry, limits).unwrap();
    let router = in_process(app(server), Identity { name: "test".into(), groups: Vec::new() });
    for path in [INSTANCES.to_owned(), format!("{INSTANCES}?watch=1")] {
        let request = Request::get(path).body(Body::empty()).unwrap();
        let response = router.clone().oneshot(request).await.unwrap();
        assert_eq!(response.status(), StatusCode::TOO_MANY_REQUESTS);
        assert_eq!(response.headers()["retry-after"], "1");
    }
    let text = TextEncoder::new().encode_to_string(&registry.gather()).unwrap();
    for limit in ["in_flight", "watches"] {
        let line = format!("apiserver_rejected_requests_total{{limit=\"{limit}\"}} 1\n");
        assert!(text.contains(&line), "{text}");
    }
}
