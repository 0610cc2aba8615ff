//! A server in this process, and objects to put into it.
#![allow(dead_code, reason = "each test file uses a part of this")]

use axum::{
    Router,
    body::Body,
    http::{Method, Request, StatusCode},
};
use exo_apiserver::{ApiServer, Identity, app, in_process};
use exo_store::Store;
use http_body_util::BodyExt as _;
use kube::Client;
use serde_json::{Value, json};
use tower::ServiceExt as _;

pub(crate) struct Server {
    pub(crate) store: Store,
    pub(crate) server: ApiServer,
    pub(crate) registry: prometheus::Registry,
    /// With an identity.
    pub(crate) router: Router,
}

pub(crate) fn start() -> Server {
    start_on(Store::memory())
}

pub(crate) fn start_on(store: Store) -> Server {
    let registry = prometheus::Registry::new();
    let server = ApiServer::new(store.clone(), &exo_crds::all(), &registry).unwrap();
    let identity = Identity { name: "test".into(), groups: vec!["system:masters".into()] };
    let router = in_process(app(server.clone()), identity);
    Server { store, server, registry, router }
}

impl Server {
    pub(crate) fn client(&self) -> Client {
        Client::new(self.router.clone(), "default")
    }

    /// Sends one request; the answer's body as JSON.
    pub(crate) async fn call(
        &self,
        method: Method,
        path: &str,
        body: Option<Value>,
    ) -> (StatusCode, Value) {
        let content_type = match method {
            Method::PATCH => "application/merge-patch+json",
            _ => "application/json",
        };
        let body = body.map_or_else(Body::empty, |body| Body::from(body.to_string()));
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header("content-type", content_type)
            .body(body)
            .unwrap();
        let (status, _, body) = self.send(request).await;
        (status, body)
    }

    pub(crate) async fn send(
        &self,
        request: Request<Body>,
    ) -> (StatusCode, http::HeaderMap, Value) {
        let response = self.router.clone().oneshot(request).await.unwrap();
        let (parts, body) = response.into_parts();
        let bytes = body.collect().await.unwrap().to_bytes();
        let body = serde_json::from_slice(&bytes)
            .unwrap_or_else(|_| Value::String(String::from_utf8_lossy(&bytes).into_owned()));
        (parts.status, parts.headers, body)
    }

    pub(crate) async fn get(&self, path: &str) -> (StatusCode, Value) {
        self.call(Method::GET, path, None).await
    }
}

pub(crate) const INSTANCES: &str = "/apis/exo.dev/v1alpha1/namespaces/default/inferenceinstances";
pub(crate) const SHARDS: &str = "/apis/exo.dev/v1alpha1/namespaces/default/shards";
pub(crate) const NODES: &str = "/apis/exo.dev/v1alpha1/nodes";

pub(crate) fn instance(name: &str) -> Value {
    json!({
        "apiVersion": "exo.dev/v1alpha1",
        "kind": "InferenceInstance",
        "metadata": {"name": name},
        "spec": {"model": "tiny"}
    })
}

pub(crate) fn node(name: &str) -> Value {
    json!({
        "apiVersion": "exo.dev/v1alpha1",
        "kind": "Node",
        "metadata": {"name": name},
        "spec": {}
    })
}

pub(crate) fn shard(name: &str, node: &str, rank: u32) -> Value {
    json!({
        "apiVersion": "exo.dev/v1alpha1",
        "kind": "Shard",
        "metadata": {"name": name, "labels": {"exo.dev/instance": "llama"}},
        "spec": {
            "instance": "llama", "replica": 0, "epoch": 1, "node": node, "rank": rank,
            "worldSize": 2, "sharding": "Pipeline",
            "layers": if rank == 0 { "0-39" } else { "40-79" },
            "model": {
                "name": "llama", "source": {"path": "llama"}, "modelType": "llama", "layers": 80
            },
            "transport": "jaccl", "seed": 1, "contextLength": 4096, "maxConcurrency": 4,
            "fastSynch": true
        }
    })
}
