//! What a request asks for: path, verb and parameters, read once.

use std::{collections::BTreeMap, time::Duration};

use axum::http::Method;

use crate::error::ApiError;

/// Parameters of the query; the last one of a name counts.
#[derive(Clone, Debug, Default)]
pub(crate) struct Query(BTreeMap<String, String>);

impl Query {
    pub(crate) fn parse(query: Option<&str>) -> Self {
        Self(pairs(query).collect())
    }

    /// Absent and empty are the same.
    pub(crate) fn get(&self, name: &str) -> Option<&str> {
        let value = self.0.get(name).map(String::as_str);
        value.filter(|v| !v.is_empty())
    }

    /// Given, with whatever value.
    pub(crate) fn has(&self, name: &str) -> bool {
        self.0.contains_key(name)
    }

    /// As in Kubernetes: set by anything but `0` and `false`, however that is written.
    pub(crate) fn flag(&self, name: &str) -> Option<bool> {
        let value = self.0.get(name)?;
        Some(value != "0" && !value.eq_ignore_ascii_case("false"))
    }

    pub(crate) fn number(&self, name: &str) -> Result<Option<u64>, ApiError> {
        self.get(name)
            .map(|text| {
                text.parse().map_err(|_| {
                    ApiError::BadRequest(format!(
                        "invalid value for {name}: `{text}` is not a number"
                    ))
                })
            })
            .transpose()
    }
}

/// A length of time as Go writes it: `300ms`, `1m30s`, `0`. `None` for anything else, and for what
/// lies in the past.
pub(crate) fn duration(text: &str) -> Option<Duration> {
    const UNITS_S: [(&str, f64); 8] = [
        ("ns", 1e-9),
        ("us", 1e-6),
        ("\u{b5}s", 1e-6),
        ("\u{3bc}s", 1e-6),
        ("ms", 1e-3),
        ("s", 1.0),
        ("m", 60.0),
        ("h", 3600.0),
    ];
    let mut rest = text.strip_prefix('+').unwrap_or(text);
    if rest == "0" {
        return Some(Duration::ZERO);
    }
    let mut whole = Duration::ZERO;
    loop {
        let is_digit = |c: char| c.is_ascii_digit() || c == '.';
        let (number, after) = rest.split_at(rest.find(|c| !is_digit(c))?);
        let (unit, after) = after.split_at(after.find(is_digit).unwrap_or(after.len()));
        let (_, seconds) = UNITS_S.iter().find(|(name, _)| *name == unit)?;
        let part = Duration::try_from_secs_f64(number.parse::<f64>().ok()? * seconds).ok()?;
        whole = whole.checked_add(part)?;
        rest = after;
        if rest.is_empty() {
            return Some(whole);
        }
    }
}

fn pairs(query: Option<&str>) -> impl Iterator<Item = (String, String)> {
    let pairs = query.unwrap_or_default().split('&').filter(|pair| !pair.is_empty());
    pairs.map(|pair| {
        let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
        (decode(name, true), decode(value, true))
    })
}

/// All values of a parameter that can be given several times.
pub(crate) fn values_of(query: Option<&str>, name: &str) -> Vec<String> {
    pairs(query).filter(|(given, _)| given == name).map(|(_, value)| value).collect()
}

/// Undoes percent-encoding; what is no valid UTF-8 afterwards is replaced.
fn decode(text: &str, plus_is_space: bool) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&first, tail)) = rest.split_first() {
        let hex = |b: u8| char::from(b).to_digit(16);
        rest = tail;
        match (first, tail) {
            (b'%', [high, low, after @ ..]) => {
                if let (Some(high), Some(low)) = (hex(*high), hex(*low)) {
                    bytes.extend(u8::try_from(high * 16 + low));
                    rest = after;
                } else {
                    bytes.push(first);
                }
            }
            (b'+', _) if plus_is_space => bytes.push(b' '),
            _ => bytes.push(first),
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

/// Where a path below `/apis/GROUP/VERSION` or `/api/VERSION` leads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Target {
    pub(crate) group: String,
    pub(crate) version: String,
    pub(crate) namespace: Option<String>,
    pub(crate) plural: String,
    pub(crate) name: Option<String>,
    pub(crate) subresource: Option<String>,
}

impl Target {
    /// `None` for a path of another shape.
    pub(crate) fn parse(path: &str) -> Option<Self> {
        let (group, rest) = match path.strip_prefix("/api/") {
            Some(rest) => (None, rest),
            None => {
                let (group, rest) = path.strip_prefix("/apis/")?.split_once('/')?;
                (Some(group), rest)
            }
        };
        let mut segments = rest.split('/');
        let version = segments.next()?;
        let rest: Vec<&str> = segments.collect();
        let (namespace, rest) = match rest.as_slice() {
            // Namespaces are resources too.
            ["namespaces", _, "status" | "finalize"] if group.is_none() => (None, &rest[..]),
            ["namespaces", namespace, rest @ ..] if !rest.is_empty() => (Some(*namespace), rest),
            rest => (None, rest),
        };
        let (plural, name, subresource) = match rest {
            [plural] => (plural, None, None),
            [plural, name] => (plural, Some(name), None),
            [plural, name, subresource] => (plural, Some(name), Some(subresource)),
            _ => return None,
        };
        let all = [group.unwrap_or("core"), version, plural];
        let parts = namespace.iter().chain(name).chain(subresource);
        if all.iter().chain(parts).any(|part| part.is_empty()) {
            return None;
        }
        let owned = |text: &str| decode(text, false);
        Some(Self {
            group: group.map(owned).unwrap_or_default(),
            version: owned(version),
            namespace: namespace.map(owned),
            plural: owned(plural),
            name: name.map(|n| owned(n)),
            subresource: subresource.map(|s| owned(s)),
        })
    }
}

/// What to do with the target.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verb {
    Get,
    List,
    Watch,
    Create,
    Update,
    Patch,
    Delete,
    DeleteCollection,
}

impl Verb {
    pub(crate) fn of(method: &Method, target: &Target, query: &Query) -> Result<Self, ApiError> {
        let watch = query.flag("watch") == Some(true);
        let verb = match (method.as_str(), target.name.is_some()) {
            ("GET", false) if watch => Self::Watch,
            ("GET", false) => Self::List,
            ("GET", true) => Self::Get,
            ("POST", false) => Self::Create,
            ("DELETE", false) => Self::DeleteCollection,
            ("PUT", true) => Self::Update,
            ("PATCH", true) => Self::Patch,
            ("DELETE", true) if target.subresource.is_none() => Self::Delete,
            _ => return Err(ApiError::MethodNotAllowed),
        };
        Ok(verb)
    }

    /// As policies on access name it.
    pub(crate) fn policy_name(self) -> &'static str {
        match self {
            Self::Get => "get",
            Self::List => "list",
            Self::Watch => "watch",
            Self::Create => "create",
            Self::Update => "update",
            Self::Patch => "patch",
            Self::Delete => "delete",
            Self::DeleteCollection => "deletecollection",
        }
    }

    /// Kind of the options that come with it.
    pub(crate) fn options(self) -> &'static str {
        match self {
            Self::Get => "GetOptions",
            Self::List | Self::Watch => "ListOptions",
            Self::Create => "CreateOptions",
            Self::Update => "UpdateOptions",
            Self::Patch => "PatchOptions",
            Self::Delete | Self::DeleteCollection => "DeleteOptions",
        }
    }

    /// As metrics name it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Get => "GET",
            Self::List => "LIST",
            Self::Watch => "WATCH",
            Self::Create => "POST",
            Self::Update => "PUT",
            Self::Patch => "PATCH",
            Self::Delete => "DELETE",
            Self::DeleteCollection => "DELETECOLLECTION",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Namespace, plural, name, subresource.
    type Parts<'a> = (Option<&'a str>, &'a str, Option<&'a str>, Option<&'a str>);

    #[test]
    fn paths_are_read_or_refused() {
        let check = |path: &str, expect: Option<Parts<'_>>| {
            let target = Target::parse(path);
            let found = target.as_ref().map(|t| {
                (
                    t.namespace.as_deref(),
                    t.plural.as_str(),
                    t.name.as_deref(),
                    t.subresource.as_deref(),
                )
            });
            assert_eq!(found, expect, "{path}");
        };
        check("/apis/g/v/nodes", Some((None, "nodes", None, None)));
        check("/apis/g/v/nodes/a", Some((None, "nodes", Some("a"), None)));
        check("/apis/g/v/nodes/a/status", Some((None, "nodes", Some("a"), Some("status"))));
        check("/apis/g/v/namespaces/n/shards", Some((Some("n"), "shards", None, None)));
        check("/apis/g/v/namespaces/n/shards/a", Some((Some("n"), "shards", Some("a"), None)));
        check("/apis/g/v/nodes/a%2Fb", Some((None, "nodes", Some("a/b"), None)));
        for bad in ["/apis/g/v", "/apis/g/v/", "/apis/g/v/nodes/", "/x", "/apis/g/v/a/b/c/d"] {
            check(bad, None);
        }
    }

    #[test]
    fn lengths_of_time_are_read_as_go_does() {
        for (text, expect_ms) in [
            ("0", Some(0)),
            ("0s", Some(0)),
            ("300ms", Some(300)),
            ("1.5h", Some(5_400_000)),
            ("1m30s", Some(90_000)),
            ("+2us2ms", Some(2)),
            ("", None),
            ("5", None),
            ("s", None),
            ("-1s", None),
            ("1d", None),
            ("1.2.3s", None),
            ("1s5", None),
            ("99999999999999999999h", None),
        ] {
            let found = duration(text).map(|time| time.as_millis());
            assert_eq!(found, expect_ms, "{text}");
        }
    }

    #[test]
    fn parameters_are_decoded() {
        let query = Query::parse(Some("a=x%3Dy%2Cz+w&watch=1&limit=5&n=%zz&b&c=False&d=0"));
        assert_eq!(query.get("a"), Some("x=y,z w"));
        let flags = ["watch", "a", "b", "c", "d", "absent"].map(|name| query.flag(name));
        assert_eq!(flags, [Some(true), Some(true), Some(true), Some(false), Some(false), None]);
        assert_eq!(query.number("limit").unwrap(), Some(5));
        assert!(query.number("a").is_err());
        assert_eq!(query.get("n"), Some("%zz"));
        assert_eq!(query.get("absent"), None);
    }
}
