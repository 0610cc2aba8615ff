//! What a shard's task needs of the world: the API, the disk, ports, processes.

use std::{future::Future, net::IpAddr, path::PathBuf, time::Duration};

use exo_crds::{
    ModelSource, SHARD_FINALIZER, Shard, ShardFailure, ShardListen,
    event::Occurrence,
    runner::{RunnerEvent, RunnerTls},
};
use exo_recorder::Recorder;
use kube::{
    Api, Client,
    api::{Patch, PatchParams},
};
use serde_json::{Value, json};
use tokio::{sync::oneshot, time::timeout};

use super::{Exit, failure, launch::Launch};
use crate::{ports::Reservation, runner::Process, weights::ModelStore};

/// A call that takes longer is made again.
const CALL_LIMIT: Duration = Duration::from_secs(5);

/// A write to the API that did not happen.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum ApiError {
    #[error("the shard is gone")]
    Gone,
    /// The object is not as it was taken to be.
    #[error("{0}")]
    Conflict(String),
    #[error("{0}")]
    Failed(String),
}

/// A disk that has to wake up takes a few seconds; one that takes longer hangs.
const LOCATE_LIMIT: Duration = Duration::from_secs(30);

/// What comes from a runner.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Output {
    Event(RunnerEvent),
    /// It has ended; nothing follows.
    Exited(Exit),
}

/// A runner that has been started.
pub(crate) trait Runner: Send + 'static {
    /// Must be cancel-safe.
    fn next(&mut self) -> impl Future<Output = Output> + Send;
    /// Returns when it has ended, which must not take long.
    fn stop(&mut self) -> impl Future<Output = Exit> + Send;
}

/// The seam at which tests put a script in place of the world.
pub(crate) trait Facilities: Send + Sync + 'static {
    type Reservation: Send;
    type Runner: Runner;

    /// The folder with the model's files.
    fn locate(
        &self,
        source: &ModelSource,
    ) -> impl Future<Output = Result<PathBuf, ShardFailure>> + Send;
    /// Addresses, held until the first part is dropped.
    fn reserve(&self) -> Result<(Self::Reservation, ShardListen), ShardFailure>;
    /// Where and as what runners are started.
    fn machine(&self) -> &Machine;
    fn spawn(&self, launch: &Launch) -> Result<Self::Runner, ShardFailure>;
    /// Adds or removes the agent's finalizer.
    fn set_finalizer(
        &self,
        shard: &Shard,
        present: bool,
    ) -> impl Future<Output = Result<(), ApiError>> + Send;
    /// Merges `patch` into the status of this very shard, not of another with its name.
    fn write_status(
        &self,
        shard: &Shard,
        patch: Value,
    ) -> impl Future<Output = Result<(), ApiError>> + Send;
    /// Tells what happened to the shard; never waits.
    fn tell(&self, shard: &Shard, occurrence: Occurrence);
}

/// Facts that runners are started with.
#[derive(Clone, Debug)]
pub(crate) struct Machine {
    pub(crate) address: IpAddr,
    pub(crate) runner_path: PathBuf,
    pub(crate) shards_dir: PathBuf,
    pub(crate) models: ModelStore,
    pub(crate) tls: RunnerTls,
}

/// The real world.
pub(crate) struct Host {
    client: Client,
    machine: Machine,
    events: Recorder,
}

impl Host {
    pub(crate) fn new(client: Client, machine: Machine, events: Recorder) -> Self {
        Self { client, machine, events }
    }

    fn api(&self, shard: &Shard) -> Api<Shard> {
        let namespace = shard.metadata.namespace.as_deref().unwrap_or_default();
        Api::namespaced(self.client.clone(), namespace)
    }
}

/// Waits for an answer, but not for ever.
async fn answer<T>(
    call: impl Future<Output = Result<T, kube::Error>> + Send,
) -> Result<T, ApiError> {
    match timeout(CALL_LIMIT, call).await {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(kube::Error::Api(status))) if status.code == 404 => Err(ApiError::Gone),
        Ok(Err(kube::Error::Api(status))) if status.code == 409 => {
            Err(ApiError::Conflict(status.message))
        }
        Ok(Err(error)) => Err(ApiError::Failed(error.to_string())),
        Err(_) => Err(ApiError::Failed(format!("no answer within {} s", CALL_LIMIT.as_secs()))),
    }
}

impl Facilities for Host {
    type Reservation = Reservation;
    type Runner = Process;

    async fn locate(&self, source: &ModelSource) -> Result<PathBuf, ShardFailure> {
        let (models, source) = (self.machine.models.clone(), source.clone());
        let (found, answer) = oneshot::channel();
        // Folders may lie on a disk that hangs: a thread of its own keeps nothing else waiting, not
        // even the end of the process.
        let look = move || drop(found.send(models.locate(&source)));
        let failed = |message: String| failure("WeightsNotFound", message, false);
        std::thread::Builder::new()
            .name("locate".to_owned())
            .spawn(look)
            .map_err(|error| failed(format!("no thread to look for the weights: {error}")))?;
        match timeout(LOCATE_LIMIT, answer).await {
            Ok(Ok(found)) => found.map_err(ShardFailure::from),
            Ok(Err(_)) => Err(failed("looking for the weights broke".to_owned())),
            Err(_) => {
                let seconds = LOCATE_LIMIT.as_secs();
                Err(failed(format!("the disk did not say within {seconds} s what is on it")))
            }
        }
    }

    fn reserve(&self) -> Result<(Reservation, ShardListen), ShardFailure> {
        let address = self.machine.address;
        let reserved = Reservation::new(address).and_then(|held| {
            let listen = held.listen()?;
            Ok((held, listen))
        });
        reserved.map_err(|error| {
            failure("NoAddress", format!("can't listen on {address}: {error}"), false)
        })
    }

    fn machine(&self) -> &Machine {
        &self.machine
    }

    fn spawn(&self, launch: &Launch) -> Result<Process, ShardFailure> {
        let path = &self.machine.runner_path;
        Process::start(path, launch).map_err(|error| {
            failure("RunnerNotStarted", format!("starting {}: {error}", path.display()), false)
        })
    }

    async fn set_finalizer(&self, shard: &Shard, present: bool) -> Result<(), ApiError> {
        let api = self.api(shard);
        let name = shard.metadata.name.as_deref().unwrap_or_default();
        let now = answer(api.get(name)).await?;
        if now.metadata.uid != shard.metadata.uid {
            return Err(ApiError::Gone);
        }
        let mut finalizers = now.metadata.finalizers.unwrap_or_default();
        if finalizers.iter().any(|finalizer| finalizer == SHARD_FINALIZER) == present {
            return Ok(());
        }
        if present {
            finalizers.push(SHARD_FINALIZER.to_owned());
        } else {
            finalizers.retain(|finalizer| finalizer != SHARD_FINALIZER);
        }
        let patch = Patch::Merge(json!({"metadata": {
            "finalizers": finalizers,
            "resourceVersion": now.metadata.resource_version,
        }}));
        answer(api.patch(name, &PatchParams::default(), &patch)).await.map(drop)
    }

    async fn write_status(&self, shard: &Shard, patch: Value) -> Result<(), ApiError> {
        let api = self.api(shard);
        let name = shard.metadata.name.as_deref().unwrap_or_default();
        // The uid makes the server refuse what is meant for an earlier shard of this name.
        let patch = json!({"metadata": {"uid": shard.metadata.uid}, "status": patch});
        let patch = Patch::Merge(patch);
        match answer(api.patch_status(name, &PatchParams::default(), &patch)).await {
            // It may also be that others write at the same time.
            Err(ApiError::Conflict(message)) => {
                let now = answer(api.get(name)).await?;
                Err(if now.metadata.uid == shard.metadata.uid {
                    ApiError::Conflict(message)
                } else {
                    ApiError::Gone
                })
            }
            result => result.map(drop),
        }
    }

    fn tell(&self, shard: &Shard, occurrence: Occurrence) {
        self.events.record(shard, occurrence);
    }
}
