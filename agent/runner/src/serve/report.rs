//! What the runner tells its agent on stdout, and how the process ends.

use std::{
    error::Error,
    fmt::{self, Write as _},
    io::Write as _,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use exo_crds::{
    ShardPhase,
    runner::{EXIT_PERMANENT, EXIT_RETRYABLE, RunnerEvent},
};
use exo_engine::{EngineError, exit_now};
use tracing::{error, info};

/// While a rank loads or warms up for long or waits for others that do, it says so again this often;
/// the agent takes longer silence for a hang.
const REPEAT_PERIOD: Duration = Duration::from_secs(30);

/// Why the runner ends, as its last event says it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Failure {
    pub(crate) reason: &'static str,
    pub(crate) message: String,
    /// Whether another try would fail the same way.
    pub(crate) permanent: bool,
}

impl Failure {
    pub(crate) fn permanent(reason: &'static str, message: impl Into<String>) -> Self {
        Self { reason, message: message.into(), permanent: true }
    }

    pub(crate) fn retryable(reason: &'static str, message: impl Into<String>) -> Self {
        Self { reason, message: message.into(), permanent: false }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.reason, self.message)
    }
}

impl From<EngineError> for Failure {
    fn from(error: EngineError) -> Self {
        let permanent = error.is_permanent();
        let reason = match &error {
            EngineError::Config(_) | EngineError::Layers(_) => "BadModel",
            EngineError::Load(_) => "BadWeights",
            EngineError::Group(_) | EngineError::Mixed { .. } => "GroupFailed",
            EngineError::Mlx(_)
            | EngineError::UnknownSequence(_)
            | EngineError::FedTwice(_)
            | EngineError::NoTokens
            | EngineError::Token { .. }
            | EngineError::ContextFull { .. } => "EngineFailed",
        };
        Self { reason, message: chain(&error), permanent }
    }
}

/// An error with its causes, each once.
pub(crate) fn chain(error: &(dyn Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.ends_with(&cause_text) {
            let _ = write!(text, ": {cause_text}");
        }
        source = cause.source();
    }
    text
}

/// Prints events; the only writer of stdout. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub(crate) struct Reporter {
    last_phase: Arc<Mutex<Option<RunnerEvent>>>,
}

impl Reporter {
    /// Tells how far the start is; says nothing when that is no news.
    pub(crate) fn phase(&self, phase: ShardPhase, progress_percent: u8) {
        let event = RunnerEvent::Phase { phase, progress_percent };
        let mut last = self.last_phase();
        if last.as_ref() == Some(&event) {
            return;
        }
        if !matches!(&*last, Some(RunnerEvent::Phase { phase: before, .. }) if *before == phase) {
            info!(?phase, "entered a phase");
        }
        print(&event);
        *last = Some(event);
    }

    pub(crate) fn memory(&self, bytes: u64) {
        print(&RunnerEvent::Memory { bytes });
    }

    pub(crate) fn throughput(&self, tokens_per_s: f64) {
        print(&RunnerEvent::Throughput { tokens_per_s });
    }

    /// Prints the failure as the last event and ends the process.
    pub(crate) fn fail(&self, failure: &Failure) -> ! {
        // Held until the end: nothing else is printed after it, and only one thread fails.
        let _last = self.last_phase();
        // The event first: a log that nobody reads must not keep it back.
        print(&RunnerEvent::Failed {
            reason: failure.reason.to_owned(),
            message: failure.message.clone(),
            permanent: failure.permanent,
        });
        error!(reason = failure.reason, permanent = failure.permanent, "{}", failure.message);
        exit_now(if failure.permanent { EXIT_PERMANENT } else { EXIT_RETRYABLE })
    }

    /// Repeats the phase from time to time while loading and warming up.
    pub(crate) async fn repeat_loading(self) {
        loop {
            tokio::time::sleep(REPEAT_PERIOD).await;
            let last = self.last_phase();
            let repeated = |phase| matches!(phase, ShardPhase::Loading | ShardPhase::Warming);
            match &*last {
                Some(event @ RunnerEvent::Phase { phase, .. }) if repeated(*phase) => print(event),
                Some(_) | None => {}
            }
        }
    }

    fn last_phase(&self) -> MutexGuard<'_, Option<RunnerEvent>> {
        self.last_phase.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn print(event: &RunnerEvent) {
    let mut line = serde_json::to_string(event).expect("the type has no maps with odd keys");
    line.push('\n');
    let mut out = std::io::stdout().lock();
    // A closed pipe means that the agent is gone: the end of stdin tells that, too.
    let _ = out.write_all(line.as_bytes()).and_then(|()| out.flush());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn causes_are_told_once() {
        #[derive(Debug, thiserror::Error)]
        #[error("outer")]
        struct Outer(#[source] std::io::Error);
        let error = Outer(std::io::Error::other("inner"));
        assert_eq!(chain(&error), "outer: inner");
    }
}
