//! `exoctl wait`, and the waiting of `apply` and `delete`.

use std::{io::Write, time::Duration};

use anyhow::{anyhow, bail};
use futures::{StreamExt as _, pin_mut};
use kube::runtime::{
    WatchStreamExt as _,
    watcher::{self, watch_object},
};
use serde_json::Value;
use tokio::time::{Instant, timeout_at};

use super::{hopeless, select, teller::Teller};
use crate::{
    cli::{Goal, Wait},
    error::{Collector, Hinted},
    jsonpath::plain,
    kinds::{Kind, closest, did_you_mean},
    schema::Schemas,
    server::{Form, Server},
};

/// What is waited for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Target<'a> {
    pub(super) kind: &'a Kind,
    pub(super) namespace: &'a str,
    pub(super) name: &'a str,
    /// The very object, where another one may have taken its name meanwhile.
    pub(super) uid: Option<&'a Value>,
    /// An instance that has failed for good ends the wait.
    pub(super) gives_up: bool,
}

impl Target<'_> {
    fn named(&self) -> String {
        self.kind.named(self.name)
    }
}

pub(super) async fn run(args: &Wait, server: &Server, out: &mut dyn Write) -> anyhow::Result<()> {
    let Some((first, rest)) = args.objects.split_first() else {
        bail!("say what to wait for: KIND/NAME");
    };
    let deadline = Instant::now() + args.timeout;
    let mut failures = Collector::default();
    for one in select::found(server, (first, rest), Some((&args.select, args.all))).await? {
        let target = Target {
            kind: one.kind,
            namespace: &one.namespace,
            name: &one.name,
            uid: None,
            gives_up: false,
        };
        let waited = wait_for(server, &target, &args.goal, deadline, args.timeout).await;
        if failures.note(waited)?.is_some() {
            let met = match args.goal {
                Goal::Create => "created",
                Goal::Delete => "deleted",
                Goal::Condition { .. } | Goal::Path { .. } => "condition met",
            };
            writeln!(out, "{} {met}", one.named())?;
            out.flush()?;
        }
    }
    failures.finish()
}

/// Returns once the goal is reached. An object that doesn't exist yet is waited for as well.
/// What happens on the way is told on stderr. `timeout` is only for the message.
pub(super) async fn wait_for(
    server: &Server,
    target: &Target<'_>,
    goal: &Goal,
    deadline: Instant,
    timeout: Duration,
) -> anyhow::Result<()> {
    if let (Goal::Condition { .. }, Some(false)) = (goal, has_conditions(target.kind)) {
        bail!(
            "{} have no conditions: wait with --for=jsonpath={{.status.phase}}=VALUE, or for \
             another field",
            target.kind.api.plural
        );
    }
    // An error that repeats itself (no permission, no server) is seen at once here; watches only
    // retry.
    let path = target.kind.path(Some(target.namespace), Some(target.name));
    let mut object = server.get_if_exists(&path).await?;
    let found_uid = object.as_ref().map(|object| object["metadata"]["uid"].clone());
    let uid = target.uid.or(found_uid.as_ref());
    let objects = watch_object(server.api(target.kind, target.namespace), target.name);
    let objects = objects.default_backoff();
    pin_mut!(objects);
    let mut teller = Teller::new(Instant::now());
    let mut was_there = object.is_some();
    let mut trouble = None;
    let mut due = false;
    loop {
        let State::NotYet(mut now) = State::of(goal, object.as_ref(), uid) else {
            return Ok(());
        };
        match &object {
            None if was_there => bail!("{} was deleted meanwhile", target.named()),
            None => now += &similar(server, target).await,
            Some(object) => has_hope(server, target, goal, object, deadline).await?,
        }
        // The state is an old one then.
        now = trouble.take().unwrap_or(now);
        // Deletions are quick and their states are dull.
        let line = teller.line(&now, Instant::now()).filter(|_| *goal != Goal::Delete);
        if let Some(line) = line.or_else(|| due.then(|| teller.overdue(Instant::now()))) {
            eprintln!("{}: {line}", target.name);
        }
        let until = deadline.min(teller.due());
        let seen = timeout_at(until, objects.next()).await;
        due = seen.is_err();
        match seen {
            Ok(Some(Ok(seen))) => object = seen.and_then(|seen| serde_json::to_value(seen).ok()),
            // The connection may come back before the deadline.
            Ok(Some(Err(error))) => trouble = Some(of_watch(server, error)),
            Ok(None) => bail!("the watch of {} ended", target.named()),
            Err(_) if until < deadline => {
                // A server that has no majority any more keeps its watches, and sends nothing.
                match timeout_at(deadline, server.get_if_exists(&path)).await {
                    Ok(Ok(found)) => object = found,
                    Ok(Err(error)) => trouble = Some(format!("trying again: {error}")),
                    Err(_) => trouble = Some(now),
                }
            }
            Err(_) => {
                let error = anyhow!(
                    "timed out after {timeout:?} waiting for {} of {}: {now}",
                    describe(goal),
                    target.named()
                );
                let hint = advice(server, target, goal, object.as_ref());
                return Err(Hinted { error, hint }.into());
            }
        }
        was_there |= object.is_some();
    }
}

/// # Errors
/// When the goal can't be reached before somebody changes something.
async fn has_hope(
    server: &Server,
    target: &Target<'_>,
    goal: &Goal,
    object: &Value,
    deadline: Instant,
) -> anyhow::Result<()> {
    if let (Goal::Condition { kind, .. }, Some(true)) = (goal, has_conditions(target.kind))
        && let Some(why) = never(object, kind)
    {
        bail!("{} {why}", target.named());
    }
    if target.gives_up {
        let reason = hopeless::reason(server, target.namespace, object);
        if let Ok(Some(reason)) = timeout_at(deadline, reason).await {
            bail!("{} will not become Ready: {reason}", target.named());
        }
    }
    Ok(())
}

fn of_watch(server: &Server, error: watcher::Error) -> String {
    let error = match error {
        watcher::Error::InitialListFailed(error)
        | watcher::Error::WatchStartFailed(error)
        | watcher::Error::WatchFailed(error) => server.explain(error),
        error => error.into(),
    };
    format!("trying again: {error}")
}

/// What to do about an object that isn't as it was to be, in time.
fn advice(server: &Server, target: &Target<'_>, goal: &Goal, object: Option<&Value>) -> String {
    let Target { kind, name, .. } = target;
    let is_default = target.namespace == server.client.default_namespace();
    let namespace = match kind.namespaced && !is_default {
        true => format!(" -n {}", target.namespace),
        false => String::new(),
    };
    let Some(object) = object else {
        return format!("`exoctl get {}{namespace}` lists those there are", kind.word());
    };
    let known = match goal {
        Goal::Condition { .. } => hopeless::advice(object),
        Goal::Create | Goal::Delete | Goal::Path { .. } => None,
    };
    let look =
        || format!("`exoctl describe {} {name}{namespace}` tells what happened", kind.spoken());
    known.unwrap_or_else(look)
}

/// The name that was meant, where an object of nearly that name is there.
async fn similar(server: &Server, target: &Target<'_>) -> String {
    let path = target.kind.path(Some(target.namespace), None);
    let list: Value = server.get(&path, &[], Form::Json).await.unwrap_or_default();
    let items = list["items"].as_array().map(Vec::as_slice).unwrap_or_default();
    let names = items.iter().filter_map(|item| item["metadata"]["name"].as_str());
    did_you_mean(closest(target.name, names))
}

/// Whether objects of a kind have conditions; `None` for kinds that exoctl doesn't know.
fn has_conditions(kind: &Kind) -> Option<bool> {
    Schemas::built_in().has_conditions(&kind.api.api_version, &kind.api.kind)
}

/// Why an object of a known kind will never have a condition: it got all that there are at once.
fn never(object: &Value, wanted: &str) -> Option<String> {
    let conditions = object["status"]["conditions"].as_array()?;
    let types: Vec<&str> = conditions.iter().filter_map(|c| c["type"].as_str()).collect();
    let has_it = types.iter().any(|have| have.eq_ignore_ascii_case(wanted));
    if types.is_empty() || has_it {
        return None;
    }
    let meant = did_you_mean(closest(wanted, types.iter().copied()));
    Some(format!("has no condition `{wanted}`, only {}{meant}", types.join(", ")))
}

/// How far a goal is.
#[derive(Clone, Debug, PartialEq, Eq)]
enum State {
    Reached,
    /// With what is the matter.
    NotYet(String),
}

impl State {
    /// `uid`: the object that was there at first; another one of its name doesn't keep a deleted
    /// one alive.
    fn of(goal: &Goal, object: Option<&Value>, uid: Option<&Value>) -> Self {
        let Some(object) = object else {
            return match goal {
                Goal::Delete => Self::Reached,
                Goal::Create | Goal::Condition { .. } | Goal::Path { .. } => {
                    Self::NotYet("it does not exist yet".to_owned())
                }
            };
        };
        match goal {
            Goal::Create => Self::Reached,
            Goal::Delete => match uid == Some(&object["metadata"]["uid"]) {
                false => Self::Reached,
                true => Self::NotYet(match object["metadata"]["finalizers"].as_array() {
                    Some(finalizers) if !finalizers.is_empty() => {
                        let names: Vec<_> = finalizers.iter().map(plain).collect();
                        format!("it still has finalizers: {}", names.join(", "))
                    }
                    _ => "it still exists".to_owned(),
                }),
            },
            Goal::Condition { kind, status } => Self::of_condition(object, kind, status),
            Goal::Path { path, value } => match (path.find(object).map(plain), value) {
                (Some(_), None) => Self::Reached,
                (Some(found), Some(wanted)) if found == *wanted => Self::Reached,
                (Some(found), _) => Self::NotYet(format!("the value is {found}")),
                (None, _) => Self::NotYet("the field is not set".to_owned()),
            },
        }
    }

    fn of_condition(object: &Value, kind: &str, wanted: &str) -> Self {
        let conditions = object["status"]["conditions"].as_array();
        let is_it = |c: &&Value| c["type"].as_str().is_some_and(|t| t.eq_ignore_ascii_case(kind));
        let Some(condition) = conditions.and_then(|c| c.iter().find(is_it)) else {
            return Self::NotYet(format!("{kind} is not known yet"));
        };
        let text = |field: &str| condition[field].as_str().unwrap_or_default();
        if is_stale(object, condition) {
            return Self::NotYet("the newest change has not been looked at".to_owned());
        }
        if text("status").eq_ignore_ascii_case(wanted) {
            return Self::Reached;
        }
        Self::NotYet(match (text("reason"), text("message")) {
            ("", "") => format!("{kind} is {}", text("status")),
            ("", message) => message.to_owned(),
            (reason, "") => reason.to_owned(),
            // It says so itself.
            (reason, message) if message.contains(&format!(": {reason}: ")) => message.to_owned(),
            // One sentence: what it does, and how far each rank is.
            (reason @ "Starting", message) => format!("{reason}, {message}"),
            (reason, message) => format!("{reason}: {message}"),
        })
    }
}

/// Whether a condition is a verdict on an older spec, which says nothing about this one.
pub(super) fn is_stale(object: &Value, condition: &Value) -> bool {
    let generation = object["metadata"]["generation"].as_i64();
    let observed = condition["observedGeneration"]
        .as_i64()
        .or_else(|| object["status"]["observedGeneration"].as_i64());
    matches!((generation, observed), (Some(generation), Some(observed)) if observed < generation)
}

fn describe(goal: &Goal) -> String {
    match goal {
        Goal::Create => "the creation".to_owned(),
        Goal::Delete => "the deletion".to_owned(),
        Goal::Condition { kind, status } if status == "True" => format!("condition {kind}"),
        Goal::Condition { kind, status } => format!("condition {kind}={status}"),
        Goal::Path { value: Some(value), .. } => format!("the value {value}"),
        Goal::Path { value: None, .. } => "the field".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn not_yet(text: &str) -> State {
        State::NotYet(text.to_owned())
    }

    #[test]
    fn conditions() {
        let ready = Goal::Condition { kind: "ready".into(), status: "True".into() };
        let check = |object: Value, expect: State| {
            assert_eq!(State::of(&ready, Some(&object), None), expect, "{object}");
        };
        let with = |status: &str, observed: u32| {
            json!({"metadata": {"generation": 2}, "status": {"conditions": [{"type": "Ready",
                "status": status, "reason": "NoCapacity", "message": "no node has 19Gi free",
                "observedGeneration": observed}]}})
        };
        check(with("True", 2), State::Reached);
        check(with("False", 2), not_yet("NoCapacity: no node has 19Gi free"));
        check(with("True", 1), not_yet("the newest change has not been looked at"));
        check(json!({}), not_yet("ready is not known yet"));
        let starting = json!({"status": {"conditions": [{"type": "Ready", "status": "False",
            "reason": "Starting", "message": "rank 0 Loading on a, rank 1 Ready on b"}]}});
        check(starting, not_yet("Starting, rank 0 Loading on a, rank 1 Ready on b"));
        let missing = json!({"status": {"conditions": [{"type": "Ready", "status": "False",
            "reason": "WeightsNotFound", "message": "shard a on b: WeightsNotFound: no `x`"}]}});
        check(missing, not_yet("shard a on b: WeightsNotFound: no `x`"));
        let bare = json!({"status": {"conditions": [{"type": "Ready", "status": "Unknown"}]}});
        check(bare, not_yet("ready is Unknown"));
        assert_eq!(State::of(&ready, None, None), not_yet("it does not exist yet"));
    }

    #[test]
    fn some_conditions_never_come() {
        let check = |object: Value, wanted: &str, expect: Option<&str>| {
            assert_eq!(never(&object, wanted).as_deref(), expect, "{wanted}");
        };
        let instance = json!({"status": {"conditions": [{"type": "Placed"}, {"type": "Ready"}]}});
        check(instance.clone(), "ready", None);
        check(
            instance,
            "Redy",
            Some("has no condition `Redy`, only Placed, Ready; did you mean `Ready`?"),
        );
        check(json!({}), "Redy", None);
        let kinds = crate::kinds::Kinds::built_in();
        assert_eq!(has_conditions(kinds.find("instance").unwrap()), Some(true));
        assert_eq!(has_conditions(kinds.find("shard").unwrap()), Some(false));
    }

    #[test]
    fn deletion() {
        let state = |object: Option<Value>, uid: Option<Value>| {
            State::of(&Goal::Delete, object.as_ref(), uid.as_ref())
        };
        let object = |uid: &str| Some(json!({"metadata": {"uid": uid, "finalizers": ["a/b"]}}));
        assert_eq!(state(None, Some(json!("1"))), State::Reached);
        assert_eq!(state(object("2"), Some(json!("1"))), State::Reached);
        assert_eq!(state(object("1"), Some(json!("1"))), not_yet("it still has finalizers: a/b"));
    }

    #[test]
    fn paths() {
        let goal = |value: Option<&str>| Goal::Path {
            path: "{.status.phase}".parse().unwrap(),
            value: value.map(str::to_owned),
        };
        let object = json!({"status": {"phase": "Starting"}});
        let state = |value: Option<&str>| State::of(&goal(value), Some(&object), None);
        assert_eq!(state(None), State::Reached);
        assert_eq!(state(Some("Starting")), State::Reached);
        assert_eq!(state(Some("Ready")), not_yet("the value is Starting"));
        assert_eq!(State::of(&goal(None), Some(&json!({})), None), not_yet("the field is not set"));
    }
}
