//! `exoctl apply`: server-side apply. What a file says is set, what an earlier version of it said and
//! this one doesn't is taken back, and what others have set stays.
//!
//! As kubectl does, each document is applied for itself: one that is refused is reported, and keeps no
//! other one back. A file that is not YAML is refused as a whole, before anything is sent. What is
//! valid the server alone says; only `--dry-run=client` asks the schemas of this exoctl.

use std::{io::Write, path::PathBuf, time::Duration};

use anyhow::{Context as _, bail};
use serde_json::Value;
use tokio::time::Instant;

use super::{
    documents::{self, Document},
    select::Found,
    wait,
};
use crate::{
    cli::{Apply, Global, Goal},
    error::{Collector, refused},
    kinds::{Kind, Kinds},
    schema::Schemas,
    server::{APPLY_PATCH, Namespace, Server},
};

const STRICT: (&str, &str) = ("fieldValidation", "Strict");
const MANAGER: (&str, &str) = ("fieldManager", "exoctl");
const DRY_RUN: (&str, &str) = ("dryRun", "All");

/// A document ready to be sent.
#[derive(Debug)]
pub(super) struct Planned<'k> {
    pub(super) source: String,
    pub(super) kind: &'k Kind,
    namespace: String,
    pub(super) name: String,
    pub(super) object: Value,
}

impl<'k> Planned<'k> {
    fn found(&self) -> Found<'k> {
        let Self { kind, namespace, name, .. } = self;
        Found { kind, namespace: namespace.clone(), name: name.clone() }
    }

    /// A namespace that is yet to be made can't be asked about what will be in it.
    pub(super) fn is_in_a_coming_namespace(&self, planned: &[Self]) -> bool {
        planned.iter().any(|p| p.is_namespace() && p.name == self.namespace)
    }

    /// Only instances do; the other kinds are what they are, and so is one that shall not run.
    fn becomes_ready(&self) -> bool {
        self.kind.api.kind == "InferenceInstance" && self.object["spec"]["replicas"] != 0
    }

    fn is_namespace(&self) -> bool {
        self.kind.api.kind == "Namespace" && self.kind.api.group.is_empty()
    }
}

pub(super) async fn run(args: &Apply, server: &Server, out: &mut dyn Write) -> anyhow::Result<()> {
    let mut failures = Collector::default();
    let mut planned = plan_files(&args.files, server, &mut failures).await?;
    // What is in a namespace needs it to be there.
    planned.sort_by_key(|one| !one.is_namespace());
    for one in &planned {
        let done = send(server, one, args.force_conflicts, args.dry_run.is_some()).await;
        if let Some(done) = failures.note(done.with_context(|| one.source.clone()))? {
            let suffix = if args.dry_run.is_some() { " (server dry run)" } else { "" };
            writeln!(out, "{} {done}{suffix}", one.kind.named(&one.name))?;
            out.flush()?;
        }
    }
    failures.finish()?;
    if args.wait && args.dry_run.is_none() {
        let deadline = Instant::now() + args.timeout;
        let mut failures = Collector::default();
        for one in planned.iter().filter(|one| one.becomes_ready()) {
            let one = one.found();
            let waited = wait_until_ready(server, &one, (deadline, args.timeout), out).await;
            failures.note(waited)?;
        }
        failures.finish()?;
    }
    Ok(())
}

/// `--dry-run=client`: asks no server, and needs none.
pub(super) fn check(args: &Apply, global: &Global, out: &mut dyn Write) -> anyhow::Result<()> {
    let (kinds, schemas) = (Kinds::built_in(), Schemas::built_in());
    let namespace = Namespace::new(global, "default");
    let mut failures = Collector::default();
    let documents = documents::read(&args.files, &mut failures)?;
    for one in plan(documents, &kinds, |object| namespace.of(object), &mut failures)? {
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

/// What the files order, but for what is seen here to have a fault.
pub(super) async fn plan_files<'s>(
    files: &[PathBuf],
    server: &'s Server,
    failures: &mut Collector,
) -> anyhow::Result<Vec<Planned<'s>>> {
    let documents = documents::read(files, failures)?;
    // There is nothing to ask about: what is wrong with the files is known.
    if documents.is_empty() {
        return Ok(Vec::new());
    }
    let kinds = server.kinds().await?;
    plan(documents, kinds, |object| server.namespace_of(object), failures)
}

/// Finds the kind, namespace and name of every document before any is sent. Of two documents for one
/// object the first one counts.
fn plan<'k>(
    documents: Vec<Document>,
    kinds: &'k Kinds,
    namespace_of: impl Fn(&Value) -> anyhow::Result<String>,
    failures: &mut Collector,
) -> anyhow::Result<Vec<Planned<'k>>> {
    let mut planned: Vec<Planned<'_>> = Vec::new();
    for document in documents {
        let source = document.source.clone();
        let one = plan_one(document, kinds, &namespace_of);
        let Some(one) = failures.note(one.with_context(|| source))? else { continue };
        let same = |p: &&Planned<'_>| {
            p.kind == one.kind && p.namespace == one.namespace && p.name == one.name
        };
        if let Some(first) = planned.iter().find(same) {
            let named = one.kind.named(&one.name);
            let twice = anyhow::anyhow!("{}: {named} is in {} already", one.source, first.source);
            failures.note::<()>(Err(twice))?;
        } else {
            planned.push(one);
        }
    }
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

/// Applies a document, or tries to. The server merges into what is there when the request comes.
pub(super) async fn before_and_after(
    server: &Server,
    one: &Planned<'_>,
    force: bool,
    dry_run: bool,
) -> anyhow::Result<(Option<Value>, Value)> {
    let mut query = vec![STRICT, MANAGER];
    query.extend(force.then_some(("force", "true")));
    query.extend(dry_run.then_some(DRY_RUN));
    let path = one.kind.path(Some(&one.namespace), Some(&one.name));
    let before = server.get_if_exists(&path).await?;
    let after = server.patch(&path, APPLY_PATCH, &query, &one.object).await;
    Ok((before, after.map_err(explain_conflicts)?))
}

/// Returns what was done, in kubectl's words.
async fn send(
    server: &Server,
    one: &Planned<'_>,
    force: bool,
    dry_run: bool,
) -> anyhow::Result<&'static str> {
    // What was before is only for the word.
    let (before, after) = before_and_after(server, one, force, dry_run).await?;
    Ok(match before {
        None => "created",
        Some(before) if same(&before, &after, false) => "unchanged",
        Some(_) => "configured",
    })
}

/// Turns a refusal because of others' fields into one sentence that says what to do.
pub(super) fn explain_conflicts(error: anyhow::Error) -> anyhow::Error {
    let Some(refusal) = refused(&error).filter(|refusal| refusal.is_conflict()) else {
        return error;
    };
    let causes = refusal.0.details.iter().flat_map(|details| &details.causes);
    let fields: Vec<String> = causes
        .filter(|cause| cause.reason == "FieldManagerConflict")
        .map(|cause| {
            // `conflict with "kubectl" using exo.dev/v1alpha1 at …`
            let manager = cause.message.split('"').nth(1).unwrap_or("somebody else");
            format!("{} is set by {manager}", cause.field.trim_start_matches('.'))
        })
        .collect();
    match fields.is_empty() {
        true => error,
        false => anyhow::anyhow!("{}: --force-conflicts takes over", fields.join(", ")),
    }
}

/// Whether a write changed nothing that anybody sees; of the status only a look `at_status` does.
pub(super) fn same(before: &Value, after: &Value, at_status: bool) -> bool {
    let essence = |object: &Value| {
        let mut object = object.clone();
        if let Some(fields) = object.as_object_mut().filter(|_| !at_status) {
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

/// Waits for an instance to be Ready, and says so. One that can't become Ready is not waited for.
/// `until`: when, and how long that was at first.
pub(super) async fn wait_until_ready(
    server: &Server,
    one: &Found<'_>,
    until: (Instant, Duration),
    out: &mut dyn Write,
) -> anyhow::Result<()> {
    let goal = Goal::Condition { kind: "Ready".to_owned(), status: "True".to_owned() };
    let target = wait::Target {
        kind: one.kind,
        namespace: &one.namespace,
        name: &one.name,
        uid: None,
        gives_up: true,
    };
    wait::wait_for(server, &target, &goal, until.0, until.1).await?;
    writeln!(out, "{} is Ready", one.named())?;
    Ok(out.flush()?)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::error::Refused;

    #[test]
    fn conflicts_name_fields_and_managers() {
        let cause = |field: &str, manager: &str| {
            json!({"reason": "FieldManagerConflict", "field": field,
                   "message": format!("conflict with {manager}")})
        };
        let status = json!({"code": 409, "reason": "Conflict", "message": "Apply failed",
            "details": {"causes": [
            cause(".spec.replicas", "\"exoctl-scale\" with subresource \"scale\" using exo.dev/v1alpha1 at 2026-01-02T03:04:05Z"),
            cause(".spec.model", "\"kubectl\"")]}});
        let refusal = Refused(serde_json::from_value(status).unwrap());
        assert_eq!(
            explain_conflicts(refusal.into()).to_string(),
            "spec.replicas is set by exoctl-scale, spec.model is set by kubectl: \
             --force-conflicts takes over"
        );
        let other: Refused = Refused(
            serde_json::from_value(json!({"code": 409,
            "reason": "Conflict", "message": "modified"}))
            .unwrap(),
        );
        assert_eq!(explain_conflicts(other.into()).to_string(), "modified");
    }

    #[test]
    fn bookkeeping_is_no_change() {
        let object = |version: &str, replicas: u32, phase: &str| {
            json!({"metadata": {"name": "a", "resourceVersion": version, "generation": version},
                   "spec": {"replicas": replicas}, "status": {"phase": phase}})
        };
        let (ready, pending) = (object("1", 1, "Ready"), object("2", 1, "Pending"));
        assert!(same(&ready, &pending, false));
        assert!(!same(&ready, &pending, true));
        assert!(!same(&ready, &object("1", 2, "Ready"), false));
    }
}
