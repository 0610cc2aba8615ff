//! Drives one Shard: asks what to do next, does it, and waits for the next thing to happen.

use std::{sync::Arc, time::Duration};

use exo_crds::{Rendezvous, Shard, ShardPhase, runner::REASON_PEER_LOST};
use tokio::{
    sync::watch,
    time::{Instant, sleep, sleep_until},
};
use tokio_util::sync::CancellationToken;

use super::{
    Local, Step,
    facilities::{ApiError, Facilities, Output, Runner as _},
    launch::launch,
    report::Reporter,
    slots::{Slot, Slots},
};
use crate::{Delays, metrics::Metrics};

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
    _slot: Slot,
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

    fn spawn(&mut self, model_dir: std::path::PathBuf, meeting: &Rendezvous, slot: Slot) {
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
mod script;
#[cfg(test)]
mod tests;
