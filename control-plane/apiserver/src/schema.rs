//! A CRD's schema at work: unknown fields, defaults, validation.
//!
//! Structural schemas (OpenAPI 3.0 as CRDs write it) are walked by hand for unknown fields and
//! defaults; the rest is translated to JSON Schema and left to `jsonschema`.

mod structural;
mod words;

use jsonschema::{Draft, Validator};
use serde_json::{Map, Value, json};

pub(crate) use structural::drop_nulls;
pub(crate) use words::shown;

use structural::is_whole_number;

use crate::{clock, error::Cause, fields, rules::Rules};

/// A schema that can't be compiled.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SchemaError {
    #[error("writing the schema as JSON")]
    Json(#[source] serde_json::Error),
    #[error("the schema is invalid: {0}")]
    Invalid(String),
    #[error("a rule is invalid: {0}")]
    Rule(String),
}

#[derive(Debug)]
pub(crate) struct Schema {
    structural: Value,
    /// The same with the metadata's schema.
    typed: Value,
    validator: Validator,
    rules: Option<Rules>,
}

/// More causes than a person reads are cut off.
const MAX_CAUSES: usize = 32;

impl Schema {
    pub(crate) fn compile(structural: Value) -> Result<Self, SchemaError> {
        let mut typed = structural.clone();
        typed["properties"]["metadata"] = metadata_schema(&structural);
        let validator = jsonschema::options()
            .with_draft(Draft::Draft202012)
            .should_validate_formats(true)
            .should_ignore_unknown_formats(true)
            .with_format("date-time", clock::is_time)
            .build(&translate(&typed))
            .map_err(|error| SchemaError::Invalid(error.to_string()))?;
        let rules = Rules::compile(&structural)?;
        Ok(Self { structural, typed, validator, rules })
    }

    /// The schema as the definition has it.
    pub(crate) fn structural(&self) -> &Value {
        &self.structural
    }

    /// How objects are divided into fields.
    pub(crate) fn typed(&self) -> &Value {
        &self.typed
    }

    /// Removes fields that the schema doesn't know and returns their paths.
    pub(crate) fn prune(&self, object: &mut Value) -> Vec<String> {
        let mut unknown = Vec::new();
        structural::prune(&self.structural, object, "", &mut unknown);
        unknown
    }

    /// Fills in what is absent and has a default. Where a whole number is wanted, `2.0` becomes `2`:
    /// both are the same to a schema, but not to those who read the object into a type.
    pub(crate) fn default(&self, object: &mut Value) {
        structural::default(&self.structural, object);
    }

    /// Everything that is wrong, in the order of the fields. Rules are asked about what is otherwise
    /// right, those about changes if there is something `old`.
    pub(crate) fn validate(&self, object: &Value, old: Option<&Value>) -> Vec<Cause> {
        let mut causes: Vec<Cause> = self
            .validator
            .iter_errors(object)
            .take(MAX_CAUSES)
            .map(|error| words::cause(&error))
            .collect();
        fields::duplicates(Some(&self.structural), object, "", &mut causes);
        if let (true, Some(rules)) = (causes.is_empty(), &self.rules) {
            causes = rules.broken(object, old);
        }
        causes.sort_by(|a, b| a.field.cmp(&b.field));
        causes
    }
}

/// What clients write of `metav1.ObjectMeta`, with the bounds that a definition may set to names.
/// Its lists are merged by element.
fn metadata_schema(structural: &Value) -> Value {
    let text = json!({"type": "string"});
    let texts = json!({"type": "object", "additionalProperties": text});
    let flag = json!({"type": "boolean", "nullable": true});
    let bounded = |name: &str| {
        let bounds = structural.pointer(&format!("/properties/metadata/properties/{name}"));
        let mut schema = bounds.and_then(Value::as_object).cloned().unwrap_or_default();
        schema.insert("type".to_owned(), json!("string"));
        schema
    };
    json!({"type": "object", "properties": {
        "name": bounded("name"),
        "generateName": bounded("generateName"),
        "labels": texts,
        "annotations": texts,
        "finalizers": {"type": "array", "x-kubernetes-list-type": "set", "items": text},
        "ownerReferences": {
            "type": "array",
            "x-kubernetes-list-type": "map",
            "x-kubernetes-list-map-keys": ["uid"],
            "items": {"type": "object", "x-kubernetes-map-type": "atomic", "properties": {
                "apiVersion": text, "kind": text, "name": text, "uid": text,
                "controller": flag, "blockOwnerDeletion": flag,
            }},
        },
    }})
}

/// Least and greatest number of a format. Without one it is a number of 64 bits.
fn bounds(format: Option<&str>) -> (Value, Value) {
    match format {
        Some("uint8") => (json!(0), json!(u8::MAX)),
        Some("uint16") => (json!(0), json!(u16::MAX)),
        Some("uint32") => (json!(0), json!(u32::MAX)),
        Some("uint64") => (json!(0), json!(u64::MAX)),
        Some("int32") => (json!(i32::MIN), json!(i32::MAX)),
        _ => (json!(i64::MIN), json!(i64::MAX)),
    }
}

/// From a CRD's dialect to JSON Schema 2020-12.
fn translate(schema: &Value) -> Value {
    let Some(fields) = schema.as_object() else {
        return schema.clone();
    };
    let flag = |name: &str| fields.get(name) == Some(&Value::Bool(true));
    let mut out = Map::new();
    for (name, value) in fields {
        let translated = match name.as_str() {
            "nullable" | "default" | "example" | "description" | "externalDocs" => continue,
            _ if name.starts_with("x-") => continue,
            "properties" | "patternProperties" => {
                let fields = value.as_object().into_iter().flatten();
                fields.map(|(n, s)| (n.clone(), translate(s))).collect()
            }
            "items" | "additionalProperties" | "not" => translate(value),
            "allOf" | "anyOf" | "oneOf" => {
                let schemas = value.as_array().into_iter().flatten();
                schemas.map(translate).collect()
            }
            // OpenAPI 3.0 writes these as flags beside the limit.
            "exclusiveMinimum" | "exclusiveMaximum" if value.is_boolean() => continue,
            "minimum" if flag("exclusiveMinimum") => {
                out.insert("exclusiveMinimum".to_owned(), value.clone());
                continue;
            }
            "maximum" if flag("exclusiveMaximum") => {
                out.insert("exclusiveMaximum".to_owned(), value.clone());
                continue;
            }
            _ => value.clone(),
        };
        out.insert(name.clone(), translated);
    }
    if is_whole_number(schema) {
        // JSON Schema knows no such formats; types that are read from an object do.
        let (least, greatest) = bounds(fields.get("format").and_then(Value::as_str));
        out.entry("minimum").or_insert(least);
        out.entry("maximum").or_insert(greatest);
    }
    if flag("x-kubernetes-int-or-string") {
        out.insert("type".to_owned(), json!(["integer", "string"]));
    }
    if flag("nullable") {
        allow_null(&mut out);
    }
    Value::Object(out)
}

fn allow_null(schema: &mut Map<String, Value>) {
    match schema.get_mut("type") {
        Some(Value::Array(types)) => types.push(json!("null")),
        Some(one) => *one = json!([one.clone(), "null"]),
        None => {}
    }
    if let Some(Value::Array(values)) = schema.get_mut("enum")
        && !values.contains(&Value::Null)
    {
        values.push(Value::Null);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn schema() -> Schema {
        Schema::compile(json!({
            "type": "object",
            "required": ["spec"],
            "properties": {
                "spec": {
                    "type": "object",
                    "required": ["model"],
                    "properties": {
                        "model": {"type": "string", "minLength": 1},
                        "replicas": {
                            "type": "integer", "format": "uint32", "default": 1, "minimum": 0.0
                        },
                        "seed": {"type": "integer", "format": "uint64"},
                        "count": {"type": "integer"},
                        "limit": {"type": "number", "minimum": 0, "exclusiveMinimum": true},
                        "mode": {"type": "string", "enum": ["A", "B"], "nullable": true},
                        "when": {"type": "string", "format": "date-time"},
                        "nodes": {
                            "type": "object", "default": {},
                            "properties": {"min": {"type": "integer", "default": 2}}
                        },
                        "list": {"type": "array", "items": {
                            "type": "object",
                            "properties": {"a": {"type": "integer", "default": 3}}
                        }},
                        "map": {"type": "object", "additionalProperties": {"type": "string"}},
                        "free": {"type": "object", "x-kubernetes-preserve-unknown-fields": true},
                        "port": {"x-kubernetes-int-or-string": true}
                    }
                }
            }
        }))
        .unwrap()
    }

    #[test]
    fn unknown_fields_go_and_are_named() {
        let mut object = json!({
            "apiVersion": "v", "kind": "k", "metadata": {"x": 1},
            "other": 1,
            "spec": {
                "model": "m", "modle": "m",
                "nodes": {"mim": 1},
                "list": [{"a": 1}, {"b": 1}],
                "map": {"any": "x"},
                "free": {"any": {"thing": 1}}
            }
        });
        let unknown = schema().prune(&mut object);
        assert_eq!(unknown, ["other", "spec.modle", "spec.nodes.mim", "spec.list[1].b"]);
        assert_eq!(
            object,
            json!({
                "apiVersion": "v", "kind": "k", "metadata": {"x": 1},
                "spec": {
                    "model": "m", "nodes": {}, "list": [{"a": 1}, {}],
                    "map": {"any": "x"}, "free": {"any": {"thing": 1}}
                }
            })
        );
    }

    #[test]
    fn defaults_reach_into_what_they_add() {
        let mut object = json!({"spec": {"replicas": null, "list": [{}, {"a": 5}]}});
        schema().default(&mut object);
        assert_eq!(
            object,
            json!({"spec": {
                "replicas": 1, "nodes": {"min": 2}, "list": [{"a": 3}, {"a": 5}]
            }})
        );
    }

    #[test]
    fn whole_numbers_are_written_as_such_and_fit_their_types() {
        let check = |spec: Value, expect: Value| {
            let mut object = json!({"spec": spec});
            object["spec"]["model"] = json!("m");
            schema().default(&mut object);
            assert_eq!(object["spec"].get("seed"), expect.get("seed"), "{object}");
            assert_eq!(schema().validate(&object, None), [], "{object}");
        };
        check(json!({"seed": 2.0}), json!({"seed": 2}));
        check(json!({"seed": -0.0}), json!({"seed": 0}));
        check(json!({"seed": 1e19}), json!({"seed": 10_000_000_000_000_000_000_u64}));
        check(json!({"seed": u64::MAX}), json!({"seed": u64::MAX}));
        check(json!({"count": -2e9, "replicas": 4e9}), json!({}));
        for bad in [
            json!({"seed": 1.5}),
            json!({"seed": -1.0}),
            json!({"seed": 18_446_744_073_709_551_616.0}),
            json!({"seed": 1e300}),
            json!({"replicas": 4_294_967_296_u64}),
            json!({"count": u64::MAX}),
            json!({"count": -1e19}),
        ] {
            let mut object = json!({"spec": bad});
            object["spec"]["model"] = json!("m");
            schema().default(&mut object);
            assert_eq!(schema().validate(&object, None).len(), 1, "{object}");
        }
    }

    #[test]
    fn metadata_has_types_too() {
        let check = |metadata: Value, expect: &[&str]| {
            let object = json!({"metadata": metadata, "spec": {"model": "m"}});
            let causes = schema().validate(&object, None);
            let fields: Vec<_> = causes.iter().map(|c| c.field.as_str()).collect();
            assert_eq!(fields, expect, "{object}");
        };
        check(json!({"name": "a", "labels": {"x": "1"}, "finalizers": ["f"]}), &[]);
        check(json!({"generateName": 5}), &["metadata.generateName"]);
        check(json!({"labels": {"x": 1}}), &["metadata.labels.x"]);
        check(json!({"labels": {"x": null}}), &["metadata.labels.x"]);
        check(json!({"annotations": "x"}), &["metadata.annotations"]);
        check(json!({"finalizers": [1]}), &["metadata.finalizers[0]"]);
        check(
            json!({"ownerReferences": [{"uid": "u", "controller": "yes", "name": 1}]}),
            &["metadata.ownerReferences[0].controller", "metadata.ownerReferences[0].name"],
        );
        check(json!({"ownerReferences": [{"uid": "u", "controller": null}]}), &[]);
    }

    #[test]
    fn definitions_may_bound_names() {
        let schema = Schema::compile(json!({"type": "object", "properties": {"metadata": {
            "type": "object",
            "properties": {
                "name": {"type": "string", "maxLength": 3},
                "generateName": {"type": "string", "pattern": "^a"}
            }
        }}}))
        .unwrap();
        let check = |metadata: Value, expect: &[&str]| {
            let causes = schema.validate(&json!({"metadata": metadata}), None);
            let found: Vec<_> =
                causes.iter().map(|c| format!("{} {}", c.field, c.reason)).collect();
            assert_eq!(found, expect, "{metadata}");
        };
        check(json!({"name": "abc", "generateName": "a-", "labels": {"x": "long"}}), &[]);
        check(json!({"name": "abcd"}), &["metadata.name FieldValueTooLong"]);
        check(json!({"generateName": "b-"}), &["metadata.generateName FieldValueInvalid"]);
        check(json!({"labels": {"x": 1}}), &["metadata.labels.x FieldValueTypeInvalid"]);
    }

    #[test]
    fn each_fault_names_its_field() {
        let check = |spec: Value, expect: &[(&str, &str, &str)]| {
            let causes = schema().validate(&json!({"spec": spec}), None);
            let found: Vec<_> =
                causes.iter().map(|c| (c.field.as_str(), c.reason, c.message.as_str())).collect();
            assert_eq!(found, expect);
        };
        check(json!({"model": "m", "mode": null, "port": "http"}), &[]);
        check(json!({}), &[("spec.model", "FieldValueRequired", "Required value")]);
        check(
            json!({"model": "m", "replicas": "two", "nodes": {"min": "x"}}),
            &[
                (
                    "spec.nodes.min",
                    "FieldValueTypeInvalid",
                    "Invalid value: \"string\": spec.nodes.min must be of type integer",
                ),
                (
                    "spec.replicas",
                    "FieldValueTypeInvalid",
                    "Invalid value: \"string\": spec.replicas must be of type integer",
                ),
            ],
        );
        check(
            json!({"model": "m", "mode": "C"}),
            &[(
                "spec.mode",
                "FieldValueNotSupported",
                "Unsupported value: \"C\": supported values: \"A\", \"B\"",
            )],
        );
        check(
            json!({"model": "m", "replicas": -1}),
            &[(
                "spec.replicas",
                "FieldValueInvalid",
                "Invalid value: -1: spec.replicas in body should be greater than or equal to 0",
            )],
        );
        check(
            json!({"model": "", "limit": 0, "when": "noon"}),
            &[
                (
                    "spec.limit",
                    "FieldValueInvalid",
                    "Invalid value: 0: spec.limit in body should be greater than 0",
                ),
                (
                    "spec.model",
                    "FieldValueInvalid",
                    "Invalid value: \"\": spec.model in body should be at least 1 chars long",
                ),
                (
                    "spec.when",
                    "FieldValueInvalid",
                    "Invalid value: \"noon\": spec.when in body must be of type date-time: \
                     \"noon\"",
                ),
            ],
        );
        let fields = |spec: Value| -> Vec<String> {
            let causes = schema().validate(&json!({"spec": spec}), None);
            causes.into_iter().map(|c| c.field).collect()
        };
        assert_eq!(fields(json!({"model": "m", "list": [{"a": "x"}]})), ["spec.list[0].a"]);
        assert_eq!(fields(json!({"model": "m", "map": {"k": 1}})), ["spec.map.k"]);
        assert_eq!(fields(json!({"model": "m", "port": true})), ["spec.port"]);
    }
}
