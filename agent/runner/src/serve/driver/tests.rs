//! What the driver does with requests, on an engine that answers with the prompt.

use std::sync::{Arc, mpsc};

use exo_crds::generate::FinishReason;
use exo_engine::Sampling;
use tokio::sync::{Semaphore, mpsc as events};

use super::{super::answer::AnswerSpec, super::samples, *};

/// Answers with the prompt, one token after the other, and then ends.
#[derive(Debug, Default)]
struct Echo {
    /// With the length of the prompt.
    fed: HashMap<SeqId, (usize, Vec<u32>)>,
    log: Vec<String>,
    has_others: bool,
    /// What the other ranks run next.
    told: Option<Vec<Feed>>,
}

impl Echo {
    fn draw(&self, seq: SeqId, draw: u64) -> StepOutput {
        let (prompt, fed) = &self.fed[&seq];
        let token = *fed[..*prompt].get(draw as usize).unwrap_or(&samples::EOS[0]);
        StepOutput { token, logprob: None, top: Vec::new() }
    }
}

impl Executor for Echo {
    fn open(&mut self, seq: SeqId, opening: &Opening) -> Result<(), Failure> {
        self.log.push(format!("open {seq}"));
        assert_eq!(self.told, None);
        let prompt = opening.prompt.expect("serve knows it");
        assert!(self.fed.insert(seq, (prompt, Vec::new())).is_none());
        Ok(())
    }

    fn prefill(&mut self, step: &Step) -> Result<Stepped, Failure> {
        let Step::Prefill { seq, tokens, sample, draw } = step else { panic!("{step:?}") };
        self.log.push(format!("prefill {seq}"));
        assert_eq!(self.told, None);
        let (_, fed) = self.fed.get_mut(seq).expect("open");
        fed.extend(tokens);
        if fed[0] == u32::from(b'!') {
            return Ok(Stepped::Refused("no exclamations".to_owned()));
        }
        Ok(Stepped::Done(sample.then(|| self.draw(*seq, *draw)).into_iter().collect()))
    }

    fn decode(&mut self, feeds: &[Feed], again: bool) -> Result<Stepped, Failure> {
        let names: Vec<String> = feeds.iter().map(|feed| feed.seq.to_string()).collect();
        self.log.push(format!("decode {}", names.join("+")));
        assert!(self.told.take().is_none_or(|told| told == feeds));
        if feeds.iter().any(|feed| feed.token == u32::from(b'?')) {
            return Ok(Stepped::Refused("no questions".to_owned()));
        }
        for feed in feeds {
            self.fed.get_mut(&feed.seq).expect("open").1.push(feed.token);
        }
        let drawn = feeds.iter().map(|feed| self.draw(feed.seq, feed.draw));
        let drawn: Vec<StepOutput> = drawn.collect();
        self.told = again.then(|| super::again(feeds, &drawn));
        Ok(Stepped::Done(drawn))
    }

    fn has_others(&self) -> bool {
        self.has_others
    }

    fn close(&mut self, seq: SeqId) -> Result<(), Failure> {
        self.log.push(format!("close {seq}"));
        assert_eq!(self.told, None);
        assert!(self.fed.remove(&seq).is_some());
        Ok(())
    }
}

struct Bench {
    driver: Driver<Echo>,
    places: Arc<Semaphore>,
    next: SeqId,
}

impl Bench {
    fn new(live_max: usize) -> Self {
        Self::with_memory(live_max, 10_000)
    }

    fn with_memory(live_max: usize, kv_positions: usize) -> Self {
        let limits = Limits { live_max, chunk_tokens: 4, kv_positions };
        let driver = Driver::new(limits, Echo::default(), Metrics::new());
        Self { driver, places: Arc::new(Semaphore::new(10)), next: 0 }
    }

    fn submission(&mut self, prompt: &str) -> (Submission, events::Receiver<GenerateEvent>) {
        self.long_submission(prompt, 6)
    }

    fn long_submission(
        &mut self,
        prompt: &str,
        tokens_max: u32,
    ) -> (Submission, events::Receiver<GenerateEvent>) {
        let spec = AnswerSpec {
            before: Vec::new(),
            generated: Vec::new(),
            tokens_max,
            stops: vec!["STOP".to_owned()],
            logprobs: false,
        };
        let (answer, _) = Answer::new(samples::tokenizer(), samples::EOS.into(), &spec).unwrap();
        let (events, receiver) = events::channel(tokens_max as usize + 3);
        self.next += 1;
        let opening = Opening {
            sampling: Sampling::greedy(),
            prompt: Some(prompt.len()),
            last_draw: u64::from(tokens_max) - 1,
        };
        let tokens: Vec<u32> = prompt.bytes().map(u32::from).collect();
        let submission = Submission {
            job: Job { seq: self.next, tokens, draws: 0 },
            opening,
            answer,
            events,
            accepted: Instant::now(),
            permit: self.places.clone().try_acquire_owned().unwrap(),
        };
        (submission, receiver)
    }

    fn submit(&mut self, prompt: &str) -> events::Receiver<GenerateEvent> {
        let (submission, receiver) = self.submission(prompt);
        self.driver.take(Order::Submit(Box::new(submission)));
        receiver
    }

    fn run(&mut self) {
        while self.driver.turn().unwrap() {}
    }

    fn log(&self) -> Vec<&str> {
        self.driver.executor.log.iter().map(String::as_str).collect()
    }
}

/// All text, and how it ended.
fn outcome(receiver: &mut events::Receiver<GenerateEvent>) -> (String, Option<GenerateEvent>) {
    let mut all = String::new();
    while let Ok(event) = receiver.try_recv() {
        match event {
            GenerateEvent::Token { text, .. } => all += &text,
            last => return (all, Some(last)),
        }
    }
    (all, None)
}

fn check_end(receiver: &mut events::Receiver<GenerateEvent>, expect: &str, why: FinishReason) {
    let (mut text, last) = outcome(receiver);
    let Some(GenerateEvent::End { finish_reason, text: rest, completion_tokens, .. }) = last else {
        panic!("no ending but {last:?}")
    };
    text += &rest;
    assert_eq!((text.as_str(), finish_reason), (expect, why));
    assert!(completion_tokens <= 6);
}

/// One more than there are places.
fn answer_three(bench: &mut Bench) {
    let (mut a, mut b, mut c) = (bench.submit("abc"), bench.submit("lengthy"), bench.submit("x"));
    assert_eq!(bench.driver.metrics.waiting_requests.get(), 3);
    bench.run();
    check_end(&mut a, "abc", FinishReason::Stop);
    check_end(&mut b, "length", FinishReason::Length);
    check_end(&mut c, "x", FinishReason::Stop);
}

#[test]
fn answers_stream_side_by_side() {
    let mut bench = Bench::new(2);
    answer_three(&mut bench);
    assert_eq!(
        bench.log(),
        [
            "open 1",
            "open 2",
            "prefill 1",
            "decode 1",
            "prefill 2",
            "decode 1",
            "prefill 2",
            "decode 1+2",
            "close 1",
            "open 3",
            "prefill 3",
            "decode 2+3",
            "close 3",
            "decode 2",
            "decode 2",
            "decode 2",
            "close 2",
        ]
    );
    assert_eq!(bench.places.available_permits(), 10);
    assert!(bench.driver.executor.fed.is_empty());
    let metrics = &bench.driver.metrics;
    assert_eq!((metrics.requests.get(), metrics.active_sequences.get()), (3, 0));
    assert_eq!(metrics.prompt_tokens.get(), 11);
    let text = String::from_utf8(metrics.render()).unwrap();
    assert!(text.contains("exo_runner_tokens_total{kind=\"completion\"} 12"), "{text}");
}

#[test]
fn with_other_ranks_answers_are_the_same_and_what_was_told_is_run() {
    let mut bench = Bench::new(2);
    bench.driver.executor.has_others = true;
    answer_three(&mut bench);
    assert_eq!(
        bench.log(),
        [
            "open 1",
            "open 2",
            "prefill 1",
            // Prompts wait: nothing is told ahead.
            "decode 1",
            "prefill 2",
            "decode 1",
            "prefill 2",
            "decode 1+2",
            // The first has ended with what came before.
            "decode 1+2",
            "close 1",
            "open 3",
            "prefill 3",
            "decode 2+3",
            "decode 2+3",
            "close 3",
            // Its length is known: the last is not followed by one in vain.
            "decode 2",
            "close 2",
        ]
    );
    assert!(bench.driver.executor.fed.is_empty());
    assert_eq!(bench.places.available_permits(), 10);
    // Draws for nobody are not counted.
    let text = String::from_utf8(bench.driver.metrics.render()).unwrap();
    assert!(text.contains("exo_runner_tokens_total{kind=\"completion\"} 12"), "{text}");
}

#[test]
fn what_was_told_is_run_before_whoever_leaves_is_closed() {
    let mut bench = Bench::new(2);
    bench.driver.executor.has_others = true;
    let (a, mut b) = (bench.submit("abcdef"), bench.submit("bcdef"));
    let mut c = bench.submit("c");
    while bench.driver.settled.is_none() {
        assert!(bench.driver.turn().unwrap());
    }
    bench.driver.take(Order::Cancel(1));
    drop(a);
    let before = bench.log().len();
    bench.run();
    assert_eq!(bench.log()[before..before + 2], ["decode 1+2", "close 1"]);
    check_end(&mut b, "bcdef", FinishReason::Stop);
    check_end(&mut c, "c", FinishReason::Stop);
    assert!(bench.driver.executor.fed.is_empty());
}

#[test]
fn whoever_comes_is_let_in_behind_what_was_told() {
    let mut bench = Bench::new(2);
    bench.driver.executor.has_others = true;
    let mut a = bench.submit("abcdef");
    while bench.driver.settled.is_none() {
        assert!(bench.driver.turn().unwrap());
    }
    let (mut b, before) = (bench.submit("b"), bench.log().len());
    bench.run();
    assert_eq!(bench.log()[before..before + 3], ["decode 1", "open 2", "prefill 2"]);
    check_end(&mut a, "abcdef", FinishReason::Length);
    check_end(&mut b, "b", FinishReason::Stop);
}

#[test]
fn a_step_that_is_refused_settles_nothing() {
    let mut bench = Bench::new(3);
    bench.driver.executor.has_others = true;
    let (mut a, mut b) = (bench.submit("abcdef"), bench.submit("b?d"));
    bench.run();
    check_end(&mut a, "abcdef", FinishReason::Length);
    let message = "no questions".to_owned();
    let error = GenerateEvent::Error { code: ErrorCode::InvalidRequest, message };
    assert_eq!(outcome(&mut b), ("b?".to_owned(), Some(error)));
    assert!(bench.driver.executor.fed.is_empty());
}

#[test]
fn a_stop_text_ends_it() {
    let mut bench = Bench::new(1);
    let mut a = bench.submit("aSTOPb");
    bench.run();
    check_end(&mut a, "a", FinishReason::Stop);
}

#[test]
fn nothing_is_made_for_clients_that_left() {
    let mut bench = Bench::new(1);
    let (a, b) = (bench.submit("abcdef"), bench.submit("b"));
    let mut c = bench.submit("c");
    for _ in 0..3 {
        bench.driver.turn().unwrap();
    }
    drop((a, b));
    bench.driver.take(Order::Cancel(2));
    bench.run();
    // One step finds the first client gone; the second was told of.
    assert_eq!(
        bench.log(),
        [
            "open 1",
            "prefill 1",
            "prefill 1",
            "decode 1",
            "close 1",
            "open 3",
            "prefill 3",
            "decode 3",
            "close 3",
        ]
    );
    check_end(&mut c, "c", FinishReason::Stop);
    assert_eq!(bench.places.available_permits(), 10);
}

#[test]
fn a_refused_step_ends_its_request_alone() {
    let mut bench = Bench::new(2);
    let (mut a, mut b) = (bench.submit("!a"), bench.submit("b"));
    bench.run();
    let error = GenerateEvent::Error {
        code: ErrorCode::InvalidRequest,
        message: "no exclamations".to_owned(),
    };
    assert_eq!(outcome(&mut a), (String::new(), Some(error)));
    check_end(&mut b, "b", FinishReason::Stop);
}

#[test]
fn a_row_that_is_refused_leaves_the_others_of_its_batch() {
    let mut bench = Bench::new(3);
    let (mut a, mut b, mut c) =
        (bench.submit("abcdef"), bench.submit("b?"), bench.submit("cdefgh"));
    bench.run();
    check_end(&mut a, "abcdef", FinishReason::Length);
    check_end(&mut c, "cdefgh", FinishReason::Length);
    let message = "no questions".to_owned();
    let error = GenerateEvent::Error { code: ErrorCode::InvalidRequest, message };
    assert_eq!(outcome(&mut b), ("b?".to_owned(), Some(error)));
    let log = bench.log().join(", ");
    assert!(log.contains("decode 1+2, decode 1, decode 2, close 2"), "{log}");
    assert!(log.contains("decode 1+3"), "{log}");
    assert!(bench.driver.executor.fed.is_empty());
}

#[test]
fn whoever_is_put_off_sees_a_pause_only() {
    put_off(false);
    put_off(true);
}

fn put_off(has_others: bool) {
    // Enough for both prompts, but not for both answers.
    let mut bench = Bench::with_memory(4, exo_engine::cache_positions([300 + 64; 2]));
    bench.driver.executor.has_others = has_others;
    let texts = ["a".repeat(300), "b".repeat(300)];
    let answers: Vec<_> = (texts.iter())
        .map(|text| {
            let (submission, receiver) = bench.long_submission(text, 400);
            bench.driver.take(Order::Submit(Box::new(submission)));
            receiver
        })
        .collect();
    bench.run();
    for (mut answer, text) in answers.into_iter().zip(&texts) {
        let (found, last) = outcome(&mut answer);
        assert!(matches!(last, Some(GenerateEvent::End { .. })), "{last:?}");
        assert_eq!(&found, text);
    }
    assert!(bench.log().contains(&"decode 1+2"));
    assert_eq!(bench.driver.metrics.put_off.get(), 1);
}

#[test]
fn the_loop_ends_when_orders_do() {
    let mut bench = Bench::new(1);
    let (orders, receiver) = mpsc::channel();
    let (submission, mut a) = bench.submission("abc");
    orders.send(Order::Submit(Box::new(submission))).unwrap();
    drop(orders);
    bench.driver.run(&receiver).unwrap();
    check_end(&mut a, "abc", FinishReason::Stop);
}
