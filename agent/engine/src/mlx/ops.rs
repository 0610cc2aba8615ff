//! Operations that every layer of every step uses. mlx-rs's own ask for the default stream and make a handle of it each
//! time, which costs a good part of what they do. Owns no rule about shapes: MLX's hold.

use std::cell::OnceCell;
use std::ptr;

use mlx_rs::error::Exception;
use mlx_rs::fast::ScaledDotProductAttentionMask as Mask;
use mlx_rs::{Array, Stream};

use super::array::finish;

/// This thread's default stream. The handle lives as long as the thread.
pub(super) fn stream() -> mlx_sys::mlx_stream {
    thread_local! {
        static STREAM: OnceCell<Stream> = const { OnceCell::new() };
    }
    STREAM.with(|stream| stream.get_or_init(Stream::default).as_ptr())
}

/// MLX's sign for no array; it owns nothing.
const NONE: mlx_sys::mlx_array = mlx_sys::mlx_array { ctx: ptr::null_mut() };

fn call(operation: impl FnOnce(*mut mlx_sys::mlx_array) -> i32) -> Result<Array, Exception> {
    let mut result = NONE;
    let status = operation(&raw mut result);
    // SAFETY: the handle is ours; it is passed on once.
    unsafe { finish(status, result) }
}

/// As [`mlx_rs::ops::add`].
pub(crate) fn add(a: &Array, b: &Array) -> Result<Array, Exception> {
    // SAFETY: as for all calls here: the handles are live, and the result is a live place.
    call(|result| unsafe { mlx_sys::mlx_add(result, a.as_ptr(), b.as_ptr(), stream()) })
}

/// As [`mlx_rs::ops::multiply`].
pub(super) fn multiply(a: &Array, b: &Array) -> Result<Array, Exception> {
    // SAFETY: as in `add`.
    call(|result| unsafe { mlx_sys::mlx_multiply(result, a.as_ptr(), b.as_ptr(), stream()) })
}

/// As [`mlx_rs::ops::sigmoid`].
pub(super) fn sigmoid(x: &Array) -> Result<Array, Exception> {
    // SAFETY: as in `add`.
    call(|result| unsafe { mlx_sys::mlx_sigmoid(result, x.as_ptr(), stream()) })
}

/// As [`mlx_rs::ops::matmul`].
pub(crate) fn matmul(a: &Array, b: &Array) -> Result<Array, Exception> {
    // SAFETY: as in `add`.
    call(|result| unsafe { mlx_sys::mlx_matmul(result, a.as_ptr(), b.as_ptr(), stream()) })
}

/// As [`Array::reshape`].
pub(crate) fn reshape(x: &Array, shape: &[i32]) -> Result<Array, Exception> {
    // SAFETY: as in `add`; the shape outlives the call.
    call(|result| unsafe {
        mlx_sys::mlx_reshape(result, x.as_ptr(), shape.as_ptr(), shape.len(), stream())
    })
}

/// As [`mlx_rs::fast::rms_norm`].
pub(crate) fn rms_norm(x: &Array, weight: Option<&Array>, eps: f32) -> Result<Array, Exception> {
    let weight = weight.map_or(NONE, Array::as_ptr);
    // SAFETY: as in `add`.
    call(|result| unsafe { mlx_sys::mlx_fast_rms_norm(result, x.as_ptr(), weight, eps, stream()) })
}

/// How positions turn features; see [`crate::nn::Rope`].
#[derive(Clone, Copy)]
pub(crate) struct Turn<'a> {
    pub(crate) dims: i32,
    pub(crate) traditional: bool,
    /// Either this or `periods`.
    pub(crate) base: Option<f32>,
    pub(crate) scale: f32,
    pub(crate) periods: Option<&'a Array>,
}

impl Turn<'_> {
    fn base(self) -> mlx_sys::mlx_optional_float {
        let (value, has_value) = (self.base.unwrap_or(0.0), self.base.is_some());
        mlx_sys::mlx_optional_float { value, has_value }
    }

    /// As [`mlx_rs::fast::rope`]: the first position is `offset`.
    pub(crate) fn all(self, x: &Array, offset: i32) -> Result<Array, Exception> {
        let Self { dims, traditional, scale, periods, .. } = self;
        let (x, periods) = (x.as_ptr(), periods.map_or(NONE, Array::as_ptr));
        // SAFETY: as in `add`.
        call(|result| unsafe {
            let base = self.base();
            mlx_sys::mlx_fast_rope(
                result,
                x,
                dims,
                traditional,
                base,
                scale,
                offset,
                periods,
                stream(),
            )
        })
    }

    /// As [`mlx_rs::fast::rope_dynamic`]: each row has its own first position.
    pub(crate) fn by_row(self, x: &Array, offsets: &Array) -> Result<Array, Exception> {
        let Self { dims, traditional, scale, periods, .. } = self;
        let (x, periods) = (x.as_ptr(), periods.map_or(NONE, Array::as_ptr));
        let offsets = offsets.as_ptr();
        // SAFETY: as in `add`.
        call(|result| unsafe {
            let base = self.base();
            mlx_sys::mlx_fast_rope_dynamic(
                result,
                x,
                dims,
                traditional,
                base,
                scale,
                offsets,
                periods,
                stream(),
            )
        })
    }
}

/// As [`mlx_rs::fast::scaled_dot_product_attention`], without sinks.
pub(crate) fn attend(
    queries: &Array,
    keys: &Array,
    values: &Array,
    scale: f32,
    mask: Option<&Mask<'_>>,
) -> Result<Array, Exception> {
    let (mode, mask) = match mask {
        None => (c"", NONE),
        Some(Mask::Causal) => (c"causal", NONE),
        Some(Mask::Array(mask)) => (c"", mask.as_ptr()),
    };
    // SAFETY: as in `add`; the mode is a constant.
    call(|result| unsafe {
        mlx_sys::mlx_fast_scaled_dot_product_attention(
            result,
            queries.as_ptr(),
            keys.as_ptr(),
            values.as_ptr(),
            scale,
            mode.as_ptr(),
            mask,
            NONE,
            false,
            stream(),
        )
    })
}
