//! From logits to the next token, on the device. Owns the sampling rule; never reads arrays back.

use mlx_rs::Array;
use mlx_rs::error::Exception;
use mlx_rs::ops::indexing::{argmax_axis, take_along_axis};
use mlx_rs::ops::{
    argpartition_axis, concatenate, cumsum, minimum, select, softmax_axis, sort_axis,
};
use mlx_rs::{Dtype, random};
use serde::{Deserialize, Serialize};

use crate::mlx::slice;
use crate::seed::derive_shard_seed;

/// Logits divided by less would leave the range of float32; and nothing but the likeliest token would
/// ever be drawn.
const TEMPERATURE_MIN: f32 = 1e-6;

/// How the tokens of a request are drawn.
#[derive(Serialize, Deserialize, Clone, Debug, PartialEq)]
pub struct Sampling {
    /// 0, or less than a millionth, takes the likeliest token always.
    pub temperature: f32,
    /// Draws among the likeliest tokens that have this share of the probability together; 1 among all. The
    /// temperature applies first.
    pub top_p: f32,
    pub seed: u64,
    /// Report the token's log-probability and those of this many likeliest tokens. They are the model's own: neither
    /// temperature nor `top_p` changes them.
    pub logprobs: Option<u32>,
}

impl Sampling {
    /// Always the likeliest token, nothing reported.
    pub fn greedy() -> Self {
        Self { temperature: 0.0, top_p: 1.0, seed: 0, logprobs: None }
    }

    fn is_greedy(&self) -> bool {
        self.temperature < TEMPERATURE_MIN || self.top_p <= 0.0
    }

    /// How many of the likeliest tokens are reported for a vocabulary of this size.
    pub(crate) fn top_count(&self, vocab_size: usize) -> usize {
        self.logprobs.map_or(0, |n| (n as usize).min(vocab_size))
    }

    /// Length of what [`draw`] returns.
    pub(crate) fn report_len(&self, vocab_size: usize) -> usize {
        if self.logprobs.is_none() { 1 } else { 2 + 2 * self.top_count(vocab_size) }
    }
}

/// A draw, still on the device.
pub(crate) struct Draw {
    /// `[1]`, uint32: what the next step feeds.
    pub(crate) token: Array,
    /// Uint32: the token; and with log-probabilities wanted, the token's own, then the ids and the values of the
    /// likeliest in no order. Values are the bits of float32.
    pub(crate) report: Array,
}

/// The outcome of a step that drew a token.
#[derive(Clone, Debug, PartialEq)]
pub struct StepOutput {
    pub token: u32,
    pub logprob: Option<f32>,
    /// Likeliest first; equal ones by id.
    pub top: Vec<(u32, f32)>,
}

impl StepOutput {
    pub(crate) fn parse(report: &[u32]) -> Self {
        let token = report[0];
        let Some(&logprob) = report.get(1) else {
            return Self { token, logprob: None, top: Vec::new() };
        };
        let (ids, values) = report[2..].split_at((report.len() - 2) / 2);
        let values = values.iter().map(|&bits| f32::from_bits(bits));
        let mut top: Vec<(u32, f32)> = ids.iter().copied().zip(values).collect();
        top.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        Self { token, logprob: Some(f32::from_bits(logprob)), top }
    }
}

/// Draws from `logits` of shape `[1, vocab]`. `draw` counts the draws of the request.
pub(crate) fn draw(logits: &Array, sampling: &Sampling, draw: u64) -> Result<Draw, Exception> {
    let token = if sampling.is_greedy() {
        argmax_axis(logits, -1, false)?
    } else {
        let seed = derive_shard_seed(sampling.seed, 0, draw);
        let scaled = scale(logits, sampling)?;
        random::categorical(&scaled, -1, None, &random::key(seed)?)?
    };
    let report = match sampling.logprobs {
        None => token.clone(),
        Some(_) => report(logits, &token, sampling.top_count(logits.dim(-1) as usize) as i32)?,
    };
    Ok(Draw { token, report })
}

/// Logits after temperature and `top_p`, in float32.
fn scale(logits: &Array, sampling: &Sampling) -> Result<Array, Exception> {
    let logits = logits.as_dtype(Dtype::Float32)?;
    let scaled = logits.multiply(Array::from_f32(1.0 / sampling.temperature))?;
    if sampling.top_p >= 1.0 {
        return Ok(scaled);
    }
    // Ascending, so that a token is kept when what comes up to and with it exceeds the part to be cut off.
    let probabilities = softmax_axis(&scaled, -1, true)?;
    let sorted = sort_axis(&probabilities, -1)?;
    let cumulative = cumsum(&sorted, -1, None, None)?;
    let kept = cumulative.gt(Array::from_f32(1.0 - sampling.top_p))?;
    // The smallest kept probability decides; rounding must not cut off the likeliest token.
    let smallest = select(&kept, &sorted, Array::from_f32(2.0))?.min_axis(-1, true)?;
    let threshold = minimum(&smallest, probabilities.max_axis(-1, true)?)?;
    select(probabilities.ge(&threshold)?, &scaled, Array::from_f32(f32::NEG_INFINITY))
}

fn report(logits: &Array, token: &Array, top: i32) -> Result<Array, Exception> {
    let logits = logits.as_dtype(Dtype::Float32)?;
    let logprobs = logits.subtract(logits.logsumexp_axis(-1, true)?)?;
    let own = take_along_axis(&logprobs, token.reshape(&[1, 1])?, -1)?;
    let bits = |values: &Array| values.reshape(&[-1])?.view_dtype(Dtype::Uint32);
    let mut parts = vec![token.reshape(&[1])?, bits(&own)?];
    if top > 0 {
        let vocab = logprobs.dim(-1);
        let order = argpartition_axis(logprobs.negative()?, (top - 1).min(vocab - 1), -1)?;
        let ids = slice(&order, &[0, 0], &[1, top])?;
        let values = take_along_axis(&logprobs, &ids, -1)?;
        parts.push(ids.as_dtype(Dtype::Uint32)?.reshape(&[-1])?);
        parts.push(bits(&values)?);
    }
    concatenate(&parts, 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tokens(probabilities: &[f32], temperature: f32, top_p: f32, draws: u64) -> Vec<u32> {
        let logits: Vec<f32> = probabilities.iter().map(|p| p.ln()).collect();
        let logits = Array::from_slice(&logits, &[1, probabilities.len() as i32]);
        let sampling = Sampling { temperature, top_p, seed: 7, logprobs: None };
        (0..draws)
            .map(|i| draw(&logits, &sampling, i).unwrap().token.to_vec_exact::<u32>().unwrap()[0])
            .collect()
    }

    #[test]
    fn greedy_takes_the_first_of_the_likeliest() {
        assert_eq!(tokens(&[0.1, 0.4, 0.4, 0.1], 0.0, 1.0, 3), [1, 1, 1]);
        assert_eq!(tokens(&[0.1, 0.3, 0.4, 0.2], 1.0, 0.0, 2), [2, 2]);
        for cold in [f32::MIN_POSITIVE, 1e-40, 1e-7] {
            assert_eq!(tokens(&[0.1, 0.3, 0.4, 0.2], cold, 0.9, 2), [2, 2], "{cold}");
        }
    }

    #[test]
    fn top_p_keeps_the_smallest_set_that_reaches_it() {
        let probabilities = [0.05, 0.5, 0.15, 0.3];
        for (top_p, allowed) in
            [(1e-9, vec![1]), (0.4, vec![1]), (0.75, vec![1, 3]), (0.9, vec![1, 2, 3])]
        {
            let mut seen = tokens(&probabilities, 1.0, top_p, 200);
            seen.sort_unstable();
            seen.dedup();
            assert_eq!(seen, allowed, "top_p {top_p}");
        }
    }

    #[test]
    fn draws_follow_the_probabilities_and_the_seed() {
        let drawn = tokens(&[0.2, 0.8], 1.0, 1.0, 1000);
        let ones = drawn.iter().filter(|&&t| t == 1).count();
        // Six standard deviations around 800.
        assert!((724..=876).contains(&ones), "{ones}");
        assert_eq!(drawn, tokens(&[0.2, 0.8], 1.0, 1.0, 1000));
        let cold = tokens(&[0.2, 0.8], 0.2, 1.0, 1000);
        assert!(cold.iter().filter(|&&t| t == 1).count() > 980);
    }

    #[test]
    fn reports_log_probabilities_of_the_model_itself() {
        let probabilities = [0.125_f32, 0.5, 0.25, 0.125];
        let logits: Vec<f32> = probabilities.iter().map(|p| p.ln() + 3.0).collect();
        let logits = Array::from_slice(&logits, &[1, 4]);
        let sampling = Sampling { temperature: 0.0, top_p: 1.0, seed: 0, logprobs: Some(3) };
        let drawn = draw(&logits, &sampling, 0).unwrap();
        let report: Vec<u32> = drawn.report.to_vec_exact().unwrap();
        assert_eq!(report.len(), sampling.report_len(4));
        let output = StepOutput::parse(&report);
        assert_eq!(output.token, 1);
        assert!((output.logprob.unwrap() - 0.5_f32.ln()).abs() < 1e-6);
        let ids: Vec<u32> = output.top.iter().map(|t| t.0).collect();
        assert_eq!(ids[..2], [1, 2]);
        assert!(ids[2] == 0 || ids[2] == 3);
        assert!((output.top[1].1 - 0.25_f32.ln()).abs() < 1e-6);

        let all = Sampling { logprobs: Some(99), ..sampling };
        let report: Vec<u32> = draw(&logits, &all, 0).unwrap().report.to_vec_exact().unwrap();
        assert_eq!(StepOutput::parse(&report).top.len(), 4);
    }
}
