//! Which voters answer: what people are told when the store can't do what they ask.
//!
//! Never: a reason to do or not to do anything. Who leads is settled by votes alone.

use std::{collections::BTreeSet, time::Duration};

use tokio::{
    task::JoinSet,
    time::{Instant, timeout_at},
};

use super::{
    call::{NO_CALL, Target},
    node::Node,
};

/// A node that answers at all does so within this time.
const ANSWER_LIMIT: Duration = Duration::from_millis(500);

/// How all of those begin that say so.
const NO_MAJORITY: &str = "no majority of voters";

/// One member as the roll needs it.
struct Voter {
    target: Target,
    name: String,
}

impl Node {
    /// Why nothing could be done: that too few voters answer and which ones do not, and what was
    /// `found` here. Asks all of them at once, until a majority has answered; nobody where Raft has
    /// stopped on this node, for that is reason enough.
    pub(super) async fn explain(&self, found: String) -> String {
        if self.metrics().borrow().running_state.is_err() {
            return found;
        }
        let (configs, voters) = self.roll();
        let mut asked = JoinSet::new();
        for voter in voters.iter().filter(|voter| voter.target.id != self.id) {
            let (caller, target) = (self.caller.clone(), voter.target.clone());
            asked.spawn(async move {
                let answer = caller.post::<u64>(&target, "applied", Vec::new(), ANSWER_LIMIT).await;
                answer.is_ok().then_some(target.id)
            });
        }
        let mut answered = BTreeSet::from([self.id]);
        let until = Instant::now() + ANSWER_LIMIT;
        while lacking(&configs, &answered).is_some()
            && let Ok(Some(answer)) = timeout_at(until, asked.join_next()).await
        {
            answered.extend(answer.ok().flatten());
        }
        let name = |id: u64| {
            let voter = voters.iter().find(|voter| voter.target.id == id);
            voter.map_or_else(
                || id.to_string(),
                |voter| match voter.name.as_str() {
                    "" => voter.target.address.clone(),
                    name => format!("{name} at {}", voter.target.address),
                },
            )
        };
        match lacking(&configs, &answered) {
            Some(voters) => with_found(no_majority(voters, &answered, name), &found),
            None => found,
        }
    }

    /// The sets of voters of which each needs a majority, and all of their voters.
    fn roll(&self) -> (Vec<BTreeSet<u64>>, Vec<Voter>) {
        let metrics = self.metrics();
        let metrics = metrics.borrow();
        let membership = metrics.membership_config.membership();
        let voter = |id: u64| {
            let node = membership.get_node(&id)?;
            let target = Target { id, address: node.addr.clone() };
            Some(Voter { target, name: node.name.clone() })
        };
        (membership.get_joint_config().clone(), membership.voter_ids().filter_map(voter).collect())
    }
}

/// The first set of voters of which no majority has answered.
fn lacking<'c>(
    configs: &'c [BTreeSet<u64>],
    answered: &BTreeSet<u64>,
) -> Option<&'c BTreeSet<u64>> {
    configs.iter().find(|voters| voters.intersection(answered).count() * 2 <= voters.len())
}

/// What was found is told too, unless it says no more than that: so does a call that failed.
fn with_found(no_majority: String, found: &str) -> String {
    match [NO_MAJORITY, NO_CALL].iter().any(|known| found.starts_with(known)) {
        true => no_majority,
        false => format!("{no_majority} ({found})"),
    }
}

fn no_majority(
    voters: &BTreeSet<u64>,
    answered: &BTreeSet<u64>,
    name: impl Fn(u64) -> String,
) -> String {
    let count = voters.intersection(answered).count();
    let silent: Vec<String> = voters.difference(answered).map(|id| name(*id)).collect();
    format!(
        "{NO_MAJORITY}: {count} of {} {} (none from {}); start those nodes, or mend the \
         network between them",
        voters.len(),
        if count == 1 { "answers" } else { "answer" },
        silent.join(", ")
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_does_not_answer_is_named() {
        let check = |configs: &[&[u64]], answered: &[u64], expect: Option<&str>| {
            let configs: Vec<BTreeSet<u64>> =
                configs.iter().map(|voters| voters.iter().copied().collect()).collect();
            let answered = answered.iter().copied().collect();
            let text = lacking(&configs, &answered)
                .map(|voters| no_majority(voters, &answered, |id| format!("mac-{id}")));
            let start = text.as_deref().and_then(|text| text.split(';').next());
            assert_eq!(start, expect);
        };
        let alone = "no majority of voters: 1 of 3 answers (none from mac-2, mac-3)";
        check(&[&[1, 2, 3]], &[1], Some(alone));
        check(&[&[1, 2, 3]], &[1, 3], None);
        check(&[&[1]], &[1], None);
        let learner = "no majority of voters: 0 of 1 answer (none from mac-1)";
        check(&[&[1]], &[4], Some(learner));
        let half = "no majority of voters: 2 of 4 answer (none from mac-3, mac-4)";
        check(&[&[1, 2, 3], &[1, 2, 3, 4]], &[1, 2], Some(half));
    }

    #[test]
    fn what_was_found_is_told_once() {
        let text = |found| with_found("no majority of voters: 1 of 3 answers".to_owned(), found);
        assert_eq!(
            text("no leader is known"),
            "no majority of voters: 1 of 3 answers (no leader is known)"
        );
        // Its figures would make a new text of the same trouble each time.
        assert_eq!(
            text("no majority of voters has answered this leader for 1503 ms"),
            "no majority of voters: 1 of 3 answers"
        );
        assert_eq!(
            text("calling node 7 at 10.0.0.7:8443: Connection refused (os error 111)"),
            "no majority of voters: 1 of 3 answers"
        );
    }
}
