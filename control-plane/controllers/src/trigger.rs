//! Streams that say when to look again.

use std::{collections::BTreeMap, fmt::Debug, future};

use futures::{Stream, StreamExt as _, stream};
use kube::{
    Api, Resource,
    runtime::{
        WatchStreamExt as _,
        watcher::{self, Event, watcher},
    },
};
use serde::de::DeserializeOwned;
use tokio::sync::watch;

/// One item whenever an object appears, goes, or its digest changes. Watch errors are retried with
/// growing delays.
pub(crate) fn changes<K, D>(
    api: Api<K>,
    digest: impl Fn(&K) -> D + Send + 'static,
) -> impl Stream<Item = ()> + Send + 'static
where
    K: Resource<DynamicType = ()> + Clone + DeserializeOwned + Debug + Send + 'static,
    D: PartialEq + Send + 'static,
{
    let mut known: BTreeMap<String, D> = BTreeMap::new();
    watcher(api, watcher::Config::default()).default_backoff().filter_map(move |event| {
        let changed = match event {
            Ok(Event::Apply(object) | Event::InitApply(object)) => {
                let name = object.meta().name.clone().unwrap_or_default();
                let digest = digest(&object);
                let same = known.get(&name) == Some(&digest);
                known.insert(name, digest);
                !same
            }
            Ok(Event::Delete(object)) => {
                known.remove(object.meta().name.as_deref().unwrap_or_default());
                true
            }
            // Something may have gone while nobody watched.
            Ok(Event::InitDone) => true,
            Ok(Event::Init) => false,
            Err(error) => {
                tracing::debug!(%error, "watch interrupted");
                false
            }
        };
        future::ready(changed.then_some(()))
    })
}

/// One item whenever leadership is gained.
pub(crate) fn elections(leadership: watch::Receiver<bool>) -> impl Stream<Item = ()> + Send {
    stream::unfold(leadership, |mut leadership| async move {
        loop {
            leadership.changed().await.ok()?;
            if *leadership.borrow_and_update() {
                return Some(((), leadership));
            }
        }
    })
}
