//! `exo-runner generate`: one prompt, one answer, on one rank or several. Owns the loop and the printing; all ranks
//! run the same loop in lock-step: the engine tells each of them every token. With `--more`, one such answer after the
//! other.

use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, anyhow, bail, ensure};
use clap::{Parser, ValueEnum};
use exo_crds::generate::SamplingParams;
use exo_engine::distributed::Group;
use exo_engine::text::{ChatInput, ChatTemplate, Detokenizer, Tokenizer};
use exo_engine::{
    Engine, LoadConfig, NoKernels, Opening, Sampling, SeqId, Step, StepOutput, StepPath,
};
use serde::Serialize;

use crate::printer::Printer;
use crate::step_path::{self, StepPathReport};
use crate::{guard, sampling};

/// Prompt tokens fed at a time: enough to fill any device, few enough to bound temporary memory.
const PREFILL_CHUNK: usize = 2048;

const SEQUENCE: SeqId = 0;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Model folder in Hugging Face layout.
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
    #[command(flatten)]
    prompt: Prompt,
    /// Most tokens to generate.
    #[arg(long, default_value_t = 256, value_name = "N")]
    max_tokens: usize,
    #[command(flatten)]
    sampling: SamplingArgs,
    /// How ranks share the model.
    #[arg(long, value_enum, default_value_t = Sharding::Pipeline)]
    sharding: Sharding,
    /// Layers of this rank, from 0, the end not included. Without it the ranks split the layers evenly.
    #[arg(long, value_name = "A..B", value_parser = parse_layers)]
    layers: Option<Range<usize>>,
    /// Report the log-probability of each token and of the K likeliest.
    #[arg(long, value_name = "K")]
    logprobs: Option<u32>,
    /// Print one JSON object at the end instead of text as it comes.
    #[arg(long)]
    json: bool,
    /// Then answer what comes on standard input: arguments as for this command, a JSON list of texts in each line. The
    /// ranks stay together, also for another model.
    #[arg(long, requires = "json")]
    more: bool,
    /// With several ranks: give up when a step, or meeting the others, takes longer.
    #[arg(long, default_value_t = 300, value_name = "SECONDS")]
    stall_limit: u32,
}

#[derive(clap::Args)]
#[group(required = true, multiple = false)]
struct Prompt {
    /// Text to continue.
    #[arg(long, value_name = "TEXT")]
    prompt: Option<String>,
    /// Token ids to continue; no tokenizer is needed.
    #[arg(long, value_name = "IDS", value_delimiter = ',')]
    prompt_ids: Option<Vec<u32>>,
    /// A user's message to answer.
    #[arg(long, value_name = "TEXT")]
    chat: Option<String>,
}

#[derive(clap::Args)]
struct SamplingArgs {
    /// 0 takes the likeliest token always.
    #[arg(long, default_value_t = 0.0, value_name = "T")]
    temperature: f32,
    /// Draw among so many of the likeliest tokens; 0 for all.
    #[arg(long, default_value_t = 0, value_name = "K")]
    top_k: u32,
    /// Draw among the likeliest tokens that have this probability together.
    #[arg(long, default_value_t = 1.0, value_name = "P")]
    top_p: f32,
    /// Draw among tokens at least this share as likely as the likeliest.
    #[arg(long, default_value_t = 0.0, value_name = "P")]
    min_p: f32,
    /// Divides the logits of tokens that occurred; 1 for none.
    #[arg(long, default_value_t = 1.0, value_name = "X")]
    repetition_penalty: f32,
    /// Taken from the logits of tokens of the answer.
    #[arg(long, default_value_t = 0.0, value_name = "X", allow_negative_numbers = true)]
    presence_penalty: f32,
    /// Taken from the logits of tokens of the answer for each time they occurred.
    #[arg(long, default_value_t = 0.0, value_name = "X", allow_negative_numbers = true)]
    frequency_penalty: f32,
    /// Added to a token's logit; may be given several times.
    #[arg(long, value_name = "ID=X", value_parser = parse_bias)]
    logit_bias: Vec<(u32, f32)>,
    #[arg(long, default_value_t = 0, value_name = "S")]
    seed: u64,
}

impl SamplingArgs {
    /// The checked sampling for a vocabulary of this size.
    fn read(&self, logprobs: Option<u32>, vocab_size: usize) -> anyhow::Result<Sampling> {
        let params = SamplingParams {
            temperature: self.temperature,
            top_k: self.top_k,
            top_p: self.top_p,
            min_p: self.min_p,
            repetition_penalty: self.repetition_penalty,
            presence_penalty: self.presence_penalty,
            frequency_penalty: self.frequency_penalty,
            logit_bias: self.logit_bias.iter().copied().collect(),
            seed: self.seed,
        };
        let sampling = sampling::check(params, vocab_size).map_err(|refusal| {
            anyhow!("--{}: {}", refusal.field.replace('_', "-"), refusal.reason)
        })?;
        Ok(Sampling { logprobs, ..sampling })
    }
}

fn parse_bias(text: &str) -> Result<(u32, f32), String> {
    let pair = text.split_once('=').and_then(|(id, x)| Some((id.parse().ok()?, x.parse().ok()?)));
    pair.ok_or_else(|| "expected ID=X, as in 13=-5".to_owned())
}

#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum Sharding {
    /// Each rank holds a run of layers.
    Pipeline,
    /// Each rank holds a part of every layer.
    Tensor,
}

pub(crate) fn parse_layers(text: &str) -> Result<Range<usize>, String> {
    let range = text.split_once("..").and_then(|(a, b)| Some(a.parse().ok()?..b.parse().ok()?));
    range
        .filter(|range| range.start < range.end)
        .ok_or_else(|| "expected A..B with A < B, as in 0..16".to_owned())
}

#[derive(Serialize)]
struct Report {
    tokens: Vec<u32>,
    /// Null when the model folder has no tokenizer.
    text: Option<String>,
    finish_reason: &'static str,
    prompt_tokens: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    logprobs: Option<Vec<TokenLogprob>>,
    time_to_first_token_s: f64,
    /// From the first to the last token; null when there are fewer than two.
    decode_tokens_per_s: Option<f64>,
    peak_memory_bytes: u64,
    /// Of the first rank.
    step_path: StepPathReport,
}

#[derive(Serialize)]
struct TokenLogprob {
    #[serde(flatten)]
    own: Logprob,
    top: Vec<Logprob>,
}

#[derive(Serialize)]
struct Logprob {
    token: u32,
    logprob: f32,
}

/// What `--more` reads.
#[derive(Parser)]
#[command(no_binary_name = true)]
struct Line {
    #[command(flatten)]
    args: Args,
}

impl Line {
    fn parse(line: &str) -> anyhow::Result<Args> {
        let arguments: Vec<String> =
            serde_json::from_str(line).context("expected a JSON list of arguments")?;
        Ok(Self::try_parse_from(arguments)?.args)
    }
}

pub(crate) fn run(args: &Args) -> anyhow::Result<ExitCode> {
    guard::start(Duration::from_secs(args.stall_limit.into()))?;
    guard::watch("forming the group of ranks");
    let group = Group::from_env()?;
    if let Some(group) = &group {
        group.self_test()?;
    }
    answer(args, group.as_ref())?;
    if args.more {
        guard::rest();
        for line in io::stdin().lines() {
            answer(&Line::parse(&line?)?, group.as_ref())?;
            guard::rest();
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn answer(args: &Args, group: Option<&Group>) -> anyhow::Result<()> {
    ensure!(args.max_tokens > 0, "--max-tokens must be at least 1");
    let (rank, size) = group.map_or((0, 1), |g| (g.rank(), g.size()));
    let (layers, sharding) =
        share_of(&args.model, args.sharding, args.layers.as_ref(), rank, size)?;
    let tokenizer = match args.prompt.prompt_ids {
        Some(_) if !args.model.join("tokenizer.json").exists() => None,
        _ => Some(Tokenizer::load(&args.model)?),
    };
    let prompt = prompt_tokens(args, tokenizer.as_ref())?;
    let config = LoadConfig {
        model_dir: args.model.clone(),
        layers,
        sharding,
        group: group.cloned(),
        context_length: 0,
    };
    guard::watch_loading();
    let mut engine = Engine::load(&config, &mut |_| guard::watch_loading())?;
    say_path(&engine.info().step_path, rank, args.json);
    let printer = (rank == 0).then(Printer::start).transpose()?;
    let output = Output { tokenizer: tokenizer.as_ref(), printer, json: args.json };
    let report = generate(args, &mut engine, &prompt, &output)?;
    output.finish(&report)?;
    guard::watch("the last step");
    engine.finish();
    guard::rest();
    Ok(())
}

/// Tells people, on a machine where there could be kernels of our own, whether they are used.
fn say_path(path: &StepPath, rank: usize, json: bool) {
    step_path::complain(path, rank);
    let is_news = path.fallback().is_none() && *path != StepPath::Operations(NoKernels::NoGpu);
    if is_news && rank == 0 && !json {
        eprintln!("steps: {path}");
    }
}

/// The layers of `rank` of `size`: those asked for, or an even share.
pub(crate) fn share_of(
    model: &Path,
    sharding: Sharding,
    layers: Option<&Range<usize>>,
    rank: usize,
    size: usize,
) -> anyhow::Result<(Range<usize>, exo_engine::Sharding)> {
    match (sharding, layers) {
        (Sharding::Pipeline, Some(layers)) => Ok((layers.clone(), exo_engine::Sharding::Pipeline)),
        (Sharding::Pipeline, None) => {
            let layers = even_share(count_layers(model)?, rank, size)?;
            Ok((layers, exo_engine::Sharding::Pipeline))
        }
        (Sharding::Tensor, None) => Ok((0..count_layers(model)?, exo_engine::Sharding::Tensor)),
        (Sharding::Tensor, Some(_)) => {
            bail!("--layers does not go with --sharding tensor: every rank has all layers")
        }
    }
}

/// `config.json`'s number of layers: needed before the engine reads the folder.
fn count_layers(model: &Path) -> anyhow::Result<usize> {
    let path = model.join("config.json");
    let text = std::fs::read(&path).with_context(|| format!("can't read {}", path.display()))?;
    let config: serde_json::Value = serde_json::from_slice(&text)
        .with_context(|| format!("{} is not valid", path.display()))?;
    let layers = config.get("num_hidden_layers").and_then(serde_json::Value::as_u64);
    layers.map(|n| n as usize).with_context(|| format!("{}: no num_hidden_layers", path.display()))
}

/// The layers of `rank` when `size` ranks split them; earlier ranks take what does not divide.
fn even_share(layers: usize, rank: usize, size: usize) -> anyhow::Result<Range<usize>> {
    ensure!(layers >= size, "{layers} layers are too few for {size} ranks");
    let (each, rest) = (layers / size, layers % size);
    let start = rank * each + rank.min(rest);
    Ok(start..start + each + usize::from(rank < rest))
}

fn prompt_tokens(args: &Args, tokenizer: Option<&Tokenizer>) -> anyhow::Result<Vec<u32>> {
    let tokens = match (&args.prompt.prompt_ids, &args.prompt.prompt, &args.prompt.chat, tokenizer)
    {
        (Some(ids), ..) => ids.clone(),
        (_, Some(text), _, Some(tokenizer)) => tokenizer.encode_with_special(text)?,
        (_, _, Some(text), Some(tokenizer)) => {
            let message = serde_json::json!({"role": "user", "content": text});
            let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
            let rendered = ChatTemplate::load(&args.model)?.render(&ChatInput {
                messages: &[message],
                tools: &[],
                add_generation_prompt: true,
                now: now.try_into().unwrap_or(0),
            })?;
            tokenizer.encode(&rendered)?
        }
        _ => bail!("one of --prompt, --prompt-ids and --chat is needed"),
    };
    ensure!(!tokens.is_empty(), "the prompt has no tokens");
    Ok(tokens)
}

fn generate(
    args: &Args,
    engine: &mut Engine,
    prompt: &[u32],
    output: &Output<'_>,
) -> anyhow::Result<Report> {
    let sampling = args.sampling.read(args.logprobs, engine.info().vocab_size)?;
    let eos = engine.info().eos_token_ids.clone();
    let room = engine.info().max_context.saturating_sub(prompt.len());
    ensure!(room > 0, "the prompt of {} tokens fills the context", prompt.len());
    // The last token drawn need not be fed: it takes no room.
    let max_tokens = args.max_tokens.min(room + 1);
    let last_draw = (max_tokens as u64).saturating_sub(1);
    engine.open(SEQUENCE, &Opening { sampling, prompt: None, last_draw });
    let mut detokenizer = Detokenizer::new();

    let started = Instant::now();
    let mut drawn = prefill(engine, SEQUENCE, prompt)?;
    // When the first token came, and the latest one.
    let mut times: Option<(Instant, Instant)> = None;
    let (mut tokens, mut logprobs, mut finish_reason) = (Vec::new(), Vec::new(), "length");
    let mut draws = 0;
    loop {
        let step = drawn.context("the engine drew no token")?;
        let token = step.token;
        let now = Instant::now();
        times = Some((times.map_or(now, |(first, _)| first), now));
        draws += 1;
        if eos.contains(&token) {
            finish_reason = "stop";
            break;
        }
        tokens.push(token);
        logprobs.extend(token_logprob(&step));
        if let Some(tokenizer) = output.tokenizer {
            output.piece(&detokenizer.push(tokenizer, token)?);
        }
        if tokens.len() == max_tokens {
            break;
        }
        guard::watch("a step");
        drawn = engine.step(&Step::Decode { seq: SEQUENCE, token, draw: draws })?;
    }
    if let Some(tokenizer) = output.tokenizer {
        output.piece(&detokenizer.finish(tokenizer)?);
    }
    let text = output.tokenizer.map(|t| t.decode(&tokens)).transpose()?;
    let (first, last) = times.expect("the loop has drawn a token");
    let decode_s = last.duration_since(first).as_secs_f64();
    Ok(Report {
        text,
        finish_reason,
        prompt_tokens: prompt.len(),
        logprobs: args.logprobs.map(|_| logprobs),
        time_to_first_token_s: first.duration_since(started).as_secs_f64(),
        decode_tokens_per_s: (draws > 1).then(|| (draws - 1) as f64 / decode_s),
        peak_memory_bytes: engine.peak_memory_bytes(),
        step_path: (&engine.info().step_path).into(),
        tokens,
    })
}

pub(crate) fn prefill(
    engine: &mut Engine,
    seq: SeqId,
    prompt: &[u32],
) -> anyhow::Result<Option<StepOutput>> {
    let mut drawn = None;
    let mut left = prompt;
    while !left.is_empty() {
        let (chunk, rest) = left.split_at(left.len().min(PREFILL_CHUNK));
        left = rest;
        let sample = rest.is_empty();
        let tokens = chunk.to_vec();
        guard::watch("a part of the prompt");
        drawn = engine.step(&Step::Prefill { seq, tokens, sample, draw: 0 })?;
    }
    Ok(drawn)
}

fn token_logprob(drawn: &StepOutput) -> Option<TokenLogprob> {
    let own = Logprob { token: drawn.token, logprob: drawn.logprob? };
    let top = drawn.top.iter().map(|&(token, logprob)| Logprob { token, logprob }).collect();
    Some(TokenLogprob { own, top })
}

/// Where the answer goes: text as it comes, or one object at the end, or nowhere.
struct Output<'a> {
    tokenizer: Option<&'a Tokenizer>,
    /// Of the first rank; the others are silent.
    printer: Option<Printer>,
    json: bool,
}

impl Output<'_> {
    fn piece(&self, text: &str) {
        if let Some(printer) = self.printer.as_ref().filter(|_| !self.json && !text.is_empty()) {
            printer.print(text);
        }
    }

    fn finish(self, report: &Report) -> anyhow::Result<()> {
        let Some(printer) = self.printer else { return Ok(()) };
        let line = if self.json {
            serde_json::to_string(report)?
        } else if self.tokenizer.is_none() {
            let ids: Vec<String> = report.tokens.iter().map(u32::to_string).collect();
            ids.join(",")
        } else {
            String::new()
        };
        printer.print(&format!("{line}\n"));
        guard::rest();
        Ok(printer.finish()?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn even_shares_are_contiguous_and_cover_all_layers() {
        for layers in 1..70 {
            for size in 1..=layers {
                let mut next = 0;
                for rank in 0..size {
                    let share = even_share(layers, rank, size).unwrap();
                    assert_eq!(share.start, next);
                    assert!(share.len() == layers / size || share.len() == layers / size + 1);
                    next = share.end;
                }
                assert_eq!(next, layers);
            }
        }
        assert!(even_share(2, 0, 3).is_err());
    }

    #[test]
    fn further_arguments_are_a_list_in_a_line() {
        let args = Line::parse(r#"["--model", "a b", "--prompt-ids", "1,2"]"#).unwrap();
        assert_eq!((args.model.to_str(), args.max_tokens), (Some("a b"), 256));
        assert_eq!(args.prompt.prompt_ids, Some(vec![1, 2]));
        for bad in ["", "{}", "[1]", "[]", r#"["--model", "a", "--prompt", "b", "--nothing"]"#] {
            assert!(Line::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn layers_are_read_as_half_open_ranges() {
        assert_eq!(parse_layers("0..16"), Ok(0..16));
        for bad in ["", "3", "4..4", "5..2", "a..b", "1..2..3"] {
            assert!(parse_layers(bad).is_err(), "{bad}");
        }
    }
}
