//! Places for runners: a replica has one, so that its next epoch waits for the last one's runner.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
};

use exo_crds::Shard;
use tokio::sync::{Mutex as AsyncMutex, OwnedMutexGuard};

/// One runner per replica: whoever holds a replica's slot may have a runner.
#[derive(Clone, Debug, Default)]
pub(crate) struct Slots(Arc<Mutex<BTreeMap<SlotKey, Arc<AsyncMutex<()>>>>>);

/// A replica's place, until it is dropped.
#[derive(Debug)]
pub(super) struct Slot {
    _held: OwnedMutexGuard<()>,
}

/// Namespace, instance, replica.
type SlotKey = (String, String, u32);

impl Slots {
    /// Waits until no other shard of the replica has a runner here. Cancel-safe.
    pub(super) async fn take(&self, shard: &Shard) -> Slot {
        let namespace = shard.metadata.namespace.clone().unwrap_or_default();
        let key = (namespace, shard.spec.instance.clone(), shard.spec.replica);
        let slot = {
            let mut slots = self.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
            slots.retain(|_, slot| Arc::strong_count(slot) > 1);
            slots.entry(key).or_default().clone()
        };
        Slot { _held: slot.lock_owned().await }
    }
}
