//! Model inference on MLX: one process is one rank. Owns loading, sharding, the KV cache, sampling and text handling;
//! opens no sockets but MLX's own and decides nothing about requests.

mod batch;
mod cache;
mod config;
mod engine;
mod history;
mod loader;
mod mlx;
mod models;
mod nn;
mod pipeline;
mod sample;
mod seed;
mod tensor;
pub mod text;
mod timing;

pub use batch::cache_positions;
pub use cache::bound_reuse;
pub use config::ConfigError;
pub use engine::{
    Engine, EngineError, Feed, LoadConfig, ModelInfo, Opening, SeqId, Sharding, Step,
};
pub use loader::{LoadError, LoadProgress, Mismatch, Misshaped};
pub use mlx::{distributed, exit_now, uses_gpu};
pub use models::{NoKernels, StepPath};
pub use sample::{Sampling, StepOutput};
pub use seed::derive_shard_seed;
pub use timing::DeviceTimes;
