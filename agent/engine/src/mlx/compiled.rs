//! Functions of arrays that MLX traces once, and fuses where it can. Owns what is fused everywhere; decides nothing about
//! shapes.

use std::cell::{OnceCell, RefCell};
use std::ffi::{c_int, c_void};

use mlx_rs::error::Exception;
use mlx_rs::{Array, Device, DeviceType};

use super::array::finish;
use super::ops::{multiply, sigmoid};
use super::take_error;

/// `silu(gate) · up`, for shapes that are equal.
pub(crate) fn gated(gate: &Array, up: &Array) -> Result<Array, Exception> {
    thread_local! {
        static FUSED: OnceCell<Option<Traced>> = const { OnceCell::new() };
    }
    FUSED.with(|fused| match fused.get_or_init(gated_on_gpu) {
        Some(traced) => traced.apply([gate, up]),
        None => gated_steps(gate, up),
    })
}

/// None without a GPU: MLX's CPU backend would start a C++ compiler, which few machines have.
fn gated_on_gpu() -> Option<Traced> {
    let device = Device::try_default().and_then(|device| device.get_type());
    match device {
        Ok(DeviceType::Gpu) => {
            Traced::new(Shapes::Any, |inputs| gated_steps(&inputs[0], &inputs[1]))
        }
        Ok(DeviceType::Cpu) | Err(_) => None,
    }
}

fn gated_steps(gate: &Array, up: &Array) -> Result<Array, Exception> {
    multiply(&multiply(gate, &sigmoid(gate)?)?, up)
}

/// For which shapes a trace holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Shapes {
    Any,
    /// Those that it was made with; for others another is made.
    Same,
}

type Function = Box<dyn Fn(&[Array]) -> Result<Array, Exception>>;

/// A function of arrays whose graph MLX keeps, so that calling it costs less than making the graph. Arrays that the
/// function has from elsewhere are constants of it. It belongs to its thread, as MLX's streams do.
pub(crate) struct Traced(mlx_sys::mlx_closure);

thread_local! {
    /// Why the function that is being traced failed: MLX's own message says only that it did.
    static FAILURE: RefCell<Option<Exception>> = const { RefCell::new(None) };
}

impl Traced {
    /// None if MLX does not trace here.
    pub(crate) fn new(
        shapes: Shapes,
        function: impl Fn(&[Array]) -> Result<Array, Exception> + 'static,
    ) -> Option<Self> {
        let function: Box<Function> = Box::new(Box::new(function));
        // SAFETY: MLX frees the function by `discard` when the last handle is gone; `traced` is a new handle that MLX
        // sets.
        unsafe {
            let payload = Box::into_raw(function).cast::<c_void>();
            let plain = mlx_sys::mlx_closure_new_func_payload(Some(call), payload, Some(discard));
            let mut traced = mlx_sys::mlx_closure_new();
            let status = mlx_sys::mlx_compile(&mut traced, plain, shapes == Shapes::Any);
            mlx_sys::mlx_closure_free(plain);
            (status == 0).then_some(Self(traced))
        }
    }

    pub(crate) fn apply<const N: usize>(&self, inputs: [&Array; N]) -> Result<Array, Exception> {
        let handles = inputs.map(Array::as_ptr);
        // SAFETY: handles are live; both vectors are freed once, the result holds its own reference.
        unsafe {
            let inputs = mlx_sys::mlx_vector_array_new_data(handles.as_ptr(), N);
            let mut outputs = mlx_sys::mlx_vector_array_new();
            let status = mlx_sys::mlx_closure_apply(&mut outputs, self.0, inputs);
            let result = if status == 0 {
                item(outputs, 0)
            } else {
                let reason = FAILURE.with_borrow_mut(Option::take);
                Err(reason.unwrap_or_else(|| Exception::custom(take_error())))
            };
            mlx_sys::mlx_vector_array_free(inputs);
            mlx_sys::mlx_vector_array_free(outputs);
            result
        }
    }
}

impl Drop for Traced {
    fn drop(&mut self) {
        // SAFETY: the handle is ours.
        unsafe { mlx_sys::mlx_closure_free(self.0) };
    }
}

extern "C" fn call(
    result: *mut mlx_sys::mlx_vector_array,
    inputs: mlx_sys::mlx_vector_array,
    function: *mut c_void,
) -> c_int {
    // SAFETY: MLX passes the function that `new` gave it, a live vector, and a live place for the result, which copies
    // the array that it is set to.
    unsafe {
        let function = &*function.cast::<Function>();
        let count = mlx_sys::mlx_vector_array_size(inputs);
        let inputs: Result<Vec<Array>, Exception> = (0..count).map(|i| item(inputs, i)).collect();
        match inputs.and_then(|inputs| function(&inputs)) {
            Ok(array) => mlx_sys::mlx_vector_array_set_value(result, array.as_ptr()),
            Err(error) => {
                FAILURE.with_borrow_mut(|failure| *failure = Some(error));
                1
            }
        }
    }
}

extern "C" fn discard(function: *mut c_void) {
    // SAFETY: `new` made it of a box, and MLX calls this once.
    drop(unsafe { Box::from_raw(function.cast::<Function>()) });
}

/// # Safety
/// `arrays` is a live vector.
pub(super) unsafe fn item(
    arrays: mlx_sys::mlx_vector_array,
    index: usize,
) -> Result<Array, Exception> {
    // SAFETY: the new handle is passed to `finish` once.
    unsafe {
        let mut array = mlx_sys::mlx_array_new();
        let status = mlx_sys::mlx_vector_array_get(&mut array, arrays, index);
        finish(status, array)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mlx::ops::matmul;

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

    #[test]
    fn what_is_traced_is_called_with_what_it_is_given() {
        // Nothing that could be fused: on a CPU that would need a compiler.
        let ten = Array::from_slice(&[10.0_f32], &[1, 1]);
        let sum =
            Traced::new(Shapes::Same, move |inputs| matmul(&inputs[0], &inputs[1])?.add(&ten));
        let sum = sum.unwrap();
        for (a, b, expect) in [
            (vec![1.0_f32, 2.0], vec![3.0, 4.0], 21.0),
            (vec![0.0, 1.0], vec![5.0, 6.0], 16.0),
            (vec![1.0, 1.0, 1.0], vec![1.0, 2.0, 3.0], 16.0),
        ] {
            let count = a.len() as i32;
            let (a, b) = (Array::from_slice(&a, &[1, count]), Array::from_slice(&b, &[count, 1]));
            let found: Vec<f32> = sum.apply([&a, &b]).unwrap().to_vec_exact().unwrap();
            assert_eq!(found, [expect]);
        }
    }

    #[test]
    fn what_fails_while_it_is_traced_says_why() {
        crate::mlx::init();
        let bad = Traced::new(Shapes::Same, |_| Err(Exception::custom("for a reason"))).unwrap();
        let x = Array::from_slice(&[1.0_f32], &[1]);
        assert_eq!(bad.apply([&x]).unwrap_err().what(), "for a reason");
    }
}
