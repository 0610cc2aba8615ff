//! kubectl, run against a server of this process.

use std::{
    ffi::OsString,
    path::PathBuf,
    process::{Output, Stdio},
    time::Duration,
};

use axum::http::Method;
use serde_json::Value;
use tempfile::TempDir;
use tokio::{
    io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader, Lines},
    process::{Child, ChildStdout, Command},
    time::timeout,
};

use crate::{
    serve,
    support::{self, Server},
};

/// Every wait ends as soon as what it waits for is there.
pub(crate) const LIMIT: Duration = Duration::from_secs(60);

pub(crate) struct Kubectl {
    pub(crate) dir: TempDir,
    config: PathBuf,
}

/// Another one than the first on the path, where `EXO_KUBECTL` names it.
fn program() -> OsString {
    std::env::var_os("EXO_KUBECTL").unwrap_or_else(|| "kubectl".into())
}

/// A server with its kubectl; `None` without kubectl.
pub(crate) async fn start() -> Option<(Server, Kubectl)> {
    if Command::new(program()).arg("--help").output().await.is_err() {
        assert!(std::env::var_os("CI").is_none(), "kubectl is missing in CI");
        eprintln!("there is no kubectl here: nothing is tested");
        return None;
    }
    let server = support::start();
    let (address, _) = serve::listen(server.router.clone()).await;
    let dir = TempDir::new().unwrap();
    let config = dir.path().join("kubeconfig");
    let text = format!(
        "apiVersion: v1\nkind: Config\ncurrent-context: c\n\
         clusters: [{{name: c, cluster: {{server: 'http://{address}'}}}}]\n\
         contexts: [{{name: c, context: {{cluster: c, user: c}}}}]\n\
         users: [{{name: c, user: {{}}}}]\n"
    );
    std::fs::write(&config, text).unwrap();
    Some((server, Kubectl { dir, config }))
}

impl Kubectl {
    pub(crate) fn command(&self, args: &str) -> Command {
        let mut command = Command::new(program());
        command
            .arg("--kubeconfig")
            .arg(&self.config)
            .arg(format!("--cache-dir={}", self.dir.path().join("cache").display()))
            .args(args.split(' '))
            .env("HOME", self.dir.path())
            .kill_on_drop(true);
        command
    }

    pub(crate) async fn run(&self, args: &str, input: &str) -> Output {
        let mut child = self
            .command(args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        child.stdin.take().unwrap().write_all(input.as_bytes()).await.unwrap();
        let output = timeout(LIMIT, child.wait_with_output()).await;
        output.unwrap_or_else(|_| panic!("kubectl {args} hangs")).unwrap()
    }

    /// kubectl 1.27 and later leave validation to the server and explain by OpenAPI 3.
    pub(crate) async fn is_recent(&self) -> bool {
        self.minor().await >= 27
    }

    /// kubectl 1.28 and later know the review of oneself that is no beta.
    pub(crate) async fn knows_itself(&self) -> bool {
        self.minor().await >= 28
    }

    /// Its own version is 1 point this.
    pub(crate) async fn minor(&self) -> u32 {
        let version = self.ok("version --client -o json", "").await;
        let version: serde_json::Value = serde_json::from_str(&version).unwrap();
        let minor = version["clientVersion"]["minor"].as_str().unwrap();
        minor.trim_end_matches('+').parse().unwrap()
    }

    /// What a successful command prints.
    pub(crate) async fn ok(&self, args: &str, input: &str) -> String {
        let output = self.run(args, input).await;
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "kubectl {args}: {error}");
        String::from_utf8(output.stdout).unwrap()
    }

    /// What a failing command complains.
    pub(crate) async fn fails(&self, args: &str, input: &str) -> String {
        let output = self.run(args, input).await;
        assert!(!output.status.success(), "kubectl {args} succeeds");
        String::from_utf8(output.stderr).unwrap()
    }
}

/// What a command that goes on prints, line by line. It ends when dropped.
pub(crate) struct Running {
    _child: Child,
    lines: Lines<BufReader<ChildStdout>>,
}

impl Running {
    pub(crate) fn start(kubectl: &Kubectl, args: &str) -> Self {
        let mut child = kubectl.command(args).stdout(Stdio::piped()).spawn().unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        Self { _child: child, lines }
    }

    pub(crate) async fn line(&mut self) -> String {
        let line = timeout(LIMIT, self.lines.next_line()).await;
        line.expect("kubectl prints something").unwrap().expect("kubectl goes on")
    }
}

/// Creates an object without kubectl.
pub(crate) async fn post(server: &Server, path: &str, object: Value) {
    let (code, body) = server.call(Method::POST, path, Some(object)).await;
    assert_eq!(code.as_u16(), 201, "{body}");
}
