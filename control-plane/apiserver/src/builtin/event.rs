//! What an event must say, and what of it stays: `ValidateEventCreate` and `ValidateEventUpdate` of
//! Kubernetes. What comes through the events' own group is checked more strictly in both.

use serde_json::{Value, json};

use super::{is_own_event, types::EVENT_FIELDS};
use crate::{clock, error::Cause, object, resource::Resource};

/// Of the texts below, in bytes.
const MAX_TEXT: usize = 128;
const MAX_NOTE: usize = 1024;
/// Where events about objects without a namespace may be.
const DEFAULT: &str = "default";
const SYSTEM: &str = "kube-system";
/// What an event said first, by the names of its own group. Only its series goes on.
const FIXED: [&str; 13] = [
    "regarding",
    "related",
    "reason",
    "note",
    "type",
    "action",
    "eventTime",
    "reportingController",
    "reportingInstance",
    "deprecatedSource",
    "deprecatedFirstTimestamp",
    "deprecatedLastTimestamp",
    "deprecatedCount",
];

/// What is wrong with an event that replaces `current`, or is new.
pub(super) fn faults(resource: &Resource, event: &Value, current: Option<&Value>) -> Vec<Cause> {
    let mut causes = common_faults(resource, event);
    let Some(current) = current else {
        if is_own_event(resource) {
            causes.extend(series_faults(event));
            causes.extend(faults_of_new(event));
        }
        return causes;
    };
    let known = common_faults(resource, current);
    causes.retain(|cause| !known.contains(cause));
    if is_own_event(resource) && !is_same(&event["series"], &current["series"]) {
        causes.extend(series_faults(event));
    }
    causes
}

/// What an update changes of what must stay, when it comes through the events' own group.
pub(super) fn fixed(resource: &Resource, current: &Value, wanted: &Value) -> Vec<Cause> {
    if !is_own_event(resource) {
        return Vec::new();
    }
    let changed = FIXED.into_iter().filter(|field| !is_same(&current[*field], &wanted[*field]));
    changed
        .map(|field| Cause::invalid(field, format_args!("{}: field is immutable", wanted[field])))
        .collect()
}

/// Of both groups. An event with an `eventTime` is of the newer form, whose fields are all needed.
fn common_faults(resource: &Resource, event: &Value) -> Vec<Cause> {
    let is_own = is_own_event(resource);
    let field = |own: &'static str| {
        let core = EVENT_FIELDS.iter().find(|(_, name)| *name == own).map(|(core, _)| *core);
        core.filter(|_| !is_own).unwrap_or(own)
    };
    let text = |own| event[field(own)].as_str().unwrap_or_default();
    let mut causes = Vec::new();

    let is_new_form = event["eventTime"].is_string();
    let namespace = object::namespace(event).unwrap_or_default();
    let about = event[field("regarding")]["namespace"].as_str().unwrap_or_default();
    let agree = match about {
        "" => namespace == DEFAULT || (is_new_form && namespace == SYSTEM),
        _ => is_new_form || about == namespace,
    };
    if !agree {
        let field = format!("{}.namespace", field("regarding"));
        let problem = format_args!("{}: does not match event.namespace", json!(about));
        causes.push(Cause::invalid(field, problem));
    }
    if is_new_form {
        let controller = text("reportingController");
        if !controller.is_empty() && !object::is_qualified_name(controller) {
            let problem = format_args!("{}: {}", json!(controller), object::QUALIFIED_NAME);
            causes.push(Cause::invalid(field("reportingController"), problem));
        }
        for own in ["reportingController", "reportingInstance", "action", "reason"] {
            match text(own) {
                "" => causes.push(Cause::required(field(own))),
                // The controller's own rule is above.
                text if text.len() > MAX_TEXT && own != "reportingController" => {
                    causes.push(too_long(field(own), MAX_TEXT));
                }
                _ => {}
            }
        }
        if text("note").len() > MAX_NOTE {
            causes.push(too_long(field("note"), MAX_NOTE));
        }
    }
    causes
}

fn series_faults(event: &Value) -> Vec<Cause> {
    let mut causes = Vec::new();
    let Some(series) = event["series"].as_object() else {
        return causes;
    };
    let count = series.get("count").and_then(Value::as_i64).unwrap_or_default();
    if count < 2 {
        let problem = format_args!("{count}: should be at least 2");
        causes.push(Cause::invalid("series.count", problem));
    }
    if !series.get("lastObservedTime").is_some_and(Value::is_string) {
        causes.push(Cause::required("series.lastObservedTime"));
    }
    causes
}

/// The events' own group takes nothing but the newer form.
fn faults_of_new(event: &Value) -> Vec<Cause> {
    let mut causes = Vec::new();
    if !event["eventTime"].is_string() {
        causes.push(Cause::required("eventTime"));
    }
    let kind = event["type"].as_str().unwrap_or_default();
    if !["Normal", "Warning"].contains(&kind) {
        let problem = format_args!("\"\": has invalid value: {kind}");
        causes.push(Cause::invalid("type", problem));
    }
    let older = EVENT_FIELDS.iter().map(|(_, own)| *own).filter(|f| f.starts_with("deprecated"));
    for field in older.filter(|field| is_set(&event[*field])) {
        causes.push(Cause::invalid(field, "\"\": needs to be unset"));
    }
    causes
}

/// The same to who reads both: what is empty is not there, and times can be written in many ways.
fn is_same(one: &Value, other: &Value) -> bool {
    match (one, other) {
        (Value::Object(a), Value::Object(b)) => {
            a.keys().chain(b.keys()).all(|field| is_same(&one[field], &other[field]))
        }
        (Value::String(a), Value::String(b)) if a != b => {
            clock::parse(a).is_some_and(|time| clock::parse(b) == Some(time))
        }
        _ => one == other || !is_set(one) && !is_set(other),
    }
}

/// Empty values are as good as none, as for Go.
fn is_set(value: &Value) -> bool {
    match value {
        Value::Null => false,
        Value::Object(fields) => fields.values().any(is_set),
        Value::String(text) => !text.is_empty(),
        other => *other != json!(0),
    }
}

fn too_long(field: &str, limit: usize) -> Cause {
    Cause::invalid(field, format_args!("\"\": can have at most {limit} characters"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::builtin::{self, EVENTS_GROUP};

    /// The fields that `change` makes wrong in an event that is right.
    fn wrong(group: &str, change: &Value) -> Vec<String> {
        let all = builtin::resources().unwrap();
        let resource = all.iter().find(|r| r.kind == builtin::EVENT && r.group == group).unwrap();
        let mut event = json!({
            "metadata": {"name": "e", "namespace": "team"}, "type": "Normal", "reason": "Placed",
            "regarding": {"kind": "Shard", "name": "s", "namespace": "team"}, "action": "Place",
            "eventTime": "2026-01-01T00:00:00.000000Z", "reportingController": "exo.dev/c",
            "reportingInstance": "i", "note": "n".repeat(MAX_NOTE),
        });
        json_patch::merge(&mut event, change);
        if group.is_empty() {
            builtin::to_stored(all.iter().find(|r| is_own_event(r)).unwrap(), &mut event);
        }
        faults(resource, &event, None).into_iter().map(|cause| cause.field).collect()
    }

    #[test]
    fn new_events_say_all() {
        let own = |change: Value| wrong(EVENTS_GROUP, &change);
        let core = |change: Value| wrong("", &change);
        assert_eq!(own(json!({})), [""; 0]);
        assert_eq!(core(json!({})), [""; 0]);
        assert_eq!(own(json!({"action": null, "reason": ""})), ["action", "reason"]);
        assert_eq!(own(json!({"reportingInstance": "x".repeat(129)})), ["reportingInstance"]);
        let controller = |name: &str| own(json!({"reportingController": name}));
        assert_eq!(controller("my controller"), ["reportingController"]);
        assert_eq!(controller(&format!("{}.example.com/c", "long".repeat(15))), [""; 0]);
        assert_eq!(
            own(json!({"series": {"count": 1}})),
            ["series.count", "series.lastObservedTime"]
        );
        let series = json!({"series": {
            "count": 2, "lastObservedTime": "2026-01-01T00:00:00.000000Z",
        }});
        assert_eq!(own(series), [""; 0]);
        assert_eq!(core(json!({"reportingController": null})), ["reportingComponent"]);
        assert_eq!(own(json!({"note": "n".repeat(MAX_NOTE + 1)})), ["note"]);
        assert_eq!(own(json!({"type": "Info"})), ["type"]);
        assert_eq!(own(json!({"deprecatedCount": 2})), ["deprecatedCount"]);
        assert_eq!(own(json!({"deprecatedCount": 0, "deprecatedSource": {}})), [""; 0]);
        assert_eq!(own(json!({"eventTime": null})), ["eventTime"]);
        let about = |namespace: &str| json!({"regarding": {"namespace": namespace}});
        assert_eq!(own(about("other")), [""; 0]);
        assert_eq!(own(about("")), ["regarding.namespace"]);
        assert_eq!(core(about("")), ["involvedObject.namespace"]);
    }

    #[test]
    fn the_older_form_is_taken_as_it_always_was() {
        let older = json!({
            "eventTime": null, "reportingController": null, "reportingInstance": null,
            "action": null, "type": "Info", "deprecatedCount": 2, "note": "n".repeat(5000),
        });
        assert_eq!(wrong("", &older), [""; 0]);
        let elsewhere = json!({"eventTime": null, "regarding": {"namespace": "other"}});
        assert_eq!(wrong("", &elsewhere), ["involvedObject.namespace"]);
        let of_a_node = json!({
            "regarding": {"kind": "Node", "namespace": null}, "metadata": {"namespace": "default"},
        });
        assert_eq!(wrong("", &of_a_node), [""; 0]);
        assert_eq!(wrong(EVENTS_GROUP, &of_a_node), [""; 0]);
    }

    /// The fields of which an update through this group is refused.
    fn refused(group: &str, change: &Value) -> Vec<String> {
        let all = builtin::resources().unwrap();
        let resource = all.iter().find(|r| r.kind == builtin::EVENT && r.group == group).unwrap();
        let mut current = json!({
            "metadata": {"name": "e", "namespace": "team"}, "type": "Normal", "reason": "Placed",
            "regarding": {"kind": "Shard", "name": "s", "namespace": "team"}, "action": "Place",
            "eventTime": "2026-01-01T00:00:00.000000Z", "reportingController": "exo.dev/c",
            "reportingInstance": "i", "note": "n", "deprecatedCount": 1,
            "series": {"count": 1, "lastObservedTime": "2026-01-01T00:00:00.000000Z"},
        });
        let mut wanted = current.clone();
        json_patch::merge(&mut wanted, change);
        if group.is_empty() {
            let own = all.iter().find(|r| is_own_event(r)).unwrap();
            builtin::to_stored(own, &mut current);
            builtin::to_stored(own, &mut wanted);
        }
        let causes = faults(resource, &wanted, Some(&current));
        let causes = causes.into_iter().chain(fixed(resource, &current, &wanted));
        causes.map(|cause| cause.field).collect()
    }

    #[test]
    fn nothing_but_the_series_goes_on() {
        let own = |change: Value| refused(EVENTS_GROUP, &change);
        let core = |change: Value| refused("", &change);
        let changes = json!({
            "regarding": {"name": "t"}, "related": {"name": "r"}, "reason": "Other",
            "note": "other", "type": "Warning", "action": "Other",
            "eventTime": "2026-01-01T00:00:01Z", "reportingController": "c",
            "reportingInstance": "j", "deprecatedSource": {"host": "h"},
            "deprecatedFirstTimestamp": "2026-01-01T00:00:00Z",
            "deprecatedLastTimestamp": "2026-01-01T00:00:00Z", "deprecatedCount": 2,
        });
        assert_eq!(own(changes.clone()), FIXED);
        assert_eq!(core(changes), [""; 0], "as it always was");
        let mut all = FIXED.to_vec();
        all.sort_unstable();
        let mut known: Vec<String> =
            crate::builtin::types::own_event()["schema"]["openAPIV3Schema"]["properties"]
                .as_object()
                .unwrap()
                .keys()
                .cloned()
                .collect();
        known.retain(|field| field != "series");
        known.sort_unstable();
        assert_eq!(all, known);
        // What says the same is the same.
        let same = json!({
            "eventTime": "2026-01-01T01:00:00+01:00", "related": {"name": ""},
            "deprecatedSource": {}, "deprecatedFirstTimestamp": null,
        });
        assert_eq!(own(same), [""; 0]);
        // Of a series, what it says now.
        assert_eq!(own(json!({"metadata": {"labels": {"a": "b"}}})), [""; 0]);
        assert_eq!(own(json!({"series": {"count": 5}})), [""; 0]);
        assert_eq!(own(json!({"series": {"count": 0}})), ["series.count"]);
        assert_eq!(core(json!({"series": {"count": 0}})), [""; 0]);
        assert_eq!(own(json!({"series": null})), [""; 0]);
        // What both groups need.
        assert_eq!(core(json!({"action": ""})), ["action"]);
        assert_eq!(core(json!({"regarding": {"namespace": ""}})), ["involvedObject.namespace"]);
    }
}
