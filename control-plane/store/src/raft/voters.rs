//! Which members vote: an odd number of those that are there, five at most.
//!
//! An even number bears the loss of no more voters than the odd one below it, and needs one more to
//! agree: two voters stop when either is lost, one voter and a learner only when the voter is.
//! So learners become voters in pairs. Nobody loses its vote here: a voter that is away may come
//! back, and one that does not is taken out by people.

use std::{collections::BTreeSet, time::Duration};

use tokio::time::{Instant, sleep, timeout_at};

use super::{
    call::Target,
    members::{Change, Member},
    node::Node,
};

/// More voters make each write wait for more disks, and bear more losses than a rack of Macs has.
const MAX_VOTERS: usize = 5;
/// A learner that is so many entries behind still has to catch up.
const BEHIND: u64 = 1_000;
/// Between two looks while there are learners. Each asks every learner once.
const PERIOD: Duration = Duration::from_millis(500);
/// A learner that takes longer is not there.
const ANSWER_LIMIT: Duration = Duration::from_secs(1);

/// The learners that become voters now. `ready`: those that are there and have caught up.
fn to_promote(members: &[Member], ready: &BTreeSet<u64>) -> BTreeSet<u64> {
    let voters = members.iter().filter(|m| m.is_voter).count();
    let learners: Vec<u64> =
        members.iter().filter(|m| !m.is_voter && ready.contains(&m.id)).map(|m| m.id).collect();
    let all = (voters + learners.len()).min(MAX_VOTERS);
    let wanted = if all % 2 == 1 { all } else { all - 1 };
    learners.into_iter().take(wanted.saturating_sub(voters)).collect()
}

/// While this node leads, makes voters of learners; returns when Raft has stopped.
pub(super) async fn keep(node: &Node) {
    let mut metrics = node.metrics();
    loop {
        let leads_learners = metrics.wait_for(|m| {
            let membership = m.membership_config.membership();
            m.current_leader == Some(node.id) && membership.learner_ids().next().is_some()
        });
        if leads_learners.await.is_err() {
            return;
        }
        let members = node.members();
        let ids = to_promote(&members, &ready(node, &members).await);
        if !ids.is_empty() {
            tracing::info!(?ids, "learners become voters");
            if let Err(refusal) = node.change_here(&Change::Promote { ids }).await {
                tracing::debug!(?refusal, "learners are not voters yet");
            }
        }
        sleep(PERIOD).await;
    }
}

/// The learners that answer and have nearly everything.
async fn ready(node: &Node, members: &[Member]) -> BTreeSet<u64> {
    let deadline = Instant::now() + ANSWER_LIMIT;
    let newest = node.metrics().borrow().last_log_index.unwrap_or(0);
    let mut asked = tokio::task::JoinSet::new();
    for member in members.iter().filter(|m| !m.is_voter) {
        let (caller, target) =
            (node.caller.clone(), Target { id: member.id, address: member.address.clone() });
        asked.spawn(async move {
            let answer = caller.post::<u64>(&target, "applied", Vec::new(), ANSWER_LIMIT).await;
            answer.ok().map(|applied| (target.id, applied))
        });
    }
    let mut ready = BTreeSet::new();
    while let Ok(Some(answer)) = timeout_at(deadline, asked.join_next()).await {
        if let Ok(Some((id, applied))) = answer
            && applied + BEHIND >= newest
        {
            ready.insert(id);
        }
    }
    ready
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn voters_grow_in_pairs_up_to_five() {
        let check = |voters: u64, learners: u64, absent: &[u64], promoted: &[u64]| {
            let member = |id| Member {
                id,
                name: format!("n{id}"),
                address: String::new(),
                is_voter: id <= voters,
            };
            let members: Vec<_> = (1..=voters + learners).map(member).collect();
            let ready = (1..=voters + learners).filter(|id| !absent.contains(id)).collect();
            let found: Vec<_> = to_promote(&members, &ready).into_iter().collect();
            assert_eq!(found, promoted, "{voters} voters, {learners} learners");
        };
        check(1, 0, &[], &[]);
        check(1, 1, &[], &[]);
        check(1, 2, &[], &[2, 3]);
        check(1, 2, &[3], &[]);
        check(1, 3, &[2], &[3, 4]);
        check(1, 6, &[], &[2, 3, 4, 5]);
        check(3, 1, &[], &[]);
        check(3, 2, &[], &[4, 5]);
        check(5, 4, &[], &[]);
        // After a loss the next learner takes the place.
        check(2, 1, &[], &[3]);
        check(2, 0, &[], &[]);
        check(4, 1, &[], &[5]);
        check(4, 0, &[], &[]);
        check(6, 1, &[], &[]);
    }
}
