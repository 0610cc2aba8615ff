//! create, update and patch.

use axum::{http::StatusCode, response::Response};
use exo_store::{Txn, TxnOutcome};
use serde_json::{Value, json};

use super::admission;
use crate::{
    error::{ApiError, Cause},
    object,
    server::{Call, MAX_BODY_BYTES, Subresource},
};

/// Tries of a write that names no resource version; each one looks anew.
const MAX_TRIES: usize = 16;
/// Random characters after `generateName`, without vowels and look-alikes as in Kubernetes.
const SUFFIX_ALPHABET: &[u8; 27] = b"bcdfghjklmnpqrstvwxz2456789";
const SUFFIX_LEN: usize = 5;
/// Longest `generateName` that is used whole, so that the suffix still fits a label.
const MAX_GENERATE_BASE: usize = 63 - SUFFIX_LEN;

pub(crate) async fn create(call: &Call) -> Result<Response, ApiError> {
    let mut object = call.body_object()?;
    admission::check_identity(call, &mut object)?;
    if object::resource_version(&object).is_some() {
        return Err(ApiError::BadRequest(
            "resourceVersion should not be set on objects to be created".to_owned(),
        ));
    }
    admission::stamp_new(&call.resource, &mut object);
    let base = match object::text(&object, "generateName") {
        Some(base) if object::name(&object).is_empty() && !base.is_empty() => {
            Some(base.chars().take(MAX_GENERATE_BASE).collect::<String>())
        }
        _ => None,
    };
    for _ in 0..MAX_TRIES {
        if let Some(base) = &base {
            let name = format!("{base}{}", random_suffix());
            object::set_metadata(&mut object, "name", Some(json!(name)));
        }
        let warnings = admission::admit(call, &mut object, None)?;
        if let Some(revision) = insert(call, &object).await? {
            set_version(&mut object, revision);
            return Ok(call.respond(StatusCode::CREATED, object, &warnings));
        }
        if base.is_none() {
            break;
        }
    }
    let name = object::name(&object);
    Err(ApiError::AlreadyExists(call.resource.subject(name)))
}

/// The new object's revision; `None` if the name is taken.
async fn insert(call: &Call, object: &Value) -> Result<Option<u64>, ApiError> {
    let name = object::name(object);
    let key = call.resource.key(call.namespace.as_deref(), name);
    let store = call.server.store();
    if call.query.dry_run()? {
        return Ok(match store.get(&key).await? {
            Some(_) => None,
            None => Some(store.revision()),
        });
    }
    match store.txn(Txn::create(key, object::encode(object)?)).await? {
        TxnOutcome::Committed { revision } => Ok(Some(revision)),
        TxnOutcome::Conflict { .. } => Ok(None),
    }
}

fn random_suffix() -> String {
    let random = uuid::Uuid::new_v4();
    let bytes = random.as_bytes();
    bytes[..SUFFIX_LEN]
        .iter()
        .map(|byte| char::from(SUFFIX_ALPHABET[usize::from(*byte) % SUFFIX_ALPHABET.len()]))
        .collect()
}

fn set_version(object: &mut Value, revision: u64) {
    object::set_metadata(object, "resourceVersion", Some(json!(revision.to_string())));
}

pub(crate) async fn update(call: &Call) -> Result<Response, ApiError> {
    let mut wanted = call.body_object()?;
    admission::check_identity(call, &mut wanted)?;
    if object::resource_version(&wanted).is_none() {
        return Err(ApiError::Invalid {
            subject: call.resource.subject(&call.name),
            causes: vec![Cause {
                reason: "FieldValueInvalid",
                message: "Invalid value: 0: must be specified for an update".to_owned(),
                field: "metadata.resourceVersion".to_owned(),
            }],
        });
    }
    change(call, |_| Ok(wanted.clone())).await
}

const PATCH_TYPES: &str = "application/json-patch+json, application/merge-patch+json";

pub(crate) async fn patch(call: &Call) -> Result<Response, ApiError> {
    let bad = |error: serde_json::Error| ApiError::BadRequest(format!("the patch is bad: {error}"));
    match call.content_type.as_deref() {
        Some("application/merge-patch+json") => {
            let patch: Value = serde_json::from_slice(&call.body).map_err(bad)?;
            if !patch.is_object() {
                return Err(ApiError::BadRequest("the patch is not an object".to_owned()));
            }
            change(call, |current| {
                let mut wanted = current.clone();
                json_patch::merge(&mut wanted, &patch);
                Ok(wanted)
            })
            .await
        }
        Some("application/json-patch+json") => {
            let patch: json_patch::Patch = serde_json::from_slice(&call.body).map_err(bad)?;
            change(call, |current| {
                let mut wanted = current.clone();
                apply_json_patch(&mut wanted, &patch)?;
                Ok(wanted)
            })
            .await
        }
        _ => Err(ApiError::UnsupportedMediaType(PATCH_TYPES)),
    }
}

/// Operations of one JSON patch, as in Kubernetes.
const MAX_PATCH_OPERATIONS: usize = 10_000;

fn apply_json_patch(object: &mut Value, patch: &json_patch::Patch) -> Result<(), ApiError> {
    if patch.len() > MAX_PATCH_OPERATIONS {
        return Err(ApiError::TooLarge(MAX_BODY_BYTES));
    }
    for operation in &patch.0 {
        json_patch::patch(object, std::slice::from_ref(operation))
            .map_err(|error| ApiError::Unprocessable(error.to_string()))?;
        // A few copies of copies could fill the memory.
        if matches!(operation, json_patch::PatchOperation::Copy(_))
            && object.to_string().len() > MAX_BODY_BYTES
        {
            return Err(ApiError::TooLarge(MAX_BODY_BYTES));
        }
    }
    Ok(())
}

/// Replaces the object by what `wanted` makes of it. Where that carries a resource version it must
/// be the current one; where it doesn't, a conflict means another try.
async fn change(
    call: &Call,
    wanted: impl Fn(&Value) -> Result<Value, ApiError>,
) -> Result<Response, ApiError> {
    let store = call.server.store();
    let key = call.key();
    for _ in 0..MAX_TRIES {
        let entry = store.get(&key).await?.ok_or_else(|| call.not_found())?;
        let mut current = object::decode(&entry)?;
        // What an older schema knew is not the client's mistake.
        call.resource.schema.prune(&mut current);
        let mut new = wanted(&current)?;
        check_target(call, &current, &mut new)?;
        admission::merge_update(call, &current, &mut new);
        let warnings = admission::admit(call, &mut new, Some(&current))?;
        check_finalizers(call, &current, &new)?;
        if call.subresource != Some(Subresource::Status) {
            admission::bump_generation(&current, &mut new);
        }
        set_version(&mut new, entry.mod_revision);
        if new == current || call.query.dry_run()? {
            return Ok(call.respond(StatusCode::OK, new, &warnings));
        }
        let gone = object::is_deleting(&new) && object::finalizers(&new).is_empty();
        let txn = if gone {
            Txn::delete(key.as_str(), entry.mod_revision)
        } else {
            Txn::replace(key.as_str(), entry.mod_revision, object::encode(&new)?)
        };
        if let TxnOutcome::Committed { revision } = store.txn(txn).await? {
            set_version(&mut new, revision);
            return Ok(call.respond(StatusCode::OK, new, &warnings));
        }
    }
    Err(ApiError::modified(call.resource.subject(&call.name)))
}

/// The wanted object is this object, and not an older or another one.
fn check_target(call: &Call, current: &Value, wanted: &mut Value) -> Result<(), ApiError> {
    if !wanted.is_object() {
        return Err(ApiError::Unprocessable("the patched object is not an object".to_owned()));
    }
    admission::check_identity(call, wanted)?;
    let name = object::name(wanted);
    if name != call.name {
        return Err(ApiError::BadRequest(format!(
            "the name of the object ({name}) does not match the name on the URL ({})",
            call.name
        )));
    }
    let subject = || call.resource.subject(&call.name);
    if let Some(uid) = object::uid(wanted).filter(|uid| Some(*uid) != object::uid(current)) {
        return Err(ApiError::Conflict {
            subject: subject(),
            message: format!(
                "Precondition failed: UID in precondition: {uid}, UID in object meta: {}",
                object::uid(current).unwrap_or_default()
            ),
        });
    }
    match object::resource_version(wanted) {
        Some(version) if Some(version) != object::resource_version(current) => {
            Err(ApiError::modified(subject()))
        }
        _ => Ok(()),
    }
}

/// An object that is being deleted gets no new finalizers.
fn check_finalizers(call: &Call, current: &Value, new: &Value) -> Result<(), ApiError> {
    if !object::is_deleting(current) {
        return Ok(());
    }
    let old = object::finalizers(current);
    match object::finalizers(new).iter().find(|f| !old.contains(f)) {
        None => Ok(()),
        Some(added) => Err(ApiError::Invalid {
            subject: call.resource.subject(&call.name),
            causes: vec![Cause {
                reason: "FieldValueForbidden",
                message: format!(
                    "Forbidden: no new finalizers can be added if the object is being deleted, \
                     found new finalizers [{}]",
                    json!(added)
                ),
                field: "metadata.finalizers".to_owned(),
            }],
        }),
    }
}
