//! What a runner is started with: pure, from a Shard to files and environment.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
};

use exo_crds::{
    Rendezvous, Shard, ShardFailure, TransportKind,
    runner::{RunnerConfig, RunnerTls, STEP_LIMIT_S},
};

use super::failure;

/// Variables that tell MLX about a group. A runner gets those of its own group and no others,
/// whatever the agent's environment says.
pub(crate) const GROUP_VARIABLES: [&str; 11] = [
    "MLX_RANK",
    "MLX_WORLD_SIZE",
    "MLX_HOSTFILE",
    "MLX_RING_VERBOSE",
    "MLX_IBV_DEVICES",
    "MLX_IBV_COORDINATOR",
    "MLX_JACCL_COORDINATOR",
    "MLX_JACCL_RING",
    "MLX_METAL_FAST_SYNCH",
    "NCCL_HOST_IP",
    "NCCL_PORT",
];

/// What a user may not set for a runner: the loader would put foreign code into the process that
/// holds the node's private key. `LD_LIBRARY_PATH` stays: CUDA builds of MLX are found through it.
const LOADER_VARIABLES: [&str; 2] = ["LD_PRELOAD", "LD_AUDIT"];
const LOADER_PREFIX: &str = "DYLD_";

/// Everything needed to start one runner.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Launch {
    /// The shard's own folder.
    pub(crate) dir: PathBuf,
    pub(crate) config: RunnerConfig,
    /// Contents of MLX's host file; absent for a single rank.
    pub(crate) hosts: Option<String>,
    /// In order; a later value replaces an earlier one of the same name.
    pub(crate) environment: Vec<(String, String)>,
}

impl Launch {
    pub(crate) fn config_path(&self) -> PathBuf {
        self.dir.join("config.json")
    }

    pub(crate) fn hosts_path(&self) -> PathBuf {
        self.dir.join("hosts.json")
    }
}

/// The folder of a shard.
pub(crate) fn shard_dir(shards_dir: &Path, shard: &Shard) -> PathBuf {
    let namespace = shard.metadata.namespace.as_deref().unwrap_or_default();
    let name = shard.metadata.name.as_deref().unwrap_or_default();
    shards_dir.join(format!("{namespace}_{name}"))
}

/// The launch of a shard whose ranks shall meet at `meeting`. `serve` is the address set aside for
/// requests.
pub(crate) fn launch(
    shards_dir: &Path,
    tls: &RunnerTls,
    shard: &Shard,
    model_dir: PathBuf,
    meeting: &Rendezvous,
    serve: &str,
) -> Result<Launch, ShardFailure> {
    let spec = &shard.spec;
    let address = |text: &str| -> Result<SocketAddr, ShardFailure> {
        text.parse().map_err(|_| {
            failure(
                "BadAddress",
                format!("`{text}` is not an address such as 10.0.0.1:7000"),
                false,
            )
        })
    };
    for host in &meeting.hosts {
        address(host)?;
    }
    let dir = shard_dir(shards_dir, shard);
    let hosts = if spec.world_size == 1 {
        None
    } else {
        match spec.transport {
            TransportKind::Ring => {
                let lines: Vec<[&String; 1]> = meeting.hosts.iter().map(|host| [host]).collect();
                Some(serde_json::json!(lines).to_string())
            }
            TransportKind::Jaccl | TransportKind::Nccl => {
                let message = format!("this agent can't set up {:?} yet", spec.transport);
                return Err(failure("TransportUnsupported", message, true));
            }
        }
    };
    for (name, value) in &spec.environment {
        if let Some(objection) = objection(name, value) {
            let message = format!("environment variable `{}` {objection}", name.escape_debug());
            return Err(failure("BadEnvironment", message, true));
        }
    }
    let mut environment: Vec<(String, String)> =
        spec.environment.iter().map(|(name, value)| (name.clone(), value.clone())).collect();
    let mut set = |name: &str, value: String| environment.push((name.to_owned(), value));
    if hosts.is_some() {
        set("MLX_RANK", spec.rank.to_string());
        set("MLX_HOSTFILE", dir.join("hosts.json").display().to_string());
    }
    if spec.fast_synch {
        set("MLX_METAL_FAST_SYNCH", "1".to_owned());
    }
    let config = RunnerConfig {
        shard: shard.metadata.name.clone().unwrap_or_default(),
        namespace: shard.metadata.namespace.clone().unwrap_or_default(),
        instance: spec.instance.clone(),
        epoch: spec.epoch,
        group: group(shard),
        rank: spec.rank,
        world_size: spec.world_size,
        model_dir,
        model_type: spec.model.model_type.clone(),
        total_layers: spec.model.layers,
        sharding: spec.sharding,
        layers: spec.layers,
        transport: spec.transport,
        control: address(&meeting.control)?,
        serve: if spec.rank == 0 { Some(address(serve)?) } else { None },
        seed: spec.seed,
        context_length: spec.context_length,
        max_concurrency: spec.max_concurrency,
        step_limit_s: STEP_LIMIT_S,
        tls: tls.clone(),
    };
    Ok(Launch { dir, config, hosts, environment })
}

/// What speaks against a variable that a user wants for the runners.
fn objection(name: &str, value: &str) -> Option<&'static str> {
    if name.is_empty() || name.contains(['=', '\0']) {
        Some("has no possible name")
    } else if value.contains('\0') {
        Some("has a NUL in its value")
    } else if GROUP_VARIABLES.contains(&name) {
        Some("is set by the agent alone")
    } else if LOADER_VARIABLES.contains(&name) || name.starts_with(LOADER_PREFIX) {
        Some("would load foreign code into the runner")
    } else {
        None
    }
}

/// Names the ranks that belong together: the owner's uid tells an instance from an earlier one of
/// the same name.
fn group(shard: &Shard) -> String {
    let owners = shard.metadata.owner_references.as_deref().unwrap_or_default();
    let namespace = shard.metadata.namespace.as_deref().unwrap_or_default();
    let owner = owners.first().map_or(namespace, |owner| owner.uid.as_str());
    format!("{owner}/{}-{}-a{}", shard.spec.instance, shard.spec.replica, shard.spec.epoch)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shard::tests::{meeting, shard};

    fn tls() -> RunnerTls {
        RunnerTls { ca: "/c/ca".into(), cert: "/c/cert".into(), key: "/c/key".into() }
    }

    fn check(shard: &Shard) -> Result<Launch, ShardFailure> {
        launch(Path::new("/d"), &tls(), shard, "/m".into(), &meeting(), "127.0.0.1:1003")
    }

    #[test]
    fn two_ranks_get_a_host_file() {
        let mut shard = shard("tiny-0-a1-0");
        shard.spec.environment = environment(&[("LD_LIBRARY_PATH", "/cuda"), ("X", "y=z")]);
        let launch = check(&shard).unwrap();
        assert_eq!(launch.hosts.as_deref(), Some(r#"[["127.0.0.1:1001"],["127.0.0.1:2001"]]"#));
        let lines: Vec<String> =
            launch.environment.iter().map(|(name, value)| format!("{name}={value}")).collect();
        assert_eq!(
            lines,
            [
                "LD_LIBRARY_PATH=/cuda",
                "X=y=z",
                "MLX_RANK=0",
                "MLX_HOSTFILE=/d/default_tiny-0-a1-0/hosts.json",
                "MLX_METAL_FAST_SYNCH=1",
            ]
        );
        assert_eq!(
            serde_json::to_value(&launch.config).unwrap(),
            serde_json::json!({
                "shard": "tiny-0-a1-0",
                "namespace": "default",
                "instance": "tiny",
                "epoch": 1,
                "group": "default/tiny-0-a1",
                "rank": 0,
                "world_size": 2,
                "model_dir": "/m",
                "model_type": "llama",
                "total_layers": 8,
                "sharding": "Pipeline",
                "layers": "0-3",
                "transport": "ring",
                "control": "127.0.0.1:1002",
                "serve": "127.0.0.1:1003",
                "seed": 7,
                "context_length": 512,
                "max_concurrency": 4,
                "step_limit_s": 60,
                "tls": {"ca": "/c/ca", "cert": "/c/cert", "key": "/c/key"},
            })
        );
    }

    fn environment(variables: &[(&str, &str)]) -> std::collections::BTreeMap<String, String> {
        variables.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
    }

    #[test]
    fn variables_that_would_break_the_runner_are_refused_by_name() {
        let bad = ["LD_PRELOAD", "LD_AUDIT", "DYLD_INSERT_LIBRARIES", "DYLD_", "A=B", "A\0", ""];
        for name in bad.into_iter().chain(GROUP_VARIABLES) {
            let mut shard = shard("s");
            shard.spec.environment = environment(&[("GOOD", "1"), (name, "1")]);
            let failure = check(&shard).unwrap_err();
            assert_eq!((failure.reason.as_str(), failure.permanent), ("BadEnvironment", true));
            let shown = name.escape_debug().to_string();
            assert!(failure.message.contains(&format!("`{shown}`")), "{}", failure.message);
        }
        let mut shard = shard("s");
        shard.spec.environment = environment(&[("A", "1\0")]);
        let message = check(&shard).unwrap_err().message;
        assert_eq!(message, "environment variable `A` has a NUL in its value");
    }

    #[test]
    fn a_single_rank_needs_no_group() {
        let mut shard = shard("s");
        shard.spec.world_size = 1;
        shard.spec.fast_synch = false;
        let launch = check(&shard).unwrap();
        assert_eq!((launch.hosts, launch.environment), (None, vec![]));
    }

    #[test]
    fn only_rank_0_serves() {
        let mut shard = shard("s");
        shard.spec.rank = 1;
        assert_eq!(check(&shard).unwrap().config.serve, None);
    }

    #[test]
    fn what_cannot_work_is_refused() {
        let mut jaccl = shard("s");
        jaccl.spec.transport = TransportKind::Jaccl;
        assert!(check(&jaccl).unwrap_err().permanent);
        let mut elsewhere = meeting();
        elsewhere.control = "studio-1:x".to_owned();
        let error =
            launch(Path::new("/d"), &tls(), &shard("s"), "/m".into(), &elsewhere, "127.0.0.1:1")
                .unwrap_err();
        assert_eq!(error.message, "`studio-1:x` is not an address such as 10.0.0.1:7000");
    }
}
