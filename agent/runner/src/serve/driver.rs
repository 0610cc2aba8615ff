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
use exo_engine::{Feed, Opening, SeqId, Step, StepOutput};
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
    fn open(&mut self, seq: SeqId, opening: &Opening) -> Result<(), Failure>;
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
    pub(crate) opening: Opening,
    pub(crate) answer: Answer,
    /// Has room for all events of the answer.
    pub(crate) events: Sender<GenerateEvent>,
    pub(crate) accepted: Instant,
    /// The request's place in the queue, free again when it is over.
    pub(crate) permit: OwnedSemaphorePermit,
}

#[derive(Debug)]
struct Running {
    opening: Opening,
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
                let Submission { job, opening, answer, events, accepted, permit } = *submission;
                self.metrics.requests.inc();
                let running = Running {
                    opening,
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
            Action::Open { seq } => {
                if let Some(running) = self.running.get(&seq) {
                    self.executor.open(seq, &running.opening)?;
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
mod tests;
