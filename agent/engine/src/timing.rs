//! Where a thread's time in steps goes: handing work to the device, and waiting for it. What is left is the making of
//! graphs. Measures, decides nothing.

use std::cell::Cell;
use std::time::{Duration, Instant};

use rustix::time::{ClockId, clock_gettime};

/// A thread's times since they were last taken, or since the thread began.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DeviceTimes {
    /// MLX's own work on the host: ordering the graph, encoding it for the device. Where the device is behind, most of
    /// it is waiting for the device to take more.
    pub submit: Duration,
    pub wait: Duration,
    /// This thread's processor time, but for what it spent in `wait`.
    pub computed: Duration,
}

#[derive(Clone, Copy)]
struct Spent {
    submit: Duration,
    wait: Duration,
    /// Processor time of `wait`, and the thread's when the times were last taken.
    not_counted: Duration,
}

thread_local! {
    static SPENT: Cell<Spent> = const {
        Cell::new(Spent { submit: Duration::ZERO, wait: Duration::ZERO, not_counted: Duration::ZERO })
    };
}

impl DeviceTimes {
    /// This thread's, which start anew.
    pub fn take() -> Self {
        let now = processor_time();
        let begun = Spent { submit: Duration::ZERO, wait: Duration::ZERO, not_counted: now };
        let Spent { submit, wait, not_counted } = SPENT.replace(begun);
        Self { submit, wait, computed: now.saturating_sub(not_counted) }
    }
}

/// Runs what hands work to the device.
pub(crate) fn submit<T>(f: impl FnOnce() -> T) -> T {
    let started = Instant::now();
    let result = f();
    let spent = SPENT.get();
    SPENT.set(Spent { submit: spent.submit + started.elapsed(), ..spent });
    result
}

/// Runs what waits for the device.
pub(crate) fn wait<T>(f: impl FnOnce() -> T) -> T {
    let (started, computed) = (Instant::now(), processor_time());
    let result = f();
    let spent = SPENT.get();
    let wait = spent.wait + started.elapsed();
    let not_counted = spent.not_counted + processor_time().saturating_sub(computed);
    SPENT.set(Spent { wait, not_counted, ..spent });
    result
}

/// This thread's so far.
fn processor_time() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    // Neither is ever negative, and the second is below a billion.
    let (seconds, nanoseconds) = (time.tv_sec.cast_unsigned(), time.tv_nsec as u32);
    Duration::new(seconds, nanoseconds)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Keeps the processor busy for at least so long.
    fn compute(at_least: Duration) {
        let until = processor_time() + at_least;
        while processor_time() < until {
            std::hint::black_box(0);
        }
    }

    #[test]
    fn computing_is_told_from_waiting() {
        // Far apart: where machines share a processor, what others take of it can count as this thread's.
        let (short, long) = (Duration::from_millis(3), Duration::from_millis(300));
        DeviceTimes::take();
        submit(|| compute(short));
        submit(|| std::thread::sleep(long));
        wait(|| compute(long));
        compute(short);
        let times = DeviceTimes::take();
        assert!(times.submit >= short + long, "{times:?}");
        assert!(times.wait >= long, "{times:?}");
        assert!(times.computed >= short * 2 && times.computed < long, "{times:?}");
    }
}
