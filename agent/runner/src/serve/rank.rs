//! One rank's way from nothing to `Ready` and its work then, all on the engine's thread: MLX's
//! objects stay on the thread that made them.

mod link;
mod steps;

use std::{
    io::ErrorKind,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use exo_crds::{ShardPhase, ShardingKind, TransportKind, runner::RunnerConfig};
use exo_engine::{
    Engine, EngineError, LoadConfig, LoadProgress, Sharding,
    distributed::{Backend, Group},
    text::{ChatTemplate, TextError, Tokenizer},
};
use exo_trust::TlsPaths;
use tokio::{net::TcpListener, runtime::Handle, sync::Mutex, time::timeout};
use tracing::{info, warn};

pub(crate) use self::link::channel_failure;
use self::{
    link::{LAST_WORDS_LIMIT, Link, Loaded, WAITING, connect},
    steps::Ranks,
};
use super::{
    channel::{RankNote, Sender},
    http::Shared,
    report::{Failure, Reporter, chain},
    request::ModelText,
    roll::Steps,
    watchdog::Watchdog,
};

/// Ranks that talk on the rank channel already; MLX itself gives up earlier on most transports.
const GROUP_LIMIT: Duration = Duration::from_secs(60);
const SELF_TEST_LIMIT: Duration = Duration::from_secs(30);
/// For the next part of the weights. Below `SILENCE_LIMIT_S`, so that the runner speaks first.
const LOAD_LIMIT: Duration = Duration::from_secs(100);
/// A peer's failure is often known here a moment before the channel names the peer: who waits is
/// told the cause, and does not pass its own guess on to others.
const BLAME_PAUSE: Duration = Duration::from_millis(500);

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
    if let Link::Other { sender, leaves, .. } = &mut link {
        // Rank 0 may end, and the channel with it, before this rank has said why.
        leaves.store(true, Ordering::SeqCst);
        let note = RankNote::Failed { message: failure.message.clone() };
        let send = async {
            timeout(LAST_WORDS_LIMIT, async { sender.lock().await.send(&note).await }).await
        };
        let _ = start.runtime.block_on(send);
    }
    failure
}

fn serve(start: &Start, link: &mut Link, loaded: &Loaded) -> Result<(), Failure> {
    let Start { config, reporter, .. } = start;
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
    let mut ranks = Ranks::new(start, engine);
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
    match info.step_path.fallback() {
        Some(reason) => {
            warn!(%reason, "decodes one sequence without kernels of our own, which is slower");
        }
        None => info!(steps = %info.step_path, "loaded the model"),
    }
    Ok(engine)
}
