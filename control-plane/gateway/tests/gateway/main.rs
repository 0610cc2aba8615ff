//! The gateway over real sockets: an API server in this process, scripted runners, clients that
//! speak HTTP.

mod cluster;
mod failures;
mod protocol;
mod runner;
