//! What is run next, in stories and against an engine that checks every rule.

use proptest::prelude::*;

use super::*;

fn scheduler(live_max: usize, chunk_tokens: usize) -> Scheduler {
    Scheduler::new(Limits { live_max, chunk_tokens, kv_positions: 10_000 })
}

fn job(seq: SeqId, prompt: usize) -> Job {
    Job { seq, tokens: (0..prompt as u32).collect(), draws: 0 }
}

fn open(seq: SeqId) -> Action {
    Action::Open { seq }
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
    assert_eq!(s.next(), Some(open(7)));
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
    s.submit(Job { seq: 1, tokens: vec![5, 6], draws: 9 });
    assert_eq!(s.next(), Some(open(1)));
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
    for seq in 1..=3 {
        assert_eq!(s.next(), Some(open(seq)));
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
    assert_eq!(s.next(), Some(open(1)));
    assert_eq!(s.counts(), (1, 2));
    s.finish(2);
    s.finish(1);
    assert_eq!(s.next(), Some(Action::Close { seq: 1 }));
    assert_eq!(s.next(), Some(open(3)));
    assert_eq!(s.counts(), (1, 0));
}

#[test]
fn the_newest_is_put_off_when_memory_runs_short_and_goes_on_later() {
    let kv_positions = cache_positions([164; 2]);
    let mut s = Scheduler::new(Limits { live_max: 9, chunk_tokens: 1000, kv_positions });
    for seq in 1..=3 {
        s.submit(job(seq, 100));
    }
    assert_eq!(s.next(), Some(open(1)));
    assert_eq!(s.next(), Some(open(2)));
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
    assert_eq!(s.next(), Some(open(2)));
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
        Action::Open { seq } => {
            let waits_longer = |t: &Track| !t.open && !t.over;
            assert!(!tracks[..seq as usize].iter().any(waits_longer), "not in order");
            let track = &mut tracks[seq as usize];
            assert!(!track.open && track.fed == 0);
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
