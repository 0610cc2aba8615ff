//! How slow this node's disk is, and how much longer elections take for that.
//!
//! Nobody leads before a majority has written its vote to disk. Where one write takes as long as
//! voters wait for one another, each election ends in the next. A disk does not tell; so a node
//! measures its own when it starts.

use std::{
    fs::{self, File},
    io::{self, Write as _},
    path::Path,
    time::{Duration, Instant},
};

use serde::{Deserialize, Serialize};

/// The times of [`election`](super::election) fit a disk that writes through in this time. SSDs take
/// a tenth of it and less, a disk that others keep busy some more.
const SOUND: Duration = Duration::from_millis(100);
/// Beyond it, a node that waits is of no more use than one that can't be elected.
const FACTOR_MAX: u32 = 10;
/// Of so many writes the median counts: one may have met a busy moment.
const WRITES: usize = 5;
const WRITE_BYTES: usize = 4096;

/// How many times longer than on a sound disk something may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub(super) struct Pace(u32);

impl Pace {
    /// Writes a few small blocks to a file of the folder, and takes it away.
    ///
    /// # Errors
    /// When the folder can't be written to.
    pub(super) fn measure(dir: &Path) -> io::Result<Self> {
        let path = dir.join("store.pace");
        let measured = File::create(&path).and_then(|mut file| {
            let mut taken = [Duration::ZERO; WRITES];
            for taken in &mut taken {
                let begin = Instant::now();
                file.write_all(&[0; WRITE_BYTES])?;
                file.sync_data()?;
                *taken = begin.elapsed();
            }
            taken.sort_unstable();
            Ok(taken[WRITES / 2])
        });
        let removed = fs::remove_file(&path);
        let taken = measured?;
        removed?;
        Ok(Self::of(taken))
    }

    fn of(write: Duration) -> Self {
        let factor = write.as_millis().div_ceil(SOUND.as_millis());
        Self(u32::try_from(factor).unwrap_or(FACTOR_MAX).clamp(1, FACTOR_MAX))
    }

    pub(super) fn is_slow(self) -> bool {
        self != Self::of(SOUND)
    }

    /// Whether who stands, with this pace, waits long enough for the vote of `voter`: a quarter of
    /// the time is for the way, and for writes that take longer than most.
    pub(super) fn has_time_for(self, voter: Self) -> bool {
        let limit = Duration::from_millis(self.times_ms(super::ELECTION_MS.0));
        voter.times(SOUND) <= limit * 3 / 4
    }

    pub(super) fn times(self, duration: Duration) -> Duration {
        duration * self.0
    }

    pub(super) fn times_ms(self, ms: u64) -> u64 {
        ms * u64::from(self.0)
    }
}

impl Default for Pace {
    fn default() -> Self {
        Self::of(SOUND)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_slower_the_disk_the_longer_everything() {
        let factor = |ms| Pace::of(Duration::from_millis(ms)).0;
        assert_eq!([0, 5, 100, 101, 300, 950, 60_000].map(factor), [1, 1, 1, 2, 3, 10, 10]);
        let slow = Pace::of(Duration::from_millis(300));
        assert!(slow.is_slow() && !Pace::default().is_slow());
        assert_eq!((slow.times(SOUND), slow.times_ms(7)), (SOUND * 3, 21));
    }

    #[test]
    fn who_is_fast_has_no_time_for_the_slowest() {
        let waits = |own, voter| Pace(own).has_time_for(Pace(voter));
        assert!(waits(1, 1) && waits(1, 3) && !waits(1, 4) && waits(2, 6) && waits(10, 1));
    }

    #[test]
    fn measuring_leaves_nothing_behind() {
        let dir = tempfile::tempdir().unwrap();
        Pace::measure(dir.path()).unwrap();
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
        assert!(Pace::measure(&dir.path().join("none")).is_err());
    }
}
