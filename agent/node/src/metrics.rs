//! What the agent counts.

use std::{collections::BTreeMap, sync::Arc, sync::Mutex};

use prometheus::{IntCounterVec, IntGaugeVec, Opts, Registry};

/// Handles to the agent's metrics; clones share them.
#[derive(Clone, Debug)]
pub(crate) struct Metrics {
    /// Runners started for an epoch after a shard's first.
    pub(crate) restarts: IntCounterVec,
    /// Runners that failed, by reason.
    pub(crate) failures: IntCounterVec,
    shard_memory: IntGaugeVec,
    node_memory: IntGaugeVec,
    /// Memory that runners report, by shard.
    held: Arc<Mutex<BTreeMap<String, u64>>>,
}

impl Metrics {
    pub(crate) fn register(registry: &Registry) -> Result<Self, prometheus::Error> {
        let metrics = Self {
            restarts: IntCounterVec::new(
                Opts::new(
                    "exo_agent_runner_restarts_total",
                    "Runners started for an epoch after an instance's first.",
                ),
                &["namespace", "instance"],
            )?,
            failures: IntCounterVec::new(
                Opts::new("exo_agent_runner_failures_total", "Shards that failed, by reason."),
                &["reason"],
            )?,
            shard_memory: IntGaugeVec::new(
                Opts::new("exo_shard_memory_bytes", "Memory that MLX holds for a shard."),
                &["namespace", "shard"],
            )?,
            node_memory: IntGaugeVec::new(
                Opts::new("exo_node_memory_bytes", "Memory of this machine, by kind."),
                &["kind"],
            )?,
            held: Arc::default(),
        };
        registry.register(Box::new(metrics.restarts.clone()))?;
        registry.register(Box::new(metrics.failures.clone()))?;
        registry.register(Box::new(metrics.shard_memory.clone()))?;
        registry.register(Box::new(metrics.node_memory.clone()))?;
        Ok(metrics)
    }

    /// Takes note of what a shard's runner holds; `None` once it has ended.
    pub(crate) fn shard_memory(&self, namespace: &str, shard: &str, bytes: Option<u64>) {
        let key = format!("{namespace}/{shard}");
        let mut held = self.held.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        match bytes {
            Some(bytes) => {
                held.insert(key, bytes);
                self.shard_memory.with_label_values(&[namespace, shard]).set(gauge(bytes));
            }
            // A label that was never set can't be removed: nothing to do.
            None => {
                if held.remove(&key).is_some() {
                    let _ = self.shard_memory.remove_label_values(&[namespace, shard]);
                }
            }
        }
    }

    /// Memory that all runners here hold, in bytes.
    pub(crate) fn held_bytes(&self) -> u64 {
        let held = self.held.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        held.values().sum()
    }

    pub(crate) fn node_memory(&self, kind: &str, bytes: u64) {
        self.node_memory.with_label_values(&[kind]).set(gauge(bytes));
    }
}

fn gauge(bytes: u64) -> i64 {
    i64::try_from(bytes).unwrap_or(i64::MAX)
}
