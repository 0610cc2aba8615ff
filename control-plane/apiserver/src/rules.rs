//! `x-kubernetes-validations`: rules in the Common Expression Language that schemas carry, for what
//! a schema alone can't say.
//!
//! Owns: compiling them when a definition is read, and the causes of what breaks them. Never: the
//! language itself.

use kube_cel::{CompiledSchema, compile_schema, validate_compiled};
use serde_json::Value;

use crate::{
    error::Cause,
    schema::{SchemaError, shown},
};

/// The rules of one schema.
#[derive(Debug)]
pub(crate) struct Rules(CompiledSchema);

impl Rules {
    /// `None` for a schema without rules.
    pub(crate) fn compile(schema: &Value) -> Result<Option<Self>, SchemaError> {
        if !has_rules(schema) {
            return Ok(None);
        }
        let compiled = compile_schema(schema);
        check(&compiled)?;
        Ok(Some(Self(compiled)))
    }

    /// What breaks a rule. A rule that can't be evaluated counts as broken.
    pub(crate) fn broken(&self, object: &Value, old: Option<&Value>) -> Vec<Cause> {
        let Err(errors) = validate_compiled(&self.0, object, old) else {
            return Vec::new();
        };
        let causes = errors.into_vec().into_iter().map(|error| {
            let field = error.field_path;
            let value = at(object, &field).unwrap_or(object);
            Cause {
                reason: match error.reason.as_deref() {
                    Some("FieldValueRequired") => "FieldValueRequired",
                    Some("FieldValueForbidden") => "FieldValueForbidden",
                    Some("FieldValueDuplicate") => "FieldValueDuplicate",
                    _ => "FieldValueInvalid",
                },
                message: format!("Invalid value: {}: {}", shown(value, false), error.message),
                field,
            }
        });
        causes.collect()
    }
}

fn has_rules(schema: &Value) -> bool {
    match schema {
        Value::Object(fields) => fields
            .iter()
            .any(|(name, value)| name == "x-kubernetes-validations" || has_rules(value)),
        Value::Array(items) => items.iter().any(has_rules),
        _ => false,
    }
}

/// Every rule, at any depth, is one that can be asked.
fn check(compiled: &CompiledSchema) -> Result<(), SchemaError> {
    if let Some(error) = compiled.compilation_errors().first() {
        return Err(SchemaError::Rule(error.to_string()));
    }
    let inner = compiled.properties.values().chain(compiled.items.as_deref());
    inner.chain(compiled.additional_properties.as_deref()).try_for_each(check)
}

/// The value at a path such as `spec.nodes[0].min`.
fn at<'a>(object: &'a Value, path: &str) -> Option<&'a Value> {
    let mut steps = path.split(['.', '[']).map(|step| step.trim_end_matches(']'));
    steps.try_fold(object, |value, step| match value {
        Value::Array(items) => items.get(step.parse::<usize>().ok()?),
        value => value.get(step),
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn schema(rules: &Value) -> Value {
        json!({"type": "object", "properties": {"spec": {
            "type": "object",
            "properties": {"min": {"type": "integer"}, "max": {"type": "integer"}},
            "x-kubernetes-validations": rules,
        }}})
    }

    #[test]
    fn broken_rules_name_their_field() {
        let rules = schema(&json!([
            {"rule": "!has(self.min) || !has(self.max) || self.min <= self.max",
             "message": "min may not be above max", "fieldPath": ".min"},
            {"rule": "self.max == oldSelf.max", "message": "max is fixed"},
        ]));
        let rules = Rules::compile(&rules).unwrap().unwrap();
        let check = |spec: Value, old: Option<Value>, expect: &[(&str, &str)]| {
            let old = old.map(|spec| json!({"spec": spec}));
            let causes = rules.broken(&json!({"spec": spec}), old.as_ref());
            let found: Vec<_> =
                causes.iter().map(|c| (c.field.as_str(), c.message.as_str())).collect();
            assert_eq!(found, expect);
        };
        check(json!({"min": 1, "max": 1}), None, &[]);
        check(json!({"max": 1}), None, &[]);
        let above = ("spec.min", "Invalid value: 3: min may not be above max");
        check(json!({"min": 3, "max": 1}), None, &[above]);
        let fixed = ("spec", "Invalid value: \"object\": max is fixed");
        check(json!({"max": 2}), Some(json!({"max": 1})), &[fixed]);
        check(json!({"max": 2}), Some(json!({"max": 2})), &[]);
    }

    #[test]
    fn a_rule_that_is_none_is_found_when_it_is_read() {
        assert!(Rules::compile(&json!({"type": "object"})).unwrap().is_none());
        let error = Rules::compile(&schema(&json!([{"rule": "self.min <="}]))).unwrap_err();
        assert!(error.to_string().contains("self.min <="), "{error}");
    }
}
