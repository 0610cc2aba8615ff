//! How far the log is on disk, where entries may have been reported as done before they are: see
//! [`log`](super::log). Never: the writing itself.

use std::{
    io,
    sync::Arc,
    time::{Duration, Instant},
};

use openraft::LogId;
use tokio::sync::watch;

/// A leader whose disk takes longer reports nothing early any more: openraft then waits for the disk,
/// heartbeats end, and a node with a disk that works takes over.
const FLUSH_LIMIT: Duration = Duration::from_secs(1);
/// How far the log is on disk, where it may have been reported as done before it was.
#[derive(Clone, Debug)]
pub(super) struct Flushing(Arc<watch::Sender<Progress>>);

#[derive(Clone, Debug, Default)]
struct Progress {
    /// Up to here it may have been reported before it was so; 0 for never.
    early: u64,
    /// The newest entry on disk.
    flushed: Option<LogId<u64>>,
    /// Since when entries that were reported early wait for the disk.
    waiting: Option<Instant>,
    failed: Option<String>,
}

impl Progress {
    fn has(&self, index: u64) -> bool {
        index > self.early || self.flushed.is_some_and(|flushed| index <= flushed.index)
    }
}

impl Flushing {
    pub(super) fn new(flushed: Option<LogId<u64>>) -> Self {
        Self(Arc::new(watch::Sender::new(Progress { flushed, ..Progress::default() })))
    }

    fn change(&self, change: impl FnOnce(&mut Progress)) {
        self.0.send_modify(change);
    }

    /// Why nothing more is written.
    pub(super) fn failure(&self) -> Option<String> {
        self.0.borrow().failed.clone()
    }

    /// Takes note that the entries up to `index` are reported as done.
    pub(super) fn reported(&self, index: u64, now: Instant) {
        self.change(|progress| {
            progress.early = progress.early.max(index);
            progress.waiting.get_or_insert(now);
        });
    }

    pub(super) fn flushed(&self, last: Option<LogId<u64>>, now: Instant) {
        self.change(|progress| {
            progress.flushed = last;
            let is_done = last.is_some_and(|last| last.index >= progress.early);
            progress.waiting = progress.waiting.and((!is_done).then_some(now));
        });
    }

    /// Nothing more is written, and why.
    pub(super) fn failed(&self, why: String) {
        self.change(|progress| progress.failed = Some(why));
    }

    /// The entries from `index` on are gone; `last` is what is left.
    pub(super) fn cut(&self, index: u64, last: Option<LogId<u64>>) {
        self.change(|progress| {
            progress.early = progress.early.min(index.saturating_sub(1));
            progress.flushed = last;
        });
    }

    /// Whether the entry at `index` is on disk.
    pub(super) fn is_flushed(&self, index: u64) -> bool {
        self.0.borrow().flushed.is_some_and(|flushed| index <= flushed.index)
    }

    /// Whether the disk hangs: nothing of what was reported early got there for too long.
    pub(super) fn is_overdue(&self, now: Instant) -> bool {
        let waiting = self.0.borrow().waiting;
        waiting.is_some_and(|since| now.saturating_duration_since(since) > FLUSH_LIMIT)
    }

    /// Waits until the entry at `index` is on disk.
    pub(super) async fn reached(&self, index: u64) -> io::Result<()> {
        let mut progress = self.0.subscribe();
        // The sender lives in `self`.
        let now = progress.wait_for(|p| p.failed.is_some() || p.has(index)).await;
        match now.map_err(io::Error::other)?.failed.clone() {
            Some(failed) => Err(io::Error::other(failed)),
            None => Ok(()),
        }
    }

    /// Waits until this leader has proposed an entry after this one.
    pub(super) async fn proposed_after(&self, index: u64) {
        let mut progress = self.0.subscribe();
        // The sender lives in `self`.
        let _ = progress.wait_for(|p| p.early > index).await;
    }

    /// The same entry if it is on disk, or the newest one that is.
    pub(super) fn at_most(&self, id: LogId<u64>) -> Option<LogId<u64>> {
        let progress = self.0.borrow();
        if progress.has(id.index) { Some(id) } else { progress.flushed.min(Some(id)) }
    }
}

#[cfg(test)]
mod tests {
    use openraft::CommittedLeaderId;

    use super::*;

    fn id(index: u64) -> LogId<u64> {
        LogId::new(CommittedLeaderId::new(1, 1), index)
    }

    #[tokio::test]
    async fn only_what_was_reported_early_is_waited_for() {
        let flushing = Flushing::new(Some(id(3)));
        for index in [1, 3, 4, 99] {
            flushing.reached(index).await.unwrap();
            assert_eq!(flushing.at_most(id(index)), Some(id(index)));
        }
        flushing.change(|progress| progress.early = 5);
        flushing.reached(3).await.unwrap();
        flushing.reached(6).await.unwrap();
        assert_eq!(flushing.at_most(id(4)), Some(id(3)), "followers are told of what is on disk");
        let waiting = tokio::spawn({
            let flushing = flushing.clone();
            async move { flushing.reached(5).await }
        });
        flushing.change(|progress| progress.flushed = Some(id(4)));
        tokio::task::yield_now().await;
        assert!(!waiting.is_finished());
        flushing.change(|progress| progress.flushed = Some(id(5)));
        waiting.await.unwrap().unwrap();

        flushing.change(|progress| progress.failed = Some("no room".to_owned()));
        assert!(flushing.reached(6).await.unwrap_err().to_string().contains("no room"));
    }

    #[test]
    fn a_disk_that_hangs_is_waited_for_again() {
        let flushing = Flushing::new(Some(id(3)));
        let begin = Instant::now();
        let late = |seconds| begin + Duration::from_secs(seconds);
        assert!(!flushing.is_overdue(late(100)), "nothing waits");
        flushing.reported(4, begin);
        flushing.reported(5, late(1));
        assert!(!flushing.is_overdue(late(1)));
        assert!(flushing.is_overdue(late(2)), "the oldest counts");
        flushing.flushed(Some(id(4)), late(2));
        assert!(!flushing.is_overdue(late(3)), "the disk goes on");
        assert!(flushing.is_overdue(late(4)));
        flushing.flushed(Some(id(5)), late(4));
        assert!(!flushing.is_overdue(late(100)));
    }
}
