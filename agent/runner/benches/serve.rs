//! How fast one answer comes out of `exo-runner serve`, beside what `exo-runner bench` says of the same engine:
//! `cargo bench -p exo-runner --bench serve -- FOLDER…`. The two take turns, for machines change their speed. Prints one line
//! per model; measures, asserts nothing.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a measurement prints or panics")]

#[allow(dead_code, reason = "shared with tests")]
#[path = "../tests/serve/client.rs"]
mod client;
#[allow(dead_code, reason = "shared with tests")]
#[path = "../tests/serve/model.rs"]
mod model;
#[allow(dead_code, reason = "shared with tests")]
#[path = "../tests/serve/process.rs"]
mod process;

use std::{fs, path::Path, process::Command};

use exo_crds::generate::GenerateEvent;
use serde_json::{Value, json};

use client::Client;
use process::{Group, binary};

const TURNS: usize = 5;
const PROMPT_TOKENS: u32 = 64;
const MAX_TOKENS: u32 = 256;

fn main() {
    let folders = std::env::args().skip(1).filter(|argument| !argument.starts_with("--"));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    for folder in folders {
        let (mut alone, mut served) = (Vec::new(), Vec::new());
        for _ in 0..TURNS {
            alone.push(engine_speed(Path::new(&folder)));
            served.push(runtime.block_on(served_speed(Path::new(&folder))));
        }
        let (alone, served) = (median(alone), median(served));
        println!(
            "{folder}: bench {alone:.1} tokens/s, serve {served:.1}, {:.3} of it",
            served / alone
        );
    }
}

fn engine_speed(folder: &Path) -> f64 {
    let (prompt, most) = (PROMPT_TOKENS.to_string(), MAX_TOKENS.to_string());
    let output = Command::new(binary())
        .args(["bench", "--json", "--rounds", "3"])
        .args(["--prompt-tokens", &prompt, "--max-tokens", &most, "--model"])
        .arg(folder)
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    report["runs"][0]["decode_tokens_per_s"].as_f64().unwrap()
}

/// As rank 0 itself measures it, from the first token to the last; `bench` begins with the second.
async fn served_speed(folder: &Path) -> f64 {
    let config: Value =
        serde_json::from_slice(&fs::read(folder.join("config.json")).unwrap()).unwrap();
    let layers = config["num_hidden_layers"].as_u64().unwrap();
    let group = Group::new(1, folder, u32::try_from(layers).unwrap());
    let _runner = group.start_all();
    let client = Client::new(&group.tls, group.serve);
    let tokens: Vec<u32> = (0..PROMPT_TOKENS).collect();
    let request = json!({"id": "r", "prompt": {"tokens": tokens}, "max_tokens": MAX_TOKENS,
                         "sampling": {"temperature": 0.0}});
    let mut speeds = Vec::new();
    // The first is a warm-up.
    for _ in 0..4 {
        let mut stream = client.stream(&request).await;
        let end = loop {
            match stream.next().await.expect("an end") {
                GenerateEvent::End { decode_tokens_per_s, completion_tokens, .. } => {
                    assert_eq!(completion_tokens, MAX_TOKENS);
                    break decode_tokens_per_s;
                }
                GenerateEvent::Error { message, .. } => panic!("{message}"),
                _ => {}
            }
        };
        speeds.push(end);
    }
    median(speeds.split_off(1))
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}
