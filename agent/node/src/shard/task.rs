//! Drives one Shard: asks what to do next, does it, and waits for the next thing to happen.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
    time::Duration,
};

use exo_crds::{Rendezvous, Shard, ShardPhase, runner::REASON_PEER_LOST};
use tokio::{
    sync::{Mutex as AsyncMutex, OwnedMutexGuard, watch},
    time::{Instant, sleep, sleep_until},
};
use tokio_util::sync::CancellationToken;

use super::{
    Local, Step,
    facilities::{ApiError, Facilities, Output, Runner as _},
    launch::launch,
    report::Reporter,
};
use crate::{Delays, metrics::Metrics};

/// One runner per replica: whoever holds a replica's slot may have a runner.
#[derive(Clone, Debug, Default)]
pub(crate) struct Slots(Arc<Mutex<BTreeMap<SlotKey, Arc<AsyncMutex<()>>>>>);

/// Namespace, instance, replica.
type SlotKey = (String, String, u32);

impl Slots {
    /// Waits until no other shard of the replica has a runner here. Cancel-safe.
    async fn take(&self, shard: &Shard) -> OwnedMutexGuard<()> {
        let namespace = shard.metadata.namespace.clone().unwrap_or_default();
        let key = (namespace, shard.spec.instance.clone(), shard.spec.replica);
        let slot = {
            let mut slots = self.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
            slots.retain(|_, slot| Arc::strong_count(slot) > 1);
            slots.entry(key).or_default().clone()
        };
        slot.lock_owned().await
    }
}

/// What all shards' tasks share.
pub(crate) struct Shared<F> {
    pub(crate) facilities: Arc<F>,
    pub(crate) slots: Slots,
    pub(crate) metrics: Metrics,
    /// A runner that is not Ready yet and stays silent for longer is taken for hung.
    pub(crate) silence_limit: Duration,
    /// The agent shall end.
    pub(crate) ending: CancellationToken,
}

impl<F> Clone for Shared<F> {
    fn clone(&self) -> Self {
        Self {
            facilities: self.facilities.clone(),
            slots: self.slots.clone(),
            metrics: self.metrics.clone(),
            silence_limit: self.silence_limit,
            ending: self.ending.clone(),
        }
    }
}

/// Runs until the shard is gone or the agent ends, and its runner with it. `wanted` holds the shard
/// as watched last, `None` once it is gone.
pub(crate) async fn run<F: Facilities>(
    shared: Shared<F>,
    first: Arc<Shard>,
    mut wanted: watch::Receiver<Option<Arc<Shard>>>,
) {
    // An earlier agent has told what led there.
    let first_phase = first.status.as_ref().and_then(|status| status.phase);
    let mut task = Task {
        local: Local::begin(&first),
        reporter: Reporter::start(shared.facilities.clone(), first.clone()),
        shared,
        first,
        reservation: None,
        running: None,
        counted: false,
        told: first_phase,
    };
    let mut seen = task.first.clone();
    let mut delays = Delays::new();
    loop {
        let shard = wanted.borrow_and_update().clone();
        task.report();
        // Only what is new: an old sighting says nothing about the last write.
        if let Some(shard) = shard.as_ref().filter(|shard| !Arc::ptr_eq(shard, &seen)) {
            task.reporter.observe(shard);
            seen = shard.clone();
        }
        let ending = task.shared.ending.is_cancelled();
        let result = match task.local.next(shard.as_deref(), ending) {
            Step::Wait => {
                task.wait(&mut wanted).await;
                Ok(())
            }
            Step::Finish => return,
            step => task.perform(step, &mut wanted).await,
        };
        match result {
            Ok(()) => delays = Delays::new(),
            Err(error) => {
                tracing::debug!(shard = task.name(), %error, "will try again");
                let delay = delays.next().unwrap_or(Delays::LONGEST);
                tokio::select! {
                    // Cancel-safe: all are only waited for.
                    () = sleep(delay) => {}
                    _ = wanted.changed() => {}
                    () = task.shared.ending.cancelled() => {}
                }
            }
        }
    }
}

struct Task<F: Facilities> {
    shared: Shared<F>,
    /// The shard as it was first seen: all of its spec but the rendezvous is fixed.
    first: Arc<Shard>,
    local: Local,
    reporter: Reporter,
    reservation: Option<F::Reservation>,
    running: Option<Running<F::Runner>>,
    /// Its failure is in the metrics.
    counted: bool,
    /// The phase of which the last event told.
    told: Option<ShardPhase>,
}

/// A live runner and its replica's slot, which goes after it.
struct Running<R> {
    runner: R,
    last_word: Instant,
    _slot: OwnedMutexGuard<()>,
}

impl<F: Facilities> Task<F> {
    fn name(&self) -> &str {
        self.first.metadata.name.as_deref().unwrap_or_default()
    }

    fn namespace(&self) -> &str {
        self.first.metadata.namespace.as_deref().unwrap_or_default()
    }

    fn report(&mut self) {
        let status = self.local.status();
        if let Some(phase) = status.phase.filter(|phase| self.told != Some(*phase)) {
            self.told = Some(phase);
            if let Some(occurrence) = self.local.occurrence(&self.first) {
                self.shared.facilities.tell(&self.first, occurrence);
            }
        }
        // A shard without status is Pending already: that needs no write.
        if status.phase != Some(ShardPhase::Pending) {
            self.reporter.set(status);
        }
        self.shared.metrics.shard_memory(self.namespace(), self.name(), self.local.memory_bytes());
        if let Some(failure) = self.local.failure()
            && !self.counted
        {
            // Ranks that lose a peer only follow it: the peer's own node tells what happened.
            if failure.reason == REASON_PEER_LOST {
                tracing::info!(shard = self.name(), "shard ended: {}", failure.message);
            } else {
                tracing::warn!(
                    shard = self.name(),
                    reason = failure.reason,
                    permanent = failure.permanent,
                    "shard failed: {}",
                    failure.message
                );
            }
            self.shared.metrics.failures.with_label_values(&[failure.reason.as_str()]).inc();
            self.counted = true;
        }
    }

    async fn perform(
        &mut self,
        step: Step,
        wanted: &mut watch::Receiver<Option<Arc<Shard>>>,
    ) -> Result<(), ApiError> {
        match step {
            Step::AddFinalizer => {
                self.shared.facilities.set_finalizer(&self.first, true).await?;
                self.local.finalizer_added();
            }
            Step::RemoveFinalizer => {
                self.reporter.flush().await;
                match self.shared.facilities.set_finalizer(&self.first, false).await {
                    Ok(()) | Err(ApiError::Gone) => self.local.finalizer_removed(),
                    Err(error) => return Err(error),
                }
            }
            Step::Locate => {
                match self.shared.facilities.locate(&self.first.spec.model.source).await {
                    Ok(dir) => self.local.located(dir),
                    Err(failure) => self.local.failed(failure),
                }
            }
            Step::Reserve => match self.shared.facilities.reserve() {
                Ok((reservation, listen)) => {
                    self.reservation = Some(reservation);
                    self.local.reserved(listen);
                }
                Err(failure) => self.local.failed(failure),
            },
            Step::Spawn(model_dir, meeting) => {
                let ending = self.shared.ending.clone();
                let slot = tokio::select! {
                    // Cancel-safe: a slot that was not taken yet is asked for again.
                    slot = self.shared.slots.take(&self.first) => slot,
                    _ = wanted.changed() => return Ok(()),
                    () = ending.cancelled() => return Ok(()),
                };
                self.spawn(model_dir, &meeting, slot);
            }
            Step::GiveUp(failure) => {
                self.reservation = None;
                self.local.failed(failure);
            }
            Step::Stop => {
                if let Some(mut running) = self.running.take() {
                    tracing::info!(shard = self.name(), "stopping the runner");
                    let exit = running.runner.stop().await;
                    self.local.stopped(exit);
                }
            }
            Step::Wait | Step::Finish => {}
        }
        Ok(())
    }

    fn spawn(
        &mut self,
        model_dir: std::path::PathBuf,
        meeting: &Rendezvous,
        slot: OwnedMutexGuard<()>,
    ) {
        let facilities = self.shared.facilities.clone();
        let machine = facilities.machine();
        let status = self.local.status();
        let serve = status.listen.map(|listen| listen.serve).unwrap_or_default();
        let prepared =
            launch(&machine.shards_dir, &machine.tls, &self.first, model_dir, meeting, &serve);
        // From here on the runner's own sockets hold the addresses.
        self.reservation = None;
        match prepared.and_then(|launch| facilities.spawn(&launch)) {
            Ok(runner) => {
                tracing::info!(shard = self.name(), "runner started");
                self.running = Some(Running { runner, last_word: Instant::now(), _slot: slot });
                self.local.spawned();
                if self.first.spec.epoch > 1 {
                    let labels = [self.namespace(), self.first.spec.instance.as_str()];
                    self.shared.metrics.restarts.with_label_values(&labels).inc();
                }
            }
            Err(failure) => self.local.failed(failure),
        }
    }

    /// Until the shard changes, the runner says something or stays silent too long, or the agent
    /// ends.
    async fn wait(&mut self, wanted: &mut watch::Receiver<Option<Arc<Shard>>>) {
        let ending = self.shared.ending.clone();
        let Some(running) = &mut self.running else {
            tokio::select! {
                // Cancel-safe: both are only waited for.
                _ = wanted.changed() => {}
                () = ending.cancelled() => {}
            }
            return;
        };
        let limit = self.shared.silence_limit;
        let deadline = self.local.must_speak().then(|| running.last_word + limit);
        let silent = async {
            match deadline {
                Some(deadline) => sleep_until(deadline).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            // What the runner has said counts even if the shard is deleted at the same moment: it
            // may be why its peers failed.
            biased;
            // Cancel-safe: the runner's next word stays where it is, the others are only waited for.
            output = running.runner.next() => match output {
                Output::Event(event) => {
                    running.last_word = Instant::now();
                    self.local.said(event);
                }
                Output::Exited(exit) => {
                    self.running = None;
                    self.local.exited(exit);
                }
            },
            _ = wanted.changed() => {}
            () = ending.cancelled() => {}
            () = silent => self.local.hung(limit),
        }
    }
}

impl<F: Facilities> Drop for Task<F> {
    fn drop(&mut self) {
        let name = self.first.metadata.name.as_deref().unwrap_or_default();
        self.shared.metrics.shard_memory(self.namespace(), name, None);
    }
}

#[cfg(test)]
mod tests {
    use std::{net::Ipv4Addr, path::PathBuf};

    use exo_crds::{
        ModelSource, ShardFailure, ShardListen,
        event::Occurrence,
        runner::{RunnerEvent, RunnerTls},
    };
    use prometheus::Registry;
    use serde_json::Value;
    use tokio::{sync::mpsc, task::JoinHandle, time::timeout};

    use super::*;
    use crate::{
        shard::{
            Exit,
            facilities::{Machine, Runner},
            failure,
            launch::Launch,
            tests::{delete, listen, meeting, shard},
        },
        weights::ModelStore,
    };

    /// Short, but long against what the scripts do.
    const SILENCE: Duration = Duration::from_millis(300);

    /// A world that does as the test says and writes down what is asked of it.
    struct Script {
        machine: Machine,
        /// What was asked, in order.
        log: mpsc::UnboundedSender<String>,
        /// Tests speak for the runner of a shard through these.
        voices: Mutex<BTreeMap<String, mpsc::UnboundedSender<Output>>>,
        weights: Result<PathBuf, ShardFailure>,
        /// Calls to the API that fail before one succeeds.
        failing_calls: Mutex<u32>,
        /// All that was sent to be merged into a status, arrived or not.
        patches: Mutex<Vec<Value>>,
        /// Whom events were about, and their reasons.
        events: Mutex<Vec<String>>,
    }

    struct FakeRunner {
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
    struct World {
        shared: Shared<Script>,
        log: mpsc::UnboundedReceiver<String>,
        registry: Registry,
    }

    struct Running {
        wanted: watch::Sender<Option<Arc<Shard>>>,
        shard: Shard,
        task: JoinHandle<()>,
    }

    impl World {
        fn new(edit: impl FnOnce(&mut Script)) -> Self {
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

        fn start(&self, shard: Shard) -> Running {
            let first = Arc::new(shard.clone());
            let (wanted, receiver) = watch::channel(Some(first.clone()));
            let task = tokio::spawn(run(self.shared.clone(), first, receiver));
            Running { wanted, shard, task }
        }

        async fn expect(&mut self, lines: &[&str]) {
            for line in lines {
                let next = timeout(Duration::from_secs(300), self.log.recv()).await;
                assert_eq!(next.unwrap().as_deref(), Some(*line));
            }
        }

        fn say(&self, shard: &str, output: Output) {
            self.shared.facilities.voices.lock().unwrap()[shard].send(output).unwrap();
        }

        fn phase(&self, shard: &str, phase: ShardPhase) {
            self.say(shard, Output::Event(RunnerEvent::Phase { phase, progress_percent: 50 }));
        }

        fn metric(&self, name: &str) -> f64 {
            let families = self.registry.gather();
            let family = families.iter().find(|family| family.name() == name);
            let sum = |m: &prometheus::proto::Metric| {
                m.get_counter().get_value() + m.get_gauge().get_value()
            };
            family.map_or(0.0, |family| family.get_metric().iter().map(sum).sum())
        }
    }

    impl Running {
        fn edit(&mut self, edit: impl FnOnce(&mut Shard)) {
            edit(&mut self.shard);
            self.wanted.send_replace(Some(Arc::new(self.shard.clone())));
        }

        fn meet(&mut self) {
            self.edit(|shard| shard.spec.rendezvous = Some(meeting()));
        }

        async fn gone(self) {
            self.wanted.send_replace(None);
            timeout(Duration::from_secs(60), self.task).await.unwrap().unwrap();
        }
    }

    #[tokio::test]
    async fn a_shard_from_its_beginning_to_its_end() {
        let mut world = World::new(|_| {});
        let mut shard = world.start(shard("s"));
        world.expect(&["s is Downloaded"]).await;
        shard.meet();
        world.expect(&["spawn s", "s is Connecting"]).await;
        world.phase("s", ShardPhase::Loading);
        world.expect(&["s is Loading"]).await;
        world.phase("s", ShardPhase::Ready);
        world.say("s", Output::Event(RunnerEvent::Memory { bytes: 9 }));
        world.expect(&["s is Ready"]).await;
        assert_eq!(world.metric("exo_shard_memory_bytes"), 9.0);
        shard.edit(delete);
        world.expect(&["stop s", "stopped s", "s is Stopping", "finalizer of s: false"]).await;
        shard.gone().await;
        assert_eq!(
            *world.shared.facilities.events.lock().unwrap(),
            ["s: Downloaded", "s: Connecting", "s: Loading", "s: Ready", "s: Stopped"]
        );
        assert_eq!(world.metric("exo_shard_memory_bytes"), 0.0);
        assert_eq!(world.metric("exo_agent_runner_failures_total"), 0.0);
    }

    #[tokio::test]
    async fn the_next_epoch_waits_for_the_old_runner() {
        let mut world = World::new(|_| {});
        let mut old = world.start(shard("old"));
        world.expect(&["old is Downloaded"]).await;
        old.meet();
        world.expect(&["spawn old", "old is Connecting"]).await;
        let mut next = shard("new");
        next.spec.epoch = 2;
        let mut new = world.start(next);
        world.expect(&["new is Downloaded"]).await;
        new.meet();
        old.edit(delete);
        world.expect(&["stop old", "stopped old"]).await;
        // The order of these three is nobody's business; that they come after is.
        let mut rest = Vec::new();
        for _ in 0..4 {
            rest.push(world.log.recv().await.unwrap());
        }
        rest.sort();
        assert_eq!(
            rest,
            ["finalizer of old: false", "new is Connecting", "old is Stopping", "spawn new"]
        );
        assert_eq!(world.metric("exo_agent_runner_restarts_total"), 1.0);
        old.gone().await;
        new.gone().await;
    }

    #[tokio::test]
    async fn a_failure_is_told_before_the_finalizer_goes() {
        let mut world = World::new(|_| {});
        let mut shard = world.start(shard("s"));
        world.expect(&["s is Downloaded"]).await;
        shard.meet();
        world.expect(&["spawn s", "s is Connecting"]).await;
        world.say(
            "s",
            Output::Event(RunnerEvent::Failed {
                reason: "BadWeights".to_owned(),
                message: "no tensor `x`".to_owned(),
                permanent: true,
            }),
        );
        shard.edit(delete);
        let mut lines = Vec::new();
        for _ in 0..4 {
            lines.push(world.log.recv().await.unwrap());
        }
        assert_eq!(lines.last().unwrap(), "finalizer of s: false");
        assert!(lines.contains(&"s is Failed".to_owned()), "{lines:?}");
        assert!(lines.contains(&"stopped s".to_owned()), "{lines:?}");
        assert_eq!(world.metric("exo_agent_runner_failures_total"), 1.0);
        shard.gone().await;
    }

    #[tokio::test]
    async fn a_silent_runner_is_stopped_before_it_is_ready_but_not_after() {
        let mut world = World::new(|_| {});
        let mut shard = world.start(shard("s"));
        world.expect(&["s is Downloaded"]).await;
        shard.meet();
        world.expect(&["spawn s", "s is Connecting"]).await;
        world.phase("s", ShardPhase::Ready);
        world.expect(&["s is Ready"]).await;
        let quiet = timeout(SILENCE * 4, world.log.recv()).await;
        assert!(quiet.is_err(), "{quiet:?}");
        let begin = Instant::now();
        world.phase("s", ShardPhase::Warming);
        world.expect(&["s is Warming", "stop s"]).await;
        assert!(begin.elapsed() >= SILENCE);
        shard.gone().await;
    }

    #[tokio::test]
    async fn missing_weights_fail_the_shard() {
        let missing = failure("WeightsNotFound", "no folder", false);
        let mut world = World::new(|script| script.weights = Err(missing));
        let shard = world.start(shard("s"));
        world.expect(&["s is Failed"]).await;
        shard.gone().await;
    }

    #[tokio::test]
    async fn an_api_that_is_away_is_waited_for() {
        let mut world = World::new(|script| *script.failing_calls.lock().unwrap() = 3);
        let mut bare = shard("s");
        bare.metadata.finalizers = None;
        let mut shard = world.start(bare);
        world.expect(&["finalizer of s: true", "s is Downloaded"]).await;
        shard.meet();
        world.expect(&["spawn s", "s is Connecting"]).await;
        // A runner's events are heard while no status can be written.
        *world.shared.facilities.failing_calls.lock().unwrap() = 3;
        for _ in 0..1000 {
            world.phase("s", ShardPhase::Loading);
        }
        world.phase("s", ShardPhase::Ready);
        world.expect(&["s is Ready"]).await;
        shard.gone().await;
    }

    #[tokio::test]
    async fn a_status_that_others_changed_is_put_right_once() {
        let mut world = World::new(|_| {});
        let mut shard = world.start(shard("s"));
        world.expect(&["s is Downloaded"]).await;
        let written = |shard: &mut Shard| {
            let (phase, listen) = (Some(ShardPhase::Downloaded), Some(listen()));
            shard.status = Some(exo_crds::ShardStatus { phase, listen, ..Default::default() });
        };
        // The echo of the own write, and then somebody takes the address away.
        shard.edit(written);
        shard.edit(|shard| shard.status = None);
        world.expect(&["s is Downloaded"]).await;
        shard.edit(written);
        let quiet = timeout(Duration::from_secs(2), world.log.recv()).await;
        assert!(quiet.is_err(), "{quiet:?}");
        shard.gone().await;
    }

    #[tokio::test]
    async fn what_a_failed_write_may_have_left_is_taken_away() {
        let mut world = World::new(|_| {});
        let mut shard = world.start(shard("s"));
        world.expect(&["s is Downloaded"]).await;
        shard.meet();
        world.expect(&["spawn s", "s is Connecting"]).await;
        *world.shared.facilities.failing_calls.lock().unwrap() = 2;
        world.say("s", Output::Event(RunnerEvent::Memory { bytes: 9 }));
        world.phase("s", ShardPhase::Loading);
        let sent = |name: &str| {
            let patches = world.shared.facilities.patches.lock().unwrap();
            patches.iter().any(|patch| !patch[name].is_null())
        };
        while !sent("memoryBytes") {
            sleep(Duration::from_millis(5)).await;
        }
        world.say("s", Output::Exited(Exit { signal: Some(9), ..Exit::default() }));
        world.expect(&["s is Failed"]).await;
        let last = world.shared.facilities.patches.lock().unwrap().last().cloned().unwrap();
        assert_eq!(last.get("memoryBytes"), Some(&Value::Null), "{last}");
        shard.gone().await;
    }

    #[tokio::test]
    async fn the_end_of_the_agent_is_the_end_of_its_runners() {
        let mut world = World::new(|_| {});
        let mut shard = world.start(shard("s"));
        world.expect(&["s is Downloaded"]).await;
        shard.meet();
        world.expect(&["spawn s", "s is Connecting"]).await;
        world.shared.ending.cancel();
        world.expect(&["stop s", "stopped s"]).await;
        shard.task.await.unwrap();
        // Finalizers stay: the control plane decides about shards of a node that has gone.
        assert!(world.log.try_recv().is_err());
    }
}
