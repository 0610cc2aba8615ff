//! From logits to the next tokens, on the device: one row per sequence, each drawn as if it were alone. Owns the
//! sampling rule; never reads arrays back.

mod params;

use std::ops::Range;

use mlx_rs::Array;
use mlx_rs::error::Exception;
use mlx_rs::ops::indexing::{argmax_axis, take_along_axis};
use mlx_rs::ops::{
    argpartition_axis, concatenate, cumsum, maximum, minimum, select, softmax_axis, sort_axis,
    zeros_dtype,
};
use mlx_rs::{Dtype, random};

pub use self::params::Sampling;
use crate::history::Counts;
use crate::mlx::slice;
use crate::seed::derive_shard_seed;

/// What is drawn for one row.
pub(crate) struct Row<'a> {
    pub(crate) sampling: &'a Sampling,
    /// Counts the draws of the request.
    pub(crate) draw: u64,
    /// Present if the sampling has penalties.
    pub(crate) counts: Option<Counts>,
    /// As [`Sampling::bias`].
    pub(crate) bias: Option<&'a Array>,
}

impl<'a> Row<'a> {
    fn is_adjusted(&self) -> bool {
        self.counts.is_some() || self.bias.is_some()
    }
}

/// Draws for several rows, still on the device.
pub(crate) struct Draw {
    /// `[rows]`, uint32: what the next step feeds.
    pub(crate) tokens: Array,
    /// Uint32, one row after the other: the token; and with log-probabilities wanted, the token's own, then the ids
    /// and the values of the likeliest in no order. Values are the bits of float32.
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

/// Where each row is in a report of them all.
pub(crate) fn spans<'a>(
    samplings: impl Iterator<Item = &'a Sampling>,
    vocab_size: usize,
) -> Vec<Range<usize>> {
    let mut end = 0;
    let spans = samplings.map(|sampling| {
        let start = end;
        end += sampling.report_len(vocab_size);
        start..end
    });
    spans.collect()
}

/// Draws from `logits` `[rows, vocab]`. What a row draws does not depend on the others.
pub(crate) fn draw(logits: &Array, rows: &[Row<'_>]) -> Result<Draw, Exception> {
    let adjusted = match rows.iter().any(Row::is_adjusted) {
        true => by_row(logits, rows, adjust)?,
        false => logits.clone(),
    };
    let tokens = if rows.iter().all(|row| row.sampling.is_greedy()) {
        argmax_axis(&adjusted, -1, false)?
    } else {
        let scaled = leave_out(scale(&adjusted, rows)?, rows)?;
        argmax_axis(scaled.add(noise(rows, logits.dim(1))?)?, -1, false)?
    };
    let report = if rows.iter().all(|row| row.sampling.logprobs.is_none()) {
        tokens.clone()
    } else {
        let reports = rows.iter().enumerate().map(|(index, row)| {
            let index = index as i32;
            let token = slice(&tokens, &[index], &[index + 1])?;
            match row.sampling.logprobs {
                None => Ok(token),
                Some(_) => {
                    let top = row.sampling.top_count(logits.dim(1) as usize) as i32;
                    report(&row_of(logits, index)?, &token, top)
                }
            }
        });
        concatenate(&reports.collect::<Result<Vec<_>, Exception>>()?, 0)?
    };
    Ok(Draw { tokens, report })
}

fn row_of(logits: &Array, index: i32) -> Result<Array, Exception> {
    if logits.dim(0) == 1 {
        return Ok(logits.clone());
    }
    slice(logits, &[index, 0], &[index + 1, logits.dim(1)])
}

/// `logits` in float32 after `f` for each row.
fn by_row(
    logits: &Array,
    rows: &[Row<'_>],
    f: impl Fn(&Array, &Row<'_>) -> Result<Array, Exception>,
) -> Result<Array, Exception> {
    let logits = logits.as_dtype(Dtype::Float32)?;
    let changed =
        rows.iter().enumerate().map(|(index, row)| f(&row_of(&logits, index as i32)?, row));
    let changed = changed.collect::<Result<Vec<_>, Exception>>()?;
    if changed.len() == 1 { Ok(changed[0].clone()) } else { concatenate(&changed, 0) }
}

/// Penalties and bias, on logits `[1, vocab]`.
#[expect(clippy::float_cmp, reason = "the values that mean none are set, not computed")]
fn adjust(logits: &Array, row: &Row<'_>) -> Result<Array, Exception> {
    let &Sampling { repetition_penalty, presence_penalty, frequency_penalty, .. } = row.sampling;
    let mut logits = logits.clone();
    let scaled = |array: &Array, by: f32| array.multiply(Array::from_f32(by));
    if let Some(counts) = &row.counts {
        if repetition_penalty != 1.0 {
            let positive = logits.gt(Array::from_f32(0.0))?;
            let less = select(
                positive,
                scaled(&logits, 1.0 / repetition_penalty)?,
                scaled(&logits, repetition_penalty)?,
            )?;
            logits = select(counts.seen()?, less, logits)?;
        }
        if presence_penalty != 0.0 || frequency_penalty != 0.0 {
            let drawn = counts.drawn()?;
            let present = drawn.gt(Array::from_f32(0.0))?.as_dtype(Dtype::Float32)?;
            let penalty = scaled(&drawn, frequency_penalty)?;
            logits = logits.subtract(penalty.add(scaled(&present, presence_penalty)?)?)?;
        }
    }
    match row.bias {
        Some(bias) => logits.add(bias),
        None => Ok(logits),
    }
}

/// One number per row, `[rows, 1]`.
fn column(rows: &[Row<'_>], f: impl Fn(&Sampling) -> f32) -> Array {
    let values: Vec<f32> = rows.iter().map(|row| f(row.sampling)).collect();
    Array::from_slice(&values, &[rows.len() as i32, 1])
}

/// Logits after the temperature, in float32; rows that draw nothing by chance stay as they are.
fn scale(logits: &Array, rows: &[Row<'_>]) -> Result<Array, Exception> {
    let by = |s: &Sampling| if s.is_greedy() { 1.0 } else { 1.0 / s.temperature };
    logits.as_dtype(Dtype::Float32)?.multiply(column(rows, by))
}

/// Minus infinity where `top_k`, `top_p` or `min_p` leave a token out.
fn leave_out(scaled: Array, rows: &[Row<'_>]) -> Result<Array, Exception> {
    let cut = |s: &Sampling| !s.is_greedy() && (s.top_k > 0 || s.top_p < 1.0);
    let chosen: Vec<usize> = (0..rows.len()).filter(|i| cut(rows[*i].sampling)).collect();
    let min_p = |s: &Sampling| if s.is_greedy() { 0.0 } else { s.min_p };
    let mut threshold = None;
    if chosen.len() == rows.len() {
        threshold = Some(smallest_kept(&scaled, rows)?);
    } else if !chosen.is_empty() {
        // Sorting is dear: only where it is asked for.
        let part = |i: &usize| smallest_kept(&row_of(&scaled, *i as i32)?, &rows[*i..=*i]);
        let mut found = chosen.iter().map(part).collect::<Result<Vec<_>, Exception>>()?;
        found.push(Array::from_slice(&[f32::NEG_INFINITY], &[1, 1]));
        let place = |i: usize| chosen.iter().position(|c| *c == i).unwrap_or(chosen.len());
        let places: Vec<u32> = (0..rows.len()).map(|i| place(i) as u32).collect();
        let places = Array::from_slice(&places, &[rows.len() as i32]);
        threshold = Some(concatenate(&found, 0)?.take_axis(&places, 0)?);
    }
    if rows.iter().any(|row| min_p(row.sampling) > 0.0) {
        // The logarithm of 0 leaves nothing out.
        let least = scaled.max_axis(-1, true)?.add(column(rows, |s| min_p(s).ln()))?;
        threshold = Some(match threshold {
            Some(other) => maximum(other, least)?,
            None => least,
        });
    }
    match threshold {
        Some(threshold) => {
            select(scaled.ge(threshold)?, &scaled, Array::from_f32(f32::NEG_INFINITY))
        }
        None => Ok(scaled),
    }
}

/// The smallest logit that `top_k` and `top_p` keep, `[rows, 1]`; equal ones are kept together.
fn smallest_kept(scaled: &Array, rows: &[Row<'_>]) -> Result<Array, Exception> {
    let (count, vocab) = (rows.len() as i32, scaled.dim(1));
    let sorted = sort_axis(scaled, -1)?;
    let places: Vec<i32> = (rows.iter())
        .map(|row| match i32::try_from(row.sampling.top_k) {
            Ok(k @ 1..) if k < vocab => vocab - k,
            Ok(_) | Err(_) => 0,
        })
        .collect();
    let of_k = take_along_axis(&sorted, Array::from_slice(&places, &[count, 1]), -1)?;
    if rows.iter().all(|row| row.sampling.top_p >= 1.0) {
        return Ok(of_k);
    }
    let kept = sorted.ge(&of_k)?;
    let left = select(kept, &sorted, Array::from_f32(f32::NEG_INFINITY))?;
    // Ascending, so that a token is kept when what comes up to and with it exceeds the part to be cut off.
    let cumulative = cumsum(softmax_axis(&left, -1, true)?, -1, None, None)?;
    let cut_off = column(rows, |s| if s.top_p >= 1.0 { -1.0 } else { 1.0 - s.top_p });
    let kept = cumulative.gt(cut_off)?;
    let smallest = select(kept, &left, Array::from_f32(f32::INFINITY))?.min_axis(-1, true)?;
    // Rounding must not cut off the likeliest token.
    let of_p = minimum(smallest, slice(&sorted, &[0, vocab - 1], &[count, vocab])?)?;
    maximum(of_k, of_p)
}

/// `[rows, vocab]`, float32: added to log-probabilities, the largest sum is a draw by them (the Gumbel-max trick).
/// Zeros for rows that draw nothing by chance.
fn noise(rows: &[Row<'_>], vocab: i32) -> Result<Array, Exception> {
    let shape = [1, vocab];
    let noise = rows.iter().map(|row| {
        if row.sampling.is_greedy() {
            return zeros_dtype(&shape, Dtype::Float32);
        }
        let seed = derive_shard_seed(row.sampling.seed, 0, row.draw);
        random::gumbel::<f32>(&shape[..], &random::key(seed)?)
    });
    let noise = noise.collect::<Result<Vec<_>, Exception>>()?;
    if noise.len() == 1 { Ok(noise[0].clone()) } else { concatenate(&noise, 0) }
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
    use crate::history::History;

    fn logits(probabilities: &[f32]) -> Array {
        let logits: Vec<f32> = probabilities.iter().map(|p| p.ln()).collect();
        Array::from_slice(&logits, &[1, probabilities.len() as i32])
    }

    fn row(sampling: &Sampling, draw: u64) -> Row<'_> {
        Row { sampling, draw, counts: None, bias: None }
    }

    fn sampled(temperature: f32, top_p: f32) -> Sampling {
        Sampling { temperature, top_p, seed: 7, ..Sampling::greedy() }
    }

    fn read(drawn: &Draw) -> Vec<u32> {
        drawn.tokens.to_vec_exact().unwrap()
    }

    fn tokens_of(probabilities: &[f32], sampling: &Sampling, draws: u64) -> Vec<u32> {
        let logits = logits(probabilities);
        (0..draws).flat_map(|i| read(&draw(&logits, &[row(sampling, i)]).unwrap())).collect()
    }

    fn tokens(probabilities: &[f32], temperature: f32, top_p: f32, draws: u64) -> Vec<u32> {
        tokens_of(probabilities, &sampled(temperature, top_p), draws)
    }

    fn kinds(mut tokens: Vec<u32>) -> Vec<u32> {
        tokens.sort_unstable();
        tokens.dedup();
        tokens
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
    fn unlikely_tokens_are_left_out() {
        let probabilities = [0.05, 0.5, 0.15, 0.3];
        let all = sampled(1.0, 1.0);
        for (top_k, top_p, min_p, allowed) in [
            (0, 1e-9, 0.0, vec![1]),
            (0, 0.4, 0.0, vec![1]),
            (0, 0.75, 0.0, vec![1, 3]),
            (0, 0.9, 0.0, vec![1, 2, 3]),
            (1, 1.0, 0.0, vec![1]),
            (2, 1.0, 0.0, vec![1, 3]),
            (3, 1.0, 0.0, vec![1, 2, 3]),
            (9, 1.0, 0.0, vec![0, 1, 2, 3]),
            (0, 1.0, 0.2, vec![1, 2, 3]),
            (0, 1.0, 0.5, vec![1, 3]),
            (0, 1.0, 1.0, vec![1]),
            // Of the three likeliest the first two have 0.84 together.
            (3, 0.82, 0.0, vec![1, 3]),
            (3, 0.9, 0.5, vec![1, 3]),
        ] {
            let sampling = Sampling { top_k, top_p, min_p, ..all.clone() };
            let seen = kinds(tokens_of(&probabilities, &sampling, 200));
            assert_eq!(seen, allowed, "top_k {top_k} top_p {top_p} min_p {min_p}");
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

    /// Tokens 0 and 1 in the prompt, 1 twice and 2 once in the answer.
    fn adjusted(sampling: &Sampling, logits: &[f32]) -> Vec<f32> {
        let vocab = logits.len() as i32;
        let mut history = History::resumed(2);
        history.feed_prompt(&[0, 1, 1, 2, 1]);
        let counts = Some(history.counts(vocab, None).unwrap());
        let bias = sampling.bias(vocab);
        let row = Row { sampling, draw: 0, counts, bias: bias.as_ref() };
        let logits = Array::from_slice(logits, &[1, vocab]);
        adjust(&logits, &row).unwrap().to_vec_exact().unwrap()
    }

    #[test]
    fn penalties_and_bias_change_logits_as_documented() {
        let none = Sampling::greedy();
        let logits = [4.0, -2.0, 3.0, 1.0];
        let check = |sampling: Sampling, expect: [f32; 4]| {
            assert_eq!(adjusted(&sampling, &logits), expect, "{sampling:?}");
        };
        check(none.clone(), logits);
        check(Sampling { repetition_penalty: 2.0, ..none.clone() }, [2.0, -4.0, 1.5, 1.0]);
        check(Sampling { presence_penalty: 0.5, ..none.clone() }, [4.0, -2.5, 2.5, 1.0]);
        check(Sampling { frequency_penalty: 0.5, ..none.clone() }, [4.0, -3.0, 2.5, 1.0]);
        let bias = vec![(3, 9.0), (0, -1.0), (77, 1.0)];
        check(Sampling { logit_bias: bias, ..none }, [3.0, -2.0, 3.0, 10.0]);
    }

    #[test]
    fn rows_draw_as_if_they_were_alone() {
        let samplings = [
            sampled(1.0, 0.9),
            Sampling::greedy(),
            Sampling { top_k: 3, seed: 8, ..sampled(0.7, 1.0) },
            Sampling { min_p: 0.3, seed: 9, ..sampled(1.3, 1.0) },
            Sampling {
                logit_bias: vec![(4, 3.0)],
                logprobs: Some(2),
                seed: 3,
                ..sampled(1.0, 1.0)
            },
            Sampling { logprobs: Some(0), ..Sampling::greedy() },
        ];
        let all: Vec<Array> = (0..samplings.len())
            .map(|r| logits(&[0.1, 0.2, 0.05, 0.3, 0.15, 0.2].map(|p| p + 0.01 * r as f32)))
            .collect();
        let together = concatenate(&all, 0).unwrap();
        let spans = spans(samplings.iter(), 6);
        for i in 0..20 {
            let biases: Vec<Option<Array>> = samplings.iter().map(|s| s.bias(6)).collect();
            let rows: Vec<Row<'_>> = (samplings.iter().zip(&biases))
                .map(|(s, bias)| Row { bias: bias.as_ref(), ..row(s, i) })
                .collect();
            let both = draw(&together, &rows).unwrap();
            let report: Vec<u32> = both.report.to_vec_exact().unwrap();
            for (index, alone) in rows.into_iter().enumerate() {
                let alone = draw(&all[index], &[alone]).unwrap();
                assert_eq!(read(&both)[index], read(&alone)[0], "row {index}");
                let alone: Vec<u32> = alone.report.to_vec_exact().unwrap();
                assert_eq!(report[spans[index].clone()], alone, "row {index}");
            }
        }
    }

    #[test]
    fn reports_log_probabilities_of_the_model_itself() {
        let probabilities = [0.125_f32, 0.5, 0.25, 0.125];
        let logits: Vec<f32> = probabilities.iter().map(|p| p.ln() + 3.0).collect();
        let logits = Array::from_slice(&logits, &[1, 4]);
        let sampling = Sampling { logprobs: Some(3), ..Sampling::greedy() };
        let drawn = draw(&logits, &[row(&sampling, 0)]).unwrap();
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
        let drawn = draw(&logits, &[row(&all, 0)]).unwrap();
        let report: Vec<u32> = drawn.report.to_vec_exact().unwrap();
        assert_eq!(StepOutput::parse(&report).top.len(), 4);
    }
}
