//! From a request's body to what is run for it, or a refusal that names the field. Pure but for the
//! tokenizer and the chat template.

use std::sync::Arc;

use exo_crds::generate::{ErrorCode, GenerateRequest, Prompt, SamplingParams};
use exo_engine::{
    Sampling,
    text::{ChatInput, ChatTemplate, TextError, Tokenizer},
};
use serde::Deserialize;

use super::answer::AnswerSpec;
use crate::sampling;

/// As OpenAI's API allows at most.
const TOP_LOGPROBS_MAX: u32 = 20;
/// More than any client sends; each is looked for with every token.
const STOPS_MAX: usize = 16;
const STOP_BYTES_MAX: usize = 1024;
/// Tokens before the answer that can change how its first word reads.
const BEFORE_TOKENS: usize = 8;

/// What requests are checked against.
#[derive(Debug)]
pub(crate) struct ModelLimits {
    pub(crate) vocab_size: usize,
    /// Tokens of prompt and answer together.
    pub(crate) context_length: usize,
    /// For requests that bring no seed.
    pub(crate) seed: u64,
}

/// The model's way with text.
#[derive(Debug)]
pub(crate) struct ModelText {
    pub(crate) tokenizer: Arc<Tokenizer>,
    /// Absent for models that don't chat.
    pub(crate) template: Option<ChatTemplate>,
}

/// A request that can be run.
#[derive(Debug)]
pub(crate) struct Prepared {
    /// The gateway's name for the request.
    pub(crate) id: String,
    pub(crate) prompt: Vec<u32>,
    pub(crate) sampling: Sampling,
    pub(crate) answer: AnswerSpec,
}

/// Why a request is not run.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub(crate) struct Refusal {
    pub(crate) code: ErrorCode,
    pub(crate) message: String,
}

impl Refusal {
    fn invalid(message: impl Into<String>) -> Self {
        Self { code: ErrorCode::InvalidRequest, message: message.into() }
    }

    fn too_long(message: String) -> Self {
        Self { code: ErrorCode::ContextLengthExceeded, message }
    }
}

impl From<TextError> for Refusal {
    fn from(error: TextError) -> Self {
        Self::invalid(error.to_string())
    }
}

/// Reads, checks and tokenizes a request.
pub(crate) fn prepare(
    body: &[u8],
    text: &ModelText,
    limits: &ModelLimits,
) -> Result<Prepared, Refusal> {
    let request: GenerateRequest =
        serde_json::from_slice(body).map_err(|error| Refusal::invalid(error.to_string()))?;
    let mut sampling = sampling(request.sampling.clone(), request.logprobs, limits)?;
    if sampling.seed == 0 && !brings_seed(body) {
        sampling.seed = limits.seed;
    }
    check_stops(&request.stop)?;
    let prompt = tokenize(&request.prompt, request.now, text)?;
    if prompt.is_empty() {
        return Err(Refusal::invalid("prompt: it has no tokens"));
    }
    check_ids("prompt.tokens", &prompt, limits)?;
    check_ids("generated", &request.generated, limits)?;
    let tokens_max = tokens_max(&request, prompt.len(), limits)?;
    let before = match &request.prompt {
        // The answer is a turn of its own.
        Prompt::Chat { .. } => Vec::new(),
        Prompt::Text(_) | Prompt::Tokens(_) => {
            prompt[prompt.len().saturating_sub(BEFORE_TOKENS)..].to_vec()
        }
    };
    let answer = AnswerSpec {
        before,
        generated: request.generated,
        tokens_max,
        stops: request.stop,
        logprobs: request.logprobs.is_some(),
    };
    Ok(Prepared { id: request.id, prompt, sampling, answer })
}

fn sampling(
    params: SamplingParams,
    logprobs: Option<u32>,
    limits: &ModelLimits,
) -> Result<Sampling, Refusal> {
    if let Some(count) = logprobs.filter(|count| *count > TOP_LOGPROBS_MAX) {
        return Err(Refusal::invalid(format!(
            "logprobs: {count} entries asked for, at most {TOP_LOGPROBS_MAX} are given"
        )));
    }
    let sampling = sampling::check(params, limits.vocab_size)
        .map_err(|bad| Refusal::invalid(format!("sampling.{}: {}", bad.field, bad.reason)))?;
    Ok(Sampling { logprobs, ..sampling })
}

/// Whether a seed of 0 was asked for; the parsed request looks the same without one.
fn brings_seed(body: &[u8]) -> bool {
    #[derive(Deserialize)]
    struct Seeds {
        sampling: Option<Seed>,
    }
    #[derive(Deserialize)]
    struct Seed {
        seed: Option<u64>,
    }
    serde_json::from_slice::<Seeds>(body)
        .is_ok_and(|seeds| seeds.sampling.and_then(|sampling| sampling.seed).is_some())
}

fn check_stops(stops: &[String]) -> Result<(), Refusal> {
    if stops.len() > STOPS_MAX {
        let count = stops.len();
        return Err(Refusal::invalid(format!("stop: {count} texts, at most {STOPS_MAX} may be")));
    }
    for (index, stop) in stops.iter().enumerate() {
        if stop.is_empty() || stop.len() > STOP_BYTES_MAX {
            let bytes = stop.len();
            return Err(Refusal::invalid(format!(
                "stop[{index}]: {bytes} bytes, must have 1 to {STOP_BYTES_MAX}"
            )));
        }
    }
    Ok(())
}

fn tokenize(prompt: &Prompt, now: i64, text: &ModelText) -> Result<Vec<u32>, Refusal> {
    match prompt {
        Prompt::Tokens(tokens) => Ok(tokens.clone()),
        Prompt::Text(prompt) => Ok(text.tokenizer.encode_with_special(prompt)?),
        Prompt::Chat { messages, tools } => {
            if messages.is_empty() {
                return Err(Refusal::invalid("prompt.chat.messages: it is empty"));
            }
            let Some(template) = &text.template else {
                return Err(Refusal::invalid("prompt.chat: this model has no chat template"));
            };
            let input = ChatInput { messages, tools, add_generation_prompt: true, now };
            Ok(text.tokenizer.encode(&template.render(&input)?)?)
        }
    }
}

fn check_ids(field: &str, ids: &[u32], limits: &ModelLimits) -> Result<(), Refusal> {
    let vocab_size = limits.vocab_size;
    match ids.iter().position(|id| *id as usize >= vocab_size) {
        Some(index) => Err(Refusal::invalid(format!(
            "{field}[{index}]: token {} is not in the vocabulary of {vocab_size}",
            ids[index]
        ))),
        None => Ok(()),
    }
}

/// Most tokens of the answer, those drawn in earlier runs included.
fn tokens_max(
    request: &GenerateRequest,
    prompt_tokens: usize,
    limits: &ModelLimits,
) -> Result<u32, Refusal> {
    let context_length = limits.context_length;
    if prompt_tokens >= context_length {
        return Err(Refusal::too_long(format!(
            "the prompt has {prompt_tokens} tokens, the context {context_length}; none is left for \
             the answer"
        )));
    }
    let room = u32::try_from(context_length - prompt_tokens).unwrap_or(u32::MAX);
    match request.max_tokens {
        Some(asked) if asked > room => Err(Refusal::too_long(format!(
            "max_tokens asks for {asked}, but the prompt has {prompt_tokens} tokens of the context's \
             {context_length}: {room} are left"
        ))),
        asked => Ok(asked.unwrap_or(room)),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::{super::samples, *};

    fn prepare(body: &Value) -> Result<Prepared, Refusal> {
        let limits = ModelLimits { vocab_size: 257, context_length: 20, seed: 42 };
        super::prepare(body.to_string().as_bytes(), &samples::text(), &limits)
    }

    fn check_refusal(field: &str, value: &Value, code: ErrorCode, part: &str) {
        let mut body = json!({"id": "r", "prompt": {"text": "abc"}});
        body[field] = value.clone();
        let refusal = prepare(&body).unwrap_err();
        assert_eq!(refusal.code, code);
        assert!(refusal.message.contains(part), "{refusal}");
    }

    #[test]
    fn bad_fields_are_named() {
        use ErrorCode::{ContextLengthExceeded, InvalidRequest};
        for (field, value, part) in [
            ("promt", json!(1), "`promt`"),
            ("prompt", json!({"text": ""}), "prompt"),
            ("prompt", json!({"tokens": [1, 257]}), "prompt.tokens[1]: token 257"),
            ("prompt", json!({"chat": {"messages": []}}), "messages"),
            ("prompt", json!({"chat": {"messages": [{"role": "x"}]}}), "roles are a and b"),
            ("prompt", json!({"chat": {"messages": [], "tool": []}}), "`tool`"),
            ("generated", json!([300]), "generated[0]"),
            ("sampling", json!({"temperature": -1.0}), "sampling.temperature"),
            ("sampling", json!({"top_p": 0.0}), "sampling.top_p"),
            ("sampling", json!({"top_q": 1}), "`top_q`"),
            ("sampling", json!({"top_k": -1}), "-1"),
            ("sampling", json!({"min_p": 1.5}), "sampling.min_p: 1.5"),
            ("sampling", json!({"repetition_penalty": 0}), "sampling.repetition_penalty"),
            ("sampling", json!({"presence_penalty": 2.5}), "sampling.presence_penalty: 2.5"),
            ("sampling", json!({"frequency_penalty": -3}), "sampling.frequency_penalty: -3"),
            ("sampling", json!({"logit_bias": {"3": 101}}), "sampling.logit_bias[3]: 101"),
            ("sampling", json!({"logit_bias": {"257": 1}}), "logit_bias[257]: token 257"),
            ("sampling", json!({"logit_bias": {"x": 1}}), "number in quotes"),
            ("stop", json!(["a", ""]), "stop[1]"),
            ("logprobs", json!(21), "logprobs"),
        ] {
            check_refusal(field, &value, InvalidRequest, part);
        }
        check_refusal("max_tokens", &json!(18), ContextLengthExceeded, "18");
        let long = json!({"text": "01234567890123456789"});
        check_refusal("prompt", &long, ContextLengthExceeded, "20 tokens");
    }

    #[test]
    fn a_chat_goes_through_the_template() {
        let messages = json!([{"role": "a", "content": "hi"}]);
        let prepared =
            prepare(&json!({"id": "r", "prompt": {"chat": {"messages": messages}}})).unwrap();
        let expect: Vec<u32> = b"a:hi;b:".iter().map(|b| u32::from(*b)).collect();
        assert_eq!(prepared.prompt, expect);
        assert!(prepared.answer.before.is_empty());
        assert_eq!(prepared.answer.tokens_max, 13);
        assert_eq!(prepared.sampling.temperature, 1.0);
    }

    #[test]
    fn the_seed_is_the_requests_or_the_instances() {
        let seed = |sampling: Value| {
            let body = json!({"id": "r", "prompt": {"text": "a"}, "sampling": sampling});
            prepare(&body).unwrap().sampling.seed
        };
        assert_eq!(seed(json!({})), 42);
        assert_eq!(seed(json!({"seed": 0})), 0);
        assert_eq!(seed(json!({"seed": 7})), 7);
    }

    #[test]
    fn a_text_is_followed_closely() {
        let body = json!({"id": "r", "prompt": {"text": "0123456789"}, "max_tokens": 5,
            "generated": [1, 2], "stop": ["x"], "logprobs": 0,
            "sampling": {"temperature": 0.5, "top_p": 0.9, "seed": 7, "top_k": 3, "min_p": 0.25,
                "repetition_penalty": 1.5, "presence_penalty": 1, "frequency_penalty": -0.5,
                "logit_bias": {"9": -100, "3": 2}}});
        let prepared = prepare(&body).unwrap();
        assert_eq!(prepared.answer.before, "23456789".bytes().map(u32::from).collect::<Vec<_>>());
        assert_eq!((prepared.answer.tokens_max, prepared.answer.logprobs), (5, true));
        assert_eq!(prepared.answer.generated, [1, 2]);
        let sampling = Sampling {
            temperature: 0.5,
            top_k: 3,
            top_p: 0.9,
            min_p: 0.25,
            repetition_penalty: 1.5,
            presence_penalty: 1.0,
            frequency_penalty: -0.5,
            logit_bias: vec![(3, 2.0), (9, -100.0)],
            seed: 7,
            logprobs: Some(0),
        };
        assert_eq!(prepared.sampling, sampling);
    }
}
