//! `exoctl logs`: what a shard's agent kept of its runner's log.

use std::io::Write;

use anyhow::bail;
use serde_json::Value;

use super::select::checked;
use crate::{
    cli::Logs,
    jsonpath::plain,
    server::{Form, Server},
};

pub(super) async fn run(args: &Logs, server: &Server, out: &mut dyn Write) -> anyhow::Result<()> {
    let name = args.shard.split_once('/').map_or(args.shard.as_str(), |(_, name)| name);
    let kind = server.own_kind("Shard").await?;
    let path = kind.path(Some(server.namespace()), Some(&checked(name)?));
    let shard: Value = server.get(&path, &[], Form::Json).await?;
    let status = &shard["status"];
    let lines = status["lastLogLines"].as_array().map(Vec::as_slice).unwrap_or_default();
    if lines.is_empty() {
        bail!(
            "no lines of shard {name} are kept: that happens when its runner fails, and it is {}; \
             the whole log is exo's own on {}",
            status["phase"].as_str().unwrap_or("Pending"),
            plain(&shard["spec"]["node"])
        );
    }
    for line in lines {
        writeln!(out, "{}", plain(line))?;
    }
    Ok(())
}
