//! What several nodes see of one etcd.
#![cfg(feature = "etcd")]
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod support;

use etcd_client::Client;
use exo_store::{EtcdConfig, ListQuery, Txn};
use support::etcd::Server;
use tokio::time::timeout;

#[tokio::test(flavor = "multi_thread")]
async fn nodes_share_one_store_and_one_of_them_leads() {
    if !support::etcd::is_there() {
        return;
    }
    let server = Server::start();
    let first = server.open().await;
    timeout(support::LIMIT, first.leads().wait_for(|leads| *leads)).await.unwrap().unwrap();
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

#[tokio::test(flavor = "multi_thread")]
async fn etcd_is_called_by_tls_with_a_certificate() {
    if !support::etcd::is_there() {
        return;
    }
    let server = Server::start_with_tls();
    let store = server.open().await;
    store.txn(Txn::create("/a", "v")).await.unwrap();
    assert!(store.get("/a").await.unwrap().is_some());
    store.shutdown().await;

    let EtcdConfig { tls, .. } = server.config();
    let mut without = tls.unwrap();
    assert!(!format!("{without:?}").contains("PRIVATE"));
    without.identity = None;
    let config = EtcdConfig { tls: Some(without), ..server.config() };
    assert!(server.try_open(config).await.is_err(), "a certificate is asked for");
    let other = Server::start_with_tls();
    let config = EtcdConfig { tls: other.config().tls, ..server.config() };
    assert!(server.try_open(config).await.is_err(), "another authority is not believed");
}

#[tokio::test(flavor = "multi_thread")]
async fn etcd_is_called_with_a_password() {
    if !support::etcd::is_there() {
        return;
    }
    let server = Server::start();
    server.open().await.shutdown().await;
    let mut admin = Client::connect(&server.config().endpoints, None).await.unwrap();
    admin.user_add("root", "secret", None).await.unwrap();
    admin.role_add("root").await.unwrap();
    admin.user_grant_role("root", "root").await.unwrap();
    admin.auth_enable().await.unwrap();

    let with = |password: &str| EtcdConfig {
        user: Some(("root".to_owned(), password.to_owned())),
        ..server.config()
    };
    let store = server.try_open(with("secret")).await.unwrap();
    store.txn(Txn::create("/a", "v")).await.unwrap();
    assert!(store.get("/a").await.unwrap().is_some());
    store.shutdown().await;
    assert!(server.try_open(with("guess")).await.is_err());
    assert!(server.try_open(server.config()).await.is_err());
}
