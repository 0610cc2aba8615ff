//! Inputs from seeds: the same seed makes the same input.
//!
//! `EXO_FUZZ_SECONDS` makes a test go on for that long, `EXO_FUZZ_SEED` starts it elsewhere. A finding
//! tells the seed of its input: `EXO_FUZZ_SEED=n EXO_FUZZ_SECONDS=0` repeats it as the first.

use std::{
    fmt,
    time::{Duration, Instant},
};

use proptest::{
    strategy::Strategy,
    test_runner::{Config, RngAlgorithm, TestCaseResult, TestRng, TestRunner},
};

use crate::setting;

/// The seeds of one run, one after the other. Prints as how many there were, and in what time.
#[derive(Debug)]
pub struct Seeds {
    next: u64,
    done: u64,
    inputs: u64,
    seconds: Option<u64>,
    began: Instant,
}

impl Seeds {
    /// `inputs` of them where the environment says nothing else.
    pub fn new(inputs: u64) -> Self {
        let next = setting("EXO_FUZZ_SEED").unwrap_or(0);
        let seconds = setting("EXO_FUZZ_SECONDS");
        Self { next, done: 0, inputs, seconds, began: Instant::now() }
    }
}

impl Iterator for Seeds {
    type Item = u64;

    fn next(&mut self) -> Option<u64> {
        let goes_on = match self.seconds {
            Some(0) => self.done < 1,
            Some(seconds) => self.began.elapsed() < Duration::from_secs(seconds),
            None => self.done < self.inputs,
        };
        goes_on.then(|| {
            let seed = self.next;
            self.next = seed.wrapping_add(1);
            self.done += 1;
            seed
        })
    }
}

impl fmt::Display for Seeds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} inputs in {:.1?}", self.done, self.began.elapsed())
    }
}

/// Checks the seed's input.
///
/// # Panics
/// With the seed and the finding, which is first made as small as can be.
pub fn check<S: Strategy>(inputs: &S, seed: u64, check: impl Fn(S::Value) -> TestCaseResult) {
    let mut bytes = [0; 32];
    bytes[..8].copy_from_slice(&seed.to_le_bytes());
    let rng = TestRng::from_seed(RngAlgorithm::ChaCha, &bytes);
    // A finding as small as can be is worth some seconds, not minutes.
    let config = Config { failure_persistence: None, max_shrink_time: 20_000, ..Config::default() };
    let mut runner = TestRunner::new_with_rng(config, rng);
    let input = inputs.new_tree(&mut runner).expect("nothing is filtered out");
    if let Err(finding) = runner.run_one(input, check) {
        panic!("seed {seed}: {finding}");
    }
}
