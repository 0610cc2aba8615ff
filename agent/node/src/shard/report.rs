//! Writes a Shard's status, so that the shard's task never waits for the API.

use std::{sync::Arc, time::Duration};

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

/// The one writer of a Shard's status. Only the latest value counts.
pub(crate) struct Reporter {
    wanted: watch::Sender<ShardStatus>,
    written: watch::Receiver<ShardStatus>,
    task: JoinHandle<()>,
}

impl Reporter {
    pub(crate) fn start<F: Facilities>(facilities: Arc<F>, shard: Arc<Shard>) -> Self {
        let begin = shard.status.clone().unwrap_or_default();
        let (wanted, orders) = watch::channel(begin.clone());
        let (receipts, written) = watch::channel(begin);
        let task = tokio::spawn(write(facilities, shard, orders, receipts));
        Self { wanted, written, task }
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

async fn write<F: Facilities>(
    facilities: Arc<F>,
    shard: Arc<Shard>,
    mut orders: watch::Receiver<ShardStatus>,
    receipts: watch::Sender<ShardStatus>,
) {
    let mut delays = Delays::new();
    let mut last = Instant::now();
    loop {
        let wanted = orders.borrow_and_update().clone();
        let written = receipts.borrow().clone();
        if wanted == written {
            if orders.changed().await.is_err() {
                return;
            }
            continue;
        }
        // A failed shard has little left to say, and its replica waits for it to be gone.
        let minor = wanted.phase == written.phase
            && wanted.listen == written.listen
            && wanted.last_log_lines == written.last_log_lines
            && wanted.failure == written.failure;
        let earliest = last + MINOR_PERIOD;
        if minor && Instant::now() < earliest {
            tokio::select! {
                // Cancel-safe: both are only waited for.
                () = sleep_until(earliest) => {}
                changed = orders.changed() => match changed {
                    Ok(()) => continue,
                    Err(_) => return,
                },
            }
        }
        match facilities.write_status(&shard, patch(&written, &wanted)).await {
            Ok(()) => {
                last = Instant::now();
                delays = Delays::new();
                receipts.send_replace(wanted);
            }
            Err(ApiError::Gone) => return,
            Err(error) => {
                let name = shard.metadata.name.as_deref().unwrap_or_default();
                tracing::debug!(shard = name, %error, "writing the status; will try again");
                sleep(delays.next().unwrap_or(Delays::LONGEST)).await;
            }
        }
    }
}

/// A merge patch that turns `from` into `to`: a field that is left out must be taken away.
fn patch(from: &ShardStatus, to: &ShardStatus) -> Value {
    let fields = |status: &ShardStatus| match serde_json::to_value(status) {
        Ok(Value::Object(fields)) => fields,
        Ok(_) | Err(_) => Map::new(),
    };
    let mut patch = fields(to);
    for name in fields(from).into_iter().map(|(name, _)| name) {
        patch.entry(name).or_insert(Value::Null);
    }
    Value::Object(patch)
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
        let to = ShardStatus { phase: Some(ShardPhase::Stopping), ..ShardStatus::default() };
        assert_eq!(
            patch(&from, &to),
            serde_json::json!({"phase": "Stopping", "memoryBytes": null})
        );
    }
}
