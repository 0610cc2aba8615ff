//! Which members vote: an odd number of those that are there, five at most.
//!
//! An even number bears the loss of no more voters than the odd one below it, and needs one more to
//! agree: two voters stop when either is lost, one voter and a learner only when the voter is.
//! So learners become voters in pairs, and when people take out a voter, of the even number that is
//! left one becomes a learner. A voter that is away keeps its vote: it may come back.

use std::{collections::BTreeSet, time::Duration};

use tokio::time::{Instant, sleep, timeout_at};

use super::{
    call::Target,
    members::{Change, Member, is_between_steps},
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

/// The voter that becomes a learner now: of an even number the one that has least of the log, never
/// the leader. `matched` says how far each has it.
fn to_demote(members: &[Member], own: u64, matched: impl Fn(u64) -> Option<u64>) -> Option<u64> {
    let voters = || members.iter().filter(|m| m.is_voter).map(|m| m.id);
    if voters().count() % 2 == 1 {
        return None;
    }
    voters().filter(|id| *id != own).min_by_key(|id| (matched(*id), std::cmp::Reverse(*id)))
}

/// While this node leads, keeps the number of voters odd; returns when Raft has stopped.
pub(super) async fn keep(node: &Node) {
    let mut metrics = node.metrics();
    loop {
        let leads_others = metrics.wait_for(|m| {
            let membership = m.membership_config.membership();
            let is_even = membership.voter_ids().count() % 2 == 0;
            let has_learners = membership.learner_ids().next().is_some();
            let wants_look = has_learners || is_even || is_between_steps(m);
            m.current_leader == Some(node.id) && wants_look
        });
        if leads_others.await.is_err() {
            return;
        }
        if is_between_steps(&node.metrics().borrow()) {
            complete(node).await;
            sleep(PERIOD).await;
            continue;
        }
        let members = node.members();
        let ids = to_promote(&members, &ready(node, &members).await);
        if !ids.is_empty() {
            tracing::info!(?ids, "learners become voters");
            if let Err(refusal) = node.change_here(&Change::Promote { ids }).await {
                tracing::debug!(?refusal, "learners are not voters yet");
            }
        } else if let Some(id) = to_demote(&members, node.id, |id| matched(node, id)) {
            tracing::info!(
                id,
                "an even number of voters bears no more losses: one becomes a learner"
            );
            let voters = members.iter().filter(|m| m.is_voter && m.id != id);
            let change = Change::Voters { ids: voters.map(|m| m.id).collect() };
            if let Err(refusal) = node.change_here(&change).await {
                tracing::debug!(?refusal, "the number of voters is even still");
            }
        }
        sleep(PERIOD).await;
    }
}

/// Takes the second step of a change whose first one was another leader's: until then majorities of
/// both sets are needed. While this node makes a change it is refused here, and completes itself.
async fn complete(node: &Node) {
    match node.changes.complete().await {
        Ok(true) => tracing::info!("completed the change of voters that another leader began"),
        Ok(false) => {}
        Err(refusal) => tracing::debug!(?refusal, "the membership still changes"),
    }
}

/// The newest entry that a member is known to have, as far as this leader knows.
fn matched(node: &Node, id: u64) -> Option<u64> {
    let metrics = node.metrics();
    let metrics = metrics.borrow();
    metrics.replication.as_ref()?.get(&id).copied().flatten().map(|log_id| log_id.index)
}

/// The learners that answer and have nearly everything.
pub(super) async fn ready(node: &Node, members: &[Member]) -> BTreeSet<u64> {
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
    fn an_even_number_of_voters_loses_one() {
        let check = |voters: u64, learners: u64, own: u64, demoted: Option<u64>| {
            let member = |id| Member {
                id,
                name: String::new(),
                address: String::new(),
                is_voter: id <= voters,
            };
            let members: Vec<_> = (1..=voters + learners).map(member).collect();
            let found = to_demote(&members, own, |id| (id != 3).then_some(100));
            assert_eq!(found, demoted, "{voters} voters, {learners} learners, {own} leads");
        };
        check(1, 3, 1, None);
        check(3, 0, 1, None);
        check(2, 0, 1, Some(2));
        check(2, 1, 2, Some(1));
        // Least of the log first, then the newest.
        check(4, 0, 1, Some(3));
        check(4, 0, 3, Some(4));
    }

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
