//! One pass through the layers: what of the common buffers each layer is given, and where what is fed belongs. Changes
//! no layout.

use std::cell::OnceCell;

use mlx_rs::error::Exception;
use mlx_rs::fast::ScaledDotProductAttentionMask as Mask;
use mlx_rs::ops::{arange, concatenate, select};
use mlx_rs::{Array, Dtype};

use super::Segment;
use crate::cache::KvCache;
use crate::mlx::slice;
use crate::nn::least;

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
    /// The same as `[1]`, int32, once it was asked for.
    position: OnceCell<Array>,
}

impl<'a> Pass<'a> {
    pub(super) fn new(segments: Vec<&'a mut Segment>, positions: i32) -> Result<Self, Exception> {
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
        Ok(Self { segments, views, rows, offset, position: OnceCell::new() })
    }

    /// Layers that the caches are for.
    pub(crate) fn layers(&self) -> usize {
        self.segments.first().map_or(0, |segment| segment.caches.len())
    }

    /// The caches of one layer.
    pub(crate) fn layer(&mut self, layer: usize) -> LayerCache<'_> {
        let segments = self.segments.iter_mut().zip(&self.views);
        let parts = segments.map(|(s, view)| Part { cache: &mut s.caches[layer], view });
        let (offset, position) = (&self.offset, &self.position);
        LayerCache { parts: parts.collect(), rows: self.rows, offset, position }
    }

    /// The buffers, for evaluation.
    pub(crate) fn arrays(&self) -> Vec<&Array> {
        let caches = self.segments.iter().flat_map(|segment| &segment.caches);
        caches.flat_map(KvCache::arrays).collect()
    }
}

/// What a pass feeds in one layer.
pub(crate) struct LayerCache<'a> {
    pub(super) parts: Vec<Part<'a>>,
    rows: i32,
    offset: &'a Offset,
    position: &'a OnceCell<Array>,
}

/// Where a single fed position is to be put, by whom may write there.
pub(crate) struct Place<'a> {
    /// `[1]`, int32.
    pub(crate) position: &'a Array,
    /// Buffers `[1, kv_heads, capacity, head_dim]`.
    pub(crate) keys: &'a Array,
    pub(crate) values: &'a Array,
}

impl LayerCache<'_> {
    /// Counts the next position of the only sequence that is fed as held, for the caller to put it there. None, and
    /// nothing is counted, if there are several sequences, or no buffers of this type yet.
    pub(crate) fn next_place(&mut self, dtype: Dtype) -> Option<Place<'_>> {
        let ([part], &Offset::All(offset)) = (self.parts.as_mut_slice(), self.offset) else {
            return None;
        };
        // Without padding, places and positions are the same.
        if part.view.rows > 1 || part.view.own.is_some() || part.cache.len() != offset {
            return None;
        }
        let (keys, values) = part.cache.next_place(dtype)?;
        let position = self.position.get_or_init(|| Array::from_slice(&[offset], &[1]));
        Some(Place { position, keys, values })
    }

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
    pub(super) cache: &'a mut KvCache,
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
