//! Reads JSON and YAML into values, tells which keys were given twice, and stops where a text stands
//! for more than it may.

use std::{
    cell::{Cell, RefCell},
    fmt::{self, Write as _},
};

use serde::{
    Deserializer,
    de::{self, DeserializeSeed, MapAccess, SeqAccess, Visitor},
};
use serde_json::{Map, Number, Value, map};

/// A text as it was read.
#[derive(Clone, Debug, PartialEq)]
pub struct Document {
    /// Of a key that was given twice the last value.
    pub value: Value,
    /// Paths of such keys, as `spec.nodes[1].min`: the first few, and of long ones the beginning.
    pub duplicates: Vec<String>,
}

/// More than a person reads. What is noted of them is bounded, so that they can't fill the memory.
const MAX_DUPLICATES: usize = 32;
const MAX_PATH_CHARS: usize = 256;
/// Cost of each value beside its text.
const VALUE_COST: usize = 16;

/// Reads JSON. Nesting is limited by the parser.
///
/// # Errors
/// What is wrong with the text, and where.
pub fn from_json(text: &[u8]) -> Result<Document, serde_json::Error> {
    let notes = Notes::new(usize::MAX);
    let mut deserializer = serde_json::Deserializer::from_slice(text);
    let value = notes.reader().deserialize(&mut deserializer)?;
    deserializer.end()?;
    Ok(notes.document(value))
}

/// What is noted while a document is read.
pub(crate) struct Notes {
    /// What its values may still take.
    left: Cell<usize>,
    duplicates: RefCell<Vec<String>>,
}

impl Notes {
    pub(crate) fn new(max_cost: usize) -> Self {
        Self { left: Cell::new(max_cost), duplicates: RefCell::default() }
    }

    pub(crate) fn reader(&self) -> Reader<'_> {
        Reader { notes: self, place: None }
    }

    pub(crate) fn document(self, value: Value) -> Document {
        Document { value, duplicates: self.duplicates.into_inner() }
    }
}

/// Where in a document a value stands; the root is nowhere.
#[derive(Clone, Copy)]
struct Place<'a> {
    parent: Option<&'a Place<'a>>,
    step: Step<'a>,
}

#[derive(Clone, Copy)]
enum Step<'a> {
    Key(&'a str),
    Index(usize),
}

impl fmt::Display for Place<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(parent) = self.parent {
            parent.fmt(f)?;
        }
        match self.step {
            Step::Key(key) if self.parent.is_some() => write!(f, ".{key}"),
            Step::Key(key) => f.write_str(key),
            Step::Index(index) => write!(f, "[{index}]"),
        }
    }
}

/// Takes the beginning of what is written, and ends the writing there.
struct Beginning {
    text: String,
    left: usize,
}

impl fmt::Write for Beginning {
    fn write_str(&mut self, more: &str) -> fmt::Result {
        for char in more.chars() {
            if self.left == 0 {
                self.text.push('…');
                return Err(fmt::Error);
            }
            self.left -= 1;
            self.text.push(char);
        }
        Ok(())
    }
}

/// Reads a value as long as there is something left for it.
#[derive(Clone, Copy)]
pub(crate) struct Reader<'a> {
    notes: &'a Notes,
    place: Option<&'a Place<'a>>,
}

impl Reader<'_> {
    fn pay<E: de::Error>(self, text_bytes: usize) -> Result<(), E> {
        let left = self.notes.left.get().checked_sub(VALUE_COST + text_bytes);
        let left = left.ok_or_else(|| E::custom("the aliases in it make it too large"))?;
        self.notes.left.set(left);
        Ok(())
    }

    fn note_duplicate(self, key: &str) {
        let mut duplicates = self.notes.duplicates.borrow_mut();
        if duplicates.len() < MAX_DUPLICATES {
            let place = Place { parent: self.place, step: Step::Key(key) };
            let mut path = Beginning { text: String::new(), left: MAX_PATH_CHARS };
            // An error only means that there is more of it.
            let _ = write!(path, "{place}");
            duplicates.push(path.text);
        }
    }
}

impl<'de> DeserializeSeed<'de> for Reader<'_> {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Reader<'_> {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a value that JSON has too")
    }

    fn visit_bool<E: de::Error>(self, value: bool) -> Result<Value, E> {
        self.pay(0).map(|()| Value::Bool(value))
    }

    fn visit_i64<E: de::Error>(self, value: i64) -> Result<Value, E> {
        self.pay(0).map(|()| value.into())
    }

    fn visit_u64<E: de::Error>(self, value: u64) -> Result<Value, E> {
        self.pay(0).map(|()| value.into())
    }

    fn visit_f64<E: de::Error>(self, value: f64) -> Result<Value, E> {
        self.pay(0)?;
        let number = Number::from_f64(value);
        number.map(Value::Number).ok_or_else(|| E::custom(format!("{value} is no number in JSON")))
    }

    fn visit_str<E: de::Error>(self, value: &str) -> Result<Value, E> {
        self.pay(value.len()).map(|()| value.into())
    }

    fn visit_string<E: de::Error>(self, value: String) -> Result<Value, E> {
        self.pay(value.len()).map(|()| value.into())
    }

    fn visit_unit<E: de::Error>(self) -> Result<Value, E> {
        self.pay(0).map(|()| Value::Null)
    }

    fn visit_none<E: de::Error>(self) -> Result<Value, E> {
        self.visit_unit()
    }

    fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        self.deserialize(deserializer)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Value, A::Error> {
        self.pay(0)?;
        let mut list = Vec::new();
        loop {
            let place = Place { parent: self.place, step: Step::Index(list.len()) };
            let reader = Reader { notes: self.notes, place: Some(&place) };
            match items.next_element_seed(reader)? {
                Some(item) => list.push(item),
                None => return Ok(Value::Array(list)),
            }
        }
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Value, A::Error> {
        self.pay(0)?;
        let mut map = Map::new();
        while let Some(key) = entries.next_key::<String>()? {
            self.pay(key.len())?;
            let place = Place { parent: self.place, step: Step::Key(&key) };
            let reader = Reader { notes: self.notes, place: Some(&place) };
            let value = entries.next_value_seed(reader)?;
            match map.entry(key) {
                map::Entry::Vacant(entry) => {
                    entry.insert(value);
                }
                map::Entry::Occupied(mut entry) => {
                    self.note_duplicate(entry.key());
                    entry.insert(value);
                }
            }
        }
        Ok(Value::Object(map))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    #[test]
    fn keys_given_twice_are_named() {
        let read = |text: &str| from_json(text.as_bytes()).unwrap();
        let fine = read(r#"{"a": [1, {"b": null}], "c": 1e3, "d": "x\n", "e": -7}"#);
        assert_eq!(fine.value, json!({"a": [1, {"b": null}], "c": 1e3, "d": "x\n", "e": -7}));
        assert!(fine.duplicates.is_empty());
        let twice = read(r#"{"a": 1, "b": [{}, {"c": {"d": 1, "d": 2}, "c": 3}], "a": 4}"#);
        assert_eq!(twice.value, json!({"a": 4, "b": [{}, {"c": 3}]}), "the last one counts");
        assert_eq!(twice.duplicates, ["b[1].c.d", "b[1].c", "a"]);
        assert_eq!(read(r#"[{"a": 1, "a": 1}]"#).duplicates, ["[0].a"]);
        from_json(b"{} {}").unwrap_err();
        from_json(b"").unwrap_err();
        let deep = "[".repeat(100_000);
        assert!(from_json(deep.as_bytes()).unwrap_err().to_string().contains("recursion limit"));
    }

    #[test]
    fn what_is_told_of_duplicates_is_bounded() {
        let many = format!("{{{}\"a\": 1}}", "\"a\": 1,".repeat(1_000));
        assert_eq!(from_json(many.as_bytes()).unwrap().duplicates.len(), MAX_DUPLICATES);
        let key = "é".repeat(100_000);
        let long = format!("{{\"{key}\": {{\"a\": 1, \"a\": 2}}}}");
        let path = &from_json(long.as_bytes()).unwrap().duplicates[0];
        assert_eq!(path.chars().count(), MAX_PATH_CHARS + 1);
        assert!(path.ends_with("é…"), "{path}");
    }

    proptest! {
        /// On any text it agrees with the reader that everybody uses.
        #[test]
        fn it_reads_what_serde_json_reads(text in "[\\[\\]{}:,\"a0-9eE.+\\\\nu -]{0,40}") {
            let expect: Result<Value, _> = serde_json::from_str(&text);
            match (from_json(text.as_bytes()), expect) {
                (Ok(found), Ok(expect)) => prop_assert_eq!(found.value, expect),
                (Err(_), Err(_)) => {}
                (found, expect) => prop_assert!(false, "{:?} and {:?}", found, expect),
            }
        }
    }
}
