//! Clusters of stores in one process, over real sockets, whose nodes can be stopped and cut off.
#![allow(clippy::unwrap_used, reason = "a test may panic")]
#![allow(dead_code, unreachable_pub, reason = "not every test uses all of it")]

#[cfg(feature = "etcd")]
pub mod etcd;

use std::{
    cell::Cell,
    collections::BTreeSet,
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use axum::{
    extract::Request,
    http::StatusCode,
    middleware::{self, Next},
    response::IntoResponse as _,
};
use exo_store::{Begin, Peering, RaftConfig, Store, StoreError, raft_routes};
use tempfile::TempDir;
use tokio::{
    net::TcpListener,
    sync::{oneshot, watch},
    task::JoinHandle,
    time::{Instant, timeout},
};

/// Nothing in these tests takes so long, not even on a machine that stands still now and then.
pub const LIMIT: Duration = Duration::from_secs(90);

/// What a read or a definite refusal comes to: leaders may be lost meanwhile, also for no reason that
/// a test gave.
///
/// # Panics
/// When it still fails after [`LIMIT`], or for a reason that stays.
pub async fn in_the_end<T, F>(call: impl Fn() -> F) -> T
where
    F: Future<Output = Result<T, StoreError>>,
{
    let deadline = Instant::now() + LIMIT;
    loop {
        match call().await {
            Ok(value) => return value,
            Err(error) => {
                let passes = error.is_retryable() || matches!(error, StoreError::Unknown(_));
                assert!(passes && Instant::now() < deadline, "{error}");
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        }
    }
}

fn name(id: u64) -> String {
    format!("n{id}")
}

type Blocked = Arc<Mutex<BTreeSet<u64>>>;

struct Running {
    store: Store,
    stop: oneshot::Sender<()>,
    server: JoinHandle<()>,
}

pub struct Node {
    pub id: u64,
    pub address: SocketAddr,
    dir: PathBuf,
    /// Where nobody gave a folder.
    _own_dir: Option<TempDir>,
    /// Whose calls don't arrive here.
    blocked: Blocked,
    /// Whose calls arrive, but get no answer.
    unanswered: Blocked,
    /// How often another node asked this one whether it would have it as its leader.
    asked: Arc<AtomicUsize>,
    /// Takes calls on, and answers none, while it is set.
    frozen: watch::Sender<bool>,
    running: Option<Running>,
}

impl Node {
    async fn new(id: u64, dir: Option<&Path>, client: &reqwest::Client, begin: Begin) -> Self {
        let own_dir = dir.is_none().then(|| TempDir::new().unwrap());
        let dir = own_dir.as_ref().map_or(dir, |own| Some(own.path())).unwrap().to_owned();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let mut node = Self {
            id,
            address: listener.local_addr().unwrap(),
            dir,
            _own_dir: own_dir,
            blocked: Blocked::default(),
            unanswered: Blocked::default(),
            asked: Arc::default(),
            frozen: watch::Sender::default(),
            running: None,
        };
        node.run(listener, client, begin).await;
        node
    }

    async fn run(&mut self, listener: TcpListener, client: &reqwest::Client, begin: Begin) {
        let config = RaftConfig {
            dir: self.dir.clone(),
            node_id: self.id,
            name: name(self.id),
            address: self.address.to_string(),
        };
        let peering = Peering { client: client.clone(), tls: None, begin };
        let store = Store::raft_with_peers(config, peering).await.unwrap();
        let (blocked, unanswered) = (Arc::clone(&self.blocked), Arc::clone(&self.unanswered));
        let asked = Arc::clone(&self.asked);
        let frozen = self.frozen.clone();
        let cut = move |request: Request, next: Next| {
            let source = &request.headers()["x-exo-raft-source"];
            let source: u64 = source.to_str().unwrap().parse().unwrap();
            let cut_off = blocked.lock().unwrap().contains(&source);
            let unanswered = unanswered.lock().unwrap().contains(&source);
            if !cut_off && request.uri().path().ends_with("/would-have") {
                asked.fetch_add(1, Ordering::Relaxed);
            }
            let mut frozen = frozen.subscribe();
            async move {
                frozen.wait_for(|frozen| !frozen).await.unwrap();
                if cut_off {
                    return StatusCode::SERVICE_UNAVAILABLE.into_response();
                }
                let answer = next.run(request).await;
                if unanswered { StatusCode::SERVICE_UNAVAILABLE.into_response() } else { answer }
            }
        };
        let app = raft_routes(&store).layer(middleware::from_fn(cut));
        let (stop, stopped) = oneshot::channel::<()>();
        let server = tokio::spawn(async move {
            let stopped = async { drop(stopped.await) };
            axum::serve(listener, app).with_graceful_shutdown(stopped).await.unwrap();
        });
        self.running = Some(Running { store, stop, server });
    }

    /// How often others asked this node for their election.
    pub fn asked(&self) -> usize {
        self.asked.load(Ordering::Relaxed)
    }

    pub fn store(&self) -> &Store {
        &self.running.as_ref().expect("the node runs").store
    }
}

pub struct Cluster {
    pub nodes: Vec<Node>,
    client: reqwest::Client,
}

impl Cluster {
    /// Nodes 1 to `size`, all of them voters.
    pub async fn start(size: u64) -> Self {
        Self::start_in(&vec![None; usize::try_from(size).unwrap()]).await
    }

    /// The same with their stores in these folders, or in some of their own.
    pub async fn start_in(dirs: &[Option<&Path>]) -> Self {
        exo_trust::install_crypto();
        let size = dirs.len() as u64;
        let client = reqwest::Client::new();
        let first = Node::new(1, dirs[0], &client, Begin::Found).await;
        let mut cluster = Self { nodes: vec![first], client };
        for id in 2..=size {
            cluster.join_in(id, dirs[id as usize - 1]).await;
        }
        cluster.nodes[0].store().change_membership((1..=size).collect()).await.unwrap();
        for node in &cluster.nodes {
            cluster
                .until("all know the leader", || {
                    node.store().leadership().borrow().leader.is_some()
                })
                .await;
        }
        cluster
    }

    /// A new node, as a learner.
    pub async fn join(&mut self, id: u64) {
        self.join_in(id, None).await;
    }

    async fn join_in(&mut self, id: u64, dir: Option<&Path>) {
        let node = Node::new(id, dir, &self.client, Begin::Join).await;
        let first = self.nodes.iter().find(|n| n.running.is_some()).unwrap();
        first.store().add_learner(id, &name(id), &node.address.to_string()).await.unwrap();
        self.nodes.push(node);
    }

    pub fn node(&self, id: u64) -> &Node {
        self.nodes.iter().find(|n| n.id == id).unwrap()
    }

    pub fn store(&self, id: u64) -> Store {
        self.node(id).store().clone()
    }

    pub async fn stop(&mut self, id: u64) {
        let node = self.nodes.iter_mut().find(|n| n.id == id).unwrap();
        let Running { store, stop, server } = node.running.take().unwrap();
        store.shutdown().await;
        stop.send(()).unwrap();
        timeout(LIMIT, server).await.expect("open connections end").unwrap();
    }

    pub async fn restart(&mut self, id: u64) {
        let node = self.nodes.iter_mut().find(|n| n.id == id).unwrap();
        // While the node was down its port was anybody's.
        let deadline = Instant::now() + LIMIT;
        let listener = loop {
            match TcpListener::bind(node.address).await {
                Ok(listener) => break listener,
                Err(error) => assert!(Instant::now() < deadline, "{}: {error}", node.address),
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        };
        // What is in the folder counts.
        node.run(listener, &self.client, Begin::Join).await;
    }

    /// Cuts these nodes off from the others.
    pub fn partition(&self, side: &[u64]) {
        for node in &self.nodes {
            let mut blocked = node.blocked.lock().unwrap();
            let others = self.nodes.iter().map(|n| n.id);
            *blocked = others.filter(|id| side.contains(id) != side.contains(&node.id)).collect();
        }
    }

    /// What this node calls to others does not arrive; what they call to it does.
    pub fn silence(&self, id: u64) {
        for node in self.nodes.iter().filter(|n| n.id != id) {
            node.blocked.lock().unwrap().insert(id);
        }
    }

    /// What this node calls to others arrives; it hears nothing of them, neither calls nor answers.
    pub fn deafen(&self, id: u64) {
        for node in &self.nodes {
            if node.id == id {
                *node.blocked.lock().unwrap() = self.nodes.iter().map(|n| n.id).collect();
            } else {
                node.unanswered.lock().unwrap().insert(id);
            }
        }
    }

    /// What `from` calls to `to` does not arrive, and nothing else is lost.
    pub fn cut(&self, from: u64, to: u64) {
        self.node(to).blocked.lock().unwrap().insert(from);
    }

    /// As if its machine stood still: it calls nobody, and whoever calls it waits.
    pub fn freeze(&self, id: u64) {
        self.silence(id);
        self.node(id).frozen.send_replace(true);
    }

    pub fn heal(&self) {
        for node in &self.nodes {
            node.frozen.send_replace(false);
            node.blocked.lock().unwrap().clear();
            node.unanswered.lock().unwrap().clear();
        }
    }

    pub async fn until(&self, what: &str, holds: impl Fn() -> bool) {
        let deadline = Instant::now() + LIMIT;
        while !holds() {
            assert!(Instant::now() < deadline, "not in time: {what}");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// The leader among some nodes, once they have one.
    pub async fn leader_among(&self, ids: &[u64]) -> u64 {
        let leader = || {
            let mut running =
                self.nodes.iter().filter(|n| ids.contains(&n.id) && n.running.is_some());
            running.find(|n| n.store().is_leader()).map(|n| n.id)
        };
        let found = Cell::new(None);
        self.until("a leader", || {
            found.set(leader());
            found.get().is_some()
        })
        .await;
        found.get().unwrap()
    }

    pub async fn leader(&self) -> u64 {
        let ids: Vec<u64> = self.nodes.iter().map(|n| n.id).collect();
        self.leader_among(&ids).await
    }

    pub async fn shutdown(mut self) {
        let running = self.nodes.iter().filter(|n| n.running.is_some());
        for id in running.map(|n| n.id).collect::<Vec<_>>() {
            self.stop(id).await;
        }
    }
}
