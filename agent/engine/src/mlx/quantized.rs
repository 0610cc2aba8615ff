//! Products with packed matrices. mlx-rs's own know the affine mode only.

use std::ffi::CStr;

use mlx_rs::Array;
use mlx_rs::error::Exception;

use super::array::finish;
use super::ops::stream;

/// A matrix, or a stack of matrices, in one of MLX's packed forms.
#[derive(Clone, Copy)]
pub(crate) struct Quantized<'a> {
    /// Uint32, `[…, rows, columns · bits / 32]`.
    pub(crate) weight: &'a Array,
    /// `[…, rows, columns / group_size]`.
    pub(crate) scales: &'a Array,
    /// As `scales`; only the affine mode has them.
    pub(crate) biases: Option<&'a Array>,
    pub(crate) group_size: i32,
    pub(crate) bits: i32,
    /// MLX's name of the mode.
    pub(crate) mode: &'static CStr,
}

fn optional(value: i32) -> mlx_sys::mlx_optional_int {
    mlx_sys::mlx_optional_int { value, has_value: true }
}

/// An array's handle, or MLX's sign for none, which owns nothing.
fn handle(array: Option<&Array>) -> mlx_sys::mlx_array {
    match array {
        Some(array) => array.as_ptr(),
        // SAFETY: makes an empty handle.
        None => unsafe { mlx_sys::mlx_array_new() },
    }
}

impl Quantized<'_> {
    /// `x · Wᵀ` for `transpose`, else `x · W`.
    pub(crate) fn matmul(&self, x: &Array, transpose: bool) -> Result<Array, Exception> {
        // SAFETY: all handles and the mode's name are live; the result is checked before use.
        unsafe {
            let mut result = mlx_sys::mlx_array_new();
            let status = mlx_sys::mlx_quantized_matmul(
                &mut result,
                x.as_ptr(),
                self.weight.as_ptr(),
                self.scales.as_ptr(),
                handle(self.biases),
                transpose,
                optional(self.group_size),
                optional(self.bits),
                self.mode.as_ptr(),
                stream(),
            );
            finish(status, result)
        }
    }

    /// `x · Wᵀ` with, for each index, its matrix of the stack; `sorted` promises that indices never fall.
    pub(crate) fn gather_matmul(
        &self,
        x: &Array,
        indices: &Array,
        sorted: bool,
    ) -> Result<Array, Exception> {
        // SAFETY: as in `matmul`.
        unsafe {
            let mut result = mlx_sys::mlx_array_new();
            let status = mlx_sys::mlx_gather_qmm(
                &mut result,
                x.as_ptr(),
                self.weight.as_ptr(),
                self.scales.as_ptr(),
                handle(self.biases),
                handle(None),
                indices.as_ptr(),
                true,
                optional(self.group_size),
                optional(self.bits),
                self.mode.as_ptr(),
                sorted,
                stream(),
            );
            finish(status, result)
        }
    }

    /// The values themselves, `[…, rows, columns]`.
    pub(crate) fn dequantize(&self) -> Result<Array, Exception> {
        let dtype =
            mlx_sys::mlx_optional_dtype { value: self.scales.dtype().into(), has_value: false };
        // SAFETY: as in `matmul`.
        unsafe {
            let mut result = mlx_sys::mlx_array_new();
            let status = mlx_sys::mlx_dequantize(
                &mut result,
                self.weight.as_ptr(),
                self.scales.as_ptr(),
                handle(self.biases),
                optional(self.group_size),
                optional(self.bits),
                self.mode.as_ptr(),
                handle(None),
                dtype,
                stream(),
            );
            finish(status, result)
        }
    }
}
