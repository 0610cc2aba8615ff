//! Events: what controllers and agents tell about a resource, in the form in which Kubernetes keeps
//! them. The same thing told again counts up in the event that is there.

use k8s_openapi::{
    api::core::v1::{Event, EventSource, ObjectReference},
    apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta, Time},
    jiff::Timestamp,
};
use serde::Serialize;
use serde_json::{Value, json};

/// Kubernetes' own limit of an event's text, in bytes.
const MAX_NOTE_BYTES: usize = 1024;
/// Of the reporter's name.
const MAX_REPORTER_BYTES: usize = 128;
/// Leaves room for the dot and the hash in a name of at most 253 bytes.
const MAX_OBJECT_NAME_BYTES: usize = 236;
/// Events about resources without a namespace are kept here, as Kubernetes does.
const DEFAULT_NAMESPACE: &str = "default";

/// Something that happened to a resource.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Occurrence {
    /// Somebody may have to look; else it is only good to know.
    pub warning: bool,
    /// A constant, in CamelCase.
    pub reason: String,
    /// One sentence. Without times and other figures that differ each time: they would make every
    /// occurrence another event.
    pub note: String,
}

impl Occurrence {
    pub fn normal(reason: &str, note: impl Into<String>) -> Self {
        Self { warning: false, reason: reason.to_owned(), note: note.into() }
    }

    pub fn warning(reason: &str, note: impl Into<String>) -> Self {
        Self { warning: true, reason: reason.to_owned(), note: note.into() }
    }
}

/// Who tells.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reporter {
    /// What it is, `exo-agent`.
    pub component: String,
    /// Which one: the node's name.
    pub instance: String,
}

/// The event of a first occurrence. The same occurrence told by the same reporter has the same name
/// again, so that creating it twice is refused: then send [`repeated`].
pub fn first(
    about: &ObjectReference,
    occurrence: &Occurrence,
    reporter: &Reporter,
    now: Timestamp,
) -> Event {
    let now = Time(Timestamp::from_second(now.as_second()).unwrap_or(now));
    let note = cut(&occurrence.note, MAX_NOTE_BYTES);
    let kind = if occurrence.warning { "Warning" } else { "Normal" };
    let about_text = |text: &Option<String>| text.clone().unwrap_or_default();
    let hash = hash(&[
        &about_text(&about.uid),
        &about_text(&about.kind),
        kind,
        &occurrence.reason,
        note,
        &reporter.component,
        &reporter.instance,
    ]);
    let name = about_text(&about.name);
    let name = cut(&name, MAX_OBJECT_NAME_BYTES).trim_end_matches(['.', '-']);
    Event {
        metadata: ObjectMeta {
            name: Some(format!("{name}.{hash:016x}")),
            namespace: Some(namespace(about).to_owned()),
            ..ObjectMeta::default()
        },
        involved_object: ObjectReference { resource_version: None, ..about.clone() },
        type_: Some(kind.to_owned()),
        reason: Some(occurrence.reason.clone()),
        message: Some(note.to_owned()),
        count: Some(1),
        // Whoever gives a time of this kind names an action too.
        event_time: Some(MicroTime(now.0)),
        action: Some(occurrence.reason.clone()),
        first_timestamp: Some(now.clone()),
        last_timestamp: Some(now),
        source: Some(EventSource {
            component: Some(reporter.component.clone()),
            host: Some(reporter.instance.clone()),
        }),
        reporting_component: Some(reporter.component.clone()),
        reporting_instance: Some(cut(&reporter.instance, MAX_REPORTER_BYTES).to_owned()),
        ..Event::default()
    }
}

/// Where events about a resource are kept.
pub fn namespace(about: &ObjectReference) -> &str {
    about.namespace.as_deref().filter(|n| !n.is_empty()).unwrap_or(DEFAULT_NAMESPACE)
}

/// The merge patch that counts one more occurrence in `stored`, on condition that nobody else did.
pub fn repeated(stored: &Event, now: Timestamp) -> Value {
    let now = Time(Timestamp::from_second(now.as_second()).unwrap_or(now));
    json!({
        "metadata": {"resourceVersion": stored.metadata.resource_version},
        "count": stored.count.unwrap_or(1).saturating_add(1),
        "lastTimestamp": now,
    })
}

/// At most so many bytes, whole characters.
fn cut(text: &str, max_bytes: usize) -> &str {
    &text[..text.floor_char_boundary(max_bytes)]
}

/// FNV-1a of the parts, each closed by a byte that no text has: equal everywhere and for ever.
fn hash(parts: &[&str]) -> u64 {
    let bytes = parts.iter().flat_map(|part| part.bytes().chain([0xff]));
    bytes.fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn about(name: &str) -> ObjectReference {
        ObjectReference {
            api_version: Some("exo.dev/v1alpha1".to_owned()),
            kind: Some("Shard".to_owned()),
            name: Some(name.to_owned()),
            namespace: Some("team".to_owned()),
            uid: Some("u".to_owned()),
            ..ObjectReference::default()
        }
    }

    fn reporter(instance: &str) -> Reporter {
        Reporter { component: "exo-agent".to_owned(), instance: instance.to_owned() }
    }

    #[test]
    fn the_same_told_again_is_the_same_event() {
        let at = |seconds| Timestamp::from_second(seconds).unwrap();
        let occurrence = Occurrence::warning("BadWeights", "no tensor x");
        let event = first(&about("s"), &occurrence, &reporter("a"), at(1));
        let name = |event: &Event| event.metadata.name.clone().unwrap();
        assert_eq!(name(&event).len(), "s.".len() + 16);
        assert_eq!(event.metadata.namespace.as_deref(), Some("team"));
        let again = first(&about("s"), &occurrence, &reporter("a"), at(9));
        assert_eq!(name(&again), name(&event));
        let other = Occurrence { note: "no tensor y".to_owned(), ..occurrence.clone() };
        for different in [
            first(&about("s"), &other, &reporter("a"), at(1)),
            first(&about("s"), &occurrence, &reporter("b"), at(1)),
            first(
                &about("s"),
                &Occurrence { warning: false, ..occurrence.clone() },
                &reporter("a"),
                at(1),
            ),
        ] {
            assert_ne!(name(&different), name(&event));
        }
        let mut stored = event;
        stored.metadata.resource_version = Some("7".to_owned());
        assert_eq!(
            repeated(&stored, at(5)),
            json!({
                "metadata": {"resourceVersion": "7"}, "count": 2,
                "lastTimestamp": "1970-01-01T00:00:05Z",
            })
        );
    }

    #[test]
    fn long_names_and_texts_are_cut() {
        let long = Occurrence::normal("R", "ü".repeat(2_000));
        let event = first(&about(&"n".repeat(253)), &long, &reporter("a"), Timestamp::UNIX_EPOCH);
        assert_eq!(event.metadata.name.unwrap().len(), 253);
        assert_eq!(event.message.unwrap().len(), 1024);
        let cluster_wide = ObjectReference { namespace: None, ..about("a") };
        assert_eq!(namespace(&cluster_wide), "default");
    }
}
