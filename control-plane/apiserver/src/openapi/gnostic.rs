//! The OpenAPI 2 document as a protocol buffer, the only form in which kubectl reads it.
//!
//! Owns: what kubectl looks at: definitions with their types, and which operations take a dry run.
//! Never: limits and defaults, which it doesn't know. Field numbers are those of `OpenAPIv2.proto`
//! in google/gnostic.

use serde_json::{Map, Value};

/// A message while it is being written.
#[derive(Default)]
struct Message(Vec<u8>);

impl Message {
    fn varint(&mut self, mut value: u64) {
        loop {
            let low = value.to_le_bytes()[0] & 0x7f;
            value >>= 7;
            if value == 0 {
                self.0.push(low);
                return;
            }
            self.0.push(low | 0x80);
        }
    }

    /// A length-delimited field.
    fn bytes(&mut self, field: u64, bytes: &[u8]) {
        self.varint(field << 3 | 2);
        self.varint(bytes.len() as u64);
        self.0.extend_from_slice(bytes);
    }

    fn text(&mut self, field: u64, text: &str) {
        self.bytes(field, text.as_bytes());
    }

    fn message(&mut self, field: u64, message: &Self) {
        self.bytes(field, &message.0);
    }

    fn yes(&mut self, field: u64) {
        self.varint(field << 3);
        self.varint(1);
    }

    /// A field of the JSON document, if it is a text.
    fn text_of(&mut self, field: u64, of: &Value, name: &str) {
        if let Some(text) = of.get(name).and_then(Value::as_str) {
            self.text(field, text);
        }
    }

    /// All extensions, as YAML, of which JSON is a part.
    fn extensions(&mut self, field: u64, of: &Value) {
        for (name, value) in fields(of).filter(|(name, _)| name.starts_with("x-")) {
            let mut yaml = Self::default();
            yaml.text(2, &value.to_string());
            self.message(field, &named(name, &yaml));
        }
    }
}

fn fields(value: &Value) -> impl Iterator<Item = (&String, &Value)> {
    value.as_object().into_iter().flatten()
}

fn named(name: &str, value: &Message) -> Message {
    let mut entry = Message::default();
    entry.text(1, name);
    entry.message(2, value);
    entry
}

/// The document of these paths and definitions, both in the words of version 2.
pub(super) fn document(
    title: &str,
    version: &str,
    paths: &Map<String, Value>,
    definitions: &Value,
) -> Vec<u8> {
    let mut info = Message::default();
    info.text(1, title);
    info.text(2, version);
    let mut items = Message::default();
    for (path, methods) in paths {
        items.message(2, &named(path, &path_item(methods)));
    }
    let mut schemas = Message::default();
    for (name, definition) in fields(definitions) {
        schemas.message(1, &named(name, &schema(definition)));
    }
    let mut document = Message::default();
    document.text(1, "2.0");
    document.message(2, &info);
    document.message(8, &items);
    document.message(9, &schemas);
    document.0
}

fn path_item(methods: &Value) -> Message {
    let mut item = Message::default();
    for (name, of) in fields(methods) {
        let field = match name.as_str() {
            "get" => 2,
            "put" => 3,
            "post" => 4,
            "delete" => 5,
            "patch" => 8,
            _ => continue,
        };
        item.message(field, &operation(of));
    }
    item
}

fn operation(of: &Value) -> Message {
    let mut operation = Message::default();
    operation.text_of(5, of, "operationId");
    for parameter in of.get("parameters").and_then(Value::as_array).into_iter().flatten() {
        let mut query = Message::default();
        query.text_of(2, parameter, "in");
        query.text_of(4, parameter, "name");
        query.text_of(6, parameter, "type");
        // A parameter, which is not of the body, but of the query.
        for field in [3, 2, 1] {
            let mut outer = Message::default();
            outer.message(field, &query);
            query = outer;
        }
        operation.message(8, &query);
    }
    operation.extensions(13, of);
    operation
}

fn schema(of: &Value) -> Message {
    // A reference with a description of its own.
    if let Some([only]) = of.get("allOf").and_then(Value::as_array).map(Vec::as_slice) {
        let mut schema = schema(only);
        schema.text_of(4, of, "description");
        return schema;
    }
    let mut schema = Message::default();
    schema.text_of(1, of, "$ref");
    schema.text_of(2, of, "format");
    schema.text_of(4, of, "description");
    for name in of.get("required").and_then(Value::as_array).into_iter().flatten() {
        schema.text(19, name.as_str().unwrap_or_default());
    }
    if let Some(additional) = of.get("additionalProperties") {
        let mut item = Message::default();
        match additional {
            Value::Bool(true) => item.yes(2),
            Value::Object(_) => item.message(1, &self::schema(additional)),
            _ => {}
        }
        schema.message(21, &item);
    }
    if of.get("type").is_some_and(Value::is_string) {
        let mut types = Message::default();
        types.text_of(1, of, "type");
        schema.message(22, &types);
    }
    if let Some(items) = of.get("items") {
        let mut item = Message::default();
        item.message(1, &self::schema(items));
        schema.message(23, &item);
    }
    if let Some(properties) = of.get("properties") {
        let mut all = Message::default();
        for (name, property) in fields(properties) {
            all.message(1, &named(name, &self::schema(property)));
        }
        schema.message(25, &all);
    }
    schema.extensions(31, of);
    schema
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn lengths_of_every_size_are_written() {
        let mut message = Message::default();
        message.text(31, &"x".repeat(300));
        assert_eq!(message.0[..4], [0xfa, 1, 0xac, 2]);
        assert_eq!(message.0.len(), 304);
    }

    #[test]
    fn a_schema_has_its_types_and_extensions() {
        let message = schema(&json!({
            "type": "object", "required": ["a"], "x-b": [1],
            "properties": {"a": {"$ref": "#/definitions/c"}},
        }));
        let text = String::from_utf8_lossy(&message.0);
        for part in ["object", "x-b", "[1]", "#/definitions/c"] {
            assert!(text.contains(part), "{part}");
        }
        assert_eq!(message.0[..5], [0x9a, 1, 1, b'a', 0xb2]);
    }
}
