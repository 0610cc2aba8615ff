//! One rank of a model: loads its part and runs steps that it is given. Owns weights and the caches of open
//! sequences; decides neither what to run next nor when a sequence is over.

mod run;

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::path::PathBuf;

use mlx_rs::Array;
use mlx_rs::error::Exception;
use serde::{Deserialize, Serialize};

use self::run::{Ahead, Batch};
use crate::batch::{RowId, Segments};
use crate::config::{Config, ConfigError};
use crate::distributed::{Group, GroupError};
use crate::history::History;
use crate::loader::{self, Checkpoint, LoadError, LoadProgress, Selection};
use crate::models::{Args, Facts, Model, Part, StepPath};
use crate::pipeline::{self, Pipeline};
use crate::sample::{Sampling, StepOutput};
use crate::tensor::Team;

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
    /// How this rank runs decode steps of a single sequence.
    pub step_path: StepPath,
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

/// One row of a decode step: `token`, the last one drawn, is fed to `seq`, and the next is drawn as draw number `draw`.
#[derive(Serialize, Deserialize, Clone, Copy, Debug, PartialEq, Eq)]
pub struct Feed {
    pub seq: SeqId,
    pub token: u32,
    pub draw: u64,
}

/// What a sequence is opened with, on all ranks alike.
#[derive(Serialize, Deserialize, Clone, Debug, PartialEq)]
pub struct Opening {
    pub sampling: Sampling,
    /// For penalties: how many of the tokens that are fed first are the prompt. Without it, those that
    /// [`Step::Prefill`] feeds.
    pub prompt: Option<usize>,
    /// The number of the last draw that will be asked for: nothing is begun behind it. Draws behind it are made all
    /// the same.
    pub last_draw: u64,
}

impl From<Sampling> for Opening {
    /// The prompt is what [`Step::Prefill`] feeds, and the end is open.
    fn from(sampling: Sampling) -> Self {
        Self { sampling, prompt: None, last_draw: u64::MAX }
    }
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
    #[error(
        "rank {with} computes on CUDA and rank {without} does not: over '{backend}' either all ranks \
         must, or none"
    )]
    Mixed { with: usize, without: usize, backend: &'static str },
    #[error(transparent)]
    Group(#[from] GroupError),
    #[error("MLX: {}", crate::mlx::reason(.0.what()))]
    Mlx(#[from] Exception),
    #[error("sequence {0} is not open")]
    UnknownSequence(SeqId),
    #[error("sequence {0} is fed twice in one step")]
    FedTwice(SeqId),
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
            Self::Config(_) | Self::Layers(_) | Self::Mixed { .. } => true,
            Self::Load(error) => error.is_permanent(),
            Self::Group(_) | Self::Mlx(_) => false,
            Self::UnknownSequence(_) | Self::FedTwice(_) | Self::NoTokens => true,
            Self::Token { .. } | Self::ContextFull { .. } => true,
        }
    }
}

struct Sequence {
    sampling: Sampling,
    /// Its place in the caches.
    row: RowId,
    /// Tokens fed by steps. The caches hold one more while a step is begun ahead.
    position: usize,
    /// Present if penalties ask for it.
    history: Option<History>,
    /// As [`Sampling::bias`], on the rank that draws.
    bias: Option<Array>,
    /// As [`Opening::last_draw`].
    last_draw: u64,
}

/// Whom this rank works with.
#[derive(Clone)]
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
    segments: Segments,
    next_row: RowId,
    /// What was begun before it was asked for.
    ahead: Option<Ahead>,
    decoded: u64,
    /// Of the vocabulary.
    last_token: Array,
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
            step_path: model.step_path().clone(),
        };
        let layers = part.layers.len();
        let last_token = Array::from_slice(&[info.vocab_size.saturating_sub(1) as u32], &[1]);
        Ok(Self {
            model,
            info,
            layers,
            ranks,
            sequences: BTreeMap::new(),
            segments: Segments::default(),
            next_row: 0,
            ahead: None,
            decoded: 0,
            last_token,
        })
    }

    pub fn info(&self) -> &ModelInfo {
        &self.info
    }

    /// Makes room for a sequence. One that is open under the same name is dropped.
    pub fn open(&mut self, seq: SeqId, opening: &Opening) {
        self.close(seq);
        let sampling = &opening.sampling;
        let history = opening.prompt.map_or_else(History::default, History::resumed);
        let row = self.next_row;
        self.next_row += 1;
        self.segments.open(row, self.layers);
        let draws = match &self.ranks {
            Ranks::Alone => true,
            Ranks::Pipeline(pipeline) => pipeline.is_last(),
            Ranks::Team(team) => team.is_first(),
        };
        let vocab = self.info.vocab_size as i32;
        let sequence = Sequence {
            row,
            position: 0,
            history: (draws && sampling.has_penalties()).then_some(history),
            bias: if draws { sampling.bias(vocab) } else { None },
            sampling: sampling.clone(),
            last_draw: opening.last_draw,
        };
        self.sequences.insert(seq, sequence);
    }

    /// Frees a sequence's memory, at the latest with the next step; nothing happens if it is not open.
    pub fn close(&mut self, seq: SeqId) {
        if let Some(sequence) = self.sequences.remove(&seq) {
            self.segments.close(sequence.row);
            self.forget_ahead(sequence.row);
        }
    }

    /// Runs one step on this rank. Every rank gets the token that was drawn, the first its log-probabilities, too; steps
    /// that draw nothing give none.
    ///
    /// Every rank of the group must be given the same steps in the same order. A step that is refused before it
    /// begins (unknown sequence, bad token, full context) is refused on all ranks alike and leaves the sequence as it
    /// was.
    ///
    /// # Errors
    /// The step is refused, or MLX or a peer failed; after the latter the engine is not fit for use.
    pub fn step(&mut self, step: &Step) -> Result<Option<StepOutput>, EngineError> {
        match step {
            Step::Prefill { seq, tokens, sample, draw } => {
                self.prefill(*seq, tokens, sample.then_some(*draw))
            }
            &Step::Decode { seq, token, draw } => {
                Ok(self.decode(&[Feed { seq, token, draw }])?.pop())
            }
        }
    }

    /// Runs one decode step for several sequences together, which reads the weights once for all of them. What was drawn
    /// is in the order of `feeds`.
    ///
    /// # Errors
    /// As [`Engine::step`].
    pub fn decode(&mut self, feeds: &[Feed]) -> Result<Vec<StepOutput>, EngineError> {
        let mut seen = BTreeSet::new();
        for feed in feeds {
            self.admit(feed.seq, &[feed.token])?;
            if !seen.insert(feed.seq) {
                return Err(EngineError::FedTwice(feed.seq));
            }
        }
        if feeds.is_empty() {
            return Err(EngineError::NoTokens);
        }
        let outputs = self.run_decode(feeds)?;
        self.decoded += 1;
        if self.decoded.is_multiple_of(STEPS_PER_CLEANUP) {
            mlx_rs::memory::clear_cache()?;
        }
        Ok(outputs)
    }

    fn prefill(
        &mut self,
        seq: SeqId,
        tokens: &[u32],
        draw: Option<u64>,
    ) -> Result<Option<StepOutput>, EngineError> {
        self.admit(seq, tokens)?;
        self.take_back_ahead(seq)?;
        let feed = Feed { seq, token: 0, draw: draw.unwrap_or(0) };
        // Makes sure that no other row lies beside this one.
        let rows = self.gather(&[feed])?.rows;
        if let Some(sequence) = self.sequences.get_mut(&seq) {
            sequence.position += tokens.len();
            sequence.history.iter_mut().for_each(|history| history.feed_prompt(tokens));
        }
        let batch = Batch { rows, tokens: tokens.to_vec(), draws: draw.is_some() };
        let output = self.run_prefill(&batch)?;
        // A chunk's temporary memory is much larger than a decode step's.
        if tokens.len() > 1 {
            mlx_rs::memory::clear_cache()?;
        }
        Ok(output)
    }

    /// For a message about a model whose log-probabilities are none: the first layer behind which hidden states of
    /// `tokens` are not finite. None if that is in none of this rank's layers, or if they can't be run here without
    /// the other ranks.
    ///
    /// # Errors
    /// MLX failed.
    pub fn first_not_finite_layer(&mut self, tokens: &[u32]) -> Result<Option<usize>, EngineError> {
        match &self.ranks {
            Ranks::Alone => {}
            Ranks::Pipeline(pipeline) if pipeline.is_first() => {}
            Ranks::Pipeline(_) | Ranks::Team(_) => return Ok(None),
        }
        let mut segments = Segments::default();
        segments.open(0, self.layers);
        let mut pass = segments.pass(&BTreeSet::from([0]), tokens.len() as i32)?;
        // The first rank has the first layers.
        Ok(self.model.first_not_finite(&ids(tokens), &mut pass)?)
    }

    /// Ends the work of a rank whose steps have all gone well: waits for what was begun ahead, which takes as long as
    /// the other ranks do.
    pub fn finish(self) {
        let group = match &self.ranks {
            Ranks::Alone => None,
            Ranks::Pipeline(pipeline) => Some(pipeline.group()),
            Ranks::Team(team) => team.group(),
        };
        crate::mlx::synchronize();
        if let Some(group) = group {
            group.synchronize();
        }
    }

    /// Bytes that MLX holds for weights, caches and work in progress.
    pub fn memory_bytes(&self) -> u64 {
        mlx_rs::memory::active_memory().unwrap_or(0) as u64
    }

    /// The most that [`Engine::memory_bytes`] has been in this process.
    pub fn peak_memory_bytes(&self) -> u64 {
        mlx_rs::memory::peak_memory().unwrap_or(0) as u64
    }

    fn admit(&self, seq: SeqId, tokens: &[u32]) -> Result<(), EngineError> {
        let (vocab_size, max_context) = (self.info.vocab_size, self.info.max_context);
        let sequence = self.sequences.get(&seq).ok_or(EngineError::UnknownSequence(seq))?;
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
}

impl Drop for Engine {
    /// Begun steps are waited for: a process that ends while MLX works ends in a crash. With other ranks that is for
    /// [`Engine::finish`]: waiting for a peer that is gone would never end.
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
        let Range { start, end } = part.layers;
        return Err(EngineError::Layers(format!(
            "a rank was given {start}..{end}, but the model has {all} by its config.json: does the \
             Model resource give another number?"
        )));
    }
    Ok(part)
}

/// Checks that all ranks begin steps ahead, or none: else they would wait for each other for ever. Blocks until all have
/// come here.
fn meet_alike(group: &Group) -> Result<(), EngineError> {
    let own = u32::from(group.runs_beside_the_host());
    let all = group.all_gather(&Array::from_slice(&[own], &[1]))?;
    all.eval().map_err(|e| GroupError::collective("all_gather", &e))?;
    match mixed(all.as_slice(), group.backend().name()) {
        None => Ok(()),
        Some(error) => Err(error),
    }
}

/// What is wrong if some ranks begin steps ahead (1) and some, which are those on CUDA, do not (0).
fn mixed(ahead: &[u32], backend: &'static str) -> Option<EngineError> {
    let first = |kind: u32| ahead.iter().position(|own| *own == kind);
    Some(EngineError::Mixed { with: first(0)?, without: first(1)?, backend })
}

/// Meets the other ranks, if there are any. Blocks until all have loaded.
fn meet(
    model: &Model,
    part: &Part,
    team: Team,
    group: Option<Group>,
    facts: &Facts,
) -> Result<Ranks, EngineError> {
    if let Some(group) = &group {
        meet_alike(group)?;
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_with_cuda_and_without_are_refused_by_name() {
        assert!(mixed(&[1, 1, 1], "ring").is_none() && mixed(&[0, 0], "ring").is_none());
        let error = mixed(&[1, 1, 0], "ring").unwrap();
        assert_eq!(
            error.to_string(),
            "rank 2 computes on CUDA and rank 0 does not: over 'ring' either all ranks must, or none"
        );
        assert!(error.is_permanent());
    }
}
