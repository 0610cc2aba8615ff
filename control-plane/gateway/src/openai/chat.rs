//! What a chat answer consists of: turns a runner's events into the pieces that clients see.
//!
//! One state machine for streams and whole answers. However events come, the pieces are one
//! `Begin`, then text and tool calls, then exactly one `Finish` or `Failed`, then nothing.

use exo_crds::generate::{FinishReason, GenerateEvent, TokenLogprobs};
use serde_json::{Value, json};

use super::tools::{Found, ToolCall, ToolCallScanner};
use crate::error::ApiError;

/// A part of an answer.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Piece {
    Begin,
    /// Empty text comes only with log probabilities.
    Text {
        text: String,
        logprobs: Option<Logprobs>,
    },
    ToolCall {
        index: usize,
        call: ToolCall,
    },
    Finish {
        reason: &'static str,
        usage: Usage,
    },
    Failed(ApiError),
}

/// Log probabilities of one token.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Logprobs(TokenLogprobs);

/// Tokens of a request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Usage {
    pub(crate) prompt_tokens: u32,
    pub(crate) completion_tokens: u32,
}

impl Usage {
    pub(crate) fn json(self) -> Value {
        json!({
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": u64::from(self.prompt_tokens) + u64::from(self.completion_tokens),
        })
    }
}

impl Logprobs {
    /// One entry of `choices[].logprobs.content`.
    pub(crate) fn json(&self) -> Value {
        let entry = |text: &str, logprob: f32| json!({"token": text, "logprob": logprob, "bytes": text.as_bytes()});
        let mut token = entry(&self.0.text, self.0.logprob);
        token["top_logprobs"] =
            self.0.top.iter().map(|top| entry(&top.text, top.logprob)).collect();
        token
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Fresh,
    Running,
    Over,
}

/// The machine; one per answer.
#[derive(Debug)]
pub(crate) struct ChatAnswer {
    state: State,
    usage: Usage,
    /// Absent when the request brought no tools: then tags are text like any other.
    scanner: Option<ToolCallScanner>,
}

impl ChatAnswer {
    pub(crate) fn new(with_tools: bool) -> Self {
        Self {
            state: State::Fresh,
            usage: Usage::default(),
            scanner: with_tools.then(ToolCallScanner::default),
        }
    }

    /// Takes the next event.
    pub(crate) fn push(&mut self, event: GenerateEvent) -> Vec<Piece> {
        let mut pieces = Vec::new();
        match event {
            GenerateEvent::Start { prompt_tokens } => {
                self.usage.prompt_tokens = prompt_tokens;
                self.begin(&mut pieces);
            }
            GenerateEvent::Token { text, logprobs, .. } => {
                self.begin(&mut pieces);
                if self.state == State::Running {
                    self.usage.completion_tokens += 1;
                    self.text(text, logprobs.map(Logprobs), &mut pieces);
                }
            }
            GenerateEvent::End { finish_reason, text, completion_tokens, .. } => {
                self.begin(&mut pieces);
                if self.state == State::Running {
                    self.usage.completion_tokens =
                        self.usage.completion_tokens.max(completion_tokens);
                    self.text(text, None, &mut pieces);
                    self.finish(finish_reason, &mut pieces);
                }
            }
            GenerateEvent::Error { code, message } => {
                return self.fail(ApiError::from_runner(code, message));
            }
        }
        pieces
    }

    /// The answer can't go on.
    pub(crate) fn fail(&mut self, error: ApiError) -> Vec<Piece> {
        if std::mem::replace(&mut self.state, State::Over) == State::Over {
            Vec::new()
        } else {
            vec![Piece::Failed(error)]
        }
    }

    pub(crate) fn is_over(&self) -> bool {
        self.state == State::Over
    }

    fn begin(&mut self, pieces: &mut Vec<Piece>) {
        if self.state == State::Fresh {
            self.state = State::Running;
            pieces.push(Piece::Begin);
        }
    }

    fn text(&mut self, text: String, logprobs: Option<Logprobs>, pieces: &mut Vec<Piece>) {
        let Some(scanner) = &mut self.scanner else {
            if !text.is_empty() || logprobs.is_some() {
                pieces.push(Piece::Text { text, logprobs });
            }
            return;
        };
        let first_call = scanner.calls();
        let found = scanner.push(&text);
        push_found(found, first_call, logprobs, pieces);
    }

    fn finish(&mut self, reason: FinishReason, pieces: &mut Vec<Piece>) {
        let mut called = false;
        if let Some(scanner) = &mut self.scanner {
            let first_call = scanner.calls();
            let found = scanner.finish();
            called = scanner.calls() > 0;
            push_found(found, first_call, None, pieces);
        }
        let reason = match reason {
            FinishReason::Stop if called => "tool_calls",
            FinishReason::Stop => "stop",
            FinishReason::Length => "length",
        };
        self.state = State::Over;
        pieces.push(Piece::Finish { reason, usage: self.usage });
    }
}

/// The log probabilities go with the first text, or with an empty one.
fn push_found(
    found: Vec<Found>,
    first_call: usize,
    mut logprobs: Option<Logprobs>,
    pieces: &mut Vec<Piece>,
) {
    let mut index = first_call;
    for found in found {
        match found {
            Found::Text(text) => pieces.push(Piece::Text { text, logprobs: logprobs.take() }),
            Found::Call(call) => {
                pieces.push(Piece::ToolCall { index, call });
                index += 1;
            }
        }
    }
    if logprobs.is_some() {
        pieces.push(Piece::Text { text: String::new(), logprobs });
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use exo_crds::generate::ErrorCode;

    use super::*;

    pub(crate) fn start(prompt_tokens: u32) -> GenerateEvent {
        GenerateEvent::Start { prompt_tokens }
    }

    pub(crate) fn token(id: u32, text: &str) -> GenerateEvent {
        GenerateEvent::Token { id, text: text.to_owned(), logprobs: None }
    }

    pub(crate) fn end(finish_reason: FinishReason, text: &str) -> GenerateEvent {
        GenerateEvent::End {
            finish_reason,
            text: text.to_owned(),
            completion_tokens: 0,
            time_to_first_token_s: 0.0,
            decode_tokens_per_s: 0.0,
        }
    }

    fn run(with_tools: bool, events: Vec<GenerateEvent>) -> Vec<Piece> {
        let mut answer = ChatAnswer::new(with_tools);
        events.into_iter().flat_map(|e| answer.push(e)).collect()
    }

    fn text(text: &str) -> Piece {
        Piece::Text { text: text.to_owned(), logprobs: None }
    }

    fn finish(reason: &'static str, prompt_tokens: u32, completion_tokens: u32) -> Piece {
        Piece::Finish { reason, usage: Usage { prompt_tokens, completion_tokens } }
    }

    #[test]
    fn an_answer_has_one_beginning_and_one_end() {
        let events = vec![
            start(4),
            token(1, "a"),
            token(2, ""),
            start(4),
            end(FinishReason::Stop, "b"),
            token(3, "late"),
            end(FinishReason::Length, "late"),
            GenerateEvent::Error { code: ErrorCode::Unavailable, message: "late".into() },
        ];
        assert_eq!(run(false, events), [Piece::Begin, text("a"), text("b"), finish("stop", 4, 2)]);
    }

    #[test]
    fn no_token_at_all_is_an_empty_answer() {
        assert_eq!(
            run(true, vec![start(4), end(FinishReason::Stop, "")]),
            [Piece::Begin, finish("stop", 4, 0)]
        );
    }

    #[test]
    fn tags_are_text_without_tools_and_calls_with_them() {
        let events = || {
            vec![
                start(9),
                token(1, "<tool_call>{\"name\": \"a\"}"),
                token(2, "</tool_call>"),
                end(FinishReason::Stop, ""),
            ]
        };
        let pieces = run(true, events());
        assert!(matches!(&pieces[1], Piece::ToolCall { index: 0, call } if call.name == "a"));
        assert_eq!(pieces[2], finish("tool_calls", 9, 2));
        assert_eq!(run(false, events()).len(), 4);
    }

    #[test]
    fn fails_once() {
        let mut answer = ChatAnswer::new(false);
        let error = ApiError::unavailable("gone");
        assert_eq!(answer.fail(error.clone()), [Piece::Failed(error.clone())]);
        assert_eq!(answer.fail(error), []);
        assert!(answer.is_over());
    }
}
