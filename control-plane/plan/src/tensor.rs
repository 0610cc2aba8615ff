//! Which numbers of ranks can share every layer of a model, and what each holds then. The rules are
//! those of the engine: whole attention heads, whole key and value heads or one head on several
//! ranks, equal parts of the inner features, and packed weights cut between groups only.

use exo_crds::ModelSpec;
use serde::Serialize;

/// What does not come out even.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, thiserror::Error)]
pub enum Uneven {
    #[error("{count} {what} do not divide by {ranks}")]
    Parts { what: &'static str, count: u32, ranks: u32 },
    #[error("{ranks} ranks neither divide {heads} KV heads nor are a multiple of them")]
    KvHeads { heads: u32, ranks: u32 },
    #[error(
        "a part of {part} of {count} {what} is not a multiple of the quantization's groups of {group}"
    )]
    Groups { what: &'static str, count: u32, part: u32, group: u32 },
}

/// Why `ranks` ranks can't share the layers of `model`. Sizes that the model does not tell are left
/// to the runners.
pub(crate) fn objection(model: &ModelSpec, ranks: u32) -> Option<Uneven> {
    let facts = &model.architecture;
    let group = model.quantization.as_ref().map_or(1, |q| q.group_size.max(1));
    let parts = |what: &'static str, count: u32, width: u32| {
        if !count.is_multiple_of(ranks) {
            return Some(Uneven::Parts { what, count, ranks });
        }
        let part = (count / ranks).saturating_mul(width);
        (ranks > 1 && !part.is_multiple_of(group)).then(|| Uneven::Groups {
            what: if width == 1 { what } else { "attention features" },
            count: count.saturating_mul(width),
            part,
            group,
        })
    };
    let heads = facts.kv_heads;
    let even = heads.is_multiple_of(ranks) || ranks.is_multiple_of(heads.max(1));
    // A latent is not shared but repeated.
    let kv_heads =
        (!even && facts.kv_latent().is_none()).then_some(Uneven::KvHeads { heads, ranks });
    parts("attention heads", facts.heads, facts.head_dim)
        .or(kv_heads)
        .or_else(|| parts("inner features of the MLP", facts.intermediate_size?, 1))
        .or_else(|| parts("inner features of an expert", facts.moe_intermediate_size?, 1))
}

/// Key and value heads of one of `ranks` ranks.
pub(crate) fn kv_heads(model: &ModelSpec, ranks: u32) -> u32 {
    model.architecture.kv_heads.div_ceil(ranks.max(1))
}

#[cfg(test)]
mod tests {
    use exo_crds::Quantization;

    use super::*;
    use crate::testing::model;

    #[test]
    fn numbers_are_named_that_do_not_come_out_even() {
        let check = |edit: &dyn Fn(&mut ModelSpec), ranks: u32, expect: Option<&str>| {
            // 8 heads of 32, 8 key and value heads.
            let mut model = model(4).spec;
            edit(&mut model);
            assert_eq!(objection(&model, ranks).map(|u| u.to_string()).as_deref(), expect);
        };
        let group = |group_size| Some(Quantization { bits: 4, group_size });
        check(&|_| {}, 1, None);
        check(&|_| {}, 8, None);
        check(&|_| {}, 3, Some("8 attention heads do not divide by 3"));
        check(&|m| m.architecture.kv_heads = 2, 4, None);
        check(
            &|m| (m.architecture.heads, m.architecture.kv_heads) = (12, 4),
            6,
            Some("6 ranks neither divide 4 KV heads nor are a multiple of them"),
        );
        check(
            &|m| m.architecture.intermediate_size = Some(510),
            4,
            Some("510 inner features of the MLP do not divide by 4"),
        );
        check(
            &|m| m.architecture.moe_intermediate_size = Some(6),
            4,
            Some("6 inner features of an expert do not divide by 4"),
        );
        check(&|m| m.quantization = group(64), 4, None);
        check(
            &|m| m.quantization = group(64),
            8,
            Some(
                "a part of 32 of 256 attention features is not a multiple of the quantization's \
                 groups of 64",
            ),
        );
        // Nothing is cut on one rank.
        check(&|m| m.architecture.intermediate_size = Some(500), 1, None);
        check(&|m| m.quantization = group(48), 1, None);
    }
}
