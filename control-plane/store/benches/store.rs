//! Three voters against three members of etcd, each a process of its own on this machine, each
//! writing through to disk, in turn while both run; then what 10,000 keys and 1,000 watches cost
//! etcd, for comparison with the `scale` benchmark. Last the time from the death of exo's leader to
//! the next acknowledged write.
//!
//! `cargo bench -p exo-store --features etcd -- [seconds per turn] [kills] [keys] [watches]`, with
//! `etcd` on the path for the comparison. Values have 256 bytes; each client waits for its answer.
#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a tool for people who build exo")]

use std::{
    collections::BTreeMap,
    net::{SocketAddr, TcpListener as StdListener},
    path::Path,
    process::{Child, Command, Stdio},
    sync::Arc,
    time::{Duration, Instant},
};

use axum::{http::StatusCode, routing::post, serve::ListenerExt as _};
use exo_store::{Begin, ListQuery, Peering, RaftConfig, Store, raft_routes};
use serde_json::{Value, json};
use tempfile::TempDir;

const CHILD: &str = "EXO_STORE_BENCH_NODE";
const CLIENTS: [usize; 3] = [1, 16, 64];
/// A disk's speed changes from one moment to the next: the systems take short turns, in pairs.
const TURNS: usize = 15;

#[tokio::main]
async fn main() {
    exo_trust::install_crypto();
    if let Ok(node) = std::env::var(CHILD) {
        return serve(&serde_json::from_str(&node).unwrap()).await;
    }
    let numbers: Vec<u64> = std::env::args().filter_map(|a| a.parse().ok()).collect();
    let number = |at: usize, default: u64| numbers.get(at).copied().unwrap_or(default);
    let (seconds, kills) = (Duration::from_secs(number(0, 1)), number(1, 20));
    let mut exo = Exo::start().await;
    let own = Arc::new(ExoWriter { client: exo.client.clone(), node: exo.leader().await });
    #[cfg(feature = "etcd")]
    let etcd = etcd::Cluster::start().await;
    for clients in CLIENTS {
        let mut own_turns = Vec::new();
        #[cfg(feature = "etcd")]
        let mut etcd_turns = Vec::new();
        for turn in 0..TURNS {
            // Who comes first changes, so that neither always meets what the other left to write.
            let own_first = turn % 2 == 0;
            if own_first {
                own_turns.push(load(clients, seconds, &own).await);
            }
            #[cfg(feature = "etcd")]
            if let Some(etcd) = &etcd {
                etcd_turns.push(load(clients, seconds, &etcd.writer()).await);
            }
            if !own_first {
                own_turns.push(load(clients, seconds, &own).await);
            }
        }
        #[cfg(feature = "etcd")]
        let ratios = own_turns.iter().zip(&etcd_turns).map(|(own, etcd)| rate(own) / rate(etcd));
        #[cfg(feature = "etcd")]
        let ratios = sorted(ratios);
        report("exo", clients, own_turns);
        #[cfg(feature = "etcd")]
        if !etcd_turns.is_empty() {
            report("etcd", clients, etcd_turns);
            let median = ratios[ratios.len() / 2];
            println!("      {clients:>3} clients: exo/etcd {median:.2} (median of {TURNS} pairs)");
        }
    }
    drop((own, exo));
    #[cfg(feature = "etcd")]
    if let Some(etcd) = etcd {
        Box::pin(etcd.scale(number(2, 10_000), number(3, 1_000))).await;
    }
    if kills > 0 {
        exo = Exo::start().await;
        kill_leaders(&mut exo, kills).await;
    }
}

/// One voter.
async fn serve(node: &Value) {
    let address: SocketAddr = node["address"].as_str().unwrap().parse().unwrap();
    let begin = if node["id"] == 1 { Begin::Found } else { Begin::Join };
    let store =
        open(node["dir"].as_str().unwrap(), node["id"].as_u64().unwrap(), address, begin).await;
    let listener = tokio::net::TcpListener::bind(address).await.unwrap();
    let listener = listener.tap_io(|stream| stream.set_nodelay(true).unwrap());
    axum::serve(listener, raft_routes(&store).merge(front(store))).await.unwrap();
}

/// What a client of the leader meets: the store as `exo`'s API server uses it, behind HTTP.
fn front(store: Store) -> axum::Router {
    let txn = async move |body: axum::body::Bytes| {
        let Ok(txn) = serde_json::from_slice(&body) else { return StatusCode::BAD_REQUEST };
        let outcome = if store.is_leader() { store.txn(txn).await.ok() } else { None };
        outcome.map_or(StatusCode::SERVICE_UNAVAILABLE, |_| StatusCode::OK)
    };
    axum::Router::new().route("/txn", post(txn))
}

async fn open(dir: impl AsRef<Path>, node_id: u64, address: SocketAddr, begin: Begin) -> Store {
    let dir = dir.as_ref().to_owned();
    let config = RaftConfig { dir, node_id, name: String::new(), address: address.to_string() };
    let peering = Peering { client: reqwest::Client::new(), tls: None, begin };
    Store::raft_with_peers(config, peering).await.unwrap()
}

fn free_address() -> SocketAddr {
    StdListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap()
}

struct Voter {
    id: u64,
    address: SocketAddr,
    dir: TempDir,
    process: Child,
}

impl Voter {
    fn start(id: u64, address: SocketAddr, dir: TempDir) -> Self {
        let node = json!({"id": id, "address": address, "dir": dir.path()});
        let process = Command::new(std::env::current_exe().unwrap())
            .env(CHILD, node.to_string())
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        Self { id, address, dir, process }
    }
}

impl Drop for Voter {
    fn drop(&mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
    }
}

struct Exo {
    voters: BTreeMap<u64, Voter>,
    client: reqwest::Client,
}

#[derive(Clone)]
struct Node {
    id: u64,
    address: SocketAddr,
}

impl Exo {
    async fn start() -> Self {
        let voter = |id| {
            (
                id,
                Voter::start(
                    id,
                    free_address(),
                    TempDir::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap(),
                ),
            )
        };
        let exo = Self { voters: (1..=3).map(voter).collect(), client: reqwest::Client::new() };
        // The others keep a writer waiting for as long as they know of no leader.
        let first = exo.nodes().swap_remove(0);
        while !put(&exo.client, &first, "/probe").await {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        for id in [2, 3] {
            let address = exo.voters[&id].address;
            let change = json!({"add_learner": {"id": id, "address": address}});
            call(&exo.client, &first, "members", &change).await.unwrap();
        }
        let change = json!({"voters": {"ids": [1, 2, 3]}});
        call(&exo.client, &first, "members", &change).await.unwrap();
        exo
    }

    fn nodes(&self) -> Vec<Node> {
        self.voters.values().map(|v| Node { id: v.id, address: v.address }).collect()
    }

    /// The first node that takes a write.
    async fn leader(&self) -> Node {
        loop {
            for node in self.nodes() {
                if put(&self.client, &node, "/probe").await {
                    return node;
                }
            }
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }
}

/// `None` for everything but a good answer.
async fn call(client: &reqwest::Client, to: &Node, call: &str, body: &Value) -> Option<Value> {
    let answer = client
        .post(format!("http://{}/exo/v1/raft/{call}", to.address))
        .header("x-exo-raft-source", 0)
        .header("x-exo-raft-target", to.id)
        .body(body.to_string())
        .send()
        .await
        .ok()?;
    let answer: Value = serde_json::from_slice(&answer.bytes().await.ok()?).ok()?;
    answer.get("Ok").cloned()
}

async fn put(client: &reqwest::Client, node: &Node, key: &str) -> bool {
    let put = json!({"put": {"key": key, "value": "x".repeat(256)}});
    let txn = json!({"compare": [], "ops": [put]});
    let request = client.post(format!("http://{}/txn", node.address)).body(txn.to_string());
    request.send().await.is_ok_and(|answer| answer.status() == StatusCode::OK)
}

trait Writer: Send + Sync + 'static {
    fn write(&self, key: String) -> impl Future<Output = ()> + Send;
}

struct ExoWriter {
    client: reqwest::Client,
    node: Node,
}

impl Writer for ExoWriter {
    async fn write(&self, key: String) {
        assert!(put(&self.client, &self.node, &key).await, "refused");
    }
}

/// How long it took, and all latencies.
type Turn = (Duration, Vec<Duration>);

/// A number of clients, each of which writes one key after the other.
async fn load<W: Writer>(clients: usize, seconds: Duration, writer: &Arc<W>) -> Turn {
    let begin = Instant::now();
    let tasks: Vec<_> = (0..clients)
        .map(|client| {
            let writer = Arc::clone(writer);
            tokio::spawn(async move {
                let mut latencies = Vec::new();
                while begin.elapsed() < seconds {
                    let sent = Instant::now();
                    writer.write(format!("/{client}/{}", latencies.len())).await;
                    latencies.push(sent.elapsed());
                }
                latencies
            })
        })
        .collect();
    let mut latencies = Vec::new();
    for task in tasks {
        latencies.extend(task.await.unwrap());
    }
    (begin.elapsed(), latencies)
}

/// Writes per second.
fn rate((took, latencies): &Turn) -> f64 {
    latencies.len() as f64 / took.as_secs_f64()
}

fn sorted(values: impl Iterator<Item = f64>) -> Vec<f64> {
    let mut values: Vec<f64> = values.collect();
    values.sort_unstable_by(f64::total_cmp);
    values
}

/// Prints the median of the turns' rates; the latencies are those of all turns.
fn report(system: &str, clients: usize, turns: Vec<Turn>) {
    let rates = sorted(turns.iter().map(rate));
    let rate = rates[rates.len() / 2];
    let mut latencies: Vec<Duration> = turns.into_iter().flat_map(|turn| turn.1).collect();
    latencies.sort_unstable();
    let at = |share: f64| latencies[((latencies.len() - 1) as f64 * share) as usize];
    println!(
        "{system:>5} {clients:>3} clients {rate:>9.0} writes/s ({:.0} to {:.0})  p50 {:>8.2?}  p99 {:>8.2?}",
        rates[0],
        rates[rates.len() - 1],
        at(0.5),
        at(0.99)
    );
}

/// Kills leaders under load; checks at the end that everything acknowledged is there.
async fn kill_leaders(exo: &mut Exo, kills: u64) {
    let mut acknowledged = vec!["/probe".to_owned()];
    let mut gaps = Vec::new();
    for round in 0..kills {
        let leader = exo.leader().await;
        for i in 0..50 {
            let key = format!("/{round}/{i}");
            if put(&exo.client, &leader, &key).await {
                acknowledged.push(key);
            }
        }
        let mut dead = exo.voters.remove(&leader.id).unwrap();
        dead.process.kill().unwrap();
        let killed = Instant::now();
        exo.leader().await;
        gaps.push(killed.elapsed());
        dead.process.wait().unwrap();
        let dir = std::mem::replace(&mut dead.dir, TempDir::new().unwrap());
        exo.voters.insert(leader.id, Voter::start(leader.id, dead.address, dir));
    }
    gaps.sort_unstable();
    println!(
        "  exo leader killed {kills} times: next acknowledged write after {:.0?} (median), {:.0?} (worst)",
        gaps[gaps.len() / 2],
        gaps[gaps.len() - 1]
    );
    // A learner reads everything over the network, as of now.
    let (dir, address) = (TempDir::new().unwrap(), free_address());
    let store = open(dir.path(), 9, address, Begin::Join).await;
    let listener = tokio::net::TcpListener::bind(address).await.unwrap();
    let app = raft_routes(&store);
    tokio::spawn(async move { axum::serve(listener, app).await.unwrap() });
    let change = json!({"add_learner": {"id": 9, "address": address}});
    while call(&exo.client, &exo.leader().await, "members", &change).await.is_none() {}
    let found = store.list(&ListQuery::default()).await.unwrap();
    let lost = acknowledged
        .iter()
        .filter(|key| found.entries.binary_search_by(|e| (*e.key).cmp(key)).is_err())
        .count();
    println!("  {} acknowledged writes read again, {lost} lost", acknowledged.len());
    assert_eq!(lost, 0);
}

#[cfg(feature = "etcd")]
mod etcd {
    use etcd_client::{Client, GetOptions, WatchOptions};

    use super::{
        Arc, Child, Command, Duration, Instant, SocketAddr, Stdio, TempDir, Writer, free_address,
    };

    /// A Shard with its status and managed fields has about this size.
    const VALUE_BYTES: usize = 1_500;
    const CHANGES: u64 = 100;

    pub(super) struct EtcdWriter(Client);

    impl Writer for EtcdWriter {
        async fn write(&self, key: String) {
            self.0.kv_client().put(key, "x".repeat(256), None).await.unwrap();
        }
    }

    struct Members(Vec<(Child, TempDir)>);

    impl Drop for Members {
        fn drop(&mut self) {
            for (process, _) in &mut self.0 {
                process.kill().unwrap();
                process.wait().unwrap();
            }
        }
    }

    pub(super) struct Cluster {
        members: Members,
        leader: Client,
    }

    impl Cluster {
        /// `None` without etcd.
        pub(super) async fn start() -> Option<Self> {
            let (members, clients) = members()?;
            Some(Self { leader: leader(&clients).await, members })
        }

        pub(super) fn writer(&self) -> Arc<EtcdWriter> {
            Arc::new(EtcdWriter(self.leader.clone()))
        }

        pub(super) async fn scale(self, keys: u64, watches: u64) {
            scale(&self.members, self.leader, keys, watches).await;
        }
    }

    /// Three, and where clients reach them.
    fn members() -> Option<(Members, Vec<SocketAddr>)> {
        let peers: Vec<_> = (0..3).map(|_| free_address()).collect();
        let clients: Vec<_> = (0..3).map(|_| free_address()).collect();
        let names = peers.iter().enumerate().map(|(i, p)| format!("m{i}=http://{p}"));
        let cluster = names.collect::<Vec<_>>().join(",");
        let mut members = Members(Vec::new());
        for i in 0..3 {
            let dir = TempDir::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
            let (peer, client) = (format!("http://{}", peers[i]), format!("http://{}", clients[i]));
            let process = Command::new("etcd")
                .args(["--name", &format!("m{i}"), "--initial-cluster", &cluster])
                .args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer])
                .args(["--listen-client-urls", &client, "--advertise-client-urls", &client])
                .args(["--log-level", "error", "--data-dir"])
                .arg(dir.path())
                .stderr(Stdio::null())
                .spawn();
            let Ok(process) = process else {
                println!(" etcd is not on the path: no comparison");
                return None;
            };
            members.0.push((process, dir));
        }
        Some((members, clients))
    }

    /// Resident memory of the members, in MiB.
    fn memory(members: &Members) -> Vec<u64> {
        let resident = |process: &Child| {
            let status = std::fs::read_to_string(format!("/proc/{}/status", process.id()));
            let status = status.unwrap_or_default();
            let line = status.lines().find(|line| line.starts_with("VmRSS"));
            let kib = line.and_then(|line| line.split_whitespace().nth(1)?.parse::<u64>().ok());
            kib.unwrap_or(0) >> 10
        };
        members.0.iter().map(|(process, _)| resident(process)).collect()
    }

    fn times(what: &str, mut times: Vec<Duration>) {
        times.sort_unstable();
        let at = |share: f64| times[((times.len() - 1) as f64 * share) as usize];
        println!(" etcd {what}: p50 {:.1?}  p99 {:.1?}  worst {:.1?}", at(0.5), at(0.99), at(1.0));
    }

    async fn scale(members: &Members, client: Client, keys: u64, watches: u64) {
        let value = "x".repeat(VALUE_BYTES);
        for number in 0..keys {
            client.kv_client().put(format!("/s/{number:05}"), value.as_str(), None).await.unwrap();
        }
        println!(" etcd memory with {keys} keys: {:?} MiB", memory(members));
        let mut took = Vec::new();
        for _ in 0..20 {
            let sent = Instant::now();
            let (mut from, mut found) = ("/s/".to_owned(), 0);
            // In pages that gRPC lets through.
            while found < keys {
                let page = GetOptions::new().with_range("/s0").with_limit(2_000);
                let page = client.kv_client().get(from, Some(page)).await.unwrap();
                found += page.kvs().len() as u64;
                from = format!("{}\0", page.kvs().last().unwrap().key_str().unwrap());
            }
            took.push(sent.elapsed());
        }
        times(&format!("list of {keys}"), took);
        let (seen, mut all_seen) = tokio::sync::mpsc::unbounded_channel();
        for _ in 0..watches {
            let all = WatchOptions::new().with_prefix();
            let mut stream = client.watch_client().watch("/s/", Some(all)).await.unwrap();
            let seen = seen.clone();
            tokio::spawn(async move {
                while let Ok(Some(answer)) = stream.message().await {
                    for _ in answer.events() {
                        if seen.send(Instant::now()).is_err() {
                            return;
                        }
                    }
                }
            });
        }
        println!(" etcd memory with {watches} watches: {:?} MiB", memory(members));
        let mut took = Vec::new();
        for change in 0..CHANGES {
            let sent = Instant::now();
            let put = client.kv_client().put(format!("/s/{change:05}"), value.as_str(), None).await;
            put.unwrap();
            for _ in 0..watches {
                took.push(all_seen.recv().await.unwrap() - sent);
            }
        }
        times(&format!("fan-out to {watches} watches"), took);
    }

    /// The leader takes writes without handing them on, as exo's does.
    async fn leader(clients: &[SocketAddr]) -> Client {
        loop {
            for address in clients {
                let Ok(mut client) = Client::connect([address.to_string()], None).await else {
                    continue;
                };
                if let Ok(status) = client.status().await
                    && let Some(header) = status.header()
                    && status.leader() != 0
                    && header.member_id() == status.leader()
                {
                    return client;
                }
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
}
