//! The Kubernetes client of a node that has no control plane: one of several API servers, another
//! one as soon as that fails.
//!
//! Calls that fail are not repeated here: all callers do that themselves, and know what is safe.

use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use anyhow::Context as _;
use exo_trust::{TlsPaths, reqwest_client};
use http::{Request, Response, StatusCode};
use kube::{Client, client::Body};
use tokio::time::{MissedTickBehavior, interval, timeout};
use tokio_util::sync::CancellationToken;
use tower::BoxError;
use tracing::{info, warn};

use crate::{control, data_dir::DataDir, dial};

/// A server that has not begun to answer by then is no use; elections take less.
const ANSWER_LIMIT: Duration = Duration::from_secs(3);
/// How often the servers are asked who else there is.
const LEARN_PERIOD: Duration = Duration::from_secs(10);

/// Known API servers, and the one in use.
pub(crate) struct Servers {
    tls: TlsPaths,
    /// Address and client; never empty.
    known: Mutex<Vec<(String, Client)>>,
    /// Counts failures: its remainder says which one is in use.
    turn: AtomicU64,
}

impl Servers {
    pub(crate) fn new(tls: &TlsPaths, addresses: &[String]) -> anyhow::Result<Arc<Self>> {
        let known = addresses
            .iter()
            .map(|address| Ok((address.clone(), connect(tls, address)?)))
            .collect::<anyhow::Result<Vec<_>>>()?;
        anyhow::ensure!(!known.is_empty(), "no API server is known");
        Ok(Arc::new(Self { tls: tls.clone(), known: Mutex::new(known), turn: AtomicU64::new(0) }))
    }

    /// A client that uses them in turn.
    pub(crate) fn client(self: &Arc<Self>) -> Client {
        let servers = Arc::clone(self);
        let service = tower::service_fn(move |request: Request<Body>| {
            let servers = Arc::clone(&servers);
            async move { servers.send(request).await }
        });
        Client::new(service, "default")
    }

    fn known(&self) -> std::sync::MutexGuard<'_, Vec<(String, Client)>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The server in use, and its turn.
    fn current(&self) -> (u64, String, Client) {
        let known = self.known();
        let turn = self.turn.load(Ordering::Relaxed);
        let at = usize::try_from(turn % known.len() as u64).unwrap_or(0);
        let (address, client) = &known[at];
        (turn, address.clone(), client.clone())
    }

    async fn send(&self, request: Request<Body>) -> Result<Response<Body>, BoxError> {
        let (turn, address, client) = self.current();
        // A caller that gives up waiting has seen a failure too.
        let mut failure = Failure { servers: self, turn, address: &address, happened: true };
        let answer = timeout(ANSWER_LIMIT, client.send(request)).await;
        failure.happened = match &answer {
            Ok(Ok(response)) => is_failing(response.status()),
            Ok(Err(_)) | Err(_) => true,
        };
        match answer {
            Ok(answer) => Ok(answer?),
            Err(_) => Err(format!("{address} gave no answer in {ANSWER_LIMIT:?}").into()),
        }
    }

    /// The next one's turn, unless somebody has noticed before.
    fn give_up(&self, turn: u64, address: &str) {
        let changed =
            self.turn.compare_exchange(turn, turn + 1, Ordering::Relaxed, Ordering::Relaxed);
        if changed.is_ok() && self.known().len() > 1 {
            info!(server = address, "the API server fails: asking the next one");
        }
    }

    /// Follows who serves the API, and writes it down for the next start.
    pub(crate) async fn learn(&self, data: &DataDir, stop: CancellationToken) {
        let client = match reqwest_client(&self.tls) {
            Ok(client) => client,
            Err(error) => return warn!(%error, "other API servers can't be asked for"),
        };
        let mut ticks = interval(LEARN_PERIOD);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                // Cancel-safe: nothing has been started in this round.
                () = stop.cancelled() => return,
                _ = ticks.tick() => {}
            }
            let (_, address, _) = self.current();
            let Ok(answer) = control::members_at(&client, &address).await else { continue };
            let addresses: Vec<_> = answer.members.into_iter().map(|m| m.address).collect();
            if let Err(error) = self.adopt(&addresses).and_then(|()| data.save_members(&addresses))
            {
                warn!("the API servers can't be remembered: {error:#}");
            }
        }
    }

    /// Adds servers; those that were named by people stay.
    fn adopt(&self, addresses: &[String]) -> anyhow::Result<()> {
        for address in addresses {
            if !self.known().iter().any(|(known, _)| known == address) {
                let client = connect(&self.tls, address)?;
                self.known().push((address.clone(), client));
            }
        }
        Ok(())
    }
}

/// The server has lost its majority or its way to the leader: before the call, or while it ran.
fn is_failing(status: StatusCode) -> bool {
    matches!(status, StatusCode::SERVICE_UNAVAILABLE | StatusCode::GATEWAY_TIMEOUT)
}

struct Failure<'a> {
    servers: &'a Servers,
    turn: u64,
    address: &'a str,
    happened: bool,
}

impl Drop for Failure<'_> {
    fn drop(&mut self) {
        if self.happened {
            self.servers.give_up(self.turn, self.address);
        }
    }
}

/// A Kubernetes client of one API server, with this node's certificate.
fn connect(tls: &TlsPaths, address: &str) -> anyhow::Result<Client> {
    dial::kube_client(tls, address).context("--peers")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_server_without_a_majority_is_given_up() {
        let failing = |code: u16| is_failing(StatusCode::from_u16(code).unwrap());
        assert!([503, 504].into_iter().all(failing));
        assert!(![200, 201, 404, 409, 422, 429, 500, 507].into_iter().any(failing));
    }
}
