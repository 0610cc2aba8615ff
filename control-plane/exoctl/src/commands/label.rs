//! `exoctl label` and `exoctl annotate`.

use std::{collections::BTreeMap, io::Write};

use anyhow::bail;
use serde_json::{Map, Value, json};

use super::{
    change_query, dry_run_suffix,
    select::{self, Found},
};
use crate::{
    cli::Marks,
    error::{Collector, refused},
    jsonpath::plain,
    server::{Form, MERGE_PATCH, Server},
};

/// Somebody else may write the same object; more in a row is no race.
const MAX_TRIES: usize = 8;

/// Labels or annotations.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sort {
    /// Below `metadata`.
    field: &'static str,
    one: &'static str,
    done: &'static str,
    /// When keys were only removed.
    undone: &'static str,
    manager: &'static str,
}

impl Sort {
    /// kubectl's word for what became of an object.
    fn word(self, changed: &Map<String, Value>) -> String {
        if changed.is_empty() {
            return format!("not {}", self.done);
        }
        let only_removed = changed.values().all(Value::is_null);
        (if only_removed { self.undone } else { self.done }).to_owned()
    }
}

pub(super) const LABELS: Sort = Sort {
    field: "labels",
    one: "label",
    done: "labeled",
    undone: "unlabeled",
    manager: "exoctl-label",
};
pub(super) const ANNOTATIONS: Sort = Sort {
    field: "annotations",
    one: "annotation",
    done: "annotated",
    undone: "annotated",
    manager: "exoctl-annotate",
};

/// What to do with each key: set it to a value, or remove it.
type Changes = BTreeMap<String, Option<String>>;

pub(super) async fn run(
    args: &Marks,
    sort: Sort,
    server: &Server,
    out: &mut dyn Write,
) -> anyhow::Result<()> {
    let (objects, changes) = split(&args.words)?;
    let Some((first, rest)) = objects.split_first() else {
        bail!("say what to {}: KIND NAME or KIND/NAME first", sort.field.trim_end_matches('s'));
    };
    if changes.is_empty() != args.list {
        match args.list {
            true => bail!("--list changes nothing: leave KEY=VALUE and KEY- out"),
            false => bail!("say which {}: KEY=VALUE to set, KEY- to remove", sort.field),
        }
    }
    let suffix = dry_run_suffix(args.dry_run);
    let mut failures = Collector::default();
    for one in select::found(server, (first, rest), Some((&args.select, args.all))).await? {
        if args.list {
            let object = server.get::<Value>(&one.path(), &[], Form::Json).await;
            if let Some(object) = failures.note(object)? {
                print(&one, &object["metadata"][sort.field], out)?;
            }
            continue;
        }
        let marked = mark(args, sort, server, &one, &changes).await;
        if let Some(changed) = failures.note(marked)? {
            writeln!(out, "{} {}{suffix}", one.named(), sort.word(&changed))?;
            out.flush()?;
        }
    }
    failures.finish()
}

fn print(one: &Found<'_>, marks: &Value, out: &mut dyn Write) -> anyhow::Result<()> {
    writeln!(out, "{}:", one.named())?;
    for (key, value) in marks.as_object().into_iter().flatten() {
        writeln!(out, "  {key}={}", plain(value))?;
    }
    Ok(())
}

/// Words about objects come first, then those about keys.
fn split(words: &[String]) -> anyhow::Result<(Vec<String>, Changes)> {
    let is_change = |word: &String| word.contains('=') || word.ends_with('-');
    let start = words.iter().position(is_change).unwrap_or(words.len());
    let mut changes = Changes::new();
    for word in &words[start..] {
        let (key, value) = match word.split_once('=') {
            Some((key, value)) => (key, Some(value.to_owned())),
            None => match word.strip_suffix('-') {
                Some(key) => (key, None),
                None => bail!("`{word}` is neither KEY=VALUE nor KEY-"),
            },
        };
        if key.is_empty() {
            bail!("`{word}` has no key");
        }
        if changes.insert(key.to_owned(), value).is_some() {
            bail!("`{key}` is given twice");
        }
    }
    Ok((words[..start].to_vec(), changes))
}

/// What had to be changed: values set, null for keys removed.
async fn mark(
    args: &Marks,
    sort: Sort,
    server: &Server,
    one: &Found<'_>,
    changes: &Changes,
) -> anyhow::Result<Map<String, Value>> {
    let query = change_query(sort.manager, args.dry_run);
    for _ in 0..MAX_TRIES {
        let object: Value = server.get(&one.path(), &[], Form::Json).await?;
        let wanted = wanted(sort, changes, &object, args.overwrite)?;
        if wanted.is_empty() {
            return Ok(wanted);
        }
        // What was looked at is what is changed.
        let version = &object["metadata"]["resourceVersion"];
        let patch = json!({"metadata": {"resourceVersion": version, sort.field: wanted}});
        match server.patch(&one.path(), MERGE_PATCH, &query, &patch).await {
            Ok(_) => return Ok(wanted),
            Err(error) if refused(&error).is_some_and(|r| r.is_conflict()) => {}
            Err(error) => return Err(error),
        }
    }
    bail!("{} keeps being changed by others: try again", one.named())
}

/// The part of the changes that isn't so already.
fn wanted(
    sort: Sort,
    changes: &Changes,
    object: &Value,
    overwrite: bool,
) -> anyhow::Result<Map<String, Value>> {
    let mut wanted = Map::new();
    for (key, value) in changes {
        let there = object["metadata"][sort.field][key].as_str();
        match (there, value) {
            (None, None) => eprintln!("{} `{key}` is not there", sort.one),
            (Some(there), Some(value)) if there == value => {}
            (Some(there), Some(_)) if !overwrite => {
                bail!("{} `{key}` is `{there}` already: --overwrite replaces it", sort.one)
            }
            (_, value) => {
                wanted.insert(key.clone(), json!(value));
            }
        }
    }
    Ok(wanted)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(text: &str) -> Vec<String> {
        text.split(' ').map(str::to_owned).collect()
    }

    #[test]
    fn objects_come_before_keys() {
        let (objects, changes) = split(&words("nodes a b rack=1 exo.dev/x=a=b old-")).unwrap();
        assert_eq!(objects, ["nodes", "a", "b"]);
        let value = |text: &str| Some(text.to_owned());
        let expect = [("exo.dev/x", value("a=b")), ("old", None), ("rack", value("1"))];
        assert_eq!(changes, expect.map(|(key, value)| (key.to_owned(), value)).into());
        for (bad, needle) in
            [("node a x=1 b", "neither"), ("node a x=1 x-", "twice"), ("node a =1", "no key")]
        {
            let error = split(&words(bad)).unwrap_err().to_string();
            assert!(error.contains(needle), "{bad}: {error}");
        }
    }

    #[test]
    fn values_that_are_there_are_kept_unless_told_otherwise() {
        let object = json!({"metadata": {"labels": {"a": "1", "b": "2"}}});
        let of = |text: &str, overwrite: bool| {
            let (_, changes) = split(&words(text)).unwrap();
            wanted(LABELS, &changes, &object, overwrite).map(Value::Object)
        };
        assert_eq!(of("x a=1", false).unwrap(), json!({}));
        assert_eq!(of("x a=2", true).unwrap(), json!({"a": "2"}));
        assert_eq!(of("x b- c=3 d-", false).unwrap(), json!({"b": null, "c": "3"}));
        let word = |sort: Sort, text: &str| {
            let (_, changes) = split(&words(text)).unwrap();
            sort.word(&wanted(sort, &changes, &object, true).unwrap())
        };
        assert_eq!(word(LABELS, "x b- d-"), "unlabeled");
        assert_eq!(word(LABELS, "x b- c=3"), "labeled");
        assert_eq!(word(LABELS, "x d- a=1"), "not labeled");
        assert_eq!(word(ANNOTATIONS, "x d-"), "not annotated");
        assert!(of("x a=2", false).unwrap_err().to_string().contains("--overwrite"));
    }
}
