//! Events expire, and are bounded.

use std::sync::Arc;

use exo_store::{ListQuery, Txn};
use serde_json::Value;
use time::OffsetDateTime;
use tokio::time::{Duration, sleep};

use crate::{builtin, clock, error::ApiError, server::ApiServer};

/// Events are kept so long, as in Kubernetes.
const EVENT_LIFETIME: time::Duration = time::Duration::HOUR;
/// More than these are not kept; the oldest go.
const MAX_EVENTS: usize = 10_000;
const EXPIRY_PERIOD: Duration = Duration::from_secs(60);

/// Deletes old events; ends with an error only.
pub(super) async fn expire(server: &ApiServer) -> ApiError {
    loop {
        if let Err(error) = expire_old(server, clock::now()).await {
            return error;
        }
        sleep(EXPIRY_PERIOD).await;
    }
}

async fn expire_old(server: &ApiServer, now: OffsetDateTime) -> Result<(), ApiError> {
    let mut resources = server.resources().iter();
    let Some(events) = resources.find(|r| r.builtin && r.kind == builtin::EVENT) else {
        return Ok(());
    };
    let query = ListQuery { prefix: events.prefix(None), ..ListQuery::default() };
    let listing = server.store().list(&query).await?;
    let mut by_age = Vec::new();
    for entry in &listing.entries {
        by_age.push((last_seen(&events.decode(entry)?), entry));
    }
    by_age.sort_by_key(|(seen, _)| *seen);
    let excess = by_age.len().saturating_sub(MAX_EVENTS);
    for (index, (seen, entry)) in by_age.iter().enumerate() {
        let is_old = seen.is_none_or(|seen| now - seen > EVENT_LIFETIME);
        if index < excess || is_old {
            let key = Arc::clone(&entry.key);
            server.store().txn(Txn::delete(key, entry.mod_revision)).await?;
        }
    }
    Ok(())
}

/// When an event happened last, as far as it says.
fn last_seen(event: &Value) -> Option<OffsetDateTime> {
    ["/series/lastObservedTime", "/lastTimestamp", "/eventTime", "/metadata/creationTimestamp"]
        .iter()
        .filter_map(|field| event.pointer(field)?.as_str().and_then(clock::parse))
        .max()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::resource::PREFIX;

    #[tokio::test]
    async fn events_expire_and_are_bounded() {
        let store = exo_store::Store::memory();
        let registry = prometheus::Registry::new();
        let server = ApiServer::new(store.clone(), &exo_crds::all(), &registry).unwrap();
        let now = clock::parse("2026-11-22T12:00:00Z").unwrap();
        let put = async |name: &str, minutes: i64| {
            let time = clock::format(now - time::Duration::minutes(minutes));
            let event =
                json!({"metadata": {"name": name, "namespace": "n"}, "lastTimestamp": time});
            let key = format!("{PREFIX}core/events/n/{name}");
            store.txn(Txn::create(key, event.to_string())).await.unwrap();
        };
        put("old", 61).await;
        put("young", 59).await;
        let names = async || {
            let query = ListQuery { prefix: format!("{PREFIX}core/"), ..ListQuery::default() };
            let entries = store.list(&query).await.unwrap().entries;
            entries.iter().map(|e| e.key.rsplit('/').next().unwrap().to_owned()).collect::<Vec<_>>()
        };
        expire_old(&server, now).await.unwrap();
        assert_eq!(names().await, ["young"]);
        for n in 0..MAX_EVENTS {
            put(&format!("e{n}"), 1).await;
        }
        expire_old(&server, now).await.unwrap();
        let left = names().await;
        assert_eq!(left.len(), MAX_EVENTS);
        assert!(!left.contains(&"young".to_owned()), "the oldest goes first");
    }
}
