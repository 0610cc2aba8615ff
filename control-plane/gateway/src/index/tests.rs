use serde_json::{Value, json};

use super::*;

/// 2026-01-02T03:04:05Z.
const NOW: i64 = 1_767_323_045;

fn instance(
    namespace: &str,
    name: &str,
    model: &str,
    replicas: &[(u32, u64, bool)],
) -> InferenceInstance {
    let replicas: Vec<_> = replicas
        .iter()
        .map(|(index, epoch, ready)| {
            json!({"index": index, "epoch": epoch, "nodes": ["a"], "ready": ready,
                   "endpoint": ready.then(|| format!("10.0.0.{index}:{epoch}"))})
        })
        .collect();
    serde_json::from_value(json!({
        "apiVersion": "exo.dev/v1alpha1", "kind": "InferenceInstance",
        "metadata": {"namespace": namespace, "name": name,
                     "creationTimestamp": "2026-01-02T03:04:05Z"},
        "spec": {"model": model, "seed": 7},
        "status": {"replicas": replicas, "conditions": [{
            "type": "Ready", "status": "False", "reason": "NoCapacity",
            "message": "no node has 19Gi free", "lastTransitionTime": "2026-01-02T03:04:05Z"}]},
    }))
    .unwrap()
}

fn model(name: &str, repo: Option<&str>) -> Model {
    serde_json::from_value(json!({
        "apiVersion": "exo.dev/v1alpha1", "kind": "Model", "metadata": {"name": name},
        "spec": {"source": {"repo": repo}, "weights": {"layer": 1, "embedding": 1, "head": 1},
            "architecture": {"modelType": "llama", "layers": 2, "hiddenSize": 8, "heads": 2,
                "kvHeads": 2, "headDim": 4, "vocabSize": 16, "contextLength": 32}},
    }))
    .unwrap()
}

fn endpoints(index: &Index, name: &str) -> Option<Vec<String>> {
    let served = index.lookup(name)?;
    Some(served.targets.into_iter().map(|t| t.endpoint).collect())
}

#[test]
fn a_name_is_an_instance_then_a_model_then_a_repository() {
    let mut index = Index::default();
    assert!(!index.is_complete());
    index.replace_instances(
        &[
            instance("default", "chat", "llama-70b", &[(0, 3, true), (1, 1, false)]),
            instance("default", "second", "llama-70b", &[(2, 4, true)]),
        ],
        NOW,
    );
    index.replace_models(&[
        model("llama-70b", Some("meta/llama")),
        model("unused", Some("meta/unused")),
    ]);
    assert!(index.is_complete());

    let both = || Some(vec!["10.0.0.0:3".to_owned(), "10.0.0.2:4".to_owned()]);
    assert_eq!(endpoints(&index, "chat"), Some(vec!["10.0.0.0:3".to_owned()]));
    assert_eq!(endpoints(&index, "default/chat"), endpoints(&index, "chat"));
    assert_eq!(endpoints(&index, "llama-70b"), both());
    assert_eq!(endpoints(&index, "meta/llama"), both());
    for unknown in ["", "meta/unused", "unused", "other/chat", "CHAT"] {
        assert_eq!(endpoints(&index, unknown), None, "{unknown}");
    }
    let served = index.lookup("chat").unwrap();
    assert_eq!(served.seed, Some(7));
    assert_eq!(served.waiting_for.as_deref(), Some("NoCapacity: no node has 19Gi free"));
}

#[test]
fn what_is_tried_later_says_when() {
    let check = |second: Option<&str>, generation: i64, expect: Option<i64>| {
        let mut object = instance("default", "chat", "m", &[(0, 3, false), (1, 1, false)]);
        object.metadata.generation = Some(generation);
        let status = object.status.as_mut().unwrap();
        status.observed_generation = Some(1);
        let times = [Some("2026-01-02T03:04:05Z"), second];
        for (replica, time) in status.replicas.iter_mut().zip(times) {
            replica.retry_after = time.map(|time| serde_json::from_value(json!(time)).unwrap());
        }
        let mut index = Index::default();
        index.apply_instance(&object, NOW);
        assert_eq!(index.lookup("chat").unwrap().not_before, expect);
        index.apply_instance(&instance("default", "other", "m", &[(0, 1, false)]), NOW);
        assert_eq!(index.lookup("m").unwrap().not_before, None, "the other may come first");
    };
    check(Some("2026-01-02T03:00:00Z"), 1, Some(1_767_322_800));
    check(None, 1, None);
    check(Some("2026-01-02T03:00:00Z"), 2, None);
}

/// Of two replicas, as the controller reports them.
fn waiting(reason: &str, phase: &str, placed_at: &str, replicas: &[Value]) -> InferenceInstance {
    let mut object = instance("default", "chat", "m", &[]);
    object.spec.replicas = 2;
    object.metadata.generation = Some(2);
    object.status = serde_json::from_value(json!({
        "phase": phase, "observedGeneration": 2, "replicas": replicas,
        "conditions": [
            {"type": "Placed", "status": "False", "reason": reason, "message": "m",
             "lastTransitionTime": placed_at},
            {"type": "Ready", "status": "False", "reason": reason, "message": "m",
             "lastTransitionTime": "2026-01-02T03:04:05Z"}]}))
    .unwrap();
    object
}

fn replica(index: u32, epoch: u64, more: &Value) -> Value {
    let mut replica = json!({"index": index, "epoch": epoch, "nodes": [], "ready": false});
    replica.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    replica
}

fn stuck_since(index: &Index) -> Option<i64> {
    index.lookup("chat").unwrap().stuck_since
}

#[test]
fn what_only_somebody_can_change_is_stuck() {
    // A quarter of an hour after Ready became False.
    const PLACED_AT: i64 = NOW + 900;
    let check = |reason: &str, phase: &str, replicas: &[Value], expect: Option<i64>| {
        let mut object = waiting(reason, phase, "2026-01-02T03:19:05Z", replicas);
        let mut index = Index::default();
        index.apply_instance(&object, PLACED_AT + 1);
        assert_eq!(stuck_since(&index), expect, "{reason} {phase} {replicas:?}");
        index.apply_instance(&object, PLACED_AT + 2);
        assert_eq!(stuck_since(&index), expect, "again {reason} {phase}");
        // A verdict on an older spec is none.
        object.metadata.generation = Some(3);
        index.apply_instance(&object, PLACED_AT + 3);
        assert_eq!(stuck_since(&index), None, "{reason} {phase}");
    };
    let (never, once) = (|index| replica(index, 0, &json!({})), |i| replica(i, 3, &json!({})));
    let why = "shard chat-0-a1-0 on b: WeightsNotFound: no folder `x`";
    let lacked = |index| replica(index, 1, &json!({"nodes": ["b"], "lastFailure": why}));
    let lacks = |index| {
        let mut lacking = lacked(index);
        lacking["retryAfter"] = json!("2026-01-02T03:10:05Z");
        lacking
    };
    let tried = |at: &str| replica(1, 3, &json!({"retryAfter": at, "failures": 2}));
    let stops = |index| replica(index, 3, &json!({"nodes": ["a"]}));
    let (first, grace) = (Some(PLACED_AT + 5), Some(PLACED_AT + 20));
    check("Unplaceable", "Pending", &[never(0)], grace);
    check("Unplaceable", "Pending", &[never(0), once(1)], grace);
    check("Unplaceable", "Starting", &[never(0), once(1)], None);
    check("ModelNotFound", "Pending", &[], first);
    check("NameTooLong", "Pending", &[never(0)], first);
    check("NoReplicas", "Pending", &[stops(4)], Some(0));
    check("WeightsNotFound", "Failed", &[lacks(0)], Some(0));
    check("WeightsNotFound", "Failed", &[lacks(0), lacks(1)], Some(0));
    check("ShardFailed", "Failed", &[once(0)], None);
    check("Starting", "Starting", &[stops(0)], None);
    // The other one is on its way, or tried again.
    check("Unplaceable", "Pending", &[never(0), stops(1)], None);
    check("Unplaceable", "Failed", &[never(0), stops(1)], None);
    check("ModelNotFound", "Pending", &[once(0), stops(1)], None);
    check("WeightsNotFound", "Failed", &[lacks(0), stops(1)], None);
    check("WeightsNotFound", "Failed", &[lacks(0), once(1)], None);
    check("WeightsNotFound", "Failed", &[lacks(0), lacked(1)], None);
    let soon = [never(0), tried("2026-01-02T03:20:05Z")];
    check("Unplaceable", "Failed", &soon, Some(PLACED_AT + 60 + 20));
    check("Unplaceable", "Pending", &[never(0), tried("2026-01-02T03:10:05Z")], grace);
    // One that is not wanted any more comes not back.
    check("Unplaceable", "Pending", &[never(0), stops(2)], grace);
}

#[test]
fn what_lost_its_place_just_now_is_waited_for() {
    let since = "2026-01-02T03:04:05Z";
    let waiting = |reason: &str, phase: &str, second: Value| {
        waiting(reason, phase, since, &[replica(0, 0, &json!({})), second])
    };
    let unplaceable = || waiting("Unplaceable", "Pending", replica(1, 3, &json!({})));
    let serving = || waiting("Unplaceable", "Degraded", replica(1, 3, &json!({"nodes": ["a"]})));
    let none_wanted = || waiting("NoReplicas", "Pending", replica(1, 3, &json!({})));
    let mut index = Index::default();
    index.apply_instance(&unplaceable(), NOW + 1000);
    assert_eq!(stuck_since(&index), Some(NOW + 20), "of what was before, the condition tells");
    for earlier in [serving(), none_wanted()] {
        index.apply_instance(&earlier, NOW + 2000);
        index.apply_instance(&unplaceable(), NOW + 3000);
        assert_eq!(stuck_since(&index), Some(NOW + 3020));
        index.apply_instance(&unplaceable(), NOW + 3010);
        assert_eq!(stuck_since(&index), Some(NOW + 3020), "no news");
        index.replace_instances(&[unplaceable()], NOW + 3015);
        assert_eq!(stuck_since(&index), Some(NOW + 3020), "nor is a new list");
    }
}

#[test]
fn what_is_stuck_is_not_listed() {
    let mut stuck = instance("default", "stuck", "m", &[(0, 3, false)]);
    let status = stuck.status.as_mut().unwrap();
    status.conditions[0].reason = "Unplaceable".to_owned();
    status.replicas[0].nodes.clear();
    let mut index = Index::default();
    index.apply_instance(&stuck, NOW);
    let ids = |index: &Index, now_s| -> Vec<String> {
        index.list(now_s).into_iter().map(|listed| listed.id).collect()
    };
    assert_eq!(ids(&index, 1_767_323_064), ["stuck"], "its nodes may come back");
    assert_eq!(ids(&index, 1_767_323_065), [""; 0]);
    assert!(index.lookup("m").unwrap().is_stuck(1_767_323_065));
    index.apply_instance(&instance("default", "starting", "m", &[(0, 1, false)]), NOW);
    assert_eq!(ids(&index, 1_767_323_065), ["starting"]);
    assert!(!index.lookup("m").unwrap().is_stuck(1_767_323_065), "the other one serves it");
    index.apply_instance(&instance("default", "stuck", "m", &[(0, 4, true)]), NOW);
    assert_eq!(ids(&index, 1_767_323_065), ["starting", "stuck"]);
}

#[test]
fn a_new_epoch_is_another_replica() {
    let mut index = Index::default();
    index.apply_instance(&instance("default", "chat", "m", &[(0, 3, true)]), NOW);
    let old = index.lookup("chat").unwrap().targets[0].replica.clone();
    assert!(index.is_ready(&old));
    index.apply_instance(&instance("default", "chat", "m", &[(0, 4, true)]), NOW);
    assert!(!index.is_ready(&old));
    index.delete_instance(&instance("default", "chat", "m", &[]));
    assert_eq!(index.lookup("chat"), None);
}

#[test]
fn a_name_in_two_namespaces_is_listed_twice() {
    let mut index = Index::default();
    index.apply_instance(&instance("team", "chat", "m", &[]), NOW);
    index.apply_instance(&instance("default", "chat", "n", &[]), NOW);
    let ids: Vec<_> = index.list(0).into_iter().map(|l| l.id).collect();
    assert_eq!(ids, ["chat", "team/chat"]);
    assert_eq!(index.lookup("chat").unwrap().model, "n");
    assert_eq!(index.lookup("team/chat").unwrap().model, "m");
    assert_eq!(index.list(0)[0].created, 1_767_323_045);
}
