//! Records Events for controllers and agents without keeping them waiting; and says for their logs
//! what the API server answered.
//!
//! Events are a courtesy: what the queue has no room for and what the API refuses is dropped. What
//! an event looks like is the matter of [`exo_crds::event`]; what is worth one, of the caller.

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

/// Waiting events: a burst of every instance of a large cluster, or of all phases of a node's shards.
const QUEUE: usize = 256;
/// Tries against others who count the same event up.
const TRIES: usize = 4;
/// A call that takes longer is given up.
const CALL_LIMIT: Duration = Duration::from_secs(5);

/// Takes events. Clones share the queue.
#[derive(Clone, Debug)]
pub struct Recorder(mpsc::Sender<(ObjectReference, Occurrence)>);

impl Recorder {
    /// A recorder, and what empties its queue; that never ends. While `is_active` says no, as on a
    /// node that doesn't lead, events are dropped.
    pub fn new(
        client: Client,
        reporter: Reporter,
        is_active: impl Fn() -> bool,
    ) -> (Self, impl Future<Output = ()>) {
        let (sender, mut waiting) = mpsc::channel(QUEUE);
        let writing = async move {
            while let Some((about, occurrence)) = waiting.recv().await {
                if !is_active() {
                    continue;
                }
                match timeout(CALL_LIMIT, record(&client, &about, &occurrence, &reporter)).await {
                    Ok(Ok(())) => {}
                    Ok(Err(error)) => tracing::debug!(%error, "an event could not be written"),
                    Err(_) => tracing::debug!("an event could not be written in time"),
                }
            }
            std::future::pending::<()>().await;
        };
        (Self(sender), writing)
    }

    /// Never waits.
    pub fn record<K>(&self, about: &K, occurrence: Occurrence)
    where
        K: Resource<DynamicType = ()>,
    {
        if let Err(error) = self.0.try_send((about.object_ref(&()), occurrence)) {
            tracing::debug!(%error, "an event is lost");
        }
    }
}

/// What the API server says, else what is at the bottom of a failed call: kube's own text adds the
/// whole answer in Rust's notation.
pub fn problem(error: &(dyn std::error::Error + 'static)) -> String {
    let mut cause = error;
    loop {
        match cause.downcast_ref::<kube::Error>() {
            Some(kube::Error::Api(status)) if !status.message.is_empty() => {
                return status.message.clone();
            }
            Some(_) | None => match cause.source() {
                Some(source) => cause = source,
                None => return cause.to_string(),
            },
        }
    }
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
