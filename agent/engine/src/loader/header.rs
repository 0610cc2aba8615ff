//! The header of one safetensors file. Owns the format's rules; reads no tensor data.
//!
//! Format: 8 bytes little-endian header length, a JSON object of that length (tensor name → `dtype`, `shape`,
//! `data_offsets` relative to the end of the header; `__metadata__` is free text), then the data without gaps.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use mlx_rs::Dtype;
use serde::Deserialize;
use serde::de::{Deserializer, MapAccess, Visitor};

use super::error::LoadError;

/// The format's reference implementation has the same limit.
const HEADER_LIMIT_BYTES: u64 = 100_000_000;

/// The member that is no tensor.
const METADATA: &str = "__metadata__";

/// One tensor: what it is and which bytes of its file hold it.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Entry {
    pub(crate) dtype: Dtype,
    pub(crate) shape: Vec<i32>,
    /// First byte, from the start of the file.
    pub(crate) start: u64,
    pub(crate) length: u64,
}

#[derive(Deserialize)]
struct RawEntry {
    dtype: String,
    shape: Vec<u64>,
    data_offsets: (u64, u64),
}

enum RawValue {
    Tensor(RawEntry),
    Metadata,
}

/// The object's members in order. A map type would drop repeated names in silence.
struct RawHeader(Vec<(String, RawValue)>);

impl<'de> Deserialize<'de> for RawHeader {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Members;
        impl<'de> Visitor<'de> for Members {
            type Value = RawHeader;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("an object of tensors")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<RawHeader, A::Error> {
                let mut members: Vec<(String, RawValue)> = Vec::new();
                let mut has_metadata = false;
                while let Some(name) = map.next_key::<String>()? {
                    let value = if name == METADATA {
                        if has_metadata {
                            return Err(serde::de::Error::duplicate_field(METADATA));
                        }
                        has_metadata = true;
                        map.next_value::<serde::de::IgnoredAny>()?;
                        RawValue::Metadata
                    } else {
                        RawValue::Tensor(map.next_value()?)
                    };
                    members.push((name, value));
                }
                Ok(RawHeader(members))
            }
        }
        deserializer.deserialize_map(Members)
    }
}

fn dtype(name: &str) -> Option<(Dtype, u64)> {
    Some(match name {
        "U8" => (Dtype::Uint8, 1),
        "I8" => (Dtype::Int8, 1),
        "U16" => (Dtype::Uint16, 2),
        "I16" => (Dtype::Int16, 2),
        "F16" => (Dtype::Float16, 2),
        "BF16" => (Dtype::Bfloat16, 2),
        "U32" => (Dtype::Uint32, 4),
        "I32" => (Dtype::Int32, 4),
        "F32" => (Dtype::Float32, 4),
        "U64" => (Dtype::Uint64, 8),
        "I64" => (Dtype::Int64, 8),
        _ => return None,
    })
}

/// The tensors of the file at `path`, in the order of their data.
pub(crate) fn read(path: &Path) -> Result<Vec<(String, Entry)>, LoadError> {
    let io = |source| LoadError::Io { path: path.to_owned(), source };
    let bad = |reason: String| LoadError::BadHeader { path: path.to_owned(), reason };
    // Asked before it is opened: opening a pipe waits for a writer.
    let metadata = std::fs::metadata(path).map_err(io)?;
    if !metadata.is_file() {
        return Err(bad("it is no regular file".to_owned()));
    }
    let length = metadata.len();
    let mut file = File::open(path).map_err(io)?;
    if length < 8 {
        return Err(bad(format!("the file has {length} bytes, fewer than the 8 of its length")));
    }
    let mut size = [0; 8];
    file.read_exact(&mut size).map_err(io)?;
    let size = u64::from_le_bytes(size);
    if size > HEADER_LIMIT_BYTES || size > length - 8 {
        return Err(bad(format!("its length says {size} bytes, the file has {length}")));
    }
    let mut json = vec![0; size as usize];
    file.read_exact(&mut json).map_err(io)?;
    parse(path, &json, length)
}

fn parse(path: &Path, json: &[u8], length: u64) -> Result<Vec<(String, Entry)>, LoadError> {
    let bad = |reason: String| LoadError::BadHeader { path: path.to_owned(), reason };
    // As a whole: the parser does not look at free text.
    let text = str::from_utf8(json).map_err(|e| bad(format!("it is no text: {e}")))?;
    let header: RawHeader = serde_json::from_str(text).map_err(|e| bad(e.to_string()))?;
    let data = 8 + json.len() as u64;
    let mut entries = Vec::new();
    for (name, value) in header.0 {
        let RawValue::Tensor(raw) = value else { continue };
        let entry =
            entry(&raw, data).map_err(|reason| bad(format!("tensor '{name}': {reason}")))?;
        entries.push((name, entry));
    }
    entries.sort_by(|a, b| (a.1.start, a.1.length, &a.0).cmp(&(b.1.start, b.1.length, &b.0)));

    let mut names: Vec<&String> = entries.iter().map(|(name, _)| name).collect();
    names.sort();
    if let Some(pair) = names.windows(2).find(|pair| pair[0] == pair[1]) {
        return Err(bad(format!("tensor '{}' occurs twice", pair[0])));
    }
    let mut expected = data;
    for (name, entry) in &entries {
        if entry.start != expected {
            return Err(bad(format!(
                "tensor '{name}' starts at byte {} where {expected} was expected",
                entry.start
            )));
        }
        expected += entry.length;
        if expected > length {
            return Err(LoadError::Truncated {
                path: path.to_owned(),
                tensor: name.clone(),
                end: expected,
                length,
            });
        }
    }
    if expected != length {
        return Err(bad(format!("the tensors end at byte {expected}, the file at byte {length}")));
    }
    Ok(entries)
}

fn entry(raw: &RawEntry, data: u64) -> Result<Entry, String> {
    let (dtype, size) =
        dtype(&raw.dtype).ok_or_else(|| format!("type {} is not supported", raw.dtype))?;
    let shape: Result<Vec<i32>, _> = raw.shape.iter().map(|&n| i32::try_from(n)).collect();
    let shape = shape.map_err(|_| format!("shape {:?} is too large", raw.shape))?;
    let bytes = raw.shape.iter().try_fold(size, |bytes, &n| bytes.checked_mul(n));
    let (begin, end) = raw.data_offsets;
    let length = end.checked_sub(begin);
    if bytes.is_none() || bytes != length {
        return Err(format!(
            "shape {:?} of {} does not have the size of bytes {begin} to {end}",
            raw.shape, raw.dtype
        ));
    }
    let start = data.checked_add(begin).filter(|s| s.checked_add(length.unwrap_or(0)).is_some());
    let start = start.ok_or_else(|| format!("bytes {begin} to {end} are out of range"))?;
    Ok(Entry { dtype, shape, start, length: length.unwrap_or(0) })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(json: &str, data_bytes: u64, expect: &str) {
        let result = parse(Path::new("w"), json.as_bytes(), 8 + json.len() as u64 + data_bytes);
        let text = match result {
            Ok(entries) => format!("{:?}", entries.iter().map(|e| &e.0).collect::<Vec<_>>()),
            Err(error) => error.to_string(),
        };
        assert!(text.contains(expect), "{json}: {text}");
    }

    #[test]
    fn refuses_what_breaks_the_format_and_names_it() {
        let one = r#""a":{"dtype":"F32","shape":[2,2],"data_offsets":[0,16]}"#;
        check(&format!(r#"{{"__metadata__":{{"format":"pt"}},{one}}}"#), 16, r#"["a"]"#);
        check("{}", 0, "[]");
        check("[]", 0, "an object of tensors");
        check("{", 0, "bad header");
        check(&format!("{{{one}}}"), 12, "tensor 'a' ends at byte");
        check(&format!("{{{one}}}"), 17, "the tensors end at byte");
        check(&format!("{{{one},{one}}}"), 16, "'a' occurs twice");
        check(r#"{"__metadata__":{},"__metadata__":{}}"#, 0, "duplicate field `__metadata__`");
        let overlap = r#""b":{"dtype":"U8","shape":[4],"data_offsets":[12,16]}"#;
        check(&format!("{{{one},{overlap}}}"), 16, "tensor 'b' starts at byte");
        check(r#"{"a":{"dtype":"F4","shape":[],"data_offsets":[0,4]}}"#, 4, "type F4");
        check(
            r#"{"a":{"dtype":"F32","shape":[3],"data_offsets":[0,4]}}"#,
            4,
            "does not have the size",
        );
        check(
            r#"{"a":{"dtype":"U8","shape":[1],"data_offsets":[4,3]}}"#,
            4,
            "does not have the size",
        );
        let huge = u64::MAX;
        check(
            &format!(r#"{{"a":{{"dtype":"U8","shape":[{huge},{huge}],"data_offsets":[0,1]}}}}"#),
            1,
            "too large",
        );
        check(
            &format!(
                r#"{{"a":{{"dtype":"U8","shape":[1],"data_offsets":[{},{huge}]}}}}"#,
                huge - 1
            ),
            1,
            "out of range",
        );
    }

    #[test]
    fn refuses_what_is_no_text_wherever_it_stands() {
        for json in [&b"{\"__metadata__\":{\"a\":\"\xFF\"}}"[..], b"{\"\xC0\":1}"] {
            let error = parse(Path::new("w"), json, 8 + json.len() as u64).unwrap_err();
            assert!(error.to_string().contains("bad header: it is no text"), "{error}");
        }
    }

    proptest::proptest! {
        #[test]
        fn never_panics(json in ".*", data in 0u64..64) {
            let _ = parse(Path::new("w"), json.as_bytes(), 8 + json.len() as u64 + data);
        }
    }
}
