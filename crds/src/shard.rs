//! `Shard`: the part of one replica that one node runs as one rank.

#![expect(clippy::duplicated_attributes, reason = "columns of one type; a false positive")]

use std::{borrow::Cow, collections::BTreeMap, fmt, ops::Range, str::FromStr};

use kube::CustomResource;
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

use crate::{ModelSource, Quantity, ShardingKind};

/// An assignment, written by the instance controller; all but `rendezvous` is fixed at creation.
#[derive(CustomResource, Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[kube(
    group = "exo.dev",
    version = "v1alpha1",
    kind = "Shard",
    plural = "shards",
    singular = "shard",
    namespaced,
    selectable = ".spec.node",
    selectable = ".spec.instance",
    selectable = ".status.phase",
    doc = "One rank of one copy of a model: made by the control plane, run by a node's agent.",
    category = "exo",
    category = "all",
    status = "ShardStatus",
    derive = "PartialEq",
    printcolumn(name = "Instance", type_ = "string", json_path = ".spec.instance"),
    printcolumn(name = "Rank", type_ = "integer", json_path = ".spec.rank"),
    printcolumn(name = "Node", type_ = "string", json_path = ".spec.node"),
    printcolumn(name = "Layers", type_ = "string", json_path = ".spec.layers"),
    printcolumn(name = "Sharding", type_ = "string", json_path = ".spec.sharding"),
    printcolumn(name = "Backend", type_ = "string", json_path = ".spec.transport"),
    printcolumn(name = "Phase", type_ = "string", json_path = ".status.phase"),
    printcolumn(name = "Progress", type_ = "string", json_path = ".status.progress"),
    printcolumn(name = "Memory", type_ = "string", json_path = ".status.memory"),
    printcolumn(
        name = "Error",
        type_ = "string",
        json_path = ".status.failure.message",
        priority = 1
    ),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp")
)]
#[serde(rename_all = "camelCase")]
pub struct ShardSpec {
    pub instance: String,
    pub replica: u32,
    pub epoch: u64,
    pub node: String,
    /// 0-based.
    pub rank: u32,
    #[schemars(range(min = 1))]
    pub world_size: u32,
    pub sharding: ShardingKind,
    /// Layers of this rank, inclusive, as in `0-39`.
    pub layers: LayerRange,
    pub model: ShardModel,
    pub transport: TransportKind,
    /// Filled once every rank of the epoch has said where it listens.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rendezvous: Option<Rendezvous>,
    /// Base seed of requests that bring none.
    pub seed: u64,
    /// Longest sequence, in tokens.
    pub context_length: u32,
    pub max_concurrency: u32,
    pub fast_synch: bool,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub environment: BTreeMap<String, String>,
}

/// The weights a shard loads, copied from its Model so that a later edit can't mix revisions.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ShardModel {
    pub name: String,
    pub source: ModelSource,
    /// `model_type` that the files must have.
    pub model_type: String,
    /// Layers of the whole model, which the files must have.
    pub layers: u32,
}

/// How ranks of one epoch talk to each other.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema,
)]
#[serde(rename_all = "lowercase")]
pub enum TransportKind {
    Ring,
    Jaccl,
    Nccl,
}

/// Where the ranks of one epoch meet; the same in all its shards.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Rendezvous {
    /// By rank: `IP:port` for MLX's own connections (ring).
    pub hosts: Vec<String>,
    /// `IP:port` of rank 0's control channel.
    pub control: String,
}

/// What the node's agent reports about its shard.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ShardStatus {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub phase: Option<ShardPhase>,
    /// Of loading: `0%` to `100%`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub progress: Option<String>,
    /// Memory that MLX holds, rounded.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory: Option<Quantity>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_bytes: Option<u64>,
    /// Set from `Downloaded` on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub listen: Option<ShardListen>,
    /// Decode speed over the last reporting period, tokens per second; rank 0 only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tokens_per_second: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failure: Option<ShardFailure>,
    /// The runner's last lines on stderr, oldest first; kept on failure.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub last_log_lines: Vec<String>,
}

/// Addresses that a shard's agent has set aside for it, `IP:port` each.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ShardListen {
    /// MLX's own connections.
    pub transport: String,
    /// Control channel; used by rank 0.
    pub control: String,
    /// Requests from gateways; used by rank 0.
    pub serve: String,
}

/// Reason of a shard, and of its instance, whose node has no weights: somebody has to bring them.
pub const REASON_WEIGHTS_NOT_FOUND: &str = "WeightsNotFound";

/// Why a shard failed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ShardFailure {
    /// A constant, in CamelCase.
    pub reason: String,
    /// One sentence that names the file, tensor or peer.
    pub message: String,
    /// Trying again can't help until something is changed.
    pub permanent: bool,
}

/// Where a shard is in its life.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema,
)]
pub enum ShardPhase {
    Pending,
    Downloading,
    /// Weights are on disk, addresses are set aside; waits for `spec.rendezvous`.
    Downloaded,
    Connecting,
    Loading,
    Warming,
    Ready,
    Stopping,
    Failed,
}

/// A contiguous, non-empty range of layers, printed inclusively (`0-39`) as Kubernetes prints
/// CPU sets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LayerRange {
    first: u32,
    last: u32,
}

/// Text that is not a layer range.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not a range of layers such as 0-39")]
pub struct ParseLayerRangeError(String);

impl LayerRange {
    /// `None` for an empty range. `end` is exclusive.
    pub fn new(range: Range<u32>) -> Option<Self> {
        (range.start < range.end).then(|| Self { first: range.start, last: range.end - 1 })
    }

    /// The half-open range.
    pub fn range(self) -> Range<u32> {
        self.first..self.last + 1
    }
}

impl fmt::Display for LayerRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.first, self.last)
    }
}

impl FromStr for LayerRange {
    type Err = ParseLayerRangeError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let error = || ParseLayerRangeError(text.to_owned());
        let (first, last) = text.split_once('-').ok_or_else(error)?;
        let number = |s: &str| s.parse::<u32>().ok().filter(|n| n.to_string() == s);
        match (number(first), number(last)) {
            (Some(first), Some(last)) if first <= last && last < u32::MAX => {
                Ok(Self { first, last })
            }
            _ => Err(error()),
        }
    }
}

impl Serialize for LayerRange {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for LayerRange {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = Cow::<'_, str>::deserialize(deserializer)?;
        text.parse().map_err(de::Error::custom)
    }
}

impl JsonSchema for LayerRange {
    fn schema_name() -> Cow<'static, str> {
        "LayerRange".into()
    }

    fn inline_schema() -> bool {
        true
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "type": "string",
            "pattern": "^(0|[1-9][0-9]{0,8})-(0|[1-9][0-9]{0,8})$",
            "maxLength": 24,
            "x-kubernetes-validations": [{
                "rule": "int(self.split('-')[0]) <= int(self.split('-')[1])",
                "message": "the first layer must not be above the last",
            }],
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layer_ranges_are_inclusive_in_text_and_half_open_in_code() {
        let range: LayerRange = "0-39".parse().unwrap();
        assert_eq!(range.range(), 0..40);
        assert_eq!(LayerRange::new(40..80).unwrap().to_string(), "40-79");
        assert_eq!(LayerRange::new(3..3), None);
        for bad in ["", "3", "4-3", "-1-3", "0x1-3", "01-3", "0-4294967295"] {
            assert!(bad.parse::<LayerRange>().is_err(), "{bad}");
        }
    }
}
