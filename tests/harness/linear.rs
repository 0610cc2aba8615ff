//! Checks that what clients saw of one register could have happened one operation after the other.
//! The search is that of the crate `todc-utils`; here is what a register is, and what became of
//! operations whose end nobody knows.

use std::collections::HashSet;

use todc_utils::{
    linearizability::{
        WGLChecker,
        history::{Action, History},
    },
    specifications::Specification,
};

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

/// A register that begins with 0.
struct Register;

impl Specification for Register {
    type State = u64;
    /// And whether it is known to have happened.
    type Operation = (Kind, bool);

    fn init() -> u64 {
        0
    }

    fn apply((kind, known): &Self::Operation, value: &u64) -> (bool, u64) {
        match kind {
            Kind::Read(seen) => (seen == value || !known, *value),
            Kind::Write(new) => (true, *new),
            // Nobody knows what it found.
            Kind::Cas { from, to, .. } if !known => {
                (true, if from == value { *to } else { *value })
            }
            Kind::Cas { from, to, done: true } => (from == value, *to),
            Kind::Cas { from, done: false, .. } => (from != value, *value),
        }
    }
}

/// Whether the register, beginning with 0, could have been used like this.
pub fn is_linearizable(ops: &[Op]) -> bool {
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
    search(&certain) || (certain.len() < ops.len() && search(ops))
}

fn search(ops: &[Op]) -> bool {
    // At one and the same time, what begins does so before anything ends. What is not known to have
    // ended does so last of all, where it may also have had no effect that anybody saw.
    let mut events = Vec::new();
    for (client, op) in ops.iter().enumerate() {
        let operation = (op.kind.clone(), op.end.is_some());
        events.push(((op.start, false), (client, Action::Call(operation.clone()))));
        let end = (op.end.unwrap_or(u64::MAX), true);
        events.push((end, (client, Action::Response(operation))));
    }
    events.sort_by_key(|(time, _)| *time);
    let actions: Vec<_> = events.into_iter().map(|(_, action)| action).collect();
    // The crate knows no history without operations.
    actions.is_empty() || WGLChecker::<Register>::is_linearizable(History::from_actions(actions))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(wanted: bool, ops: &[(u64, Option<u64>, Kind)]) {
        let ops: Vec<_> =
            ops.iter().map(|(s, e, kind)| Op { start: *s, end: *e, kind: kind.clone() }).collect();
        assert_eq!(is_linearizable(&ops), wanted, "{ops:?}");
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
        assert!(is_linearizable(&ops));
        ops.push(Op { start: 1_500, end: Some(1_501), kind: Kind::Read(100) });
        assert!(!is_linearizable(&ops));
    }
}
