//! The ranks that split every layer among them. Owns who has which share and the sums that join them; never computes
//! layers.

use std::ops::Range;

use mlx_rs::Array;
use mlx_rs::error::Exception;

use crate::distributed::{Group, GroupError};
use crate::engine::EngineError;

/// One rank's place among the ranks that share each layer. A rank on its own holds all.
#[derive(Clone, Default)]
pub(crate) struct Team {
    group: Option<Group>,
}

impl Team {
    pub(crate) fn new(group: Group) -> Self {
        Self { group: Some(group).filter(|g| g.size() > 1) }
    }

    pub(crate) fn is_alone(&self) -> bool {
        self.group.is_none()
    }

    pub(crate) fn is_first(&self) -> bool {
        self.share().rank == 0
    }

    pub(crate) fn share(&self) -> Share {
        let (rank, size) = self.group.as_ref().map_or((0, 1), |g| (g.rank(), g.size()));
        Share { rank: rank as i32, size: size as i32 }
    }

    /// How many of `units` this rank holds, as [`Share::of`]; the loader has checked that the split comes out even.
    pub(crate) fn own(&self, units: i32, repeat: bool) -> i32 {
        let share = self.share().of(units, repeat).expect("the loader has checked the split");
        share.end - share.start
    }

    /// The sum of what the ranks have; `x` itself for a rank on its own.
    pub(crate) fn sum(&self, x: &Array) -> Result<Array, Exception> {
        match &self.group {
            None => Ok(x.clone()),
            Some(group) => group.all_sum(x).map_err(|e| Exception::custom(e.to_string())),
        }
    }

    /// Meets the other ranks and checks that all have read the same model: `facts` must be equal. Blocks until all
    /// ranks have come here.
    pub(crate) fn meet(&self, facts: &[i32]) -> Result<(), EngineError> {
        let Some(group) = &self.group else { return Ok(()) };
        let all = group.all_gather(&Array::from_slice(facts, &[1, facts.len() as i32]))?;
        all.eval().map_err(|e| GroupError::collective("all_gather", &e))?;
        let all = all.as_slice::<i32>();
        match all.chunks_exact(facts.len()).position(|other| other != facts) {
            None => Ok(()),
            Some(rank) => Err(EngineError::Layers(format!(
                "rank {rank} has another model (or sharding) than rank {}",
                group.rank()
            ))),
        }
    }
}

/// Which of `size` equal shares.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Share {
    pub(crate) rank: i32,
    pub(crate) size: i32,
}

impl Share {
    pub(crate) const WHOLE: Self = Self { rank: 0, size: 1 };

    /// The part of `units` that this rank holds: equal parts, or, with `repeat` and fewer units than ranks, one unit
    /// that several ranks hold. None if neither comes out even.
    pub(crate) fn of(self, units: i32, repeat: bool) -> Option<Range<i32>> {
        let Self { rank, size } = self;
        if units % size == 0 {
            let each = units / size;
            Some(rank * each..(rank + 1) * each)
        } else if repeat && units > 0 && size % units == 0 {
            let unit = rank * units / size;
            Some(unit..unit + 1)
        } else {
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_cover_all_units_in_order() {
        for size in 1..9 {
            for units in 1..40 {
                let shares: Option<Vec<_>> =
                    (0..size).map(|rank| Share { rank, size }.of(units, false)).collect();
                assert_eq!(shares.is_some(), units % size == 0);
                let all: Vec<i32> = shares.into_iter().flatten().flatten().collect();
                assert!(all.is_empty() || all == (0..units).collect::<Vec<_>>());
            }
        }
    }

    #[test]
    fn too_few_units_are_repeated_next_to_each_other() {
        let of = |rank| Share { rank, size: 6 }.of(2, true);
        let units: Vec<i32> = (0..6).filter_map(of).map(|r| r.start).collect();
        assert_eq!(units, [0, 0, 0, 1, 1, 1]);
        assert_eq!(Share { rank: 0, size: 6 }.of(4, true), None);
    }
}
