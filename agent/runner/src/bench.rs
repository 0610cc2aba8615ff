//! `exo-runner bench`: how fast this machine, or several ranks together, run a model. Owns the measuring and the
//! printing; what it measures is the engine that serves, where prompts are fed in smaller parts.

use std::io::{self, Write};
use std::ops::Range;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use exo_engine::distributed::Group;
use exo_engine::{
    DeviceTimes, Engine, Feed, LoadConfig, Opening, Sampling, SeqId, StepPath, derive_shard_seed,
};
use serde::Serialize;

use crate::generate::{Sharding, parse_layers, prefill, share_of};
use crate::guard;
use crate::printer::ignore_broken_pipe;
use crate::step_path::{self, StepPathReport};

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
    /// Tokens to generate per round. Decoding is timed from the second to the last.
    #[arg(long, value_name = "N", default_value_t = 128)]
    max_tokens: usize,
    /// Sequences that are decoded together, one measurement each.
    #[arg(long, value_name = "B", value_delimiter = ',', default_value = "1")]
    batch: Vec<usize>,
    /// Rounds of each measurement; the medians are reported.
    #[arg(long, value_name = "N", default_value_t = 3)]
    rounds: usize,
    /// How ranks share the model.
    #[arg(long, value_enum, default_value_t = Sharding::Pipeline)]
    sharding: Sharding,
    /// Layers of this rank, from 0, the end not included. Without it the ranks split the layers evenly.
    #[arg(long, value_name = "A..B", value_parser = parse_layers)]
    layers: Option<Range<usize>>,
    /// With several ranks: give up when a step, or meeting the others, takes longer.
    #[arg(long, default_value_t = 300, value_name = "SECONDS")]
    stall_limit: u32,
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
    /// Of this rank.
    step_path: StepPathReport,
    runs: Vec<Run>,
    /// The most that MLX has held on this rank.
    peak_memory_bytes: u64,
    /// The most memory that this process has had; null where the system does not say.
    peak_resident_bytes: Option<u64>,
}

/// Medians over the rounds.
#[derive(Serialize)]
struct Run {
    /// Of each sequence.
    prompt_tokens: usize,
    /// Of each sequence.
    max_tokens: usize,
    /// Sequences decoded together.
    batch: usize,
    /// Of the first sequence; the prompts are fed one after the other.
    time_to_first_token_s: f64,
    /// Of all sequences, as the next.
    prefill_tokens_per_s: f64,
    /// From the second token to the last: behind the first, the device has nothing to do yet.
    decode_tokens_per_s: f64,
    /// Of a decode step, the mean over the same steps of a round.
    step_ms: StepMs,
}

#[derive(Clone, Copy, Serialize)]
struct StepMs {
    total: f64,
    /// Making the graph.
    build: f64,
    /// MLX's own work on the host: ordering the graph and encoding it. Includes waiting for a device that takes no
    /// more yet.
    submit: f64,
    /// For the device, or for other ranks.
    wait: f64,
    /// What `build` and `submit` took of the processor.
    host_cpu: f64,
}

/// What one round took.
struct Round {
    first_token_s: f64,
    prefill_s: f64,
    decode_s: f64,
    device: DeviceTimes,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<ExitCode> {
    ensure!(args.max_tokens > 2, "--max-tokens must be at least 3");
    ensure!(args.rounds > 0, "--rounds must be at least 1");
    ensure!(args.prompt_tokens.iter().all(|n| *n > 0), "--prompt-tokens must be at least 1");
    ensure!(args.batch.iter().all(|n| *n > 0), "--batch must be at least 1");
    guard::start(Duration::from_secs(args.stall_limit.into()))?;
    guard::watch("forming the group of ranks");
    let group = Group::from_env()?;
    let (rank, ranks) = group.as_ref().map_or((0, 1), |g| (g.rank(), g.size()));
    let (layers, sharding) =
        share_of(&args.model, args.sharding, args.layers.as_ref(), rank, ranks)?;
    let config =
        LoadConfig { model_dir: args.model.clone(), layers, sharding, group, context_length: 0 };
    let started = Instant::now();
    guard::watch_loading();
    let mut engine = Engine::load(&config, &mut |_| guard::watch_loading())?;
    let load_s = started.elapsed().as_secs_f64();
    let step_path = engine.info().step_path.clone();
    step_path::complain(&step_path, rank);
    let mut runs = Vec::new();
    for &length in &args.prompt_tokens {
        for &batch in &args.batch {
            runs.push(measure(&mut engine, length, batch, args)?);
        }
    }
    let report = Report {
        model_type: engine.info().model_type.clone(),
        ranks,
        weight_bytes: engine.info().weight_bytes,
        load_s,
        step_path: (&step_path).into(),
        runs,
        peak_memory_bytes: engine.peak_memory_bytes(),
        peak_resident_bytes: peak_resident_bytes(),
    };
    if rank == 0 || args.every_rank {
        let text = match args.json {
            true => serde_json::to_string(&report)?,
            false => table(&report, &step_path),
        };
        guard::rest();
        writeln!(io::stdout().lock(), "{text}").or_else(ignore_broken_pipe)?;
    }
    guard::watch("the last step");
    engine.finish();
    Ok(ExitCode::SUCCESS)
}

fn measure(engine: &mut Engine, length: usize, batch: usize, args: &Args) -> anyhow::Result<Run> {
    let (wanted, max_context) = (length + args.max_tokens, engine.info().max_context);
    ensure!(wanted <= max_context, "{wanted} tokens do not fit the context of {max_context}");
    let vocab_size = engine.info().vocab_size as u64;
    let token = |i: usize| (derive_shard_seed(0, 0, i as u64) % vocab_size) as u32;
    let prompt = |row: usize| (row * length..(row + 1) * length).map(token).collect();
    let prompts: Vec<Vec<u32>> = (0..batch).map(prompt).collect();
    round(engine, &prompts, args.max_tokens.min(WARM_UP_TOKENS))?;
    let rounds: anyhow::Result<Vec<Round>> =
        (0..args.rounds).map(|_| round(engine, &prompts, args.max_tokens)).collect();
    let rounds = rounds?;
    let steps = (args.max_tokens - 2) as f64;
    let median_of = |f: &dyn Fn(&Round) -> f64| median(rounds.iter().map(f).collect());
    let step_ms = |f: &dyn Fn(&Round) -> f64| median_of(f) * 1e3 / steps;
    let seconds = Duration::as_secs_f64;
    let rows = batch as f64;
    Ok(Run {
        prompt_tokens: length,
        max_tokens: args.max_tokens,
        batch,
        time_to_first_token_s: median_of(&|r| r.first_token_s),
        prefill_tokens_per_s: rows * length as f64 / median_of(&|r| r.prefill_s),
        decode_tokens_per_s: rows * steps / median_of(&|r| r.decode_s),
        step_ms: StepMs {
            total: step_ms(&|r| r.decode_s),
            build: step_ms(&|r| r.decode_s - seconds(&r.device.submit) - seconds(&r.device.wait)),
            submit: step_ms(&|r| seconds(&r.device.submit)),
            wait: step_ms(&|r| seconds(&r.device.wait)),
            host_cpu: step_ms(&|r| seconds(&r.device.computed)),
        },
    })
}

/// Feeds the prompts one after the other, then draws `max_tokens` likeliest tokens for each together, whatever they
/// are. Each of the steps that are timed begins the next one, as in the middle of an answer: one more is drawn behind
/// them, so that nothing is under way when the next round begins.
fn round(engine: &mut Engine, prompts: &[Vec<u32>], max_tokens: usize) -> anyhow::Result<Round> {
    let started = Instant::now();
    let (mut tokens, mut first_token_s) = (Vec::new(), 0.0);
    let (sampling, last_draw) = (Sampling::greedy(), max_tokens as u64);
    let opening = Opening { sampling, prompt: None, last_draw };
    for (seq, prompt) in (0..).zip(prompts) {
        engine.open(seq, &opening);
        let drawn = prefill(engine, seq, prompt)?;
        tokens.push(drawn.context("the engine drew no token")?.token);
        if seq == 0 {
            first_token_s = started.elapsed().as_secs_f64();
        }
    }
    let prefill_s = started.elapsed().as_secs_f64();
    step(engine, &mut tokens, 1)?;
    let second = Instant::now();
    DeviceTimes::take();
    for draw in 2..last_draw {
        step(engine, &mut tokens, draw)?;
    }
    let decode_s = second.elapsed().as_secs_f64();
    let device = DeviceTimes::take();
    step(engine, &mut tokens, last_draw)?;
    (0..prompts.len() as SeqId).for_each(|seq| engine.close(seq));
    Ok(Round { first_token_s, prefill_s, decode_s, device })
}

/// Feeds the `tokens` of all sequences, and draws the next in their place.
fn step(engine: &mut Engine, tokens: &mut Vec<u32>, draw: u64) -> anyhow::Result<()> {
    guard::watch("a step");
    let feed = |(seq, &token): (SeqId, &u32)| Feed { seq, token, draw };
    let feeds: Vec<Feed> = (0..).zip(tokens.iter()).map(feed).collect();
    let drawn = engine.decode(&feeds)?;
    ensure!(drawn.len() == feeds.len(), "the engine drew {} tokens", drawn.len());
    *tokens = drawn.iter().map(|output| output.token).collect();
    Ok(())
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

fn table(report: &Report, step_path: &StepPath) -> String {
    let mib = |bytes: u64| bytes >> 20;
    let mut lines = vec![format!(
        "{}, {} rank(s), {} MiB of weights loaded in {:.1} s, peak {} MiB",
        report.model_type,
        report.ranks,
        mib(report.weight_bytes),
        report.load_s,
        mib(report.peak_memory_bytes),
    )];
    lines.push(format!("steps of one sequence: {step_path}"));
    lines.push(format!(
        "{:>7} {:>6} {:>12} {:>9} {:>12} {:>8} {:>8} {:>8} {:>8} {:>8}",
        "PROMPT",
        "BATCH",
        "PREFILL/S",
        "FIRST MS",
        "DECODE/S",
        "STEP MS",
        "BUILD",
        "SUBMIT",
        "WAIT",
        "HOST CPU",
    ));
    for run in &report.runs {
        let step = run.step_ms;
        lines.push(format!(
            "{:>7} {:>6} {:>12.1} {:>9.1} {:>12.1} {:>8.3} {:>8.3} {:>8.3} {:>8.3} {:>8.3}",
            run.prompt_tokens,
            run.batch,
            run.prefill_tokens_per_s,
            run.time_to_first_token_s * 1e3,
            run.decode_tokens_per_s,
            step.total,
            step.build,
            step.submit,
            step.wait,
            step.host_cpu,
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
