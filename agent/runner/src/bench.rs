//! `exo-runner bench`: how fast this machine, or several ranks together, run a model. Owns the measuring and the
//! printing; what it measures is the engine as it serves.

use std::io::{self, Write};
use std::ops::Range;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::ensure;
use exo_engine::distributed::Group;
use exo_engine::{DeviceTimes, Engine, LoadConfig, Sampling, Step, derive_shard_seed};
use serde::Serialize;

use crate::generate::{
    SEQUENCE, Sharding, ignore_broken_pipe, parse_layers, prefill, share, share_of,
};

/// Tokens decoded before the first measured round: kernels are compiled, clocks go up.
const WARM_UP_TOKENS: usize = 16;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Model folder in Hugging Face layout; no tokenizer is needed.
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
    /// Lengths of the prompts, one measurement each.
    #[arg(long, value_name = "N", value_delimiter = ',', default_value = "512")]
    prompt_tokens: Vec<usize>,
    /// Tokens to generate per round.
    #[arg(long, value_name = "N", default_value_t = 128)]
    max_tokens: usize,
    /// Rounds of each measurement; the medians are reported.
    #[arg(long, value_name = "N", default_value_t = 3)]
    rounds: usize,
    /// How ranks share the model.
    #[arg(long, value_enum, default_value_t = Sharding::Pipeline)]
    sharding: Sharding,
    /// Layers of this rank, from 0, the end not included. Without it the ranks split the layers evenly.
    #[arg(long, value_name = "A..B", value_parser = parse_layers)]
    layers: Option<Range<usize>>,
    /// Print one JSON object instead of a table.
    #[arg(long)]
    json: bool,
    /// Every rank prints, not the first alone.
    #[arg(long)]
    every_rank: bool,
}

#[derive(Serialize)]
struct Report {
    model_type: String,
    ranks: usize,
    /// Of this rank.
    weight_bytes: u64,
    load_s: f64,
    runs: Vec<Run>,
    /// The most that MLX has held on this rank.
    peak_memory_bytes: u64,
    /// The most memory that this process has had; null where the system does not say.
    peak_resident_bytes: Option<u64>,
}

/// Medians over the rounds.
#[derive(Serialize)]
struct Run {
    prompt_tokens: usize,
    max_tokens: usize,
    time_to_first_token_s: f64,
    prefill_tokens_per_s: f64,
    decode_tokens_per_s: f64,
    /// Of a decode step, the mean over a round.
    step_ms: StepMs,
}

#[derive(Clone, Copy, Serialize)]
struct StepMs {
    total: f64,
    /// Making the graph.
    build: f64,
    /// MLX's own work on the host: ordering the graph and encoding it.
    submit: f64,
    /// For the device, or for other ranks.
    wait: f64,
}

/// What one round took.
struct Round {
    first_token_s: f64,
    decode_s: f64,
    device: DeviceTimes,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<ExitCode> {
    ensure!(args.max_tokens > 1, "--max-tokens must be at least 2");
    ensure!(args.rounds > 0, "--rounds must be at least 1");
    ensure!(args.prompt_tokens.iter().all(|n| *n > 0), "--prompt-tokens must be at least 1");
    let group = Group::from_env()?;
    let (rank, ranks) = group.as_ref().map_or((0, 1), |g| (g.rank(), g.size()));
    let (layers, sharding) =
        share_of(&args.model, args.sharding, args.layers.as_ref(), rank, ranks)?;
    let config = LoadConfig {
        model_dir: args.model.clone(),
        layers,
        sharding,
        group: group.clone(),
        context_length: 0,
    };
    let started = Instant::now();
    let mut engine = Engine::load(&config, &mut |_| {})?;
    let load_s = started.elapsed().as_secs_f64();
    let runs: anyhow::Result<Vec<Run>> = args
        .prompt_tokens
        .iter()
        .map(|&length| measure(&mut engine, group.as_ref(), length, args))
        .collect();
    let report = Report {
        model_type: engine.info().model_type.clone(),
        ranks,
        weight_bytes: engine.info().weight_bytes,
        load_s,
        runs: runs?,
        peak_memory_bytes: engine.peak_memory_bytes(),
        peak_resident_bytes: peak_resident_bytes(),
    };
    if rank == 0 || args.every_rank {
        let text = if args.json { serde_json::to_string(&report)? } else { table(&report) };
        writeln!(io::stdout().lock(), "{text}").or_else(ignore_broken_pipe)?;
    }
    Ok(ExitCode::SUCCESS)
}

fn measure(
    engine: &mut Engine,
    group: Option<&Group>,
    length: usize,
    args: &Args,
) -> anyhow::Result<Run> {
    let (wanted, max_context) = (length + args.max_tokens, engine.info().max_context);
    ensure!(wanted <= max_context, "{wanted} tokens do not fit the context of {max_context}");
    let vocab_size = engine.info().vocab_size as u64;
    let token = |i: usize| (derive_shard_seed(0, 0, i as u64) % vocab_size) as u32;
    let prompt: Vec<u32> = (0..length).map(token).collect();
    round(engine, group, &prompt, args.max_tokens.min(WARM_UP_TOKENS))?;
    let rounds: anyhow::Result<Vec<Round>> =
        (0..args.rounds).map(|_| round(engine, group, &prompt, args.max_tokens)).collect();
    let rounds = rounds?;
    let steps = (args.max_tokens - 1) as f64;
    let median_of = |f: &dyn Fn(&Round) -> f64| median(rounds.iter().map(f).collect());
    let step_ms = |f: &dyn Fn(&Round) -> f64| median_of(f) * 1e3 / steps;
    let seconds = Duration::as_secs_f64;
    let first_token_s = median_of(&|r| r.first_token_s);
    let decode_s = median_of(&|r| r.decode_s);
    Ok(Run {
        prompt_tokens: length,
        max_tokens: args.max_tokens,
        time_to_first_token_s: first_token_s,
        prefill_tokens_per_s: length as f64 / first_token_s,
        decode_tokens_per_s: steps / decode_s,
        step_ms: StepMs {
            total: step_ms(&|r| r.decode_s),
            build: step_ms(&|r| r.decode_s - seconds(&r.device.submit) - seconds(&r.device.wait)),
            submit: step_ms(&|r| seconds(&r.device.submit)),
            wait: step_ms(&|r| seconds(&r.device.wait)),
        },
    })
}

/// Feeds the prompt and draws `max_tokens` likeliest tokens, whatever they are.
fn round(
    engine: &mut Engine,
    group: Option<&Group>,
    prompt: &[u32],
    max_tokens: usize,
) -> anyhow::Result<Round> {
    engine.open(SEQUENCE, &Sampling::greedy());
    let started = Instant::now();
    let drawn = prefill(engine, prompt)?;
    let mut token = share(group, drawn.as_ref())?;
    let first = Instant::now();
    DeviceTimes::take();
    let mut shared = Duration::ZERO;
    for draw in 1..max_tokens as u64 {
        let drawn = engine.step(&Step::Decode { seq: SEQUENCE, token, draw })?;
        let asked = Instant::now();
        token = share(group, drawn.as_ref())?;
        shared += asked.elapsed();
    }
    let decode_s = first.elapsed().as_secs_f64();
    let mut device = DeviceTimes::take();
    device.wait += shared;
    engine.close(SEQUENCE);
    Ok(Round { first_token_s: first.duration_since(started).as_secs_f64(), decode_s, device })
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    if values.len() % 2 == 1 {
        values[middle]
    } else {
        f64::midpoint(values[middle - 1], values[middle])
    }
}

/// `VmHWM`, which Linux has.
fn peak_resident_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib << 10)
}

fn table(report: &Report) -> String {
    let mib = |bytes: u64| bytes >> 20;
    let mut lines = vec![format!(
        "{}, {} rank(s), {} MiB of weights loaded in {:.1} s, peak {} MiB",
        report.model_type,
        report.ranks,
        mib(report.weight_bytes),
        report.load_s,
        mib(report.peak_memory_bytes),
    )];
    lines.push(format!(
        "{:>7} {:>12} {:>9} {:>12} {:>8} {:>8} {:>8} {:>8}",
        "PROMPT", "PREFILL/S", "FIRST MS", "DECODE/S", "STEP MS", "BUILD", "SUBMIT", "WAIT",
    ));
    for run in &report.runs {
        let step = run.step_ms;
        lines.push(format!(
            "{:>7} {:>12.1} {:>9.1} {:>12.1} {:>8.3} {:>8.3} {:>8.3} {:>8.3}",
            run.prompt_tokens,
            run.prefill_tokens_per_s,
            run.time_to_first_token_s * 1e3,
            run.decode_tokens_per_s,
            step.total,
            step.build,
            step.submit,
            step.wait,
        ));
    }
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_of_odd_and_even_counts() {
        assert_eq!(median(vec![3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(vec![4.0, 1.0, 2.0, 3.0]), 2.5);
    }
}
