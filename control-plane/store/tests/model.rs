//! The state against a model that keeps every revision as a whole map.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::collections::BTreeMap;

use exo_store::{
    Command, Compare, HistoryLimits, ListQuery, Meta, Op, Outcome, ReadError, State, Txn,
};
use proptest::prelude::*;

/// All of history: what each key held, with its mod revision, at each revision.
#[derive(Default)]
struct Model {
    revisions: Vec<BTreeMap<String, (String, u64)>>,
}

impl Model {
    fn new() -> Self {
        Self { revisions: vec![BTreeMap::new()] }
    }

    fn revision(&self) -> u64 {
        self.revisions.len() as u64 - 1
    }

    /// Whether the comparisons hold.
    fn apply(&mut self, txn: &Txn) -> bool {
        let now = self.revisions.last().unwrap();
        let at = |key: &str| now.get(key).map_or(0, |(_, revision)| *revision);
        if !txn.compare.iter().all(|c| at(&c.key) == c.mod_revision) {
            return false;
        }
        let revision = self.revision() + 1;
        let mut next = now.clone();
        let mut changed = false;
        for op in &txn.ops {
            match op {
                Op::Put { key, value } => {
                    next.insert(key.to_string(), (value.to_string(), revision));
                    changed = true;
                }
                Op::Delete { key } => changed |= next.remove(&**key).is_some(),
            }
        }
        if changed {
            self.revisions.push(next);
        }
        true
    }
}

#[derive(Clone, Debug)]
enum Step {
    Write { keys: Vec<(u8, bool)>, guess: Option<(u8, bool)> },
    Compact(u8),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let write = (
        prop::collection::btree_map(0..6_u8, any::<bool>(), 1..3),
        prop::option::of((0..6_u8, any::<bool>())),
    )
        .prop_map(|(keys, guess)| Step::Write { keys: keys.into_iter().collect(), guess });
    let compact = (0..100_u8).prop_map(Step::Compact);
    prop::collection::vec(prop_oneof![9 => write, 1 => compact], 1..60)
}

fn key(number: u8) -> String {
    // Two prefixes, one of which begins with the other.
    format!("/{}{number}", if number < 3 { "a" } else { "ab" })
}

fn check_reads(state: &State, model: &Model) -> Result<(), TestCaseError> {
    for revision in 0..=model.revision() {
        let query =
            ListQuery { prefix: "/ab".into(), revision: Some(revision), ..ListQuery::default() };
        let listing = state.list(&query);
        if revision < state.compacted() {
            let refused = matches!(listing, Err(ReadError::Compacted { .. }));
            prop_assert!(refused, "{listing:?}");
            continue;
        }
        let found: Vec<_> = listing
            .unwrap()
            .entries
            .iter()
            .map(|e| (e.key.to_string(), (e.value.to_string(), e.mod_revision)))
            .collect();
        let map = &model.revisions[usize::try_from(revision).unwrap()];
        let expect: Vec<_> = map
            .iter()
            .filter(|(k, _)| k.starts_with("/ab"))
            .map(|(k, v)| (k.clone(), v.clone()))
            .collect();
        prop_assert_eq!(found, expect);
    }
    Ok(())
}

/// Events replayed over an old revision give the newest one.
fn check_watch(state: &State, model: &Model, limit: usize) -> Result<(), TestCaseError> {
    for start in state.compacted()..=model.revision() {
        let mut map = model.revisions[usize::try_from(start).unwrap()].clone();
        let mut cursor = start;
        while cursor < model.revision() {
            let batch = state.events_after("/", cursor, limit).unwrap();
            prop_assert!(batch.revision > cursor, "a watch gets on");
            for event in batch.events {
                let old = map.get(&*event.key).map(|(value, _)| value.clone());
                prop_assert_eq!(event.previous.map(|e| e.value.to_string()), old);
                match event.current {
                    Some(entry) => {
                        prop_assert_eq!(entry.mod_revision, event.revision);
                        let value = (entry.value.to_string(), event.revision);
                        map.insert(event.key.to_string(), value);
                    }
                    None => {
                        map.remove(&*event.key);
                    }
                }
            }
            cursor = batch.revision;
        }
        prop_assert_eq!(&map, model.revisions.last().unwrap());
    }
    Ok(())
}

proptest! {
    #[test]
    fn state_does_what_the_model_does(steps in steps(), events in 1..80_usize, limit in 1..5_usize) {
        let limits = HistoryLimits { events, bytes: 4_000 };
        let mut state = State::new(limits);
        let mut twin = State::new(limits);
        let mut model = Model::new();
        for (index, step) in (1..).zip(steps) {
            let command = match step {
                Step::Compact(percent) => Command::Compact {
                    revision: model.revision() * u64::from(percent) / 100,
                },
                Step::Write { keys, guess } => {
                    let compare = guess.map(|(number, right)| {
                        let current = state.get(&key(number)).map_or(0, |e| e.mod_revision);
                        let mod_revision = if right { current } else { current + 1 };
                        Compare { key: key(number).into(), mod_revision }
                    });
                    let ops = keys.into_iter().map(|(number, put)| {
                        let key = key(number).into();
                        if put {
                            Op::Put { key, value: format!("v{index}").into() }
                        } else {
                            Op::Delete { key }
                        }
                    });
                    Command::Txn(Txn { compare: compare.into_iter().collect(), ops: ops.collect() })
                }
            };
            let meta = Meta { index, time_ms: index };
            let outcome = state.apply(meta, &command);
            prop_assert_eq!(&twin.apply(meta, &command), &outcome);
            if let Command::Txn(txn) = &command {
                let held = model.apply(txn);
                prop_assert_eq!(matches!(outcome, Outcome::Committed { .. }), held);
            }
            prop_assert_eq!(state.revision(), model.revision());
            prop_assert_eq!(state.len(), model.revisions.last().unwrap().len());
            let bytes: usize = model.revisions.last().unwrap().iter()
                .map(|(k, (v, _))| k.len() + v.len()).sum();
            prop_assert_eq!(state.live_bytes(), bytes);
            // A transaction that alone is larger than the limit stays whole.
            prop_assert!(state.history_events() <= events.max(2));
        }
        prop_assert_eq!(&state, &twin);
        check_reads(&state, &model)?;
        check_watch(&state, &model, limit)?;
    }
}
