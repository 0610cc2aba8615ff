//! One rank's way from nothing to `Ready` and its work then, all on the engine's thread: MLX's
//! objects stay on the thread that made them.

use std::{
    io::ErrorKind,
    sync::{
        Arc,
        atomic::{AtomicU32, AtomicU64, Ordering},
        mpsc,
    },
    time::{Duration, Instant},
};

use exo_crds::{
    ShardPhase, ShardingKind, TransportKind,
    runner::{EXIT_STOPPED, REASON_PEER_LOST, RunnerConfig},
};
use exo_engine::{
    Engine, EngineError, Feed, LoadConfig, LoadProgress, Sampling, SeqId, Sharding, Step,
    StepOutput,
    distributed::{Backend, Group},
    exit_now,
    text::{ChatTemplate, TextError, Tokenizer},
};
use exo_trust::TlsPaths;
use tokio::{net::TcpListener, runtime::Handle, sync::Mutex, sync::Semaphore, time::timeout};
use tracing::warn;

use super::{
    channel::{self, ChannelError, Hello, Peer, RankCommand, RankNote, Receiver, Sender},
    driver::{Driver, Executor, Stepped},
    http::{Service, Shared, WAITING_MAX},
    report::{Failure, Reporter, chain},
    request::{ModelLimits, ModelText},
    roll::{Roll, Steps},
    scheduler::Limits,
    warm::{self, Extent},
    watchdog::Watchdog,
};

/// For all ranks to start and find each other; an agent may have a runner to fetch first.
const CONNECT_LIMIT: Duration = Duration::from_secs(60);
/// Ranks that talk on the rank channel already; MLX itself gives up earlier on most transports.
const GROUP_LIMIT: Duration = Duration::from_secs(60);
const SELF_TEST_LIMIT: Duration = Duration::from_secs(30);
/// For the next part of the weights. Below `SILENCE_LIMIT_S`, so that the runner speaks first.
const LOAD_LIMIT: Duration = Duration::from_secs(100);
const MEET_LIMIT: Duration = Duration::from_secs(60);
/// For the whole warm-up, whose steps make kernels. Below `SILENCE_LIMIT_S`, as for loading.
const WARM_LIMIT: Duration = Duration::from_secs(100);
/// No other shape is begun after this: better a first request that waits than a shard that is not there.
const WARM_BUDGET: Duration = Duration::from_secs(40);
/// Rank 0 waits less long for a step than the others do: it can find out who is to blame.
const FOLLOWER_PATIENCE: Duration = Duration::from_secs(15);
/// A peer's failure is often known here a moment before the channel names the peer: who waits is
/// told the cause, and does not pass its own guess on to others.
const BLAME_PAUSE: Duration = Duration::from_millis(500);
/// For the last words to rank 0.
const LAST_WORDS_LIMIT: Duration = Duration::from_secs(1);

/// A chunk of this size uses the device well and delays other sequences by a few steps only.
const CHUNK_TOKENS: usize = 512;

/// How often memory is looked at while steps run.
const MEMORY_PERIOD: Duration = Duration::from_secs(2);

const WARMING: &str = "warming up";
const WAITING: &str = "waiting for the other ranks to load";

/// What the engine's thread starts from.
pub(crate) struct Start {
    pub(crate) config: RunnerConfig,
    pub(crate) tls: TlsPaths,
    pub(crate) runtime: Handle,
    pub(crate) reporter: Reporter,
    pub(crate) watchdog: Watchdog,
    /// Rank 0's HTTP side.
    pub(crate) shared: Shared,
    /// Rank 0's ends of the rank channel, once there; also used to tell the others to stop.
    pub(crate) senders: Arc<Mutex<Vec<Sender>>>,
    /// Rank 0's socket for the rank channel.
    pub(crate) control: Option<TcpListener>,
    pub(crate) steps: Steps,
}

/// How a rank gets its orders.
enum Link {
    /// Rank 0 makes them from requests.
    First,
    /// The others are told; `sender` goes back to rank 0.
    Other { commands: mpsc::Receiver<RankCommand>, sender: Arc<Mutex<Sender>> },
}

/// Counts the ranks that have their weights.
#[derive(Clone)]
struct Loaded {
    count: Arc<AtomicU32>,
    world_size: u32,
    watchdog: Watchdog,
}

impl Loaded {
    fn one_more(&self) {
        if self.count.fetch_add(1, Ordering::SeqCst) + 1 == self.world_size {
            // Unless the ranks have met already.
            self.watchdog.replace(WAITING, "meeting the other ranks after loading", MEET_LIMIT);
        }
    }
}

/// Runs the rank; returns when it can't go on. Rank 0 is told first where there is one.
pub(crate) fn run(mut start: Start) -> Failure {
    let pause = |failure: &Failure, world_size: u32| {
        if world_size > 1 && !failure.permanent {
            std::thread::sleep(BLAME_PAUSE);
        }
    };
    let world_size = start.config.world_size;
    let (mut link, loaded) = match connect(&mut start) {
        Err(failure) => {
            pause(&failure, world_size);
            return failure;
        }
        Ok(connected) => connected,
    };
    let failure = match serve(&start, &mut link, &loaded) {
        Ok(()) => Failure::retryable("Stopped", "nobody can send requests any more"),
        Err(failure) => failure,
    };
    // Meanwhile the channel's task may end the process with the cause.
    pause(&failure, world_size);
    if let Link::Other { sender, .. } = &mut link {
        let note = RankNote::Failed { message: failure.message.clone() };
        let send = async {
            timeout(LAST_WORDS_LIMIT, async { sender.lock().await.send(&note).await }).await
        };
        let _ = start.runtime.block_on(send);
    }
    failure
}

/// Opens the rank channel.
fn connect(start: &mut Start) -> Result<(Link, Loaded), Failure> {
    let Start { config, tls, runtime, reporter, watchdog, senders, control, steps, .. } = start;
    let loaded =
        Loaded { count: Arc::default(), world_size: config.world_size, watchdog: watchdog.clone() };
    reporter.phase(ShardPhase::Connecting, 0);
    if config.world_size == 1 {
        return Ok((Link::First, loaded));
    }
    let me = Hello::from(&*config);
    let Some(listener) = control.take() else {
        let connecting = channel::connect(config.control, tls, &me, CONNECT_LIMIT);
        let (sender, receiver) =
            runtime.block_on(connecting).map_err(|error| channel_failure(&error))?.split();
        let (orders, commands) = mpsc::channel();
        let sender = Arc::new(Mutex::new(sender));
        let back = (sender.clone(), steps.clone());
        runtime.spawn(take_commands(receiver, orders, back, reporter.clone()));
        return Ok((Link::Other { commands, sender }, loaded));
    };
    let gathering = channel::gather(&listener, tls, &me, CONNECT_LIMIT);
    let peers = runtime.block_on(gathering).map_err(|error| channel_failure(&error))?;
    let roll = Roll::default();
    let asked = (roll.clone(), runtime.clone(), senders.clone(), steps.clone());
    watchdog.ask(Box::new(move |still| {
        let (roll, runtime, senders, steps) = &asked;
        roll.call(runtime, senders, steps, still)
    }));
    let mut ends = senders.blocking_lock();
    for peer in peers {
        let (sender, receiver) = Peer::split(peer);
        ends.push(sender);
        let all = senders.clone();
        let told = (loaded.clone(), roll.clone());
        runtime.spawn(take_notes(receiver, told, reporter.clone(), all));
    }
    drop(ends);
    Ok((Link::First, loaded))
}

/// Other ranks: hands commands to the engine's thread until rank 0 is lost.
async fn take_commands(
    mut receiver: Receiver,
    orders: mpsc::Sender<RankCommand>,
    (sender, steps): (Arc<Mutex<Sender>>, Steps),
    reporter: Reporter,
) {
    loop {
        match receiver.receive().await {
            Ok(RankCommand::RollCall) => {
                let here = RankNote::Here { steps: steps.count() };
                // Without a connection the next receive tells.
                let _ = sender.lock().await.send(&here).await;
            }
            Ok(RankCommand::Shutdown) => exit_now(EXIT_STOPPED),
            Ok(RankCommand::Abandon { message }) => {
                reporter.fail(&Failure::retryable(REASON_PEER_LOST, message));
            }
            // The engine's thread is gone only when it ends the process itself.
            Ok(command) => drop(orders.send(command)),
            Err(error) => reporter.fail(&channel_failure(&error)),
        }
    }
}

/// Rank 0: listens to one rank until it is lost.
async fn take_notes(
    mut receiver: Receiver,
    (loaded, roll): (Loaded, Roll),
    reporter: Reporter,
    senders: Arc<Mutex<Vec<Sender>>>,
) {
    let rank = receiver.rank();
    let failure = loop {
        match receiver.receive().await {
            Ok(RankNote::Loaded) => loaded.one_more(),
            Ok(RankNote::Here { steps }) => roll.answered(rank, steps),
            Ok(RankNote::Failed { message }) => {
                let message = format!("rank {rank} failed: {message}");
                break Failure::retryable(REASON_PEER_LOST, message);
            }
            Err(error) => break channel_failure(&error),
        }
    };
    // The others would see the loss of rank 0 only.
    let message = failure.message.clone();
    let tell = async {
        let mut senders = senders.lock().await;
        senders.retain(|sender| sender.rank() != rank);
        channel::send_all(&mut senders, &RankCommand::Abandon { message }).await
    };
    let _ = timeout(LAST_WORDS_LIMIT, tell).await;
    reporter.fail(&failure)
}

fn serve(start: &Start, link: &mut Link, loaded: &Loaded) -> Result<(), Failure> {
    let Start { config, reporter, watchdog, .. } = start;
    reporter.phase(ShardPhase::Connecting, 3);
    let group = match config.world_size {
        1 => None,
        _ => Some(form_group(start)?),
    };
    reporter.phase(ShardPhase::Loading, 10);
    let text = match link {
        Link::First => Some(load_text(config)?),
        Link::Other { .. } => None,
    };
    let engine = load(start, link, loaded, group)?;
    reporter.phase(ShardPhase::Warming, 90);
    reporter.memory(engine.memory_bytes());
    let mut ranks = Ranks {
        memory: Memory { bytes: engine.memory_bytes(), checked: Instant::now() },
        engine,
        watchdog: watchdog.clone(),
        reporter: reporter.clone(),
        runtime: start.runtime.clone(),
        senders: start.senders.clone(),
        warm: false,
        step_limit: step_limit(config),
        steps: start.steps.clone(),
    };
    match (link, text) {
        (Link::First, Some(text)) => ranks.serve_requests(start, text),
        (Link::Other { commands, .. }, _) => ranks.follow(commands),
        (Link::First, None) => unreachable!("loaded above"),
    }
}

/// Forms MLX's group and tries it out.
fn form_group(start: &Start) -> Result<Group, Failure> {
    let Start { config, reporter, watchdog, .. } = start;
    let backend = match config.transport {
        TransportKind::Ring => Backend::Ring,
        TransportKind::Jaccl => Backend::Jaccl,
        TransportKind::Nccl => Backend::Nccl,
    };
    watchdog.watch("forming MLX's group", GROUP_LIMIT);
    let group = Group::init(backend).map_err(EngineError::from)?;
    if (group.rank(), group.size()) != (config.rank as usize, config.world_size as usize) {
        let (rank, size) = (group.rank(), group.size());
        return Err(Failure::permanent(
            "BadConfig",
            format!(
                "MLX's environment says rank {rank} of {size}, the config rank {} of {}",
                config.rank, config.world_size
            ),
        ));
    }
    reporter.phase(ShardPhase::Connecting, 6);
    watchdog.watch("the group's self-test", SELF_TEST_LIMIT);
    group.self_test().map_err(EngineError::from)?;
    watchdog.rest();
    Ok(group)
}

fn load_text(config: &RunnerConfig) -> Result<ModelText, Failure> {
    let failure = |error: &TextError| {
        let passing =
            matches!(error, TextError::Read { source, .. } if source.kind() != ErrorKind::NotFound);
        Failure { reason: "BadModel", message: chain(error), permanent: !passing }
    };
    let tokenizer = Tokenizer::load(&config.model_dir).map_err(|error| failure(&error))?;
    let template = match ChatTemplate::load(&config.model_dir) {
        Ok(template) => Some(template),
        Err(TextError::NoTemplate { .. }) => None,
        Err(error) => return Err(failure(&error)),
    };
    Ok(ModelText { tokenizer: Arc::new(tokenizer), template })
}

/// Loads this rank's weights; blocks until all ranks have theirs.
fn load(
    start: &Start,
    link: &mut Link,
    loaded: &Loaded,
    group: Option<Group>,
) -> Result<Engine, Failure> {
    let Start { config, runtime, reporter, watchdog, .. } = start;
    let layers = config.layers.range();
    let load = LoadConfig {
        model_dir: config.model_dir.clone(),
        layers: layers.start as usize..layers.end as usize,
        sharding: match config.sharding {
            ShardingKind::Pipeline => Sharding::Pipeline,
            ShardingKind::Tensor => Sharding::Tensor,
        },
        group,
        context_length: config.context_length as usize,
    };
    exo_engine::bound_reuse();
    watchdog.watch("loading the weights", LOAD_LIMIT);
    let mut told = Ok(());
    let mut progress = |LoadProgress { bytes_done, bytes_total }| {
        let share = (bytes_done * 75).checked_div(bytes_total).unwrap_or(75);
        reporter.phase(ShardPhase::Loading, 10 + u8::try_from(share).unwrap_or(75));
        if bytes_done < bytes_total || config.world_size == 1 {
            watchdog.watch("loading the weights", LOAD_LIMIT);
            return;
        }
        // As long as the others take; whoever hangs is ended by its own watchdog, and the channel
        // tells the others.
        watchdog.watch(WAITING, Duration::MAX);
        match link {
            Link::First => loaded.one_more(),
            Link::Other { sender, .. } => {
                let send = async { sender.lock().await.send(&RankNote::Loaded).await };
                told = runtime.block_on(send);
            }
        }
    };
    let engine = Engine::load(&load, &mut progress)?;
    watchdog.rest();
    told.map_err(|error| channel_failure(&error))?;
    let info = engine.info();
    let (model_type, layers) = (&config.model_type, config.total_layers as usize);
    if (&info.model_type, info.layers) != (model_type, layers) {
        let message = format!(
            "{} is of type {} with {} layers, expected {model_type} with {layers}",
            config.model_dir.display(),
            info.model_type,
            info.layers,
        );
        return Err(Failure::permanent("BadModel", message));
    }
    Ok(engine)
}

struct Memory {
    bytes: u64,
    checked: Instant,
}

/// The engine of this rank, and for rank 0 the way to make the others run the same.
struct Ranks {
    engine: Engine,
    watchdog: Watchdog,
    reporter: Reporter,
    runtime: Handle,
    /// Empty on other ranks than 0, and when there are none.
    senders: Arc<Mutex<Vec<Sender>>>,
    memory: Memory,
    /// The warm-up is over, which has one limit for all its steps.
    warm: bool,
    step_limit: Duration,
    steps: Steps,
}

impl Ranks {
    /// Rank 0 from here on.
    fn serve_requests(mut self, start: &Start, text: ModelText) -> Result<(), Failure> {
        let live_max = start.config.max_concurrency.max(1) as usize;
        self.watchdog.watch(WARMING, WARM_LIMIT);
        self.warm_up(live_max)?;
        self.tell(&RankCommand::Ready)?;
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
            live_max,
            chunk_tokens: CHUNK_TOKENS,
        };
        let is_over = || began.elapsed() > WARM_BUDGET;
        warm::warm_up(self, &extent, is_over, |done, all| {
            let share = u8::try_from(done * 9 / all).unwrap_or(9);
            reporter.phase(ShardPhase::Warming, 90 + share);
        })
    }

    /// The other ranks from here on.
    fn follow(&mut self, commands: &mpsc::Receiver<RankCommand>) -> Result<(), Failure> {
        self.watchdog.watch(WARMING, WARM_LIMIT);
        while let Ok(command) = commands.recv() {
            match command {
                RankCommand::Open { seq, sampling, prompt } => {
                    self.engine.resume(seq, &sampling, prompt);
                }
                RankCommand::Prefill(step) => {
                    let result = self.watched(|engine| engine.step(&step));
                    warn_of_refusal(&stepped(result)?);
                }
                RankCommand::Decode(feeds) => {
                    let result = self.watched(|engine| engine.decode(&feeds));
                    warn_of_refusal(&stepped(result)?);
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

    /// Makes the other ranks run the same as this one.
    fn tell(&self, command: &RankCommand) -> Result<(), Failure> {
        let send = async { channel::send_all(&mut self.senders.lock().await, command).await };
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
    fn open(&mut self, seq: SeqId, sampling: &Sampling, prompt: usize) -> Result<(), Failure> {
        self.tell(&RankCommand::Open { seq, sampling: sampling.clone(), prompt })?;
        self.engine.resume(seq, sampling, prompt);
        Ok(())
    }

    fn prefill(&mut self, step: &Step) -> Result<Stepped, Failure> {
        self.tell(&RankCommand::Prefill(step.clone()))?;
        stepped(self.watched(|engine| engine.step(step)))
    }

    fn decode(&mut self, feeds: &[Feed]) -> Result<Stepped, Failure> {
        self.tell(&RankCommand::Decode(feeds.to_vec()))?;
        stepped(self.watched(|engine| engine.decode(feeds)))
    }

    fn close(&mut self, seq: SeqId) -> Result<(), Failure> {
        self.tell(&RankCommand::Close { seq })?;
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

pub(crate) fn channel_failure(error: &ChannelError) -> Failure {
    let (reason, permanent) = match error {
        ChannelError::Trust(_) => ("BadCertificates", true),
        ChannelError::Listen { .. } => ("PortInUse", false),
        ChannelError::Missing { .. } | ChannelError::Unreachable { .. } => ("PeerMissing", false),
        ChannelError::Lost { .. } => (REASON_PEER_LOST, false),
    };
    Failure { reason, message: chain(error), permanent }
}
