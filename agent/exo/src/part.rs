//! Parts of the process: tasks that run until they are asked to stop.

use std::{future::Future, time::Duration};

use anyhow::anyhow;
use tokio::{task::JoinHandle, time::timeout};
use tokio_util::sync::CancellationToken;
use tracing::warn;

/// A part that runs until its token is cancelled.
pub(crate) struct Part {
    name: &'static str,
    stop: CancellationToken,
    task: JoinHandle<anyhow::Result<()>>,
}

impl Part {
    pub(crate) fn start<F>(name: &'static str, make: impl FnOnce(CancellationToken) -> F) -> Self
    where
        F: Future<Output = anyhow::Result<()>> + Send + 'static,
    {
        let stop = CancellationToken::new();
        Self { name, task: tokio::spawn(make(stop.clone())), stop }
    }

    /// Waits for the end, which nobody asked for.
    pub(crate) async fn failure(&mut self) -> anyhow::Error {
        match (&mut self.task).await {
            Ok(Ok(())) => anyhow!("the {} ended", self.name),
            Ok(Err(error)) => error.context(format!("the {} failed", self.name)),
            Err(error) => anyhow!("the {} broke off: {error}", self.name),
        }
    }

    pub(crate) async fn stop(mut self, limit: Duration) {
        self.stop.cancel();
        if self.task.is_finished() {
            return;
        }
        match timeout(limit, &mut self.task).await {
            Ok(Ok(Ok(()))) => {}
            Ok(Ok(Err(error))) => warn!(part = self.name, "stopping: {error:#}"),
            Ok(Err(error)) => warn!(part = self.name, %error, "broke off while stopping"),
            Err(_) => self.task.abort(),
        }
    }
}

/// The same for a part that may not be there.
pub(crate) async fn failure_of(part: &mut Option<Part>) -> anyhow::Error {
    match part {
        Some(part) => part.failure().await,
        None => std::future::pending().await,
    }
}
