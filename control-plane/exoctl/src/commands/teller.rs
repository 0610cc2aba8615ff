//! What a command that waits tells: each new state once, of a failure that comes again only that,
//! and now and then how long it has been waiting. Decides what to say, and prints nothing.

use std::{collections::BTreeSet, time::Duration};

use tokio::time::Instant;

/// After so long a silence people wonder whether anything still happens.
const PERIOD: Duration = Duration::from_secs(15);
/// Many ranks start within a moment: of states with one reason the last one of so long is told.
const PAUSE: Duration = Duration::from_secs(2);
/// A reminder fits on a line; the whole text was told before.
const MAX_REMINDER_CHARS: usize = 100;

#[derive(Debug)]
pub(super) struct Teller {
    began: Instant,
    last_line: Instant,
    /// A line that waits for the end of the pause.
    pending: Option<String>,
    /// The reason that the last line gave.
    reason: String,
    /// The last state, told or not.
    state: String,
    /// The shape of the last one told that was neither a failure nor a try after one.
    told: Option<String>,
    /// The shape of the last failure.
    failure: Option<String>,
    /// How far tries have come, as told.
    tries: BTreeSet<String>,
}

impl Teller {
    pub(super) fn new(now: Instant) -> Self {
        Self {
            began: now,
            last_line: now,
            pending: None,
            reason: String::new(),
            state: String::new(),
            told: None,
            failure: None,
            tries: BTreeSet::new(),
        }
    }

    /// What is to be told of a state, if anything.
    pub(super) fn line(&mut self, state: &str, now: Instant) -> Option<String> {
        state.clone_into(&mut self.state);
        let line = self.news(state)?;
        if reason(&line) == self.reason && now < self.last_line + PAUSE {
            self.pending = Some(line);
            return None;
        }
        self.pending = None;
        reason(&line).clone_into(&mut self.reason);
        self.last_line = now;
        Some(line)
    }

    fn news(&mut self, state: &str) -> Option<String> {
        let (text, failures) = split_failures(state);
        match failures {
            // A try after failures: it is news as long as it comes further than those before.
            Some((_, tail)) if tail.starts_with("before") => {
                self.tries.insert(shape(text)).then(|| text.to_owned())
            }
            Some(_) => {
                let failure = shape(of_any_shard(text));
                let is_known = self.failure.as_ref() == Some(&failure);
                (self.failure, self.told) = (Some(failure), None);
                (!is_known).then(|| state.to_owned())
            }
            // What is stopped because of it.
            None if self.failure.as_ref().is_some_and(|f| shape(state).contains(f)) => None,
            None => {
                let shape = shape(state);
                self.failure = None;
                self.tries.insert(shape.clone());
                let is_known = self.told.as_ref() == Some(&shape);
                self.told = Some(shape);
                (!is_known).then(|| state.to_owned())
            }
        }
    }

    /// When something is to be told even if nothing comes.
    pub(super) fn due(&self) -> Instant {
        self.last_line + if self.pending.is_some() { PAUSE } else { PERIOD }
    }

    /// That: what was held back, else how long it has been and the state in short.
    pub(super) fn overdue(&mut self, now: Instant) -> String {
        self.last_line = now;
        if let Some(line) = self.pending.take() {
            return line;
        }
        let elapsed_s = now.duration_since(self.began).as_secs();
        format!("still waiting after {elapsed_s}s: {}", in_short(&self.state))
    }
}

/// The word that a state begins with.
fn reason(state: &str) -> &str {
    state.split([':', ',']).next().unwrap_or_default()
}

/// A state but for its numbers: free memory and times change all the while.
fn shape(state: &str) -> String {
    let mut shape = String::with_capacity(state.len());
    for c in state.chars() {
        match c.is_ascii_digit() {
            true if shape.ends_with('#') => {}
            true => shape.push('#'),
            false => shape.push(c),
        }
    }
    shape
}

fn in_short(state: &str) -> String {
    let (text, failures) = split_failures(state);
    match failures {
        None => cut(text),
        Some((count, tail)) => match tail.strip_prefix("in a row, ") {
            Some(next) => format!("{}; failed {count} time(s), {next}", cut(of_any_shard(text))),
            None => format!("{}; failed {count} time(s) before", cut(text)),
        },
    }
}

fn cut(text: &str) -> String {
    match text.char_indices().nth(MAX_REMINDER_CHARS) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
    }
}

/// The controller's words about failures, at the end of a message: `; 3 failure(s) …`.
fn split_failures(text: &str) -> (&str, Option<(&str, &str)>) {
    let split = || {
        let (before, tail) = text.split_once(" failure(s) ")?;
        let (head, count) = before.rsplit_once("; ")?;
        count.parse::<u32>().ok().map(|_| (head, Some((count, tail))))
    };
    split().unwrap_or((text, None))
}

/// A failure without its `shard NAME on NODE: `: each try has new names, and ranks fail alike.
fn of_any_shard(failure: &str) -> &str {
    let of_shard = failure.split_once("shard ").and_then(|(_, rest)| rest.split_once(": "));
    of_shard.map_or(failure, |(_, what)| what)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Checks what is told of one state after the other.
    fn story(states: &[(&str, Option<&str>)]) {
        let mut now = Instant::now();
        let mut teller = Teller::new(now);
        for (state, expect) in states {
            now += PAUSE;
            assert_eq!(teller.line(state, now).as_deref(), *expect, "{state}");
        }
    }

    #[test]
    fn the_same_failure_is_told_once() {
        let starting = "Starting, rank 0 Pending on a, rank 1 Pending on b";
        let missing = "WeightsNotFound: no folder `x`";
        let failed = |count: u32, rank: u32| {
            format!(
                "shard tiny-0-a{count}-{rank} on b: {missing}; {count} failure(s) in a row, next \
                 try after 08:00:0{count}Z"
            )
        };
        let again = |phase: &str, count: u32| {
            let last = format!("shard tiny-0-a{count}-1 on b: {missing}");
            format!("Starting, rank 0 {phase} on a; {count} failure(s) before, the last: {last}")
        };
        let other = "ShardFailed: shard tiny-0-a3-0 on a: RunnerExited: killed by signal 9; \
                     3 failure(s) in a row, next try after 08:00:09Z";
        let unseen = "the newest change has not been looked at";
        story(&[
            (starting, Some(starting)),
            (&failed(1, 1), Some(&failed(1, 1))),
            (&failed(1, 1), None),
            (&format!("Stopping: shard tiny-0-a1-1 on b: {missing}; waiting for it"), None),
            (&again("Pending", 1), Some("Starting, rank 0 Pending on a")),
            (&failed(2, 0), None),
            (&again("Pending", 2), None),
            (&again("Loading", 2), Some("Starting, rank 0 Loading on a")),
            (&failed(3, 1), None),
            (other, Some(other)),
            (&again("Pending", 3), None),
            (unseen, Some(unseen)),
            // Somebody has changed something, and it did not help.
            (&failed(4, 1), Some(&failed(4, 1))),
        ]);
        // A first try that failed at once was told already.
        let pending = "Starting, rank 0 Pending on a";
        story(&[
            (pending, Some(pending)),
            (&failed(1, 1), Some(&failed(1, 1))),
            (&again("Pending", 1), None),
        ]);
    }

    #[test]
    fn a_reason_is_told_whenever_it_changes_but_for_its_numbers() {
        let none = |free: &str| format!("Unplaceable: one: {free} free, one layer needs 110Gi");
        let starting = "Starting, rank 0 Loading on one";
        story(&[
            (&none("23Gi"), Some(&none("23Gi"))),
            (&none("9Gi"), None),
            (&none("21Gi"), None),
            (starting, Some(starting)),
            (&none("21Gi"), Some(&none("21Gi"))),
        ]);
    }

    #[test]
    fn ranks_that_start_together_are_told_together() {
        let began = Instant::now();
        let mut teller = Teller::new(began);
        let mut line =
            |state: &str, after_ms| teller.line(state, began + Duration::from_millis(after_ms));
        assert!(line("Starting, rank 0 Pending on a, rank 1 Pending on b", 0).is_some());
        assert!(line("Starting, rank 0 Loading on a, rank 1 Pending on b", 10).is_none());
        let both = "Starting, rank 0 Loading on a, rank 1 Loading on b";
        assert!(line(both, 20).is_none());
        // What is no news doesn't take its place.
        assert!(line(both, 30).is_none());
        assert_eq!(teller.due(), began + PAUSE);
        assert_eq!(teller.overdue(began + PAUSE), both);
        assert_eq!(teller.due(), began + PAUSE + PERIOD);
        // Another reason waits for nothing.
        let mut line = |state: &str| teller.line(state, began + PAUSE);
        assert!(line("Starting, rank 0 Ready on a, rank 1 Loading on b").is_none());
        assert!(line("Unplaceable: no node is known").is_some());
        assert_eq!(teller.due(), began + PAUSE + PERIOD);
    }

    #[test]
    fn reminders_give_the_time_and_the_newest_state() {
        let began = Instant::now();
        let mut teller = Teller::new(began);
        let mut reminder = |state: &str, after_s: u64| {
            let now = began + Duration::from_secs(after_s);
            teller.line(state, began);
            assert_eq!(teller.due(), began + PERIOD);
            let reminder = teller.overdue(now);
            assert_eq!(teller.due(), now + PERIOD);
            teller.last_line = began;
            reminder
        };
        assert_eq!(
            reminder("ModelNotFound: there is no model named x", 15),
            "still waiting after 15s: ModelNotFound: there is no model named x"
        );
        assert_eq!(
            reminder("shard a-0-a7-0 on b: Crashed: x; 7 failure(s) in a row, next try soon", 90),
            "still waiting after 90s: Crashed: x; failed 7 time(s), next try soon"
        );
        let long = reminder(&format!("NoCapacity: {}", "no node has room ".repeat(9)), 75);
        assert!(
            long.starts_with("still waiting after 75s: NoCapacity: no node has room "),
            "{long}"
        );
        assert!(long.chars().count() < 130 && long.ends_with('…'), "{long}");
        assert_eq!(
            reminder("Starting, rank 0 Loading on a; 2 failure(s) before, the last: x", 30),
            "still waiting after 30s: Starting, rank 0 Loading on a; failed 2 time(s) before"
        );
    }
}
