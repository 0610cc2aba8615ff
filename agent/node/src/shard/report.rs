//! Writes a Shard's status, so that the shard's task never waits for the API.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use exo_crds::{Shard, ShardStatus};
use serde_json::{Map, Value};
use tokio::{
    sync::watch,
    task::JoinHandle,
    time::{Instant, sleep, sleep_until, timeout},
};

use super::facilities::{ApiError, Facilities};
use crate::Delays;

/// Progress and speed are written no more often than this; a new phase at once.
const MINOR_PERIOD: Duration = Duration::from_millis(500);
/// Longest wait for the last words of a shard that is being deleted.
const FLUSH_LIMIT: Duration = Duration::from_secs(2);

/// Until then a status that differs from what was written is probably one from before.
const ECHO_LIMIT: Duration = Duration::from_secs(1);

/// The one writer of a Shard's status. Only the latest value counts.
pub(crate) struct Reporter {
    wanted: watch::Sender<ShardStatus>,
    observed: watch::Sender<ShardStatus>,
    written: watch::Receiver<ShardStatus>,
    task: JoinHandle<()>,
}

impl Reporter {
    pub(crate) fn start<F: Facilities>(facilities: Arc<F>, shard: Arc<Shard>) -> Self {
        let begin = shard.status.clone().unwrap_or_default();
        let (wanted, orders) = watch::channel(begin.clone());
        let (observed, sightings) = watch::channel(begin.clone());
        let attempted = fields(&begin).into_iter().map(|(name, _)| name).collect();
        let (receipts, written) = watch::channel(begin);
        let mut writer = Writer { attempted, facilities, shard, orders, sightings, receipts };
        let task = tokio::spawn(async move { writer.run().await });
        Self { wanted, observed, written, task }
    }

    /// Takes note of what the API says: what others made of the status is put right.
    pub(crate) fn observe(&self, shard: &Shard) {
        self.observed.send_replace(shard.status.clone().unwrap_or_default());
    }

    pub(crate) fn set(&self, status: ShardStatus) {
        self.wanted.send_if_modified(|wanted| {
            let changed = *wanted != status;
            *wanted = status;
            changed
        });
    }

    /// Waits a little until what was set last is written.
    pub(crate) async fn flush(&mut self) {
        let wanted = self.wanted.borrow().clone();
        let written = self.written.wait_for(|written| *written == wanted);
        // Too late or gone: nobody will read it.
        let _ = timeout(FLUSH_LIMIT, written).await;
    }
}

impl Drop for Reporter {
    fn drop(&mut self) {
        self.task.abort();
    }
}

struct Writer<F> {
    facilities: Arc<F>,
    shard: Arc<Shard>,
    orders: watch::Receiver<ShardStatus>,
    sightings: watch::Receiver<ShardStatus>,
    receipts: watch::Sender<ShardStatus>,
    /// Fields that may be there: those that were found, and all that were ever sent, for a write
    /// that seemed to fail may have arrived.
    attempted: BTreeSet<String>,
}

impl<F: Facilities> Writer<F> {
    /// Writes until nobody gives orders any more, or until the shard is gone.
    async fn run(&mut self) {
        let mut delays = Delays::new();
        let mut last = Instant::now();
        loop {
            let wanted = self.orders.borrow_and_update().clone();
            let written = self.receipts.borrow().clone();
            if wanted == written {
                if !self.wait_for_difference(&written).await {
                    return;
                }
                if *self.orders.borrow() != written {
                    continue;
                }
                tracing::info!(shard = self.name(), "putting right a status that was changed");
            } else if is_minor(&written, &wanted) && Instant::now() < last + MINOR_PERIOD {
                tokio::select! {
                    // Cancel-safe: both are only waited for.
                    () = sleep_until(last + MINOR_PERIOD) => {}
                    changed = self.orders.changed() => match changed {
                        Ok(()) => continue,
                        Err(_) => return,
                    },
                }
            }
            let wanted = self.orders.borrow_and_update().clone();
            self.attempted.extend(fields(&self.sightings.borrow()).into_iter().map(|f| f.0));
            let patch = patch(&self.attempted, &wanted);
            self.attempted.extend(patch.keys().cloned());
            match self.facilities.write_status(&self.shard, Value::Object(patch)).await {
                Ok(()) => {
                    last = Instant::now();
                    // Sighted before this write, so nothing to be put right.
                    self.sightings.mark_unchanged();
                    delays = Delays::new();
                    self.receipts.send_replace(wanted);
                }
                Err(ApiError::Gone) => return,
                Err(error) => {
                    tracing::debug!(shard = self.name(), %error, "writing the status failed");
                    sleep(delays.next().unwrap_or(Delays::LONGEST)).await;
                }
            }
        }
    }

    /// Waits for a new order, or until the API has shown something else than what was written for
    /// long enough not to be an echo of earlier writes. False when there will be no more orders.
    async fn wait_for_difference(&mut self, written: &ShardStatus) -> bool {
        loop {
            // Each sighting is put right once: a status that never reads as it was written must
            // not be written for ever.
            let suspect = self.sightings.has_changed().unwrap_or(false);
            let differs = suspect && *self.sightings.borrow() != *written;
            if suspect && !differs {
                self.sightings.mark_unchanged();
            }
            tokio::select! {
                // Cancel-safe: all are only waited for.
                changed = self.orders.changed() => return changed.is_ok(),
                () = sleep(ECHO_LIMIT), if differs => {
                    if *self.sightings.borrow_and_update() != *written {
                        return true;
                    }
                }
                Ok(()) = self.sightings.changed(), if !differs => self.sightings.mark_changed(),
            }
        }
    }

    fn name(&self) -> &str {
        self.shard.metadata.name.as_deref().unwrap_or_default()
    }
}

/// Whether a change can wait a little. A failed shard has little left to say, and its replica waits
/// for it to be gone.
fn is_minor(written: &ShardStatus, wanted: &ShardStatus) -> bool {
    wanted.phase == written.phase
        && wanted.listen == written.listen
        && wanted.last_log_lines == written.last_log_lines
        && wanted.failure == written.failure
}

fn fields(status: &ShardStatus) -> Map<String, Value> {
    match serde_json::to_value(status) {
        Ok(Value::Object(fields)) => fields,
        Ok(_) | Err(_) => Map::new(),
    }
}

/// A merge patch that leaves exactly `to`, where at most the fields in `attempted` are there: one
/// that is left out must be taken away.
fn patch(attempted: &BTreeSet<String>, to: &ShardStatus) -> Map<String, Value> {
    let mut patch = fields(to);
    for name in attempted {
        patch.entry(name).or_insert(Value::Null);
    }
    patch
}

#[cfg(test)]
mod tests {
    use exo_crds::ShardPhase;

    use super::*;

    #[test]
    fn fields_that_end_are_taken_away() {
        let from = ShardStatus {
            phase: Some(ShardPhase::Ready),
            memory_bytes: Some(7),
            ..ShardStatus::default()
        };
        let attempted = fields(&from).into_iter().map(|(name, _)| name).collect();
        let to = ShardStatus { phase: Some(ShardPhase::Stopping), ..ShardStatus::default() };
        assert_eq!(
            Value::Object(patch(&attempted, &to)),
            serde_json::json!({"phase": "Stopping", "memoryBytes": null})
        );
    }
}
