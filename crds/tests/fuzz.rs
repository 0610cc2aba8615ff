//! No text, however odd, makes the readers of YAML and JSON fail, hang or disagree.
//!
//! How long, and from which seed: see `exo_test_support::fuzz`.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::{
    cell::RefCell,
    collections::BTreeMap,
    time::{Duration, Instant},
};

use exo_crds::{InferenceInstance, Model, document, yaml};
use exo_test_support::fuzz;
use proptest::prelude::*;
use serde_json::Value;

const SAMPLE: &str = include_str!("../../manifests/samples/tiny.yaml");
const DEFINITION: &str = include_str!("../../manifests/crds/shards.yaml");
const JSON: &str = r#"{"apiVersion": "v1", "kind": "List", "items": [
    {"kind": "Model", "spec": {"weights": {"layer": 1.5e3}, "x": [null, true, -0, "\u00e9\n"]}}]}"#;

/// Inputs of an ordinary run.
const INPUTS: u64 = 500;
/// For one text: a debug build on a busy machine takes some seconds for the largest.
const TIME_LIMIT: Duration = Duration::from_secs(60);

/// A good text with some of its characters changed.
fn damaged() -> impl Strategy<Value = String> {
    let texts = prop::sample::select(vec![SAMPLE, DEFINITION, JSON]);
    let edits = prop::collection::vec((any::<prop::sample::Index>(), 0..6_u8, odd_char()), 1..8);
    (texts, edits).prop_map(|(text, edits)| {
        let mut chars: Vec<char> = text.chars().collect();
        for (at, kind, c) in edits {
            let at = at.index(chars.len().max(1));
            match kind {
                0 => chars.truncate(at),
                1 if !chars.is_empty() => {
                    chars.remove(at);
                }
                2 if !chars.is_empty() => chars[at] = c,
                // A line once more.
                3 => {
                    let line: Vec<char> = chars[at..].iter().copied().take(40).collect();
                    chars.splice(at..at, line);
                }
                4 => chars.insert(at, '\n'),
                _ => chars.insert(at, c),
            }
        }
        chars.into_iter().collect()
    })
}

fn odd_char() -> impl Strategy<Value = char> {
    prop_oneof![
        3 => prop::sample::select("-?:,[]{}#&*!|>'\"%@`~ \t\n\r\0\u{85}\u{feff}\u{2028}".chars().collect::<Vec<_>>()),
        1 => any::<char>(),
    ]
}

/// What the syntax consists of, in any order.
fn soup() -> impl Strategy<Value = String> {
    let word = prop::sample::select(vec![
        "- ",
        "a: ",
        "b: ",
        "? ",
        ": ",
        "&x ",
        "*x",
        "*y ",
        "!!str ",
        "!!binary ",
        "!t ",
        "|\n",
        "|2-\n",
        ">-\n",
        ">+\n",
        "[",
        "]",
        "{",
        "}",
        ", ",
        "\"",
        "'",
        "\\x41",
        "\\",
        "#",
        "\n",
        "\n  ",
        "\n    ",
        "---\n",
        "...\n",
        "%YAML 1.2\n",
        "%TAG ! x\n",
        "<<: ",
        "~",
        "0x1F",
        "0o7",
        "1e999",
        "-.inf",
        ".nan",
        "18446744073709551616",
        "-9223372036854775809",
        "1_000",
        "yes",
        "\u{feff}",
        "\0",
        "é",
        "\t",
        "@",
        "`",
        "2026-01-01",
        "kind: Model\n",
        "spec: {}\n",
        "metadata:\n  name: a\n",
    ]);
    let times = prop_oneof![60 => Just(1_usize), 6 => 1..300_usize, 1 => Just(4_000)];
    prop::collection::vec((word, times), 0..30)
        .prop_map(|words| words.into_iter().map(|(word, times)| word.repeat(times)).collect())
}

fn text() -> impl Strategy<Value = String> {
    prop_oneof![
        3 => damaged(),
        3 => soup(),
        1 => "[ -~\n\t&*!|>%@`é]{0,80}",
        1 => ".{0,200}",
    ]
}

/// What became of a text, in a word.
fn check(text: &str) -> Result<&'static str, TestCaseError> {
    let began = Instant::now();
    let read = yaml::documents(text);
    // Types take what they take; they must not fall over the rest.
    let _ = yaml::from_str::<InferenceInstance>(text);
    let _ = yaml::from_str::<Model>(text);
    prop_assert!(began.elapsed() < TIME_LIMIT, "it took {:?}", began.elapsed());
    if let Err(error) = &read {
        prop_assert!(!error.to_string().is_empty());
    }
    let lenient = yaml::lenient_documents(text);
    // What is refused for its duplicates alone is what has some.
    let has_duplicates =
        lenient.as_ref().is_ok_and(|all| all.iter().any(|one| !one.duplicates.is_empty()));
    let is_duplicate = matches!(read, Err(yaml::YamlError::Duplicate { .. }));
    prop_assert_eq!(has_duplicates, is_duplicate);

    let json: Result<Value, _> = serde_json::from_str(text);
    match (document::from_json(text.as_bytes()), json) {
        (Ok(found), Ok(expect)) => prop_assert_eq!(found.value, expect),
        (Err(_), Err(_)) => {}
        (found, expect) => prop_assert!(false, "{:?} and {:?}", found, expect),
    }
    let Ok(values) = read else { return Ok("refused") };
    if values.is_empty() {
        return Ok("nothing");
    }
    // What is read is JSON, and reads the same again.
    for value in values {
        let again = yaml::documents(&yaml::to_string(&value).unwrap());
        prop_assert_eq!(again.unwrap(), [value]);
    }
    Ok("read")
}

#[test]
fn any_text_is_read_or_refused() {
    let outcomes: RefCell<BTreeMap<&str, u64>> = RefCell::default();
    let texts = text();
    let mut seeds = fuzz::Seeds::new(INPUTS);
    for seed in seeds.by_ref() {
        fuzz::check(&texts, seed, |text| {
            *outcomes.borrow_mut().entry(check(&text)?).or_default() += 1;
            Ok(())
        });
    }
    println!("{seeds}: {:?}", outcomes.borrow());
}
