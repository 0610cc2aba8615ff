//! What a validator finds wrong, in Kubernetes' words.

use jsonschema::{ValidationError, error::ValidationErrorKind};
use serde_json::Value;

use crate::error::Cause;

/// As Kubernetes words it.
pub(super) fn cause(error: &ValidationError<'_>) -> Cause {
    let field = dotted(error.instance_path().as_str());
    let instance = error.instance();
    match error.kind() {
        ValidationErrorKind::Required { property } => {
            let name = property.as_str().unwrap_or_default();
            Cause::required(join(&field, name))
        }
        ValidationErrorKind::Type { .. } => {
            let expected = expected_types(&error.to_string());
            let got = shown(instance, true);
            Cause {
                reason: "FieldValueTypeInvalid",
                message: format!("Invalid value: {got}: {field} must be of type {expected}"),
                field,
            }
        }
        ValidationErrorKind::Enum { options } => {
            let options = options.as_array().map_or(&[][..], Vec::as_slice);
            let options: Vec<String> =
                options.iter().filter(|o| !o.is_null()).map(Value::to_string).collect();
            Cause {
                reason: "FieldValueNotSupported",
                message: format!(
                    "Unsupported value: {}: supported values: {}",
                    shown(instance, false),
                    options.join(", ")
                ),
                field,
            }
        }
        kind => beyond_bounds(kind, instance, field)
            .unwrap_or_else(|field| invalid(instance, field, &error.to_string())),
    }
}

fn invalid(instance: &Value, field: String, problem: &str) -> Cause {
    Cause::invalid(field, format_args!("{}: {problem}", shown(instance, false)))
}

/// A value that its bounds or its form forbid; the field comes back for any other fault.
fn beyond_bounds(
    kind: &ValidationErrorKind,
    instance: &Value,
    field: String,
) -> Result<Cause, String> {
    let problem = match kind {
        ValidationErrorKind::MaxLength { limit } => {
            let message = format!("Too long: may not be more than {limit} characters");
            return Ok(Cause { reason: "FieldValueTooLong", message, field });
        }
        ValidationErrorKind::MaxItems { limit } => {
            let count = instance.as_array().map_or(0, Vec::len);
            let message = format!("Too many: {count}: must have at most {limit} items");
            return Ok(Cause { reason: "FieldValueTooMany", message, field });
        }
        ValidationErrorKind::Minimum { limit } => {
            format!("should be greater than or equal to {}", bound(limit))
        }
        ValidationErrorKind::Maximum { limit } => {
            format!("should be less than or equal to {}", bound(limit))
        }
        ValidationErrorKind::ExclusiveMinimum { limit } => {
            format!("should be greater than {}", bound(limit))
        }
        ValidationErrorKind::ExclusiveMaximum { limit } => {
            format!("should be less than {}", bound(limit))
        }
        ValidationErrorKind::MinLength { limit } => {
            format!("should be at least {limit} chars long")
        }
        ValidationErrorKind::MinItems { limit } => format!("should have at least {limit} items"),
        ValidationErrorKind::Pattern { pattern } => format!("should match '{pattern}'"),
        ValidationErrorKind::Format { format } => format!("must be of type {format}: {instance}"),
        _ => return Err(field),
    };
    let problem = format!("{field} in body {problem}");
    Ok(invalid(instance, field, &problem))
}

/// Definitions write whole numbers as `64.0`.
fn bound(limit: &Value) -> String {
    match limit.as_f64() {
        Some(number) if number.fract() == 0.0 && number.abs() < 1e15 => format!("{number:.0}"),
        _ => limit.to_string(),
    }
}

/// The types at the end of jsonschema's message: `… is not of type "integer"` or `of types "a", "b"`.
fn expected_types(message: &str) -> String {
    let types = message.rsplit_once(" of type").map_or(message, |(_, t)| t);
    let types = types.strip_prefix('s').unwrap_or(types);
    types.trim().replace('"', "").replace(", null", "").replace("null, ", "")
}

/// A value within a message: whole if it is short, else its type.
pub(crate) fn shown(value: &Value, type_only: bool) -> String {
    let kind = match value {
        Value::Null => "null",
        Value::Bool(_) => "\"boolean\"",
        Value::Number(_) => "\"number\"",
        Value::String(_) => "\"string\"",
        Value::Array(_) => "\"array\"",
        Value::Object(_) => "\"object\"",
    };
    match value {
        Value::Array(_) | Value::Object(_) => kind.to_owned(),
        _ if type_only => kind.to_owned(),
        _ => value.to_string(),
    }
}

/// `/spec/nodes/0/min` → `spec.nodes[0].min`.
fn dotted(pointer: &str) -> String {
    let mut path = String::new();
    for segment in pointer.split('/').skip(1) {
        let segment = segment.replace("~1", "/").replace("~0", "~");
        if !path.is_empty() && segment.bytes().all(|b| b.is_ascii_digit()) {
            path = format!("{path}[{segment}]");
        } else {
            path = join(&path, &segment);
        }
    }
    path
}

fn join(path: &str, name: &str) -> String {
    if path.is_empty() { name.to_owned() } else { format!("{path}.{name}") }
}
