//! What a sequence has said so far, as penalties need it. Owns the counts on the device; never changes logits.

use mlx_rs::error::Exception;
use mlx_rs::ops::{arange, floor};
use mlx_rs::{Array, Dtype};

/// Added to the count of a token that is in the prompt.
const IN_PROMPT: f32 = 0.5;

/// How often each token of the vocabulary came. One array, so that no part of it is left unevaluated over many steps.
#[derive(Clone)]
pub(crate) struct Counts {
    /// `[1, vocab]`, float32: how often each token was drawn, plus [`IN_PROMPT`].
    marks: Array,
}

impl Counts {
    fn new(tokens: &[u32], prompt: usize, vocab: i32) -> Self {
        let (prompt, drawn) = tokens.split_at(prompt.min(tokens.len()));
        let mut marks = vec![0_f32; vocab as usize];
        for &token in prompt {
            marks[token as usize] = IN_PROMPT;
        }
        for &token in drawn {
            marks[token as usize] += 1.0;
        }
        Self { marks: Array::from_slice(&marks, &[1, vocab]) }
    }

    /// With one more drawn token, `[1, 1]`.
    fn with(&self, token: &Array) -> Result<Self, Exception> {
        let vocab = self.marks.dim(1);
        let one = arange::<i32, u32>(0, vocab, 1)?.reshape(&[1, vocab])?.eq(token)?;
        Ok(Self { marks: self.marks.add(one.as_dtype(Dtype::Float32)?)? })
    }

    /// `[1, vocab]`, float32: how often each token was drawn.
    pub(crate) fn drawn(&self) -> Result<Array, Exception> {
        floor(&self.marks)
    }

    /// `[1, vocab]`, bool: which tokens were drawn or are in the prompt.
    pub(crate) fn seen(&self) -> Result<Array, Exception> {
        self.marks.gt(Array::from_f32(0.0))
    }
}

/// The tokens of one sequence whose sampling asks for them.
#[derive(Default)]
pub(crate) struct History {
    tokens: Vec<u32>,
    /// How many of the first tokens are the prompt.
    prompt: usize,
    /// The prompt's length was told; what is fed as a prompt behind it was drawn before.
    resumed: bool,
    /// Counts of so many tokens; the last of them may still be on the device.
    counts: Option<(usize, Counts)>,
}

impl History {
    /// Of a sequence whose first `prompt` tokens alone are its prompt.
    pub(crate) fn resumed(prompt: usize) -> Self {
        Self { prompt, resumed: true, ..Self::default() }
    }

    /// Takes tokens that were fed as a prompt.
    pub(crate) fn feed_prompt(&mut self, tokens: &[u32]) {
        self.tokens.extend(tokens);
        self.counts = None;
        if !self.resumed {
            self.prompt = self.tokens.len();
        }
    }

    /// Takes tokens that were drawn and then fed.
    pub(crate) fn feed(&mut self, tokens: &[u32]) {
        self.tokens.extend(tokens);
    }

    /// Forgets a token that was counted, but is not fed after all.
    pub(crate) fn roll_back(&mut self) {
        self.counts = None;
    }

    /// Counts of everything that was fed, and of `pending` `[1, 1]` behind it, which is fed next or rolled back.
    pub(crate) fn counts(
        &mut self,
        vocab: i32,
        pending: Option<&Array>,
    ) -> Result<Counts, Exception> {
        let fed = self.tokens.len();
        let known = match self.counts.take() {
            Some((upto, counts)) if upto == fed => counts,
            Some((upto, counts)) if upto + 1 == fed && upto >= self.prompt => {
                counts.with(&Array::from_slice(&self.tokens[upto..], &[1, 1]))?
            }
            Some(_) | None => Counts::new(&self.tokens, self.prompt, vocab),
        };
        let (upto, counts) = match pending {
            None => (fed, known),
            Some(token) => (fed + 1, known.with(token)?),
        };
        self.counts = Some((upto, counts.clone()));
        Ok(counts)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(counts: &Counts) -> (Vec<f32>, Vec<bool>) {
        let (drawn, seen) = (counts.drawn().unwrap(), counts.seen().unwrap());
        (drawn.to_vec_exact().unwrap(), seen.to_vec_exact().unwrap())
    }

    #[test]
    fn counts_are_the_same_however_tokens_come() {
        let mut history = History::default();
        history.feed_prompt(&[0, 3]);
        let seen = vec![true, false, false, true, false];
        assert_eq!(read(&history.counts(5, None).unwrap()), (vec![0.0; 5], seen.clone()));
        // Drawn ahead, and then fed as drawn.
        let ahead = history.counts(5, Some(&Array::from_slice(&[3_u32], &[1, 1]))).unwrap();
        let expect = (vec![0.0, 0.0, 0.0, 1.0, 0.0], seen);
        assert_eq!(read(&ahead), expect);
        history.feed(&[3]);
        assert_eq!(read(&history.counts(5, None).unwrap()), expect);
        // One by one.
        history.feed(&[4]);
        let after = (vec![0.0, 0.0, 0.0, 1.0, 1.0], vec![true, false, false, true, true]);
        assert_eq!(read(&history.counts(5, None).unwrap()), after);
        // Drawn ahead, and then something else is fed.
        history.counts(5, Some(&Array::from_slice(&[1_u32], &[1, 1]))).unwrap();
        history.roll_back();
        assert_eq!(read(&history.counts(5, None).unwrap()), after);
    }
}
