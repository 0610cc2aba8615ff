//! Arrays that MLX reads to where they are used: into the device's own memory on CUDA, elsewhere into the array itself.
//! Owns the file that MLX believes to read, which holds one array; never knows of real files.

use std::ffi::{CStr, c_char, c_void};
use std::fs::File;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::AsRawFd;
use std::ptr;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};

use mlx_rs::error::Exception;
use mlx_rs::{Array, Dtype, Stream};
use serde_json::json;

use super::array::finish;

/// The name of the one array.
const NAME: &CStr = c"array";

/// Sets all bytes of an array, as this machine has them in memory; false if that failed. Called once, from any thread.
pub(crate) type Fill = Box<dyn Fn(&mut [MaybeUninit<u8>]) -> bool + Send + Sync>;

/// An array of `shape` whose bytes `fill` sets.
///
/// # Errors
/// `fill` failed, or the device has no memory.
pub(crate) fn read_array(shape: &[i32], dtype: Dtype, fill: Fill) -> Result<Array, Exception> {
    // Only CUDA's backend reads on the device's stream.
    let stream = if is_cuda() { Stream::thread_local_or_default() } else { Stream::cpu() };
    let document = Box::into_raw(Box::new(Document::new(shape, dtype, fill)));
    // SAFETY: `document` is live until MLX calls `free`; every handle is freed once; the array, which holds a reference
    // to the reader, is checked before use.
    let array = unsafe {
        let reader = mlx_sys::mlx_io_reader_new(document.cast(), VTABLE);
        let mut arrays = mlx_sys::mlx_map_string_to_array_new();
        let mut metadata = mlx_sys::mlx_map_string_to_string_new();
        let mut array = mlx_sys::mlx_array_new();
        let mut status = mlx_sys::mlx_load_safetensors_reader(
            &mut arrays,
            &mut metadata,
            reader,
            stream.as_ptr(),
        );
        if status == 0 {
            status = mlx_sys::mlx_map_string_to_array_get(&mut array, arrays, NAME.as_ptr());
        }
        mlx_sys::mlx_map_string_to_array_free(arrays);
        mlx_sys::mlx_map_string_to_string_free(metadata);
        mlx_sys::mlx_io_reader_free(reader);
        finish(status, array)?
    };
    array.eval()?;
    Ok(array)
}

/// Reads exactly as many bytes as `out` takes, from `offset` of `file` on, and returns them.
pub(crate) fn read_exact_at<'a>(
    file: &File,
    out: &'a mut [MaybeUninit<u8>],
    offset: u64,
) -> io::Result<&'a [u8]> {
    let mut done = 0;
    while done < out.len() {
        let rest = &mut out[done..];
        let at = libc::off_t::try_from(offset + done as u64).map_err(io::Error::other)?;
        // SAFETY: the call writes at most as many bytes as `rest` has.
        let read =
            unsafe { libc::pread(file.as_raw_fd(), rest.as_mut_ptr().cast(), rest.len(), at) };
        match usize::try_from(read) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(read) => done += read,
            Err(_) => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
    }
    // SAFETY: every byte has been written.
    Ok(unsafe { std::slice::from_raw_parts(out.as_ptr().cast(), out.len()) })
}

pub(super) fn is_cuda() -> bool {
    static FOUND: OnceLock<bool> = OnceLock::new();
    *FOUND.get_or_init(|| {
        let mut found = false;
        // SAFETY: MLX writes to a live place.
        let status = unsafe { mlx_sys::mlx_cuda_is_available(&mut found) };
        status == 0 && found
    })
}

/// A safetensors file of one array, as MLX asks for its bytes: the head in sequence, the data at once.
struct Document {
    head: Vec<u8>,
    /// How much of the head was read.
    place: AtomicUsize,
    data_length: usize,
    fill: Fill,
}

impl Document {
    fn new(shape: &[i32], dtype: Dtype, fill: Fill) -> Self {
        let (name, size) = described(dtype);
        let elements: usize = shape.iter().map(|&n| usize::try_from(n).unwrap_or(0)).product();
        let data_length = elements * size;
        let entry = json!({"dtype": name, "shape": shape, "data_offsets": [0, data_length]});
        let names = NAME.to_str().expect("it is ASCII");
        let text = json!({ names: entry }).to_string();
        let mut head = (text.len() as u64).to_le_bytes().to_vec();
        head.extend(text.into_bytes());
        Self { head, place: AtomicUsize::new(0), data_length, fill }
    }
}

/// The format's name of a type, and its size in bytes.
fn described(dtype: Dtype) -> (&'static str, usize) {
    match dtype {
        Dtype::Bool => ("BOOL", 1),
        Dtype::Uint8 => ("U8", 1),
        Dtype::Int8 => ("I8", 1),
        Dtype::Uint16 => ("U16", 2),
        Dtype::Int16 => ("I16", 2),
        Dtype::Float16 => ("F16", 2),
        Dtype::Bfloat16 => ("BF16", 2),
        Dtype::Uint32 => ("U32", 4),
        Dtype::Int32 => ("I32", 4),
        Dtype::Float32 => ("F32", 4),
        Dtype::Uint64 => ("U64", 8),
        Dtype::Int64 => ("I64", 8),
        Dtype::Float64 => ("F64", 8),
        Dtype::Complex64 => ("C64", 8),
    }
}

const VTABLE: mlx_sys::mlx_io_vtable = mlx_sys::mlx_io_vtable {
    is_open: Some(is_well),
    good: Some(is_well),
    tell: Some(tell),
    seek: Some(seek),
    read: Some(read),
    read_at_offset: Some(read_at_offset),
    write: Some(write),
    label: Some(label),
    free: Some(free),
};

/// # Safety
/// As all functions here that MLX calls: `document` is the pointer that `read_array` gave it, and not freed yet.
unsafe fn document<'a>(document: *mut c_void) -> &'a Document {
    // SAFETY: see above; nobody has it mutably.
    unsafe { &*document.cast::<Document>() }
}

unsafe extern "C" fn is_well(_: *mut c_void) -> bool {
    true
}

/// MLX asks for this at the end only: it is the length.
unsafe extern "C" fn tell(this: *mut c_void) -> usize {
    // SAFETY: see `document`.
    let this = unsafe { document(this) };
    this.head.len() + this.data_length
}

/// MLX seeks the end, and then where it has been.
unsafe extern "C" fn seek(_: *mut c_void, _offset: i64, _whence: i32) -> i32 {
    0
}

unsafe extern "C" fn read(this: *mut c_void, out: *mut c_char, length: usize) -> usize {
    // SAFETY: see `document`.
    let this = unsafe { document(this) };
    let start = this.place.fetch_add(length, Ordering::Relaxed).min(this.head.len());
    let part = &this.head[start..];
    let length = length.min(part.len());
    // SAFETY: `out` has room for what was asked for, and is none of our memory.
    unsafe { ptr::copy_nonoverlapping(part.as_ptr().cast(), out, length) };
    length
}

unsafe extern "C" fn read_at_offset(
    this: *mut c_void,
    out: *mut c_char,
    length: usize,
    offset: usize,
) -> usize {
    // SAFETY: see `document`.
    let this = unsafe { document(this) };
    if (offset, length) != (this.head.len(), this.data_length) {
        return 0;
    }
    // SAFETY: `out` has room for what was asked for, and nobody else has it now.
    let out = unsafe { std::slice::from_raw_parts_mut(out.cast::<MaybeUninit<u8>>(), length) };
    if (this.fill)(out) { length } else { 0 }
}

unsafe extern "C" fn write(_: *mut c_void, _: *const c_char, _: usize) -> usize {
    0
}

unsafe extern "C" fn label(_: *mut c_void) -> *const c_char {
    NAME.as_ptr()
}

unsafe extern "C" fn free(this: *mut c_void) {
    // SAFETY: see `document`; MLX calls this last, and once.
    drop(unsafe { Box::from_raw(this.cast::<Document>()) });
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filled(bytes: Vec<u8>) -> Fill {
        Box::new(move |out| {
            assert_eq!(out.len(), bytes.len());
            out.iter_mut().zip(&bytes).for_each(|(out, byte)| {
                out.write(*byte);
            });
            true
        })
    }

    #[test]
    fn an_array_has_the_bytes_that_it_was_filled_with() {
        crate::mlx::init();
        let bytes = [1_u32, 7, u32::MAX].iter().flat_map(|n| n.to_le_bytes()).collect();
        let array = read_array(&[3, 1], Dtype::Uint32, filled(bytes)).unwrap();
        assert_eq!((array.shape(), array.as_slice::<u32>()), (&[3, 1][..], &[1, 7, u32::MAX][..]));
        let bytes = vec![0x80, 0x3f, 0x00, 0xc0];
        let array = read_array(&[2], Dtype::Bfloat16, filled(bytes)).unwrap();
        let values: Vec<f32> = array.as_dtype(Dtype::Float32).unwrap().to_vec_exact().unwrap();
        assert_eq!(values, [1.0, -2.0]);
    }

    #[test]
    fn a_failure_to_read_is_an_error() {
        crate::mlx::init();
        let error = read_array(&[2], Dtype::Uint8, Box::new(|_| false)).unwrap_err();
        assert!(error.what().contains("unable to read"), "{}", error.what());
        // Later arrays are well.
        read_array(&[1], Dtype::Uint8, filled(vec![3])).unwrap();
    }
}
