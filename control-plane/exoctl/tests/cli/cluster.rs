//! An API server for one test, and `exoctl` pointed at it.

use std::{path::PathBuf, process::Stdio, time::Duration};

use exo_apiserver::{ApiServer, Identity, app, collect_garbage, in_process};
use exo_store::Store;
use k8s_openapi::{
    api::core::v1::Event,
    apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition,
    apimachinery::pkg::apis::meta::v1::Time, jiff::Timestamp,
};
use kube::{
    Api, Client,
    api::{ListParams, Patch, PatchParams, PostParams},
};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::{io::AsyncWriteExt as _, net::TcpListener, process::Command};

/// Long enough for a busy machine; every wait ends as soon as what it waits for is there.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

pub(crate) struct Cluster {
    pub(crate) client: Client,
    pub(crate) dir: TempDir,
    tasks: [tokio::task::JoinHandle<()>; 2],
}

impl Drop for Cluster {
    fn drop(&mut self) {
        self.tasks.iter().for_each(tokio::task::JoinHandle::abort);
    }
}

/// What a command printed.
pub(crate) struct Output {
    pub(crate) code: i32,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Cluster {
    pub(crate) async fn start() -> Self {
        Self::start_with(&exo_crds::all()).await
    }

    /// A server that may know more than exoctl.
    pub(crate) async fn start_with(crds: &[CustomResourceDefinition]) -> Self {
        exo_trust::install_crypto();
        let registry = prometheus::Registry::new();
        let server = ApiServer::new(Store::memory(), crds, &registry).unwrap();
        let collecting = tokio::spawn(collect_garbage(server.clone(), std::future::pending()));
        let identity = Identity { name: "admin".into(), groups: vec!["system:masters".into()] };
        let router = in_process(app(server), identity);
        let client = Client::new(router.clone(), "default");
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let server = tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
        let dir = tempfile::tempdir().unwrap();
        let kubeconfig = format!(
            "apiVersion: v1\nkind: Config\ncurrent-context: exo\n\
             clusters: [{{name: exo, cluster: {{server: '{url}'}}}}]\n\
             users: [{{name: admin, user: {{}}}}]\n\
             contexts: [{{name: exo, context: {{cluster: exo, user: admin}}}}]\n"
        );
        std::fs::write(dir.path().join("kubeconfig"), kubeconfig).unwrap();
        Self { client, dir, tasks: [server, collecting] }
    }

    pub(crate) fn kubeconfig(&self) -> PathBuf {
        self.dir.path().join("kubeconfig")
    }

    /// `exoctl` in the test's folder, which is its data directory as well.
    pub(crate) fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_exoctl"));
        command
            .args(args)
            .current_dir(self.dir.path())
            .env_remove("KUBECONFIG")
            .env("EXO_HOME", self.dir.path())
            .stdin(Stdio::null())
            .kill_on_drop(true);
        command
    }

    pub(crate) async fn run(&self, args: &[&str]) -> Output {
        self.run_with_input(args, "").await
    }

    pub(crate) async fn run_with_input(&self, args: &[&str], input: &str) -> Output {
        let mut command = self.command(args);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let mut stdin = child.stdin.take().unwrap();
        // A command that does not read its input may be gone already.
        let _ = stdin.write_all(input.as_bytes()).await;
        drop(stdin);
        let output = tokio::time::timeout(PATIENCE, child.wait_with_output()).await;
        let output = output.expect("exoctl ends").unwrap();
        Output {
            code: output.status.code().expect("no signal ends it"),
            stdout: String::from_utf8(output.stdout).unwrap(),
            stderr: String::from_utf8(output.stderr).unwrap(),
        }
    }

    /// The two shards of the manual's example.
    pub(crate) async fn create_shards(&self) {
        for (rank, layers) in [(0, "0-39"), (1, "40-79")] {
            self.create_shard(rank, layers).await;
        }
    }

    pub(crate) async fn create_shard(&self, rank: u32, layers: &str) {
        let name = format!("llama-0-a1-{rank}");
        let api = Api::<exo_crds::Shard>::namespaced(self.client.clone(), "default");
        let shard = serde_json::from_value(json!({
            "apiVersion": "exo.dev/v1alpha1", "kind": "Shard",
            "metadata": {"name": name, "labels": {"exo.dev/instance": "llama"}},
            "spec": {"instance": "llama", "replica": 0, "epoch": 1,
                "node": format!("studio-{}", rank + 1), "rank": rank, "worldSize": 2,
                "sharding": "Pipeline", "layers": layers, "transport": "jaccl", "seed": 1,
                "contextLength": 2048, "maxConcurrency": 4, "fastSynch": true,
                "model": {"name": "llama", "source": {"path": "llama"}, "modelType": "llama",
                          "layers": 80}},
        }))
        .unwrap();
        api.create(&PostParams::default(), &shard).await.unwrap();
        let status = json!({"status": {"phase": "Ready", "progress": "100%", "memory": "19Gi"}});
        api.patch_status(&name, &PatchParams::default(), &Patch::Merge(status)).await.unwrap();
    }

    /// Two machines, one half full, one with nothing known of it.
    pub(crate) async fn create_nodes(&self) {
        let api = Api::<exo_crds::Node>::all(self.client.clone());
        for (name, rack) in [("mac-1", "a"), ("mac-2", "b")] {
            let node = serde_json::from_value(json!({
                "apiVersion": "exo.dev/v1alpha1", "kind": "Node",
                "metadata": {"name": name, "labels": {"rack": rack}}, "spec": {},
            }))
            .unwrap();
            api.create(&PostParams::default(), &node).await.unwrap();
        }
        let gib = 1_u64 << 30;
        let memory = json!({"total": "64Gi", "free": "32Gi", "totalBytes": 64 * gib,
            "usableBytes": 48 * gib, "freeBytes": 32 * gib});
        let ready = condition(true, "AgentReports", "the agent reports");
        let status = json!({"status": {"memory": memory, "os": "macos", "chip": "Apple M4",
            "transports": ["ring"], "conditions": [ready],
            "addresses": [{"type": "InternalIP", "address": "192.0.2.1"}]}});
        api.patch_status("mac-1", &PatchParams::default(), &Patch::Merge(status)).await.unwrap();
    }

    /// The manual's shards anew, all of them on one node.
    pub(crate) async fn move_shards(&self, node: &str) {
        let api = Api::<exo_crds::Shard>::namespaced(self.client.clone(), "default");
        for shard in api.list(&ListParams::default()).await.unwrap() {
            let name = shard.metadata.name.unwrap();
            let patch = json!({"spec": {"node": node}});
            api.patch(&name, &PatchParams::default(), &Patch::Merge(patch)).await.unwrap();
        }
    }

    /// What controllers write down: one event that repeated itself and a later one, told in the
    /// wrong order.
    pub(crate) async fn create_events(&self, name: &str) {
        let instance =
            Api::<exo_crds::InferenceInstance>::namespaced(self.client.clone(), "default")
                .get(name)
                .await
                .unwrap();
        let api = Api::<Event>::namespaced(self.client.clone(), "default");
        let now = Timestamp::now().as_second();
        let events = [
            ("Warning", "ShardFailed", "no tensor `x`", 3, 10),
            ("Normal", "Placed", "on mac-1, mac-2", 1, 60),
        ];
        for (kind, reason, message, count, ago_s) in events {
            let time = Time(Timestamp::from_second(now - ago_s).unwrap());
            let event = serde_json::from_value(json!({
                "metadata": {"name": format!("{name}.{}", reason.to_lowercase())},
                "involvedObject": {"apiVersion": "exo.dev/v1alpha1", "kind": "InferenceInstance",
                    "name": name, "namespace": "default", "uid": instance.metadata.uid},
                "type": kind, "reason": reason, "message": message, "count": count,
                "firstTimestamp": time, "lastTimestamp": time,
                "source": {"component": "instance-controller"},
            }))
            .unwrap();
            api.create(&PostParams::default(), &event).await.unwrap();
        }
    }

    /// What an agent tells of a shard that failed and is gone by now.
    pub(crate) async fn create_failure_event(&self, shard: &str) {
        let api = Api::<Event>::namespaced(self.client.clone(), "default");
        let time = Time(Timestamp::from_second(Timestamp::now().as_second()).unwrap());
        for (kind, reason, message) in [
            ("Warning", "RunnerExited", "the runner was killed by signal 9"),
            ("Normal", "Stopped", "the runner was stopped"),
        ] {
            let event = serde_json::from_value(json!({
                "metadata": {"name": format!("{shard}.{}", reason.to_lowercase())},
                "involvedObject": {"apiVersion": "exo.dev/v1alpha1", "kind": "Shard",
                    "name": shard, "namespace": "default"},
                "type": kind, "reason": reason, "message": message, "count": 1,
                "firstTimestamp": time, "lastTimestamp": time,
                "source": {"component": "exo-agent", "host": "mac-2"},
            }))
            .unwrap();
            api.create(&PostParams::default(), &event).await.unwrap();
        }
    }

    /// Does what agent and controller do when an instance of two ranks can't be loaded.
    pub(crate) async fn fail(&self, name: &str, permanent: bool) {
        let shards = Api::<exo_crds::Shard>::namespaced(self.client.clone(), "default");
        let shard = format!("{name}-0-a3-1");
        if shards.get_opt(&shard).await.unwrap().is_none() {
            let object = serde_json::from_value(json!({
                "apiVersion": "exo.dev/v1alpha1", "kind": "Shard",
                "metadata": {"name": shard, "labels": {"exo.dev/instance": name}},
                "spec": {"instance": name, "replica": 0, "epoch": 3, "node": "mac-2", "rank": 1,
                    "worldSize": 2, "sharding": "Pipeline", "layers": "4-7", "transport": "ring",
                    "seed": 1, "contextLength": 2048, "maxConcurrency": 4, "fastSynch": true,
                    "model": {"name": "tiny", "source": {"path": "tiny"}, "modelType": "llama",
                              "layers": 8}},
            }))
            .unwrap();
            shards.create(&PostParams::default(), &object).await.unwrap();
        }
        let failure = json!({"reason": "BadWeights", "message": "no tensor `lm_head.weight`",
            "permanent": permanent});
        let status = json!({"status": {"phase": "Failed", "failure": failure,
            "lastLogLines": ["loading 8 layers", "error: no tensor `lm_head.weight`"]}});
        shards.patch_status(&shard, &PatchParams::default(), &Patch::Merge(status)).await.unwrap();
        // The controller's words follow the shard's.
        let message = match permanent {
            true => "shard chat-0-a3-1: BadWeights; next try in a while",
            false => "shard chat-0-a3-0: PeerLost; next try soon",
        };
        let status = json!({"status": {"phase": "Failed",
            "replicas": [{"index": 0, "epoch": 3, "nodes": ["mac-1", "mac-2"], "ready": false}],
            "conditions": [condition(false, "ShardFailed", message)]}});
        self.patch_instance(name, status).await;
    }

    /// Does what the instance controller does when an instance is, or isn't, ready.
    pub(crate) async fn set_ready(&self, name: &str, ready: bool) {
        let condition = match ready {
            true => condition(true, "AllReady", "1 of 1 replicas is ready"),
            false => condition(false, "NoCapacity", "no node has 19Gi free"),
        };
        let phase = if ready { "Ready" } else { "Pending" };
        self.patch_instance(name, json!({"status": {"phase": phase, "conditions": [condition]}}))
            .await;
    }

    /// Does what the instance controller does while the ranks of an instance load.
    pub(crate) async fn set_starting(&self, name: &str) {
        let message = "rank 0 Loading on mac-1, rank 1 Downloaded on mac-2";
        let condition = condition(false, "Starting", message);
        let status = json!({"status": {"phase": "Starting", "conditions": [condition]}});
        self.patch_instance(name, status).await;
    }

    async fn patch_instance(&self, name: &str, status: Value) {
        let api = Api::<exo_crds::InferenceInstance>::namespaced(self.client.clone(), "default");
        api.patch_status(name, &PatchParams::default(), &Patch::Merge(status)).await.unwrap();
    }
}

fn condition(ready: bool, reason: &str, message: &str) -> Value {
    json!({"type": "Ready", "status": if ready { "True" } else { "False" }, "reason": reason,
        "message": message, "lastTransitionTime": Time(Timestamp::now()), "observedGeneration": 1})
}
