//! Slices with exact bounds: mlx-rs's own add reshapes, which cost a graph node each.

use mlx_rs::Array;
use mlx_rs::error::Exception;

use super::ops::stream;
use super::take_error;

/// Ranks of arrays here are at most this: batch, head, position, feature.
const STRIDES: [i32; 4] = [1; 4];

/// `array[start..stop]` along every axis; `start` and `stop` have one entry per axis.
pub(crate) fn slice(array: &Array, start: &[i32], stop: &[i32]) -> Result<Array, Exception> {
    assert!(start.len() == array.ndim() && stop.len() == start.len() && start.len() <= 4);
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
            stream(),
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
            stream(),
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
