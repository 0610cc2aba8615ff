//! get and list.

use axum::{http::StatusCode, response::Response};
use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use exo_store::{Entry, ListQuery, ReadError, StoreError};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::{clock, error::ApiError, request::Verb, selector::Selector, server::Call, table::Form};

/// Entries read from the store at once while filtering.
const PAGE: usize = 1000;

pub(crate) async fn get(call: &Call) -> Result<Response, ApiError> {
    if let Some(wanted) = call.query.number("resourceVersion")? {
        check_reached(call, wanted).await?;
    }
    let entry = call.read().await?.ok_or_else(|| call.not_found())?;
    Ok(call.respond(StatusCode::OK, call.resource.decode(&entry)?, &[]))
}

pub(crate) async fn list(call: &Call) -> Result<Response, ApiError> {
    let mut body = call.form.begin_list(&call.resource);
    let now = clock::now();
    // No object stays a value: as values they would take many times the memory.
    let whole = call.form == Form::Whole;
    let page = read_page(call, whole, |object| match object {
        Found::Stored(entry) => body.push_stored(entry),
        Found::Object(object) => body.push(&call.form.item(&call.resource, object, now)),
    })
    .await?;
    let mut metadata = json!({"resourceVersion": page.revision.to_string()});
    if let Some(token) = page.next {
        metadata["continue"] = json!(token.encode());
    }
    if let Some(remaining) = page.remaining {
        metadata["remainingItemCount"] = json!(remaining);
    }
    Ok(body.respond(&metadata))
}

/// Where a list goes on; opaque to clients.
#[derive(Serialize, Deserialize)]
struct Continue {
    /// 0 for the newest, whatever came before.
    revision: u64,
    /// Last key that was handed out.
    after: String,
}

impl Continue {
    fn encode(&self) -> String {
        URL_SAFE_NO_PAD.encode(json!(self).to_string())
    }

    fn decode(token: &str, prefix: &str) -> Result<Self, ApiError> {
        let bytes = URL_SAFE_NO_PAD.decode(token).ok();
        bytes
            .and_then(|bytes| serde_json::from_slice(&bytes).ok())
            .filter(|token: &Self| token.after.starts_with(prefix))
            .ok_or_else(|| ApiError::BadRequest("continue key is not valid".to_owned()))
    }
}

struct Page {
    revision: u64,
    next: Option<Continue>,
    /// How many come after it, as far as that can be told without looking into them.
    remaining: Option<usize>,
}

/// What the collection's keys begin with: narrowed to one key where the selector names one.
pub(crate) fn prefix(call: &Call, selector: &Selector) -> String {
    let prefix = call.resource.prefix(call.namespace.as_deref());
    let one_scope = call.namespace.is_some() || !call.resource.namespaced;
    match selector.name() {
        Some(name) if one_scope => prefix + name,
        _ => prefix,
    }
}

pub(crate) fn selector(call: &Call) -> Result<Selector, ApiError> {
    Selector::parse(
        call.query.get("labelSelector"),
        call.query.get("fieldSelector"),
        &call.resource,
    )
}

/// An object of a page: as it is stored where nobody had to look into it.
enum Found<'a> {
    Stored(&'a Entry),
    Object(Value),
}

/// Hands the objects of one page to `take`, as they are stored where they are `wanted_whole`.
async fn read_page(
    call: &Call,
    wanted_whole: bool,
    mut take: impl FnMut(Found<'_>),
) -> Result<Page, ApiError> {
    let selector = selector(call)?;
    let prefix = prefix(call, &selector);
    let limit = call.query.number("limit")?.unwrap_or(0);
    let limit = usize::try_from(limit).unwrap_or(usize::MAX);
    check_options(call)?;
    let (mut revision, mut after) = match call.query.get("continue") {
        Some(token) => {
            if call.query.get("resourceVersion").is_some_and(|version| version != "0") {
                return Err(ApiError::BadRequest(
                    "specifying resource version is not allowed when using continue".to_owned(),
                ));
            }
            let token = Continue::decode(token, &prefix)?;
            (Some(token.revision).filter(|revision| *revision > 0), Some(token.after))
        }
        None => (exact_revision(call).await?, None),
    };
    let begun = after.clone();
    let store = call.server.store();
    let mut local = call.takes_old();
    let (mut count, mut bytes) = (0, 0);
    let max_bytes = call.server.flow().limits().list_bytes;
    loop {
        let query =
            ListQuery { prefix: prefix.clone(), after: after.clone(), limit: PAGE, revision };
        let listing = if local { store.list_local(&query) } else { store.list(&query).await };
        let listing = listing.map_err(|error| expired(error, begun.as_deref()))?;
        // Further pages are of the same revision, which is here by now.
        local = true;
        revision = Some(listing.revision);
        for (at, entry) in listing.entries.iter().enumerate() {
            // Whoever names a limit goes on where a page ends, be it shorter than that.
            let is_full = limit > 0 && (count == limit || bytes > max_bytes);
            if is_full {
                let before = at.checked_sub(1).map(|at| listing.entries[at].key.to_string());
                let after = before.or(after).unwrap_or_default();
                let next = Continue { revision: listing.revision, after };
                let remaining = selector.is_empty().then(|| remaining(call, &prefix, &next));
                let remaining = remaining.flatten();
                return Ok(Page { revision: listing.revision, next: Some(next), remaining });
            }
            let as_stored = wanted_whole && selector.is_empty() && call.resource.is_plain(entry);
            let found = if as_stored {
                Some(Found::Stored(entry))
            } else {
                Some(call.resource.decode(entry)?)
                    .filter(|object| selector.matches(&call.resource, object))
                    .map(Found::Object)
            };
            if let Some(found) = found {
                take(found);
                count += 1;
                bytes += entry.value.len();
                if limit == 0 && bytes > max_bytes {
                    return Err(ApiError::ListTooLarge(max_bytes));
                }
            }
        }
        if !listing.more {
            return Ok(Page { revision: listing.revision, next: None, remaining: None });
        }
        after = listing.entries.last().map(|entry| entry.key.to_string());
    }
}

/// Number of entries after the page's last one. They are of a revision that is here, and only their
/// places are copied.
fn remaining(call: &Call, prefix: &str, next: &Continue) -> Option<usize> {
    let query = ListQuery {
        prefix: prefix.to_owned(),
        after: Some(next.after.clone()),
        limit: 0,
        revision: Some(next.revision),
    };
    // Compacted meanwhile: then the client's next page will tell it.
    call.server.store().list_local(&query).ok().map(|listing| listing.entries.len())
}

/// The revision that a list must show. Without `Exact`, the newest state is never too old.
async fn exact_revision(call: &Call) -> Result<Option<u64>, ApiError> {
    let version = call.query.number("resourceVersion")?;
    if let Some(wanted) = version {
        check_reached(call, wanted).await?;
    }
    Ok(version.filter(|_| call.query.get("resourceVersionMatch") == Some("Exact")))
}

/// What of the options that go together must not, as in Kubernetes.
pub(super) fn check_options(call: &Call) -> Result<(), ApiError> {
    let query = &call.query;
    let version_match = query.get("resourceVersionMatch");
    let is_watch = call.verb == Verb::Watch;
    // Whatever is done with what they select.
    let kind = Verb::List.options();
    let known: &[&str] = if is_watch { &["NotOlderThan"] } else { &["Exact", "NotOlderThan"] };
    if let Some(other) = version_match.filter(|value| !known.contains(value)) {
        return Err(ApiError::unsupported_option(kind, "resourceVersionMatch", other, known));
    }
    let streams = query.flag("sendInitialEvents").is_some();
    let version = query.get("resourceVersion");
    let (option, problem) = if is_watch && streams && version_match.is_none() {
        ("resourceVersionMatch", "sendInitialEvents requires NotOlderThan")
    } else if is_watch && !streams && version_match.is_some() {
        ("resourceVersionMatch", "it is for watches with sendInitialEvents alone")
    } else if !is_watch && streams {
        ("sendInitialEvents", "it is for watches alone")
    } else if !is_watch && version_match.is_some() && version.is_none() {
        ("resourceVersionMatch", "it needs a resourceVersion")
    } else if version_match.is_some() && query.get("continue").is_some() {
        ("resourceVersionMatch", "continue says which version it goes on with")
    } else if version_match == Some("Exact") && version == Some("0") {
        ("resourceVersionMatch", "0 is any version")
    } else {
        return Ok(());
    };
    Err(ApiError::invalid_option(
        kind,
        "FieldValueForbidden",
        option,
        &format!("Forbidden: {problem}"),
    ))
}

/// Nothing can be newer than what there is.
async fn check_reached(call: &Call, wanted: u64) -> Result<(), ApiError> {
    if wanted <= call.server.store().revision() {
        return Ok(());
    }
    let current = call.server.store().current_revision().await?;
    if wanted > current { Err(ApiError::FutureVersion { wanted, current }) } else { Ok(()) }
}

/// `after` is the last key that the client has.
fn expired(error: StoreError, after: Option<&str>) -> ApiError {
    match (error, after) {
        (StoreError::Read(ReadError::Compacted { .. }), Some(after)) => {
            let go_on = Continue { revision: 0, after: after.to_owned() };
            ApiError::ExpiredPage { go_on: go_on.encode() }
        }
        (StoreError::Read(ReadError::Compacted { .. }), None) => ApiError::Expired(
            "The provided resourceVersion is too old to display a consistent list result. Start a \
             new list without it."
                .to_owned(),
        ),
        (other, _) => other.into(),
    }
}

/// All objects that the call's selector matches, for verbs that act on each.
pub(crate) async fn matching(call: &Call) -> Result<(Vec<Value>, u64), ApiError> {
    let mut objects = Vec::new();
    let page = read_page(call, false, |found| match found {
        Found::Object(object) => objects.push(object),
        Found::Stored(_) => {}
    })
    .await?;
    Ok((objects, page.revision))
}
