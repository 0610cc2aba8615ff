//! Registers the Node and keeps its status true.

use std::{path::PathBuf, time::Duration};

use exo_crds::{
    MemoryStatus, Node, NodeAddress, NodeSpec, NodeStatus, NodeVersions, Quantity, TransportKind,
    condition, event::Occurrence, set_condition,
};
use exo_recorder::Recorder;
use k8s_openapi::{
    apimachinery::pkg::apis::meta::v1::{MicroTime, Time},
    jiff::Timestamp,
};
use kube::{
    Api, Client,
    api::{Patch, PatchParams, PostParams},
};
use serde_json::json;
use tokio::{
    sync::watch,
    time::{MissedTickBehavior, interval, timeout},
};
use tokio_util::sync::CancellationToken;

use crate::{
    AgentConfig,
    metrics::Metrics,
    probe::{self, Facts},
};

/// Five of these fit into the limit after which the control plane gives a node up.
const HEARTBEAT: Duration = Duration::from_secs(2);
/// A call that takes longer would delay the next heartbeat too much.
const CALL_LIMIT: Duration = Duration::from_secs(4);
/// The first heartbeat waits this long for the first look at the machine and at the shards, so that
/// it says what is so; then it goes out without.
const FIRST_LIMIT: Duration = Duration::from_secs(3);
/// Saying good-bye is a courtesy: the process wants to end.
const FAREWELL_LIMIT: Duration = Duration::from_secs(1);

/// What heartbeats and the supervisor tell each other.
#[derive(Debug)]
pub(crate) struct Signals {
    /// Counts how often heartbeats succeeded again after they had failed.
    pub(crate) recovered: watch::Sender<u64>,
    /// Set once all shards of this node have been listed.
    pub(crate) listed: watch::Receiver<bool>,
    pub(crate) events: Recorder,
}

/// Sends heartbeats until `shutdown`, then says that the agent has stopped.
pub(crate) async fn run(
    client: Client,
    config: AgentConfig,
    disk: PathBuf,
    metrics: Metrics,
    mut signals: Signals,
    shutdown: CancellationToken,
) {
    let facts = tokio::task::spawn_blocking(probe::facts).await.unwrap_or_default();
    let (known, held) = (facts.clone(), metrics.clone());
    let mut memory = probe::watch("memory", move || probe::memory(&known, held.held_bytes()));
    let disk_free = probe::watch("disk", move || probe::disk_free(&disk));
    let first_look = async {
        let _ = memory.wait_for(Option::is_some).await;
        let _ = signals.listed.wait_for(|listed| *listed).await;
    };
    // Cut off by the limit, or by the end of the agent: the loop sees both.
    let _ = shutdown.run_until_cancelled(timeout(FIRST_LIMIT, first_look)).await;
    let mut reporter = Reporter {
        api: Api::all(client),
        host_name: hostname::get().ok().and_then(|name| name.into_string().ok()),
        config,
        facts,
        memory,
        disk_free,
        listed: signals.listed,
        events: signals.events,
        metrics,
        registered: false,
        node: None,
        last: NodeStatus::default(),
    };
    let mut beats = interval(HEARTBEAT);
    beats.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut failing = false;
    loop {
        tokio::select! {
            // Cancel-safe: a tick that is lost is followed by the farewell.
            () = shutdown.cancelled() => break,
            _ = beats.tick() => {}
        }
        let result = tokio::select! {
            // Cancel-safe: a heartbeat that may or may not arrive is overwritten by the farewell.
            () = shutdown.cancelled() => break,
            result = timeout(CALL_LIMIT, reporter.beat()) => result,
        };
        let error = match result {
            Ok(Ok(())) => {
                if failing {
                    tracing::info!("the control plane answers again");
                    reporter.tell_reconnected();
                    signals.recovered.send_modify(|count| *count += 1);
                }
                failing = false;
                continue;
            }
            Ok(Err(error)) => exo_recorder::problem(&error),
            Err(_) => format!("no answer within {} s", CALL_LIMIT.as_secs()),
        };
        if !failing {
            tracing::warn!(error, "heartbeat failed; will go on trying");
        }
        failing = true;
    }
    if timeout(FAREWELL_LIMIT, reporter.farewell()).await.is_err() {
        tracing::debug!("the control plane did not hear that the agent stops");
    }
}

/// What the agent says of itself.
#[derive(Clone, Copy, Debug)]
enum Agent {
    /// It does not know its shards.
    Starting,
    Ready,
    Stopped,
}

struct Reporter {
    api: Api<Node>,
    host_name: Option<String>,
    config: AgentConfig,
    facts: Facts,
    /// As last probed.
    memory: watch::Receiver<Option<MemoryStatus>>,
    disk_free: watch::Receiver<Option<u64>>,
    listed: watch::Receiver<bool>,
    events: Recorder,
    metrics: Metrics,
    registered: bool,
    /// As it was registered: what events refer to.
    node: Option<Node>,
    /// As the API returned it last: conditions of others stay in it.
    last: NodeStatus,
}

impl Reporter {
    async fn beat(&mut self) -> Result<(), kube::Error> {
        if !self.registered {
            self.register().await?;
        }
        let (memory, disk_free) = (self.memory.borrow().clone(), *self.disk_free.borrow());
        if let Some(memory) = &memory {
            self.metrics.node_memory("total", memory.total_bytes);
            self.metrics.node_memory("usable", memory.usable_bytes);
            self.metrics.node_memory("free", memory.free_bytes);
        }
        let agent = if *self.listed.borrow() { Agent::Ready } else { Agent::Starting };
        let mut status = self.status(Timestamp::now(), agent);
        status.memory = memory;
        status.disk_free = disk_free.map(|bytes| Quantity::from_bytes(bytes).rounded());
        self.write(status).await
    }

    fn tell_reconnected(&self) {
        if let Some(node) = &self.node {
            let note = "heartbeats arrive again after they had failed";
            self.events.record(node, Occurrence::warning("Reconnected", note));
        }
    }

    async fn farewell(&mut self) -> Result<(), kube::Error> {
        if !self.registered {
            return Ok(());
        }
        let status = self.status(Timestamp::now(), Agent::Stopped);
        self.write(status).await
    }

    /// Takes over a Node of this name, or makes it.
    async fn register(&mut self) -> Result<(), kube::Error> {
        let name = &self.config.node_name;
        let node = match self.api.get_opt(name).await? {
            Some(node) => node,
            None => {
                let mut node = Node::new(name, NodeSpec::default());
                let label = |key: &str, value: &str| (format!("exo.dev/{key}"), value.to_owned());
                node.metadata.labels = Some(
                    [label("os", std::env::consts::OS), label("arch", std::env::consts::ARCH)]
                        .into(),
                );
                match self.api.create(&PostParams::default(), &node).await {
                    // Somebody wrote one a moment ago.
                    Err(kube::Error::Api(error)) if error.code == 409 => self.api.get(name).await?,
                    created => created?,
                }
            }
        };
        tracing::info!(node = name, "registered");
        let note = concat!("the agent of exo ", env!("CARGO_PKG_VERSION"), " is running");
        self.events.record(&node, Occurrence::normal("AgentStarted", note));
        self.last = node.status.clone().unwrap_or_default();
        self.node = Some(node);
        self.registered = true;
        Ok(())
    }

    fn status(&self, now: Timestamp, agent: Agent) -> NodeStatus {
        let mut conditions = self.last.conditions.clone();
        let (ready, reason, message) = match agent {
            Agent::Starting => (false, "AgentStarting", "the agent can't read its shards yet"),
            Agent::Ready => (true, "AgentReady", "the agent is running"),
            Agent::Stopped => (false, "AgentStopped", "the agent was stopped"),
        };
        // Conditions keep whole seconds.
        let second = Time(Timestamp::from_second(now.as_second()).unwrap_or(now));
        let new = condition("Ready", ready, reason, message, &second);
        set_condition(&mut conditions, new);
        let address = |kind: &str, address: String| NodeAddress { kind: kind.to_owned(), address };
        let mut addresses = vec![address("InternalIP", self.config.address.to_string())];
        addresses.extend(self.host_name.clone().map(|name| address("Hostname", name)));
        NodeStatus {
            addresses,
            chip: self.facts.chip.clone(),
            os: Some(std::env::consts::OS.to_owned()),
            arch: Some(std::env::consts::ARCH.to_owned()),
            memory: None,
            compute: self.facts.compute,
            // MLX's TCP ring is in every build.
            transports: vec![TransportKind::Ring],
            disk_free: None,
            versions: NodeVersions {
                exo: Some(env!("CARGO_PKG_VERSION").to_owned()),
                os: self.facts.os_version.clone(),
            },
            last_heartbeat_time: Some(MicroTime(now)),
            conditions,
        }
    }

    /// Only this agent and, when it is silent, the control plane write here; the next heartbeat
    /// puts right whatever got mixed up.
    async fn write(&mut self, status: NodeStatus) -> Result<(), kube::Error> {
        let patch = Patch::Merge(json!({"status": status}));
        let params = PatchParams::default();
        match self.api.patch_status(&self.config.node_name, &params, &patch).await {
            Ok(node) => {
                self.last = node.status.unwrap_or_default();
                Ok(())
            }
            Err(error) => {
                // Deleted while the agent runs: the next heartbeat makes it again.
                if matches!(&error, kube::Error::Api(status) if status.code == 404) {
                    self.registered = false;
                }
                Err(error)
            }
        }
    }
}
