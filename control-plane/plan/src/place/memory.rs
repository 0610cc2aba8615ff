//! What a rank holds: weights, caches of one full context, overhead. Owns the sizes; knows no nodes.

use std::ops::Range;

use exo_crds::{ModelSpec, Quantization, ShardingKind};

use crate::tensor;

/// Memory of a rank beside weights and KV cache: the process, what MLX keeps for reuse (96 MiB at
/// most), caches that are copied ([`COPY_BYTES`]), activations of one prefill chunk.
pub(crate) const OVERHEAD_BYTES: u64 = 256 << 20;

/// When sequences come, go or outgrow their buffers, runners copy caches layer by layer, and never
/// hold more twice than this and one layer's.
const COPY_BYTES: u64 = 64 << 20;

/// Models that keep a latent make keys, values and scores of some heads at a time from it while a prompt is fed: as
/// many heads as fit into the first, or one, which takes the second for each position of the context (four times the
/// scores of a chunk of 512 tokens, a key and a value of 128 features).
const LATENT_HEADS_BYTES: u64 = 192 << 20;
const LATENT_HEAD_ELEMENTS_PER_TOKEN: u64 = 4 * 512 + 2 * 128;

/// Of float32, and of the floats with 16 bits.
const WIDE_BYTES: u64 = 4;
const NARROW_BYTES: u64 = 2;

/// Bytes that the parts of a model take on a rank.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sizes {
    /// Weights and KV cache of one layer.
    pub(super) layer: u64,
    embedding: u64,
    pub(super) head: u64,
    /// What one layer's cache takes up a second time while it is copied, beyond [`OVERHEAD_BYTES`].
    copy: u64,
    /// For attention over a long prompt, beyond [`OVERHEAD_BYTES`].
    prefill: u64,
}

impl Sizes {
    /// `ranks` share each layer. What all of them hold, its norms, is small.
    pub(super) fn new(model: &ModelSpec, context_length: u32, ranks: u32) -> Self {
        let cache = cache_bytes_per_token(model, ranks).saturating_mul(u64::from(context_length));
        Self {
            layer: model.weights.layer.div_ceil(u64::from(ranks.max(1))).saturating_add(cache),
            embedding: model.weights.embedding,
            head: model.weights.head,
            copy: cache.saturating_sub(COPY_BYTES),
            prefill: prefill_bytes(model, context_length),
        }
    }

    /// What a rank holds beside its layers.
    pub(super) fn fixed(&self, first: bool, last: bool) -> u64 {
        OVERHEAD_BYTES
            .saturating_add(self.copy)
            .saturating_add(self.prefill)
            .saturating_add(if first { self.embedding } else { 0 })
            .saturating_add(if last { self.head } else { 0 })
    }

    /// Layers that fit beside the fixed parts.
    pub(super) fn room(&self, free_bytes: u64, first: bool, last: bool) -> u64 {
        free_bytes.saturating_sub(self.fixed(first, last)) / self.layer.max(1)
    }
}

fn prefill_bytes(model: &ModelSpec, context_length: u32) -> u64 {
    let facts = &model.architecture;
    if facts.kv_latent().is_none() {
        return 0;
    }
    let head_bytes_per_token = LATENT_HEAD_ELEMENTS_PER_TOKEN * element_bytes(model);
    let head = u64::from(context_length).saturating_mul(head_bytes_per_token);
    // A short context's heads all fit.
    head.saturating_mul(u64::from(facts.heads)).min(LATENT_HEADS_BYTES).max(head)
}

/// Bytes that one layer's cache takes for a token, on one of `ranks` ranks that share the layer. Models that keep a
/// latent (DeepSeek's, arXiv 2412.19437, section 2.1.1) have it, and a key for all heads, on every rank; the others
/// have keys and values of each of the rank's heads.
fn cache_bytes_per_token(model: &ModelSpec, ranks: u32) -> u64 {
    let facts = &model.architecture;
    let elements = match facts.kv_latent() {
        Some(latent) => latent,
        None => 2 * u64::from(tensor::kv_heads(model, ranks)) * u64::from(facts.head_dim),
    };
    elements.saturating_mul(element_bytes(model))
}

/// Bytes of a number that attention works with and keeps. Runners take the type that the embedding's values have, or
/// those that scale them where it is packed; it is float32 or has 16 bits, and the embedding's size tells which.
fn element_bytes(model: &ModelSpec) -> u64 {
    let facts = &model.architecture;
    let values = u64::from(facts.vocab_size).saturating_mul(u64::from(facts.hidden_size));
    let embedding = model.weights.embedding;
    let is_wide = match &model.quantization {
        Some(Quantization { bits, group_size }) if embedding < values.saturating_mul(2) => {
            // Packed values; for each group a scale and a bias.
            let packed = values.saturating_mul(u64::from(*bits)) / 8;
            let groups = values / u64::from(*group_size).max(1);
            embedding >= packed.saturating_add(groups.saturating_mul(2 * WIDE_BYTES))
        }
        Some(_) | None => embedding >= values.saturating_mul(WIDE_BYTES),
    };
    if is_wide { WIDE_BYTES } else { NARROW_BYTES }
}

/// One rank's part of a model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Share {
    pub sharding: ShardingKind,
    pub rank: u32,
    pub world_size: u32,
    pub layers: Range<u32>,
}

/// Bytes that a rank holds once it is ready.
pub fn memory_needed(model: &ModelSpec, context_length: u32, share: &Share) -> u64 {
    let (sizes, first, last) = match share.sharding {
        ShardingKind::Pipeline => {
            let last = share.layers.end >= model.architecture.layers;
            (Sizes::new(model, context_length, 1), share.layers.start == 0, last)
        }
        // All ranks have the embedding, the first alone the head.
        ShardingKind::Tensor => {
            (Sizes::new(model, context_length, share.world_size), true, share.rank == 0)
        }
    };
    let layers = u64::from(share.layers.end - share.layers.start);
    sizes.fixed(first, last).saturating_add(sizes.layer.saturating_mul(layers))
}
