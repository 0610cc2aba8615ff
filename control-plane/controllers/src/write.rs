//! Writes, one API call each.

use exo_crds::Shard;
use exo_plan::Action;
use kube::{
    Api, Client,
    api::{DeleteParams, Patch, PatchParams, PostParams},
};
use serde_json::json;

/// A call to the API that failed.
#[derive(Debug, thiserror::Error)]
#[error("{what}")]
pub(crate) struct WriteError {
    pub(crate) what: String,
    #[source]
    pub(crate) source: Box<kube::Error>,
}

impl WriteError {
    pub(crate) fn new(what: impl Into<String>, source: kube::Error) -> Self {
        Self { what: what.into(), source: Box::new(source) }
    }

    /// Somebody else wrote first: looking again is all that is needed.
    pub(crate) fn is_conflict(&self) -> bool {
        status_code(&self.source) == Some(409)
    }

    /// The server's words, when it was asked for something that it will not do: the same request
    /// would be refused again. Being busy is no such answer.
    pub(crate) fn refusal(&self) -> Option<&str> {
        match self.source.as_ref() {
            kube::Error::Api(status)
                if (400..500).contains(&status.code) && ![408, 409, 429].contains(&status.code) =>
            {
                Some(&status.message)
            }
            _ => None,
        }
    }
}

pub(crate) fn status_code(error: &kube::Error) -> Option<u16> {
    match error {
        kube::Error::Api(status) => Some(status.code),
        _ => None,
    }
}

/// Carries out one action; what is already so counts as done. Only a shard that is still what was
/// decided about is released.
pub(crate) async fn carry_out(
    client: &Client,
    namespace: &str,
    action: &Action,
) -> Result<(), WriteError> {
    match action {
        Action::Create(shard) => {
            let api: Api<Shard> = Api::namespaced(client.clone(), namespace);
            let name = shard.metadata.name.as_deref().unwrap_or_default();
            tracing::info!(shard = name, node = shard.spec.node, "creating shard");
            api.create(&PostParams::default(), shard)
                .await
                .map_err(|e| WriteError::new(format!("creating shard {name}"), e))?;
        }
        Action::SetRendezvous { name, rendezvous } => {
            let api: Api<Shard> = Api::namespaced(client.clone(), namespace);
            tracing::info!(shard = name, "all ranks listen: telling where to meet");
            let patch = json!({"spec": {"rendezvous": rendezvous}});
            api.patch(name, &PatchParams::default(), &Patch::Merge(patch))
                .await
                .map_err(|e| WriteError::new(format!("setting the rendezvous of {name}"), e))?;
        }
        Action::Adopt { name, owners, resource_version } => {
            let api: Api<Shard> = Api::namespaced(client.clone(), namespace);
            tracing::info!(shard = name, "adopting shard");
            let patch = json!({"metadata": {
                "ownerReferences": owners,
                "resourceVersion": resource_version,
            }});
            api.patch(name, &PatchParams::default(), &Patch::Merge(patch))
                .await
                .map_err(|e| WriteError::new(format!("adopting shard {name}"), e))?;
        }
        Action::Delete { namespace, name } => {
            let api: Api<Shard> = Api::namespaced(client.clone(), namespace);
            tracing::info!(shard = name, "deleting shard");
            match api.delete(name, &DeleteParams::background()).await {
                Err(error) if status_code(&error) != Some(404) => {
                    return Err(WriteError::new(format!("deleting shard {name}"), error));
                }
                Ok(_) | Err(_) => {}
            }
        }
        Action::Release { namespace, name, finalizers, resource_version } => {
            let api: Api<Shard> = Api::namespaced(client.clone(), namespace);
            tracing::info!(shard = name, "releasing shard of a lost node");
            let patch = json!({"metadata": {
                "finalizers": finalizers,
                "resourceVersion": resource_version,
            }});
            match api.patch(name, &PatchParams::default(), &Patch::Merge(patch)).await {
                Err(error) if status_code(&error) != Some(404) => {
                    return Err(WriteError::new(format!("releasing shard {name}"), error));
                }
                Ok(_) | Err(_) => {}
            }
        }
    }
    Ok(())
}
