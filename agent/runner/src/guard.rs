//! Ends a process that runs by hand when the other ranks do not come or do not go on: a collective with a stopped
//! peer never returns. Owns the deadlines; never touches MLX.

use std::{
    io,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use exo_engine::{
    distributed::{Backend, suspects},
    exit_now,
};

/// How late a stall may be noticed.
const PERIOD: Duration = Duration::from_millis(200);
/// Ranks read different amounts from different disks: how much longer than for a step they may wait for each other.
const LOAD_FACTOR: u32 = 10;
const EXIT_STALLED: i32 = 1;

#[derive(Debug)]
struct Work {
    what: &'static str,
    until: Instant,
    limit: Duration,
}

/// Watches one piece of work at a time; does nothing in a process without other ranks.
#[derive(Debug)]
pub(crate) struct Guard {
    work: Arc<Mutex<Option<Work>>>,
    limit: Duration,
}

impl Guard {
    /// `limit` is for each piece of work.
    pub(crate) fn start(limit: Duration) -> io::Result<Self> {
        let guard = Self { work: Arc::default(), limit };
        if Backend::from_env().is_some() {
            let work = guard.work.clone();
            // On a thread of its own: the main one may be stuck.
            std::thread::Builder::new().name("guard".to_owned()).spawn(move || {
                loop {
                    std::thread::sleep(PERIOD);
                    if let Some(stall) = stall(&lock(&work), Instant::now()) {
                        end(&stall);
                    }
                }
            })?;
        }
        Ok(guard)
    }

    /// From now on `what` has the limit to go on. Takes the place of what was watched before.
    pub(crate) fn watch(&self, what: &'static str) {
        self.set(what, self.limit);
    }

    /// As [`Guard::watch`] for the time in which all ranks read their weights.
    pub(crate) fn watch_loading(&self) {
        self.set("loading, or waiting for the other ranks to load,", self.limit * LOAD_FACTOR);
    }

    fn set(&self, what: &'static str, limit: Duration) {
        *lock(&self.work) = Some(Work { what, until: Instant::now() + limit, limit });
    }
}

fn lock(work: &Mutex<Option<Work>>) -> MutexGuard<'_, Option<Work>> {
    work.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What is overdue, if anything.
fn stall(work: &Option<Work>, now: Instant) -> Option<String> {
    let Work { what, until, limit } = work.as_ref()?;
    (now > *until).then(|| format!("{what} made no progress for {} s", limit.as_secs()))
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
        let guard = Guard::start(Duration::from_secs(7)).unwrap();
        let stalled = |after_s| {
            stall(&lock(&guard.work), Instant::now() + Duration::from_secs(after_s))
        };
        assert_eq!(stalled(1000), None);
        guard.watch("a step");
        assert_eq!(stalled(6), None);
        assert_eq!(stalled(8).as_deref(), Some("a step made no progress for 7 s"));
        guard.watch_loading();
        assert_eq!(stalled(69), None);
        assert!(stalled(71).is_some());
    }
}
