//! Finds runners of an earlier agent that outlived it.
//!
//! A runner ends by itself when its agent does (its stdin closes), unless it hangs. It is known by
//! its command line, which names a config file below this agent's own folder: no list of process
//! ids has to be kept true across crashes.

use std::{
    ffi::OsString,
    path::Path,
    thread,
    time::{Duration, Instant},
};

use sysinfo::{Pid, ProcessRefreshKind, ProcessStatus, ProcessesToUpdate, System, UpdateKind};

/// Between two looks at processes that are ending.
const LOOK_AGAIN: Duration = Duration::from_millis(10);

/// What became of the runners that were found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Ended {
    pub(crate) killed: usize,
    /// Of those, still there at the deadline.
    pub(crate) left: usize,
}

/// Kills all runners whose config lies below `shards_dir` and waits, for all of them together no
/// longer than `limit`, until they have ended.
pub(crate) fn end_all(shards_dir: &Path, limit: Duration) -> Ended {
    let mut system = match System::new() {
        Ok(system) => system,
        Err(error) => {
            tracing::warn!(%error, "can't look for runners of an earlier agent");
            return Ended::default();
        }
    };
    let kind = ProcessRefreshKind::nothing().with_cmd(UpdateKind::Always);
    system.refresh_processes_specifics(ProcessesToUpdate::All, true, kind);
    let mut ending: Vec<Pid> = Vec::new();
    for process in system.processes().values() {
        // Threads are listed too on Linux.
        if process.thread_kind().is_some() || !is_ours(process.cmd(), shards_dir) {
            continue;
        }
        let pid = process.pid();
        tracing::warn!(pid = pid.as_u32(), "a runner outlived its agent: killing it");
        if !process.kill() {
            tracing::warn!(pid = pid.as_u32(), "it can't be killed");
        }
        ending.push(pid);
    }
    let killed = ending.len();
    let deadline = Instant::now() + limit;
    while !ending.is_empty() {
        let kind = ProcessRefreshKind::nothing();
        system.refresh_processes_specifics(ProcessesToUpdate::Some(&ending), true, kind);
        ending.retain(|pid| system.process(*pid).is_some_and(|process| runs(process.status())));
        if Instant::now() >= deadline {
            break;
        }
        thread::sleep(LOOK_AGAIN);
    }
    Ended { killed, left: ending.len() }
}

/// A zombie has ended, whether or not its parent has noticed.
fn runs(status: ProcessStatus) -> bool {
    !matches!(status, ProcessStatus::Zombie | ProcessStatus::Dead)
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
    fn orphans_are_ended_before_this_returns() {
        let dir = tempfile::tempdir().unwrap();
        let start = |name: &str| {
            Command::new("sh")
                .args(["-c", "read line", "serve", "--config"])
                .arg(dir.path().join(name).join("config.json"))
                .stdin(Stdio::piped())
                .spawn()
                .unwrap()
        };
        let mut children = ["a_b", "a_c", "a_d"].map(start);
        let limit = Duration::from_secs(60);
        assert_eq!(end_all(dir.path(), limit), Ended { killed: 3, left: 0 });
        for child in &mut children {
            // It can't be anything but over: not waiting proves that.
            assert!(child.try_wait().unwrap().is_some_and(|status| !status.success()));
        }
        assert_eq!(end_all(dir.path(), limit), Ended::default());
    }
}
