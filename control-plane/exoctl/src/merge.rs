//! Differences between objects as JSON merge patches (RFC 7396).

use serde_json::{Map, Value};

/// The patch that makes `after` of `before`: removed fields are null, lists are replaced whole.
pub(crate) fn difference(before: &Value, after: &Value) -> Map<String, Value> {
    let empty = Map::new();
    let fields = |value: &Value| value.as_object().cloned().unwrap_or_else(|| empty.clone());
    let (before, after) = (fields(before), fields(after));
    let mut patch = Map::new();
    for (key, now) in &after {
        match before.get(key) {
            Some(was) if was == now => {}
            Some(was) if was.is_object() && now.is_object() => {
                patch.insert(key.clone(), Value::Object(difference(was, now)));
            }
            Some(_) | None => {
                patch.insert(key.clone(), now.clone());
            }
        }
    }
    let removed = before.keys().filter(|key| !after.contains_key(*key));
    patch.extend(removed.map(|key| (key.clone(), Value::Null)));
    patch
}

/// Makes of `object` what the patch says.
pub(crate) fn apply(object: &mut Value, patch: &Map<String, Value>) {
    if !object.is_object() {
        *object = Value::Object(Map::new());
    }
    let Some(fields) = object.as_object_mut() else { return };
    for (key, value) in patch {
        match value {
            Value::Null => {
                fields.remove(key);
            }
            Value::Object(below) => {
                apply(fields.entry(key.clone()).or_insert(Value::Null), below);
            }
            value => {
                fields.insert(key.clone(), value.clone());
            }
        }
    }
}

/// Paths of what both patches set, to different values.
pub(crate) fn contested(mine: &Map<String, Value>, theirs: &Map<String, Value>) -> Vec<String> {
    let mut paths = Vec::new();
    for (key, mine) in mine {
        match (mine, theirs.get(key)) {
            (_, None) => {}
            (Value::Object(mine), Some(Value::Object(theirs))) => {
                paths.extend(contested(mine, theirs).iter().map(|path| format!("{key}.{path}")));
            }
            (mine, Some(theirs)) if mine == theirs => {}
            (_, Some(_)) => paths.push(key.clone()),
        }
    }
    paths
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_difference_makes_the_one_into_the_other() {
        let check = |before: Value, after: Value, expect: Value| {
            let patch = difference(&before, &after);
            assert_eq!(Value::Object(patch.clone()), expect);
            let mut made = before;
            apply(&mut made, &patch);
            assert_eq!(made, after);
        };
        check(json!({"a": 1}), json!({"a": 1}), json!({}));
        check(
            json!({"a": {"x": 1, "y": [1], "z": 3}, "gone": {"q": 1}}),
            json!({"a": {"x": 2, "y": [1, 2], "z": 3}, "new": {"n": 1}}),
            json!({"a": {"x": 2, "y": [1, 2]}, "new": {"n": 1}, "gone": null}),
        );
        check(json!({"a": 1}), json!({"a": {"b": 1}}), json!({"a": {"b": 1}}));
        check(json!({"a": {"b": 1}}), json!({"a": {}}), json!({"a": {"b": null}}));
    }

    #[test]
    fn only_different_values_of_one_field_are_contested() {
        let check = |mine: Value, theirs: Value, expect: &[&str]| {
            let paths = contested(mine.as_object().unwrap(), theirs.as_object().unwrap());
            assert_eq!(paths, expect);
        };
        check(json!({"a": {"x": 1}}), json!({"a": {"y": 1}}), &[]);
        check(json!({"a": {"x": 1}}), json!({"a": {"x": 1}}), &[]);
        check(json!({"a": {"x": 1}, "b": 1}), json!({"a": {"x": null}, "b": 1}), &["a.x"]);
        check(json!({"a": {"x": 1}}), json!({"a": null}), &["a"]);
    }
}
