//! Objects as JSON: their metadata, and their form in the store.

use exo_store::Entry;
use serde_json::{Map, Value};

use crate::{body::MAX_BODY_BYTES, error::ApiError};

pub(crate) fn text<'a>(object: &'a Value, field: &str) -> Option<&'a str> {
    object.get("metadata")?.get(field)?.as_str()
}

pub(crate) fn name(object: &Value) -> &str {
    text(object, "name").unwrap_or_default()
}

pub(crate) fn namespace(object: &Value) -> Option<&str> {
    text(object, "namespace")
}

pub(crate) fn uid(object: &Value) -> Option<&str> {
    text(object, "uid")
}

pub(crate) fn resource_version(object: &Value) -> Option<&str> {
    text(object, "resourceVersion").filter(|v| !v.is_empty())
}

pub(crate) fn is_deleting(object: &Value) -> bool {
    text(object, "deletionTimestamp").is_some()
}

pub(crate) fn generation(object: &Value) -> i64 {
    let generation = object.pointer("/metadata/generation");
    generation.and_then(Value::as_i64).unwrap_or(0)
}

pub(crate) fn finalizers(object: &Value) -> Vec<&str> {
    let finalizers = object.pointer("/metadata/finalizers");
    finalizers
        .and_then(Value::as_array)
        .map(|list| list.iter().filter_map(Value::as_str).collect())
        .unwrap_or_default()
}

/// Something must happen before a deleted object can go.
pub(crate) fn is_held(object: &Value) -> bool {
    let is_namespace = object.get("kind").and_then(Value::as_str) == Some("Namespace")
        && object.get("apiVersion").and_then(Value::as_str) == Some("v1");
    let content = object.pointer("/spec/finalizers").and_then(Value::as_array);
    !finalizers(object).is_empty() || is_namespace && content.is_some_and(|f| !f.is_empty())
}

fn owner_references(object: &Value) -> impl Iterator<Item = &Value> {
    let owners = object.pointer("/metadata/ownerReferences");
    owners.and_then(Value::as_array).map_or(&[][..], Vec::as_slice).iter()
}

/// `apiVersion` and kind of the owners.
pub(crate) fn owner_kinds(object: &Value) -> impl Iterator<Item = (String, String)> {
    owner_references(object).map(|owner| {
        let text = |field: &str| owner.get(field).and_then(Value::as_str).unwrap_or_default();
        (text("apiVersion").to_owned(), text("kind").to_owned())
    })
}

/// uids of the owners, each with whether this blocks the owner's deletion in the foreground.
pub(crate) fn owners(object: &Value) -> impl Iterator<Item = (&str, bool)> {
    owner_references(object).filter_map(|owner| {
        let blocks = owner.get("blockOwnerDeletion").and_then(Value::as_bool);
        Some((owner.get("uid")?.as_str()?, blocks == Some(true)))
    })
}

/// The metadata to change; made where there is none. `object` is a JSON object.
pub(crate) fn metadata_mut(object: &mut Value) -> &mut Map<String, Value> {
    let metadata = &mut object["metadata"];
    if !metadata.is_object() {
        *metadata = Value::Object(Map::new());
    }
    metadata.as_object_mut().expect("it was made an object just above")
}

/// Sets a field of the metadata, or removes it.
pub(crate) fn set_metadata(object: &mut Value, field: &str, value: Option<Value>) {
    let metadata = metadata_mut(object);
    match value {
        Some(value) => {
            metadata.insert(field.to_owned(), value);
        }
        None => {
            metadata.remove(field);
        }
    }
}

/// The object of an entry, with its resource version.
pub(crate) fn decode(entry: &Entry) -> Result<Value, ApiError> {
    decode_at(entry, entry.mod_revision)
}

/// The same at another resource version: a deleted object shows the revision of its deletion.
pub(crate) fn decode_at(entry: &Entry, revision: u64) -> Result<Value, ApiError> {
    let fields: Map<String, Value> = serde_json::from_str(&entry.value).map_err(|error| {
        ApiError::Internal(format!("the stored object {} is damaged: {error}", entry.key))
    })?;
    let mut object = Value::Object(fields);
    set_metadata(&mut object, "resourceVersion", Some(Value::String(revision.to_string())));
    Ok(object)
}

/// How the stored form of an object begins, up to the metadata's fields.
pub(crate) fn head(api_version: &str, kind: &str) -> String {
    let (api_version, kind) = (Value::from(api_version), Value::from(kind));
    format!("{{\"apiVersion\":{api_version},\"kind\":{kind},\"metadata\":{{")
}

/// The same object with what it is, and its metadata, before all else.
fn ordered(object: Value) -> Value {
    let Value::Object(mut fields) = object else {
        return object;
    };
    let first = ["apiVersion", "kind", "metadata"];
    let first = first.into_iter().filter_map(|name| fields.shift_remove_entry(name));
    let mut ordered: Map<String, Value> = first.collect();
    ordered.extend(fields);
    Value::Object(ordered)
}

/// The stored form: its place in the store's history is its resource version.
///
/// # Errors
/// `TooLarge` for more than a request could have brought.
pub(crate) fn encode(object: &Value, convert: impl Fn(&mut Value)) -> Result<String, ApiError> {
    let mut object = object.clone();
    convert(&mut object);
    set_metadata(&mut object, "resourceVersion", None);
    let text = ordered(object).to_string();
    if text.len() > MAX_BODY_BYTES {
        return Err(ApiError::TooLarge(MAX_BODY_BYTES));
    }
    Ok(text)
}

/// As in Kubernetes: of keys and values of all annotations together.
pub(crate) const MAX_ANNOTATION_BYTES: usize = 256 << 10;

/// Keys and values of all annotations together.
pub(crate) fn annotation_bytes(annotations: &Map<String, Value>) -> usize {
    annotations.iter().map(|(key, value)| key.len() + value.as_str().map_or(0, str::len)).sum()
}

/// Of a DNS subdomain, in bytes.
pub(crate) const MAX_NAME: usize = 253;
/// What [`is_qualified_name`] wants.
pub(crate) const QUALIFIED_NAME: &str = "a name of at most 63 characters is needed, after a DNS \
    subdomain and '/' if there is one; it must consist of alphanumeric characters, '-', '_' or \
    '.', and must start and end with an alphanumeric character";

pub(crate) fn is_dns_subdomain(text: &str) -> bool {
    let label = |part: &str| {
        let inner = |c: u8| c.is_ascii_lowercase() || c.is_ascii_digit() || c == b'-';
        !part.is_empty()
            && part.bytes().all(inner)
            && !part.starts_with('-')
            && !part.ends_with('-')
    };
    text.len() <= MAX_NAME && text.split('.').all(label)
}

/// What keys of labels are, and names of programs.
pub(crate) fn is_qualified_name(key: &str) -> bool {
    let (prefix, name) = match key.split_once('/') {
        Some((prefix, name)) => (Some(prefix), name),
        None => (None, key),
    };
    prefix.is_none_or(is_dns_subdomain) && !name.is_empty() && is_label_value(name)
}

/// What a label may hold: also the last part of its key, if it is not empty.
pub(crate) fn is_label_value(value: &str) -> bool {
    let inner = |c: u8| c.is_ascii_alphanumeric() || b"-_.".contains(&c);
    let outer = |c: Option<&u8>| c.is_none_or(u8::is_ascii_alphanumeric);
    let bytes = value.as_bytes();
    bytes.len() <= 63
        && bytes.iter().all(|c| inner(*c))
        && outer(bytes.first())
        && outer(bytes.last())
}
