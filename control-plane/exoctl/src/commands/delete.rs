//! `exoctl delete`.

use std::io::Write;

use anyhow::bail;
use http::Method;
use serde_json::Value;
use tokio::time::Instant;

use super::{
    documents,
    select::{self, nothing_found},
    wait,
};
use crate::{
    cli::{Delete, Goal, Select},
    error::{Collector, refused},
    kinds::Kind,
    server::Server,
};

/// An object to delete.
#[derive(Debug)]
struct Doomed<'s> {
    kind: &'s Kind,
    namespace: String,
    name: String,
}

pub(super) async fn run(args: &Delete, server: &Server, out: &mut dyn Write) -> anyhow::Result<()> {
    let mut failures = Collector::default();
    let mut deleted = Vec::new();
    for doomed in find(args, server).await? {
        let path = doomed.kind.path(Some(&doomed.namespace), Some(&doomed.name));
        let query = [("propagationPolicy", "Background")];
        let result = match server.send(Method::DELETE, &path, &query, None).await {
            Err(error) if args.ignore_not_found && is_not_found(&error) => continue,
            result => result,
        };
        if let Some(answer) = failures.note(result)? {
            let what = doomed.kind.named("");
            writeln!(out, "{} \"{}\" deleted", what.trim_end_matches('/'), doomed.name)?;
            out.flush()?;
            deleted.push((doomed, uid_of(&answer)));
        }
    }
    if args.wait {
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

async fn find<'s>(args: &Delete, server: &'s Server) -> anyhow::Result<Vec<Doomed<'s>>> {
    let Some(words) = &args.kind else {
        return in_files(args, server).await;
    };
    let mut all = Vec::new();
    for selected in select::read(server, words, &args.names).await? {
        let kind = selected.kind;
        let mut names = selected.names;
        if names.is_empty() {
            if !args.all && args.labels.is_none() {
                bail!("say which: names, -l SELECTOR or --all");
            }
            let select = Select { labels: args.labels.clone(), ..Select::default() };
            let items = select::list(server, kind, &select).await?;
            names.extend(
                items.iter().filter_map(|i| Some(i["metadata"]["name"].as_str()?.to_owned())),
            );
            if names.is_empty() {
                eprintln!("{}", nothing_found(kind, &select, server));
            }
        }
        all.extend(names.into_iter().map(|name| Doomed {
            kind,
            namespace: server.namespace().to_owned(),
            name,
        }));
    }
    Ok(all)
}

/// Last document first: what was applied after something may need it.
async fn in_files<'s>(args: &Delete, server: &'s Server) -> anyhow::Result<Vec<Doomed<'s>>> {
    let mut all = Vec::new();
    for document in documents::read(&args.files)?.into_iter().rev() {
        let (source, object) = (document.source, document.object);
        let text = |value: &Value| value.as_str().map(str::to_owned);
        let (Some(api_version), Some(kind), Some(name)) =
            (text(&object["apiVersion"]), text(&object["kind"]), text(&object["metadata"]["name"]))
        else {
            bail!("{source}: apiVersion, kind and metadata.name are required");
        };
        all.push(Doomed {
            kind: server.kinds().await?.find_exact(&api_version, &kind)?,
            namespace: server.namespace_of(&object)?,
            name,
        });
    }
    Ok(all)
}

fn is_not_found(error: &anyhow::Error) -> bool {
    refused(error).is_some_and(|refusal| refusal.is_not_found())
}

/// A deletion answers with the object while finalizers hold it, else with a Status.
fn uid_of(answer: &Value) -> Option<Value> {
    let places = [&answer["metadata"]["uid"], &answer["details"]["uid"]];
    places.into_iter().find(|uid| uid.is_string()).cloned()
}
