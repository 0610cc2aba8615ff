//! Judges the shards of one epoch: alive, or ended and why.

use exo_crds::{
    Node, Rendezvous, Shard, ShardListen, ShardPhase,
    runner::{REASON_PEER_LOST, REASON_RUNNER_LOST},
};

use super::{Action, Observed, build, by_rank, is_deleting, phase_of};

/// What has become of an epoch.
#[derive(Debug)]
pub(super) enum Verdict {
    /// No shard of it exists.
    Empty,
    Live {
        ready: bool,
        /// Writes that let the ranks meet.
        rendezvous: Vec<Action>,
    },
    Ended(End),
}

/// Why an epoch is over.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum End {
    #[error("{message}")]
    Failed {
        message: String,
        /// The shard's own.
        reason: String,
        permanent: bool,
        /// All that is known so far is that ranks lost a peer, and the peer has yet to speak.
        hearsay: bool,
        /// No runner is to blame, as far as is known: an agent was restarted, or a peer is silent.
        blameless: bool,
    },
    #[error("the instance or its model was changed")]
    Changed,
    #[error("node {node} is lost: {why}")]
    NodeLost { node: String, why: String },
    #[error("a shard of the epoch was deleted")]
    Deleted,
    #[error("a rank listens on another address than the others were told")]
    Moved,
}

/// Judges the shards of one replica that share the newest epoch.
pub(super) fn judge(observed: &Observed<'_>, shards: &[&Shard]) -> Verdict {
    if shards.is_empty() {
        return Verdict::Empty;
    }
    if build::outdated(observed, shards) {
        return Verdict::Ended(End::Changed);
    }
    if let Some(end) = failure(shards) {
        return Verdict::Ended(end);
    }
    let lost = by_rank(shards).iter().find_map(|shard| {
        lost_node(observed.nodes, &shard.spec.node)
            .map(|why| End::NodeLost { node: shard.spec.node.clone(), why })
    });
    if let Some(end) = lost {
        return Verdict::Ended(end);
    }
    let complete = by_rank(shards)
        .iter()
        .enumerate()
        .all(|(rank, shard)| shard.spec.rank as usize == rank && !is_deleting(shard))
        && shards.iter().all(|shard| shard.spec.world_size as usize == shards.len());
    if !complete {
        return Verdict::Ended(End::Deleted);
    }
    match rendezvous(shards) {
        Ok(rendezvous) => Verdict::Live {
            ready: shards.iter().all(|shard| phase_of(shard) == ShardPhase::Ready),
            rendezvous,
        },
        Err(end) => Verdict::Ended(end),
    }
}

/// The failure that says most: a permanent one before the others, then the lowest rank's. Ranks
/// whose agent was restarted come after those, and such that merely lost a peer last.
fn failure(shards: &[&Shard]) -> Option<End> {
    let key = |shard: &&Shard| {
        let failure = shard.status.as_ref().and_then(|s| s.failure.as_ref());
        let is = |reason| failure.is_some_and(|f| f.reason == reason);
        let last = (is(REASON_PEER_LOST), is(REASON_RUNNER_LOST));
        (!failure.is_some_and(|f| f.permanent), last, shard.spec.rank)
    };
    // Failed shards that are all being deleted have been dealt with.
    if !shards.iter().any(|s| has_failed(s) && !is_deleting(s)) {
        return None;
    }
    let shard = shards.iter().copied().filter(|shard| has_failed(shard)).min_by_key(key)?;
    let failure = shard.status.as_ref().and_then(|s| s.failure.as_ref());
    let what = failure.map_or_else(
        || "failed without a message".to_owned(),
        |failure| format!("{}: {}", failure.reason, failure.message),
    );
    let is = |reason| failure.is_some_and(|failure| failure.reason == reason);
    let hearsay = is(REASON_PEER_LOST) && !shards.iter().all(|shard| has_failed(shard));
    Some(End::Failed {
        // `ReplicaStatus::last_failure_reason` reads it.
        message: format!(
            "shard {} on {}: {what}",
            shard.metadata.name.as_deref().unwrap_or_default(),
            shard.spec.node
        ),
        reason: failure.map_or_else(String::new, |failure| failure.reason.clone()),
        permanent: failure.is_some_and(|failure| failure.permanent),
        hearsay,
        blameless: hearsay || is(REASON_RUNNER_LOST),
    })
}

pub(super) fn has_failed(shard: &Shard) -> bool {
    phase_of(shard) == ShardPhase::Failed
}

/// Why a node counts as lost. One whose agent has not reported yet is not lost.
pub(super) fn lost_node(nodes: &[Node], name: &str) -> Option<String> {
    let node = nodes.iter().find(|node| node.metadata.name.as_deref() == Some(name));
    let Some(node) = node else {
        return Some("it is not registered".to_owned());
    };
    node.status
        .as_ref()?
        .conditions
        .iter()
        .find(|c| c.type_ == "Ready" && c.status != "True")
        .map(|c| c.message.clone())
}

/// Tells ranks where to meet once all are listening; nothing to do before that.
fn rendezvous(shards: &[&Shard]) -> Result<Vec<Action>, End> {
    let ranks = by_rank(shards);
    let listens: Option<Vec<&ShardListen>> = ranks
        .iter()
        .map(|shard| {
            let listen = shard.status.as_ref()?.listen.as_ref()?;
            (phase_of(shard) >= ShardPhase::Downloaded).then_some(listen)
        })
        .collect();
    let Some(listens) = listens else {
        return Ok(Vec::new());
    };
    let Some(first) = listens.first() else {
        return Ok(Vec::new());
    };
    let meeting = Rendezvous {
        hosts: listens.iter().map(|l| l.transport.clone()).collect(),
        control: first.control.clone(),
    };
    let mut actions = Vec::new();
    for shard in ranks {
        match &shard.spec.rendezvous {
            None => actions.push(Action::SetRendezvous {
                name: shard.metadata.name.clone().unwrap_or_default(),
                rendezvous: meeting.clone(),
            }),
            Some(told) if *told == meeting => {}
            Some(_) => return Err(End::Moved),
        }
    }
    Ok(actions)
}

/// Where rank 0 takes requests.
pub(super) fn endpoint(shards: &[&Shard]) -> Option<String> {
    let first = shards.iter().find(|shard| shard.spec.rank == 0)?;
    let listen = first.status.as_ref()?.listen.as_ref()?;
    Some(listen.serve.clone())
}
