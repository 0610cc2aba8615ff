//! Finds the server: `--kubeconfig`, `$KUBECONFIG`, then the file that the local `exo` wrote.

use std::path::{Path, PathBuf};

use anyhow::bail;
use kube::config::{KubeConfigOptions, Kubeconfig, KubeconfigError};

use crate::cli::Global;

/// Where a system service keeps its data.
const SYSTEM_HOME: &str = "/var/lib/exo";

/// Reads the configuration that `global` and the environment lead to.
pub(crate) async fn load(global: &Global) -> anyhow::Result<kube::Config> {
    let (kubeconfig, from) = find(global)?;
    let options =
        KubeConfigOptions { context: global.context.clone(), ..KubeConfigOptions::default() };
    let mut config = kube::Config::from_custom_kubeconfig(kubeconfig, &options)
        .await
        .map_err(|error| innermost(error, &from))?;
    // A server on the LAN answers at once or not at all.
    config.connect_timeout = Some(std::time::Duration::from_secs(5));
    // Whoever typed a command wants to know why it doesn't work, not to wait for minutes.
    config.default_retry = false;
    Ok(config)
}

/// The kubeconfig, and what to call it in messages.
pub(crate) fn find(global: &Global) -> anyhow::Result<(Kubeconfig, String)> {
    if let Some(path) = &global.kubeconfig {
        return read(path);
    }
    let from_env = Kubeconfig::from_env().map_err(|error| innermost(error, "$KUBECONFIG"))?;
    if let Some(kubeconfig) = from_env {
        return Ok((kubeconfig, std::env::var("KUBECONFIG").unwrap_or_default()));
    }
    let homes = homes(std::env::var_os("EXO_HOME").map(PathBuf::from), std::env::home_dir());
    let files: Vec<_> = homes.iter().map(|home| home.join("kubeconfig")).collect();
    match files.iter().find(|file| file.exists()) {
        Some(file) => read(file),
        None => {
            let places: Vec<_> = files.iter().map(|f| f.display().to_string()).collect();
            bail!(
                "no server is known: give --kubeconfig, set KUBECONFIG, or start `exo` on this \
                 machine (looked for {})",
                places.join(" and ")
            );
        }
    }
}

fn read(path: &Path) -> anyhow::Result<(Kubeconfig, String)> {
    let from = path.display().to_string();
    let kubeconfig = Kubeconfig::read_from(path).map_err(|error| innermost(error, &from))?;
    Ok((kubeconfig, from))
}

/// One sentence that names the file once: the library's own texts repeat path and cause.
fn innermost(error: KubeconfigError, from: &str) -> anyhow::Error {
    match error {
        KubeconfigError::ReadConfig(error, path) => {
            anyhow::Error::from(error).context(format!("reading {}", path.display()))
        }
        error => {
            // Below the first line come pictures of the text.
            let error = error.to_string();
            anyhow::anyhow!("using {from}: {}", error.lines().next().unwrap_or_default())
        }
    }
}

/// Data directories of the local `exo`, the likelier one first.
fn homes(exo_home: Option<PathBuf>, home: Option<PathBuf>) -> Vec<PathBuf> {
    match (exo_home, home) {
        (Some(exo_home), _) => vec![exo_home],
        (None, Some(home)) => vec![home.join(".exo"), SYSTEM_HOME.into()],
        (None, None) => vec![SYSTEM_HOME.into()],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exo_home_replaces_the_other_places() {
        let path = |p: &str| Some(PathBuf::from(p));
        let check = |a, b, expect: &[&str]| {
            let expect: Vec<PathBuf> = expect.iter().map(PathBuf::from).collect();
            assert_eq!(homes(a, b), expect);
        };
        check(path("/data"), path("/home/ann"), &["/data"]);
        check(None, path("/home/ann"), &["/home/ann/.exo", "/var/lib/exo"]);
        check(None, None, &["/var/lib/exo"]);
    }
}
