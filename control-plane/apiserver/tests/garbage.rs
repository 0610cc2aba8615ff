//! What is owned goes with its owner.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod support;

use std::time::Duration;

use axum::http::Method;
use exo_apiserver::collect_garbage;
use serde_json::{Value, json};
use support::{INSTANCES, SHARDS, Server, instance, shard};

fn owned(name: &str, owner: &Value) -> Value {
    let mut shard = shard(name, "m1", 0);
    shard["metadata"]["ownerReferences"] = json!([{
        "apiVersion": "exo.dev/v1alpha1", "kind": "InferenceInstance",
        "name": owner["metadata"]["name"], "uid": owner["metadata"]["uid"]
    }]);
    shard
}

async fn shards(server: &Server) -> Vec<String> {
    let (_, list) = server.get(SHARDS).await;
    let items = list["items"].as_array().unwrap();
    items.iter().map(|s| s["metadata"]["name"].as_str().unwrap().to_owned()).collect()
}

/// Waits until the shards are these.
async fn shards_become(server: &Server, expect: &[&str]) {
    let mut watch = server.store.watch("/registry/", 0);
    let until = async {
        while shards(server).await != expect {
            watch.next().await.unwrap();
        }
    };
    let done = tokio::time::timeout(Duration::from_secs(10), until).await;
    assert!(done.is_ok(), "{:?} stay; expected {expect:?}", shards(server).await);
}

#[tokio::test]
async fn dependents_go_with_their_owner_even_if_it_left_before() {
    let server = support::start();
    let (_, early) = server.call(Method::POST, INSTANCES, Some(instance("early"))).await;
    server.call(Method::POST, SHARDS, Some(owned("early-0", &early))).await;
    server.call(Method::DELETE, &format!("{INSTANCES}/early"), None).await;
    let (_, owner) = server.call(Method::POST, INSTANCES, Some(instance("a"))).await;
    server.call(Method::POST, SHARDS, Some(owned("a-0", &owner))).await;
    let mut held = owned("a-1", &owner);
    held["metadata"]["finalizers"] = json!(["exo.dev/runner"]);
    server.call(Method::POST, SHARDS, Some(held)).await;
    server.call(Method::POST, SHARDS, Some(shard("free", "m1", 0))).await;

    let collector = tokio::spawn(collect_garbage(server.server.clone(), std::future::pending()));
    shards_become(&server, &["a-0", "a-1", "free"]).await;

    server.call(Method::DELETE, &format!("{INSTANCES}/a"), None).await;
    shards_become(&server, &["a-1", "free"]).await;
    let (_, held) = server.get(&format!("{SHARDS}/a-1")).await;
    assert!(held["metadata"]["deletionTimestamp"].is_string(), "its finalizer holds it");
    let free = json!({"metadata": {"finalizers": null}});
    server.call(Method::PATCH, &format!("{SHARDS}/a-1"), Some(free)).await;
    shards_become(&server, &["free"]).await;

    // An object whose owner is gone already doesn't stay.
    server.call(Method::POST, SHARDS, Some(owned("late", &owner))).await;
    shards_become(&server, &["free"]).await;
    server.store.shutdown().await;
    collector.await.unwrap();
}
