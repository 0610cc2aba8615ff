//! Clients that were not written here, against the server, over a socket: kubectl, curl and the
//! Python client. Skipped where there is none, but not in CI.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod curl;
mod kubectl;
mod objects;
mod odd;
mod python;
mod raw;
#[path = "../support/serve.rs"]
mod serve;
#[path = "../support/mod.rs"]
mod support;
mod verbs;
