//! The words: status, phase and conditions of an instance.

use exo_crds::{
    InferenceInstance, InferenceInstanceStatus, InstancePhase, ReplicaStatus, Shard, condition,
    set_condition,
};
use k8s_openapi::jiff::Timestamp;

use super::{State, by_rank, phase_of, whole_seconds};

/// Puts the replicas together.
pub(super) fn summarise(
    instance: &InferenceInstance,
    before: &InferenceInstanceStatus,
    replicas: Vec<(ReplicaStatus, State)>,
    retired: Vec<ReplicaStatus>,
    now: Timestamp,
) -> InferenceInstanceStatus {
    let wanted = replicas.len();
    let ready = replicas.iter().filter(|(status, _)| status.ready).count();
    let states: Vec<&State> = replicas.iter().map(|(_, state)| state).collect();
    let phase = phase(&states, ready);
    let mut conditions = before.conditions.clone();
    let mut set = |kind: &str, (is, reason, message): (bool, &str, String)| {
        let mut new = condition(kind, is, reason, &message, &whole_seconds(now));
        new.observed_generation = instance.metadata.generation;
        set_condition(&mut conditions, new);
    };
    set("Placed", placed(&states));
    set("Ready", readiness(&states, ready));
    let nodes: Vec<&str> =
        replicas.iter().flat_map(|(status, _)| status.nodes.iter().map(String::as_str)).collect();
    InferenceInstanceStatus {
        phase: Some(phase),
        observed_generation: instance.metadata.generation,
        ready_replicas: ready as u32,
        replica_count: wanted as u32,
        ready: Some(format!("{ready}/{wanted}")),
        nodes: (!nodes.is_empty()).then(|| nodes.join(",")),
        conditions,
        replicas: replicas.into_iter().map(|(status, _)| status).chain(retired).collect(),
    }
}

fn phase(states: &[&State], ready: usize) -> InstancePhase {
    let any = |test: fn(&State) -> bool| states.iter().any(|state| test(state));
    if ready > 0 && ready == states.len() {
        InstancePhase::Ready
    } else if ready > 0 {
        InstancePhase::Degraded
    } else if any(|state| matches!(state, State::Starting(_))) {
        InstancePhase::Starting
    } else if any(|state| matches!(state, State::BackOff { .. })) {
        InstancePhase::Failed
    } else {
        InstancePhase::Pending
    }
}

fn placed(states: &[&State]) -> (bool, &'static str, String) {
    if states.is_empty() {
        return (false, "NoReplicas", "no replicas are wanted".to_owned());
    }
    for (index, state) in states.iter().enumerate() {
        let (reason, message) = match state {
            State::Ready | State::Starting(_) => continue,
            State::Stopping(message) => ("WaitingForShards", message),
            State::BackOff { message, .. } => ("BackOff", message),
            State::Unplaceable { reason, message } => (*reason, message),
        };
        return (false, reason, about(states, index, message));
    }
    (true, "Placed", "every replica has its nodes".to_owned())
}

fn readiness(states: &[&State], ready: usize) -> (bool, &'static str, String) {
    if states.is_empty() {
        return (false, "NoReplicas", "no replicas are wanted".to_owned());
    }
    for (index, state) in states.iter().enumerate() {
        let (reason, message) = match state {
            State::Ready => continue,
            State::Starting(message) => ("Starting", message),
            State::Stopping(message) => ("Stopping", message),
            State::BackOff { reason, message } => (*reason, message),
            State::Unplaceable { reason, message } => (*reason, message),
        };
        return (false, reason, about(states, index, message));
    }
    let message = format!("{ready} of {} replica(s) answer", states.len());
    (true, "AllReplicasReady", message)
}

/// With several replicas, which one it is about.
fn about(states: &[&State], index: usize, message: &str) -> String {
    if states.len() == 1 { message.to_owned() } else { format!("replica {index}: {message}") }
}

/// Where each rank is on its way.
pub(super) fn progress(shards: &[&Shard], status: &ReplicaStatus) -> String {
    let ranks: Vec<String> = by_rank(shards)
        .iter()
        .map(|shard| {
            format!("rank {} {:?} on {}", shard.spec.rank, phase_of(shard), shard.spec.node)
        })
        .collect();
    let mut text = ranks.join(", ");
    match &status.last_failure {
        Some(failure) if status.failures == 0 => {
            text.push_str(&format!("; the last epoch ended: {failure}"));
        }
        Some(failure) => {
            text.push_str(&format!("; {} failure(s) before, the last: {failure}", status.failures));
        }
        None => {}
    }
    text
}

/// What failed, and when the next try is.
pub(super) fn back_off(status: &ReplicaStatus) -> String {
    let failure = status.last_failure.as_deref().unwrap_or("failed");
    match &status.retry_after {
        Some(time) if status.failures == 0 => format!("{failure}; next try after {}", time.0),
        Some(time) => {
            format!("{failure}; {} failure(s) in a row, next try after {}", status.failures, time.0)
        }
        None => failure.to_owned(),
    }
}
