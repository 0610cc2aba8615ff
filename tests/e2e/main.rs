//! End-to-end tests: real processes, real clients, real failures.

mod failures;
mod resources;
mod samples;
mod serving;
mod weights;
