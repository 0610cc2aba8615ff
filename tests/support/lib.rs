//! What tests of several crates share: fuzzing from seeds, small volumes, a look at metrics.
//!
//! Never: anything of the product. A function here panics where a test would.
#![allow(clippy::unwrap_used, reason = "used by tests alone")]

pub mod fuzz;
pub mod metrics;
mod volume;

pub use volume::{Volume, fill};

/// A number that the environment gives a test.
///
/// # Panics
/// When it is no number.
pub fn setting(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{name}={text} is not a number")))
}
