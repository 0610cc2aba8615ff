//! What is worth telling about a decision, as events of the instance.

use exo_crds::{InferenceInstanceStatus, ReplicaStatus, event::Occurrence};

use super::verdict::End;

/// Reasons of a Placed condition that other events tell about, or nothing at all.
const TOLD_ELSEWHERE: [&str; 4] = ["Placed", "NoReplicas", "WaitingForShards", "BackOff"];

/// A replica's way from one decision to the next.
pub(super) fn progress(before: Option<&ReplicaStatus>, after: &ReplicaStatus) -> Vec<Occurrence> {
    let unknown = ReplicaStatus::default();
    let before = before.unwrap_or(&unknown);
    let (index, epoch) = (after.index, after.epoch);
    let mut told = Vec::new();
    if epoch > before.epoch && !after.nodes.is_empty() {
        let nodes = after.nodes.join(", ");
        let note = format!("replica {index}, epoch {epoch}: placed on {nodes}");
        told.push(Occurrence::normal("Placed", note));
    }
    if let Some(failure) = &after.last_failure
        && (after.failures > before.failures || before.last_failure.as_ref() != Some(failure))
    {
        told.push(Occurrence::warning("EpochFailed", format!("replica {index}: {failure}")));
    }
    if after.ready && !before.ready {
        let note = format!("replica {index}, epoch {epoch}: every rank answers");
        told.push(Occurrence::normal("Ready", note));
    }
    told
}

/// An epoch whose shards are stopped for another reason than a failure of their own.
pub(super) fn ended(index: u32, end: &End) -> Occurrence {
    let note = format!("replica {index}: {end}");
    match end {
        End::Changed => Occurrence::normal("Replacing", note),
        End::NodeLost { .. } => Occurrence::warning("NodeLost", note),
        End::Deleted => Occurrence::warning("ShardDeleted", note),
        End::Moved => Occurrence::warning("AddressChanged", note),
        End::Failed { .. } => Occurrence::warning("EpochFailed", note),
    }
}

/// Why the instance has no place, unless that was said before. Free memory changes all the time:
/// other figures alone are nothing new.
pub(super) fn unplaceable(
    before: &InferenceInstanceStatus,
    after: &InferenceInstanceStatus,
) -> Option<Occurrence> {
    let placed = |status: &InferenceInstanceStatus| {
        status.conditions.iter().find(|c| c.type_ == "Placed").cloned()
    };
    let now = placed(after).filter(|c| !TOLD_ELSEWHERE.contains(&c.reason.as_str()))?;
    let is_known = placed(before).is_some_and(|c| {
        c.reason == now.reason && without_figures(&c.message) == without_figures(&now.message)
    });
    (!is_known).then(|| Occurrence::warning(&now.reason, now.message))
}

/// Figures with a point and a unit of their own (`1.5Gi`) are left out whole.
fn without_figures(text: &str) -> String {
    text.split_whitespace()
        .filter(|word| !word.starts_with(|c: char| c.is_ascii_digit()))
        .collect::<Vec<_>>()
        .join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn replica(epoch: u64, ready: bool, failure: Option<(u32, &str)>) -> ReplicaStatus {
        ReplicaStatus {
            epoch,
            ready,
            nodes: vec!["a".to_owned(), "b".to_owned()],
            failures: failure.map_or(0, |(count, _)| count),
            last_failure: failure.map(|(_, message)| message.to_owned()),
            ..ReplicaStatus::default()
        }
    }

    #[test]
    fn what_is_new_is_told_once() {
        let check = |before: Option<ReplicaStatus>, after: ReplicaStatus, expect: &[&str]| {
            let told = progress(before.as_ref(), &after);
            let reasons: Vec<&str> = told.iter().map(|told| told.reason.as_str()).collect();
            assert_eq!(reasons, expect, "{told:?}");
        };
        check(None, replica(1, false, None), &["Placed"]);
        check(Some(replica(1, false, None)), replica(1, false, None), &[]);
        check(Some(replica(1, false, None)), replica(1, true, None), &["Ready"]);
        check(Some(replica(1, true, None)), replica(1, true, None), &[]);
        let failed = |count, message| replica(1, false, Some((count, message)));
        check(Some(replica(1, true, None)), failed(1, "x"), &["EpochFailed"]);
        check(Some(failed(1, "x")), failed(1, "x"), &[]);
        check(Some(failed(1, "x")), failed(2, "x"), &["EpochFailed"]);
        check(Some(failed(1, "x")), failed(1, "the cause"), &["EpochFailed"]);
        check(Some(failed(2, "x")), replica(2, false, Some((2, "x"))), &["Placed"]);
        // One that was not to blame does not count.
        check(Some(replica(1, true, None)), failed(0, "x"), &["EpochFailed"]);
        check(Some(failed(0, "x")), failed(0, "x"), &[]);
    }

    #[test]
    fn figures_are_no_news() {
        let text = "node a has 1.5Gi free, 3Gi are needed";
        assert_eq!(without_figures(text), without_figures("node a has 9Gi free, 3Gi are needed"));
        assert_ne!(without_figures(text), without_figures("node b has 1.5Gi free, 3Gi are needed"));
    }
}
