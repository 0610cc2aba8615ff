//! The gateway under test, and the control plane it reads.

use std::time::Duration;

use axum::Router;
use exo_apiserver::{ApiServer, Identity, app, in_process};
use exo_crds::generate::{FinishReason, GenerateEvent};
use exo_gateway::{Gateway, Limits};
use exo_store::Store;
use kube::{
    Api, Client,
    api::{DeleteParams, Patch, PatchParams, PostParams},
};
use prometheus::Registry;
use serde_json::{Value, json};
use tokio::net::TcpListener;

use crate::runner::Runner;

/// Long enough for a busy machine; every wait ends as soon as what it waits for is there.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// Everything a test needs.
pub(crate) struct Cluster {
    pub(crate) client: Client,
    pub(crate) http: reqwest::Client,
    pub(crate) url: String,
    tasks: Vec<tokio::task::JoinHandle<()>>,
}

impl Drop for Cluster {
    fn drop(&mut self) {
        for task in &self.tasks {
            task.abort();
        }
    }
}

impl Cluster {
    pub(crate) async fn start() -> Self {
        Self::start_with(Limits::default()).await
    }

    pub(crate) async fn start_with(limits: Limits) -> Self {
        let (cluster, gateway) = Self::launch(limits, |router| router).await;
        tokio::time::timeout(PATIENCE, gateway.ready()).await.unwrap();
        cluster
    }

    /// Waits for nothing; `wrap` goes around the API server.
    pub(crate) async fn launch(
        limits: Limits,
        wrap: impl FnOnce(Router) -> Router,
    ) -> (Self, Gateway) {
        exo_trust::install_crypto();
        let server = ApiServer::new(Store::memory(), &exo_crds::all(), &Registry::new()).unwrap();
        let identity = Identity { name: "gateway".into(), groups: vec!["system:nodes".into()] };
        let client = Client::new(wrap(in_process(app(server), identity)), "default");
        let http = reqwest::Client::builder().no_proxy().build().unwrap();
        let gateway = Gateway::new(client.clone(), http.clone(), &Registry::new(), limits)
            .unwrap()
            .with_plain_runners();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let router = exo_gateway::app(gateway.clone());
        let follower = gateway.clone();
        let tasks = vec![
            tokio::spawn(async move { follower.run().await }),
            tokio::spawn(async move { axum::serve(listener, router).await.unwrap() }),
        ];
        (Self { client, http, url, tasks }, gateway)
    }

    /// Creates an instance named `chat` of the model `tiny`.
    pub(crate) async fn create_instance(&self) {
        self.create("chat").await;
    }

    async fn create(&self, name: &str) {
        let instance = serde_json::from_value(json!({
            "apiVersion": "exo.dev/v1alpha1", "kind": "InferenceInstance",
            "metadata": {"name": name}, "spec": {"model": "tiny", "seed": 11}}))
        .unwrap();
        self.instances().create(&PostParams::default(), &instance).await.unwrap();
    }

    fn instances(&self) -> Api<exo_crds::InferenceInstance> {
        Api::namespaced(self.client.clone(), "default")
    }

    /// Reports replicas of `chat` as `(index, epoch, runner)`, and waits until the gateway knows.
    pub(crate) async fn set_ready(&self, replicas: &[(u32, u64, &Runner)]) {
        let replicas: Vec<_> = replicas
            .iter()
            .map(|(index, epoch, runner)| {
                json!({"index": index, "epoch": epoch, "nodes": ["a"], "ready": true,
                       "endpoint": runner.endpoint})
            })
            .collect();
        self.set_status(json!({"readyReplicas": replicas.len(), "replicas": replicas})).await;
    }

    pub(crate) async fn set_status(&self, status: Value) {
        let patch = Patch::Merge(json!({"status": status}));
        let parameters = PatchParams::default();
        self.instances().patch_status("chat", &parameters, &patch).await.unwrap();
    }

    /// Lets `chat` serve another model, and waits until the gateway knows.
    pub(crate) async fn set_model(&self, model: &str) {
        let patch = Patch::Merge(json!({"spec": {"model": model}}));
        self.instances().patch("chat", &PatchParams::default(), &patch).await.unwrap();
        // Changes of one kind arrive in order: what is created next is seen after this.
        self.create("marker").await;
        let seen = async { while self.get("/v1/models/marker").await.status() != 200 {} };
        tokio::time::timeout(PATIENCE, seen).await.unwrap();
    }

    pub(crate) async fn delete_instance(&self) {
        self.instances().delete("chat", &DeleteParams::default()).await.unwrap();
    }

    /// An instance with one ready replica.
    pub(crate) async fn serving(&self, runner: &Runner) {
        self.create_instance().await;
        self.set_ready(&[(0, 1, runner)]).await;
    }

    pub(crate) async fn get(&self, path: &str) -> reqwest::Response {
        self.http.get(format!("{}{path}", self.url)).send().await.unwrap()
    }

    pub(crate) fn post(&self, body: &Value) -> reqwest::RequestBuilder {
        let url = format!("{}/v1/chat/completions", self.url);
        // A test may take its time between the events that it sends.
        self.http.post(url).json(body).timeout(2 * PATIENCE)
    }

    /// Starts a request; the answer comes from the returned task.
    pub(crate) fn ask(&self, body: &Value) -> tokio::task::JoinHandle<reqwest::Response> {
        let request = self.post(body);
        tokio::spawn(async move { request.send().await.unwrap() })
    }

    /// The value of a metric's line that begins with `line`.
    pub(crate) async fn metric(&self, line: &str) -> Option<f64> {
        let text = self.get("/metrics").await.text().await.unwrap();
        let found = text.lines().find_map(|l| l.strip_prefix(line)?.strip_prefix(' '))?;
        Some(found.parse().unwrap())
    }

    /// Waits until a metric has a value.
    pub(crate) async fn wait_for_metric(&self, line: &str, value: f64) {
        let reached = async {
            while self.metric(line).await != Some(value) {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        if tokio::time::timeout(PATIENCE, reached).await.is_err() {
            let text = self.get("/metrics").await.text().await.unwrap();
            panic!("{line} never was {value}:\n{text}");
        }
    }
}

/// The body of an ordinary request.
pub(crate) fn hello(stream: bool) -> Value {
    json!({"model": "chat", "stream": stream, "messages": [{"role": "user", "content": "hello"}]})
}

pub(crate) fn start() -> GenerateEvent {
    GenerateEvent::Start { prompt_tokens: 5 }
}

pub(crate) fn token(id: u32, text: &str) -> GenerateEvent {
    GenerateEvent::Token { id, text: text.to_owned(), logprobs: None }
}

pub(crate) fn end(completion_tokens: u32) -> GenerateEvent {
    GenerateEvent::End {
        finish_reason: FinishReason::Stop,
        text: String::new(),
        completion_tokens,
        time_to_first_token_s: 0.1,
        decode_tokens_per_s: 10.0,
    }
}

/// The chunks of a stream; the last entry is `[DONE]` where the stream had it.
pub(crate) fn chunks(body: &str) -> Vec<Value> {
    body.lines()
        .filter_map(|line| line.strip_prefix("data: "))
        .map(|data| serde_json::from_str(data).unwrap_or_else(|_| data.into()))
        .collect()
}

/// All the text of a stream.
pub(crate) fn text_of(chunks: &[Value]) -> String {
    chunks.iter().filter_map(|chunk| chunk["choices"][0]["delta"]["content"].as_str()).collect()
}
