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
    runner::{EXIT_PERMANENT, RunnerEvent},
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
        let lost = |message: &str| Stage::Failed(failure("RunnerLost", message, false));
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
pub(crate) mod tests {
    use exo_crds::{LayerRange, ModelSource, ShardModel, ShardSpec, ShardingKind, TransportKind};
    use k8s_openapi::{apimachinery::pkg::apis::meta::v1::Time, jiff::Timestamp};
    use proptest::prelude::*;

    use super::*;

    /// Rank 0 of two, with the finalizer on it.
    pub(crate) fn shard(name: &str) -> Shard {
        let spec = ShardSpec {
            instance: "tiny".to_owned(),
            replica: 0,
            epoch: 1,
            node: "a".to_owned(),
            rank: 0,
            world_size: 2,
            sharding: ShardingKind::Pipeline,
            layers: LayerRange::new(0..4).unwrap(),
            model: ShardModel {
                name: "tiny".to_owned(),
                source: ModelSource { path: Some("tiny".to_owned()), ..Default::default() },
                model_type: "llama".to_owned(),
                layers: 8,
            },
            transport: TransportKind::Ring,
            rendezvous: None,
            seed: 7,
            context_length: 512,
            max_concurrency: 4,
            fast_synch: true,
            environment: Default::default(),
        };
        let mut shard = Shard::new(name, spec);
        shard.metadata.namespace = Some("default".to_owned());
        shard.metadata.uid = Some(format!("uid-of-{name}"));
        shard.metadata.finalizers = Some(vec![SHARD_FINALIZER.to_owned()]);
        shard
    }

    pub(crate) fn delete(shard: &mut Shard) {
        shard.metadata.deletion_timestamp = Some(Time(Timestamp::UNIX_EPOCH));
    }

    pub(crate) fn listen() -> ShardListen {
        ShardListen {
            transport: "127.0.0.1:1001".to_owned(),
            control: "127.0.0.1:1002".to_owned(),
            serve: "127.0.0.1:1003".to_owned(),
        }
    }

    pub(crate) fn meeting() -> Rendezvous {
        Rendezvous {
            hosts: vec!["127.0.0.1:1001".to_owned(), "127.0.0.1:2001".to_owned()],
            control: "127.0.0.1:1002".to_owned(),
        }
    }

    fn phase(phase: ShardPhase, progress_percent: u8) -> RunnerEvent {
        RunnerEvent::Phase { phase, progress_percent }
    }

    /// A local state whose runner has just been started.
    fn running() -> Local {
        let mut local = Local::begin(&shard("s"));
        local.located("/m".into());
        local.reserved(listen());
        local.spawned();
        local
    }

    #[test]
    fn the_whole_way_to_ready_and_away() {
        let mut shard = shard("s");
        let mut local = Local::begin(&shard);
        assert_eq!(local.next(Some(&shard), false), Step::Locate);
        local.located("/m".into());
        assert_eq!(local.next(Some(&shard), false), Step::Reserve);
        assert_eq!(local.status().phase, Some(ShardPhase::Pending));
        local.reserved(listen());
        assert_eq!(local.next(Some(&shard), false), Step::Wait);
        assert_eq!(
            local.status(),
            ShardStatus {
                phase: Some(ShardPhase::Downloaded),
                listen: Some(listen()),
                ..ShardStatus::default()
            }
        );
        shard.spec.rendezvous = Some(meeting());
        assert_eq!(local.next(Some(&shard), false), Step::Spawn("/m".into(), meeting()));
        local.spawned();
        assert_eq!(local.next(Some(&shard), false), Step::Wait);
        assert!(local.must_speak());
        local.said(phase(ShardPhase::Loading, 40));
        local.said(RunnerEvent::Memory { bytes: 19 << 30 });
        assert_eq!(local.status().progress.as_deref(), Some("40%"));
        local.said(phase(ShardPhase::Ready, 100));
        local.said(RunnerEvent::Throughput { tokens_per_s: 12.34 });
        assert!(!local.must_speak());
        assert_eq!(
            serde_json::to_value(local.status()).unwrap(),
            serde_json::json!({
                "phase": "Ready",
                "progress": "100%",
                "memory": "19Gi",
                "memoryBytes": 19u64 << 30,
                "listen": {
                    "transport": "127.0.0.1:1001",
                    "control": "127.0.0.1:1002",
                    "serve": "127.0.0.1:1003",
                },
                "tokensPerSecond": 12.3,
            })
        );
        delete(&mut shard);
        assert_eq!(local.next(Some(&shard), false), Step::Stop);
        local.stopped(Exit::default());
        assert_eq!(local.status().phase, Some(ShardPhase::Stopping));
        assert_eq!(local.next(Some(&shard), false), Step::RemoveFinalizer);
        local.finalizer_removed();
        assert_eq!(local.next(Some(&shard), false), Step::Wait);
        assert_eq!(local.next(None, false), Step::Finish);
    }

    #[test]
    fn a_finalizer_is_added_once() {
        let mut shard = shard("s");
        shard.metadata.finalizers = None;
        let mut local = Local::begin(&shard);
        assert_eq!(local.next(Some(&shard), false), Step::AddFinalizer);
        local.finalizer_added();
        assert_eq!(local.next(Some(&shard), false), Step::Locate);
        delete(&mut shard);
        assert_eq!(local.next(Some(&shard), false), Step::Wait);
    }

    #[test]
    fn the_first_failure_counts_and_the_runner_is_stopped() {
        let mut local = running();
        local.said(RunnerEvent::Failed {
            reason: "BadWeights".to_owned(),
            message: "no tensor `x`".to_owned(),
            permanent: true,
        });
        let shard = shard("s");
        assert_eq!(local.next(Some(&shard), false), Step::Stop);
        local.stopped(Exit { code: Some(2), log_lines: vec!["bye".to_owned()], signal: None });
        assert_eq!(local.next(Some(&shard), false), Step::Wait);
        let status = local.status();
        assert_eq!(status.phase, Some(ShardPhase::Failed));
        assert_eq!(status.failure, Some(failure("BadWeights", "no tensor `x`", true)));
        assert_eq!(status.last_log_lines, ["bye"]);
    }

    #[test]
    fn silent_deaths_are_told_by_their_exit() {
        fn check(exit: Exit, message: &str, permanent: bool) {
            let mut local = running();
            local.exited(exit);
            assert_eq!(local.failure(), Some(&failure("RunnerExited", message, permanent)));
            assert_eq!(local.next(Some(&shard("s")), false), Step::Wait);
        }
        let code = |code| Exit { code: Some(code), ..Exit::default() };
        check(code(0), "the runner ended with status 0", false);
        check(code(1), "the runner ended with status 1", false);
        check(code(2), "the runner ended with status 2", true);
        let said = |exit| Exit { log_lines: vec!["loading".to_owned(), "bad".to_owned()], ..exit };
        check(said(code(1)), "the runner ended with status 1; it said last: bad", false);
        let killed = Exit { signal: Some(9), ..Exit::default() };
        check(said(killed), "the runner was killed by signal 9", false);
    }

    #[test]
    fn a_hung_runner_is_given_up() {
        let mut local = running();
        local.said(phase(ShardPhase::Loading, 10));
        local.hung(Duration::from_secs(120));
        assert_eq!(local.next(Some(&shard("s")), false), Step::Stop);
        assert_eq!(
            local.failure(),
            Some(&failure("RunnerHung", "the runner said nothing for 120 s while Loading", false))
        );
    }

    #[test]
    fn shards_of_an_earlier_agent_have_lost_their_runner() {
        fn check(phase: ShardPhase, told: bool, expect: Option<&str>) {
            let mut shard = shard("s");
            shard.status = Some(ShardStatus { phase: Some(phase), ..ShardStatus::default() });
            shard.spec.rendezvous = told.then(meeting);
            let local = Local::begin(&shard);
            let reason = local.failure().map(|failure| failure.reason.as_str());
            assert_eq!(reason, expect, "{phase:?}");
        }
        check(ShardPhase::Pending, false, None);
        check(ShardPhase::Downloaded, false, None);
        check(ShardPhase::Downloaded, true, Some("RunnerLost"));
        check(ShardPhase::Loading, true, Some("RunnerLost"));
        check(ShardPhase::Ready, true, Some("RunnerLost"));
        check(ShardPhase::Failed, true, Some("Unknown"));
    }

    #[test]
    fn a_meeting_elsewhere_is_refused() {
        let mut shard = shard("s");
        let mut local = Local::begin(&shard);
        local.located("/m".into());
        local.reserved(listen());
        let mut refused = |edit: fn(&mut Rendezvous)| {
            let mut meeting = meeting();
            edit(&mut meeting);
            shard.spec.rendezvous = Some(meeting);
            assert!(matches!(local.next(Some(&shard), false), Step::GiveUp(_)));
        };
        refused(|m| m.hosts[0] = "127.0.0.1:9".to_owned());
        refused(|m| m.control = "127.0.0.1:9".to_owned());
        refused(|m| m.hosts.truncate(1));
        refused(|m| m.hosts.clear());
    }

    #[test]
    fn an_ending_agent_stops_runners_and_leaves_finalizers() {
        let shard = shard("s");
        let mut local = running();
        assert_eq!(local.next(Some(&shard), true), Step::Stop);
        local.stopped(Exit::default());
        assert_eq!(local.next(Some(&shard), true), Step::Finish);
    }

    proptest! {
        /// In whatever order things happen: a runner is never left behind, never started twice,
        /// and the finalizer stays while it lives.
        #[test]
        fn a_runner_never_outlives_its_finalizer(
            happenings in prop::collection::vec(0u8..9, 0..40),
        ) {
            let mut shard = Some(shard("s"));
            let mut local = Local::begin(shard.as_ref().unwrap());
            let (mut alive, mut ending) = (false, false);
            for happening in happenings {
                match happening {
                    0 => if let Some(shard) = &mut shard { delete(shard) },
                    1 => if let Some(shard) = &mut shard {
                        shard.spec.rendezvous = Some(meeting());
                    },
                    2 if alive => local.said(phase(ShardPhase::Ready, 100)),
                    3 if alive => local.hung(Duration::from_secs(120)),
                    4 if alive => {
                        alive = false;
                        local.exited(Exit::default());
                    }
                    5 => shard = None,
                    6 => ending = true,
                    _ => {}
                }
                match local.next(shard.as_ref(), ending) {
                    Step::AddFinalizer => local.finalizer_added(),
                    Step::RemoveFinalizer => {
                        prop_assert!(!alive);
                        local.finalizer_removed();
                    }
                    Step::Locate => local.located("/m".into()),
                    Step::Reserve => local.reserved(listen()),
                    Step::Spawn(..) => {
                        prop_assert!(!alive);
                        alive = true;
                        local.spawned();
                    }
                    Step::GiveUp(failure) => local.failed(failure),
                    Step::Stop => {
                        prop_assert!(alive);
                        alive = false;
                        local.stopped(Exit::default());
                    }
                    Step::Wait => {}
                    Step::Finish => {
                        prop_assert!(!alive);
                        break;
                    }
                }
            }
        }
    }
}
