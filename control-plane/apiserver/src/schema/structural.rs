//! Walks a structural schema and an object together: what is not known goes, what is absent and has a
//! default comes.

use serde_json::{Number, Value};

/// Fields of the root that every object has.
const ROOT_FIELDS: [&str; 3] = ["apiVersion", "kind", "metadata"];

/// Removes nulls that the schema doesn't allow: an applied configuration means nothing by them.
pub(crate) fn drop_nulls(schema: Option<&Value>, value: &mut Value) {
    match value {
        Value::Array(items) => {
            let schema = schema.and_then(|s| s.get("items"));
            items.iter_mut().for_each(|item| drop_nulls(schema, item));
        }
        Value::Object(fields) => fields.retain(|name, value| {
            let schema = schema.and_then(|s| {
                s.get("properties").and_then(|p| p.get(name)).or(s.get("additionalProperties"))
            });
            drop_nulls(schema, value);
            let nullable = schema.and_then(|s| s.get("nullable")) == Some(&Value::Bool(true));
            !value.is_null() || nullable
        }),
        _ => {}
    }
}

fn keeps_unknown(schema: &Value) -> bool {
    schema.get("x-kubernetes-preserve-unknown-fields") == Some(&Value::Bool(true))
}

pub(super) fn prune(schema: &Value, value: &mut Value, path: &str, unknown: &mut Vec<String>) {
    match value {
        Value::Array(items) => {
            let Some(schema) = schema.get("items") else {
                return;
            };
            for (index, item) in items.iter_mut().enumerate() {
                prune(schema, item, &format!("{path}[{index}]"), unknown);
            }
        }
        Value::Object(fields) => {
            let properties = schema.get("properties");
            let additional = schema.get("additionalProperties");
            let at_root = path.is_empty();
            fields.retain(|name, value| {
                if at_root && ROOT_FIELDS.contains(&name.as_str()) {
                    return true;
                }
                let path = if at_root { name.clone() } else { format!("{path}.{name}") };
                let known =
                    properties.and_then(|p| p.get(name)).or(additional.filter(|a| a.is_object()));
                if let Some(schema) = known {
                    prune(schema, value, &path, unknown);
                    return true;
                }
                let keep = additional == Some(&Value::Bool(true)) || keeps_unknown(schema);
                if !keep {
                    unknown.push(path);
                }
                keep
            });
        }
        _ => {}
    }
}

pub(super) fn default(schema: &Value, value: &mut Value) {
    match value {
        Value::Number(number) if is_whole_number(schema) => {
            if let Some(whole) = whole(number) {
                *number = whole;
            }
        }
        Value::Array(items) => {
            if let Some(schema) = schema.get("items") {
                for item in items {
                    default(schema, item);
                }
            }
        }
        Value::Object(fields) => {
            let properties = schema.get("properties").and_then(Value::as_object);
            for (name, schema) in properties.into_iter().flatten() {
                let nullable = schema.get("nullable") == Some(&Value::Bool(true));
                if let Some(preset) = schema.get("default") {
                    let field = fields.entry(name.clone()).or_insert_with(|| preset.clone());
                    if field.is_null() && !nullable {
                        *field = preset.clone();
                    }
                }
                if let Some(field) = fields.get_mut(name) {
                    default(schema, field);
                }
            }
            if let Some(schema) = schema.get("additionalProperties").filter(|s| s.is_object()) {
                let known = |name: &String| properties.is_some_and(|p| p.contains_key(name));
                for (_, field) in fields.iter_mut().filter(|(name, _)| !known(name)) {
                    default(schema, field);
                }
            }
        }
        _ => {}
    }
}

pub(super) fn is_whole_number(schema: &Value) -> bool {
    schema.get("type").and_then(Value::as_str) == Some("integer")
}

/// First whole number above those of 64 bits, and least one with a sign.
const BEYOND_U64: f64 = 18_446_744_073_709_551_616.0;
const LEAST_I64: f64 = -9_223_372_036_854_775_808.0;

/// The same number without a fraction, if it is written with one that is zero.
fn whole(number: &Number) -> Option<Number> {
    let float = number.as_f64().filter(|float| number.is_f64() && float.fract() == 0.0)?;
    // Larger ones fit no type, and are refused for their size.
    if (0.0..BEYOND_U64).contains(&float) {
        Some(Number::from(float as u64))
    } else {
        (LEAST_I64..0.0).contains(&float).then(|| Number::from(float as i64))
    }
}
