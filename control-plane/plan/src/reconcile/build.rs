//! Writes the shards of a placement, and tells when existing ones no longer say what they should.

use std::collections::BTreeMap;

use exo_crds::{
    GROUP, InferenceInstance, LABEL_EPOCH, LABEL_INSTANCE, LABEL_REPLICA, Model, ReplicaStatus,
    SHARD_FINALIZER, Shard, ShardModel, ShardSpec, Sharding, ShardingKind, Transport,
    TransportKind, VERSION,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;

use super::{Action, Observed, is_deleting, name_of};
use crate::Placement;

/// Longest value of a label, as Kubernetes allows it.
const MAX_LABEL_CHARS: usize = 63;
/// Longest name of an object, as Kubernetes allows it.
const MAX_NAME_CHARS: usize = 253;
/// What [`shard_name`] adds at most.
const LONGEST_SUFFIX: &str = "-4294967295-a18446744073709551615-4294967295";
// The label is the tighter limit: an instance that fits it has shards whose names fit as well.
const _: () = assert!(MAX_LABEL_CHARS + LONGEST_SUFFIX.len() <= MAX_NAME_CHARS);

/// Why shards of this instance could not be written, whatever their epoch and rank.
pub(super) fn name_too_long(instance: &InferenceInstance) -> Option<String> {
    let chars = name_of(instance).len();
    (chars > MAX_LABEL_CHARS).then(|| {
        format!(
            "the name has {chars} characters; its shards carry it in the label {LABEL_INSTANCE}, \
             which holds at most {MAX_LABEL_CHARS}"
        )
    })
}

fn shard_name(instance: &str, replica: u32, epoch: u64, rank: u32) -> String {
    format!("{instance}-{replica}-a{epoch}-{rank}")
}

/// One shard per rank, for the epoch that `status` names.
pub(super) fn shards(
    instance: &InferenceInstance,
    model: &Model,
    status: &ReplicaStatus,
    placement: &Placement,
) -> Vec<Shard> {
    let world_size = placement.ranks.len() as u32;
    placement
        .ranks
        .iter()
        .zip(0u32..)
        .map(|(place, rank)| {
            let spec = ShardSpec {
                instance: name_of(instance).to_owned(),
                replica: status.index,
                epoch: status.epoch,
                node: place.node.clone(),
                rank,
                world_size,
                sharding: placement.sharding,
                layers: place.layers,
                model: shard_model(model),
                transport: placement.transport,
                rendezvous: None,
                seed: seed(instance),
                context_length: placement.context_length,
                max_concurrency: instance.spec.max_concurrency,
                fast_synch: instance.spec.fast_synch,
                environment: instance.spec.environment.clone(),
            };
            let name = shard_name(name_of(instance), status.index, status.epoch, rank);
            let mut shard = Shard::new(&name, spec);
            shard.metadata.namespace = instance.metadata.namespace.clone();
            shard.metadata.labels = Some(BTreeMap::from([
                (LABEL_INSTANCE.to_owned(), name_of(instance).to_owned()),
                (LABEL_REPLICA.to_owned(), status.index.to_string()),
                (LABEL_EPOCH.to_owned(), status.epoch.to_string()),
            ]));
            shard.metadata.finalizers = Some(vec![SHARD_FINALIZER.to_owned()]);
            shard.metadata.owner_references = Some(vec![owner(instance)]);
            shard
        })
        .collect()
}

fn owner(instance: &InferenceInstance) -> OwnerReference {
    OwnerReference {
        api_version: format!("{GROUP}/{VERSION}"),
        kind: "InferenceInstance".to_owned(),
        name: name_of(instance).to_owned(),
        uid: instance.metadata.uid.clone().unwrap_or_default(),
        controller: Some(true),
        block_owner_deletion: Some(true),
    }
}

/// Whether nobody looks after a shard.
fn is_orphan(shard: &Shard) -> bool {
    let mut owners = shard.metadata.owner_references.iter().flatten();
    !is_deleting(shard) && !owners.any(|owner| owner.controller == Some(true))
}

/// What makes the orphans among these shards the instance's own.
pub(super) fn adopt(instance: &InferenceInstance, shards: &[&Shard]) -> Vec<Action> {
    let adopted = |shard: &&Shard| Action::Adopt {
        name: shard.metadata.name.clone().unwrap_or_default(),
        owners: {
            let others = shard.metadata.owner_references.iter().flatten();
            others.cloned().chain([owner(instance)]).collect()
        },
        resource_version: shard.metadata.resource_version.clone(),
    };
    shards.iter().filter(|shard| is_orphan(shard)).map(adopted).collect()
}

fn shard_model(model: &Model) -> ShardModel {
    ShardModel {
        name: model.metadata.name.clone().unwrap_or_default(),
        source: model.spec.source.clone(),
        model_type: model.spec.architecture.model_type.clone(),
        layers: model.spec.architecture.layers,
    }
}

/// The instance's seed, or one that stays the same through all its epochs: FNV-1a of its uid, cut
/// to 53 bits because JSON readers may hold numbers as doubles.
fn seed(instance: &InferenceInstance) -> u64 {
    instance.spec.seed.unwrap_or_else(|| {
        let uid = instance.metadata.uid.as_deref().unwrap_or_default();
        let hash = uid.bytes().fold(0xcbf2_9ce4_8422_2325u64, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
        });
        hash >> 11
    })
}

/// Whether shards differ from what the instance and its model ask for now. A model that was deleted
/// leaves its shards alone.
pub(super) fn outdated(observed: &Observed<'_>, shards: &[&Shard]) -> bool {
    let instance = observed.instance;
    let wanted = &instance.spec;
    let model = observed.models.get(&wanted.model);
    let nodes = &wanted.nodes;
    let foreign = |shard: &Shard| {
        let owners = shard.metadata.owner_references.iter().flatten();
        let is_own = |owner: &OwnerReference| Some(&owner.uid) == instance.metadata.uid.as_ref();
        !is_orphan(shard) && !owners.into_iter().any(is_own)
    };
    let differs = |shard: &Shard| {
        let spec = &shard.spec;
        let context_length =
            wanted.context_length.or(model.map(|m| m.spec.architecture.context_length));
        spec.model.name != wanted.model
            || model.is_some_and(|model| shard_model(model) != spec.model)
            || !sharding_allows(wanted.sharding, spec.sharding)
            || !transport_allows(wanted.transport, spec.transport)
            || context_length.is_some_and(|wanted| wanted != spec.context_length)
            || spec.max_concurrency != wanted.max_concurrency
            || spec.fast_synch != wanted.fast_synch
            || spec.environment != wanted.environment
            // Without one any will do: shards that were adopted, or whose instance had one, go on
            // with theirs. It is for requests that bring none, and gateways, who know the
            // instance's, let none through.
            || wanted.seed.is_some_and(|wanted| wanted != spec.seed)
            || nodes.min.is_some_and(|min| spec.world_size < min)
            || nodes.max.is_some_and(|max| spec.world_size > max)
            || !selected(observed, &nodes.selector, &spec.node)
    };
    shards.iter().any(|shard| foreign(shard) || differs(shard))
}

fn sharding_allows(wanted: Sharding, is: ShardingKind) -> bool {
    match wanted {
        Sharding::Auto => true,
        Sharding::Pipeline => is == ShardingKind::Pipeline,
        Sharding::Tensor => is == ShardingKind::Tensor,
    }
}

fn transport_allows(wanted: Transport, is: TransportKind) -> bool {
    match wanted {
        Transport::Auto => true,
        Transport::Ring => is == TransportKind::Ring,
        Transport::Jaccl => is == TransportKind::Jaccl,
        Transport::Nccl => is == TransportKind::Nccl,
    }
}

/// A node that is gone counts as selected: that it is lost says more.
fn selected(observed: &Observed<'_>, selector: &BTreeMap<String, String>, name: &str) -> bool {
    let node = observed.nodes.iter().find(|node| node.metadata.name.as_deref() == Some(name));
    node.is_none_or(|node| {
        let labels = node.metadata.labels.as_ref();
        selector.iter().all(|(key, value)| labels.and_then(|labels| labels.get(key)) == Some(value))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_suffix_is_longer_than_the_longest() {
        assert_eq!(shard_name("", u32::MAX, u64::MAX, u32::MAX), LONGEST_SUFFIX);
    }
}
