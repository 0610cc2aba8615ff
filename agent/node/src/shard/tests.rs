//! What a shard does next, in stories and in whatever order things happen.

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
