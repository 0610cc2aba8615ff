//! Objects outlive the process.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod support;

use axum::http::Method;
use exo_store::{RaftConfig, Store};
use serde_json::json;
use support::{INSTANCES, instance};
use tempfile::TempDir;

#[tokio::test(flavor = "multi_thread")]
async fn objects_and_positions_outlive_a_restart() {
    let dir = TempDir::new().unwrap();
    let open = || {
        Store::raft(RaftConfig {
            dir: dir.path().to_owned(),
            node_id: 1,
            name: "a".into(),
            address: "127.0.0.1:1".into(),
        })
    };
    let server = support::start_on(open().await.unwrap());
    server.call(Method::POST, INSTANCES, Some(instance("a"))).await;
    let status = json!({"status": {"phase": "Ready"}});
    let path = format!("{INSTANCES}/a/status");
    let (_, before) = server.call(Method::PATCH, &path, Some(status)).await;
    server.store.shutdown().await;
    assert_eq!(server.get("/readyz").await.0, 503);
    assert_eq!(server.get(INSTANCES).await.0, 503);

    let server = support::start_on(open().await.unwrap());
    assert_eq!(server.get(&format!("{INSTANCES}/a")).await.1, before);
    // A client goes on where it was.
    let position = &before["metadata"]["resourceVersion"].as_str().unwrap();
    server.call(Method::POST, INSTANCES, Some(instance("b"))).await;
    let query = format!("{INSTANCES}?watch=1&timeoutSeconds=1&resourceVersion={position}");
    let (_, event) = server.get(&query).await;
    assert_eq!(
        (&event["type"], &event["object"]["metadata"]["name"]),
        (&json!("ADDED"), &json!("b"))
    );
    server.store.shutdown().await;
}
