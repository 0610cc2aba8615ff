//! Which rank is to blame when a step stalls: rank 0 calls the roll on the rank channel, which tasks
//! answer whose engines are stuck. Owns the answers; never ends anything.

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::{runtime::Handle, sync::Mutex as AsyncMutex, time::timeout};

use super::{
    channel::{self, RankCommand, Sender},
    watchdog::Still,
};

/// A rank that is alive answers within milliseconds; one whose machine swaps takes longer.
const ANSWER_LIMIT: Duration = Duration::from_secs(2);

/// Steps that this rank has done. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub(crate) struct Steps(Arc<AtomicU64>);

impl Steps {
    pub(crate) fn one_more(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn count(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Rank 0's list of answers, by rank. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub(crate) struct Roll(Arc<Mutex<BTreeMap<u32, u64>>>);

impl Roll {
    pub(crate) fn answered(&self, rank: u32, steps: u64) {
        self.answers().insert(rank, steps);
    }

    fn answers(&self) -> MutexGuard<'_, BTreeMap<u32, u64>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Asks all ranks, waits a little and says who is to blame; none if that can't be told. All
    /// ranks are told as well, so that they don't take rank 0's end for the cause; but not if the
    /// step came to its end meanwhile.
    pub(crate) fn call(
        &self,
        runtime: &Handle,
        senders: &Arc<AsyncMutex<Vec<Sender>>>,
        steps: &Steps,
        still: Still<'_>,
    ) -> Option<String> {
        self.answers().clear();
        runtime.block_on(async {
            let mut senders = timeout(ANSWER_LIMIT, senders.lock()).await.ok()?;
            let ranks: Vec<u32> = senders.iter().map(Sender::rank).collect();
            for sender in senders.iter_mut() {
                // The buffers of a connection to a rank that reads nothing may be full.
                let _ = timeout(ANSWER_LIMIT, sender.send(&RankCommand::RollCall)).await;
            }
            tokio::time::sleep(ANSWER_LIMIT).await;
            let blamed = blame(&ranks, &self.answers(), steps.count())?;
            if !still() {
                return None;
            }
            let abandon = RankCommand::Abandon { message: format!("a step stalled: {blamed}") };
            let tell = channel::send_all(&mut senders, &abandon);
            let _ = timeout(ANSWER_LIMIT, tell).await;
            Some(blamed)
        })
    }
}

/// Those of `ranks` that did not answer; else those that have done fewest steps, if others, rank 0
/// with `own` among them, have done more.
fn blame(ranks: &[u32], answers: &BTreeMap<u32, u64>, own: u64) -> Option<String> {
    let silent: Vec<u32> = ranks.iter().copied().filter(|r| !answers.contains_key(r)).collect();
    if !silent.is_empty() {
        let verb = if silent.len() == 1 { "does" } else { "do" };
        return Some(format!("{} {verb} not answer", name(&silent)));
    }
    let fewest = answers.values().copied().min()?;
    let most = answers.values().copied().max()?.max(own);
    if fewest == most {
        return None;
    }
    let mut behind: Vec<u32> =
        answers.iter().filter(|(_, steps)| **steps == fewest).map(|(rank, _)| *rank).collect();
    if own == fewest {
        behind.insert(0, 0);
    }
    let verb = if behind.len() == 1 { "has" } else { "have" };
    Some(format!("{} {verb} done {fewest} steps, others {most}", name(&behind)))
}

fn name(ranks: &[u32]) -> String {
    let mut text = (if ranks.len() == 1 { "rank" } else { "ranks" }).to_owned();
    for (index, rank) in ranks.iter().enumerate() {
        let _ = write!(text, "{}{rank}", if index == 0 { " " } else { ", " });
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_silent_are_blamed_first_and_then_the_slow() {
        let check = |answers: &[(u32, u64)], own: u64, expect: Option<&str>| {
            let answers = answers.iter().copied().collect();
            assert_eq!(blame(&[1, 2, 3], &answers, own).as_deref(), expect);
        };
        check(&[(1, 7), (3, 7)], 7, Some("rank 2 does not answer"));
        check(&[(1, 7)], 7, Some("ranks 2, 3 do not answer"));
        check(&[(1, 7), (2, 6), (3, 7)], 7, Some("rank 2 has done 6 steps, others 7"));
        check(&[(1, 7), (2, 6), (3, 7)], 6, Some("ranks 0, 2 have done 6 steps, others 7"));
        check(&[(1, 7), (2, 7), (3, 7)], 7, None);
    }
}
