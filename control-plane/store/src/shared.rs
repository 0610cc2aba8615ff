//! The state behind a lock, with a signal on each change; and the watches that follow it.
//!
//! A watch holds a cursor and reads the state's own history, so that a slow consumer costs no
//! memory: when history has moved past its cursor it gets [`ReadError::Compacted`].

use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use tokio::sync::watch;

use crate::{
    StoreError,
    state::{Batch, State},
};

/// Events handed out at once; bounds the time under the lock.
const BATCH_EVENTS: usize = 512;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Progress {
    revision: u64,
    closed: bool,
}

pub(crate) struct Shared {
    state: RwLock<State>,
    progress: watch::Sender<Progress>,
}

impl Shared {
    pub(crate) fn new(state: State) -> Arc<Self> {
        let progress = watch::Sender::new(Progress { revision: state.revision(), closed: false });
        Arc::new(Self { state: RwLock::new(state), progress })
    }

    pub(crate) fn read(&self) -> RwLockReadGuard<'_, State> {
        // `apply` doesn't panic, and readers change nothing: the state is whole all the same.
        self.state.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes the state, then wakes the watches.
    pub(crate) fn change<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        let (result, revision) = {
            let mut state: RwLockWriteGuard<'_, State> =
                self.state.write().unwrap_or_else(PoisonError::into_inner);
            let result = change(&mut state);
            (result, state.revision())
        };
        self.progress.send_if_modified(|progress| {
            let changed = progress.revision != revision;
            progress.revision = revision;
            changed
        });
        result
    }

    /// Ends all watches.
    pub(crate) fn close(&self) {
        self.progress.send_modify(|progress| progress.closed = true);
    }

    pub(crate) fn is_closed(&self) -> bool {
        self.progress.borrow().closed
    }

    /// Waits until the state has this revision, or the store is shut down.
    #[cfg(feature = "etcd")]
    pub(crate) async fn reached(&self, revision: u64) {
        let mut progress = self.progress.subscribe();
        // The sender lives as long as `self`.
        let _ = progress.wait_for(|p| p.revision >= revision || p.closed).await;
    }

    pub(crate) fn watch(self: &Arc<Self>, prefix: &str, after: u64) -> Watch {
        Watch {
            wake: self.progress.subscribe(),
            shared: Arc::clone(self),
            prefix: prefix.into(),
            cursor: after,
        }
    }
}

/// Follows the keys below one prefix.
pub struct Watch {
    shared: Arc<Shared>,
    wake: watch::Receiver<Progress>,
    prefix: Box<str>,
    cursor: u64,
}

impl Watch {
    /// Everything up to this revision has been handed out or didn't concern this watch.
    pub fn revision(&self) -> u64 {
        self.cursor
    }

    /// Waits for the next events; the batch is never empty.
    ///
    /// Cancel safe: the cursor moves only together with the return of what it passed, or over
    /// revisions without events for this watch.
    ///
    /// # Errors
    /// [`StoreError::Read`] with `Compacted` when the consumer was too slow, or its first revision
    /// too old; [`StoreError::Closed`] when the store shuts down. Both are final.
    pub async fn next(&mut self) -> Result<Batch, StoreError> {
        loop {
            if self.wake.borrow_and_update().closed {
                return Err(StoreError::Closed);
            }
            let batch = self.shared.read().events_after(&self.prefix, self.cursor, BATCH_EVENTS)?;
            self.cursor = batch.revision;
            if !batch.events.is_empty() {
                return Ok(batch);
            }
            // The sender lives in `shared`, which this watch keeps alive.
            self.wake.changed().await.map_err(|_| StoreError::Closed)?;
        }
    }
}
