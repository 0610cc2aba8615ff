//! Controllers: observe through the Kubernetes API, let `exo-plan` decide, write what it says.
//!
//! Owns: reading what a decision needs, the order and safety of its writes, when to look again.
//! Never: policy (that is `exo-plan`), anything but the Kubernetes API.
//!
//! # Guarantees
//! - Only the leader writes: leadership is checked before every single write.
//! - Everything is read anew from the API for each decision; watches only say when to look.
//! - A status that says nothing new is not written.

mod instance;
mod node;
mod read;
#[cfg(test)]
mod testing;
mod trigger;
mod write;

use exo_crds::event::Reporter;
use exo_recorder::Recorder;
use kube::Client;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// A controller that ended though nobody asked it to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the {0} controller ended by itself")]
pub struct Ended(&'static str);

/// Runs all controllers until `shutdown` is cancelled. They act while `leadership` is true and stay
/// silent otherwise.
///
/// # Errors
/// [`Ended`]: without that controller nothing would be looked after any more.
pub async fn run(
    client: Client,
    leadership: watch::Receiver<bool>,
    shutdown: CancellationToken,
) -> Result<(), Ended> {
    let (events, telling) = {
        let (component, instance) = ("exo-controllers".to_owned(), "leader".to_owned());
        let (reporter, leads) = (Reporter { component, instance }, leadership.clone());
        Recorder::new(client.clone(), reporter, move || *leads.borrow())
    };
    let instances =
        instance::run(client.clone(), leadership.clone(), events.clone(), shutdown.clone());
    let nodes = node::run(client, leadership, events, shutdown.clone());
    let ended = |name| if shutdown.is_cancelled() { Ok(()) } else { Err(Ended(name)) };
    // On the heap: it is large, and whoever runs this would have to hold it.
    let work = Box::pin(async {
        tokio::try_join!(
            async {
                instances.await;
                ended("instance")
            },
            async {
                nodes.await;
                ended("node")
            },
        )
    });
    tokio::select! {
        result = work => result.map(|_| ()),
        // Cancel-safe: it never ends by itself, and events on their way are a courtesy.
        () = telling => Ok(()),
    }
}
