//! Resource types of the `exo.dev/v1alpha1` API group and the wire forms that cross the border
//! between control plane and agent.
//!
//! Owns: the Rust types from which the CRDs are generated, their validation beyond the schema,
//! quantities, the form of events, JSON and YAML reading. Never: IO, clocks, randomness, policy.

mod condition;
pub mod document;
pub mod event;
pub mod generate;
mod instance;
mod model;
mod node;
mod quantity;
pub mod runner;
mod shard;
pub mod transcode;
pub mod yaml;

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::CustomResourceExt as _;

pub use condition::{condition, set_condition};
pub use instance::{
    InferenceInstance, InferenceInstanceSpec, InferenceInstanceStatus, InstancePhase,
    NodeRequirements, ReplicaStatus, Sharding, Transport,
};
pub use model::{
    Architecture, MODEL_TYPES, Model, ModelSource, ModelSpec, ModelStatus, Quantization,
    ShardingKind, WeightBytes,
};
pub use node::{Compute, MemoryStatus, Node, NodeAddress, NodeSpec, NodeStatus, NodeVersions};
pub use quantity::{ParseQuantityError, Quantity};
pub use shard::{
    LayerRange, ParseLayerRangeError, REASON_WEIGHTS_NOT_FOUND, Rendezvous, Shard, ShardFailure,
    ShardListen, ShardModel, ShardPhase, ShardSpec, ShardStatus, TransportKind,
};

/// API group of every resource defined here.
pub const GROUP: &str = "exo.dev";
/// The one version served.
pub const VERSION: &str = "v1alpha1";
/// Extension of a kubeconfig's cluster: `{"servers": ["HOST:PORT", …]}`, the other nodes that serve
/// the same API.
pub const KUBECONFIG_SERVERS: &str = "exo.dev/servers";
/// Finalizer that an agent holds on a Shard until its runner has stopped.
pub const SHARD_FINALIZER: &str = "exo.dev/runner";
/// Label on a Shard: the InferenceInstance it belongs to.
pub const LABEL_INSTANCE: &str = "exo.dev/instance";
/// Label on a Shard: the epoch it belongs to.
pub const LABEL_EPOCH: &str = "exo.dev/epoch";
/// Label on a Shard: the replica it belongs to.
pub const LABEL_REPLICA: &str = "exo.dev/replica";

/// All definitions of the group, in the order in which they are printed.
pub fn all() -> Vec<CustomResourceDefinition> {
    vec![Node::crd(), Model::crd(), InferenceInstance::crd(), Shard::crd()]
}
