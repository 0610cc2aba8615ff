//! Keys and values of the tokens that sequences have fed, for one layer. Owns their buffers and how they grow; never
//! computes attention, and never decides which sequences share a buffer.

use mlx_rs::Array;
use mlx_rs::error::Exception;
use mlx_rs::ops::{concatenate, zeros_dtype};

use crate::mlx::{slice, slice_update};

/// Positions added at a time: rare enough that neither copying on growth matters nor that a device has to prepare
/// anew for other sizes, few enough that short sequences waste little.
const GROWTH: i32 = 256;

/// Positions that a buffer for `len` of them has.
pub(crate) fn capacity(len: i32) -> i32 {
    (len + GROWTH - 1) / GROWTH * GROWTH
}

/// Key and value buffers of shape `[rows, kv_heads, capacity, head_dim]`, of which the first `len` positions are set.
#[derive(Default)]
pub(crate) struct KvCache {
    buffers: Option<(Array, Array)>,
    len: i32,
}

impl KvCache {
    /// Positions held.
    pub(crate) fn len(&self) -> i32 {
        self.len
    }

    /// Adds `keys` and `values`, each `[rows, kv_heads, n, head_dim]`, and returns all that are held.
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
        let held = (span(&key_buffer, 0, end)?, span(&value_buffer, 0, end)?);
        self.buffers = Some((key_buffer, value_buffer));
        Ok(held)
    }

    /// Forgets the last `count` positions.
    pub(crate) fn truncate(&mut self, count: i32) {
        self.len = (self.len - count).max(0);
    }

    /// Some of the rows, without the first `from` positions.
    pub(crate) fn take(&self, rows: &[u32], from: i32) -> Result<Self, Exception> {
        let Some((keys, values)) = &self.buffers else { return Ok(Self::default()) };
        let len = self.len - from;
        let rows = Array::from_slice(rows, &[rows.len() as i32]);
        let take = |buffer: &Array| {
            let held = span(buffer, from, self.len)?.take_axis(&rows, 0)?;
            place(&held, 0, capacity(len + 1) - len)
        };
        Ok(Self { buffers: Some((take(keys)?, take(values)?)), len })
    }

    /// The rows of both, their last positions side by side: the shorter ones begin with zeros.
    pub(crate) fn join(self, other: Self) -> Result<Self, Exception> {
        let len = self.len.max(other.len);
        let room = capacity(len + 1) - len;
        let shift = |buffer: &Array, held: i32| place(&span(buffer, 0, held)?, len - held, room);
        match (self.buffers, other.buffers) {
            (Some((keys, values)), Some((other_keys, other_values))) => {
                let join = |a: &Array, b: &Array| {
                    concatenate(&[shift(a, self.len)?, shift(b, other.len)?], 0)
                };
                let buffers = (join(&keys, &other_keys)?, join(&values, &other_values)?);
                Ok(Self { buffers: Some(buffers), len })
            }
            (buffers, None) => Ok(Self { buffers, len: self.len }),
            (None, buffers) => Ok(Self { buffers, len: other.len }),
        }
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
    let stop = [buffer.dim(0), buffer.dim(1), end, buffer.dim(3)];
    slice_update(&buffer, update, &[0, 0, start, 0], &stop)
}

/// The positions `start..end`.
fn span(buffer: &Array, start: i32, end: i32) -> Result<Array, Exception> {
    slice(buffer, &[0, 0, start, 0], &[buffer.dim(0), buffer.dim(1), end, buffer.dim(3)])
}

/// `held` with zeros for `before` positions before it and `after` behind it.
fn place(held: &Array, before: i32, after: i32) -> Result<Array, Exception> {
    let zeros = |n: i32| zeros_dtype(&[held.dim(0), held.dim(1), n, held.dim(3)], held.dtype());
    let mut parts = Vec::with_capacity(3);
    if before > 0 {
        parts.push(zeros(before)?);
    }
    parts.push(held.clone());
    if after > 0 {
        parts.push(zeros(after)?);
    }
    if parts.len() == 1 { Ok(held.clone()) } else { concatenate(&parts, 2) }
}

/// A buffer for at least `end` positions that starts with the first `len` of `old`; heads and type as `like`.
fn grow(old: Option<Array>, like: &Array, len: i32, end: i32) -> Result<Array, Exception> {
    match old {
        Some(old) if len > 0 => place(&span(&old, 0, len)?, 0, capacity(end) - len),
        _ => {
            let shape = [like.dim(0), like.dim(1), capacity(end), like.dim(3)];
            zeros_dtype(&shape, like.dtype())
        }
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

    #[test]
    fn rows_join_and_part_with_their_last_positions_side_by_side() {
        let (mut long, mut short) = (KvCache::default(), KvCache::default());
        long.extend(&positions(10, 3), &positions(0, 3)).unwrap();
        short.extend(&positions(20, 1), &positions(0, 1)).unwrap();
        let mut both = long.join(short).unwrap();
        let next = concatenate(&[positions(13, 1), positions(21, 1)], 0).unwrap();
        let (keys, _) = both.extend(&next, &next).unwrap();
        assert_eq!(keys.shape(), [2, 2, 4, 1]);
        let rows = values(&keys);
        assert_eq!(rows[..4], [10.0, 11.0, 12.0, 13.0]);
        assert_eq!(rows[8..12], [0.0, 0.0, 20.0, 21.0]);

        let mut second = both.take(&[1], 2).unwrap();
        assert_eq!(second.len(), 2);
        let (keys, _) = second.extend(&positions(22, 1), &positions(0, 1)).unwrap();
        assert_eq!(values(&keys), [20.0, 21.0, 22.0, 1020.0, 1021.0, 1022.0]);
    }

    #[test]
    fn buffers_have_room_for_what_is_asked() {
        for (len, expect) in [(1, 256), (256, 256), (257, 512), (513, 768)] {
            assert_eq!(capacity(len), expect);
        }
    }
}
