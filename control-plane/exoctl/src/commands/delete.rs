//! `exoctl delete`.

use std::io::Write;

use anyhow::{Context as _, bail};
use http::Method;
use serde_json::Value;
use tokio::time::Instant;

use super::{
    documents::{self, Document},
    select::{self, Found},
    wait,
};
use crate::{
    cli::{Cascade, Delete, Goal},
    error::{Collector, is_not_found},
    server::Server,
};

pub(super) async fn run(args: &Delete, server: &Server, out: &mut dyn Write) -> anyhow::Result<()> {
    let mut query = vec![propagation(args.cascade)];
    query.extend(args.dry_run.map(|_| ("dryRun", "All")));
    let suffix = super::dry_run_suffix(args.dry_run);
    let mut failures = Collector::default();
    let mut deleted = Vec::new();
    let doomed = match &args.kind {
        Some(kind) => {
            let rule = Some((&args.select, args.all));
            select::found(server, (kind.as_str(), &args.names), rule).await?
        }
        None => in_files(args, server, &mut failures).await?,
    };
    for doomed in doomed {
        let result = match server.send(Method::DELETE, &doomed.path(), &query, None).await {
            Err(error) if args.ignore_not_found && is_not_found(&error) => continue,
            result => result,
        };
        if let Some(answer) = failures.note(result)? {
            let what = doomed.kind.named("");
            let what = what.trim_end_matches('/');
            writeln!(out, "{what} \"{}\" deleted{suffix}", doomed.name)?;
            out.flush()?;
            deleted.push((doomed, uid_of(&answer)));
        }
    }
    if args.wait && args.dry_run.is_none() {
        let deadline = Instant::now() + args.timeout;
        for (doomed, uid) in deleted {
            let target = wait::Target {
                kind: doomed.kind,
                namespace: &doomed.namespace,
                name: &doomed.name,
                uid: uid.as_ref(),
                gives_up: false,
            };
            let gone = wait::wait_for(server, &target, &Goal::Delete, deadline, args.timeout).await;
            failures.note(gone)?;
        }
    }
    failures.finish()
}

fn propagation(cascade: Cascade) -> (&'static str, &'static str) {
    let policy = match cascade {
        Cascade::Background => "Background",
        Cascade::Foreground => "Foreground",
        Cascade::Orphan => "Orphan",
    };
    ("propagationPolicy", policy)
}

/// Last document first: what was applied after something may need it. A document that says nothing
/// to delete keeps no other one from it.
async fn in_files<'s>(
    args: &Delete,
    server: &'s Server,
    failures: &mut Collector,
) -> anyhow::Result<Vec<Found<'s>>> {
    let mut all = Vec::new();
    for document in documents::read(&args.files, failures)?.into_iter().rev() {
        let found = in_document(&document, server).await;
        all.extend(failures.note(found.with_context(|| document.source))?);
    }
    // With a namespace goes what is in it: by its own name while that still is there.
    all.sort_by_key(|one| one.kind.api.kind == "Namespace" && one.kind.api.group.is_empty());
    Ok(all)
}

async fn in_document<'s>(document: &Document, server: &'s Server) -> anyhow::Result<Found<'s>> {
    let object = &document.object;
    let text = |value: &Value| value.as_str().map(str::to_owned);
    let (Some(api_version), Some(kind), Some(name)) =
        (text(&object["apiVersion"]), text(&object["kind"]), text(&object["metadata"]["name"]))
    else {
        bail!("apiVersion, kind and metadata.name are required");
    };
    Ok(Found {
        kind: server.kinds().await?.find_exact(&api_version, &kind)?,
        namespace: server.namespace_of(object)?,
        name: select::checked(&name)?,
    })
}

/// A deletion answers with the object while finalizers hold it, else with a Status.
fn uid_of(answer: &Value) -> Option<Value> {
    let places = [&answer["metadata"]["uid"], &answer["details"]["uid"]];
    places.into_iter().find(|uid| uid.is_string()).cloned()
}
