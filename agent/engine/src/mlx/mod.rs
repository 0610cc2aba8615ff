//! The boundary to MLX's C interface: the only place with `unsafe`. Owns what mlx-rs lacks (process groups, exact
//! slices, packed matrices, fused functions, kernels, reading from anywhere, operations at less cost) and error capture for it; never holds model or sequence state.
#![allow(unsafe_code)]

mod array;
mod compiled;
mod device;
pub mod distributed;
pub(crate) mod kernels;
mod ops;
mod peers;
mod quantized;
mod reader;
mod self_test;

pub(crate) use array::{slice, slice_update};
pub(crate) use compiled::{Shapes, Traced, gated};
pub(crate) use device::kind as device_kind;
pub use device::uses_gpu;
pub(crate) use ops::{Turn, add, attend, matmul, reshape, rms_norm};
pub(crate) use quantized::Quantized;
pub(crate) use reader::{read_array, read_exact_at};

use std::cell::RefCell;
use std::ffi::{CStr, c_char, c_void};
use std::sync::Once;

unsafe extern "C" {
    /// mlx-rs's own handler. It keeps messages in a place that only mlx-rs can read.
    fn default_mlx_error_handler(message: *const c_char, data: *mut c_void);
}

thread_local! {
    static LAST_ERROR: RefCell<Option<String>> = const { RefCell::new(None) };
}

/// MLX reports errors on the thread that made the call; both this crate and mlx-rs want them.
extern "C" fn keep_error(message: *const c_char, data: *mut c_void) {
    // SAFETY: MLX passes a valid C string that lives for this call.
    let text = unsafe { CStr::from_ptr(message) }.to_string_lossy().into_owned();
    LAST_ERROR.with_borrow_mut(|last| *last = Some(text));
    // SAFETY: the same arguments, passed on to the handler that mlx-rs would have installed.
    unsafe { default_mlx_error_handler(message, data) }
}

/// Installs the error handler once. Without one, MLX's C layer ends the process on any error.
pub(crate) fn init() {
    static INIT: Once = Once::new();
    INIT.call_once(|| {
        // mlx-rs installs its handler before its first operation; that must come before ours, which replaces it.
        let _ = mlx_rs::memory::active_memory();
        // SAFETY: the handler is a plain function that lives for ever, with no data.
        unsafe { mlx_sys::mlx_set_error_handler(Some(keep_error), std::ptr::null_mut(), None) };
    });
}

/// Ends the process at once, whatever its threads do. `std::process::exit` would run the destructors
/// of MLX's globals, which join threads that may be stuck in a collective.
pub fn exit_now(code: i32) -> ! {
    // SAFETY: always sound; nothing of this process is used after it.
    unsafe { libc::_exit(code) }
}

/// Waits until everything that was submitted to the default stream is done.
pub(crate) fn synchronize() {
    let stream = mlx_rs::Stream::thread_local_or_default();
    // SAFETY: the stream is live. The result says only whether the work failed, which its arrays say as well.
    unsafe { mlx_sys::mlx_synchronize(stream.as_ptr()) };
}

/// The message of the last failed call on this thread.
fn take_error() -> String {
    let message = LAST_ERROR.with_borrow_mut(Option::take);
    message.map_or_else(|| "no reason given".to_owned(), |m| reason(&m).to_owned())
}

/// MLX's message without the place in its own sources that its C layer appends.
pub(crate) fn reason(message: &str) -> &str {
    match message.rsplit_once(" at ") {
        Some((reason, place)) if place.contains(".cpp:") => reason,
        _ => message,
    }
}

/// mlx-rs seeds its unseeded random state from this clock, which only macOS has. Nothing here draws unseeded, so
/// any clock serves.
#[cfg(not(target_os = "macos"))]
#[unsafe(no_mangle)]
extern "C" fn mach_approximate_time() -> u64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    now.map_or(0, |d| d.as_nanos() as u64)
}

#[cfg(test)]
mod tests {
    use super::reason;

    #[test]
    fn reasons_lose_the_place_in_foreign_sources_only() {
        assert_eq!(reason("[matmul] no at /a/b c/ops.cpp:12"), "[matmul] no");
        assert_eq!(reason("failed at rank 3"), "failed at rank 3");
    }
}
