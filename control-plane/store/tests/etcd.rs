//! What several nodes see of one etcd.
#![cfg(feature = "etcd")]
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod support;

use exo_store::{ListQuery, Txn};
use support::etcd::Server;
use tokio::time::timeout;

#[tokio::test(flavor = "multi_thread")]
async fn nodes_share_one_store_and_one_of_them_leads() {
    let server = Server::start();
    let first = server.open().await;
    assert!(first.is_leader());
    for i in 0..1_200 {
        first.txn(Txn::create(format!("/{i:04}"), "v")).await.unwrap();
    }
    // More than one page of what was there before; then what is new.
    let second = server.open().await;
    assert!(!second.is_leader());
    let listing = second.list(&ListQuery::default()).await.unwrap();
    assert_eq!(listing.entries.len(), 1_200);
    assert_eq!(listing.entries, first.list(&ListQuery::default()).await.unwrap().entries);
    let mut watch = second.watch("/", listing.revision);
    first.txn(Txn::create("/new", "v")).await.unwrap();
    let batch = timeout(support::LIMIT, watch.next()).await.unwrap().unwrap();
    assert_eq!(&*batch.events[0].key, "/new");
    assert_eq!(second.get("/new").await.unwrap(), first.get("/new").await.unwrap());

    // The lease of a node that is gone runs out.
    let mut leads = second.leads();
    first.shutdown().await;
    drop(first);
    timeout(support::LIMIT, leads.wait_for(|leads| *leads)).await.unwrap().unwrap();
}
