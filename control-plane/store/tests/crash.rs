//! A process that is killed loses nothing that it acknowledged.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::{
    io::{BufRead as _, BufReader, Write as _},
    path::Path,
    process::{Command, Stdio},
};

use exo_store::{ListQuery, RaftConfig, Store, Txn, TxnOutcome};
use tempfile::TempDir;

const CHILD_DIR: &str = "EXO_STORE_TEST_CHILD_DIR";

async fn open(dir: &Path) -> Store {
    Store::raft(RaftConfig {
        dir: dir.to_owned(),
        node_id: 1,
        name: "a".into(),
        address: "127.0.0.1:8443".into(),
    })
    .await
    .unwrap()
}

/// The child: writes for ever from several tasks and prints each acknowledged key.
#[tokio::test(flavor = "multi_thread")]
async fn child_writes_until_it_is_killed() {
    let Some(dir) = std::env::var_os(CHILD_DIR) else {
        return;
    };
    let store = open(Path::new(&dir)).await;
    let begin = store.revision();
    let tasks: Vec<_> = (0..8)
        .map(|task| {
            let store = store.clone();
            tokio::spawn(async move {
                for i in 0.. {
                    let key = format!("/{begin}-{task}-{i}");
                    let outcome = store.txn(Txn::create(key.as_str(), "v")).await.unwrap();
                    assert!(matches!(outcome, TxnOutcome::Committed { .. }));
                    writeln!(std::io::stdout(), "acknowledged {key}").unwrap();
                }
            })
        })
        .collect();
    for task in tasks {
        task.await.unwrap();
    }
}

/// `EXO_TEST_ROUNDS` sets the number of kills.
#[tokio::test(flavor = "multi_thread")]
async fn acknowledged_writes_survive_kill_9() {
    let rounds = exo_test_support::setting("EXO_TEST_ROUNDS").unwrap_or(8);
    let dir = TempDir::new().unwrap();
    let mut acknowledged = Vec::new();
    for round in 1..=rounds {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "child_writes_until_it_is_killed", "--nocapture"])
            .env(CHILD_DIR, dir.path())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        // At another point each time: after so many writes, and in the middle of some.
        let (enough, mut seen) = (1 + round * 37 % 150, 0);
        for line in lines {
            // The harness may print its own text before a key on the same line.
            let line = line.unwrap();
            if let Some((_, key)) = line.split_once("acknowledged ") {
                acknowledged.push(key.to_owned());
                seen += 1;
            }
            if seen == enough {
                child.kill().unwrap();
            }
        }
        child.wait().unwrap();
        assert!(seen >= enough, "the child ended by itself in round {round}");
    }
    let store = open(dir.path()).await;
    let listing = store.list(&ListQuery::default()).await.unwrap();
    for key in &acknowledged {
        let found = listing.entries.binary_search_by(|e| (*e.key).cmp(key));
        assert!(found.is_ok(), "{key} was acknowledged and is lost");
    }
    eprintln!("{rounds} kills, {} acknowledged writes read again", acknowledged.len());
    store.shutdown().await;
}
