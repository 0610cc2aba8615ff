//! End-to-end tests: real processes, real clients, real failures.

#![allow(clippy::unwrap_used, reason = "tests")]

mod again;
mod disk;
mod etcd;
mod failures;
mod minority;
mod operations;
mod partitions;
mod resources;
mod samples;
mod serving;
mod slow_disk;
mod voters;
mod weights;
