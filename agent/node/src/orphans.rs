//! Finds runners of an earlier agent that outlived it.
//!
//! A runner ends by itself when its agent does (its stdin closes), unless it hangs. It is known by
//! its command line, which names a config file below this agent's own folder: no list of process
//! ids has to be kept true across crashes.

use std::{ffi::OsString, path::Path};

use sysinfo::{ProcessRefreshKind, ProcessesToUpdate, System, UpdateKind};

/// Kills all runners whose config lies below `shards_dir` and waits until they have ended. Returns
/// how many there were.
pub(crate) fn end_all(shards_dir: &Path) -> usize {
    let mut system = match System::new() {
        Ok(system) => system,
        Err(error) => {
            tracing::warn!(%error, "can't look for runners of an earlier agent");
            return 0;
        }
    };
    let kind = ProcessRefreshKind::nothing().with_cmd(UpdateKind::Always);
    system.refresh_processes_specifics(ProcessesToUpdate::All, true, kind);
    let mut ended = 0;
    for process in system.processes().values() {
        // Threads are listed too on Linux.
        if process.thread_kind().is_some() || !is_ours(process.cmd(), shards_dir) {
            continue;
        }
        tracing::warn!(pid = process.pid().as_u32(), "a runner outlived its agent: killing it");
        if let Err(error) = process.kill_and_wait() {
            tracing::warn!(?error, "it can't be killed");
        }
        ended += 1;
    }
    ended
}

/// `… serve --config SHARDS_DIR/…`
fn is_ours(command: &[OsString], shards_dir: &Path) -> bool {
    let serves = command.iter().any(|word| word == "serve");
    serves
        && command
            .windows(2)
            .any(|pair| pair[0] == "--config" && Path::new(&pair[1]).starts_with(shards_dir))
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;

    fn check(line: &str, ours: bool) {
        let command: Vec<OsString> = line.split(' ').map(OsString::from).collect();
        assert_eq!(is_ours(&command, Path::new("/home/me/.exo/shards")), ours, "{line}");
    }

    #[test]
    fn only_runners_of_this_data_directory_are_ours() {
        check("/bin/exo-runner serve --config /home/me/.exo/shards/a_b/config.json", true);
        check("/bin/exo-runner serve --config /home/me/.exo2/shards/a_b/config.json", false);
        check("/bin/exo-runner serve --config /home/me/.exo/shards2/config.json", false);
        check("/bin/exo-runner generate --model /home/me/.exo/shards/x", false);
        check("vi /home/me/.exo/shards/a_b/config.json", false);
    }

    #[test]
    fn an_orphan_is_ended_before_this_returns() {
        let dir = tempfile::tempdir().unwrap();
        let config = dir.path().join("a_b/config.json");
        let mut child = Command::new("sh")
            .args(["-c", "read line", "serve", "--config"])
            .arg(&config)
            .stdin(Stdio::piped())
            .spawn()
            .unwrap();
        assert_eq!(end_all(dir.path()), 1);
        // Killed and, as a child of this process, already waited for: an error either way is fine.
        assert!(!child.wait().is_ok_and(|status| status.success()));
        assert_eq!(end_all(dir.path()), 0);
    }
}
