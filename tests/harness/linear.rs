//! Checks that what clients saw of one register could have happened one operation after the other.
//!
//! The search is Wing and Gong's, with Lowe's memory of the configurations that led nowhere: any
//! operation that began before the first end of those not yet placed may come next.

use std::collections::HashSet;

/// One operation of one client on the register.
#[derive(Clone, Debug)]
pub struct Op {
    /// Times in any unit, from one clock.
    pub start: u64,
    /// `None`: nobody knows how it ended. It may have happened at any time since, or never.
    pub end: Option<u64>,
    pub kind: Kind,
}

/// What was asked, and what came back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kind {
    Read(u64),
    Write(u64),
    /// Sets a value in place of another; `false` where it found neither reason to.
    Cas {
        from: u64,
        to: u64,
        done: bool,
    },
}

/// Operations already placed, and the register's value after them.
#[derive(Clone, PartialEq, Eq, Hash)]
struct Configuration {
    placed: Vec<u64>,
    value: u64,
}

impl Configuration {
    fn has(&self, op: usize) -> bool {
        self.placed[op / 64] & (1 << (op % 64)) != 0
    }

    fn with(&self, op: usize, value: u64) -> Self {
        let mut placed = self.placed.clone();
        placed[op / 64] |= 1 << (op % 64);
        Self { placed, value }
    }
}

/// The value after the operation; `None` if it can't have happened at this value.
fn apply(kind: &Kind, value: u64) -> Option<u64> {
    match kind {
        Kind::Read(seen) => (*seen == value).then_some(value),
        Kind::Write(new) => Some(*new),
        Kind::Cas { from, to, done: true } => (*from == value).then_some(*to),
        Kind::Cas { from, done: false, .. } => (*from != value).then_some(value),
    }
}

/// Whether the register, beginning with `initial`, could have been used like this.
pub fn is_linearizable(initial: u64, ops: &[Op]) -> bool {
    let mut ops = ops.to_vec();
    ops.sort_by_key(|op| op.start);
    // What ended unknown and was never seen need not have happened: first without it, for each of
    // those doubles the search.
    let seen: HashSet<u64> = ops
        .iter()
        .filter_map(|op| match op.kind {
            Kind::Read(value) | Kind::Cas { from: value, done: true, .. } => Some(value),
            Kind::Write(_) | Kind::Cas { done: false, .. } => None,
        })
        .collect();
    let certain: Vec<Op> = ops
        .iter()
        .filter(|op| {
            op.end.is_some()
                || match op.kind {
                    Kind::Write(value) | Kind::Cas { to: value, .. } => seen.contains(&value),
                    Kind::Read(_) => false,
                }
        })
        .cloned()
        .collect();
    search(initial, &certain) || (certain.len() < ops.len() && search(initial, &ops))
}

/// `ops` by their starts.
fn search(initial: u64, ops: &[Op]) -> bool {
    let first = Configuration { placed: vec![0; ops.len().div_ceil(64)], value: initial };
    let mut tried: HashSet<Configuration> = HashSet::new();
    let mut stack = vec![first];
    while let Some(now) = stack.pop() {
        let mut first_end = u64::MAX;
        let mut next = Vec::new();
        for (at, op) in ops.iter().enumerate().filter(|(at, _)| !now.has(*at)) {
            // Neither this one nor any later one may come now, or end sooner.
            if op.start > first_end {
                break;
            }
            first_end = first_end.min(op.end.unwrap_or(u64::MAX));
            next.push(at);
        }
        if first_end == u64::MAX {
            return true;
        }
        next.retain(|at| ops[*at].start <= first_end);
        // The one on top of the stack is tried first: what is known to have happened, soonest end
        // first.
        next.sort_by_key(|at| std::cmp::Reverse(ops[*at].end.unwrap_or(u64::MAX)));
        for at in next {
            if let Some(value) = apply(&ops[at].kind, now.value) {
                let configuration = now.with(at, value);
                if tried.insert(configuration.clone()) {
                    stack.push(configuration);
                }
            }
        }
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(wanted: bool, ops: &[(u64, Option<u64>, Kind)]) {
        let ops: Vec<_> =
            ops.iter().map(|(s, e, kind)| Op { start: *s, end: *e, kind: kind.clone() }).collect();
        assert_eq!(is_linearizable(0, &ops), wanted, "{ops:?}");
    }

    #[test]
    fn histories_are_told_apart() {
        use Kind::{Cas, Read, Write};
        let cas = |from, to, done| Cas { from, to, done };
        check(true, &[]);
        check(true, &[(1, Some(2), Read(0))]);
        check(false, &[(1, Some(2), Read(1))]);
        // One after the other.
        check(true, &[(1, Some(2), Write(1)), (3, Some(4), Read(1))]);
        check(false, &[(1, Some(2), Write(1)), (3, Some(4), Read(0))]);
        // At the same time: either way.
        check(true, &[(1, Some(4), Write(1)), (2, Some(3), Read(0))]);
        check(true, &[(1, Some(4), Write(1)), (2, Some(3), Read(1))]);
        // But not back again.
        let reads = [(1, Some(9), Write(1)), (2, Some(3), Read(1)), (4, Some(5), Read(0))];
        check(false, &reads);
        // What ended unknown may have happened late, or never, but only once.
        check(true, &[(1, None, Write(1)), (5, Some(6), Read(0)), (7, Some(8), Read(1))]);
        check(true, &[(1, None, Write(1)), (5, Some(6), Read(0))]);
        let twice = [
            (1, None, Write(1)),
            (2, Some(3), Read(1)),
            (4, Some(5), Write(2)),
            (6, Some(7), Read(1)),
        ];
        check(false, &twice);
        // Compare and set.
        check(true, &[(1, Some(2), cas(0, 1, true)), (3, Some(4), cas(0, 2, false))]);
        check(false, &[(1, Some(2), cas(0, 1, true)), (3, Some(4), cas(0, 2, true))]);
        check(false, &[(1, Some(4), cas(0, 1, true)), (2, Some(3), cas(0, 2, true))]);
        check(false, &[(1, Some(2), cas(0, 1, false))]);
    }

    /// A lost update among many operations is found, and their number does no harm.
    #[test]
    fn one_lost_update_among_many_is_found() {
        let mut ops = Vec::new();
        for i in 1..=200 {
            ops.push(Op { start: i * 10, end: Some(i * 10 + 14), kind: Kind::Write(i) });
            ops.push(Op { start: i * 10 + 1, end: Some(i * 10 + 13), kind: Kind::Read(i) });
        }
        assert!(is_linearizable(0, &ops));
        ops.push(Op { start: 1_500, end: Some(1_501), kind: Kind::Read(100) });
        assert!(!is_linearizable(0, &ops));
    }
}
