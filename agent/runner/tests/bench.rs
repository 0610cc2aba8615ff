//! `exo-runner bench`, as people and scripts read it.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

#[allow(dead_code, reason = "shared with other tests")]
#[path = "serve/model.rs"]
mod model;

use std::process::Command;

use serde_json::{Value, json};

fn bench(arguments: &[&str]) -> String {
    let dir = tempfile::tempdir().unwrap();
    model::write(dir.path(), &[]);
    let output = Command::new(env!("CARGO_BIN_EXE_exo-runner"))
        .args(["bench", "--rounds", "1", "--max-tokens", "9", "--model"])
        .arg(dir.path())
        .args(arguments)
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn each_prompt_is_measured_with_each_batch() {
    let arguments = ["--prompt-tokens", "20,300", "--batch", "1,4,16", "--json"];
    let report: Value = serde_json::from_str(&bench(&arguments)).unwrap();
    // Tests have no NVIDIA GPU.
    let path = &report["step_path"];
    assert_eq!((&path["own_kernels_layers"], &path["fallback"]), (&json!(0), &json!(false)));
    assert_eq!(path["reason"], "MLX computes on no NVIDIA GPU here");
    let runs = report["runs"].as_array().unwrap();
    let shapes: Vec<_> = (runs.iter())
        .map(|run| (run["prompt_tokens"].as_u64().unwrap(), run["batch"].as_u64().unwrap()))
        .collect();
    assert_eq!(shapes, [(20, 1), (20, 4), (20, 16), (300, 1), (300, 4), (300, 16)]);
    for run in runs {
        let number = |value: &Value| value.as_f64().filter(|n| *n > 0.0).unwrap();
        let step = &run["step_ms"];
        let total = number(&step["total"]);
        // Every row of a step is a token.
        let expect = number(&run["batch"]) * 1e3 / total;
        let found = number(&run["decode_tokens_per_s"]);
        assert!((found / expect - 1.0).abs() < 1e-6, "{run}");
        let parts = ["build", "submit", "wait"].map(|part| step[part].as_f64().unwrap());
        assert!(parts.iter().all(|part| *part >= 0.0), "{run}");
        assert!((parts.iter().sum::<f64>() / total - 1.0).abs() < 1e-6, "{run}");
        // The first of the prompts is not waited for longer than for all.
        let all = number(&run["batch"]) * number(&run["prompt_tokens"]);
        let all_s = all / number(&run["prefill_tokens_per_s"]);
        assert!(number(&run["time_to_first_token_s"]) <= all_s, "{run}");
    }
}

#[test]
fn the_table_has_a_line_for_each() {
    let table = bench(&["--prompt-tokens", "20", "--batch", "1,4"]);
    let lines: Vec<Vec<&str>> = table.lines().map(|l| l.split_whitespace().collect()).collect();
    assert_eq!(lines.len(), 5, "{table}");
    assert_eq!(lines[1][..4], ["steps", "of", "one", "sequence:"]);
    assert_eq!(lines[2][..2], ["PROMPT", "BATCH"]);
    assert_eq!((&lines[3][..2], &lines[4][..2]), (&["20", "1"][..], &["20", "4"][..]));
}
