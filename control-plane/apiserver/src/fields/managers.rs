//! The entries of `metadata.managedFields`, and how writes change them.

use serde_json::{Value, json};

use super::{
    set::{FieldSet, Step},
    typed::{self, Difference},
};
use crate::{
    clock::is_time,
    object::{self, MAX_ANNOTATION_BYTES, annotation_bytes},
};

/// Stands for whoever wrote what was there before fields were managed.
const BEFORE_FIRST_APPLY: &str = "before-first-apply";
/// Stands for the updates of managers that were forgotten.
const ANCIENT_CHANGES: &str = "ancient-changes";
/// Name that kubectl applies under, and where it kept what it applied by itself.
const KUBECTL: &str = "kubectl";
const LAST_APPLIED: &str = "kubectl.kubernetes.io/last-applied-configuration";
/// Entries by updates, as in Kubernetes; the oldest are put together.
const MAX_UPDATE_ENTRIES: usize = 10;
/// Fields that belong to the server, within the metadata.
const SERVER_METADATA: [&str; 10] = [
    "name",
    "namespace",
    "creationTimestamp",
    "deletionTimestamp",
    "deletionGracePeriodSeconds",
    "selfLink",
    "uid",
    "generation",
    "managedFields",
    "resourceVersion",
];

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Operation {
    Apply,
    Update,
}

/// Who writes, and when.
#[derive(Clone, Debug)]
pub(crate) struct Author<'a> {
    pub(crate) manager: &'a str,
    pub(crate) api_version: String,
    /// Empty for the object itself.
    pub(crate) subresource: &'a str,
    /// RFC 3339.
    pub(crate) now: &'a str,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Entry {
    operation: Operation,
    time: String,
    manager: String,
    api_version: String,
    subresource: String,
    fields: FieldSet,
}

impl Entry {
    fn new(operation: Operation, author: &Author<'_>, fields: FieldSet) -> Self {
        Self {
            operation,
            time: author.now.to_owned(),
            manager: author.manager.to_owned(),
            api_version: author.api_version.clone(),
            subresource: author.subresource.to_owned(),
            fields,
        }
    }

    fn is_of(&self, operation: Operation, author: &Author<'_>) -> bool {
        self.operation == operation
            && self.manager == author.manager
            && self.api_version == author.api_version
            && self.subresource == author.subresource
    }

    fn decode(value: &Value) -> Option<Self> {
        let text = |field: &str| value.get(field).and_then(Value::as_str).unwrap_or_default();
        if text("fieldsType") != "FieldsV1" || !(text("time").is_empty() || is_time(text("time"))) {
            return None;
        }
        Some(Self {
            operation: match text("operation") {
                "Apply" => Operation::Apply,
                "Update" => Operation::Update,
                _ => return None,
            },
            time: text("time").to_owned(),
            manager: text("manager").to_owned(),
            api_version: text("apiVersion").to_owned(),
            subresource: text("subresource").to_owned(),
            fields: FieldSet::decode(value.get("fieldsV1")?)?,
        })
    }

    fn encode(&self) -> Value {
        let mut entry = json!({
            "manager": self.manager,
            "operation": match self.operation {
                Operation::Apply => "Apply",
                Operation::Update => "Update",
            },
            "apiVersion": self.api_version,
        });
        if !self.time.is_empty() {
            entry["time"] = json!(self.time);
        }
        entry["fieldsType"] = json!("FieldsV1");
        entry["fieldsV1"] = self.fields.encode();
        if !self.subresource.is_empty() {
            entry["subresource"] = json!(self.subresource);
        }
        entry
    }

    /// As a conflict names it.
    fn shown(&self) -> String {
        let mut text = json!(self.manager).to_string();
        if !self.subresource.is_empty() {
            text += &format!(" with subresource {}", json!(self.subresource));
        }
        if self.operation == Operation::Update {
            text += &format!(" using {}", self.api_version);
            if !self.time.is_empty() {
                text += &format!(" at {}", self.time);
            }
        }
        text
    }
}

/// `None` where the object has no entries, or such as can't be read.
fn decode(object: &Value) -> Option<Vec<Entry>> {
    let entries = object.pointer("/metadata/managedFields")?.as_array()?;
    let entries: Vec<Entry> = entries.iter().map(Entry::decode).collect::<Option<_>>()?;
    (!entries.is_empty()).then_some(entries)
}

fn store(object: &mut Value, mut entries: Vec<Entry>) {
    entries.retain(|entry| !entry.fields.is_empty());
    entries.sort_by(|a, b| {
        let key = |e: &Entry| {
            (
                e.operation,
                e.time.clone(),
                e.manager.clone(),
                e.api_version.clone(),
                e.subresource.clone(),
            )
        };
        key(a).cmp(&key(b))
    });
    forget_oldest(&mut entries);
    let entries: Vec<Value> = entries.iter().map(Entry::encode).collect();
    let entries = (!entries.is_empty()).then_some(Value::Array(entries));
    object::set_metadata(object, "managedFields", entries);
}

/// `entries` are in order: updates come last, oldest first.
fn forget_oldest(entries: &mut Vec<Entry>) {
    let first = entries.iter().take_while(|e| e.operation == Operation::Apply).count();
    let excess = (entries.len() - first).saturating_sub(MAX_UPDATE_ENTRIES);
    if excess == 0 {
        return;
    }
    let forgotten: Vec<Entry> = entries.drain(first..=first + excess).collect();
    let mut forgotten = forgotten.into_iter();
    if let Some(mut ancient) = forgotten.next() {
        ancient.manager = ANCIENT_CHANGES.to_owned();
        ancient.subresource.clear();
        for entry in forgotten {
            ancient.fields.union(&entry.fields);
            ancient.time = entry.time;
        }
        entries.insert(first, ancient);
    }
}

/// Takes out what belongs to the server.
fn strip(set: &mut FieldSet) {
    let field = |name: &str| Step::Field(name.to_owned());
    set.member = false;
    set.children.remove(&field("apiVersion"));
    set.children.remove(&field("kind"));
    if let Some(metadata) = set.children.get_mut(&field("metadata")) {
        metadata.member = false;
        for name in SERVER_METADATA {
            metadata.children.remove(&field(name));
        }
        if metadata.is_empty() {
            set.children.remove(&field("metadata"));
        }
    }
}

fn stripped_difference(schema: &Value, old: &Value, new: &Value) -> Difference {
    let mut difference = typed::compare(Some(schema), old, new);
    strip(&mut difference.changed);
    strip(&mut difference.removed);
    difference
}

/// Enters the author of a new object.
pub(crate) fn created(schema: &Value, object: &mut Value, author: &Author<'_>) {
    let difference = stripped_difference(schema, &json!({}), object);
    store(object, vec![Entry::new(Operation::Update, author, difference.changed)]);
}

/// Enters the author of what turned `current` into `object`.
///
/// `claimed` is what the client made of the entries: others that can be read are taken as they
/// are, and a single empty one ends the bookkeeping. An object without entries stays so until it
/// is applied.
pub(crate) fn updated(
    schema: &Value,
    current: &Value,
    object: &mut Value,
    claimed: Option<&Value>,
    author: &Author<'_>,
) {
    if claimed == Some(&json!([{}])) {
        object::set_metadata(object, "managedFields", None);
        return;
    }
    let claimed = claimed.and_then(|c| decode(&json!({"metadata": {"managedFields": c}})));
    let Some(mut entries) = claimed.or_else(|| decode(current)) else {
        object::set_metadata(object, "managedFields", None);
        return;
    };
    let difference = stripped_difference(schema, current, object);
    if !difference.is_empty() {
        take_over(&mut entries, &difference);
        match entries.iter_mut().find(|e| e.is_of(Operation::Update, author)) {
            Some(entry) => {
                entry.fields.union(&difference.changed);
                author.now.clone_into(&mut entry.time);
            }
            None => entries.push(Entry::new(Operation::Update, author, difference.changed)),
        }
    }
    store(object, entries);
}

/// What is changed is no longer what others have made it, and what is removed is no one's.
fn take_over(entries: &mut [Entry], difference: &Difference) {
    for entry in entries {
        entry.fields.subtract(&difference.changed);
        entry.fields.subtract_below(&difference.removed);
    }
}

/// A field that another manager holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct FieldConflict {
    pub(crate) manager: String,
    /// Such as `.spec.replicas`.
    pub(crate) field: String,
}

/// Merges `config` into `current` (`None`: there is no such object), by `author`; returns the object
/// with its entries.
///
/// `config` holds what the author wants to be responsible for and nothing else; what they applied
/// earlier and left out now is removed unless someone else holds it.
///
/// # Errors
/// The fields that others hold and `config` changes, unless `force` takes them over.
pub(crate) fn apply(
    schema: &Value,
    current: Option<&Value>,
    config: &Value,
    force: bool,
    author: &Author<'_>,
) -> Result<Value, Vec<FieldConflict>> {
    let mut wanted = FieldSet::default();
    typed::collect(Some(schema), config, false, &mut wanted);
    strip(&mut wanted);
    let Some(current) = current else {
        let mut object = config.clone();
        store(&mut object, vec![Entry::new(Operation::Apply, author, wanted)]);
        return Ok(object);
    };
    let mut entries = decode(current).unwrap_or_else(|| vec![before_first_apply(schema, current)]);
    let own = entries.iter().position(|e| e.is_of(Operation::Apply, author));
    let own = own.map(|at| entries.remove(at));

    let mut object = current.clone();
    typed::merge(Some(schema), &mut object, config);
    if let Some(own) = &own {
        let mut owned = wanted.clone();
        entries.iter().for_each(|entry| owned.union(&entry.fields));
        // The metadata stays, whatever of it is held.
        owned.child(Step::Field("metadata".to_owned()));
        typed::remove_unowned(&mut object, &own.fields, &owned);
    }
    let difference = stripped_difference(schema, current, &object);
    let conflicts: Vec<FieldConflict> = entries
        .iter()
        .flat_map(|entry| {
            let fields = entry.fields.shared(&difference.changed).into_iter();
            fields.map(|field| FieldConflict { manager: entry.shown(), field })
        })
        .collect();
    let is_forced = force || is_own_past(schema, current, &difference, &conflicts, author);
    if !is_forced && !conflicts.is_empty() {
        return Err(conflicts);
    }
    take_over(&mut entries, &difference);
    let mut entry = Entry::new(Operation::Apply, author, wanted);
    if let Some(own) = own.filter(|own| own.fields == entry.fields && difference.is_empty()) {
        entry.time = own.time;
    }
    entries.push(entry);
    store(&mut object, entries);
    if author.manager == KUBECTL && author.subresource.is_empty() {
        renew_last_applied(&mut object, config);
    }
    Ok(object)
}

/// What kubectl applied by itself is what it goes by when it does so again: where there is such an
/// annotation, it must not fall behind. As in Kubernetes, an empty one is none, and one that would
/// be too long goes.
fn renew_last_applied(object: &mut Value, config: &Value) {
    let annotations = object.pointer_mut("/metadata/annotations").and_then(Value::as_object_mut);
    let has_text = |value: &Value| value.as_str().is_some_and(|text| !text.is_empty());
    let Some(annotations) = annotations.filter(|a| a.get(LAST_APPLIED).is_some_and(has_text))
    else {
        return;
    };
    let mut config = config.clone();
    let own = config.pointer_mut("/metadata/annotations").and_then(Value::as_object_mut);
    own.and_then(|own| own.remove(LAST_APPLIED));
    annotations.insert(LAST_APPLIED.to_owned(), json!(format!("{config}\n")));
    if annotation_bytes(annotations) > MAX_ANNOTATION_BYTES {
        annotations.remove(LAST_APPLIED);
    }
}

/// kubectl keeps what it applied by itself in an annotation. What it has from there is its own when
/// it goes over to server-side apply.
fn is_own_past(
    schema: &Value,
    current: &Value,
    difference: &Difference,
    conflicts: &[FieldConflict],
    author: &Author<'_>,
) -> bool {
    let annotations = current.pointer("/metadata/annotations");
    let text = annotations.and_then(|a| a.get(LAST_APPLIED)?.as_str());
    let last = text.and_then(|text| serde_json::from_str::<Value>(text).ok());
    let Some(last) = last.filter(|_| author.manager == KUBECTL) else {
        return false;
    };
    let mut fields = FieldSet::default();
    typed::collect(Some(schema), &last, false, &mut fields);
    let own = fields.shared(&difference.changed);
    conflicts.iter().all(|conflict| own.contains(&conflict.field))
}

fn before_first_apply(schema: &Value, current: &Value) -> Entry {
    let mut fields = FieldSet::default();
    typed::collect(Some(schema), current, true, &mut fields);
    strip(&mut fields);
    let api_version = current.get("apiVersion").and_then(Value::as_str).unwrap_or_default();
    Entry {
        operation: Operation::Update,
        time: String::new(),
        manager: BEFORE_FIRST_APPLY.to_owned(),
        api_version: api_version.to_owned(),
        subresource: String::new(),
        fields,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn author(manager: &'static str) -> Author<'static> {
        Author { manager, api_version: "g/v".into(), subresource: "", now: "2026-01-01T00:00:00Z" }
    }

    fn schema() -> Value {
        json!({"type": "object", "properties": {"spec": {"type": "object", "properties": {
            "a": {"type": "integer"}, "b": {"type": "integer"},
            "labels": {"type": "object", "additionalProperties": {"type": "string"}}
        }}}})
    }

    fn apply_as(
        manager: &'static str,
        current: Option<&Value>,
        spec: &Value,
        force: bool,
    ) -> Result<Value, Vec<FieldConflict>> {
        let config = json!({"apiVersion": "g/v", "kind": "K", "metadata": {"name": "x"},
                            "spec": spec});
        apply(&schema(), current, &config, force, &author(manager))
    }

    /// Manager, operation and fields of each entry.
    fn held(object: &Value) -> Vec<(String, String, Value)> {
        let entries = object.pointer("/metadata/managedFields").and_then(Value::as_array);
        let text = |v: &Value| v.as_str().unwrap().to_owned();
        entries
            .into_iter()
            .flatten()
            .map(|e| (text(&e["manager"]), text(&e["operation"]), e["fieldsV1"].clone()))
            .collect()
    }

    #[test]
    fn fields_are_shared_contested_and_taken() {
        let first = apply_as("one", None, &json!({"a": 1, "b": 1}), false).unwrap();
        let shared = apply_as("two", Some(&first), &json!({"a": 1}), false).unwrap();
        assert_eq!(shared["spec"], json!({"a": 1, "b": 1}));
        let conflicts = apply_as("two", Some(&shared), &json!({"a": 1, "b": 2}), false);
        let conflict = FieldConflict { manager: "\"one\"".into(), field: ".spec.b".into() };
        assert_eq!(conflicts, Err(vec![conflict]));
        let taken = apply_as("two", Some(&shared), &json!({"a": 1, "b": 2}), true).unwrap();
        assert_eq!(taken["spec"], json!({"a": 1, "b": 2}));
        assert_eq!(
            held(&taken),
            [
                ("one".into(), "Apply".into(), json!({"f:spec": {"f:a": {}}})),
                ("two".into(), "Apply".into(), json!({"f:spec": {"f:a": {}, "f:b": {}}})),
            ]
        );
        // What one leaves out stays as long as the other holds it.
        let left = apply_as("one", Some(&taken), &json!({}), false).unwrap();
        assert_eq!(left["spec"], json!({"a": 1, "b": 2}));
        let left = apply_as("two", Some(&left), &json!({"b": 2}), false).unwrap();
        assert_eq!(left["spec"], json!({"b": 2}));
    }

    #[test]
    fn updates_take_fields_without_asking() {
        let mut object = json!({"spec": {"a": 1, "labels": {"x": "1"}}});
        created(&schema(), &mut object, &author("maker"));
        assert_eq!(
            held(&object),
            [(
                "maker".into(),
                "Update".into(),
                json!({"f:spec": {".": {}, "f:a": {}, "f:labels": {".": {}, "f:x": {}}}}),
            )]
        );
        let mut changed = object.clone();
        changed["spec"] = json!({"a": 2, "labels": {}});
        let claimed = changed["metadata"]["managedFields"].clone();
        updated(&schema(), &object, &mut changed, Some(&claimed), &author("changer"));
        assert_eq!(
            held(&changed),
            [
                ("changer".into(), "Update".into(), json!({"f:spec": {"f:a": {}}})),
                ("maker".into(), "Update".into(), json!({"f:spec": {".": {}, "f:labels": {}}}),),
            ]
        );
        let conflicts = apply_as("one", Some(&changed), &json!({"a": 3}), false).unwrap_err();
        assert_eq!(conflicts[0].manager, "\"changer\" using g/v at 2026-01-01T00:00:00Z");
        let mut reset = changed.clone();
        updated(&schema(), &changed, &mut reset, Some(&json!([{}])), &author("changer"));
        assert_eq!(held(&reset), []);
        let applied = apply_as("one", Some(&reset), &json!({"a": 2}), false).unwrap();
        assert_eq!(held(&applied)[1].0, BEFORE_FIRST_APPLY);
    }

    #[test]
    fn old_updates_are_put_together() {
        let mut object = json!({"spec": {}});
        created(&schema(), &mut object, &author("maker"));
        for (index, manager) in
            ["a", "b", "c", "d", "e", "f", "g", "h", "i", "j", "k", "l"].into_iter().enumerate()
        {
            let mut changed = object.clone();
            changed["spec"]["labels"][manager] = json!(index.to_string());
            updated(&schema(), &object, &mut changed, None, &author(manager));
            object = changed;
        }
        let held = held(&object);
        assert_eq!(held.len(), MAX_UPDATE_ENTRIES);
        assert!(held.iter().any(|(manager, ..)| manager == ANCIENT_CHANGES));
    }
}
