//! An API server for one test, and `exoctl` pointed at it.

use std::{path::PathBuf, process::Stdio, time::Duration};

use exo_apiserver::{ApiServer, Identity, app, in_process};
use exo_store::Store;
use k8s_openapi::{apimachinery::pkg::apis::meta::v1::Time, jiff::Timestamp};
use kube::{
    Api, Client,
    api::{Patch, PatchParams, PostParams},
};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::{io::AsyncWriteExt as _, net::TcpListener, process::Command};

/// Long enough for a busy machine; every wait ends as soon as what it waits for is there.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

pub(crate) struct Cluster {
    pub(crate) client: Client,
    pub(crate) dir: TempDir,
    server: tokio::task::JoinHandle<()>,
}

impl Drop for Cluster {
    fn drop(&mut self) {
        self.server.abort();
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
        exo_trust::install_crypto();
        let registry = prometheus::Registry::new();
        let server = ApiServer::new(Store::memory(), &exo_crds::all(), &registry).unwrap();
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
        Self { client, dir, server }
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

    /// Does what the instance controller does when an instance is, or isn't, ready.
    pub(crate) async fn set_ready(&self, name: &str, ready: bool) {
        let api = Api::<exo_crds::InferenceInstance>::namespaced(self.client.clone(), "default");
        let now = Time(Timestamp::now());
        let (status, reason, message) = match ready {
            true => ("True", "AllReady", "1 of 1 replicas is ready"),
            false => ("False", "NoCapacity", "no node has 19Gi free"),
        };
        let status: Value = json!({"status": {"phase": if ready { "Ready" } else { "Pending" },
            "conditions": [{"type": "Ready", "status": status, "reason": reason,
                "message": message, "lastTransitionTime": now,
                "observedGeneration": 1}]}});
        api.patch_status(name, &PatchParams::default(), &Patch::Merge(status)).await.unwrap();
    }
}
