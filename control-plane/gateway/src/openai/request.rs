//! Reads the body of `POST /v1/chat/completions`.
//!
//! Wrong types and values out of range are refused with the field's path. Options that can't be
//! honoured are refused too, rather than silently dropped; fields nobody knows are ignored.

use std::collections::BTreeMap;

use exo_crds::generate::{GenerateRequest, MAX_LOGIT_BIASES, Prompt, SamplingParams};
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
const MAX_LOGIT_BIAS: f64 = 100.0;
/// Clients use 1 to 2; runners take no more than this.
const MAX_REPETITION_PENALTY: f64 = 100.0;

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
    /// Without the seed.
    sampling: SamplingParams,
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
        Ok(Self {
            model: fields.required_str("model")?.to_owned(),
            stream,
            include_usage: read_stream_options(fields, stream)?,
            // Negative seeds are seeds as well: all 64 bits count.
            seed: fields.integer("seed", i64::MIN..=i64::MAX)?.map(i64::cast_unsigned),
            messages: read_messages(fields)?,
            tools: read_tools(fields)?,
            max_tokens: read_max_tokens(fields)?,
            sampling: read_sampling(fields)?,
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
            sampling: SamplingParams { seed, ..self.sampling },
            stop: self.stop,
            logprobs: self.logprobs,
            now,
        }
    }
}

fn refuse_unsupported(fields: Fields<'_>) -> Result<(), ApiError> {
    if fields.integer("n", i64::MIN..=i64::MAX)?.unwrap_or(1) != 1 {
        let message = "must be 1: a request gets one answer; for several, send it several times";
        return Err(fields.error("n", message));
    }
    if let Some(format) = fields.object("response_format")? {
        let format = Fields::new(format, "response_format");
        if format.required_str("type")? != "text" {
            return Err(format.error("type", "must be `text`: output can't be constrained"));
        }
    }
    Ok(())
}

/// OpenAI's parameters and, as extensions, `top_k`, `min_p` and `repetition_penalty` as other
/// servers know them.
fn read_sampling(fields: Fields<'_>) -> Result<SamplingParams, ApiError> {
    let number = |name: &str, low: f64, high: f64, default: f32| {
        let number = fields.number(name, low, high)?;
        Ok::<f32, ApiError>(number.map_or(default, |number| number as f32))
    };
    let repetition_penalty = number("repetition_penalty", 0.0, MAX_REPETITION_PENALTY, 1.0)?;
    if repetition_penalty <= 0.0 {
        return Err(fields.error("repetition_penalty", "must be above 0"));
    }
    // Some clients say that there is no limit with -1.
    let top_k = fields.integer("top_k", -1..=i64::from(u32::MAX))?.unwrap_or(0);
    Ok(SamplingParams {
        temperature: number("temperature", 0.0, 2.0, 1.0)?,
        top_k: u32::try_from(top_k).unwrap_or(0),
        // Zero keeps the most probable token, as everything just above zero does.
        top_p: number("top_p", 0.0, 1.0, 1.0)?.max(f32::MIN_POSITIVE),
        min_p: number("min_p", 0.0, 1.0, 0.0)?,
        repetition_penalty,
        presence_penalty: number("presence_penalty", -2.0, 2.0, 0.0)?,
        frequency_penalty: number("frequency_penalty", -2.0, 2.0, 0.0)?,
        logit_bias: read_logit_bias(fields)?,
        seed: 0,
    })
}

/// Biases by token id.
fn read_logit_bias(fields: Fields<'_>) -> Result<BTreeMap<u32, f32>, ApiError> {
    let Some(object) = fields.object("logit_bias")? else {
        return Ok(BTreeMap::new());
    };
    if object.len() > MAX_LOGIT_BIASES {
        return Err(fields.error("logit_bias", &format!("may hold at most {MAX_LOGIT_BIASES}")));
    }
    let inner = Fields::new(object, "logit_bias");
    let biases = object.keys().map(|key| {
        let token = key.parse().map_err(|_| inner.error(key, "must be a token id"))?;
        let bias = inner.number(key, -MAX_LOGIT_BIAS, MAX_LOGIT_BIAS)?.unwrap_or(0.0);
        Ok((token, bias as f32))
    });
    biases.collect()
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
            "user": "ann", "something_new": {"x": 1}, "n": 1, "presence_penalty": 0.5,
            "frequency_penalty": -2, "logit_bias": {"50256": -100, "7": 1.5}, "top_k": 40,
            "min_p": 0.25, "repetition_penalty": 1.5,
        })))
        .unwrap();
        assert!(request.stream && request.include_usage);
        assert_eq!(request.seed, Some(u64::MAX));
        let generate = request.into_generate("x".into(), 1, 0);
        assert_eq!(generate.max_tokens, Some(7));
        assert_eq!(generate.stop, ["END"]);
        assert_eq!(generate.logprobs, Some(3));
        let expect = SamplingParams {
            temperature: 0.0,
            top_k: 40,
            top_p: 0.5,
            min_p: 0.25,
            repetition_penalty: 1.5,
            presence_penalty: 0.5,
            frequency_penalty: -2.0,
            logit_bias: BTreeMap::from([(7, 1.5), (50_256, -100.0)]),
            seed: 1,
        };
        assert_eq!(generate.sampling, expect);
        let unlimited = ChatRequest::read(&with(json!({"top_k": -1}))).unwrap();
        assert_eq!(unlimited.into_generate("x".into(), 0, 0).sampling, SamplingParams::default());
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
        check(json!({"presence_penalty": 2.1}), "presence_penalty");
        check(json!({"frequency_penalty": "x"}), "frequency_penalty");
        check(json!({"repetition_penalty": 0}), "repetition_penalty");
        check(json!({"top_k": 1.5}), "top_k");
        check(json!({"min_p": 2}), "min_p");
        check(json!({"logit_bias": [1]}), "logit_bias");
        check(json!({"logit_bias": {"5": 101}}), "logit_bias.5");
        check(json!({"logit_bias": {"a": 1}}), "logit_bias.a");
        check(json!({"response_format": {"type": "json_object"}}), "response_format.type");
        check(json!({"messages": {}}), "messages");
    }

    #[test]
    fn whole_numbers_have_limits() {
        let message = |extra: &str| {
            let extra = serde_json::from_str(extra).unwrap();
            ChatRequest::read(&with(extra)).unwrap_err().message
        };
        let tokens = "`max_tokens` must be between 1 and 4294967295";
        assert_eq!(message(r#"{"max_tokens": 0}"#), tokens);
        assert_eq!(message(r#"{"max_tokens": 10000000000000000000}"#), tokens);
        assert_eq!(message(r#"{"max_tokens": 99999999999999999999}"#), tokens);
        assert_eq!(message(r#"{"max_tokens": -99999999999999999999}"#), tokens);
        let fraction = message(r#"{"max_tokens": 1.5}"#);
        assert_eq!(fraction, "`max_tokens` must be a whole number, not a fraction");
        let seed = message(r#"{"seed": 18446744073709551615}"#);
        assert!(seed.starts_with("`seed` must be between -9223372036854775808 and "), "{seed}");
        let whole = ChatRequest::read(&with(json!({"max_tokens": 5.0}))).unwrap();
        assert_eq!(whole.max_tokens, Some(5));
    }

    #[test]
    fn a_body_that_is_no_object_is_refused() {
        for body in [json!([]), json!("x"), json!(null)] {
            assert_eq!(ChatRequest::read(&body).unwrap_err().status, 400);
        }
    }
}
