//! A runner process: started, listened to, stopped.

use std::{
    collections::VecDeque,
    fs, io,
    os::unix::process::ExitStatusExt as _,
    path::{Path, PathBuf},
    process::{ExitStatus, Stdio},
    sync::{Arc, Mutex},
    time::Duration,
};

use exo_crds::runner::RunnerEvent;
use tokio::{
    io::AsyncRead,
    process::{Child, ChildStdin, Command},
    sync::mpsc,
    task::JoinHandle,
    time::timeout,
};

use crate::{
    lines::Lines,
    shard::{
        Exit,
        facilities::{Output, Runner},
        launch::{GROUP_VARIABLES, Launch},
    },
};

/// Time to end by itself once its stdin is closed.
const STOP_LIMIT: Duration = Duration::from_secs(3);
/// Lines of its log that are kept for the Shard's status.
const KEPT_LINES: usize = 20;
/// Longer lines are cut when kept: a status is no place for a dump.
const KEPT_LINE_BYTES: usize = 400;
/// Longer lines are cut when read.
const LINE_LIMIT_BYTES: usize = 64 << 10;
/// Events that wait for the shard's task. It reads them as they come; a runner that floods it has
/// to wait.
const EVENT_QUEUE: usize = 64;

/// A running `exo-runner serve`.
#[derive(Debug)]
pub(crate) struct Process {
    child: Child,
    /// Open as long as the runner shall live.
    stdin: Option<ChildStdin>,
    events: mpsc::Receiver<RunnerEvent>,
    log: JoinHandle<()>,
    tail: Arc<Mutex<VecDeque<String>>>,
    dir: PathBuf,
}

impl Process {
    /// Writes the runner's files and starts it. It gets a process group of its own, so that a
    /// Ctrl-C meant for the agent does not reach it first.
    pub(crate) fn start(runner: &Path, launch: &Launch) -> io::Result<Self> {
        fs::create_dir_all(&launch.dir)?;
        fs::write(launch.config_path(), serde_json::to_vec_pretty(&launch.config)?)?;
        if let Some(hosts) = &launch.hosts {
            fs::write(launch.hosts_path(), hosts)?;
        }
        let mut command = Command::new(runner);
        command.arg("serve").arg("--config").arg(launch.config_path());
        for name in GROUP_VARIABLES {
            command.env_remove(name);
        }
        let mut child = command
            .envs(launch.environment.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0)
            .kill_on_drop(true)
            .spawn()?;
        let stdin = child.stdin.take();
        let shard = launch.config.shard.clone();
        let (sender, events) = mpsc::channel(EVENT_QUEUE);
        if let Some(stdout) = child.stdout.take() {
            tokio::spawn(read_events(stdout, sender, shard.clone()));
        }
        let tail = Arc::new(Mutex::new(VecDeque::new()));
        let stderr = child.stderr.take();
        let kept = tail.clone();
        let log = tokio::spawn(async move {
            if let Some(stderr) = stderr {
                read_log(stderr, kept, shard).await;
            }
        });
        Ok(Self { child, stdin, events, log, tail, dir: launch.dir.clone() })
    }

    async fn exit(&mut self, status: Option<ExitStatus>) -> Exit {
        // What it wrote last may still be in the pipe; somebody else may hold the pipe open.
        let _ = timeout(Duration::from_millis(500), &mut self.log).await;
        let tail = self.tail.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        Exit {
            code: status.and_then(|status| status.code()),
            signal: status.and_then(|status| status.signal()),
            log_lines: tail.iter().cloned().collect(),
        }
    }
}

impl Runner for Process {
    /// Cancel-safe: an event is taken or not, and waiting for the end can be begun again.
    async fn next(&mut self) -> Output {
        if let Some(event) = self.events.recv().await {
            return Output::Event(event);
        }
        let status = self.child.wait().await.ok();
        Output::Exited(self.exit(status).await)
    }

    async fn stop(&mut self) -> Exit {
        drop(self.stdin.take());
        let status = match timeout(STOP_LIMIT, self.child.wait()).await {
            Ok(status) => status.ok(),
            Err(_) => {
                let pid = self.child.id();
                tracing::warn!(pid, "the runner did not stop when asked: killing it");
                // Both fail only when it has ended already.
                let _ = self.child.start_kill();
                self.child.wait().await.ok()
            }
        };
        self.exit(status).await
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.dir) {
            tracing::debug!(%error, dir = %self.dir.display(), "leaving a shard's folder behind");
        }
    }
}

/// Reads to the end of the pipe, come what may: a runner must never wait for its agent to read.
async fn read_events(
    stdout: impl AsyncRead + Unpin,
    events: mpsc::Sender<RunnerEvent>,
    shard: String,
) {
    let mut lines = Lines::new(stdout, LINE_LIMIT_BYTES);
    while let Some(line) = lines.next().await {
        let event = if line.cut {
            Err("too long".to_owned())
        } else {
            serde_json::from_str(&line.text).map_err(|error| error.to_string())
        };
        match event {
            // Without anybody at the other end, events are read all the same.
            Ok(event) => drop(events.send(event).await),
            Err(error) => tracing::warn!(shard, error, "a line from the runner is no event"),
        }
    }
}

async fn read_log(
    stderr: impl AsyncRead + Unpin,
    tail: Arc<Mutex<VecDeque<String>>>,
    shard: String,
) {
    let mut lines = Lines::new(stderr, LINE_LIMIT_BYTES);
    while let Some(line) = lines.next().await {
        let line = line.text;
        tracing::debug!(target: "exo_runner", shard, "{line}");
        let mut tail = tail.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        if tail.len() == KEPT_LINES {
            tail.pop_front();
        }
        tail.push_back(cut(line));
    }
}

fn cut(mut line: String) -> String {
    if line.len() > KEPT_LINE_BYTES {
        line.truncate(line.floor_char_boundary(KEPT_LINE_BYTES));
        line.push('…');
    }
    line
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use exo_crds::{ShardPhase, runner::RunnerTls};

    use super::*;
    use crate::shard::{launch::launch, tests};

    /// A runner written as a shell script, in a folder of its own.
    fn script(dir: &Path, body: &str) -> PathBuf {
        let path = dir.join("runner.sh");
        fs::write(&path, format!("#!/bin/sh\n{body}\n")).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        path
    }

    fn start(dir: &Path, body: &str) -> Process {
        let mut shard = tests::shard("s");
        shard.spec.environment = [("GREETING".to_owned(), "hello".to_owned())].into();
        let tls = RunnerTls { ca: "/a".into(), cert: "/b".into(), key: "/c".into() };
        let launch =
            launch(dir, &tls, &shard, "/m".into(), &tests::meeting(), "127.0.0.1:1003").unwrap();
        Process::start(&script(dir, body), &launch).unwrap()
    }

    async fn event(process: &mut Process) -> RunnerEvent {
        match process.next().await {
            Output::Event(event) => event,
            Output::Exited(exit) => panic!("{exit:?}"),
        }
    }

    async fn exited(process: &mut Process) -> Exit {
        match process.next().await {
            Output::Exited(exit) => exit,
            Output::Event(event) => panic!("{event:?}"),
        }
    }

    #[tokio::test]
    async fn gets_its_files_and_environment_and_tells_events() {
        let dir = tempfile::tempdir().unwrap();
        let mut process = start(
            dir.path(),
            r#"echo "$GREETING $1 $2 rank $MLX_RANK" >&2
               cat "$MLX_HOSTFILE" >&2; echo >&2
               grep -c '"world_size": 2' "$3" >&2
               echo '{"type":"phase","phase":"Loading","progress_percent":5}'
               echo 'no event'
               echo '{"type":"memory","bytes":7}'
               exit 2"#,
        );
        let loading = RunnerEvent::Phase { phase: ShardPhase::Loading, progress_percent: 5 };
        assert_eq!(event(&mut process).await, loading);
        assert_eq!(event(&mut process).await, RunnerEvent::Memory { bytes: 7 });
        let exit = exited(&mut process).await;
        assert_eq!((exit.code, exit.signal), (Some(2), None));
        assert_eq!(
            exit.log_lines,
            ["hello serve --config rank 0", r#"[["127.0.0.1:1001"],["127.0.0.1:2001"]]"#, "1",]
        );
        let folder = process.dir.clone();
        assert!(folder.is_dir());
        drop(process);
        assert!(!folder.exists());
    }

    #[tokio::test]
    async fn ends_when_its_stdin_closes() {
        let dir = tempfile::tempdir().unwrap();
        let mut process = start(dir.path(), "cat >/dev/null; echo stopping >&2");
        let exit = process.stop().await;
        assert_eq!(exit, Exit { code: Some(0), signal: None, log_lines: vec!["stopping".into()] });
    }

    #[tokio::test]
    async fn is_killed_when_it_does_not_listen() {
        let dir = tempfile::tempdir().unwrap();
        let mut process =
            start(dir.path(), r#"echo '{"type":"memory","bytes":1}'; exec sleep 1000"#);
        event(&mut process).await;
        assert_eq!(process.stop().await.signal, Some(9));
    }

    #[tokio::test]
    async fn odd_output_is_read_over() {
        let dir = tempfile::tempdir().unwrap();
        // More than a pipe holds: a reader that stops leaves the runner stuck.
        let mut process = start(
            dir.path(),
            r#"for pipe in 1 2; do
                 head -c 71680 /dev/zero | tr '\0' x >&$pipe; echo >&$pipe
                 printf '\377\n' >&$pipe
                 head -c 71680 /dev/zero | tr '\0' y >&$pipe; echo >&$pipe
               done
               echo '{"type":"memory","bytes":7}'
               echo 'the end' >&2"#,
        );
        assert_eq!(event(&mut process).await, RunnerEvent::Memory { bytes: 7 });
        let exit = exited(&mut process).await;
        assert_eq!((exit.code, exit.log_lines.len()), (Some(0), 4));
        assert_eq!(exit.log_lines[1], "\u{fffd}");
        assert_eq!(exit.log_lines[3], "the end");
    }

    #[tokio::test]
    async fn keeps_the_last_lines_of_its_log() {
        let dir = tempfile::tempdir().unwrap();
        let mut process = start(
            dir.path(),
            r#"for i in $(seq 1 50); do echo "line $i" >&2; done
               head -c 1000 /dev/zero | tr '\0' x >&2
               kill -9 $$"#,
        );
        let exit = exited(&mut process).await;
        assert_eq!(exit.signal, Some(9));
        assert_eq!(exit.log_lines.len(), KEPT_LINES);
        assert_eq!(exit.log_lines[0], "line 32");
        assert_eq!(exit.log_lines[19].len(), KEPT_LINE_BYTES + '…'.len_utf8());
    }
}
