//! The Kubernetes API protocol over a [`Store`](exo_store::Store), as an axum Router.
//!
//! Owns: discovery, verbs, validation by CRD schema, selectors, watches, Table output,
//! `metav1.Status` errors, field management, garbage collection by owner reference, limits of
//! what is answered at once. Never: TLS, what a resource means. It knows resources by their
//! `CustomResourceDefinition` alone, and those few of Kubernetes' own that tools count on.

mod auth;
mod authorize;
mod body;
mod builtin;
mod clock;
mod discovery;
mod error;
mod fields;
mod flow;
mod garbage;
mod health;
mod jsonpath;
mod list;
mod metrics;
mod namespace;
mod object;
mod openapi;
mod protobuf;
mod request;
mod resource;
mod review;
mod rules;
mod schema;
mod selector;
mod server;
mod table;
mod tagged;
mod verbs;
mod wire;

use axum::{Extension, Router};

pub use auth::Identity;
pub use authorize::{Attributes, Policy};
pub use flow::Limits;
pub use garbage::collect_garbage;
pub use resource::DefinitionError;
pub use server::{ApiServer, ServerError, app};

/// The router for a client in the same process: every request comes from `identity`.
///
/// Works as the service of `kube::Client::new(service, "default")`.
pub fn in_process(router: Router, identity: Identity) -> Router {
    router.layer(Extension(identity))
}
