//! Which sequences are fed together in one pass, and what their attention needs to know: rows of several sequences
//! lie in common buffers, their last positions side by side, with padding before the shorter ones. Owns that layout;
//! never computes attention, and never decides what is fed.
//!
//! Outside attention a pass of several sequences looks like one sequence: hidden states are `[1, rows, features]`, one
//! position per row.

use std::collections::BTreeSet;

use mlx_rs::Array;
use mlx_rs::error::Exception;
use mlx_rs::fast::ScaledDotProductAttentionMask as Mask;
use mlx_rs::ops::{arange, concatenate, select};

use crate::cache::{KvCache, capacity};
use crate::mlx::slice;
use crate::nn::least;

/// Names a sequence's place in the caches; never used twice.
pub(crate) type RowId = u64;

/// How many positions may be padding for a row that holds `held`: reading some that do not count costs less than one
/// more pass of attention per layer.
const fn padding_max(held: i32) -> i32 {
    held / 4 + 64
}

/// The most positions of memory that a sequence of `tokens` takes up while it is decoded beside others.
pub fn cache_positions(tokens: usize) -> usize {
    let held = i32::try_from(tokens).unwrap_or(i32::MAX / 2).min(i32::MAX / 2);
    capacity(held + padding_max(held)) as usize
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

    /// Whether the rows of both may lie in common buffers.
    fn goes_with(&self, other: &Self) -> bool {
        let (a, b) = (self.held_min(), other.held_min());
        let longest = self.len().max(other.len());
        a > 0 && b > 0 && longest - a.min(b) <= padding_max(a.min(b))
    }

    fn join(self, other: Self) -> Result<Self, Exception> {
        let (len, other_len) = (self.len(), other.len());
        let longest = len.max(other_len);
        let shifted = |members: Vec<Member>, by: i32| {
            members.into_iter().map(move |m| Member { padding: m.padding + by, ..m })
        };
        let mut members: Vec<Member> = shifted(self.members, longest - len).collect();
        members.extend(shifted(other.members, longest - other_len));
        let caches = self.caches.into_iter().zip(other.caches).map(|(a, b)| a.join(b));
        Ok(Self { members, caches: caches.collect::<Result<_, _>>()? })
    }

    /// The rows that `keep` says, in buffers of their own without padding that all of them have.
    fn part(&self, keep: impl Fn(RowId) -> bool) -> Result<Self, Exception> {
        let kept = self.members.iter().enumerate().filter(|(_, m)| keep(m.row));
        let (indices, members): (Vec<u32>, Vec<Member>) =
            kept.map(|(index, member)| (index as u32, *member)).unzip();
        let spare = members.iter().map(|m| m.padding).min().unwrap_or(0);
        let members = members.into_iter().map(|m| Member { padding: m.padding - spare, ..m });
        let caches = self.caches.iter().map(|cache| cache.take(&indices, spare));
        Ok(Self { members: members.collect(), caches: caches.collect::<Result<_, _>>()? })
    }
}

/// The caches of all open sequences.
#[derive(Default)]
pub(crate) struct Segments {
    list: Vec<Segment>,
    /// Closed rows that still lie beside others.
    gone: BTreeSet<RowId>,
}

impl Segments {
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
                let mut other = index + 1;
                while other < self.list.len() {
                    if self.is_wanted(other, wanted)
                        && self.list[index].goes_with(&self.list[other])
                    {
                        let later = self.list.remove(other);
                        let first = self.list.remove(index);
                        self.list.insert(index, first.join(later)?);
                    } else {
                        other += 1;
                    }
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
        Pass::new(self.list.iter_mut().filter(is_fed).collect(), positions)
    }

    fn is_wanted(&self, index: usize, wanted: &BTreeSet<RowId>) -> bool {
        self.list[index].members.first().is_some_and(|m| wanted.contains(&m.row))
    }

    /// Separates the rows `wanted` from all others, and drops those that are gone from where they were.
    fn part(&mut self, wanted: &BTreeSet<RowId>) -> Result<(), Exception> {
        let gone = std::mem::take(&mut self.gone);
        let mut list = Vec::with_capacity(self.list.len());
        for segment in self.list.drain(..) {
            let fed = segment.members.iter().filter(|m| wanted.contains(&m.row)).count();
            let dropped = segment.members.iter().any(|m| gone.contains(&m.row));
            if !dropped && (fed == 0 || fed == segment.members.len()) {
                list.push(segment);
                continue;
            }
            for side in [true, false] {
                let keep = |row: RowId| wanted.contains(&row) == side && !gone.contains(&row);
                let part = segment.part(keep)?;
                if !part.members.is_empty() {
                    list.push(part);
                }
            }
        }
        self.list = list;
        Ok(())
    }
}

/// Where fed positions are in their sequences.
pub(crate) enum Offset {
    /// The same place in all rows.
    All(i32),
    /// `[rows]`, int32.
    ByRow(Array),
}

/// What all layers have in common about one segment.
struct View {
    rows: i32,
    /// `[rows, 1, 1, held]`, bool: which positions belong to the row, with what is fed. Absent when all do.
    own: Option<Array>,
}

impl View {
    fn new(segment: &Segment) -> Result<Self, Exception> {
        let rows = segment.members.len() as i32;
        let padding: Vec<i32> = segment.members.iter().map(|m| m.padding).collect();
        let own = match padding.iter().all(|p| *p == 0) {
            true => None,
            false => {
                let first = Array::from_slice(&padding, &[rows, 1, 1, 1]);
                Some(arange::<i32, i32>(0, segment.len() + 1, 1)?.ge(&first)?)
            }
        };
        Ok(Self { rows, own })
    }
}

/// One pass through the layers of this rank.
pub(crate) struct Pass<'a> {
    segments: Vec<&'a mut Segment>,
    views: Vec<View>,
    rows: i32,
    /// Of the first position that is fed; several are only fed to a single row.
    offset: Offset,
}

impl<'a> Pass<'a> {
    fn new(segments: Vec<&'a mut Segment>, positions: i32) -> Result<Self, Exception> {
        let views = segments.iter().map(|segment| View::new(segment));
        let views = views.collect::<Result<Vec<_>, _>>()?;
        let rows = views.iter().map(|view| view.rows).sum();
        assert!(rows == 1 || positions == 1, "several positions are fed to one row only");
        let held = |s: &Segment| {
            let len = s.len();
            s.members.iter().map(move |m| len - m.padding).collect::<Vec<_>>()
        };
        let offsets: Vec<i32> = segments.iter().flat_map(|s| held(s)).collect();
        let first = offsets.first().copied().unwrap_or(0);
        let offset = match offsets.iter().all(|offset| *offset == first) {
            true => Offset::All(first),
            false => Offset::ByRow(Array::from_slice(&offsets, &[rows])),
        };
        Ok(Self { segments, views, rows, offset })
    }

    /// Layers that the caches are for.
    pub(crate) fn layers(&self) -> usize {
        self.segments.first().map_or(0, |segment| segment.caches.len())
    }

    /// The caches of one layer.
    pub(crate) fn layer(&mut self, layer: usize) -> LayerCache<'_> {
        let segments = self.segments.iter_mut().zip(&self.views);
        let parts = segments.map(|(s, view)| Part { cache: &mut s.caches[layer], view });
        LayerCache { parts: parts.collect(), rows: self.rows, offset: &self.offset }
    }

    /// The buffers, for evaluation.
    pub(crate) fn arrays(&self) -> Vec<&Array> {
        let caches = self.segments.iter().flat_map(|segment| &segment.caches);
        caches.flat_map(KvCache::arrays).collect()
    }
}

/// What a pass feeds in one layer.
pub(crate) struct LayerCache<'a> {
    parts: Vec<Part<'a>>,
    rows: i32,
    offset: &'a Offset,
}

impl LayerCache<'_> {
    /// Sequences that are fed.
    pub(crate) fn rows(&self) -> i32 {
        self.rows
    }

    /// Where the fed position with this index is; several are only fed to a single row.
    pub(crate) fn offset(&self, index: i32) -> Offset {
        match self.offset {
            Offset::All(offset) => Offset::All(offset + index),
            Offset::ByRow(offsets) => Offset::ByRow(offsets.clone()),
        }
    }

    /// Runs `attend` on the rows of each part of the caches. `inputs` and the result have one entry per row along
    /// their first axis, of four.
    pub(crate) fn each<const N: usize>(
        &mut self,
        inputs: [Array; N],
        attend: impl Fn([Array; N], &mut Part<'_>) -> Result<Array, Exception>,
    ) -> Result<Array, Exception> {
        if let [part] = self.parts.as_mut_slice() {
            return attend(inputs, part);
        }
        let mut outputs = Vec::with_capacity(self.parts.len());
        let mut start = 0;
        for part in &mut self.parts {
            let end = start + part.view.rows;
            let mut own = inputs.clone();
            for input in &mut own {
                let stop = [end, input.dim(1), input.dim(2), input.dim(3)];
                *input = slice(input, &[start, 0, 0, 0], &stop)?;
            }
            outputs.push(attend(own, part)?);
            start = end;
        }
        concatenate(&outputs, 0)
    }
}

/// The caches of one layer for rows whose last positions lie side by side.
pub(crate) struct Part<'a> {
    cache: &'a mut KvCache,
    view: &'a View,
}

impl Part<'_> {
    /// As [`KvCache::extend`].
    pub(crate) fn extend(
        &mut self,
        keys: &Array,
        values: &Array,
    ) -> Result<(Array, Array), Exception> {
        self.cache.extend(keys, values)
    }

    /// What `queries` queries per row, the last that were fed, may look at.
    pub(crate) fn mask(&self, queries: i32) -> Option<Mask<'_>> {
        match &self.view.own {
            Some(own) => Some(Mask::Array(own)),
            None => (queries > 1).then_some(Mask::Causal),
        }
    }

    /// `scores` `[rows, heads, queries, held]`, with the least number of their type where a query may not look.
    pub(crate) fn hide(&self, scores: Array) -> Result<Array, Exception> {
        let (queries, held) = (scores.dim(2), scores.dim(3));
        let seen = match &self.view.own {
            Some(own) => own.clone(),
            None if queries > 1 => {
                let keys = arange::<i32, i32>(0, held, 1)?;
                arange::<i32, i32>(held - queries, held, 1)?.reshape(&[queries, 1])?.ge(&keys)?
            }
            None => return Ok(scores),
        };
        select(seen, &scores, least(scores.dtype())?)
    }
}

#[cfg(test)]
mod tests {
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
    fn a_sequence_takes_at_least_what_it_holds() {
        for tokens in [1, 63, 64, 500, 513, 100_000] {
            let positions = cache_positions(tokens);
            assert!(positions > tokens && positions < tokens + tokens / 3 + 400, "{tokens}");
        }
    }
}
