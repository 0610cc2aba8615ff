//! Whatever happens in whatever order.

use proptest::prelude::*;

use super::*;

/// Something that happens to a cluster.
#[derive(Clone, Debug)]
enum Happening {
    Controller,
    Agents,
    Fail { shard: usize, reason: &'static str, permanent: bool },
    Lose(usize),
    Recover(usize),
    Remove(usize),
    Seconds(i64),
    Replicas(u32),
    Seed(u64),
}

const REASONS: [&str; 3] = ["RunnerExited", "RunnerLost", "PeerLost"];

fn happening() -> impl Strategy<Value = Happening> {
    prop_oneof![
        4 => Just(Happening::Controller),
        4 => Just(Happening::Agents),
        2 => (0usize..4, prop::sample::select(&REASONS[..]), any::<bool>())
            .prop_map(|(shard, reason, permanent)| Happening::Fail { shard, reason, permanent }),
        1 => (0usize..4).prop_map(Happening::Lose),
        1 => (0usize..4).prop_map(Happening::Recover),
        1 => (0usize..4).prop_map(Happening::Remove),
        2 => (1i64..100).prop_map(Happening::Seconds),
        1 => (0u32..3).prop_map(Happening::Replicas),
        1 => (0u64..3).prop_map(Happening::Seed),
    ]
}

fn happen(world: &mut World, event: &Happening) {
    let bump = |world: &mut World| {
        *world.instance.metadata.generation.get_or_insert(1) += 1;
    };
    let name = |world: &World, index: usize| {
        let shards = world.shards.len();
        (shards > 0).then(|| world.shards[index % shards].metadata.name.clone().unwrap())
    };
    match event {
        Happening::Controller => {
            world.step();
        }
        Happening::Agents => world.agents(),
        Happening::Fail { shard, reason, permanent } => {
            if let Some(name) = name(world, *shard) {
                world.fail(&name, reason, "x", *permanent);
            }
        }
        Happening::Lose(index) => lose(&mut world.nodes[*index]),
        Happening::Recover(index) => {
            let name = world.nodes[*index].metadata.name.clone().unwrap();
            world.nodes[*index] = node(&name, 1 << 30);
        }
        Happening::Remove(index) => {
            if let Some(name) = name(world, *index) {
                let now = whole_seconds(world.now);
                world.shard(&name).metadata.deletion_timestamp = Some(now);
            }
        }
        Happening::Seconds(seconds) => world.pass_time(*seconds),
        Happening::Replicas(replicas) => {
            world.instance.spec.replicas = *replicas;
            bump(world);
        }
        Happening::Seed(seed) => {
            world.instance.spec.seed = Some(*seed);
            bump(world);
        }
    }
}

proptest! {
    /// Whatever happens, no two epochs of a replica overlap and no number is used twice (checked
    /// at each write); and once things are calm, all replicas answer.
    #[test]
    fn decisions_converge(events in prop::collection::vec(happening(), 0..60)) {
        let mut world = World::new(&["a", "b", "c", "d"], 2);
        for event in &events {
            happen(&mut world, event);
        }
        for index in 0..4 {
            happen(&mut world, &Happening::Recover(index));
        }
        for _ in 0..12 {
            world.settle();
            world.agents();
            world.pass_time(60);
        }
        world.settle();
        let replicas = world.instance.spec.replicas;
        prop_assert_eq!(world.status().ready_replicas, replicas);
        prop_assert_eq!(world.shards.len(), 2 * replicas as usize);
        prop_assert_eq!(world.decide().requeue_after, None);
    }
}
