//! `Node`: one machine, as its agent describes it.

#![expect(clippy::duplicated_attributes, reason = "columns of one type; a false positive")]

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, MicroTime};
use kube::CustomResource;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{Quantity, TransportKind};

/// What an administrator wants of a machine.
#[derive(CustomResource, Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[kube(
    group = "exo.dev",
    version = "v1alpha1",
    kind = "Node",
    plural = "nodes",
    singular = "node",
    selectable = ".spec.unschedulable",
    selectable = ".status.chip",
    doc = "A machine that runs shards, as its agent describes it.",
    category = "exo",
    status = "NodeStatus",
    derive = "Default",
    derive = "PartialEq",
    printcolumn(
        name = "Ready",
        type_ = "string",
        json_path = ".status.conditions[?(@.type==\"Ready\")].status"
    ),
    printcolumn(name = "Cordoned", type_ = "boolean", json_path = ".spec.unschedulable"),
    printcolumn(name = "Chip", type_ = "string", json_path = ".status.chip"),
    printcolumn(name = "Memory", type_ = "string", json_path = ".status.memory.total"),
    printcolumn(name = "Free", type_ = "string", json_path = ".status.memory.free"),
    printcolumn(name = "Compute", type_ = "string", json_path = ".status.compute"),
    printcolumn(name = "OS", type_ = "string", json_path = ".status.os", priority = 1),
    printcolumn(
        name = "Address",
        type_ = "string",
        json_path = ".status.addresses[0].address",
        priority = 1
    ),
    printcolumn(name = "Version", type_ = "string", json_path = ".status.versions.exo"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp")
)]
#[serde(rename_all = "camelCase")]
pub struct NodeSpec {
    /// No new shards are placed here; running ones stay.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub unschedulable: bool,
    /// Memory left to everything that is not exo.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_reserve: Option<Quantity>,
}

/// What the machine's agent reports.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct NodeStatus {
    /// Where other nodes reach this one; the preferred address first.
    #[serde(default)]
    pub addresses: Vec<NodeAddress>,
    /// Processor name as the operating system gives it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub chip: Option<String>,
    /// `macos` or `linux`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub os: Option<String>,
    /// `aarch64` or `x86_64`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub arch: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory: Option<MemoryStatus>,
    /// What MLX computes on here.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub compute: Option<Compute>,
    /// Transports that the runner installed here can use.
    #[serde(default)]
    pub transports: Vec<TransportKind>,
    /// Free space on the disk that holds the weights.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk_free: Option<Quantity>,
    #[serde(default)]
    pub versions: NodeVersions,
    /// Last sign of life, written by the agent on a period.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_heartbeat_time: Option<MicroTime>,
    #[serde(default)]
    pub conditions: Vec<Condition>,
}

/// One address of a node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct NodeAddress {
    /// `InternalIP` or `Hostname`.
    #[serde(rename = "type")]
    pub kind: String,
    pub address: String,
}

/// Memory of a machine. Quantities are rounded for reading; the byte counts are exact.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct MemoryStatus {
    pub total: Quantity,
    pub free: Quantity,
    pub total_bytes: u64,
    /// What MLX may hold: the GPU's working-set limit on a Mac, all memory elsewhere.
    pub usable_bytes: u64,
    /// Available now, with what exo's own runners hold already counted as used.
    pub free_bytes: u64,
}

/// What MLX computes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Compute {
    Metal,
    Cuda,
    Cpu,
}

/// Versions of what runs on a node.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct NodeVersions {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exo: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub os: Option<String>,
}
