//! Namespaces that are to go: their content is deleted, and while some of it stays they say what
//! and why.

use std::{collections::BTreeMap, sync::Arc};

use exo_store::ListQuery;
use serde_json::{Value, json};

use super::{edit, graph::Graph};
use crate::{
    clock,
    error::{ApiError, qualified},
    object,
    resource::Resource,
    server::ApiServer,
    verbs::{self, Preconditions, Propagation},
};

/// Deletes the content of namespaces that are to go; those that are empty go.
pub(super) async fn empty(server: &ApiServer, graph: &Graph) -> Result<(), ApiError> {
    for key in &graph.namespaces {
        let Some(node) = graph.nodes.get(key) else {
            continue;
        };
        let remains = delete_content(server, key).await?;
        let now = clock::format(clock::now());
        edit(server, server.namespaces(), key, &node.uid, |namespace| {
            if remains.objects.is_empty() {
                namespace["spec"]["finalizers"] = Value::Array(Vec::new());
            }
            remains.tell(namespace, &now);
        })
        .await?;
    }
    Ok(())
}

/// What stays of a namespace's content, and by which finalizers.
#[derive(Debug, Default)]
struct Remains {
    /// Number of objects by resource.
    objects: BTreeMap<String, usize>,
    /// Number of objects by finalizer.
    finalizers: BTreeMap<String, usize>,
}

async fn delete_content(server: &ApiServer, namespace: &Arc<str>) -> Result<Remains, ApiError> {
    let name = namespace.rsplit('/').next().unwrap_or_default();
    let mut remains = Remains::default();
    for resource in server.resources().iter().filter(|r| r.namespaced) {
        let query = ListQuery { prefix: resource.prefix(Some(name)), ..ListQuery::default() };
        let store = server.store();
        for entries in store.list(&query).await?.entries.chunks(verbs::AT_ONCE) {
            let mut doomed = Vec::new();
            for entry in entries {
                let object = resource.decode(entry)?;
                if object::is_deleting(&object) {
                    // It has been told before, and waits for its finalizers.
                    remains.add(resource, &object);
                } else {
                    doomed.push((entry.key.to_string(), Preconditions::default()));
                }
            }
            let (doomed, policy) = (doomed.into_iter(), Propagation::Background);
            for removed in verbs::remove_together(store, resource, doomed, policy).await {
                if let Some(verbs::Removed::Marked(object)) = removed? {
                    remains.add(resource, &object);
                }
            }
        }
    }
    Ok(remains)
}

impl Remains {
    fn add(&mut self, resource: &Resource, object: &Value) {
        let resource = qualified(&resource.plural, &resource.group);
        *self.objects.entry(resource).or_default() += 1;
        for finalizer in object::finalizers(object) {
            *self.finalizers.entry(finalizer.to_owned()).or_default() += 1;
        }
    }

    /// Puts it into the namespace's conditions. One that went at once needs none.
    fn tell(&self, namespace: &mut Value, now: &str) {
        let conditions = namespace.pointer("/status/conditions").and_then(Value::as_array);
        let mut conditions = conditions.cloned().unwrap_or_default();
        if self.objects.is_empty() && conditions.is_empty() {
            return;
        }
        for (kind, counts, reasons, intro, none) in [
            (
                "NamespaceContentRemaining",
                &self.objects,
                ["ContentRemoved", "SomeResourcesRemain"],
                "Still there: ",
                "Nothing of the content is left",
            ),
            (
                "NamespaceFinalizersRemaining",
                &self.finalizers,
                ["ContentHasNoFinalizers", "SomeFinalizersRemain"],
                "Objects stay until who set these finalizers removes them: ",
                "No finalizer keeps any of the content",
            ),
        ] {
            let remains = !counts.is_empty();
            let counts: Vec<String> =
                counts.iter().map(|(what, count)| format!("{what} ({count})")).collect();
            let message =
                if remains { format!("{intro}{}", counts.join(", ")) } else { none.to_owned() };
            let status = if remains { "True" } else { "False" };
            let mut condition = json!({
                "type": kind, "status": status, "reason": reasons[usize::from(remains)],
                "message": message, "lastTransitionTime": now,
            });
            match conditions.iter_mut().find(|other| other["type"] == kind) {
                Some(other) => {
                    if other["status"] == status {
                        condition["lastTransitionTime"] = other["lastTransitionTime"].clone();
                    }
                    *other = condition;
                }
                None => conditions.push(condition),
            }
        }
        namespace["status"]["conditions"] = Value::Array(conditions);
    }
}
