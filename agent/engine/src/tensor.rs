//! The ranks that split every layer among them. Owns who has which share and the sums that join them; never computes
//! layers.

use std::cell::Cell;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::ops::Range;
use std::rc::Rc;

use mlx_rs::Array;
use mlx_rs::error::Exception;

use crate::distributed::{Group, GroupError};
use crate::engine::EngineError;
use crate::mlx::device_kind;

/// One rank's place among the ranks that share each layer. A rank on its own holds all.
#[derive(Clone, Default)]
pub(crate) struct Team {
    group: Option<Group>,
    /// The ranks compute on different devices, which may round differently. Known to all clones once the ranks have
    /// met.
    devices_differ: Rc<Cell<bool>>,
}

impl Team {
    pub(crate) fn new(group: Group) -> Self {
        Self { group: Some(group).filter(|g| g.size() > 1), ..Self::default() }
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

    /// The tokens `[rows]` of the first rank on every rank; the others give zeros.
    pub(crate) fn share_tokens(&self, tokens: &Array) -> Result<Array, GroupError> {
        self.group.as_ref().map_or_else(|| Ok(tokens.clone()), |group| group.all_sum(tokens))
    }

    pub(crate) fn group(&self) -> Option<&Group> {
        self.group.as_ref()
    }

    /// `choice`, uint32, as the first rank has made it, on all ranks. Each rank chooses from the same numbers, and alike
    /// where the devices are; where they are not, choices between almost equal numbers may differ, and are shared.
    pub(crate) fn agreed(&self, choice: Array) -> Result<Array, Exception> {
        let Some(group) = self.group.as_ref().filter(|_| self.devices_differ.get()) else {
            return Ok(choice);
        };
        // The others wait for their own as well: all ranks must come to their sums in the same order.
        let own = match self.is_first() {
            true => choice,
            false => choice.multiply(Array::from_slice(&[0_u32], &[1]))?,
        };
        group.all_sum(&own).map_err(|e| Exception::custom(e.to_string()))
    }

    /// Learns whether all ranks compute on the same `kind` of device. Blocks until all ranks have come here.
    fn compare_devices(&self, group: &Group, kind: &str) -> Result<(), EngineError> {
        let mut hasher = DefaultHasher::new();
        kind.hash(&mut hasher);
        let own = (hasher.finish() >> 32) as u32;
        let all = group.all_gather(&Array::from_slice(&[own], &[1, 1]))?;
        all.eval().map_err(|e| GroupError::collective("all_gather", &e))?;
        self.devices_differ.set(all.as_slice::<u32>().iter().any(|other| *other != own));
        Ok(())
    }

    /// Meets the other ranks and checks that all have read the same model: `facts` must be equal. Blocks until all
    /// ranks have come here.
    pub(crate) fn meet(&self, facts: &[i32]) -> Result<(), EngineError> {
        let Some(group) = &self.group else { return Ok(()) };
        let all = group.all_gather(&Array::from_slice(facts, &[1, facts.len() as i32]))?;
        all.eval().map_err(|e| GroupError::collective("all_gather", &e))?;
        let all = all.as_slice::<i32>();
        match all.chunks_exact(facts.len()).position(|other| other != facts) {
            None => self.compare_devices(group, &device_kind()),
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
    use std::net::Ipv4Addr;

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

    /// Of the ranks that the test below starts.
    const RANK: &str = "EXO_TEST_TEAM_RANK";

    /// Not a test of its own but one rank of [`one_choice_counts_where_devices_differ`].
    #[test]
    fn as_one_rank() {
        let Ok(rank) = std::env::var(RANK) else { return };
        let rank: u32 = rank.parse().unwrap();
        let group = Group::from_env().unwrap().unwrap();
        let team = Team::new(group.clone());
        let clone = team.clone();
        let own = [10 + rank, 20 + rank, 30 + rank];
        let agreed = || {
            let agreed = clone.agreed(Array::from_slice(&own, &[1, 1, 3])).unwrap();
            agreed.eval().unwrap();
            agreed.as_slice::<u32>().to_vec()
        };
        team.meet(&[1, 2]).unwrap();
        assert_eq!(agreed(), own, "the same device");
        team.compare_devices(&group, &format!("device {rank}")).unwrap();
        assert_eq!(agreed(), [10, 20, 30]);
    }

    #[test]
    fn one_choice_counts_where_devices_differ() {
        let dir = tempfile::tempdir().unwrap();
        let hosts = dir.path().join("hosts.json");
        // An address of this process alone, where there are several: no other takes these ports.
        let id = std::process::id().to_be_bytes();
        let address = match cfg!(target_os = "linux") {
            true => Ipv4Addr::new(127, 128 | id[1], id[2], id[3].max(2)),
            false => Ipv4Addr::LOCALHOST,
        };
        let held = [0; 3].map(|_| std::net::TcpListener::bind((address, 0)).unwrap());
        let names = held.each_ref().map(|l| [l.local_addr().unwrap().to_string()]);
        std::fs::write(&hosts, serde_json::to_string(&names).unwrap()).unwrap();
        drop(held);
        let start = |rank: u32| {
            std::process::Command::new(std::env::current_exe().unwrap())
                .args(["tensor::tests::as_one_rank", "--exact", "--nocapture"])
                .env(RANK, rank.to_string())
                .env("MLX_RANK", rank.to_string())
                .env("MLX_HOSTFILE", &hosts)
                .spawn()
                .unwrap()
        };
        let ranks = [0, 1, 2].map(start);
        for mut rank in ranks {
            assert!(rank.wait().unwrap().success());
        }
    }
}
