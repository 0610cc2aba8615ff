//! Which ready replica takes a request: the one with the fewest requests in flight from here.
//!
//! Owns the counts of requests in flight. Never does IO.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
};

use crate::index::{ReplicaId, Target};

/// Requests in flight by replica.
#[derive(Clone, Debug, Default)]
pub(crate) struct Balance {
    outstanding: Arc<Mutex<BTreeMap<ReplicaId, u32>>>,
}

/// A request's place at a replica; gives it back when dropped.
#[derive(Debug)]
pub(crate) struct Lease {
    outstanding: Arc<Mutex<BTreeMap<ReplicaId, u32>>>,
    replica: ReplicaId,
}

/// Lower is better; the order of the fields is the policy.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Score<'a> {
    /// Times that this very request broke there.
    failures: u32,
    outstanding: u32,
    replica: &'a ReplicaId,
}

impl Balance {
    /// Takes a place at the best of `targets`. `failures` are the request's own.
    pub(crate) fn pick(
        &self,
        targets: &[Target],
        failures: &BTreeMap<ReplicaId, u32>,
    ) -> Option<(Target, Lease)> {
        let mut outstanding = self.outstanding.lock().unwrap_or_else(PoisonError::into_inner);
        let best = targets.iter().min_by_key(|target| Score {
            failures: failures.get(&target.replica).copied().unwrap_or(0),
            outstanding: outstanding.get(&target.replica).copied().unwrap_or(0),
            replica: &target.replica,
        })?;
        *outstanding.entry(best.replica.clone()).or_default() += 1;
        let lease =
            Lease { outstanding: Arc::clone(&self.outstanding), replica: best.replica.clone() };
        Some((best.clone(), lease))
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        let mut outstanding = self.outstanding.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = outstanding.get_mut(&self.replica) {
            *count -= 1;
            // Epochs come and go: an entry that nobody uses must not stay.
            if *count == 0 {
                outstanding.remove(&self.replica);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::index::InstanceKey;

    fn target(index: u32) -> Target {
        Target {
            replica: ReplicaId {
                instance: InstanceKey { namespace: "default".into(), name: "chat".into() },
                index,
                epoch: 1,
            },
            endpoint: format!("10.0.0.{index}:1"),
        }
    }

    #[test]
    fn fewest_in_flight_first_ties_by_index() {
        let balance = Balance::default();
        let targets = [target(1), target(0)];
        let pick = || balance.pick(&targets, &BTreeMap::new()).unwrap();
        let (first, first_lease) = pick();
        let (second, _second_lease) = pick();
        let (third, third_lease) = pick();
        let index = |target: &Target| target.replica.index;
        assert_eq!((index(&first), index(&second), index(&third)), (0, 1, 0));
        drop(first_lease);
        drop(third_lease);
        assert_eq!(index(&pick().0), 0);
        assert!(balance.pick(&[], &BTreeMap::new()).is_none());
    }

    #[test]
    fn a_replica_that_broke_comes_last_and_nothing_leaks() {
        let balance = Balance::default();
        let targets = [target(0), target(1)];
        let failures = BTreeMap::from([(target(0).replica, 1)]);
        let leases: Vec<_> = (0..5)
            .map(|_| balance.pick(&targets, &failures).unwrap())
            .inspect(|(target, _)| assert_eq!(target.replica.index, 1))
            .collect();
        drop(leases);
        assert!(balance.outstanding.lock().unwrap().is_empty());
    }
}
