//! How much is answered at once: requests in flight, and watches of one client.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use prometheus::IntGauge;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::error::ApiError;

/// Limits of one server. What is over them is refused with `429` and `Retry-After`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Requests being answered, watches not counted.
    pub in_flight: usize,
    /// Running watches of one identity.
    pub watches_per_client: usize,
    /// Of the objects in one answer, as they are stored. With `limit` a page ends there, without it
    /// the list is refused.
    pub list_bytes: usize,
    /// How long a request's body may be under way: it holds a place among those in flight.
    pub body: Duration,
    /// How long a request may take up to the end of its answer; clients can ask for less with
    /// `timeout`. Watches have a time of their own.
    pub request: Duration,
}

impl Default for Limits {
    /// In flight as Kubernetes has it; watches for a gateway or an agent with every kind in each of
    /// many namespaces; a list of tens of thousands of objects; for a request, and so for its body, as
    /// long as Kubernetes has.
    fn default() -> Self {
        Self {
            in_flight: 400,
            watches_per_client: 2_000,
            list_bytes: 128 << 20,
            body: Duration::from_secs(60),
            request: Duration::from_secs(60),
        }
    }
}

/// Counts against the limits.
#[derive(Debug)]
pub(crate) struct Flow {
    in_flight: Arc<Semaphore>,
    watches: Arc<Mutex<BTreeMap<String, usize>>>,
    /// KiB of long answers that may be in memory to be written otherwise.
    rewritten_kib: Arc<Semaphore>,
    limits: Limits,
}

impl Flow {
    pub(crate) fn new(limits: Limits) -> Self {
        Self {
            in_flight: Arc::new(Semaphore::new(limits.in_flight)),
            watches: Arc::default(),
            rewritten_kib: Arc::new(Semaphore::new(max_rewritten_kib(&limits) as usize)),
            limits,
        }
    }

    pub(crate) fn limits(&self) -> &Limits {
        &self.limits
    }

    /// A place among the requests in flight, counted by `gauge` until it is dropped.
    pub(crate) fn request(&self, gauge: &IntGauge) -> Result<RequestPlace, ApiError> {
        let permit = Arc::clone(&self.in_flight)
            .try_acquire_owned()
            .map_err(|_| ApiError::TooManyRequests("too many requests, please try again later"))?;
        gauge.inc();
        Ok(RequestPlace { gauge: gauge.clone(), _permit: permit })
    }

    /// A share of the memory for answers that are gathered before they are written otherwise, for
    /// one of about so many bytes: until it is dropped. The longest list may take all of it.
    pub(crate) fn rewriting(&self, bytes: u64) -> Result<OwnedSemaphorePermit, ApiError> {
        let max_kib = max_rewritten_kib(&self.limits);
        let kib = u32::try_from(bytes >> 10).unwrap_or(max_kib).clamp(1, max_kib);
        let share = Arc::clone(&self.rewritten_kib).try_acquire_many_owned(kib);
        share.map_err(|_| {
            ApiError::TooManyRequests(
                "too many long lists are being written as YAML or indented, please try again later",
            )
        })
    }

    /// A place among the client's watches, until it is dropped.
    pub(crate) fn watch(&self, client: &str) -> Result<WatchPlace, ApiError> {
        let mut watches = self.watches.lock().unwrap_or_else(PoisonError::into_inner);
        let count = watches.entry(client.to_owned()).or_default();
        if *count >= self.limits.watches_per_client {
            return Err(ApiError::TooManyRequests("too many watches of this client"));
        }
        *count += 1;
        Ok(WatchPlace { client: client.to_owned(), watches: Arc::clone(&self.watches) })
    }
}

/// As many bytes as one list may have.
fn max_rewritten_kib(limits: &Limits) -> u32 {
    u32::try_from(limits.list_bytes >> 10).unwrap_or(u32::MAX >> 3).max(1)
}

/// One request that is being answered, until its answer is out.
#[derive(Debug)]
pub(crate) struct RequestPlace {
    gauge: IntGauge,
    _permit: OwnedSemaphorePermit,
}

impl Drop for RequestPlace {
    fn drop(&mut self) {
        self.gauge.dec();
    }
}

/// One running watch.
#[derive(Debug)]
pub(crate) struct WatchPlace {
    client: String,
    watches: Arc<Mutex<BTreeMap<String, usize>>>,
}

impl Drop for WatchPlace {
    fn drop(&mut self) {
        let mut watches = self.watches.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = watches.get_mut(&self.client) {
            *count = count.saturating_sub(1);
            if *count == 0 {
                watches.remove(&self.client);
            }
        }
    }
}
