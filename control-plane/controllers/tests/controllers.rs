//! The controllers against a real API server in the same process, with agents played by the test.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    future::Future,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use axum::{
    Json, Router,
    extract::Request,
    http::{Method, StatusCode},
    middleware::{self, Next},
    response::IntoResponse as _,
};
use exo_apiserver::{ApiServer, Identity, app, collect_garbage, in_process};
use exo_crds::{
    InferenceInstance, InstancePhase, MemoryStatus, Model, Node, NodeAddress, NodeStatus, Quantity,
    Shard, TransportKind, condition, set_condition,
};
use exo_store::Store;
use k8s_openapi::{api::core::v1::Event, apimachinery::pkg::apis::meta::v1::Time, jiff::Timestamp};
use kube::{
    Api, Client, ResourceExt as _,
    api::{DeleteParams, ListParams, Patch, PatchParams, PostParams, PropagationPolicy},
};
use serde_json::{Value, json};
use tokio::{sync::watch, task::JoinHandle, time::Instant};
use tokio_util::sync::CancellationToken;

const DEADLINE: Duration = Duration::from_secs(20);

/// An API server with its controllers; both end with the test.
struct Cluster {
    client: Client,
    leadership: watch::Sender<bool>,
    shutdown: CancellationToken,
    controllers: JoinHandle<Result<(), exo_controllers::Ended>>,
}

impl Cluster {
    fn start(leads: bool) -> Self {
        Self::start_with(leads, |router| router)
    }

    /// `wrap` may come between the controllers and the API server.
    fn start_with(leads: bool, wrap: impl FnOnce(Router) -> Router) -> Self {
        let registry = prometheus::Registry::new();
        let server = ApiServer::new(Store::memory(), &exo_crds::all(), &registry).unwrap();
        let identity =
            Identity { name: "test".to_owned(), groups: vec!["system:masters".to_owned()] };
        let shutdown = CancellationToken::new();
        tokio::spawn(collect_garbage(server.clone(), shutdown.clone().cancelled_owned()));
        let client = Client::new(wrap(in_process(app(server), identity)), "default");
        let (leadership, receiver) = watch::channel(leads);
        let running = exo_controllers::run(client.clone(), receiver, shutdown.clone());
        Self { client, leadership, shutdown, controllers: tokio::spawn(running) }
    }

    fn shards(&self) -> Api<Shard> {
        Api::namespaced(self.client.clone(), "default")
    }

    fn instances(&self) -> Api<InferenceInstance> {
        Api::namespaced(self.client.clone(), "default")
    }

    async fn create<K>(&self, api: Api<K>, value: Value)
    where
        K: Clone + std::fmt::Debug + serde::Serialize + serde::de::DeserializeOwned,
    {
        let object: K = serde_json::from_value(value).unwrap();
        api.create(&PostParams::default(), &object).await.unwrap();
    }

    /// A node whose agent has just reported.
    async fn node(&self, name: &str) {
        let api: Api<Node> = Api::all(self.client.clone());
        self.create(
            api.clone(),
            json!({
                "apiVersion": "exo.dev/v1alpha1", "kind": "Node",
                "metadata": {"name": name}, "spec": {},
            }),
        )
        .await;
        let mut conditions = Vec::new();
        let now = Time(Timestamp::now());
        set_condition(&mut conditions, condition("Ready", true, "AgentReady", "x", &now));
        let memory = Quantity::from_bytes(1 << 30);
        let status = NodeStatus {
            addresses: vec![NodeAddress {
                kind: "InternalIP".to_owned(),
                address: "127.0.0.1".to_owned(),
            }],
            memory: Some(MemoryStatus {
                total: memory,
                free: memory,
                total_bytes: 1 << 30,
                usable_bytes: 1 << 30,
                free_bytes: 1 << 30,
            }),
            transports: vec![TransportKind::Ring],
            conditions,
            ..NodeStatus::default()
        };
        let patch = Patch::Merge(json!({"status": status}));
        api.patch_status(name, &PatchParams::default(), &patch).await.unwrap();
    }

    /// Two nodes, and an instance for both of them.
    async fn populate(&self) {
        self.node("a").await;
        self.node("b").await;
        self.create(
            Api::<Model>::all(self.client.clone()),
            json!({
                "apiVersion": "exo.dev/v1alpha1", "kind": "Model",
                "metadata": {"name": "tiny"},
                "spec": {
                    "source": {"path": "tiny"},
                    "architecture": {
                        "modelType": "llama", "layers": 8, "hiddenSize": 64, "heads": 4,
                        "kvHeads": 4, "headDim": 16, "vocabSize": 64, "contextLength": 128,
                    },
                    "weights": {"layer": 1000, "embedding": 1000, "head": 1000},
                    "shardings": ["Pipeline"],
                },
            }),
        )
        .await;
        self.instance().await;
    }

    async fn instance(&self) {
        self.create(
            self.instances(),
            json!({
                "apiVersion": "exo.dev/v1alpha1", "kind": "InferenceInstance",
                "metadata": {"name": "chat"},
                "spec": {"model": "tiny", "nodes": {"min": 2}},
            }),
        )
        .await;
    }

    async fn uids(&self) -> Vec<String> {
        let shards = self.shards().list(&ListParams::default()).await.unwrap();
        shards.iter().map(|shard| shard.uid().unwrap()).collect()
    }

    /// Deletes the instance so that its shards run on; returns when it is gone.
    async fn orphan(self: &Arc<Self>) {
        let orphan = DeleteParams {
            propagation_policy: Some(PropagationPolicy::Orphan),
            ..DeleteParams::default()
        };
        self.instances().delete("chat", &orphan).await.unwrap();
        let gone = |cluster: Arc<Cluster>| async move {
            cluster.instances().get_opt("chat").await.unwrap().is_none().then_some(())
        };
        self.until("the instance's end", gone, self).await;
    }

    /// Returns when all shards are this instance's, and nobody else's.
    async fn adopted(self: &Arc<Self>, instance: &InferenceInstance) {
        let uid = instance.uid().unwrap();
        let adopted = |cluster: Arc<Cluster>| {
            let uid = uid.clone();
            async move {
                let shards = cluster.shards().list(&ListParams::default()).await.unwrap();
                let is_own =
                    |s: &Shard| matches!(s.owner_references(), [owner] if owner.uid == uid);
                shards.iter().all(is_own).then_some(())
            }
        };
        self.until("adoption", adopted, self).await;
    }

    async fn patch_status(&self, shard: &str, status: Value) {
        let patch = Patch::Merge(json!({"status": status}));
        self.shards().patch_status(shard, &PatchParams::default(), &patch).await.unwrap();
    }

    /// Does what the agents of all nodes would do next.
    async fn agents(&self) {
        for shard in self.shards().list(&ListParams::default()).await.unwrap() {
            let name = shard.name_any();
            let phase = shard.status.as_ref().and_then(|status| status.phase);
            if shard.metadata.deletion_timestamp.is_some() {
                let patch = Patch::Merge(json!({"metadata": {"finalizers": null}}));
                let patched = self.shards().patch(&name, &PatchParams::default(), &patch).await;
                // The controller releases shards of a lost node itself, perhaps just now.
                match patched {
                    Ok(_) => {}
                    Err(kube::Error::Api(status)) if status.code == 404 => {}
                    Err(error) => panic!("{error}"),
                }
            } else if phase.is_none() {
                let port = 7000 + 10 * shard.spec.rank;
                let at = |offset| format!("127.0.0.1:{}", port + offset);
                let listen = json!({"transport": at(0), "control": at(1), "serve": at(2)});
                self.patch_status(&name, json!({"phase": "Downloaded", "listen": listen})).await;
            } else if shard.spec.rendezvous.is_some()
                && phase == Some(exo_crds::ShardPhase::Downloaded)
            {
                self.patch_status(&name, json!({"phase": "Ready"})).await;
            }
        }
    }

    /// The events about an object, each with its count.
    async fn told(&self, kind: &str, name: &str) -> Vec<String> {
        let api: Api<Event> = Api::all(self.client.clone());
        let about = format!("involvedObject.kind={kind},involvedObject.name={name}");
        let events = api.list(&ListParams::default().fields(&about)).await.unwrap();
        let text = |text: Option<String>| text.unwrap_or_default();
        let line = |event: Event| {
            let count = event.count.unwrap_or(0);
            let (kind, reason) = (text(event.type_), text(event.reason));
            format!("{kind} {reason} {count}: {}", text(event.message))
        };
        events.into_iter().map(line).collect()
    }

    /// Lets agents work until `condition` holds.
    async fn until<T, F>(
        &self,
        what: &str,
        condition: impl Fn(Arc<Cluster>) -> F,
        me: &Arc<Self>,
    ) -> T
    where
        F: Future<Output = Option<T>>,
    {
        let begin = Instant::now();
        loop {
            if let Some(value) = condition(me.clone()).await {
                return value;
            }
            assert!(begin.elapsed() < DEADLINE, "waited {DEADLINE:?} for {what}");
            self.agents().await;
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// Of the instance's condition of that type, while its reason is this one.
    async fn message(&self, instance: &str, kind: &str, reason: &str) -> Option<String> {
        let status = self.instances().get(instance).await.unwrap().status?;
        let condition = status.conditions.into_iter().find(|c| c.type_ == kind)?;
        (condition.reason == reason).then_some(condition.message)
    }

    async fn ready_epoch(self: &Arc<Self>, epoch: u64) -> InferenceInstance {
        let ready = |cluster: Arc<Cluster>| async move {
            let instance = cluster.instances().get("chat").await.unwrap();
            let status = instance.status.clone()?;
            let ready =
                status.phase == Some(InstancePhase::Ready) && status.replicas[0].epoch == epoch;
            ready.then_some(instance)
        };
        self.until(&format!("epoch {epoch}"), ready, self).await
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_instance_lives_through_failure_and_change() {
    let cluster = Arc::new(Cluster::start(true));
    cluster.populate().await;
    let instance = cluster.ready_epoch(1).await;
    let status = instance.status.unwrap();
    assert_eq!(status.replicas[0].endpoint.as_deref(), Some("127.0.0.1:7002"));
    assert_eq!(status.nodes.as_deref(), Some("a,b"));
    let shard = cluster.shards().get("chat-0-a1-1").await.unwrap();
    assert_eq!(shard.spec.rendezvous.unwrap().hosts, ["127.0.0.1:7000", "127.0.0.1:7010"]);
    assert_eq!(shard.metadata.owner_references.unwrap()[0].name, "chat");

    let failure = json!({"reason": "RunnerExited", "message": "gone", "permanent": false});
    cluster.patch_status("chat-0-a1-0", json!({"phase": "Failed", "failure": failure})).await;
    let status = cluster.ready_epoch(2).await.status.unwrap();
    assert_eq!(status.replicas[0].failures, 1);

    let patch = Patch::Merge(json!({"spec": {"contextLength": 64}}));
    cluster.instances().patch("chat", &PatchParams::default(), &patch).await.unwrap();
    cluster.ready_epoch(3).await;

    // A Node that is taken away takes its shards along, and says what is missing.
    let nodes: Api<Node> = Api::all(cluster.client.clone());
    nodes.delete("b", &DeleteParams::default()).await.unwrap();
    let waiting = |cluster: Arc<Cluster>| async move {
        cluster.message("chat", "Placed", "Unplaceable").await
    };
    let message = cluster.until("a refusal", waiting, &cluster).await;
    assert!(message.starts_with("2 node(s) wanted, 1 usable: a: "), "{message}");
    cluster.node("c").await;
    let instance = cluster.ready_epoch(4).await;
    assert_eq!(instance.status.unwrap().nodes.as_deref(), Some("a,c"));

    let told = |cluster: Arc<Cluster>| async move {
        let told = cluster.told("InferenceInstance", "chat").await;
        told.contains(&"Normal Placed 1: replica 0, epoch 4: placed on a, c".to_owned())
            .then_some(told)
    };
    let told = cluster.until("the events", told, &cluster).await;
    for expect in [
        "Normal Placed 1: replica 0, epoch 1: placed on a, b",
        "Normal Ready 1: replica 0, epoch 1: every rank answers",
        "Warning EpochFailed 1: replica 0: shard chat-0-a1-0 on a: RunnerExited: gone",
        "Normal Replacing 1: replica 0: the instance or its model was changed",
        "Warning NodeLost 1: replica 0: node b is lost: it is not registered",
    ] {
        assert!(told.iter().any(|line| line == expect), "{expect} in {told:#?}");
    }
    // Another one may come from the moment in which `c` has no status yet.
    let is_first = |line: &&String| line.contains("Unplaceable") && !line.contains("c: not ready");
    let refusals: Vec<_> = told.iter().filter(is_first).collect();
    assert_eq!(refusals.len(), 1, "{told:#?}");

    cluster.shutdown.cancel();
    let cluster = Arc::into_inner(cluster).unwrap();
    tokio::time::timeout(DEADLINE, cluster.controllers).await.unwrap().unwrap().unwrap();
}

/// The next try would be five minutes away.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_failed_shard_that_somebody_deletes_is_tried_again_at_once() {
    let cluster = Arc::new(Cluster::start(true));
    cluster.populate().await;
    cluster.ready_epoch(1).await;
    let failure = json!({"reason": "BadWeights", "message": "no tensor `x`", "permanent": true});
    cluster.patch_status("chat-0-a1-1", json!({"phase": "Failed", "failure": failure})).await;
    let failed = |cluster: Arc<Cluster>| async move {
        cluster.message("chat", "Ready", "ShardFailed").await
    };
    cluster.until("the failure in the status", failed, &cluster).await;
    let status = cluster.instances().get("chat").await.unwrap().status.unwrap();
    assert_eq!(status.replicas[0].kept_shards, ["chat-0-a1-1"]);
    cluster.shards().delete("chat-0-a1-1", &DeleteParams::default()).await.unwrap();
    let status = cluster.ready_epoch(2).await.status.unwrap();
    assert_eq!((status.replicas[0].failures, status.replicas[0].kept_shards.len()), (0, 0));
}

/// `exoctl delete instance chat --cascade=orphan`, and later an instance of that name again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn shards_that_were_left_running_are_adopted() {
    let cluster = Arc::new(Cluster::start(true));
    cluster.populate().await;
    cluster.ready_epoch(1).await;
    let before = cluster.uids().await;
    cluster.orphan().await;
    assert_eq!(cluster.uids().await, before);

    cluster.instance().await;
    let instance = cluster.ready_epoch(1).await;
    cluster.adopted(&instance).await;
    assert_eq!(cluster.uids().await, before, "they ran on");
}

/// The instance is deleted, and its shards are let go, between two looks of one decision: at the
/// instance and at the shards.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn shards_that_are_let_go_meanwhile_are_not_taken_back() {
    let (gate, is_open) = watch::channel(true);
    let (held, mut is_held) = watch::channel(false);
    let hold = move |request: Request, next: Next| {
        // As the controller lists them; agents look into one namespace.
        let lists = request.uri().path() == "/apis/exo.dev/v1alpha1/shards"
            && !request.uri().query().unwrap_or_default().contains("watch=");
        let (mut is_open, held) = (is_open.clone(), held.clone());
        async move {
            if lists && !*is_open.borrow_and_update() {
                held.send_replace(true);
                is_open.wait_for(|open| *open).await.unwrap();
            }
            next.run(request).await
        }
    };
    let wrap = |router: Router| router.layer(middleware::from_fn(hold));
    let cluster = Arc::new(Cluster::start_with(true, wrap));
    cluster.populate().await;
    cluster.ready_epoch(1).await;
    let before = cluster.uids().await;
    gate.send_replace(false);
    cluster.patch_status("chat-0-a1-0", json!({"tokensPerSecond": 1})).await;
    is_held.wait_for(|held| *held).await.unwrap();
    cluster.orphan().await;
    gate.send_replace(true);
    cluster.instance().await;
    let instance = cluster.ready_epoch(1).await;
    cluster.adopted(&instance).await;
    assert_eq!(cluster.uids().await, before, "they ran on");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_refused_shard_is_a_failure_that_waits() {
    const REFUSALS: u32 = 2;
    let asked = Arc::new(AtomicU32::new(0));
    let counter = asked.clone();
    // Of each epoch the second rank is refused.
    let refuse = move |request: Request, next: Next| {
        let creates = request.method() == Method::POST && request.uri().path().ends_with("/shards");
        let nth = if creates { counter.fetch_add(1, Ordering::SeqCst) } else { 0 };
        let refused = nth % 2 == 1 && nth / 2 < REFUSALS;
        async move {
            if !refused {
                return next.run(request).await;
            }
            let status = json!({"kind": "Status", "apiVersion": "v1", "status": "Failure",
                "message": "spec.rank: not today", "reason": "Invalid", "code": 422});
            (StatusCode::UNPROCESSABLE_ENTITY, Json(status)).into_response()
        }
    };
    let cluster =
        Arc::new(Cluster::start_with(true, |router| router.layer(middleware::from_fn(refuse))));
    cluster.populate().await;
    let failed = |cluster: Arc<Cluster>| async move {
        cluster.message("chat", "Ready", "ShardFailed").await
    };
    let message = cluster.until("the failure in the status", failed, &cluster).await;
    // The first wait may be too short to be seen.
    assert!(message.contains("the API server refused the shard chat-0-a"), "{message}");
    assert!(message.contains("-1: spec.rank: not today; "), "{message}");
    assert!(message.contains(" failure(s) in a row, next try after"), "{message}");
    // Epochs 1 and 2 are refused, 3 is not: no number was used up in between.
    let status = cluster.ready_epoch(3).await.status.unwrap();
    assert_eq!(status.replicas[0].failures, REFUSALS);
    assert_eq!(asked.load(Ordering::SeqCst), 2 * REFUSALS + 2);
}

/// There may be very many: nothing reads all of them at once, or again and again while nothing is new.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn shards_are_listed_in_pages_and_only_when_there_is_a_reason() {
    let [nodes, shards, whole]: [Arc<AtomicU32>; 3] = Default::default();
    let counters = [&nodes, &shards, &whole].map(Arc::clone);
    let count = move |request: Request, next: Next| {
        let query = request.uri().query().unwrap_or_default();
        let is_list = *request.method() == Method::GET && !query.contains("watch=");
        // Of all namespaces: agents, whom this test plays, look into one.
        let of = |plural: &str| request.uri().path() == format!("/apis/exo.dev/v1alpha1/{plural}");
        let is_whole = of("shards") && !query.contains("limit=");
        for (counter, counts) in counters.iter().zip([of("nodes"), of("shards"), is_whole]) {
            counter.fetch_add(u32::from(is_list && counts), Ordering::SeqCst);
        }
        next.run(request)
    };
    let wrap = |router: Router| router.layer(middleware::from_fn(count));
    let cluster = Arc::new(Cluster::start_with(true, wrap));
    cluster.populate().await;
    cluster.ready_epoch(1).await;
    let rounds = |wanted: u32| {
        let nodes = Arc::clone(&nodes);
        move |_: Arc<Cluster>| {
            let seen = nodes.load(Ordering::SeqCst);
            async move { (seen >= wanted).then_some(()) }
        }
    };
    // What the last write has set in motion ends.
    let calm = nodes.load(Ordering::SeqCst) + 2;
    cluster.until("two rounds", rounds(calm), &cluster).await;
    let (begin, listed) = (nodes.load(Ordering::SeqCst), shards.load(Ordering::SeqCst));
    cluster.until("three more", rounds(begin + 3), &cluster).await;
    assert_eq!(shards.load(Ordering::SeqCst), listed, "no reason to list shards");
    assert_eq!(whole.load(Ordering::SeqCst), 0, "all at once");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_instance_with_a_name_for_no_label_is_told_so() {
    let cluster = Arc::new(Cluster::start(true));
    cluster.populate().await;
    let name = "n".repeat(64);
    cluster
        .create(
            cluster.instances(),
            json!({
                "apiVersion": "exo.dev/v1alpha1", "kind": "InferenceInstance",
                "metadata": {"name": name}, "spec": {"model": "tiny"},
            }),
        )
        .await;
    let refused = |cluster: Arc<Cluster>| async move {
        cluster.message(&"n".repeat(64), "Ready", "NameTooLong").await
    };
    cluster.until("a refusal", refused, &cluster).await;
    let status = cluster.instances().get(&"n".repeat(64)).await.unwrap().status.unwrap();
    assert_eq!(status.replicas[0].epoch, 0);
    // The others are not held up.
    cluster.ready_epoch(1).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn only_the_leader_acts() {
    let cluster = Arc::new(Cluster::start(false));
    cluster.populate().await;
    // Long enough for a leader to have acted many times.
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert_eq!(cluster.instances().get("chat").await.unwrap().status, None);
    cluster.leadership.send_replace(true);
    cluster.ready_epoch(1).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_quiet_instance_is_not_written() {
    let cluster = Arc::new(Cluster::start(true));
    cluster.populate().await;
    let before = cluster.ready_epoch(1).await;
    // Each is a reason to look again, none a reason to write.
    for speed in 0..5 {
        cluster.patch_status("chat-0-a1-0", json!({"tokensPerSecond": speed})).await;
        cluster.node(&format!("spare-{speed}")).await;
    }
    let idle = |_| async { None::<()> };
    let quiet =
        tokio::time::timeout(Duration::from_millis(500), cluster.until("", idle, &cluster)).await;
    assert!(quiet.is_err());
    let after = cluster.instances().get("chat").await.unwrap();
    assert_eq!(before.metadata.resource_version, after.metadata.resource_version);
}
