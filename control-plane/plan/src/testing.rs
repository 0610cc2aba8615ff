//! Small resources for tests.

use exo_crds::{
    Architecture, InferenceInstance, InferenceInstanceSpec, MemoryStatus, Model, ModelSource,
    ModelSpec, Node, NodeAddress, NodeRequirements, NodeSpec, NodeStatus, Quantity, Sharding,
    ShardingKind, Transport, TransportKind, WeightBytes, condition, set_condition,
};
use k8s_openapi::{apimachinery::pkg::apis::meta::v1::Time, jiff::Timestamp};

use crate::NodeState;

/// One layer takes 1 MiB of weights and 1 MiB of cache at the full context of 1024.
pub(crate) fn model(layers: u32) -> Model {
    Model::new(
        "tiny",
        ModelSpec {
            source: ModelSource { path: Some("tiny".to_owned()), ..ModelSource::default() },
            architecture: Architecture {
                model_type: "llama".to_owned(),
                layers,
                hidden_size: 256,
                heads: 8,
                kv_heads: 8,
                head_dim: 32,
                vocab_size: 32_000,
                context_length: 1024,
                intermediate_size: None,
                moe_intermediate_size: None,
                kv_lora_rank: None,
                qk_rope_head_dim: None,
            },
            weights: WeightBytes { layer: 1 << 20, embedding: 0, head: 0 },
            quantization: None,
            shardings: vec![ShardingKind::Pipeline, ShardingKind::Tensor],
        },
    )
}

pub(crate) fn instance_spec(model: &str) -> InferenceInstanceSpec {
    InferenceInstanceSpec {
        model: model.to_owned(),
        replicas: 1,
        sharding: Sharding::Auto,
        transport: Transport::Auto,
        nodes: NodeRequirements::default(),
        context_length: None,
        max_concurrency: 4,
        seed: None,
        fast_synch: true,
        environment: Default::default(),
    }
}

pub(crate) fn instance(model: &str, ranks: u32) -> InferenceInstance {
    let mut spec = instance_spec(model);
    spec.nodes.min = Some(ranks);
    let mut instance = InferenceInstance::new("chat", spec);
    instance.metadata.namespace = Some("default".to_owned());
    instance.metadata.uid = Some("8d7c".to_owned());
    instance.metadata.generation = Some(1);
    instance
}

pub(crate) fn node_state(name: &str, free_bytes: u64) -> NodeState {
    NodeState {
        name: name.to_owned(),
        labels: Default::default(),
        ready: Ok(()),
        schedulable: true,
        has_address: true,
        transports: vec![TransportKind::Ring],
        free_bytes: Some(free_bytes),
    }
}

pub(crate) fn node(name: &str, free_bytes: u64) -> Node {
    let mut node = Node::new(name, NodeSpec::default());
    let mut conditions = Vec::new();
    let since = Time(Timestamp::UNIX_EPOCH);
    let running = condition("Ready", true, "AgentReady", "the agent is running", &since);
    set_condition(&mut conditions, running);
    node.status = Some(NodeStatus {
        addresses: vec![NodeAddress {
            kind: "InternalIP".to_owned(),
            address: "10.0.0.1".to_owned(),
        }],
        memory: Some(MemoryStatus {
            total: Quantity::from_bytes(free_bytes),
            free: Quantity::from_bytes(free_bytes),
            total_bytes: free_bytes,
            usable_bytes: free_bytes,
            free_bytes,
        }),
        transports: vec![TransportKind::Ring],
        conditions,
        ..NodeStatus::default()
    });
    node
}

/// Marks a node as its agent being lost.
pub(crate) fn lose(node: &mut Node) {
    let status = node.status.get_or_insert_default();
    let message = "no sign of life from the agent for 10 s";
    let lost = condition("Ready", false, "HeartbeatLost", message, &Time(Timestamp::UNIX_EPOCH));
    set_condition(&mut status.conditions, lost);
}
