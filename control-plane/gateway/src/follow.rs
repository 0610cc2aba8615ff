//! Keeps the index up to date by watching the API server.

use std::{fmt::Debug, time::Duration};

use exo_crds::{InferenceInstance, Model};
use futures::{StreamExt as _, pin_mut};
use kube::{
    Api, Client, Resource,
    api::ListParams,
    runtime::{
        WatchStreamExt as _,
        utils::Backoff,
        watcher::{self, DefaultBackoff, Event, watcher},
    },
};
use serde::de::DeserializeOwned;
use tokio::sync::watch;

use crate::{http::unix_time, index::Index};

/// A change of what is known of one kind.
enum Change<K> {
    Replace(Vec<K>),
    Apply(K),
    Delete(K),
}

/// Follows the API server for ever; drop the future to stop.
pub(crate) async fn follow(client: Client, index: &watch::Sender<Index>) {
    let instances =
        follow_kind(Api::<InferenceInstance>::all(client.clone()), index, |index, change| {
            match change {
                Change::Replace(objects) => index.replace_instances(&objects, unix_time()),
                Change::Apply(object) => index.apply_instance(&object, unix_time()),
                Change::Delete(object) => index.delete_instance(&object),
            }
        });
    let models = follow_kind(Api::<Model>::all(client), index, |index, change| match change {
        Change::Replace(objects) => index.replace_models(&objects),
        Change::Apply(object) => index.apply_model(&object),
        Change::Delete(object) => index.delete_model(&object),
    });
    futures::join!(instances, models);
}

async fn follow_kind<K>(
    api: Api<K>,
    index: &watch::Sender<Index>,
    mut change: impl FnMut(&mut Index, Change<K>),
) where
    K: Resource<DynamicType = ()> + Clone + DeserializeOwned + Debug + Send + 'static,
{
    let events = watcher(api, watcher::Config::default()).backoff(Soon::default());
    pin_mut!(events);
    // A new list takes effect as a whole: nothing looks deleted while it arrives.
    let mut listed = Vec::new();
    // The last problem in the log, until there is none.
    let mut told: Option<String> = None;
    while let Some(event) = events.next().await {
        let next = match event {
            Ok(Event::Init) => {
                listed.clear();
                continue;
            }
            Ok(Event::InitApply(object)) => {
                listed.push(object);
                continue;
            }
            Ok(Event::InitDone) => Change::Replace(std::mem::take(&mut listed)),
            Ok(Event::Apply(object)) => Change::Apply(object),
            Ok(Event::Delete(object)) => Change::Delete(object),
            Err(error) => {
                // What is known stays in use; the stream backs off and comes back.
                let problem = exo_recorder::problem(&error);
                let kind = K::kind(&());
                if told.as_deref() == Some(&problem) {
                    tracing::debug!(%kind, problem, "still can't watch the API server");
                } else {
                    tracing::warn!(%kind, problem, "can't watch the API server");
                    told = Some(problem.clone());
                }
                index.send_if_modified(|index| index.failed(problem));
                continue;
            }
        };
        told = None;
        index.send_modify(|index| change(index, next));
    }
}

/// kube's own pauses, but for the long ones: clients wait for what is read here.
#[derive(Default)]
struct Soon(DefaultBackoff);

const LONGEST_PAUSE: Duration = Duration::from_secs(2);

impl Iterator for Soon {
    type Item = Duration;

    fn next(&mut self) -> Option<Duration> {
        self.0.next().map(|pause| pause.min(LONGEST_PAUSE))
    }
}

impl Backoff for Soon {
    fn reset(&mut self) {
        self.0.reset();
    }
}

/// Why the API server can't be read now; `None` where it can be, or where that can't be found out
/// before the limit. The API server says within five seconds that it has no majority, within one
/// where it has had none for longer, and takes more time on slow disks.
pub(crate) async fn unreadable(client: &Client, limit: Duration) -> Option<String> {
    let models = Api::<Model>::all(client.clone());
    // Without a version in it, the store's leader is asked.
    let newest = ListParams::default().limit(1);
    let answer = tokio::time::timeout(limit, models.list_metadata(&newest)).await.ok()?;
    match answer {
        // It answers: it has too much to do, or minds something else.
        Err(kube::Error::Api(status)) if !matches!(status.code, 503 | 504) => None,
        answer => answer.err().map(|error| exo_recorder::problem(&error)),
    }
}
