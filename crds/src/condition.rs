//! Conditions as the Kubernetes API conventions define them.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};

/// Sets one condition. Its `last_transition_time` (now) counts only when its status changes; else
/// the earlier time stays. Conditions stay ordered by type.
pub fn set_condition(conditions: &mut Vec<Condition>, mut new: Condition) {
    let same = conditions.iter().find(|c| c.type_ == new.type_ && c.status == new.status);
    if let Some(same) = same {
        new.last_transition_time = same.last_transition_time.clone();
    }
    conditions.retain(|c| c.type_ != new.type_);
    conditions.push(new);
    conditions.sort_by(|a, b| a.type_.cmp(&b.type_));
}

/// A condition that came to be `now`; it belongs to no generation until the caller says so.
pub fn condition(kind: &str, is: bool, reason: &str, message: &str, now: &Time) -> Condition {
    Condition {
        type_: kind.to_owned(),
        status: if is { "True" } else { "False" }.to_owned(),
        reason: reason.to_owned(),
        message: message.to_owned(),
        observed_generation: None,
        last_transition_time: now.clone(),
    }
}
