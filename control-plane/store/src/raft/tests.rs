//! openraft's own suite, and what becomes of a store's file.

use std::{fs, path::Path};

use openraft::{
    StorageError,
    testing::{StoreBuilder, Suite},
};
use tempfile::TempDir;

use super::*;
use crate::{Store, Txn, TxnOutcome, state::ListQuery};

struct Builder;

impl StoreBuilder<TypeConfig, LogStore, StateMachine, TempDir> for Builder {
    async fn build(&self) -> Result<(TempDir, LogStore, StateMachine), StorageError<u64>> {
        let dir = TempDir::new().unwrap();
        let disk = Arc::new(Disk::open(dir.path(), 1).unwrap());
        let machine = StateMachine::load(&disk).unwrap();
        let log = LogStore::open(disk).unwrap();
        Ok((dir, log, machine))
    }
}

#[test]
fn log_and_machine_pass_openrafts_suite() {
    Suite::test_all(Builder).unwrap();
}

#[test]
fn log_entries_keep_their_form_on_disk() {
    let request =
        Request { time_ms: 5, commands: [Command::Txn(Txn::create("/a", "1"))].into(), mark: 0 };
    let entry: openraft::Entry<TypeConfig> = openraft::Entry {
        log_id: openraft::LogId::new(openraft::CommittedLeaderId::new(2, 1), 7),
        payload: openraft::EntryPayload::Normal(request),
    };
    let literal = serde_json::json!({
        "log_id": {"leader_id": {"term": 2, "node_id": 1}, "index": 7},
        "payload": {"Normal": {"time_ms": 5, "commands": [{"txn": {
            "compare": [{"key": "/a", "mod_revision": 0}],
            "ops": [{"put": {"key": "/a", "value": "1"}}]
        }}]}}
    });
    assert_eq!(serde_json::to_value(&entry).unwrap(), literal);
    let back: openraft::Entry<TypeConfig> = serde_json::from_value(literal).unwrap();
    assert_eq!(back, entry);
}

fn config(dir: &Path) -> RaftConfig {
    RaftConfig {
        dir: dir.to_owned(),
        node_id: 1,
        name: "a".into(),
        address: "127.0.0.1:8443".into(),
    }
}

async fn put(store: &Store, key: &str, value: &str) -> u64 {
    let txn = Txn {
        compare: Vec::new(),
        ops: vec![crate::Op::Put { key: key.into(), value: value.into() }],
    };
    match store.txn(txn).await.unwrap() {
        TxnOutcome::Committed { revision } => revision,
        TxnOutcome::Conflict { .. } => panic!("nothing was compared"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_continues_from_snapshot_and_log() {
    let dir = TempDir::new().unwrap();
    let before = {
        let store = Store::raft(config(dir.path())).await.unwrap();
        for i in 0..20 {
            put(&store, &format!("/k{}", i % 7), &i.to_string()).await;
        }
        store.snapshot().await.unwrap();
        let backend = RaftBackend::of(&store);
        let last = backend.metrics().last_applied.unwrap();
        backend.node.raft.trigger().purge_log(last.index).await.unwrap();
        for i in 20..25 {
            put(&store, "/late", &i.to_string()).await;
        }
        store.shutdown().await;
        store.list_local(&ListQuery::default()).unwrap()
    };
    assert_eq!(before.revision, 25);

    let store = Store::raft(config(dir.path())).await.unwrap();
    assert_eq!(store.list(&ListQuery::default()).await.unwrap(), before);
    // History is there too, from before and after the snapshot.
    let batch = store.watch("/", 0).next().await.unwrap();
    let revisions: Vec<u64> = batch.events.iter().map(|e| e.revision).collect();
    assert_eq!(revisions, (1..=25).collect::<Vec<_>>());
    assert_eq!(put(&store, "/more", "x").await, 26);
    store.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_that_is_not_ours_is_refused_by_name() {
    let dir = TempDir::new().unwrap();
    let store = Store::raft(config(dir.path())).await.unwrap();
    put(&store, "/a", &"x".repeat(100_000)).await;
    store.shutdown().await;
    drop(store);
    let file = dir.path().join("store.redb");
    let good = fs::read(&file).unwrap();
    let refusal = |node_id: u64| {
        let config = RaftConfig { node_id, ..config(dir.path()) };
        async move {
            let Err(error) = Store::raft(config).await else { panic!("opened") };
            (error.to_string(), error.is_damage())
        }
    };

    let (message, is_damage) = refusal(2).await;
    assert!(message.contains("belongs to node 1") && !is_damage, "{message}");

    {
        let database = redb::Database::open(&file).unwrap();
        let txn = database.begin_write().unwrap();
        let meta = redb::TableDefinition::<&str, &[u8]>::new("meta");
        txn.open_table(meta).unwrap().insert("format", b"9".as_slice()).unwrap();
        txn.commit().unwrap();
    }
    let (message, is_damage) = refusal(1).await;
    assert!(message.contains("store.redb has format 9") && !is_damage, "{message}");

    // A bit of the large value flips.
    let mut torn = good.clone();
    let at = torn.windows(64).position(|w| w == [b'x'; 64]).unwrap() + 5_000;
    torn[at] ^= 1;
    fs::write(&file, &torn).unwrap();
    let (message, is_damage) = refusal(1).await;
    assert!(message.contains("store.redb is damaged") && is_damage, "{message}");

    fs::write(&file, &good[..good.len() / 2]).unwrap();
    let (message, is_damage) = refusal(1).await;
    assert!(message.contains("store.redb") && is_damage, "{message}");

    fs::write(&file, b"something else, and long enough to be looked at".repeat(200)).unwrap();
    let (message, is_damage) = refusal(1).await;
    assert!(message.contains("store.redb is damaged") && is_damage, "{message}");

    fs::write(&file, &good).unwrap();
    let store = Store::raft(config(dir.path())).await.unwrap();
    assert!(store.get("/a").await.unwrap().is_some());
    store.shutdown().await;
}

/// What a killed process leaves: the files as they are, without a word of good-bye.
fn files_as_they_are(from: &Path) -> TempDir {
    let to = TempDir::new().unwrap();
    for file in ["store.redb", "store.mark"] {
        fs::copy(from.join(file), to.path().join(file)).unwrap();
    }
    to
}

#[tokio::test(flavor = "multi_thread")]
async fn a_complete_last_commit_that_is_damaged_is_no_torn_one() {
    let dir = TempDir::new().unwrap();
    let store = Store::raft(config(dir.path())).await.unwrap();
    put(&store, "/a", "1").await;
    let torn = files_as_they_are(dir.path());
    put(&store, "/b", &"y".repeat(100_000)).await;
    let killed = files_as_they_are(dir.path());

    let again = Store::raft(config(killed.path())).await.unwrap();
    assert!(again.get("/b").await.unwrap().is_some());
    again.shutdown().await;

    // The same, and a bit of the last commit flips: it was acknowledged, so it can't be passed over.
    let killed = files_as_they_are(dir.path());
    let file = killed.path().join("store.redb");
    let mut bytes = fs::read(&file).unwrap();
    let at = bytes.windows(64).position(|w| w == [b'y'; 64]).unwrap() + 5_000;
    bytes[at] ^= 1;
    fs::write(&file, &bytes).unwrap();
    let Err(error) = Store::raft(config(killed.path())).await else { panic!("opened") };
    let message = error.to_string();
    assert!(message.contains("the end of the log was written, and is gone"), "{message}");
    assert!(message.contains("remove") && message.contains("store.mark"), "{message}");
    // Who accepts the loss says so.
    fs::remove_file(killed.path().join("store.mark")).unwrap();
    let again = Store::raft(config(killed.path())).await.unwrap();
    assert!(again.get("/a").await.unwrap().is_some());
    assert!(again.get("/b").await.unwrap().is_none());
    again.shutdown().await;

    // The end of the file was written, and the process killed before the mark: nothing is wrong.
    fs::copy(torn.path().join("store.mark"), dir.path().join("store.mark")).unwrap();
    store.shutdown().await;
    drop(store);
    fs::copy(torn.path().join("store.mark"), dir.path().join("store.mark")).unwrap();
    let again = Store::raft(config(dir.path())).await.unwrap();
    assert!(again.get("/b").await.unwrap().is_some());
    again.shutdown().await;

    fs::write(dir.path().join("store.mark"), "{}\n00").unwrap();
    let Err(error) = Store::raft(config(dir.path())).await else { panic!("opened") };
    assert!(error.to_string().contains("store.mark") && error.is_damage(), "{error}");
}

/// Where Raft has stopped it is of no use to hear who else does not answer.
#[tokio::test(flavor = "multi_thread")]
async fn a_store_that_has_stopped_says_that_alone() {
    let dir = TempDir::new().unwrap();
    let store = Store::raft(config(dir.path())).await.unwrap();
    let node = Arc::clone(&RaftBackend::of(&store).node);
    // Another voter that is not there: there is no majority from now on.
    let other = BTreeMap::from([(2, MemberNode::of("b", "127.0.0.1:1"))]);
    let add = openraft::ChangeMembers::AddNodes(other);
    node.raft.change_membership(add, true).await.unwrap();
    let promoting = tokio::spawn({
        let raft = node.raft.clone();
        let promote = openraft::ChangeMembers::AddVoterIds(BTreeSet::from([2]));
        async move { raft.change_membership(promote, true).await }
    });
    let two_vote = |m: &RaftMetrics<u64, MemberNode>| {
        m.membership_config.membership().voter_ids().count() == 2
    };
    node.metrics().wait_for(two_vote).await.unwrap();
    let running = node.explain("what was found".to_owned()).await;
    let expect = "no majority of voters: 1 of 2 answers (none from b at 127.0.0.1:1); ";
    assert!(running.starts_with(expect) && running.contains("(what was found)"), "{running}");

    node.raft.shutdown().await.unwrap();
    assert_eq!(node.explain("what was found".to_owned()).await, "what was found");
    let error = store.txn(Txn::create("/a", "1")).await.unwrap_err().to_string();
    assert!(error.contains("Raft has stopped") && !error.contains("majority"), "{error}");
    promoting.abort();
    store.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_leader_that_starts_again_begins_a_new_term() {
    let dir = TempDir::new().unwrap();
    let mut terms = Vec::new();
    for round in 0..3 {
        let store = Store::raft(config(dir.path())).await.unwrap();
        assert!(store.is_leader());
        put(&store, "/a", &round.to_string()).await;
        terms.push(store.leadership().borrow().term);
        store.shutdown().await;
    }
    // In the old one it may have sent entries to others that are not on its own disk.
    assert!(terms.is_sorted_by(|a, b| a < b), "{terms:?}");
}

fn log_id(term: u64, index: u64) -> openraft::LogId<u64> {
    openraft::LogId::new(openraft::CommittedLeaderId::new(term, 1), index)
}

#[test]
fn an_older_snapshot_does_not_replace_a_newer_one() {
    let dir = TempDir::new().unwrap();
    let disk = Disk::open(dir.path(), 1).unwrap();
    let meta = |index| disk::Meta {
        last_log_id: Some(log_id(1, index)),
        snapshot_id: index.to_string(),
        ..disk::Meta::default()
    };
    disk.save_snapshot(&meta(10), b"ten").unwrap();
    disk.save_snapshot(&meta(5), b"five").unwrap();
    assert_eq!(disk.snapshot().unwrap(), Some((meta(10), b"ten".to_vec())));
    disk.save_snapshot(&meta(11), b"eleven").unwrap();
    assert_eq!(disk.snapshot().unwrap(), Some((meta(11), b"eleven".to_vec())));
    disk.close();
    drop(disk);
    Disk::open(dir.path(), 1).unwrap();
}

#[test]
fn a_log_that_was_cut_on_purpose_opens_again() {
    let dir = TempDir::new().unwrap();
    let entry = |term, index| openraft::Entry::<TypeConfig> {
        log_id: log_id(term, index),
        payload: openraft::EntryPayload::Blank,
    };
    let reopened = || Disk::open(dir.path(), 1).unwrap();
    let disk = reopened();
    disk.append(&[entry(1, 1), entry(1, 2), entry(1, 3)]).unwrap();
    disk.truncate(2).unwrap();
    drop(disk);
    let disk = reopened();
    assert_eq!(disk.last().unwrap().unwrap().log_id, log_id(1, 1));
    disk.append(&[entry(2, 2)]).unwrap();
    disk.purge(&log_id(2, 2)).unwrap();
    drop(disk);
    let disk = reopened();
    assert_eq!(disk.last().unwrap(), None);
    disk.truncate(1).unwrap();
    disk.save_vote(&openraft::Vote::new(3, 1)).unwrap();
    drop(disk);
    assert_eq!(reopened().vote().unwrap(), Some(openraft::Vote::new(3, 1)));
}

#[test]
fn nodes_without_names_are_read_as_before() {
    let node: MemberNode = serde_json::from_str(r#"{"addr":"127.0.0.1:1"}"#).unwrap();
    assert_eq!(node, MemberNode::of("", "127.0.0.1:1"));
    assert_eq!(serde_json::to_string(&node).unwrap(), r#"{"addr":"127.0.0.1:1"}"#);
    let named = MemberNode::of("a", "127.0.0.1:1");
    let literal = r#"{"addr":"127.0.0.1:1","name":"a"}"#;
    assert_eq!(serde_json::to_string(&named).unwrap(), literal);
}

impl RaftBackend {
    fn of(store: &Store) -> &Self {
        store.raft_backend().expect("a replicated store")
    }
}
