//! Disks without room: a leader's, and everybody's.

use std::{fs, time::Duration};

use exo_store::{StoreError, Txn};
use exo_test_support::{Volume, fill};
use tokio::time::{Instant, timeout};

use crate::{
    caught_up, create, get,
    support::{Cluster, in_the_end},
};

/// A cluster needs less by far.
const VOLUME: &str = "size=180m";
const BALLAST_BYTES: usize = 100 << 20;
/// Writes may stand still for so long when the leader's disk is full; patience with a busy machine.
const PAUSE: Duration = Duration::from_secs(2);
const PAUSES: usize = 3;

fn volumes() -> Option<Vec<Volume>> {
    let volumes: Option<Vec<_>> = (0..3).map(|_| Volume::mount(VOLUME)).collect();
    if volumes.is_none() {
        eprintln!("nothing can be mounted here: this test did not run");
    }
    volumes
}

async fn start(volumes: &[Volume]) -> Cluster {
    let dirs: Vec<_> = volumes.iter().map(|volume| Some(volume.path())).collect();
    Cluster::start_in(&dirs).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_leader_without_room_hands_its_office_over() {
    let Some(volumes) = volumes() else { return };
    let cluster = start(&volumes).await;
    let mut pauses = Vec::new();
    for round in 0..PAUSES {
        let full = cluster.leader().await;
        let others: Vec<u64> = (1..=3).filter(|id| *id != full).collect();
        let ballast = volumes[full as usize - 1].path().join("ballast");
        create(&cluster.store(others[0]), &format!("/{round}-before"), "v").await;
        fill(&ballast, BALLAST_BYTES);
        let began = Instant::now();
        // The very first one waits for the next leader: it is not refused.
        for (number, id) in others.iter().enumerate() {
            let txn = Txn::create(format!("/{round}-{number}"), "v");
            let written = cluster.store(*id).txn(txn).await;
            assert!(!matches!(written, Err(StoreError::Full(_))), "{written:?}");
            create(&cluster.store(*id), &format!("/{round}-{number}-again"), "v").await;
        }
        pauses.push(began.elapsed());
        assert_ne!(cluster.leader_among(&others).await, full);
        // It knows the new one, and its own clients may write.
        let store = cluster.store(full);
        cluster.until("it leads no more", || !store.is_leader()).await;
        create(&store, &format!("/{round}-there"), "v").await;
        let told = store.is_full().unwrap();
        assert!(told.contains(&format!("the disk of node n{full} is full: ")), "{told}");
        // With room it has all that it missed.
        fs::remove_file(&ballast).unwrap();
        caught_up(&store).await;
        assert!(store.get_local(&format!("/{round}-there")).is_some());
        assert_eq!(store.is_full(), None);
    }
    eprintln!("writes stood still for {pauses:?}");
    assert!(pauses.iter().any(|pause| *pause < PAUSE), "{pauses:?}");
    cluster.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn while_all_disks_are_full_there_are_reads_and_no_writes() {
    let Some(volumes) = volumes() else { return };
    let mut cluster = start(&volumes).await;
    let leader = cluster.leader().await;
    create(&cluster.store(leader), "/a", "1").await;
    for id in 1..=3 {
        caught_up(&cluster.store(id)).await;
    }
    let ballasts: Vec<_> = volumes.iter().map(|volume| volume.path().join("ballast")).collect();
    for ballast in ballasts.iter().rev() {
        fill(ballast, BALLAST_BYTES);
    }
    let refused = async |cluster: &Cluster, ids: &[u64]| {
        for id in ids {
            let store = cluster.store(*id);
            let call = async || match store.txn(Txn::create("/b", "1")).await {
                Err(StoreError::Full(text)) => Ok(text),
                Err(error) => Err(error),
                Ok(done) => panic!("{done:?}"),
            };
            let text = in_the_end(call).await;
            assert!(text.contains("the disk of node n") && text.contains(" is full: "), "{text}");
            assert!(get(&store, "/a").await.is_some() && get(&store, "/b").await.is_none());
        }
    };
    refused(&cluster, &[1, 2, 3]).await;
    // Another one leads when the leader is lost, for the sake of those who read.
    let lost = cluster.leader().await;
    cluster.stop(lost).await;
    let others: Vec<u64> = (1..=3).filter(|id| *id != lost).collect();
    refused(&cluster, &others).await;
    cluster.restart(lost).await;
    refused(&cluster, &[1, 2, 3]).await;
    // Two that have room are enough, whoever leads.
    fs::remove_file(&ballasts[0]).unwrap();
    fs::remove_file(&ballasts[1]).unwrap();
    let store = cluster.store(3);
    let write = create(&store, "/b", "1");
    timeout(Duration::from_secs(60), write).await.expect("writes are taken again");
    fs::remove_file(&ballasts[2]).unwrap();
    for id in 1..=3 {
        assert!(get(&cluster.store(id), "/b").await.is_some());
    }
    cluster.shutdown().await;
}
