//! `exoctl completion`, and the `__complete` that its scripts call.

use std::{io::Write, time::Duration};

use clap::CommandFactory as _;
use serde_json::Value;

use crate::{
    cli::{Args, Global, Shell},
    completion::{self, Candidate, Wanted},
    config,
    kinds::{Kind, Kinds},
    server::{Form, Server},
};

/// Nobody waits longer for a word; a server that is away costs the connection's own limit.
const LIMIT: Duration = Duration::from_secs(10);

pub(super) fn script(shell: Shell, out: &mut dyn Write) -> anyhow::Result<()> {
    Ok(out.write_all(completion::script(shell).as_bytes())?)
}

/// Prints a candidate on each line, after a tab what it is. What can't be found out is left out.
pub(super) async fn run(words: &[String], out: &mut dyn Write) -> anyhow::Result<()> {
    let line = completion::read(Args::command(), words);
    let found = find(&line.wanted, &line.typed, &line.global);
    let found = tokio::time::timeout(LIMIT, found).await.unwrap_or(Ok(Vec::new()));
    for (word, about) in found.unwrap_or_default() {
        if word.starts_with(&line.typed) {
            let about = about.lines().next().unwrap_or_default();
            let tab = if about.is_empty() { "" } else { "\t" };
            writeln!(out, "{}{word}{tab}{about}", line.prefix)?;
        }
    }
    Ok(())
}

async fn find(wanted: &Wanted, typed: &str, global: &Global) -> anyhow::Result<Vec<Candidate>> {
    let nothing_about = |word: String| (word, String::new());
    match wanted {
        Wanted::Fixed(candidates) => Ok(candidates.clone()),
        Wanted::Free => Ok(Vec::new()),
        Wanted::Context => {
            let (kubeconfig, _) = config::find(global)?;
            Ok(kubeconfig.contexts.into_iter().map(|c| nothing_about(c.name)).collect())
        }
        Wanted::Namespace => {
            let server = Server::connect(global).await?;
            let kind = server.kinds().await?.find("namespaces")?;
            Ok(names(&server, kind).await?.into_iter().map(nothing_about).collect())
        }
        Wanted::Name { kind, but } => {
            let server = Server::connect(global).await?;
            let kind = server.kinds().await?.find(kind)?;
            let names = names(&server, kind).await?.into_iter();
            Ok(names.filter(|name| !but.contains(name)).map(nothing_about).collect())
        }
        Wanted::Kind => {
            let server = Server::connect(global).await;
            if let (Ok(server), Some((word, _))) = (&server, typed.split_once('/')) {
                let kind = server.kinds().await?.find(word)?;
                let names = names(server, kind).await?.into_iter();
                return Ok(names.map(|name| nothing_about(format!("{word}/{name}"))).collect());
            }
            let built_in = Kinds::built_in();
            let kinds = match &server {
                Ok(server) => server.kinds().await.unwrap_or(&built_in),
                Err(_) => &built_in,
            };
            Ok(kinds.iter().flat_map(kind_words).collect())
        }
    }
}

/// A kind's plural and those of its short names that are words.
fn kind_words(kind: &Kind) -> Vec<Candidate> {
    let about = format!("{} of {}", kind.api.kind, kind.api.api_version);
    kind.words().map(|word| (word.to_owned(), about.clone())).collect()
}

async fn names(server: &Server, kind: &Kind) -> anyhow::Result<Vec<String>> {
    let list: Value =
        server.get(&kind.path(Some(server.namespace()), None), &[], Form::Json).await?;
    let items = list["items"].as_array().map(Vec::as_slice).unwrap_or_default();
    Ok(items
        .iter()
        .filter_map(|item| Some(item["metadata"]["name"].as_str()?.to_owned()))
        .collect())
}
