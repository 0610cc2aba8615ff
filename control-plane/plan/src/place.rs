//! Chooses nodes, their order and their layers for one replica.
//!
//! Hard rules: the node is Ready, schedulable, carries the selector's labels, has an address, can
//! use the transport (a single rank needs none), and each rank has memory for its weights, its KV
//! cache of one full context and a fixed overhead; the number of nodes is within `nodes.min` and
//! `nodes.max`. A pipeline has at most as many ranks as layers; with tensor sharding the number of
//! ranks divides what they share (`tensor`).
//!
//! Preference: as few nodes as the rules allow; of those, most free memory first, then name. Memory
//! is what each node reports: two agents on one machine report the same memory twice, and nothing
//! here corrects that.

use std::{cmp::Reverse, collections::BTreeMap, fmt, num::NonZeroU64, ops::Range};

use exo_crds::{
    InferenceInstanceSpec, LayerRange, Model, ModelSpec, Node, Quantity, Sharding, ShardingKind,
    Transport, TransportKind,
};
use serde::Serialize;

use crate::{StageCapacity, Uneven, partition, tensor};

/// Memory of a rank beside weights and KV cache: the process, MLX's buffer cache, activations of
/// one prefill chunk.
pub(crate) const OVERHEAD_BYTES: u64 = 256 << 20;

/// KV cache elements are half-precision floats.
const CACHE_ELEMENT_BYTES: u64 = 2;

/// What placement must know of a node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeState {
    pub name: String,
    pub labels: BTreeMap<String, String>,
    /// `Err` carries the reason.
    pub ready: Result<(), String>,
    pub schedulable: bool,
    pub has_address: bool,
    pub transports: Vec<TransportKind>,
    /// Free for new shards; unknown until the agent has reported it.
    pub free_bytes: Option<u64>,
}

impl NodeState {
    /// `promised_bytes` is memory that shards on this node will take but do not hold yet.
    pub fn observe(node: &Node, promised_bytes: u64) -> Self {
        let status = node.status.clone().unwrap_or_default();
        let reserve = node.spec.memory_reserve.map_or(0, Quantity::bytes);
        Self {
            name: node.metadata.name.clone().unwrap_or_default(),
            labels: node.metadata.labels.clone().unwrap_or_default(),
            ready: readiness(&status.conditions),
            schedulable: !node.spec.unschedulable,
            has_address: !status.addresses.is_empty(),
            transports: status.transports,
            free_bytes: status.memory.map(|memory| {
                memory
                    .free_bytes
                    .min(memory.usable_bytes)
                    .saturating_sub(reserve)
                    .saturating_sub(promised_bytes)
            }),
        }
    }
}

fn readiness(
    conditions: &[k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition],
) -> Result<(), String> {
    match conditions.iter().find(|c| c.type_ == "Ready") {
        Some(ready) if ready.status == "True" => Ok(()),
        Some(ready) => Err(ready.message.clone()),
        None => Err("its agent has not reported yet".to_owned()),
    }
}

/// One question to [`place`].
#[derive(Clone, Copy, Debug)]
pub struct Placing<'a> {
    pub model: &'a Model,
    pub instance: &'a InferenceInstanceSpec,
    pub nodes: &'a [NodeState],
}

/// An answer: ranks in order.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Placement {
    pub sharding: ShardingKind,
    pub transport: TransportKind,
    pub context_length: u32,
    pub ranks: Vec<RankPlacement>,
}

/// One rank of a placement.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct RankPlacement {
    pub node: String,
    pub layers: LayerRange,
    /// What the rank is expected to hold.
    pub memory_bytes: u64,
}

/// Why there is no placement.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, thiserror::Error)]
pub struct Unplaceable {
    pub why: Why,
    /// By node name.
    pub nodes: BTreeMap<String, NodeReason>,
}

/// The reason as a whole.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, thiserror::Error)]
pub enum Why {
    #[error("model {model} can't be split as {wanted:?}: its `shardings` leave that out")]
    Sharding { model: String, wanted: Sharding },
    /// `ranks` as text: one number, or several.
    #[error("model {model} can't be split over {ranks} ranks: {uneven}")]
    Uneven { model: String, ranks: String, uneven: Uneven },
    #[error("transport {wanted:?} is not supported yet; use Auto or Ring")]
    Transport { wanted: Transport },
    #[error("nodes.min is {min}, nodes.max is {max}")]
    MinAboveMax { min: u32, max: u32 },
    #[error("nodes.min is {min}, but model {model} has only {layers} layers")]
    MinAboveLayers { min: u32, layers: u32, model: String },
    #[error("contextLength is {wanted}, but model {model} goes up to {limit}")]
    Context { wanted: u32, limit: u32, model: String },
    #[error("no node is known")]
    NoNodes,
    #[error("{wanted} node(s) wanted, {usable} usable")]
    TooFewNodes { wanted: u32, usable: u32 },
    #[error("{layers} layers need {needed}, and {nodes} node(s) can hold only {held} of them")]
    Memory { layers: u32, needed: Quantity, nodes: u32, held: u64 },
    #[error("each of {ranks} rank(s) needs {needed}, the first {first}")]
    ShareMemory { ranks: u32, needed: Quantity, first: Quantity },
}

/// What one node lacks, or what it could hold.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, thiserror::Error)]
pub enum NodeReason {
    #[error("not ready: {0}")]
    NotReady(String),
    #[error("marked unschedulable")]
    Unschedulable,
    #[error("has no label {key}={wanted}")]
    Selector { key: String, wanted: String },
    #[error("has no address")]
    NoAddress,
    #[error("has not reported its memory")]
    MemoryUnknown,
    #[error("its runner can't use {0:?}")]
    NoTransport(TransportKind),
    #[error("{free} free, one layer and its overhead need {needed}")]
    Memory { free: Quantity, needed: Quantity },
    #[error("{free} free, room for {layers} layer(s)")]
    Room { free: Quantity, layers: u64 },
    #[error("{free} free")]
    Free { free: Quantity },
}

impl fmt::Display for Unplaceable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.why)?;
        for (index, (name, reason)) in self.nodes.iter().enumerate() {
            write!(f, "{} {name}: {reason}", if index == 0 { ":" } else { ";" })?;
        }
        Ok(())
    }
}

/// Order in which nodes are taken; the fields' order is the policy.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Preference {
    free_bytes: Reverse<u64>,
    name: String,
}

/// Bytes that the parts of a model take on a rank.
#[derive(Clone, Copy, Debug)]
struct Sizes {
    /// Weights and KV cache of one layer.
    layer: u64,
    embedding: u64,
    head: u64,
}

impl Sizes {
    /// `ranks` share each layer. What all of them hold, its norms, is small.
    fn new(model: &ModelSpec, context_length: u32, ranks: u32) -> Self {
        let facts = &model.architecture;
        let cache = 2u64
            .saturating_mul(CACHE_ELEMENT_BYTES)
            .saturating_mul(u64::from(tensor::kv_heads(model, ranks)))
            .saturating_mul(u64::from(facts.head_dim))
            .saturating_mul(u64::from(context_length));
        Self {
            layer: model.weights.layer.div_ceil(u64::from(ranks.max(1))).saturating_add(cache),
            embedding: model.weights.embedding,
            head: model.weights.head,
        }
    }

    /// What a rank holds beside its layers.
    fn fixed(&self, first: bool, last: bool) -> u64 {
        OVERHEAD_BYTES
            .saturating_add(if first { self.embedding } else { 0 })
            .saturating_add(if last { self.head } else { 0 })
    }

    /// Layers that fit beside the fixed parts.
    fn room(&self, free_bytes: u64, first: bool, last: bool) -> u64 {
        free_bytes.saturating_sub(self.fixed(first, last)) / self.layer.max(1)
    }
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

/// Places one replica; the same question always gets the same answer.
///
/// # Errors
/// [`Unplaceable`], with a reason for every node.
pub fn place(question: &Placing<'_>) -> Result<Placement, Unplaceable> {
    let rules = Rules::new(question).map_err(|why| Unplaceable { why, nodes: BTreeMap::new() })?;
    let mut reasons = BTreeMap::new();
    let mut usable: Vec<(Preference, &NodeState)> = Vec::new();
    for node in question.nodes {
        match rules.admit(node) {
            Ok(free_bytes) => usable.push((
                Preference { free_bytes: Reverse(free_bytes), name: node.name.clone() },
                node,
            )),
            Err(reason) => {
                reasons.insert(node.name.clone(), reason);
            }
        }
    }
    usable.sort_by(|a, b| a.0.cmp(&b.0));

    let most = rules.most(count(&usable));
    for ranks in (rules.min..=most).filter(|ranks| rules.divides(*ranks).is_none()) {
        let candidates: Vec<&Preference> = usable
            .iter()
            .filter(|(_, node)| ranks == 1 || node.transports.contains(&rules.transport))
            .map(|(preference, _)| preference)
            .take(ranks as usize)
            .collect();
        if count(&candidates) == ranks
            && let Some(ranks) = match rules.sharding {
                ShardingKind::Pipeline => rules.arrange(&candidates),
                ShardingKind::Tensor => rules.share(&candidates),
            }
        {
            return Ok(Placement {
                sharding: rules.sharding,
                transport: rules.transport,
                context_length: rules.context_length,
                ranks,
            });
        }
    }
    Err(rules.refuse(&usable, reasons))
}

fn count<T>(items: &[T]) -> u32 {
    u32::try_from(items.len()).unwrap_or(u32::MAX)
}

/// The question with its defaults filled in.
struct Rules<'a> {
    sharding: ShardingKind,
    transport: TransportKind,
    context_length: u32,
    min: u32,
    max: u32,
    layers: u32,
    sizes: Sizes,
    model: &'a Model,
    selector: &'a BTreeMap<String, String>,
}

impl<'a> Rules<'a> {
    fn new(question: &Placing<'a>) -> Result<Self, Why> {
        let (instance, model) = (question.instance, &question.model.spec);
        let name = || question.model.metadata.name.clone().unwrap_or_default();
        let layers = model.architecture.layers;
        let sharding = match instance.sharding {
            Sharding::Auto | Sharding::Pipeline => ShardingKind::Pipeline,
            Sharding::Tensor => ShardingKind::Tensor,
        };
        if !model.shardings.contains(&sharding) {
            return Err(Why::Sharding { model: name(), wanted: instance.sharding });
        }
        let transport = match instance.transport {
            Transport::Auto | Transport::Ring => TransportKind::Ring,
            wanted @ (Transport::Jaccl | Transport::Nccl) => return Err(Why::Transport { wanted }),
        };
        let limit = model.architecture.context_length;
        let context_length = instance.context_length.unwrap_or(limit);
        if context_length > limit {
            return Err(Why::Context { wanted: context_length, limit, model: name() });
        }
        let min = instance.nodes.min.unwrap_or(1).max(1);
        let max = instance.nodes.max.unwrap_or(u32::MAX);
        if min > max {
            return Err(Why::MinAboveMax { min, max });
        }
        if sharding == ShardingKind::Pipeline && min > layers {
            return Err(Why::MinAboveLayers { min, layers, model: name() });
        }
        Ok(Self {
            sharding,
            transport,
            context_length,
            min,
            max,
            layers,
            sizes: Sizes::new(model, context_length, 1),
            model: question.model,
            selector: &instance.nodes.selector,
        })
    }

    /// Free memory of a node that may take part.
    fn admit(&self, node: &NodeState) -> Result<u64, NodeReason> {
        if let Err(reason) = &node.ready {
            return Err(NodeReason::NotReady(reason.clone()));
        }
        if !node.schedulable {
            return Err(NodeReason::Unschedulable);
        }
        for (key, wanted) in self.selector {
            if node.labels.get(key) != Some(wanted) {
                return Err(NodeReason::Selector { key: key.clone(), wanted: wanted.clone() });
            }
        }
        if !node.has_address {
            return Err(NodeReason::NoAddress);
        }
        if self.min > 1 && !node.transports.contains(&self.transport) {
            return Err(NodeReason::NoTransport(self.transport));
        }
        node.free_bytes.ok_or(NodeReason::MemoryUnknown)
    }

    /// The most ranks that may be made of so many usable nodes.
    fn most(&self, usable: u32) -> u32 {
        match self.sharding {
            ShardingKind::Pipeline => self.max.min(self.layers).min(usable),
            ShardingKind::Tensor => self.max.min(usable),
        }
    }

    /// Why so many ranks can't share the model's layers.
    fn divides(&self, ranks: u32) -> Option<Uneven> {
        match self.sharding {
            ShardingKind::Pipeline => None,
            ShardingKind::Tensor => tensor::objection(&self.model.spec, ranks),
        }
    }

    /// What a rank of `world_size` holds when all share every layer.
    fn share_bytes(&self, rank: u32, world_size: u32) -> u64 {
        let share =
            Share { sharding: ShardingKind::Tensor, rank, world_size, layers: 0..self.layers };
        memory_needed(&self.model.spec, self.context_length, &share)
    }

    /// A part of every layer for each of these nodes. The first, which has most memory, has the
    /// head as well.
    fn share(&self, nodes: &[&Preference]) -> Option<Vec<RankPlacement>> {
        let ranks = nodes.iter().zip(0u32..).map(|(node, rank)| {
            let memory_bytes = self.share_bytes(rank, count(nodes));
            (memory_bytes <= node.free_bytes.0).then_some(RankPlacement {
                node: node.name.clone(),
                layers: LayerRange::new(0..self.layers)?,
                memory_bytes,
            })
        });
        ranks.collect()
    }

    /// Layers for exactly these nodes. They keep their order unless only another first or last
    /// rank leaves room for embedding and head. All layers have one size, so counting how many fit
    /// decides exactly whether an order can work.
    fn arrange(&self, nodes: &[&Preference]) -> Option<Vec<RankPlacement>> {
        let world = nodes.len();
        // Spares the search below for counts that no order can help.
        let most: u64 = nodes
            .iter()
            .map(|node| self.sizes.room(node.free_bytes.0, false, false))
            .fold(0, u64::saturating_add);
        if most < u64::from(self.layers) {
            return None;
        }
        let orders = (0..world).flat_map(|first| {
            // The usual last rank is tried first.
            (0..world)
                .rev()
                .filter(move |last| *last != first || world == 1)
                .map(move |last| (first, last))
        });
        for (first, last) in orders {
            if !self.fits(nodes, first, last) {
                continue;
            }
            let mut order: Vec<&Preference> = vec![nodes[first]];
            order.extend(
                (0..world)
                    .filter(|index| *index != first && *index != last)
                    .map(|index| nodes[index]),
            );
            if world > 1 {
                order.push(nodes[last]);
            }
            if let Some(ranks) = self.split(&order) {
                return Some(ranks);
            }
        }
        None
    }

    fn fits(&self, nodes: &[&Preference], first: usize, last: usize) -> bool {
        let mut sum = 0u64;
        for (index, node) in nodes.iter().enumerate() {
            let room = self.sizes.room(node.free_bytes.0, index == first, index == last);
            if room == 0 {
                return false;
            }
            sum = sum.saturating_add(room);
        }
        sum >= u64::from(self.layers)
    }

    fn split(&self, order: &[&Preference]) -> Option<Vec<RankPlacement>> {
        let last = order.len() - 1;
        let stages: Vec<StageCapacity> = order
            .iter()
            .enumerate()
            .map(|(rank, node)| StageCapacity {
                memory_bytes: node
                    .free_bytes
                    .0
                    .saturating_sub(self.sizes.fixed(rank == 0, rank == last)),
                fixed_bytes: if rank == last { self.sizes.head } else { 0 },
                // Chips are taken as equally fast until nodes report their memory bandwidth.
                speed: NonZeroU64::MIN,
            })
            .collect();
        let layers = vec![self.sizes.layer; self.layers as usize];
        let ranges = partition(&layers, &stages)?;
        order
            .iter()
            .zip(ranges)
            .enumerate()
            .map(|(rank, (node, range))| {
                let held = self.sizes.layer.saturating_mul(range.len() as u64);
                // Ends are at most `self.layers`, so they fit.
                let layers = LayerRange::new(range.start as u32..range.end as u32)?;
                Some(RankPlacement {
                    node: node.name.clone(),
                    layers,
                    memory_bytes: self.sizes.fixed(rank == 0, rank == last).saturating_add(held),
                })
            })
            .collect()
    }

    fn refuse(
        &self,
        usable: &[(Preference, &NodeState)],
        mut reasons: BTreeMap<String, NodeReason>,
    ) -> Unplaceable {
        if self.sharding == ShardingKind::Tensor {
            return self.refuse_sharing(usable, reasons);
        }
        let mut held = 0u64;
        for (preference, _) in usable {
            let free = preference.free_bytes.0;
            let room = self.sizes.room(free, false, false);
            held = held.saturating_add(room);
            let needed = self.sizes.fixed(false, false).saturating_add(self.sizes.layer);
            let reason = if room == 0 {
                NodeReason::Memory {
                    free: Quantity::from_bytes(free).rounded(),
                    needed: Quantity::from_bytes(needed).rounded(),
                }
            } else {
                NodeReason::Room {
                    free: Quantity::from_bytes(free).rounded(),
                    layers: room.min(u64::from(self.layers)),
                }
            };
            reasons.insert(preference.name.clone(), reason);
        }
        let why = if reasons.is_empty() {
            Why::NoNodes
        } else if count(usable) < self.min {
            Why::TooFewNodes { wanted: self.min, usable: count(usable) }
        } else {
            let whole = self
                .sizes
                .fixed(true, true)
                .saturating_add(self.sizes.layer.saturating_mul(u64::from(self.layers)));
            Why::Memory {
                layers: self.layers,
                needed: Quantity::from_bytes(whole).rounded(),
                nodes: count(usable).min(self.max),
                held: held.min(u64::from(self.layers)),
            }
        };
        Unplaceable { why, nodes: reasons }
    }

    /// As [`Rules::refuse`] for tensor sharding.
    fn refuse_sharing(
        &self,
        usable: &[(Preference, &NodeState)],
        mut reasons: BTreeMap<String, NodeReason>,
    ) -> Unplaceable {
        for (preference, _) in usable {
            let free = Quantity::from_bytes(preference.free_bytes.0).rounded();
            reasons.insert(preference.name.clone(), NodeReason::Free { free });
        }
        let (min, most) = (self.min, self.most(count(usable)));
        let even = (min..=most).rev().find(|ranks| self.divides(*ranks).is_none());
        let why = match (even, self.divides(most)) {
            _ if reasons.is_empty() => Why::NoNodes,
            _ if most < min => Why::TooFewNodes { wanted: min, usable: count(usable) },
            (Some(ranks), _) => Why::ShareMemory {
                ranks,
                needed: Quantity::from_bytes(self.share_bytes(1, ranks)).rounded(),
                first: Quantity::from_bytes(self.share_bytes(0, ranks)).rounded(),
            },
            (None, Some(uneven)) => {
                let model = self.model.metadata.name.clone().unwrap_or_default();
                let ranks = if min < most { format!("{min} to {most}") } else { min.to_string() };
                Why::Uneven { model, ranks, uneven }
            }
            (None, None) => unreachable!("`most` is one of those that were tried"),
        };
        Unplaceable { why, nodes: reasons }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::testing::{instance_spec, model, node_state};

    const MIB: u64 = 1 << 20;
    const OVERHEAD_MIB: u64 = OVERHEAD_BYTES / MIB;

    fn ranks(placement: &Placement) -> Vec<(String, String)> {
        placement.ranks.iter().map(|rank| (rank.node.clone(), rank.layers.to_string())).collect()
    }

    fn check(nodes: &[NodeState], edit: impl Fn(&mut InferenceInstanceSpec), expect: &str) {
        let (model, mut instance) = (model(8), instance_spec("tiny"));
        edit(&mut instance);
        let answer = place(&Placing { model: &model, instance: &instance, nodes });
        let text = match &answer {
            Ok(placement) => ranks(placement)
                .iter()
                .map(|(node, layers)| format!("{node} {layers}"))
                .collect::<Vec<_>>()
                .join(", "),
            Err(unplaceable) => unplaceable.to_string(),
        };
        assert_eq!(text, expect);
    }

    #[test]
    fn takes_as_few_nodes_as_needed_with_most_memory_first() {
        let nodes = [node_state("a", 1 << 30), node_state("b", 2 << 30), node_state("c", 2 << 30)];
        check(&nodes, |_| {}, "b 0-7");
        check(&nodes, |i| i.nodes.min = Some(2), "b 0-3, c 4-7");
        check(&nodes, |i| i.nodes.min = Some(3), "b 0-2, c 3-5, a 6-7");
        let small = OVERHEAD_BYTES + 9 * MIB;
        let nodes = [node_state("a", small), node_state("b", small)];
        check(&nodes, |_| {}, "a 0-3, b 4-7");
    }

    #[test]
    fn says_what_each_node_lacks() {
        let ready = || node_state("a", 1 << 30);
        check(&[], |_| {}, "no node is known");
        let nodes = [
            NodeState {
                ready: Err("no heartbeat for 10 s".to_owned()),
                ..node_state("a", 1 << 30)
            },
            NodeState { schedulable: false, ..node_state("b", 1 << 30) },
            NodeState { free_bytes: None, ..node_state("c", 1 << 30) },
            NodeState { has_address: false, ..node_state("d", 1 << 30) },
        ];
        check(
            &nodes,
            |_| {},
            "1 node(s) wanted, 0 usable: a: not ready: no heartbeat for 10 s; \
             b: marked unschedulable; c: has not reported its memory; d: has no address",
        );
        check(
            &[ready()],
            |i| {
                i.nodes.selector = [("rack".to_owned(), "1".to_owned())].into();
            },
            "1 node(s) wanted, 0 usable: a: has no label rack=1",
        );
        check(
            &[ready()],
            |i| i.nodes.min = Some(2),
            "2 node(s) wanted, 1 usable: a: 1Gi free, room for 8 layer(s)",
        );
        check(
            &[node_state("a", 100 * MIB), node_state("b", (OVERHEAD_MIB + 4) * MIB)],
            |_| {},
            "8 layers need 272Mi, and 2 node(s) can hold only 2 of them: \
             a: 100Mi free, one layer and its overhead need 258Mi; \
             b: 260Mi free, room for 2 layer(s)",
        );
        check(
            &[ready()],
            |i| i.transport = Transport::Jaccl,
            "transport Jaccl is not supported yet; use Auto or Ring",
        );
        check(
            &[ready()],
            |i| i.nodes.min = Some(9),
            "nodes.min is 9, but model tiny has only 8 layers",
        );
        check(
            &[ready()],
            |i| (i.nodes.min, i.nodes.max) = (Some(3), Some(2)),
            "nodes.min is 3, nodes.max is 2",
        );
        check(
            &[ready()],
            |i| i.context_length = Some(4096),
            "contextLength is 4096, but model tiny goes up to 1024",
        );
    }

    #[test]
    fn tensor_sharding_takes_a_number_of_nodes_that_divides_the_model() {
        let nodes = |free: u64| ["a", "b", "c", "d", "e"].map(|name| node_state(name, free));
        let tensor = |min: u32| {
            move |i: &mut InferenceInstanceSpec| {
                (i.sharding, i.nodes.min) = (Sharding::Tensor, Some(min));
            }
        };
        check(&nodes(1 << 30), tensor(2), "a 0-7, b 0-7");
        check(&nodes(1 << 30), tensor(3), "a 0-7, b 0-7, c 0-7, d 0-7");
        check(&nodes(1 << 30)[..1], tensor(1), "a 0-7");
        check(
            &nodes(1 << 30)[..3],
            tensor(3),
            "model tiny can't be split over 3 ranks: 8 attention heads do not divide by 3: \
             a: 1Gi free; b: 1Gi free; c: 1Gi free",
        );
        check(
            &nodes(1 << 30)[..2],
            tensor(3),
            "3 node(s) wanted, 2 usable: a: 1Gi free; b: 1Gi free",
        );
        // 8 MiB of weights and 8 MiB of cache: 16, 8 or 4 on each of 1, 2 or 4 ranks.
        check(&nodes(OVERHEAD_BYTES + 15 * MIB), tensor(1), "a 0-7, b 0-7");
        check(&nodes(OVERHEAD_BYTES + 4 * MIB), tensor(1), "a 0-7, b 0-7, c 0-7, d 0-7");
        check(
            &nodes(OVERHEAD_BYTES + 3 * MIB)[..2],
            tensor(1),
            "each of 2 rank(s) needs 264Mi, the first 264Mi: a: 259Mi free; b: 259Mi free",
        );
    }

    #[test]
    fn the_first_of_a_team_has_the_head() {
        let (mut model, mut instance) = (model(2), instance_spec("tiny"));
        (model.spec.weights.embedding, model.spec.weights.head) = (MIB, 6 * MIB);
        (instance.sharding, instance.nodes.min) = (Sharding::Tensor, Some(2));
        let nodes = [
            node_state("small", OVERHEAD_BYTES + 3 * MIB),
            node_state("big", OVERHEAD_BYTES + 9 * MIB),
        ];
        let placement =
            place(&Placing { model: &model, instance: &instance, nodes: &nodes }).unwrap();
        assert_eq!(placement.sharding, ShardingKind::Tensor);
        let ranks: Vec<(&str, u64)> = (placement.ranks.iter())
            .map(|r| (r.node.as_str(), r.memory_bytes - OVERHEAD_BYTES))
            .collect();
        assert_eq!(ranks, [("big", 9 * MIB), ("small", 3 * MIB)]);
        model.spec.shardings = vec![ShardingKind::Pipeline];
        let refusal = place(&Placing { model: &model, instance: &instance, nodes: &nodes });
        let expect = "model tiny can't be split as Tensor: its `shardings` leave that out";
        assert_eq!(refusal.unwrap_err().to_string(), expect);
    }

    #[test]
    fn another_order_is_found_when_only_that_leaves_room_for_the_head() {
        let (mut model, mut instance) = (model(2), instance_spec("tiny"));
        model.spec.weights.embedding = 0;
        model.spec.weights.head = 6 * MIB;
        instance.nodes.min = Some(2);
        let nodes = [
            node_state("big", OVERHEAD_BYTES + 9 * MIB),
            node_state("small", OVERHEAD_BYTES + 3 * MIB),
        ];
        let placement =
            place(&Placing { model: &model, instance: &instance, nodes: &nodes }).unwrap();
        let order: Vec<&str> = placement.ranks.iter().map(|r| r.node.as_str()).collect();
        assert_eq!(order, ["small", "big"]);
    }

    /// Whether these nodes, in this order, can hold the model: tries all splits by recursion.
    fn order_works(order: &[u64], layers: u64, sizes: &Sizes, first: bool) -> bool {
        let Some((free, rest)) = order.split_first() else {
            return layers == 0;
        };
        (1..=layers).any(|n| {
            sizes.fixed(first, rest.is_empty()) + n * sizes.layer <= *free
                && order_works(rest, layers - n, sizes, false)
        })
    }

    fn permutations(items: &[u64], take: usize) -> Vec<Vec<u64>> {
        if take == 0 {
            return vec![vec![]];
        }
        let mut all = Vec::new();
        for index in 0..items.len() {
            let mut rest = items.to_vec();
            let chosen = rest.remove(index);
            for mut tail in permutations(&rest, take - 1) {
                tail.insert(0, chosen);
                all.push(tail);
            }
        }
        all
    }

    proptest! {
        /// Against every subset in every order: the number of nodes is the least that works, and a
        /// refusal is right.
        #[test]
        fn fewest_nodes_and_right_refusals(
            free in prop::collection::vec(0u64..14, 0..5),
            layers in 1u32..6,
            embedding in 0u64..6,
            head in 0u64..6,
            min in 1u32..3,
        ) {
            let (mut model, mut instance) = (model(layers), instance_spec("tiny"));
            model.spec.weights.embedding = embedding * MIB;
            model.spec.weights.head = head * MIB;
            instance.nodes.min = Some(min);
            let free: Vec<u64> = free.iter().map(|mib| OVERHEAD_BYTES - MIB + mib * MIB).collect();
            let nodes: Vec<NodeState> = free
                .iter()
                .enumerate()
                .map(|(index, free)| node_state(&format!("n{index}"), *free))
                .collect();
            let sizes = Sizes::new(&model.spec, 1024, 1);
            let least = (min as usize..=free.len().min(layers as usize)).find(|ranks| {
                permutations(&free, *ranks)
                    .iter()
                    .any(|order| order_works(order, u64::from(layers), &sizes, true))
            });
            let answer = place(&Placing { model: &model, instance: &instance, nodes: &nodes });
            match answer {
                Ok(placement) => {
                    prop_assert_eq!(Some(placement.ranks.len()), least);
                    let mut next = 0;
                    for rank in &placement.ranks {
                        let node = nodes.iter().find(|n| n.name == rank.node).unwrap();
                        prop_assert!(rank.memory_bytes <= node.free_bytes.unwrap());
                        let range = rank.layers.range();
                        let share = Share {
                            sharding: ShardingKind::Pipeline,
                            rank: 0,
                            world_size: placement.ranks.len() as u32,
                            layers: range.clone(),
                        };
                        prop_assert_eq!(
                            rank.memory_bytes,
                            memory_needed(&model.spec, 1024, &share)
                        );
                        prop_assert_eq!(range.start, next);
                        next = range.end;
                    }
                    prop_assert_eq!(next, layers);
                }
                Err(unplaceable) => {
                    prop_assert_eq!(least, None);
                    let about_nodes = min <= layers;
                    let named = if about_nodes { nodes.len() } else { 0 };
                    prop_assert_eq!(unplaceable.nodes.len(), named);
                }
            }
        }
    }

    #[test]
    fn a_thousand_nodes_are_no_burden() {
        let nodes: Vec<NodeState> = (0..1000)
            .map(|index| node_state(&format!("n{index:04}"), OVERHEAD_BYTES + 5 * MIB))
            .collect();
        let (model, instance) = (model(126), instance_spec("tiny"));
        let placement =
            place(&Placing { model: &model, instance: &instance, nodes: &nodes }).unwrap();
        assert_eq!(placement.ranks.len(), 63);
    }
}
