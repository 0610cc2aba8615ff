//! Sets of fields of one object, and their wire form `FieldsV1`.

use std::{collections::BTreeMap, fmt};

use serde_json::{Map, Value};

/// One step from a value to a part of it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Step {
    Field(String),
    /// The element of a list of objects that has these keys; a JSON object, keys in order.
    Keys(String),
    /// The element of a set; its JSON.
    Value(String),
    Index(usize),
}

impl Step {
    /// As `FieldsV1` writes it.
    fn encode(&self) -> String {
        match self {
            Self::Field(name) => format!("f:{name}"),
            Self::Keys(keys) => format!("k:{keys}"),
            Self::Value(value) => format!("v:{value}"),
            Self::Index(index) => format!("i:{index}"),
        }
    }

    fn decode(text: &str) -> Option<Self> {
        let (kind, rest) = text.split_once(':')?;
        match kind {
            "f" => Some(Self::Field(rest.to_owned())),
            "k" => Some(Self::keys(serde_json::from_str(rest).ok()?)),
            "v" => {
                let value: Value = serde_json::from_str(rest).ok()?;
                Some(Self::Value(value.to_string()))
            }
            "i" => rest.parse().ok().map(Self::Index),
            _ => None,
        }
    }

    /// The same keys make the same step, in whatever order they come.
    pub(crate) fn keys(keys: BTreeMap<String, Value>) -> Self {
        Self::Keys(Value::Object(keys.into_iter().collect()).to_string())
    }
}

/// `.name`, `[key="value"]`, `[="value"]` or `[0]`, as refusals name fields.
impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Field(name) => write!(f, ".{name}"),
            Self::Keys(keys) => {
                let keys: BTreeMap<String, Value> = serde_json::from_str(keys).unwrap_or_default();
                let keys: Vec<String> = keys.iter().map(|(k, v)| format!("{k}={v}")).collect();
                write!(f, "[{}]", keys.join(","))
            }
            Self::Value(value) => write!(f, "[={value}]"),
            Self::Index(index) => write!(f, "[{index}]"),
        }
    }
}

/// Fields, as a tree of the steps that lead to them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct FieldSet {
    /// The place itself belongs to the set.
    pub(crate) member: bool,
    pub(crate) children: BTreeMap<Step, FieldSet>,
}

impl FieldSet {
    pub(crate) fn is_empty(&self) -> bool {
        !self.member && self.children.is_empty()
    }

    /// The set below a step; made where there is none.
    pub(crate) fn child(&mut self, step: Step) -> &mut Self {
        self.children.entry(step).or_default()
    }

    pub(crate) fn union(&mut self, other: &Self) {
        self.member |= other.member;
        for (step, other) in &other.children {
            self.child(step.clone()).union(other);
        }
    }

    /// Takes out each member of `other`.
    pub(crate) fn subtract(&mut self, other: &Self) {
        self.member &= !other.member;
        self.in_common(other, Self::subtract);
    }

    /// Takes out each member of `other` with all that is below it.
    pub(crate) fn subtract_below(&mut self, other: &Self) {
        if other.member {
            *self = Self::default();
        } else {
            self.in_common(other, Self::subtract_below);
        }
    }

    fn in_common(&mut self, other: &Self, change: impl Fn(&mut Self, &Self)) {
        self.children.retain(|step, child| {
            if let Some(other) = other.children.get(step) {
                change(child, other);
            }
            !child.is_empty()
        });
    }

    /// Paths of the members that both have, as in `.spec.replicas`.
    pub(crate) fn shared(&self, other: &Self) -> Vec<String> {
        let mut paths = Vec::new();
        self.collect_shared(other, "", &mut paths);
        paths
    }

    fn collect_shared(&self, other: &Self, path: &str, paths: &mut Vec<String>) {
        if self.member && other.member {
            paths.push(path.to_owned());
        }
        for (step, child) in &self.children {
            if let Some(other) = other.children.get(step) {
                child.collect_shared(other, &format!("{path}{step}"), paths);
            }
        }
    }

    pub(crate) fn encode(&self) -> Value {
        let mut fields = Map::new();
        if self.member && !self.children.is_empty() {
            fields.insert(".".to_owned(), Value::Object(Map::new()));
        }
        for (step, child) in &self.children {
            fields.insert(step.encode(), child.encode());
        }
        Value::Object(fields)
    }

    /// `None` for what is no set of fields.
    pub(crate) fn decode(value: &Value) -> Option<Self> {
        let mut set = Self::decode_below(value)?;
        // The root stands for no field.
        set.member = false;
        Some(set)
    }

    fn decode_below(value: &Value) -> Option<Self> {
        let fields = value.as_object()?;
        let mut set = Self { member: fields.is_empty(), children: BTreeMap::new() };
        for (name, value) in fields {
            if name == "." {
                set.member = true;
            } else {
                set.children.insert(Step::decode(name)?, Self::decode_below(value)?);
            }
        }
        Some(set)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn set(value: &Value) -> FieldSet {
        FieldSet::decode(value).unwrap()
    }

    #[test]
    fn the_wire_form_goes_both_ways() {
        let fields = json!({
            "f:metadata": {"f:labels": {".": {}, "f:a:b": {}}, "f:finalizers": {"v:\"x\"": {}}},
            "f:spec": {"f:list": {"k:{\"a\":1,\"b\":\"c\"}": {".": {}, "f:a": {}}, "i:3": {}}},
        });
        assert_eq!(
            set(&fields).encode(),
            json!({
                "f:metadata": {"f:finalizers": {"v:\"x\"": {}}, "f:labels": {".": {}, "f:a:b": {}}},
                "f:spec": {"f:list": {"k:{\"a\":1,\"b\":\"c\"}": {".": {}, "f:a": {}}, "i:3": {}}},
            })
        );
        let swapped = json!({"f:l": {"k:{\"b\":\"c\",\"a\":1}": {}}});
        assert_eq!(set(&swapped), set(&json!({"f:l": {"k:{\"a\":1,\"b\":\"c\"}": {}}})));
        for bad in [json!(1), json!({"x": {}}), json!({"f:a": 1}), json!({"k:{": {}})] {
            assert_eq!(FieldSet::decode(&bad), None, "{bad}");
        }
    }

    #[test]
    fn sets_are_joined_cut_and_compared() {
        let mut a = set(&json!({"f:a": {".": {}, "f:b": {}, "f:c": {}}}));
        a.union(&set(&json!({"f:a": {"f:d": {}}, "f:e": {}})));
        assert_eq!(
            a.shared(&set(&json!({"f:a": {".": {}, "f:d": {}}, "f:x": {}}))),
            [".a", ".a.d"]
        );
        let mut cut = a.clone();
        cut.subtract(&set(&json!({"f:a": {".": {}, "f:b": {}}, "f:e": {}})));
        assert_eq!(cut, set(&json!({"f:a": {"f:c": {}, "f:d": {}}})));
        a.subtract_below(&set(&json!({"f:a": {}})));
        assert_eq!(a, set(&json!({"f:e": {}})));
        let list = set(&json!({"f:l": {"k:{\"n\":\"x\"}": {}, "v:2": {}, "i:0": {}}}));
        assert_eq!(list.shared(&list), [".l[n=\"x\"]", ".l[=2]", ".l[0]"]);
    }
}
