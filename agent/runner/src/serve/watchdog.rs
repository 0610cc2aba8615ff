//! Ends the process when a piece of work takes too long: a collective with a dead peer never
//! returns, and nothing inside MLX notices.

use std::{
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError},
    time::{Duration, Instant},
};

use super::report::{Failure, Reporter};

/// How late a stall may be noticed.
const PERIOD: Duration = Duration::from_secs(1);

#[derive(Debug)]
struct Work {
    what: &'static str,
    limit: Duration,
    since: Instant,
}

/// Whether what stalled still does.
pub(crate) type Still<'a> = &'a (dyn Fn() -> bool + Sync);
/// Finds out who is to blame for a stall. May take some seconds, in which the work may go on.
type Inquiry = Box<dyn Fn(Still<'_>) -> Option<String> + Send + Sync>;

/// Watches one piece of work at a time. Cheap to clone.
#[derive(Clone, Default)]
pub(crate) struct Watchdog {
    work: Arc<Mutex<Option<Work>>>,
    inquiry: Arc<OnceLock<Inquiry>>,
}

impl Watchdog {
    /// From now on `what` has `limit` to go on. Takes the place of what was watched before.
    pub(crate) fn watch(&self, what: &'static str, limit: Duration) {
        *self.work() = Some(Work { what, limit, since: Instant::now() });
    }

    /// As [`Watchdog::watch`], but only if `before` is what is under way.
    pub(crate) fn replace(&self, before: &str, what: &'static str, limit: Duration) {
        let mut work = self.work();
        if work.as_ref().is_some_and(|work| work.what == before) {
            *work = Some(Work { what, limit, since: Instant::now() });
        }
    }

    /// Nothing is under way.
    pub(crate) fn rest(&self) {
        *self.work() = None;
    }

    /// What is overdue, if anything, and since when it is under way.
    fn stalled(&self, now: Instant) -> Option<(Failure, Instant)> {
        let work = self.work();
        let work = work.as_ref()?;
        (now.saturating_duration_since(work.since) > work.limit).then(|| {
            let (what, seconds) = (work.what, work.limit.as_secs());
            let text = format!("{what} made no progress for {seconds} s");
            (Failure::retryable("Stalled", text), work.since)
        })
    }

    /// Whether the work that was under way then is so now.
    fn is_still(&self, since: Instant) -> bool {
        self.work().as_ref().is_some_and(|work| work.since == since)
    }

    /// Asks this when something stalls. Only the first inquiry counts.
    pub(crate) fn ask(&self, inquiry: Inquiry) {
        let _ = self.inquiry.set(inquiry);
    }

    /// Looks on for ever, on a thread of its own: the others may all be stuck.
    pub(crate) fn start(&self, reporter: Reporter) -> std::io::Result<()> {
        let watchdog = self.clone();
        std::thread::Builder::new().name("watchdog".to_owned()).spawn(move || {
            loop {
                std::thread::sleep(PERIOD);
                let Some((mut failure, since)) = watchdog.stalled(Instant::now()) else { continue };
                let still = || watchdog.is_still(since);
                if let Some(blamed) = watchdog.inquiry.get().and_then(|inquiry| inquiry(&still)) {
                    failure.message += &format!(": {blamed}");
                }
                if still() {
                    reporter.fail(&failure);
                }
            }
        })?;
        Ok(())
    }

    fn work(&self) -> MutexGuard<'_, Option<Work>> {
        self.work.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_what_stalls() {
        let watchdog = Watchdog::default();
        let later = |s| Instant::now() + Duration::from_secs(s);
        assert_eq!(watchdog.stalled(later(1000)), None);
        watchdog.watch("a step", Duration::from_secs(60));
        assert_eq!(watchdog.stalled(later(59)), None);
        let (failure, since) = watchdog.stalled(later(61)).unwrap();
        assert_eq!(failure.message, "a step made no progress for 60 s");
        assert!(!failure.permanent);
        assert!(watchdog.is_still(since));
        // It went on while others were asked.
        watchdog.watch("a step", Duration::from_secs(60));
        assert!(!watchdog.is_still(since));
        watchdog.replace("a step", "another", Duration::MAX);
        assert_eq!(watchdog.stalled(later(1000)), None);
        watchdog.replace("a step", "a third", Duration::ZERO);
        assert_eq!(watchdog.stalled(later(1000)), None);
        watchdog.watch("a step", Duration::ZERO);
        watchdog.rest();
        assert_eq!(watchdog.stalled(later(1000)), None);
    }
}
