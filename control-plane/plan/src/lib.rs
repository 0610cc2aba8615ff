//! Pure decisions: which nodes run which layers, and what to do next about an instance.
//!
//! Owns all policy of the control plane: layer partition, placement, the life of epochs, restart
//! back-off, node health. Every function takes what was observed, the present time among it, and
//! returns what shall be done, with reasons. Never: IO, clocks, randomness, logging.

mod health;
mod partition;
mod place;
mod preview;
mod reconcile;
mod tensor;
#[cfg(test)]
mod testing;

pub use health::{HEARTBEAT_LIMIT, Heartbeats, heartbeat_lost};
pub use partition::{StageCapacity, partition};
pub use place::{
    NodeReason, NodeState, Placement, Placing, RankPlacement, Share, Unplaceable, Why,
    memory_needed, place,
};
pub use preview::preview;
pub use reconcile::{Action, Decision, Observed, create_refused, reconcile, release_lost};
pub use tensor::Uneven;
