//! Decisions about an instance, one after the other, in a world that does what a test says.

mod failures;
mod life;
mod random;

use exo_crds::{
    InstancePhase, REASON_WEIGHTS_NOT_FOUND, Shard, ShardFailure, ShardListen, ShardStatus,
};

use super::*;
use crate::testing::{instance, lose, model, node};

/// A cluster whose agents do what a test says.
struct World {
    instance: InferenceInstance,
    models: BTreeMap<String, Model>,
    nodes: Vec<Node>,
    shards: Vec<Shard>,
    now: Timestamp,
    /// Epochs seen per replica, to notice one used twice.
    epochs: BTreeMap<u32, u64>,
}

impl World {
    fn new(nodes: &[&str], ranks: u32) -> Self {
        Self {
            instance: instance("tiny", ranks),
            models: BTreeMap::from([("tiny".to_owned(), model(8))]),
            nodes: nodes.iter().map(|name| node(name, 1 << 30)).collect(),
            shards: Vec::new(),
            now: Timestamp::from_second(1_000).unwrap(),
            epochs: BTreeMap::new(),
        }
    }

    fn decide(&self) -> Decision {
        reconcile(&Observed {
            instance: &self.instance,
            models: &self.models,
            nodes: &self.nodes,
            shards: &self.shards,
            now: self.now,
        })
    }

    /// One pass of the controller; whether it wrote anything.
    fn step(&mut self) -> bool {
        let decision = self.decide();
        let quiet =
            decision.actions.is_empty() && self.instance.status.as_ref() == Some(&decision.status);
        self.instance.status = Some(decision.status);
        for action in decision.actions {
            self.apply(action);
        }
        self.check();
        !quiet
    }

    /// Passes until nothing is left to write.
    fn settle(&mut self) {
        for _ in 0..10 {
            if !self.step() {
                return;
            }
        }
        panic!("never quiet: {:?}", self.decide());
    }

    fn apply(&mut self, action: Action) {
        match action {
            Action::Create(shard) => {
                let replica = shard.spec.replica;
                let others = self.shards.iter().filter(|s| s.spec.replica == replica);
                assert!(
                    others.into_iter().all(|s| s.spec.epoch == shard.spec.epoch),
                    "an older epoch still has shards"
                );
                let known = self.epochs.entry(replica).or_insert(0);
                assert!(shard.spec.rank > 0 || shard.spec.epoch > *known, "epoch used twice");
                *known = shard.spec.epoch;
                let claimed = self.instance.status.as_ref().unwrap();
                assert!(
                    claimed
                        .replicas
                        .iter()
                        .any(|r| r.index == replica && r.epoch == shard.spec.epoch)
                );
                self.shards.push(*shard);
            }
            Action::SetRendezvous { name, rendezvous } => {
                self.shard(&name).spec.rendezvous = Some(rendezvous);
            }
            Action::Adopt { name, owners, .. } => {
                self.shard(&name).metadata.owner_references = Some(owners);
            }
            Action::Delete { name, .. } => {
                let now = whole_seconds(self.now);
                self.shard(&name).metadata.deletion_timestamp = Some(now);
            }
            Action::Release { name, .. } => {
                assert!(is_deleting(self.shard(&name)));
                self.shards.retain(|s| s.metadata.name.as_ref() != Some(&name));
            }
        }
    }

    /// What must hold after every pass.
    fn check(&self) {
        let names: BTreeSet<&str> =
            self.shards.iter().filter_map(|s| s.metadata.name.as_deref()).collect();
        assert_eq!(names.len(), self.shards.len(), "two shards of one name");
        let mut epochs: BTreeMap<(u32, u64), Vec<&Shard>> = BTreeMap::new();
        for shard in self.shards.iter().filter(|s| !is_deleting(s) && !verdict::has_failed(s)) {
            let key = (shard.spec.replica, shard.spec.epoch);
            epochs.entry(key).or_default().push(shard);
        }
        let replicas: BTreeSet<u32> = epochs.keys().map(|(replica, _)| *replica).collect();
        assert_eq!(replicas.len(), epochs.len(), "two live epochs of a replica");
    }

    fn shard(&mut self, name: &str) -> &mut Shard {
        self.shards
            .iter_mut()
            .find(|shard| shard.metadata.name.as_deref() == Some(name))
            .unwrap_or_else(|| panic!("no shard {name}"))
    }

    /// Sets a shard's phase, with listen addresses as an agent reports them.
    fn set(&mut self, name: &str, phase: ShardPhase) {
        let port = 7000 + self.shards.len() as u32;
        let shard = self.shard(name);
        let port = port + 100 * shard.spec.rank;
        let status = shard.status.get_or_insert_default();
        status.phase = Some(phase);
        if phase >= ShardPhase::Downloaded && status.listen.is_none() {
            let at = |offset| format!("10.0.0.1:{}", port + offset);
            status.listen = Some(ShardListen { transport: at(0), control: at(1), serve: at(2) });
        }
    }

    fn fail(&mut self, name: &str, reason: &str, message: &str, permanent: bool) {
        let shard = self.shard(name);
        let status = shard.status.get_or_insert_default();
        status.phase = Some(ShardPhase::Failed);
        status.failure = Some(ShardFailure {
            reason: reason.to_owned(),
            message: message.to_owned(),
            permanent,
        });
    }

    /// Every agent of a node that is not lost does its next step.
    fn agents(&mut self) {
        let alive: Vec<String> = self
            .nodes
            .iter()
            .filter_map(|node| node.metadata.name.clone())
            .filter(|name| verdict::lost_node(&self.nodes, name).is_none())
            .collect();
        self.shards.retain(|s| !is_deleting(s) || !alive.contains(&s.spec.node));
        let next: Vec<(String, ShardPhase)> = self
            .shards
            .iter()
            .filter(|s| alive.contains(&s.spec.node))
            .filter_map(|s| {
                let phase = match phase_of(s) {
                    ShardPhase::Pending => ShardPhase::Downloaded,
                    ShardPhase::Downloaded if s.spec.rendezvous.is_some() => ShardPhase::Loading,
                    ShardPhase::Loading => ShardPhase::Ready,
                    _ => return None,
                };
                Some((s.metadata.name.clone()?, phase))
            })
            .collect();
        for (name, phase) in next {
            self.set(&name, phase);
        }
    }

    fn pass_time(&mut self, seconds: i64) {
        self.now = Timestamp::from_second(self.now.as_second() + seconds).unwrap();
    }

    fn status(&self) -> &InferenceInstanceStatus {
        self.instance.status.as_ref().unwrap()
    }

    fn message(&self, kind: &str) -> String {
        let conditions = &self.status().conditions;
        let condition = conditions.iter().find(|c| c.type_ == kind).unwrap();
        format!("{} {}: {}", condition.status, condition.reason, condition.message)
    }

    fn names(&self) -> Vec<String> {
        self.shards
            .iter()
            .map(|s| {
                let mark = if is_deleting(s) { "-" } else { "" };
                format!("{mark}{}", s.metadata.name.as_deref().unwrap())
            })
            .collect()
    }

    fn until_ready(&mut self) {
        for _ in 0..6 {
            self.settle();
            self.agents();
        }
        self.settle();
        assert_eq!(self.status().phase, Some(InstancePhase::Ready));
    }
}
