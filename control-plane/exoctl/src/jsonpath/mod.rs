//! kubectl's JSONPath: paths that lead to values of an object, and templates made of them.
//!
//! Owns: reading and following them. Arithmetic and functions of other dialects are not read.

mod parse;
mod template;

use std::{cmp::Ordering, fmt, str::FromStr};

use serde_json::Value;

pub(crate) use template::Template;

/// A path such as `{.status.replicas[0].ready}`.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct JsonPath {
    steps: Vec<Step>,
    /// As it was written, without braces.
    text: String,
}

impl fmt::Display for JsonPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{{{}}}", self.text)
    }
}

#[derive(Clone, Debug, PartialEq)]
enum Step {
    Field(String),
    /// Every value of an object or array.
    All,
    /// This value and all below it.
    Below,
    /// From the end when negative.
    Index(i64),
    Slice {
        start: Option<i64>,
        end: Option<i64>,
    },
    /// `['a','b']`, `[0,2]`.
    Union(Vec<Step>),
    Filter(Filter),
}

/// `[?(@.field=="value")]`, or `[?(@.field)]` for those that have it.
#[derive(Clone, Debug, PartialEq)]
struct Filter {
    path: Vec<Step>,
    test: Option<(Test, Value)>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Test {
    Equal,
    NotEqual,
    Less,
    LessOrEqual,
    Greater,
    GreaterOrEqual,
}

/// Text that is not a path this reads.
#[derive(Debug, thiserror::Error)]
#[error(
    "`{0}` is not a path such as {{.status.phase}} or {{.status.conditions[?(@.type==\"Ready\")].status}}"
)]
pub(crate) struct ParsePathError(String);

impl FromStr for JsonPath {
    type Err = ParsePathError;

    /// With or without braces and a leading dot.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let error = || ParsePathError(text.to_owned());
        let trimmed = text.trim();
        let braced = trimmed.strip_prefix('{').map(|rest| rest.strip_suffix('}'));
        let path = braced.unwrap_or(Some(trimmed)).ok_or_else(error)?;
        let steps = parse::path(path).ok_or_else(error)?;
        if steps.is_empty() {
            return Err(error());
        }
        Ok(Self { steps, text: path.trim().to_owned() })
    }
}

impl JsonPath {
    /// Everything the path leads to, in the order of the document.
    pub(crate) fn all<'v>(&self, value: &'v Value) -> Vec<&'v Value> {
        follow(&self.steps, value)
    }

    /// The first value that it leads to.
    pub(crate) fn find<'v>(&self, value: &'v Value) -> Option<&'v Value> {
        self.all(value).into_iter().next()
    }
}

fn follow<'v>(steps: &[Step], value: &'v Value) -> Vec<&'v Value> {
    steps.iter().fold(vec![value], |values, step| {
        values.into_iter().flat_map(|value| step.follow(value)).collect()
    })
}

impl Step {
    fn follow<'v>(&self, value: &'v Value) -> Vec<&'v Value> {
        match self {
            Self::Field(name) => value.get(name).into_iter().collect(),
            Self::All => children(value),
            Self::Below => {
                let mut found = Vec::new();
                descend(value, &mut found);
                found
            }
            Self::Index(index) => {
                let items = value.as_array().map(Vec::as_slice).unwrap_or_default();
                from_either_end(*index, items.len())
                    .and_then(|i| items.get(i))
                    .into_iter()
                    .collect()
            }
            Self::Slice { start, end } => {
                let items = value.as_array().map(Vec::as_slice).unwrap_or_default();
                let bound = |bound: Option<i64>, default: usize| match bound {
                    None => default,
                    Some(at) if at < 0 => from_either_end(at, items.len()).unwrap_or(0),
                    Some(at) => usize::try_from(at).unwrap_or(usize::MAX).min(items.len()),
                };
                let (start, end) = (bound(*start, 0), bound(*end, items.len()));
                items.get(start..end.max(start)).unwrap_or_default().iter().collect()
            }
            Self::Union(steps) => steps.iter().flat_map(|step| step.follow(value)).collect(),
            Self::Filter(filter) => {
                children(value).into_iter().filter(|entry| filter.holds(entry)).collect()
            }
        }
    }
}

fn children(value: &Value) -> Vec<&Value> {
    match value {
        Value::Array(items) => items.iter().collect(),
        Value::Object(fields) => fields.values().collect(),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => Vec::new(),
    }
}

fn descend<'v>(value: &'v Value, found: &mut Vec<&'v Value>) {
    found.push(value);
    for child in children(value) {
        descend(child, found);
    }
}

/// A position counted from the end when negative; `None` before the first.
fn from_either_end(index: i64, len: usize) -> Option<usize> {
    let from_start = if index < 0 { index + i64::try_from(len).ok()? } else { index };
    usize::try_from(from_start).ok()
}

impl Filter {
    fn holds(&self, entry: &Value) -> bool {
        let found = follow(&self.path, entry);
        let Some((test, wanted)) = &self.test else {
            return !found.is_empty();
        };
        found.first().is_some_and(|value| {
            let order = compare(value, wanted);
            match test {
                Test::Equal => order == Ordering::Equal,
                Test::NotEqual => order != Ordering::Equal,
                Test::Less => order == Ordering::Less,
                Test::LessOrEqual => order != Ordering::Greater,
                Test::Greater => order == Ordering::Greater,
                Test::GreaterOrEqual => order != Ordering::Less,
            }
        })
    }
}

/// Numbers by their value, quantities by their size, everything else as text.
pub(crate) fn compare(a: &Value, b: &Value) -> Ordering {
    match (number(a), number(b)) {
        (Some(a), Some(b)) => a.partial_cmp(&b).unwrap_or(Ordering::Equal),
        _ => plain(a).cmp(&plain(b)),
    }
}

fn number(value: &Value) -> Option<f64> {
    match value {
        Value::Number(number) => number.as_f64(),
        Value::String(text) => {
            text.parse::<exo_crds::Quantity>().ok().map(|quantity| quantity.bytes() as f64)
        }
        Value::Null | Value::Bool(_) | Value::Array(_) | Value::Object(_) => None,
    }
}

/// A value as a person would write it: strings without quotes.
pub(crate) fn plain(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn follows_fields_indices_and_filters() {
        let object = json!({"status": {"phase": "Ready", "replicas": [{"n": 1}, {"n": 2}, {"n": 3}],
            "conditions": [{"type": "Placed", "status": "True"}, {"type": "Ready", "status": "False"}]},
            "labels": {"exo.dev/instance": "llama"}});
        let check = |path: &str, expect: &[&str]| {
            let read: JsonPath = path.parse().unwrap();
            let found: Vec<_> = read.all(&object).into_iter().map(plain).collect();
            assert_eq!(found, expect, "{path}");
        };
        check("{.status.phase}", &["Ready"]);
        check("status.phase", &["Ready"]);
        check("$.status.phase", &["Ready"]);
        check(".status.replicas[1].n", &["2"]);
        check(".status.replicas[-1].n", &["3"]);
        check(".status.replicas[1:].n", &["2", "3"]);
        check(".status.replicas[:-1].n", &["1", "2"]);
        check(".status.replicas[0,2].n", &["1", "3"]);
        check(".status.replicas[9].n", &[]);
        check(".status.replicas[*].n", &["1", "2", "3"]);
        check(".status.nothing.here", &[]);
        check(".labels.exo\\.dev/instance", &["llama"]);
        check(".labels['exo.dev/instance']", &["llama"]);
        check("..n", &["1", "2", "3"]);
        check("{.status.conditions[?(@.type==\"Ready\")].status}", &["False"]);
        check("{.status.conditions[?(@.type=='Gone')].status}", &[]);
        check("{.status.replicas[?(@.n>=2)].n}", &["2", "3"]);
        check("{.status.replicas[?(@.n != 2)].n}", &["1", "3"]);
        check("{.status.conditions[?(@.reason)].type}", &[]);
    }

    #[test]
    fn refuses_what_it_can_not_read() {
        for bad in [
            "",
            "{}",
            "{.a",
            ".",
            ".a[",
            ".a[x]",
            ".a[?(@.b",
            ".a[?(@.b==)]",
            "a..",
            ".a['b]",
            ".a[1,]",
            ".a b",
        ] {
            assert!(bad.parse::<JsonPath>().is_err(), "{bad}");
        }
    }

    #[test]
    fn quantities_compare_by_size() {
        assert_eq!(compare(&json!("2Gi"), &json!("900Mi")), Ordering::Greater);
        assert_eq!(compare(&json!(10), &json!(9)), Ordering::Greater);
        assert_eq!(compare(&json!("b"), &json!("a")), Ordering::Greater);
    }
}
