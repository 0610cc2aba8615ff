//! `exo-runner serve`: one rank of one Shard, started and watched by an agent. Owns the way to
//! `Ready`, the rank channel, scheduling and rank 0's HTTP side; never computes, and never decides
//! about restarts.

mod answer;
mod channel;
mod driver;
mod http;
mod metrics;
mod rank;
mod report;
mod request;
mod roll;
#[cfg(test)]
mod samples;
mod scheduler;
mod warm;
mod watchdog;

use std::{
    io::Read as _,
    path::{Path, PathBuf},
    process::ExitCode,
    sync::Arc,
    thread,
    time::Duration,
};

use exo_crds::runner::{EXIT_STOPPED, RunnerConfig};
use exo_engine::exit_now;
use exo_trust::{ClientAuth, ServeLimits, TlsListener, TlsPaths, TrustError};
use tokio::{
    net::TcpListener,
    runtime::Runtime,
    signal::unix::{SignalKind, signal},
    sync::Mutex,
    time::timeout,
};
use tracing::{error, info};
use tracing_subscriber::EnvFilter;

use self::{
    channel::{ChannelError, RankCommand, Sender},
    http::Shared,
    metrics::Metrics,
    rank::{Start, channel_failure},
    report::{Failure, Reporter, chain},
    roll::Steps,
    watchdog::Watchdog,
};

/// Between two figures of the speed.
const THROUGHPUT_PERIOD: Duration = Duration::from_secs(2);
/// For telling the other ranks to stop.
const GOODBYE_LIMIT: Duration = Duration::from_millis(200);
/// The rank channel, HTTP and timers; the work is on the engine's thread.
const WORKER_THREADS: usize = 2;

/// Serve one rank of a model, as an agent starts it.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The rank's configuration, a JSON file that the agent wrote
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
}

/// Serves until stdin ends, a signal comes or something fails. Ends the process itself: MLX's
/// threads may hang.
pub(crate) fn run(args: &Args) -> anyhow::Result<ExitCode> {
    start_log();
    let reporter = Reporter::default();
    exit_with_stdin();
    exo_trust::install_crypto();
    let config = match read_config(&args.config) {
        Ok(config) => config,
        Err(failure) => reporter.fail(&failure),
    };
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(WORKER_THREADS)
        .enable_all()
        .build()?;
    let watchdog = Watchdog::default();
    watchdog.start(reporter.clone())?;
    let start = match runtime.block_on(prepare(config, &runtime, &reporter, watchdog)) {
        Ok(start) => start,
        Err(failure) => reporter.fail(&failure),
    };
    // MLX recurses through its graph.
    let engine = thread::Builder::new().name("engine".to_owned()).stack_size(16 << 20);
    let failure = match engine.spawn(move || rank::run(start))?.join() {
        Ok(failure) => failure,
        Err(_) => Failure::retryable("Panicked", "the engine's thread panicked; see the log"),
    };
    reporter.fail(&failure)
}

/// Opens sockets, starts the tasks beside the engine's thread.
async fn prepare(
    config: RunnerConfig,
    runtime: &Runtime,
    reporter: &Reporter,
    watchdog: Watchdog,
) -> Result<Start, Failure> {
    let tls = TlsPaths {
        ca: config.tls.ca.clone(),
        cert: config.tls.cert.clone(),
        key: config.tls.key.clone(),
    };
    let senders = Arc::new(Mutex::new(Vec::new()));
    runtime.spawn(exit_with_signals(senders.clone())?);
    runtime.spawn(reporter.clone().repeat_loading());
    let shared = Shared { service: Arc::default(), metrics: Metrics::new() };
    let mut control = None;
    if config.rank == 0 {
        if config.world_size > 1 {
            control = Some(listen(config.control).await?);
        }
        let address = config.serve.ok_or_else(|| {
            Failure::permanent("BadConfig", "`serve`: rank 0 needs an address for requests")
        })?;
        let listener = listen(address).await?;
        let server = exo_trust::server_config(&tls, ClientAuth::Required)
            .map_err(|error| bad_certificates(&error))?;
        let listener = TlsListener::new(listener, server)
            .map_err(|error| Failure::retryable("HttpFailed", chain(&error)))?;
        let app = http::app(shared.clone());
        let reporter_of_http = reporter.clone();
        runtime.spawn(async move {
            let never = std::future::pending();
            exo_trust::serve(listener, app, ServeLimits::default(), never).await;
            let message = "it ended".to_owned();
            reporter_of_http.fail(&Failure::retryable("HttpFailed", message));
        });
        runtime.spawn(report_throughput(shared.metrics.clone(), reporter.clone()));
    }
    info!(
        shard = config.shard,
        group = config.group,
        rank = config.rank,
        world_size = config.world_size,
        "starting"
    );
    Ok(Start {
        config,
        tls,
        runtime: runtime.handle().clone(),
        reporter: reporter.clone(),
        watchdog,
        shared,
        senders,
        control,
        steps: Steps::default(),
    })
}

/// The log goes to stderr; stdout is for events.
fn start_log() {
    let filter = EnvFilter::try_from_env("EXO_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    // An error says that there is a log already.
    let _ = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(false)
        // It would complain of a log that can't be written into that same log, and panic.
        .log_internal_errors(false)
        .try_init();
}

/// Ends the process when the agent is gone, whatever the other threads do.
fn exit_with_stdin() {
    let watch = || {
        let mut buffer = [0; 64];
        loop {
            match std::io::stdin().read(&mut buffer) {
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Ok(0) | Err(_) => exit_now(EXIT_STOPPED),
                Ok(_) => {}
            }
        }
    };
    if let Err(error) = thread::Builder::new().name("stdin".to_owned()).spawn(watch) {
        error!(%error, "no thread to watch stdin");
        exit_now(exo_crds::runner::EXIT_RETRYABLE);
    }
}

/// Ends the process when it is asked to, and the other ranks with it.
fn exit_with_signals(
    senders: Arc<Mutex<Vec<Sender>>>,
) -> Result<impl Future<Output = ()> + Send, Failure> {
    let failure = |error| Failure::retryable("SignalsFailed", chain(&error));
    let mut terminate = signal(SignalKind::terminate()).map_err(failure)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(failure)?;
    Ok(async move {
        // Cancel-safe: signals are not lost, and the process ends with the first.
        tokio::select! {
            _ = terminate.recv() => info!("asked to stop"),
            _ = interrupt.recv() => info!("interrupted"),
        }
        let goodbye = async {
            let mut senders = senders.lock().await;
            channel::send_all(&mut senders, &RankCommand::Shutdown).await
        };
        // The ends of the connections tell the others as well.
        let _ = timeout(GOODBYE_LIMIT, goodbye).await;
        exit_now(EXIT_STOPPED);
    })
}

/// Tells the speed while tokens are drawn, and once when that ends.
async fn report_throughput(metrics: Metrics, reporter: Reporter) {
    let mut clock = tokio::time::interval(THROUGHPUT_PERIOD);
    let (mut before, mut idle) = (0, true);
    loop {
        clock.tick().await;
        let tokens = metrics.completion_tokens.get();
        let drawn = tokens - before;
        before = tokens;
        if drawn > 0 || !idle {
            reporter.throughput(drawn as f64 / THROUGHPUT_PERIOD.as_secs_f64());
        }
        idle = drawn == 0;
    }
}

async fn listen(address: std::net::SocketAddr) -> Result<TcpListener, Failure> {
    TcpListener::bind(address)
        .await
        .map_err(|source| channel_failure(&ChannelError::Listen { address, source }))
}

fn bad_certificates(error: &TrustError) -> Failure {
    Failure::permanent("BadCertificates", chain(error))
}

fn read_config(path: &Path) -> Result<RunnerConfig, Failure> {
    let bad =
        |message: String| Failure::permanent("BadConfig", format!("{}: {message}", path.display()));
    let text = std::fs::read(path).map_err(|error| bad(error.to_string()))?;
    let config: RunnerConfig =
        serde_json::from_slice(&text).map_err(|error| bad(error.to_string()))?;
    if config.world_size == 0 || config.rank >= config.world_size {
        let (rank, world_size) = (config.rank, config.world_size);
        return Err(bad(format!("there is no rank {rank} in a world of {world_size}")));
    }
    Ok(config)
}
