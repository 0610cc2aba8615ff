//! watch: a stream of events, one JSON document per line.

use std::{convert::Infallible, sync::Arc, time::Duration};

use async_stream::stream;
use axum::{
    body::Body,
    http::{StatusCode, header},
    response::{IntoResponse as _, Response},
};
use bytes::Bytes;
use exo_store::{Batch, Entry, Event, ListQuery, StoreError, Watch};
use prometheus::{IntCounter, IntGauge};
use serde_json::{Value, json};
use tokio::time::{Instant, MissedTickBehavior, interval_at, sleep_until};

use super::read;
use crate::{
    clock, error::ApiError, flow::WatchPlace, resource::Resource, selector::Selector, server::Call,
    table::Form,
};

/// Watches end after this long where the client names no time, so that connections balance anew.
const DEFAULT_TIMEOUT_S: u64 = 30 * 60;
/// What is there already goes out in pieces of about this size: each has its cost for a connection.
const BLOCK_BYTES: usize = 16 << 10;
/// Bookmarks keep an idle client's position fresh.
const BOOKMARK_PERIOD: Duration = Duration::from_secs(30);
/// Marks the bookmark after the initial events.
const INITIAL_EVENTS_END: &str = "k8s.io/initial-events-end";

/// Where a watch begins.
struct Start {
    /// Events after this revision.
    revision: u64,
    /// Objects that are told first; they are read only when it is their turn.
    initial: Vec<Entry>,
    /// A bookmark ends the initial objects.
    mark_initial: bool,
}

/// Writes the events of one watch.
struct Writer {
    resource: Arc<Resource>,
    selector: Selector,
    form: Form,
    columns_told: bool,
    /// Counts the events.
    told: IntCounter,
}

pub(crate) async fn watch(call: Call) -> Result<Response, ApiError> {
    let selector = read::selector(&call)?;
    let prefix = read::prefix(&call, &selector);
    let bookmarks = call.query.flag("allowWatchBookmarks") == Some(true);
    let timeout_s = call.query.number("timeoutSeconds")?;
    let timeout_s = timeout_s.filter(|s| *s > 0).unwrap_or(DEFAULT_TIMEOUT_S);
    // A day is for ever; larger numbers would only overflow the clock.
    let deadline = Instant::now() + Duration::from_secs(timeout_s.min(86_400));
    let start = match start(&call, &prefix).await {
        // Told within the stream: clients list anew after that, but try again after an HTTP error.
        Err(error @ ApiError::Expired(_)) => {
            let headers = [(header::CONTENT_TYPE, "application/json")];
            return Ok((StatusCode::OK, headers, error_line(&error)).into_response());
        }
        start => start?,
    };
    let changes = call.server.store().watch(&prefix, start.revision);
    let metrics = call.server.metrics();
    let place = call.server.flow().watch(&call.client).inspect_err(|_| {
        metrics.rejected.with_label_values(&["watches"]).inc();
    })?;
    let labels = [call.resource.plural.as_str()];
    let gauge = metrics.watches.with_label_values(&labels);
    let told = metrics.watch_events.with_label_values(&labels);
    let (resource, form) = (call.resource, call.form);
    let writer = Writer { resource, selector, form, columns_told: false, told };
    let stream = events(writer, start, changes, bookmarks, deadline, Counted::new(gauge, place));
    let headers = [(header::CONTENT_TYPE, "application/json")];
    Ok((StatusCode::OK, headers, Body::from_stream(stream)).into_response())
}

async fn start(call: &Call, prefix: &str) -> Result<Start, ApiError> {
    let query = &call.query;
    let version = query.number("resourceVersion")?;
    let send_initial = query.flag("sendInitialEvents");
    read::check_options(call)?;
    let from_now = version.is_none_or(|v| v == 0);
    let wants_initial = send_initial.unwrap_or(from_now);
    if let (false, Some(revision)) = (wants_initial || from_now, version) {
        let current = call.server.store().current_revision().await?;
        if revision > current {
            // A position in another history, from before the store was made anew.
            return Err(ApiError::Expired(format!(
                "resource version {revision} is not of this store, which is at {current}"
            )));
        }
        return Ok(Start { revision, initial: Vec::new(), mark_initial: false });
    }
    let listing = call
        .server
        .store()
        .list(&ListQuery {
            prefix: prefix.to_owned(),
            // Without initial events only the revision is of interest.
            limit: usize::from(!wants_initial),
            ..ListQuery::default()
        })
        .await?;
    let current = listing.revision;
    if let Some(wanted) = version.filter(|wanted| *wanted > current) {
        return Err(ApiError::FutureVersion { wanted, current });
    }
    let initial = if wants_initial { listing.entries } else { Vec::new() };
    Ok(Start { revision: listing.revision, initial, mark_initial: send_initial == Some(true) })
}

fn events(
    mut writer: Writer,
    start: Start,
    mut changes: Watch,
    bookmarks: bool,
    deadline: Instant,
    counted: Counted,
) -> impl futures::Stream<Item = Result<Bytes, Infallible>> {
    stream! {
        let _counted = counted;
        let mut block = Vec::new();
        for entry in start.initial {
            let line = writer.initial(&entry);
            block.extend_from_slice(line.as_ref().unwrap_or_else(|last| last));
            if line.is_err() {
                yield Ok(block.into());
                return;
            }
            if block.len() >= BLOCK_BYTES {
                yield Ok(std::mem::take(&mut block).into());
            }
        }
        if !block.is_empty() {
            yield Ok(block.into());
        }
        if start.mark_initial && bookmarks {
            yield Ok(writer.bookmark(start.revision, true));
        }
        let mut ticks = interval_at(Instant::now() + BOOKMARK_PERIOD, BOOKMARK_PERIOD);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                // Cancel safe: the cursor moves only with a returned batch.
                batch = changes.next() => match writer.batch(batch) {
                    Ok(Some(lines)) => yield Ok(lines),
                    Ok(None) => {}
                    Err(Some(last)) => {
                        yield Ok(last);
                        return;
                    }
                    Err(None) => return,
                },
                // Cancel safe: a tick that is not taken comes again.
                _ = ticks.tick(), if bookmarks => {
                    yield Ok(writer.bookmark(changes.revision(), false));
                }
                () = sleep_until(deadline) => {
                    if bookmarks {
                        yield Ok(writer.bookmark(changes.revision(), false));
                    }
                    return;
                }
            }
        }
    }
}

impl Writer {
    /// The line of an object that is there already, empty if it is not selected; the last one on an
    /// error.
    fn initial(&mut self, entry: &Entry) -> Result<Bytes, Bytes> {
        if let Some(line) = self.whole("ADDED", entry, entry.mod_revision) {
            return Ok(line);
        }
        match self.resource.decode(entry) {
            Ok(object) if self.selector.matches(&self.resource, &object) => {
                Ok(self.line("ADDED", object))
            }
            Ok(_) => Ok(Bytes::new()),
            Err(error) => Err(error_line(&error)),
        }
    }

    /// The lines of a batch, `None` if nothing of it is selected. On an error the stream ends,
    /// with a last line where there is something to tell.
    fn batch(&mut self, batch: Result<Batch, StoreError>) -> Result<Option<Bytes>, Option<Bytes>> {
        let batch = match batch {
            Ok(batch) => batch,
            Err(StoreError::Closed) => return Err(None),
            Err(error) => return Err(Some(error_line(&error.into()))),
        };
        let mut lines = Vec::new();
        for event in &batch.events {
            match self.event(event) {
                Ok(Some(line)) => lines.extend_from_slice(&line),
                Ok(None) => {}
                Err(error) => {
                    lines.extend_from_slice(&error_line(&error));
                    return Err(Some(lines.into()));
                }
            }
        }
        Ok((!lines.is_empty()).then(|| lines.into()))
    }

    /// What an event is to this watch: objects come and go by the selector too.
    fn event(&mut self, event: &Event) -> Result<Option<Bytes>, ApiError> {
        let whole = match (&event.previous, &event.current) {
            (None, Some(entry)) => self.whole("ADDED", entry, event.revision),
            (Some(_), Some(entry)) => self.whole("MODIFIED", entry, event.revision),
            (Some(entry), None) => self.whole("DELETED", entry, event.revision),
            (None, None) => None,
        };
        if whole.is_some() {
            return Ok(whole);
        }
        let selected = |entry: Option<_>| -> Result<Option<Value>, ApiError> {
            let object = entry.map(|e| self.resource.decode_at(e, event.revision)).transpose()?;
            Ok(object.filter(|o| self.selector.matches(&self.resource, o)))
        };
        let current = selected(event.current.as_ref())?;
        let needs_previous = current.is_none() || !self.selector.is_empty();
        let previous = if needs_previous {
            selected(event.previous.as_ref())?.map(Some)
        } else {
            event.previous.as_ref().map(|_| None)
        };
        Ok(match (previous, current) {
            (None, Some(object)) => Some(self.line("ADDED", object)),
            (Some(_), Some(object)) => Some(self.line("MODIFIED", object)),
            (Some(Some(object)), None) => Some(self.line("DELETED", object)),
            (None | Some(None), None) => None,
        })
    }

    /// The line of an object into which nobody has to look.
    fn whole(&self, kind: &str, entry: &Entry, revision: u64) -> Option<Bytes> {
        if self.form != Form::Whole || !self.selector.is_empty() {
            return None;
        }
        let mut line = format!("{{\"type\":\"{kind}\",\"object\":");
        if !self.resource.write_at(&mut line, entry, revision) {
            return None;
        }
        line.push_str("}\n");
        self.told.inc();
        Some(line.into())
    }

    fn line(&mut self, kind: &str, object: Value) -> Bytes {
        self.told.inc();
        let first = !std::mem::replace(&mut self.columns_told, true);
        let object = self.form.watched(&self.resource, object, first, clock::now());
        line(kind, &object)
    }

    fn bookmark(&self, revision: u64, initial_end: bool) -> Bytes {
        let mut metadata = json!({"resourceVersion": revision.to_string()});
        if initial_end {
            metadata["annotations"] = json!({INITIAL_EVENTS_END: "true"});
        }
        line("BOOKMARK", &self.form.bookmark(&self.resource, &metadata))
    }
}

fn error_line(error: &ApiError) -> Bytes {
    line("ERROR", &error.status())
}

fn line(kind: &str, object: &Value) -> Bytes {
    let mut text = json!({"type": kind, "object": object}).to_string();
    text.push('\n');
    text.into()
}

/// Counts a watch for as long as it lives.
struct Counted {
    gauge: IntGauge,
    _place: WatchPlace,
}

impl Counted {
    fn new(gauge: IntGauge, place: WatchPlace) -> Self {
        gauge.inc();
        Self { gauge, _place: place }
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.gauge.dec();
    }
}
