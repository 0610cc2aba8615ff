//! The part of kubectl's JSONPath that `wait` needs: fields, indices, and filters by equality.

use std::str::FromStr;

use serde_json::Value;

/// A path such as `{.status.replicas[0].ready}`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct JsonPath {
    steps: Vec<Step>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Step {
    Field(String),
    Index(usize),
    /// `[?(@.field=="value")]`: the first entry for which it holds.
    Filter {
        field: String,
        value: String,
    },
}

/// Text that is not a path this reads.
#[derive(Debug, thiserror::Error)]
#[error(
    "`{0}` is not a path such as {{.status.phase}} or {{.status.conditions[?(@.type==\"Ready\")].status}}"
)]
pub(crate) struct ParsePathError(String);

impl FromStr for JsonPath {
    type Err = ParsePathError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let error = || ParsePathError(text.to_owned());
        let braced = text.strip_prefix('{').map(|rest| rest.strip_suffix('}'));
        let mut rest = braced.unwrap_or(Some(text)).ok_or_else(error)?;
        let mut steps = Vec::new();
        while !rest.is_empty() {
            let (step, tail) = read_step(rest).ok_or_else(error)?;
            steps.push(step);
            rest = tail;
        }
        if steps.is_empty() {
            return Err(error());
        }
        Ok(Self { steps })
    }
}

fn read_step(text: &str) -> Option<(Step, &str)> {
    if let Some(rest) = text.strip_prefix("[?(@.") {
        let (filter, rest) = rest.split_once(")]")?;
        let (field, value) = filter.split_once("==")?;
        let value = value.trim();
        let value = ['"', '\''].into_iter().find_map(|q| value.strip_prefix(q)?.strip_suffix(q))?;
        let (field, value) = (field.trim().to_owned(), value.to_owned());
        return Some((Step::Filter { field, value }, rest));
    }
    if let Some(rest) = text.strip_prefix('[') {
        let (index, rest) = rest.split_once(']')?;
        return Some((Step::Index(index.parse().ok()?), rest));
    }
    let rest = text.strip_prefix('.')?;
    let end = rest.find(['.', '[']).unwrap_or(rest.len());
    let (field, rest) = rest.split_at(end);
    (!field.is_empty()).then(|| (Step::Field(field.to_owned()), rest))
}

impl JsonPath {
    /// What the path leads to.
    pub(crate) fn find<'v>(&self, value: &'v Value) -> Option<&'v Value> {
        self.steps.iter().try_fold(value, |value, step| match step {
            Step::Field(name) => value.get(name),
            Step::Index(index) => value.get(index),
            Step::Filter { field, value: wanted } => value
                .as_array()?
                .iter()
                .find(|entry| entry.get(field).is_some_and(|v| plain(v) == *wanted)),
        })
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
        let object = json!({"status": {"phase": "Ready", "replicas": [{"n": 1}, {"n": 2}],
            "conditions": [{"type": "Placed", "status": "True"}, {"type": "Ready", "status": "False"}]}});
        let check = |path: &str, expect: Option<&str>| {
            let path: JsonPath = path.parse().unwrap();
            assert_eq!(path.find(&object).map(plain).as_deref(), expect, "{path:?}");
        };
        check("{.status.phase}", Some("Ready"));
        check(".status.replicas[1].n", Some("2"));
        check(".status.replicas[2].n", None);
        check(".status.nothing.here", None);
        check("{.status.conditions[?(@.type==\"Ready\")].status}", Some("False"));
        check("{.status.conditions[?(@.type=='Gone')].status}", None);
    }

    #[test]
    fn refuses_what_it_can_not_read() {
        for bad in ["", "{}", "{.a", "a", ".", ".a[", ".a[x]", ".a[?(@.b)]", ".a..b", "{.a[*]}"] {
            assert!(bad.parse::<JsonPath>().is_err(), "{bad}");
        }
    }
}
