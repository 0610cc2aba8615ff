//! `exo` as a process: what it refuses, what it says, what it lets web pages do.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::TcpStream,
    path::Path,
    process::{Child, Command, Output, Stdio},
};

use serde_json::Value;

fn exo(dir: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_exo"));
    command
        .args(["--no-agent", "--name", "mac-1", "--listen", "127.0.0.1"])
        .args(["--port", "0", "--api-port", "0", "--data-dir"])
        .arg(dir)
        .env_remove("EXO_LOG")
        .env_remove("EXO_HOME");
    command
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn a_misspelled_log_directive_is_a_usage_error() {
    let dir = tempfile::tempdir().unwrap();
    for (directive, needle) in [("inof", "`inof`"), ("info,exo_store=debg", "`exo_store=debg`")] {
        let output = exo(dir.path()).env("EXO_LOG", directive).output().unwrap();
        assert_eq!(output.status.code(), Some(2), "{}", stderr(&output));
        assert!(stderr(&output).contains(needle), "{}", stderr(&output));
    }
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0, "nothing was written");
}

#[test]
fn a_file_is_refused_as_data_directory() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let output = exo(file.path()).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let text = stderr(&output);
    assert!(
        text.contains(&file.path().display().to_string()) && text.contains("is a file"),
        "{text}"
    );
    assert!(text.contains("--data-dir"), "{text}");
}

/// A running one; ended on drop.
struct Running {
    child: Child,
    /// `127.0.0.1:PORT` of the gateway.
    gateway: String,
    /// `HOST:PORT` that other nodes are told.
    join: String,
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Starts it and waits for its banner.
fn start(mut command: Command) -> Running {
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let mut value = |name: &str| loop {
        let line = lines.next().expect("the banner comes before the end").unwrap();
        if let Some(value) = line.trim().strip_prefix(name) {
            break value.split_whitespace().next().unwrap_or_default().to_owned();
        }
    };
    let gateway =
        value("OpenAI API").trim_start_matches("http://").trim_end_matches("/v1").to_owned();
    let join = value("join         exo --peers");
    Running { child, gateway, join }
}

/// The head of the answer to a request that a page of `origin` makes.
fn ask(running: &Running, origin: &str) -> String {
    let mut stream = TcpStream::connect(&running.gateway).unwrap();
    let request = format!(
        "GET /v1/models HTTP/1.1\r\nHost: {}\r\nOrigin: {origin}\r\nConnection: close\r\n\r\n",
        running.gateway
    );
    stream.write_all(request.as_bytes()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer.split("\r\n\r\n").next().unwrap_or_default().to_lowercase()
}

#[test]
fn a_node_that_is_named_localhost_is_told_to_others_by_an_address_of_the_network() {
    let dir = tempfile::tempdir().unwrap();
    let node = |name: &str, args: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_exo"));
        command
            .args(["--no-agent", "--port", "0", "--api-port", "0", "--name", name, "--data-dir"])
            .arg(dir.path().join(name))
            .args(args)
            .env_remove("EXO_LOG")
            .env_remove("EXO_HOME");
        start(command)
    };
    let host = |running: &Running| running.join.rsplit_once(':').unwrap().0.to_owned();
    let by_localhost = |peer: &Running| {
        let (_, port) = peer.join.rsplit_once(':').unwrap();
        format!("localhost:{port}")
    };
    // Of a machine without a network all addresses are loopback.
    let first = node("first", &[]);
    let second = node("second", &["--peers", &by_localhost(&first)]);
    assert_eq!(host(&second), host(&first));
    // Where the first one is for this machine alone, so is the second.
    let alone = node("alone", &["--listen", "127.0.0.1"]);
    let beside = node("beside", &["--peers", &by_localhost(&alone)]);
    assert_eq!(host(&beside), "127.0.0.1");
}

#[test]
fn only_pages_of_allowed_origins_reach_the_gateway() {
    let dir = tempfile::tempdir().unwrap();
    let mut command = exo(dir.path());
    command.args(["--allow-origin", "https://chat.example.org,app://desk"]);
    let running = start(command);
    for (origin, allowed) in
        [("https://chat.example.org", true), ("app://desk", true), ("https://example.org", false)]
    {
        let head = ask(&running, origin);
        assert_eq!(head.starts_with("http/1.1 200"), allowed, "{head}");
        let header = format!("access-control-allow-origin: {origin}");
        assert_eq!(head.contains(&header), allowed, "{head}");
    }
}

#[test]
fn the_log_is_in_our_own_words() {
    let dir = tempfile::tempdir().unwrap();
    let mut command = exo(dir.path());
    command.args(["--log-format", "json"]);
    let mut running = start(command);
    let pid = running.child.id().to_string();
    assert!(Command::new("kill").args(["-TERM", &pid]).status().unwrap().success());
    let mut log = String::new();
    running.child.stderr.take().unwrap().read_to_string(&mut log).unwrap();
    assert!(running.child.wait().unwrap().success(), "{log}");
    assert!(log.contains("stopping"), "{log}");
    for line in log.lines() {
        let entry: Value = serde_json::from_str(line).unwrap_or_else(|_| panic!("{line}"));
        assert!(entry["target"].as_str().unwrap().starts_with("exo"), "{line}");
        let fields = entry["fields"].to_string();
        for debug in ["Some(", "Error {", "Error(", "None"] {
            assert!(!fields.contains(debug), "{line}");
        }
    }
}
