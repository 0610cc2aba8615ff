//! A world for tests of [`Task`](super::Task): it does as a test says and writes down what is asked.

use std::{
    collections::BTreeMap,
    net::Ipv4Addr,
    path::PathBuf,
    sync::{Arc, Mutex},
    time::Duration,
};

use exo_crds::{
    ModelSource, Shard, ShardFailure, ShardListen, ShardPhase,
    event::Occurrence,
    runner::{RunnerEvent, RunnerTls},
};
use prometheus::Registry;
use serde_json::Value;
use tokio::{
    sync::{mpsc, watch},
    task::JoinHandle,
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;

use super::{Shared, run};
use crate::{
    metrics::Metrics,
    shard::{
        Exit,
        facilities::{ApiError, Facilities, Machine, Output, Runner},
        launch::Launch,
        slots::Slots,
        tests::{listen, meeting},
    },
    weights::ModelStore,
};

/// Short, but long against what the scripts do.
pub(super) const SILENCE: Duration = Duration::from_millis(300);

/// A world that does as the test says and writes down what is asked of it.
pub(super) struct Script {
    machine: Machine,
    /// What was asked, in order.
    log: mpsc::UnboundedSender<String>,
    /// Tests speak for the runner of a shard through these.
    voices: Mutex<BTreeMap<String, mpsc::UnboundedSender<Output>>>,
    pub(super) weights: Result<PathBuf, ShardFailure>,
    /// Calls to the API that fail before one succeeds.
    pub(super) failing_calls: Mutex<u32>,
    /// All that was sent to be merged into a status, arrived or not.
    pub(super) patches: Mutex<Vec<Value>>,
    /// Whom events were about, and their reasons.
    pub(super) events: Mutex<Vec<String>>,
}

pub(super) struct FakeRunner {
    name: String,
    outputs: mpsc::UnboundedReceiver<Output>,
    log: mpsc::UnboundedSender<String>,
}

impl Runner for FakeRunner {
    async fn next(&mut self) -> Output {
        match self.outputs.recv().await {
            Some(output) => output,
            None => std::future::pending().await,
        }
    }

    async fn stop(&mut self) -> Exit {
        self.log.send(format!("stop {}", self.name)).unwrap();
        // Ending takes a moment, in which nothing else may start.
        sleep(Duration::from_millis(100)).await;
        self.log.send(format!("stopped {}", self.name)).unwrap();
        Exit { code: Some(0), ..Exit::default() }
    }
}

impl Script {
    fn call(&self, what: String) -> Result<(), ApiError> {
        let mut failing = self.failing_calls.lock().unwrap();
        if *failing > 0 {
            *failing -= 1;
            return Err(ApiError::Failed("no route".to_owned()));
        }
        let _ = self.log.send(what);
        Ok(())
    }
}

fn name(shard: &Shard) -> String {
    shard.metadata.name.clone().unwrap()
}

impl Facilities for Script {
    type Reservation = ();
    type Runner = FakeRunner;

    async fn locate(&self, _source: &ModelSource) -> Result<PathBuf, ShardFailure> {
        self.weights.clone()
    }

    fn reserve(&self) -> Result<((), ShardListen), ShardFailure> {
        Ok(((), listen()))
    }

    fn machine(&self) -> &Machine {
        &self.machine
    }

    fn spawn(&self, launch: &Launch) -> Result<FakeRunner, ShardFailure> {
        let name = launch.config.shard.clone();
        self.log.send(format!("spawn {name}")).unwrap();
        let (voice, outputs) = mpsc::unbounded_channel();
        self.voices.lock().unwrap().insert(name.clone(), voice);
        Ok(FakeRunner { name, outputs, log: self.log.clone() })
    }

    async fn set_finalizer(&self, shard: &Shard, present: bool) -> Result<(), ApiError> {
        self.call(format!("finalizer of {}: {present}", name(shard)))
    }

    async fn write_status(&self, shard: &Shard, patch: Value) -> Result<(), ApiError> {
        let phase = patch["phase"].as_str().unwrap_or_default();
        let written = self.call(format!("{} is {phase}", name(shard)));
        self.patches.lock().unwrap().push(patch);
        written
    }

    fn tell(&self, shard: &Shard, occurrence: Occurrence) {
        let told = format!("{}: {}", name(shard), occurrence.reason);
        self.events.lock().unwrap().push(told);
    }
}

/// Tasks of one agent, and what they asked for.
pub(super) struct World {
    pub(super) shared: Shared<Script>,
    pub(super) log: mpsc::UnboundedReceiver<String>,
    registry: Registry,
}

pub(super) struct Running {
    wanted: watch::Sender<Option<Arc<Shard>>>,
    shard: Shard,
    pub(super) task: JoinHandle<()>,
}

impl World {
    pub(super) fn new(edit: impl FnOnce(&mut Script)) -> Self {
        let (sender, log) = mpsc::unbounded_channel();
        let mut script = Script {
            machine: Machine {
                address: Ipv4Addr::LOCALHOST.into(),
                runner_path: "/bin/runner".into(),
                shards_dir: "/d".into(),
                models: ModelStore::new(Vec::new(), |_| None),
                tls: RunnerTls { ca: "/a".into(), cert: "/b".into(), key: "/c".into() },
            },
            log: sender,
            voices: Mutex::default(),
            weights: Ok("/m".into()),
            failing_calls: Mutex::new(0),
            patches: Mutex::default(),
            events: Mutex::default(),
        };
        edit(&mut script);
        let registry = Registry::new();
        let shared = Shared {
            facilities: Arc::new(script),
            slots: Slots::default(),
            metrics: Metrics::register(&registry).unwrap(),
            silence_limit: SILENCE,
            ending: CancellationToken::new(),
        };
        Self { shared, log, registry }
    }

    pub(super) fn start(&self, shard: Shard) -> Running {
        let first = Arc::new(shard.clone());
        let (wanted, receiver) = watch::channel(Some(first.clone()));
        let task = tokio::spawn(run(self.shared.clone(), first, receiver));
        Running { wanted, shard, task }
    }

    pub(super) async fn expect(&mut self, lines: &[&str]) {
        for line in lines {
            let next = timeout(Duration::from_secs(300), self.log.recv()).await;
            assert_eq!(next.unwrap().as_deref(), Some(*line));
        }
    }

    pub(super) fn say(&self, shard: &str, output: Output) {
        self.shared.facilities.voices.lock().unwrap()[shard].send(output).unwrap();
    }

    pub(super) fn phase(&self, shard: &str, phase: ShardPhase) {
        self.say(shard, Output::Event(RunnerEvent::Phase { phase, progress_percent: 50 }));
    }

    pub(super) fn metric(&self, name: &str) -> f64 {
        let families = self.registry.gather();
        let family = families.iter().find(|family| family.name() == name);
        let sum =
            |m: &prometheus::proto::Metric| m.get_counter().get_value() + m.get_gauge().get_value();
        family.map_or(0.0, |family| family.get_metric().iter().map(sum).sum())
    }
}

impl Running {
    pub(super) fn edit(&mut self, edit: impl FnOnce(&mut Shard)) {
        edit(&mut self.shard);
        self.wanted.send_replace(Some(Arc::new(self.shard.clone())));
    }

    pub(super) fn meet(&mut self) {
        self.edit(|shard| shard.spec.rendezvous = Some(meeting()));
    }

    pub(super) async fn gone(self) {
        self.wanted.send_replace(None);
        timeout(Duration::from_secs(60), self.task).await.unwrap().unwrap();
    }
}
