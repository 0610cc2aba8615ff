//! Label and field selectors.

use std::collections::BTreeSet;

use serde_json::Value;

use crate::{error::ApiError, object, resource::Resource};

/// What selectors of Kubernetes' users call the node that an object is bound to; of the objects
/// that have a node here, it is this field.
const KUBERNETES_NODE: &str = "spec.nodeName";
const NODE: &str = "spec.node";

/// What a list or watch is narrowed to.
#[derive(Clone, Debug, Default)]
pub(crate) struct Selector {
    labels: Vec<LabelRule>,
    fields: Vec<FieldRule>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum LabelRule {
    Exists(String),
    Absent(String),
    In(String, BTreeSet<String>),
    /// Also matches objects without the label.
    NotIn(String, BTreeSet<String>),
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct FieldRule {
    field: String,
    equal: bool,
    value: String,
}

impl Selector {
    /// # Errors
    /// `BadRequest` that names the part that isn't understood.
    pub(crate) fn parse(
        labels: Option<&str>,
        fields: Option<&str>,
        resource: &Resource,
    ) -> Result<Self, ApiError> {
        let labels = parse_labels(labels.unwrap_or_default())?;
        let mut fields = parse_fields(fields.unwrap_or_default())?;
        let is_selectable = |field: &str| resource.selectable.iter().any(|f| f.name == field);
        for rule in &mut fields {
            if rule.field == KUBERNETES_NODE && is_selectable(NODE) {
                NODE.clone_into(&mut rule.field);
            }
            let known = matches!(rule.field.as_str(), "metadata.name" | "metadata.namespace")
                || is_selectable(&rule.field);
            if !known {
                let own = resource.selectable.iter().map(|f| f.name.as_str());
                let supported: Vec<_> =
                    ["metadata.name", "metadata.namespace"].into_iter().chain(own).collect();
                return Err(ApiError::BadRequest(format!(
                    "field label not supported: {}; supported: {}",
                    rule.field,
                    supported.join(", ")
                )));
            }
        }
        Ok(Self { labels, fields })
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.labels.is_empty() && self.fields.is_empty()
    }

    /// The one name that can match, if the selector says so.
    pub(crate) fn name(&self) -> Option<&str> {
        self.fields
            .iter()
            .find(|rule| rule.equal && rule.field == "metadata.name")
            .map(|rule| rule.value.as_str())
    }

    pub(crate) fn matches(&self, resource: &Resource, object: &Value) -> bool {
        let label = |name: &str| object.pointer("/metadata/labels")?.get(name)?.as_str();
        self.labels.iter().all(|rule| match rule {
            LabelRule::Exists(name) => label(name).is_some(),
            LabelRule::Absent(name) => label(name).is_none(),
            LabelRule::In(name, values) => label(name).is_some_and(|v| values.contains(v)),
            LabelRule::NotIn(name, values) => label(name).is_none_or(|v| !values.contains(v)),
        }) && self.fields.iter().all(|rule| {
            let value = field(resource, object, &rule.field);
            (value == rule.value) == rule.equal
        })
    }
}

/// A field as selectors compare it.
fn field(resource: &Resource, object: &Value, name: &str) -> String {
    match name {
        "metadata.name" => return object::name(object).to_owned(),
        "metadata.namespace" => return object::namespace(object).unwrap_or_default().to_owned(),
        _ => {}
    }
    let Some(field) = resource.selectable.iter().find(|field| field.name == name) else {
        return String::new();
    };
    match field.path.first(object) {
        Some(Value::String(text)) => text.clone(),
        Some(Value::Null) | None => field.absent.to_owned(),
        Some(other) => other.to_string(),
    }
}

fn parse_labels(text: &str) -> Result<Vec<LabelRule>, ApiError> {
    split_outside_parentheses(text)
        .into_iter()
        .map(str::trim)
        .filter(|part| !part.is_empty())
        .map(|part| {
            parse_label_rule(part).ok_or_else(|| {
                ApiError::BadRequest(format!("unable to parse label selector: `{part}`"))
            })
        })
        .collect()
}

fn split_outside_parentheses(text: &str) -> Vec<&str> {
    let mut parts = Vec::new();
    let mut depth = 0;
    let mut start = 0;
    for (at, c) in text.char_indices() {
        match c {
            '(' => depth += 1,
            ')' => depth -= 1,
            ',' if depth == 0 => {
                parts.push(&text[start..at]);
                start = at + 1;
            }
            _ => {}
        }
    }
    parts.push(&text[start..]);
    parts
}

fn parse_label_rule(part: &str) -> Option<LabelRule> {
    if let Some(list) = part.strip_suffix(')') {
        let (left, values) = list.split_once('(')?;
        let values = values.split(',').map(label_value).collect::<Option<_>>()?;
        let left = left.trim();
        if let Some(name) = left.strip_suffix(" notin") {
            return Some(LabelRule::NotIn(label_name(name)?, values));
        }
        return Some(LabelRule::In(label_name(left.strip_suffix(" in")?)?, values));
    }
    let one = |value: &str| Some(BTreeSet::from([label_value(value)?]));
    if let Some((name, value)) = part.split_once("!=") {
        return Some(LabelRule::NotIn(label_name(name)?, one(value)?));
    }
    if let Some((name, value)) = part.split_once("==").or_else(|| part.split_once('=')) {
        return Some(LabelRule::In(label_name(name)?, one(value)?));
    }
    if let Some(name) = part.strip_prefix('!') {
        return Some(LabelRule::Absent(label_name(name)?));
    }
    Some(LabelRule::Exists(label_name(part)?))
}

fn label_name(text: &str) -> Option<String> {
    let text = text.trim();
    let allowed = |c: char| c.is_ascii_alphanumeric() || "-_./".contains(c);
    (!text.is_empty() && text.chars().all(allowed)).then(|| text.to_owned())
}

/// What no label can have is a slip of the pen: `a=b=c`.
fn label_value(text: &str) -> Option<String> {
    let text = text.trim();
    object::is_label_value(text).then(|| text.to_owned())
}

fn parse_fields(text: &str) -> Result<Vec<FieldRule>, ApiError> {
    split_unescaped(text)
        .into_iter()
        .filter(|part| !part.trim().is_empty())
        .map(|part| {
            let (field, value, equal) = if let Some((f, v)) = part.split_once("!=") {
                (f, v, false)
            } else if let Some((f, v)) = part.split_once("==").or_else(|| part.split_once('=')) {
                (f, v, true)
            } else {
                return Err(ApiError::BadRequest(format!("invalid field selector: `{part}`")));
            };
            Ok(FieldRule { field: field.trim().to_owned(), equal, value: unescape(value.trim()) })
        })
        .collect()
}

fn split_unescaped(text: &str) -> Vec<&str> {
    let mut parts = Vec::new();
    let mut escaped = false;
    let mut start = 0;
    for (at, c) in text.char_indices() {
        match c {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            ',' => {
                parts.push(&text[start..at]);
                start = at + 1;
            }
            _ => {}
        }
    }
    parts.push(&text[start..]);
    parts
}

fn unescape(text: &str) -> String {
    let mut out = String::new();
    let mut chars = text.chars();
    while let Some(c) = chars.next() {
        out.push(if c == '\\' { chars.next().unwrap_or(c) } else { c });
    }
    out
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn resource() -> Resource {
        let crd = exo_crds::all().into_iter().find(|crd| crd.spec.names.kind == "Shard").unwrap();
        Resource::from_crd(&crd).unwrap()
    }

    #[test]
    fn selectors_match_as_kubernetes_does() {
        let resource = resource();
        let object = json!({
            "metadata": {"name": "a", "namespace": "n", "labels": {"x": "1", "y": ""}},
            "spec": {"node": "m1"}
        });
        let check = |labels: &str, fields: &str, expect: bool| {
            let selector = Selector::parse(Some(labels), Some(fields), &resource).unwrap();
            assert_eq!(selector.matches(&resource, &object), expect, "{labels} {fields}");
        };
        check("", "", true);
        check("x=1", "", true);
        check("x==1,y", "", true);
        check("x!=1", "", false);
        check("z!=1", "", true);
        check("x in (1, 2)", "", true);
        check("x in (2,3),y", "", false);
        check("x notin (2)", "", true);
        check("!z", "", true);
        check("!x", "", false);
        check("z", "", false);
        check("y=", "", true);
        check("", "metadata.name=a,metadata.namespace=n", true);
        check("", "metadata.name!=a", false);
        check("", "spec.node=m1", true);
        check("", "spec.node==m2", false);
        check("x=1", "spec.node!=m2", true);
        check("", "spec.nodeName=m1", true);
        check("", "spec.nodeName!=m1", false);
    }

    #[test]
    fn what_is_not_understood_is_refused() {
        let resource = resource();
        for (labels, fields) in
            [("a b", ""), ("=x", ""), ("x in 1)", ""), ("", "spec.rank=1"), ("", "metadata.name")]
        {
            let result = Selector::parse(Some(labels), Some(fields), &resource);
            assert!(matches!(result, Err(ApiError::BadRequest(_))), "{labels} {fields}");
        }
        for labels in ["a=b=c", "a==b=c", "a!=b=c", "a=b c", "a in (b=c)", "a=-", "a=é"] {
            let error = Selector::parse(Some(labels), None, &resource).unwrap_err().to_string();
            assert_eq!(error, format!("unable to parse label selector: `{labels}`"));
        }
        let error = Selector::parse(None, Some("spec.rank=1"), &resource).unwrap_err().to_string();
        let supported = "supported: metadata.name, metadata.namespace, spec.";
        assert!(
            error.contains("not supported: spec.rank;") && error.contains(supported),
            "{error}"
        );
    }
}
