//! Arrays from bytes and slices with exact bounds. mlx-rs's own have limits (31 bits of size) and add reshapes, which
//! cost a graph node each.

use std::sync::OnceLock;

use mlx_rs::error::Exception;
use mlx_rs::ops::full_like;
use mlx_rs::{Array, Dtype, Stream};

use super::take_error;

/// Ranks of arrays here are at most this: batch, head, position, feature.
const STRIDES: [i32; 4] = [1; 4];

/// A copy of `bytes` as an array. Values are as this machine has them in memory: little-endian.
///
/// # Panics
/// If `bytes` are not as many as shape and type say.
pub(crate) fn from_bytes(bytes: &[u8], shape: &[i32], dtype: Dtype) -> Array {
    let elements: usize = shape.iter().map(|&n| usize::try_from(n).unwrap_or(0)).product();
    assert_eq!(elements * dtype_size(dtype), bytes.len(), "bytes for {shape:?} of {dtype:?}");
    // SAFETY: the bytes are as many as MLX reads, and every bit pattern is a value of these types.
    unsafe { Array::from_raw_data(bytes.as_ptr().cast(), shape, dtype) }
}

/// The same values in the device's own memory. On CUDA arrays made by the host lie in memory that the driver moves
/// page by page; elsewhere there is nothing to do.
pub(crate) fn on_device(array: Array) -> Result<Array, Exception> {
    if !is_cuda() {
        return Ok(array);
    }
    // `array` is still held here, so that MLX can't hand out the same memory again.
    let copy = full_like(&array, &array, array.dtype())?;
    copy.eval()?;
    drop(array);
    // Or the next copy would get the memory that was just given up.
    mlx_rs::memory::clear_cache()?;
    Ok(copy)
}

fn is_cuda() -> bool {
    static FOUND: OnceLock<bool> = OnceLock::new();
    *FOUND.get_or_init(|| {
        let mut found = false;
        // SAFETY: MLX writes to a live place.
        let status = unsafe { mlx_sys::mlx_cuda_is_available(&mut found) };
        status == 0 && found
    })
}

fn dtype_size(dtype: Dtype) -> usize {
    match dtype {
        Dtype::Bool | Dtype::Uint8 | Dtype::Int8 => 1,
        Dtype::Uint16 | Dtype::Int16 | Dtype::Float16 | Dtype::Bfloat16 => 2,
        Dtype::Uint32 | Dtype::Int32 | Dtype::Float32 => 4,
        Dtype::Uint64 | Dtype::Int64 | Dtype::Float64 | Dtype::Complex64 => 8,
    }
}

/// `array[start..stop]` along every axis; `start` and `stop` have one entry per axis.
pub(crate) fn slice(array: &Array, start: &[i32], stop: &[i32]) -> Result<Array, Exception> {
    assert!(start.len() == array.ndim() && stop.len() == start.len() && start.len() <= 4);
    let stream = Stream::thread_local_or_default();
    // SAFETY: pointers and lengths are those of live slices; the result is checked before use.
    unsafe {
        let mut result = mlx_sys::mlx_array_new();
        let status = mlx_sys::mlx_slice(
            &mut result,
            array.as_ptr(),
            start.as_ptr(),
            start.len(),
            stop.as_ptr(),
            stop.len(),
            STRIDES.as_ptr(),
            start.len(),
            stream.as_ptr(),
        );
        finish(status, result)
    }
}

/// A copy of `array` with `update` put at `start..stop`; done in place when nothing else holds `array`'s data.
pub(crate) fn slice_update(
    array: &Array,
    update: &Array,
    start: &[i32],
    stop: &[i32],
) -> Result<Array, Exception> {
    assert!(start.len() == array.ndim() && stop.len() == start.len() && start.len() <= 4);
    let stream = Stream::thread_local_or_default();
    // SAFETY: as in `slice`.
    unsafe {
        let mut result = mlx_sys::mlx_array_new();
        let status = mlx_sys::mlx_slice_update(
            &mut result,
            array.as_ptr(),
            update.as_ptr(),
            start.as_ptr(),
            start.len(),
            stop.as_ptr(),
            stop.len(),
            STRIDES.as_ptr(),
            start.len(),
            stream.as_ptr(),
        );
        finish(status, result)
    }
}

/// # Safety
/// `result` is an array handle that the caller owns.
pub(super) unsafe fn finish(status: i32, result: mlx_sys::mlx_array) -> Result<Array, Exception> {
    if status == 0 {
        // SAFETY: ownership of the handle passes to the array.
        Ok(unsafe { Array::from_ptr(result) })
    } else {
        // SAFETY: the handle is ours and not used again.
        unsafe { mlx_sys::mlx_array_free(result) };
        Err(Exception::custom(take_error()))
    }
}
