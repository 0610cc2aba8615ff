//! `exoctl scale`.

use std::io::Write;

use anyhow::bail;
use serde_json::{Value, json};
use tokio::time::Instant;

use super::{
    apply, change_query, dry_run_suffix,
    select::{self, Found},
};
use crate::{
    cli::Scale,
    error::{Collector, is_not_found},
    server::{Form, MERGE_PATCH, Server},
};

pub(super) async fn run(args: &Scale, server: &Server, out: &mut dyn Write) -> anyhow::Result<()> {
    let suffix = dry_run_suffix(args.dry_run);
    let mut failures = Collector::default();
    let mut scaled = Vec::new();
    let words = (args.kind.as_str(), args.names.as_slice());
    for one in select::found(server, words, None).await? {
        if failures.note(scale(args, server, &one).await)?.is_some() {
            writeln!(out, "{} scaled{suffix}", one.named())?;
            out.flush()?;
            scaled.push(one);
        }
    }
    if args.wait && args.dry_run.is_none() && args.replicas > 0 {
        let deadline = Instant::now() + args.timeout;
        for one in &scaled {
            let waited = apply::wait_until_ready(server, one, (deadline, args.timeout), out).await;
            failures.note(waited)?;
        }
    }
    failures.finish()
}

async fn scale(args: &Scale, server: &Server, one: &Found<'_>) -> anyhow::Result<()> {
    let path = one.path() + "/scale";
    let now: Value = match server.get(&path, &[], Form::Json).await {
        // Either the object isn't there, or its kind has no replicas.
        Err(error) if is_not_found(&error) => {
            server.get::<Value>(&one.path(), &[], Form::Json).await?;
            bail!("{} can't be scaled", one.kind.api.plural);
        }
        now => now?,
    };
    let mut patch = json!({"spec": {"replicas": args.replicas}});
    if let Some(wanted) = args.current_replicas {
        let found = now["spec"]["replicas"].as_u64().unwrap_or(0);
        if found != u64::from(wanted) {
            bail!("{} has {found} replicas, not {wanted}", one.named());
        }
        // Nobody may have changed it since.
        let version = &now["metadata"]["resourceVersion"];
        patch["metadata"] = json!({"resourceVersion": version});
    }
    let query = change_query("exoctl-scale", args.dry_run);
    server.patch(&path, MERGE_PATCH, &query, &patch).await?;
    Ok(())
}
