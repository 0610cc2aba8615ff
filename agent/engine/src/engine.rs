//! One rank of a model: loads its part and runs steps that it is given. Owns weights and the caches of open
//! sequences; decides neither what to run next nor when a sequence is over.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::PathBuf;

use mlx_rs::Array;
use mlx_rs::error::Exception;
use mlx_rs::transforms::{async_eval, eval};
use serde::{Deserialize, Serialize};

use crate::cache::KvCache;
use crate::config::{Config, ConfigError};
use crate::distributed::{Group, GroupError};
use crate::loader::{self, Checkpoint, LoadError, LoadProgress, Selection};
use crate::models::{Args, Facts, Model, Part};
use crate::pipeline::{self, Pipeline};
use crate::sample::{self, Draw, Sampling, StepOutput};
use crate::tensor::Team;
use crate::timing;

/// Decode steps between two times that MLX is told to give back memory that it keeps for reuse.
const STEPS_PER_CLEANUP: u64 = 256;

/// Names a sequence on all ranks. Chosen by the caller.
pub type SeqId = u64;

/// How the ranks of a group share a model.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Sharding {
    /// Each rank holds a run of layers.
    #[default]
    Pipeline,
    /// Each rank holds a part of every layer.
    Tensor,
}

/// What to load.
#[derive(Clone)]
pub struct LoadConfig {
    /// A model folder as Hugging Face lays it out: `config.json` and safetensors.
    pub model_dir: PathBuf,
    /// The layers of this rank, from 0; all of them with [`Sharding::Tensor`].
    pub layers: Range<usize>,
    pub sharding: Sharding,
    /// The ranks that share the model, in pipeline order where that matters; none runs it alone.
    pub group: Option<Group>,
    /// Most tokens that a sequence may have, prompt included; 0 for what the model allows.
    pub context_length: usize,
}

/// Facts about the loaded model.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelInfo {
    pub model_type: String,
    /// Of the whole model.
    pub layers: usize,
    pub vocab_size: usize,
    /// Tokens that end an answer.
    pub eos_token_ids: Vec<u32>,
    /// Most tokens that a sequence may have here.
    pub max_context: usize,
    /// Bytes of weights that this rank holds.
    pub weight_bytes: u64,
}

/// One unit of work. All ranks of a group run the same steps in the same order.
#[derive(Serialize, Deserialize, Clone, Debug, PartialEq)]
pub enum Step {
    /// Feeds prompt tokens; with `sample`, on the last chunk, draws the next token as draw number `draw`.
    Prefill { seq: SeqId, tokens: Vec<u32>, sample: bool, draw: u64 },
    /// Feeds `token`, the last one drawn, and draws the next. `draw` counts the draws of the request so far, also
    /// those before it was resumed.
    Decode { seq: SeqId, token: u32, draw: u64 },
}

impl Step {
    pub fn seq(&self) -> SeqId {
        match self {
            Self::Prefill { seq, .. } | Self::Decode { seq, .. } => *seq,
        }
    }
}

#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error(transparent)]
    Load(#[from] LoadError),
    #[error("layers do not fit: {0}")]
    Layers(String),
    #[error(transparent)]
    Group(#[from] GroupError),
    #[error("MLX: {}", crate::mlx::reason(.0.what()))]
    Mlx(#[from] Exception),
    #[error("sequence {0} is not open")]
    UnknownSequence(SeqId),
    #[error("no tokens to feed")]
    NoTokens,
    #[error("token {token} is not in the vocabulary of {vocab_size}")]
    Token { token: u32, vocab_size: usize },
    #[error("{wanted} tokens do not fit the context of {max_context}")]
    ContextFull { wanted: usize, max_context: usize },
}

impl EngineError {
    /// Whether loading the same folder in the same way again would fail in the same way.
    pub fn is_permanent(&self) -> bool {
        match self {
            Self::Config(ConfigError::Io { .. }) => false,
            Self::Config(_) | Self::Layers(_) => true,
            Self::Load(error) => error.is_permanent(),
            Self::Group(_) | Self::Mlx(_) => false,
            Self::UnknownSequence(_) | Self::NoTokens => true,
            Self::Token { .. } | Self::ContextFull { .. } => true,
        }
    }
}

struct Sequence {
    sampling: Sampling,
    /// One per layer of this rank.
    caches: Vec<KvCache>,
    /// Tokens fed by steps. The caches hold one more while a lookahead is under way.
    position: usize,
    lookahead: Option<Lookahead>,
}

/// The next decode step, begun before it was asked for: it feeds `token` as draw number `draw`.
struct Lookahead {
    token: u32,
    draw: u64,
    drawn: Draw,
}

/// Whom this rank works with.
enum Ranks {
    Alone,
    Pipeline(Pipeline),
    Team(Team),
}

/// One rank of a model. Lives on the thread that loaded it.
pub struct Engine {
    model: Model,
    info: ModelInfo,
    layers: usize,
    ranks: Ranks,
    sequences: BTreeMap<SeqId, Sequence>,
    decoded: u64,
}

impl Engine {
    /// Reads this rank's part of the weights, then meets the other ranks if there are any: it blocks until all of
    /// them have loaded.
    ///
    /// # Errors
    /// The folder is not a model that can be run, the layers of the ranks do not fit together, or the group failed.
    pub fn load(
        config: &LoadConfig,
        progress: &mut dyn FnMut(LoadProgress),
    ) -> Result<Self, EngineError> {
        crate::mlx::init();
        let files = Config::read(&config.model_dir)?;
        let args = Args::parse(&files)?;
        let facts = args.facts();
        let group = config.group.clone().filter(|g| g.size() > 1);
        let team = match (config.sharding, &group) {
            (Sharding::Tensor, Some(group)) => Team::new(group.clone()),
            (Sharding::Tensor, None) | (Sharding::Pipeline, _) => Team::default(),
        };
        let part = part(&team, group.as_ref(), config.layers.clone(), facts.layers)?;

        let checkpoint = Checkpoint::open(&config.model_dir)?;
        let modules = args.modules(&|tensor| checkpoint.contains(tensor));
        let selection = Selection {
            modules: &modules,
            quantization: files.quantization.as_ref(),
            ignored: &|tensor| args.ignores(tensor),
            owns: &|home| part.owns(home),
            share: team.share(),
        };
        let mut weight_bytes = 0;
        let weights = loader::load(&checkpoint, &selection, &mut |p| {
            weight_bytes = p.bytes_total;
            progress(p);
        })?;
        let model = args.build(&part, &team, weights)?;
        let ranks = meet(&model, &part, team, group, &facts)?;
        let max_context = match config.context_length {
            0 => facts.max_context,
            length => length.min(facts.max_context),
        };
        let info = ModelInfo {
            model_type: files.model_type,
            layers: facts.layers,
            vocab_size: facts.vocab_size,
            eos_token_ids: files.eos_token_ids,
            max_context,
            weight_bytes,
        };
        let layers = part.layers.len();
        Ok(Self { model, info, layers, ranks, sequences: BTreeMap::new(), decoded: 0 })
    }

    pub fn info(&self) -> &ModelInfo {
        &self.info
    }

    /// Makes room for a sequence. One that is open under the same name is dropped.
    pub fn open(&mut self, seq: SeqId, sampling: &Sampling) {
        let caches = (0..self.layers).map(|_| KvCache::default()).collect();
        let sampling = sampling.clone();
        self.sequences.insert(seq, Sequence { sampling, caches, position: 0, lookahead: None });
    }

    /// Frees a sequence's memory; nothing happens if it is not open.
    pub fn close(&mut self, seq: SeqId) {
        self.sequences.remove(&seq);
    }

    /// Runs one step on this rank. The first rank gets what was drawn; the others, and steps that draw nothing, none.
    ///
    /// Every rank of the group must be given the same steps in the same order. A step that is refused before it
    /// begins (unknown sequence, bad token, full context) is refused on all ranks alike and leaves the sequence as it
    /// was.
    ///
    /// # Errors
    /// The step is refused, or MLX or a peer failed; after the latter the engine is not fit for use.
    pub fn step(&mut self, step: &Step) -> Result<Option<StepOutput>, EngineError> {
        let (seq, tokens, draw) = match step {
            Step::Prefill { seq, tokens, sample, draw } => {
                (*seq, tokens.as_slice(), sample.then_some(*draw))
            }
            Step::Decode { seq, token, draw } => (*seq, std::slice::from_ref(token), Some(*draw)),
        };
        // Taken out while it runs: a failed step leaves no half-fed sequence behind.
        let mut sequence = self.sequences.remove(&seq).ok_or(EngineError::UnknownSequence(seq))?;
        if let Err(refusal) = self.admit(&sequence, tokens) {
            self.sequences.insert(seq, sequence);
            return Err(refusal);
        }
        let output = match &self.ranks {
            Ranks::Alone => self.step_alone(&mut sequence, tokens, draw)?,
            Ranks::Pipeline(pipeline) => {
                self.step_in_pipeline(pipeline, &mut sequence, tokens, draw)?
            }
            Ranks::Team(team) => self.step_in_team(team, &mut sequence, tokens, draw)?,
        };
        sequence.position += tokens.len();
        self.sequences.insert(seq, sequence);
        self.clean_up(step)?;
        Ok(output)
    }

    /// Bytes that MLX holds for weights, caches and work in progress.
    pub fn memory_bytes(&self) -> u64 {
        mlx_rs::memory::active_memory().unwrap_or(0) as u64
    }

    /// The most that [`Engine::memory_bytes`] has been in this process.
    pub fn peak_memory_bytes(&self) -> u64 {
        mlx_rs::memory::peak_memory().unwrap_or(0) as u64
    }

    fn admit(&self, sequence: &Sequence, tokens: &[u32]) -> Result<(), EngineError> {
        let (vocab_size, max_context) = (self.info.vocab_size, self.info.max_context);
        if tokens.is_empty() {
            return Err(EngineError::NoTokens);
        }
        if let Some(&token) = tokens.iter().find(|t| **t as usize >= vocab_size) {
            return Err(EngineError::Token { token, vocab_size });
        }
        let wanted = sequence.position + tokens.len();
        if wanted > max_context {
            return Err(EngineError::ContextFull { wanted, max_context });
        }
        Ok(())
    }

    /// While the caller handles a token, the device already works on the next one.
    fn step_alone(
        &self,
        sequence: &mut Sequence,
        tokens: &[u32],
        draw: Option<u64>,
    ) -> Result<Option<StepOutput>, EngineError> {
        let ready = sequence.lookahead.take();
        let drawn = match (ready, draw) {
            (Some(ready), Some(draw)) if tokens == [ready.token] && draw == ready.draw => {
                ready.drawn
            }
            (ready, draw) => {
                if ready.is_some() {
                    sequence.caches.iter_mut().for_each(|cache| cache.truncate(1));
                }
                let hidden = self.model.embed(&ids(tokens))?;
                let hidden = self.model.forward(hidden, 1, &mut sequence.caches)?;
                let Some(draw) = draw else {
                    eval(sequence.caches.iter().flat_map(KvCache::arrays))?;
                    return Ok(None);
                };
                let drawn = self.draw(&hidden, &sequence.sampling, draw)?;
                timing::submit(|| async_eval([&drawn.token, &drawn.report]))?;
                drawn
            }
        };
        let next = draw.map_or(0, |draw| draw + 1);
        let begun = if sequence.position + tokens.len() < self.info.max_context {
            let hidden = self.model.embed(&drawn.token.reshape(&[1, 1])?)?;
            let hidden = self.model.forward(hidden, 1, &mut sequence.caches)?;
            let begun = self.draw(&hidden, &sequence.sampling, next)?;
            timing::submit(|| async_eval([&begun.token, &begun.report]))?;
            Some(begun)
        } else {
            None
        };
        let output = read_report(&drawn.report)?;
        sequence.lookahead =
            begun.map(|drawn| Lookahead { token: output.token, draw: next, drawn });
        Ok(Some(output))
    }

    fn step_in_pipeline(
        &self,
        pipeline: &Pipeline,
        sequence: &mut Sequence,
        tokens: &[u32],
        draw: Option<u64>,
    ) -> Result<Option<StepOutput>, EngineError> {
        let hidden = if pipeline.is_first() {
            self.model.embed(&ids(tokens))?
        } else {
            pipeline.receive_hidden(tokens.len() as i32)?
        };
        let wanted = if pipeline.is_last() { 1 } else { tokens.len() as i32 };
        let hidden = self.model.forward(hidden, wanted, &mut sequence.caches)?;
        if !pipeline.is_last() {
            wait(&[&pipeline.send_hidden(&hidden)?], "send")?;
        } else if let Some(draw) = draw {
            let drawn = self.draw(&hidden, &sequence.sampling, draw)?;
            wait(&[&pipeline.send_report(&drawn.report)?], "send")?;
        }
        if draw.is_none() {
            // Nothing else may depend on the last layer's keys and values.
            let caches: Vec<&Array> = sequence.caches.iter().flat_map(KvCache::arrays).collect();
            wait(&caches, "recv")?;
            return Ok(None);
        }
        if !pipeline.is_first() {
            return Ok(None);
        }
        let len = sequence.sampling.report_len(self.info.vocab_size);
        let report = pipeline.receive_report(len)?;
        wait(&[&report], "recv")?;
        Ok(Some(read_report(&report)?))
    }

    /// All ranks do the same work on their parts of each layer; the first alone has the head and draws. Nothing is
    /// begun ahead: ranks whose steps went apart would wait for each other's sums for ever.
    fn step_in_team(
        &self,
        team: &Team,
        sequence: &mut Sequence,
        tokens: &[u32],
        draw: Option<u64>,
    ) -> Result<Option<StepOutput>, EngineError> {
        let hidden = self.model.embed(&ids(tokens))?;
        let hidden = self.model.forward(hidden, 1, &mut sequence.caches)?;
        // All ranks must evaluate the same sums: those behind the last layer's keys, or those behind its result.
        match draw {
            None => {
                let caches: Vec<&Array> =
                    sequence.caches.iter().flat_map(KvCache::arrays).collect();
                wait(&caches, "all_sum")?;
                Ok(None)
            }
            Some(draw) if team.is_first() => {
                let drawn = self.draw(&hidden, &sequence.sampling, draw)?;
                wait(&[&drawn.report], "all_sum")?;
                Ok(Some(read_report(&drawn.report)?))
            }
            Some(_) => {
                wait(&[&hidden], "all_sum")?;
                Ok(None)
            }
        }
    }

    /// Draws from the hidden state of one position.
    fn draw(&self, hidden: &Array, sampling: &Sampling, draw: u64) -> Result<Draw, Exception> {
        let logits = self.model.head(hidden)?;
        sample::draw(&logits.reshape(&[1, -1])?, sampling, draw)
    }

    fn clean_up(&mut self, step: &Step) -> Result<(), EngineError> {
        let due = match step {
            // A chunk's temporary memory is much larger than a decode step's.
            Step::Prefill { tokens, .. } => tokens.len() > 1,
            Step::Decode { .. } => {
                self.decoded += 1;
                self.decoded.is_multiple_of(STEPS_PER_CLEANUP)
            }
        };
        if due {
            mlx_rs::memory::clear_cache()?;
        }
        Ok(())
    }
}

impl Drop for Engine {
    /// Begun steps are waited for: a process that ends while MLX works ends in a crash. With other ranks nothing is
    /// begun ahead, and waiting for a peer that is gone would never end.
    fn drop(&mut self) {
        match self.ranks {
            Ranks::Alone => crate::mlx::synchronize(),
            Ranks::Pipeline(_) | Ranks::Team(_) => {}
        }
    }
}

/// The part of a model of `all` layers that this rank holds.
fn part(
    team: &Team,
    group: Option<&Group>,
    layers: Range<usize>,
    all: usize,
) -> Result<Part, EngineError> {
    let part = if team.is_alone() {
        pipeline::part(group, layers)
    } else {
        Part { layers, first: true, last: team.is_first() }
    };
    let needs_all = (part.first && part.last) || !team.is_alone();
    if part.layers.is_empty() || part.layers.end > all || (needs_all && part.layers.len() != all) {
        return Err(EngineError::Layers(format!("{:?} of {all}", part.layers)));
    }
    Ok(part)
}

/// Meets the other ranks, if there are any. Blocks until all have loaded.
fn meet(
    model: &Model,
    part: &Part,
    team: Team,
    group: Option<Group>,
    facts: &Facts,
) -> Result<Ranks, EngineError> {
    if !team.is_alone() {
        let &Facts { layers, hidden_size, vocab_size, .. } = facts;
        team.meet(&[-1, layers as i32, hidden_size as i32, vocab_size as i32])?;
        return Ok(Ranks::Team(team));
    }
    let Some(group) = group else { return Ok(Ranks::Alone) };
    // Not evaluated: the graph knows the type.
    let embedding = match part.first {
        true => Some(model.embed(&ids(&[0]))?.dtype()),
        false => None,
    };
    let meeting = Pipeline::meet(group, part, facts.layers, facts.hidden_size, embedding)?;
    Ok(Ranks::Pipeline(meeting))
}

/// Token ids as the model takes them, `[1, positions]`.
fn ids(tokens: &[u32]) -> Array {
    Array::from_slice(tokens, &[1, tokens.len() as i32])
}

/// Evaluates; a failure counts as one of the collective that the arrays depend on.
fn wait(arrays: &[&Array], operation: &'static str) -> Result<(), GroupError> {
    let arrays = || arrays.iter().copied();
    timing::submit(|| async_eval(arrays()))
        .and_then(|()| timing::wait(|| eval(arrays())))
        .map_err(|e| GroupError::collective(operation, &e))
}

fn read_report(report: &Array) -> Result<StepOutput, Exception> {
    timing::wait(|| report.eval())?;
    Ok(StepOutput::parse(report.as_slice::<u32>()))
}
