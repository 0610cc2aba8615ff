//! A disk without room: writes are refused and say why, reads go on, and it ends with the lack.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::fs;

use exo_store::{ListQuery, RaftConfig, Store, StoreError, Txn};
use exo_test_support::{Volume, fill};

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_refuses_writes_and_recovers() {
    let Some(volume) = Volume::mount("size=200m") else {
        return eprintln!("nothing can be mounted here: this test did not run");
    };
    let config = || RaftConfig {
        dir: volume.path().join("store"),
        node_id: 1,
        name: "a".into(),
        address: "127.0.0.1:1".into(),
    };
    let store = Store::raft(config()).await.unwrap();
    store.txn(Txn::create("/a", "1")).await.unwrap();
    let mut watch = store.watch("/", 0);
    let ballast = volume.path().join("ballast");
    for _ in 0..2 {
        fill(&ballast, 100 << 20);
        let error = store.txn(Txn::create("/b", "1")).await.unwrap_err();
        assert!(matches!(error, StoreError::Full(_)), "{error}");
        assert!(error.to_string().contains("disk of node a is full: "), "{error}");
        assert!(error.to_string().contains("MiB are free at"), "{error}");
        assert_eq!(store.is_full(), Some(error.to_string()));
        assert!(store.get("/a").await.unwrap().is_some());
        assert!(store.get("/b").await.unwrap().is_none());
        assert_eq!(store.list(&ListQuery::default()).await.unwrap().entries.len(), 1);
        fs::remove_file(&ballast).unwrap();
    }
    assert_eq!(store.is_full(), None);
    store.txn(Txn::create("/b", "1")).await.unwrap();
    assert_eq!(watch.next().await.unwrap().events.len(), 2);
    store.shutdown().await;
    drop((store, watch));

    // Not one byte is left when it opens: that is said, and nothing is lost.
    let room = 200 << 20;
    let mut size = room;
    while size > 0 && fs::write(&ballast, vec![1; size]).is_err() {
        size -= 1 << 20;
    }
    match Store::raft(config()).await {
        Ok(store) => store.shutdown().await,
        Err(error) => assert!(error.to_string().contains("store"), "{error}"),
    }
    fs::remove_file(&ballast).unwrap();
    let store = Store::raft(config()).await.unwrap();
    assert!(store.get("/b").await.unwrap().is_some());
    store.shutdown().await;
}
