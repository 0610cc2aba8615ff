//! Tries a new group out: sums, gathers and messages of known numbers in several sizes. Owns the numbers; never
//! decides how long to wait, and tries nothing that a backend does not have.

use mlx_rs::{Array, Dtype};

use super::distributed::{Group, GroupError};

/// Elements: one, some that no number of ranks divides, and more bytes than a backend sends in one piece.
const SIZES: [usize; 3] = [1, 1_021, 300_007];

/// Values differ by place up to this, so that swapped or missing pieces show; all sums are exact in float32.
const PLACES: usize = 251;

fn numbers(size: usize, of: impl Fn(usize) -> usize) -> Vec<f32> {
    (0..size).map(|i| of(i % PLACES) as f32).collect()
}

fn array(numbers: &[f32]) -> Array {
    Array::from_slice(numbers, &[numbers.len() as i32])
}

impl Group {
    /// Blocks until all ranks have come here.
    ///
    /// # Errors
    /// A rank is gone, or something else arrived than was sent.
    pub fn self_test(&self) -> Result<(), GroupError> {
        for size in SIZES {
            self.test_sum(size)?;
            self.test_gather(size)?;
            if self.backend().has_messages() {
                self.test_messages(size)?;
            }
        }
        Ok(())
    }

    fn test_sum(&self, size: usize) -> Result<(), GroupError> {
        let (rank, ranks) = (self.rank(), self.size());
        let sum = self.all_sum(&array(&numbers(size, |i| i + rank)))?;
        let expected = numbers(size, |i| i * ranks + ranks * (ranks - 1) / 2);
        check("all_sum", &sum, &expected, |_| "the ranks' sum".to_owned())
    }

    fn test_gather(&self, size: usize) -> Result<(), GroupError> {
        let rank = self.rank();
        let all = self.all_gather(&array(&numbers(size, |i| i + rank)))?;
        let expected = (0..self.size()).flat_map(|rank| numbers(size, |i| i + rank));
        let expected: Vec<f32> = expected.collect();
        check("all_gather", &all, &expected, |i| format!("the part of rank {}", i / size))
    }

    /// A message goes round, as only neighbours can talk on every backend; each rank adds one to it.
    fn test_messages(&self, size: usize) -> Result<(), GroupError> {
        let (rank, ranks) = (self.rank(), self.size());
        let (before, behind) = ((rank + ranks - 1) % ranks, (rank + 1) % ranks);
        let send = || {
            let sent = self.send(&array(&numbers(size, |i| i + rank)), behind)?;
            sent.eval().map_err(|e| GroupError::collective("send", &e))
        };
        let receive = || {
            let received = self.recv(&[size as i32], Dtype::Float32, before)?;
            let expected = numbers(size, |i| i + before);
            check("recv", &received, &expected, |_| format!("the message of rank {before}"))
        };
        if rank == 0 {
            send()?;
            receive()
        } else {
            receive()?;
            send()
        }
    }
}

/// Evaluates and compares; `source` says where a number at a place comes from.
fn check(
    operation: &'static str,
    found: &Array,
    expected: &[f32],
    source: impl Fn(usize) -> String,
) -> Result<(), GroupError> {
    found.eval().map_err(|e| GroupError::collective(operation, &e))?;
    let found = found.as_slice::<f32>();
    let wrong = |reason| Err(GroupError::SelfTest { operation, size: expected.len(), reason });
    if found.len() != expected.len() {
        return wrong(format!("{} numbers arrived", found.len()));
    }
    #[expect(clippy::float_cmp, reason = "small whole numbers are exact")]
    let place = found.iter().zip(expected).position(|(found, expected)| found != expected);
    match place {
        None => Ok(()),
        Some(i) => wrong(format!(
            "{} has {} at place {i} where {} was expected",
            source(i),
            found[i],
            expected[i]
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wrong_number_is_told_with_its_place_and_source() {
        let part = |i: usize| format!("the part of rank {}", i / 2);
        let found = array(&[0.0, 1.0, 1.0, 2.0]);
        assert!(check("all_gather", &found, &[0.0, 1.0, 1.0, 2.0], part).is_ok());
        let error = check("all_gather", &found, &[0.0, 1.0, 1.0, 3.0], part).unwrap_err();
        assert_eq!(
            error.to_string(),
            "the group's self-test failed: all_gather of 4 numbers: the part of rank 1 has 2 at \
             place 3 where 3 was expected"
        );
        let error = check("all_gather", &found, &[0.0], part).unwrap_err();
        assert!(error.to_string().contains("4 numbers arrived"), "{error}");
    }
}
