//! Readers of YAML 1.1, as Kubernetes' clients are, take some bare words for something else than
//! text: `yes` for true, `12:30` for 750, a date for a date. What is written here by the rules of
//! 1.2 gets quotes around them.
//!
//! Knows only the block style of the writer: one key or item per line, nothing folded. It never
//! changes what a reader of 1.2 finds.

use std::ops::Range;

/// Texts that 1.1 takes for true, false, a key to merge and a default.
const WORDS: [&[&str]; 3] = [
    &["y", "Y", "yes", "Yes", "YES", "on", "On", "ON"],
    &["n", "N", "no", "No", "NO", "off", "Off", "OFF"],
    &["<<", "="],
];

/// Puts in quotes what is text in 1.2 only.
pub(super) fn quote(text: String) -> String {
    let words = misread(&text);
    if words.is_empty() {
        return text;
    }
    let mut quoted = String::with_capacity(text.len() + 2 * words.len());
    let mut written = 0;
    for word in words {
        quoted.push_str(&text[written..word.start]);
        quoted.push('\'');
        quoted.push_str(&text[word.clone()]);
        quoted.push('\'');
        written = word.end;
    }
    quoted.push_str(&text[written..]);
    quoted
}

/// What of the text does not end with its line.
enum Open {
    Nothing,
    /// A text of several lines, with the least that each of them is indented.
    Block(usize),
    /// A text in these quotes.
    Quotes(u8),
}

/// Where the bare words are that 1.1 doesn't take for text.
fn misread(text: &str) -> Vec<Range<usize>> {
    let mut words = Vec::new();
    let mut open = Open::Nothing;
    let mut next = 0;
    for line in text.split_inclusive('\n') {
        let begin = next;
        next += line.len();
        let line = line.strip_suffix('\n').unwrap_or(line);
        let indent = line.bytes().take_while(|b| *b == b' ').count();
        match open {
            Open::Block(least) if line.is_empty() || indent >= least => continue,
            Open::Quotes(mark) => {
                if closing_quote(line, mark).is_some() {
                    open = Open::Nothing;
                }
                continue;
            }
            Open::Block(_) | Open::Nothing => {}
        }
        let mut column = indent;
        let mut least = 0;
        while [b"- ", b"? ", b": "].iter().any(|mark| line.as_bytes()[column..].starts_with(*mark))
        {
            least = column + 1;
            column += 2;
        }
        let mut word = |word: Range<usize>| {
            if is_misread(&line[word.clone()]) {
                words.push(begin + word.start..begin + word.end);
            }
        };
        if let Some(length) = key_length(&line[column..]) {
            word(column..column + length);
            least = column + 1;
            column = line.len().min(column + length + 2);
        }
        word(column..line.len());
        open = match line.as_bytes()[column..] {
            [b'|' | b'>', ..] => Open::Block(least),
            [mark @ (b'\'' | b'"'), ..] if closing_quote(&line[column + 1..], mark).is_none() => {
                Open::Quotes(mark)
            }
            _ => Open::Nothing,
        };
    }
    words
}

/// Bytes of the key that a line begins with, its quotes included.
fn key_length(node: &str) -> Option<usize> {
    match node.bytes().next()? {
        mark @ (b'\'' | b'"') => {
            let length = closing_quote(&node[1..], mark)? + 2;
            let rest = &node[length..];
            (rest == ":" || rest.starts_with(": ")).then_some(length)
        }
        b'[' | b'{' | b'|' | b'>' => None,
        _ => node.find(": ").or_else(|| Some(node.strip_suffix(':')?.len())),
    }
}

/// Where a quoted text ends, of which the opening mark is left out.
fn closing_quote(text: &str, mark: u8) -> Option<usize> {
    let bytes = text.as_bytes();
    let mut at = 0;
    loop {
        match *bytes.get(at)? {
            b'\\' if mark == b'"' => at += 2,
            b'\'' if mark == b'\'' && bytes.get(at + 1) == Some(&b'\'') => at += 2,
            found if found == mark => return Some(at),
            _ => at += 1,
        }
    }
}

/// Whether 1.1 takes a bare word, which is text in 1.2, for anything else.
fn is_misread(word: &str) -> bool {
    WORDS.iter().any(|words| words.contains(&word)) || is_number(word) || is_time(word)
}

/// Numbers as 1.1 and Go write them: digits in groups, other radices, minutes and seconds.
fn is_number(word: &str) -> bool {
    // A text that begins with `_` is none, one that has a sign before it is to Go.
    let digits = match word.strip_prefix(['+', '-']) {
        Some(digits) => digits.trim_start_matches('_'),
        None => word,
    };
    if !digits.starts_with(|c: char| c.is_ascii_digit() || c == '.') || is_plain_number(word) {
        return false;
    }
    let digits = digits.replace('_', "").to_ascii_lowercase();
    let of_radix = [("0x", 16), ("0o", 8), ("0b", 2)].into_iter().any(|(prefix, radix)| {
        digits.strip_prefix(prefix).is_some_and(|rest| rest.chars().all(|c| c.is_digit(radix)))
    });
    of_radix || is_decimal(&digits) || is_sexagesimal(&digits)
}

/// What the writer means as a number: it quotes such a text by itself.
fn is_plain_number(word: &str) -> bool {
    serde_json::from_str::<serde_json::Number>(word).is_ok()
}

fn is_decimal(digits: &str) -> bool {
    let (mantissa, exponent) = digits.split_once('e').unwrap_or((digits, "0"));
    let exponent = exponent.strip_prefix(['+', '-']).unwrap_or(exponent);
    let (whole, part) = mantissa.split_once('.').unwrap_or((mantissa, ""));
    let are_digits = |text: &str| text.bytes().all(|b| b.is_ascii_digit());
    are_digits(whole)
        && are_digits(part)
        && are_digits(exponent)
        && !(whole.is_empty() && part.is_empty())
        && !exponent.is_empty()
}

/// To the base of 60: `12:30`, `1:02:03.5`.
fn is_sexagesimal(digits: &str) -> bool {
    let (digits, part) = digits.split_once('.').unwrap_or((digits, ""));
    let mut places = digits.split(':');
    let first = places.next().unwrap_or_default();
    let are_digits = |text: &str| text.bytes().all(|b| b.is_ascii_digit());
    let is_below_60 = |place: &str| match place.as_bytes() {
        [one] => one.is_ascii_digit(),
        [tens, one] => matches!(tens, b'0'..=b'5') && one.is_ascii_digit(),
        _ => false,
    };
    digits.contains(':')
        && !first.is_empty()
        && are_digits(first)
        && are_digits(part)
        && places.all(is_below_60)
}

/// A date, or one with a time behind it.
fn is_time(word: &str) -> bool {
    let mut rest = word;
    for (place, most) in [4, 2, 2].into_iter().enumerate() {
        if place > 0 {
            let Some(behind) = rest.strip_prefix('-') else {
                return false;
            };
            rest = behind;
        }
        let digits = rest.bytes().take(most).take_while(u8::is_ascii_digit).count();
        if digits == 0 || (place == 0 && digits < most) {
            return false;
        }
        rest = &rest[digits..];
    }
    let time = rest.trim_start_matches(['T', 't', ' ', '\t']);
    rest.is_empty() || (time.len() < rest.len() && time.starts_with(|c: char| c.is_ascii_digit()))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use crate::yaml;

    /// What YAML 1.1 (its types bool, int, float, timestamp, merge, value) or Go's reader take for
    /// something else.
    const QUOTED: &str = "y Y n N yes Yes YES no No NO on On ON off Off OFF = << 12:30 -1:00 \
        +190:20:30 08:59:07.5 1_000 -1_0 +_1 0b1_0 0x_ff 0XFF 0B11 0O17 0o1_7 1_0.5 1_0e3 .5_0 0_7 \
        1_ 2026-11-23 2026-1-2 2026-11-23T09:20:00Z";

    /// What is text to all readers.
    const BARE: &str = "yEs yes! yes|no nO onto == < 1.2.3 127.0.0.1 127.0.0.1:8080 12:60 12:345 \
        12:3a 1:x 48Gi _1 3f2a-11 0b12 0xfg 1e . 2026-11 2026-11-23x 26-11-23";

    #[test]
    fn what_older_readers_take_for_something_else_is_quoted() {
        for word in QUOTED.split_whitespace().chain(["2026-11-23 9:20:00.5 +1"]) {
            let object = json!({"k": word, "list": [word, [word]], "map": [{"a": 1, word: word}]});
            let expect = format!("k: '{word}'\nlist:\n- '{word}'\n- - '{word}'\nmap:\n- ");
            let text = yaml::to_string(&object).unwrap();
            let rest = text.strip_prefix(&expect).unwrap_or_else(|| panic!("{word}: {text}"));
            assert!(rest.contains(&format!("'{word}': '{word}'\n")), "{word}: {text}");
            assert_eq!(yaml::documents(&text).unwrap(), [object]);
            assert_eq!(yaml::to_string(&json!(word)).unwrap(), format!("'{word}'\n"));
        }
    }

    #[test]
    fn nothing_else_is_quoted() {
        for word in BARE.split_whitespace() {
            let text = yaml::to_string(&json!([word])).unwrap();
            assert_eq!(text, format!("- {word}\n"));
        }
        let values = json!({"a": true, "b": -1, "c": 1.5, "d": null, "e": 1e300, "f": [], "g": {}});
        let expect = "a: true\nb: -1\nc: 1.5\nd: null\ne: 1e300\nf: []\ng: {}\n";
        assert_eq!(yaml::to_string(&values).unwrap(), expect);
    }

    #[test]
    fn texts_that_hold_such_words_stay_as_they_are() {
        let lines = "yes: no\n- on\n\n  12:30\n";
        let long = "x".repeat(200);
        for text in [
            lines.to_owned(),
            format!("\n{lines}"),
            format!("  {lines}no"),
            format!("{lines}\n\n"),
            "yes\r\nno\r\n".to_owned(),
            "a\ryes: no\rb".to_owned(),
            "a\u{2028}yes: no\u{2029}no\u{85}on".to_owned(),
            "it's: 'no'\n".to_owned(),
            "'yes': \"no\"".to_owned(),
            "\"no\\\": yes".to_owned(),
            "\u{7}yes: no".to_owned(),
            " yes: no".to_owned(),
            "| no".to_owned(),
            "# no".to_owned(),
            format!("{long}: no"),
            long,
        ] {
            for value in [
                json!(text),
                json!([text, "no"]),
                json!({"k": text, "no": text, "z": {"no": "no"}}),
                json!([{"k": text, "no": "no"}, [text, [text, "no"], "no"]]),
                json!({(text.as_str()): "no", "a": {(text.as_str()): {(text.as_str()): ["no"]}}}),
            ] {
                let written = yaml::to_string(&value).unwrap();
                assert!(!written.contains(" no\n") || text.contains(" no"), "{written}");
                assert_eq!(yaml::documents(&written).unwrap(), [value], "{written}");
            }
        }
        let object = json!({"k": "yes\nno", "l": "no"});
        assert_eq!(yaml::to_string(&object).unwrap(), "k: |-\n  yes\n  no\nl: 'no'\n");
    }
}
