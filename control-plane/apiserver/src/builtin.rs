//! Kubernetes' own types that are served beside the defined ones, and what is special about each:
//! `Namespace`, `Secret`, `Event` (two groups, one storage), `Lease`, `CustomResourceDefinition`.

mod event;
mod secret;
mod types;

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use serde_json::{Value, json};

use crate::{
    error::Cause,
    object,
    resource::{Access, DefinitionError, Resource},
};

pub(crate) const NAMESPACE: &str = "Namespace";
pub(crate) const EVENT: &str = "Event";
const SECRET: &str = "Secret";
/// Group under which all events are stored; it can't be that of a definition.
const CORE: &str = "core";
const EVENTS_GROUP: &str = "events.k8s.io";
/// All of them, in the order of discovery.
pub(crate) fn resources() -> Result<Vec<Resource>, DefinitionError> {
    let mut namespace = define("", NAMESPACE, "namespaces", "Cluster", &types::namespace())?;
    namespace.short_names = vec!["ns".to_owned()];
    let secret = define("", SECRET, "secrets", "Namespaced", &types::secret())?;
    let mut event = define("", EVENT, "events", "Namespaced", &types::core_event())?;
    let mut own_event = define(EVENTS_GROUP, EVENT, "events", "Namespaced", &types::own_event())?;
    for event in [&mut event, &mut own_event] {
        event.short_names = vec!["ev".to_owned()];
        event.storage_group = CORE.to_owned();
        let seen = event.columns.first_mut();
        seen.expect("the definition above has columns").fallbacks =
            [".series.lastObservedTime", ".eventTime", ".metadata.creationTimestamp"]
                .iter()
                .map(|path| path.parse().expect("the literal is a path"))
                .collect();
    }
    let lease = define("coordination.k8s.io", "Lease", "leases", "Namespaced", &types::lease())?;
    let mut definition = define(
        "apiextensions.k8s.io",
        "CustomResourceDefinition",
        "customresourcedefinitions",
        "Cluster",
        &types::definition(),
    )?;
    definition.short_names = vec!["crd".to_owned(), "crds".to_owned()];
    definition.access = Access::ReadOnly;
    Ok(vec![namespace, secret, event, own_event, lease, definition])
}

fn define(
    group: &str,
    kind: &str,
    plural: &str,
    scope: &str,
    version: &Value,
) -> Result<Resource, DefinitionError> {
    let mut version = version.clone();
    version["name"] = json!("v1");
    version["served"] = json!(true);
    version["storage"] = json!(true);
    let definition = json!({
        "metadata": {},
        "spec": {
            "group": group,
            "scope": scope,
            "names": {"kind": kind, "plural": plural},
            "versions": [version],
        },
    });
    let definition: CustomResourceDefinition =
        serde_json::from_value(definition).expect("the literals here are definitions");
    let mut resource = Resource::from_crd(&definition)?;
    resource.builtin = true;
    if group.is_empty() {
        resource.storage_group = CORE.to_owned();
    }
    Ok(resource)
}

/// From the stored form to the resource's own.
pub(crate) fn from_stored(resource: &Resource, object: &mut Value) {
    if is_own_event(resource) {
        rename(object, |(core, own)| (core, own));
        object["apiVersion"] = json!(resource.api_version());
    }
}

/// The other way.
pub(crate) fn to_stored(resource: &Resource, object: &mut Value) {
    if is_own_event(resource) {
        rename(object, |(core, own)| (own, core));
        object["apiVersion"] = json!("v1");
    }
}

fn is_own_event(resource: &Resource) -> bool {
    resource.builtin && resource.group == EVENTS_GROUP
}

fn rename(
    object: &mut Value,
    order: impl Fn((&'static str, &'static str)) -> (&'static str, &'static str),
) {
    let Some(fields) = object.as_object_mut() else {
        return;
    };
    for pair in types::EVENT_FIELDS {
        let (from, to) = order(pair);
        if let Some(value) = fields.remove(from) {
            fields.insert(to.to_owned(), value);
        }
    }
}

/// Whether an update need not say which version of the object it replaces: as in Kubernetes, of its
/// own types, where nothing depends on one holder.
pub(crate) fn updates_blindly(resource: &Resource) -> bool {
    resource.builtin && matches!(resource.kind.as_str(), NAMESPACE | SECRET | EVENT)
}

/// What the server writes into a new object of these kinds.
pub(crate) fn stamp_new(resource: &Resource, object: &mut Value) {
    if resource.builtin && resource.kind == NAMESPACE {
        // Its content is deleted before it goes.
        object["spec"] = json!({"finalizers": ["kubernetes"]});
        object["status"] = json!({"phase": "Active"});
    }
}

/// What the server makes of objects of these kinds before they are validated.
pub(crate) fn prepare(resource: &Resource, object: &mut Value) {
    if !resource.builtin {
        return;
    }
    match resource.kind.as_str() {
        NAMESPACE => {
            let name = json!(object::name(object));
            let metadata = object::metadata_mut(object);
            let labels = metadata.entry("labels").or_insert_with(|| json!({}));
            if let Some(labels) = labels.as_object_mut() {
                labels.insert("kubernetes.io/metadata.name".to_owned(), name);
            }
        }
        SECRET => secret::prepare(object),
        _ => {}
    }
}

/// What is wrong with an object of these kinds that their schemas don't say. What `current` has
/// wrong too, from before a check, is let pass.
pub(crate) fn faults(resource: &Resource, object: &Value, current: Option<&Value>) -> Vec<Cause> {
    if !resource.builtin {
        return Vec::new();
    }
    match (resource.kind.as_str(), current) {
        (SECRET, None) => secret::faults(object),
        (SECRET, Some(current)) => {
            let known = secret::faults(current);
            secret::faults(object).into_iter().filter(|cause| !known.contains(cause)).collect()
        }
        (EVENT, current) => event::faults(resource, object, current),
        _ => Vec::new(),
    }
}

/// What an update must not change of these kinds.
pub(crate) fn fixed(resource: &Resource, current: &Value, wanted: &Value) -> Vec<Cause> {
    if !resource.builtin {
        return Vec::new();
    }
    match resource.kind.as_str() {
        SECRET => secret::fixed(current, wanted),
        EVENT => event::fixed(resource, current, wanted),
        _ => Vec::new(),
    }
}
