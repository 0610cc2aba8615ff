//! Real `exo-runner serve` processes on this machine, and what they say.

use std::{
    fs,
    io::{BufRead as _, BufReader},
    net::SocketAddr,
    path::{Path, PathBuf},
    process::{Child, ChildStdin, Command, ExitStatus, Stdio},
    sync::mpsc::{Receiver, channel},
    thread,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use exo_crds::{
    ShardPhase, ShardingKind,
    runner::{RunnerConfig, RunnerEvent},
};
use exo_trust::{Authority, GROUP_NODES, Subject, TlsPaths, write_private};
use serde_json::json;
use tempfile::TempDir;

use crate::model::{free_addresses, loopback};

/// Far more than anything here takes, even on a busy machine.
pub(crate) const LIMIT: Duration = Duration::from_secs(60);

/// What the ranks of a group share: model, certificates, addresses.
pub(crate) struct Group {
    pub(crate) dir: TempDir,
    pub(crate) tls: TlsPaths,
    pub(crate) serve: SocketAddr,
    control: SocketAddr,
    ring: Vec<SocketAddr>,
    model: PathBuf,
    model_layers: u32,
    pub(crate) name: &'static str,
    pub(crate) sharding: ShardingKind,
    /// 0 for the model's own.
    pub(crate) context_length: u32,
    pub(crate) max_concurrency: u32,
    pub(crate) step_limit_s: u32,
}

/// One rank's process; killed when dropped.
pub(crate) struct Runner {
    child: Child,
    /// Dropped, it tells the runner that its agent is gone.
    pub(crate) stdin: Option<ChildStdin>,
    events: Receiver<RunnerEvent>,
    pub(crate) seen: Vec<RunnerEvent>,
    log: PathBuf,
}

/// The runner, or the one in a folder of choice.
pub(crate) fn binary() -> PathBuf {
    match std::env::var_os("EXO_BIN_DIR") {
        Some(folder) => Path::new(&folder).join("exo-runner"),
        None => env!("CARGO_BIN_EXE_exo-runner").into(),
    }
}

impl Group {
    pub(crate) fn new(world_size: usize, model: &Path, model_layers: u32) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let now_s = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
        let authority = Authority::open_or_create(dir.path(), now_s).unwrap();
        let subject = Subject { name: "node".to_owned(), groups: vec![GROUP_NODES.to_owned()] };
        let issued = authority.issue(&subject, Some(&[loopback()]), now_s).unwrap();
        let tls = TlsPaths::in_dir(dir.path());
        write_private(&tls.cert, issued.certificate_pem.as_bytes()).unwrap();
        write_private(&tls.key, issued.key_pem.as_bytes()).unwrap();
        let mut addresses = free_addresses(2 + world_size);
        let ring = addresses.split_off(2);
        let hosts: Vec<_> = ring.iter().map(|address| [address.to_string()]).collect();
        fs::write(dir.path().join("hosts.json"), json!(hosts).to_string()).unwrap();
        Self {
            tls,
            serve: addresses[0],
            control: addresses[1],
            ring,
            dir,
            model: model.to_owned(),
            model_layers,
            name: "group",
            sharding: ShardingKind::Pipeline,
            context_length: 0,
            max_concurrency: 4,
            step_limit_s: 60,
        }
    }

    fn config(&self, rank: usize) -> RunnerConfig {
        let world_size = self.ring.len() as u32;
        let share = self.model_layers / world_size;
        let first = rank as u32 * share;
        let is_last = rank + 1 == self.ring.len();
        let end = if is_last { self.model_layers } else { first + share };
        let layers = match self.sharding {
            ShardingKind::Pipeline => format!("{first}-{}", end - 1),
            ShardingKind::Tensor => format!("0-{}", self.model_layers - 1),
        };
        serde_json::from_value(json!({
            "shard": format!("shard-{rank}"), "namespace": "default", "instance": "shard",
            "epoch": 1, "group": self.name, "rank": rank, "world_size": world_size,
            "model_dir": self.model, "model_type": "llama", "total_layers": self.model_layers,
            "sharding": self.sharding, "layers": layers, "transport": "ring",
            "control": self.control, "serve": (rank == 0).then_some(self.serve), "seed": 42,
            "context_length": self.context_length, "max_concurrency": self.max_concurrency, "step_limit_s": self.step_limit_s, "tls": self.tls,
        }))
        .unwrap()
    }

    pub(crate) fn start(&self, rank: usize) -> Runner {
        let config = self.config(rank);
        let path = self.dir.path().join(format!("config-{rank}.json"));
        fs::write(&path, serde_json::to_vec(&config).unwrap()).unwrap();
        let log = self.dir.path().join(format!("log-{rank}"));
        let mut child = Command::new(binary())
            .args(["serve", "--config"])
            .arg(&path)
            .env("MLX_RANK", rank.to_string())
            .env("MLX_HOSTFILE", self.dir.path().join("hosts.json"))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(fs::File::create(&log).unwrap())
            .spawn()
            .unwrap();
        let (sender, events) = channel();
        let stdout = BufReader::new(child.stdout.take().unwrap());
        thread::spawn(move || {
            for line in stdout.lines() {
                let event = serde_json::from_str(&line.unwrap()).expect("only events on stdout");
                if sender.send(event).is_err() {
                    return;
                }
            }
        });
        Runner { stdin: child.stdin.take(), child, events, seen: Vec::new(), log }
    }

    /// Starts all ranks and waits until they are ready.
    pub(crate) fn start_all(&self) -> Vec<Runner> {
        let mut runners: Vec<_> = (0..self.ring.len()).map(|rank| self.start(rank)).collect();
        for runner in &mut runners {
            runner.ready();
        }
        runners
    }
}

impl Runner {
    /// What this process has used of processors; none where the system does not say so in this way.
    pub(crate) fn processor_time(&self) -> Option<Duration> {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.child.id())).ok()?;
        // Behind the name: user and system time are the 12th and 13th, in hundredths of a second.
        let fields: Vec<&str> = stat.rsplit_once(") ")?.1.split(' ').collect();
        let [user, system] = [fields.get(11)?, fields.get(12)?].map(|field| field.parse::<u64>());
        Some(Duration::from_millis(10 * (user.ok()? + system.ok()?)))
    }

    /// Waits for an event of this kind.
    pub(crate) fn wait_for(&mut self, wanted: impl Fn(&RunnerEvent) -> bool) -> RunnerEvent {
        let deadline = Instant::now() + LIMIT;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let Ok(event) = self.events.recv_timeout(left) else {
                let log = fs::read_to_string(&self.log).unwrap();
                panic!("the event did not come; seen {:?}; the log:\n{log}", self.seen);
            };
            self.seen.push(event.clone());
            if wanted(&event) {
                return event;
            }
        }
    }

    pub(crate) fn ready(&mut self) {
        self.wait_for(|event| {
            matches!(event, RunnerEvent::Phase { phase: ShardPhase::Ready, progress_percent: 100 })
        });
    }

    /// Waits until the log says this.
    pub(crate) fn wait_for_log(&self, part: &str) {
        let deadline = Instant::now() + LIMIT;
        loop {
            let log = fs::read_to_string(&self.log).unwrap();
            if log.contains(part) {
                return;
            }
            assert!(Instant::now() < deadline, "`{part}` is not in the log:\n{log}");
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// Waits for the failure; returns its message.
    pub(crate) fn failure(&mut self) -> (String, String, bool) {
        match self.wait_for(|event| matches!(event, RunnerEvent::Failed { .. })) {
            RunnerEvent::Failed { reason, message, permanent } => (reason, message, permanent),
            _ => unreachable!(),
        }
    }

    pub(crate) fn exit(&mut self) -> ExitStatus {
        let deadline = Instant::now() + LIMIT;
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(Instant::now() < deadline, "it does not end");
            thread::sleep(Duration::from_millis(5));
        }
    }

    pub(crate) fn signal(&self, name: &str) {
        let id = self.child.id().to_string();
        assert!(Command::new("kill").args(["-s", name, &id]).status().unwrap().success());
    }
}

impl Drop for Runner {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
