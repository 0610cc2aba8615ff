//! JSON texts that are written in another notation, piece by piece: a list of thousands of objects
//! never stands in memory as values.

use std::{cell::Cell, fmt};

use serde::{
    Deserializer, Serialize, Serializer,
    de::{self, DeserializeSeed, MapAccess, SeqAccess, Visitor},
    ser::{self, SerializeMap as _, SerializeSeq as _},
};

/// A JSON text that serializes as what it stands for. Not valid JSON is an error of the serializer,
/// as is what nests deeper than 128 levels.
#[derive(Clone, Copy, Debug)]
pub struct JsonText<'a>(pub &'a [u8]);

impl Serialize for JsonText<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut reader = serde_json::Deserializer::from_slice(self.0);
        let written = Unread::new(&mut reader).serialize(serializer)?;
        reader.end().map_err(ser::Error::custom)?;
        Ok(written)
    }
}

/// A value that is read when it is written.
struct Unread<D>(Cell<Option<D>>);

impl<D> Unread<D> {
    fn new(reader: D) -> Self {
        Self(Cell::new(Some(reader)))
    }
}

impl<'de, D: Deserializer<'de>> Serialize for Unread<D> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let reader = self.0.take().ok_or_else(|| ser::Error::custom("it is written once only"))?;
        reader.deserialize_any(Written(serializer)).map_err(ser::Error::custom)
    }
}

/// Writes what is read.
struct Written<S>(S);

fn passed<T, S: ser::Error, D: de::Error>(result: Result<T, S>) -> Result<T, D> {
    result.map_err(D::custom)
}

impl<'de, S: Serializer> Visitor<'de> for Written<S> {
    type Value = S::Ok;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("a JSON value")
    }

    fn visit_bool<E: de::Error>(self, value: bool) -> Result<S::Ok, E> {
        passed(self.0.serialize_bool(value))
    }

    fn visit_i64<E: de::Error>(self, value: i64) -> Result<S::Ok, E> {
        passed(self.0.serialize_i64(value))
    }

    fn visit_u64<E: de::Error>(self, value: u64) -> Result<S::Ok, E> {
        passed(self.0.serialize_u64(value))
    }

    fn visit_f64<E: de::Error>(self, value: f64) -> Result<S::Ok, E> {
        passed(self.0.serialize_f64(value))
    }

    fn visit_str<E: de::Error>(self, value: &str) -> Result<S::Ok, E> {
        passed(self.0.serialize_str(value))
    }

    fn visit_unit<E: de::Error>(self) -> Result<S::Ok, E> {
        passed(self.0.serialize_unit())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<S::Ok, A::Error> {
        let mut list = passed(self.0.serialize_seq(items.size_hint()))?;
        while items.next_element_seed(Item(&mut list))?.is_some() {}
        passed(list.end())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut fields: A) -> Result<S::Ok, A::Error> {
        let mut map = passed(self.0.serialize_map(fields.size_hint()))?;
        while let Some(name) = fields.next_key::<String>()? {
            passed(map.serialize_key(&name))?;
            fields.next_value_seed(Field(&mut map))?;
        }
        passed(map.end())
    }
}

/// The next item of a list.
struct Item<'a, L>(&'a mut L);

impl<'de, L: ser::SerializeSeq> DeserializeSeed<'de> for Item<'_, L> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, reader: D) -> Result<(), D::Error> {
        passed(self.0.serialize_element(&Unread::new(reader)))
    }
}

/// The value of a map's next field.
struct Field<'a, M>(&'a mut M);

impl<'de, M: ser::SerializeMap> DeserializeSeed<'de> for Field<'_, M> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, reader: D) -> Result<(), D::Error> {
        passed(self.0.serialize_value(&Unread::new(reader)))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::yaml;

    #[test]
    fn every_value_is_written_as_it_is() {
        let value = json!({
            "text": "a: b\n\"c\"", "like": ["1", "true", "null", "~", ""], "none": null,
            "numbers": [0, -1, 1.5, u64::MAX, i64::MIN], "yes": true,
            "empty": [{}, []], "one": {"in": {"one": 1}}, "ü": "日本",
        });
        let text = value.to_string();
        let same: Value = serde_json::to_value(JsonText(text.as_bytes())).unwrap();
        assert_eq!(same, value);
        let yaml = yaml::to_string(&JsonText(text.as_bytes())).unwrap();
        assert_eq!(yaml, yaml::to_string(&value).unwrap());
        assert_eq!(yaml::documents(&yaml).unwrap(), [value]);
    }

    #[test]
    fn what_is_no_json_is_an_error() {
        for bad in ["", "{", "{} x", "[1,]", "{\"a\":}", &"[".repeat(1_000)] {
            serde_json::to_value(JsonText(bad.as_bytes())).unwrap_err();
            yaml::to_string(&JsonText(bad.as_bytes())).unwrap_err();
        }
    }
}
