//! The steps of one rank, which for rank 0 are those of all: it tells the others what to run. Owns the engine once it is
//! loaded; never decides what is run.

use std::{
    sync::{Arc, atomic::AtomicU64, mpsc},
    time::{Duration, Instant},
};

use exo_crds::{ShardPhase, runner::RunnerConfig};
use exo_engine::{Engine, EngineError, Feed, Opening, SeqId, Step, StepOutput};
use tokio::{
    runtime::Handle,
    sync::{Mutex, Semaphore},
};
use tracing::warn;

use super::super::{
    channel::{self, RankCommand, Sender},
    driver::{self, Driver, Executor, Stepped},
    http::{Service, WAITING_MAX},
    report::{Failure, Reporter},
    request::{ModelLimits, ModelText},
    roll::Steps,
    scheduler::Limits,
    warm::{self, Extent},
    watchdog::Watchdog,
};
use super::{Start, link::channel_failure};

/// For the whole warm-up, whose steps make kernels. Below `SILENCE_LIMIT_S`, as for loading.
const WARM_LIMIT: Duration = Duration::from_secs(100);
/// No other shape is begun after this: better a first request that waits than a shard that is not there.
const WARM_BUDGET: Duration = Duration::from_secs(40);
/// Rank 0 waits less long for a step than the others do: it can find out who is to blame.
const FOLLOWER_PATIENCE: Duration = Duration::from_secs(15);
/// A chunk of this size uses the device well and delays other sequences by a few steps only.
const CHUNK_TOKENS: usize = 512;
/// How often memory is looked at while steps run.
const MEMORY_PERIOD: Duration = Duration::from_secs(2);
const WARMING: &str = "warming up";

struct Memory {
    bytes: u64,
    checked: Instant,
}

/// The engine of this rank, and for rank 0 the way to make the others run the same.
pub(super) struct Ranks {
    engine: Engine,
    watchdog: Watchdog,
    reporter: Reporter,
    runtime: Handle,
    /// Empty on other ranks than 0, and when there are none.
    senders: Arc<Mutex<Vec<Sender>>>,
    /// There are no other ranks.
    alone: bool,
    memory: Memory,
    /// The next decode step is what was told; on rank 0.
    told: bool,
    /// What a decode step would feed that was told ahead; on the others.
    again: Option<Vec<Feed>>,
    /// The warm-up is over, which has one limit for all its steps.
    warm: bool,
    step_limit: Duration,
    steps: Steps,
}

impl Ranks {
    pub(super) fn new(start: &Start, engine: Engine) -> Self {
        Self {
            memory: Memory { bytes: engine.memory_bytes(), checked: Instant::now() },
            engine,
            watchdog: start.watchdog.clone(),
            reporter: start.reporter.clone(),
            runtime: start.runtime.clone(),
            senders: start.senders.clone(),
            alone: start.config.world_size == 1,
            told: false,
            again: None,
            warm: false,
            step_limit: step_limit(&start.config),
            steps: start.steps.clone(),
        }
    }

    /// Rank 0 from here on.
    pub(super) fn serve_requests(mut self, start: &Start, text: ModelText) -> Result<(), Failure> {
        let live_max = start.config.max_concurrency.max(1) as usize;
        self.watchdog.watch(WARMING, WARM_LIMIT);
        self.warm_up(live_max)?;
        self.tell(|| RankCommand::Ready)?;
        self.watchdog.rest();
        self.warm = true;
        let info = self.engine.info();
        // What placement has set aside on each rank.
        let kv_positions = info.max_context;
        let (orders, receiver) = mpsc::channel();
        let service = Service {
            text,
            limits: ModelLimits {
                vocab_size: info.vocab_size,
                context_length: info.max_context,
                seed: start.config.seed,
            },
            eos_token_ids: info.eos_token_ids.as_slice().into(),
            orders,
            places: Arc::new(Semaphore::new(live_max + WAITING_MAX)),
            next_seq: AtomicU64::new(1),
        };
        if start.shared.service.set(service).is_err() {
            unreachable!("a process gets ready once");
        }
        self.reporter.phase(ShardPhase::Ready, 100);
        let limits = Limits { live_max, chunk_tokens: CHUNK_TOKENS, kv_positions };
        Driver::new(limits, self, start.shared.metrics.clone()).run(&receiver)
    }

    /// Runs what requests will, so that the first of them finds all kernels made.
    fn warm_up(&mut self, live_max: usize) -> Result<(), Failure> {
        let (began, reporter) = (Instant::now(), self.reporter.clone());
        let extent = Extent {
            compiles: exo_engine::uses_gpu(),
            max_context: self.engine.info().max_context,
            vocab_size: self.engine.info().vocab_size,
            live_max,
            chunk_tokens: CHUNK_TOKENS,
        };
        let is_over = || began.elapsed() > WARM_BUDGET;
        warm::warm_up(self, &extent, is_over, |done, all| {
            let share = u8::try_from(done * 9 / all).unwrap_or(9);
            reporter.phase(ShardPhase::Warming, 90 + share);
        })
        .map_err(|failure| self.with_layer(failure))
    }

    /// Adds to a failure for numbers that are none where they come from, as far as this rank knows.
    fn with_layer(&mut self, mut failure: Failure) -> Failure {
        if failure.reason == warm::NOT_FINITE
            && let tokens = [warm::TOKEN; warm::PROMPT_TOKENS]
            && let Ok(Some(layer)) = self.engine.first_not_finite_layer(&tokens)
        {
            failure.message += &format!("; hidden states are not finite from layer {layer} on");
        }
        failure
    }

    /// The other ranks from here on.
    pub(super) fn follow(&mut self, commands: &mpsc::Receiver<RankCommand>) -> Result<(), Failure> {
        self.watchdog.watch(WARMING, WARM_LIMIT);
        while let Ok(command) = commands.recv() {
            match command {
                RankCommand::Open { seq, opening } => self.engine.open(seq, &opening),
                RankCommand::Prefill(step) => {
                    let result = self.watched(|engine| engine.step(&step));
                    warn_of_refusal(&stepped(result)?);
                }
                RankCommand::Decode(feeds) => self.follow_decode(&feeds)?,
                RankCommand::DecodeAgain => {
                    if let Some(feeds) = self.again.take() {
                        self.follow_decode(&feeds)?;
                    }
                }
                RankCommand::Close { seq } => self.engine.close(seq),
                RankCommand::Ready => {
                    self.watchdog.rest();
                    self.warm = true;
                    self.reporter.phase(ShardPhase::Ready, 100);
                }
                RankCommand::RollCall | RankCommand::Shutdown | RankCommand::Abandon { .. } => {
                    unreachable!("the channel's task deals with it")
                }
            }
        }
        Ok(())
    }

    fn follow_decode(&mut self, feeds: &[Feed]) -> Result<(), Failure> {
        let stepped = stepped(self.watched(|engine| engine.decode(feeds)))?;
        warn_of_refusal(&stepped);
        self.again = match &stepped {
            Stepped::Done(outputs) => Some(driver::again(feeds, outputs)),
            Stepped::Refused(_) => None,
        };
        Ok(())
    }

    /// Makes the other ranks, where there are any, run the same as this one.
    fn tell(&self, command: impl FnOnce() -> RankCommand) -> Result<(), Failure> {
        if self.alone {
            return Ok(());
        }
        let command = command();
        let send = async { channel::send_all(&mut self.senders.lock().await, &command).await };
        // On this thread: a socket rarely makes a writer wait, so nobody must be woken.
        self.runtime.block_on(send).map_err(|error| channel_failure(&error))
    }

    /// Runs a step on this rank.
    fn watched<T>(&mut self, step: impl FnOnce(&mut Engine) -> T) -> T {
        if self.warm {
            self.watchdog.watch("a step", self.step_limit);
        }
        let result = step(&mut self.engine);
        self.steps.one_more();
        if self.warm {
            self.watchdog.rest();
        }
        self.check_memory();
        result
    }

    /// Tells a change of memory of more than a hundredth.
    fn check_memory(&mut self) {
        if self.memory.checked.elapsed() < MEMORY_PERIOD {
            return;
        }
        self.memory.checked = Instant::now();
        let bytes = self.engine.memory_bytes();
        if bytes.abs_diff(self.memory.bytes) > self.memory.bytes / 100 {
            self.memory.bytes = bytes;
            self.reporter.memory(bytes);
        }
    }
}

impl Executor for Ranks {
    fn open(&mut self, seq: SeqId, opening: &Opening) -> Result<(), Failure> {
        self.tell(|| RankCommand::Open { seq, opening: opening.clone() })?;
        self.engine.open(seq, opening);
        Ok(())
    }

    fn prefill(&mut self, step: &Step) -> Result<Stepped, Failure> {
        self.tell(|| RankCommand::Prefill(step.clone()))?;
        stepped(self.watched(|engine| engine.step(step)))
    }

    fn decode(&mut self, feeds: &[Feed], again: bool) -> Result<Stepped, Failure> {
        if !std::mem::take(&mut self.told) {
            self.tell(|| RankCommand::Decode(feeds.to_vec()))?;
        }
        if again {
            self.tell(|| RankCommand::DecodeAgain)?;
        }
        let stepped = stepped(self.watched(|engine| engine.decode(feeds)))?;
        self.told = again && matches!(stepped, Stepped::Done(_));
        Ok(stepped)
    }

    fn has_others(&self) -> bool {
        !self.alone
    }

    fn close(&mut self, seq: SeqId) -> Result<(), Failure> {
        self.tell(|| RankCommand::Close { seq })?;
        self.engine.close(seq);
        Ok(())
    }
}

fn step_limit(config: &RunnerConfig) -> Duration {
    let limit = Duration::from_secs(config.step_limit_s.into());
    if config.rank == 0 { limit } else { limit + FOLLOWER_PATIENCE }
}

/// What came of a step; an error ends the rank.
fn stepped(
    result: Result<impl IntoIterator<Item = StepOutput>, EngineError>,
) -> Result<Stepped, Failure> {
    match result {
        Ok(outputs) => Ok(Stepped::Done(outputs.into_iter().collect())),
        Err(
            error @ (EngineError::UnknownSequence(_)
            | EngineError::FedTwice(_)
            | EngineError::NoTokens
            | EngineError::Token { .. }
            | EngineError::ContextFull { .. }),
        ) => Ok(Stepped::Refused(error.to_string())),
        Err(error) => Err(error.into()),
    }
}

fn warn_of_refusal(stepped: &Stepped) {
    if let Stepped::Refused(message) = stepped {
        warn!(message, "a step was refused");
    }
}
