//! Which sequences are fed together in one pass, and what their attention needs to know: rows of several sequences
//! lie in common buffers, their last positions side by side, with padding before the shorter ones. Owns that layout;
//! never computes attention, and never decides what is fed.
//!
//! Outside attention a pass of several sequences looks like one sequence: hidden states are `[1, rows, features]`, one
//! position per row.

mod pass;

use std::collections::BTreeSet;

use mlx_rs::error::Exception;

pub(crate) use self::pass::{LayerCache, Offset, Part, Pass, Place};
use crate::cache::{COPY_BYTES_MAX, Copies, KvCache, Rows, capacity};

/// Names a sequence's place in the caches; never used twice.
pub(crate) type RowId = u64;

/// How many positions may be padding for a row that holds `held`: reading some that do not count costs less than one
/// more pass of attention per layer.
const fn padding_max(held: i32) -> i32 {
    held / 4 + 64
}

/// The most positions of memory that sequences of so many tokens take up while they are decoded together, however
/// they come to lie beside each other.
pub fn cache_positions(tokens: impl IntoIterator<Item = usize>) -> usize {
    // Room for what is reckoned below.
    let clamped = |tokens| i32::try_from(tokens).unwrap_or(i32::MAX / 2).min(i32::MAX / 2);
    let mut held: Vec<i32> = tokens.into_iter().map(clamped).collect();
    held.sort_unstable();
    let positions = |&own: &i32| {
        // Common buffers are as long as their longest row. Behind a shorter one padding is bounded more tightly, so
        // that none is longer than this row itself allows.
        let longest = held.partition_point(|other| *other <= own + padding_max(own)) - 1;
        capacity(held[longest]) as usize
    };
    held.iter().map(positions).fold(0, usize::saturating_add)
}

/// One sequence in a [`Segment`].
#[derive(Clone, Copy, Debug)]
struct Member {
    row: RowId,
    /// Positions of the buffers before its own first.
    padding: i32,
}

/// Sequences in common buffers.
struct Segment {
    members: Vec<Member>,
    /// One per layer.
    caches: Vec<KvCache>,
}

impl Segment {
    fn len(&self) -> i32 {
        self.caches.first().map_or(0, KvCache::len)
    }

    /// What the shortest row holds.
    fn held_min(&self) -> i32 {
        self.len() - self.members.iter().map(|m| m.padding).max().unwrap_or(0)
    }

    /// What decides whether rows may lie in common buffers.
    fn extent(&self) -> Extent {
        Extent { longest: self.len(), shortest: self.held_min() }
    }

    /// All rows of `segments` in common buffers.
    fn join(segments: Vec<Self>, copies: &mut Copies) -> Result<Self, Exception> {
        let longest = segments.iter().map(Self::len).max().unwrap_or(0);
        let (mut members, mut layers) = (Vec::new(), Vec::new());
        let mut rows: Vec<Vec<i32>> = Vec::new();
        for segment in segments {
            let shift = longest - segment.len();
            rows.push((0..segment.members.len() as i32).collect());
            let shifted = segment.members.into_iter();
            members.extend(shifted.map(|m| Member { padding: m.padding + shift, ..m }));
            layers.push(segment.caches.into_iter());
        }
        let mut caches = Vec::new();
        loop {
            let old: Vec<KvCache> = layers.iter_mut().filter_map(Iterator::next).collect();
            if old.is_empty() {
                return Ok(Self { members, caches });
            }
            let parts = old.iter().zip(&rows);
            let parts: Vec<Rows<'_>> =
                parts.map(|(cache, rows)| Rows { cache, rows, from: 0 }).collect();
            let new = KvCache::lay(&parts, 1)?;
            copies.replaced(old, std::slice::from_ref(&new))?;
            caches.push(new);
        }
    }

    /// The rows of each of `sides`, by their places, in buffers of their own without padding that all of them have.
    /// Rows on no side are gone.
    fn split(self, sides: &[Vec<i32>], copies: &mut Copies) -> Result<Vec<Self>, Exception> {
        let mut parts = Vec::with_capacity(sides.len());
        let mut spare = Vec::with_capacity(sides.len());
        for side in sides {
            let members = || side.iter().map(|place| self.members[*place as usize]);
            let from = members().map(|m| m.padding).min().unwrap_or(0);
            let members = members().map(|m| Member { padding: m.padding - from, ..m }).collect();
            parts.push(Self { members, caches: Vec::with_capacity(self.caches.len()) });
            spare.push(from);
        }
        for cache in self.caches {
            let lay = |(rows, &from): (&Vec<i32>, &i32)| {
                KvCache::lay(&[Rows { cache: &cache, rows, from }], 1)
            };
            let new: Vec<KvCache> = sides.iter().zip(&spare).map(lay).collect::<Result<_, _>>()?;
            copies.replaced(vec![cache], &new)?;
            parts.iter_mut().zip(new).for_each(|(part, cache)| part.caches.push(cache));
        }
        Ok(parts)
    }

    /// Makes room for `positions` more.
    fn grow(&mut self, positions: i32, copies: &mut Copies) -> Result<(), Exception> {
        let rows: Vec<i32> = (0..self.members.len() as i32).collect();
        for cache in self.caches.iter_mut().filter(|cache| cache.is_full_for(positions)) {
            let whole = Rows { cache, rows: &rows, from: 0 };
            let larger = KvCache::lay(&[whole], positions)?;
            let old = std::mem::replace(cache, larger);
            copies.replaced(vec![old], std::slice::from_ref(cache))?;
        }
        Ok(())
    }
}

/// What the rows of some buffers hold.
#[derive(Clone, Copy)]
struct Extent {
    longest: i32,
    shortest: i32,
}

impl Extent {
    /// That of the rows of both in common buffers; none if they may not lie there.
    fn with(self, other: Self) -> Option<Self> {
        let longest = self.longest.max(other.longest);
        let shortest = self.shortest.min(other.shortest);
        let fits = shortest > 0 && longest - shortest <= padding_max(shortest);
        fits.then_some(Self { longest, shortest })
    }
}

/// The caches of all open sequences.
pub(crate) struct Segments {
    list: Vec<Segment>,
    /// Closed rows that still lie beside others.
    gone: BTreeSet<RowId>,
    /// Until the next pass.
    copies: Copies,
}

impl Default for Segments {
    fn default() -> Self {
        Self::new(COPY_BYTES_MAX)
    }
}

impl Segments {
    fn new(copy_bytes_max: usize) -> Self {
        Self { list: Vec::new(), gone: BTreeSet::new(), copies: Copies::new(copy_bytes_max) }
    }

    /// Makes an empty cache of `layers` layers.
    pub(crate) fn open(&mut self, row: RowId, layers: usize) {
        let caches = (0..layers).map(|_| KvCache::default()).collect();
        self.list.push(Segment { members: vec![Member { row, padding: 0 }], caches });
    }

    /// Frees a row's memory: at once if no other lies beside it, else with the next pass.
    pub(crate) fn close(&mut self, row: RowId) {
        self.gone.insert(row);
        let gone = &mut self.gone;
        self.list.retain(|segment| {
            let over = segment.members.iter().all(|m| gone.contains(&m.row));
            if over {
                segment.members.iter().for_each(|m| {
                    gone.remove(&m.row);
                });
            }
            !over
        });
    }

    /// Gives `row` buffers of its own and forgets its last `count` positions.
    pub(crate) fn truncate(&mut self, row: RowId, count: i32) -> Result<(), Exception> {
        self.part(&BTreeSet::from([row]))?;
        for segment in self.list.iter_mut().filter(|s| s.members.iter().any(|m| m.row == row)) {
            segment.caches.iter_mut().for_each(|cache| cache.truncate(count));
        }
        Ok(())
    }

    /// Brings the rows `wanted` into as few buffers as their lengths allow, and everything else out of these. Returns
    /// them in the order in which a pass feeds them, the same on all ranks.
    pub(crate) fn gather(&mut self, wanted: &BTreeSet<RowId>) -> Result<Vec<RowId>, Exception> {
        self.part(wanted)?;
        let mut index = 0;
        while index < self.list.len() {
            if self.is_wanted(index, wanted) {
                let mut extent = self.list[index].extent();
                let mut together = Vec::new();
                let mut other = index + 1;
                while other < self.list.len() {
                    let joint = extent.with(self.list[other].extent());
                    match joint.filter(|_| self.is_wanted(other, wanted)) {
                        Some(joint) => {
                            extent = joint;
                            together.push(self.list.remove(other));
                        }
                        None => other += 1,
                    }
                }
                if !together.is_empty() {
                    together.insert(0, self.list.remove(index));
                    self.list.insert(index, Segment::join(together, &mut self.copies)?);
                }
            }
            index += 1;
        }
        let of = |s: &Segment| s.members.iter().map(|m| m.row).collect::<Vec<_>>();
        Ok(self.list.iter().flat_map(of).filter(|row| wanted.contains(row)).collect())
    }

    /// A pass that feeds `positions` positions to each of the rows `wanted`; several only to a single row. The rows
    /// have been gathered.
    pub(crate) fn pass(
        &mut self,
        wanted: &BTreeSet<RowId>,
        positions: i32,
    ) -> Result<Pass<'_>, Exception> {
        let is_fed = |s: &&mut Segment| s.members.iter().any(|m| wanted.contains(&m.row));
        let mut fed: Vec<&mut Segment> = self.list.iter_mut().filter(is_fed).collect();
        let copies = &mut self.copies;
        fed.iter_mut().try_for_each(|segment| segment.grow(positions, copies))?;
        copies.leave_to_step();
        Pass::new(fed, positions)
    }

    fn is_wanted(&self, index: usize, wanted: &BTreeSet<RowId>) -> bool {
        self.list[index].members.first().is_some_and(|m| wanted.contains(&m.row))
    }

    /// Separates the rows `wanted` from all others, and drops those that are gone from where they were.
    fn part(&mut self, wanted: &BTreeSet<RowId>) -> Result<(), Exception> {
        let gone = std::mem::take(&mut self.gone);
        let mut list = Vec::with_capacity(self.list.len());
        for segment in self.list.drain(..) {
            let places = |side: bool| {
                let here = segment.members.iter().zip(0..);
                let is_here = |row| wanted.contains(&row) == side && !gone.contains(&row);
                here.filter(|(m, _)| is_here(m.row)).map(|(_, place)| place).collect::<Vec<i32>>()
            };
            let mut sides = vec![places(true), places(false)];
            sides.retain(|side| !side.is_empty());
            match sides.as_slice() {
                [all] if all.len() == segment.members.len() => list.push(segment),
                sides => list.extend(segment.split(sides, &mut self.copies)?),
            }
        }
        self.list = list;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use mlx_rs::ops::{concatenate, zeros_dtype};
    use mlx_rs::transforms::eval;
    use mlx_rs::{Array, Dtype};

    use super::*;

    fn keys(value: f32, n: i32) -> Array {
        Array::from_slice(&vec![value; n as usize], &[1, 1, n, 1])
    }

    /// Opens rows that hold so many positions; every layer holds the row's number.
    fn segments(held: &[(RowId, i32)]) -> Segments {
        let mut all = Segments::default();
        for &(row, n) in held {
            all.open(row, 2);
            let mut pass = all.pass(&BTreeSet::from([row]), n).unwrap();
            for layer in 0..2 {
                let keys = keys(row as f32, n);
                pass.layer(layer).parts[0].extend(&keys, &keys).unwrap();
            }
        }
        all
    }

    /// Rows of each segment with their padding.
    fn layout(all: &Segments) -> Vec<Vec<(RowId, i32)>> {
        let of = |s: &Segment| s.members.iter().map(|m| (m.row, m.padding)).collect();
        all.list.iter().map(of).collect()
    }

    #[test]
    fn only_a_sequence_that_is_fed_alone_has_a_place() {
        let mut all = segments(&[(1, 10), (2, 40)]);
        let one = BTreeSet::from([1]);
        let mut pass = all.pass(&one, 1).unwrap();
        for layer in 0..2 {
            let mut cache = pass.layer(layer);
            let place = cache.next_place(Dtype::Float32).unwrap();
            assert_eq!(place.position.as_slice::<i32>(), [10]);
            assert_eq!(place.keys.shape(), [1, 1, 256, 1]);
            assert_eq!(cache.parts[0].cache.len(), 11);
        }
        let both = BTreeSet::from([1, 2]);
        all.gather(&both).unwrap();
        let mut pass = all.pass(&both, 1).unwrap();
        assert!(pass.layer(0).next_place(Dtype::Float32).is_none());
        assert_eq!(pass.layer(0).parts[0].cache.len(), 40);
    }

    #[test]
    fn rows_of_like_length_share_buffers() {
        let mut all = segments(&[(1, 10), (2, 40), (3, 900), (4, 1000), (5, 7)]);
        let wanted = BTreeSet::from([1, 2, 3, 4]);
        assert_eq!(all.gather(&wanted).unwrap(), [1, 2, 3, 4]);
        assert_eq!(layout(&all), [vec![(1, 30), (2, 0)], vec![(3, 100), (4, 0)], vec![(5, 0)]]);
        // The longest leaves: what all others had before them goes, too.
        all.close(2);
        assert_eq!(all.gather(&BTreeSet::from([1, 3, 4])).unwrap(), [1, 3, 4]);
        assert_eq!(layout(&all)[0], [(1, 0)]);
        assert_eq!(all.list[0].len(), 10);
        // One of two is fed alone: it gets buffers of its own.
        assert_eq!(all.gather(&BTreeSet::from([3])).unwrap(), [3]);
        assert_eq!(layout(&all)[1..], [vec![(3, 0)], vec![(4, 0)], vec![(5, 0)]]);
        assert_eq!(all.list[1].len(), 900);
        for row in [1, 3, 4, 5] {
            all.close(row);
        }
        assert!(all.list.is_empty() && all.gone.is_empty());
    }

    #[test]
    fn a_row_that_is_cut_leaves_the_others() {
        let mut all = segments(&[(1, 10), (2, 12)]);
        all.gather(&BTreeSet::from([1, 2])).unwrap();
        all.truncate(1, 1).unwrap();
        assert_eq!(layout(&all), [vec![(1, 0)], vec![(2, 0)]]);
        assert_eq!(all.list.iter().map(Segment::len).collect::<Vec<_>>(), [9, 12]);
    }

    #[test]
    fn padding_is_hidden_and_offsets_do_not_count_it() {
        let mut all = segments(&[(1, 1), (2, 3)]);
        let wanted = BTreeSet::from([1, 2]);
        all.gather(&wanted).unwrap();
        let mut pass = all.pass(&wanted, 1).unwrap();
        let mut layer = pass.layer(1);
        assert_eq!(layer.rows(), 2);
        let Offset::ByRow(offsets) = layer.offset(0) else { panic!("rows differ") };
        assert_eq!(offsets.to_vec_exact::<i32>().unwrap(), [1, 3]);
        let next = concatenate(&[keys(1.0, 1), keys(2.0, 1)], 0).unwrap();
        let (held, _) = layer.parts[0].extend(&next, &next).unwrap();
        let held = held.reshape(&[2, 1, 1, 4]).unwrap();
        let shown = layer.parts[0].hide(held).unwrap().flatten(None, None).unwrap();
        let least = f32::MIN;
        let expect = [least, least, 1.0, 1.0, 2.0, 2.0, 2.0, 2.0];
        assert_eq!(shown.to_vec_exact::<f32>().unwrap(), expect);
    }

    #[test]
    fn sequences_take_what_they_hold_and_the_padding_that_they_can_have() {
        let check = |tokens: &[usize], expect| {
            assert_eq!(cache_positions(tokens.iter().copied()), expect, "{tokens:?}");
        };
        check(&[], 0);
        check(&[1], 256);
        check(&[1024], 1024);
        // Rows of one length have no padding.
        check(&[250; 4], 1024);
        // The second may lie beside the third, which is longer; the first is too short for that.
        check(&[100, 250, 300], 256 + 512 + 512);
        check(&[100_000, 99_000, 1], 2 * 100_096 + 256);
        check(&[usize::MAX], capacity(i32::MAX / 2) as usize);
    }

    const LAYERS: usize = 8;
    /// Of keys or values of one position in a layer: one head of four float32.
    const POSITION_BYTES: usize = 16;

    /// Feeds as many positions to each row, and waits for it.
    fn feed(all: &mut Segments, rows: &BTreeSet<RowId>, positions: i32) {
        let mut pass = all.pass(rows, positions).unwrap();
        let shape = [rows.len() as i32, 1, positions, 4];
        for layer in 0..LAYERS {
            let keys = zeros_dtype(&shape, Dtype::Float32).unwrap();
            let fed = |[keys]: [Array; 1], part: &mut Part<'_>| {
                part.extend(&keys, &keys)?;
                Ok(keys)
            };
            pass.layer(layer).each([keys], fed).unwrap();
        }
        eval(pass.arrays()).unwrap();
    }

    #[test]
    fn what_is_held_never_exceeds_what_is_counted_but_for_copies() {
        let limit = 1 << 20;
        let mut all = Segments::new(limit);
        let mut held: BTreeMap<RowId, usize> = BTreeMap::new();
        let base = mlx_rs::memory::active_memory().unwrap();
        let (mut worst, mut most) = (0, 0);
        // Rows come, grow together and go.
        for step in 0..60_u64 {
            let now = held.clone();
            mlx_rs::memory::reset_peak_memory().unwrap();
            if step.is_multiple_of(4) {
                let tokens = 3000 + 40 * step as i32;
                all.open(step, LAYERS);
                feed(&mut all, &BTreeSet::from([step]), tokens);
                held.insert(step, tokens as usize);
            }
            if step % 12 == 11 {
                let leaves = *held.keys().nth(held.len() / 2).unwrap();
                all.close(leaves);
                held.remove(&leaves);
            }
            let rows: BTreeSet<RowId> = held.keys().copied().collect();
            all.gather(&rows).unwrap();
            feed(&mut all, &rows, 1);
            held.values_mut().for_each(|tokens| *tokens += 1);
            // Neither before nor after the step, whatever moves.
            let counted = [&now, &held].map(|h| cache_positions(h.values().copied()));
            let counted = counted.into_iter().max().unwrap() * LAYERS * 2 * POSITION_BYTES;
            let peak = mlx_rs::memory::peak_memory().unwrap() - base;
            let beside = peak.saturating_sub(counted);
            worst = worst.max(beside);
            most = most.max(counted);
        }
        // Far less than all of it twice.
        let layer = most / LAYERS;
        assert!(most > 8 * limit, "{most}");
        assert!(worst <= limit + layer, "{worst} beside {most}");
    }
}
