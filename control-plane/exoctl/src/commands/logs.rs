//! `exoctl logs`: what a shard's agent kept of its runner's log; of shards that failed and were
//! replaced, what their events tell.

use std::io::Write;

use anyhow::bail;
use serde_json::Value;

use exo_crds::LABEL_INSTANCE;

use super::{
    events,
    select::{self, checked},
};
use crate::{
    cli::{Logs, Select},
    error::is_not_found,
    jsonpath::plain,
    kinds::Kind,
    server::{Form, Server},
};

pub(super) async fn run(args: &Logs, server: &Server, out: &mut dyn Write) -> anyhow::Result<()> {
    let kind = server.own_kind("Shard").await?;
    let name = match args.shard.split_once('/') {
        None => args.shard.as_str(),
        Some((word, name)) => match server.kinds().await?.find(word)? {
            found if found == kind => name,
            found if found.api.kind == "InferenceInstance" => {
                bail!("{}", of_instance(server, kind, name).await?)
            }
            found => bail!("shards have logs, {} have none", found.api.plural),
        },
    };
    let path = kind.path(Some(server.namespace()), Some(&checked(name)?));
    let shard: Value = match server.get(&path, &[], Form::Json).await {
        Err(error) if is_not_found(&error) => match failure(server, kind, name).await {
            Some(failure) => bail!("{failure}. It was replaced since"),
            None => match of_instance(server, kind, name).await {
                Ok(told) => bail!("{told}"),
                Err(_) => return Err(error),
            },
        },
        got => got?,
    };
    let status = &shard["status"];
    let lines = status["lastLogLines"].as_array().map(Vec::as_slice).unwrap_or_default();
    if lines.is_empty() {
        let before = match before(&shard["spec"]) {
            Some(before) => failure(server, kind, &before).await,
            None => None,
        };
        bail!(
            "no lines of shard {name} are kept: that happens when its runner fails, and it is {}; \
             the whole log is exo's own on {}{}",
            status["phase"].as_str().unwrap_or("Pending"),
            plain(&shard["spec"]["node"]),
            before.map_or_else(String::new, |before| format!(". Before it, {before}"))
        );
    }
    for line in lines {
        writeln!(out, "{}", plain(line))?;
    }
    Ok(())
}

/// What to say to somebody who asks for the logs of an instance.
///
/// # Errors
/// When there is no such instance.
async fn of_instance(server: &Server, shards: &Kind, name: &str) -> anyhow::Result<String> {
    let instances = server.own_kind("InferenceInstance").await?;
    let path = instances.path(Some(server.namespace()), Some(&checked(name)?));
    server.get::<Value>(&path, &[], Form::Json).await?;
    let labels = Some(format!("{LABEL_INSTANCE}={name}"));
    let select = Select { labels, ..Select::default() };
    let shards = select::list(server, shards, &select).await?;
    let names: Vec<String> = shards.iter().map(|s| plain(&s["metadata"]["name"])).collect();
    Ok(match names.is_empty() {
        true => format!(
            "`{name}` is an instance without shards: `exoctl describe instance {name}` says why"
        ),
        false => format!("`{name}` is an instance; its shards have logs: {}", names.join(", ")),
    })
}

/// The shard in whose place this one came.
fn before(spec: &Value) -> Option<String> {
    let number = |field: &str| spec[field].as_u64();
    let epoch = number("epoch")?.checked_sub(1)?;
    let (replica, rank) = (number("replica")?, number("rank")?);
    Some(format!("{}-{replica}-a{epoch}-{rank}", spec["instance"].as_str()?))
}

/// How a shard failed, if that is still known.
async fn failure(server: &Server, kind: &Kind, name: &str) -> Option<String> {
    let event = events::last_warning(server, kind, name).await.ok()??;
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    Some(format!(
        "shard {name} failed with {}: {}; what its runner logged is in exo's own log on {}",
        text(&event["reason"]),
        text(&event["message"]),
        text(&event["source"]["host"])
    ))
}
