//! Wire form of a generation request, gateway → runner of rank 0, over HTTP with mutual TLS.
//!
//! `POST /v1/generate` takes a [`GenerateRequest`] and answers `application/x-ndjson`: one
//! [`GenerateEvent`] per line, first `Start`, then `Token`s, then exactly one `End` or `Error`.
//! Closing the connection cancels the request. A request that broke off is resumed by sending it
//! again with the tokens already received in `generated`: the seed and the draw number make the
//! continuation the same as if nothing had happened.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::Value;

/// Path of the endpoint.
pub const PATH: &str = "/v1/generate";

/// One request.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GenerateRequest {
    /// Chosen by the gateway; appears in logs and traces.
    pub id: String,
    pub prompt: Prompt,
    /// Tokens that the client already has, from an earlier run of the same request.
    #[serde(default)]
    pub generated: Vec<u32>,
    /// At most this many new tokens, those in `generated` included; as many as the context allows
    /// when absent.
    #[serde(default)]
    pub max_tokens: Option<u32>,
    #[serde(default)]
    pub sampling: SamplingParams,
    /// Texts that end the answer; not part of it.
    #[serde(default)]
    pub stop: Vec<String>,
    /// Top entries wanted with each token; `Some(0)` asks for the chosen token's alone.
    #[serde(default)]
    pub logprobs: Option<u32>,
    /// Seconds since 1970, for chat templates that print the date.
    #[serde(default)]
    pub now: i64,
}

/// What the answer continues.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Prompt {
    /// Rendered by the model's chat template.
    Chat {
        /// OpenAI message objects, as the template sees them.
        messages: Vec<Value>,
        /// OpenAI tool objects; none when empty.
        #[serde(default)]
        tools: Vec<Value>,
    },
    Text(String),
    Tokens(Vec<u32>),
}

/// How tokens are drawn. Bias and penalties come first, then the temperature; `top_k`, `top_p` and
/// `min_p` leave out tokens in this order, each among those that the one before has left.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SamplingParams {
    /// 0 is greedy.
    pub temperature: f32,
    /// Draws among so many of the likeliest tokens; 0 among all.
    #[serde(skip_serializing_if = "is_default")]
    pub top_k: u32,
    /// Smallest set of tokens with at least this probability; 1 keeps all.
    pub top_p: f32,
    /// Keeps tokens that are at least this share as likely as the likeliest; 0 keeps all.
    #[serde(skip_serializing_if = "is_default")]
    pub min_p: f32,
    /// Divides the positive logits of tokens of prompt and answer, multiplies their negative ones;
    /// 1 for none.
    #[serde(skip_serializing_if = "is_one")]
    pub repetition_penalty: f32,
    /// Taken from the logits of the tokens of the answer.
    #[serde(skip_serializing_if = "is_default")]
    pub presence_penalty: f32,
    /// Taken from the logit of a token of the answer as often as it occurs there.
    #[serde(skip_serializing_if = "is_default")]
    pub frequency_penalty: f32,
    /// Added to the logits of these tokens.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub logit_bias: BTreeMap<u32, f32>,
    /// The gateway always sends one, so that a resumed request draws the same.
    pub seed: u64,
}

/// Most entries of `logit_bias`: as many as any client sends, and few enough for one message between
/// ranks.
pub const MAX_LOGIT_BIASES: usize = 1_024;

fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

#[expect(clippy::float_cmp, reason = "the value that means none is set, not computed")]
#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde's signature")]
fn is_one(value: &f32) -> bool {
    *value == 1.0
}

impl Default for SamplingParams {
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: BTreeMap::new(),
            seed: 0,
        }
    }
}

/// One line of the answer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum GenerateEvent {
    Start {
        prompt_tokens: u32,
    },
    Token {
        id: u32,
        /// Text that became certain with this token; empty inside a multi-token character or
        /// while it might become part of a stop text.
        text: String,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        logprobs: Option<TokenLogprobs>,
    },
    End {
        finish_reason: FinishReason,
        /// Text held back until now.
        #[serde(default)]
        text: String,
        completion_tokens: u32,
        /// Seconds from admission to the first token of this run.
        time_to_first_token_s: f64,
        decode_tokens_per_s: f64,
    },
    Error {
        code: ErrorCode,
        message: String,
    },
}

/// Why an answer ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FinishReason {
    /// End-of-sequence token or stop text.
    Stop,
    /// `max_tokens` or the context is used up.
    Length,
}

/// What went wrong with a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ErrorCode {
    /// The request itself; never retried.
    InvalidRequest,
    /// Prompt and `max_tokens` exceed the context; never retried.
    ContextLengthExceeded,
    /// The rank group broke or is stopping; retried on the next epoch or another replica.
    Unavailable,
}

impl ErrorCode {
    /// Whether another replica or a later epoch may do better.
    pub const fn is_retryable(self) -> bool {
        match self {
            Self::InvalidRequest | Self::ContextLengthExceeded => false,
            Self::Unavailable => true,
        }
    }
}

/// Log probabilities (natural logarithm) of one position.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TokenLogprobs {
    pub logprob: f32,
    /// Text of the token by itself.
    pub text: String,
    pub top: Vec<TopLogprob>,
}

/// One of the most probable tokens of a position.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TopLogprob {
    pub id: u32,
    pub text: String,
    pub logprob: f32,
}
