//! Reads the documents that `-f` names.

use std::{
    io::Read as _,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, bail};
use exo_crds::yaml;
use serde_json::Value;

use crate::error::Collector;

/// A document and where it comes from.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Document {
    /// `instance.yaml`, or `instance.yaml (document 2)`.
    pub(super) source: String,
    pub(super) object: Value,
}

const EXTENSIONS: [&str; 3] = ["yaml", "yml", "json"];

/// Reads files, folders (their files by name, not the folders inside) and stdin (`-`). What can't be
/// read of them is noted.
///
/// # Errors
/// When there is nothing to do, or to say of a file.
pub(super) fn read(paths: &[PathBuf], failures: &mut Collector) -> anyhow::Result<Vec<Document>> {
    let mut documents = Vec::new();
    for path in paths {
        if path == Path::new("-") {
            documents.extend(failures.note(read_stdin())?.unwrap_or_default());
        } else if path.is_dir() {
            for file in failures.note(files_in(path))?.unwrap_or_default() {
                documents.extend(failures.note(read_file(&file))?.unwrap_or_default());
            }
        } else {
            documents.extend(failures.note(read_file(path))?.unwrap_or_default());
        }
    }
    if documents.is_empty() && failures.is_empty() {
        bail!("no document to read");
    }
    Ok(documents)
}

fn read_stdin() -> anyhow::Result<Vec<Document>> {
    let mut text = String::new();
    let limit = yaml::MAX_BYTES as u64 + 1;
    std::io::stdin().take(limit).read_to_string(&mut text).context("reading stdin")?;
    parse("stdin", &text)
}

fn files_in(folder: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let reading = || format!("reading {}", folder.display());
    let mut files = Vec::new();
    for entry in std::fs::read_dir(folder).with_context(reading)? {
        let path = entry.with_context(reading)?.path();
        let extension = path.extension().and_then(|e| e.to_str());
        if extension.is_some_and(|e| EXTENSIONS.contains(&e)) && path.is_file() {
            files.push(path);
        }
    }
    if files.is_empty() {
        bail!("{} holds no .yaml, .yml or .json file", folder.display());
    }
    files.sort();
    Ok(files)
}

fn read_file(path: &Path) -> anyhow::Result<Vec<Document>> {
    let name = path.display().to_string();
    let reading = || format!("reading {name}");
    let bytes = std::fs::metadata(path).with_context(reading)?.len();
    if bytes > yaml::MAX_BYTES as u64 {
        bail!("{name} has {bytes} bytes; at most {} are read", yaml::MAX_BYTES);
    }
    let text = std::fs::read_to_string(path).with_context(reading)?;
    parse(&name, &text)
}

/// Reads every document of `text`; the items of a `List` are documents of their own.
fn parse(name: &str, text: &str) -> anyhow::Result<Vec<Document>> {
    let values = yaml::documents(text).with_context(|| name.to_owned())?;
    let several = values.len() > 1;
    let mut documents = Vec::new();
    for (i, object) in values.into_iter().enumerate() {
        let source = match several {
            true => format!("{name} (document {})", i + 1),
            false => name.to_owned(),
        };
        match object {
            Value::Object(mut list) if list.get("kind").is_some_and(|kind| kind == "List") => {
                let items = list.remove("items").unwrap_or_default();
                let Value::Array(items) = items else {
                    bail!("{source}: items: must be an array");
                };
                documents.extend(items.into_iter().enumerate().map(|(i, object)| Document {
                    source: format!("{source} (item {})", i + 1),
                    object,
                }));
            }
            object => documents.push(Document { source, object }),
        }
    }
    Ok(documents)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::error::lines;

    fn read_all(paths: &[PathBuf]) -> anyhow::Result<Vec<Document>> {
        let mut failures = Collector::default();
        let documents = read(paths, &mut failures)?;
        failures.finish()?;
        Ok(documents)
    }

    #[test]
    fn documents_say_where_they_come_from() {
        let sources = |text: &str| -> Vec<String> {
            parse("a.yaml", text).unwrap().into_iter().map(|d| d.source).collect()
        };
        assert_eq!(sources("x: 1"), ["a.yaml"]);
        assert_eq!(sources("x: 1\n---\ny: 2\n"), ["a.yaml (document 1)", "a.yaml (document 2)"]);
        assert_eq!(
            sources("kind: List\nitems: [{x: 1}, {y: 2}]"),
            ["a.yaml (item 1)", "a.yaml (item 2)"]
        );
        assert_eq!(parse("a", "{\"x\": 1}").unwrap()[0].object, json!({"x": 1}));
    }

    #[test]
    fn a_mistake_is_reported_with_file_and_line() {
        let error = format!("{:#}", parse("a.yaml", "a: [1").unwrap_err());
        assert!(error.starts_with("a.yaml: document 1: "), "{error}");
        assert!(error.contains("line"), "{error}");
    }

    #[test]
    fn a_folder_gives_its_files_in_order() {
        let dir = tempfile::tempdir().unwrap();
        for (name, text) in [("b.yml", "n: 2"), ("a.yaml", "n: 1"), ("c.txt", "n: 3")] {
            std::fs::write(dir.path().join(name), text).unwrap();
        }
        let documents = read_all(&[dir.path().to_owned()]).unwrap();
        let numbers: Vec<_> = documents.iter().map(|d| d.object["n"].clone()).collect();
        assert_eq!(numbers, [1, 2]);
    }

    #[test]
    fn nothing_to_read_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let missing = dir.path().join("x.yaml");
        for path in [dir.path().to_owned(), missing.clone()] {
            let error = lines(&read_all(std::slice::from_ref(&path)).unwrap_err()).join("\n");
            assert!(error.contains(&path.display().to_string()), "{error}");
        }
        std::fs::write(&missing, "---\n").unwrap();
        assert_eq!(read_all(&[missing]).unwrap_err().to_string(), "no document to read");
    }
}
