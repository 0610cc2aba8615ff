//! `exoctl` itself against an API server in this process, over a real socket.

mod cluster;
mod golden;
mod streams;
