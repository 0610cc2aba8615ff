//! Strategic merge patches, as far as Kubernetes' own types served here need them: maps are merged,
//! lists of the metadata are merged by element, other lists are replaced.

use serde_json::{Map, Value};

const DIRECTIVE: &str = "$patch";
const DELETE_FROM: &str = "$deleteFromPrimitiveList/";

pub(super) fn merge(target: &mut Value, patch: &Value) {
    let Some(patch) = patch.as_object() else {
        *target = patch.clone();
        return;
    };
    if !target.is_object() {
        *target = Value::Object(Map::new());
    }
    let Some(fields) = target.as_object_mut() else {
        return;
    };
    if patch.get(DIRECTIVE).and_then(Value::as_str) == Some("replace") {
        fields.clear();
    }
    for (name, value) in patch {
        if let Some(list) = name.strip_prefix(DELETE_FROM) {
            let gone = value.as_array().map_or(&[][..], Vec::as_slice);
            if let Some(Value::Array(items)) = fields.get_mut(list) {
                items.retain(|item| !gone.contains(item));
            }
        } else if name.starts_with('$') {
            // The order of elements and the like: nothing here depends on it.
        } else {
            merge_field(fields, name, value);
        }
    }
}

fn merge_field(fields: &mut Map<String, Value>, name: &str, value: &Value) {
    match value {
        Value::Null => {
            fields.remove(name);
        }
        Value::Object(patch) if patch.get(DIRECTIVE).and_then(Value::as_str) == Some("delete") => {
            fields.remove(name);
        }
        Value::Object(_) => merge(fields.entry(name).or_insert(Value::Null), value),
        Value::Array(items) if matches!(name, "finalizers" | "ownerReferences") => {
            let present = fields.entry(name).or_insert_with(|| Value::Array(Vec::new()));
            merge_elements(present, items);
        }
        _ => {
            fields.insert(name.to_owned(), value.clone());
        }
    }
}

/// Elements with a `uid` are merged by it, others are a set.
fn merge_elements(present: &mut Value, items: &[Value]) {
    let Some(present) = present.as_array_mut() else {
        return;
    };
    for item in items {
        let is_same = |other: &Value| match item.get("uid") {
            Some(uid) => other.get("uid") == Some(uid),
            None => other == item,
        };
        if item.get(DIRECTIVE).and_then(Value::as_str) == Some("delete") {
            present.retain(|other| !is_same(other));
        } else if let Some(other) = present.iter_mut().find(|other| is_same(other)) {
            merge(other, item);
        } else {
            present.push(item.clone());
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn maps_and_the_metadatas_lists_are_merged() {
        let mut object = json!({
            "metadata": {
                "labels": {"a": "1", "b": "2"}, "finalizers": ["x", "y"],
                "ownerReferences": [{"uid": "1", "name": "n"}, {"uid": "2"}]
            },
            "data": {"k": "v"}, "list": [1, 2]
        });
        merge(
            &mut object,
            &json!({
                "metadata": {
                    "labels": {"a": null, "c": "3"},
                    "finalizers": ["z"], "$deleteFromPrimitiveList/finalizers": ["x"],
                    "$setElementOrder/finalizers": ["y", "z"],
                    "ownerReferences": [{"uid": "2", "$patch": "delete"}, {"uid": "1", "name": "m"}]
                },
                "data": {"$patch": "replace", "l": "w"}, "list": [3]
            }),
        );
        assert_eq!(
            object,
            json!({
                "metadata": {
                    "labels": {"b": "2", "c": "3"}, "finalizers": ["y", "z"],
                    "ownerReferences": [{"uid": "1", "name": "m"}]
                },
                "data": {"l": "w"}, "list": [3]
            })
        );
    }
}
