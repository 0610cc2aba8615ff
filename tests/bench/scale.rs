//! 10,000 Shards and 1,000 watches on three real control planes: how long a list takes, how long
//! after a change the last watch has it, and what it costs in memory.
//!
//! `EXO_BIN_DIR=target/release cargo bench -p exo-tests --bench scale -- [shards] [watches]`
#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a tool for people who build exo")]

use std::{
    fs,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use exo_tests::{Admin, Exo, Trio};
use serde_json::{Value, json};
use tokio::sync::Semaphore;

const CALL_LIMIT: Duration = Duration::from_secs(600);
/// An HTTP/2 connection takes 200 streams at once; each client has one to its node.
const WATCHES_PER_CLIENT: usize = 100;
/// Creations under way at once.
const WRITERS: usize = 64;
const LISTS: usize = 20;
const CHANGES: usize = 100;

fn main() {
    let numbers: Vec<usize> = std::env::args().filter_map(|a| a.parse().ok()).collect();
    let shards = numbers.first().copied().unwrap_or(10_000);
    let watches = numbers.get(1).copied().unwrap_or(1_000);
    let trio = Trio::start(&["--no-agent"]).unwrap();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let admins: Vec<Admin> =
        trio.nodes.iter().map(|exo| Admin::of(exo, CALL_LIMIT).unwrap()).collect();
    runtime.block_on(measure(&trio, &admins, shards, watches));
}

fn url(admin: &Admin) -> String {
    format!("{}/apis/exo.dev/v1alpha1/namespaces/default/shards", admin.url)
}

fn shard(number: usize) -> Value {
    json!({
        "apiVersion": "exo.dev/v1alpha1", "kind": "Shard",
        "metadata": {"name": format!("llama-{number}"), "labels": {"exo.dev/instance": "llama"}},
        "spec": {
            "instance": "llama", "replica": 0, "epoch": 1, "node": format!("mac-{}", number % 32),
            "rank": 0, "worldSize": 2, "sharding": "Pipeline", "layers": "0-39",
            "model": {
                "name": "llama", "source": {"path": "llama"}, "modelType": "llama", "layers": 80
            },
            "transport": "ring", "seed": 1, "contextLength": 4096, "maxConcurrency": 4,
            "fastSynch": true
        },
    })
}

/// Resident memory of each process, in MiB.
fn memory(trio: &Trio) -> Vec<u64> {
    let resident = |exo: &Exo| {
        let text = fs::read_to_string(format!("/proc/{}/status", exo.pid())).unwrap_or_default();
        let line = text.lines().find(|line| line.starts_with("VmRSS"));
        let kib = line.and_then(|line| line.split_whitespace().nth(1)?.parse::<u64>().ok());
        kib.unwrap_or(0) >> 10
    };
    trio.nodes.iter().map(resident).collect()
}

fn report(what: &str, mut times: Vec<Duration>) {
    times.sort_unstable();
    let at = |share: f64| times[((times.len() - 1) as f64 * share) as usize];
    println!("{what}: p50 {:.1?}  p99 {:.1?}  worst {:.1?}", at(0.5), at(0.99), at(1.0));
}

async fn measure(trio: &Trio, admins: &[Admin], shards: usize, watches: usize) {
    println!("memory empty: {:?} MiB", memory(trio));
    let begin = Instant::now();
    let places = Arc::new(Semaphore::new(WRITERS));
    let mut creating = tokio::task::JoinSet::new();
    for number in 0..shards {
        let place = Arc::clone(&places).acquire_owned().await.unwrap();
        let admin = admins[number % 3].clone();
        creating.spawn(async move {
            let answer = admin.client.post(url(&admin)).json(&shard(number)).send().await.unwrap();
            let status = answer.status();
            assert!(status.is_success(), "{status}: {}", answer.text().await.unwrap());
            drop(place);
        });
    }
    while let Some(done) = creating.join_next().await {
        done.unwrap();
    }
    println!("{shards} Shards created in {:.1?}", begin.elapsed());
    let mut version = String::new();
    for (old, name) in [("", "up to date"), ("?resourceVersion=0", "resourceVersion=0")] {
        let mut times = Vec::new();
        for round in 0..LISTS {
            let admin = &admins[round % 3];
            let sent = Instant::now();
            let answer = admin.client.get(format!("{}{old}", url(admin))).send().await.unwrap();
            let bytes = answer.bytes().await.unwrap();
            times.push(sent.elapsed());
            let list: Value = serde_json::from_slice(&bytes).unwrap();
            assert_eq!(list["items"].as_array().unwrap().len(), shards);
            version = list["metadata"]["resourceVersion"].as_str().unwrap().to_owned();
        }
        report(&format!("list of {shards}, {name}"), times);
    }
    println!("memory with {shards} Shards: {:?} MiB", memory(trio));
    fan_out(trio, admins, &version, watches).await;
}

async fn fan_out(trio: &Trio, admins: &[Admin], version: &str, watches: usize) {
    let sent: Arc<Mutex<Instant>> = Arc::new(Mutex::new(Instant::now()));
    let (seen, mut all_seen) = tokio::sync::mpsc::unbounded_channel::<Duration>();
    let mut watchers: Vec<Admin> = Vec::new();
    for watch in 0..watches {
        if watch % WATCHES_PER_CLIENT == 0 {
            let node = &trio.nodes[watchers.len() % 3];
            watchers.push(Admin::of(node, CALL_LIMIT).unwrap());
        }
        let admin = &watchers[watch / WATCHES_PER_CLIENT];
        let query = format!("{}?watch=true&resourceVersion={version}", url(admin));
        let mut answer = admin.client.get(query).send().await.unwrap();
        assert!(answer.status().is_success(), "{}", answer.status());
        let (sent, seen) = (Arc::clone(&sent), seen.clone());
        tokio::spawn(async move {
            // One event is one line.
            while let Ok(Some(chunk)) = answer.chunk().await {
                for _ in chunk.iter().filter(|byte| **byte == b'\n') {
                    let took = sent.lock().unwrap().elapsed();
                    if seen.send(took).is_err() {
                        return;
                    }
                }
            }
        });
    }
    println!("memory with {watches} watches: {:?} MiB", memory(trio));
    let mut times = Vec::new();
    for change in 0..CHANGES {
        let admin = &admins[change % 3];
        let patch = json!({"metadata": {"annotations": {"change": change.to_string()}}});
        *sent.lock().unwrap() = Instant::now();
        let answer = admin
            .client
            .patch(format!("{}/llama-{change}", url(admin)))
            .header("content-type", "application/merge-patch+json")
            .body(patch.to_string())
            .send()
            .await
            .unwrap();
        assert!(answer.status().is_success(), "{}", answer.status());
        for _ in 0..watches {
            times.push(all_seen.recv().await.unwrap());
        }
    }
    report(&format!("fan-out to {watches} watches, from the request on"), times);
    println!("memory after it: {:?} MiB", memory(trio));
}
