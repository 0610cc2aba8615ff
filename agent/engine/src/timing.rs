//! Where a thread's time in steps goes: handing work to the device, and waiting for it. What is left is the making of
//! graphs. Measures, decides nothing.

use std::cell::Cell;
use std::time::{Duration, Instant};

/// A thread's times since they were last taken.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DeviceTimes {
    /// MLX's own work on the host: ordering the graph, encoding it for the device.
    pub submit: Duration,
    pub wait: Duration,
}

thread_local! {
    static SPENT: Cell<DeviceTimes> = const {
        Cell::new(DeviceTimes { submit: Duration::ZERO, wait: Duration::ZERO })
    };
}

impl DeviceTimes {
    /// This thread's, which start anew.
    pub fn take() -> Self {
        SPENT.take()
    }
}

/// Runs what hands work to the device.
pub(crate) fn submit<T>(f: impl FnOnce() -> T) -> T {
    timed(f, |times, took| times.submit += took)
}

/// Runs what waits for the device.
pub(crate) fn wait<T>(f: impl FnOnce() -> T) -> T {
    timed(f, |times, took| times.wait += took)
}

fn timed<T>(f: impl FnOnce() -> T, add: impl FnOnce(&mut DeviceTimes, Duration)) -> T {
    let started = Instant::now();
    let result = f();
    let mut times = SPENT.get();
    add(&mut times, started.elapsed());
    SPENT.set(times);
    result
}
