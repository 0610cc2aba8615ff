//! How a request wants its tokens drawn. Draws nothing.

use mlx_rs::Array;
use serde::{Deserialize, Serialize};

/// Logits divided by less would leave the range of float32; and nothing but the likeliest token would
/// ever be drawn.
const TEMPERATURE_MIN: f32 = 1e-6;

/// How the tokens of a request are drawn. Bias and penalties come first, then the temperature; `top_k`, `top_p` and
/// `min_p` leave out tokens in this order, each among those that the one before has left.
#[derive(Serialize, Deserialize, Clone, Debug, PartialEq)]
pub struct Sampling {
    /// 0, or less than a millionth, takes the likeliest token always.
    pub temperature: f32,
    /// Draws among so many of the likeliest tokens; 0 among all.
    pub top_k: u32,
    /// Draws among the likeliest tokens that have this share of the probability together; 1 among all.
    pub top_p: f32,
    /// Draws among the tokens that are at least this share as likely as the likeliest; 0 among all.
    pub min_p: f32,
    /// Divides the positive logits of tokens of prompt and answer, multiplies their negative ones; 1 for none.
    pub repetition_penalty: f32,
    /// Taken from the logits of the tokens of the answer; 0 for none.
    pub presence_penalty: f32,
    /// Taken from the logit of a token of the answer as often as it occurs there; 0 for none.
    pub frequency_penalty: f32,
    /// Added to the logits of these tokens.
    pub logit_bias: Vec<(u32, f32)>,
    pub seed: u64,
    /// Report the token's log-probability and those of this many likeliest tokens. They are the model's own: nothing
    /// of the above changes them.
    pub logprobs: Option<u32>,
}

impl Sampling {
    /// Always the likeliest token, nothing reported.
    pub fn greedy() -> Self {
        Self {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: Vec::new(),
            seed: 0,
            logprobs: None,
        }
    }

    pub(super) fn is_greedy(&self) -> bool {
        self.temperature < TEMPERATURE_MIN || self.top_p <= 0.0 || self.top_k == 1
    }

    /// Whether the tokens so far matter.
    #[expect(clippy::float_cmp, reason = "the values that mean none are set, not computed")]
    pub(crate) fn has_penalties(&self) -> bool {
        self.repetition_penalty != 1.0
            || self.presence_penalty != 0.0
            || self.frequency_penalty != 0.0
    }

    /// How many of the likeliest tokens are reported for a vocabulary of this size.
    pub(crate) fn top_count(&self, vocab_size: usize) -> usize {
        self.logprobs.map_or(0, |n| (n as usize).min(vocab_size))
    }

    /// Length of what a row's report has.
    pub(crate) fn report_len(&self, vocab_size: usize) -> usize {
        if self.logprobs.is_none() { 1 } else { 2 + 2 * self.top_count(vocab_size) }
    }

    /// The bias over the vocabulary, `[1, vocab]` float32, if there is any. Tokens outside are left out.
    pub(crate) fn bias(&self, vocab: i32) -> Option<Array> {
        if self.logit_bias.is_empty() {
            return None;
        }
        let mut values = vec![0_f32; vocab as usize];
        for &(token, bias) in &self.logit_bias {
            if let Some(value) = values.get_mut(token as usize) {
                *value += bias;
            }
        }
        Some(Array::from_slice(&values, &[1, vocab]))
    }
}
