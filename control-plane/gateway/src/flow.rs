//! Carries one request from admission to its last event: chooses a replica, passes its events on,
//! and goes on elsewhere when it breaks.
//!
//! Guarantees: the events of a flow are one `Start`, then tokens without gap or repetition, then
//! one `End` or one error, whatever happens to the replicas meanwhile. Dropping a flow closes its
//! connection, which stops the runner.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use exo_crds::generate::{GenerateEvent, GenerateRequest};
use futures::{Stream, stream};
use tokio::{sync::watch, time::Instant};

use crate::{
    Shared,
    balance::Lease,
    error::ApiError,
    follow::unreadable,
    http::unix_time,
    index::{Index, ReplicaId, Served, Target},
    progress::Progress,
    upstream::{Break, Events, Remedy},
};

/// A withdrawn replica may still be finishing its answers; silence for this long means it's gone.
const WITHDRAWN_GRACE: Duration = Duration::from_secs(1);
/// Pause before the same replica is tried again: first, and at most.
const BACKOFF_MIN: Duration = Duration::from_millis(100);
const BACKOFF_MAX: Duration = Duration::from_secs(2);
/// By so much the controller's clock may be ahead of this one.
const CLOCKS_DIFFER: Duration = Duration::from_secs(5);

/// A power of two. With the pauses between them a second and a half: more than an election takes.
const FAILURES_TO_ASK: u32 = 4;
/// For so long the API server is asked whether it can be read: before the deadline, and at it.
const ASK: Duration = Duration::from_secs(8);
const LAST_ASK: Duration = Duration::from_secs(1);
/// Beyond every deadline.
const FAR_S: u64 = 3600;

/// One request under way.
#[derive(Debug)]
pub(crate) struct Flow {
    shared: Arc<Shared>,
    /// As the request named it; looked up again for every attempt.
    name: String,
    /// Tokens mean something to this Model only.
    model: String,
    progress: Progress,
    arrived: Instant,
    /// When to give up waiting for a replica.
    deadline: Instant,
    failures: BTreeMap<ReplicaId, u32>,
    /// No replica that failed this request is tried again before.
    rest_until: Instant,
    attempt: Option<Attempt>,
    /// The client waits for an answer to go on.
    broken: bool,
    over: bool,
}

#[derive(Debug)]
struct Attempt {
    replica: ReplicaId,
    events: Events,
    index: watch::Receiver<Index>,
    _lease: Lease,
}

impl Flow {
    /// `model` is what `name` was found to stand for.
    pub(crate) fn new(
        shared: Arc<Shared>,
        name: String,
        model: String,
        request: GenerateRequest,
        arrived: Instant,
    ) -> Self {
        Self {
            deadline: arrived + shared.limits.ready_wait,
            shared,
            name,
            model,
            progress: Progress::new(request),
            arrived,
            failures: BTreeMap::new(),
            rest_until: arrived,
            attempt: None,
            broken: false,
            over: false,
        }
    }

    /// The events, as a stream that holds the flow.
    pub(crate) fn into_stream(self) -> impl Stream<Item = Result<GenerateEvent, ApiError>> {
        stream::unfold(self, |mut flow| async move {
            let item = flow.next().await?;
            Some((item, flow))
        })
    }

    async fn next(&mut self) -> Option<Result<GenerateEvent, ApiError>> {
        while !self.over {
            let event = match &mut self.attempt {
                Some(attempt) => attempt.next().await,
                None => match self.choose().await {
                    Ok((target, lease)) => match self.connect(target, lease).await {
                        Ok(()) => continue,
                        Err((replica, broken)) => {
                            self.failed_at(replica);
                            Err(broken)
                        }
                    },
                    Err(error) => {
                        self.over = true;
                        return Some(Err(error));
                    }
                },
            };
            match event {
                // A runner's error is a break: it may be curable elsewhere.
                Ok(GenerateEvent::Error { code, message }) => {
                    let broken = Break::Refused { code, message };
                    if let Err(error) = self.broke(&broken) {
                        return Some(Err(error));
                    }
                }
                Ok(event) => {
                    if let Some(event) = self.accept(event) {
                        return Some(Ok(event));
                    }
                }
                Err(broken) => {
                    if let Err(error) = self.broke(&broken) {
                        return Some(Err(error));
                    }
                }
            }
        }
        None
    }

    fn accept(&mut self, event: GenerateEvent) -> Option<GenerateEvent> {
        let metrics = &self.shared.metrics;
        match &event {
            GenerateEvent::Start { prompt_tokens } if !self.progress.started() => {
                metrics.prompt(*prompt_tokens);
            }
            GenerateEvent::Token { .. } => {
                let first = self.progress.request().generated.is_empty();
                metrics.token(first.then(|| self.arrived.elapsed()));
                self.broken = false;
            }
            GenerateEvent::End { .. } => self.over = true,
            GenerateEvent::Start { .. } | GenerateEvent::Error { .. } => {}
        }
        self.progress.accept(event)
    }

    /// Prepares the next attempt, or says why there is none.
    fn broke(&mut self, broken: &Break) -> Result<(), ApiError> {
        if let Some(attempt) = self.attempt.take() {
            self.failed_at(attempt.replica);
        }
        let remedy = match broken.remedy() {
            Remedy::ElsewhereSuspect if !self.progress.may_try_again() => {
                self.over = true;
                return Err(ApiError::bad_runner(format!(
                    "the runner failed each time at the same point of this request: {broken}"
                )));
            }
            remedy => remedy,
        };
        if remedy == Remedy::None {
            self.over = true;
            return Err(match broken {
                Break::Refused { code, message } => ApiError::from_runner(*code, message.clone()),
                other => ApiError::bad_runner(other.to_string()),
            });
        }
        // The time to find another replica counts from the last token, however often that fails.
        if self.progress.started() && !std::mem::replace(&mut self.broken, true) {
            self.deadline = Instant::now() + self.shared.limits.resume_wait;
            let request = self.progress.request();
            let (id, tokens) = (&request.id, request.generated.len());
            tracing::warn!(id, tokens, %broken, "an answer broke off and will be resumed");
        } else {
            tracing::debug!(id = self.progress.request().id, %broken, "a replica can't go on");
        }
        Ok(())
    }

    fn failed_at(&mut self, replica: ReplicaId) {
        let failures = self.failures.entry(replica).or_default();
        *failures += 1;
        let backoff = BACKOFF_MIN.saturating_mul(1 << (*failures - 1).min(16));
        self.rest_until = Instant::now() + backoff.min(BACKOFF_MAX);
    }

    /// Waits for a replica that may be tried, until the deadline.
    async fn choose(&self) -> Result<(Target, Lease), ApiError> {
        let mut index = self.shared.index.subscribe();
        let mut asked = false;
        loop {
            let served = self.served(&index.borrow_and_update())?;
            let now = Instant::now();
            let rested = |target: &Target| {
                now >= self.rest_until || !self.failures.contains_key(&target.replica)
            };
            let targets: Vec<_> = served.targets.iter().filter(|t| rested(t)).cloned().collect();
            if let Some(choice) = self.shared.balance.pick(&targets, &self.failures) {
                return Ok(choice);
            }
            if served.targets.is_empty()
                && (self.is_stuck(&served) || is_later(served.not_before, self.deadline))
            {
                return Err(self.nothing_ready(&served).not_soon());
            }
            if now >= self.deadline {
                return Err(match unreadable(&self.shared.client.0, LAST_ASK).await {
                    Some(why) => self.out_of_touch(&why),
                    None => self.nothing_ready(&served),
                });
            }
            if self.may_be_out_of_touch(&served.targets, &mut asked)
                && let Some(why) =
                    unreadable(&self.shared.client.0, ASK.min(self.deadline - now)).await
            {
                return Err(self.out_of_touch(&why));
            }
            let wake = match served.targets.is_empty() {
                true => self.deadline.min(stuck_at(&served, now)),
                false => self.deadline.min(self.rest_until),
            };
            tokio::select! {
                // Cancel-safe: a change that was not seen stays marked.
                changed = index.changed() => if changed.is_err() {
                    return Err(ApiError::unavailable("the gateway is stopping"));
                },
                () = tokio::time::sleep_until(wake) => {}
            }
        }
    }

    /// What the request's name stands for now.
    fn served(&self, index: &Index) -> Result<Served, ApiError> {
        match index.lookup(&self.name) {
            Some(served) if served.model == self.model => Ok(served),
            Some(_) if self.progress.started() => {
                Err(ApiError::unavailable(format!("`{}` serves another model now", self.name)))
            }
            None if self.progress.started() => {
                Err(ApiError::unavailable(format!("`{}` was deleted", self.name)))
            }
            _ => Err(ApiError::model_not_found(&self.name)),
        }
    }

    /// Whether waiting is in vain. A request that was taken once waits all the same: what ran a
    /// moment ago is often back soon.
    fn is_stuck(&self, served: &Served) -> bool {
        let was_taken = self.progress.started() || !self.failures.is_empty();
        !was_taken && served.is_stuck(unix_time())
    }

    /// Whether it is time to ask if this node still knows what runs where: every replica has failed
    /// several times. Asked after ever more failures; a request that was begun waits in any case.
    fn may_be_out_of_touch(&self, targets: &[Target], asked: &mut bool) -> bool {
        let failed = |target: &Target| self.failures.get(&target.replica).copied().unwrap_or(0);
        let least = targets.iter().map(failed).min().unwrap_or(0);
        !self.progress.started()
            && least >= FAILURES_TO_ASK
            && least.is_power_of_two()
            && !std::mem::replace(asked, true)
    }

    fn out_of_touch(&self, why: &str) -> ApiError {
        ApiError::unavailable(format!(
            "no replica of `{}` answers, and which others there are can't be read: {why}",
            self.name
        ))
    }

    fn nothing_ready(&self, served: &Served) -> ApiError {
        let name = &self.name;
        ApiError::unavailable(match (&served.waiting_for, served.targets.is_empty()) {
            (_, false) => {
                format!("no replica of `{name}` takes the request: all are busy or failing")
            }
            (Some(why), true) => format!("no replica of `{name}` is ready: {why}"),
            (None, true) => format!("no replica of `{name}` is ready"),
        })
    }

    async fn connect(&mut self, target: Target, lease: Lease) -> Result<(), (ReplicaId, Break)> {
        let mut index = self.shared.index.subscribe();
        let replica = target.replica;
        let opened = tokio::select! {
            opened = self.shared.runners.open(&target.endpoint, self.progress.request()) => opened,
            () = withdrawn(&mut index, &replica) => Err(Break::Withdrawn),
        };
        match opened {
            Ok(events) => {
                if self.broken {
                    self.shared.metrics.resumes.inc();
                }
                self.attempt = Some(Attempt { replica, events, index, _lease: lease });
                Ok(())
            }
            Err(broken) => Err((replica, broken)),
        }
    }
}

impl Attempt {
    async fn next(&mut self) -> Result<GenerateEvent, Break> {
        tokio::select! {
            biased;
            // Cancel-safe: says so itself.
            event = self.events.next() => event,
            () = withdrawn(&mut self.index, &self.replica) => Err(Break::Withdrawn),
        }
    }
}

/// Whether that time, in seconds since 1970, is after the deadline. Machines' clocks differ a little.
fn is_later(time_s: Option<i64>, deadline: Instant) -> bool {
    let left = deadline.saturating_duration_since(Instant::now()) + CLOCKS_DIFFER;
    let left_s = i64::try_from(left.as_secs()).unwrap_or(i64::MAX);
    time_s.is_some_and(|time_s| time_s > unix_time().saturating_add(left_s))
}

/// When it is sure that nothing will be ready, if it is not yet: far away where it is.
fn stuck_at(served: &Served, now: Instant) -> Instant {
    let left_s = served.stuck_since.map_or(0, |since| since.saturating_sub(unix_time()));
    let left_s = u64::try_from(left_s).ok().filter(|left_s| (1..FAR_S).contains(left_s));
    now + Duration::from_secs(left_s.unwrap_or(FAR_S))
}

/// Returns a while after the replica was withdrawn; never while it isn't. A machine that lost its
/// power closes no connection: only the control plane tells.
async fn withdrawn(index: &mut watch::Receiver<Index>, replica: &ReplicaId) {
    if index.wait_for(|index| !index.is_ready(replica)).await.is_err() {
        // The gateway is going down; its streams are cut with the server.
        return std::future::pending().await;
    }
    tokio::time::sleep(WITHDRAWN_GRACE).await;
}
