//! Keys and values of the tokens that sequences have fed, for one layer. Owns their buffers, how they grow and how rows
//! move between them; never computes attention, and never decides which sequences share a buffer.

use std::ops::Range;

use mlx_rs::error::Exception;
use mlx_rs::memory::set_cache_limit;
use mlx_rs::ops::zeros_dtype;
use mlx_rs::transforms::eval;
use mlx_rs::{Array, Dtype};

use crate::mlx::{slice, slice_update};
use crate::timing;

/// Positions added at a time: rare enough that neither copying on growth matters nor that a device has to prepare
/// anew for other sizes, few enough that short sequences waste little.
const GROWTH: i32 = 256;

/// Bytes of old and new buffers that may wait to be copied. Placement counts with them in what it sets aside for a
/// rank beside weights and caches (`exo-plan`, `memory`), together with one layer's caches.
pub(crate) const COPY_BYTES_MAX: usize = 64 << 20;

/// Bytes that MLX may keep of memory that was given up. Enough for what a decode step makes and gives up again;
/// placement counts with them.
const REUSE_BYTES_MAX: usize = 96 << 20;

/// Bounds what MLX keeps of memory that was given up: without, it is as much as the machine has, and the caches of
/// sequences that are over would stay. For processes whose memory others count on.
pub fn bound_reuse() {
    // Fails on no platform; without the bound more is kept.
    if let Ok(before) = set_cache_limit(REUSE_BYTES_MAX)
        && before < REUSE_BYTES_MAX
    {
        let _ = set_cache_limit(before);
    }
}

/// Positions that a buffer for `len` of them has.
pub(crate) fn capacity(len: i32) -> i32 {
    (len + GROWTH - 1) / GROWTH * GROWTH
}

/// Keeps what layers hold twice while their rows move to other buffers within a limit: copies of many small layers
/// become part of the next step, of large ones each is made, and the old one given up, before the next.
pub(crate) struct Copies {
    limit_bytes: usize,
    made: Vec<Array>,
    bytes: usize,
}

impl Copies {
    pub(crate) fn new(limit_bytes: usize) -> Self {
        Self { limit_bytes, made: Vec::new(), bytes: 0 }
    }

    /// Takes note that `new` takes the place of `old`, which nobody else must hold.
    pub(crate) fn replaced(&mut self, old: Vec<KvCache>, new: &[KvCache]) -> Result<(), Exception> {
        self.made.extend(new.iter().flat_map(KvCache::arrays).cloned());
        let both = old.iter().chain(new).flat_map(KvCache::arrays);
        self.bytes += both.map(Array::nbytes).sum::<usize>();
        drop(old);
        if self.bytes > self.limit_bytes {
            timing::wait(|| eval(&self.made))?;
            self.leave_to_step();
        }
        Ok(())
    }

    /// What is not made yet becomes part of the step that comes. Must be called before: buffers that are held here
    /// could not be written in place.
    pub(crate) fn leave_to_step(&mut self) {
        self.made.clear();
        self.bytes = 0;
    }
}

/// Rows of a cache that go into another.
#[derive(Clone, Copy)]
pub(crate) struct Rows<'a> {
    pub(crate) cache: &'a KvCache,
    /// Rising.
    pub(crate) rows: &'a [i32],
    /// Positions that are left out before the first.
    pub(crate) from: i32,
}

impl Rows<'_> {
    fn len(&self) -> i32 {
        self.cache.len - self.from
    }
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

    /// Adds `keys` and `values`, each `[rows, kv_heads, n, head_dim]`, and returns all that are held. There is room
    /// for them: [`KvCache::is_full_for`].
    pub(crate) fn extend(
        &mut self,
        keys: &Array,
        values: &Array,
    ) -> Result<(Array, Array), Exception> {
        let end = self.len + keys.dim(2);
        let (key_buffer, value_buffer) = match self.buffers.take() {
            Some(buffers) => buffers,
            None => (empty(keys, keys.dim(0), end)?, empty(values, values.dim(0), end)?),
        };
        let key_buffer = put(key_buffer, keys, self.len, end)?;
        let value_buffer = put(value_buffer, values, self.len, end)?;
        self.len = end;
        let held = (span(&key_buffer, 0, end)?, span(&value_buffer, 0, end)?);
        self.buffers = Some((key_buffer, value_buffer));
        Ok(held)
    }

    /// Counts one more position as held, for the caller to put it into the buffers. None if there are none of this type,
    /// or no room.
    pub(crate) fn next_place(&mut self, dtype: Dtype) -> Option<(&Array, &Array)> {
        let (keys, values) = self.buffers.as_ref()?;
        if self.len >= keys.dim(2) || keys.dtype() != dtype || values.dtype() != dtype {
            return None;
        }
        self.len += 1;
        Some((keys, values))
    }

    /// Forgets the last `count` positions.
    pub(crate) fn truncate(&mut self, count: i32) {
        self.len = (self.len - count).max(0);
    }

    /// Whether `count` more positions need larger buffers than there are. Without any, the first to come are made as
    /// large as they must be.
    pub(crate) fn is_full_for(&self, count: i32) -> bool {
        self.buffers.as_ref().is_some_and(|(keys, _)| self.len + count > keys.dim(2))
    }

    /// All rows of `parts`, one part behind the other, in buffers of their own that have room for `more` positions.
    /// Their last positions lie side by side: the shorter ones begin with zeros.
    pub(crate) fn lay(parts: &[Rows<'_>], more: i32) -> Result<Self, Exception> {
        let len = parts.iter().map(Rows::len).max().unwrap_or(0);
        let keys = lay(parts, |(keys, _)| keys, len, more)?;
        let values = lay(parts, |(_, values)| values, len, more)?;
        Ok(Self { buffers: keys.zip(values), len })
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

/// Zeros for at least `len` positions of `rows` rows; heads, width and type as `like`.
fn empty(like: &Array, rows: i32, len: i32) -> Result<Array, Exception> {
    zeros_dtype(&[rows, like.dim(1), capacity(len), like.dim(3)], like.dtype())
}

/// As [`KvCache::lay`], for the buffers that `of` picks; none where no part has any.
fn lay(
    parts: &[Rows<'_>],
    of: impl Fn(&(Array, Array)) -> &Array,
    len: i32,
    more: i32,
) -> Result<Option<Array>, Exception> {
    let source = |part: &Rows<'_>| part.cache.buffers.as_ref().map(&of).cloned();
    let Some(like) = parts.iter().find_map(source) else { return Ok(None) };
    let count = parts.iter().map(|part| part.rows.len() as i32).sum();
    let mut buffer = empty(&like, count, len + more)?;
    drop(like);
    let mut first = 0;
    for part in parts {
        for run in runs(part.rows) {
            let end = first + run.end - run.start;
            if let Some(old) = source(part) {
                let (heads, width) = (old.dim(1), old.dim(3));
                let stop = [run.end, heads, part.cache.len, width];
                let held = slice(&old, &[run.start, 0, part.from, 0], &stop)?;
                let (start, stop) = ([first, 0, len - part.len(), 0], [end, heads, len, width]);
                buffer = slice_update(&buffer, &held, &start, &stop)?;
            }
            first = end;
        }
    }
    Ok(Some(buffer))
}

/// Rising numbers as ranges of consecutive ones.
fn runs(rows: &[i32]) -> impl Iterator<Item = Range<i32>> {
    rows.chunk_by(|a, b| a + 1 == *b).map(|run| run[0]..run[0] + run.len() as i32)
}

#[cfg(test)]
mod tests {
    use mlx_rs::ops::concatenate;

    use super::*;

    /// `n` positions for two heads of width 1, numbered from `from`; the second head is offset by 1000.
    fn positions(from: i32, n: i32) -> Array {
        let data: Vec<f32> =
            (from..from + n).chain(from + 1000..from + 1000 + n).map(|x| x as f32).collect();
        Array::from_slice(&data, &[1, 2, n, 1])
    }

    fn all<'a>(cache: &'a KvCache, rows: &'a [i32]) -> Rows<'a> {
        Rows { cache, rows, from: 0 }
    }

    fn values(array: &Array) -> Vec<f32> {
        array.flatten(None, None).unwrap().to_vec_exact().unwrap()
    }

    #[test]
    fn keeps_every_position_over_growth_and_truncation() {
        let mut cache = KvCache::default();
        let mut held = (Array::from_int(0), Array::from_int(0));
        for (from, n) in [(0, 5), (5, 1), (6, 300), (306, 1)] {
            if cache.is_full_for(n) {
                cache = KvCache::lay(&[all(&cache, &[0])], n).unwrap();
            }
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
    fn places_are_counted_while_there_are_any() {
        let mut cache = KvCache::default();
        assert!(cache.next_place(Dtype::Float32).is_none(), "no buffers yet");
        cache.extend(&positions(0, 255), &positions(0, 255)).unwrap();
        assert!(cache.next_place(Dtype::Bfloat16).is_none(), "of another type");
        assert_eq!(cache.len(), 255);
        let (keys, values) = cache.next_place(Dtype::Float32).unwrap();
        assert_eq!((keys.shape(), values.shape()), (&[1, 2, 256, 1][..], &[1, 2, 256, 1][..]));
        assert_eq!(cache.len(), 256);
        assert!(cache.next_place(Dtype::Float32).is_none(), "full");
        cache.truncate(1);
        assert!(cache.next_place(Dtype::Float32).is_some());
    }

    #[test]
    fn rows_join_and_part_with_their_last_positions_side_by_side() {
        let (mut long, mut short) = (KvCache::default(), KvCache::default());
        long.extend(&positions(10, 3), &positions(0, 3)).unwrap();
        short.extend(&positions(20, 1), &positions(0, 1)).unwrap();
        let mut both = KvCache::lay(&[all(&long, &[0]), all(&short, &[0])], 1).unwrap();
        let next = concatenate(&[positions(13, 1), positions(21, 1)], 0).unwrap();
        let (keys, _) = both.extend(&next, &next).unwrap();
        assert_eq!(keys.shape(), [2, 2, 4, 1]);
        let rows = values(&keys);
        assert_eq!(rows[..4], [10.0, 11.0, 12.0, 13.0]);
        assert_eq!(rows[8..12], [0.0, 0.0, 20.0, 21.0]);

        let second = Rows { cache: &both, rows: &[1], from: 2 };
        let mut second = KvCache::lay(&[second], 1).unwrap();
        assert_eq!(second.len(), 2);
        let (keys, _) = second.extend(&positions(22, 1), &positions(0, 1)).unwrap();
        assert_eq!(values(&keys), [20.0, 21.0, 22.0, 1020.0, 1021.0, 1022.0]);
    }

    #[test]
    fn rows_move_in_runs() {
        let of = |rows: &[i32]| runs(rows).collect::<Vec<_>>();
        assert_eq!(of(&[]), []);
        assert_eq!(of(&[0, 1, 2, 5, 7, 8]), [0..3, 5..6, 7..9]);
    }

    #[test]
    fn buffers_have_room_for_what_is_asked() {
        for (len, expect) in [(1, 256), (256, 256), (257, 512), (513, 768)] {
            assert_eq!(capacity(len), expect);
        }
    }
}
