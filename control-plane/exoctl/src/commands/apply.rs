//! `exoctl apply`: creates what is missing and replaces the spec of what is there.
//!
//! Guarantee: when the server finds a document of the files invalid, none of them is applied. What
//! is valid the server alone says; only `--dry-run=client` asks the schemas of this exoctl.

use std::io::Write;

use anyhow::{Context as _, bail};
use http::Method;
use serde_json::{Map, Value};
use tokio::time::Instant;

use super::{
    documents::{self, Document},
    wait,
};
use crate::{
    cli::{Apply, Global, Goal},
    error::{Collector, refused},
    kinds::{Kind, Kinds},
    schema::Schemas,
    server::{Namespace, Server},
};

/// Someone else writes the same object (its controller's status, say); more in a row is no race.
const MAX_CONFLICTS: usize = 8;
const STRICT: (&str, &str) = ("fieldValidation", "Strict");
const MANAGER: (&str, &str) = ("fieldManager", "exoctl");

/// A document ready to be sent.
#[derive(Debug)]
struct Planned<'k> {
    source: String,
    kind: &'k Kind,
    namespace: String,
    name: String,
    object: Value,
}

pub(super) async fn run(args: &Apply, server: &Server, out: &mut dyn Write) -> anyhow::Result<()> {
    let documents = documents::read(&args.files)?;
    let kinds = server.kinds().await?;
    let planned = plan(documents, kinds, |object| server.namespace_of(object))?;
    // A single document needs no rehearsal: refused, it leaves nothing behind.
    if planned.len() > 1 && args.dry_run.is_none() {
        rehearse(server, &planned).await?;
    }
    let mut failures = Collector::default();
    for one in &planned {
        let done = send(server, one, args.dry_run.is_some()).await;
        let done = done.with_context(|| one.source.clone());
        if let Some(done) = failures.note(done)? {
            let suffix = if args.dry_run.is_some() { " (server dry run)" } else { "" };
            writeln!(out, "{} {done}{suffix}", one.kind.named(&one.name))?;
            out.flush()?;
        }
    }
    failures.finish()?;
    if args.wait && args.dry_run.is_none() {
        wait_until_ready(args, server, &planned, out).await?;
    }
    Ok(())
}

/// `--dry-run=client`: asks no server, and needs none.
pub(super) fn check(args: &Apply, global: &Global, out: &mut dyn Write) -> anyhow::Result<()> {
    let (kinds, schemas) = (Kinds::built_in(), Schemas::built_in());
    let namespace = Namespace::new(global, "default");
    let documents = documents::read(&args.files)?;
    let mut failures = Collector::default();
    for one in plan(documents, &kinds, |object| namespace.of(object))? {
        let Kind { api, .. } = one.kind;
        let problems = schemas.check(&api.api_version, &api.kind, &one.object);
        if problems.is_empty() {
            writeln!(out, "{} valid (client dry run)", one.kind.named(&one.name))?;
        } else {
            let Planned { source, name, .. } = &one;
            let problems = problems.join("; ");
            let invalid = anyhow::anyhow!("{source}: {} `{name}` is invalid: {problems}", api.kind);
            failures.note::<()>(Err(invalid))?;
        }
    }
    failures.finish()
}

/// Lets the server check all documents, so that a refusal of the last one finds nothing done.
async fn rehearse(server: &Server, planned: &[Planned<'_>]) -> anyhow::Result<()> {
    let mut failures = Collector::default();
    for one in planned {
        let checked = send(server, one, true).await;
        failures.note(checked.with_context(|| one.source.clone()))?;
    }
    failures.finish()
}

/// Finds the kind, namespace and name of every document before any is sent.
fn plan<'k>(
    documents: Vec<Document>,
    kinds: &'k Kinds,
    namespace_of: impl Fn(&Value) -> anyhow::Result<String>,
) -> anyhow::Result<Vec<Planned<'k>>> {
    let mut failures = Collector::default();
    let mut planned: Vec<Planned<'_>> = Vec::new();
    for document in documents {
        let source = document.source.clone();
        let one = plan_one(document, kinds, &namespace_of);
        if let Some(one) = failures.note(one.with_context(|| source))? {
            let same = |p: &&Planned<'_>| {
                p.kind == one.kind && p.namespace == one.namespace && p.name == one.name
            };
            if let Some(first) = planned.iter().find(same) {
                let twice = anyhow::anyhow!(
                    "{}: {} is in {} already",
                    one.source,
                    one.kind.named(&one.name),
                    first.source
                );
                failures.note::<()>(Err(twice))?;
            }
            planned.push(one);
        }
    }
    failures.finish()?;
    Ok(planned)
}

fn plan_one<'k>(
    document: Document,
    kinds: &'k Kinds,
    namespace_of: impl Fn(&Value) -> anyhow::Result<String>,
) -> anyhow::Result<Planned<'k>> {
    let Document { source, mut object } = document;
    if !object.is_object() {
        bail!("the document is not an object");
    }
    let text = |field: &str| object[field].as_str().filter(|text| !text.is_empty());
    let api_version = text("apiVersion").context("apiVersion: is required")?;
    let kind_name = text("kind").context("kind: is required")?;
    let metadata = &object["metadata"];
    let name = metadata["name"].as_str().filter(|name| !name.is_empty());
    let name = name.context("metadata.name: is required")?.to_owned();
    let kind = kinds.find_exact(api_version, kind_name)?;
    let namespace = namespace_of(&object)?;
    let metadata = object["metadata"].as_object_mut().context("metadata: must be an object")?;
    match kind.namespaced {
        true => metadata.insert("namespace".to_owned(), namespace.as_str().into()),
        false => metadata.remove("namespace"),
    };
    // The answer to an earlier `get` may be applied: what the server owns is not the user's.
    for field in ["resourceVersion", "uid", "generation", "creationTimestamp", "managedFields"] {
        metadata.remove(field);
    }
    if let Some(object) = object.as_object_mut() {
        object.remove("status");
    }
    Ok(Planned { source, kind, namespace, name, object })
}

/// Returns what was done, in kubectl's words.
async fn send(server: &Server, one: &Planned<'_>, dry_run: bool) -> anyhow::Result<&'static str> {
    let mut query = vec![STRICT, MANAGER];
    if dry_run {
        query.push(("dryRun", "All"));
    }
    let path = one.kind.path(Some(&one.namespace), Some(&one.name));
    let mut conflicts = 0;
    loop {
        let Some(live) = server.get_if_exists(&path).await? else {
            let path = one.kind.path(Some(&one.namespace), None);
            let created = server.send(Method::POST, &path, &query, Some(&one.object));
            match created.await {
                Ok(_) => return Ok("created"),
                // Someone was faster: go on with theirs.
                Err(error) if conflicts < MAX_CONFLICTS && already_exists(&error) => {
                    conflicts += 1;
                    continue;
                }
                Err(error) => return Err(error),
            }
        };
        let wanted = replaced(&live, &one.object);
        match server.send(Method::PUT, &path, &query, Some(&wanted)).await {
            Ok(now) if same(&live, &now) => return Ok("unchanged"),
            Ok(_) => return Ok("configured"),
            Err(error)
                if conflicts < MAX_CONFLICTS
                    && refused(&error).is_some_and(|refusal| refusal.is_conflict()) =>
            {
                conflicts += 1;
            }
            Err(error) => return Err(error),
        }
    }
}

fn already_exists(error: &anyhow::Error) -> bool {
    refused(error).is_some_and(|refusal| refusal.0.reason == "AlreadyExists")
}

/// The live object as the document wants it: its spec and everything else at the top replaced,
/// its labels and annotations added to those there.
fn replaced(live: &Value, document: &Value) -> Value {
    let empty = Map::new();
    let mut wanted = document.clone();
    let mut metadata = live["metadata"].clone();
    for field in ["labels", "annotations"] {
        let given = document["metadata"][field].as_object().unwrap_or(&empty);
        if given.is_empty() {
            continue;
        }
        match metadata[field].as_object_mut() {
            Some(there) => there.extend(given.clone()),
            None => metadata[field] = Value::Object(given.clone()),
        }
    }
    wanted["metadata"] = metadata;
    wanted
}

/// Whether a write changed nothing that anybody sees.
fn same(before: &Value, after: &Value) -> bool {
    let essence = |object: &Value| {
        let mut object = object.clone();
        if let Some(fields) = object.as_object_mut() {
            fields.remove("status");
        }
        if let Some(metadata) = object["metadata"].as_object_mut() {
            for field in ["resourceVersion", "managedFields", "generation"] {
                metadata.remove(field);
            }
        }
        object
    };
    essence(before) == essence(after)
}

/// Only instances become Ready; the other kinds are what they are. One that can't is not waited for.
async fn wait_until_ready(
    args: &Apply,
    server: &Server,
    planned: &[Planned<'_>],
    out: &mut dyn Write,
) -> anyhow::Result<()> {
    let deadline = Instant::now() + args.timeout;
    let goal = Goal::Condition { kind: "Ready".to_owned(), status: "True".to_owned() };
    let mut failures = Collector::default();
    for one in planned.iter().filter(|p| p.kind.api.kind == "InferenceInstance") {
        let target = wait::Target {
            kind: one.kind,
            namespace: &one.namespace,
            name: &one.name,
            uid: None,
            gives_up: true,
        };
        let waited = wait::wait_for(server, &target, &goal, deadline, args.timeout).await;
        if failures.note(waited)?.is_some() {
            writeln!(out, "{} is Ready", one.kind.named(&one.name))?;
            out.flush()?;
        }
    }
    failures.finish()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn replacing_drops_old_fields_and_keeps_what_others_set() {
        let live = json!({"apiVersion": "v", "kind": "K",
            "metadata": {"name": "a", "uid": "u", "resourceVersion": "7", "finalizers": ["f"],
                         "labels": {"theirs": "1", "both": "old"}},
            "spec": {"model": "a", "replicas": 3}, "status": {"phase": "Ready"}});
        let document = json!({"apiVersion": "v", "kind": "K",
            "metadata": {"name": "a", "labels": {"both": "new"}, "annotations": {"n": "1"}},
            "spec": {"model": "b"}});
        assert_eq!(
            replaced(&live, &document),
            json!({"apiVersion": "v", "kind": "K",
                "metadata": {"name": "a", "uid": "u", "resourceVersion": "7", "finalizers": ["f"],
                             "labels": {"theirs": "1", "both": "new"}, "annotations": {"n": "1"}},
                "spec": {"model": "b"}})
        );
    }

    #[test]
    fn bookkeeping_is_no_change() {
        let object = |version: &str, replicas: u32, phase: &str| {
            json!({"metadata": {"name": "a", "resourceVersion": version, "generation": version},
                   "spec": {"replicas": replicas}, "status": {"phase": phase}})
        };
        assert!(same(&object("1", 1, "Ready"), &object("2", 1, "Pending")));
        assert!(!same(&object("1", 1, "Ready"), &object("1", 2, "Ready")));
    }
}
