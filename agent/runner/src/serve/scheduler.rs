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
    /// How many of the tokens are the prompt.
    pub(crate) prompt: usize,
    /// How many tokens were drawn in earlier runs.
    pub(crate) draws: u64,
}

/// The next thing to do.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Action {
    /// The first `prompt` tokens that are fed are the prompt.
    Open {
        seq: SeqId,
        prompt: usize,
    },
    Prefill(Step),
    Decode(Vec<Feed>),
    Close {
        seq: SeqId,
    },
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
            let (seq, prompt) = (job.seq, job.prompt);
            self.live.insert(seq, Live { job, state: State::Prefill { fed: 0 } });
            self.prefilling.push_back(seq);
            return Some(Action::Open { seq, prompt });
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
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn scheduler(live_max: usize, chunk_tokens: usize) -> Scheduler {
        Scheduler::new(Limits { live_max, chunk_tokens, kv_positions: 10_000 })
    }

    fn job(seq: SeqId, prompt: usize) -> Job {
        Job { seq, tokens: (0..prompt as u32).collect(), prompt, draws: 0 }
    }

    fn open(seq: SeqId, prompt: usize) -> Action {
        Action::Open { seq, prompt }
    }

    fn prefill(seq: SeqId, tokens: std::ops::Range<u32>, sample: bool) -> Action {
        Action::Prefill(Step::Prefill { seq, tokens: tokens.collect(), sample, draw: 0 })
    }

    fn decode(rows: &[(SeqId, u32, u64)]) -> Action {
        let feed = |&(seq, token, draw): &(SeqId, u32, u64)| Feed { seq, token, draw };
        Action::Decode(rows.iter().map(feed).collect())
    }

    #[test]
    fn a_prompt_goes_in_chunks_and_then_decodes() {
        let mut s = scheduler(1, 4);
        assert_eq!(s.next(), None);
        s.submit(job(7, 6));
        assert_eq!(s.next(), Some(open(7, 6)));
        assert_eq!(s.next(), Some(prefill(7, 0..4, false)));
        assert_eq!(s.next(), Some(prefill(7, 4..6, true)));
        assert_eq!(s.next(), None);
        s.drew(7, 50);
        assert_eq!(s.next(), Some(decode(&[(7, 50, 1)])));
        s.drew(7, 51);
        assert_eq!(s.next(), Some(decode(&[(7, 51, 2)])));
        s.finish(7);
        s.finish(7);
        assert_eq!(s.next(), Some(Action::Close { seq: 7 }));
        assert_eq!(s.next(), None);
    }

    #[test]
    fn a_resumed_sequence_goes_on_counting_draws() {
        let mut s = scheduler(1, 4);
        s.submit(Job { seq: 1, tokens: vec![5, 6], prompt: 1, draws: 9 });
        assert_eq!(s.next(), Some(open(1, 1)));
        let step = Step::Prefill { seq: 1, tokens: vec![5, 6], sample: true, draw: 9 };
        assert_eq!(s.next(), Some(Action::Prefill(step)));
        s.drew(1, 4);
        assert_eq!(s.next(), Some(decode(&[(1, 4, 10)])));
    }

    #[test]
    fn a_long_prompt_holds_up_the_others_by_one_chunk() {
        let mut s = scheduler(3, 4);
        s.submit(job(1, 1));
        s.submit(job(2, 1));
        s.submit(job(3, 9));
        for (seq, prompt) in [(1, 1), (2, 1), (3, 9)] {
            assert_eq!(s.next(), Some(open(seq, prompt)));
        }
        let mut seen = Vec::new();
        for _ in 0..7 {
            let action = s.next().unwrap();
            match &action {
                Action::Prefill(step @ Step::Prefill { sample: true, .. }) => {
                    s.drew(step.seq(), 50);
                }
                Action::Decode(feeds) => feeds.iter().for_each(|feed| s.drew(feed.seq, 50)),
                _ => {}
            }
            seen.push(action);
        }
        let chunk = |range, sample| prefill(3, range, sample);
        let both = |draw| decode(&[(1, 50, draw + 1), (2, 50, draw)]);
        assert_eq!(
            seen,
            [
                prefill(1, 0..1, true),
                decode(&[(1, 50, 1)]),
                prefill(2, 0..1, true),
                both(1),
                chunk(0..4, false),
                both(2),
                chunk(4..8, false),
            ]
        );
    }

    #[test]
    fn the_rest_waits_in_order_and_may_leave() {
        let mut s = scheduler(1, 4);
        for seq in 1..=3 {
            s.submit(job(seq, 1));
        }
        assert_eq!(s.next(), Some(open(1, 1)));
        assert_eq!(s.counts(), (1, 2));
        s.finish(2);
        s.finish(1);
        assert_eq!(s.next(), Some(Action::Close { seq: 1 }));
        assert_eq!(s.next(), Some(open(3, 1)));
        assert_eq!(s.counts(), (1, 0));
    }

    #[test]
    fn the_newest_is_put_off_when_memory_runs_short_and_goes_on_later() {
        let kv_positions = cache_positions([164; 2]);
        let mut s = Scheduler::new(Limits { live_max: 9, chunk_tokens: 1000, kv_positions });
        for seq in 1..=3 {
            s.submit(job(seq, 100));
        }
        assert_eq!(s.next(), Some(open(1, 100)));
        assert_eq!(s.next(), Some(open(2, 100)));
        assert_eq!(s.next(), Some(prefill(1, 0..100, true)));
        s.drew(1, 50);
        assert_eq!(s.next(), Some(decode(&[(1, 50, 1)])));
        s.drew(1, 51);
        assert_eq!(s.next(), Some(prefill(2, 0..100, true)));
        s.drew(2, 60);
        let mut draws = 1;
        let closed = loop {
            match s.next() {
                Some(Action::Decode(feeds)) => {
                    draws += 1;
                    feeds.iter().for_each(|feed| s.drew(feed.seq, 60 + draws as u32));
                }
                other => break other,
            }
        };
        assert!(draws > 60, "{draws}");
        assert_eq!(closed, Some(Action::Close { seq: 2 }));
        assert_eq!((s.counts(), s.put_off()), ((1, 2), 1));
        assert!(matches!(s.next(), Some(Action::Decode(feeds)) if feeds.len() == 1));
        s.finish(1);
        assert_eq!(s.next(), Some(Action::Close { seq: 1 }));
        // It goes on with all that it had, before the one that has not begun.
        assert_eq!(s.next(), Some(open(2, 100)));
        let Some(Action::Prefill(Step::Prefill { seq: 2, tokens, sample: true, draw })) = s.next()
        else {
            panic!("the second goes on")
        };
        assert_eq!((tokens.len() as u64, draw), (100 + draws, draws));
        assert_eq!(tokens[100..103], [60, 62, 63]);
    }

    #[test]
    fn a_short_context_has_room_for_several_short_sequences() {
        let limits = Limits { live_max: 9, chunk_tokens: 1000, kv_positions: 1024 };
        let mut s = Scheduler::new(limits);
        for seq in 1..=5 {
            s.submit(job(seq, 190));
        }
        let mut draws = 0;
        while draws < 200 {
            match s.next().unwrap() {
                Action::Prefill(step) => s.drew(step.seq(), 7),
                Action::Decode(feeds) => {
                    feeds.iter().for_each(|feed| s.drew(feed.seq, 7));
                    draws += feeds.len();
                }
                Action::Open { .. } => {}
                Action::Close { seq } => panic!("{seq} was put off"),
            }
        }
        // Four times 256 positions.
        assert_eq!(s.counts(), (4, 1));
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
            (1..90_usize, 1..80_u64).prop_map(|(prompt, answer)| Event::Submit { prompt, answer }),
            any::<prop::sample::Index>().prop_map(Event::Cancel),
            (1..60_usize).prop_map(Event::Run),
        ]
    }

    #[derive(Debug, Default)]
    struct Track {
        prompt: usize,
        answer: u64,
        /// Tokens in its cache.
        fed: usize,
        draws: u64,
        open: bool,
        begun: bool,
        over: bool,
    }

    impl Track {
        fn drew(&mut self, s: &mut Scheduler, seq: SeqId) {
            s.drew(seq, self.draws as u32);
            self.draws += 1;
            if self.draws == self.answer {
                s.finish(seq);
                self.over = true;
            }
        }
    }

    /// Plays an engine that checks every rule; `tracks` is indexed by sequence number.
    fn run_one(s: &mut Scheduler, limits: Limits, tracks: &mut [Track]) -> bool {
        let Some(action) = s.next() else { return false };
        match action {
            Action::Open { seq, prompt } => {
                let waits_longer = |t: &Track| !t.open && !t.over;
                assert!(!tracks[..seq as usize].iter().any(waits_longer), "not in order");
                let track = &mut tracks[seq as usize];
                assert!(!track.open && track.fed == 0 && prompt == track.prompt);
                (track.open, track.begun) = (true, true);
            }
            Action::Close { seq } => {
                let track = &mut tracks[seq as usize];
                assert!(track.open);
                (track.open, track.fed) = (false, 0);
                let newer = |t: &Track| t.open && !t.over;
                assert!(track.over || !tracks[seq as usize..].iter().any(newer), "not the newest");
            }
            Action::Prefill(Step::Prefill { seq, tokens, sample, draw }) => {
                let track = &mut tracks[seq as usize];
                assert!(track.open && !track.over && draw == track.draws);
                assert!(!tokens.is_empty() && tokens.len() <= limits.chunk_tokens);
                for token in &tokens {
                    let index = track.fed;
                    let expect = if index < track.prompt { index } else { index - track.prompt };
                    assert_eq!(*token as usize, expect);
                    track.fed += 1;
                }
                assert_eq!(sample, track.fed == track.prompt + track.draws as usize);
                if sample {
                    track.drew(s, seq);
                }
            }
            Action::Prefill(Step::Decode { .. }) => unreachable!("decode steps are for all"),
            Action::Decode(feeds) => {
                assert!(!feeds.is_empty());
                for (seq, track) in tracks.iter().enumerate().filter(|(_, t)| t.open && !t.over) {
                    // All that can go on do so: those that were put off feed their tokens first.
                    let ready = track.fed + 1 == track.prompt + track.draws as usize;
                    let behind = ready && track.draws > 0;
                    assert!(!behind || feeds.iter().any(|f| f.seq == seq as u64), "left behind");
                }
                for Feed { seq, token, draw } in feeds {
                    let track = &mut tracks[seq as usize];
                    assert!(track.open && !track.over);
                    assert_eq!((draw, u64::from(token)), (track.draws, track.draws - 1));
                    track.fed += 1;
                    track.drew(s, seq);
                }
            }
        }
        let open: Vec<&Track> = tracks.iter().filter(|t| t.open).collect();
        assert!(open.len() <= limits.live_max);
        let held = cache_positions(open.iter().filter(|t| t.fed > 0).map(|t| t.fed));
        assert!(open.len() == 1 || held <= limits.kv_positions, "{held} of {limits:?}");
        true
    }

    proptest! {
        #[test]
        fn every_sequence_gets_what_it_asked_for(
            live_max in 1..5_usize,
            chunk_tokens in 1..60_usize,
            kv_positions in 1..1500_usize,
            events in prop::collection::vec(event(), 0..40),
        ) {
            let limits = Limits { live_max, chunk_tokens, kv_positions };
            let mut s = Scheduler::new(limits);
            let mut tracks: Vec<Track> = Vec::new();
            for event in events {
                match event {
                    Event::Submit { prompt, answer } => {
                        s.submit(job(tracks.len() as u64, prompt));
                        tracks.push(Track { prompt, answer, ..Track::default() });
                    }
                    Event::Cancel(index) if !tracks.is_empty() => {
                        let seq = index.index(tracks.len());
                        s.finish(seq as u64);
                        tracks[seq].over = true;
                    }
                    Event::Cancel(_) => {}
                    Event::Run(count) => {
                        for _ in 0..count {
                            run_one(&mut s, limits, &mut tracks);
                        }
                    }
                }
            }
            let mut left = 100_000;
            while run_one(&mut s, limits, &mut tracks) {
                left -= 1;
                prop_assert!(left > 0, "it never ends");
            }
            prop_assert_eq!(s.counts(), (0, 0));
            prop_assert!(tracks.iter().all(|track| track.over && !track.open));
        }
    }
}
