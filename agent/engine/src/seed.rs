//! Seeds for sampling: a pure function of the request's seed, so that a resumed request draws the same tokens on
//! any number of ranks.

/// The seed of one draw. `shard_id` is 0 for sampling: the draw must not depend on how the model is split. `step`
/// counts the draws of the request.
///
/// All arithmetic is on 64 bits, wrapping; the mixing is that of SplitMix64.
pub fn derive_shard_seed(base_seed: u64, shard_id: u64, step: u64) -> u64 {
    let mut z =
        base_seed.wrapping_add(0x9E37_79B9_7F4A_7C15_u64.wrapping_mul(shard_id)).wrapping_add(step);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equals_vectors_computed_with_arbitrary_precision_integers() {
        assert_eq!(derive_shard_seed(0, 0, 0), 0);
        assert_eq!(derive_shard_seed(0, 0, 1), 6238072747940578789);
        assert_eq!(derive_shard_seed(0, 1, 0), 16294208416658607535);
        assert_eq!(derive_shard_seed(42, 0, 0), 12058926934050108962);
        assert_eq!(derive_shard_seed(42, 3, 7), 15457057981642006713);
        assert_eq!(
            derive_shard_seed(18446744073709551615, 18446744073709551615, 18446744073709551615),
            2748217288011717306
        );
        assert_eq!(derive_shard_seed(9223372036854775808, 2, 1099511627776), 1841655103598460023);
    }
}
