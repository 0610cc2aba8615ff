//! Checks how tokens shall be drawn, for requests and for the command line alike.

use std::fmt::Display;

use exo_crds::generate::{MAX_LOGIT_BIASES, SamplingParams};
use exo_engine::Sampling;

/// As OpenAI's API allows at most, either way.
const PENALTY_MAX: f32 = 2.0;
const LOGIT_BIAS_MAX: f32 = 100.0;
/// Clients use 1 to 2; far above, a logit would leave the range of its type.
const REPETITION_PENALTY_MAX: f32 = 100.0;

/// What is wrong with one parameter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct BadSampling {
    pub(crate) field: String,
    pub(crate) reason: String,
}

/// The sampling of `params` for a vocabulary of this size; nothing is reported.
pub(crate) fn check(params: SamplingParams, vocab_size: usize) -> Result<Sampling, BadSampling> {
    let SamplingParams {
        temperature,
        top_k,
        top_p,
        min_p,
        repetition_penalty,
        presence_penalty,
        frequency_penalty,
        logit_bias,
        seed,
    } = params;
    if !(temperature.is_finite() && temperature >= 0.0) {
        return bad("temperature", &temperature, "a number from 0 up");
    }
    if !(top_p > 0.0 && top_p <= 1.0) {
        return bad("top_p", &top_p, "above 0 and at most 1");
    }
    if !(0.0..=1.0).contains(&min_p) {
        return bad("min_p", &min_p, "between 0 and 1");
    }
    if !(repetition_penalty > 0.0 && repetition_penalty <= REPETITION_PENALTY_MAX) {
        let wanted = format!("above 0 and at most {REPETITION_PENALTY_MAX}");
        return bad("repetition_penalty", &repetition_penalty, &wanted);
    }
    let penalties =
        [("presence_penalty", presence_penalty), ("frequency_penalty", frequency_penalty)];
    for (field, penalty) in penalties {
        within(field, penalty, PENALTY_MAX)?;
    }
    if logit_bias.len() > MAX_LOGIT_BIASES {
        let wanted = format!("at most {MAX_LOGIT_BIASES}");
        return bad("logit_bias", &format_args!("{} entries", logit_bias.len()), &wanted);
    }
    for (token, bias) in &logit_bias {
        let field = format!("logit_bias[{token}]");
        if *token as usize >= vocab_size {
            let wanted = format!("in the vocabulary of {vocab_size}");
            return bad(&field, &format_args!("token {token}"), &wanted);
        }
        within(&field, *bias, LOGIT_BIAS_MAX)?;
    }
    Ok(Sampling {
        temperature,
        top_k,
        top_p,
        min_p,
        repetition_penalty,
        presence_penalty,
        frequency_penalty,
        logit_bias: logit_bias.into_iter().collect(),
        seed,
        logprobs: None,
    })
}

fn within(field: &str, value: f32, limit: f32) -> Result<(), BadSampling> {
    if (-limit..=limit).contains(&value) {
        return Ok(());
    }
    bad(field, &value, &format!("between -{limit} and {limit}"))
}

fn bad<T>(field: &str, value: &dyn Display, wanted: &str) -> Result<T, BadSampling> {
    Err(BadSampling { field: field.to_owned(), reason: format!("{value} is not {wanted}") })
}
