//! Where a replica would go if it were asked for now: for people, before they ask.

use exo_crds::Model;

use crate::{NodeState, Observed, Placement, Placing, Unplaceable, place, reconcile::node_states};

/// What the instance controller would decide for one more replica of `observed.instance`, and the
/// nodes as it sees them. `model` is the instance's.
///
/// # Errors
/// [`Unplaceable`], with a reason for every node.
pub fn preview(
    observed: &Observed<'_>,
    model: &Model,
) -> (Vec<NodeState>, Result<Placement, Unplaceable>) {
    let nodes = node_states(observed);
    let instance = &observed.instance.spec;
    let placed = place(&Placing { model, instance, nodes: &nodes });
    (nodes, placed)
}
