//! `exoctl edit`: an object in the user's editor, and what was changed there back to the server.
//!
//! Guarantee: what others change meanwhile is never overwritten unseen. Changes to other fields
//! go together; the same field changed twice opens the editor again, as does whatever the server
//! refuses. What can't be sent stays in a file that the message names.

use std::{io::Write, path::Path, process::Command};

use anyhow::{Context as _, bail};
use exo_crds::yaml;
use serde_json::{Map, Value};
use tempfile::NamedTempFile;

use super::{
    change_query,
    select::{self, Found},
};
use crate::{
    cli::Edit,
    error::{Collector, Refused, refused},
    jsonpath::plain,
    merge,
    server::{Form, MERGE_PATCH, Server},
};

const HEADER: &str = "\
# Lines that begin with # are ignored. Saving without a change, or an empty file, changes nothing.
#
";
/// Writes by others between two of ours; more in a row is no race.
const MAX_TRIES: usize = 8;

pub(super) async fn run(args: &Edit, server: &Server, out: &mut dyn Write) -> anyhow::Result<()> {
    let editor = editor(|name| std::env::var(name).ok());
    let mut failures = Collector::default();
    let words = (args.kind.as_str(), args.names.as_slice());
    for one in select::found(server, words, None).await? {
        let edited = edit(server, &one, &editor).await;
        if let Some(changed) = failures.note(edited)? {
            match changed {
                true => writeln!(out, "{} edited", one.named())?,
                false => eprintln!("{}: nothing was changed", one.named()),
            }
            out.flush()?;
        }
    }
    failures.finish()
}

/// kubectl's own variable first, so that both tools open the same editor.
fn editor(variable: impl Fn(&str) -> Option<String>) -> String {
    ["KUBE_EDITOR", "VISUAL", "EDITOR"]
        .into_iter()
        .filter_map(variable)
        .find(|editor| !editor.trim().is_empty())
        .unwrap_or_else(|| "vi".to_owned())
}

/// What is being edited.
struct Session<'a> {
    server: &'a Server,
    one: &'a Found<'a>,
    /// As the server has it.
    version: Value,
    /// As the user was shown it, without what the server owns.
    base: Value,
}

/// What became of an attempt.
enum Sent {
    Done,
    /// To be edited again: the text, and why.
    Again(String, String),
}

/// Whether anything was changed.
async fn edit(server: &Server, one: &Found<'_>, editor: &str) -> anyhow::Result<bool> {
    let live: Value = server.get(&one.path(), &[], Form::Json).await?;
    let version = live["metadata"]["resourceVersion"].clone();
    let mut session = Session { server, one, version, base: editable(live) };
    let file = tempfile::Builder::new().prefix("exoctl-edit-").suffix(".yaml").tempfile()?;
    let mut body = yaml::to_string(&session.base)?;
    let mut complaint: Option<String> = None;
    // What was refused as it stands.
    let mut refused: Option<String> = None;
    loop {
        let shown =
            format!("{HEADER}{}{body}", complaint.as_deref().map_or_else(String::new, commented));
        std::fs::write(file.path(), &shown).context("writing the file to edit")?;
        open(editor, file.path())?;
        let text = std::fs::read_to_string(file.path()).context("reading the edited file")?;
        let edited = without_comments(&text);
        if edited.trim().is_empty() || text == shown || refused.as_ref() == Some(&edited) {
            let Some(complaint) = complaint else { return Ok(false) };
            return given_up(file, &edited, &complaint);
        }
        let object = match session.read(&edited) {
            Ok(object) => object,
            Err(error) => {
                refused = Some(edited.clone());
                (body, complaint) = (edited, Some(format!("{error:#}")));
                continue;
            }
        };
        let patch = merge::difference(&session.base, &object);
        if patch.is_empty() {
            return Ok(false);
        }
        match session.send(patch, edited.clone()).await {
            Ok(Sent::Done) => return Ok(true),
            Ok(Sent::Again(text, why)) => {
                refused = (text == edited).then(|| edited.clone());
                (body, complaint) = (text, Some(why));
            }
            Err(error) => {
                let saved = keep(file, &edited)?;
                return Err(error.context(format!("the edited text is in {saved}")));
            }
        }
    }
}

fn given_up(file: NamedTempFile, edited: &str, complaint: &str) -> anyhow::Result<bool> {
    if edited.trim().is_empty() {
        bail!("nothing was changed: {complaint}");
    }
    let saved = keep(file, edited)?;
    bail!("nothing was changed: {complaint} (the edited text is in {saved})")
}

fn keep(file: NamedTempFile, text: &str) -> anyhow::Result<String> {
    std::fs::write(file.path(), text).context("keeping the edited text")?;
    let (_, path) = file.keep().context("keeping the edited text")?;
    Ok(path.display().to_string())
}

impl Session<'_> {
    /// The object of a text; it must still be the same one.
    fn read(&self, text: &str) -> anyhow::Result<Value> {
        let mut documents = yaml::documents(text)?;
        let object = match (documents.pop(), documents.is_empty()) {
            (Some(object), true) if object.is_object() => object,
            _ => bail!("one object is expected"),
        };
        for path in ["/apiVersion", "/kind", "/metadata/name", "/metadata/namespace"] {
            let (was, is) = (self.base.pointer(path), object.pointer(path));
            if was != is {
                let field = path.trim_start_matches('/').replace('/', ".");
                bail!("{field} can't be changed: it is {}", was.map_or_else(String::new, plain));
            }
        }
        Ok(object)
    }

    /// Sends the changes; those of others that leave them alone are taken over.
    async fn send(&mut self, patch: Map<String, Value>, text: String) -> anyhow::Result<Sent> {
        let query = change_query("exoctl-edit", None);
        for _ in 0..MAX_TRIES {
            let mut body = Value::Object(patch.clone());
            body["metadata"]["resourceVersion"] = self.version.clone();
            let path = self.one.path();
            let error = match self.server.patch(&path, MERGE_PATCH, &query, &body).await {
                Ok(_) => return Ok(Sent::Done),
                Err(error) => error,
            };
            match refused(&error) {
                Some(refusal) if refusal.is_conflict() => {}
                Some(refusal) if is_about_the_text(refusal) => {
                    return Ok(Sent::Again(text, refusal.to_string()));
                }
                Some(_) | None => return Err(error),
            }
            let live: Value = self.server.get(&path, &[], Form::Json).await?;
            self.version = live["metadata"]["resourceVersion"].clone();
            let live = editable(live);
            let theirs = merge::difference(&self.base, &live);
            let contested = merge::contested(&patch, &theirs);
            self.base = live;
            if !contested.is_empty() {
                let mut mine = self.base.clone();
                merge::apply(&mut mine, &patch);
                return Ok(Sent::Again(yaml::to_string(&mine)?, self.contest(&contested)));
            }
        }
        bail!("{} keeps being changed by others: try again", self.one.named())
    }

    /// What others made of the fields that were changed here too.
    fn contest(&self, paths: &[String]) -> String {
        let now = |path: &String| {
            let value = self.base.pointer(&format!("/{}", path.replace('.', "/")));
            format!("{path} is {} now", value.map_or_else(|| "not set".to_owned(), plain))
        };
        let fields: Vec<String> = paths.iter().map(now).collect();
        format!("somebody else changed this meanwhile: {}. Save to set yours", fields.join(", "))
    }
}

/// Whether another text might please the server.
fn is_about_the_text(refusal: &Refused) -> bool {
    matches!(refusal.0.code, 400 | 422)
}

/// The object without what nobody edits, fields by name.
fn editable(mut object: Value) -> Value {
    if let Some(fields) = object.as_object_mut() {
        fields.remove("status");
    }
    if let Some(metadata) = object["metadata"].as_object_mut() {
        for field in ["managedFields", "uid", "resourceVersion", "generation", "creationTimestamp"]
        {
            metadata.remove(field);
        }
    }
    object.sort_all_objects();
    object
}

fn commented(text: &str) -> String {
    let mut lines: String = text.lines().map(|line| format!("# {line}\n")).collect();
    lines.push_str("#\n");
    lines
}

/// Only those at the top are ours; the others may be part of a text.
fn without_comments(text: &str) -> String {
    let lines = text.lines().skip_while(|line| line.starts_with('#'));
    lines.map(|line| format!("{line}\n")).collect()
}

/// Editors are given with arguments (`code --wait`): the shell reads them.
fn open(editor: &str, path: &Path) -> anyhow::Result<()> {
    let status = Command::new("sh")
        .args(["-c", &format!("{editor} \"$1\""), "sh"])
        .arg(path)
        .status()
        .with_context(|| format!("starting the editor `{editor}`"))?;
    if !status.success() {
        bail!("the editor `{editor}` ended with {status}: set EDITOR to another one");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kubectls_editor_comes_first() {
        let of = |set: &[(&str, &str)]| {
            editor(|name| set.iter().find(|(n, _)| *n == name).map(|(_, v)| (*v).to_owned()))
        };
        assert_eq!(of(&[]), "vi");
        assert_eq!(of(&[("EDITOR", "nano"), ("VISUAL", " ")]), "nano");
        assert_eq!(of(&[("EDITOR", "nano"), ("KUBE_EDITOR", "code --wait")]), "code --wait");
    }

    #[test]
    fn comments_at_the_top_are_ours() {
        let text = format!("{HEADER}{}a: |\n  # not one\n", commented("bad\nvalue"));
        assert!(text.contains("# bad\n# value\n"), "{text}");
        assert_eq!(without_comments(&text), "a: |\n  # not one\n");
    }
}
