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

    // Of kinds that are not served, nobody here knows what exists.
    let mut foreign = shard("foreign", "m1", 0);
    foreign["metadata"]["ownerReferences"] =
        json!([{"apiVersion": "apps/v1", "kind": "Deployment", "name": "d", "uid": "d"}]);
    server.call(Method::POST, SHARDS, Some(foreign)).await;
    // An object whose owner is gone already doesn't stay.
    server.call(Method::POST, SHARDS, Some(owned("late", &owner))).await;
    shards_become(&server, &["foreign", "free"]).await;
    server.store.shutdown().await;
    collector.await.unwrap();
}

/// Why a namespace doesn't go is said where its users look.
#[tokio::test]
async fn namespaces_say_what_holds_them() {
    let server = support::start();
    let namespace = json!({
        "apiVersion": "v1", "kind": "Namespace",
        "metadata": {"name": "team", "finalizers": ["example.com/own"]},
    });
    server.call(Method::POST, "/api/v1/namespaces", Some(namespace)).await;
    let shards = SHARDS.replace("default", "team");
    for (name, finalizers) in [("free", json!([])), ("a", json!(["example.com/x"]))] {
        let mut shard = shard(name, "m1", 0);
        shard["metadata"]["finalizers"] = finalizers;
        server.call(Method::POST, &shards, Some(shard)).await;
    }
    let mut b = shard("b", "m1", 1);
    b["metadata"]["finalizers"] = json!(["example.com/x", "example.com/y"]);
    server.call(Method::POST, &shards, Some(b)).await;
    let collector = tokio::spawn(collect_garbage(server.server.clone(), std::future::pending()));
    let team = "/api/v1/namespaces/team";
    server.call(Method::DELETE, team, None).await;
    // Type, status, reason and message of each condition, once they are so.
    let told = async |expect: [&str; 2]| -> Value {
        let mut watch = server.store.watch("/registry/core/namespaces/", 0);
        let until = async {
            loop {
                let (_, team) = server.get(team).await;
                let conditions = team["status"]["conditions"].as_array().cloned();
                let text = |c: &Value| {
                    let word = |field: &str| c[field].as_str().unwrap().to_owned();
                    ["type", "status", "reason", "message"].map(word).join(" | ")
                };
                if conditions.iter().flatten().map(text).eq(expect.map(str::to_owned)) {
                    return team;
                }
                watch.next().await.unwrap();
            }
        };
        let told = tokio::time::timeout(Duration::from_secs(10), until).await;
        told.unwrap_or_else(|_| panic!("it doesn't say {expect:?}"))
    };
    let first = told([
        "NamespaceContentRemaining | True | SomeResourcesRemain | Still there: shards.exo.dev (2)",
        "NamespaceFinalizersRemaining | True | SomeFinalizersRemain | Objects stay until who set \
         these finalizers removes them: example.com/x (2), example.com/y (1)",
    ])
    .await;
    assert_eq!(first["status"]["phase"], "Terminating");
    let release = json!({"metadata": {"finalizers": null}});
    server.call(Method::PATCH, &format!("{shards}/b"), Some(release.clone())).await;
    let second = told([
        "NamespaceContentRemaining | True | SomeResourcesRemain | Still there: shards.exo.dev (1)",
        "NamespaceFinalizersRemaining | True | SomeFinalizersRemain | Objects stay until who set \
         these finalizers removes them: example.com/x (1)",
    ])
    .await;
    let since = "/status/conditions/0/lastTransitionTime";
    assert_eq!(first.pointer(since), second.pointer(since), "it holds on");
    server.call(Method::PATCH, &format!("{shards}/a"), Some(release.clone())).await;
    told([
        "NamespaceContentRemaining | False | ContentRemoved | Nothing of the content is left",
        "NamespaceFinalizersRemaining | False | ContentHasNoFinalizers | No finalizer keeps any of \
         the content",
    ])
    .await;
    // Its own finalizer is the last to hold it; nothing more is written meanwhile.
    let settled = server.store.revision();
    server.call(Method::POST, SHARDS, Some(shard("other", "m1", 0))).await;
    shards_become(&server, &["other"]).await;
    assert_eq!(server.store.revision(), settled + 1);
    server.call(Method::PATCH, team, Some(release)).await;
    assert_eq!(server.get(team).await.0, 404);
    server.store.shutdown().await;
    collector.await.unwrap();
}
