//! Tells that an instance can't become Ready before somebody changes something, so that nobody need
//! wait for it, and what to change. The controller goes on trying; only the command that waits gives
//! up.

use exo_crds::{GROUP, LABEL_INSTANCE, VERSION};
use serde_json::Value;

use super::wait::is_stale;
use crate::{
    jsonpath::plain,
    server::{Form, Server},
};

/// Reason of a Ready condition that no time changes: names stay.
const NAME_TOO_LONG: &str = "NameTooLong";
/// Reason of a Ready condition while a failed replica waits for its next try.
const SHARD_FAILED: &str = "ShardFailed";

/// Reason of a Ready condition of an instance that shall not run.
const NO_REPLICAS: &str = "NoReplicas";

/// Why it is hopeless; `None` when it is not, or when that can't be found out now.
pub(super) async fn reason(server: &Server, namespace: &str, instance: &Value) -> Option<String> {
    let ready = ready(instance)?;
    let text = |field: &str| ready[field].as_str().unwrap_or_default();
    if [NAME_TOO_LONG, NO_REPLICAS].contains(&text("reason")) {
        return Some(text("message").to_owned());
    }
    if text("reason") != SHARD_FAILED && instance["status"]["phase"] != "Failed" {
        return None;
    }
    let kinds = server.kinds().await.ok()?;
    let kind = kinds.find_exact(&format!("{GROUP}/{VERSION}"), "Shard").ok()?;
    let name = instance["metadata"]["name"].as_str()?;
    let selector = format!("{LABEL_INSTANCE}={name}");
    let query = [("labelSelector", selector.as_str())];
    let list: Value =
        server.get(&kind.path(Some(namespace), None), &query, Form::Json).await.ok()?;
    permanent_failure(instance, list["items"].as_array()?)
}

/// What to do about an instance that was waited for in vain, where the reason says it.
pub(super) fn advice(instance: &Value) -> Option<String> {
    let model = plain(&instance["spec"]["model"]);
    let nodes = instance["spec"]["nodes"]["min"].as_u64().filter(|min| *min > 1);
    let nodes = nodes.map_or_else(String::new, |min| format!(" --nodes {min}"));
    let advice = match ready(instance)?["reason"].as_str()? {
        "ModelNotFound" => {
            format!("apply a Model named {model}; `exoctl get models` lists those there are")
        }
        "Unplaceable" => format!(
            "start exo on another machine, free memory or ask for less; `exoctl explain placement \
             {model}{nodes}` shows what there is"
        ),
        "WeightsNotFound" => format!(
            "put the folder where the node looks for it, or correct it with `exoctl edit model \
             {model}`"
        ),
        _ => return None,
    };
    Some(format!("{advice}; exo goes on trying"))
}

/// The Ready condition, if it is about the present spec.
fn ready(instance: &Value) -> Option<&Value> {
    let conditions = instance["status"]["conditions"].as_array()?;
    let ready = conditions.iter().find(|condition| condition["type"] == "Ready")?;
    (ready["status"] != "True" && !is_stale(instance, ready)).then_some(ready)
}

/// The permanent failure of a shard of an epoch that the instance counts as its newest.
fn permanent_failure(instance: &Value, shards: &[Value]) -> Option<String> {
    let replicas = instance["status"]["replicas"].as_array()?;
    let is_newest = |shard: &&Value| {
        let spec = &shard["spec"];
        replicas.iter().any(|r| r["index"] == spec["replica"] && r["epoch"] == spec["epoch"])
    };
    let is_leaving = |shard: &Value| shard["metadata"]["deletionTimestamp"].is_string();
    shards.iter().filter(is_newest).find_map(|shard| {
        let failure = &shard["status"]["failure"];
        let failed = shard["status"]["phase"] == "Failed" && failure["permanent"] == true;
        (failed && !is_leaving(shard)).then(|| {
            let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
            format!(
                "shard {} on {}: {}: {}",
                text(&shard["metadata"]["name"]),
                text(&shard["spec"]["node"]),
                text(&failure["reason"]),
                text(&failure["message"])
            )
        })
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn shard(epoch: u64, permanent: bool) -> Value {
        json!({"metadata": {"name": format!("chat-0-a{epoch}-1")},
            "spec": {"replica": 0, "epoch": epoch, "node": "mac-2"},
            "status": {"phase": "Failed", "failure": {"reason": "BadWeights",
                "message": "no tensor `x`", "permanent": permanent}}})
    }

    #[test]
    fn only_a_permanent_failure_of_the_newest_epoch_counts() {
        let instance = json!({"status": {"replicas": [{"index": 0, "epoch": 2}]}});
        let check = |shards: &[Value], expect: Option<&str>| {
            assert_eq!(permanent_failure(&instance, shards).as_deref(), expect, "{shards:?}");
        };
        let found = Some("shard chat-0-a2-1 on mac-2: BadWeights: no tensor `x`");
        check(&[shard(2, false), shard(2, true)], found);
        check(&[shard(1, true)], None);
        check(&[shard(2, false)], None);
        let mut leaving = shard(2, true);
        leaving["metadata"]["deletionTimestamp"] = json!("2026-01-02T03:04:05Z");
        check(&[leaving], None);
        let mut other_replica = shard(2, true);
        other_replica["spec"]["replica"] = json!(1);
        check(&[other_replica], None);
    }

    #[test]
    fn advice_fits_the_reason() {
        let check = |reason: &str, expect: Option<&str>| {
            let instance = json!({"spec": {"model": "tiny", "nodes": {"min": 2}}, "status":
                {"conditions": [{"type": "Ready", "status": "False", "reason": reason}]}});
            let told = advice(&instance);
            let fits = match (&told, expect) {
                (Some(told), Some(expect)) => told.contains(expect),
                (told, expect) => told.is_none() && expect.is_none(),
            };
            assert!(fits, "{reason}: {told:?}");
        };
        check("ModelNotFound", Some("apply a Model named tiny"));
        check("Unplaceable", Some("`exoctl explain placement tiny --nodes 2`"));
        check("WeightsNotFound", Some("`exoctl edit model tiny`"));
        check("Starting", None);
    }

    #[test]
    fn a_verdict_on_an_older_spec_is_no_verdict() {
        let instance = |observed: u32, status: &str| {
            json!({"metadata": {"generation": 2}, "status": {"conditions": [{"type": "Ready",
                "status": status, "reason": "ShardFailed", "observedGeneration": observed}]}})
        };
        assert!(ready(&instance(2, "False")).is_some());
        assert!(ready(&instance(1, "False")).is_none());
        assert!(ready(&instance(2, "True")).is_none());
    }
}
