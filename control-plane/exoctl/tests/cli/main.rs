//! `exoctl` itself against an API server in this process, over a real socket.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod cluster;
mod edit;
mod golden;
mod shells;
mod streams;
