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

mod arrange;
mod memory;
mod node;
mod refusal;
#[cfg(test)]
mod tests;

use std::{cmp::Reverse, collections::BTreeMap};

use exo_crds::{
    InferenceInstanceSpec, LayerRange, Model, Sharding, ShardingKind, Transport, TransportKind,
};
use serde::Serialize;

#[cfg(test)]
pub(crate) use self::memory::OVERHEAD_BYTES;
use self::memory::Sizes;
pub use self::{
    memory::{Share, memory_needed},
    node::NodeState,
    refusal::{NodeReason, Unplaceable, Why},
};
use crate::{Uneven, tensor};

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

/// A node that may take part.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Candidate {
    preference: Preference,
    /// Whether it can use the transport; a rank on its own needs none.
    linked: bool,
}

/// Order in which nodes are taken; the fields' order is the policy.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Preference {
    free_bytes: Reverse<u64>,
    name: String,
}

/// Places one replica; the same question always gets the same answer.
///
/// # Errors
/// [`Unplaceable`], with a reason for every node.
pub fn place(question: &Placing<'_>) -> Result<Placement, Unplaceable> {
    let rules = Rules::new(question).map_err(|why| Unplaceable { why, nodes: BTreeMap::new() })?;
    let mut reasons = BTreeMap::new();
    let mut usable = Vec::new();
    for node in question.nodes {
        match rules.admit(node) {
            Ok(free_bytes) => usable.push(Candidate {
                preference: Preference { free_bytes: Reverse(free_bytes), name: node.name.clone() },
                linked: node.transports.contains(&rules.transport),
            }),
            Err(reason) => {
                reasons.insert(node.name.clone(), reason);
            }
        }
    }
    usable.sort_by(|a, b| a.preference.cmp(&b.preference));
    match rules.search(&usable, false) {
        Some(ranks) => Ok(Placement {
            sharding: rules.sharding,
            transport: rules.transport,
            context_length: rules.context_length,
            ranks,
        }),
        None => Err(rules.refuse(&usable, reasons)),
    }
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

    /// The ranks on as few of the `usable` nodes as possible, which are in order of preference. With `linked` as if all
    /// of them could use the transport.
    fn search(&self, usable: &[Candidate], linked: bool) -> Option<Vec<RankPlacement>> {
        let all = || usable.iter().map(|candidate| &candidate.preference);
        let several: Vec<&Preference> = match linked {
            true => all().collect(),
            false => {
                usable.iter().filter(|c| c.linked).map(|candidate| &candidate.preference).collect()
            }
        };
        let first: Vec<&Preference> = all().take(1).collect();
        let most = self.most(count(usable));
        let mut even = (self.min..=most).filter(|ranks| self.divides(*ranks).is_none());
        even.find_map(|ranks| {
            let nodes = if ranks == 1 { &first } else { &several };
            self.ranks_on(nodes.get(..ranks as usize)?)
        })
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
}
