//! Checks documents of exo's own kinds without a server, for `apply --dry-run=client`.
//!
//! Never used for what is sent: the server may be newer and know more fields than this exoctl.
//! Only what is certainly wrong here is reported: unknown fields, wrong types, missing fields,
//! values out of range.

use serde_json::{Map, Value};

use crate::kinds::{closest, did_you_mean};

/// Schemas of the kinds this exoctl was built with.
pub(crate) struct Schemas(Vec<(String, String, Value)>);

impl Schemas {
    /// Those of `exo.dev`.
    pub(crate) fn built_in() -> Self {
        let mut schemas = Vec::new();
        for crd in exo_crds::all() {
            for version in crd.spec.versions {
                let schema = version.schema.and_then(|s| s.open_api_v3_schema);
                let schema = serde_json::to_value(schema).unwrap_or_default();
                let api_version = format!("{}/{}", crd.spec.group, version.name);
                schemas.push((api_version, crd.spec.names.kind.clone(), schema));
            }
        }
        Self(schemas)
    }

    /// Whether objects of a kind have conditions; `None` for kinds without a schema here.
    pub(crate) fn has_conditions(&self, api_version: &str, kind: &str) -> Option<bool> {
        let (_, _, schema) = self.0.iter().find(|(a, k, _)| a == api_version && k == kind)?;
        Some(schema["properties"]["status"]["properties"]["conditions"].is_object())
    }

    /// What is wrong with a document; nothing for kinds without a schema here.
    pub(crate) fn check(&self, api_version: &str, kind: &str, document: &Value) -> Vec<String> {
        let is_it = |(a, k, _): &&(String, String, Value)| a == api_version && k == kind;
        let mut problems = Vec::new();
        if let (Some((_, _, schema)), Some(object)) =
            (self.0.iter().find(is_it), document.as_object())
        {
            // The server owns these; the schema of a CRD doesn't describe them.
            let own: Map<_, _> = object
                .iter()
                .filter(|(key, _)| {
                    !["apiVersion", "kind", "metadata", "status"].contains(&key.as_str())
                })
                .map(|(key, value)| (key.clone(), value.clone()))
                .collect();
            check(schema, &Value::Object(own), "", &mut problems);
        }
        problems
    }
}

fn check(schema: &Value, value: &Value, path: &str, problems: &mut Vec<String>) {
    if schema["x-kubernetes-preserve-unknown-fields"] == true
        || (value.is_null() && (schema["nullable"] == true || !path.is_empty()))
    {
        // The server drops nulls where a field is optional; only it knows which those are.
        return;
    }
    if let Some(wanted) = schema["type"].as_str()
        && !has_type(value, wanted)
    {
        problems.push(format!("{path}: must be {}, not {}", article(wanted), shown(value)));
        return;
    }
    if let Some(allowed) = schema["enum"].as_array()
        && !allowed.contains(value)
    {
        let names: Vec<_> = allowed.iter().filter_map(Value::as_str).collect();
        let meant = value.as_str().and_then(|v| closest(v, names.iter().copied()));
        problems.push(format!(
            "{path}: {} is not one of {}{}",
            shown(value),
            names.join(", "),
            did_you_mean(meant)
        ));
        return;
    }
    match value {
        Value::Object(object) => check_object(schema, object, path, problems),
        Value::Array(items) => {
            for (i, item) in items.iter().enumerate() {
                check(&schema["items"], item, &format!("{path}[{i}]"), problems);
            }
        }
        Value::Number(number) => {
            let n = number.as_f64().unwrap_or(f64::NAN);
            let bound = |name: &str| schema[name].as_f64();
            if let Some(low) = bound("minimum").filter(|&low| n < low) {
                problems.push(format!("{path}: must be at least {low}, not {number}"));
            }
            if let Some(high) = bound("maximum").filter(|&high| n > high) {
                problems.push(format!("{path}: must be at most {high}, not {number}"));
            }
        }
        Value::String(text) => {
            let least = schema["minLength"].as_u64().unwrap_or(0);
            if (text.chars().count() as u64) < least {
                problems.push(format!("{path}: must not be empty"));
            }
        }
        Value::Null | Value::Bool(_) => {}
    }
}

fn check_object(
    schema: &Value,
    object: &Map<String, Value>,
    path: &str,
    problems: &mut Vec<String>,
) {
    let field_path = |name: &str| match path {
        "" => name.to_owned(),
        path => format!("{path}.{name}"),
    };
    for name in schema["required"].as_array().into_iter().flatten() {
        let name = name.as_str().unwrap_or_default();
        if !object.contains_key(name) {
            problems.push(format!("{}: is required", field_path(name)));
        }
    }
    let properties = schema["properties"].as_object();
    let others = &schema["additionalProperties"];
    for (name, value) in object {
        let path = field_path(name);
        match (properties.and_then(|p| p.get(name)), properties) {
            (Some(schema), _) => check(schema, value, &path, problems),
            (None, _) if others.is_object() => check(others, value, &path, problems),
            (None, Some(properties)) if *others != Value::Bool(true) => {
                let meant = closest(name, properties.keys().map(String::as_str));
                problems.push(format!("{path}: unknown field{}", did_you_mean(meant)));
            }
            (None, _) => {}
        }
    }
}

fn has_type(value: &Value, wanted: &str) -> bool {
    match wanted {
        "object" => value.is_object(),
        "array" => value.is_array(),
        "string" => value.is_string(),
        "boolean" => value.is_boolean(),
        "number" => value.is_number(),
        "integer" => value.as_f64().is_some_and(|n| n.fract() == 0.0),
        _ => true,
    }
}

fn article(kind: &str) -> String {
    match kind {
        "object" | "array" | "integer" => format!("an {kind}"),
        kind => format!("a {kind}"),
    }
}

fn shown(value: &Value) -> String {
    match value {
        Value::Object(_) => "an object".to_owned(),
        Value::Array(_) => "an array".to_owned(),
        Value::String(text) => format!("`{text}`"),
        other => format!("`{other}`"),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[allow(clippy::needless_pass_by_value, reason = "literals read better")]
    fn problems(spec: Value) -> Vec<String> {
        let document = json!({"apiVersion": "exo.dev/v1alpha1", "kind": "InferenceInstance",
            "metadata": {"name": "a", "anything": 1}, "spec": spec});
        Schemas::built_in().check("exo.dev/v1alpha1", "InferenceInstance", &document)
    }

    #[test]
    fn a_good_document_has_no_problems() {
        assert!(problems(json!({"model": "llama"})).is_empty());
        assert!(
            problems(json!({"model": "llama", "replicas": 2, "sharding": "Pipeline",
                "nodes": {"min": 2, "max": null, "selector": {"rack": "a"}}, "fastSynch": false,
                "environment": {"A": "b"}, "seed": 3}))
            .is_empty()
        );
    }

    #[test]
    fn each_problem_names_its_field() {
        let check = |spec: Value, expect: &[&str]| assert_eq!(problems(spec), expect);
        check(json!({}), &["spec.model: is required"]);
        check(json!({"model": ""}), &["spec.model: must not be empty"]);
        check(
            json!({"model": "a", "replicaas": 2}),
            &["spec.replicaas: unknown field; did you mean `replicas`?"],
        );
        check(
            json!({"model": "a", "replicas": "two", "nodes": {"min": -1, "most": 1}}),
            &[
                "spec.replicas: must be an integer, not `two`",
                "spec.nodes.min: must be at least 1, not -1",
                "spec.nodes.most: unknown field",
            ],
        );
        check(
            json!({"model": "a", "sharding": "Pipelin", "environment": {"A": 1}}),
            &[
                "spec.sharding: `Pipelin` is not one of Auto, Pipeline, Tensor; did you mean `Pipeline`?",
                "spec.environment.A: must be a string, not `1`",
            ],
        );
        check(json!([]), &["spec: must be an object, not an array"]);
    }

    #[test]
    fn other_kinds_are_the_servers_business() {
        assert!(Schemas::built_in().check("v1", "Secret", &json!({"x": 1})).is_empty());
    }
}
