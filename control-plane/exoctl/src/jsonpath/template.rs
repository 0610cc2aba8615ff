//! Templates: text with `{paths}`, quoted text, and `{range}` … `{end}`.

use std::str::FromStr;

use serde_json::Value;

use super::{JsonPath, follow, parse, plain};

/// A template such as `{range .items[*]}{.metadata.name}{"\n"}{end}`.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Template {
    parts: Vec<Part>,
}

#[derive(Clone, Debug, PartialEq)]
enum Part {
    Text(String),
    Path(JsonPath),
    Range { path: JsonPath, body: Vec<Part> },
}

/// Text that is not a template this reads.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ParseTemplateError {
    #[error("`{{` without `}}` in `{0}`")]
    Open(String),
    #[error("`{{{0}}}` is neither a path such as {{.metadata.name}}, a quoted text, range nor end")]
    Segment(String),
    #[error("{{range}} without {{end}}")]
    RangeWithoutEnd,
    #[error("{{end}} without {{range}}")]
    EndWithoutRange,
}

impl FromStr for Template {
    type Err = ParseTemplateError;

    /// Without any brace, the text is one path.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if !text.contains('{') {
            let path = text.parse().map_err(|_| ParseTemplateError::Segment(text.to_owned()))?;
            return Ok(Self { parts: vec![Part::Path(path)] });
        }
        // Ranges that are open, the outermost first; below them what the template itself holds.
        let mut open: Vec<(JsonPath, Vec<Part>)> = Vec::new();
        let mut parts = Vec::new();
        let mut rest = text;
        while let Some(start) = rest.find('{') {
            if start > 0 {
                parts.push(Part::Text(rest[..start].to_owned()));
            }
            let inside = &rest[start + 1..];
            let end = parse::outside_quotes(inside, |rest| rest.starts_with('}'));
            let end = end.ok_or_else(|| ParseTemplateError::Open(text.to_owned()))?;
            let segment = inside[..end].trim();
            rest = &inside[end + 1..];
            match segment.strip_prefix("range ") {
                Some(path) => {
                    let outer = std::mem::take(&mut parts);
                    open.push((read(path, segment)?, outer));
                }
                None if segment == "end" => {
                    let (path, outer) = open.pop().ok_or(ParseTemplateError::EndWithoutRange)?;
                    let body = std::mem::replace(&mut parts, outer);
                    parts.push(Part::Range { path, body });
                }
                None => parts.push(match parse::unquoted(segment) {
                    Some(text) => Part::Text(text),
                    None => Part::Path(read(segment, segment)?),
                }),
            }
        }
        if !open.is_empty() {
            return Err(ParseTemplateError::RangeWithoutEnd);
        }
        if !rest.is_empty() {
            parts.push(Part::Text(rest.to_owned()));
        }
        Ok(Self { parts })
    }
}

fn read(path: &str, segment: &str) -> Result<JsonPath, ParseTemplateError> {
    let steps = parse::path(path.trim());
    let steps = steps.ok_or_else(|| ParseTemplateError::Segment(segment.to_owned()))?;
    Ok(JsonPath { steps, text: path.trim().to_owned() })
}

impl Template {
    /// What it makes of a value. Paths that lead nowhere give nothing, several values are joined
    /// by a space.
    pub(crate) fn print(&self, value: &Value) -> String {
        let mut text = String::new();
        print(&self.parts, value, &mut text);
        text
    }
}

fn print(parts: &[Part], value: &Value, text: &mut String) {
    for part in parts {
        match part {
            Part::Text(fixed) => text.push_str(fixed),
            Part::Path(path) => {
                let found: Vec<_> = follow(&path.steps, value).into_iter().map(plain).collect();
                text.push_str(&found.join(" "));
            }
            Part::Range { path, body } => {
                for entry in follow(&path.steps, value) {
                    print(body, entry, text);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn prints_paths_text_and_ranges() {
        let list = json!({"items": [
            {"metadata": {"name": "a"}, "spec": {"n": 1}, "on": ["x", "y"]},
            {"metadata": {"name": "b"}, "spec": {"n": 2}, "on": []},
        ]});
        let check = |template: &str, expect: &str| {
            let read: Template = template.parse().unwrap();
            assert_eq!(read.print(&list), expect, "{template}");
        };
        check("{.items[*].metadata.name}", "a b");
        check(".items[*].metadata.name", "a b");
        check("names: {.items[*].metadata.name}\n", "names: a b\n");
        check(r#"{range .items[*]}{.metadata.name}{"\t"}{.spec.n}{"\n"}{end}"#, "a\t1\nb\t2\n");
        check("{range .items[*]}{@.metadata.name}:{range .on[*]}{@}+{end};{end}", "a:x+y+;b:;");
        check("{.items[0].spec}", "{\"n\":1}");
        check("{.nothing}", "");
        check("{'}'}", "}");
    }

    #[test]
    fn says_what_it_can_not_read() {
        let check = |template: &str, needle: &str| {
            let error = template.parse::<Template>().unwrap_err().to_string();
            assert!(error.contains(needle), "{template}: {error}");
        };
        check("{.a", "without");
        check("{.a b}", "{.a b}");
        check("{range .a[*]}x", "{range} without {end}");
        check("{end}", "{end} without {range}");
        check("", "neither");
    }
}
