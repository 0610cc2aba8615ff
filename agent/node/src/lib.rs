//! Node agent: registers the machine and runs the shards that are bound to it.
//!
//! Owns: the Node's status, the Shards' status, runner processes, finding weights on disk, setting
//! addresses aside. Never: placement or restart policy (the control plane decides when to try
//! again), MLX (that is the runner), writing outside its data directory.
//!
//! # Guarantees
//! - A Shard's finalizer goes only after its runner has ended.
//! - No two runners of one replica of an instance live here at the same time.
//! - Runners end with the agent, and those of an earlier agent are ended at start.

mod lines;
mod metrics;
mod node;
mod orphans;
mod ports;
mod probe;
mod runner;
mod shard;
mod supervisor;
mod weights;

use std::{
    io,
    net::IpAddr,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use exo_crds::{event::Reporter, runner::RunnerTls};
use exo_recorder::Recorder;
use exo_trust::TlsPaths;
use kube::{Client, runtime::utils::Backoff};
use prometheus::Registry;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::{
    metrics::Metrics,
    orphans::Ended,
    shard::facilities::{Host, Machine},
    weights::ModelStore,
};

/// A process that survives SIGKILL for longer hangs in the kernel; waiting more is no use.
const ORPHANS_LIMIT: Duration = Duration::from_secs(5);

/// What an agent must be told.
#[derive(Clone, Debug)]
pub struct AgentConfig {
    /// Name of the Node resource.
    pub node_name: String,
    /// The agent keeps its files below `shards/` in here.
    pub data_dir: PathBuf,
    /// The `exo-runner` binary.
    pub runner_path: PathBuf,
    /// Folders in which relative model paths are looked up, in this order.
    pub model_dirs: Vec<PathBuf>,
    /// Where other nodes reach this one.
    pub address: IpAddr,
    /// Certificates of this node, for its runners.
    pub tls: TlsPaths,
}

/// Why an agent can't start.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    #[error("preparing {path}")]
    DataDir {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("registering metrics")]
    Metrics(#[from] prometheus::Error),
}

/// Runs the agent until `shutdown` is cancelled; returns when all its runners have ended. An API
/// that can't be reached is waited for.
///
/// # Errors
/// Only what makes starting impossible.
pub async fn run(
    config: AgentConfig,
    client: Client,
    registry: &Registry,
    shutdown: CancellationToken,
) -> Result<(), AgentError> {
    let metrics = Metrics::register(registry)?;
    let shards_dir = prepare(&config.data_dir).await?;
    let models = ModelStore::new(config.model_dirs.clone(), |name| std::env::var_os(name));
    let machine = Machine {
        address: config.address,
        runner_path: config.runner_path.clone(),
        shards_dir,
        models,
        tls: RunnerTls {
            ca: absolute(&config.tls.ca)?,
            cert: absolute(&config.tls.cert)?,
            key: absolute(&config.tls.key)?,
        },
    };
    let disk = machine.models.disk().to_owned();
    let (events, telling) = {
        let component = "exo-agent".to_owned();
        let reporter = Reporter { component, instance: config.node_name.clone() };
        Recorder::new(client.clone(), reporter, || true)
    };
    let host = Arc::new(Host::new(client.clone(), machine, events.clone()));
    let (recovered, recoveries) = watch::channel(0);
    let (listed, is_listed) = watch::channel(false);
    let source = supervisor::Source {
        client: client.clone(),
        node: config.node_name.clone(),
        list_limit: supervisor::LIST_LIMIT,
    };
    let supervising = supervisor::run(
        source,
        host,
        metrics.clone(),
        supervisor::Signals { recovered: recoveries, listed },
        shutdown.clone(),
    );
    let signals = node::Signals { recovered, listed: is_listed, events };
    let work = async {
        tokio::join!(supervising, node::run(client, config, disk, metrics, signals, shutdown))
    };
    tokio::select! {
        _ = work => {}
        // Cancel-safe: it never ends by itself, and events on their way are a courtesy.
        () = telling => {}
    }
    Ok(())
}

/// Ends what an earlier agent left running and clears its files.
async fn prepare(data_dir: &Path) -> Result<PathBuf, AgentError> {
    let failed = |path: &Path| {
        let path = path.to_owned();
        move |source| AgentError::DataDir { path, source }
    };
    std::fs::create_dir_all(data_dir).map_err(failed(data_dir))?;
    let shards_dir = absolute(data_dir)?.join("shards");
    let dir = shards_dir.clone();
    let ending = tokio::task::spawn_blocking(move || orphans::end_all(&dir, ORPHANS_LIMIT));
    match ending.await {
        Ok(Ended { killed: 0, .. }) => {}
        Ok(Ended { killed, left: 0 }) => {
            tracing::info!(killed, "ended runners of an earlier agent");
        }
        Ok(Ended { left, .. }) => {
            tracing::warn!(left, "runners of an earlier agent can't be killed; going on");
        }
        Err(error) => tracing::warn!(%error, "looking for runners of an earlier agent broke"),
    }
    match std::fs::remove_dir_all(&shards_dir) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err(failed(&shards_dir)(error));
        }
        Ok(()) | Err(_) => {}
    }
    std::fs::create_dir_all(&shards_dir).map_err(failed(&shards_dir))?;
    Ok(shards_dir)
}

fn absolute(path: &Path) -> Result<PathBuf, AgentError> {
    std::path::absolute(path)
        .map_err(|source| AgentError::DataDir { path: path.to_owned(), source })
}

/// Delays between tries of a watch or a call: short, because serving waits for them and an agent is
/// but one client.
#[derive(Clone, Debug)]
pub(crate) struct Delays(Duration);

impl Delays {
    const FIRST: Duration = Duration::from_millis(100);
    const LONGEST: Duration = Duration::from_secs(2);

    pub(crate) fn new() -> Self {
        Self(Self::FIRST)
    }
}

impl Iterator for Delays {
    type Item = Duration;

    fn next(&mut self) -> Option<Duration> {
        let delay = self.0;
        self.0 = (delay * 2).min(Self::LONGEST);
        Some(delay)
    }
}

impl Backoff for Delays {
    fn reset(&mut self) {
        self.0 = Self::FIRST;
    }
}
