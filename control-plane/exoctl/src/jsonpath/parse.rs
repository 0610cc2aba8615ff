//! Reads paths. `None` everywhere means: not a path.

use serde_json::Value;

use super::{Filter, Step, Test};

/// Reads a whole path: `.a[0]`, `$.a`, `@.a`, `a.b`.
pub(super) fn path(text: &str) -> Option<Vec<Step>> {
    let mut rest = text.strip_prefix(['$', '@']).unwrap_or(text);
    let mut steps = Vec::new();
    // Only the first field may come without its dot.
    if rest.starts_with(|c: char| is_field(c)) && rest == text {
        let (field, tail) = field(rest)?;
        steps.push(field);
        rest = tail;
    }
    while !rest.is_empty() {
        let tail = step(rest, &mut steps)?;
        rest = tail;
    }
    Some(steps)
}

/// Reads one step; returns what follows it.
fn step<'t>(text: &'t str, steps: &mut Vec<Step>) -> Option<&'t str> {
    if let Some(rest) = text.strip_prefix("..") {
        steps.push(Step::Below);
        if rest.starts_with('[') {
            return bracket(rest, steps);
        }
        let (step, rest) = field(rest)?;
        steps.push(step);
        return Some(rest);
    }
    if text.starts_with('[') {
        return bracket(text, steps);
    }
    let rest = text.strip_prefix('.')?;
    if rest.starts_with('[') {
        return bracket(rest, steps);
    }
    let (step, rest) = field(rest)?;
    steps.push(step);
    Some(rest)
}

fn is_field(c: char) -> bool {
    c.is_alphanumeric() || matches!(c, '_' | '-' | '/' | '\\' | '*')
}

/// A name, in which `\` keeps the next character from ending it; or `*`.
fn field(text: &str) -> Option<(Step, &str)> {
    let mut name = String::new();
    let mut chars = text.char_indices();
    let mut end = text.len();
    while let Some((at, c)) = chars.next() {
        match c {
            '\\' => name.push(chars.next()?.1),
            c if is_field(c) => name.push(c),
            _ => {
                end = at;
                break;
            }
        }
    }
    let step = match name.as_str() {
        "" => return None,
        "*" => Step::All,
        _ => Step::Field(name),
    };
    Some((step, &text[end..]))
}

/// `[…]`; returns what follows it.
fn bracket<'t>(text: &'t str, steps: &mut Vec<Step>) -> Option<&'t str> {
    let text = text.strip_prefix('[')?;
    if let Some(rest) = text.strip_prefix("?(") {
        let end = outside_quotes(rest, |rest| rest.starts_with(")]"))?;
        steps.push(Step::Filter(filter(&rest[..end])?));
        return Some(&rest[end + 2..]);
    }
    let end = outside_quotes(text, |rest| rest.starts_with(']'))?;
    let (inside, rest) = (&text[..end], &text[end + 1..]);
    let mut parts: Vec<Step> =
        split_outside_quotes(inside, ',').into_iter().map(entry).collect::<Option<_>>()?;
    steps.push(if parts.len() == 1 { parts.pop()? } else { Step::Union(parts) });
    Some(rest)
}

/// One entry between brackets.
fn entry(text: &str) -> Option<Step> {
    let text = text.trim();
    if text == "*" {
        return Some(Step::All);
    }
    if let Some(name) = unquoted(text) {
        return Some(Step::Field(name));
    }
    let Some((start, end)) = text.split_once(':') else {
        return text.parse().ok().map(Step::Index);
    };
    let bound = |text: &str| match text.trim() {
        "" => Some(None),
        text => text.parse().ok().map(Some),
    };
    Some(Step::Slice { start: bound(start)?, end: bound(end)? })
}

fn filter(text: &str) -> Option<Filter> {
    let tests = [
        ("==", Test::Equal),
        ("!=", Test::NotEqual),
        ("<=", Test::LessOrEqual),
        (">=", Test::GreaterOrEqual),
        ("<", Test::Less),
        (">", Test::Greater),
    ];
    let found = tests.iter().find_map(|(sign, test)| {
        let at = outside_quotes(text, |rest| rest.starts_with(sign))?;
        Some((&text[..at], *test, &text[at + sign.len()..]))
    });
    let of_entry = |text: &str| {
        let text = text.trim();
        text.starts_with('@').then(|| path(text)).flatten()
    };
    match found {
        None => Some(Filter { path: of_entry(text)?, test: None }),
        Some((left, test, right)) => {
            Some(Filter { path: of_entry(left)?, test: Some((test, literal(right.trim())?)) })
        }
    }
}

fn literal(text: &str) -> Option<Value> {
    if let Some(text) = unquoted(text) {
        return Some(Value::String(text));
    }
    serde_json::from_str(text).ok().filter(|v: &Value| !v.is_object() && !v.is_array())
}

/// The text between single or double quotes, with `\` escapes.
pub(super) fn unquoted(text: &str) -> Option<String> {
    let quote = text.chars().next().filter(|c| matches!(c, '"' | '\''))?;
    let inner = text.strip_prefix(quote)?.strip_suffix(quote)?;
    let mut plain = String::new();
    let mut chars = inner.chars();
    while let Some(c) = chars.next() {
        match c {
            '\\' => plain.push(match chars.next()? {
                'n' => '\n',
                't' => '\t',
                'r' => '\r',
                other => other,
            }),
            c if c == quote => return None,
            c => plain.push(c),
        }
    }
    Some(plain)
}

/// The first position outside quotes for which `is_it` holds of the text from there.
pub(super) fn outside_quotes(text: &str, is_it: impl Fn(&str) -> bool) -> Option<usize> {
    let mut quote = None;
    let mut escaped = false;
    for (at, c) in text.char_indices() {
        match (quote, c) {
            _ if escaped => escaped = false,
            (_, '\\') => escaped = true,
            (Some(open), c) if c == open => quote = None,
            (Some(_), _) => {}
            (None, _) if is_it(&text[at..]) => return Some(at),
            (None, '"' | '\'') => quote = Some(c),
            (None, _) => {}
        }
    }
    None
}

fn split_outside_quotes(text: &str, separator: char) -> Vec<&str> {
    let mut parts = Vec::new();
    let mut rest = text;
    while let Some(at) = outside_quotes(rest, |rest| rest.starts_with(separator)) {
        parts.push(&rest[..at]);
        rest = &rest[at + separator.len_utf8()..];
    }
    parts.push(rest);
    parts
}
