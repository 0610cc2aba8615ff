//! Instance controller: looks after the shards of every InferenceInstance.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use exo_crds::{InferenceInstance, Model, Node, Shard, event::Occurrence};
use exo_plan::{Action as Do, Decision, Observed, create_refused, reconcile};
use exo_recorder::Recorder;
use futures::StreamExt as _;
use k8s_openapi::jiff::Timestamp;
use kube::{
    Api, Client, ResourceExt as _,
    api::PostParams,
    runtime::{
        Controller,
        controller::{Action, Config},
        watcher,
    },
};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::{
    read, trigger,
    write::{WriteError, carry_out},
};

/// Looks at everything this often even if no watch said anything.
const RESYNC: Duration = Duration::from_secs(60);
/// After a failed call.
const RETRY: Duration = Duration::from_secs(1);
/// After somebody else wrote first.
const RETRY_CONFLICT: Duration = Duration::from_millis(50);

struct Context {
    client: Client,
    leadership: watch::Receiver<bool>,
    events: Recorder,
}

impl Context {
    fn leads(&self) -> bool {
        *self.leadership.borrow()
    }
}

pub(crate) async fn run(
    client: Client,
    leadership: watch::Receiver<bool>,
    events: Recorder,
    shutdown: CancellationToken,
) {
    let nodes = trigger::changes(Api::<Node>::all(client.clone()), |node| {
        let status = node.status.clone().unwrap_or_default();
        // Neither heartbeats nor memory, which never stand still.
        let ready = status.conditions.into_iter().find(|c| c.type_ == "Ready");
        (
            node.spec.clone(),
            node.metadata.labels.clone(),
            ready.map(|ready| (ready.status, ready.message)),
            status.transports,
            status.addresses,
            status.memory.is_some(),
        )
    });
    let models =
        trigger::changes(Api::<Model>::all(client.clone()), |model: &Model| model.spec.clone());
    let context =
        Arc::new(Context { client: client.clone(), leadership: leadership.clone(), events });
    // One decision at a time: each must see the memory that the one before has promised away.
    Controller::new(Api::<InferenceInstance>::all(client.clone()), watcher::Config::default())
        .owns(Api::<Shard>::all(client), watcher::Config::default())
        .reconcile_all_on(nodes)
        .reconcile_all_on(models)
        .reconcile_all_on(trigger::elections(leadership))
        .with_config(Config::default().concurrency(1))
        .graceful_shutdown_on(shutdown.cancelled_owned())
        .run(look, |instance, error, _context| after_error(&instance, error), context)
        .for_each(|result| async move {
            if let Err(error) = result {
                tracing::debug!(%error, "instance controller");
            }
        })
        .await;
}

async fn look(
    instance: Arc<InferenceInstance>,
    context: Arc<Context>,
) -> Result<Action, WriteError> {
    if !context.leads() {
        return Ok(Action::await_change());
    }
    let namespace = instance.namespace().unwrap_or_default();
    let name = instance.name_any();
    let api: Api<InferenceInstance> = Api::namespaced(context.client.clone(), &namespace);
    let Some(instance) =
        api.get_opt(&name).await.map_err(|e| WriteError::new(format!("reading {name}"), e))?
    else {
        return Ok(Action::await_change());
    };
    let decision = decide(&context.client, &instance).await?;
    let adopts = decision.actions.iter().any(|action| matches!(action, Do::Adopt { .. }));
    if adopts && !may_adopt(&api, &instance).await? {
        return Ok(Action::requeue(RETRY_CONFLICT));
    }
    if act(&context, &api, instance, &decision).await? == Acted::Refused {
        // What was just written calls for another decision.
        return Ok(Action::requeue(RETRY_CONFLICT));
    }
    let after = decision.requeue_after.unwrap_or(RESYNC).min(RESYNC);
    Ok(Action::requeue(after))
}

async fn decide(client: &Client, instance: &InferenceInstance) -> Result<Decision, WriteError> {
    let (nodes, models, shards) = (
        Api::<Node>::all(client.clone()),
        Api::<Model>::all(client.clone()),
        Api::<Shard>::all(client.clone()),
    );
    let (nodes, models, shards) =
        tokio::try_join!(read::all(&nodes), read::all(&models), read::all(&shards))
            .map_err(|e| WriteError::new("reading nodes, models and shards", e))?;
    let models: BTreeMap<String, Model> =
        models.into_iter().map(|model| (model.name_any(), model)).collect();
    Ok(reconcile(&Observed {
        instance,
        models: &models,
        nodes: &nodes,
        shards: &shards,
        now: Timestamp::now(),
    }))
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Acted {
    Done,
    /// A shard was refused, which the status says now.
    Refused,
}

/// Whether the instance is still there to own shards. One that is deleted so that its shards run on
/// lets go of them only after its deletion is written: whoever saw shards without an owner and asks
/// this afterwards doesn't make them its own once more, to go with it.
async fn may_adopt(
    api: &Api<InferenceInstance>,
    instance: &InferenceInstance,
) -> Result<bool, WriteError> {
    let name = instance.name_any();
    let now = api.get_opt(&name).await;
    let now = now.map_err(|e| WriteError::new(format!("reading {name}"), e))?;
    Ok(now.is_some_and(|now| {
        now.metadata.uid == instance.metadata.uid && now.metadata.deletion_timestamp.is_none()
    }))
}

/// Writes the status first, on condition that the instance is still what was looked at: so an epoch
/// number is taken by one leader only.
async fn act(
    context: &Context,
    api: &Api<InferenceInstance>,
    mut instance: InferenceInstance,
    decision: &Decision,
) -> Result<Acted, WriteError> {
    let name = instance.name_any();
    let namespace = instance.namespace().unwrap_or_default();
    if instance.status.as_ref() != Some(&decision.status) && context.leads() {
        let phase = |status: &exo_crds::InferenceInstanceStatus| status.phase;
        let before = instance.status.as_ref().and_then(phase);
        if before != decision.status.phase {
            let phase = decision.status.phase.map(tracing::field::debug);
            tracing::info!(instance = name, phase, "instance");
        }
        instance.status = Some(decision.status.clone());
        instance = replace_status(api, &instance).await?;
    }
    if context.leads() {
        for occurrence in &decision.events {
            context.events.record(&instance, occurrence.clone());
        }
    }
    let mut status = decision.status.clone();
    let mut refused = BTreeSet::new();
    let mut failed = None;
    for action in &decision.actions {
        if !context.leads() {
            return Ok(Acted::Done);
        }
        let created = match action {
            Do::Create(shard) => Some(shard),
            Do::SetRendezvous { .. }
            | Do::Adopt { .. }
            | Do::Delete { .. }
            | Do::Release { .. } => None,
        };
        if created.is_some_and(|shard| refused.contains(&shard.spec.replica)) {
            // Its epoch is over before it began.
            continue;
        }
        let Err(error) = carry_out(&context.client, &namespace, action).await else {
            continue;
        };
        match (created, error.refusal()) {
            (Some(shard), Some(why)) => {
                tracing::warn!(instance = name, %error, why, "the server refused a shard");
                create_refused(&mut status, shard, why, Timestamp::now());
                let note = format!("the API server refused a shard: {why}");
                context.events.record(&instance, Occurrence::warning("ShardRefused", note));
                refused.insert(shard.spec.replica);
            }
            _ => {
                failed = Some(error);
                break;
            }
        }
    }
    if !refused.is_empty() && context.leads() {
        instance.status = Some(status);
        replace_status(api, &instance).await?;
    }
    match failed {
        Some(error) => Err(error),
        None if refused.is_empty() => Ok(Acted::Done),
        None => Ok(Acted::Refused),
    }
}

async fn replace_status(
    api: &Api<InferenceInstance>,
    instance: &InferenceInstance,
) -> Result<InferenceInstance, WriteError> {
    let name = instance.name_any();
    api.replace_status(&name, &PostParams::default(), instance)
        .await
        .map_err(|e| WriteError::new(format!("writing the status of {name}"), e))
}

fn after_error(instance: &InferenceInstance, error: &WriteError) -> Action {
    if error.is_conflict() {
        return Action::requeue(RETRY_CONFLICT);
    }
    let cause = exo_recorder::problem(&*error.source);
    tracing::warn!(instance = instance.name_any(), %error, cause, "will try again");
    Action::requeue(RETRY)
}
