//! Starts real exo processes for the end-to-end tests: binaries of the same build, own data
//! directories, free ports, stopped when dropped.

pub mod linear;
pub mod net;
mod trio;

use std::{
    fs::{self, File},
    io::{BufRead as _, BufReader},
    net::TcpListener,
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    sync::mpsc,
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail, ensure};
use serde_json::Value;
use tempfile::TempDir;
pub use trio::{Admin, Trio, members};

/// Longest wait for anything in these tests. Generous: CI machines are small and shared, and stand
/// still for seconds.
pub const DEADLINE: Duration = Duration::from_secs(180);
/// Tries to meet something while it is under way: it is over already where the machine stood still
/// in between.
pub const TRIES: usize = 5;
/// Pause between two looks at a condition.
const LOOK_AGAIN: Duration = Duration::from_millis(100);
/// What exoctl says where another try may do what this one couldn't.
const PASSING: [&str; 4] = [
    "can't reach the API server",
    "doesn't lead the store",
    "the outcome of the write is unknown",
    "the store is unavailable",
];

/// The repository's root.
pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("tests/ has a parent").to_owned()
}

/// A binary of this workspace: from `EXO_BIN_DIR`, or built with the same profile as the running
/// test.
pub fn binary(name: &str) -> anyhow::Result<PathBuf> {
    let folder = match std::env::var_os("EXO_BIN_DIR") {
        Some(folder) => PathBuf::from(folder),
        None => {
            let test = std::env::current_exe()?;
            test.ancestors().nth(2).context("tests run from target/PROFILE/deps")?.to_owned()
        }
    };
    let path = folder.join(name);
    ensure!(path.exists(), "{} is missing: run `make test`, which builds it", path.display());
    Ok(path)
}

/// Python with the test clients, made by `make test`.
pub fn python() -> anyhow::Result<PathBuf> {
    let path = root().join(".venv/bin/python");
    ensure!(path.exists(), "{} is missing: run `make test`, which makes it", path.display());
    Ok(path)
}

/// Sum of the samples of a Prometheus text that have this name and all of `labels`, each written
/// as `key="value"`.
pub fn metric(text: &str, name: &str, labels: &[&str]) -> f64 {
    text.lines()
        .filter(|line| line.split(['{', ' ']).next() == Some(name))
        .filter(|line| labels.iter().all(|label| line.contains(label)))
        .filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok())
        .sum()
}

/// Looks until `condition` gives a value. A look that fails has seen nothing yet; its error is told
/// when no later one sees anything.
pub fn wait_for<T>(
    what: &str,
    mut condition: impl FnMut() -> anyhow::Result<Option<T>>,
) -> anyhow::Result<T> {
    let (begin, mut failed) = (Instant::now(), String::new());
    loop {
        match condition() {
            Ok(Some(value)) => return Ok(value),
            Ok(None) => {}
            Err(error) => failed = format!("; the last look that failed: {error:#}"),
        }
        if begin.elapsed() > DEADLINE {
            bail!("waited {DEADLINE:?} for {what}{failed}");
        }
        std::thread::sleep(LOOK_AGAIN);
    }
}

/// Tries until it succeeds.
pub fn in_the_end<T>(
    what: &str,
    mut attempt: impl FnMut() -> anyhow::Result<T>,
) -> anyhow::Result<T> {
    wait_for(what, || attempt().map(Some))
}

/// Runs exoctl as the admin, once.
fn exoctl(kubeconfig: &Path, args: &[&str]) -> anyhow::Result<Output> {
    let mut command = Command::new(binary("exoctl")?);
    Ok(command.arg("--kubeconfig").arg(kubeconfig).args(args).output()?)
}

/// The same, again while there is no leader: whoever stood still may have lost it.
fn exoctl_led(kubeconfig: &Path, args: &[&str]) -> anyhow::Result<Output> {
    let (begin, mut args) = (Instant::now(), args.to_vec());
    loop {
        let output = exoctl(kubeconfig, &args)?;
        let text = String::from_utf8_lossy(&output.stderr);
        let passes = PASSING.iter().any(|passing| text.contains(passing));
        if output.status.success() || !passes || begin.elapsed() > DEADLINE {
            return Ok(output);
        }
        eprintln!("exoctl {args:?} once more: {text}");
        // The try whose end is unknown may have done it.
        if args[0] == "delete" && !args.contains(&"--ignore-not-found") {
            args.push("--ignore-not-found");
        }
        std::thread::sleep(LOOK_AGAIN);
    }
}

/// The same; anything but success is an error. Returns stdout.
fn exoctl_ok(
    kubeconfig: &Path,
    args: &[&str],
    logs: impl Fn() -> String,
) -> anyhow::Result<String> {
    let output = exoctl_led(kubeconfig, args)?;
    let text = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "exoctl {args:?}: {text}{}", logs());
    Ok(String::from_utf8(output.stdout)?)
}

/// Control plane with an agent (`mac-1`) and a second agent (`mac-2`).
pub struct Cluster {
    pub first: Exo,
    pub second: Exo,
    /// Folder that the nodes search for models.
    pub models: PathBuf,
    dir: TempDir,
}

impl Cluster {
    /// Starts both processes and waits until both nodes are Ready.
    pub fn start() -> anyhow::Result<Self> {
        Self::start_with_peers(str::to_owned)
    }

    /// The same; `peers` makes the second agent's `--peers` from the address of the first.
    pub fn start_with_peers(peers: impl Fn(&str) -> String) -> anyhow::Result<Self> {
        let dir = tempfile::Builder::new().prefix("exo-e2e-").tempdir()?;
        let models = models_in(dir.path())?;
        let place = Place::loopback(dir.path(), &models);
        let first = Exo::start(&place, "mac-1", &["--port", "0", "--api-port", "0"])?;
        let peer = first.api()?.trim_start_matches("https://").to_owned();
        let args = ["--no-control-plane", "--peers", &peers(&peer)];
        let second = Exo::start(&place, "mac-2", &args)?;
        let cluster = Self { first, second, models, dir };
        cluster.wait_for_nodes()?;
        Ok(cluster)
    }

    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    pub fn wait_for_nodes(&self) -> anyhow::Result<()> {
        for node in ["mac-1", "mac-2"] {
            self.exoctl_ok(&["wait", &format!("node/{node}"), "--for=condition=Ready"])?;
        }
        Ok(())
    }

    pub fn kubeconfig(&self) -> PathBuf {
        self.first.data_dir.join("kubeconfig")
    }

    /// Runs exoctl as the admin, again while there is no leader; anything but success is an error.
    /// Returns stdout.
    pub fn exoctl_ok(&self, args: &[&str]) -> anyhow::Result<String> {
        exoctl_ok(&self.kubeconfig(), args, || self.logs())
    }

    /// Applies a manifest given as text; the answer may be a refusal.
    pub fn apply(&self, text: &str, wait: bool) -> anyhow::Result<Output> {
        let file = self.dir.path().join("manifest.yaml");
        fs::write(&file, text)?;
        let file = file.to_str().context("the path is UTF-8")?.to_owned();
        let mut args = vec!["apply", "-f", &file];
        if wait {
            args.extend(["--wait", "--timeout", "5m"]);
        }
        exoctl_led(&self.kubeconfig(), &args)
    }

    /// The sample with the tiny model, applied and Ready.
    pub fn apply_tiny(&self) -> anyhow::Result<()> {
        let sample = fs::read_to_string(root().join("manifests/samples/tiny.yaml"))?;
        let output = self.apply(&sample, true)?;
        ensure!(
            output.status.success(),
            "{}{}",
            String::from_utf8_lossy(&output.stderr),
            self.logs()
        );
        Ok(())
    }

    /// What the gateway says about itself at `/metrics`.
    pub fn gateway_metrics(&self) -> anyhow::Result<String> {
        let url = self.first.gateway()?.replace("/v1", "/metrics");
        in_the_end("the gateway's metrics", || {
            let output = Command::new("curl").args(["-sf", "--max-time", "60", &url]).output()?;
            ensure!(output.status.success(), "no metrics at {url}");
            Ok(String::from_utf8(output.stdout)?)
        })
    }

    /// The shards once there are so many.
    pub fn wait_for_shards(&self, count: usize) -> anyhow::Result<Vec<Value>> {
        wait_for(&format!("{count} shards"), || {
            Ok(Some(self.shards()?).filter(|shards| shards.len() == count))
        })
        .with_context(|| self.logs())
    }

    /// All shards, as JSON objects sorted by name.
    pub fn shards(&self) -> anyhow::Result<Vec<Value>> {
        let text = self.exoctl_ok(&["get", "shards", "-o", "json"])?;
        let list: Value = serde_json::from_str(&text)?;
        Ok(list["items"].as_array().context("a list has items")?.clone())
    }

    /// The last lines of both processes' logs, for failure messages.
    pub fn logs(&self) -> String {
        [&self.first, &self.second].map(|exo| exo.log_tail()).concat()
    }
}

/// A folder with links to the built-in models, to which a test may add its own.
fn models_in(dir: &Path) -> anyhow::Result<PathBuf> {
    let models = dir.join("models");
    fs::create_dir(&models)?;
    for entry in fs::read_dir(root().join("manifests/models"))? {
        let entry = entry?;
        std::os::unix::fs::symlink(entry.path(), models.join(entry.file_name()))?;
    }
    Ok(models)
}

/// Where processes run.
#[derive(Clone)]
pub struct Place {
    /// Holds data directories and logs.
    pub dir: PathBuf,
    pub models: PathBuf,
    /// Address to listen on.
    pub listen: String,
    /// Network namespace, if not this process's own.
    pub space: Option<String>,
    /// Further environment of the processes.
    pub env: Vec<(String, String)>,
}

impl Place {
    pub fn loopback(dir: &Path, models: &Path) -> Self {
        let (dir, models) = (dir.to_owned(), models.to_owned());
        Self { dir, models, listen: "127.0.0.1".to_owned(), space: None, env: vec![] }
    }
}

/// One running `exo`.
pub struct Exo {
    pub data_dir: PathBuf,
    pub name: String,
    args: Vec<String>,
    place: Place,
    log: PathBuf,
    endpoints: Vec<(String, String)>,
    child: Child,
}

impl Exo {
    /// Starts a process, and waits until it has said where it is.
    pub fn start(place: &Place, name: &str, args: &[&str]) -> anyhow::Result<Self> {
        let mut exo = Self::launch(place, name, args)?;
        exo.read_banner()?;
        Ok(exo)
    }

    /// Starts a process that is not waited for.
    pub fn launch(place: &Place, name: &str, args: &[&str]) -> anyhow::Result<Self> {
        let (data_dir, log) = (place.dir.join(name), place.dir.join(format!("{name}.log")));
        let args: Vec<_> = args.iter().map(|arg| (*arg).to_owned()).collect();
        let child = Self::spawn(name, &data_dir, place, &log, &args)?;
        Ok(Self {
            data_dir,
            name: name.to_owned(),
            args,
            place: place.clone(),
            log,
            endpoints: Vec::new(),
            child,
        })
    }

    fn spawn(
        name: &str,
        data_dir: &Path,
        place: &Place,
        log: &Path,
        args: &[String],
    ) -> anyhow::Result<Child> {
        let log = File::options().create(true).append(true).open(log)?;
        let mut command = match &place.space {
            // It becomes the command: same process, same id.
            Some(space) => {
                let mut command = Command::new("ip");
                command.args(["netns", "exec", space]).arg(binary("exo")?);
                command
            }
            None => Command::new(binary("exo")?),
        };
        Ok(command
            .args(["--name", name, "--listen", &place.listen, "--data-dir"])
            .arg(data_dir)
            .args(args)
            .env("EXO_MODEL_PATH", &place.models)
            .env_remove("EXO_HOME")
            .envs(place.env.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(log)
            .spawn()?)
    }

    /// `  name   value` lines up to `join`; an agent alone prints none and is not waited for.
    pub fn read_banner(&mut self) -> anyhow::Result<()> {
        if self.args.iter().any(|arg| arg == "--no-control-plane") {
            return Ok(());
        }
        let stdout = self.child.stdout.take().context("stdout is piped")?;
        self.endpoints.clear();
        let (sender, lines) = mpsc::channel();
        // Reads to the end, so that the process never waits for a reader.
        std::thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                let _ = sender.send(line);
            }
        });
        let deadline = Instant::now() + DEADLINE;
        loop {
            let line = match lines.recv_timeout(deadline.saturating_duration_since(Instant::now()))
            {
                Ok(line) => line,
                Err(mpsc::RecvTimeoutError::Disconnected) => break,
                Err(mpsc::RecvTimeoutError::Timeout) => {
                    bail!("{} said no address in {DEADLINE:?}: {}", self.name, self.log_tail())
                }
            };
            if let Some((name, value)) = line.trim().split_once("  ") {
                self.endpoints.push((name.to_owned(), value.trim().to_owned()));
                if name == "join" {
                    return Ok(());
                }
            }
        }
        bail!("{} stopped at start: {}", self.name, self.log_tail())
    }

    fn endpoint(&self, name: &str) -> anyhow::Result<&str> {
        let found = self.endpoints.iter().find(|(key, _)| key == name);
        let (_, value) = found.with_context(|| format!("the banner names no {name}"))?;
        Ok(value.split_whitespace().next().unwrap_or_default())
    }

    /// `http://127.0.0.1:PORT/v1`
    pub fn gateway(&self) -> anyhow::Result<&str> {
        self.endpoint("OpenAI API")
    }

    /// `https://127.0.0.1:PORT`
    pub fn api(&self) -> anyhow::Result<&str> {
        self.endpoint("cluster API")
    }

    /// The end of the process, if it has ended by itself.
    pub fn exit_code(&mut self) -> anyhow::Result<Option<i32>> {
        Ok(self.child.try_wait()?.and_then(|status| status.code()))
    }

    /// The whole log so far.
    pub fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Sends SIGKILL and waits for the end.
    pub fn kill(&mut self) -> anyhow::Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }

    /// Starts again on the same data directory and the same ports, by its data: without peers.
    pub fn restart(&mut self) -> anyhow::Result<()> {
        self.relaunch()?;
        self.read_banner()
    }

    /// The same without waiting until it is ready.
    pub fn relaunch(&mut self) -> anyhow::Result<()> {
        let port = |url: &str| url.rsplit(':').next().map(|p| p.trim_end_matches("/v1").to_owned());
        if !self.endpoints.is_empty() {
            let gateway = port(self.gateway()?).context("the gateway has a port")?;
            let api = port(self.api()?).context("the API has a port")?;
            self.wait_for_ports([&gateway, &api])?;
            let mut args = ["--port", &gateway, "--api-port", &api].map(str::to_owned).to_vec();
            let mut old = self.args.iter();
            while let Some(arg) = old.next() {
                if ["--port", "--api-port", "--peers"].contains(&arg.as_str()) {
                    old.next();
                } else {
                    args.push(arg.clone());
                }
            }
            self.args = args;
        }
        self.child = Self::spawn(&self.name, &self.data_dir, &self.place, &self.log, &self.args)?;
        Ok(())
    }

    /// While it was down, any connection of this machine may have got its ports.
    fn wait_for_ports(&self, ports: [&str; 2]) -> anyhow::Result<()> {
        // Nobody else is in a namespace, and nobody here can try.
        if self.place.space.is_some() {
            return Ok(());
        }
        in_the_end("its ports to be free", || {
            for port in ports {
                TcpListener::bind(format!("{}:{port}", self.place.listen))?;
            }
            Ok(())
        })
    }

    /// Asks it to stop as launchd would and returns its exit status.
    pub fn terminate(&mut self) -> anyhow::Result<Option<i32>> {
        let pid = self.child.id().to_string();
        Command::new("kill").args(["-TERM", &pid]).status()?;
        wait_for("the process to end", || Ok(self.child.try_wait()?.map(|status| status.code())))
    }

    /// Process ids of its runners.
    pub fn runners(&self) -> anyhow::Result<Vec<u32>> {
        children_named(self.child.id(), "exo-runner")
    }

    /// The end of its log.
    pub fn log_tail(&self) -> String {
        let text = self.log();
        let lines: Vec<_> = text.lines().collect();
        let tail = lines[lines.len().saturating_sub(40)..].join("\n");
        format!("\n--- {}\n{tail}\n", self.name)
    }
}

impl Drop for Exo {
    fn drop(&mut self) {
        // Already ended is fine. Runners end with their agent: their stdin closes.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Direct children of a process by command name, from `ps`, which Linux and macOS share.
fn children_named(parent: u32, name: &str) -> anyhow::Result<Vec<u32>> {
    let output = Command::new("ps").args(["-A", "-o", "pid=,ppid=,comm="]).output()?;
    let text = String::from_utf8(output.stdout)?;
    Ok(text
        .lines()
        .filter_map(|line| {
            let mut fields = line.split_whitespace();
            let (pid, ppid) = (fields.next()?.parse().ok()?, fields.next()?.parse::<u32>().ok()?);
            (ppid == parent && fields.next()?.ends_with(name)).then_some(pid)
        })
        .collect())
}
