//! Whether given nodes can hold a model, and who of them gets what. Owns order and layers; never
//! chooses the nodes.

use std::num::NonZeroU64;

use exo_crds::{LayerRange, ShardingKind};

use super::{Preference, RankPlacement, Rules, count};
use crate::{StageCapacity, partition};

impl Rules<'_> {
    /// The ranks on exactly these nodes, if they have room.
    pub(super) fn ranks_on(&self, nodes: &[&Preference]) -> Option<Vec<RankPlacement>> {
        match self.sharding {
            ShardingKind::Pipeline => self.arrange(nodes),
            ShardingKind::Tensor => self.share(nodes),
        }
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
}
