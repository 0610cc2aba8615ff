//! What MLX computes on here. Says it; chooses nothing.

use std::ffi::{CStr, c_char};
use std::ptr;

use super::init;

/// Whether models run on a GPU here.
pub fn uses_gpu() -> bool {
    init();
    let kind = mlx_rs::Device::try_default().and_then(|device| device.get_type());
    matches!(kind, Ok(mlx_rs::DeviceType::Gpu))
}

/// MLX's version and the device's name, as in "0.32.2 Apple M3 Ultra": where both are equal, the same operations on
/// the same numbers have the same results.
pub(crate) fn kind() -> String {
    init();
    format!("{} {}", version(), name().unwrap_or_default())
}

fn version() -> String {
    // SAFETY: the string is made here, read while it lives, and freed once.
    unsafe {
        let mut text = mlx_sys::mlx_string_new();
        let status = mlx_sys::mlx_version(&mut text);
        let version = if status == 0 { copied(mlx_sys::mlx_string_data(text)) } else { None };
        mlx_sys::mlx_string_free(text);
        version.unwrap_or_default()
    }
}

fn name() -> Option<String> {
    // SAFETY: both handles are made here and freed once; the text is copied while they live.
    unsafe {
        let (mut device, mut info) = (mlx_sys::mlx_device_new(), mlx_sys::mlx_device_info_new());
        let mut text = ptr::null();
        let found = mlx_sys::mlx_get_default_device(&mut device) == 0
            && mlx_sys::mlx_device_info_get(&mut info, device) == 0
            && mlx_sys::mlx_device_info_get_string(&mut text, info, c"device_name".as_ptr()) == 0;
        let name = if found { copied(text) } else { None };
        mlx_sys::mlx_device_info_free(info);
        mlx_sys::mlx_device_free(device);
        name
    }
}

/// # Safety
/// `text` is null or a C string.
unsafe fn copied(text: *const c_char) -> Option<String> {
    // SAFETY: the caller says so.
    (!text.is_null()).then(|| unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_device_has_a_name() {
        let kind = kind();
        let (version, name) = kind.split_once(' ').unwrap();
        assert!(version.starts_with("0."), "{kind}");
        assert!(!name.is_empty(), "{kind}");
    }
}
