//! Writes, one API call each.

use exo_crds::{SHARD_FINALIZER, Shard};
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
}

pub(crate) fn status_code(error: &kube::Error) -> Option<u16> {
    match error {
        kube::Error::Api(status) => Some(status.code),
        _ => None,
    }
}

/// Carries out one action; what is already so counts as done.
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
        Action::Release { namespace, name } => release(client, namespace, name).await?,
    }
    Ok(())
}

/// Takes the agent's finalizer off, on condition that the shard has not changed meanwhile.
async fn release(client: &Client, namespace: &str, name: &str) -> Result<(), WriteError> {
    let api: Api<Shard> = Api::namespaced(client.clone(), namespace);
    let failed = |error| WriteError::new(format!("releasing shard {name}"), error);
    let Some(shard) = api.get_opt(name).await.map_err(failed)? else {
        return Ok(());
    };
    let left: Vec<String> = shard
        .metadata
        .finalizers
        .unwrap_or_default()
        .into_iter()
        .filter(|finalizer| finalizer != SHARD_FINALIZER)
        .collect();
    tracing::info!(shard = name, node = shard.spec.node, "releasing shard of a lost node");
    let patch = json!({"metadata": {
        "finalizers": left,
        "resourceVersion": shard.metadata.resource_version,
    }});
    match api.patch(name, &PatchParams::default(), &Patch::Merge(patch)).await {
        Err(error) if status_code(&error) != Some(404) => Err(failed(error)),
        Ok(_) | Err(_) => Ok(()),
    }
}
