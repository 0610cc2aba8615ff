//! Splits layers over pipeline stages.

use std::{cmp::Ordering, num::NonZeroU64, ops::Range};

/// What one stage can hold and how fast it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StageCapacity {
    /// Bytes left for layers.
    pub memory_bytes: u64,
    /// Bytes that this stage reads for each token beside its layers: the output head's.
    pub fixed_bytes: u64,
    /// Bytes read per unit of time; only the ratio between stages matters.
    pub speed: NonZeroU64,
}

/// Time of a stage for one token, as a fraction, so that comparing loses nothing.
#[derive(Clone, Copy, Debug)]
struct StageTime {
    bytes: u64,
    speed: NonZeroU64,
}

impl StageTime {
    const ZERO: Self = Self { bytes: 0, speed: NonZeroU64::MIN };
}

impl Ord for StageTime {
    fn cmp(&self, other: &Self) -> Ordering {
        let cross = |a: &Self, b: &Self| u128::from(a.bytes) * u128::from(b.speed.get());
        cross(self, other).cmp(&cross(other, self))
    }
}

impl PartialOrd for StageTime {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for StageTime {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for StageTime {}

/// Splits layers of `layers[i]` bytes each over `stages`, in order: contiguous, disjoint, covering
/// all, at least one layer per stage. Among the splits that fit each stage's memory it takes one
/// whose slowest stage is fastest, and of those the most even one (least sum of squared bytes).
/// `None` when no split fits. Exact, by dynamic programming over prefixes: O(stages × layers²) at
/// worst.
pub fn partition(layers: &[u64], stages: &[StageCapacity]) -> Option<Vec<Range<usize>>> {
    if stages.is_empty() || layers.len() < stages.len() {
        return None;
    }
    let prefix = prefix_sums(layers)?;
    let slowest = slowest_stage(&prefix, stages)?;
    Some(most_even(&prefix, stages, slowest))
}

/// `prefix[i]` = bytes of the first `i` layers; `None` when they overflow.
fn prefix_sums(layers: &[u64]) -> Option<Vec<u64>> {
    let mut prefix = vec![0u64];
    let mut sum = 0u64;
    for bytes in layers {
        sum = sum.checked_add(*bytes)?;
        prefix.push(sum);
    }
    Some(prefix)
}

fn stage_time(stage: &StageCapacity, bytes: u64) -> StageTime {
    StageTime { bytes: bytes.saturating_add(stage.fixed_bytes), speed: stage.speed }
}

/// The least possible time of the slowest stage.
fn slowest_stage(prefix: &[u64], stages: &[StageCapacity]) -> Option<StageTime> {
    let layers = prefix.len() - 1;
    let mut best: Vec<Option<StageTime>> = vec![None; layers + 1];
    best[0] = Some(StageTime::ZERO);
    for (index, stage) in stages.iter().enumerate() {
        let mut next = vec![None; layers + 1];
        let later = stages.len() - index - 1;
        for end in index + 1..=layers - later {
            for start in (index..end).rev() {
                let bytes = prefix[end] - prefix[start];
                let time = stage_time(stage, bytes);
                // An earlier start only makes this stage larger and slower.
                if bytes > stage.memory_bytes || next[end].is_some_and(|best| time >= best) {
                    break;
                }
                let candidate = best[start].map(|before| before.max(time));
                if let Some(candidate) = candidate
                    && next[end].is_none_or(|best| candidate < best)
                {
                    next[end] = Some(candidate);
                }
            }
        }
        best = next;
    }
    best[layers]
}

/// The most even split none of whose stages is slower than `limit`, which must be reachable.
fn most_even(prefix: &[u64], stages: &[StageCapacity], limit: StageTime) -> Vec<Range<usize>> {
    let layers = prefix.len() - 1;
    let mut best: Vec<Option<f64>> = vec![None; layers + 1];
    best[0] = Some(0.0);
    let mut starts = Vec::new();
    for (index, stage) in stages.iter().enumerate() {
        let mut next: Vec<Option<f64>> = vec![None; layers + 1];
        let mut start_of = vec![0; layers + 1];
        let later = stages.len() - index - 1;
        for end in index + 1..=layers - later {
            for start in (index..end).rev() {
                let bytes = prefix[end] - prefix[start];
                if bytes > stage.memory_bytes || stage_time(stage, bytes) > limit {
                    break;
                }
                // Only a preference among equally fast splits: rounding can do no harm.
                let square = (bytes as f64) * (bytes as f64);
                if let Some(before) = best[start]
                    && next[end].is_none_or(|best| before + square < best)
                {
                    next[end] = Some(before + square);
                    start_of[end] = start;
                }
            }
        }
        best = next;
        starts.push(start_of);
    }
    let mut end = layers;
    let mut ranges: Vec<Range<usize>> = starts
        .iter()
        .rev()
        .map(|start_of| {
            let range = start_of[end]..end;
            end = range.start;
            range
        })
        .collect();
    ranges.reverse();
    ranges
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn stage(memory_bytes: u64, speed: u64) -> StageCapacity {
        StageCapacity { memory_bytes, fixed_bytes: 0, speed: NonZeroU64::new(speed).unwrap() }
    }

    fn check(layers: &[u64], stages: &[StageCapacity], expect: Option<&[Range<usize>]>) {
        assert_eq!(partition(layers, stages).as_deref(), expect, "{layers:?}");
    }

    #[test]
    fn splits_evenly_when_stages_are_equal() {
        check(&[1; 8], &[stage(99, 1); 2], Some(&[0..4, 4..8]));
        check(&[1; 61], &[stage(99, 1); 2], Some(&[0..31, 31..61]));
        check(&[1; 10], &[stage(99, 1); 4], Some(&[0..3, 3..6, 6..8, 8..10]));
        check(&[1; 3], &[stage(99, 1); 3], Some(&[0..1, 1..2, 2..3]));
    }

    #[test]
    fn follows_memory_speed_and_the_head() {
        check(&[1; 8], &[stage(2, 1), stage(99, 1)], Some(&[0..2, 2..8]));
        check(&[1; 9], &[stage(99, 2), stage(99, 1)], Some(&[0..6, 6..9]));
        let head = StageCapacity { fixed_bytes: 4, ..stage(99, 1) };
        check(&[1; 8], &[stage(99, 1), head], Some(&[0..6, 6..8]));
        check(&[9, 1, 1, 1], &[stage(99, 1); 2], Some(&[0..1, 1..4]));
    }

    #[test]
    fn refuses_what_cannot_fit() {
        check(&[1; 8], &[stage(3, 1), stage(4, 1)], None);
        check(&[1; 2], &[stage(9, 1); 3], None);
        check(&[1; 2], &[], None);
        check(&[], &[stage(9, 1)], None);
        check(&[u64::MAX, u64::MAX], &[stage(u64::MAX, 1)], None);
    }

    /// All splits, written without regard to cost: the oracle.
    fn all_splits(layers: usize, stages: usize) -> Vec<Vec<Range<usize>>> {
        fn extend(from: usize, layers: usize, stages: usize) -> Vec<Vec<Range<usize>>> {
            if stages == 1 {
                return if from < layers {
                    vec![std::iter::once(from..layers).collect()]
                } else {
                    vec![]
                };
            }
            let mut all = Vec::new();
            for end in from + 1..layers {
                for rest in extend(end, layers, stages - 1) {
                    all.push(std::iter::once(from..end).chain(rest).collect());
                }
            }
            all
        }
        extend(0, layers, stages)
    }

    /// Slowest stage and evenness of a split; `None` when it does not fit.
    fn cost(
        layers: &[u64],
        stages: &[StageCapacity],
        split: &[Range<usize>],
    ) -> Option<(u64, u64)> {
        // Test speeds divide this, so times are whole numbers.
        const UNIT: u64 = 12;
        let mut slowest = 0;
        let mut squares = 0;
        for (range, stage) in split.iter().zip(stages) {
            let bytes: u64 = layers[range.clone()].iter().sum();
            if bytes > stage.memory_bytes {
                return None;
            }
            slowest = slowest.max((bytes + stage.fixed_bytes) * UNIT / stage.speed.get());
            squares += bytes * bytes;
        }
        Some((slowest, squares))
    }

    proptest! {
        #[test]
        fn agrees_with_brute_force(
            layers in prop::collection::vec(0u64..9, 1..10),
            stages in prop::collection::vec(
                (0u64..30, 0u64..5, prop::sample::select(vec![1u64, 2, 3, 4])),
                1..5,
            ),
        ) {
            let stages: Vec<StageCapacity> = stages
                .into_iter()
                .map(|(memory_bytes, fixed_bytes, speed)| StageCapacity {
                    fixed_bytes,
                    ..stage(memory_bytes, speed)
                })
                .collect();
            let best = all_splits(layers.len(), stages.len())
                .iter()
                .filter_map(|split| cost(&layers, &stages, split))
                .min();
            let found = partition(&layers, &stages);
            prop_assert_eq!(found.is_some(), best.is_some());
            if let Some(split) = found {
                prop_assert_eq!(split.len(), stages.len());
                let mut next = 0;
                for range in &split {
                    prop_assert_eq!(range.start, next);
                    prop_assert!(range.end > range.start);
                    next = range.end;
                }
                prop_assert_eq!(next, layers.len());
                prop_assert_eq!(cost(&layers, &stages, &split), best);
            }
        }
    }
}
