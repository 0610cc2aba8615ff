//! Objects as their schema divides them into fields: which fields an object has, in which two
//! objects differ, and how an applied configuration is merged.
//!
//! Follows the rules of Kubernetes' structured merge: maps are granular unless
//! `x-kubernetes-map-type` says `atomic`; lists are atomic unless `x-kubernetes-list-type` says
//! `set` or `map` (with `x-kubernetes-list-map-keys`).

use std::collections::BTreeMap;

use serde_json::{Map, Value};

use super::set::{FieldSet, Step};
use crate::error::Cause;

/// In which fields two objects differ.
#[derive(Debug, Default)]
pub(crate) struct Difference {
    /// Added or modified.
    pub(crate) changed: FieldSet,
    /// With all that was below.
    pub(crate) removed: FieldSet,
}

impl Difference {
    pub(crate) fn is_empty(&self) -> bool {
        self.changed.is_empty() && self.removed.is_empty()
    }
}

/// How a value is divided.
enum Shape<'a> {
    /// Not at all: a scalar, or what is replaced whole.
    Atomic,
    Map(&'a Map<String, Value>),
    /// Elements with the steps to them.
    List(Vec<(Step, &'a Value)>),
}

fn shape<'a>(schema: Option<&Value>, value: &'a Value) -> Shape<'a> {
    let keyword = |name: &str| schema.and_then(|s| s.get(name)).and_then(Value::as_str);
    match value {
        Value::Object(_) if keyword("x-kubernetes-map-type") == Some("atomic") => Shape::Atomic,
        Value::Object(fields) => Shape::Map(fields),
        Value::Array(items) => match keyword("x-kubernetes-list-type") {
            Some("set") => Shape::List(
                items.iter().map(|item| (Step::Value(item.to_string()), item)).collect(),
            ),
            Some("map") => {
                let keys: Vec<&str> = list_keys(schema).collect();
                Shape::List(items.iter().map(|item| (keys_of(&keys, schema, item), item)).collect())
            }
            _ => Shape::Atomic,
        },
        _ => Shape::Atomic,
    }
}

fn list_keys(schema: Option<&Value>) -> impl Iterator<Item = &str> {
    let keys = schema.and_then(|s| s.get("x-kubernetes-list-map-keys"));
    keys.and_then(Value::as_array).map_or(&[][..], Vec::as_slice).iter().filter_map(Value::as_str)
}

/// The step to an element; a key that it lacks counts with its default.
fn keys_of(keys: &[&str], schema: Option<&Value>, item: &Value) -> Step {
    let preset = |key: &str| {
        let fields = schema.and_then(|s| s.get("items")?.get("properties"));
        fields.and_then(|f| f.get(key)?.get("default"))
    };
    let pairs = keys.iter().filter_map(|key| {
        let value = item.get(key).or_else(|| preset(key))?;
        Some(((*key).to_owned(), value.clone()))
    });
    Step::keys(pairs.collect::<BTreeMap<_, _>>())
}

/// Schema of a map's field, and whether the schema names that field.
fn field_schema<'a>(schema: Option<&'a Value>, name: &str) -> (Option<&'a Value>, bool) {
    let named = schema.and_then(|s| s.get("properties")?.get(name));
    let others = schema.and_then(|s| s.get("additionalProperties")).filter(|s| s.is_object());
    (named.or(others), named.is_some())
}

fn items_schema(schema: Option<&Value>) -> Option<&Value> {
    schema.and_then(|s| s.get("items"))
}

/// Adds all fields of `value`. With `containers` maps and lists are fields too, as they are for
/// whoever made them by an update.
pub(crate) fn collect(schema: Option<&Value>, value: &Value, containers: bool, set: &mut FieldSet) {
    match shape(schema, value) {
        Shape::Atomic => set.member = true,
        Shape::Map(fields) => {
            set.member |= containers || fields.is_empty();
            for (name, value) in fields {
                let (schema, is_named) = field_schema(schema, name);
                let child = set.child(Step::Field(name.clone()));
                child.member |= !is_named && schema.is_some();
                collect(schema, value, containers, child);
            }
        }
        Shape::List(items) => {
            set.member |= containers || items.is_empty();
            for (step, item) in items {
                let child = set.child(step);
                child.member = true;
                collect(items_schema(schema), item, containers, child);
            }
        }
    }
}

/// What turns `old` into `new`.
pub(crate) fn compare(schema: Option<&Value>, old: &Value, new: &Value) -> Difference {
    let mut difference = Difference::default();
    compare_at(schema, old, new, &mut Vec::new(), &mut difference);
    difference
}

fn at<'a>(set: &'a mut FieldSet, path: &[Step]) -> &'a mut FieldSet {
    path.iter().fold(set, |set, step| set.child(step.clone()))
}

fn compare_at(
    schema: Option<&Value>,
    old: &Value,
    new: &Value,
    path: &mut Vec<Step>,
    difference: &mut Difference,
) {
    match (shape(schema, old), shape(schema, new)) {
        (Shape::Map(old), Shape::Map(new)) => {
            for (name, old) in old {
                path.push(Step::Field(name.clone()));
                let (schema, _) = field_schema(schema, name);
                match new.get(name) {
                    Some(new) => compare_at(schema, old, new, path, difference),
                    None => at(&mut difference.removed, path).member = true,
                }
                path.pop();
            }
            for (name, new) in new.iter().filter(|(name, _)| !old.contains_key(*name)) {
                path.push(Step::Field(name.clone()));
                let (schema, _) = field_schema(schema, name);
                add(schema, new, path, difference);
                path.pop();
            }
        }
        (Shape::List(old), Shape::List(new)) => {
            let old: BTreeMap<Step, &Value> = old.into_iter().collect();
            let new: BTreeMap<Step, &Value> = new.into_iter().collect();
            let schema = items_schema(schema);
            for (step, old) in &old {
                path.push(step.clone());
                match new.get(step) {
                    Some(new) => compare_at(schema, old, new, path, difference),
                    None => at(&mut difference.removed, path).member = true,
                }
                path.pop();
            }
            for (step, new) in new.iter().filter(|(step, _)| !old.contains_key(*step)) {
                path.push(step.clone());
                add(schema, new, path, difference);
                path.pop();
            }
        }
        _ if old == new => {}
        _ => add(schema, new, path, difference),
    }
}

fn add(schema: Option<&Value>, new: &Value, path: &[Step], difference: &mut Difference) {
    let set = at(&mut difference.changed, path);
    set.member = true;
    collect(schema, new, true, set);
}

/// Puts `config` over `live`.
pub(crate) fn merge(schema: Option<&Value>, live: &mut Value, config: &Value) {
    match (shape(schema, live), shape(schema, config)) {
        (Shape::Map(_), Shape::Map(config)) => {
            let Value::Object(live) = live else {
                return;
            };
            for (name, config) in config {
                let (schema, _) = field_schema(schema, name);
                match live.get_mut(name) {
                    Some(live) => merge(schema, live, config),
                    None => {
                        live.insert(name.clone(), config.clone());
                    }
                }
            }
        }
        (Shape::List(present), Shape::List(config)) => {
            let places: BTreeMap<Step, usize> =
                present.into_iter().enumerate().map(|(at, (step, _))| (step, at)).collect();
            let Value::Array(live) = live else {
                return;
            };
            for (step, config) in config {
                match places.get(&step).and_then(|at| live.get_mut(*at)) {
                    Some(live) => merge(items_schema(schema), live, config),
                    None => live.push(config.clone()),
                }
            }
        }
        _ => *live = config.clone(),
    }
}

/// Removes from `value` what is in `before` and in which nothing is `owned` any more.
pub(crate) fn remove_unowned(value: &mut Value, before: &FieldSet, owned: &FieldSet) {
    for (step, before) in &before.children {
        match owned.children.get(step) {
            Some(owned) => {
                if let Some(part) = part_mut(value, step) {
                    remove_unowned(part, before, owned);
                }
            }
            None => remove_part(value, step),
        }
    }
}

fn is_element(step: &Step, item: &Value) -> bool {
    match step {
        Step::Keys(keys) => serde_json::from_str::<Map<String, Value>>(keys)
            .is_ok_and(|keys| keys.iter().all(|(key, value)| item.get(key) == Some(value))),
        Step::Value(value) => serde_json::from_str::<Value>(value).is_ok_and(|v| v == *item),
        Step::Field(_) | Step::Index(_) => false,
    }
}

fn part_mut<'a>(value: &'a mut Value, step: &Step) -> Option<&'a mut Value> {
    match (step, value) {
        (Step::Field(name), Value::Object(fields)) => fields.get_mut(name),
        (Step::Index(index), Value::Array(items)) => items.get_mut(*index),
        (_, Value::Array(items)) => items.iter_mut().find(|item| is_element(step, item)),
        _ => None,
    }
}

fn remove_part(value: &mut Value, step: &Step) {
    match (step, value) {
        (Step::Field(name), Value::Object(fields)) => {
            fields.remove(name);
        }
        (Step::Keys(_) | Step::Value(_), Value::Array(items)) => {
            items.retain(|item| !is_element(step, item));
        }
        _ => {}
    }
}

/// Elements that stand twice in a list whose elements must differ.
pub(crate) fn duplicates(
    schema: Option<&Value>,
    value: &Value,
    path: &str,
    causes: &mut Vec<Cause>,
) {
    match value {
        Value::Object(fields) => {
            for (name, value) in fields {
                let (schema, _) = field_schema(schema, name);
                if schema.is_some() {
                    let dot = if path.is_empty() { "" } else { "." };
                    duplicates(schema, value, &format!("{path}{dot}{name}"), causes);
                }
            }
        }
        Value::Array(items) => {
            if let Shape::List(elements) = shape(schema, value) {
                let mut seen = std::collections::BTreeSet::new();
                for (index, (step, _)) in elements.iter().enumerate() {
                    if !seen.insert(step) {
                        let shown = match step {
                            Step::Keys(text) | Step::Value(text) | Step::Field(text) => text,
                            Step::Index(_) => continue,
                        };
                        causes.push(Cause {
                            reason: "FieldValueDuplicate",
                            message: format!("Duplicate value: {shown}"),
                            field: format!("{path}[{index}]"),
                        });
                    }
                }
            }
            for (index, item) in items.iter().enumerate() {
                duplicates(items_schema(schema), item, &format!("{path}[{index}]"), causes);
            }
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn schema() -> Value {
        json!({"type": "object", "properties": {
            "plain": {"type": "array"},
            "set": {"type": "array", "x-kubernetes-list-type": "set"},
            "map": {
                "type": "array", "x-kubernetes-list-type": "map",
                "x-kubernetes-list-map-keys": ["name", "port"],
                "items": {"type": "object", "properties": {
                    "name": {"type": "string"}, "port": {"type": "integer", "default": 80},
                    "value": {"type": "string"}, "other": {"type": "string"}
                }}
            },
            "whole": {"type": "object", "x-kubernetes-map-type": "atomic"},
            "deep": {"type": "object", "properties": {"a": {}, "b": {}}},
            "labels": {"type": "object", "additionalProperties": {"type": "string"}}
        }})
    }

    fn fields(value: &Value, containers: bool) -> Value {
        let mut set = FieldSet::default();
        collect(Some(&schema()), value, containers, &mut set);
        set.encode()
    }

    #[test]
    fn the_schema_says_what_a_field_is() {
        let object = json!({
            "plain": [1, 2], "set": ["x"], "map": [{"name": "n", "value": "v"}],
            "whole": {"a": 1}, "deep": {"a": 1}, "labels": {"l": "1"}, "free": {"x": [1]}
        });
        assert_eq!(
            fields(&object, false),
            json!({
                "f:deep": {"f:a": {}},
                "f:free": {"f:x": {}},
                "f:labels": {"f:l": {}},
                "f:map": {"k:{\"name\":\"n\",\"port\":80}": {".": {}, "f:name": {}, "f:value": {}}},
                "f:plain": {}, "f:set": {"v:\"x\"": {}}, "f:whole": {}
            })
        );
        assert_eq!(
            fields(&json!({"deep": {"a": 1}, "set": [], "labels": {}}), true),
            json!({".": {}, "f:deep": {".": {}, "f:a": {}}, "f:labels": {}, "f:set": {}})
        );
    }

    #[test]
    fn differences_are_found_in_lists_and_maps() {
        let difference = compare(
            Some(&schema()),
            &json!({
                "plain": [1], "set": ["x", "y"], "deep": {"a": 1, "b": 1}, "whole": {"a": 1},
                "map": [{"name": "n", "port": 80, "value": "v"}, {"name": "gone", "port": 1}]
            }),
            &json!({
                "plain": [2], "set": ["z", "x"], "deep": {"a": 1}, "whole": {"a": 1},
                "map": [{"name": "n", "port": 80, "value": "w"}], "labels": {"l": "1"}
            }),
        );
        assert_eq!(
            difference.changed.encode(),
            json!({
                "f:labels": {".": {}, "f:l": {}},
                "f:map": {"k:{\"name\":\"n\",\"port\":80}": {"f:value": {}}},
                "f:plain": {}, "f:set": {"v:\"z\"": {}}
            })
        );
        assert_eq!(
            difference.removed.encode(),
            json!({
                "f:deep": {"f:b": {}}, "f:map": {"k:{\"name\":\"gone\",\"port\":1}": {}},
                "f:set": {"v:\"y\"": {}}
            })
        );
        assert!(
            compare(Some(&schema()), &json!({"set": [1, 2]}), &json!({"set": [2, 1]})).is_empty()
        );
    }

    #[test]
    fn a_configuration_is_merged_by_keys() {
        let mut live = json!({
            "plain": [1, 2], "set": ["x"], "deep": {"b": 1},
            "map": [{"name": "n", "port": 80, "other": "o"}, {"name": "m", "port": 80}]
        });
        merge(
            Some(&schema()),
            &mut live,
            &json!({
                "plain": [3], "set": ["y", "x"], "deep": {"a": 2},
                "map": [{"name": "n", "value": "v"}, {"name": "n", "port": 81}]
            }),
        );
        assert_eq!(
            live,
            json!({
                "plain": [3], "set": ["x", "y"], "deep": {"b": 1, "a": 2},
                "map": [
                    {"name": "n", "port": 80, "other": "o", "value": "v"},
                    {"name": "m", "port": 80}, {"name": "n", "port": 81}
                ]
            })
        );
    }

    #[test]
    fn only_what_nobody_owns_is_removed() {
        let mut value = json!({
            "deep": {"a": 1, "b": 1}, "set": ["x", "y"], "labels": {"l": "1"},
            "map": [{"name": "n", "port": 80, "value": "v"}, {"name": "m", "port": 80}]
        });
        let set = |value: &Value| FieldSet::decode(value).unwrap();
        remove_unowned(
            &mut value,
            &set(&json!({
                "f:deep": {"f:a": {}, "f:b": {}}, "f:set": {"v:\"x\"": {}, "v:\"y\"": {}},
                "f:labels": {"f:l": {}},
                "f:map": {
                    "k:{\"name\":\"n\",\"port\":80}": {".": {}, "f:value": {}},
                    "k:{\"name\":\"m\",\"port\":80}": {".": {}}
                }
            })),
            &set(&json!({
                "f:deep": {"f:b": {}}, "f:set": {"v:\"y\"": {}},
                "f:map": {"k:{\"name\":\"n\",\"port\":80}": {".": {}}}
            })),
        );
        assert_eq!(
            value,
            json!({"deep": {"b": 1}, "set": ["y"], "map": [{"name": "n", "port": 80}]})
        );
    }

    #[test]
    fn elements_that_must_differ_are_compared() {
        let mut causes = Vec::new();
        let value = json!({
            "plain": [1, 1], "set": ["a", "b", "a"],
            "map": [{"name": "n"}, {"name": "n", "port": 80}]
        });
        duplicates(Some(&schema()), &value, "", &mut causes);
        let found: Vec<_> = causes.iter().map(|c| c.field.as_str()).collect();
        assert_eq!(found, ["set[2]", "map[1]"]);
    }
}
