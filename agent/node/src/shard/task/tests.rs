use std::time::Duration;

use exo_crds::{Shard, ShardPhase, runner::RunnerEvent};
use serde_json::Value;
use tokio::time::{Instant, sleep, timeout};

use super::script::{SILENCE, World};
use crate::shard::{
    Exit,
    facilities::Output,
    failure,
    tests::{delete, listen, shard},
};

#[tokio::test]
async fn a_shard_from_its_beginning_to_its_end() {
    let mut world = World::new(|_| {});
    let mut shard = world.start(shard("s"));
    world.expect(&["s is Downloaded"]).await;
    shard.meet();
    world.expect(&["spawn s", "s is Connecting"]).await;
    world.phase("s", ShardPhase::Loading);
    world.expect(&["s is Loading"]).await;
    world.phase("s", ShardPhase::Ready);
    world.say("s", Output::Event(RunnerEvent::Memory { bytes: 9 }));
    world.expect(&["s is Ready"]).await;
    assert_eq!(world.metric("exo_shard_memory_bytes"), 9.0);
    shard.edit(delete);
    world.expect(&["stop s", "stopped s", "s is Stopping", "finalizer of s: false"]).await;
    shard.gone().await;
    assert_eq!(
        *world.shared.facilities.events.lock().unwrap(),
        ["s: Downloaded", "s: Connecting", "s: Loading", "s: Ready", "s: Stopped"]
    );
    assert_eq!(world.metric("exo_shard_memory_bytes"), 0.0);
    assert_eq!(world.metric("exo_agent_runner_failures_total"), 0.0);
}

#[tokio::test]
async fn the_next_epoch_waits_for_the_old_runner() {
    let mut world = World::new(|_| {});
    let mut old = world.start(shard("old"));
    world.expect(&["old is Downloaded"]).await;
    old.meet();
    world.expect(&["spawn old", "old is Connecting"]).await;
    let mut next = shard("new");
    next.spec.epoch = 2;
    let mut new = world.start(next);
    world.expect(&["new is Downloaded"]).await;
    new.meet();
    old.edit(delete);
    world.expect(&["stop old", "stopped old"]).await;
    // The order of these three is nobody's business; that they come after is.
    let mut rest = Vec::new();
    for _ in 0..4 {
        rest.push(world.log.recv().await.unwrap());
    }
    rest.sort();
    assert_eq!(
        rest,
        ["finalizer of old: false", "new is Connecting", "old is Stopping", "spawn new"]
    );
    assert_eq!(world.metric("exo_agent_runner_restarts_total"), 1.0);
    old.gone().await;
    new.gone().await;
}

#[tokio::test]
async fn a_failure_is_told_before_the_finalizer_goes() {
    let mut world = World::new(|_| {});
    let mut shard = world.start(shard("s"));
    world.expect(&["s is Downloaded"]).await;
    shard.meet();
    world.expect(&["spawn s", "s is Connecting"]).await;
    world.say(
        "s",
        Output::Event(RunnerEvent::Failed {
            reason: "BadWeights".to_owned(),
            message: "no tensor `x`".to_owned(),
            permanent: true,
        }),
    );
    shard.edit(delete);
    let mut lines = Vec::new();
    for _ in 0..4 {
        lines.push(world.log.recv().await.unwrap());
    }
    assert_eq!(lines.last().unwrap(), "finalizer of s: false");
    assert!(lines.contains(&"s is Failed".to_owned()), "{lines:?}");
    assert!(lines.contains(&"stopped s".to_owned()), "{lines:?}");
    assert_eq!(world.metric("exo_agent_runner_failures_total"), 1.0);
    shard.gone().await;
}

#[tokio::test]
async fn a_silent_runner_is_stopped_before_it_is_ready_but_not_after() {
    let mut world = World::new(|_| {});
    let mut shard = world.start(shard("s"));
    world.expect(&["s is Downloaded"]).await;
    shard.meet();
    world.expect(&["spawn s", "s is Connecting"]).await;
    world.phase("s", ShardPhase::Ready);
    world.expect(&["s is Ready"]).await;
    let quiet = timeout(SILENCE * 4, world.log.recv()).await;
    assert!(quiet.is_err(), "{quiet:?}");
    let begin = Instant::now();
    world.phase("s", ShardPhase::Warming);
    world.expect(&["s is Warming", "stop s"]).await;
    assert!(begin.elapsed() >= SILENCE);
    shard.gone().await;
}

#[tokio::test]
async fn missing_weights_fail_the_shard() {
    let missing = failure("WeightsNotFound", "no folder", false);
    let mut world = World::new(|script| script.weights = Err(missing));
    let shard = world.start(shard("s"));
    world.expect(&["s is Failed"]).await;
    shard.gone().await;
}

#[tokio::test]
async fn an_api_that_is_away_is_waited_for() {
    let mut world = World::new(|script| *script.failing_calls.lock().unwrap() = 3);
    let mut bare = shard("s");
    bare.metadata.finalizers = None;
    let mut shard = world.start(bare);
    world.expect(&["finalizer of s: true", "s is Downloaded"]).await;
    shard.meet();
    world.expect(&["spawn s", "s is Connecting"]).await;
    // A runner's events are heard while no status can be written.
    *world.shared.facilities.failing_calls.lock().unwrap() = 3;
    for _ in 0..1000 {
        world.phase("s", ShardPhase::Loading);
    }
    world.phase("s", ShardPhase::Ready);
    world.expect(&["s is Ready"]).await;
    shard.gone().await;
}

#[tokio::test]
async fn a_status_that_others_changed_is_put_right_once() {
    let mut world = World::new(|_| {});
    let mut shard = world.start(shard("s"));
    world.expect(&["s is Downloaded"]).await;
    let written = |shard: &mut Shard| {
        let (phase, listen) = (Some(ShardPhase::Downloaded), Some(listen()));
        shard.status = Some(exo_crds::ShardStatus { phase, listen, ..Default::default() });
    };
    // The echo of the own write, and then somebody takes the address away.
    shard.edit(written);
    shard.edit(|shard| shard.status = None);
    world.expect(&["s is Downloaded"]).await;
    shard.edit(written);
    let quiet = timeout(Duration::from_secs(2), world.log.recv()).await;
    assert!(quiet.is_err(), "{quiet:?}");
    shard.gone().await;
}

#[tokio::test]
async fn what_a_failed_write_may_have_left_is_taken_away() {
    let mut world = World::new(|_| {});
    let mut shard = world.start(shard("s"));
    world.expect(&["s is Downloaded"]).await;
    shard.meet();
    world.expect(&["spawn s", "s is Connecting"]).await;
    *world.shared.facilities.failing_calls.lock().unwrap() = 2;
    world.say("s", Output::Event(RunnerEvent::Memory { bytes: 9 }));
    world.phase("s", ShardPhase::Loading);
    let sent = |name: &str| {
        let patches = world.shared.facilities.patches.lock().unwrap();
        patches.iter().any(|patch| !patch[name].is_null())
    };
    while !sent("memoryBytes") {
        sleep(Duration::from_millis(5)).await;
    }
    world.say("s", Output::Exited(Exit { signal: Some(9), ..Exit::default() }));
    world.expect(&["s is Failed"]).await;
    let last = world.shared.facilities.patches.lock().unwrap().last().cloned().unwrap();
    assert_eq!(last.get("memoryBytes"), Some(&Value::Null), "{last}");
    shard.gone().await;
}

#[tokio::test]
async fn the_end_of_the_agent_is_the_end_of_its_runners() {
    let mut world = World::new(|_| {});
    let mut shard = world.start(shard("s"));
    world.expect(&["s is Downloaded"]).await;
    shard.meet();
    world.expect(&["spawn s", "s is Connecting"]).await;
    world.shared.ending.cancel();
    world.expect(&["stop s", "stopped s"]).await;
    shard.task.await.unwrap();
    // Finalizers stay: the control plane decides about shards of a node that has gone.
    assert!(world.log.try_recv().is_err());
}
