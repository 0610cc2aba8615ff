//! create, update and apply, and what all writes have in common.

use std::sync::Arc;

use axum::{http::StatusCode, response::Response};
use exo_store::{Entry, Txn, TxnOutcome};
use serde_json::{Value, json};

use super::{
    admission,
    patch::{APPLY_PATCH, PATCH_TYPES, Patch},
};
use crate::{
    body::Input,
    builtin, clock,
    error::{ApiError, Cause},
    fields::{self, Author},
    namespace::{self, Home},
    object, schema,
    server::{Call, Subresource},
};

/// Tries of a write that names no resource version; each one looks anew.
const MAX_TRIES: usize = 16;
/// Random characters after `generateName`, without vowels and look-alikes as in Kubernetes.
const SUFFIX_ALPHABET: &[u8; 27] = b"bcdfghjklmnpqrstvwxz2456789";
const SUFFIX_LEN: usize = 5;
/// Longest `generateName` that is used whole, so that the suffix still fits a label.
const MAX_GENERATE_BASE: usize = 63 - SUFFIX_LEN;

pub(crate) async fn create(call: &Call) -> Result<Response, ApiError> {
    let Input { mut object, duplicates } = call.body_object()?;
    admission::check_identity(call, &mut object)?;
    if object::resource_version(&object).is_some() {
        return Err(ApiError::BadRequest(
            "resourceVersion should not be set on objects to be created".to_owned(),
        ));
    }
    object::set_metadata(&mut object, "managedFields", None);
    admission::stamp_new(&call.resource, &mut object);
    let mut home = namespace::check_new(call, false).await?;
    let manager = manager(call)?;
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
        object::set_metadata(&mut object, "managedFields", None);
        let warnings = admission::admit(call, &mut object, None, &duplicates)?;
        let now = clock::format(clock::now());
        let author = author(call, &manager, &now);
        fields::created(call.resource.schema.typed(), &mut object, &author);
        if let Some(inserted) = insert(call, &object, &mut home).await? {
            inserted.show(&mut object);
            return Ok(call.respond(StatusCode::CREATED, object, &warnings));
        }
        if base.is_none() {
            break;
        }
    }
    let name = object::name(&object);
    Err(ApiError::AlreadyExists(call.resource.subject(name)))
}

/// Longest name of a field manager, as in Kubernetes.
const MAX_MANAGER_LEN: usize = 128;

/// Name of the field manager: the parameter, or what the client calls itself.
fn manager(call: &Call) -> Result<String, ApiError> {
    let Some(manager) = call.query.get("fieldManager") else {
        let agent = call.user_agent.as_deref().unwrap_or_default();
        let name = agent.split('/').next().unwrap_or_default().trim();
        let name: String = name.chars().take(MAX_MANAGER_LEN).collect();
        return Ok(if name.is_empty() { "unknown".to_owned() } else { name });
    };
    if manager.len() > MAX_MANAGER_LEN || manager.chars().any(char::is_control) {
        return Err(ApiError::invalid_option(
            call.verb.options(),
            "FieldValueInvalid",
            "fieldManager",
            &format!("Invalid value: must be at most {MAX_MANAGER_LEN} printable characters"),
        ));
    }
    Ok(manager.to_owned())
}

fn author<'a>(call: &'a Call, manager: &'a str, now: &'a str) -> Author<'a> {
    Author {
        manager,
        api_version: call.resource.api_version(),
        subresource: call.subresource.map_or("", Subresource::name),
        now,
    }
}

/// A new object is there, or would be.
enum Inserted {
    At(u64),
    OnlyTried,
}

impl Inserted {
    fn show(&self, object: &mut Value) {
        match self {
            Self::At(revision) => set_version(object, *revision),
            Self::OnlyTried => {}
        }
    }
}

/// `None` if the name is taken. Nothing comes into a namespace that is no more what it was when it
/// was looked at: then it is looked at anew.
async fn insert(
    call: &Call,
    object: &Value,
    home: &mut Home,
) -> Result<Option<Inserted>, ApiError> {
    let name = object::name(object);
    let key = call.resource.key(call.namespace.as_deref(), name);
    let store = call.server.store();
    if call.dry_run()? {
        return Ok(match store.get(&key).await? {
            Some(_) => None,
            None => Some(Inserted::OnlyTried),
        });
    }
    let value: Arc<str> = call.resource.encode(object)?.into();
    for _ in 0..MAX_TRIES {
        let mut txn = Txn::create(key.as_str(), Arc::clone(&value));
        txn.compare.extend(home.clone());
        match store.txn(txn).await? {
            TxnOutcome::Committed { revision } => return Ok(Some(Inserted::At(revision))),
            TxnOutcome::Conflict { current } if current.first().is_some_and(Option::is_some) => {
                return Ok(None);
            }
            TxnOutcome::Conflict { .. } => *home = namespace::check_new(call, true).await?,
        }
    }
    let namespace = call.namespace.as_deref().unwrap_or_default();
    Err(ApiError::modified(call.server.namespaces().subject(namespace)))
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
    let Input { object: mut wanted, duplicates } = call.body_object()?;
    admission::check_identity(call, &mut wanted)?;
    let is_blind = object::resource_version(&wanted).is_none();
    let replace = |_: &Value| {
        // Only of what is there: of anything else, that is what the client must know.
        if is_blind && !builtin::updates_blindly(&call.resource) {
            return Err(names_no_version(call));
        }
        Ok(wanted.clone())
    };
    let (object, warnings) = change(call, &duplicates, replace).await?;
    Ok(call.respond(StatusCode::OK, object, &warnings))
}

fn names_no_version(call: &Call) -> ApiError {
    ApiError::Invalid {
        subject: call.resource.subject(&call.name),
        causes: vec![Cause::invalid(
            "metadata.resourceVersion",
            "0x0: must be specified for an update",
        )],
    }
}

pub(crate) async fn patch(call: &Call) -> Result<Response, ApiError> {
    if call.content_type.as_deref() == Some(APPLY_PATCH) {
        return apply(call).await;
    }
    let patch = Patch::read(call)?;
    let (object, warnings) = change(call, &patch.duplicates, |current| {
        let mut wanted = current.clone();
        patch.apply(call, &mut wanted)?;
        Ok(wanted)
    })
    .await?;
    Ok(call.respond(StatusCode::OK, object, &warnings))
}

/// Server-side apply.
async fn apply(call: &Call) -> Result<Response, ApiError> {
    if call.query.get("fieldManager").is_none() {
        let message = "Required value: is required for apply patch";
        let reason = "FieldValueRequired";
        return Err(ApiError::invalid_option("PatchOptions", reason, "fieldManager", message));
    }
    if call.subresource == Some(Subresource::Scale) {
        return Err(ApiError::UnsupportedMediaType(PATCH_TYPES));
    }
    let manager = manager(call)?;
    let force = call.query.flag("force") == Some(true);
    let Input { object: mut config, duplicates } = call.apply_object()?;
    admission::check_identity(call, &mut config)?;
    // Where the configuration leaves it out, the path says it.
    if config.pointer("/metadata/name").is_none_or(|name| name.is_null() || name == "") {
        object::set_metadata(&mut config, "name", Some(json!(call.name)));
    }
    check_name(call, &config)?;
    if config.pointer("/metadata/managedFields").is_some_and(|m| !m.is_null()) {
        return Err(ApiError::BadRequest("metadata.managedFields must be nil".to_owned()));
    }
    let unknown = admission::prune_unknown(&call.resource, &mut config);
    let warnings = admission::judge(call, unknown.clone(), &duplicates)?;
    check_declared(call, &unknown)?;
    let typed = call.resource.schema.typed();
    schema::drop_nulls(Some(typed), &mut config);
    restrict(call, &mut config);

    let store = call.server.store();
    let now = clock::format(clock::now());
    let author = author(call, &manager, &now);
    for _ in 0..MAX_TRIES {
        let Some(entry) = store.get(&call.key()).await? else {
            if let Some(response) = apply_new(call, &config, &author, &warnings).await? {
                return Ok(response);
            }
            continue;
        };
        let current = readable(call, &entry)?;
        check_version(call, &current, &config)?;
        let merged = fields::apply(typed, Some(&current), &config, force, &author);
        let mut new = merged.map_err(|conflicts| ApiError::ApplyConflict {
            subject: call.resource.subject(&call.name),
            conflicts,
        })?;
        let managed = new.pointer("/metadata/managedFields").cloned();
        admission::merge_update(call, &current, &mut new);
        object::set_metadata(&mut new, "managedFields", managed);
        admission::admit(call, &mut new, Some(&current), &[])?;
        if let Some(new) = commit(call, &entry, &current, new).await? {
            return Ok(call.respond(StatusCode::OK, new, &warnings));
        }
    }
    Err(ApiError::modified(call.resource.subject(&call.name)))
}

/// An applied configuration has no fields that nobody could own, however fields are validated.
fn check_declared(call: &Call, unknown: &[String]) -> Result<(), ApiError> {
    if unknown.is_empty() {
        return Ok(());
    }
    let resource = &call.resource;
    let place = call.namespace.as_deref().unwrap_or_default();
    let faults: Vec<String> = unknown
        .iter()
        .take(admission::MAX_FAULTS_TOLD)
        .map(|path| format!(".{path}: field not declared in schema"))
        .collect();
    Err(ApiError::BadRequest(format!(
        "failed to create typed patch object ({place}/{}; {}, Kind={}): {}",
        call.name,
        resource.api_version(),
        resource.kind,
        faults.join(", ")
    )))
}

/// Leaves of a configuration what the subresource can change.
fn restrict(call: &Call, config: &mut Value) {
    let status_only = call.subresource == Some(Subresource::Status);
    if let Some(fields) = config.as_object_mut() {
        fields.retain(|name, _| match name.as_str() {
            "apiVersion" | "kind" | "metadata" => true,
            "status" => status_only || !call.resource.has_status,
            _ => !status_only,
        });
    }
    if status_only {
        object::metadata_mut(config)
            .retain(|name, _| ["name", "namespace", "uid", "resourceVersion"].contains(&&**name));
    }
}

/// Creates what is applied; `None` if it has come about meanwhile.
async fn apply_new(
    call: &Call,
    config: &Value,
    author: &Author<'_>,
    warnings: &[String],
) -> Result<Option<Response>, ApiError> {
    if call.subresource.is_some() {
        return Err(call.not_found());
    }
    if object::uid(config).is_some() || object::resource_version(config).is_some() {
        return Err(ApiError::Conflict {
            subject: call.resource.subject(&call.name),
            message: "uid or resourceVersion mismatch: the object doesn't exist".to_owned(),
        });
    }
    let mut home = namespace::check_new(call, false).await?;
    let applied = fields::apply(call.resource.schema.typed(), None, config, false, author);
    let mut object = applied.expect("a new object has no other managers");
    admission::stamp_new(&call.resource, &mut object);
    admission::admit(call, &mut object, None, &[])?;
    Ok(insert(call, &object, &mut home).await?.map(|inserted| {
        inserted.show(&mut object);
        call.respond(StatusCode::CREATED, object, warnings)
    }))
}

/// Replaces the object by what `wanted` makes of it; returns it with warnings. Where that carries a
/// resource version it must be the current one; where it doesn't, a conflict means another try.
/// `duplicates` are the request's, to be warned of or refused.
pub(super) async fn change(
    call: &Call,
    duplicates: &[String],
    wanted: impl Fn(&Value) -> Result<Value, ApiError>,
) -> Result<(Value, Vec<String>), ApiError> {
    let manager = manager(call)?;
    let now = clock::format(clock::now());
    let author = author(call, &manager, &now);
    for _ in 0..MAX_TRIES {
        let entry = call.server.store().get(&call.key()).await?;
        let entry = entry.ok_or_else(|| call.not_found())?;
        let current = readable(call, &entry)?;
        let mut new = wanted(&current)?;
        check_target(call, &current, &mut new)?;
        let claimed = new.pointer("/metadata/managedFields").cloned();
        admission::merge_update(call, &current, &mut new);
        let warnings = admission::admit(call, &mut new, Some(&current), duplicates)?;
        let typed = call.resource.schema.typed();
        fields::updated(typed, &current, &mut new, claimed.as_ref(), &author);
        if let Some(new) = commit(call, &entry, &current, new).await? {
            return Ok((new, warnings));
        }
    }
    Err(ApiError::modified(call.resource.subject(&call.name)))
}

/// The object of an entry, without what an older schema knew: that is not the client's mistake.
fn readable(call: &Call, entry: &Entry) -> Result<Value, ApiError> {
    let mut current = call.resource.decode(entry)?;
    call.resource.schema.prune(&mut current);
    Ok(current)
}

/// Stores the admitted object in the place of `current`; returns it as it is stored then, or `None`
/// if another writer was faster.
async fn commit(
    call: &Call,
    entry: &Entry,
    current: &Value,
    mut new: Value,
) -> Result<Option<Value>, ApiError> {
    check_finalizers(call, current, &new)?;
    if call.subresource != Some(Subresource::Status) {
        admission::bump_generation(&call.resource, current, &mut new);
    }
    set_version(&mut new, entry.mod_revision);
    if new == *current || call.dry_run()? {
        return Ok(Some(new));
    }
    let key = Arc::clone(&entry.key);
    let txn = if object::is_deleting(&new) && !object::is_held(&new) {
        Txn::delete(key, entry.mod_revision)
    } else {
        Txn::replace(key, entry.mod_revision, call.resource.encode(&new)?)
    };
    Ok(match call.server.store().txn(txn).await? {
        TxnOutcome::Committed { revision } => {
            set_version(&mut new, revision);
            Some(new)
        }
        TxnOutcome::Conflict { .. } => None,
    })
}

/// A patch that can't be applied to the object as it is.
pub(super) fn unprocessable(call: &Call, message: String) -> ApiError {
    ApiError::Unprocessable { subject: call.resource.subject(&call.name), message }
}

/// The wanted object is this object, and not an older or another one.
fn check_target(call: &Call, current: &Value, wanted: &mut Value) -> Result<(), ApiError> {
    if !wanted.is_object() {
        return Err(unprocessable(call, "the patched object is not an object".to_owned()));
    }
    admission::check_identity(call, wanted)?;
    check_name(call, wanted)?;
    check_version(call, current, wanted)?;
    check_creation(call, current, wanted)
}

/// When it was made stays; clients may write the same time otherwise, or leave it out.
fn check_creation(call: &Call, current: &Value, wanted: &Value) -> Result<(), ApiError> {
    const FIELD: &str = "creationTimestamp";
    let Some(given) = object::text(wanted, FIELD) else {
        return Ok(());
    };
    let time = |text: Option<&str>| text.and_then(clock::parse);
    if time(Some(given)) == time(object::text(current, FIELD)) {
        return Ok(());
    }
    Err(ApiError::Invalid {
        subject: call.resource.subject(&call.name),
        causes: vec![Cause::invalid(
            format!("metadata.{FIELD}"),
            format_args!("{}: field is immutable", json!(given)),
        )],
    })
}

fn check_name(call: &Call, wanted: &Value) -> Result<(), ApiError> {
    let name = object::name(wanted);
    if name == call.name {
        return Ok(());
    }
    Err(ApiError::BadRequest(format!(
        "the name of the object ({name}) does not match the name on the URL ({})",
        call.name
    )))
}

/// uid and resource version, where the client names them, are the current ones.
fn check_version(call: &Call, current: &Value, wanted: &Value) -> Result<(), ApiError> {
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

#[cfg(test)]
mod tests {
    use exo_store::Store;
    use tokio::time::Instant;

    use super::*;
    use crate::{
        request::{Query, Verb},
        server::ApiServer,
        table::Form,
    };

    fn creation(server: &ApiServer) -> Call {
        let resource = server.resources().iter().find(|r| r.kind == "Secret").unwrap();
        Call {
            server: server.clone(),
            verb: Verb::Create,
            resource: Arc::clone(resource),
            namespace: Some("team".into()),
            name: String::new(),
            subresource: None,
            query: Query::default(),
            form: Form::Whole,
            content_type: None,
            user_agent: None,
            client: String::new(),
            body: bytes::Bytes::new(),
            deadline: Instant::now(),
        }
    }

    /// Whatever becomes of the namespace while a new object is being looked at.
    #[tokio::test]
    async fn nothing_comes_into_a_namespace_that_went_meanwhile() {
        let registry = prometheus::Registry::new();
        let store = Store::memory();
        let server = ApiServer::new(store.clone(), &exo_crds::all(), &registry).unwrap();
        let call = creation(&server);
        let key = server.namespaces().key(None, "team");
        let put = async |metadata: Value| {
            let before = store.get_local(&key).map_or(0, |entry| entry.mod_revision);
            let object = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": metadata});
            store.txn(Txn::replace(key.as_str(), before, object.to_string())).await.unwrap();
        };
        let secret = |name: &str| {
            json!({
                "apiVersion": "v1", "kind": "Secret",
                "metadata": {"name": name, "namespace": "team"},
            })
        };
        put(json!({"name": "team"})).await;
        let mut home = namespace::check_new(&call, false).await.unwrap();
        let first = home.clone();
        put(json!({"name": "team", "labels": {"a": "b"}})).await;
        let made = insert(&call, &secret("a"), &mut home).await.unwrap();
        assert!(matches!(made, Some(Inserted::At(_))), "it is still there");
        for before in [home.clone(), first.clone()] {
            let mut home = before;
            assert!(insert(&call, &secret("a"), &mut home).await.unwrap().is_none());
        }
        put(json!({"name": "team", "deletionTimestamp": "2026-01-01T00:00:00Z"})).await;
        let refused = insert(&call, &secret("b"), &mut home).await;
        assert!(matches!(refused, Err(ApiError::Terminating { .. })));
        let revision = store.get_local(&key).unwrap().mod_revision;
        store.txn(Txn::delete(key.as_str(), revision)).await.unwrap();
        let refused = insert(&call, &secret("b"), &mut home).await;
        assert!(matches!(refused, Err(ApiError::NotFound(_))));
        assert!(store.get_local(&call.resource.key(Some("team"), "b")).is_none());
    }
}
