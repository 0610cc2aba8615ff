//! What all ranks run before rank 0 takes requests, so that the first ones find all kernels made, and a model that
//! computes no numbers is found out. Owns the choice of shapes; measures nothing, and never decides how long is too
//! long.

use exo_engine::{Feed, Opening, Sampling, Step, StepOutput, cache_positions};

use super::{
    driver::{Executor, Stepped},
    report::Failure,
};

/// Why the warm-up fails where log-probabilities are NaN or infinite.
pub(crate) const NOT_FINITE: &str = "NotFinite";
/// What is fed everywhere.
pub(crate) const TOKEN: u32 = 0;
/// What is fed instead where that gives no numbers: 16 bits can be too few for a single odd token.
const OTHER_TOKEN: u32 = 1;
/// Enough for the kernels of a prefill.
pub(crate) const PROMPT_TOKENS: usize = 32;
/// Between prompts of rows side by side: their positions differ then, and the shorter ones begin with padding.
const PROMPT_DIFFERENCE: usize = 8;
/// Two with all rows, the second of which was begun ahead, the first for half of several; one after some have left.
const DECODE_STEPS: usize = 3;
/// Rows up to which kernels differ by their number; more are handled as these are.
const ROWS_MAX: usize = 32;

/// What the shapes follow from.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Extent {
    /// Kernels are compiled when they are first used.
    pub(crate) compiles: bool,
    pub(crate) max_context: usize,
    pub(crate) vocab_size: usize,
    /// Sequences that are decoded together at most.
    pub(crate) live_max: usize,
    /// Prompt tokens fed in one step.
    pub(crate) chunk_tokens: usize,
}

/// Sequences that run side by side.
#[derive(Debug)]
struct Round {
    /// How each draws, and the length of its prompt.
    rows: Vec<(Sampling, usize)>,
}

/// Runs the shapes one after the other until `is_over` says so; the first always. Tells after each how many are done,
/// and of how many.
///
/// # Errors
/// A rank failed, or refused what it must be able to do.
pub(crate) fn warm_up(
    executor: &mut impl Executor,
    extent: &Extent,
    is_over: impl Fn() -> bool,
    mut tell: impl FnMut(usize, usize),
) -> Result<(), Failure> {
    let rounds = rounds(extent);
    for (index, round) in rounds.iter().enumerate() {
        if index > 0 && is_over() {
            break;
        }
        match run(executor, extent, round, TOKEN) {
            Err(failure) if failure.reason == NOT_FINITE && extent.vocab_size > 1 => {
                run(executor, extent, round, OTHER_TOKEN)?;
                tracing::warn!(token = TOKEN, "the model computes no numbers for this token");
            }
            result => result?,
        }
        tell(index + 1, rounds.len());
    }
    Ok(())
}

fn rounds(extent: &Extent) -> Vec<Round> {
    // Room for one token behind the prompt, where there is any.
    let room = extent.max_context.saturating_sub(1).max(1);
    let one = |sampling, prompt: usize| Round { rows: vec![(sampling, prompt.min(room))] };
    // Reported, to be looked at: always, as this round always runs.
    let greedy = Sampling { logprobs: Some(0), ..Sampling::greedy() };
    let mut rounds = vec![one(greedy, PROMPT_TOKENS)];
    if !extent.compiles {
        return rounds;
    }
    rounds.push(one(chosen(), PROMPT_TOKENS));
    rounds.push(one(penalized(), extent.chunk_tokens));
    let longest = PROMPT_TOKENS + PROMPT_DIFFERENCE;
    let fits = |rows: usize| {
        // With a step before all are there, and one that is begun behind the last.
        let tokens = longest + DECODE_STEPS + 2;
        rows <= extent.live_max.min(ROWS_MAX)
            && tokens <= extent.max_context
            && cache_positions(std::iter::repeat_n(tokens, rows)) <= extent.max_context
    };
    let doubled = std::iter::successors(Some(2_usize), |rows| Some(rows * 2));
    rounds.extend(doubled.take_while(|rows| fits(*rows)).map(|rows| {
        let row = |index: usize| match index % 2 {
            0 => (Sampling::greedy(), PROMPT_TOKENS),
            _ => (chosen(), longest),
        };
        Round { rows: (0..rows).map(row).collect() }
    }));
    rounds
}

/// By chance among some tokens.
fn chosen() -> Sampling {
    Sampling { temperature: 0.7, top_k: 40, top_p: 0.9, min_p: 0.05, ..Sampling::greedy() }
}

/// By chance among all, with everything that changes logits, and reported.
fn penalized() -> Sampling {
    Sampling {
        temperature: 1.0,
        repetition_penalty: 1.1,
        presence_penalty: 0.1,
        frequency_penalty: 0.1,
        logit_bias: vec![(0, 0.5)],
        logprobs: Some(5),
        ..Sampling::greedy()
    }
}

/// All sequences are closed behind it, unless a rank failed: requests may have their numbers.
fn run(
    executor: &mut impl Executor,
    extent: &Extent,
    round: &Round,
    token: u32,
) -> Result<(), Failure> {
    let mut open: Vec<Feed> = Vec::new();
    let result = run_open(executor, extent, round, token, &mut open);
    if !result.as_ref().is_err_and(|failure| failure.reason != NOT_FINITE) {
        open.into_iter().try_for_each(|feed| executor.close(feed.seq))?;
    }
    result
}

/// Leaves in `open` what the next step would feed to each sequence that is still open.
fn run_open(
    executor: &mut impl Executor,
    extent: &Extent,
    round: &Round,
    token: u32,
    open: &mut Vec<Feed>,
) -> Result<(), Failure> {
    // Half of several rows have a step begun ahead when the others come: that is how requests join others.
    let joins = round.rows.len() / 2;
    for ((sampling, prompt), seq) in round.rows.iter().zip(0..) {
        if seq > 0 && seq as usize == joins {
            decode(executor, round, open)?;
        }
        let opening = Opening { prompt: Some(*prompt), ..sampling.clone().into() };
        executor.open(seq, &opening)?;
        open.push(Feed { seq, token, draw: 0 });
        let mut outputs = Vec::new();
        for start in (0..*prompt).step_by(extent.chunk_tokens) {
            let end = (start + extent.chunk_tokens).min(*prompt);
            let (tokens, sample) = (vec![token; end - start], end == *prompt);
            outputs = done(executor.prefill(&Step::Prefill { seq, tokens, sample, draw: 0 })?)?;
        }
        go_on(round, &mut open[seq as usize..], &outputs);
    }
    let longest = round.rows.iter().map(|(_, prompt)| *prompt).max().unwrap_or(0);
    let steps = DECODE_STEPS.min(extent.max_context.saturating_sub(longest));
    for step in 1..=steps {
        if step == DECODE_STEPS {
            for feed in open.split_off(open.len().div_ceil(2)) {
                executor.close(feed.seq)?;
            }
        }
        decode(executor, round, open)?;
    }
    Ok(())
}

fn decode(executor: &mut impl Executor, round: &Round, open: &mut [Feed]) -> Result<(), Failure> {
    let outputs = done(executor.decode(open, false)?)?;
    go_on(round, open, &outputs);
    Ok(())
}

/// Rows side by side go on with what they drew, so that what was begun ahead is used. One row alone is fed the same token
/// all the time, whose numbers are looked at.
fn go_on(round: &Round, feeds: &mut [Feed], outputs: &[StepOutput]) {
    feeds.iter_mut().for_each(|feed| feed.draw += 1);
    if round.rows.len() > 1 {
        feeds.iter_mut().zip(outputs).for_each(|(feed, output)| feed.token = output.token);
    }
}

fn done(stepped: Stepped) -> Result<Vec<StepOutput>, Failure> {
    match stepped {
        Stepped::Done(outputs) => {
            let mut logprobs = outputs.iter().filter_map(|output| output.logprob);
            match logprobs.all(f32::is_finite) {
                true => Ok(outputs),
                false => Err(Failure::permanent(
                    NOT_FINITE,
                    "the model's log-probabilities are NaN or infinite, though its weights are \
                     not: they may be of another type than the file says, or damaged",
                )),
            }
        }
        Stepped::Refused(message) => Err(Failure::permanent("EngineFailed", message)),
    }
}

#[cfg(test)]
mod tests {
    use std::{cell::Cell, collections::BTreeMap};

    use exo_engine::SeqId;

    use super::*;

    /// Knows what is open, and refuses what does not fit.
    struct Model {
        extent: Extent,
        held: BTreeMap<SeqId, usize>,
        batches: Vec<usize>,
        /// Of each batch.
        fed: Vec<Vec<(u32, u64)>>,
        chunks: Vec<usize>,
        /// Of what it draws, if it draws.
        logprob: Option<f32>,
        /// What it can't compute with.
        odd: Option<u32>,
        /// From this step on.
        odd_from: usize,
    }

    impl Model {
        fn new(extent: Extent) -> Self {
            let (batches, chunks) = (Vec::new(), Vec::new());
            Self {
                extent,
                held: BTreeMap::new(),
                batches,
                fed: Vec::new(),
                chunks,
                logprob: None,
                odd: None,
                odd_from: 0,
            }
        }

        fn drawn(&self, rows: usize, token: u32) -> Stepped {
            let steps = self.batches.len() + self.chunks.len();
            if self.odd == Some(token) && steps >= self.odd_from {
                let logprob = Some(f32::NAN);
                return Stepped::Done(vec![StepOutput { token, logprob, top: Vec::new() }]);
            }
            let output = |logprob| StepOutput { token: 1, logprob: Some(logprob), top: Vec::new() };
            Stepped::Done(self.logprob.map(|x| vec![output(x); rows]).unwrap_or_default())
        }

        fn feed(&mut self, seq: SeqId, tokens: usize) {
            *self.held.get_mut(&seq).expect("open") += tokens;
            let held = self.held.values().copied();
            assert!(held.clone().all(|held| held <= self.extent.max_context));
            assert!(held.len() == 1 || cache_positions(held) <= self.extent.max_context);
        }
    }

    impl Executor for Model {
        fn open(&mut self, seq: SeqId, _: &Opening) -> Result<(), Failure> {
            assert!(self.held.insert(seq, 0).is_none());
            Ok(())
        }

        fn prefill(&mut self, step: &Step) -> Result<Stepped, Failure> {
            let Step::Prefill { seq, tokens, .. } = step else { panic!("{step:?}") };
            self.chunks.push(tokens.len());
            self.feed(*seq, tokens.len());
            Ok(self.drawn(1, tokens[0]))
        }

        fn has_others(&self) -> bool {
            false
        }

        fn decode(&mut self, feeds: &[Feed], _: bool) -> Result<Stepped, Failure> {
            feeds.iter().for_each(|feed| self.feed(feed.seq, 1));
            self.batches.push(feeds.len());
            self.fed.push(feeds.iter().map(|feed| (feed.token, feed.draw)).collect());
            Ok(self.drawn(feeds.len(), feeds[0].token))
        }

        fn close(&mut self, seq: SeqId) -> Result<(), Failure> {
            assert!(self.held.remove(&seq).is_some());
            Ok(())
        }
    }

    /// Batches and chunks that were run until `rounds` were done.
    fn warmed(extent: Extent, rounds: usize) -> (Vec<usize>, Vec<usize>) {
        let mut model = Model::new(extent);
        let told = Cell::new(0);
        warm_up(&mut model, &extent, || told.get() >= rounds, |done, _| told.set(done)).unwrap();
        assert!(model.held.is_empty());
        (model.batches, model.chunks)
    }

    #[test]
    fn shapes_are_those_that_requests_can_have() {
        let extent = Extent {
            compiles: true,
            max_context: 4096,
            vocab_size: 2,
            live_max: 12,
            chunk_tokens: 512,
        };
        let (batches, chunks) = warmed(extent, usize::MAX);
        assert_eq!(batches, [1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 1, 2, 4, 4, 2, 4, 8, 8, 4]);
        assert_eq!(chunks[..5], [32, 32, 512, 32, 40]);
        // Nothing is compiled: one short answer will do.
        let (batches, chunks) = warmed(Extent { compiles: false, ..extent }, usize::MAX);
        assert_eq!((batches, chunks), (vec![1; 3], vec![32]));
        // Whatever there is room for.
        let (batches, _) = warmed(Extent { max_context: 600, ..extent }, usize::MAX);
        assert_eq!(batches.iter().max(), Some(&2));
        for max_context in 1..50 {
            warmed(Extent { max_context, ..extent }, usize::MAX);
        }
    }

    #[test]
    fn rows_come_to_others_that_are_a_step_ahead() {
        let extent = Extent {
            compiles: true,
            max_context: 4096,
            vocab_size: 2,
            live_max: 2,
            chunk_tokens: 512,
        };
        let mut model = Model { logprob: Some(-0.5), ..Model::new(extent) };
        warm_up(&mut model, &extent, || false, |_, _| {}).unwrap();
        let alone = [vec![(TOKEN, 1)], vec![(TOKEN, 2)], vec![(TOKEN, 3)]];
        assert_eq!(model.fed[..9], [alone.clone(), alone.clone(), alone].concat());
        // What they drew.
        let together = [vec![(1, 1)], vec![(1, 2), (1, 1)], vec![(1, 3), (1, 2)], vec![(1, 4)]];
        assert_eq!(model.fed[9..], together);
    }

    #[test]
    fn a_model_that_computes_no_numbers_is_refused() {
        let extent = Extent {
            compiles: false,
            max_context: 64,
            vocab_size: 2,
            live_max: 1,
            chunk_tokens: 512,
        };
        for (logprob, is_fine) in [(-0.5, true), (f32::NAN, false), (f32::NEG_INFINITY, false)] {
            let mut model = Model { logprob: Some(logprob), ..Model::new(extent) };
            match warm_up(&mut model, &extent, || false, |_, _| {}) {
                Ok(()) => assert!(is_fine, "{logprob}"),
                Err(failure) => {
                    assert!(!is_fine, "{failure}");
                    assert_eq!((failure.reason, failure.permanent), (NOT_FINITE, true));
                }
            }
        }
    }

    #[test]
    fn a_single_token_without_numbers_is_no_reason_to_refuse_a_model() {
        let extent = Extent {
            compiles: true,
            max_context: 4096,
            vocab_size: 2,
            live_max: 4,
            chunk_tokens: 512,
        };
        let mut model = Model { odd: Some(TOKEN), ..Model::new(extent) };
        warm_up(&mut model, &extent, || false, |_, _| {}).unwrap();
        assert!(model.held.is_empty());
        // Where nothing else can be fed, that is all there is.
        let mut model = Model { odd: Some(TOKEN), ..Model::new(extent) };
        let failure = warm_up(&mut model, &Extent { vocab_size: 1, ..extent }, || false, |_, _| {});
        assert_eq!(failure.unwrap_err().reason, NOT_FINITE);
        // In the last step of two rows, one of which has left.
        let mut model = Model { odd: Some(TOKEN), odd_from: 18, ..Model::new(extent) };
        warm_up(&mut model, &extent, || false, |_, _| {}).unwrap();
        assert!(model.held.is_empty());
    }

    #[test]
    fn it_ends_when_its_time_is_over() {
        let extent = Extent {
            compiles: true,
            max_context: 4096,
            vocab_size: 2,
            live_max: 12,
            chunk_tokens: 512,
        };
        assert_eq!(warmed(extent, 0).0, [1; 3]);
        assert_eq!(warmed(extent, 4).0.iter().max(), Some(&2));
    }
}
