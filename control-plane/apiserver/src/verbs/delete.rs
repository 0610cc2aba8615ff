//! delete and deletecollection.

use axum::{http::StatusCode, response::Response};
use exo_store::{Store, Txn, TxnOutcome};
use futures::future::join_all;
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::time::Instant;

use super::read;
use crate::{
    clock,
    error::ApiError,
    namespace, object,
    resource::Resource,
    server::{Call, json_response},
};

/// Tries against concurrent writers; each one looks anew.
const MAX_TRIES: usize = 16;

/// The part of `metav1.DeleteOptions` that changes something here.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Options {
    #[serde(default)]
    preconditions: Option<Preconditions>,
    #[serde(default)]
    propagation_policy: Option<String>,
    /// The older way to say `Orphan` or `Background`.
    #[serde(default)]
    orphan_dependents: Option<bool>,
    #[serde(default)]
    dry_run: Option<Vec<String>>,
    /// What `dry_run` comes to.
    #[serde(skip)]
    only_tries: bool,
}

/// What must hold of the object.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Preconditions {
    #[serde(default)]
    pub(crate) uid: Option<String>,
    #[serde(default)]
    pub(crate) resource_version: Option<String>,
}

/// What becomes of an object's dependents.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Propagation {
    /// They are deleted afterwards.
    #[default]
    Background,
    /// Those that block go first.
    Foreground,
    /// They stay, without this owner.
    Orphan,
}

/// Held until the dependents that block are gone.
pub(crate) const FOREGROUND: &str = "foregroundDeletion";
/// Held until no dependent names this owner.
pub(crate) const ORPHAN: &str = "orphan";

impl Propagation {
    fn finalizer(self) -> Option<&'static str> {
        match self {
            Self::Background => None,
            Self::Foreground => Some(FOREGROUND),
            Self::Orphan => Some(ORPHAN),
        }
    }

    fn of(call: &Call, options: &Options) -> Result<Self, ApiError> {
        if options.propagation_policy.is_some() && options.orphan_dependents.is_some() {
            return Err(ApiError::invalid_option(
                "DeleteOptions",
                "FieldValueInvalid",
                "propagationPolicy",
                "Invalid value: orphanDependents and deletionPropagation cannot be both set",
            ));
        }
        match options.propagation_policy.as_deref() {
            None if options.orphan_dependents == Some(true) => Ok(Self::Orphan),
            None | Some("Background") => Ok(Self::Background),
            Some("Foreground") => Ok(Self::Foreground),
            Some("Orphan") => Ok(Self::Orphan),
            Some(other) => {
                let supported = ["Background", "Foreground", "Orphan"];
                Err(call.unsupported("propagationPolicy", other, &supported))
            }
        }
    }
}

/// What became of an object.
pub(crate) enum Removed {
    /// It is gone; as it was last.
    Gone(Value),
    /// It waits for its finalizers.
    Marked(Value),
}

pub(crate) async fn delete(call: &Call) -> Result<Response, ApiError> {
    let options = options(call)?;
    let propagation = Propagation::of(call, &options)?;
    if call.resource.is_namespaces() && call.name == namespace::DEFAULT {
        return Err(ApiError::Forbidden {
            subject: call.resource.subject(&call.name),
            message: "this namespace may not be deleted".to_owned(),
        });
    }
    let preconditions = options.preconditions.unwrap_or_default();
    let dry_run = call.dry_run()? || options.only_tries;
    let store = call.server.store();
    if dry_run {
        let entry = store.get(&call.key()).await?;
        let entry = entry.ok_or_else(|| call.not_found())?;
        let mut object = call.resource.decode(&entry)?;
        check(&call.resource, &object, &preconditions)?;
        return Ok(match doom(&call.resource, &mut object, propagation) {
            Fate::Goes => gone(call, &object),
            Fate::Waits { .. } => call.respond(StatusCode::OK, object, &[]),
        });
    }
    let removed = remove(store, &call.resource, &call.key(), &preconditions, propagation).await?;
    match removed.ok_or_else(|| call.not_found())? {
        Removed::Gone(object) => Ok(gone(call, &object)),
        Removed::Marked(object) => Ok(call.respond(StatusCode::OK, object, &[])),
    }
}

fn gone(call: &Call, object: &Value) -> Response {
    let body = json!({
        "apiVersion": "v1",
        "kind": "Status",
        "metadata": {},
        "status": "Success",
        "details": {
            "name": object::name(object),
            "group": call.resource.group,
            "kind": call.resource.plural,
            "uid": object::uid(object).unwrap_or_default(),
        },
    });
    json_response(StatusCode::OK, &body)
}

fn options(call: &Call) -> Result<Options, ApiError> {
    let mut options: Options = if call.body.is_empty() {
        Options::default()
    } else {
        let object = call.body_object()?.object;
        // Whoever sends another thing means another thing.
        let kind = object.get("kind").and_then(Value::as_str).unwrap_or_default();
        if !["", "DeleteOptions"].contains(&kind) {
            let problem = format!("a DeleteOptions is expected here, not a {kind}");
            return Err(ApiError::BadRequest(problem));
        }
        serde_json::from_value(object)
            .map_err(|error| ApiError::BadRequest(format!("bad DeleteOptions: {error}")))?
    };
    if let Some(policy) = call.query.get("propagationPolicy") {
        options.propagation_policy = Some(policy.to_owned());
    }
    if let Some(orphan) = call.query.flag("orphanDependents") {
        options.orphan_dependents = Some(orphan);
    }
    for value in options.dry_run.iter().flatten() {
        if value != "All" {
            return Err(call.unsupported("dryRun", value, &["All"]));
        }
        options.only_tries = true;
    }
    Ok(options)
}

/// Deletes what `key` holds, or marks it while finalizers hold it; `None` if there is nothing.
pub(crate) async fn remove(
    store: &Store,
    resource: &Resource,
    key: &str,
    preconditions: &Preconditions,
    propagation: Propagation,
) -> Result<Option<Removed>, ApiError> {
    for _ in 0..MAX_TRIES {
        let Some(entry) = store.get(key).await? else {
            return Ok(None);
        };
        let mut object = resource.decode(&entry)?;
        check(resource, &object, preconditions)?;
        let fate = doom(resource, &mut object, propagation);
        let txn = match fate {
            Fate::Waits { is_new: false } => return Ok(Some(Removed::Marked(object))),
            Fate::Waits { is_new: true } => {
                Txn::replace(key, entry.mod_revision, resource.encode(&object)?)
            }
            Fate::Goes => Txn::delete(key, entry.mod_revision),
        };
        if let TxnOutcome::Committed { revision } = store.txn(txn).await? {
            let version = json!(revision.to_string());
            object::set_metadata(&mut object, "resourceVersion", Some(version));
            return Ok(Some(match fate {
                Fate::Waits { .. } => Removed::Marked(object),
                Fate::Goes => Removed::Gone(object),
            }));
        }
    }
    Err(ApiError::modified(resource.subject(name_of(key))))
}

fn name_of(key: &str) -> &str {
    key.rsplit('/').next().unwrap_or(key)
}

/// What a deletion does to an object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    Goes,
    /// For its finalizers; `is_new` if it did not do so before.
    Waits {
        is_new: bool,
    },
}

/// Makes of the object what a deletion makes of it.
fn doom(resource: &Resource, object: &mut Value, propagation: Propagation) -> Fate {
    let added = hold(object, propagation);
    if !object::is_held(object) {
        return Fate::Goes;
    }
    let is_new = added || !object::is_deleting(object);
    mark(resource, object);
    Fate::Waits { is_new }
}

/// Adds the finalizer of the propagation; `false` if nothing is new.
fn hold(object: &mut Value, propagation: Propagation) -> bool {
    let Some(finalizer) = propagation.finalizer() else {
        return false;
    };
    let finalizers = object::finalizers(object);
    if finalizers.contains(&finalizer) {
        return false;
    }
    let kept = finalizers.into_iter().filter(|f| ![FOREGROUND, ORPHAN].contains(f));
    let finalizers: Vec<&str> = kept.chain([finalizer]).collect();
    let finalizers = json!(finalizers);
    object::set_metadata(object, "finalizers", Some(finalizers));
    true
}

/// The object is to go once nothing holds it.
fn mark(resource: &Resource, object: &mut Value) {
    if object::is_deleting(object) {
        return;
    }
    if resource.is_namespaces() {
        object["status"]["phase"] = json!("Terminating");
    }
    let now = json!(clock::format(clock::now()));
    object::set_metadata(object, "deletionTimestamp", Some(now));
    object::set_metadata(object, "deletionGracePeriodSeconds", Some(json!(0)));
    if !resource.builtin {
        let generation = json!(object::generation(object) + 1);
        object::set_metadata(object, "generation", Some(generation));
    }
}

fn check(
    resource: &Resource,
    object: &Value,
    preconditions: &Preconditions,
) -> Result<(), ApiError> {
    let conflict = |what: &str, wanted: &str, found: Option<&str>| ApiError::Conflict {
        subject: resource.subject(object::name(object)),
        message: format!(
            "Precondition failed: {what} in precondition: {wanted}, {what} in object meta: {}",
            found.unwrap_or_default()
        ),
    };
    let uid = object::uid(object);
    if let Some(wanted) = preconditions.uid.as_deref().filter(|w| Some(*w) != uid) {
        return Err(conflict("UID", wanted, uid));
    }
    let version = object::resource_version(object);
    let wanted = preconditions.resource_version.as_deref();
    if let Some(wanted) = wanted.filter(|w| Some(*w) != version) {
        return Err(conflict("ResourceVersion", wanted, version));
    }
    Ok(())
}

pub(crate) async fn delete_collection(call: &Call) -> Result<Response, ApiError> {
    let options = options(call)?;
    let propagation = Propagation::of(call, &options)?;
    if call.resource.is_namespaces() {
        return Err(ApiError::MethodNotAllowed);
    }
    let dry_run = call.dry_run()? || options.only_tries;
    let (objects, revision) = read::matching(call).await?;
    if !dry_run {
        remove_matching(call, &objects, propagation).await?;
    }
    let metadata = json!({"resourceVersion": revision.to_string()});
    let mut body = call.form.begin_list(&call.resource);
    let now = clock::now();
    for object in objects {
        body.push(&call.form.item(&call.resource, object, now));
    }
    Ok(body.respond(&metadata))
}

async fn remove_matching(
    call: &Call,
    objects: &[Value],
    propagation: Propagation,
) -> Result<(), ApiError> {
    let mut changed = false;
    let mut left = objects.len();
    for objects in objects.chunks(AT_ONCE) {
        let doomed = objects.iter().map(|object| {
            let key = call.resource.key(object::namespace(object), object::name(object));
            // Another one of the same name, made meanwhile, is not meant.
            let uid = object::uid(object).map(str::to_owned);
            (key, Preconditions { uid, resource_version: None })
        });
        let store = call.server.store();
        let mut stopped = None;
        for removed in remove_together(store, &call.resource, doomed, propagation).await {
            match removed {
                Ok(removed) => changed |= removed.is_some(),
                Err(ApiError::Conflict { .. }) => {}
                Err(error) => stopped = Some(error),
            }
        }
        if let Some(error) = stopped {
            return Err(halfway(error, changed));
        }
        // Where the store doesn't wait for anything, nobody else would look at the clock.
        left -= objects.len();
        if left > 0 && Instant::now() >= call.deadline {
            return Err(ApiError::late(call.verb));
        }
    }
    Ok(())
}

/// Objects that are deleted at once: the store writes together what comes together, so that so many
/// take hardly longer than one.
pub(crate) const AT_ONCE: usize = 32;

/// [`remove`] of several keys at once, of which there should be at most [`AT_ONCE`].
pub(crate) async fn remove_together(
    store: &Store,
    resource: &Resource,
    doomed: impl Iterator<Item = (String, Preconditions)>,
    propagation: Propagation,
) -> Vec<Result<Option<Removed>, ApiError>> {
    let removals = doomed.map(async |(key, preconditions)| {
        remove(store, resource, &key, &preconditions, propagation).await
    });
    join_all(removals).await
}

/// What stopped a deletion of several objects. That nothing was done holds for the last one only.
fn halfway(error: ApiError, changed: bool) -> ApiError {
    match error {
        ApiError::Unavailable(text) | ApiError::Full(text) if changed => {
            ApiError::Timeout(format!("some of the objects are deleted, others are not: {text}"))
        }
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use axum::response::IntoResponse as _;

    use super::*;

    #[test]
    fn a_deletion_that_stops_halfway_does_not_say_that_nothing_was_done() {
        let check = |error: ApiError, changed: bool, code: u16| {
            let answer = halfway(error, changed).into_response();
            assert_eq!(answer.status().as_u16(), code);
        };
        check(ApiError::Unavailable("no majority".into()), false, 503);
        check(ApiError::Unavailable("no majority".into()), true, 504);
        check(ApiError::Full("no room".into()), false, 507);
        check(ApiError::Full("no room".into()), true, 504);
        check(ApiError::UnknownPath, true, 404);
    }
}
