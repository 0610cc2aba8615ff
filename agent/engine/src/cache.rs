//! Keys and values of the tokens that one sequence has fed, for one layer. Owns their buffers and how they grow;
//! never computes attention.

use mlx_rs::Array;
use mlx_rs::error::Exception;
use mlx_rs::ops::{concatenate, zeros_dtype};

use crate::mlx::{slice, slice_update};

/// Positions added at a time: rare enough that copying on growth does not matter, small enough that short sequences
/// waste little.
const GROWTH: i32 = 256;

/// Key and value buffers of shape `[1, kv_heads, capacity, head_dim]`, of which the first `len` positions are set.
#[derive(Default)]
pub(crate) struct KvCache {
    buffers: Option<(Array, Array)>,
    len: i32,
}

impl KvCache {
    /// Tokens held.
    pub(crate) fn len(&self) -> i32 {
        self.len
    }

    /// Adds `keys` and `values`, each `[1, kv_heads, n, head_dim]`, and returns all that are held.
    pub(crate) fn extend(
        &mut self,
        keys: &Array,
        values: &Array,
    ) -> Result<(Array, Array), Exception> {
        let end = self.len + keys.dim(2);
        let (key_buffer, value_buffer) = match self.buffers.take() {
            Some((k, v)) if end <= k.dim(2) => (k, v),
            old => {
                let (old_keys, old_values) = old.unzip();
                (grow(old_keys, keys, self.len, end)?, grow(old_values, values, self.len, end)?)
            }
        };
        let key_buffer = put(key_buffer, keys, self.len, end)?;
        let value_buffer = put(value_buffer, values, self.len, end)?;
        self.len = end;
        let held = (first(&key_buffer, end)?, first(&value_buffer, end)?);
        self.buffers = Some((key_buffer, value_buffer));
        Ok(held)
    }

    /// Forgets the last `count` tokens.
    pub(crate) fn truncate(&mut self, count: i32) {
        self.len = (self.len - count).max(0);
    }

    /// The buffers, for evaluation.
    pub(crate) fn arrays(&self) -> impl Iterator<Item = &Array> {
        self.buffers.iter().flat_map(|(k, v)| [k, v])
    }
}

#[expect(
    clippy::needless_pass_by_value,
    reason = "a buffer held elsewhere would be copied, not written to"
)]
fn put(buffer: Array, update: &Array, start: i32, end: i32) -> Result<Array, Exception> {
    let stop = [1, buffer.dim(1), end, buffer.dim(3)];
    slice_update(&buffer, update, &[0, 0, start, 0], &stop)
}

fn first(buffer: &Array, end: i32) -> Result<Array, Exception> {
    slice(buffer, &[0, 0, 0, 0], &[1, buffer.dim(1), end, buffer.dim(3)])
}

/// A buffer for at least `end` positions that starts with the first `len` of `old`; heads and type as `like`.
fn grow(old: Option<Array>, like: &Array, len: i32, end: i32) -> Result<Array, Exception> {
    let capacity = (end + GROWTH - 1) / GROWTH * GROWTH;
    let room = zeros_dtype(&[1, like.dim(1), capacity - len, like.dim(3)], like.dtype())?;
    match old {
        Some(old) if len > 0 => concatenate(&[first(&old, len)?, room], 2),
        _ => Ok(room),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `n` positions for two heads of width 1, numbered from `from`; the second head is offset by 1000.
    fn positions(from: i32, n: i32) -> Array {
        let data: Vec<f32> =
            (from..from + n).chain(from + 1000..from + 1000 + n).map(|x| x as f32).collect();
        Array::from_slice(&data, &[1, 2, n, 1])
    }

    fn values(array: &Array) -> Vec<f32> {
        array.flatten(None, None).unwrap().to_vec_exact().unwrap()
    }

    #[test]
    fn keeps_every_position_over_growth_and_truncation() {
        let mut cache = KvCache::default();
        let mut held = (Array::from_int(0), Array::from_int(0));
        for (from, n) in [(0, 5), (5, 1), (6, 300), (306, 1)] {
            held = cache.extend(&positions(from, n), &positions(-from, n)).unwrap();
        }
        assert_eq!(cache.len(), 307);
        let keys = values(&held.0);
        let expect: Vec<f32> = (0..307).chain(1000..1307).map(|x| x as f32).collect();
        assert_eq!(keys, expect);

        cache.truncate(7);
        let (keys, _) = cache.extend(&positions(777, 1), &positions(0, 1)).unwrap();
        assert_eq!(keys.shape(), [1, 2, 301, 1]);
        let keys = values(&keys);
        assert_eq!(&keys[298..301], [298.0, 299.0, 777.0]);
    }
}
