//! Schemas, columns and selectable fields of Kubernetes' own types, described for `explain`.

use serde_json::{Map, Value, json};

/// Names of an event's fields: in the core group, where they are stored so, and in its own.
pub(super) const EVENT_FIELDS: [(&str, &str); 7] = [
    ("involvedObject", "regarding"),
    ("message", "note"),
    ("source", "deprecatedSource"),
    ("firstTimestamp", "deprecatedFirstTimestamp"),
    ("lastTimestamp", "deprecatedLastTimestamp"),
    ("count", "deprecatedCount"),
    ("reportingComponent", "reportingController"),
];

fn any(about: &str) -> Value {
    json!({"type": "object", "description": about, "x-kubernetes-preserve-unknown-fields": true})
}

fn text(about: &str) -> Value {
    json!({"type": "string", "description": about})
}

fn flag(about: &str) -> Value {
    json!({"type": "boolean", "description": about})
}

fn time(about: &str) -> Value {
    json!({"type": "string", "format": "date-time", "description": about})
}

/// At least `minimum`.
fn count(minimum: u32, about: &str) -> Value {
    json!({"type": "integer", "format": "int32", "minimum": minimum, "description": about})
}

fn texts(about: &str) -> Value {
    json!({"type": "array", "description": about, "items": {"type": "string"}})
}

fn map(about: &str) -> Value {
    json!({"type": "object", "description": about, "additionalProperties": {"type": "string"}})
}

fn object(about: &str, properties: &Value) -> Value {
    json!({"type": "object", "description": about, "properties": properties})
}

fn nullable(mut schema: Value) -> Value {
    schema["nullable"] = json!(true);
    schema
}

fn schema(about: &str, properties: &Value) -> Value {
    json!({"openAPIV3Schema": object(about, properties)})
}

fn age() -> Value {
    json!({"name": "Age", "type": "date", "jsonPath": ".metadata.creationTimestamp"})
}

pub(super) fn namespace() -> Value {
    let condition = object(
        "One thing about the namespace that holds or doesn't.",
        &json!({
            "type": text("What the condition is about."),
            "status": text("Whether it holds: True, False or Unknown."),
            "reason": text("Why, in one word for programs."),
            "message": text("Why, in a sentence for people."),
            "lastTransitionTime": time("When the status changed last."),
        }),
    );
    let about = "While the namespace is on its way out: what of its content keeps it.";
    json!({
        "schema": schema(
            "A space for names: objects in different namespaces may have the same name, and all \
             objects of a namespace go with it.",
            &json!({
                "spec": object("How the namespace is to behave.", &json!({
                    "finalizers": texts("What must happen to its content before it can go."),
                })),
                "status": object("How the namespace is.", &json!({
                    "phase": text("Active, or Terminating while it is being deleted."),
                    "conditions": {"type": "array", "description": about, "items": condition},
                })),
            }),
        ),
        "subresources": {"status": {}},
        "selectableFields": [{"jsonPath": ".status.phase"}],
        "additionalPrinterColumns": [
            {"name": "Status", "type": "string", "jsonPath": ".status.phase"},
            age(),
        ],
    })
}

pub(super) fn secret() -> Value {
    let mut kind = text("What the secret is for, so that programs know which keys to look for.");
    kind["default"] = json!("Opaque");
    json!({
        "schema": schema(
            "Data that not everyone may read, such as keys and passwords: at most 1 MiB or so.",
            &json!({
                "data": map("The secret data by name, each value in base64."),
                "stringData": map(
                    "Data to be written as plain text; it becomes part of `data` and is never \
                     shown.",
                ),
                "type": kind,
                "immutable": flag("When true, the data can't be changed any more."),
            }),
        ),
        "selectableFields": [{"jsonPath": ".type"}],
        "additionalPrinterColumns": [
            {"name": "Type", "type": "string", "jsonPath": ".type"},
            {"name": "Data", "type": "integer", "jsonPath": ".data"},
            age(),
        ],
    })
}

pub(super) fn lease() -> Value {
    let spec = json!({
        "holderIdentity": nullable(text("Who holds the lease; empty while nobody does.")),
        "leaseDurationSeconds": nullable(count(
            1,
            "How long after `renewTime` others must wait before they may take it.",
        )),
        "acquireTime": nullable(time("When its holder took it.")),
        "renewTime": nullable(time("When its holder last said that it still has it.")),
        "leaseTransitions": nullable(count(0, "How often it went from one holder to another.")),
        "strategy": nullable(text("How the holder is chosen, where that is coordinated.")),
        "preferredHolder": nullable(text("To whom the holder should hand it over.")),
    });
    json!({
        "schema": schema(
            "A sign that someone is alive or leads: it counts only while it is renewed.",
            &json!({"spec": object("Who holds the lease, and until when.", &spec)}),
        ),
        "additionalPrinterColumns": [
            {"name": "Holder", "type": "string", "jsonPath": ".spec.holderIdentity"},
            age(),
        ],
    })
}

pub(super) fn definition() -> Value {
    json!({
        "schema": schema(
            "A kind of object that is served beside Kubernetes' own; read-only here.",
            &json!({
                "spec": any("Names, scope and versions of the kind, with their schemas."),
                "status": any("The names and versions that are served."),
            }),
        ),
        "additionalPrinterColumns": [
            {"name": "Created At", "type": "string", "jsonPath": ".metadata.creationTimestamp"},
        ],
    })
}

/// Of the core group.
pub(super) fn core_event() -> Value {
    let own = event_fields().into_iter();
    let fields = own.map(|(name, schema)| {
        let core = EVENT_FIELDS.iter().find(|(_, own)| *own == name);
        (core.map_or(name, |(core, _)| (*core).to_owned()), schema)
    });
    event_version(&fields.collect())
}

/// Of the events' own group.
pub(super) fn own_event() -> Value {
    event_version(&event_fields())
}

fn event_fields() -> Map<String, Value> {
    let reference = |about: &str| {
        let mut reference = object(
            about,
            &json!({
                "apiVersion": text("Group and version of the object."),
                "kind": text("Kind of the object."),
                "name": text("Name of the object."),
                "namespace": text("Namespace of the object."),
                "uid": text("Which of the objects that ever had this name."),
                "resourceVersion": text("The state of the object that is meant."),
                "fieldPath": text("The part of the object that is meant."),
            }),
        );
        reference["x-kubernetes-map-type"] = json!("atomic");
        nullable(reference)
    };
    let series = json!({
        "count": {
            "type": "integer", "format": "int32",
            "description": "How often it happened, up to the time below.",
        },
        "lastObservedTime": nullable(time("When it happened last.")),
    });
    let source = json!({
        "component": text("The program that reports it."),
        "host": text("The machine on which the program runs."),
    });
    let reporter = "The program that reports it, such as exo-controllers.";
    let mut times = count(0, "How often it happened.");
    times.as_object_mut().expect("a schema is a map").remove("minimum");
    let fields = json!({
        "regarding": reference("The object that it is about."),
        "related": reference("A second object that has to do with it."),
        "note": nullable(text("What happened, in a sentence for people.")),
        "reason": nullable(text("Why, in one word for programs.")),
        "type": nullable(text("Normal or Warning.")),
        "action": nullable(text("What was done, or could not be done, about the object.")),
        "eventTime": nullable(time("When it happened first.")),
        "series": nullable(object("Set when it happened again and again.", &series)),
        "reportingController": nullable(text(reporter)),
        "reportingInstance": nullable(text("Which one of these programs, if there are several.")),
        "deprecatedSource": nullable(object("Who reports it, in the older form.", &source)),
        "deprecatedFirstTimestamp": nullable(time("When it happened first, in the older form.")),
        "deprecatedLastTimestamp": nullable(time("When it happened last, in the older form.")),
        "deprecatedCount": nullable(times),
    });
    let Value::Object(fields) = fields else { unreachable!("the literal above is a map") };
    fields
}

fn event_version(fields: &Map<String, Value>) -> Value {
    let (about, note, last, count, source) = if fields.contains_key("note") {
        let source = ".reportingController";
        ("regarding", "note", "deprecatedLastTimestamp", "deprecatedCount", source)
    } else {
        ("involvedObject", "message", "lastTimestamp", "count", ".reportingComponent")
    };
    let mut selectable: Vec<Value> =
        ["kind", "namespace", "name", "uid", "apiVersion", "resourceVersion", "fieldPath"]
            .iter()
            .map(|field| json!({"jsonPath": format!(".{about}.{field}")}))
            .collect();
    for field in ["reason", "type", "reportingController", "reportingComponent"] {
        if fields.contains_key(field) {
            selectable.push(json!({"jsonPath": format!(".{field}")}));
        }
    }
    let what = "Something that happened to an object, told to people; it is kept for an hour.";
    json!({
        "schema": schema(what, &Value::Object(fields.clone())),
        "selectableFields": selectable,
        "additionalPrinterColumns": [
            {"name": "Last Seen", "type": "date", "jsonPath": format!(".{last}")},
            {"name": "Type", "type": "string", "jsonPath": ".type"},
            {"name": "Reason", "type": "string", "jsonPath": ".reason"},
            {"name": "Object", "type": "string", "jsonPath": format!(".{about}")},
            {"name": "Message", "type": "string", "jsonPath": format!(".{note}")},
            {"name": "Source", "type": "string", "jsonPath": source, "priority": 1},
            {"name": "Count", "type": "integer", "jsonPath": format!(".{count}"), "priority": 1},
        ],
    })
}
