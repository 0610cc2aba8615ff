//! Finds a model's files on this machine. Reads only.

use std::{
    ffi::OsString,
    fs, io,
    path::{Component, Path, PathBuf},
};

use exo_crds::{ModelSource, REASON_WEIGHTS_NOT_FOUND, ShardFailure};

/// Folders that may hold weights.
#[derive(Clone, Debug)]
pub(crate) struct ModelStore {
    /// For relative paths.
    dirs: Vec<PathBuf>,
    /// A Hugging Face cache: `models--OWNER--NAME/snapshots/COMMIT/…`.
    cache: PathBuf,
}

/// Why a model's files can't be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum WeightsError {
    #[error("the model's source names neither a path nor a repo")]
    NoSource,
    #[error("`{0}` is not a path inside a model folder")]
    BadPath(String),
    #[error("`{0}` is not the name of a repository such as owner/name")]
    BadRepo(String),
    #[error("`{0}` is not the name of a revision")]
    BadRevision(String),
    #[error("no folder {path} on this node; looked in {}", list(.looked))]
    NoFolder { path: String, looked: Vec<PathBuf> },
    #[error(
        "{repo} at {revision} is not on this node; download it with \
         `hf download {repo} --revision {revision}`"
    )]
    NotCached { repo: String, revision: String },
    #[error("{} is incomplete: {missing} is missing", .dir.display())]
    Incomplete { dir: PathBuf, missing: String },
    #[error("{} can't be read: {error}", .path.display())]
    Unreadable { path: PathBuf, error: String },
}

fn list(dirs: &[PathBuf]) -> String {
    if dirs.is_empty() {
        return "no folder, because EXO_MODEL_PATH is not set".to_owned();
    }
    let dirs: Vec<String> = dirs.iter().map(|dir| dir.display().to_string()).collect();
    dirs.join(", ")
}

impl From<WeightsError> for ShardFailure {
    fn from(error: WeightsError) -> Self {
        let (reason, permanent) = match &error {
            WeightsError::NoSource
            | WeightsError::BadPath(_)
            | WeightsError::BadRepo(_)
            | WeightsError::BadRevision(_) => ("BadModelSource", true),
            // Somebody may be copying or downloading them just now.
            WeightsError::NoFolder { .. }
            | WeightsError::NotCached { .. }
            | WeightsError::Incomplete { .. }
            | WeightsError::Unreadable { .. } => (REASON_WEIGHTS_NOT_FOUND, false),
        };
        Self { reason: reason.to_owned(), message: error.to_string(), permanent }
    }
}

impl ModelStore {
    /// The cache is where Hugging Face's own tools put it: `HF_HUB_CACHE`, `HF_HOME/hub`,
    /// `~/.cache/huggingface/hub`.
    pub(crate) fn new(dirs: Vec<PathBuf>, env: impl Fn(&str) -> Option<OsString>) -> Self {
        let set = |name: &str| env(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        let cache = set("HF_HUB_CACHE")
            .or_else(|| set("HF_HOME").map(|home| home.join("hub")))
            .or_else(|| set("XDG_CACHE_HOME").map(|dir| dir.join("huggingface/hub")))
            .or_else(|| set("HOME").map(|home| home.join(".cache/huggingface/hub")))
            .unwrap_or_else(|| PathBuf::from(".cache/huggingface/hub"));
        Self { dirs, cache }
    }

    /// A folder on the disk that downloads go to.
    pub(crate) fn disk(&self) -> &Path {
        &self.cache
    }

    /// The folder with a model's files, which are all there.
    pub(crate) fn locate(&self, source: &ModelSource) -> Result<PathBuf, WeightsError> {
        let dir = match (&source.path, &source.repo) {
            (Some(path), _) => self.folder(path)?,
            (None, Some(repo)) => {
                self.snapshot(repo, source.revision.as_deref().unwrap_or("main"))?
            }
            (None, None) => return Err(WeightsError::NoSource),
        };
        check_complete(&dir)?;
        Ok(dir)
    }

    fn folder(&self, path: &str) -> Result<PathBuf, WeightsError> {
        let relative = Path::new(path);
        if relative.is_absolute() {
            return if relative.is_dir() {
                Ok(relative.to_owned())
            } else {
                Err(WeightsError::NoFolder {
                    path: path.to_owned(),
                    looked: vec![PathBuf::from("/")],
                })
            };
        }
        if !is_inside(path) {
            return Err(WeightsError::BadPath(path.to_owned()));
        }
        let found = self.dirs.iter().map(|dir| dir.join(relative)).find(|dir| dir.is_dir());
        match found {
            Some(dir) => std::path::absolute(&dir)
                .map_err(|error| WeightsError::Unreadable { path: dir, error: error.to_string() }),
            None => {
                Err(WeightsError::NoFolder { path: path.to_owned(), looked: self.dirs.clone() })
            }
        }
    }

    fn snapshot(&self, repo: &str, revision: &str) -> Result<PathBuf, WeightsError> {
        let proper = |part: &str| {
            !part.is_empty()
                && !part.starts_with('.')
                && part.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b))
        };
        let (owner, name) = repo
            .split_once('/')
            .filter(|(owner, name)| proper(owner) && proper(name))
            .ok_or_else(|| WeightsError::BadRepo(repo.to_owned()))?;
        if !is_inside(revision) {
            return Err(WeightsError::BadRevision(revision.to_owned()));
        }
        let dir = self.cache.join(format!("models--{owner}--{name}"));
        let commit = match fs::read_to_string(dir.join("refs").join(revision)) {
            Ok(commit) => commit.trim().to_owned(),
            // A commit has no ref: the snapshot itself is named after it.
            Err(_) => revision.to_owned(),
        };
        let snapshot = dir.join("snapshots").join(&commit);
        if is_inside(&commit) && snapshot.is_dir() {
            Ok(snapshot)
        } else {
            Err(WeightsError::NotCached { repo: repo.to_owned(), revision: revision.to_owned() })
        }
    }
}

/// A relative path that does not leave its folder.
fn is_inside(path: &str) -> bool {
    !path.is_empty()
        && Path::new(path).components().all(|part| matches!(part, Component::Normal(_)))
}

/// Whether config and all weight files are there. What is in them is the runner's to check.
fn check_complete(dir: &Path) -> Result<(), WeightsError> {
    let incomplete = |missing: String| WeightsError::Incomplete { dir: dir.to_owned(), missing };
    if !dir.join("config.json").is_file() {
        return Err(incomplete("config.json".to_owned()));
    }
    let index = dir.join("model.safetensors.index.json");
    let unreadable = |error: String| WeightsError::Unreadable { path: index.clone(), error };
    let text = match fs::read(&index) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return if dir.join("model.safetensors").is_file() {
                Ok(())
            } else {
                Err(incomplete("model.safetensors".to_owned()))
            };
        }
        Err(error) => return Err(unreadable(error.to_string())),
    };
    #[derive(serde::Deserialize)]
    struct Index {
        weight_map: std::collections::BTreeMap<String, String>,
    }
    let index: Index = serde_json::from_slice(&text).map_err(|e| unreadable(e.to_string()))?;
    match index.weight_map.values().find(|file| !is_inside(file) || !dir.join(file).is_file()) {
        Some(file) => Err(incomplete(file.clone())),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn touch(path: &Path) {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, "{}").unwrap();
    }

    fn store(dir: &Path) -> ModelStore {
        let hub = dir.join("hub").into_os_string();
        ModelStore::new(vec![dir.join("a"), dir.join("b")], move |name| {
            (name == "HF_HUB_CACHE").then(|| hub.clone())
        })
    }

    fn path(path: &str) -> ModelSource {
        ModelSource { path: Some(path.to_owned()), ..ModelSource::default() }
    }

    fn repo(repo: &str, revision: Option<&str>) -> ModelSource {
        ModelSource {
            repo: Some(repo.to_owned()),
            revision: revision.map(str::to_owned),
            ..ModelSource::default()
        }
    }

    #[test]
    fn relative_paths_are_searched_in_order() {
        let dir = tempfile::tempdir().unwrap();
        let store = store(dir.path());
        let error = store.locate(&path("tiny")).unwrap_err();
        let (a, b) = (dir.path().join("a"), dir.path().join("b"));
        assert_eq!(
            error.to_string(),
            format!("no folder tiny on this node; looked in {}, {}", a.display(), b.display())
        );
        touch(&b.join("tiny/config.json"));
        assert_eq!(
            store.locate(&path("tiny")).unwrap_err(),
            WeightsError::Incomplete {
                dir: b.join("tiny"),
                missing: "model.safetensors".to_owned()
            }
        );
        touch(&b.join("tiny/model.safetensors"));
        assert_eq!(store.locate(&path("tiny")).unwrap(), b.join("tiny"));
        let absolute = b.join("tiny").display().to_string();
        assert_eq!(store.locate(&path(&absolute)).unwrap(), b.join("tiny"));
        touch(&a.join("tiny/config.json"));
        touch(&a.join("tiny/model.safetensors"));
        assert_eq!(store.locate(&path("tiny")).unwrap(), a.join("tiny"));
        for bad in ["../b/tiny", "", "./tiny", "tiny/.."] {
            assert_eq!(
                store.locate(&path(bad)).unwrap_err(),
                WeightsError::BadPath(bad.to_owned())
            );
        }
        assert_eq!(store.locate(&ModelSource::default()).unwrap_err(), WeightsError::NoSource);
    }

    #[test]
    fn repositories_are_found_by_branch_and_by_commit() {
        let dir = tempfile::tempdir().unwrap();
        let store = store(dir.path());
        let error = store.locate(&repo("me/tiny", None)).unwrap_err();
        assert_eq!(
            error.to_string(),
            "me/tiny at main is not on this node; download it with \
             `hf download me/tiny --revision main`"
        );
        assert!(!ShardFailure::from(error).permanent);
        let model = dir.path().join("hub/models--me--tiny");
        let snapshot = model.join("snapshots/0abc");
        touch(&snapshot.join("config.json"));
        fs::write(
            snapshot.join("model.safetensors.index.json"),
            r#"{"weight_map": {"x": "model-1.safetensors", "y": "model-2.safetensors"}}"#,
        )
        .unwrap();
        touch(&snapshot.join("model-1.safetensors"));
        assert_eq!(
            store.locate(&repo("me/tiny", Some("0abc"))).unwrap_err(),
            WeightsError::Incomplete {
                dir: snapshot.clone(),
                missing: "model-2.safetensors".to_owned()
            }
        );
        touch(&snapshot.join("model-2.safetensors"));
        assert_eq!(store.locate(&repo("me/tiny", Some("0abc"))).unwrap(), snapshot);
        fs::create_dir_all(model.join("refs/pr")).unwrap();
        fs::write(model.join("refs/main"), "0abc\n").unwrap();
        fs::write(model.join("refs/pr/1"), "../../../..").unwrap();
        assert_eq!(store.locate(&repo("me/tiny", None)).unwrap(), snapshot);
        assert!(store.locate(&repo("me/tiny", Some("pr/1"))).is_err());
        for bad in ["tiny", "../x/y", "me/..", "me/ti ny", "/x"] {
            assert_eq!(
                store.locate(&repo(bad, None)).unwrap_err(),
                WeightsError::BadRepo(bad.to_owned())
            );
        }
        assert_eq!(
            store.locate(&repo("me/tiny", Some("../x"))).unwrap_err(),
            WeightsError::BadRevision("../x".to_owned())
        );
    }

    #[test]
    fn the_cache_is_where_other_tools_put_it() {
        let cache = |set: &[(&str, &str)]| {
            let env = |name: &str| {
                let value = set.iter().find(|(key, _)| *key == name);
                value.map(|(_, value)| OsString::from(value))
            };
            ModelStore::new(Vec::new(), env).disk().display().to_string()
        };
        assert_eq!(cache(&[("HOME", "/h")]), "/h/.cache/huggingface/hub");
        assert_eq!(cache(&[("HOME", "/h"), ("HF_HOME", "/f")]), "/f/hub");
        assert_eq!(cache(&[("HF_HOME", "/f"), ("HF_HUB_CACHE", "/c")]), "/c");
        assert_eq!(cache(&[("HOME", "/h"), ("HF_HUB_CACHE", "")]), "/h/.cache/huggingface/hub");
    }
}
