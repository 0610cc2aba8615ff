//! Ranks that run by hand, and what they say when one of them does not come, is killed or stops.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

#[allow(dead_code, reason = "shared with other tests")]
#[path = "serve/model.rs"]
mod model;

use std::{
    fs::{self, File},
    io::{ErrorKind, Read as _, Write as _},
    net::SocketAddr,
    os::{fd::OwnedFd, unix::net::UnixStream},
    path::Path,
    process::{Child, Command, ExitStatus, Stdio},
    thread,
    time::{Duration, Instant},
};

use serde_json::{Value, json};
use tempfile::TempDir;

/// For what takes a second or two on an idle machine.
const LIMIT: Duration = Duration::from_secs(60);

struct Ranks {
    dir: TempDir,
    addresses: Vec<SocketAddr>,
}

struct Rank {
    child: Child,
    log: std::path::PathBuf,
}

impl Ranks {
    fn new(count: usize) -> Self {
        let dir = tempfile::tempdir().unwrap();
        model::write(dir.path(), &[]);
        let addresses = model::free_addresses(count);
        let hosts: Vec<_> = addresses.iter().map(|address| [address.to_string()]).collect();
        fs::write(dir.path().join("hosts.json"), json!(hosts).to_string()).unwrap();
        Self { dir, addresses }
    }

    /// A long answer, which rank 0 prints as it comes.
    fn start(&self, rank: usize, arguments: &[&str]) -> Rank {
        self.start_with(rank, "4000", Stdio::piped(), arguments)
    }

    fn start_with(&self, rank: usize, tokens: &str, out: Stdio, arguments: &[&str]) -> Rank {
        let log = self.dir.path().join(format!("log-{rank}"));
        let child = Command::new(env!("CARGO_BIN_EXE_exo-runner"))
            .args(["generate", "--prompt-ids", "1,2,3", "--max-tokens", tokens, "--model"])
            .arg(self.dir.path())
            .args(arguments)
            .env("MLX_RANK", rank.to_string())
            .env("MLX_HOSTFILE", self.dir.path().join("hosts.json"))
            .stdout(out)
            .stderr(File::create(&log).unwrap())
            .spawn()
            .unwrap();
        Rank { child, log }
    }

    /// Starts all and waits until the answer has begun.
    fn start_all(&self, arguments: &[&str]) -> Vec<Rank> {
        let mut ranks: Vec<_> =
            (0..self.addresses.len()).map(|rank| self.start(rank, arguments)).collect();
        let mut text = [0; 8];
        let began = ranks[0].child.stdout.as_mut().unwrap().read_exact(&mut text);
        assert!(began.is_ok(), "no answer: {}", ranks[0].log());
        ranks
    }

    /// What all together answer; one alone is in no group.
    fn answer(&self, arguments: &[&str]) -> Value {
        let start = |rank: usize| {
            let mut command = Command::new(env!("CARGO_BIN_EXE_exo-runner"));
            command.args(["generate", "--json", "--prompt-ids", "1,2,3", "--model"]);
            command.arg(self.dir.path()).args(arguments).stdout(Stdio::piped());
            if self.addresses.len() > 1 {
                command.env("MLX_RANK", rank.to_string());
                command.env("MLX_HOSTFILE", self.dir.path().join("hosts.json"));
            }
            command.spawn().unwrap()
        };
        let running: Vec<_> = (0..self.addresses.len()).map(start).collect();
        let ended = running.into_iter().map(|child| child.wait_with_output().unwrap());
        let outputs: Vec<_> = ended.collect();
        assert!(outputs.iter().all(|output| output.status.success()), "{outputs:?}");
        assert!(outputs[1..].iter().all(|output| output.stdout.is_empty()));
        serde_json::from_slice(&outputs[0].stdout).unwrap()
    }

    /// From now on these tokens end an answer.
    fn end_at(&self, tokens: &Value) {
        let path = self.dir.path().join("config.json");
        let mut config: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        config["eos_token_id"] = tokens.clone();
        fs::write(path, config.to_string()).unwrap();
    }

    /// As messages name it.
    fn name(&self, rank: usize) -> String {
        format!("rank {rank} ({})", self.addresses[rank])
    }
}

impl Rank {
    fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap()
    }

    fn signal(&self, name: &str) {
        let id = self.child.id().to_string();
        assert!(Command::new("kill").args(["-s", name, &id]).status().unwrap().success());
    }

    fn exit(&mut self) -> ExitStatus {
        let deadline = Instant::now() + LIMIT;
        // Nobody else reads on: the rank must not wait for that.
        drop(self.child.stdout.take());
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(Instant::now() < deadline, "it does not end: {}", self.log());
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// Waits for its failure; returns what it says.
    fn failure(&mut self) -> String {
        let status = self.exit();
        let log = self.log();
        assert_eq!(status.code(), Some(1), "{log}");
        log
    }
}

impl Drop for Rank {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Kills a rank in the middle of an answer; the others must end and say who is gone.
fn killed(count: usize, killed: usize, arguments: &[&str]) {
    let ranks = Ranks::new(count);
    let mut running = ranks.start_all(arguments);
    let began = Instant::now();
    running[killed].signal("KILL");
    for rank in (0..count).filter(|rank| *rank != killed) {
        let log = running[rank].failure();
        let beside = (rank + 1) % count == killed || (killed + 1) % count == rank;
        // Who is not beside the rank that was killed sees one that has ended for that.
        let gone = (0..count).any(|other| log.contains(&ranks.name(other)));
        let named = if beside { log.contains(&ranks.name(killed)) } else { gone };
        assert!(named, "rank {rank}: {log}");
        assert!(log.contains("gone"), "rank {rank}: {log}");
    }
    // Not by the limit on stalls, which is longer.
    assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
}

#[test]
fn a_rank_of_a_pipeline_that_is_killed_is_named_by_those_beside_it() {
    killed(3, 1, &[]);
    killed(4, 2, &[]);
}

#[test]
fn a_rank_of_a_team_that_is_killed_is_named_by_the_other() {
    killed(2, 1, &["--sharding", "tensor"]);
    killed(2, 0, &["--sharding", "tensor"]);
}

#[test]
fn a_rank_that_does_not_come_is_named() {
    let ranks = Ranks::new(3);
    let mut running: Vec<_> =
        (0..2).map(|rank| ranks.start(rank, &["--stall-limit", "3"])).collect();
    for rank in &mut running {
        let log = rank.failure();
        assert!(log.contains("forming the group of ranks made no progress for 3 s"), "{log}");
        assert!(log.contains(&ranks.name(2)), "{log}");
        assert!(log.contains("not connected"), "{log}");
    }
}

#[test]
fn a_rank_that_stops_is_not_waited_for_without_end() {
    let ranks = Ranks::new(2);
    let mut running = ranks.start_all(&["--stall-limit", "4"]);
    running[1].signal("STOP");
    let log = running[0].failure();
    assert!(log.contains("a step made no progress for 4 s"), "{log}");
    assert!(log.contains(&format!("{} does not answer", ranks.name(1))), "{log}");
}

/// Two ends of a stream. So much is under way in it that the next to write must wait until the other end reads.
fn full_stream() -> (UnixStream, UnixStream, usize) {
    let (reader, mut writer) = UnixStream::pair().unwrap();
    writer.set_nonblocking(true).unwrap();
    let mut under_way = 0;
    let full = loop {
        match writer.write(&[b'.'; 4096]) {
            Ok(written) => under_way += written,
            Err(error) => break error,
        }
    };
    assert_eq!(full.kind(), ErrorKind::WouldBlock);
    writer.set_nonblocking(false).unwrap();
    (reader, writer, under_way)
}

#[test]
fn a_reader_that_pauses_holds_up_no_rank() {
    let ranks = Ranks::new(2);
    let (mut reader, writer, under_way) = full_stream();
    let arguments = ["--stall-limit", "4"];
    let out = Stdio::from(OwnedFd::from(writer));
    let mut first = ranks.start_with(0, "50", out, &arguments);
    let mut other = ranks.start_with(1, "50", Stdio::null(), &arguments);
    // The answer comes to its end although nobody reads it.
    assert!(other.exit().success(), "{}", other.log());
    // Nor does the first rank end itself for that.
    let patience = Instant::now() + Duration::from_secs(6);
    while Instant::now() < patience {
        assert_eq!(first.child.try_wait().unwrap(), None, "{}", first.log());
        thread::sleep(Duration::from_millis(50));
    }
    let mut text = Vec::new();
    reader.read_to_end(&mut text).unwrap();
    assert!(first.exit().success(), "{}", first.log());
    let answer = text.split_off(under_way);
    assert!(answer.len() > 50 && answer.ends_with(b"\n"), "{answer:?}");
}

#[test]
fn a_host_file_that_is_missing_is_an_error() {
    let ranks = Ranks::new(2);
    fs::remove_file(Path::new(ranks.dir.path()).join("hosts.json")).unwrap();
    let log = ranks.start(0, &[]).failure();
    assert!(log.contains("the 'ring' group could not be formed"), "{log}");
}

/// Each rank begins a step before it knows whether there will be one: at the end all have begun the same.
#[test]
fn answers_are_the_same_on_any_number_of_ranks() {
    let greedy = ["--max-tokens", "12"];
    let drawn = ["--max-tokens", "12", "--temperature", "9", "--seed", "7", "--top-p", "0.99"];
    let answers = |count: usize, sharding: &[&str]| {
        let ranks = Ranks::new(count);
        let answer = |arguments: &[&str]| ranks.answer(&[arguments, sharding].concat());
        let mut found = vec![answer(&greedy), answer(&drawn)];
        let bias = format!("{}=-100", found[1]["tokens"][0]);
        let more = ["--frequency-penalty", "0.7", "--logprobs", "3", "--logit-bias", &bias];
        found.push(answer(&[&drawn[..], &more].concat()));
        // The answer ends where this token comes first.
        ranks.end_at(&json!([found[1]["tokens"][6]]));
        found.push(answer(&drawn));
        found
    };
    let alone = answers(1, &[]);
    assert_eq!(alone[3]["finish_reason"], "stop");
    assert_ne!(alone[1]["tokens"], alone[0]["tokens"]);
    assert_ne!(alone[2]["tokens"], alone[1]["tokens"]);
    for (count, sharding) in [(2, "pipeline"), (2, "tensor"), (4, "pipeline"), (4, "tensor")] {
        let found = answers(count, &["--sharding", sharding]);
        for (found, alone) in found.iter().zip(&alone) {
            assert_eq!(found["tokens"], alone["tokens"], "{sharding} on {count}");
            assert_eq!(found["finish_reason"], alone["finish_reason"], "{sharding} on {count}");
        }
        let tops = found[2]["logprobs"].as_array().unwrap();
        assert!(tops.len() == 12 && tops.iter().all(|t| t["top"].as_array().unwrap().len() == 3));
    }
}
