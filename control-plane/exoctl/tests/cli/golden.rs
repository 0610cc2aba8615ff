//! Scripts: text files of commands and what they print, `golden/*.txt`.
//!
//! `$ exoctl …` is a command, `! …` a line on stderr, `? N` an exit status that isn't 0, everything
//! else a line on stdout. `@ …` has the test do something. Ages, times and ids are blotted out.
//! `EXO_BLESS=1` rewrites the scripts from what happens.

use std::{fmt::Write as _, fs, path::PathBuf};

use crate::cluster::Cluster;

fn golden(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/cli/golden").join(name)
}

async fn check(name: &str) {
    let script = fs::read_to_string(golden(name)).unwrap();
    let cluster = Cluster::start().await;
    for file in fs::read_dir(golden("files")).unwrap() {
        let file = file.unwrap();
        fs::copy(file.path(), cluster.dir.path().join(file.file_name())).unwrap();
    }
    let mut transcript = String::new();
    for line in script.lines() {
        if let Some(words) = line.strip_prefix("$ exoctl ") {
            let _ = writeln!(transcript, "{line}");
            run(&cluster, words, &mut transcript).await;
        } else if let Some(action) = line.strip_prefix("@ ") {
            let _ = writeln!(transcript, "{line}");
            match action {
                "create shards" => cluster.create_shards().await,
                "nodes report" => cluster.create_nodes().await,
                "shards move to mac-1" => cluster.move_shards("mac-1").await,
                "chat had events" => cluster.create_events("chat").await,
                "shards before had failed" => {
                    cluster.create_failure_event("llama-0-a0-0").await;
                    cluster.create_failure_event("chat-0-a2-1").await;
                }
                "chat is ready" => cluster.set_ready("chat", true).await,
                "chat is not ready" => cluster.set_ready("chat", false).await,
                "chat is starting" => cluster.set_starting("chat").await,
                "chat has failed for now" => cluster.fail("chat", false).await,
                "chat has failed for good" => cluster.fail("chat", true).await,
                other => panic!("{name}: no such action: {other}"),
            }
        } else if line.starts_with('#') || line.is_empty() {
            let _ = writeln!(transcript, "{line}");
        }
    }
    if std::env::var_os("EXO_BLESS").is_some() {
        fs::write(golden(name), transcript).unwrap();
    } else {
        // Empty lines are for the reader; those that commands print are lost on them as well.
        let lines = |text: &str| -> Vec<String> {
            text.lines().filter(|l| !l.is_empty()).map(str::to_owned).collect()
        };
        let (happened, expected) = (lines(&transcript), lines(&script));
        for (i, (happened, expected)) in happened.iter().zip(&expected).enumerate() {
            assert_eq!(happened, expected, "{name}, after:\n{}", expected_before(&script, i));
        }
        assert_eq!(happened.len(), expected.len(), "{name} has more or fewer lines");
    }
}

/// The few lines before line `i`, empty ones not counted.
fn expected_before(script: &str, i: usize) -> String {
    let lines: Vec<&str> = script.lines().filter(|l| !l.is_empty()).collect();
    lines[i.saturating_sub(8)..i].join("\n")
}

async fn run(cluster: &Cluster, words: &str, transcript: &mut String) {
    let (words, input) = match words.split_once(" < ") {
        Some((words, file)) => (words, fs::read_to_string(cluster.dir.path().join(file)).unwrap()),
        None => (words, String::new()),
    };
    let args = split(words);
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let output = cluster.run_with_input(&args, &input).await;
    let dir = cluster.dir.path().display().to_string();
    for line in output.stdout.lines() {
        let _ = writeln!(transcript, "{}", blot(line, &dir));
    }
    for line in output.stderr.lines() {
        let _ = writeln!(transcript, "! {}", blot(line, &dir));
    }
    if output.code != 0 {
        let _ = writeln!(transcript, "? {}", output.code);
    }
}

/// Words as a shell splits them: spaces between braces belong to a word, for templates' sake.
fn split(line: &str) -> Vec<String> {
    let mut words = vec![String::new()];
    let mut depth = 0_u32;
    for c in line.chars() {
        match c {
            '{' => depth += 1,
            '}' => depth = depth.saturating_sub(1),
            _ => {}
        }
        match (c, words.last_mut()) {
            (' ', _) if depth == 0 => words.push(String::new()),
            (c, Some(word)) => word.push(c),
            (_, None) => {}
        }
    }
    words.retain(|word| !word.is_empty());
    words
}

/// Takes out what differs from run to run.
fn blot(line: &str, dir: &str) -> String {
    let line = line.replace(dir, "DIR");
    let word = |word: &str| {
        let bare = word.trim_matches(['"', ',', '\'', '(', ')']);
        let is_age = |w: &str| {
            let digits = w.trim_end_matches('s');
            w.ends_with('s') && !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit())
        };
        let is_time = bare.len() >= 20 && bare.ends_with('Z') && bare.as_bytes()[4] == b'-';
        let is_version = bare.starts_with("v1.") && bare.contains('+');
        let is_id = bare.len() == 36 && bare.matches('-').count() == 4;
        let mark = match () {
            () if is_age(bare) => "AGE",
            () if is_time => "TIME",
            () if is_id => "UID",
            () if is_version => "VERSION",
            () => return word.to_owned(),
        };
        word.replace(bare, mark)
    };
    let mut line = line.split(' ').map(word).collect::<Vec<_>>().join(" ");
    if let Some(at) = line.find("esourceVersion") {
        line.truncate(at + "esourceVersion".len());
    }
    // Columns after an age move with it.
    match line.split_once("AGE  ") {
        Some((before, after)) => format!("{before}AGE   {}", after.trim_start()),
        None => line,
    }
}

#[tokio::test]
async fn resources() {
    check("resources.txt").await;
}

#[tokio::test]
async fn changes() {
    check("changes.txt").await;
}

#[tokio::test]
async fn reads() {
    check("reads.txt").await;
}

#[tokio::test]
async fn nodes() {
    check("nodes.txt").await;
}

#[tokio::test]
async fn completion() {
    check("completion.txt").await;
}

#[tokio::test]
async fn tables() {
    check("tables.txt").await;
}

#[tokio::test]
async fn mistakes() {
    check("mistakes.txt").await;
}

#[tokio::test]
async fn waiting() {
    check("waiting.txt").await;
}
