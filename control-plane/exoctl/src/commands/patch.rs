//! `exoctl patch`.

use std::{io::Write, path::Path};

use anyhow::{Context as _, bail};
use exo_crds::yaml;
use serde_json::{Value, json};

use super::{
    apply::{explain_conflicts, same},
    change_query, dry_run_suffix,
    select::{self, Found},
};
use crate::{
    cli::{Patch, PatchKind},
    error::Collector,
    server::{APPLY_PATCH, Form, JSON_PATCH, MERGE_PATCH, STRATEGIC_PATCH, Server},
};

pub(super) async fn run(args: &Patch, server: &Server, out: &mut dyn Write) -> anyhow::Result<()> {
    let patch = read(args)?;
    let subresource = match args.subresource.as_deref() {
        None => String::new(),
        Some(name @ ("status" | "scale")) => format!("/{name}"),
        Some(other) => bail!("--subresource: `{other}` is neither status nor scale"),
    };
    let mut query = change_query("exoctl-patch", args.dry_run);
    query.extend(args.force_conflicts.then_some(("force", "true")));
    let suffix = dry_run_suffix(args.dry_run);
    let mut failures = Collector::default();
    let words = (args.kind.as_str(), args.names.as_slice());
    for one in select::found(server, words, None).await? {
        let path = one.path() + &subresource;
        let patched = patch_one(args, server, &one, &path, &query, &patch).await;
        if let Some(changed) = failures.note(patched)? {
            let done = if changed { "patched" } else { "patched (no change)" };
            writeln!(out, "{} {done}{suffix}", one.named())?;
            out.flush()?;
        }
    }
    failures.finish()
}

/// Whether anything is different now.
async fn patch_one(
    args: &Patch,
    server: &Server,
    one: &Found<'_>,
    path: &str,
    query: &[(&str, &str)],
    patch: &Value,
) -> anyhow::Result<bool> {
    let before: Value = server.get(path, &[], Form::Json).await?;
    let (content_type, patch) = match args.kind_of_patch {
        PatchKind::Merge => (MERGE_PATCH, patch.clone()),
        PatchKind::Json => (JSON_PATCH, patch.clone()),
        PatchKind::Strategic => (STRATEGIC_PATCH, patch.clone()),
        PatchKind::Apply => (APPLY_PATCH, complete(one, patch)),
    };
    let after = server.patch(path, content_type, query, &patch).await;
    let after = after.map_err(explain_conflicts)?;
    Ok(!same(&before, &after, args.subresource.is_some()))
}

/// An applied configuration says what it is about; nobody need type that.
fn complete(one: &Found<'_>, patch: &Value) -> Value {
    let mut config = json!({
        "apiVersion": one.kind.api.api_version,
        "kind": one.kind.api.kind,
        "metadata": {},
    });
    if let (Some(config), Some(patch)) = (config.as_object_mut(), patch.as_object()) {
        config.extend(patch.clone());
    }
    if let Some(metadata) = config["metadata"].as_object_mut() {
        metadata.insert("name".to_owned(), one.name.as_str().into());
    }
    config
}

fn read(args: &Patch) -> anyhow::Result<Value> {
    let (name, text) = match (&args.patch, &args.patch_file) {
        (Some(text), _) => ("--patch".to_owned(), text.clone()),
        (None, Some(path)) if path == Path::new("-") => {
            ("stdin".to_owned(), std::io::read_to_string(std::io::stdin())?)
        }
        (None, Some(path)) => {
            let name = path.display().to_string();
            let text = std::fs::read_to_string(path).with_context(|| format!("reading {name}"))?;
            (name, text)
        }
        (None, None) => bail!("give the patch with --patch or --patch-file"),
    };
    let mut documents = yaml::documents(&text).with_context(|| name.clone())?;
    let patch = match (documents.pop(), documents.is_empty()) {
        (Some(patch), true) => patch,
        _ => bail!("{name}: one patch is expected"),
    };
    let is_list = args.kind_of_patch == PatchKind::Json;
    match (is_list, &patch) {
        (true, Value::Array(_)) | (false, Value::Object(_)) => Ok(patch),
        (true, _) => bail!(
            "{name}: a json patch is a list such as \
             [{{\"op\": \"replace\", \"path\": \"/spec/replicas\", \"value\": 2}}]"
        ),
        (false, Value::Array(_)) => {
            bail!("{name}: a list of operations is a patch of --type json")
        }
        (false, _) => {
            bail!("{name}: a patch holds fields, such as {{\"spec\": {{\"replicas\": 2}}}}")
        }
    }
}
