//! The part of JSONPath that CRDs use for printer columns, selectable fields and subresources:
//! `.a.b`, `['a']`, `[0]`, `[*]`, `[?(@.type=="Ready")]`.
//!
//! Owns: parsing and evaluation. Never: slices, scripts, recursive descent.

use std::str::FromStr;

use serde_json::Value;

/// A parsed path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct JsonPath {
    steps: Vec<Step>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Step {
    Field(String),
    /// Negative: from the end.
    Index(i64),
    All,
    /// Elements in which the field at `path` is equal (or not) to `value`.
    Filter {
        path: Vec<String>,
        equal: bool,
        value: Value,
    },
}

/// A text that is not such a path.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{path}` is not a path this server understands: {problem}")]
pub(crate) struct ParsePathError {
    path: String,
    problem: &'static str,
}

impl FromStr for JsonPath {
    type Err = ParsePathError;

    fn from_str(path: &str) -> Result<Self, Self::Err> {
        let error = |problem| ParsePathError { path: path.to_owned(), problem };
        let mut rest = path.strip_prefix('$').unwrap_or(path);
        let mut steps = Vec::new();
        while !rest.is_empty() {
            if let Some(after) = rest.strip_prefix('.') {
                let (name, tail) = field_name(after);
                if name.is_empty() {
                    return Err(error("a field name is missing"));
                }
                steps.push(Step::Field(name));
                rest = tail;
            } else if let Some(after) = rest.strip_prefix('[') {
                let end = closing_bracket(after).ok_or_else(|| error("`]` is missing"))?;
                steps.push(bracket(after[..end].trim()).map_err(error)?);
                rest = &after[end + 1..];
            } else {
                return Err(error("`.` or `[` expected"));
            }
        }
        Ok(Self { steps })
    }
}

/// A field name up to the next `.` or `[`, where `\` takes the next character as it is.
fn field_name(text: &str) -> (String, &str) {
    let mut name = String::new();
    let mut chars = text.char_indices();
    while let Some((at, c)) = chars.next() {
        match c {
            '\\' => {
                if let Some((_, escaped)) = chars.next() {
                    name.push(escaped);
                }
            }
            '.' | '[' => return (name, &text[at..]),
            _ => name.push(c),
        }
    }
    (name, "")
}

/// Position of the `]` that ends this bracket, outside of quotes.
fn closing_bracket(text: &str) -> Option<usize> {
    let mut quote = None;
    for (at, c) in text.char_indices() {
        match (quote, c) {
            (Some(q), c) if q == c => quote = None,
            (None, '"' | '\'') => quote = Some(c),
            (None, ']') => return Some(at),
            _ => {}
        }
    }
    None
}

fn bracket(inner: &str) -> Result<Step, &'static str> {
    if inner == "*" {
        return Ok(Step::All);
    }
    if let Some(name) = unquote(inner) {
        return Ok(Step::Field(name.to_owned()));
    }
    if let Some(filter) = inner.strip_prefix("?(").and_then(|f| f.strip_suffix(')')) {
        return parse_filter(filter.trim());
    }
    let index = inner.parse().map_err(|_| "an index was expected")?;
    Ok(Step::Index(index))
}

fn parse_filter(filter: &str) -> Result<Step, &'static str> {
    let (left, right, equal) = if let Some((left, right)) = filter.split_once("==") {
        (left, right, true)
    } else if let Some((left, right)) = filter.split_once("!=") {
        (left, right, false)
    } else {
        return Err("a filter must compare with == or !=");
    };
    let path = left
        .trim()
        .strip_prefix("@.")
        .ok_or("a filter must begin with @.")?
        .split('.')
        .map(str::to_owned)
        .collect();
    let right = right.trim();
    let value = match unquote(right) {
        Some(text) => Value::from(text),
        None => serde_json::from_str(right).map_err(|_| "a filter must compare with a literal")?,
    };
    Ok(Step::Filter { path, equal, value })
}

fn unquote(text: &str) -> Option<&str> {
    ['"', '\''].iter().find_map(|q| text.strip_prefix(*q).and_then(|t| t.strip_suffix(*q)))
}

impl JsonPath {
    /// The first value that the path leads to.
    pub(crate) fn first<'a>(&self, value: &'a Value) -> Option<&'a Value> {
        let mut found = vec![value];
        for step in &self.steps {
            found = found.into_iter().flat_map(|v| step.apply(v)).collect();
        }
        found.into_iter().next()
    }
}

impl Step {
    fn apply<'a>(&self, value: &'a Value) -> Vec<&'a Value> {
        match self {
            Self::Field(name) => value.get(name).into_iter().collect(),
            Self::Index(index) => {
                let items = value.as_array().map_or(&[][..], Vec::as_slice);
                let len = i64::try_from(items.len()).unwrap_or(i64::MAX);
                let at = if *index < 0 { len + index } else { *index };
                let found = usize::try_from(at).ok().and_then(|at| items.get(at));
                found.into_iter().collect()
            }
            Self::All => children(value),
            Self::Filter { path, equal, value: wanted } => children(value)
                .into_iter()
                .filter(|item| {
                    let field = path.iter().try_fold(*item, |v, name| v.get(name));
                    field.is_some_and(|field| (field == wanted) == *equal)
                })
                .collect(),
        }
    }
}

fn children(value: &Value) -> Vec<&Value> {
    match value {
        Value::Array(items) => items.iter().collect(),
        Value::Object(fields) => fields.values().collect(),
        _ => Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn paths_lead_to_the_first_match() {
        let object = json!({
            "metadata": {"labels": {"a.b/c": "label"}},
            "status": {
                "conditions": [
                    {"type": "Placed", "status": "True", "message": "x]"},
                    {"type": "Ready", "status": "False", "n": 3}
                ]
            }
        });
        let check = |path: &str, expect: Option<Value>| {
            let parsed: JsonPath = path.parse().unwrap();
            assert_eq!(parsed.first(&object).cloned(), expect, "{path}");
        };
        check(r#".status.conditions[?(@.type=="Ready")].status"#, Some(json!("False")));
        check(r"$.status.conditions[?(@.type=='Placed')].message", Some(json!("x]")));
        check(r#".status.conditions[?(@.message=="x]")].type"#, Some(json!("Placed")));
        check(".status.conditions[?(@.n==3)].type", Some(json!("Ready")));
        check(r#".status.conditions[?(@.type!="Placed")].type"#, Some(json!("Ready")));
        check(".status.conditions[1].type", Some(json!("Ready")));
        check(".status.conditions[-1].type", Some(json!("Ready")));
        check(".status.conditions[*].type", Some(json!("Placed")));
        check(r".metadata.labels.a\.b/c", Some(json!("label")));
        check(".metadata.labels['a.b/c']", Some(json!("label")));
        check(".status.absent.deeper", None);
        check(".status.conditions[9]", None);
    }

    #[test]
    fn other_texts_are_refused() {
        for bad in ["a", ".", ".a[", ".a[x]", ".a[?(@.b)]", ".a[?(b==1)]", "..a", ".a[?(@.b==c)]"] {
            assert!(bad.parse::<JsonPath>().is_err(), "{bad}");
        }
    }
}
