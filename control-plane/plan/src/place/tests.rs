use proptest::prelude::*;

use super::*;
use crate::testing::{instance_spec, model, node_state};

const MIB: u64 = 1 << 20;
const OVERHEAD_MIB: u64 = OVERHEAD_BYTES / MIB;

fn ranks(placement: &Placement) -> Vec<(String, String)> {
    placement.ranks.iter().map(|rank| (rank.node.clone(), rank.layers.to_string())).collect()
}

fn check(nodes: &[NodeState], edit: impl Fn(&mut InferenceInstanceSpec), expect: &str) {
    let (model, mut instance) = (model(8), instance_spec("tiny"));
    edit(&mut instance);
    let answer = place(&Placing { model: &model, instance: &instance, nodes });
    let text = match &answer {
        Ok(placement) => ranks(placement)
            .iter()
            .map(|(node, layers)| format!("{node} {layers}"))
            .collect::<Vec<_>>()
            .join(", "),
        Err(unplaceable) => unplaceable.to_string(),
    };
    assert_eq!(text, expect);
}

#[test]
fn takes_as_few_nodes_as_needed_with_most_memory_first() {
    let nodes = [node_state("a", 1 << 30), node_state("b", 2 << 30), node_state("c", 2 << 30)];
    check(&nodes, |_| {}, "b 0-7");
    check(&nodes, |i| i.nodes.min = Some(2), "b 0-3, c 4-7");
    check(&nodes, |i| i.nodes.min = Some(3), "b 0-2, c 3-5, a 6-7");
    let small = OVERHEAD_BYTES + 9 * MIB;
    let nodes = [node_state("a", small), node_state("b", small)];
    check(&nodes, |_| {}, "a 0-3, b 4-7");
}

#[test]
fn says_what_each_node_lacks() {
    let ready = || node_state("a", 1 << 30);
    check(&[], |_| {}, "no node is known");
    let nodes = [
        NodeState { ready: Err("no heartbeat for 10 s".to_owned()), ..node_state("a", 1 << 30) },
        NodeState { schedulable: false, ..node_state("b", 1 << 30) },
        NodeState { free_bytes: None, ..node_state("c", 1 << 30) },
        NodeState { has_address: false, ..node_state("d", 1 << 30) },
    ];
    check(
        &nodes,
        |_| {},
        "1 node(s) wanted, 0 usable: a: not ready: no heartbeat for 10 s; \
         b: marked unschedulable; c: has not reported its memory; d: has no address",
    );
    check(
        &[ready()],
        |i| {
            i.nodes.selector = [("rack".to_owned(), "1".to_owned())].into();
        },
        "1 node(s) wanted, 0 usable: a: has no label rack=1",
    );
    check(
        &[ready()],
        |i| i.nodes.min = Some(2),
        "2 node(s) wanted, 1 usable: a: 1Gi free, room for 8 layer(s)",
    );
    check(
        &[node_state("a", 100 * MIB), node_state("b", (OVERHEAD_MIB + 4) * MIB)],
        |_| {},
        "the model's 8 layers need 272Mi, and 2 node(s) have room for only 2 of them: \
         a: 100Mi free, one layer and its overhead need 258Mi; \
         b: 260Mi free, room for 2 layer(s)",
    );
    check(
        &[node_state("a", 100 * MIB)],
        |_| {},
        "the model's 8 layers need 272Mi, and none of 1 node(s) has room for even one of them: \
         a: 100Mi free, one layer and its overhead need 258Mi",
    );
    check(
        &[ready()],
        |i| i.transport = Transport::Jaccl,
        "transport Jaccl is not supported yet; use Auto or Ring",
    );
    check(
        &[ready()],
        |i| i.nodes.min = Some(9),
        "nodes.min is 9, but model tiny has only 8 layers",
    );
    check(
        &[ready()],
        |i| (i.nodes.min, i.nodes.max) = (Some(3), Some(2)),
        "nodes.min is 3, nodes.max is 2",
    );
    check(
        &[ready()],
        |i| i.context_length = Some(4096),
        "contextLength is 4096, but model tiny goes up to 1024",
    );
}

#[test]
fn tensor_sharding_takes_a_number_of_nodes_that_divides_the_model() {
    let nodes = |free: u64| ["a", "b", "c", "d", "e"].map(|name| node_state(name, free));
    let tensor = |min: u32| {
        move |i: &mut InferenceInstanceSpec| {
            (i.sharding, i.nodes.min) = (Sharding::Tensor, Some(min));
        }
    };
    check(&nodes(1 << 30), tensor(2), "a 0-7, b 0-7");
    check(&nodes(1 << 30), tensor(3), "a 0-7, b 0-7, c 0-7, d 0-7");
    check(&nodes(1 << 30)[..1], tensor(1), "a 0-7");
    check(
        &nodes(1 << 30)[..3],
        tensor(3),
        "model tiny can't be split over 3 ranks: 8 attention heads do not divide by 3: \
         a: 1Gi free; b: 1Gi free; c: 1Gi free",
    );
    check(&nodes(1 << 30)[..2], tensor(3), "3 node(s) wanted, 2 usable: a: 1Gi free; b: 1Gi free");
    // 8 MiB of weights and 8 MiB of cache: 16, 8 or 4 on each of 1, 2 or 4 ranks.
    check(&nodes(OVERHEAD_BYTES + 15 * MIB), tensor(1), "a 0-7, b 0-7");
    check(&nodes(OVERHEAD_BYTES + 4 * MIB), tensor(1), "a 0-7, b 0-7, c 0-7, d 0-7");
    check(
        &nodes(OVERHEAD_BYTES + 3 * MIB)[..2],
        tensor(1),
        "each of 2 rank(s) needs 264Mi, the first 264Mi: a: 259Mi free; b: 259Mi free",
    );
}

#[test]
fn the_first_of_a_team_has_the_head() {
    let (mut model, mut instance) = (model(2), instance_spec("tiny"));
    (model.spec.weights.embedding, model.spec.weights.head) = (MIB, 6 * MIB);
    (instance.sharding, instance.nodes.min) = (Sharding::Tensor, Some(2));
    let nodes = [
        node_state("small", OVERHEAD_BYTES + 3 * MIB),
        node_state("big", OVERHEAD_BYTES + 9 * MIB),
    ];
    let placement = place(&Placing { model: &model, instance: &instance, nodes: &nodes }).unwrap();
    assert_eq!(placement.sharding, ShardingKind::Tensor);
    let ranks: Vec<(&str, u64)> = (placement.ranks.iter())
        .map(|r| (r.node.as_str(), r.memory_bytes - OVERHEAD_BYTES))
        .collect();
    assert_eq!(ranks, [("big", 9 * MIB), ("small", 3 * MIB)]);
    model.spec.shardings = vec![ShardingKind::Pipeline];
    let refusal = place(&Placing { model: &model, instance: &instance, nodes: &nodes });
    let expect = "model tiny can't be split as Tensor: its `shardings` leave that out";
    assert_eq!(refusal.unwrap_err().to_string(), expect);
}

#[test]
fn nodes_that_can_not_reach_each_other_are_named() {
    let small = OVERHEAD_BYTES + 9 * MIB;
    let nodes = |linked: usize| -> Vec<NodeState> {
        let transports = |index| if index < linked { vec![TransportKind::Ring] } else { vec![] };
        let node =
            |(index, name)| NodeState { transports: transports(index), ..node_state(name, small) };
        ["a", "b"].into_iter().enumerate().map(node).collect()
    };
    let tensor = |i: &mut InferenceInstanceSpec| i.sharding = Sharding::Tensor;
    check(&nodes(2), |_| {}, "a 0-3, b 4-7");
    check(&nodes(2), tensor, "a 0-7, b 0-7");
    let alone = "265Mi free, but its runner can't use Ring, which more than one node needs";
    let why = |linked| {
        format!(
            "no node has room for the whole model, and of 2 usable ones {linked} can use Ring, \
             which several together need"
        )
    };
    for linked in [0, 1] {
        let first = |free: &str| if linked == 0 { alone.to_owned() } else { free.to_owned() };
        let of = |free: &str| format!("{}: a: {}; b: {alone}", why(linked), first(free));
        check(&nodes(linked), |_| {}, &of("265Mi free, room for 4 layer(s)"));
        check(&nodes(linked), tensor, &of("265Mi free"));
    }
    // Here it is the memory: they would not do together either.
    let one = |i: &mut InferenceInstanceSpec| i.nodes.max = Some(1);
    let rooms = "a: 265Mi free, room for 4 layer(s); b: 265Mi free, room for 4 layer(s)";
    let few = format!(
        "the model's 8 layers need 272Mi, and 1 node(s) have room for only 4 of them: {rooms}"
    );
    check(&nodes(1), one, &few);
    check(&nodes(2), one, &few);
}

/// DeepSeek V3 as published: 61 layers, 128 heads, a latent of 512 and a rotated key of 64.
fn deepseek_v3() -> Model {
    let mut model = model(61);
    let facts = &mut model.spec.architecture;
    facts.model_type = "deepseek_v3".to_owned();
    (facts.hidden_size, facts.vocab_size, facts.context_length) = (7168, 129_280, 163_840);
    (facts.heads, facts.kv_heads, facts.head_dim) = (128, 128, 128);
    (facts.kv_lora_rank, facts.qk_rope_head_dim) = (Some(512), Some(64));
    model.spec.weights = exo_crds::WeightBytes { layer: 0, embedding: 0, head: 0 };
    model
}

#[test]
fn a_latent_is_what_counts_where_models_keep_one() {
    let model = deepseek_v3().spec;
    let needed = |sharding, world_size, layers, context| {
        let share = Share { sharding, rank: 0, world_size, layers };
        memory_needed(&model, context, &share) - OVERHEAD_BYTES
    };
    // 576 numbers of two bytes for a token and layer, 70,272 bytes in all; and what attention makes of them.
    let heads = 192 * MIB;
    assert_eq!(needed(ShardingKind::Pipeline, 1, 0..61, 4096), 70_272 * 4096 + heads);
    assert_eq!(needed(ShardingKind::Pipeline, 4, 10..20, 4096), 11_520 * 4096 + heads);
    // Every rank of a team has all of it.
    assert_eq!(needed(ShardingKind::Tensor, 8, 0..61, 4096), 70_272 * 4096 + heads);
    assert_eq!(needed(ShardingKind::Tensor, 8, 0..61, 10), 70_272 * 10 + 10 * 128 * 4608);
    // One layer's, 180 MiB at the longest context, may be there a second time; 64 MiB of it are overhead anyway.
    let copy = 163_840 * 1152 - 64 * MIB;
    let head = 163_840 * 4608;
    assert_eq!(needed(ShardingKind::Pipeline, 1, 0..61, 163_840), 70_272 * 163_840 + copy + head);
    assert_eq!(crate::tensor::objection(&model, 16), None);
}

#[test]
fn caches_are_as_wide_as_what_the_embedding_holds() {
    let packed = |bits, group_size| Some(exo_crds::Quantization { bits, group_size });
    // Bytes of an embedding of 129,280 rows of 7168.
    let values: u64 = 129_280 * 7168;
    for (embedding, quantization, element_bytes) in [
        (values * 2, None, 2),
        (values * 4, None, 4),
        (values / 2 + values / 64 * 4, packed(4, 64), 2),
        (values / 2 + values / 64 * 8, packed(4, 64), 4),
        (values + values / 32 * 4, packed(8, 32), 2),
        (values + values / 32 * 8, packed(8, 32), 4),
        // Not packed as the rest is.
        (values * 2, packed(4, 64), 2),
        (values * 4, packed(4, 64), 4),
        // mxfp4, and a size that is not known.
        (values / 2 + values / 32, packed(4, 32), 2),
        (0, None, 2),
    ] {
        let mut model = deepseek_v3().spec;
        model.weights.embedding = embedding;
        model.quantization = quantization;
        let layers = 10..20;
        let share = Share { sharding: ShardingKind::Pipeline, rank: 1, world_size: 4, layers };
        let needed = memory_needed(&model, 100_000, &share) - OVERHEAD_BYTES;
        // Ten layers' latents, one a second time, and what attention makes of them for one head.
        let latents = 100_000 * 576 * element_bytes;
        let expect = 11 * latents - 64 * MIB + 100_000 * 2304 * element_bytes;
        assert_eq!(needed, expect, "{embedding} {:?}", model.quantization);
    }
}

#[test]
fn a_team_shares_keys_and_values_by_heads() {
    // Llama 3.3 70B: 80 layers, 8 heads of 128; at most one head's on each of 16 ranks.
    let mut model = model(80).spec;
    (model.architecture.heads, model.architecture.head_dim) = (64, 128);
    model.weights.layer = 0;
    for (world_size, heads) in [(1, 8), (4, 2), (8, 1), (16, 1)] {
        let share = Share { sharding: ShardingKind::Tensor, rank: 1, world_size, layers: 0..80 };
        let expect = 80 * 2 * heads * 128 * 2 * 4096;
        assert_eq!(memory_needed(&model, 4096, &share), OVERHEAD_BYTES + expect);
    }
}

#[test]
fn another_order_is_found_when_only_that_leaves_room_for_the_head() {
    let (mut model, mut instance) = (model(2), instance_spec("tiny"));
    model.spec.weights.embedding = 0;
    model.spec.weights.head = 6 * MIB;
    instance.nodes.min = Some(2);
    let nodes = [
        node_state("big", OVERHEAD_BYTES + 9 * MIB),
        node_state("small", OVERHEAD_BYTES + 3 * MIB),
    ];
    let placement = place(&Placing { model: &model, instance: &instance, nodes: &nodes }).unwrap();
    let order: Vec<&str> = placement.ranks.iter().map(|r| r.node.as_str()).collect();
    assert_eq!(order, ["small", "big"]);
}

/// Whether these nodes, in this order, can hold the model: tries all splits by recursion.
fn order_works(order: &[u64], layers: u64, sizes: &Sizes, first: bool) -> bool {
    let Some((free, rest)) = order.split_first() else {
        return layers == 0;
    };
    (1..=layers).any(|n| {
        sizes.fixed(first, rest.is_empty()) + n * sizes.layer <= *free
            && order_works(rest, layers - n, sizes, false)
    })
}

fn permutations(items: &[u64], take: usize) -> Vec<Vec<u64>> {
    if take == 0 {
        return vec![vec![]];
    }
    let mut all = Vec::new();
    for index in 0..items.len() {
        let mut rest = items.to_vec();
        let chosen = rest.remove(index);
        for mut tail in permutations(&rest, take - 1) {
            tail.insert(0, chosen);
            all.push(tail);
        }
    }
    all
}

proptest! {
    /// Against every subset in every order: the number of nodes is the least that works, and a
    /// refusal is right.
    #[test]
    fn fewest_nodes_and_right_refusals(
        free in prop::collection::vec(0u64..14, 0..5),
        layers in 1u32..6,
        embedding in 0u64..6,
        head in 0u64..6,
        min in 1u32..3,
    ) {
        let (mut model, mut instance) = (model(layers), instance_spec("tiny"));
        model.spec.weights.embedding = embedding * MIB;
        model.spec.weights.head = head * MIB;
        instance.nodes.min = Some(min);
        let free: Vec<u64> = free.iter().map(|mib| OVERHEAD_BYTES - MIB + mib * MIB).collect();
        let nodes: Vec<NodeState> = free
            .iter()
            .enumerate()
            .map(|(index, free)| node_state(&format!("n{index}"), *free))
            .collect();
        let sizes = Sizes::new(&model.spec, 1024, 1);
        let least = (min as usize..=free.len().min(layers as usize)).find(|ranks| {
            permutations(&free, *ranks)
                .iter()
                .any(|order| order_works(order, u64::from(layers), &sizes, true))
        });
        let answer = place(&Placing { model: &model, instance: &instance, nodes: &nodes });
        match answer {
            Ok(placement) => {
                prop_assert_eq!(Some(placement.ranks.len()), least);
                let mut next = 0;
                for rank in &placement.ranks {
                    let node = nodes.iter().find(|n| n.name == rank.node).unwrap();
                    prop_assert!(rank.memory_bytes <= node.free_bytes.unwrap());
                    let range = rank.layers.range();
                    let share = Share {
                        sharding: ShardingKind::Pipeline,
                        rank: 0,
                        world_size: placement.ranks.len() as u32,
                        layers: range.clone(),
                    };
                    prop_assert_eq!(
                        rank.memory_bytes,
                        memory_needed(&model.spec, 1024, &share)
                    );
                    prop_assert_eq!(range.start, next);
                    next = range.end;
                }
                prop_assert_eq!(next, layers);
            }
            Err(unplaceable) => {
                prop_assert_eq!(least, None);
                let about_nodes = min <= layers;
                let named = if about_nodes { nodes.len() } else { 0 };
                prop_assert_eq!(unplaceable.nodes.len(), named);
            }
        }
    }
}

#[test]
fn a_thousand_nodes_are_no_burden() {
    let nodes: Vec<NodeState> = (0..1000)
        .map(|index| node_state(&format!("n{index:04}"), OVERHEAD_BYTES + 5 * MIB))
        .collect();
    let (model, instance) = (model(126), instance_spec("tiny"));
    let placement = place(&Placing { model: &model, instance: &instance, nodes: &nodes }).unwrap();
    assert_eq!(placement.ranks.len(), 63);
}
