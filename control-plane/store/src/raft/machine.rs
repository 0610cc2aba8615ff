//! Raft's state machine: the state in memory, with snapshots on disk.

use std::{io::Cursor, sync::Arc};

use openraft::{
    AnyError, Entry, EntryPayload, LogId, OptionalSend, RaftSnapshotBuilder, Snapshot,
    StorageError, StorageIOError, StoredMembership, storage::RaftStateMachine,
};
use tokio::sync::watch;

use super::{
    MemberNode, Request, Response, SnapshotData, TypeConfig,
    disk::{Disk, Meta},
    error::DiskError,
    flushing::Flushing,
};
use crate::{
    command,
    shared::Shared,
    state::{HistoryLimits, State, StateImage},
};

type Result<T, E = StorageError<u64>> = std::result::Result<T, E>;

pub(super) struct StateMachine {
    shared: Arc<Shared>,
    disk: Arc<Disk>,
    flushing: Option<Flushing>,
    applied: Option<LogId<u64>>,
    /// Tells how far this is.
    progress: watch::Sender<u64>,
    membership: StoredMembership<u64, MemberNode>,
}

impl StateMachine {
    /// The state of the last snapshot; Raft applies the log behind it anew.
    pub(super) fn load(disk: &Arc<Disk>) -> Result<Self, DiskError> {
        let mut machine = Self {
            shared: Shared::new(State::default()),
            disk: Arc::clone(disk),
            flushing: None,
            applied: None,
            progress: watch::Sender::new(0),
            membership: StoredMembership::default(),
        };
        if let Some((meta, data)) = disk.snapshot()? {
            let image: StateImage = disk.parse(|| "the snapshot".to_owned(), &data)?;
            machine.adopt(&meta, image);
        }
        Ok(machine)
    }

    /// Applies only what this log has on disk.
    pub(super) fn after(&mut self, flushing: Flushing) {
        self.flushing = Some(flushing);
    }

    pub(super) fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    /// The newest entry that is applied; 0 for none.
    pub(super) fn progress(&self) -> watch::Receiver<u64> {
        self.progress.subscribe()
    }

    fn reached(&mut self, id: Option<LogId<u64>>) {
        self.applied = id;
        self.progress.send_replace(id.map_or(0, |id| id.index));
    }

    fn adopt(&mut self, meta: &Meta, image: StateImage) {
        let new = State::from_image(HistoryLimits::DEFAULT, image);
        self.shared.change(|state| *state = new);
        self.reached(meta.last_log_id);
        self.membership = meta.last_membership.clone();
    }

    fn apply_request(&self, index: u64, request: &Request) -> Response {
        let meta = command::Meta { index, time_ms: request.time_ms };
        self.shared.change(|state| {
            let commands = request.commands.iter();
            Response(commands.map(|c| state.apply(meta, c)).collect())
        })
    }
}

impl RaftStateMachine<TypeConfig> for StateMachine {
    type SnapshotBuilder = SnapshotBuilder;

    async fn applied_state(
        &mut self,
    ) -> Result<(Option<LogId<u64>>, StoredMembership<u64, MemberNode>)> {
        Ok((self.applied, self.membership.clone()))
    }

    async fn apply<I>(&mut self, entries: I) -> Result<Vec<Response>>
    where
        I: IntoIterator<Item = Entry<TypeConfig>> + OptionalSend,
        I::IntoIter: OptionalSend,
    {
        let mut responses = Vec::new();
        let mut last = self.applied;
        for entry in entries {
            if let Some(flushing) = &self.flushing {
                flushing
                    .reached(entry.log_id.index)
                    .await
                    .map_err(|error| StorageIOError::apply(entry.log_id, AnyError::new(&error)))?;
            }
            last = Some(entry.log_id);
            responses.push(match entry.payload {
                EntryPayload::Blank => Response(Vec::new()),
                EntryPayload::Normal(request) => self.apply_request(entry.log_id.index, &request),
                EntryPayload::Membership(membership) => {
                    self.membership = StoredMembership::new(Some(entry.log_id), membership);
                    Response(Vec::new())
                }
            });
        }
        self.reached(last);
        Ok(responses)
    }

    async fn get_snapshot_builder(&mut self) -> SnapshotBuilder {
        // State and position belong together: both are taken here, between two applies.
        SnapshotBuilder {
            image: Some(self.shared.read().image()),
            applied: self.applied,
            membership: self.membership.clone(),
            disk: Arc::clone(&self.disk),
        }
    }

    async fn begin_receiving_snapshot(&mut self) -> Result<Box<SnapshotData>> {
        Ok(Box::new(Cursor::new(Vec::new())))
    }

    async fn install_snapshot(&mut self, meta: &Meta, snapshot: Box<SnapshotData>) -> Result<()> {
        let signature = || Some(meta.signature());
        let data = snapshot.into_inner();
        let image = serde_json::from_slice(&data)
            .map_err(|error| StorageIOError::read_snapshot(signature(), AnyError::new(&error)))?;
        save(&self.disk, meta, data)
            .await
            .map_err(|error| StorageIOError::write_snapshot(signature(), error))?;
        self.adopt(meta, image);
        Ok(())
    }

    async fn get_current_snapshot(&mut self) -> Result<Option<Snapshot<TypeConfig>>> {
        let snapshot = self
            .disk
            .snapshot()
            .map_err(|error| StorageIOError::read_snapshot(None, AnyError::new(&error)))?;
        Ok(snapshot.map(|(meta, data)| Snapshot { meta, snapshot: Box::new(Cursor::new(data)) }))
    }
}

/// Writes a snapshot, and gives it back: a second copy may be large.
async fn save(disk: &Arc<Disk>, meta: &Meta, data: Vec<u8>) -> Result<Vec<u8>, AnyError> {
    let (disk, meta) = (Arc::clone(disk), meta.clone());
    let saving =
        tokio::task::spawn_blocking(move || disk.save_snapshot(&meta, &data).map(|()| data));
    match saving.await {
        Ok(Ok(data)) => Ok(data),
        Ok(Err(error)) => Err(AnyError::new(&error)),
        Err(error) => Err(AnyError::new(&error)),
    }
}

/// Writes one snapshot.
pub(super) struct SnapshotBuilder {
    /// Taken by the first build.
    image: Option<StateImage>,
    applied: Option<LogId<u64>>,
    membership: StoredMembership<u64, MemberNode>,
    disk: Arc<Disk>,
}

impl RaftSnapshotBuilder<TypeConfig> for SnapshotBuilder {
    async fn build_snapshot(&mut self) -> Result<Snapshot<TypeConfig>> {
        let meta = Meta {
            last_log_id: self.applied,
            last_membership: self.membership.clone(),
            // One position has one content, so its name needs nothing random.
            snapshot_id: self.applied.map_or("empty".to_owned(), |id| id.to_string()),
        };
        let fault = |error: AnyError| StorageIOError::write_snapshot(Some(meta.signature()), error);
        let Some(image) = self.image.take() else {
            let error = std::io::Error::other("a builder builds one snapshot");
            return Err(fault(AnyError::new(&error)).into());
        };
        let data = tokio::task::spawn_blocking(move || serde_json::to_vec(&image))
            .await
            .map_err(|error| fault(AnyError::new(&error)))?
            .map_err(|error| fault(AnyError::new(&error)))?;
        let data = save(&self.disk, &meta, data).await.map_err(fault)?;
        Ok(Snapshot { meta, snapshot: Box::new(Cursor::new(data)) })
    }
}
