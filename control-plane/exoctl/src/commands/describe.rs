//! `exoctl describe`: one object on a page, for people.

use std::{fmt::Write as _, io::Write};

use exo_crds::{GROUP, VERSION};
use k8s_openapi::{apimachinery::pkg::apis::meta::v1::Time, jiff::Timestamp};
use serde_json::{Map, Value, json};

use super::{
    events,
    select::{self, nothing_found},
};
use crate::{
    cli::Describe,
    error::Collector,
    jsonpath::plain,
    server::{Form, Server},
};

pub(super) async fn run(
    args: &Describe,
    server: &Server,
    out: &mut dyn Write,
) -> anyhow::Result<()> {
    let mut failures = Collector::default();
    let mut first = true;
    for selected in select::read(server, &args.kind, &args.names).await? {
        let mut objects = Vec::new();
        if selected.names.is_empty() {
            objects = select::list(server, selected.kind, &args.select).await?;
            if objects.is_empty() {
                eprintln!("{}", nothing_found(selected.kind, &args.select, server));
            }
        }
        for name in &selected.names {
            let path = selected.kind.path(args.select.namespace(server), Some(name));
            let object = server.get::<Value>(&path, &[], Form::Json).await;
            objects.extend(failures.note(object)?);
        }
        for object in objects {
            if !std::mem::take(&mut first) {
                writeln!(out, "\n")?;
            }
            let now = Timestamp::now();
            write!(out, "{}", page(&object, now))?;
            if args.show_events {
                write_shards(server, &object, out).await?;
                // Who may see an object need not see its events.
                match events::of_object(server, &object).await {
                    Ok(events) => write!(out, "{}", event_rows(&events, now))?,
                    Err(error) => eprintln!("its events can't be read: {error:#}"),
                }
            }
        }
    }
    failures.finish()
}

/// Width of the labels of the first lines.
const LABEL_WIDTH: usize = 14;

fn page(object: &Value, now: Timestamp) -> String {
    let mut page = String::new();
    let metadata = &object["metadata"];
    let mut line = |label: &str, text: &str| {
        let label = if label.is_empty() { String::new() } else { format!("{label}:") };
        let _ = writeln!(page, "{label:LABEL_WIDTH$}{text}");
    };
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    line("Name", &text(&metadata["name"]));
    if metadata["namespace"].is_string() {
        line("Namespace", &text(&metadata["namespace"]));
    }
    for (label, field) in [("Labels", "labels"), ("Annotations", "annotations")] {
        let pairs = pairs(&metadata[field]);
        let mut label = label;
        for pair in &pairs {
            line(label, pair);
            label = "";
        }
        if pairs.is_empty() {
            line(label, "<none>");
        }
    }
    line("API Version", &text(&object["apiVersion"]));
    line("Kind", &text(&object["kind"]));
    for (label, field) in [("Created", "creationTimestamp"), ("Deleting", "deletionTimestamp")] {
        if let Some(time) = metadata[field].as_str() {
            line(label, &format!("{time} ({} ago)", age(time, now)));
        }
    }
    for owner in metadata["ownerReferences"].as_array().into_iter().flatten() {
        line("Owner", &format!("{}/{}", plain(&owner["kind"]), plain(&owner["name"])));
    }
    if let Some(finalizers) = metadata["finalizers"].as_array() {
        let names: Vec<_> = finalizers.iter().map(plain).collect();
        line("Finalizers", &names.join(", "));
    }
    let mut rest = object.as_object().cloned().unwrap_or_default();
    for known in ["apiVersion", "kind", "metadata"] {
        rest.remove(known);
    }
    let conditions = rest
        .get_mut("status")
        .and_then(Value::as_object_mut)
        .and_then(|status| status.remove("conditions"));
    // By name, whatever their order on the wire.
    let mut rest = Value::Object(rest);
    rest.sort_all_objects();
    if let Some(rest) = rest.as_object() {
        write_fields(&mut page, rest, 0);
    }
    if let Some(Value::Array(conditions)) = conditions.filter(|c| c != &json!([])) {
        write_conditions(&mut page, &conditions, now);
    }
    page
}

/// `key=value` of each entry.
fn pairs(map: &Value) -> Vec<String> {
    let map = map.as_object();
    map.into_iter().flatten().map(|(key, value)| format!("{key}={}", plain(value))).collect()
}

fn write_fields(page: &mut String, fields: &Map<String, Value>, depth: usize) {
    for (key, value) in fields {
        write_value(page, &title(key), value, depth);
    }
}

fn write_value(page: &mut String, label: &str, value: &Value, depth: usize) {
    let indent = "  ".repeat(depth);
    match value {
        Value::Object(fields) if !fields.is_empty() => {
            let _ = writeln!(page, "{indent}{label}:");
            // Keys of maps such as environments are the user's own: printed as they are.
            if is_map(fields) {
                for (key, value) in fields {
                    write_value(page, key, value, depth + 1);
                }
            } else {
                write_fields(page, fields, depth + 1);
            }
        }
        Value::Array(items) if items.iter().any(Value::is_object) => {
            let _ = writeln!(page, "{indent}{label}:");
            for (i, item) in items.iter().enumerate() {
                write_value(page, &format!("{i}"), item, depth + 1);
            }
        }
        Value::Array(items) if items.iter().any(|i| plain(i).len() > 40) => {
            let _ = writeln!(page, "{indent}{label}:");
            for item in items {
                let _ = writeln!(page, "{indent}  {}", one_line(item));
            }
        }
        Value::Array(items) => {
            let items: Vec<_> = items.iter().map(one_line).collect();
            let text = if items.is_empty() { "<none>".to_owned() } else { items.join(", ") };
            let _ = writeln!(page, "{indent}{label}: {text}");
        }
        Value::Object(_) | Value::Null => {
            let _ = writeln!(page, "{indent}{label}: <none>");
        }
        value => {
            let _ = writeln!(page, "{indent}{label}: {}", one_line(value));
        }
    }
}

/// Whether keys are data, not field names: those are in camelCase throughout.
fn is_map(fields: &Map<String, Value>) -> bool {
    let is_field = |key: &String| {
        key.starts_with(|c: char| c.is_ascii_lowercase())
            && key.chars().all(|c| c.is_ascii_alphanumeric())
    };
    !fields.keys().all(is_field)
}

fn one_line(value: &Value) -> String {
    let text = plain(value);
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

/// `contextLength` → `Context Length`.
fn title(key: &str) -> String {
    let mut title = String::new();
    for (i, c) in key.chars().enumerate() {
        match c {
            c if i == 0 => title.extend(c.to_uppercase()),
            c if c.is_uppercase() => {
                title.push(' ');
                title.push(c);
            }
            c => title.push(c),
        }
    }
    title
}

fn write_conditions(page: &mut String, conditions: &[Value], now: Timestamp) {
    let rows = conditions.iter().map(|condition| {
        let text = |field: &str| condition[field].as_str().unwrap_or_default().to_owned();
        vec![
            text("type"),
            text("status"),
            age(&text("lastTransitionTime"), now),
            text("reason"),
            one_line(&condition["message"]),
        ]
    });
    let _ = writeln!(page, "Conditions:");
    write_rows(page, &["Type", "Status", "Since", "Reason", "Message"], rows.collect());
}

/// What happened to an object, the newest last; a line even when that is nothing.
fn event_rows(events: &[Value], now: Timestamp) -> String {
    if events.is_empty() {
        return format!("{:LABEL_WIDTH$}<none>\n", "Events:");
    }
    let rows = events.iter().map(|event| {
        let text = |field: &str| event[field].as_str().unwrap_or_default().to_owned();
        let from = match text("reportingComponent") {
            component if component.is_empty() => plain_or_empty(&event["source"]["component"]),
            component => component,
        };
        let age = match (events::count(event), age(events::last_seen(event), now)) {
            (1, age) => age,
            (count, age) => format!("{age} (x{count})"),
        };
        vec![text("type"), text("reason"), age, from, one_line(&event["message"])]
    });
    let mut page = "Events:\n".to_owned();
    write_rows(&mut page, &["Type", "Reason", "Age", "From", "Message"], rows.collect());
    page
}

fn plain_or_empty(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}

/// An instance is what its shards are, a node has them: each with where it is and what is the
/// matter.
async fn write_shards(server: &Server, object: &Value, out: &mut dyn Write) -> anyhow::Result<()> {
    let group = format!("{GROUP}/{VERSION}");
    let (metadata, kind) = (&object["metadata"], plain_or_empty(&object["kind"]));
    let name = plain_or_empty(&metadata["name"]);
    let rule = match kind.as_str() {
        "InferenceInstance" if object["apiVersion"] == group => format!("spec.instance={name}"),
        "Node" if object["apiVersion"] == group => format!("spec.node={name}"),
        _ => return Ok(()),
    };
    let kind = server.own_kind("Shard").await?;
    let path = kind.path(metadata["namespace"].as_str(), None);
    let list: Value = server.get(&path, &[("fieldSelector", &rule)], Form::Json).await?;
    let shards = list["items"].as_array().map(Vec::as_slice).unwrap_or_default();
    if !shards.is_empty() {
        write!(out, "{}", shard_rows(shards))?;
    }
    Ok(())
}

fn shard_rows(shards: &[Value]) -> String {
    let rows = shards.iter().map(|shard| {
        let (spec, status) = (&shard["spec"], &shard["status"]);
        let failure = &status["failure"];
        let why = match (failure["reason"].as_str(), failure["message"].as_str()) {
            (Some(reason), Some(message)) => format!("{reason}: {message}"),
            (one, other) => one.or(other).unwrap_or_default().to_owned(),
        };
        vec![
            plain_or_empty(&shard["metadata"]["name"]),
            plain_or_empty(&spec["node"]),
            status["phase"].as_str().unwrap_or("Pending").to_owned(),
            plain_or_empty(&status["progress"]),
            one_line(&Value::String(why)),
        ]
    });
    let mut page = "Shards:\n".to_owned();
    write_rows(&mut page, &["Name", "Node", "Phase", "Progress", "Failure"], rows.collect());
    page
}

/// Aligned rows under a header; the last column is as long as it is.
fn write_rows(page: &mut String, header: &[&str], rows: Vec<Vec<String>>) {
    let header = header.iter().map(|&name| name.to_owned()).collect();
    let rows: Vec<Vec<String>> = std::iter::once(header).chain(rows).collect();
    let width = |i: usize| rows.iter().map(|row| row[i].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..rows[0].len() - 1).map(width).collect();
    for row in &rows {
        let mut line = String::new();
        for (i, cell) in row.iter().enumerate() {
            let width = widths.get(i).copied().unwrap_or(0);
            let _ = write!(line, "  {cell:width$} ");
        }
        let _ = writeln!(page, "{}", line.trim_end());
    }
}

/// Time since `time`, in the two largest units at most; as kubectl prints ages.
fn age(time: &str, now: Timestamp) -> String {
    let Ok(Time(time)) = serde_json::from_value(Value::String(time.to_owned())) else {
        return "<unknown>".to_owned();
    };
    let s = (now.as_second() - time.as_second()).max(0);
    let (m, h, d) = (s / 60, s / 3600, s / 86_400);
    // The smaller unit is shown while it says something: up to ten minutes, eight hours, eight days.
    if s < 120 {
        format!("{s}s")
    } else if m < 10 && s % 60 > 0 {
        format!("{m}m{}s", s % 60)
    } else if h < 3 {
        format!("{m}m")
    } else if h < 8 && m % 60 > 0 {
        format!("{h}h{}m", m % 60)
    } else if h < 48 {
        format!("{h}h")
    } else if d < 8 && h % 24 > 0 {
        format!("{d}d{}h", h % 24)
    } else {
        format!("{d}d")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_shows_everything_once() {
        let object = json!({
            "apiVersion": "exo.dev/v1alpha1", "kind": "InferenceInstance",
            "metadata": {"name": "llama", "namespace": "default", "labels": {"team": "a", "x": "y"},
                "creationTimestamp": "2026-01-02T03:04:05Z", "resourceVersion": "5",
                "finalizers": ["exo.dev/a"]},
            "spec": {"model": "llama-70b", "nodes": {"min": 2}, "environment": {"MY_VAR": "1"},
                     "fastSynch": true, "empty": {}},
            "status": {"phase": "Pending",
                "replicas": [{"index": 0, "nodes": ["studio-1", "studio-2"]}],
                "lastLogLines": ["a very long line of a log that would not fit beside another one"],
                "conditions": [
                    {"type": "Ready", "status": "False", "reason": "NoCapacity",
                     "message": "no node has\n19Gi free", "lastTransitionTime": "2026-01-02T03:05:05Z"}]},
        });
        let now = "2026-01-02T03:06:10Z".parse().unwrap();
        assert_eq!(
            page(&object, now),
            "\
Name:         llama
Namespace:    default
Labels:       team=a
              x=y
Annotations:  <none>
API Version:  exo.dev/v1alpha1
Kind:         InferenceInstance
Created:      2026-01-02T03:04:05Z (2m5s ago)
Finalizers:   exo.dev/a
Spec:
  Empty: <none>
  Environment:
    MY_VAR: 1
  Fast Synch: true
  Model: llama-70b
  Nodes:
    Min: 2
Status:
  Last Log Lines:
    a very long line of a log that would not fit beside another one
  Phase: Pending
  Replicas:
    0:
      Index: 0
      Nodes: studio-1, studio-2
Conditions:
  Type    Status   Since   Reason       Message
  Ready   False    65s     NoCapacity   no node has 19Gi free
"
        );
    }

    #[test]
    fn events_are_told_with_their_number() {
        let now = "2026-01-02T03:06:10Z".parse().unwrap();
        assert_eq!(event_rows(&[], now), "Events:       <none>\n");
        let events = [
            json!({"type": "Normal", "reason": "Placed", "message": "on a, b", "count": 1,
                   "lastTimestamp": "2026-01-02T03:05:10Z", "source": {"component": "exo"}}),
            json!({"type": "Warning", "reason": "ShardFailed", "message": "no\ntensor", "count": 3,
                   "lastTimestamp": "2026-01-02T03:06:05Z", "reportingComponent": "instances"}),
        ];
        assert_eq!(
            event_rows(&events, now),
            "\
Events:
  Type      Reason        Age       From        Message
  Normal    Placed        60s       exo         on a, b
  Warning   ShardFailed   5s (x3)   instances   no tensor
"
        );
    }

    #[test]
    fn shards_say_what_failed() {
        let shards = [
            json!({"metadata": {"name": "a-0"}, "spec": {"node": "mac-1"}}),
            json!({"metadata": {"name": "a-1"}, "spec": {"node": "mac-2"}, "status": {
                "phase": "Failed", "progress": "40%",
                "failure": {"reason": "BadWeights", "message": "no tensor `x`"}}}),
        ];
        assert_eq!(
            shard_rows(&shards),
            "\
Shards:
  Name   Node    Phase     Progress   Failure
  a-0    mac-1   Pending
  a-1    mac-2   Failed    40%        BadWeights: no tensor `x`
"
        );
    }

    #[test]
    fn ages_are_kubectls() {
        let now: Timestamp = "2026-01-10T00:00:00Z".parse().unwrap();
        let check = |time: &str, expect: &str| assert_eq!(age(time, now), expect, "{time}");
        check("2026-01-09T23:59:01Z", "59s");
        check("2026-01-09T23:58:01Z", "119s");
        check("2026-01-09T23:57:30Z", "2m30s");
        check("2026-01-09T23:55:00Z", "5m");
        check("2026-01-09T22:00:00Z", "120m");
        check("2026-01-09T20:30:00Z", "3h30m");
        check("2026-01-09T10:30:00Z", "13h");
        check("2026-01-06T12:00:00Z", "3d12h");
        check("2026-01-01T12:00:00Z", "8d");
        check("2026-01-11T00:00:00Z", "0s");
        check("soon", "<unknown>");
    }
}
