//! Ways to break a model folder, from single bytes to well-formed headers that lie. Owns the changes; never judges
//! what becomes of them.

use serde_json::{Map, Value, json};

use crate::models::{CONFIG, Folder, INDEX, join};
use crate::random::Random;

/// Changes `folder` once to three times; says how.
pub(crate) fn mutate(folder: &mut Folder, random: &mut Random) -> String {
    let count = [1, 1, 1, 2, 3][random.below(5)];
    let changes: Vec<String> = (0..count).map(|_| once(folder, random)).collect();
    changes.join("; ")
}

fn once(folder: &mut Folder, random: &mut Random) -> String {
    let weights: Vec<String> =
        folder.keys().filter(|name| name.ends_with(".safetensors")).cloned().collect();
    let has_index = folder.contains_key(INDEX);
    if folder.is_empty() {
        return "nothing left".to_owned();
    }
    match random.below(20) {
        0..10 if !weights.is_empty() => {
            let name = random.pick(&weights).clone();
            let change = entry(folder, &name, random, header);
            format!("{name}: {change}")
        }
        10..13 if !weights.is_empty() => {
            let name = random.pick(&weights).clone();
            let change = entry(folder, &name, random, bytes);
            format!("{name}: {change}")
        }
        13..16 if has_index => format!("{INDEX}: {}", entry(folder, INDEX, random, index)),
        13..18 => format!("{CONFIG}: {}", entry(folder, CONFIG, random, config)),
        18 => {
            let names: Vec<String> = folder.keys().cloned().collect();
            let name = random.pick(&names).clone();
            format!("{name}: {}", entry(folder, &name, random, bytes))
        }
        _ => files(folder, random),
    }
}

fn entry(
    folder: &mut Folder,
    name: &str,
    random: &mut Random,
    change: fn(&mut Vec<u8>, &mut Random) -> String,
) -> String {
    match folder.get_mut(name) {
        Some(content) => change(content, random),
        None => "not there".to_owned(),
    }
}

/// Whole files go, or stand in for each other.
fn files(folder: &mut Folder, random: &mut Random) -> String {
    let names: Vec<String> = folder.keys().cloned().collect();
    let (a, b) = (random.pick(&names).clone(), random.pick(&names).clone());
    match random.below(4) {
        0 => {
            folder.remove(&a);
            format!("{a} removed")
        }
        1 => {
            let content = folder.get(&b).cloned().unwrap_or_default();
            folder.insert(a.clone(), content);
            format!("{a} replaced by {b}")
        }
        2 => {
            folder.insert(a.clone(), Vec::new());
            format!("{a} emptied")
        }
        _ => {
            let content = folder.get(&a).cloned().unwrap_or_default();
            folder.insert("c.safetensors".to_owned(), content);
            // Else nobody looks at it.
            if let Some(text) = folder.get_mut(INDEX) {
                let listed =
                    String::from_utf8_lossy(text).replacen("b.safetensors", "c.safetensors", 1);
                *text = listed.into_bytes();
            }
            format!("{a} copied to c.safetensors")
        }
    }
}

/// Changes that know nothing of the format, most of them near the start.
fn bytes(content: &mut Vec<u8>, random: &mut Random) -> String {
    if content.is_empty() {
        content.push(random.next() as u8);
        return "one byte".to_owned();
    }
    let end = *random.pick(&[8, 64, 1024, usize::MAX]);
    let at = random.below(content.len().min(end));
    match random.below(7) {
        0 => {
            content[at] ^= 1 << random.below(8);
            format!("a bit of byte {at}")
        }
        1 => {
            content[at] = *random.pick(&[0, 0xFF, 0x80, b'"', b'{', b'[', b'0', b'\\']);
            format!("byte {at}")
        }
        2 => {
            content.truncate(at);
            format!("cut at {at}")
        }
        3 => {
            let more = random.below(100);
            content.extend((0..more).map(|i| i as u8));
            format!("{more} bytes more")
        }
        4 => {
            let to = (at + random.below(64)).min(content.len());
            content.drain(at..to);
            format!("bytes {at}..{to} removed")
        }
        5 => {
            let to = (at + random.below(64)).min(content.len());
            let copy = content[at..to].to_vec();
            content.splice(at..at, copy);
            format!("bytes {at}..{to} doubled")
        }
        _ => {
            let length = content.len() as u64;
            let lengths = [0, 1, 2, length - 1, length, 100_000_000, 100_000_001, 1 << 31];
            let more = [1 << 32, 1 << 63, u64::MAX, u64::MAX - 7, length.wrapping_sub(8)];
            let value = *random.pick(&[&lengths[..], &more[..]].concat());
            let count = content.len().min(8);
            content[..count].copy_from_slice(&value.to_le_bytes()[..count]);
            format!("length {value}")
        }
    }
}

/// Numbers at the borders of types and formats.
fn number(random: &mut Random) -> Value {
    let whole = [0_i64, 1, 2, 3, 5, 7, 8, 16, 31, 32, 33, 48, 64, 100, 128, 255, 256, 1000];
    let large = [65_535_i64, 1 << 20, 1 << 24, (1 << 24) + 1, (1 << 31) - 1, 1 << 31, 1 << 32];
    match random.below(12) {
        0..5 => json!(random.pick(&whole)),
        5..8 => json!(random.pick(&large)),
        8 => json!(-*random.pick(&[1_i64, 2, 1 << 31, i64::MAX])),
        9 => json!(random.pick(&[u64::MAX, 1 << 63, (1 << 53) + 1, u64::MAX - 15])),
        _ => json!(random.pick(&[0.5, -0.5, 1e-320, 1e-30, 1e30, 1e308, 2.0, 1.5])),
    }
}

fn any(random: &mut Random) -> Value {
    match random.below(12) {
        0 => Value::Null,
        1 => json!(random.below(2) == 0),
        2 => {
            json!(random.pick(&["", "F32", "U8", "BF16", "F4", "yarn", "llama3", "\u{0}", "../x"]))
        }
        3 => json!([]),
        4 => json!({}),
        5 => json!([any(random)]),
        6 => json!({"a": any(random)}),
        7 => json!("x".repeat(1 << random.below(18))),
        8 => json!([number(random), number(random)]),
        _ => number(random),
    }
}

/// A header that is well-formed but lies, or that has what no map type shows: members twice, bytes that are no text.
fn header(content: &mut Vec<u8>, random: &mut Random) -> String {
    let Some((mut members, data)) = split(content) else { return bytes(content, random) };
    if members.is_empty() {
        return bytes(content, random);
    }
    let at = random.below(members.len());
    let name = members[at].0.clone();
    let change = match random.below(16) {
        0 => {
            members.remove(at);
            "removed".to_owned()
        }
        1 => {
            members[at].0 = random.pick(&members.clone()).0.clone();
            format!("renamed to {}", members[at].0)
        }
        2 => {
            let long = "n".repeat(1 << random.below(20));
            let names = ["", "a", "__metadata__", "model.layers.9.mlp.up_proj.weight", &long];
            (*random.pick(&names)).clone_into(&mut members[at].0);
            "renamed".to_owned()
        }
        3 => {
            let (mut twin, place) = (members[at].clone(), random.below(members.len()));
            if random.below(2) == 0 {
                twin.1 = any(random);
            }
            members.insert(place, twin);
            "twice".to_owned()
        }
        4 => member(&mut members[at].1, "dtype", any(random)),
        5 => {
            let names =
                ["F32", "F16", "BF16", "U32", "I32", "U8", "I8", "U64", "BOOL", "F64", "f32"];
            member(&mut members[at].1, "dtype", json!(random.pick(&names)))
        }
        6 => {
            let shape: Vec<Value> = (0..random.below(6)).map(|_| number(random)).collect();
            member(&mut members[at].1, "shape", json!(shape))
        }
        7 | 8 => {
            let mut shape = members[at].1["shape"].as_array().cloned().unwrap_or_default();
            shape_change(&mut shape, random);
            member(&mut members[at].1, "shape", json!(shape))
        }
        9 => member(&mut members[at].1, "shape", any(random)),
        10 => {
            let offsets = json!([number(random), number(random)]);
            member(&mut members[at].1, "data_offsets", offsets)
        }
        11 => {
            let other = random.pick(&members.clone()).1["data_offsets"].clone();
            member(&mut members[at].1, "data_offsets", other)
        }
        12 => {
            let by = *random.pick(&[1_u64, 4, 64, 1 << 40]);
            let shifted = |i: usize| members[at].1["data_offsets"][i].as_u64().unwrap_or(0) + by;
            let offsets = json!([shifted(0), shifted(1)]);
            member(&mut members[at].1, "data_offsets", offsets)
        }
        13 => member(&mut members[at].1, "data_offsets", any(random)),
        14 => {
            members[at].1 = any(random);
            "any value".to_owned()
        }
        _ => return raw(content, &members, &data, random),
    };
    *content = join(render(&members).as_bytes(), &data);
    format!("tensor '{name:.60}': {change}")
}

fn shape_change(shape: &mut Vec<Value>, random: &mut Random) {
    match random.below(4) {
        0 => drop(shape.pop()),
        1 => shape.push(json!(1)),
        2 => shape.reverse(),
        _ => {
            let at = random.below(shape.len());
            if let Some(size) = shape.get_mut(at) {
                *size = number(random);
            }
        }
    }
}

fn member(entry: &mut Value, field: &str, value: Value) -> String {
    let text = value.to_string();
    match entry.as_object_mut() {
        Some(object) => drop(object.insert(field.to_owned(), value)),
        None => *entry = json!({field: value}),
    }
    format!("{field} {text:.60}")
}

/// Headers that are no JSON objects of tensors at all.
fn raw(content: &mut Vec<u8>, members: &[Member], data: &[u8], random: &mut Random) -> String {
    let text = render(members);
    let (what, header) = match random.below(5) {
        0 => (
            "nested arrays",
            [text.trim_end_matches('}'), ",\"a\":", &"[".repeat(200_000)].concat(),
        ),
        1 => (
            "nested metadata",
            format!("{{\"__metadata__\":{}1{}}}", "[".repeat(500), "]".repeat(500)),
        ),
        2 => ("spaces", format!("{text}{}", " ".repeat(random.below(5000)))),
        3 => ("two headers", format!("{text}{text}")),
        _ => {
            let mut header = text.into_bytes();
            for _ in 0..1 + random.below(4) {
                let at = random.below(header.len());
                header[at] = 0x80 | random.next() as u8;
            }
            *content = join(&header, data);
            return "no text".to_owned();
        }
    };
    *content = join(header.as_bytes(), data);
    what.to_owned()
}

/// Name and entry of a header's tensor.
type Member = (String, Value);

/// Header members in order, and the data.
fn split(content: &[u8]) -> Option<(Vec<Member>, Vec<u8>)> {
    let length = u64::from_le_bytes(content.get(..8)?.try_into().ok()?);
    let end = usize::try_from(length).ok()?.checked_add(8)?;
    let members: Map<String, Value> = serde_json::from_slice(content.get(8..end)?).ok()?;
    Some((members.into_iter().collect(), content[end..].to_vec()))
}

fn render(members: &[Member]) -> String {
    let members: Vec<String> =
        members.iter().map(|(name, value)| format!("{}:{value}", json!(name))).collect();
    format!("{{{}}}", members.join(","))
}

fn index(content: &mut Vec<u8>, random: &mut Random) -> String {
    let Ok(mut index) = serde_json::from_slice::<Value>(content) else {
        return bytes(content, random);
    };
    let Some(map) = index.get_mut("weight_map").and_then(Value::as_object_mut) else {
        return bytes(content, random);
    };
    let names: Vec<String> = map.keys().cloned().collect();
    let name = if names.is_empty() { String::new() } else { random.pick(&names).clone() };
    let change = match random.below(8) {
        0 => {
            let files = [
                "a.safetensors",
                "b.safetensors",
                "c.safetensors",
                "../a.safetensors",
                "/",
                "",
                ".",
                "..",
                "config.json",
                INDEX,
                "a.safetensors/",
                "\u{0}",
                "/etc/passwd",
            ];
            let file = *random.pick(&files);
            map.insert(name.clone(), json!(file));
            format!("'{name}' in '{file}'")
        }
        1 => {
            map.insert(name.clone(), any(random));
            format!("'{name}' in no file")
        }
        2 => {
            map.remove(&name);
            format!("'{name}' not listed")
        }
        3 => {
            map.insert("model.layers.9.x".to_owned(), json!("a.safetensors"));
            "one more".to_owned()
        }
        4 => {
            map.clear();
            "nothing listed".to_owned()
        }
        5 => {
            index["weight_map"] = any(random);
            "any map".to_owned()
        }
        6 => {
            for file in map.values_mut() {
                *file = json!("b.safetensors");
            }
            "all in one file".to_owned()
        }
        _ => {
            index = any(random);
            "any index".to_owned()
        }
    };
    *content = index.to_string().into_bytes();
    change
}

fn config(content: &mut Vec<u8>, random: &mut Random) -> String {
    let Ok(mut config) = serde_json::from_slice::<Value>(content) else {
        return bytes(content, random);
    };
    let more = [
        "head_dim",
        "rope_scaling",
        "rope_parameters",
        "quantization",
        "attention_bias",
        "quantization_config",
        "layer_types",
        "num_local_experts",
        "q_lora_rank",
        "mlp_only_layers",
        "moe_layer_freq",
        "num_nextn_predict_layers",
        "rope_traditional",
        "n_shared_experts",
    ];
    let Some(object) = config.as_object_mut() else { return bytes(content, random) };
    let keys: Vec<String> =
        object.keys().cloned().chain(more.iter().map(|key| (*key).to_owned())).collect();
    let key = random.pick(&keys).clone();
    let change = match random.below(8) {
        0 => {
            object.remove(&key);
            "removed".to_owned()
        }
        1 => {
            let types = ["llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe", "kimi_k2"];
            object.insert("model_type".to_owned(), json!(random.pick(&types)));
            "another type".to_owned()
        }
        2 | 3 => {
            let value = any(random);
            let text = value.to_string();
            object.insert(key.clone(), value);
            format!("{text:.60}")
        }
        4 => {
            // Within an object, as of rope_scaling and quantization.
            let value = number(random);
            let inner = object.get_mut(&key).and_then(Value::as_object_mut);
            let Some(inner) = inner else { return bytes(content, random) };
            let keys: Vec<String> = inner.keys().cloned().collect();
            let inner_key =
                if keys.is_empty() { "factor".to_owned() } else { random.pick(&keys).clone() };
            let text = format!("{inner_key} {value}");
            inner.insert(inner_key, value);
            text
        }
        _ => {
            let value = number(random);
            let text = value.to_string();
            object.insert(key.clone(), value);
            text
        }
    };
    *content = config.to_string().into_bytes();
    format!("{key} {change}")
}
