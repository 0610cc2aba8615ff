//! Epochs that fail, and when the next one is tried.

use super::*;

#[test]
fn a_failed_rank_ends_the_epoch_and_the_next_try_waits() {
    let mut world = World::new(&["a", "b"], 2);
    world.until_ready();
    world.fail("chat-0-a1-1", "RunnerExited", "killed by signal 9", false);
    world.settle();
    // The peer goes at once, the failed shard stays to be looked at.
    assert_eq!(world.names(), ["-chat-0-a1-0", "chat-0-a1-1"]);
    assert_eq!(world.status().phase, Some(InstancePhase::Failed));
    assert_eq!(world.status().replicas[0].endpoint, None);
    assert_eq!(
        world.message("Ready"),
        "False ShardFailed: shard chat-0-a1-1 on b: RunnerExited: killed by signal 9; \
         1 failure(s) in a row, next try after 1970-01-01T00:16:41Z"
    );
    assert_eq!(world.decide().requeue_after, Some(Duration::from_secs(1)));
    world.pass_time(1);
    world.settle();
    assert_eq!(world.names(), ["-chat-0-a1-0", "-chat-0-a1-1"]);
    world.agents();
    world.settle();
    assert_eq!(world.names(), ["chat-0-a2-0", "chat-0-a2-1"]);
    world.until_ready();
    assert_eq!(world.status().replicas[0].failures, 1);
    assert_eq!(world.decide().requeue_after, Some(Duration::from_secs(60)));
    world.pass_time(60);
    world.settle();
    assert_eq!(world.status().replicas[0].failures, 0);
}

#[test]
fn what_several_ranks_lack_is_told_of_the_first_that_said_so() {
    let mut world = World::new(&["a", "b"], 2);
    world.settle();
    world.fail("chat-0-a1-1", REASON_WEIGHTS_NOT_FOUND, "no folder `x: BadModel: y`", false);
    world.settle();
    let told = "False WeightsNotFound: shard chat-0-a1-1 on b: WeightsNotFound: \
                no folder `x: BadModel: y`; ";
    assert!(world.message("Ready").starts_with(told), "{}", world.message("Ready"));
    let first = world.status().clone();
    world.fail("chat-0-a1-0", REASON_WEIGHTS_NOT_FOUND, "no folder `x: BadModel: y`", false);
    world.settle();
    assert_eq!(*world.status(), first);
    // What ends it for good is news, also where the known message has its name in it.
    world.fail("chat-0-a1-0", "BadModel", "no config.json", true);
    world.settle();
    let told = "False ShardFailed: shard chat-0-a1-0 on a: BadModel: no config.json; ";
    assert!(world.message("Ready").starts_with(told), "{}", world.message("Ready"));
}

#[test]
fn waits_double_up_to_a_minute() {
    let mut world = World::new(&["a"], 1);
    let mut waits = Vec::new();
    for epoch in 1..=8 {
        world.settle();
        world.fail(&format!("chat-0-a{epoch}-0"), "PeerLost", "x", false);
        world.settle();
        let wait = world.decide().requeue_after.unwrap().as_secs();
        waits.push(wait);
        world.pass_time(wait as i64);
        world.settle();
        world.agents();
    }
    assert_eq!(waits, [1, 2, 4, 8, 16, 32, 60, 60]);
}

/// Ends a ready epoch with what `end` makes of it, and waits; the wait and what was counted.
fn end_ready_epoch(world: &mut World, end: impl Fn(&mut World, u64)) -> (u64, u32) {
    world.until_ready();
    let epoch = world.status().replicas[0].epoch;
    end(world, epoch);
    world.settle();
    let wait = world.decide().requeue_after.unwrap().as_secs();
    let failures = world.status().replicas[0].failures;
    world.pass_time(wait as i64);
    world.settle();
    world.agents();
    (wait, failures)
}

const RESTARTED: &str = "the agent was restarted and its runner ended with it";

#[test]
fn agents_and_nodes_that_go_away_are_no_failures_of_what_was_ready() {
    fn check(wait: u64, end: impl Fn(&mut World, u64)) {
        let mut world = World::new(&["a", "b"], 2);
        for _ in 0..8 {
            assert_eq!(end_ready_epoch(&mut world, &end), (wait, 0));
        }
        world.until_ready();
        assert_eq!(world.status().replicas[0].epoch, 9);
    }
    // All are restarted; one is, once its peer has noticed; one stops politely first.
    check(1, |world, epoch| {
        for rank in 0..2 {
            world.fail(&format!("chat-0-a{epoch}-{rank}"), "RunnerLost", RESTARTED, false);
        }
    });
    check(2, |world, epoch| {
        world.fail(&format!("chat-0-a{epoch}-0"), "PeerLost", "rank 1 went away", false);
        world.settle();
        world.fail(&format!("chat-0-a{epoch}-1"), "RunnerLost", RESTARTED, false);
    });
    check(1, |world, epoch| {
        world.set(&format!("chat-0-a{epoch}-1"), ShardPhase::Stopping);
        world.settle();
        world.fail(&format!("chat-0-a{epoch}-1"), "RunnerLost", RESTARTED, false);
    });
    // One is off for longer than its peer's words are waited for.
    check(2, |world, epoch| {
        world.fail(&format!("chat-0-a{epoch}-0"), "PeerLost", "rank 1 went away", false);
    });
}

#[test]
fn a_restart_after_failures_leaves_their_count_and_waits_as_after_the_first() {
    let mut world = World::new(&["a", "b"], 2);
    let fail = |reason: &'static str| {
        move |world: &mut World, epoch: u64| {
            world.fail(&format!("chat-0-a{epoch}-1"), reason, "x", false);
        }
    };
    for failures in 1..=4 {
        let wait = 1 << (failures - 1);
        assert_eq!(end_ready_epoch(&mut world, fail("RunnerExited")), (wait, failures));
    }
    assert_eq!(end_ready_epoch(&mut world, fail("RunnerLost")), (1, 4));
    assert_eq!(end_ready_epoch(&mut world, fail("RunnerExited")), (16, 5));
}

#[test]
fn what_a_restart_is_told_like() {
    let mut world = World::new(&["a", "b"], 2);
    world.until_ready();
    world.fail("chat-0-a1-1", "RunnerLost", RESTARTED, false);
    let decision = world.decide();
    let told: Vec<&str> = decision.events.iter().map(|told| told.reason.as_str()).collect();
    assert_eq!(told, ["EpochFailed"]);
    world.settle();
    let ended = format!("shard chat-0-a1-1 on b: RunnerLost: {RESTARTED}");
    assert_eq!(
        world.message("Ready"),
        format!("False ShardFailed: {ended}; next try after 1970-01-01T00:16:41Z")
    );
    world.pass_time(1);
    world.settle();
    world.agents();
    world.settle();
    assert_eq!(
        world.message("Ready"),
        format!(
            "False Starting: rank 0 Pending on a, rank 1 Pending on b; the last epoch ended: {ended}"
        )
    );
}

/// Else a node that comes and goes would have models loaded all the time.
#[test]
fn an_epoch_that_ends_before_it_is_ready_counts_whatever_ended_it() {
    for (reason, waits) in [("RunnerLost", [1, 2, 4, 8]), ("PeerLost", [2, 2, 4, 8])] {
        let mut world = World::new(&["a", "b"], 2);
        for (epoch, wait) in (1..).zip(waits) {
            world.settle();
            world.agents();
            world.settle();
            world.fail(&format!("chat-0-a{epoch}-1"), reason, "x", false);
            world.settle();
            assert_eq!(world.decide().requeue_after, Some(Duration::from_secs(wait)), "{reason}");
            world.pass_time(wait as i64);
            world.settle();
            world.agents();
        }
    }
}

#[test]
fn a_cause_that_comes_to_light_after_its_peers_words_counts() {
    fn check(reason: &str, message: &str, permanent: bool, wait: u64) {
        let mut world = World::new(&["a", "b"], 2);
        world.until_ready();
        world.fail("chat-0-a1-0", "PeerLost", "rank 1 went away", false);
        world.settle();
        assert_eq!(world.status().replicas[0].failures, 0);
        world.fail("chat-0-a1-1", reason, message, permanent);
        world.settle();
        assert_eq!(world.status().replicas[0].failures, 1, "{reason}");
        assert_eq!(world.decide().requeue_after, Some(Duration::from_secs(wait)), "{reason}");
        // Once.
        world.settle();
        assert_eq!(world.status().replicas[0].failures, 1, "{reason}");
    }
    check("RunnerExited", "killed by signal 9", false, 1);
    check("BadWeights", "tensor `x` is missing", true, 300);
    // Nobody knows of another: it lies between the two.
    check("PeerLost", "rank 0 went away", false, 1);
}

#[test]
fn an_agent_that_is_restarted_later_is_not_what_ended_the_epoch() {
    let mut world = World::new(&["a", "b", "c"], 3);
    world.until_ready();
    world.fail("chat-0-a1-0", "RunnerLost", RESTARTED, false);
    world.fail("chat-0-a1-1", "OutOfMemory", "no room", false);
    world.fail("chat-0-a1-2", "PeerLost", "rank 1 went away", false);
    world.settle();
    assert_eq!(world.status().replicas[0].failures, 1);
    assert!(world.message("Ready").contains("OutOfMemory"), "{}", world.message("Ready"));
}

#[test]
fn deleting_a_failed_shard_asks_for_the_next_try_at_once() {
    fn check(delete: &[&str], seen: bool) {
        let mut world = World::new(&["a", "b"], 2);
        world.settle();
        world.fail("chat-0-a1-0", "PeerLost", "rank 1 went away", false);
        world.settle();
        world.fail("chat-0-a1-1", "BadWeights", "tensor `x` is missing", true);
        world.settle();
        assert_eq!(world.decide().requeue_after, Some(Duration::from_secs(300)));
        for name in delete {
            let now = whole_seconds(world.now);
            world.shard(name).metadata.deletion_timestamp = Some(now);
        }
        // Agents may be faster than the controller.
        if seen {
            world.settle();
            assert_eq!(
                world.message("Ready"),
                "False Stopping: a shard of the epoch was deleted; waiting for chat-0-a1-0, \
                 chat-0-a1-1 to stop"
            );
        }
        world.agents();
        world.settle();
        world.agents();
        world.settle();
        assert_eq!(world.names(), ["chat-0-a2-0", "chat-0-a2-1"], "{delete:?}");
        assert_eq!(world.status().replicas[0].failures, 0);
        world.until_ready();
        assert_eq!(world.status().replicas[0].epoch, 2);
    }
    for seen in [true, false] {
        check(&["chat-0-a1-1"], seen);
        check(&["chat-0-a1-0"], seen);
        check(&["chat-0-a1-0", "chat-0-a1-1"], seen);
    }
}

/// It is stopped because its peer failed, and what it says meanwhile is no wish of anybody.
#[test]
fn a_peer_that_fails_while_it_is_stopped_shortens_no_wait() {
    let mut world = World::new(&["a", "b"], 2);
    for (epoch, wait) in (1..).zip([1, 2, 4, 8]) {
        world.settle();
        world.agents();
        world.settle();
        world.fail(&format!("chat-0-a{epoch}-1"), "RunnerExited", "x", false);
        world.settle();
        world.fail(&format!("chat-0-a{epoch}-0"), "OutOfMemory", "no room", false);
        world.settle();
        assert_eq!(world.decide().requeue_after, Some(Duration::from_secs(wait)));
        world.agents();
        world.settle();
        assert_eq!(world.names(), [format!("chat-0-a{epoch}-1")]);
        assert_eq!(world.decide().requeue_after, Some(Duration::from_secs(wait)));
        world.pass_time(wait as i64);
        world.settle();
        world.agents();
    }
}

#[test]
fn bad_weights_wait_longest_and_name_the_tensor() {
    let mut world = World::new(&["a", "b"], 2);
    world.settle();
    world.fail("chat-0-a1-0", "PeerLost", "rank 1 went away", false);
    world.settle();
    // Rank 1, which knows the cause, is left the time to say so.
    assert_eq!(world.names(), ["chat-0-a1-0", "chat-0-a1-1"]);
    world.fail("chat-0-a1-1", "BadWeights", "tensor `lm_head.weight` is missing", true);
    world.settle();
    let message = world.message("Ready");
    assert!(message.contains("on b: BadWeights: tensor `lm_head.weight` is missing"), "{message}");
    assert_eq!(world.decide().requeue_after, Some(Duration::from_secs(300)));
    // An edit is a reason to try at once.
    world.instance.metadata.generation = Some(2);
    world.settle();
    world.agents();
    world.settle();
    assert_eq!(world.names(), ["chat-0-a2-0", "chat-0-a2-1"]);
    assert_eq!(world.status().replicas[0].failures, 0);
}

#[test]
fn hearsay_alone_ends_an_epoch_after_a_moment() {
    let mut world = World::new(&["a", "b"], 2);
    world.settle();
    world.fail("chat-0-a1-0", "PeerLost", "rank 1 went away", false);
    world.settle();
    assert_eq!(world.decide().requeue_after, Some(Duration::from_secs(2)));
    world.pass_time(2);
    world.settle();
    assert_eq!(world.names(), ["-chat-0-a1-0", "-chat-0-a1-1"]);
}

#[test]
fn a_lost_node_is_left_without_waiting_for_its_agent() {
    let mut world = World::new(&["a", "b", "c"], 2);
    world.until_ready();
    lose(&mut world.nodes[1]);
    world.settle();
    assert_eq!(world.names(), ["-chat-0-a1-0"]);
    assert_eq!(
        world.message("Ready"),
        "False Stopping: a shard of the epoch was deleted; waiting for chat-0-a1-0 to stop"
    );
    world.agents();
    world.settle();
    let nodes: Vec<&str> = world.shards.iter().map(|s| s.spec.node.as_str()).collect();
    assert_eq!(nodes, ["a", "c"]);
    // The node that comes back is not used until it is needed.
    world.until_ready();
    assert_eq!(world.status().replicas[0].failures, 0);
}

#[test]
fn a_name_that_no_label_holds_is_refused_once_and_for_all() {
    let mut world = World::new(&["a"], 1);
    world.instance.metadata.name = Some("n".repeat(64));
    world.settle();
    assert_eq!(world.names(), Vec::<String>::new());
    assert_eq!(
        world.message("Placed"),
        "False NameTooLong: the name has 64 characters; its shards carry it in the label \
         exo.dev/instance, which holds at most 63"
    );
    assert!(world.message("Ready").starts_with("False NameTooLong: "));
    assert_eq!(world.status().phase, Some(InstancePhase::Pending));
    assert_eq!(world.status().replicas[0].epoch, 0, "no number is used up");
    assert_eq!(world.decide().requeue_after, None);
    // One character less is fine.
    let name = "n".repeat(63);
    world.instance.metadata.name = Some(name.clone());
    world.settle();
    assert_eq!(world.names(), [format!("{name}-0-a1-0")]);
}

#[test]
fn a_shard_that_the_server_refuses_is_a_failed_epoch() {
    let mut world = World::new(&["a", "b"], 2);
    let mut waits = Vec::new();
    for epoch in 1..=3 {
        let decision = world.decide();
        let mut status = decision.status;
        let mut creates = decision.actions.into_iter();
        let (Some(Action::Create(first)), Some(Action::Create(second))) =
            (creates.next(), creates.next())
        else {
            panic!("two shards are wanted");
        };
        assert_eq!(second.metadata.name.as_deref(), Some(format!("chat-0-a{epoch}-1").as_str()));
        create_refused(&mut status, &second, "spec.rank: no", world.now);
        world.instance.status = Some(status);
        world.apply(Action::Create(first));
        // The rank that was created goes; nothing new comes before its time.
        world.settle();
        assert_eq!(world.names(), [format!("-chat-0-a{epoch}-0")]);
        world.agents();
        world.settle();
        assert_eq!(world.names(), Vec::<String>::new());
        assert_eq!(world.status().phase, Some(InstancePhase::Failed));
        waits.push(world.decide().requeue_after.unwrap().as_secs());
        world.pass_time(*waits.last().unwrap() as i64);
    }
    assert_eq!(waits, [1, 2, 4]);
    world.pass_time(-1);
    assert_eq!(
        world.message("Ready"),
        "False ShardFailed: the API server refused the shard chat-0-a3-1: spec.rank: no; \
         3 failure(s) in a row, next try after 1970-01-01T00:16:47Z"
    );
    world.pass_time(1);
    world.until_ready();
    assert_eq!(world.names(), ["chat-0-a4-0", "chat-0-a4-1"]);
}

#[test]
fn a_status_of_a_shard_without_failure_text_is_still_a_failure() {
    let mut world = World::new(&["a"], 1);
    world.settle();
    world.shard("chat-0-a1-0").status =
        Some(ShardStatus { phase: Some(ShardPhase::Failed), ..ShardStatus::default() });
    world.settle();
    assert!(world.message("Ready").contains("failed without a message"));
}
