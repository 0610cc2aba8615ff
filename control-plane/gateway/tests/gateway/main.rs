//! The gateway over real sockets: an API server in this process, scripted runners, clients that
//! speak HTTP.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod cluster;
mod failures;
mod protocol;
mod runner;
