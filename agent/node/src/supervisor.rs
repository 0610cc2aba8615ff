//! Watches the Shards of this node and keeps one task for each.

use std::{collections::BTreeMap, pin::pin, sync::Arc, time::Duration};

use exo_crds::{Shard, runner::SILENCE_LIMIT_S};
use futures::StreamExt as _;
use kube::{
    Api, Client,
    runtime::{
        WatchStreamExt as _,
        watcher::{self, Event, watcher},
    },
};
use tokio::{sync::watch, task::JoinSet};
use tokio_util::sync::CancellationToken;

use crate::{
    Delays,
    metrics::Metrics,
    shard::{
        facilities::Facilities,
        task::{self, Shared, Slots},
    },
};

/// Runs until `shutdown` and until all runners have ended.
pub(crate) async fn run<F: Facilities>(
    client: Client,
    node: String,
    facilities: Arc<F>,
    metrics: Metrics,
    shutdown: CancellationToken,
) {
    let config = watcher::Config::default().fields(&format!("spec.node={node}"));
    let events = watcher(Api::<Shard>::all(client), config).backoff(Delays::new());
    let mut events = pin!(events);
    let shared = Shared {
        facilities,
        slots: Slots::default(),
        metrics,
        silence_limit: Duration::from_secs(SILENCE_LIMIT_S),
        ending: shutdown.clone(),
    };
    let mut shards = Shards { node, shared, known: BTreeMap::new(), tasks: JoinSet::new() };
    let mut interrupted = false;
    loop {
        tokio::select! {
            // Cancel-safe: what the stream has not yielded yet is not needed any more.
            () = shutdown.cancelled() => break,
            Some(ended) = shards.tasks.join_next() => {
                if let Err(error) = ended {
                    tracing::error!(%error, "a shard's task broke");
                }
            }
            event = events.next() => match event {
                Some(Ok(event)) => {
                    interrupted = false;
                    shards.apply(event);
                }
                Some(Err(error)) => {
                    if !interrupted {
                        tracing::warn!(%error, "the watch for shards broke; will go on trying");
                    }
                    interrupted = true;
                }
                None => break,
            },
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
        self.known.insert(key, Known { uid: shard.metadata.uid.clone(), wanted, listed: true });
        self.tasks.spawn(task::run(self.shared.clone(), shard, receiver));
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
