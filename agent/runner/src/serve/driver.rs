//! Rank 0's loop: takes requests, runs what the scheduler says on all ranks, hands out events.
//! Lives on the engine's thread; never blocks on a client.
//!
//! Where there are other ranks, they are told of a decode step before the tokens are known that it
//! feeds, if it seems that it will be for the same sequences: they know the tokens as soon as rank 0
//! does, and need not wait for it to look at them. What was told is run, also for sequences that
//! have come to an end meanwhile; what those draw is for nobody.

use std::{
    collections::HashMap,
    sync::mpsc::{Receiver, TryRecvError},
    time::Instant,
};

use exo_crds::generate::{ErrorCode, GenerateEvent};
use exo_engine::{Feed, Sampling, SeqId, Step, StepOutput};
use tokio::sync::{OwnedSemaphorePermit, mpsc::Sender};
use tracing::{debug, warn};

use super::{
    answer::{Answer, Ending},
    metrics::Metrics,
    report::Failure,
    scheduler::{Action, Job, Limits, Scheduler},
};

/// Runs steps on all ranks. The seam between the loop and MLX.
pub(crate) trait Executor {
    /// The first `prompt` tokens that are fed are the prompt.
    fn open(&mut self, seq: SeqId, sampling: &Sampling, prompt: usize) -> Result<(), Failure>;
    /// Feeds a chunk of a prompt.
    fn prefill(&mut self, step: &Step) -> Result<Stepped, Failure>;
    /// Feeds a token to each of several sequences, and draws the next for each, in this order. With
    /// `again` the next thing that is run is [`again`] of this, unless it is refused.
    fn decode(&mut self, feeds: &[Feed], again: bool) -> Result<Stepped, Failure>;
    /// Whether there are ranks that gain by `again`.
    fn has_others(&self) -> bool;
    fn close(&mut self, seq: SeqId) -> Result<(), Failure>;
}

/// What came of a step.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Stepped {
    /// What was drawn, if the step draws.
    Done(Vec<StepOutput>),
    /// All ranks refused it alike and are as they were before.
    Refused(String),
}

/// The same sequences once more, each fed what it drew.
pub(crate) fn again(feeds: &[Feed], outputs: &[StepOutput]) -> Vec<Feed> {
    let feed = |(feed, output): (&Feed, &StepOutput)| Feed {
        seq: feed.seq,
        token: output.token,
        draw: feed.draw + 1,
    };
    feeds.iter().zip(outputs).map(feed).collect()
}

/// What the HTTP side wants.
#[derive(Debug)]
pub(crate) enum Order {
    Submit(Box<Submission>),
    /// The client is gone.
    Cancel(SeqId),
}

/// A request that was accepted; its `Start` event is on its way.
#[derive(Debug)]
pub(crate) struct Submission {
    pub(crate) job: Job,
    pub(crate) sampling: Sampling,
    pub(crate) answer: Answer,
    /// Has room for all events of the answer.
    pub(crate) events: Sender<GenerateEvent>,
    pub(crate) accepted: Instant,
    /// The request's place in the queue, free again when it is over.
    pub(crate) permit: OwnedSemaphorePermit,
}

#[derive(Debug)]
struct Running {
    sampling: Sampling,
    answer: Answer,
    events: Sender<GenerateEvent>,
    accepted: Instant,
    _permit: OwnedSemaphorePermit,
    first_token: Option<Instant>,
    tokens_of_run: u32,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Driver<E> {
    scheduler: Scheduler,
    running: HashMap<SeqId, Running>,
    executor: E,
    metrics: Metrics,
    /// The next step, where the other ranks were told of it.
    settled: Option<Vec<Feed>>,
}

impl<E: Executor> Driver<E> {
    pub(crate) fn new(limits: Limits, executor: E, metrics: Metrics) -> Self {
        let scheduler = Scheduler::new(limits);
        Self { scheduler, running: HashMap::new(), executor, metrics, settled: None }
    }

    /// Serves until nobody can send orders any more, or until a rank fails. Blocks on `orders` when
    /// there is nothing to do.
    pub(crate) fn run(&mut self, orders: &Receiver<Order>) -> Result<(), Failure> {
        loop {
            loop {
                match orders.try_recv() {
                    Ok(order) => self.take(order),
                    Err(TryRecvError::Empty) => break,
                    Err(TryRecvError::Disconnected) if self.running.is_empty() => return Ok(()),
                    Err(TryRecvError::Disconnected) => break,
                }
            }
            if self.turn()? {
                continue;
            }
            match orders.recv() {
                Ok(order) => self.take(order),
                Err(_) => return Ok(()),
            }
        }
    }

    fn take(&mut self, order: Order) {
        match order {
            Order::Submit(submission) => {
                let Submission { job, sampling, answer, events, accepted, permit } = *submission;
                self.metrics.requests.inc();
                let running = Running {
                    sampling,
                    answer,
                    events,
                    accepted,
                    _permit: permit,
                    first_token: None,
                    tokens_of_run: 0,
                };
                self.running.insert(job.seq, running);
                self.scheduler.submit(job);
            }
            Order::Cancel(seq) => self.cancel(seq),
        }
        self.count();
    }

    /// Does one thing; false when there is nothing to do.
    fn turn(&mut self) -> Result<bool, Failure> {
        if let Some(feeds) = self.settled.take() {
            self.scheduler.decode_again();
            self.decode(&feeds)?;
            self.count();
            return Ok(true);
        }
        let Some(action) = self.scheduler.next() else {
            return Ok(false);
        };
        match action {
            Action::Open { seq, prompt } => {
                if let Some(running) = self.running.get(&seq) {
                    self.executor.open(seq, &running.sampling, prompt)?;
                }
            }
            Action::Close { seq } => self.executor.close(seq)?,
            Action::Prefill(step) => self.prefill(&step)?,
            Action::Decode(feeds) => self.decode(&feeds)?,
        }
        self.count();
        Ok(true)
    }

    fn prefill(&mut self, step: &Step) -> Result<(), Failure> {
        let stepped = self.executor.prefill(step)?;
        if let Step::Prefill { tokens, .. } = step {
            self.metrics.prompt_tokens.inc_by(tokens.len() as u64);
        }
        self.came_of(&[step.seq()], stepped);
        Ok(())
    }

    fn decode(&mut self, feeds: &[Feed]) -> Result<(), Failure> {
        let again = self.executor.has_others() && self.goes_on(feeds);
        let stepped = self.run_decode(feeds, again)?;
        if feeds.len() > 1 && matches!(stepped, Stepped::Refused(_)) {
            // It does not say for whose sake: each on its own tells. All are as they were.
            return feeds.iter().map(std::slice::from_ref).try_for_each(|feed| {
                let stepped = self.run_decode(feed, false)?;
                self.came_of(&[feed[0].seq], stepped);
                Ok(())
            });
        }
        if let (true, Stepped::Done(outputs)) = (again, &stepped) {
            self.settled = Some(self::again(feeds, outputs));
        }
        let seqs: Vec<SeqId> = feeds.iter().map(|feed| feed.seq).collect();
        self.came_of(&seqs, stepped);
        Ok(())
    }

    fn run_decode(&mut self, feeds: &[Feed], again: bool) -> Result<Stepped, Failure> {
        let begun = Instant::now();
        let stepped = self.executor.decode(feeds, again)?;
        self.metrics.decode_step.observe(begun.elapsed().as_secs_f64());
        self.metrics.batch.observe(feeds.len() as f64);
        Ok(stepped)
    }

    /// Whether the step after this one will be for the same sequences, as far as is known: all
    /// may have a further token behind the one that comes, for which there is room then.
    fn goes_on(&self, feeds: &[Feed]) -> bool {
        let has_more = |feed: &Feed| {
            self.running.get(&feed.seq).is_some_and(|running| running.answer.tokens_left() > 1)
        };
        self.scheduler.is_steady() && feeds.iter().all(has_more)
    }

    fn came_of(&mut self, seqs: &[SeqId], stepped: Stepped) {
        match stepped {
            Stepped::Done(outputs) => {
                for (seq, output) in seqs.iter().zip(outputs) {
                    self.drew(*seq, &output);
                }
            }
            Stepped::Refused(message) => {
                for seq in seqs {
                    self.break_off(*seq, message.clone());
                }
            }
        }
    }

    fn drew(&mut self, seq: SeqId, output: &StepOutput) {
        let Some(running) = self.running.get_mut(&seq) else { return };
        self.metrics.completion_tokens.inc();
        self.scheduler.drew(seq, output.token);
        if running.first_token.is_none() {
            running.first_token = Some(Instant::now());
            self.metrics.time_to_first_token.observe(running.accepted.elapsed().as_secs_f64());
        }
        running.tokens_of_run += 1;
        let pushed = match running.answer.push(output) {
            Ok(pushed) => pushed,
            Err(error) => return self.break_off(seq, error.to_string()),
        };
        if let Some(event) = pushed.event
            && running.events.try_send(event).is_err()
        {
            return self.cancel(seq);
        }
        if let Some(ending) = pushed.ending {
            let end = end_event(&ending, running);
            self.finish(seq, end);
        }
    }

    /// Ends one request whose tokens can't be made or read; the others go on.
    fn break_off(&mut self, seq: SeqId, message: String) {
        if !self.running.contains_key(&seq) {
            return;
        }
        warn!(seq, message, "a request was broken off");
        let code = ErrorCode::InvalidRequest;
        self.finish(seq, GenerateEvent::Error { code, message });
    }

    fn finish(&mut self, seq: SeqId, last: GenerateEvent) {
        self.scheduler.finish(seq);
        if let Some(running) = self.running.remove(&seq) {
            // A client that left needs no ending.
            let _ = running.events.try_send(last);
        }
    }

    fn cancel(&mut self, seq: SeqId) {
        self.scheduler.finish(seq);
        if self.running.remove(&seq).is_some() {
            debug!(seq, "the client is gone");
        }
    }

    fn count(&self) {
        let (live, waiting) = self.scheduler.counts();
        self.metrics.active_sequences.set(live as i64);
        self.metrics.waiting_requests.set(waiting as i64);
        let before = self.metrics.put_off.get();
        self.metrics.put_off.inc_by(self.scheduler.put_off().saturating_sub(before));
    }
}

fn end_event(ending: &Ending, running: &Running) -> GenerateEvent {
    let first = running.first_token.unwrap_or(running.accepted);
    let decode_s = first.elapsed().as_secs_f64();
    let decoded = f64::from(running.tokens_of_run.saturating_sub(1));
    GenerateEvent::End {
        finish_reason: ending.reason,
        text: ending.text.clone(),
        completion_tokens: ending.tokens,
        time_to_first_token_s: (first - running.accepted).as_secs_f64(),
        decode_tokens_per_s: if decoded > 0.0 && decode_s > 0.0 { decoded / decode_s } else { 0.0 },
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, mpsc};

    use exo_crds::generate::FinishReason;
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
        fn open(&mut self, seq: SeqId, _: &Sampling, prompt: usize) -> Result<(), Failure> {
            self.log.push(format!("open {seq}"));
            assert_eq!(self.told, None);
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
            let (answer, _) =
                Answer::new(samples::tokenizer(), samples::EOS.into(), &spec).unwrap();
            let (events, receiver) = events::channel(tokens_max as usize + 3);
            self.next += 1;
            let tokens: Vec<u32> = prompt.bytes().map(u32::from).collect();
            let submission = Submission {
                job: Job { seq: self.next, prompt: tokens.len(), tokens, draws: 0 },
                sampling: Sampling::greedy(),
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
        let Some(GenerateEvent::End { finish_reason, text: rest, completion_tokens, .. }) = last
        else {
            panic!("no ending but {last:?}")
        };
        text += &rest;
        assert_eq!((text.as_str(), finish_reason), (expect, why));
        assert!(completion_tokens <= 6);
    }

    #[test]
    fn answers_stream_side_by_side() {
        let mut bench = Bench::new(2);
        let (mut a, mut b, mut c) =
            (bench.submit("abc"), bench.submit("lengthy"), bench.submit("x"));
        assert_eq!(bench.driver.metrics.waiting_requests.get(), 3);
        bench.run();
        check_end(&mut a, "abc", FinishReason::Stop);
        check_end(&mut b, "length", FinishReason::Length);
        check_end(&mut c, "x", FinishReason::Stop);
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
        let (mut a, mut b, mut c) =
            (bench.submit("abc"), bench.submit("lengthy"), bench.submit("x"));
        bench.run();
        check_end(&mut a, "abc", FinishReason::Stop);
        check_end(&mut b, "length", FinishReason::Length);
        check_end(&mut c, "x", FinishReason::Stop);
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
}
