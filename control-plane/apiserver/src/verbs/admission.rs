//! What is done to an object before it is stored: checks, defaults, and the fields that only the
//! server writes.

use serde_json::{Value, json};

use crate::{
    builtin, clock,
    error::{ApiError, Cause},
    object::{self, MAX_ANNOTATION_BYTES, MAX_NAME, annotation_bytes, is_dns_subdomain},
    resource::Resource,
    schema,
    server::{Call, Subresource},
};

/// What to do about fields that the schema doesn't know.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum FieldValidation {
    Strict,
    Warn,
    Ignore,
}

impl FieldValidation {
    fn of(call: &Call) -> Result<Self, ApiError> {
        match call.query.get("fieldValidation") {
            Some("Strict") => Ok(Self::Strict),
            None | Some("Warn") => Ok(Self::Warn),
            Some("Ignore") => Ok(Self::Ignore),
            Some(other) => {
                let supported = ["Ignore", "Warn", "Strict"];
                Err(call.unsupported("fieldValidation", other, &supported))
            }
        }
    }
}

/// Fields of the metadata that are stored.
const METADATA_FIELDS: [&str; 14] = [
    "name",
    "generateName",
    "namespace",
    "uid",
    "resourceVersion",
    "generation",
    "creationTimestamp",
    "deletionTimestamp",
    "deletionGracePeriodSeconds",
    "labels",
    "annotations",
    "ownerReferences",
    "finalizers",
    "managedFields",
];
/// Fields of the metadata that clients may send and nothing is done about.
const IGNORED_METADATA_FIELDS: [&str; 1] = ["selfLink"];
/// Fields of the metadata that clients have no say in.
const SERVER_FIELDS: [&str; 5] =
    ["uid", "creationTimestamp", "generation", "deletionTimestamp", "deletionGracePeriodSeconds"];
/// Unknown fields and the like that a client is told of at once, as in Kubernetes.
pub(super) const MAX_FAULTS_TOLD: usize = 100;
/// Of the label of a DNS subdomain.
const MAX_LABEL: usize = 63;

/// Prunes, defaults and validates `object`; returns warnings about what was pruned, and about
/// `duplicates`. The fields' managers are left as they are.
///
/// Faults that `current` has too are let pass: an object from before a stricter schema must stay
/// able to report its status and to lose its finalizers.
pub(super) fn admit(
    call: &Call,
    object: &mut Value,
    current: Option<&Value>,
    duplicates: &[String],
) -> Result<Vec<String>, ApiError> {
    let resource = &call.resource;
    let warnings = prune(call, object, duplicates)?;
    builtin::prepare(resource, object);
    resource.schema.default(object);
    let mut causes = metadata_causes(object, resource.is_namespaces());
    causes.extend(builtin::faults(resource, object, current));
    causes.extend(current.into_iter().flat_map(|old| builtin::fixed(resource, old, object)));
    causes.extend(resource.schema.validate(object, current));
    if let (false, Some(current)) = (causes.is_empty(), current) {
        let known = resource.schema.validate(current, None);
        causes.retain(|cause| !known.contains(cause));
    }
    if !causes.is_empty() {
        return Err(ApiError::Invalid { subject: resource.subject(object::name(object)), causes });
    }
    Ok(warnings)
}

/// Removes unknown fields, or refuses them and `duplicates` where the client wants that; returns
/// warnings.
pub(super) fn prune(
    call: &Call,
    object: &mut Value,
    duplicates: &[String],
) -> Result<Vec<String>, ApiError> {
    let unknown = prune_unknown(&call.resource, object);
    judge(call, unknown, duplicates)
}

/// Removes unknown fields; returns their paths.
pub(super) fn prune_unknown(resource: &Resource, object: &mut Value) -> Vec<String> {
    if resource.builtin {
        // Kubernetes' own decoder makes nothing of nulls.
        schema::drop_nulls(None, object);
    }
    let mut unknown = prune_metadata(object);
    unknown.extend(resource.schema.prune(object));
    unknown
}

/// Refuses unknown fields and `duplicates` where the client wants that; returns warnings.
pub(super) fn judge(
    call: &Call,
    unknown: Vec<String>,
    duplicates: &[String],
) -> Result<Vec<String>, ApiError> {
    let resource = &call.resource;
    let validation = FieldValidation::of(call)?;
    let unknown = unknown.into_iter().map(|path| format!("unknown field \"{path}\""));
    let faults: Vec<String> =
        duplicates.iter().cloned().chain(unknown).take(MAX_FAULTS_TOLD).collect();
    if validation == FieldValidation::Strict && !faults.is_empty() {
        let kind = &resource.kind;
        let version = &resource.version;
        return Err(ApiError::BadRequest(format!(
            "{kind} in version \"{version}\" cannot be handled as {} {kind}: strict decoding \
             error: {}",
            if kind.starts_with(['A', 'E', 'I', 'O']) { "an" } else { "a" },
            faults.join(", ")
        )));
    }
    Ok(if validation == FieldValidation::Warn { faults } else { Vec::new() })
}

/// Removes what isn't metadata, and empty fields; returns the paths of what isn't known.
fn prune_metadata(object: &mut Value) -> Vec<String> {
    let mut unknown = Vec::new();
    object::metadata_mut(object).retain(|name, value| {
        let name = name.as_str();
        let known = METADATA_FIELDS.contains(&name);
        if !known && !IGNORED_METADATA_FIELDS.contains(&name) {
            unknown.push(format!("metadata.{name}"));
        }
        // What is empty says nothing, as in Kubernetes.
        let is_empty = match &*value {
            Value::Null => true,
            Value::Object(map) => map.is_empty(),
            Value::Array(list) => list.is_empty(),
            _ => false,
        };
        known && !is_empty
    });
    unknown
}

/// The object is of this resource, and where the path says.
pub(super) fn check_identity(call: &Call, object: &mut Value) -> Result<(), ApiError> {
    let resource = &call.resource;
    if resource.builtin {
        // Clients of Kubernetes' own types need not name them.
        fill_type(object, &resource.api_version(), &resource.kind);
    }
    if !resource.is_type_of(object) {
        let text = |field: &str| object.get(field).and_then(Value::as_str).unwrap_or_default();
        return Err(ApiError::BadRequest(format!(
            "the object is a {:?} of {:?}; {} of {} is expected here",
            text("kind"),
            text("apiVersion"),
            resource.kind,
            resource.api_version()
        )));
    }
    let namespace = object::namespace(object).filter(|n| !n.is_empty());
    match (&call.namespace, namespace) {
        (Some(expected), None) => {
            let expected = json!(expected);
            object::set_metadata(object, "namespace", Some(expected));
        }
        (Some(expected), Some(found)) if expected != found => {
            return Err(ApiError::BadRequest(format!(
                "the namespace of the provided object does not match the namespace sent on the \
                 request: {found} and {expected}"
            )));
        }
        (Some(_), Some(_)) => {}
        (None, _) => object::set_metadata(object, "namespace", None),
    }
    Ok(())
}

/// Says what an object is, where it doesn't say so itself.
pub(crate) fn fill_type(object: &mut Value, api_version: &str, kind: &str) {
    let Some(fields) = object.as_object_mut() else {
        return;
    };
    for (field, value) in [("apiVersion", api_version), ("kind", kind)] {
        let known = fields.get(field).and_then(Value::as_str).is_some_and(|text| !text.is_empty());
        if !known {
            fields.insert(field.to_owned(), json!(value));
        }
    }
}

/// A new object's server-written fields.
pub(super) fn stamp_new(resource: &Resource, object: &mut Value) {
    for field in SERVER_FIELDS {
        object::set_metadata(object, field, None);
    }
    if resource.has_status
        && let Some(fields) = object.as_object_mut()
    {
        fields.remove("status");
    }
    let uid = uuid::Uuid::new_v4().to_string();
    object::set_metadata(object, "uid", Some(json!(uid)));
    let now = clock::format(clock::now());
    object::set_metadata(object, "creationTimestamp", Some(json!(now)));
    if !resource.builtin {
        object::set_metadata(object, "generation", Some(json!(1)));
    }
    builtin::stamp_new(resource, object);
}

/// Puts together what an update may change: `wanted` is what the client wants, and becomes what
/// will be stored once it is admitted.
pub(super) fn merge_update(call: &Call, current: &Value, wanted: &mut Value) {
    let status_only = call.subresource == Some(Subresource::Status);
    if status_only {
        let status = wanted.get("status").cloned();
        let version = object::resource_version(wanted).map(|v| json!(v));
        *wanted = current.clone();
        object::set_metadata(wanted, "resourceVersion", version);
        set_field(wanted, "status", status);
        return;
    }
    if call.resource.has_status {
        set_field(wanted, "status", current.get("status").cloned());
    }
    if call.resource.builtin && call.resource.kind == builtin::NAMESPACE {
        set_field(wanted, "spec", current.get("spec").cloned());
    }
    for field in SERVER_FIELDS {
        let value = current.pointer(&format!("/metadata/{field}")).cloned();
        object::set_metadata(wanted, field, value);
    }
}

fn set_field(object: &mut Value, field: &str, value: Option<Value>) {
    let Some(fields) = object.as_object_mut() else {
        return;
    };
    match value {
        Some(value) => {
            fields.insert(field.to_owned(), value);
        }
        None => {
            fields.remove(field);
        }
    }
}

/// Counts a change of anything but metadata and status. As in Kubernetes, its own types that are
/// served here have no count.
pub(super) fn bump_generation(resource: &Resource, current: &Value, wanted: &mut Value) {
    if resource.builtin {
        return;
    }
    let desired = |object: &Value| {
        let mut fields = object.as_object().cloned().unwrap_or_default();
        fields.remove("metadata");
        fields.remove("status");
        fields
    };
    if desired(current) != desired(wanted) {
        let generation = json!(object::generation(current) + 1);
        object::set_metadata(wanted, "generation", Some(generation));
    }
}

/// What is wrong with the metadata. Names of namespaces are part of other names.
fn metadata_causes(object: &Value, of_namespace: bool) -> Vec<Cause> {
    let mut causes = Vec::new();
    name_causes(object, of_namespace, &mut causes);
    for field in ["labels", "annotations"] {
        string_map_causes(object, field, &mut causes);
    }
    let annotations = object.pointer("/metadata/annotations").and_then(Value::as_object);
    let bytes = annotations.map_or(0, annotation_bytes);
    if bytes > MAX_ANNOTATION_BYTES {
        causes.push(Cause::too_long("metadata.annotations", MAX_ANNOTATION_BYTES));
    }
    for (index, finalizer) in object::finalizers(object).into_iter().enumerate() {
        if finalizer.is_empty() || finalizer.len() > MAX_NAME {
            let problem = format_args!("{}: must be a name", json!(finalizer));
            causes.push(Cause::invalid(format!("metadata.finalizers[{index}]"), problem));
        }
    }
    owner_causes(object, &mut causes);
    causes
}

fn owner_causes(object: &Value, causes: &mut Vec<Cause>) {
    let owners = object.pointer("/metadata/ownerReferences").and_then(Value::as_array);
    let owners = owners.map_or(&[][..], Vec::as_slice);
    let controllers = owners.iter().filter(|owner| owner["controller"] == true);
    if controllers.count() > 1 {
        let problem = "only one reference can have controller set to true";
        causes.push(Cause::invalid("metadata.ownerReferences", problem));
    }
    for (index, owner) in owners.iter().enumerate() {
        for field in ["apiVersion", "kind", "name", "uid"] {
            // What is no text is found by the schema.
            if owner.get(field).is_none_or(|value| value.is_null() || value == "") {
                let field = format!("metadata.ownerReferences[{index}].{field}");
                causes.push(Cause::required(field));
            }
        }
    }
}

fn name_causes(object: &Value, of_namespace: bool, causes: &mut Vec<Cause>) {
    let name = object::name(object);
    // As Kubernetes words it; of what is too long the characters don't matter.
    let too_long = |field: &str, limit: usize| {
        Cause::invalid(field, format_args!("must be no more than {limit} characters"))
    };
    let label = |field: &str, name: &str| {
        if name.len() > MAX_LABEL {
            return too_long(field, MAX_LABEL);
        }
        Cause::invalid(
            field,
            format_args!(
                "{}: a lowercase RFC 1123 label must consist of lower case \
                 alphanumeric characters or '-', and must start and end with an alphanumeric \
                 character",
                json!(name)
            ),
        )
    };
    if name.is_empty() {
        causes.push(Cause {
            reason: "FieldValueRequired",
            message: "Required value: name or generateName is required".to_owned(),
            field: "metadata.name".to_owned(),
        });
    } else if of_namespace && !is_dns_label(name) {
        causes.push(label("metadata.name", name));
    } else if name.len() > MAX_NAME {
        causes.push(too_long("metadata.name", MAX_NAME));
    } else if !is_dns_subdomain(name) {
        causes.push(Cause::invalid(
            "metadata.name",
            format_args!(
                "{}: a lowercase RFC 1123 subdomain must consist of lower case \
                 alphanumeric characters, '-' or '.', and must start and end with an alphanumeric \
                 character",
                json!(name)
            ),
        ));
    }
    if let Some(namespace) = object::namespace(object)
        && !is_dns_label(namespace)
    {
        causes.push(label("metadata.namespace", namespace));
    }
}

/// Labels and annotations as far as their texts go; what is no text is found by the schema.
fn string_map_causes(object: &Value, field: &str, causes: &mut Vec<Cause>) {
    let map = object.pointer(&format!("/metadata/{field}")).and_then(Value::as_object);
    let is_label = field == "labels";
    let mut refuse = |text: &str, problem: &str| {
        let problem = format_args!("{}: {problem}", json!(text));
        causes.push(Cause::invalid(format!("metadata.{field}"), problem));
    };
    for (key, value) in map.into_iter().flatten() {
        // Of annotations' keys the case doesn't matter.
        let fine = if is_label {
            object::is_qualified_name(key)
        } else {
            object::is_qualified_name(&key.to_ascii_lowercase())
        };
        if !fine {
            refuse(key, object::QUALIFIED_NAME);
        }
        if let Some(value) =
            value.as_str().filter(|value| is_label && !object::is_label_value(value))
        {
            refuse(
                value,
                "a valid label must be an empty string or at most 63 alphanumeric characters, '-', \
                 '_' or '.', and must start and end with an alphanumeric character",
            );
        }
    }
}

fn is_dns_label(text: &str) -> bool {
    text.len() <= MAX_LABEL && !text.contains('.') && is_dns_subdomain(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn metadata_is_checked_field_by_field() {
        let check = |metadata: Value, expect: &[&str]| {
            let causes = metadata_causes(&json!({"metadata": metadata}), false);
            let fields: Vec<_> = causes.iter().map(|c| c.field.as_str()).collect();
            assert_eq!(fields, expect, "{metadata}");
        };
        check(json!({"name": "a-1.b", "namespace": "n"}), &[]);
        check(json!({}), &["metadata.name"]);
        for bad in ["A", "-a", "a-", "a_b", "a..b", "a/b", &"a".repeat(254)] {
            check(json!({"name": bad}), &["metadata.name"]);
        }
        check(json!({"name": "a", "namespace": "a.b"}), &["metadata.namespace"]);
        check(
            json!({"name": "a", "labels": {"x.y/z": "V_1", "empty": ""}, "annotations": null}),
            &[],
        );
        check(json!({"name": "a", "labels": {"x": "a b"}}), &["metadata.labels"]);
        check(json!({"name": "a", "labels": {"x/y/z": "a"}}), &["metadata.labels"]);
        check(
            json!({"name": "a", "labels": {"-x": "a b", "y": "-"}}),
            &["metadata.labels", "metadata.labels", "metadata.labels"],
        );
        check(
            json!({"name": "a", "annotations": {"X.y/Z": "", "x/y/z": ""}}),
            &["metadata.annotations"],
        );
        check(json!({"name": "a", "annotations": {"x": "any text"}}), &[]);
        check(
            json!({"name": "a", "annotations": {"x": "y".repeat(MAX_ANNOTATION_BYTES)}}),
            &["metadata.annotations"],
        );
        check(json!({"name": "a", "finalizers": ["x", ""]}), &["metadata.finalizers[1]"]);
        let owner = json!({
            "apiVersion": "v", "kind": "k", "name": "n", "uid": "u", "controller": true,
        });
        check(json!({"name": "a", "ownerReferences": [owner]}), &[]);
        check(
            json!({"name": "a", "ownerReferences": [owner, owner]}),
            &["metadata.ownerReferences"],
        );
        check(
            json!({"name": "a", "ownerReferences": [{"apiVersion": "v", "kind": "k", "name": "n"}]}),
            &["metadata.ownerReferences[0].uid"],
        );
    }
}
