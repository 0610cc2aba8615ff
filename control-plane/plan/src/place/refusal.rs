//! Why there is no placement, for people: as a whole, and for each node. Owns the reasons; changes
//! no decision.

use std::{collections::BTreeMap, fmt};

use exo_crds::{Quantity, Sharding, ShardingKind, Transport, TransportKind};
use serde::Serialize;

use super::{Candidate, Rules, count};
use crate::Uneven;

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
    #[error(
        "no node has room for the whole model, and of {usable} usable ones {linked} can use {transport:?}, which \
         several together need"
    )]
    Unlinked { transport: TransportKind, linked: u32, usable: u32 },
    #[error("the model's {layers} layers need {needed}, and {}", room(*.nodes, *.held))]
    Memory { layers: u32, needed: Quantity, nodes: u32, held: u64 },
    #[error("each of {ranks} rank(s) needs {needed}, the first {first}")]
    ShareMemory { ranks: u32, needed: Quantity, first: Quantity },
}

fn room(nodes: u32, held: u64) -> String {
    match held {
        0 => format!("none of {nodes} node(s) has room for even one of them"),
        held => format!("{nodes} node(s) have room for only {held} of them"),
    }
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
    #[error("{free} free, but its runner can't use {transport:?}, which more than one node needs")]
    Alone { free: Quantity, transport: TransportKind },
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

impl Rules<'_> {
    /// Says why none of the `usable` nodes will do; `reasons` are those of the others.
    pub(super) fn refuse(
        &self,
        usable: &[Candidate],
        mut reasons: BTreeMap<String, NodeReason>,
    ) -> Unplaceable {
        for candidate in usable {
            let reason = self.about(candidate);
            reasons.insert(candidate.preference.name.clone(), reason);
        }
        let why = if reasons.is_empty() {
            Why::NoNodes
        } else if count(usable) < self.min {
            Why::TooFewNodes { wanted: self.min, usable: count(usable) }
        } else if self.search(usable, true).is_some() {
            // They would do if they could reach each other.
            let linked = usable.iter().filter(|candidate| candidate.linked).count();
            Why::Unlinked {
                transport: self.transport,
                linked: u32::try_from(linked).unwrap_or(u32::MAX),
                usable: count(usable),
            }
        } else {
            match self.sharding {
                ShardingKind::Pipeline => self.too_few_layers(&self.team(usable)),
                ShardingKind::Tensor => self.too_small_shares(count(&self.team(usable))),
            }
        };
        Unplaceable { why, nodes: reasons }
    }

    fn about(&self, candidate: &Candidate) -> NodeReason {
        let bytes = candidate.preference.free_bytes.0;
        let free = Quantity::from_bytes(bytes).rounded();
        if !candidate.linked && self.max > 1 {
            return NodeReason::Alone { free, transport: self.transport };
        }
        if self.sharding == ShardingKind::Tensor {
            return NodeReason::Free { free };
        }
        match self.sizes.room(bytes, false, false) {
            0 => {
                let needed = self.sizes.fixed(false, false).saturating_add(self.sizes.layer);
                NodeReason::Memory { free, needed: Quantity::from_bytes(needed).rounded() }
            }
            room => NodeReason::Room { free, layers: room.min(u64::from(self.layers)) },
        }
    }

    /// The most nodes that can run the model together, those with most memory first; one can always try.
    fn team<'c>(&self, usable: &'c [Candidate]) -> Vec<&'c Candidate> {
        let linked: Vec<&Candidate> = usable.iter().filter(|candidate| candidate.linked).collect();
        let all = if linked.len() < 2 { usable.iter().take(1).collect() } else { linked };
        let most = self.most(count(&all)) as usize;
        all.into_iter().take(most).collect()
    }

    fn too_few_layers(&self, team: &[&Candidate]) -> Why {
        let room = |c: &&Candidate| self.sizes.room(c.preference.free_bytes.0, false, false);
        let held = team.iter().map(room).fold(0, u64::saturating_add);
        let layers = self.sizes.layer.saturating_mul(u64::from(self.layers));
        let whole = self.sizes.fixed(true, true).saturating_add(layers);
        Why::Memory {
            layers: self.layers,
            needed: Quantity::from_bytes(whole).rounded(),
            nodes: count(team),
            held: held.min(u64::from(self.layers)),
        }
    }

    fn too_small_shares(&self, most: u32) -> Why {
        let even = (self.min..=most).rev().find(|ranks| self.divides(*ranks).is_none());
        match (even, self.divides(most)) {
            (Some(ranks), _) => Why::ShareMemory {
                ranks,
                needed: Quantity::from_bytes(self.share_bytes(1, ranks)).rounded(),
                first: Quantity::from_bytes(self.share_bytes(0, ranks)).rounded(),
            },
            (None, Some(uneven)) => {
                let model = self.model.metadata.name.clone().unwrap_or_default();
                let min = self.min;
                let ranks = if min < most { format!("{min} to {most}") } else { min.to_string() };
                Why::Uneven { model, ranks, uneven }
            }
            (None, None) => unreachable!("`most` is one of those that were tried"),
        }
    }
}
