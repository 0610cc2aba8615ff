//! `exoctl events`, and the events that `describe` shows.

use std::{cmp::Ordering, io::Write};

use anyhow::{Context as _, bail};
use serde_json::Value;

use super::{get, select};
use crate::{
    cli::{Events, Get, Select},
    kinds::Kind,
    server::{Form, Server},
};

/// Whether objects of this kind are events.
pub(super) fn is_event(kind: &Kind) -> bool {
    kind.api.kind == "Event" && matches!(kind.api.group.as_str(), "" | "events.k8s.io")
}

/// When an event happened last, RFC 3339; such texts compare as their times do.
pub(super) fn last_seen(event: &Value) -> &str {
    let places = [
        &event["series"]["lastObservedTime"],
        &event["lastTimestamp"],
        &event["deprecatedLastTimestamp"],
        &event["eventTime"],
        &event["metadata"]["creationTimestamp"],
    ];
    places.into_iter().find_map(Value::as_str).unwrap_or_default()
}

/// The older one first; those of the same second in the order in which they were written.
pub(super) fn by_time(a: &Value, b: &Value) -> Ordering {
    let when = |event: &Value| -> (String, u64) {
        let version = event["metadata"]["resourceVersion"].as_str();
        let version = version.and_then(|text| text.parse().ok()).unwrap_or(0);
        (last_seen(event).to_owned(), version)
    };
    when(a).cmp(&when(b))
}

/// How often an event happened.
pub(super) fn count(event: &Value) -> u64 {
    let places = [&event["series"]["count"], &event["count"], &event["deprecatedCount"]];
    places.into_iter().find_map(Value::as_u64).unwrap_or(1).max(1)
}

pub(super) async fn run(args: &Events, server: &Server, out: &mut dyn Write) -> anyhow::Result<()> {
    let mut rules = Vec::new();
    let mut all_namespaces = args.all_namespaces;
    if let Some(about) = &args.about {
        let Some((kind, name)) = about.split_once('/') else {
            bail!("--for: `{about}` is not KIND/NAME, as in instance/{about}");
        };
        let kind = server.kinds().await?.find(kind)?;
        rules.push(about_rule(kind, &select::checked(name)?));
        // Events about what is in no namespace are in any.
        all_namespaces |= !kind.namespaced;
    }
    match args.types.as_slice() {
        [] => {}
        [one] => rules.push(format!("type={}", capitalized(one))),
        // There are but two.
        _ => {}
    }
    let get = Get {
        kind: Some("events".to_owned()),
        names: Vec::new(),
        output: None,
        watch: args.watch,
        watch_only: false,
        select: Select {
            labels: None,
            fields: (!rules.is_empty()).then(|| rules.join(",")),
            all_namespaces,
        },
        sort_by: None,
        no_headers: args.no_headers,
        show_labels: false,
        ignore_not_found: false,
        stale: false,
        show_managed_fields: false,
    };
    get::run(&get, server, out).await
}

fn capitalized(word: &str) -> String {
    let mut letters = word.chars();
    let first = letters.next().map(|c| c.to_ascii_uppercase());
    first.into_iter().chain(letters).collect()
}

/// The field selector of the events about an object.
fn about_rule(kind: &Kind, name: &str) -> String {
    format!("involvedObject.kind={},involvedObject.name={name}", kind.api.kind)
}

/// The newest warning about an object, which may be gone.
pub(super) async fn last_warning(
    server: &Server,
    kind: &Kind,
    name: &str,
) -> anyhow::Result<Option<Value>> {
    let events = server.kinds().await?.find("events")?;
    let rule = format!("{},type=Warning", about_rule(kind, name));
    let path = events.path(Some(server.namespace()), None);
    let mut list: Value = server.get(&path, &[("fieldSelector", &rule)], Form::Json).await?;
    let items = select::take_items(&mut list, events);
    Ok(items.into_iter().max_by(by_time))
}

/// The events about an object, the newest last.
pub(super) async fn of_object(server: &Server, object: &Value) -> anyhow::Result<Vec<Value>> {
    let text = |value: &Value| value.as_str().map(str::to_owned);
    let kinds = server.kinds().await?;
    let (api_version, kind) = (text(&object["apiVersion"]), text(&object["kind"]));
    let kind = kinds.find_exact(&api_version.unwrap_or_default(), &kind.unwrap_or_default())?;
    let metadata = &object["metadata"];
    let name = text(&metadata["name"]).context("the object has no name")?;
    let events = kinds.find("events")?;
    let namespace = text(&metadata["namespace"]);
    let rule = about_rule(kind, &name);
    let path = events.path(namespace.as_deref(), None);
    let mut list: Value = server.get(&path, &[("fieldSelector", &rule)], Form::Json).await?;
    let mut items = select::take_items(&mut list, events);
    // Those about an earlier object of the name are another story.
    items.retain(|event| {
        let uid = &event["involvedObject"]["uid"];
        !uid.is_string() || *uid == metadata["uid"]
    });
    items.sort_by(by_time);
    Ok(items)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn an_events_time_is_the_last_one_that_it_has() {
        let check = |event: Value, expect: &str| assert_eq!(last_seen(&event), expect, "{event}");
        let metadata = json!({"creationTimestamp": "2026-01-01T00:00:00Z"});
        check(json!({"metadata": metadata}), "2026-01-01T00:00:00Z");
        check(
            json!({"metadata": metadata, "eventTime": "2026-01-02T00:00:00Z", "lastTimestamp": null}),
            "2026-01-02T00:00:00Z",
        );
        check(
            json!({"metadata": metadata, "lastTimestamp": "2026-01-03T00:00:00Z",
                   "series": {"lastObservedTime": "2026-01-04T00:00:00Z"}}),
            "2026-01-04T00:00:00Z",
        );
        let event = |second: u32, version: &str| {
            json!({"metadata": {"resourceVersion": version},
                   "lastTimestamp": format!("2026-01-03T00:00:0{second}Z")})
        };
        assert_eq!(by_time(&event(1, "99"), &event(2, "7")), Ordering::Less);
        assert_eq!(by_time(&event(1, "99"), &event(1, "100")), Ordering::Less);
        assert_eq!(count(&json!({"count": 3})), 3);
        assert_eq!(count(&json!({"count": null})), 1);
    }
}
