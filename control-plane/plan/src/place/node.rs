//! What placement sees of a node. Owns the reading of the resource; decides nothing.

use std::collections::BTreeMap;

use exo_crds::{Node, Quantity, TransportKind};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;

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

fn readiness(conditions: &[Condition]) -> Result<(), String> {
    match conditions.iter().find(|c| c.type_ == "Ready") {
        Some(ready) if ready.status == "True" => Ok(()),
        Some(ready) => Err(ready.message.clone()),
        None => Err("its agent has not reported yet".to_owned()),
    }
}
