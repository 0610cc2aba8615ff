//! Orders to the replicated state and their answers, in the form in which they are logged.
//!
//! Every type here is part of the on-disk format: its JSON is fixed by a literal test.

use std::{collections::BTreeSet, sync::Arc};

use serde::{Deserialize, Serialize};

/// What the log entry itself says about a command: the only source of time and position in
/// [`State::apply`](crate::State::apply).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Meta {
    /// Position in the log.
    pub index: u64,
    /// The proposer's clock, milliseconds since the Unix epoch.
    pub time_ms: u64,
}

/// One order to the state.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Command {
    Txn(Txn),
    /// Forget what was before `revision`; reads and watches from before it fail afterwards.
    Compact {
        revision: u64,
    },
}

/// All of `ops`, if every comparison holds; nothing otherwise.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Txn {
    pub compare: Vec<Compare>,
    /// No key twice.
    pub ops: Vec<Op>,
}

/// Holds while `key` was last changed at `mod_revision`; 0 means that it doesn't exist.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Compare {
    pub key: Arc<str>,
    pub mod_revision: u64,
}

/// One change.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Op {
    Put {
        key: Arc<str>,
        value: Arc<str>,
    },
    /// Of an absent key: no change.
    Delete {
        key: Arc<str>,
    },
}

impl Op {
    pub fn key(&self) -> &Arc<str> {
        match self {
            Self::Put { key, .. } | Self::Delete { key } => key,
        }
    }
}

impl Command {
    /// Bytes of the keys and values that it writes.
    pub(crate) fn size(&self) -> usize {
        match self {
            Self::Compact { .. } => 0,
            Self::Txn(txn) => txn
                .ops
                .iter()
                .map(|op| match op {
                    Op::Put { key, value } => key.len() + value.len(),
                    Op::Delete { key } => key.len(),
                })
                .sum(),
        }
    }
}

impl Txn {
    /// Why this can't be carried out, whatever the state.
    pub(crate) fn flaw(&self) -> Option<String> {
        let mut keys = BTreeSet::new();
        let twice = self.ops.iter().find(|op| !keys.insert(op.key()))?;
        Some(format!("a transaction changes `{}` twice", twice.key()))
    }

    /// A new key with this value, or a conflict.
    pub fn create(key: impl Into<Arc<str>>, value: impl Into<Arc<str>>) -> Self {
        Self::replace(key, 0, value)
    }

    /// A new value for `key` if it is still at `mod_revision`.
    pub fn replace(
        key: impl Into<Arc<str>>,
        mod_revision: u64,
        value: impl Into<Arc<str>>,
    ) -> Self {
        let key = key.into();
        Self {
            compare: vec![Compare { key: Arc::clone(&key), mod_revision }],
            ops: vec![Op::Put { key, value: value.into() }],
        }
    }

    /// Removes `key` if it is still at `mod_revision`.
    pub fn delete(key: impl Into<Arc<str>>, mod_revision: u64) -> Self {
        let key = key.into();
        Self {
            compare: vec![Compare { key: Arc::clone(&key), mod_revision }],
            ops: vec![Op::Delete { key }],
        }
    }
}

/// A key's value with its place in history.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    pub key: Arc<str>,
    pub value: Arc<str>,
    pub create_revision: u64,
    /// Revision of the last change.
    pub mod_revision: u64,
}

/// The state's answer to a command.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// Done; `revision` is the state's revision afterwards.
    Committed { revision: u64 },
    /// A comparison failed; nothing changed. What each compared key holds, in their order.
    Conflict { revision: u64, current: Vec<Option<Entry>> },
    /// Not a sensible command; nothing changed.
    Invalid { reason: String },
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn check<T>(value: &T, literal: &Value)
    where
        T: Serialize + for<'a> Deserialize<'a> + PartialEq + std::fmt::Debug,
    {
        assert_eq!(serde_json::to_value(value).unwrap(), *literal);
        let text = literal.to_string();
        assert_eq!(serde_json::from_str::<T>(&text).unwrap(), *value);
    }

    #[test]
    fn commands_keep_their_logged_form() {
        check(
            &Command::Txn(Txn {
                compare: vec![Compare { key: "/a".into(), mod_revision: 7 }],
                ops: vec![
                    Op::Put { key: "/a".into(), value: "{\"b\":1}".into() },
                    Op::Delete { key: "/c".into() },
                ],
            }),
            &json!({"txn": {
                "compare": [{"key": "/a", "mod_revision": 7}],
                "ops": [
                    {"put": {"key": "/a", "value": "{\"b\":1}"}},
                    {"delete": {"key": "/c"}}
                ]
            }}),
        );
        check(&Command::Compact { revision: 9 }, &json!({"compact": {"revision": 9}}));
        check(
            &Meta { index: 3, time_ms: 1_700_000_000_000 },
            &json!({"index": 3, "time_ms": 1_700_000_000_000_u64}),
        );
    }

    #[test]
    fn outcomes_keep_their_form() {
        check(&Outcome::Committed { revision: 4 }, &json!({"committed": {"revision": 4}}));
        check(
            &Outcome::Conflict {
                revision: 4,
                current: vec![
                    None,
                    Some(Entry {
                        key: "/a".into(),
                        value: "1".into(),
                        create_revision: 1,
                        mod_revision: 2,
                    }),
                ],
            },
            &json!({"conflict": {"revision": 4, "current": [
                null,
                {"key": "/a", "value": "1", "create_revision": 1, "mod_revision": 2}
            ]}}),
        );
        check(&Outcome::Invalid { reason: "x".into() }, &json!({"invalid": {"reason": "x"}}));
    }
}
