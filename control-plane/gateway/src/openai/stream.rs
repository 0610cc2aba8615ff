//! Writes a chat answer as OpenAI clients read it: server-sent `chat.completion.chunk` events, or
//! one `chat.completion` object.

use serde_json::{Value, json};

use super::{
    chat::{Logprobs, Piece, Usage},
    tools::ToolCall,
};
use crate::error::ApiError;

/// What every chunk of an answer repeats.
#[derive(Clone, Debug)]
pub(crate) struct AnswerHead {
    /// `chatcmpl-…`.
    pub(crate) id: String,
    /// Seconds since 1970.
    pub(crate) created: i64,
    /// As the request named it.
    pub(crate) model: String,
}

/// Writes pieces as server-sent events.
#[derive(Debug)]
pub(crate) struct ChunkWriter {
    head: AnswerHead,
    include_usage: bool,
}

/// Sent while a stream rests, so that proxies keep it open; readers skip comments.
pub(crate) const KEEP_ALIVE: &str = ": keep-alive\n\n";
const DONE: &str = "data: [DONE]\n\n";

impl ChunkWriter {
    pub(crate) fn new(head: AnswerHead, include_usage: bool) -> Self {
        Self { head, include_usage }
    }

    /// The events of one piece. `[DONE]` follows a finished answer only: after an error it would
    /// make the answer look complete.
    pub(crate) fn write(&self, piece: Piece) -> String {
        match piece {
            Piece::Begin => self.delta(&json!({"role": "assistant", "content": ""}), None),
            Piece::Text { text, logprobs } => {
                self.delta(&json!({"content": text}), logprobs.as_ref())
            }
            Piece::ToolCall { index, call } => {
                let mut call = tool_call(&self.head.id, index, &call);
                call["index"] = index.into();
                self.delta(&json!({"tool_calls": [call]}), None)
            }
            Piece::Finish { reason, usage } => {
                let mut text = self.chunk(&json!([choice(&json!({}), None, Some(reason))]), None);
                if self.include_usage {
                    text += &self.chunk(&json!([]), Some(usage));
                }
                text + DONE
            }
            Piece::Failed(error) => event(&error.body()),
        }
    }

    fn delta(&self, delta: &Value, logprobs: Option<&Logprobs>) -> String {
        self.chunk(&json!([choice(delta, logprobs, None)]), None)
    }

    fn chunk(&self, choices: &Value, usage: Option<Usage>) -> String {
        let mut chunk = json!({
            "id": self.head.id,
            "object": "chat.completion.chunk",
            "created": self.head.created,
            "model": self.head.model,
            "choices": choices,
        });
        if self.include_usage {
            chunk["usage"] = usage.map_or(Value::Null, Usage::json);
        }
        event(&chunk)
    }
}

fn choice(delta: &Value, logprobs: Option<&Logprobs>, finish_reason: Option<&str>) -> Value {
    let logprobs = logprobs.map(|logprobs| json!({"content": [logprobs.json()]}));
    json!({"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason})
}

fn event(data: &Value) -> String {
    format!("data: {data}\n\n")
}

/// The id is the answer's own plus the position, so that it is unique without a draw.
fn tool_call(answer_id: &str, index: usize, call: &ToolCall) -> Value {
    let unique = answer_id.trim_start_matches("chatcmpl-");
    json!({
        "id": format!("call_{unique}_{index}"),
        "type": "function",
        "function": {"name": call.name, "arguments": call.arguments},
    })
}

/// Collects pieces into one object.
#[derive(Debug)]
pub(crate) struct Completion {
    head: AnswerHead,
    text: String,
    calls: Vec<Value>,
    logprobs: Vec<Value>,
    with_logprobs: bool,
}

impl Completion {
    pub(crate) fn new(head: AnswerHead) -> Self {
        Self {
            head,
            text: String::new(),
            calls: Vec::new(),
            logprobs: Vec::new(),
            with_logprobs: false,
        }
    }

    /// Takes a piece; the last one gives the result.
    pub(crate) fn push(&mut self, piece: Piece) -> Option<Result<Value, ApiError>> {
        match piece {
            Piece::Begin => None,
            Piece::Text { text, logprobs } => {
                self.text += &text;
                if let Some(logprobs) = logprobs {
                    self.with_logprobs = true;
                    self.logprobs.push(logprobs.json());
                }
                None
            }
            Piece::ToolCall { index, call } => {
                self.calls.push(tool_call(&self.head.id, index, &call));
                None
            }
            Piece::Finish { reason, usage } => Some(Ok(self.object(reason, usage))),
            Piece::Failed(error) => Some(Err(error)),
        }
    }

    fn object(&mut self, reason: &str, usage: Usage) -> Value {
        let text = std::mem::take(&mut self.text);
        let calls = std::mem::take(&mut self.calls);
        let content = (calls.is_empty() || !text.is_empty()).then_some(text);
        let mut message = json!({"role": "assistant", "content": content, "refusal": null});
        if !calls.is_empty() {
            message["tool_calls"] = calls.into();
        }
        let logprobs =
            self.with_logprobs.then(|| json!({"content": std::mem::take(&mut self.logprobs)}));
        json!({
            "id": self.head.id,
            "object": "chat.completion",
            "created": self.head.created,
            "model": self.head.model,
            "choices": [{
                "index": 0,
                "message": message,
                "logprobs": logprobs,
                "finish_reason": reason,
            }],
            "usage": usage.json(),
        })
    }
}

#[cfg(test)]
mod tests {
    use exo_crds::generate::{FinishReason, GenerateEvent, TokenLogprobs, TopLogprob};

    use super::*;
    use crate::openai::chat::{
        ChatAnswer,
        tests::{end, start, token},
    };

    fn head() -> AnswerHead {
        AnswerHead { id: "chatcmpl-1".into(), created: 5, model: "m".into() }
    }

    /// The stream of `events`, with what all chunks repeat cut out.
    fn transcript(with_tools: bool, include_usage: bool, events: Vec<GenerateEvent>) -> Vec<Value> {
        let mut answer = ChatAnswer::new(with_tools);
        let writer = ChunkWriter::new(head(), include_usage);
        let text: String = events
            .into_iter()
            .flat_map(|event| answer.push(event))
            .map(|piece| writer.write(piece))
            .collect();
        let lines = text.lines().filter(|line| !line.is_empty());
        lines
            .map(|line| {
                let mut chunk = parsed(line.strip_prefix("data: ").expect("only data lines"));
                if let Some(object) = chunk.as_object_mut().filter(|o| o.contains_key("object")) {
                    assert_eq!(object.remove("id").unwrap(), "chatcmpl-1");
                    assert_eq!(object.remove("object").unwrap(), "chat.completion.chunk");
                    assert_eq!(object.remove("created").unwrap(), 5);
                    assert_eq!(object.remove("model").unwrap(), "m");
                }
                chunk
            })
            .collect()
    }

    /// `[DONE]` is no JSON and stands for itself.
    fn parsed(line: &str) -> Value {
        serde_json::from_str(line).unwrap_or_else(|_| line.into())
    }

    fn all_parsed(lines: &str) -> Vec<Value> {
        lines.trim().lines().map(parsed).collect()
    }

    #[test]
    fn streams_text() {
        let events = vec![
            start(3),
            token(1, "Hel"),
            token(2, ""),
            token(3, "lo"),
            end(FinishReason::Length, "!"),
        ];
        let expect = r#"
{"choices":[{"delta":{"content":"","role":"assistant"},"finish_reason":null,"index":0,"logprobs":null}]}
{"choices":[{"delta":{"content":"Hel"},"finish_reason":null,"index":0,"logprobs":null}]}
{"choices":[{"delta":{"content":"lo"},"finish_reason":null,"index":0,"logprobs":null}]}
{"choices":[{"delta":{"content":"!"},"finish_reason":null,"index":0,"logprobs":null}]}
{"choices":[{"delta":{},"finish_reason":"length","index":0,"logprobs":null}]}
[DONE]"#;
        assert_eq!(transcript(false, false, events), all_parsed(expect));
    }

    #[test]
    fn streams_tool_calls_and_usage() {
        let events = vec![
            start(3),
            token(1, "<tool_call>{\"name\": \"add\", \"arguments\": {\"x\": 1}}</tool_call>"),
            end(FinishReason::Stop, ""),
        ];
        let expect = r#"
{"choices":[{"delta":{"content":"","role":"assistant"},"finish_reason":null,"index":0,"logprobs":null}],"usage":null}
{"choices":[{"delta":{"tool_calls":[{"function":{"arguments":"{\"x\":1}","name":"add"},"id":"call_1_0","index":0,"type":"function"}]},"finish_reason":null,"index":0,"logprobs":null}],"usage":null}
{"choices":[{"delta":{},"finish_reason":"tool_calls","index":0,"logprobs":null}],"usage":null}
{"choices":[],"usage":{"completion_tokens":1,"prompt_tokens":3,"total_tokens":4}}
[DONE]"#;
        assert_eq!(transcript(true, true, events), all_parsed(expect));
    }

    #[test]
    fn an_error_inside_a_stream_ends_it_without_done() {
        let error = GenerateEvent::Error {
            code: exo_crds::generate::ErrorCode::Unavailable,
            message: "the runner is stopping".into(),
        };
        let text = transcript(false, false, vec![start(3), token(1, "a"), error]);
        assert_eq!(
            *text.last().unwrap(),
            parsed(
                r#"{"error":{"code":"service_unavailable","message":"the runner is stopping","param":null,"type":"server_error"}}"#
            )
        );
    }

    fn with_logprobs() -> GenerateEvent {
        GenerateEvent::Token {
            id: 1,
            text: String::new(),
            logprobs: Some(TokenLogprobs {
                logprob: -0.5,
                text: "é".into(),
                top: vec![TopLogprob { id: 2, text: "e".into(), logprob: -1.5 }],
            }),
        }
    }

    #[test]
    fn log_probabilities_come_with_tokens_that_have_no_text_yet() {
        let text = transcript(false, false, vec![start(3), with_logprobs()]);
        assert_eq!(
            *text.last().unwrap(),
            parsed(
                r#"{"choices":[{"delta":{"content":""},"finish_reason":null,"index":0,"logprobs":{"content":[{"bytes":[195,169],"logprob":-0.5,"token":"é","top_logprobs":[{"bytes":[101],"logprob":-1.5,"token":"e"}]}]}}]}"#
            )
        );
    }

    fn whole(with_tools: bool, events: Vec<GenerateEvent>) -> Result<Value, ApiError> {
        let mut answer = ChatAnswer::new(with_tools);
        let mut completion = Completion::new(head());
        let mut results = events
            .into_iter()
            .flat_map(|event| answer.push(event))
            .filter_map(|piece| completion.push(piece));
        let result = results.next().expect("one result");
        assert_eq!(results.next(), None);
        result
    }

    #[test]
    fn collects_a_whole_answer() {
        let events = vec![start(3), token(9, "Hi"), with_logprobs(), end(FinishReason::Stop, "!")];
        let object = whole(false, events).unwrap();
        assert_eq!(
            object,
            json!({
                "id": "chatcmpl-1", "object": "chat.completion", "created": 5, "model": "m",
                "choices": [{
                    "index": 0, "finish_reason": "stop",
                    "message": {"role": "assistant", "content": "Hi!", "refusal": null},
                    "logprobs": object["choices"][0]["logprobs"],
                }],
                "usage": {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5},
            })
        );
        assert_eq!(object["choices"][0]["logprobs"]["content"][0]["token"], "é");
    }

    #[test]
    fn a_call_alone_has_no_content() {
        let events = vec![
            start(3),
            token(9, "<tool_call>{\"name\": \"a\"}</tool_call>"),
            end(FinishReason::Stop, ""),
        ];
        let message = &whole(true, events).unwrap()["choices"][0]["message"];
        assert_eq!(message["content"], Value::Null);
        assert_eq!(message["tool_calls"][0]["function"]["name"], "a");
    }
}
