//! `exoctl diff`: what `exoctl apply` of the same files would change, as the server says.

use std::{fs, io::Write, process::Command};

use anyhow::{Context as _, bail};
use serde_json::Value;

use super::apply::{self, Planned};
use crate::{
    cli::Diff,
    error::{Collector, Differs, is_not_found},
    server::Server,
};

/// Fields of the metadata that change with every write, or say nothing to people.
const BOOKKEEPING: [&str; 5] =
    ["managedFields", "resourceVersion", "generation", "uid", "creationTimestamp"];

/// Where a Secret has its values.
const SECRET: [&str; 3] = ["/data", "/stringData", ANNOTATIONS];
const ANNOTATIONS: &str = "/metadata/annotations";
/// The object as client-side `kubectl apply` was given it.
const LAST_APPLIED: &str = "kubectl.kubernetes.io/last-applied-configuration";

/// # Errors
/// [`Differs`] when there is a difference, which is printed.
pub(super) async fn run(args: &Diff, server: &Server, out: &mut dyn Write) -> anyhow::Result<()> {
    let mut failures = Collector::default();
    let planned = apply::plan_files(&args.files, server, &mut failures).await?;
    let mut differs = false;
    for one in &planned {
        let change = match apply::before_and_after(server, one, args.force_conflicts, true).await {
            Err(error) if is_not_found(&error) && one.is_in_a_coming_namespace(&planned) => {
                Ok((None, one.object.clone()))
            }
            change => change,
        };
        let text = change.and_then(|(before, after)| difference(one, before, after));
        if let Some(text) = failures.note(text.with_context(|| one.source.clone()))? {
            differs |= !text.is_empty();
            out.write_all(&text)?;
            out.flush()?;
        }
    }
    failures.finish()?;
    if differs { Err(Differs.into()) } else { Ok(()) }
}

/// What `diff` says of an object before and after; nothing when it stays as it is.
fn difference(
    one: &Planned<'_>,
    mut before: Option<Value>,
    mut after: Value,
) -> anyhow::Result<Vec<u8>> {
    if one.kind.api.kind == "Secret" && one.kind.api.group.is_empty() {
        mask(before.as_mut(), &mut after);
    }
    let before = before.map(readable).transpose()?.unwrap_or_default();
    let after = readable(after)?;
    if before == after {
        return Ok(Vec::new());
    }
    let folder = tempfile::Builder::new().prefix("exoctl-diff-").tempdir()?;
    let mut command = Command::new("diff");
    command.arg("-u");
    for label in ["live", "merged"] {
        command.args(["-L", &format!("{label}/{}", one.kind.named(&one.name))]);
    }
    for (name, text) in [("live", before), ("merged", after)] {
        let path = folder.path().join(name);
        fs::write(&path, text).with_context(|| format!("writing {}", path.display()))?;
        command.arg(path);
    }
    let output = command.output().context("starting `diff`, which compares the texts")?;
    match output.status.code() {
        Some(0 | 1) => Ok(output.stdout),
        _ => bail!("`diff` failed: {}", String::from_utf8_lossy(&output.stderr).trim()),
    }
}

/// Hides a Secret's values as kubectl does: what they are is not told, but which of them change is.
fn mask(before: Option<&mut Value>, after: &mut Value) {
    let mut none = Value::Null;
    let before = before.unwrap_or(&mut none);
    for path in SECRET {
        let fields = |object: &Value| object.pointer(path).and_then(Value::as_object).cloned();
        let (old, new) = (fields(before), fields(after));
        let both = |name: &String| Some((old.as_ref()?.get(name)?, new.as_ref()?.get(name)?));
        let is_changed = |name: &String| both(name).is_some_and(|(old, new)| old != new);
        let hide = |object: &mut Value, changed: &str| {
            let fields = object.pointer_mut(path).and_then(Value::as_object_mut);
            for (name, value) in fields.into_iter().flatten() {
                // Other annotations are no secret.
                if path != ANNOTATIONS || name == LAST_APPLIED {
                    *value = if is_changed(name) { changed } else { "***" }.into();
                }
            }
        };
        hide(before, "*** (before)");
        hide(after, "*** (after)");
    }
}

fn readable(mut object: Value) -> anyhow::Result<String> {
    if let Some(metadata) = object["metadata"].as_object_mut() {
        metadata.retain(|field, _| !BOOKKEEPING.contains(&field.as_str()));
    }
    // In which order the fields came says nothing.
    object.sort_all_objects();
    Ok(exo_crds::yaml::to_string(&object)?)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_secrets_values_are_hidden_and_changes_are_seen() {
        let mut before = json!({
            "metadata": {"name": "a", "annotations": {"note": "n", (LAST_APPLIED): "{1}"}},
            "data": {"same": "czE=", "changed": "YzE=", "gone": "ZzE="},
        });
        let mut after = json!({
            "metadata": {"name": "a", "annotations": {"note": "n", (LAST_APPLIED): "{1}"}},
            "data": {"same": "czE=", "changed": "YzI=", "new": "bjI="},
            "stringData": {"plain": "text"},
        });
        mask(Some(&mut before), &mut after);
        let annotations = json!({"note": "n", (LAST_APPLIED): "***"});
        assert_eq!(
            before,
            json!({
                "metadata": {"name": "a", "annotations": annotations},
                "data": {"same": "***", "changed": "*** (before)", "gone": "***"},
            })
        );
        assert_eq!(
            after,
            json!({
                "metadata": {"name": "a", "annotations": annotations},
                "data": {"same": "***", "changed": "*** (after)", "new": "***"},
                "stringData": {"plain": "***"},
            })
        );
        let mut first = json!({"data": {"new": "bjI="}});
        mask(None, &mut first);
        assert_eq!(first, json!({"data": {"new": "***"}}));
    }
}
