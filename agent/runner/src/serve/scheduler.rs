//! What rank 0 runs next: which sequences are admitted, prefilled, decoded. Pure: knows tokens and
//! sequence numbers only; never texts, clients, the clock or MLX.
//!
//! Sequences are admitted first come, first served, up to a number of sequences and of tokens in
//! their caches. The control plane sets aside, on each rank, a cache for one full context per
//! replica (`exo-plan`, `place`): so all live sequences together never need more than that. Each
//! counts from its admission on with all that it may come to; one alone is always admitted. Work goes in rounds: one chunk of
//! one prompt, then one decode step for each sequence that has its prompt behind it. So all answers
//! stream at the same pace, and a long prompt delays them by one chunk a round at most.

use std::collections::{BTreeMap, VecDeque};

use exo_engine::{SeqId, Step};

/// Limits of a [`Scheduler`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Limits {
    /// Sequences that hold a cache at the same time.
    pub(crate) live_max: usize,
    /// Prompt tokens fed in one step.
    pub(crate) chunk_tokens: usize,
    /// Tokens that the caches of all live sequences may come to: the memory that placement set
    /// aside, one full context.
    pub(crate) kv_tokens: usize,
}

/// A sequence to run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Job {
    pub(crate) seq: SeqId,
    /// Not empty; tokens drawn in an earlier run included.
    pub(crate) prompt: Vec<u32>,
    /// How many tokens were drawn in earlier runs.
    pub(crate) draws: u64,
    /// How many more may be drawn at most.
    pub(crate) tokens_left: usize,
}

impl Job {
    /// Tokens that its cache may come to.
    fn kv_tokens(&self) -> usize {
        self.prompt.len().saturating_add(self.tokens_left)
    }
}

/// The next thing to do.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Action {
    Open { seq: SeqId },
    Step(Step),
    Close { seq: SeqId },
}

#[derive(Debug)]
enum State {
    /// Prompt tokens from here on are still to be fed.
    Prefill { fed: usize },
    /// A step that draws is under way.
    Drawing,
    /// This token was drawn and is to be fed.
    Decode { token: u32 },
}

#[derive(Debug)]
struct Live {
    job: Job,
    state: State,
    /// As it was admitted with: what is drawn is no longer left, but fed.
    kv_tokens: usize,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Scheduler {
    limits: Limits,
    waiting: VecDeque<Job>,
    live: BTreeMap<SeqId, Live>,
    /// Live sequences whose prompt is not behind them, in order of admission.
    prefilling: VecDeque<SeqId>,
    /// Sequences whose decode step of this round is still to come.
    round: VecDeque<SeqId>,
    closing: VecDeque<SeqId>,
}

impl Scheduler {
    pub(crate) fn new(limits: Limits) -> Self {
        Self {
            limits,
            waiting: VecDeque::new(),
            live: BTreeMap::new(),
            prefilling: VecDeque::new(),
            round: VecDeque::new(),
            closing: VecDeque::new(),
        }
    }

    /// Queues a sequence. Its number must not be in use.
    pub(crate) fn submit(&mut self, job: Job) {
        debug_assert!(!job.prompt.is_empty(), "the request was checked for this");
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
            live.state = State::Decode { token };
        }
    }

    /// Sequences that hold a cache, and those that wait.
    pub(crate) fn counts(&self) -> (usize, usize) {
        (self.live.len(), self.waiting.len())
    }

    /// What to run now; `None` when there is nothing to do. After a step that draws, `drew` must be
    /// called before the sequence goes on.
    pub(crate) fn next(&mut self) -> Option<Action> {
        // Memory is freed before more is taken.
        if let Some(seq) = self.closing.pop_front() {
            return Some(Action::Close { seq });
        }
        if let Some(job) = self.admit() {
            let (seq, kv_tokens) = (job.seq, job.kv_tokens());
            self.live.insert(seq, Live { job, state: State::Prefill { fed: 0 }, kv_tokens });
            self.prefilling.push_back(seq);
            return Some(Action::Open { seq });
        }
        if let Some(step) = self.next_decode() {
            return Some(Action::Step(step));
        }
        // A new round.
        self.round.extend(
            (self.live.iter())
                .filter(|(_, live)| matches!(live.state, State::Decode { .. }))
                .map(|(seq, _)| *seq),
        );
        let step = self.next_chunk().or_else(|| self.next_decode());
        step.map(Action::Step)
    }

    /// The first that waits, if there is room for it. None overtakes it: it would wait for ever.
    fn admit(&mut self) -> Option<Job> {
        let wanted = self.waiting.front()?.kv_tokens();
        let held: usize = self.live.values().map(|live| live.kv_tokens).sum();
        let fits = held.saturating_add(wanted) <= self.limits.kv_tokens;
        let admitted = self.live.is_empty() || (self.live.len() < self.limits.live_max && fits);
        if admitted { self.waiting.pop_front() } else { None }
    }

    fn next_decode(&mut self) -> Option<Step> {
        while let Some(seq) = self.round.pop_front() {
            let Some(live) = self.live.get_mut(&seq) else { continue };
            if let State::Decode { token } = live.state {
                live.state = State::Drawing;
                return Some(Step::Decode { seq, token, draw: live.job.draws });
            }
        }
        None
    }

    fn next_chunk(&mut self) -> Option<Step> {
        let seq = *self.prefilling.front()?;
        let live = self.live.get_mut(&seq).expect("`finish` takes it out of both");
        let State::Prefill { fed } = live.state else {
            unreachable!("a sequence leaves `prefilling` with its last chunk")
        };
        let end = (fed + self.limits.chunk_tokens).min(live.job.prompt.len());
        let tokens = live.job.prompt[fed..end].to_vec();
        let sample = end == live.job.prompt.len();
        if sample {
            self.prefilling.pop_front();
            live.state = State::Drawing;
            live.job.prompt = Vec::new();
        } else {
            live.state = State::Prefill { fed: end };
        }
        Some(Step::Prefill { seq, tokens, sample, draw: live.job.draws })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn scheduler(live_max: usize, chunk_tokens: usize) -> Scheduler {
        Scheduler::new(Limits { live_max, chunk_tokens, kv_tokens: 1000 })
    }

    fn job(seq: SeqId, prompt: usize) -> Job {
        Job { seq, prompt: (0..prompt as u32).collect(), draws: 0, tokens_left: 8 }
    }

    fn prefill(seq: SeqId, tokens: std::ops::Range<u32>, sample: bool) -> Action {
        Action::Step(Step::Prefill { seq, tokens: tokens.collect(), sample, draw: 0 })
    }

    fn decode(seq: SeqId, token: u32, draw: u64) -> Action {
        Action::Step(Step::Decode { seq, token, draw })
    }

    #[test]
    fn a_prompt_goes_in_chunks_and_then_decodes() {
        let mut s = scheduler(1, 4);
        assert_eq!(s.next(), None);
        s.submit(job(7, 6));
        assert_eq!(s.next(), Some(Action::Open { seq: 7 }));
        assert_eq!(s.next(), Some(prefill(7, 0..4, false)));
        assert_eq!(s.next(), Some(prefill(7, 4..6, true)));
        assert_eq!(s.next(), None);
        s.drew(7, 50);
        assert_eq!(s.next(), Some(decode(7, 50, 1)));
        s.drew(7, 51);
        assert_eq!(s.next(), Some(decode(7, 51, 2)));
        s.finish(7);
        s.finish(7);
        assert_eq!(s.next(), Some(Action::Close { seq: 7 }));
        assert_eq!(s.next(), None);
    }

    #[test]
    fn a_resumed_sequence_goes_on_counting_draws() {
        let mut s = scheduler(1, 4);
        s.submit(Job { seq: 1, prompt: vec![5, 6], draws: 9, tokens_left: 1 });
        s.next();
        let step = Step::Prefill { seq: 1, tokens: vec![5, 6], sample: true, draw: 9 };
        assert_eq!(s.next(), Some(Action::Step(step)));
        s.drew(1, 4);
        assert_eq!(s.next(), Some(decode(1, 4, 10)));
    }

    #[test]
    fn a_long_prompt_holds_up_the_others_by_one_chunk() {
        let mut s = scheduler(2, 4);
        s.submit(job(1, 1));
        s.submit(job(2, 9));
        assert_eq!(s.next(), Some(Action::Open { seq: 1 }));
        assert_eq!(s.next(), Some(Action::Open { seq: 2 }));
        assert_eq!(s.next(), Some(prefill(1, 0..1, true)));
        s.drew(1, 50);
        let mut seen = Vec::new();
        for _ in 0..5 {
            let action = s.next().unwrap();
            if action == decode(1, 50, 1) {
                // Started over, to keep the comparison short.
                s.live.get_mut(&1).unwrap().state = State::Decode { token: 50 };
            }
            seen.push(action);
        }
        let chunk = |range, sample| prefill(2, range, sample);
        let step = || decode(1, 50, 1);
        assert_eq!(
            seen,
            [chunk(0..4, false), step(), chunk(4..8, false), step(), chunk(8..9, true)]
        );
    }

    #[test]
    fn the_rest_waits_in_order_and_may_leave() {
        let mut s = scheduler(1, 4);
        for seq in 1..=3 {
            s.submit(job(seq, 1));
        }
        assert_eq!(s.next(), Some(Action::Open { seq: 1 }));
        assert_eq!(s.counts(), (1, 2));
        s.finish(2);
        s.finish(1);
        assert_eq!(s.next(), Some(Action::Close { seq: 1 }));
        assert_eq!(s.next(), Some(Action::Open { seq: 3 }));
        assert_eq!(s.counts(), (1, 0));
    }

    #[test]
    fn caches_never_come_to_more_than_was_set_aside() {
        let mut s = Scheduler::new(Limits { live_max: 9, chunk_tokens: 100, kv_tokens: 20 });
        let mut submit = |seq, prompt, tokens_left| {
            s.submit(Job { tokens_left, ..job(seq, prompt) });
        };
        // 12 of 20; 9 is too much beside it, and the small one does not overtake.
        submit(1, 4, 8);
        submit(2, 8, 1);
        submit(3, 1, 1);
        // More than there is: runs, but alone.
        submit(4, 21, 9);
        assert_eq!(s.next(), Some(Action::Open { seq: 1 }));
        assert_eq!(s.next(), Some(prefill(1, 0..4, true)));
        s.drew(1, 50);
        assert_eq!(s.next(), Some(decode(1, 50, 1)));
        s.drew(1, 51);
        assert_eq!(s.counts(), (1, 3));
        s.finish(1);
        assert_eq!(s.next(), Some(Action::Close { seq: 1 }));
        assert_eq!(s.next(), Some(Action::Open { seq: 2 }));
        assert_eq!(s.next(), Some(Action::Open { seq: 3 }));
        assert_eq!(s.next(), Some(prefill(2, 0..8, true)));
        assert_eq!(s.counts(), (2, 1));
        for seq in [2, 3] {
            s.finish(seq);
        }
        assert_eq!(s.next(), Some(Action::Close { seq: 2 }));
        assert_eq!(s.next(), Some(Action::Close { seq: 3 }));
        assert_eq!(s.next(), Some(Action::Open { seq: 4 }));
    }

    /// What a test client does between two actions.
    #[derive(Clone, Debug)]
    enum Event {
        Submit { prompt: usize, answer: u64 },
        Cancel(prop::sample::Index),
        Run(usize),
    }

    fn event() -> impl Strategy<Value = Event> {
        prop_oneof![
            (1..20_usize, 1..8_u64).prop_map(|(prompt, answer)| Event::Submit { prompt, answer }),
            any::<prop::sample::Index>().prop_map(Event::Cancel),
            (1..10_usize).prop_map(Event::Run),
        ]
    }

    #[derive(Debug, Default)]
    struct Track {
        prompt: usize,
        answer: u64,
        fed: usize,
        draws: u64,
        opened: bool,
        closed: bool,
        cancelled: bool,
        /// Decode steps of others since its last own one, while it could decode.
        passed: BTreeMap<SeqId, usize>,
    }

    /// Plays an engine that checks every rule; `tracks` is indexed by sequence number.
    fn run_one(s: &mut Scheduler, limits: Limits, tracks: &mut [Track]) -> bool {
        let Some(action) = s.next() else { return false };
        match action {
            Action::Open { seq } => {
                let waits_longer = |t: &Track| !t.opened && !t.cancelled;
                assert!(!tracks[..seq as usize].iter().any(waits_longer), "not in order");
                let track = &mut tracks[seq as usize];
                assert!(!track.opened);
                track.opened = true;
            }
            Action::Close { seq } => {
                let track = &mut tracks[seq as usize];
                assert!(track.opened && !track.closed);
                track.closed = true;
            }
            Action::Step(Step::Prefill { seq, tokens, sample, draw }) => {
                let track = &mut tracks[seq as usize];
                assert!(track.opened && !track.closed && !track.cancelled && draw == 0);
                assert!(!tokens.is_empty() && tokens.len() <= limits.chunk_tokens);
                assert_eq!(tokens[0] as usize, track.fed);
                track.fed += tokens.len();
                assert_eq!(sample, track.fed == track.prompt);
                if sample {
                    drew(s, seq, track);
                }
            }
            Action::Step(Step::Decode { seq, token, draw }) => {
                let track = &mut tracks[seq as usize];
                assert!(track.opened && !track.closed && !track.cancelled);
                assert_eq!((draw, u64::from(token)), (track.draws, track.draws - 1));
                track.passed.clear();
                drew(s, seq, track);
                for (other, track) in tracks.iter_mut().enumerate() {
                    if other as u64 != seq && track.draws > 0 && !track.closed && !track.cancelled {
                        let passed = track.passed.entry(seq).or_default();
                        *passed += 1;
                        assert!(*passed <= 2, "{seq} overtook {other} again and again");
                    }
                }
            }
        }
        let open: Vec<&Track> = tracks.iter().filter(|t| t.opened && !t.closed).collect();
        assert!(open.len() <= limits.live_max);
        let kv_tokens: usize = open.iter().map(|t| t.prompt + t.answer as usize).sum();
        assert!(open.len() == 1 || kv_tokens <= limits.kv_tokens, "{kv_tokens} of {limits:?}");
        true
    }

    fn drew(s: &mut Scheduler, seq: SeqId, track: &mut Track) {
        s.drew(seq, track.draws as u32);
        track.draws += 1;
        if track.draws == track.answer {
            s.finish(seq);
            track.cancelled = true;
        }
    }

    proptest! {
        #[test]
        fn every_sequence_gets_what_it_asked_for(
            live_max in 1..4_usize,
            chunk_tokens in 1..6_usize,
            kv_tokens in 1..60_usize,
            events in prop::collection::vec(event(), 0..40),
        ) {
            let limits = Limits { live_max, chunk_tokens, kv_tokens };
            let mut s = Scheduler::new(limits);
            let mut tracks: Vec<Track> = Vec::new();
            for event in events {
                match event {
                    Event::Submit { prompt, answer } => {
                        let tokens_left = answer as usize;
                        s.submit(Job { tokens_left, ..job(tracks.len() as u64, prompt) });
                        tracks.push(Track { prompt, answer, ..Track::default() });
                    }
                    Event::Cancel(index) if !tracks.is_empty() => {
                        let seq = index.index(tracks.len());
                        s.finish(seq as u64);
                        tracks[seq].cancelled = true;
                    }
                    Event::Cancel(_) => {}
                    Event::Run(count) => {
                        for _ in 0..count {
                            run_one(&mut s, limits, &mut tracks);
                        }
                    }
                }
            }
            let mut left = 10_000;
            while run_one(&mut s, limits, &mut tracks) {
                left -= 1;
                prop_assert!(left > 0, "it never ends");
            }
            prop_assert_eq!(s.counts(), (0, 0));
            for track in &tracks {
                prop_assert!(track.cancelled);
                prop_assert_eq!(track.opened, track.closed);
            }
        }
    }
}
