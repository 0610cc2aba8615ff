//! `InferenceInstance`: a model that shall be served.

#![expect(clippy::duplicated_attributes, reason = "columns of one type; a false positive")]

use std::collections::BTreeMap;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::CustomResource;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// The desired serving of one model.
#[derive(CustomResource, Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[kube(
    group = "exo.dev",
    version = "v1alpha1",
    kind = "InferenceInstance",
    plural = "inferenceinstances",
    singular = "inferenceinstance",
    shortname = "instance",
    shortname = "instances",
    shortname = "ii",
    namespaced,
    selectable = ".spec.model",
    selectable = ".status.phase",
    doc = "A model to be served: how many copies, on which nodes, and how it is split over them.",
    category = "exo",
    category = "all",
    status = "InferenceInstanceStatus",
    scale(spec_replicas_path = ".spec.replicas", status_replicas_path = ".status.replicaCount"),
    derive = "PartialEq",
    printcolumn(name = "Model", type_ = "string", json_path = ".spec.model"),
    printcolumn(name = "Phase", type_ = "string", json_path = ".status.phase"),
    printcolumn(name = "Ready", type_ = "string", json_path = ".status.ready"),
    printcolumn(
        name = "Reason",
        type_ = "string",
        json_path = ".status.conditions[?(@.type==\"Ready\")].reason"
    ),
    printcolumn(name = "Nodes", type_ = "string", json_path = ".status.nodes"),
    printcolumn(
        name = "Message",
        type_ = "string",
        json_path = ".status.conditions[?(@.type==\"Ready\")].message",
        priority = 1
    ),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp")
)]
#[serde(rename_all = "camelCase")]
pub struct InferenceInstanceSpec {
    /// Name of a Model.
    #[schemars(length(min = 1, max = 253))]
    pub model: String,
    /// Copies of the model, each on nodes of its own ranks.
    #[serde(default = "one")]
    #[schemars(range(min = 0, max = 64))]
    pub replicas: u32,
    #[serde(default)]
    pub sharding: Sharding,
    #[serde(default)]
    pub transport: Transport,
    #[serde(default)]
    pub nodes: NodeRequirements,
    /// Tokens of context that memory is kept for; the model's own limit when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 16))]
    pub context_length: Option<u32>,
    /// Requests that run at the same time; further ones wait.
    #[serde(default = "default_concurrency")]
    #[schemars(range(min = 1, max = 1024))]
    pub max_concurrency: u32,
    /// Seed of requests that bring none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seed: Option<u64>,
    /// Sets `MLX_METAL_FAST_SYNCH`.
    #[serde(default = "yes")]
    pub fast_synch: bool,
    /// Further environment variables of the runners.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub environment: BTreeMap<String, String>,
}

fn one() -> u32 {
    1
}

// A decode step reads the weights once for all of them: up to about this many cost little more than
// one. How many caches fit is looked after by the runner.
fn default_concurrency() -> u32 {
    16
}

fn yes() -> bool {
    true
}

/// How to split the model; `Auto` lets placement choose.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Sharding {
    #[default]
    Auto,
    Pipeline,
    Tensor,
}

/// How ranks talk; `Auto` lets placement choose.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Transport {
    #[default]
    Auto,
    Jaccl,
    Ring,
    Nccl,
}

/// Which nodes may be used, and how many for one replica.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(extend("x-kubernetes-validations" = [{
    "rule": "!has(self.min) || !has(self.max) || self.min <= self.max",
    "message": "min must not be above max",
    "fieldPath": ".min",
}]))]
pub struct NodeRequirements {
    /// At least this many; 1 when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 1024))]
    pub min: Option<u32>,
    /// At most this many; no limit when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 1024))]
    pub max: Option<u32>,
    /// Labels that a node must carry.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub selector: BTreeMap<String, String>,
}

/// What the instance controller reports.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct InferenceInstanceStatus {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub phase: Option<InstancePhase>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    #[serde(default)]
    pub ready_replicas: u32,
    /// Selected replicas for the `scale` subresource's readers.
    #[serde(default)]
    pub replica_count: u32,
    /// Ready and wanted replicas, `1/1`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ready: Option<String>,
    /// Nodes in use, by rank, joined by commas.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub nodes: Option<String>,
    #[serde(default)]
    pub replicas: Vec<ReplicaStatus>,
    #[serde(default)]
    #[schemars(extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["type"]))]
    pub conditions: Vec<Condition>,
}

/// One copy of the model.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ReplicaStatus {
    pub index: u32,
    /// Counts placements of this replica; never goes back.
    pub epoch: u64,
    /// By rank.
    pub nodes: Vec<String>,
    pub ready: bool,
    /// When this epoch became ready; absent before that.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ready_since: Option<k8s_openapi::apimachinery::pkg::apis::meta::v1::Time>,
    /// Where rank 0 takes requests, `HOST:PORT`; only while ready.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub endpoint: Option<String>,
    /// Epochs in a row that failed by themselves; sets the back-off. Forgotten after a minute of
    /// being ready.
    #[serde(default)]
    pub failures: u32,
    /// No new epoch before this time (RFC 3339).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retry_after: Option<k8s_openapi::apimachinery::pkg::apis::meta::v1::Time>,
    /// What ended the last epoch.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_failure: Option<String>,
    /// Failed shards that stay until the next epoch for their messages to be read. Whoever deletes
    /// one of them asks for that epoch at once.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub kept_shards: Vec<String>,
}

impl ReplicaStatus {
    /// Why the runner of a shard ended, such as `WeightsNotFound`, where that ended the last epoch:
    /// `last_failure` is `shard NAME on NODE: REASON: MESSAGE` then.
    pub fn last_failure_reason(&self) -> Option<&str> {
        let (_, told) = self.last_failure.as_deref()?.strip_prefix("shard ")?.split_once(": ")?;
        Some(told.split_once(": ")?.0)
    }
}

/// Where an instance is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum InstancePhase {
    /// No placement yet; the Ready condition says why.
    Pending,
    /// Shards exist and are on their way.
    Starting,
    /// At least one replica answers, fewer than wanted.
    Degraded,
    Ready,
    /// The last epoch failed; the next one waits for its back-off.
    Failed,
}
