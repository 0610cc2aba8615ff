//! Nodes that come and go, and changes of voters that are cut short.

use std::{collections::BTreeSet, time::Duration};

use exo_store::{Store, StoreError};
use tokio::time::timeout;

use crate::{
    create, gauges, get,
    support::{Cluster, LIMIT, in_the_end},
};

#[tokio::test(flavor = "multi_thread")]
async fn nodes_join_and_leave() {
    let mut cluster = Cluster::start(3).await;
    create(&cluster.store(1), "/a", "1").await;
    cluster.join(4).await;
    let learner = cluster.store(4);
    let is_voter =
        |store: &Store, id: u64| store.members().iter().find(|m| m.id == id).map(|m| m.is_voter);
    cluster.until("it knows itself", || is_voter(&learner, 4) == Some(false)).await;
    // A learner serves like the others.
    create(&learner, "/b", "1").await;
    assert!(get(&learner, "/a").await.is_some());

    // Nobody else gets its name.
    let namesake = learner.add_learner(5, "n4", "127.0.0.1:1").await;
    assert!(matches!(namesake, Err(StoreError::Invalid(_))), "{namesake:?}");

    // It takes the leader's place: the order is given on the learner itself.
    let leader = cluster.leader().await;
    let voters: BTreeSet<u64> = (1..=4).filter(|id| *id != leader).collect();
    learner.change_membership(voters).await.unwrap();
    let others: Vec<u64> = (1..=4).filter(|id| *id != leader).collect();
    cluster.leader_among(&others).await;
    learner.remove_node(leader).await.unwrap();
    cluster.until("it is gone", || is_voter(&learner, leader).is_none()).await;
    cluster.until("it votes", || is_voter(&learner, 4) == Some(true)).await;
    cluster.stop(leader).await;
    // Still three voters: one of them may be lost.
    let another = others.iter().copied().find(|id| *id != 4).unwrap();
    cluster.stop(another).await;
    create(&learner, "/c", "1").await;
    assert!(get(&learner, "/b").await.is_some());

    let unknown = learner.change_membership(BTreeSet::from([4, 99])).await;
    assert!(matches!(unknown, Err(StoreError::Invalid(_))), "{unknown:?}");
    cluster.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_only_voter_may_leave_when_another_member_is_there() {
    let mut cluster = Cluster::start(1).await;
    cluster.join(2).await;
    create(&cluster.store(1), "/a", "1").await;
    // Nobody takes the vote of a member that is not there.
    cluster.stop(2).await;
    let leaves = cluster.store(1);
    let refused = timeout(Duration::from_secs(3), leaves.remove_node(1)).await;
    assert!(refused.is_err(), "{refused:?}");
    create(&leaves, "/b", "1").await;
    assert!(leaves.members().iter().any(|member| member.id == 1 && member.is_voter));

    cluster.restart(2).await;
    let stays = cluster.store(2);
    in_the_end(|| stays.remove_node(1)).await;
    let is_alone = || matches!(&*stays.members(), [member] if member.id == 2 && member.is_voter);
    cluster.until("the other one is alone", is_alone).await;
    cluster.stop(1).await;
    create(&stays, "/c", "1").await;
    assert!(get(&stays, "/a").await.is_some() && get(&stays, "/b").await.is_some());
    cluster.shutdown().await;
}

/// What is left after the loss of a leader between the two steps of a change: until the second one
/// is taken, majorities of the old voters and of the new ones are needed.
#[tokio::test(flavor = "multi_thread")]
async fn a_change_of_voters_that_was_begun_is_completed() {
    let mut cluster = Cluster::start(1).await;
    cluster.join(2).await;
    cluster.join(3).await;
    // The first step is in the log of the only voter, and needs the learners to go on.
    cluster.partition(&[1]);
    let promoting = tokio::spawn({
        let first = cluster.store(1);
        async move { first.change_membership(BTreeSet::from([1, 2, 3])).await }
    });
    let voters = |id: u64| cluster.store(id).members().iter().filter(|m| m.is_voter).count();
    cluster.until("the first step is taken", || voters(1) == 3).await;
    promoting.abort();
    cluster.stop(1).await;
    cluster.restart(1).await;
    cluster.heal();
    cluster.leader().await;
    let keeping: Vec<_> = (1..=3)
        .map(|id| {
            let store = cluster.store(id);
            tokio::spawn(async move { store.keep_voters().await })
        })
        .collect();
    let registries: Vec<_> = (1..=3)
        .map(|id| {
            let registry = prometheus::Registry::new();
            cluster.store(id).register_metrics(&registry).unwrap();
            registry
        })
        .collect();
    let is_complete = |registry| gauges(registry, "exo_raft_voters_changing") == [0];
    cluster.until("the second step is taken", || registries.iter().all(is_complete)).await;
    // With a single set of voters the first one may be lost.
    cluster.stop(1).await;
    cluster.leader_among(&[2, 3]).await;
    create(&cluster.store(2), "/a", "v").await;
    keeping.into_iter().for_each(|task| task.abort());
    cluster.shutdown().await;
}

/// The order outlives the office of the leader that began it, and leaves nothing behind there.
#[tokio::test(flavor = "multi_thread")]
async fn a_change_that_a_deposed_leader_began_does_not_stop_others() {
    let cluster = Cluster::start(3).await;
    let old = cluster.leader().await;
    let others: Vec<u64> = (1..=3).filter(|id| *id != old).collect();
    let registry = prometheus::Registry::new();
    cluster.store(old).register_metrics(&registry).unwrap();
    cluster.partition(&[old]);
    let removed = others[0];
    let removing = tokio::spawn({
        let store = cluster.store(old);
        async move { store.remove_node(removed).await }
    });
    let begun = || gauges(&registry, "exo_raft_voters_changing") == [1];
    cluster.until("the first step is in its log", begun).await;
    let new = cluster.leader_among(&others).await;
    for i in 0..20 {
        create(&cluster.store(new), &format!("/{i}"), "v").await;
    }
    cluster.heal();
    // The next leader is told too, and it is made.
    timeout(LIMIT, removing).await.expect("it is answered").unwrap().unwrap();
    // The third one may hear of it a little later than the leader that made it.
    let third = cluster.store(others[1]);
    let is_gone = || third.members().iter().all(|member| member.id != removed);
    cluster.until("it is gone", is_gone).await;

    // When it leads again it makes changes as before.
    let old_store = cluster.store(old);
    old_store.change_membership(BTreeSet::from([old])).await.unwrap();
    cluster.until("it leads again", || old_store.is_leader()).await;
    let both = BTreeSet::from([old, others[1]]);
    timeout(LIMIT, old_store.change_membership(both)).await.expect("it is its turn").unwrap();
    let voters = || old_store.members().iter().filter(|m| m.is_voter).count();
    cluster.until("two vote", || voters() == 2).await;
    cluster.shutdown().await;
}

/// The leader that takes a voter out is lost between the two steps, and the one that was to go is
/// still there: it may vote again. Who wants it gone orders it again, as long as it is a member.
#[tokio::test(flavor = "multi_thread")]
async fn a_removal_whose_leader_is_lost_is_made_when_it_is_ordered_again() {
    let mut cluster = Cluster::start(5).await;
    let first = cluster.leader().await;
    let others: Vec<u64> = (1..=5).filter(|id| *id != first).collect();
    let (stays, goes) = (others[0], others[1]);
    let registry = prometheus::Registry::new();
    cluster.store(stays).register_metrics(&registry).unwrap();
    // A majority of the old voters has the first step, but none of the new ones.
    cluster.partition(&[first, stays, goes]);
    let removing = tokio::spawn({
        let store = cluster.store(first);
        async move { store.remove_node(goes).await }
    });
    let is_between = || gauges(&registry, "exo_raft_voters_changing") == [1];
    cluster.until("the first step arrives", is_between).await;
    cluster.stop(first).await;
    removing.abort();
    cluster.heal();
    let keeping: Vec<_> = others
        .iter()
        .map(|id| {
            let store = cluster.store(*id);
            tokio::spawn(async move { store.keep_voters().await })
        })
        .collect();
    cluster.until("the second step is taken", || !is_between()).await;

    let store = cluster.store(stays);
    timeout(LIMIT, store.remove_node(goes)).await.expect("in time").unwrap();
    let is_gone = || store.members().iter().all(|member| member.id != goes);
    cluster.until("it is gone", is_gone).await;
    // The voter that was lost makes way too, so that three are left, and all of them are there.
    let voters = || -> BTreeSet<u64> {
        store.members().iter().filter(|m| m.is_voter).map(|m| m.id).collect()
    };
    let left: BTreeSet<u64> = others.iter().copied().filter(|id| *id != goes).collect();
    cluster.until("three voters", || voters() == left).await;
    cluster.stop(goes).await;
    create(&store, "/a", "v").await;
    assert!(is_gone());
    keeping.into_iter().for_each(|task| task.abort());
    cluster.shutdown().await;
}
