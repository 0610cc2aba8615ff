//! Reads the body of `POST /v1/chat/completions`.
//!
//! Wrong types and values out of range are refused with the field's path. Options that can't be
//! honoured are refused too, rather than silently dropped; fields nobody knows are ignored.

use exo_crds::generate::{GenerateRequest, Prompt, SamplingParams};
use serde_json::{Map, Value};

use super::{
    fields::Fields,
    messages::{read_messages, read_tools},
};
use crate::error::ApiError;

/// OpenAI allows four; agents' frameworks send more.
const MAX_STOPS: usize = 16;
/// Each runs through a matcher for every token.
const MAX_STOP_BYTES: usize = 1_024;
const MAX_TOP_LOGPROBS: i64 = 20;

/// A chat request, read and checked.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct ChatRequest {
    pub(crate) model: String,
    pub(crate) stream: bool,
    pub(crate) include_usage: bool,
    /// As the client gave it; the gateway chooses one otherwise.
    pub(crate) seed: Option<u64>,
    messages: Vec<Value>,
    tools: Vec<Value>,
    max_tokens: Option<u32>,
    temperature: f32,
    top_p: f32,
    stop: Vec<String>,
    logprobs: Option<u32>,
}

impl ChatRequest {
    /// Reads a request.
    ///
    /// # Errors
    /// 400, with the field at fault in `param`.
    pub(crate) fn read(body: &Value) -> Result<Self, ApiError> {
        let object = body
            .as_object()
            .ok_or_else(|| ApiError::malformed("the request body must be a JSON object"))?;
        let fields = Fields::new(object, "");
        refuse_unsupported(fields)?;
        let stream = fields.bool("stream")?.unwrap_or(false);
        let temperature = fields.number("temperature", 0.0, 2.0)?.unwrap_or(1.0);
        let top_p = fields.number("top_p", 0.0, 1.0)?.unwrap_or(1.0);
        Ok(Self {
            model: fields.required_str("model")?.to_owned(),
            stream,
            include_usage: read_stream_options(fields, stream)?,
            // Negative seeds are seeds as well: all 64 bits count.
            seed: fields.integer("seed", i64::MIN..=i64::MAX)?.map(i64::cast_unsigned),
            messages: read_messages(fields)?,
            tools: read_tools(fields)?,
            max_tokens: read_max_tokens(fields)?,
            temperature: temperature as f32,
            // Zero keeps the most probable token, as everything just above zero does.
            top_p: (top_p as f32).max(f32::MIN_POSITIVE),
            stop: read_stop(fields)?,
            logprobs: read_logprobs(fields)?,
        })
    }

    /// Whether the answer may contain tool calls.
    pub(crate) fn has_tools(&self) -> bool {
        !self.tools.is_empty()
    }

    /// What the runner shall do. `now`: seconds since 1970.
    pub(crate) fn into_generate(self, id: String, seed: u64, now: i64) -> GenerateRequest {
        GenerateRequest {
            id,
            prompt: Prompt::Chat { messages: self.messages, tools: self.tools },
            generated: Vec::new(),
            max_tokens: self.max_tokens,
            sampling: SamplingParams { temperature: self.temperature, top_p: self.top_p, seed },
            stop: self.stop,
            logprobs: self.logprobs,
            now,
        }
    }
}

fn refuse_unsupported(fields: Fields<'_>) -> Result<(), ApiError> {
    if fields.integer("n", 1..=128)?.unwrap_or(1) != 1 {
        return Err(fields.error("n", "must be 1: one answer is made per request"));
    }
    for name in ["presence_penalty", "frequency_penalty"] {
        if fields.number(name, -2.0, 2.0)?.unwrap_or(0.0) != 0.0 {
            return Err(fields.error(name, "must be 0: penalties are not supported"));
        }
    }
    if fields.object("logit_bias")?.is_some_and(|bias| !bias.is_empty()) {
        return Err(fields.error("logit_bias", "must be empty: biases are not supported"));
    }
    if let Some(format) = fields.object("response_format")? {
        let format = Fields::new(format, "response_format");
        if format.required_str("type")? != "text" {
            return Err(format.error("type", "must be `text`: output can't be constrained"));
        }
    }
    Ok(())
}

fn read_stream_options(fields: Fields<'_>, stream: bool) -> Result<bool, ApiError> {
    let Some(options) = fields.object("stream_options")? else {
        return Ok(false);
    };
    if !stream {
        return Err(fields.error("stream_options", "is only allowed with `stream`: true"));
    }
    let options: &Map<String, Value> = options;
    let include = Fields::new(options, "stream_options").bool("include_usage")?;
    Ok(include.unwrap_or(false))
}

/// The newer name wins over the older one.
fn read_max_tokens(fields: Fields<'_>) -> Result<Option<u32>, ApiError> {
    let range = 1..=i64::from(u32::MAX);
    let older = fields.integer("max_tokens", range.clone())?;
    let newer = fields.integer("max_completion_tokens", range)?;
    Ok(newer.or(older).and_then(|n| u32::try_from(n).ok()))
}

fn read_stop(fields: Fields<'_>) -> Result<Vec<String>, ApiError> {
    let wrong = |problem: &str| Err(fields.error("stop", problem));
    let stops = match fields.get("stop") {
        None => return Ok(Vec::new()),
        Some(Value::String(stop)) => vec![stop.clone()],
        Some(Value::Array(stops)) => {
            let texts: Option<Vec<_>> =
                stops.iter().map(|stop| stop.as_str().map(str::to_owned)).collect();
            match texts {
                Some(texts) => texts,
                None => return wrong("must hold strings only"),
            }
        }
        Some(_) => return wrong("must be a string or an array of strings"),
    };
    if stops.len() > MAX_STOPS {
        return wrong(&format!("may hold at most {MAX_STOPS} texts"));
    }
    if stops.iter().any(|stop| stop.is_empty() || stop.len() > MAX_STOP_BYTES) {
        return wrong(&format!("must hold texts of 1 to {MAX_STOP_BYTES} bytes"));
    }
    Ok(stops)
}

fn read_logprobs(fields: Fields<'_>) -> Result<Option<u32>, ApiError> {
    let wanted = fields.bool("logprobs")?.unwrap_or(false);
    let top = fields.integer("top_logprobs", 0..=MAX_TOP_LOGPROBS)?;
    match (wanted, top) {
        (false, Some(1..)) => Err(fields.error("top_logprobs", "needs `logprobs`: true")),
        (false, _) => Ok(None),
        (true, top) => Ok(u32::try_from(top.unwrap_or(0)).ok()),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[allow(clippy::needless_pass_by_value, reason = "literals read better")]
    fn with(extra: Value) -> Value {
        let mut body = json!({"model": "m", "messages": [{"role": "user", "content": "hi"}]});
        body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        body
    }

    #[test]
    fn defaults_are_openais() {
        let request = ChatRequest::read(&with(json!({}))).unwrap();
        assert!(!request.stream && !request.include_usage && request.seed.is_none());
        let generate = request.into_generate("chatcmpl-1".into(), 5, 9);
        assert_eq!(
            serde_json::to_value(generate).unwrap(),
            json!({"id": "chatcmpl-1", "generated": [], "max_tokens": null, "stop": [],
                   "prompt": {"chat": {"messages": [{"role": "user", "content": "hi"}],
                                       "tools": []}},
                   "sampling": {"temperature": 1.0, "top_p": 1.0, "seed": 5},
                   "logprobs": null, "now": 9})
        );
    }

    #[test]
    fn every_option_reaches_the_runner() {
        let request = ChatRequest::read(&with(json!({
            "stream": true, "stream_options": {"include_usage": true}, "seed": -1,
            "max_tokens": 5, "max_completion_tokens": 7, "temperature": 0, "top_p": 0.5,
            "stop": "END", "logprobs": true, "top_logprobs": 3,
            "user": "ann", "something_new": {"x": 1}, "n": 1, "presence_penalty": 0,
        })))
        .unwrap();
        assert!(request.stream && request.include_usage);
        assert_eq!(request.seed, Some(u64::MAX));
        let generate = request.into_generate("x".into(), 1, 0);
        assert_eq!(generate.max_tokens, Some(7));
        assert_eq!(generate.stop, ["END"]);
        assert_eq!(generate.logprobs, Some(3));
        assert_eq!(generate.sampling.temperature, 0.0);
        assert_eq!(generate.sampling.top_p, 0.5);
    }

    #[test]
    fn names_the_field_at_fault() {
        let check = |extra: Value, param: &str| {
            let error = ChatRequest::read(&with(extra.clone())).unwrap_err();
            assert_eq!(error.status, 400, "{extra}");
            assert_eq!(error.param.as_deref(), Some(param), "{extra}");
            assert!(error.message.contains(param), "{}", error.message);
        };
        check(json!({"model": null}), "model");
        check(json!({"model": ""}), "model");
        check(json!({"model": 3}), "model");
        check(json!({"stream": "yes"}), "stream");
        check(json!({"temperature": "hot"}), "temperature");
        check(json!({"temperature": 2.5}), "temperature");
        check(json!({"top_p": -0.1}), "top_p");
        check(json!({"max_tokens": 0}), "max_tokens");
        check(json!({"max_tokens": 1.5}), "max_tokens");
        check(json!({"max_completion_tokens": -4}), "max_completion_tokens");
        check(json!({"seed": "x"}), "seed");
        check(json!({"n": 2}), "n");
        check(json!({"n": 0}), "n");
        check(json!({"stop": 1}), "stop");
        check(json!({"stop": [""]}), "stop");
        check(json!({"stop": ["a", 1]}), "stop");
        check(json!({"stop": vec!["a"; 17]}), "stop");
        check(json!({"logprobs": 1}), "logprobs");
        check(json!({"top_logprobs": 2}), "top_logprobs");
        check(json!({"logprobs": true, "top_logprobs": 21}), "top_logprobs");
        check(json!({"stream_options": {}}), "stream_options");
        check(
            json!({"stream": true, "stream_options": {"include_usage": 1}}),
            "stream_options.include_usage",
        );
        check(json!({"presence_penalty": 1}), "presence_penalty");
        check(json!({"logit_bias": {"5": 1}}), "logit_bias");
        check(json!({"response_format": {"type": "json_object"}}), "response_format.type");
        check(json!({"messages": {}}), "messages");
    }

    #[test]
    fn a_body_that_is_no_object_is_refused() {
        for body in [json!([]), json!("x"), json!(null)] {
            assert_eq!(ChatRequest::read(&body).unwrap_err().status, 400);
        }
    }
}
