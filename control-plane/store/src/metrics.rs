//! What the store tells Prometheus; read when it is asked.

use prometheus::{
    IntGauge, IntGaugeVec, Opts, Registry,
    core::{Collector, Desc},
    proto::MetricFamily,
};

use crate::Store;

/// Gauges that are filled on each collection.
struct StoreCollector {
    store: Store,
    gauges: Gauges,
}

struct Gauges {
    revision: IntGauge,
    compacted: IntGauge,
    objects: IntGauge,
    bytes: IntGauge,
    history: IntGauge,
    term: IntGauge,
    is_leader: IntGauge,
    has_leader: IntGauge,
    log_index: IntGauge,
    applied_index: IntGauge,
    apply_lag: IntGauge,
    voters_changing: IntGauge,
    /// By the follower's name; only the leader knows.
    replication_lag: IntGaugeVec,
}

impl Gauges {
    fn new() -> Result<Self, prometheus::Error> {
        let gauge = IntGauge::new;
        Ok(Self {
            revision: gauge("exo_store_revision", "Newest revision of this node")?,
            compacted: gauge("exo_store_compacted_revision", "History begins after this")?,
            objects: gauge("exo_store_objects", "Keys that exist")?,
            bytes: gauge("exo_store_bytes", "Keys and values that exist, in bytes")?,
            history: gauge("exo_store_history_events", "Events kept for watches")?,
            term: gauge("exo_raft_term", "Raft's current term")?,
            is_leader: gauge("exo_raft_is_leader", "1 on the node that leads")?,
            has_leader: gauge("exo_raft_has_leader", "1 while a leader reaches this node")?,
            log_index: gauge("exo_raft_log_index", "Newest entry of the log")?,
            applied_index: gauge("exo_raft_applied_index", "Newest entry that is applied")?,
            apply_lag: gauge(
                "exo_raft_apply_lag_entries",
                "Entries of this node's log that are not applied yet",
            )?,
            voters_changing: gauge(
                "exo_raft_voters_changing",
                "1 while majorities of two sets of voters are needed, the old one and the new one",
            )?,
            replication_lag: IntGaugeVec::new(
                Opts::new(
                    "exo_raft_replication_lag_entries",
                    "On the leader: entries of its log that a follower's log does not have yet",
                ),
                &["follower"],
            )?,
        })
    }

    fn all(&self) -> [&dyn Collector; 13] {
        [
            &self.revision,
            &self.compacted,
            &self.objects,
            &self.bytes,
            &self.history,
            &self.term,
            &self.is_leader,
            &self.has_leader,
            &self.log_index,
            &self.applied_index,
            &self.apply_lag,
            &self.voters_changing,
            &self.replication_lag,
        ]
    }
}

impl Collector for StoreCollector {
    fn desc(&self) -> Vec<&Desc> {
        self.gauges.all().iter().flat_map(|g| g.desc()).collect()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        let gauges = &self.gauges;
        let sizes = self.store.sizes();
        let raft = self.store.raft_position();
        let leadership = self.store.leadership().borrow().clone();
        let unsigned = |gauge: &IntGauge, value: u64| {
            gauge.set(i64::try_from(value).unwrap_or(i64::MAX));
        };
        unsigned(&gauges.revision, sizes.revision);
        unsigned(&gauges.compacted, sizes.compacted);
        unsigned(&gauges.objects, sizes.objects as u64);
        unsigned(&gauges.bytes, sizes.bytes as u64);
        unsigned(&gauges.history, sizes.history as u64);
        unsigned(&gauges.term, leadership.term);
        gauges.is_leader.set(i64::from(leadership.is_leader));
        gauges.has_leader.set(i64::from(raft.has_leader));
        unsigned(&gauges.log_index, raft.log_index);
        unsigned(&gauges.applied_index, raft.applied_index);
        unsigned(&gauges.apply_lag, raft.log_index.saturating_sub(raft.applied_index));
        gauges.voters_changing.set(i64::from(raft.voters_change));
        // Who has left is told of no longer.
        gauges.replication_lag.reset();
        for (follower, index) in &raft.followers {
            let gauge = gauges.replication_lag.with_label_values(&[follower]);
            unsigned(&gauge, raft.log_index.saturating_sub(*index));
        }
        gauges.all().iter().flat_map(|g| g.collect()).collect()
    }
}

impl Store {
    /// Adds this store's gauges to a registry.
    ///
    /// # Errors
    /// When the registry has them already.
    pub fn register_metrics(&self, registry: &Registry) -> Result<(), prometheus::Error> {
        registry.register(Box::new(StoreCollector { store: self.clone(), gauges: Gauges::new()? }))
    }
}
