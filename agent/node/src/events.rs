//! Tells events without keeping the shards' tasks waiting.
//!
//! Events are a courtesy: what the queue has no room for and what the API refuses is dropped.

use std::{future::Future, time::Duration};

use exo_crds::event::{self, Occurrence, Reporter};
use k8s_openapi::{
    api::core::v1::{Event, ObjectReference},
    jiff::Timestamp,
};
use kube::{
    Api, Client, Resource,
    api::{Patch, PatchParams, PostParams},
};
use tokio::{sync::mpsc, time::timeout};

/// Waiting events: some dozens of shards that all go through their phases at once.
const QUEUE: usize = 256;
/// Tries against others who count the same event up.
const TRIES: usize = 4;
/// A call that takes longer is given up.
const CALL_LIMIT: Duration = Duration::from_secs(5);
/// What reports; its events say so.
const COMPONENT: &str = "exo-agent";

/// Takes events. Clones share the queue.
#[derive(Clone, Debug)]
pub(crate) struct Events(mpsc::Sender<(ObjectReference, Occurrence)>);

impl Events {
    /// Never waits.
    pub(crate) fn tell<K>(&self, about: &K, occurrence: Occurrence)
    where
        K: Resource<DynamicType = ()>,
    {
        if let Err(error) = self.0.try_send((about.object_ref(&()), occurrence)) {
            tracing::debug!(%error, "an event is lost");
        }
    }
}

/// The queue, and what empties it; that never ends.
pub(crate) fn queue(client: Client, node: &str) -> (Events, impl Future<Output = ()> + use<>) {
    let (sender, mut waiting) = mpsc::channel(QUEUE);
    let reporter = Reporter { component: COMPONENT.to_owned(), instance: node.to_owned() };
    let telling = async move {
        while let Some((about, occurrence)) = waiting.recv().await {
            match timeout(CALL_LIMIT, record(&client, &about, &occurrence, &reporter)).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => tracing::debug!(%error, "an event could not be written"),
                Err(_) => tracing::debug!("an event could not be written in time"),
            }
        }
        std::future::pending::<()>().await;
    };
    (Events(sender), telling)
}

fn status_code(error: &kube::Error) -> Option<u16> {
    match error {
        kube::Error::Api(status) => Some(status.code),
        _ => None,
    }
}

/// Creates the event, or counts it up.
async fn record(
    client: &Client,
    about: &ObjectReference,
    occurrence: &Occurrence,
    reporter: &Reporter,
) -> Result<(), kube::Error> {
    let api: Api<Event> = Api::namespaced(client.clone(), event::namespace(about));
    let mut tries = 0;
    loop {
        tries += 1;
        let first = event::first(about, occurrence, reporter, Timestamp::now());
        let refused = match api.create(&PostParams::default(), &first).await {
            Ok(_) => return Ok(()),
            Err(error) => error,
        };
        if status_code(&refused) != Some(409) || tries >= TRIES {
            return Err(refused);
        }
        let name = first.metadata.name.as_deref().unwrap_or_default();
        // It may expire just now: then it is created after all.
        let Some(stored) = api.get_opt(name).await? else {
            continue;
        };
        let patch = Patch::Merge(event::repeated(&stored, Timestamp::now()));
        match api.patch(name, &PatchParams::default(), &patch).await {
            Ok(_) => return Ok(()),
            Err(error) if matches!(status_code(&error), Some(404 | 409)) => {}
            Err(error) => return Err(error),
        }
    }
}
