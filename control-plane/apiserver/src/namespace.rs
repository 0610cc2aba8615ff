//! Objects that the server itself puts into the store, namespaces being the reason: `default`, and
//! the definitions of what is served. And what namespaces mean for other objects.

use exo_store::{Compare, Txn, TxnOutcome};
use serde_json::{Value, json};

use crate::{
    builtin, clock,
    error::ApiError,
    object,
    resource::{Access, Resource},
    server::{ApiServer, Call},
};

/// Always there.
pub(crate) const DEFAULT: &str = "default";

/// Where a new object comes into: holds while the namespace is as it was looked at. `None` for one
/// that always stays, and for objects without.
pub(crate) type Home = Option<Compare>;

/// New objects come only into namespaces that exist and stay. What is found here may be a little
/// old, where it isn't looked up `anew`: that it still holds is to be checked with the write.
pub(crate) async fn check_new(call: &Call, anew: bool) -> Result<Home, ApiError> {
    let Some(name) = call.namespace.as_deref() else {
        return Ok(None);
    };
    let server = &call.server;
    if name == DEFAULT {
        seed(server).await?;
    }
    let namespaces = server.namespaces();
    let key = namespaces.key(None, name);
    let store = server.store();
    let entry = match store.get_local(&key).filter(|_| !anew) {
        Some(entry) => Some(entry),
        None => store.get(&key).await?,
    };
    let entry = entry.ok_or_else(|| namespaces.not_found(name))?;
    if object::is_deleting(&namespaces.decode(&entry)?) {
        let subject = call.resource.subject(&call.name);
        return Err(ApiError::Terminating { subject, namespace: name.to_owned() });
    }
    let home = Compare { key: entry.key, mod_revision: entry.mod_revision };
    Ok((name != DEFAULT).then_some(home))
}

/// Whether this server or another one has done that, as far as is known here.
pub(crate) fn is_seeded(server: &ApiServer) -> bool {
    server.store().get_local(&server.namespaces().key(None, DEFAULT)).is_some()
}

/// `default` and the definitions are there, and as this server has them. Looked after once.
pub(crate) async fn seed(server: &ApiServer) -> Result<(), ApiError> {
    server
        .seeded()
        .get_or_try_init(async || {
            let namespaces = server.namespaces();
            let mut default = json!({
                "apiVersion": "v1", "kind": builtin::NAMESPACE, "metadata": {"name": DEFAULT},
            });
            builtin::stamp_new(namespaces, &mut default);
            put(server, namespaces, default).await?;
            let definitions = server.resources().iter().find(|r| r.access == Access::ReadOnly);
            for definition in server.definitions() {
                if let Some(resource) = definitions {
                    put(server, resource, definition.clone()).await?;
                }
            }
            Ok(())
        })
        .await
        .copied()
}

/// Creates an object, or corrects its spec.
async fn put(server: &ApiServer, resource: &Resource, mut wanted: Value) -> Result<(), ApiError> {
    let key = resource.key(None, object::name(&wanted));
    let store = server.store();
    let entry = store.get(&key).await?;
    if let Some(entry) = &entry {
        let current = resource.decode(entry)?;
        // Namespaces are their users' from then on.
        if resource.access == Access::Full || current.get("spec") == wanted.get("spec") {
            return Ok(());
        }
        let metadata = current.get("metadata").cloned();
        wanted["metadata"] = metadata.unwrap_or_else(|| wanted["metadata"].clone());
    } else {
        let uid = json!(uuid::Uuid::new_v4().to_string());
        object::set_metadata(&mut wanted, "uid", Some(uid));
        let now = json!(clock::format(clock::now()));
        object::set_metadata(&mut wanted, "creationTimestamp", Some(now));
        object::set_metadata(&mut wanted, "generation", Some(json!(1)));
    }
    builtin::prepare(resource, &mut wanted);
    let revision = entry.map_or(0, |entry| entry.mod_revision);
    match store.txn(Txn::replace(key, revision, resource.encode(&wanted)?)).await? {
        // Another server was faster.
        TxnOutcome::Committed { .. } | TxnOutcome::Conflict { .. } => Ok(()),
    }
}
