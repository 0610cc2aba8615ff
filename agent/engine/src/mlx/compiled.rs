//! Functions of arrays that MLX fuses into one kernel. Owns what is fused; decides nothing about shapes.

use std::cell::OnceCell;
use std::ffi::c_int;

use mlx_rs::error::Exception;
use mlx_rs::{Array, Device, DeviceType};

use super::array::finish;
use super::ops::{multiply, sigmoid};
use super::take_error;

/// `silu(gate) · up`, for shapes that are equal.
pub(crate) fn gated(gate: &Array, up: &Array) -> Result<Array, Exception> {
    thread_local! {
        static FUSED: OnceCell<Option<Compiled>> = const { OnceCell::new() };
    }
    FUSED.with(|fused| match fused.get_or_init(|| Compiled::for_gpu(gated_graph)) {
        Some(compiled) => compiled.apply([gate, up]),
        None => gated_steps(gate, up),
    })
}

fn gated_steps(gate: &Array, up: &Array) -> Result<Array, Exception> {
    multiply(&multiply(gate, &sigmoid(gate)?)?, up)
}

extern "C" fn gated_graph(
    result: *mut mlx_sys::mlx_vector_array,
    inputs: mlx_sys::mlx_vector_array,
) -> c_int {
    // SAFETY: MLX passes a vector of the two arrays that `apply` was given, and a live place for the result, which
    // copies the array that it is set to.
    unsafe {
        let outcome = item(inputs, 0).and_then(|gate| gated_steps(&gate, &item(inputs, 1)?));
        match outcome {
            Ok(array) => mlx_sys::mlx_vector_array_set_value(result, array.as_ptr()),
            Err(_) => 1,
        }
    }
}

/// # Safety
/// `arrays` is a live vector.
unsafe fn item(arrays: mlx_sys::mlx_vector_array, index: usize) -> Result<Array, Exception> {
    // SAFETY: the new handle is passed to `finish` once.
    unsafe {
        let mut array = mlx_sys::mlx_array_new();
        let status = mlx_sys::mlx_vector_array_get(&mut array, arrays, index);
        finish(status, array)
    }
}

type Graph = extern "C" fn(*mut mlx_sys::mlx_vector_array, mlx_sys::mlx_vector_array) -> c_int;

/// A function that MLX has traced. It belongs to its thread, as MLX's streams do, and is never freed: threads that
/// build graphs live as long as the process.
struct Compiled(mlx_sys::mlx_closure);

impl Compiled {
    /// None without a GPU: MLX's CPU backend would start a C++ compiler, which few machines have.
    fn for_gpu(graph: Graph) -> Option<Self> {
        let device = Device::try_default().and_then(|device| device.get_type());
        if !matches!(device, Ok(DeviceType::Gpu)) {
            return None;
        }
        // SAFETY: the function lives for ever; `compiled` is a new handle that MLX sets.
        unsafe {
            let plain = mlx_sys::mlx_closure_new_func(Some(graph));
            let mut compiled = mlx_sys::mlx_closure_new();
            let status = mlx_sys::mlx_compile(&mut compiled, plain, true);
            mlx_sys::mlx_closure_free(plain);
            (status == 0).then_some(Self(compiled))
        }
    }

    fn apply<const N: usize>(&self, inputs: [&Array; N]) -> Result<Array, Exception> {
        let handles = inputs.map(Array::as_ptr);
        // SAFETY: handles are live; both vectors are freed once, the result holds its own reference.
        unsafe {
            let inputs = mlx_sys::mlx_vector_array_new_data(handles.as_ptr(), N);
            let mut outputs = mlx_sys::mlx_vector_array_new();
            let status = mlx_sys::mlx_closure_apply(&mut outputs, self.0, inputs);
            let result =
                if status == 0 { item(outputs, 0) } else { Err(Exception::custom(take_error())) };
            mlx_sys::mlx_vector_array_free(inputs);
            mlx_sys::mlx_vector_array_free(outputs);
            result
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gates_as_the_formula_says_fused_or_not() {
        let gate = Array::from_slice(&[-2.0_f32, 0.0, 1.5], &[3]);
        let up = Array::from_slice(&[3.0_f32, 5.0, -2.0], &[3]);
        let expect = [-2.0_f32, 0.0, 1.5].map(|g| g / (1.0 + (-g).exp()));
        for found in [gated(&gate, &up).unwrap(), gated_steps(&gate, &up).unwrap()] {
            let found: Vec<f32> = found.to_vec_exact().unwrap();
            for ((found, silu), up) in found.iter().zip(expect).zip([3.0, 5.0, -2.0]) {
                assert!((found - silu * up).abs() < 1e-6, "{found} {silu} {up}");
            }
        }
    }
}
