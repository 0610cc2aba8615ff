//! Tells from heartbeats which nodes are lost.

use std::{collections::BTreeMap, time::Duration};

use exo_crds::Node;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, MicroTime, Time};

/// Without a new heartbeat for this long a node is lost: five periods of the agent's, so that one
/// slow write or a change of leader does not end epochs.
pub const HEARTBEAT_LIMIT: Duration = Duration::from_secs(10);

/// Reason of the Ready condition of a lost node.
const HEARTBEAT_LOST: &str = "HeartbeatLost";

/// When each node's heartbeat was last seen to change, on the observer's own clock: clocks of
/// other machines are never compared with it. A fresh observer therefore also waits a full limit
/// before it calls any node lost.
#[derive(Clone, Debug, Default)]
pub struct Heartbeats {
    seen: BTreeMap<String, (MicroTime, Duration)>,
}

impl Heartbeats {
    /// Takes note of all nodes and returns the names of those overdue. `at` is time since any fixed
    /// moment. Nodes that never reported are left out: they are not Ready anyway.
    pub fn observe(&mut self, nodes: &[Node], at: Duration) -> Vec<String> {
        let mut seen = BTreeMap::new();
        let mut overdue = Vec::new();
        for node in nodes {
            let (Some(name), Some(beat)) = (
                node.metadata.name.as_ref(),
                node.status.as_ref().and_then(|s| s.last_heartbeat_time.clone()),
            ) else {
                continue;
            };
            let since = match self.seen.get(name) {
                Some((known, since)) if *known == beat => *since,
                _ => at,
            };
            if at.saturating_sub(since) >= HEARTBEAT_LIMIT {
                overdue.push(name.clone());
            }
            seen.insert(name.clone(), (beat, since));
        }
        self.seen = seen;
        overdue
    }
}

/// The conditions to write on an overdue node; `None` when it is known to be down already.
pub fn heartbeat_lost(node: &Node, now: &Time) -> Option<Vec<Condition>> {
    let mut conditions = node.status.as_ref()?.conditions.clone();
    let ready = conditions.iter().position(|c| c.type_ == "Ready");
    if let Some(ready) = ready
        && conditions[ready].status != "True"
    {
        return None;
    }
    conditions.retain(|c| c.type_ != "Ready");
    conditions.push(Condition {
        type_: "Ready".to_owned(),
        status: "Unknown".to_owned(),
        reason: HEARTBEAT_LOST.to_owned(),
        message: format!("no sign of life from the agent for {} s", HEARTBEAT_LIMIT.as_secs()),
        observed_generation: None,
        last_transition_time: now.clone(),
    });
    conditions.sort_by(|a, b| a.type_.cmp(&b.type_));
    Some(conditions)
}

#[cfg(test)]
mod tests {
    use k8s_openapi::jiff::Timestamp;

    use super::*;
    use crate::testing::node;

    fn beating(name: &str, beat: i64) -> Node {
        let mut node = node(name, 1);
        let time = MicroTime(Timestamp::from_second(beat).unwrap());
        node.status.as_mut().unwrap().last_heartbeat_time = Some(time);
        node
    }

    #[test]
    fn a_node_is_overdue_when_its_heartbeat_stands_still() {
        let mut heartbeats = Heartbeats::default();
        let mut at = |seconds, a, b| {
            heartbeats.observe(&[beating("a", a), beating("b", b)], Duration::from_secs(seconds))
        };
        // A stale time stamp alone says nothing: the observer has only just begun to look.
        assert!(at(0, 0, 1_000_000).is_empty());
        assert!(at(9, 0, 1_000_009).is_empty());
        assert_eq!(at(10, 0, 1_000_010), ["a"]);
        assert!(at(11, 2, 1_000_010).is_empty());
        assert_eq!(at(30, 3, 1_000_010), ["b"]);
    }

    #[test]
    fn a_lost_node_is_marked_once() {
        let mut node = node("a", 1);
        let now = Time(Timestamp::from_second(100).unwrap());
        let conditions = heartbeat_lost(&node, &now).unwrap();
        assert_eq!(conditions.len(), 1);
        assert_eq!(
            (conditions[0].status.as_str(), conditions[0].reason.as_str()),
            ("Unknown", HEARTBEAT_LOST)
        );
        node.status.as_mut().unwrap().conditions = conditions;
        assert_eq!(heartbeat_lost(&node, &now), None);
    }
}
