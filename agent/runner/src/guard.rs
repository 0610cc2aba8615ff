//! Ends a process that runs by hand when the other ranks do not come or do not go on: a collective with a stopped
//! peer never returns, and of several that wait for a peer that is gone, MLX lets only the first fail. Owns the deadlines, one for the process, as it has one group; never touches MLX.

use std::{
    io,
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use exo_engine::{
    distributed::{Backend, gone, suspects},
    exit_now,
};

/// How late a stall may be noticed.
const PERIOD: Duration = Duration::from_millis(200);
/// What takes longer than this may be waiting for a peer that is gone. MLX's own message, which is clearer, comes
/// earlier.
const PATIENCE: Duration = Duration::from_secs(1);
/// Ranks read different amounts from different disks: how much longer than for a step they may wait for each other.
const LOAD_FACTOR: u32 = 10;
const EXIT_STALLED: i32 = 1;

static GUARD: Mutex<Guard> = Mutex::new(Guard { limit: Duration::MAX, work: None });

#[derive(Debug)]
struct Guard {
    /// For a step.
    limit: Duration,
    work: Option<Work>,
}

#[derive(Debug)]
struct Work {
    what: &'static str,
    since: Instant,
    limit: Duration,
}

/// Starts looking, unless this process has no other ranks. Called once.
pub(crate) fn start(limit: Duration) -> io::Result<()> {
    if Backend::from_env().is_none() {
        return Ok(());
    }
    guard().limit = limit;
    // On a thread of its own: the main one may be stuck.
    std::thread::Builder::new().name("guard".to_owned()).spawn(|| {
        loop {
            std::thread::sleep(PERIOD);
            let now = Instant::now();
            let (stall, waits) = {
                let guard = guard();
                (guard.stall(now), guard.waits(now))
            };
            if let Some(stall) = stall {
                end(&stall);
            }
            if let Some((what, peers)) = waits.and_then(|what| Some((what, gone()?))) {
                eprintln!("error: {what} can't go on: {peers}");
                exit_now(EXIT_STALLED);
            }
        }
    })?;
    Ok(())
}

/// From now on `what` has the limit to go on. Takes the place of what was watched before.
pub(crate) fn watch(what: &'static str) {
    let mut guard = guard();
    let limit = guard.limit;
    guard.work = Some(Work { what, since: Instant::now(), limit });
}

/// From now on nothing has a limit: no other rank waits for this one, nor this one for others.
pub(crate) fn rest() {
    guard().work = None;
}

/// As [`watch`], for each part of the weights and for the time in which the other ranks read theirs.
pub(crate) fn watch_loading() {
    let mut guard = guard();
    let what = "loading, or waiting for the other ranks to load,";
    let limit = guard.limit.saturating_mul(LOAD_FACTOR);
    guard.work = Some(Work { what, since: Instant::now(), limit });
}

fn guard() -> MutexGuard<'static, Guard> {
    GUARD.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Guard {
    /// What has taken long enough to look for the reason, if anything.
    fn waits(&self, now: Instant) -> Option<&'static str> {
        let Work { what, since, .. } = self.work.as_ref()?;
        (now.saturating_duration_since(*since) > PATIENCE).then_some(what)
    }

    /// What is overdue, if anything.
    fn stall(&self, now: Instant) -> Option<String> {
        let Work { what, since, limit } = self.work.as_ref()?;
        let overdue = now.saturating_duration_since(*since) > *limit;
        overdue.then(|| format!("{what} made no progress for {} s", limit.as_secs()))
    }
}

fn end(stall: &str) -> ! {
    match suspects() {
        Some(peers) => eprintln!("error: {stall}: {peers}"),
        None => eprintln!("error: {stall}"),
    }
    exit_now(EXIT_STALLED)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_overdue_is_named() {
        let (limit, since) = (Duration::from_secs(7), Instant::now());
        let at = |s| since + Duration::from_secs(s);
        let mut guard = Guard { limit, work: None };
        assert_eq!(guard.stall(at(1000)), None);
        guard.work = Some(Work { what: "a step", since, limit });
        assert_eq!((guard.stall(at(7)), guard.waits(at(1))), (None, None));
        assert_eq!(guard.waits(at(2)), Some("a step"));
        assert_eq!(guard.stall(at(8)).as_deref(), Some("a step made no progress for 7 s"));
    }
}
