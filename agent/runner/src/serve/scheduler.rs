//! What rank 0 runs next: which sequences are admitted, prefilled, decoded, put off. Pure: knows
//! tokens and sequence numbers only; never texts, clients, the clock or MLX.
//!
//! Sequences are admitted first come, first served, up to a number of sequences and of positions in
//! their caches. The control plane sets aside, on each rank, a cache for one full context per
//! replica (`exo-plan`, `place`): all live sequences together never need more than that. Each counts
//! with what it holds, not with what it may come to: when they grow beyond the limit, the newest is
//! put off. Its tokens are kept, and fed anew once there is room. One alone always has room.
//!
//! Work goes in rounds: one chunk of one prompt, then one decode step for all sequences that have
//! their prompt behind them. So all answers stream at the same pace, and a long prompt delays them
//! by one chunk a round at most.

use std::collections::{BTreeMap, VecDeque};

use exo_engine::{Feed, SeqId, Step, cache_positions};

/// Tokens that every live sequence must have room for when another is admitted: otherwise it would
/// be put off again at once.
const HEADROOM_TOKENS: usize = 64;

/// Limits of a [`Scheduler`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Limits {
    /// Sequences that hold a cache at the same time.
    pub(crate) live_max: usize,
    /// Prompt tokens fed in one step.
    pub(crate) chunk_tokens: usize,
    /// Positions that the caches of all live sequences may come to: the memory that placement set
    /// aside, one full context.
    pub(crate) kv_positions: usize,
}

/// A sequence to run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Job {
    pub(crate) seq: SeqId,
    /// Not empty; tokens drawn in an earlier run included.
    pub(crate) tokens: Vec<u32>,
    /// How many tokens were drawn in earlier runs.
    pub(crate) draws: u64,
}

/// The next thing to do.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Action {
    Open { seq: SeqId },
    Prefill(Step),
    Decode(Vec<Feed>),
    Close { seq: SeqId },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Tokens from here on are still to be fed.
    Prefill { fed: usize },
    /// A step that draws is under way.
    Drawing,
    /// The last token was drawn and is to be fed.
    Decode,
}

#[derive(Debug)]
struct Live {
    /// With all tokens drawn so far.
    job: Job,
    state: State,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Scheduler {
    limits: Limits,
    waiting: VecDeque<Job>,
    /// Numbers rise with the time of submission: the last is the newest.
    live: BTreeMap<SeqId, Live>,
    /// Live sequences whose prompt is not behind them, in order of admission.
    prefilling: VecDeque<SeqId>,
    closing: VecDeque<SeqId>,
    /// The last step was a chunk: the next is a decode step, if any can be made.
    chunk_was_last: bool,
    put_off: u64,
}

impl Scheduler {
    pub(crate) fn new(limits: Limits) -> Self {
        Self {
            limits,
            waiting: VecDeque::new(),
            live: BTreeMap::new(),
            prefilling: VecDeque::new(),
            closing: VecDeque::new(),
            chunk_was_last: false,
            put_off: 0,
        }
    }

    /// Queues a sequence. Its number must not be in use.
    pub(crate) fn submit(&mut self, job: Job) {
        debug_assert!(!job.tokens.is_empty(), "the request was checked for this");
        self.waiting.push_back(job);
    }

    /// Ends a sequence, wherever it is; nothing happens if it is gone already.
    pub(crate) fn finish(&mut self, seq: SeqId) {
        if self.live.remove(&seq).is_some() {
            self.prefilling.retain(|other| *other != seq);
            self.closing.push_back(seq);
        } else {
            self.waiting.retain(|job| job.seq != seq);
        }
    }

    /// Tells what a step of the sequence drew. It goes on, unless [`Scheduler::finish`] follows.
    pub(crate) fn drew(&mut self, seq: SeqId, token: u32) {
        if let Some(live) = self.live.get_mut(&seq) {
            live.job.draws += 1;
            live.job.tokens.push(token);
            live.state = State::Decode;
        }
    }

    /// Sequences that hold a cache, and those that wait.
    pub(crate) fn counts(&self) -> (usize, usize) {
        (self.live.len(), self.waiting.len())
    }

    /// How many times a sequence was put off.
    pub(crate) fn put_off(&self) -> u64 {
        self.put_off
    }

    /// What to run now; `None` when there is nothing to do. After a step that draws, `drew` or
    /// `finish` must be called for each of its sequences before the next.
    pub(crate) fn next(&mut self) -> Option<Action> {
        // Memory is freed before more is taken.
        if let Some(seq) = self.closing.pop_front() {
            return Some(Action::Close { seq });
        }
        if let Some(seq) = self.too_many() {
            return Some(Action::Close { seq });
        }
        if let Some(job) = self.admit() {
            let seq = job.seq;
            self.live.insert(seq, Live { job, state: State::Prefill { fed: 0 } });
            self.prefilling.push_back(seq);
            return Some(Action::Open { seq });
        }
        if self.chunk_was_last {
            return self.next_decode().or_else(|| self.next_chunk());
        }
        self.next_chunk().or_else(|| self.next_decode())
    }

    /// Whether the decode step after the one that [`Scheduler::next`] gave last will be for the same sequences, unless
    /// something ends or comes meanwhile: no prompt is to be fed, nobody is let in, and nobody has to make room for it.
    pub(crate) fn is_steady(&self) -> bool {
        let fits = || self.live.len() < 2 || self.held(None, 2) <= self.limits.kv_positions;
        self.closing.is_empty() && self.prefilling.is_empty() && !self.has_room() && fits()
    }

    /// All that can go on are decoded in a step that is settled already.
    pub(crate) fn decode_again(&mut self) {
        let ready = self.live.values_mut().filter(|live| live.state == State::Decode);
        ready.for_each(|live| live.state = State::Drawing);
    }

    /// Positions that the live sequences, and `another` of so many tokens, take up with `more` tokens each.
    fn held(&self, another: Option<usize>, more: usize) -> usize {
        let live = self.live.values().map(|live| live.job.tokens.len());
        cache_positions(live.chain(another).map(|tokens| tokens + more))
    }

    /// Puts off the newest sequence if all together need more than there is.
    fn too_many(&mut self) -> Option<SeqId> {
        if self.live.len() < 2 || self.held(None, 1) <= self.limits.kv_positions {
            return None;
        }
        let (seq, live) = self.live.pop_last()?;
        self.prefilling.retain(|other| *other != seq);
        self.waiting.push_front(live.job);
        self.put_off += 1;
        Some(seq)
    }

    /// The first that waits, if there is room for it. None overtakes it: it would wait for ever.
    fn admit(&mut self) -> Option<Job> {
        if self.has_room() { self.waiting.pop_front() } else { None }
    }

    /// Whether there is room for the first that waits; not if none does.
    fn has_room(&self) -> bool {
        let Some(first) = self.waiting.front() else { return false };
        let held = || self.held(Some(first.tokens.len()), HEADROOM_TOKENS);
        let fits = || held() <= self.limits.kv_positions;
        self.live.is_empty() || (self.live.len() < self.limits.live_max && fits())
    }

    fn next_decode(&mut self) -> Option<Action> {
        let mut feeds = Vec::new();
        for (&seq, live) in &mut self.live {
            if live.state == State::Decode {
                live.state = State::Drawing;
                let token = *live.job.tokens.last().expect("a job has tokens");
                feeds.push(Feed { seq, token, draw: live.job.draws });
            }
        }
        if feeds.is_empty() {
            return None;
        }
        self.chunk_was_last = false;
        Some(Action::Decode(feeds))
    }

    fn next_chunk(&mut self) -> Option<Action> {
        let seq = *self.prefilling.front()?;
        let live = self.live.get_mut(&seq).expect("`finish` takes it out of both");
        let State::Prefill { fed } = live.state else {
            unreachable!("a sequence leaves `prefilling` with its last chunk")
        };
        let end = (fed + self.limits.chunk_tokens).min(live.job.tokens.len());
        let tokens = live.job.tokens[fed..end].to_vec();
        let sample = end == live.job.tokens.len();
        if sample {
            self.prefilling.pop_front();
            live.state = State::Drawing;
        } else {
            live.state = State::Prefill { fed: end };
        }
        self.chunk_was_last = true;
        Some(Action::Prefill(Step::Prefill { seq, tokens, sample, draw: live.job.draws }))
    }
}

#[cfg(test)]
mod tests;
