//! Wire forms between an agent and the runner process that it starts for one Shard.
//!
//! The agent writes a [`RunnerConfig`] as JSON to a file and starts `exo-runner serve --config
//! FILE`. The runner's stdin is a pipe on which nothing is ever written: its end of file means that
//! the runner must exit at once, so that no runner outlives its agent. On stdout the runner prints
//! one [`RunnerEvent`] per line as JSON and nothing else; stderr carries its log. It tells how it
//! ended by its exit status: [`EXIT_STOPPED`], [`EXIT_RETRYABLE`] or [`EXIT_PERMANENT`].
//!
//! MLX's own environment variables (`MLX_RANK`, `MLX_HOSTFILE`, …) are set by the agent.

use std::{net::SocketAddr, path::PathBuf};

use serde::{Deserialize, Serialize};

use crate::{LayerRange, ShardPhase, ShardingKind, TransportKind};

/// Exit status of a runner that was asked to stop.
pub const EXIT_STOPPED: i32 = 0;
/// Exit status after a failure that another try may not meet: a lost peer, a port in use.
pub const EXIT_RETRYABLE: i32 = 1;
/// Exit status after a failure that stays until something is changed: bad weights or config.
pub const EXIT_PERMANENT: i32 = 2;

/// Reason of a rank that ended only because another one did: never the cause.
pub const REASON_PEER_LOST: &str = "PeerLost";

/// Reason of a shard whose agent was restarted, with the node or without: its runner ended with it
/// and is not to blame.
pub const REASON_RUNNER_LOST: &str = "RunnerLost";

/// A runner that says nothing for this long before it is `Ready` is taken for hung and killed. The
/// runner's own deadlines are shorter, so that it can say which step hangs.
pub const SILENCE_LIMIT_S: u64 = 120;

/// Usual [`RunnerConfig::step_limit_s`]: a chunk of a prompt through a large model on slow links
/// stays well below.
pub const STEP_LIMIT_S: u32 = 60;

/// Everything that one rank must know.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RunnerConfig {
    /// Name of the Shard.
    pub shard: String,
    pub namespace: String,
    pub instance: String,
    pub epoch: u64,
    /// The same in all ranks of one epoch of one replica and in no other group, ever. Ranks that
    /// meet with different groups refuse each other.
    pub group: String,
    /// 0-based.
    pub rank: u32,
    pub world_size: u32,
    /// Folder in Hugging Face layout; absolute.
    pub model_dir: PathBuf,
    /// `model_type` that its `config.json` must have.
    pub model_type: String,
    /// Layers that the whole model must have.
    pub total_layers: u32,
    /// How the ranks share the model.
    #[serde(default = "pipeline")]
    pub sharding: ShardingKind,
    /// Layers of this rank, inclusive in text (`0-39`); all of them with tensor sharding.
    pub layers: LayerRange,
    /// With `world_size` 1 no group is formed and this says nothing.
    pub transport: TransportKind,
    /// The rank channel: rank 0 listens here, the others connect. Unused with `world_size` 1.
    pub control: SocketAddr,
    /// Where rank 0 takes requests; absent on the other ranks.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub serve: Option<SocketAddr>,
    /// Base seed of requests that bring none.
    pub seed: u64,
    /// Longest sequence, in tokens.
    pub context_length: u32,
    /// Sequences that run at the same time.
    pub max_concurrency: u32,
    /// A step that takes longer means that a rank is stuck or cut off.
    #[serde(default = "step_limit_s")]
    pub step_limit_s: u32,
    pub tls: RunnerTls,
}

fn pipeline() -> ShardingKind {
    ShardingKind::Pipeline
}

fn step_limit_s() -> u32 {
    STEP_LIMIT_S
}

/// PEM files for mutual TLS; absolute paths.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RunnerTls {
    /// Certificate of the cluster's authority: the only one trusted.
    pub ca: PathBuf,
    /// The node's certificate.
    pub cert: PathBuf,
    /// Its private key.
    pub key: PathBuf,
}

/// One line of a runner's stdout.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum RunnerEvent {
    /// `Connecting`, `Loading`, `Warming` or `Ready`, in this order; repeated when the percentage
    /// moves.
    Phase {
        phase: ShardPhase,
        /// Of the whole way to `Ready`, 0 to 100.
        progress_percent: u8,
    },
    /// Bytes that MLX holds now.
    Memory { bytes: u64 },
    /// Tokens decoded per second since the last such event; rank 0 only.
    Throughput { tokens_per_s: f64 },
    /// The last line of a runner that failed.
    Failed {
        /// A constant, in CamelCase.
        reason: String,
        /// One sentence that names the file, tensor or peer.
        message: String,
        /// Agrees with the exit status.
        permanent: bool,
    },
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn check_event(event: &RunnerEvent, wire: &serde_json::Value) {
        assert_eq!(&serde_json::to_value(event).unwrap(), wire);
        assert_eq!(&serde_json::from_value::<RunnerEvent>(wire.clone()).unwrap(), event);
    }

    #[test]
    fn events_have_this_form() {
        check_event(
            &RunnerEvent::Phase { phase: ShardPhase::Loading, progress_percent: 40 },
            &json!({"type": "phase", "phase": "Loading", "progress_percent": 40}),
        );
        check_event(&RunnerEvent::Memory { bytes: 7 }, &json!({"type": "memory", "bytes": 7}));
        check_event(
            &RunnerEvent::Throughput { tokens_per_s: 1.5 },
            &json!({"type": "throughput", "tokens_per_s": 1.5}),
        );
        check_event(
            &RunnerEvent::Failed {
                reason: "BadWeights".to_owned(),
                message: "no tensor `lm_head.weight`".to_owned(),
                permanent: true,
            },
            &json!({
                "type": "failed",
                "reason": "BadWeights",
                "message": "no tensor `lm_head.weight`",
                "permanent": true,
            }),
        );
    }

    #[test]
    fn the_config_has_this_form() {
        let wire = json!({
            "shard": "tiny-0-a1-0",
            "namespace": "default",
            "instance": "tiny",
            "epoch": 1,
            "group": "8d7c-0-1",
            "rank": 0,
            "world_size": 2,
            "model_dir": "/models/tiny",
            "model_type": "llama",
            "total_layers": 8,
            "sharding": "Tensor",
            "layers": "0-3",
            "transport": "ring",
            "control": "127.0.0.1:7001",
            "serve": "127.0.0.1:7002",
            "seed": 42,
            "context_length": 512,
            "max_concurrency": 4,
            "step_limit_s": 60,
            "tls": {"ca": "/c/ca.pem", "cert": "/c/node.pem", "key": "/c/node.key"},
        });
        let config: RunnerConfig = serde_json::from_value(wire.clone()).unwrap();
        assert_eq!(config.layers.range(), 0..4);
        assert_eq!(serde_json::to_value(&config).unwrap(), wire);
        let mut short = wire.clone();
        for field in ["sharding", "step_limit_s"] {
            short.as_object_mut().unwrap().remove(field);
        }
        let config: RunnerConfig = serde_json::from_value(short).unwrap();
        assert_eq!((config.sharding, config.step_limit_s), (ShardingKind::Pipeline, 60));
        let mut misspelled = wire;
        misspelled["world-size"] = json!(2);
        assert!(serde_json::from_value::<RunnerConfig>(misspelled).is_err());
    }
}
