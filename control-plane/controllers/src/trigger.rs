//! Streams that say when and where to look again.

use std::{collections::BTreeMap, fmt::Debug, future};

use exo_crds::Shard;
use futures::{Stream, StreamExt as _, stream};
use kube::{
    Api, Resource, ResourceExt as _,
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

/// Shards that are being deleted, as a watch tells of them.
#[derive(Debug, Default)]
pub(crate) struct Leaving {
    known: BTreeMap<Key, Shard>,
    /// The same anew, while a list arrives.
    listed: BTreeMap<Key, Shard>,
}

/// Namespace and name.
type Key = (String, String);

impl Leaving {
    pub(crate) fn shards(&self) -> impl Iterator<Item = &Shard> {
        self.known.values()
    }

    /// Takes in what the watch says.
    pub(crate) fn see(&mut self, event: Event<Shard>) {
        match event {
            Event::Init => self.listed.clear(),
            Event::InitApply(shard) => note(&mut self.listed, shard),
            Event::InitDone => self.known = std::mem::take(&mut self.listed),
            Event::Apply(shard) => note(&mut self.known, shard),
            Event::Delete(shard) => {
                self.known.remove(&key(&shard));
            }
        }
    }
}

fn key(shard: &Shard) -> Key {
    (shard.namespace().unwrap_or_default(), shard.name_any())
}

fn note(shards: &mut BTreeMap<Key, Shard>, shard: Shard) {
    let key = key(&shard);
    if shard.metadata.deletion_timestamp.is_some() {
        shards.insert(key, shard);
    } else {
        shards.remove(&key);
    }
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

#[cfg(test)]
mod tests {
    use k8s_openapi::{apimachinery::pkg::apis::meta::v1::Time, jiff::Timestamp};

    use super::*;

    fn shard(namespace: &str, name: &str, leaves: bool) -> Shard {
        let mut shard = crate::testing::shard(name, "a");
        shard.metadata.namespace = Some(namespace.to_owned());
        shard.metadata.deletion_timestamp = leaves.then_some(Time(Timestamp::UNIX_EPOCH));
        shard
    }

    #[test]
    fn shards_that_leave_are_known_until_they_are_gone() {
        let mut leaving = Leaving::default();
        let names = |leaving: &Leaving| {
            let names = leaving.shards().map(|s| s.namespace().unwrap() + "/" + &s.name_any());
            names.collect::<Vec<_>>().join(" ")
        };
        leaving.see(Event::Apply(shard("x", "a", false)));
        leaving.see(Event::Apply(shard("x", "b", true)));
        leaving.see(Event::Apply(shard("y", "b", true)));
        assert_eq!(names(&leaving), "x/b y/b");
        leaving.see(Event::Apply(shard("x", "a", true)));
        leaving.see(Event::Delete(shard("x", "b", true)));
        assert_eq!(names(&leaving), "x/a y/b");
        // A list takes effect as a whole.
        leaving.see(Event::Init);
        leaving.see(Event::InitApply(shard("x", "a", false)));
        leaving.see(Event::InitApply(shard("z", "c", true)));
        assert_eq!(names(&leaving), "x/a y/b");
        leaving.see(Event::InitDone);
        assert_eq!(names(&leaving), "z/c");
        // Made anew under the same name.
        leaving.see(Event::Apply(shard("z", "c", false)));
        assert_eq!(names(&leaving), "");
    }
}
