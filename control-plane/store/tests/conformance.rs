//! What every backend does the same way.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod support;

use std::time::Duration;

use exo_store::{
    Compare, ListQuery, Op, RaftConfig, ReadError, Store, StoreError, Txn, TxnOutcome,
};
use support::Cluster;
use tempfile::TempDir;
use tokio::time::timeout;

/// Runs a test body over each backend.
async fn each<F: AsyncFn(Store)>(body: F) {
    body(Store::memory()).await;
    let dir = TempDir::new().unwrap();
    let store = Store::raft(RaftConfig {
        dir: dir.path().to_owned(),
        node_id: 7,
        name: "n7".into(),
        address: "127.0.0.1:8443".into(),
    })
    .await
    .unwrap();
    body(store.clone()).await;
    store.shutdown().await;
    let cluster = Cluster::start(3).await;
    body(cluster.store(cluster.leader().await)).await;
}

/// The same, and over a node that doesn't lead.
async fn everywhere<F: AsyncFn(Store)>(body: F) {
    each(&body).await;
    let cluster = Cluster::start(3).await;
    let leader = cluster.leader().await;
    body(cluster.store(leader % 3 + 1)).await;
    cluster.shutdown().await;
    #[cfg(feature = "etcd")]
    if support::etcd::is_there() {
        let server = support::etcd::Server::start();
        let store = server.open().await;
        // Its election is a revision too.
        timeout(support::LIMIT, store.leads().wait_for(|leads| *leads)).await.unwrap().unwrap();
        store.current_revision().await.unwrap();
        body(store.clone()).await;
        store.shutdown().await;
    }
}

fn committed(outcome: TxnOutcome) -> u64 {
    match outcome {
        TxnOutcome::Committed { revision } => revision,
        TxnOutcome::Conflict { current } => panic!("conflict with {current:?}"),
    }
}

async fn create(store: &Store, key: &str, value: &str) -> u64 {
    committed(store.txn(Txn::create(key, value)).await.unwrap())
}

/// Counts revisions from where the store begins; etcd has used some by then.
fn after(store: &Store) -> impl Fn(u64) -> u64 + use<> {
    let begin = store.revision();
    move |revision| begin + revision
}

fn keys(listing: &exo_store::Listing) -> Vec<&str> {
    listing.entries.iter().map(|e| &*e.key).collect()
}

fn below(prefix: &str) -> ListQuery {
    ListQuery { prefix: prefix.into(), ..ListQuery::default() }
}

#[tokio::test(flavor = "multi_thread")]
async fn writes_compare_and_set() {
    everywhere(async |store| {
        let at = after(&store);
        assert_eq!(create(&store, "/a", "1").await, at(1));
        let conflict = store.txn(Txn::create("/a", "2")).await.unwrap();
        let TxnOutcome::Conflict { current } = conflict else { panic!("{conflict:?}") };
        let entry = current[0].clone().unwrap();
        assert_eq!((&*entry.value, entry.create_revision, entry.mod_revision), ("1", at(1), at(1)));

        let changed = store.txn(Txn::replace("/a", at(1), "2")).await.unwrap();
        assert_eq!(committed(changed), at(2));
        let stale = store.txn(Txn::delete("/a", at(1))).await.unwrap();
        assert!(matches!(stale, TxnOutcome::Conflict { .. }));
        assert_eq!(committed(store.txn(Txn::delete("/a", at(2))).await.unwrap()), at(3));
        assert_eq!(store.get("/a").await.unwrap(), None);
        assert_eq!(create(&store, "/a", "3").await, at(4));
        assert_eq!(store.get("/a").await.unwrap().unwrap().create_revision, at(4));
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_transaction_is_one_revision() {
    everywhere(async |store| {
        let at = after(&store);
        let put = |key: &str| Op::Put { key: key.into(), value: "v".into() };
        let txn = Txn { compare: vec![], ops: vec![put("/b"), put("/a")] };
        assert_eq!(committed(store.txn(txn).await.unwrap()), at(1));
        let nothing = Txn {
            compare: vec![Compare { key: "/a".into(), mod_revision: at(1) }],
            ops: vec![Op::Delete { key: "/c".into() }],
        };
        assert_eq!(committed(store.txn(nothing).await.unwrap()), at(1), "no change, no revision");
        let twice = Txn { compare: vec![], ops: vec![put("/a"), Op::Delete { key: "/a".into() }] };
        assert!(matches!(store.txn(twice).await, Err(StoreError::Invalid(_))));
        let batch = store.watch("/", at(0)).next().await.unwrap();
        let changed: Vec<_> = batch.events.iter().map(|e| (e.revision, &*e.key)).collect();
        assert_eq!(changed, [(at(1), "/b"), (at(1), "/a")]);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn lists_show_one_revision() {
    everywhere(async |store| {
        let at = after(&store);
        for key in ["/x/a", "/x/b", "/x/c", "/y/a"] {
            create(&store, key, "1").await;
        }
        let first = store.list(&ListQuery { limit: 2, ..below("/x/") }).await.unwrap();
        assert_eq!((keys(&first), first.revision, first.more), (vec!["/x/a", "/x/b"], at(4), true));
        store.txn(Txn::delete("/x/c", at(3))).await.unwrap();
        create(&store, "/x/d", "1").await;
        let rest = store
            .list(&ListQuery {
                after: Some("/x/b".into()),
                revision: Some(first.revision),
                ..below("/x/")
            })
            .await
            .unwrap();
        assert_eq!((keys(&rest), rest.revision, rest.more), (vec!["/x/c"], at(4), false));
        let now = store.list(&below("/x/")).await.unwrap();
        assert_eq!((keys(&now), now.revision), (vec!["/x/a", "/x/b", "/x/d"], at(6)));
        let future = ListQuery { revision: Some(at(99)), ..below("/") };
        assert!(matches!(
            store.list(&future).await,
            Err(StoreError::Read(ReadError::Future { .. }))
        ));
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn watches_tell_all_changes_in_order() {
    everywhere(async |store| {
        let at = after(&store);
        create(&store, "/x/a", "1").await;
        let mut watch = store.watch("/x/", at(0));
        let batch = watch.next().await.unwrap();
        assert_eq!(batch.events.len(), 1);
        assert_eq!(batch.events[0].previous, None);

        let quiet = timeout(Duration::from_millis(20), watch.next()).await;
        assert!(quiet.is_err(), "nothing to tell");
        create(&store, "/y/a", "1").await;
        store.txn(Txn::replace("/x/a", at(1), "2")).await.unwrap();
        store.txn(Txn::delete("/x/a", at(3))).await.unwrap();
        let mut told = Vec::new();
        while told.len() < 2 {
            for event in watch.next().await.unwrap().events {
                let value = |e: &Option<exo_store::Entry>| e.as_ref().map(|e| e.value.to_string());
                told.push((event.revision, value(&event.previous), value(&event.current)));
            }
        }
        assert_eq!(
            told,
            [
                (at(3), Some("1".to_owned()), Some("2".to_owned())),
                (at(4), Some("2".to_owned()), None)
            ]
        );
        assert_eq!(watch.revision(), at(4));
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn compaction_ends_what_asks_for_the_past() {
    everywhere(async |store| {
        let at = after(&store);
        create(&store, "/a", "1").await;
        for revision in 1..5 {
            store.txn(Txn::replace("/a", at(revision), "v")).await.unwrap();
        }
        let mut slow = store.watch("/", at(1));
        store.compact(at(3)).await.unwrap();
        let Err(StoreError::Read(error)) = slow.next().await else { panic!("a gap is hidden") };
        assert_eq!(error, ReadError::Compacted { requested: at(1), compacted: at(3) });
        let old = ListQuery { revision: Some(at(2)), ..below("/") };
        assert!(matches!(
            store.list(&old).await,
            Err(StoreError::Read(ReadError::Compacted { .. }))
        ));
        let kept = ListQuery { revision: Some(at(3)), ..below("/") };
        assert_eq!(store.list(&kept).await.unwrap().entries[0].mod_revision, at(3));
        let batch = store.watch("/", at(3)).next().await.unwrap();
        assert_eq!(batch.events[0].previous.as_ref().unwrap().mod_revision, at(3));
        assert!(matches!(store.compact(at(99)).await, Err(StoreError::Invalid(_))));
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn concurrent_writers_each_get_their_revision() {
    everywhere(async |store| {
        let at = after(&store);
        let writes = (0..200).map(|i| {
            let store = store.clone();
            tokio::spawn(async move { create(&store, &format!("/{i:03}"), "v").await })
        });
        let mut revisions = Vec::new();
        for write in writes.collect::<Vec<_>>() {
            revisions.push(write.await.unwrap());
        }
        revisions.sort_unstable();
        assert_eq!(revisions, (at(1)..=at(200)).collect::<Vec<_>>());
        assert_eq!(store.list(&below("/")).await.unwrap().entries.len(), 200);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_that_is_shut_down_refuses() {
    each(async |store| {
        assert!(store.is_leader());
        let mut watch = store.watch("/", 0);
        let waiting = tokio::spawn(async move { watch.next().await });
        store.shutdown().await;
        assert!(matches!(waiting.await.unwrap(), Err(StoreError::Closed)));
        assert!(matches!(store.txn(Txn::create("/a", "1")).await, Err(StoreError::Closed)));
        assert!(matches!(store.get("/a").await, Err(StoreError::Closed)));
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn metrics_tell_size_and_leadership() {
    each(async |store| {
        let registry = prometheus::Registry::new();
        store.register_metrics(&registry).unwrap();
        create(&store, "/a", "123").await;
        create(&store, "/b", "123").await;
        let text = prometheus::TextEncoder::new().encode_to_string(&registry.gather()).unwrap();
        for line in [
            "exo_store_revision 2",
            "exo_store_objects 2",
            "exo_store_bytes 10",
            "exo_store_history_events 2",
            "exo_raft_is_leader 1",
            "exo_raft_term 1",
        ] {
            assert!(text.lines().any(|l| l == line), "{line} in {text}");
        }
        assert!(*store.leads().borrow());
    })
    .await;
}
