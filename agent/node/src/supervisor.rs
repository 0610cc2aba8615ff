//! Watches the Shards of this node and keeps one task for each.
//!
//! A watch that is silent proves nothing: its connection may be dead without either end having been
//! told. So the server is asked to end each watch after a while, and one that it doesn't end is
//! given up and begun anew.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use exo_crds::{Shard, runner::SILENCE_LIMIT_S};
use futures::{StreamExt as _, stream::BoxStream};
use kube::{
    Api, Client,
    runtime::{
        WatchStreamExt as _,
        watcher::{self, Event, watcher},
    },
};
use tokio::{
    sync::watch,
    task::{Id, JoinError, JoinSet},
    time::{Instant, sleep, sleep_until},
};
use tokio_util::sync::CancellationToken;

use crate::{
    Delays,
    metrics::Metrics,
    shard::{
        facilities::Facilities,
        slots::Slots,
        task::{self, Shared},
    },
};

/// The server ends a watch after this long; five seconds later the watcher gives the connection up
/// for dead.
const WATCH_LIMIT_S: u32 = 15;
/// A list that brings nothing for this long is asked for again, on another connection if need be.
pub(crate) const LIST_LIMIT: Duration = Duration::from_secs(10);
/// A task that panics whenever it starts must not keep the machine busy.
const RESTART_PAUSE: Duration = Duration::from_secs(1);

/// What the supervisor and the heartbeats tell each other.
#[derive(Debug)]
pub(crate) struct Signals {
    /// Counts how often heartbeats succeeded again after they had failed.
    pub(crate) recovered: watch::Receiver<u64>,
    /// Set once all shards of this node have been listed.
    pub(crate) listed: watch::Sender<bool>,
}

/// Where the shards are to be found.
#[derive(Clone)]
pub(crate) struct Source {
    pub(crate) client: Client,
    pub(crate) node: String,
    /// See [`LIST_LIMIT`].
    pub(crate) list_limit: Duration,
}

impl Source {
    /// A fresh watch, which begins with a list.
    fn watch(&self) -> BoxStream<'static, watcher::Result<Event<Shard>>> {
        let config = watcher::Config::default()
            .fields(&format!("spec.node={}", self.node))
            .timeout(WATCH_LIMIT_S);
        watcher(Api::<Shard>::all(self.client.clone()), config).backoff(Delays::new()).boxed()
    }

    /// When a list that began or went on just now must have brought something.
    fn deadline(&self) -> Option<Instant> {
        Some(Instant::now() + self.list_limit)
    }
}

/// Runs until `shutdown` and until all runners have ended.
pub(crate) async fn run<F: Facilities>(
    source: Source,
    facilities: Arc<F>,
    metrics: Metrics,
    mut signals: Signals,
    shutdown: CancellationToken,
) {
    let shared = Shared {
        facilities,
        slots: Slots::default(),
        metrics,
        silence_limit: Duration::from_secs(SILENCE_LIMIT_S),
        ending: shutdown.clone(),
    };
    let mut events = source.watch();
    let node = source.node.clone();
    let mut shards = Shards { node, shared, known: BTreeMap::new(), tasks: JoinSet::new() };
    let mut interrupted = false;
    // Until then the list must have brought something; none while watching.
    let mut list_deadline = source.deadline();
    loop {
        let overdue = async move {
            match list_deadline {
                Some(deadline) => sleep_until(deadline).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            // Cancel-safe: what the stream has not yielded yet is not needed any more.
            () = shutdown.cancelled() => break,
            // Cancel-safe: a task that ended stays in the set until it is taken out.
            Some(ended) = shards.tasks.join_next_with_id() => {
                if let Err(error) = ended {
                    shards.broke(&error);
                }
            }
            // Cancel-safe: the stream keeps its state.
            event = events.next() => match event {
                Some(Ok(event)) => {
                    interrupted = false;
                    list_deadline = match &event {
                        Event::Init | Event::InitApply(_) => source.deadline(),
                        Event::InitDone | Event::Apply(_) | Event::Delete(_) => None,
                    };
                    let done = matches!(event, Event::InitDone);
                    shards.apply(event);
                    if done {
                        signals.listed.send_replace(true);
                    }
                }
                Some(Err(error)) => {
                    if !interrupted {
                        let cause = exo_recorder::problem(&error);
                        tracing::warn!(cause, "the watch for shards broke; will go on trying");
                    }
                    interrupted = true;
                    list_deadline = list_deadline.and_then(|_| source.deadline());
                }
                None => break,
            },
            // Cancel-safe: both are only waited for.
            Ok(()) = signals.recovered.changed() => {
                tracing::info!("the control plane is back: reading the shards anew");
                events = source.watch();
                list_deadline = source.deadline();
            }
            () = overdue => {
                tracing::info!("the list of shards does not come: asking again");
                events = source.watch();
                list_deadline = source.deadline();
            }
        }
    }
    while shards.tasks.join_next().await.is_some() {}
}

/// Shards that this agent looks after.
struct Shards<F> {
    node: String,
    shared: Shared<F>,
    /// By namespace and name.
    known: BTreeMap<(String, String), Known>,
    tasks: JoinSet<()>,
}

struct Known {
    uid: Option<String>,
    wanted: watch::Sender<Option<Arc<Shard>>>,
    task: Id,
    /// Seen in the list that is being read.
    listed: bool,
}

impl<F: Facilities> Shards<F> {
    fn apply(&mut self, event: Event<Shard>) {
        match event {
            Event::Init => self.known.values_mut().for_each(|known| known.listed = false),
            Event::InitApply(shard) | Event::Apply(shard) => self.seen(shard),
            Event::InitDone => self.known.retain(|_, known| {
                if !known.listed {
                    known.wanted.send_replace(None);
                }
                known.listed
            }),
            Event::Delete(shard) => self.gone(&shard),
        }
    }

    fn seen(&mut self, shard: Shard) {
        // The server may not know the field selector.
        if shard.spec.node != self.node {
            return;
        }
        let key = key(&shard);
        let shard = Arc::new(shard);
        if let Some(known) = self.known.get_mut(&key) {
            if known.uid == shard.metadata.uid {
                known.listed = true;
                known.wanted.send_replace(Some(shard));
                return;
            }
            // Another shard of the same name: the old one's task ends by itself.
            known.wanted.send_replace(None);
        }
        let (wanted, receiver) = watch::channel(Some(shard.clone()));
        let uid = shard.metadata.uid.clone();
        let task = self.tasks.spawn(task::run(self.shared.clone(), shard, receiver)).id();
        self.known.insert(key, Known { uid, wanted, task, listed: true });
    }

    /// A task has panicked, and its runner is gone with it: the shard gets another task, which
    /// reports the loss.
    fn broke(&mut self, error: &JoinError) {
        let broken = self.known.iter_mut().find(|(_, known)| known.task == error.id());
        let Some(((_, name), known)) = broken else {
            tracing::error!(%error, "the task of a shard that is gone broke");
            return;
        };
        tracing::error!(%error, shard = name, "the shard's task broke: starting it again");
        let Some(last) = known.wanted.borrow().clone() else { return };
        let (shared, receiver) = (self.shared.clone(), known.wanted.subscribe());
        let again = async move {
            // An agent that ends finds out in the task.
            let _ = shared.ending.run_until_cancelled(sleep(RESTART_PAUSE)).await;
            task::run(shared.clone(), last, receiver).await;
        };
        known.task = self.tasks.spawn(again).id();
    }

    fn gone(&mut self, shard: &Shard) {
        let key = key(shard);
        if self.known.get(&key).is_some_and(|known| known.uid == shard.metadata.uid)
            && let Some(known) = self.known.remove(&key)
        {
            known.wanted.send_replace(None);
        }
    }
}

fn key(shard: &Shard) -> (String, String) {
    (
        shard.metadata.namespace.clone().unwrap_or_default(),
        shard.metadata.name.clone().unwrap_or_default(),
    )
}

#[cfg(test)]
mod tests {
    use std::{convert::Infallible, path::PathBuf, sync::Mutex};

    use axum::{
        Json, Router,
        body::{Body, Bytes},
        extract::{RawQuery, State},
        response::{IntoResponse as _, Response},
        routing::get,
    };
    use exo_crds::{ModelSource, ShardFailure, ShardListen, event::Occurrence};
    use prometheus::Registry;
    use serde_json::{Value, json};
    use tokio::{sync::mpsc, task::JoinHandle, time::timeout};

    use super::*;
    use crate::shard::{
        Exit,
        facilities::{ApiError, Machine, Output, Runner},
        launch::Launch,
        tests::shard,
    };

    /// Far more than anything here takes.
    const LONG: Duration = Duration::from_secs(60);

    /// No runner is ever started here.
    #[derive(Debug)]
    enum NoRunner {}

    impl Runner for NoRunner {
        async fn next(&mut self) -> Output {
            match *self {}
        }

        async fn stop(&mut self) -> Exit {
            match *self {}
        }
    }

    /// Panics the first time that a shard is looked at.
    struct Clumsy {
        looks: Mutex<u32>,
        written: mpsc::UnboundedSender<Value>,
    }

    impl Facilities for Clumsy {
        type Reservation = ();
        type Runner = NoRunner;

        async fn locate(&self, _: &ModelSource) -> Result<PathBuf, ShardFailure> {
            let looks = {
                let mut looks = self.looks.lock().unwrap();
                *looks += 1;
                *looks
            };
            assert!(looks > 1, "dropped something");
            Ok("/m".into())
        }

        fn reserve(&self) -> Result<((), ShardListen), ShardFailure> {
            Ok(((), crate::shard::tests::listen()))
        }

        fn machine(&self) -> &Machine {
            unreachable!("no runner is started")
        }

        fn spawn(&self, _: &Launch) -> Result<NoRunner, ShardFailure> {
            unreachable!("no runner is started")
        }

        async fn set_finalizer(&self, _: &Shard, _: bool) -> Result<(), ApiError> {
            Ok(())
        }

        async fn write_status(&self, _: &Shard, patch: Value) -> Result<(), ApiError> {
            let _ = self.written.send(patch);
            Ok(())
        }

        fn tell(&self, _: &Shard, _: Occurrence) {}
    }

    /// An API server that answers lists, or not, and whose watches stay silent.
    #[derive(Clone)]
    struct Server {
        /// Whether the next list is answered at all.
        silent: Arc<Mutex<bool>>,
        asked: mpsc::UnboundedSender<String>,
    }

    async fn shards(State(server): State<Server>, RawQuery(query): RawQuery) -> Response {
        let query = query.unwrap_or_default();
        let watches = query.contains("watch=true");
        server.asked.send(query).unwrap();
        if watches {
            let silence = futures::stream::pending::<Result<Bytes, Infallible>>();
            return Body::from_stream(silence).into_response();
        }
        let silent = std::mem::take(&mut *server.silent.lock().unwrap());
        if silent {
            std::future::pending::<()>().await;
        }
        let list = json!({"apiVersion": "exo.dev/v1alpha1", "kind": "ShardList",
            "metadata": {"resourceVersion": "7"}, "items": [shard("s")]});
        Json(list).into_response()
    }

    /// A supervisor at work, and what the test sees of it.
    struct Bench {
        asked: mpsc::UnboundedReceiver<String>,
        written: mpsc::UnboundedReceiver<Value>,
        listed: watch::Receiver<bool>,
        recovered: watch::Sender<u64>,
        shutdown: CancellationToken,
        supervisor: JoinHandle<()>,
    }

    impl Bench {
        fn start(silent: bool, list_limit: Duration) -> Self {
            let (asking, asked) = mpsc::unbounded_channel();
            let server = Server { silent: Arc::new(Mutex::new(silent)), asked: asking };
            let router = Router::new()
                .route("/apis/exo.dev/v1alpha1/shards", get(shards))
                .with_state(server);
            let client = Client::new(router, "default");
            let (writing, written) = mpsc::unbounded_channel();
            let facilities = Arc::new(Clumsy { looks: Mutex::new(0), written: writing });
            let (recovered, recoveries) = watch::channel(0);
            let (listing, listed) = watch::channel(false);
            let shutdown = CancellationToken::new();
            let supervisor = tokio::spawn(run(
                Source { client, node: "a".to_owned(), list_limit },
                facilities,
                Metrics::register(&Registry::new()).unwrap(),
                Signals { recovered: recoveries, listed: listing },
                shutdown.clone(),
            ));
            Self { asked, written, listed, recovered, shutdown, supervisor }
        }

        async fn asked(&mut self) -> String {
            timeout(LONG, self.asked.recv()).await.unwrap().unwrap()
        }

        async fn end(self) {
            self.shutdown.cancel();
            timeout(LONG, self.supervisor).await.unwrap().unwrap();
        }
    }

    #[tokio::test]
    async fn a_list_that_does_not_come_is_asked_for_again() {
        let mut bench = Bench::start(true, Duration::from_millis(200));
        assert!(!bench.asked().await.contains("watch"));
        assert!(!*bench.listed.borrow(), "nothing has been listed");
        assert!(!bench.asked().await.contains("watch"));
        timeout(LONG, bench.listed.wait_for(|listed| *listed)).await.unwrap().unwrap();
        bench.end().await;
    }

    #[tokio::test]
    async fn a_silent_watch_ends_and_a_control_plane_that_is_back_is_asked_anew() {
        let mut bench = Bench::start(false, LONG);
        assert!(!bench.asked().await.contains("watch"));
        let watching = bench.asked().await;
        assert!(watching.contains("watch=true"), "{watching}");
        // What ends it, on the server and five seconds later here.
        assert!(watching.contains("timeoutSeconds=15"), "{watching}");
        assert!(watching.contains("fieldSelector=spec.node"), "{watching}");
        bench.recovered.send_modify(|count| *count += 1);
        assert!(!bench.asked().await.contains("watch"));
        assert!(bench.asked().await.contains("watch=true"));
        bench.end().await;
    }

    #[tokio::test]
    async fn a_task_that_panics_is_started_again() {
        let mut bench = Bench::start(false, LONG);
        let patch = timeout(LONG, bench.written.recv()).await.unwrap().unwrap();
        assert_eq!(patch["phase"], "Downloaded");
        bench.end().await;
    }
}
