//! Values of flags.

use std::time::Duration;

use crate::{
    jsonpath::{JsonPath, Template},
    kinds::{closest, did_you_mean},
};

/// How results are printed.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Output {
    Wide,
    Json,
    Yaml,
    Name,
    /// A template over the object, or over the list of them.
    JsonPath(Template),
    /// Header and path of each column.
    Columns(Vec<(String, JsonPath)>),
}

impl Output {
    pub(super) fn parse(text: &str) -> Result<Self, String> {
        const FORMS: [(&str, Output); 4] = [
            ("wide", Output::Wide),
            ("json", Output::Json),
            ("yaml", Output::Yaml),
            ("name", Output::Name),
        ];
        if let Some((_, form)) = FORMS.iter().find(|(name, _)| *name == text) {
            return Ok(form.clone());
        }
        match text.split_once('=') {
            Some(("jsonpath", template)) => {
                template.parse().map(Self::JsonPath).map_err(|error| format!("{error}"))
            }
            Some(("custom-columns", columns)) => columns_of(columns).map(Self::Columns),
            _ => {
                let names = FORMS.iter().map(|(name, _)| *name);
                let names = names.chain(["jsonpath", "custom-columns"]);
                let meant = closest(text.split('=').next().unwrap_or_default(), names);
                Err(format!(
                    "expected wide, json, yaml, name, jsonpath=TEMPLATE or \
                     custom-columns=NAME:PATH,…{}",
                    did_you_mean(meant)
                ))
            }
        }
    }
}

fn columns_of(text: &str) -> Result<Vec<(String, JsonPath)>, String> {
    let column = |text: &str| {
        let (name, path) = text.split_once(':').unwrap_or_default();
        if name.is_empty() || path.is_empty() {
            return Err(format!("`{text}` is not NAME:PATH"));
        }
        let path = path.parse().map_err(|error| format!("{error}"))?;
        Ok((name.to_owned(), path))
    };
    text.split(',').map(column).collect()
}

pub(super) fn path(text: &str) -> Result<JsonPath, String> {
    text.parse().map_err(|error| format!("{error}"))
}

/// What to wait for.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Goal {
    Create,
    Condition { kind: String, status: String },
    Delete,
    Path { path: JsonPath, value: Option<String> },
}

impl Goal {
    pub(super) fn parse(text: &str) -> Result<Self, String> {
        match text {
            "create" => return Ok(Self::Create),
            "delete" => return Ok(Self::Delete),
            _ => {}
        }
        match text.split_once('=') {
            Some(("condition", rest)) if !rest.is_empty() => {
                let (kind, status) = rest.split_once('=').unwrap_or((rest, "True"));
                if !["True", "False", "Unknown"].iter().any(|s| s.eq_ignore_ascii_case(status)) {
                    return Err(format!("a condition is True, False or Unknown, not `{status}`"));
                }
                Ok(Self::Condition { kind: kind.to_owned(), status: status.to_owned() })
            }
            Some(("jsonpath", rest)) => {
                // The value follows the closing brace; a path without braces holds no `=`.
                let (path, value) = match rest.rfind('}') {
                    Some(end) => (&rest[..=end], rest[end + 1..].strip_prefix('=')),
                    None => match rest.split_once('=') {
                        Some((path, value)) => (path, Some(value)),
                        None => (rest, None),
                    },
                };
                Ok(Self::Path {
                    path: path.parse().map_err(|error| format!("{error}"))?,
                    value: value.map(str::to_owned),
                })
            }
            _ => {
                Err("expected condition=TYPE[=STATUS], jsonpath={.path}[=VALUE], create or delete"
                    .to_owned())
            }
        }
    }
}

/// How many replicas.
pub(super) fn replicas(text: &str) -> Result<u32, String> {
    text.parse().map_err(|_| "replicas must be a whole number, 0 or more".to_owned())
}

/// Reads `90s`, `5m`, `1h30m`; a plain number is seconds.
pub(super) fn duration(text: &str) -> Result<Duration, String> {
    let wrong = || format!("`{text}` is not a time such as 30s, 5m or 1h30m");
    let mut total_s = 0_f64;
    let mut rest = text;
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(rest.len());
        let number: f64 = rest[..digits].parse().map_err(|_| wrong())?;
        rest = &rest[digits..];
        let units = [("ms", 0.001), ("s", 1.0), ("m", 60.0), ("h", 3600.0)];
        let unit = units.iter().find(|(name, _)| rest.starts_with(name));
        let (name, factor) = match unit {
            Some((name, factor)) => (*name, *factor),
            None if rest.is_empty() && total_s == 0.0 => ("", 1.0),
            None => return Err(wrong()),
        };
        rest = &rest[name.len()..];
        total_s += number * factor;
    }
    match text {
        "" => Err(wrong()),
        _ => Duration::try_from_secs_f64(total_s).map_err(|_| wrong()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_forms() {
        assert_eq!(Output::parse("yaml"), Ok(Output::Yaml));
        assert!(matches!(Output::parse("jsonpath={.a}"), Ok(Output::JsonPath(_))));
        let columns = vec![
            ("A".to_owned(), ".metadata.name".parse().unwrap()),
            ("B".to_owned(), ".b".parse().unwrap()),
        ];
        let read = Output::parse("custom-columns=A:.metadata.name,B:.b");
        assert_eq!(read, Ok(Output::Columns(columns)));
        for (bad, needle) in [
            ("yml", "did you mean `yaml`?"),
            ("", "expected wide"),
            ("jsonpath={.a", "without"),
            ("custom-columns=A", "`A` is not NAME:PATH"),
            ("custom-columns=A:[", "is not a path"),
        ] {
            let error = Output::parse(bad).unwrap_err();
            assert!(error.contains(needle), "{bad}: {error}");
        }
    }

    #[test]
    fn reads_times() {
        let check = |text: &str, ms: u64| {
            assert_eq!(duration(text), Ok(Duration::from_millis(ms)), "{text}");
        };
        check("30", 30_000);
        check("0", 0);
        check("90s", 90_000);
        check("1h30m", 5_400_000);
        check("1.5s", 1_500);
        check("250ms", 250);
        for bad in ["", "s", "5x", "5m3", "-1s", "1e400h", "99999999999999999999h"] {
            assert!(duration(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn reads_goals() {
        let condition =
            |kind: &str, status: &str| Goal::Condition { kind: kind.into(), status: status.into() };
        let path = |path: &str, value: Option<&str>| Goal::Path {
            path: path.parse().unwrap(),
            value: value.map(str::to_owned),
        };
        let check = |text: &str, goal: Goal| assert_eq!(Goal::parse(text), Ok(goal), "{text}");
        check("condition=Ready", condition("Ready", "True"));
        check("condition=Ready=False", condition("Ready", "False"));
        check("delete", Goal::Delete);
        check("create", Goal::Create);
        check("jsonpath={.status.phase}=Ready", path("{.status.phase}", Some("Ready")));
        check("jsonpath=.status.phase=Ready", path(".status.phase", Some("Ready")));
        check("jsonpath={.status.phase}", path(".status.phase", None));
        for bad in
            ["", "condition=", "condition=Ready=Yes", "ready", "jsonpath=", "jsonpath={.a[x]}"]
        {
            assert!(Goal::parse(bad).is_err(), "{bad}");
        }
    }
}
