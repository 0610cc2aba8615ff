//! `Model`: where weights come from and what placement must know about them.

#![expect(clippy::duplicated_attributes, reason = "columns of one type; a false positive")]

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::CustomResource;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Values of `model_type` that runners have an engine for, in order.
pub const MODEL_TYPES: [&str; 8] =
    ["deepseek_v3", "kimi_k2", "llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe"];

/// A model that instances can run.
#[derive(CustomResource, Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[kube(
    group = "exo.dev",
    version = "v1alpha1",
    kind = "Model",
    plural = "models",
    singular = "model",
    selectable = ".spec.architecture.modelType",
    selectable = ".spec.source.repo",
    doc = "A model: where its weights are, and what placement needs to know of it.",
    category = "exo",
    status = "ModelStatus",
    derive = "PartialEq",
    printcolumn(name = "Type", type_ = "string", json_path = ".spec.architecture.modelType"),
    printcolumn(name = "Layers", type_ = "integer", json_path = ".spec.architecture.layers"),
    printcolumn(
        name = "Context",
        type_ = "integer",
        json_path = ".spec.architecture.contextLength"
    ),
    printcolumn(name = "Bits", type_ = "integer", json_path = ".spec.quantization.bits"),
    printcolumn(name = "Source", type_ = "string", json_path = ".spec.source.repo", priority = 1),
    printcolumn(name = "Path", type_ = "string", json_path = ".spec.source.path", priority = 1),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp")
)]
#[serde(rename_all = "camelCase")]
pub struct ModelSpec {
    pub source: ModelSource,
    pub architecture: Architecture,
    pub weights: WeightBytes,
    /// Absent for weights that are not quantized.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub quantization: Option<Quantization>,
    /// How the model may be split.
    #[serde(default = "default_shardings")]
    pub shardings: Vec<ShardingKind>,
}

fn default_shardings() -> Vec<ShardingKind> {
    vec![ShardingKind::Pipeline, ShardingKind::Tensor]
}

/// Where weights come from: exactly one of `path` and `repo`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(extend("x-kubernetes-validations" = [{
    "rule": "has(self.path) != has(self.repo)",
    "message": "exactly one of path and repo is needed",
}]))]
pub struct ModelSource {
    /// A folder in Hugging Face layout: absolute, or relative to one of the node's model folders.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path: Option<String>,
    /// A Hugging Face repository, `owner/name`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub repo: Option<String>,
    /// Branch, tag or commit of `repo`; `main` when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub revision: Option<String>,
}

/// Facts of `config.json` that placement needs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(extend("x-kubernetes-validations" = [
    {
        "rule": "has(self.kvLoraRank) == has(self.qkRopeHeadDim)",
        "message": "kvLoraRank and qkRopeHeadDim belong together",
    },
    {
        "rule": "!(self.modelType in ['deepseek_v3', 'kimi_k2']) || has(self.kvLoraRank)",
        "message": "models of this type keep a latent: kvLoraRank and qkRopeHeadDim are needed",
    },
]))]
pub struct Architecture {
    /// `model_type` of `config.json`.
    #[schemars(extend("enum" = MODEL_TYPES))]
    pub model_type: String,
    #[schemars(range(min = 1, max = 10_000))]
    pub layers: u32,
    #[schemars(range(min = 1))]
    pub hidden_size: u32,
    #[schemars(range(min = 1))]
    pub heads: u32,
    #[schemars(range(min = 1))]
    pub kv_heads: u32,
    #[schemars(range(min = 1))]
    pub head_dim: u32,
    #[schemars(range(min = 1))]
    pub vocab_size: u32,
    /// Longest sequence, in tokens.
    #[schemars(range(min = 1))]
    pub context_length: u32,
    /// Inner features of the MLP. Placement checks that tensor sharding divides them; where they are
    /// not given, the runners do.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1))]
    pub intermediate_size: Option<u32>,
    /// Inner features of one expert; as above.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1))]
    pub moe_intermediate_size: Option<u32>,
    /// Width of the latent that attention keeps instead of keys and values (`kv_lora_rank`), where the
    /// model has one; the caches' size follows from it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1))]
    pub kv_lora_rank: Option<u32>,
    /// Width of the rotated key beside that latent (`qk_rope_head_dim`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1))]
    pub qk_rope_head_dim: Option<u32>,
}

impl Architecture {
    /// Numbers that attention keeps of a token in each layer, in models that keep a latent.
    pub fn kv_latent(&self) -> Option<u64> {
        Some(u64::from(self.kv_lora_rank?) + u64::from(self.qk_rope_head_dim?))
    }
}

/// Size of the weights by part, in bytes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct WeightBytes {
    /// One transformer layer.
    pub layer: u64,
    /// Token embeddings.
    pub embedding: u64,
    /// Final norm and output head; the embeddings again where they are tied.
    pub head: u64,
}

/// Quantization as mlx-lm's converter writes it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Quantization {
    pub bits: u32,
    pub group_size: u32,
}

/// A way of splitting a model over ranks.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema,
)]
pub enum ShardingKind {
    /// Contiguous layers per rank.
    Pipeline,
    /// Every layer on every rank, heads and MLP split.
    Tensor,
}

/// What the control plane knows about a model.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ModelStatus {
    #[serde(default)]
    pub conditions: Vec<Condition>,
}
