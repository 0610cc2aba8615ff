//! Finds tool calls in the text that a model writes: `<tool_call>{"name": …, "arguments": …}
//! </tool_call>`, the form that Qwen, Hermes and others are trained on.
//!
//! Text is held back only while it may still become part of a call. What turns out not to be one
//! is given back unchanged.

use serde_json::Value;

const OPEN: &str = "<tool_call>";
const CLOSE: &str = "</tool_call>";

/// What a piece of text turned out to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Found {
    Text(String),
    Call(ToolCall),
}

/// A call that the model wants made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ToolCall {
    pub(crate) name: String,
    /// JSON text of an object.
    pub(crate) arguments: String,
}

/// The scanner; one per answer.
#[derive(Debug, Default)]
pub(crate) struct ToolCallScanner {
    held: String,
    in_call: bool,
    /// White space before the call that is being read.
    gap: String,
    /// Nothing but white space came since the last call.
    after_call: bool,
    calls: usize,
    /// Bytes of `held` already searched for the end of the call.
    searched: usize,
}

impl ToolCallScanner {
    /// Takes the next piece of text.
    pub(crate) fn push(&mut self, text: &str) -> Vec<Found> {
        self.held.push_str(text);
        let mut found = Vec::new();
        while self.step(&mut found) {}
        found
    }

    /// The answer is over: what is held back is a call without its end, or text.
    pub(crate) fn finish(&mut self) -> Vec<Found> {
        let held = std::mem::take(&mut self.held);
        let mut found = Vec::new();
        if std::mem::take(&mut self.in_call) {
            self.end_call(&held, "", &mut found);
        } else {
            self.found_text(&held, &mut found);
        }
        found
    }

    /// Calls found so far.
    pub(crate) fn calls(&self) -> usize {
        self.calls
    }

    /// One transition; false when more text is needed.
    fn step(&mut self, found: &mut Vec<Found>) -> bool {
        if self.in_call {
            let Some(at) = self.held[self.searched..].find(CLOSE) else {
                // The end may be split between this piece and the next.
                self.searched = self.held.len().saturating_sub(CLOSE.len());
                while !self.held.is_char_boundary(self.searched) {
                    self.searched -= 1;
                }
                return false;
            };
            let at = self.searched + at;
            let rest = self.held.split_off(at + CLOSE.len());
            let body = std::mem::replace(&mut self.held, rest);
            self.in_call = false;
            self.end_call(&body[..at], CLOSE, found);
            return true;
        }
        if let Some(at) = self.held.find(OPEN) {
            let rest = self.held.split_off(at + OPEN.len());
            let before = std::mem::replace(&mut self.held, rest);
            // Models put a line break between their text and a call: it belongs to neither.
            let text = before[..at].trim_end();
            self.gap = before[text.len()..at].to_owned();
            self.found_text(text, found);
            self.in_call = true;
            self.searched = 0;
            return true;
        }
        let certain = self.held.len() - undecided_suffix(&self.held);
        let rest = self.held.split_off(certain);
        let text = std::mem::replace(&mut self.held, rest);
        self.found_text(&text, found);
        false
    }

    /// `body` is what stands between the tags; `close` is empty when the answer ended first.
    fn end_call(&mut self, body: &str, close: &str, found: &mut Vec<Found>) {
        let gap = std::mem::take(&mut self.gap);
        match read_call(body) {
            Some(call) => {
                self.calls += 1;
                self.after_call = true;
                found.push(Found::Call(call));
            }
            None => self.found_text(&format!("{gap}{OPEN}{body}{close}"), found),
        }
    }

    fn found_text(&mut self, text: &str, found: &mut Vec<Found>) {
        let text = if self.after_call { text.trim_start() } else { text };
        if !text.is_empty() {
            self.after_call = false;
            found.push(Found::Text(text.to_owned()));
        }
    }
}

/// Length of the end of `text` that may belong to a call: white space and a beginning of [`OPEN`].
fn undecided_suffix(text: &str) -> usize {
    let partial = (1..OPEN.len()).rev().find(|&n| text.ends_with(&OPEN[..n])).unwrap_or(0);
    let before = &text[..text.len() - partial];
    text.len() - before.trim_end().len()
}

/// `None` unless `body` is an object with a name and an object (or none) of arguments.
fn read_call(body: &str) -> Option<ToolCall> {
    let call: Value = serde_json::from_str(body.trim()).ok()?;
    let name = call.get("name")?.as_str().filter(|name| !name.is_empty())?;
    let arguments = match call.get("arguments").or_else(|| call.get("parameters")) {
        None | Some(Value::Null) => "{}".to_owned(),
        Some(Value::String(text)) => text.clone(),
        Some(object @ Value::Object(_)) => object.to_string(),
        Some(_) => return None,
    };
    Some(ToolCall { name: name.to_owned(), arguments })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Joins neighbouring texts, so that results don't depend on how the input was cut.
    fn scan(pieces: &[&str]) -> Vec<Found> {
        let mut scanner = ToolCallScanner::default();
        let mut all: Vec<Found> = pieces.iter().flat_map(|p| scanner.push(p)).collect();
        all.extend(scanner.finish());
        let mut joined: Vec<Found> = Vec::new();
        for found in all {
            match (joined.last_mut(), found) {
                (Some(Found::Text(before)), Found::Text(text)) => before.push_str(&text),
                (_, found) => joined.push(found),
            }
        }
        joined
    }

    fn text(text: &str) -> Found {
        Found::Text(text.to_owned())
    }

    fn call(name: &str, arguments: &str) -> Found {
        Found::Call(ToolCall { name: name.to_owned(), arguments: arguments.to_owned() })
    }

    /// The same, however the text is cut.
    fn check(input: &str, expect: &[Found]) {
        assert_eq!(scan(&[input]), expect, "{input:?} in one piece");
        let chars: Vec<String> = input.chars().map(String::from).collect();
        let chars: Vec<&str> = chars.iter().map(String::as_str).collect();
        assert_eq!(scan(&chars), expect, "{input:?} by characters");
        for at in (0..=input.len()).filter(|&at| input.is_char_boundary(at)) {
            let (a, b) = input.split_at(at);
            assert_eq!(scan(&[a, b]), expect, "{input:?} cut at {at}");
        }
    }

    #[test]
    fn finds_calls_however_the_text_is_cut() {
        check("", &[]);
        check("just text \n", &[text("just text \n")]);
        check(
            "<tool_call>\n{\"name\": \"add\", \"arguments\": {\"x\": 1}}\n</tool_call>\n",
            &[call("add", "{\"x\":1}")],
        );
        check(
            "Let me see.\n<tool_call>{\"name\":\"a\"}</tool_call>\n\
             <tool_call>{\"name\":\"b\",\"arguments\":\"{}\"}</tool_call>",
            &[text("Let me see."), call("a", "{}"), call("b", "{}")],
        );
        check(
            "<tool_call>{\"name\":\"é\"}</tool_call> all done",
            &[call("é", "{}"), text("all done")],
        );
    }

    #[test]
    fn gives_back_what_is_no_call() {
        for input in [
            "a < b",
            "<tool_cal",
            "<tool_call",
            "x <tool_calls> y",
            "x \n<tool_call>é</tool_call> y",
            "<tool_call>not json</tool_call>",
            "<tool_call>{\"name\": \"\"}</tool_call>",
            "<tool_call>{\"name\": \"x\", \"arguments\": [1]}</tool_call> tail",
            "<tool_call>{\"name\": \"x\", \"argum",
        ] {
            check(input, &[text(input)]);
        }
    }

    #[test]
    fn a_call_whose_end_is_missing_counts() {
        check("<tool_call>{\"name\": \"x\"}", &[call("x", "{}")]);
    }

    #[test]
    fn text_flows_as_soon_as_it_is_certain() {
        let mut scanner = ToolCallScanner::default();
        assert_eq!(scanner.push("one"), [text("one")]);
        assert_eq!(scanner.push(" <"), []);
        assert_eq!(scanner.push("b>"), [text(" <b>")]);
    }
}
