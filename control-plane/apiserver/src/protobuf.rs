//! Bodies in Kubernetes' protocol buffers, which its own clients prefer for its own types.
//!
//! Owns: reading an envelope and the messages in it into the JSON that the rest works on. Never:
//! writing them (clients that send them also take JSON), types of definitions (Kubernetes reads
//! those as JSON and YAML only).
//!
//! Field numbers are those of the `generated.proto` files in `k8s.io/api` and `k8s.io/apimachinery`.

mod messages;
mod wire;

use base64::{Engine as _, engine::general_purpose::STANDARD};
use serde_json::{Map, Value, json};

use self::{
    messages::{Kind, Message, TYPE_META},
    wire::{Field, Fields},
};
use crate::clock;

pub(crate) const MEDIA_TYPE: &str = "application/vnd.kubernetes.protobuf";
/// How every such body begins.
const MAGIC: &[u8] = b"k8s\0";

/// A body that can't be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum ProtobufError {
    #[error("it does not begin with k8s and a zero byte")]
    NoMagic,
    #[error("it is cut off or damaged")]
    Damaged,
    #[error("a text in it is not UTF-8")]
    NotText,
    #[error("a time in it is out of range")]
    NotTime,
    #[error("no message of this kind is known here")]
    UnknownKind,
}

/// Whether a body is in this form, whatever its header says.
pub(crate) fn is_protobuf(body: &[u8]) -> bool {
    body.starts_with(MAGIC)
}

/// The object in a body. Its envelope (`runtime.Unknown`) has the type in field 1, its bytes in 2.
pub(crate) fn read(body: &[u8]) -> Result<Value, ProtobufError> {
    let envelope = body.strip_prefix(MAGIC).ok_or(ProtobufError::NoMagic)?;
    let (mut types, mut raw): (&[u8], &[u8]) = (&[], &[]);
    for field in Fields::new(envelope) {
        match field? {
            (1, Field::Bytes(bytes)) => types = bytes,
            (2, Field::Bytes(bytes)) => raw = bytes,
            _ => {}
        }
    }
    let types = object(&TYPE_META, types)?;
    let text = |field: &str| types.get(field).and_then(Value::as_str).unwrap_or_default();
    let (api_version, kind) = (text("apiVersion"), text("kind"));
    let message = messages::find(api_version, kind).ok_or(ProtobufError::UnknownKind)?;
    let mut fields = json!({"apiVersion": api_version, "kind": kind});
    if let (Some(fields), Value::Object(inner)) = (fields.as_object_mut(), object(message, raw)?) {
        fields.extend(inner);
    }
    Ok(fields)
}

/// One message as a JSON object. Unknown fields are passed over, as protocol buffers mean it.
fn object(message: &Message, bytes: &[u8]) -> Result<Value, ProtobufError> {
    let mut fields = Map::new();
    for field in Fields::new(bytes) {
        let (number, value) = field?;
        let Some(known) = message.iter().find(|known| known.number == number) else {
            continue;
        };
        let value = match known.kind {
            Kind::Entries(of) => {
                let (name, value) = entry(of, value)?;
                let map = fields.entry(known.name).or_insert_with(|| json!({}));
                map[name.as_str()] = value;
                continue;
            }
            kind => self::value(kind, value)?,
        };
        if known.repeated {
            let list = fields.entry(known.name).or_insert_with(|| json!([]));
            if let Some(list) = list.as_array_mut() {
                list.push(value);
            }
        } else if !is_unset(known.kind, &value) {
            fields.insert(known.name.to_owned(), value);
        }
    }
    Ok(Value::Object(fields))
}

/// Go's encoder writes empty texts and times that were never set; JSON leaves them out.
fn is_unset(kind: Kind, value: &Value) -> bool {
    match kind {
        Kind::Text => value.as_str() == Some(""),
        Kind::Count => value.as_i64() == Some(0),
        Kind::Time | Kind::MicroTime => value.is_null(),
        Kind::Number | Kind::Flag | Kind::Bytes | Kind::Json | Kind::Entries(_) => false,
        Kind::Of(_) => value.as_object().is_some_and(Map::is_empty),
    }
}

fn value(kind: Kind, field: Field<'_>) -> Result<Value, ProtobufError> {
    Ok(match (kind, field) {
        (Kind::Text, Field::Bytes(bytes)) => Value::String(text(bytes)?),
        (Kind::Bytes, Field::Bytes(bytes)) => Value::String(STANDARD.encode(bytes)),
        (Kind::Number | Kind::Count, Field::Varint(number)) => json!(number.cast_signed()),
        (Kind::Flag, Field::Varint(number)) => Value::Bool(number != 0),
        (Kind::Time, Field::Bytes(bytes)) => time(bytes, false)?,
        (Kind::MicroTime, Field::Bytes(bytes)) => time(bytes, true)?,
        (Kind::Json, Field::Bytes(bytes)) => json_of(bytes)?,
        (Kind::Of(message), Field::Bytes(bytes)) => object(message, bytes)?,
        _ => return Err(ProtobufError::Damaged),
    })
}

/// A map's entry: field 1 is its name, 2 its value.
fn entry(of: &Kind, field: Field<'_>) -> Result<(String, Value), ProtobufError> {
    let Field::Bytes(bytes) = field else {
        return Err(ProtobufError::Damaged);
    };
    let mut name = String::new();
    let mut value = Value::String(String::new());
    for field in Fields::new(bytes) {
        match field? {
            (1, Field::Bytes(bytes)) => name = text(bytes)?,
            (2, field) => value = self::value(*of, field)?,
            _ => {}
        }
    }
    Ok((name, value))
}

fn text(bytes: &[u8]) -> Result<String, ProtobufError> {
    String::from_utf8(bytes.to_vec()).map_err(|_| ProtobufError::NotText)
}

/// `FieldsV1` carries JSON in its field 1.
fn json_of(bytes: &[u8]) -> Result<Value, ProtobufError> {
    for field in Fields::new(bytes) {
        if let (1, Field::Bytes(bytes)) = field? {
            return serde_json::from_slice(bytes).map_err(|_| ProtobufError::Damaged);
        }
    }
    Ok(json!({}))
}

/// Seconds since the Unix epoch in field 1, nanoseconds in field 2; without both it was never set.
fn time(bytes: &[u8], with_micros: bool) -> Result<Value, ProtobufError> {
    let (mut seconds, mut nanos) = (None, 0);
    for field in Fields::new(bytes) {
        match field? {
            (1, Field::Varint(number)) => seconds = Some(number.cast_signed()),
            (2, Field::Varint(number)) => nanos = number.cast_signed(),
            _ => {}
        }
    }
    let Some(seconds) = seconds else {
        return Ok(Value::Null);
    };
    let micros = if with_micros { nanos / 1_000 } else { 0 };
    let text = clock::from_unix(seconds, micros).ok_or(ProtobufError::NotTime)?;
    // The year 1 is how Go writes a time that was never set.
    Ok(if text.starts_with("0001-") { Value::Null } else { Value::String(text) })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A length-delimited field.
    fn bytes(number: u8, content: &[u8]) -> Vec<u8> {
        let mut out = vec![number << 3 | 2];
        let mut len = content.len();
        while len >= 0x80 {
            out.push(len as u8 | 0x80);
            len >>= 7;
        }
        out.push(len as u8);
        out.extend_from_slice(content);
        out
    }

    fn envelope(api_version: &str, kind: &str, raw: &[u8]) -> Vec<u8> {
        let types = [bytes(1, api_version.as_bytes()), bytes(2, kind.as_bytes())].concat();
        [MAGIC.to_vec(), bytes(1, &types), bytes(2, raw), bytes(3, b""), bytes(4, b"")].concat()
    }

    #[test]
    fn a_secret_is_read() {
        let label = [bytes(1, b"team"), bytes(2, b"a")].concat();
        let never: &[u8] = &[];
        let metadata =
            [bytes(1, b"key"), bytes(2, b""), bytes(3, b"n"), bytes(8, never), bytes(11, &label)];
        let data = [bytes(1, b"a"), bytes(2, &[0, 255])].concat();
        let secret =
            [bytes(1, &metadata.concat()), bytes(2, &data), bytes(3, b"Opaque"), vec![5 << 3, 1]];
        assert_eq!(
            read(&envelope("v1", "Secret", &secret.concat())),
            Ok(json!({
                "apiVersion": "v1", "kind": "Secret",
                "metadata": {"name": "key", "namespace": "n", "labels": {"team": "a"}},
                "data": {"a": "AP8="}, "type": "Opaque", "immutable": true,
            }))
        );
    }

    #[test]
    fn times_and_absent_numbers_are_told_apart() {
        // 2026-01-01T00:00:00 is 1 767 225 600.
        let seconds = [8, 0x80, 0xf2, 0xd6, 0xca, 6];
        let time = [&seconds[..], &[0x10, 0x88, 0x27]].concat();
        let spec = [bytes(1, b"me"), vec![2 << 3, 0], bytes(4, &time)].concat();
        let lease = bytes(2, &spec);
        assert_eq!(
            read(&envelope("coordination.k8s.io/v1", "Lease", &lease)).unwrap()["spec"],
            json!({
                "holderIdentity": "me", "leaseDurationSeconds": 0,
                "renewTime": "2026-01-01T00:00:00.000005Z",
            })
        );
    }

    #[test]
    fn what_is_no_such_body_is_refused() {
        assert_eq!(read(b"{}"), Err(ProtobufError::NoMagic));
        assert_eq!(read(b"k8s\0"), Err(ProtobufError::UnknownKind));
        assert_eq!(read(b"k8s\0\x0a\xff"), Err(ProtobufError::Damaged));
        let unknown = envelope("apps/v1", "Deployment", b"");
        assert_eq!(read(&unknown), Err(ProtobufError::UnknownKind));
        let text = envelope("v1", "Secret", &bytes(3, &[0xff]));
        assert_eq!(read(&text), Err(ProtobufError::NotText));
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_or_refused(
            raw in prop::collection::vec(any::<u8>(), 0..200),
            kind in prop::sample::select(vec!["Secret", "Namespace", "Event", "DeleteOptions"]),
        ) {
            let _ = read(&[MAGIC, &raw].concat());
            let _ = read(&envelope("v1", kind, &raw));
        }
    }
}
