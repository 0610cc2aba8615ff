//! One Shard on this node: what to do next, as a pure function of what is wanted and what is.

pub(crate) mod facilities;
pub(crate) mod launch;
mod report;
pub(crate) mod slots;
pub(crate) mod task;
mod told;

use std::{path::PathBuf, time::Duration};

use exo_crds::{
    Quantity, Rendezvous, SHARD_FINALIZER, Shard, ShardFailure, ShardListen, ShardPhase,
    ShardStatus,
    runner::{EXIT_PERMANENT, REASON_RUNNER_LOST, RunnerEvent},
};

/// What this node has done for a shard so far.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Local {
    stage: Stage,
    /// A runner process exists.
    alive: bool,
    finalizer: Finalizer,
    listen: Option<ShardListen>,
    progress_percent: u8,
    memory_bytes: Option<u64>,
    tokens_per_s: Option<f64>,
    log_lines: Vec<String>,
}

#[derive(Clone, Debug, PartialEq)]
enum Stage {
    New,
    /// Weights are here.
    Located(PathBuf),
    /// Addresses are set aside; waits for the rendezvous.
    Listening(PathBuf),
    /// What the runner said last.
    Running(ShardPhase),
    /// The runner ended because it was asked to.
    Stopped,
    Failed(ShardFailure),
}

/// What this agent has done to the finalizer; watches bring its effect with a delay.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Finalizer {
    Untouched,
    Added,
    Removed,
}

/// The next thing to do.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Step {
    AddFinalizer,
    RemoveFinalizer,
    Locate,
    Reserve,
    /// Weights are in this folder; all ranks meet there.
    Spawn(PathBuf, Rendezvous),
    /// It can't go on like this.
    GiveUp(ShardFailure),
    /// The runner must end.
    Stop,
    Wait,
    /// Nothing is left to do for this shard.
    Finish,
}

/// How a runner ended.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Exit {
    pub(crate) code: Option<i32>,
    pub(crate) signal: Option<i32>,
    /// The last lines of its log, oldest first.
    pub(crate) log_lines: Vec<String>,
}

pub(crate) fn failure(reason: &str, message: impl Into<String>, permanent: bool) -> ShardFailure {
    ShardFailure { reason: reason.to_owned(), message: message.into(), permanent }
}

impl Local {
    /// Where an agent begins that finds a shard: it has no runner for it, whatever an earlier agent
    /// reported.
    pub(crate) fn begin(shard: &Shard) -> Self {
        let status = shard.status.clone().unwrap_or_default();
        let lost = |message: &str| Stage::Failed(failure(REASON_RUNNER_LOST, message, false));
        let stage = match status.phase.unwrap_or(ShardPhase::Pending) {
            ShardPhase::Failed => Stage::Failed(
                status.failure.unwrap_or_else(|| failure("Unknown", "failed earlier", false)),
            ),
            ShardPhase::Connecting
            | ShardPhase::Loading
            | ShardPhase::Warming
            | ShardPhase::Ready
            | ShardPhase::Stopping => lost("the agent was restarted and its runner ended with it"),
            ShardPhase::Pending | ShardPhase::Downloading | ShardPhase::Downloaded => {
                // The addresses that the others were told are no longer held.
                if shard.spec.rendezvous.is_some() {
                    lost("the agent was restarted before it could start a runner")
                } else {
                    Stage::New
                }
            }
        };
        Self {
            stage,
            alive: false,
            finalizer: Finalizer::Untouched,
            listen: status.listen,
            progress_percent: 0,
            memory_bytes: None,
            tokens_per_s: None,
            log_lines: status.last_log_lines,
        }
    }

    /// What to do next. `shard` is `None` when it is gone from the API or not this node's any more;
    /// `ending` when the agent itself shall end.
    pub(crate) fn next(&self, shard: Option<&Shard>, ending: bool) -> Step {
        let deleting = |shard: &Shard| shard.metadata.deletion_timestamp.is_some();
        let unwanted = ending || shard.is_none_or(deleting);
        if self.alive && (unwanted || matches!(self.stage, Stage::Failed(_))) {
            return Step::Stop;
        }
        let Some(shard) = shard.filter(|_| !ending) else {
            return Step::Finish;
        };
        let finalizers = shard.metadata.finalizers.as_deref().unwrap_or_default();
        let held = finalizers.iter().any(|finalizer| finalizer == SHARD_FINALIZER);
        if deleting(shard) {
            return if held && self.finalizer != Finalizer::Removed {
                Step::RemoveFinalizer
            } else {
                Step::Wait
            };
        }
        if !held && self.finalizer == Finalizer::Untouched {
            return Step::AddFinalizer;
        }
        match &self.stage {
            Stage::New => Step::Locate,
            Stage::Located(_) => Step::Reserve,
            Stage::Listening(model_dir) => match &shard.spec.rendezvous {
                None => Step::Wait,
                Some(meeting) if self.is_expected(shard, meeting) => {
                    Step::Spawn(model_dir.clone(), meeting.clone())
                }
                Some(_) => Step::GiveUp(failure(
                    "AddressesChanged",
                    "the other ranks were told addresses that this node does not hold",
                    false,
                )),
            },
            Stage::Running(_) | Stage::Stopped | Stage::Failed(_) => Step::Wait,
        }
    }

    /// Whether a rendezvous names the addresses that are held here.
    fn is_expected(&self, shard: &Shard, meeting: &Rendezvous) -> bool {
        let rank = shard.spec.rank as usize;
        self.listen.as_ref().is_some_and(|listen| {
            meeting.hosts.len() == shard.spec.world_size as usize
                && meeting.hosts.get(rank) == Some(&listen.transport)
                && (rank > 0 || meeting.control == listen.control)
        })
    }

    pub(crate) fn finalizer_added(&mut self) {
        self.finalizer = Finalizer::Added;
    }

    pub(crate) fn finalizer_removed(&mut self) {
        self.finalizer = Finalizer::Removed;
    }

    pub(crate) fn located(&mut self, model_dir: PathBuf) {
        self.stage = Stage::Located(model_dir);
    }

    pub(crate) fn reserved(&mut self, listen: ShardListen) {
        if let Stage::Located(model_dir) = &self.stage {
            self.stage = Stage::Listening(model_dir.clone());
            self.listen = Some(listen);
        }
    }

    pub(crate) fn spawned(&mut self) {
        self.alive = true;
        self.stage = Stage::Running(ShardPhase::Connecting);
    }

    /// The first failure is the cause; what follows it is not.
    pub(crate) fn failed(&mut self, failure: ShardFailure) {
        if !matches!(self.stage, Stage::Failed(_)) {
            self.stage = Stage::Failed(failure);
        }
    }

    pub(crate) fn said(&mut self, event: RunnerEvent) {
        match event {
            RunnerEvent::Phase { phase, progress_percent } => {
                let Stage::Running(now) = &mut self.stage else { return };
                if let ShardPhase::Connecting
                | ShardPhase::Loading
                | ShardPhase::Warming
                | ShardPhase::Ready = phase
                {
                    *now = phase;
                    self.progress_percent = progress_percent.min(100);
                }
            }
            RunnerEvent::Memory { bytes } => self.memory_bytes = Some(bytes),
            RunnerEvent::Throughput { tokens_per_s } => {
                // One decimal is what anybody reads; more would only cause writes.
                self.tokens_per_s =
                    tokens_per_s.is_finite().then(|| (tokens_per_s * 10.0).round() / 10.0);
            }
            RunnerEvent::Failed { reason, message, permanent } => {
                self.failed(failure(&reason, message, permanent));
            }
        }
    }

    /// The runner has ended by itself.
    pub(crate) fn exited(&mut self, exit: Exit) {
        self.alive = false;
        self.memory_bytes = None;
        // Who is killed had no chance to say why: its last line would only mislead.
        let last_line = exit.log_lines.last().filter(|_| exit.signal.is_none());
        let last_line = last_line.map(|line| format!("; it said last: {line}"));
        let how = match (exit.code, exit.signal) {
            (Some(code), _) => format!("ended with status {code}"),
            (None, Some(signal)) => format!("was killed by signal {signal}"),
            (None, None) => "ended".to_owned(),
        };
        let message = format!("the runner {how}{}", last_line.unwrap_or_default());
        let permanent = exit.code == Some(EXIT_PERMANENT);
        self.log_lines = exit.log_lines;
        self.failed(failure("RunnerExited", message, permanent));
    }

    /// The runner has ended because it was told to.
    pub(crate) fn stopped(&mut self, exit: Exit) {
        self.alive = false;
        self.memory_bytes = None;
        self.tokens_per_s = None;
        if matches!(self.stage, Stage::Failed(_)) {
            self.log_lines = exit.log_lines;
        } else {
            self.stage = Stage::Stopped;
        }
    }

    /// Whether the runner has to say something now and then: it need not once it is Ready.
    pub(crate) fn must_speak(&self) -> bool {
        matches!(&self.stage, Stage::Running(phase) if *phase != ShardPhase::Ready)
    }

    /// The runner stayed silent for too long.
    pub(crate) fn hung(&mut self, limit: Duration) {
        if let Stage::Running(phase) = &self.stage {
            let seconds = limit.as_secs();
            let message = format!("the runner said nothing for {seconds} s while {phase:?}");
            self.failed(failure("RunnerHung", message, false));
        }
    }

    pub(crate) fn memory_bytes(&self) -> Option<u64> {
        self.memory_bytes
    }

    pub(crate) fn failure(&self) -> Option<&ShardFailure> {
        match &self.stage {
            Stage::Failed(failure) => Some(failure),
            Stage::New
            | Stage::Located(_)
            | Stage::Listening(_)
            | Stage::Running(_)
            | Stage::Stopped => None,
        }
    }

    /// What the Shard's status shall say.
    pub(crate) fn status(&self) -> ShardStatus {
        let phase = match &self.stage {
            Stage::New | Stage::Located(_) => ShardPhase::Pending,
            Stage::Listening(_) => ShardPhase::Downloaded,
            Stage::Running(phase) => *phase,
            Stage::Stopped => ShardPhase::Stopping,
            Stage::Failed(_) => ShardPhase::Failed,
        };
        let running = matches!(self.stage, Stage::Running(_));
        ShardStatus {
            phase: Some(phase),
            progress: running.then(|| format!("{}%", self.progress_percent)),
            memory: self.memory_bytes.map(|bytes| Quantity::from_bytes(bytes).rounded()),
            memory_bytes: self.memory_bytes,
            listen: self.listen.clone(),
            tokens_per_second: self.tokens_per_s.filter(|_| running),
            failure: self.failure().cloned(),
            last_log_lines: if self.failure().is_some() {
                self.log_lines.clone()
            } else {
                Vec::new()
            },
        }
    }
}

#[cfg(test)]
pub(crate) mod tests;
