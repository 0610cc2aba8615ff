//! Bytes of tensors, read by several threads to where they belong, and looked at on the way: values that are NaN or
//! infinite are refused. Owns how regions lie in files; knows nothing of models.

use std::fs::File;
use std::io;
use std::mem::MaybeUninit;
use std::num::NonZero;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use mlx_rs::Dtype;

use super::error::LoadError;
use super::finite::first_not_finite;
use super::header::Entry;
use crate::mlx::read_exact_at;

/// Runs shorter than this are read with what lies between them: a call each would cost more.
const SHORT_RUN_BYTES: u64 = 16 << 10;
/// Most bytes read at a time with short runs.
const BLOCK_BYTES: u64 = 4 << 20;
/// What one thread takes at a time: long enough to outweigh the taking, short enough for all to end together.
const PORTION_BYTES: u64 = 16 << 20;
/// Read and then looked at, as long as the processor still has it at hand.
const GLANCE_BYTES: usize = 256 << 10;
/// More read no faster, neither from disks nor from the system's cache.
const THREADS_MAX: usize = 8;

/// `start..stop` along one axis of a tensor, all of the others.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Region {
    pub(crate) axis: usize,
    pub(crate) start: i32,
    pub(crate) stop: i32,
}

impl Region {
    /// The region's shape in a tensor of `shape`.
    pub(crate) fn shape(&self, shape: &[i32]) -> Vec<i32> {
        let mut shape = shape.to_vec();
        shape[self.axis] = self.stop - self.start;
        shape
    }

    fn runs(&self, entry: &Entry) -> Runs {
        let product = |dims: &[i32]| dims.iter().map(|&n| n as u64).product::<u64>();
        let count = product(&entry.shape[..self.axis]);
        let stride = entry.length.checked_div(count).unwrap_or(0);
        let one = stride.checked_div(entry.shape[self.axis] as u64).unwrap_or(0);
        let length = (self.stop - self.start) as u64 * one;
        Runs { first: self.start as u64 * one, length, stride, count }
    }
}

/// An open file.
pub(super) struct Source {
    file: File,
    path: PathBuf,
}

impl Source {
    pub(super) fn open(path: &Path) -> Result<Self, LoadError> {
        let path = path.to_owned();
        match File::open(&path) {
            Ok(file) => Ok(Self { file, path }),
            Err(source) => Err(LoadError::Io { path, source }),
        }
    }
}

/// Bytes of one tensor.
pub(super) struct Piece {
    source: Arc<Source>,
    tensor: String,
    entry: Entry,
    runs: Runs,
}

impl Piece {
    pub(super) fn new(
        source: Arc<Source>,
        tensor: &str,
        entry: &Entry,
        region: Option<&Region>,
    ) -> Self {
        let runs = region.map_or_else(|| Runs::whole(entry), |region| region.runs(entry));
        Self { source, tensor: tensor.to_owned(), entry: entry.clone(), runs }
    }

    /// Says where in the tensor the value at byte `at` is.
    fn not_finite(&self, at: u64) -> LoadError {
        let Entry { shape, length, .. } = &self.entry;
        let count: u64 = shape.iter().map(|&n| n as u64).product();
        let value_bytes = length.checked_div(count).unwrap_or(0);
        let mut left = at.checked_div(value_bytes).unwrap_or(0);
        let mut place: Vec<u64> = Vec::with_capacity(shape.len());
        for &n in shape.iter().rev() {
            let n = (n as u64).max(1);
            place.insert(0, left % n);
            left /= n;
        }
        let (path, tensor) = (self.source.path.clone(), self.tensor.clone());
        LoadError::NotFinite { path, tensor, place }
    }
}

/// Bytes of several tensors, one behind the other.
pub(crate) struct Pieces(Vec<Piece>);

/// A part of a piece, and where it goes.
struct Portion<'a> {
    piece: &'a Piece,
    runs: Runs,
    out: &'a mut [MaybeUninit<u8>],
}

impl Portion<'_> {
    fn read(self) -> Result<(), LoadError> {
        let Source { file, path } = &*self.piece.source;
        let Entry { dtype, start, .. } = self.piece.entry;
        match self.runs.read(file, start, dtype, self.out) {
            Ok(None) => Ok(()),
            Ok(Some(at)) => Err(self.piece.not_finite(at)),
            Err(source) => Err(LoadError::Io { path: path.clone(), source }),
        }
    }
}

impl Pieces {
    pub(super) fn new(list: Vec<Piece>) -> Self {
        Self(list)
    }

    /// Reads all of them. `out` is as long as they are.
    pub(crate) fn read(&self, mut out: &mut [MaybeUninit<u8>]) -> Result<(), LoadError> {
        let mut portions = Vec::new();
        for piece in &self.0 {
            for runs in piece.runs.portions() {
                let (own, rest) = out.split_at_mut((runs.length * runs.count) as usize);
                out = rest;
                portions.push(Portion { piece, runs, out: own });
            }
        }
        assert!(out.is_empty(), "an array has as many bytes as its pieces");
        let cores = thread::available_parallelism().map_or(1, NonZero::get);
        let threads = portions.len().min(cores).min(THREADS_MAX);
        if threads < 2 {
            return portions.into_iter().try_for_each(Portion::read);
        }
        let left = Mutex::new(portions.into_iter());
        let next = || left.lock().unwrap_or_else(PoisonError::into_inner).next();
        let work = || {
            while let Some(portion) = next() {
                portion.read()?;
            }
            Ok(())
        };
        thread::scope(|scope| {
            let others: Vec<_> = (1..threads).map(|_| scope.spawn(work)).collect();
            let own = work();
            let join = |thread: thread::ScopedJoinHandle<'_, _>| {
                thread.join().expect("reading does not panic")
            };
            others.into_iter().map(join).fold(own, Result::and)
        })
    }
}

/// Byte runs of one length at one distance, from the start of a tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Runs {
    first: u64,
    length: u64,
    stride: u64,
    count: u64,
}

impl Runs {
    fn whole(entry: &Entry) -> Self {
        Self { first: 0, length: entry.length, stride: entry.length, count: 1 }
    }

    /// The same bytes in the same order, in parts that one thread reads.
    fn portions(self) -> Vec<Self> {
        let Self { first, length, stride, count } = self;
        let steps = |total: u64, step: u64| {
            (0..total).step_by(step as usize).map(move |at| (at, step.min(total - at)))
        };
        if count == 1 {
            let part = |(at, length)| Self { first: first + at, length, stride: length, count: 1 };
            return steps(length, PORTION_BYTES).map(part).collect();
        }
        let each = (PORTION_BYTES / stride.max(1)).max(1);
        let part = |(run, count)| Self { first: first + run * stride, length, stride, count };
        steps(count, each).map(part).collect()
    }

    /// Reads them of the tensor of `dtype` that starts at `start` of `file`. Returns the byte of the tensor where a
    /// value is not finite, if there is one.
    fn read(
        self,
        file: &File,
        start: u64,
        dtype: Dtype,
        out: &mut [MaybeUninit<u8>],
    ) -> io::Result<Option<u64>> {
        let Self { first, length, stride, count } = self;
        let size = length as usize;
        if size == 0 {
            return Ok(None);
        }
        if count == 1 || length >= SHORT_RUN_BYTES {
            for (run, out) in (0..count).zip(out.chunks_exact_mut(size)) {
                let at = first + run * stride;
                let found = read_and_look(file, start, at, dtype, out)?;
                if found.is_some() {
                    return Ok(found);
                }
            }
            return Ok(None);
        }
        let per_block = (BLOCK_BYTES / stride.max(1)).clamp(1, count);
        let mut block = Vec::new();
        for (index, out) in (0..).zip(out.chunks_mut(per_block as usize * size)) {
            let runs = out.len() / size;
            block.resize((runs - 1) * stride as usize + size, MaybeUninit::uninit());
            let begin = first + index * per_block * stride;
            let bytes = read_exact_at(file, &mut block, start + begin)?;
            let own = |run: usize| run * stride as usize..run * stride as usize + size;
            let look = |run| Some(own(run).start + first_not_finite(&bytes[own(run)], dtype)?);
            if let Some(place) = (0..runs).find_map(look) {
                return Ok(Some(begin + place as u64));
            }
            for (run, out) in out.chunks_exact_mut(size).enumerate() {
                out.copy_from_slice(&block[own(run)]);
            }
        }
        Ok(None)
    }
}

/// Reads bytes `at` and on of the tensor that starts at `start` of `file`; otherwise as [`Runs::read`].
fn read_and_look(
    file: &File,
    start: u64,
    at: u64,
    dtype: Dtype,
    out: &mut [MaybeUninit<u8>],
) -> io::Result<Option<u64>> {
    for (glance, out) in (0..).zip(out.chunks_mut(GLANCE_BYTES)) {
        let at = at + glance * GLANCE_BYTES as u64;
        let bytes = read_exact_at(file, out, start + at)?;
        if let Some(place) = first_not_finite(bytes, dtype) {
            return Ok(Some(at + place as u64));
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    /// Elements of a `[a, b, c]` tensor of bytes that a region holds, by their indices.
    fn expect(shape: [i32; 3], region: &Region) -> Vec<u8> {
        let mut found = Vec::new();
        let [a, b, c] = shape;
        for (i, index) in (0..a)
            .flat_map(|x| (0..b).flat_map(move |y| (0..c).map(move |z| [x, y, z])))
            .enumerate()
        {
            if (region.start..region.stop).contains(&index[region.axis]) {
                found.push((i % 251) as u8);
            }
        }
        found
    }

    fn read(pieces: Pieces, length: usize) -> Vec<u8> {
        crate::mlx::init();
        let fill = Box::new(move |out: &mut [MaybeUninit<u8>]| pieces.read(out).is_ok());
        let array = crate::mlx::read_array(&[length as i32], Dtype::Uint8, fill).unwrap();
        array.as_slice::<u8>().to_vec()
    }

    #[test]
    fn regions_are_read_whatever_their_axis_and_length() {
        // The first has runs of both kinds; the second more short runs than a block holds.
        for shape in [[3, 5, 20_000], [2, 70, 70_000]] {
            let length = shape.iter().product::<i32>() as usize;
            let bytes: Vec<u8> = (0..length).map(|i| (i % 251) as u8).collect();
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("file");
            let mut file = File::create(&path).unwrap();
            file.write_all(b"header").unwrap();
            file.write_all(&bytes).unwrap();
            let source = Arc::new(Source::open(&path).unwrap());
            let length = length as u64;
            let entry = Entry { dtype: Dtype::Uint8, shape: shape.to_vec(), start: 6, length };
            let mut all = (Vec::new(), Vec::new());
            for (axis, start, stop) in
                [(0, 1, 2), (0, 0, 2), (1, 2, 4), (2, 0, 7), (2, 9_000, 9_100), (2, 10, 20_000)]
            {
                let region = Region { axis, start, stop };
                let expected = expect(shape, &region);
                let piece = || Piece::new(source.clone(), "t", &entry, Some(&region));
                let found = read(Pieces::new(vec![piece()]), expected.len());
                assert!(found == expected, "{region:?} of {shape:?}");
                all.0.push(piece());
                all.1.extend(expected);
            }
            let whole = Piece::new(source.clone(), "t", &entry, None);
            all.0.push(whole);
            all.1.extend(bytes);
            assert!(read(Pieces::new(all.0), all.1.len()) == all.1, "{shape:?}");
        }
    }

    #[test]
    fn several_threads_read_what_one_would() {
        let length = 2 * PORTION_BYTES as usize + 12_345;
        let bytes: Vec<u8> = (0..=250).cycle().take(length).collect();
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        std::fs::write(&path, &bytes).unwrap();
        let source = Arc::new(Source::open(&path).unwrap());
        let (shape, length) = (vec![length as i32], length as u64);
        let entry = Entry { dtype: Dtype::Uint8, shape, start: 0, length };
        let pieces = Pieces::new(vec![Piece::new(source, "t", &entry, None)]);
        assert!(read(pieces, bytes.len()) == bytes);
    }

    #[test]
    fn a_file_that_ends_early_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("short");
        std::fs::write(&path, [0; 100]).unwrap();
        let source = Arc::new(Source::open(&path).unwrap());
        let entry = Entry { dtype: Dtype::Uint8, shape: vec![200], start: 6, length: 200 };
        let pieces = Pieces::new(vec![Piece::new(source, "t", &entry, None)]);
        let error = pieces.read(&mut [MaybeUninit::uninit(); 200]).unwrap_err();
        assert!(matches!(&error, LoadError::Io { path: named, .. } if *named == path), "{error}");
    }

    #[test]
    fn a_value_that_is_none_is_found_where_it_is_read() {
        // Runs that are read in blocks, runs that are read one by one, and all at once.
        for (shape, region) in [
            ([4, 1000, 3], Some(Region { axis: 2, start: 1, stop: 2 })),
            ([4, 3, 9000], Some(Region { axis: 1, start: 1, stop: 2 })),
            ([2, 3, 5_000_000], None),
        ] {
            let count = shape.iter().product::<i32>() as usize;
            let mut bytes = vec![0_u8; count * 2];
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("file");
            let [_, b, c] = shape.map(|n| n as usize);
            let place = [1, 1, if c == 3 { 1 } else { c - 1 }];
            let beside = [1, 0, 0];
            for (place, found) in [(beside, region.is_none()), (place, true)] {
                let at = ((place[0] * b + place[1]) * c + place[2]) * 2;
                bytes[at..at + 2].copy_from_slice(&[0x80, 0x7f]);
                std::fs::write(&path, &bytes).unwrap();
                bytes[at..at + 2].fill(0);
                let source = Arc::new(Source::open(&path).unwrap());
                let length = bytes.len() as u64;
                let (dtype, shape) = (Dtype::Bfloat16, shape.to_vec());
                let entry = Entry { dtype, shape: shape.clone(), start: 0, length };
                let out = region.as_ref().map_or(shape.clone(), |region| region.shape(&shape));
                let out = out.iter().product::<i32>() as usize * 2;
                let pieces = Pieces::new(vec![Piece::new(source, "t", &entry, region.as_ref())]);
                match pieces.read(&mut vec![MaybeUninit::uninit(); out]) {
                    Ok(()) => assert!(!found, "{shape:?}"),
                    Err(LoadError::NotFinite { tensor, place: named, .. }) => {
                        assert!(found, "{shape:?} {named:?}");
                        let expect = place.map(|n| n as u64);
                        assert_eq!((tensor.as_str(), named), ("t", expect.to_vec()));
                    }
                    Err(other) => panic!("{other}"),
                }
            }
        }
    }

    #[test]
    fn portions_are_the_whole_in_order() {
        for (length, count) in [(100, 1), (PORTION_BYTES * 2 + 5, 1), (3 << 20, 40), (7, 9_000_000)]
        {
            let runs = Runs { first: 11, length, stride: length + 3, count };
            let mut next = 0;
            for part in runs.portions() {
                let at = if count == 1 { next } else { next / length * (length + 3) };
                assert_eq!(part.first, 11 + at);
                next += part.length * part.count;
            }
            assert_eq!(next, length * count);
        }
    }
}
