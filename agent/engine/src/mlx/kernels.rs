//! Kernels of our own for NVIDIA GPUs, in CUDA C++ that MLX compiles at their first use: each does what several
//! operations do for one position of one sequence, which is too little work for a launch each. Own no weights; know
//! what a kernel can do, and never choose where it is used.

use std::ffi::{CStr, CString, c_char};

use mlx_rs::error::Exception;
use mlx_rs::{Array, Dtype};

use super::array::finish;
use super::compiled::item;
use super::ops::stream;
use super::take_error;

/// Threads of a block. Four warps, as the source says, too: small enough that few blocks do not leave much of a GPU idle.
const PRODUCT_THREADS: i32 = 128;
const ATTEND_THREADS: i32 = 256;

/// Bytes that a lane reads at once.
const CHUNK_BYTES: i32 = 16;

/// Positions of a buffer for each block that attends, and the most blocks: with less for each, putting their parts
/// together takes longer than they do.
const PART_POSITIONS: i32 = 128;
const PARTS_MAX: i32 = 32;

/// What a block of attention can keep in its 48 KiB of shared memory.
const GROUP_MAX: i32 = 8;
const GROUP_FEATURES_MAX: i32 = 1024;

/// Whether there is a GPU for them.
pub(crate) fn can_run() -> bool {
    let mut found = false;
    // SAFETY: the result is a live place.
    let status = unsafe { mlx_sys::mlx_cuda_is_available(&raw mut found) };
    status == 0 && found && super::uses_gpu()
}

/// A kernel as MLX has it.
struct Kernel(mlx_sys::mlx_fast_cuda_kernel);

/// How often and for what a kernel runs.
struct Launch<'a> {
    /// What the source calls `T`.
    dtype: Dtype,
    /// Numbers that are compiled in.
    constants: &'a [(&'static CStr, i32)],
    outputs: &'a [(&'a [i32], Dtype)],
    /// Along the first two axes.
    blocks: [i32; 2],
    threads: i32,
}

impl Kernel {
    /// `body` is the kernel's, `source` what it uses.
    fn new(
        name: &CStr,
        inputs: &[&CStr],
        outputs: &[&CStr],
        source: &str,
        body: &CStr,
    ) -> Result<Self, Exception> {
        let source = CString::new(dense(source)).expect("sources have no zeros");
        let names = |names: &[&CStr]| {
            let mut names: Vec<*const c_char> = names.iter().map(|name| name.as_ptr()).collect();
            // SAFETY: MLX copies the names, which are live.
            unsafe { mlx_sys::mlx_vector_string_new_data(names.as_mut_ptr(), names.len()) }
        };
        let (inputs, outputs) = (names(inputs), names(outputs));
        // SAFETY: all strings are live and copied; the vectors are freed once.
        let kernel = unsafe {
            // What is not contiguous would be copied, and what is written to the copy be lost.
            let kernel = mlx_sys::mlx_fast_cuda_kernel_new(
                name.as_ptr(),
                inputs,
                outputs,
                body.as_ptr(),
                source.as_ptr(),
                false,
                0,
            );
            mlx_sys::mlx_vector_string_free(inputs);
            mlx_sys::mlx_vector_string_free(outputs);
            kernel
        };
        match kernel.ctx.is_null() {
            true => Err(Exception::custom(take_error())),
            false => Ok(Self(kernel)),
        }
    }

    /// The outputs that come first.
    fn launch(&self, inputs: &[&Array], launch: &Launch<'_>) -> Result<Array, Exception> {
        let Launch { dtype, constants, outputs, blocks, threads } = *launch;
        let handles: Vec<mlx_sys::mlx_array> = inputs.iter().map(|input| input.as_ptr()).collect();
        // SAFETY: handles and strings are live, and copied where they are kept; what is made here is freed once.
        unsafe {
            let config = mlx_sys::mlx_fast_cuda_kernel_config_new();
            let mut status = mlx_sys::mlx_fast_cuda_kernel_config_add_template_arg_dtype(
                config,
                c"T".as_ptr(),
                dtype.into(),
            );
            for (name, value) in constants {
                status |= mlx_sys::mlx_fast_cuda_kernel_config_add_template_arg_int(
                    config,
                    name.as_ptr(),
                    *value,
                );
            }
            for (shape, dtype) in outputs {
                status |= mlx_sys::mlx_fast_cuda_kernel_config_add_output_arg(
                    config,
                    shape.as_ptr(),
                    shape.len(),
                    (*dtype).into(),
                );
            }
            // In threads, as Metal counts.
            let [x, y] = blocks;
            status |= mlx_sys::mlx_fast_cuda_kernel_config_set_grid(config, x * threads, y, 1);
            status |= mlx_sys::mlx_fast_cuda_kernel_config_set_thread_group(config, threads, 1, 1);
            let inputs = mlx_sys::mlx_vector_array_new_data(handles.as_ptr(), handles.len());
            let mut results = mlx_sys::mlx_vector_array_new();
            if status == 0 {
                status = mlx_sys::mlx_fast_cuda_kernel_apply(
                    &raw mut results,
                    self.0,
                    inputs,
                    config,
                    stream(),
                );
            }
            let result = match status {
                0 => item(results, 0),
                _ => finish(status, mlx_sys::mlx_array_new()),
            };
            mlx_sys::mlx_vector_array_free(inputs);
            mlx_sys::mlx_vector_array_free(results);
            mlx_sys::mlx_fast_cuda_kernel_config_free(config);
            result
        }
    }
}

impl Drop for Kernel {
    fn drop(&mut self) {
        // SAFETY: the handle is ours.
        unsafe { mlx_sys::mlx_fast_cuda_kernel_free(self.0) };
    }
}

/// A source without what only people read: MLX hashes it at every launch.
fn dense(source: &str) -> String {
    let lines = source.lines().map(str::trim);
    let lines = lines.filter(|line| !line.is_empty() && !line.starts_with("//"));
    lines.collect::<Vec<_>>().join("\n")
}

fn item_bytes(dtype: Dtype) -> Option<i32> {
    match dtype {
        Dtype::Float16 | Dtype::Bfloat16 => Some(2),
        Dtype::Float32 => Some(4),
        _ => None,
    }
}

/// Products of one position's features, `[1, 1, columns]`, with matrices `[rows, columns]`, contiguous, all of one type.
pub(crate) struct Products {
    kernel: Kernel,
    /// What is added to the mean square of a norm's input.
    eps: f32,
}

/// What becomes of a product. The kernel is told by how many axes its second input has, which costs no array: these
/// numbers.
#[derive(Clone, Copy)]
pub(crate) enum Product {
    /// That of `x` after RMS norm. The second input is the norm's weight, `[columns]`.
    Plain = 1,
    /// `silu(gate) · up` of `x` after RMS norm; the matrix has the rows of the gate, then those of `up`. The second
    /// input is the norm's weight, `[1, columns]`.
    Gated = 2,
    /// Added to the second input, `[1, 1, rows]`.
    Onto = 3,
}

impl Products {
    pub(crate) fn new(eps: f32) -> Result<Self, Exception> {
        let kernel = Kernel::new(
            c"exo_product",
            &[c"x", c"other", c"weight"],
            &[c"out"],
            include_str!("cuda/products.cuh"),
            c"run_product(other_ndim, x, other, weight, weight_shape[0], weight_shape[1], \
            __int_as_float(EPS), out);",
        )?;
        Ok(Self { kernel, eps })
    }

    /// Whether they can be had with this matrix.
    pub(crate) fn take(weight: &Array) -> bool {
        let bytes = item_bytes(weight.dtype());
        weight.ndim() == 2 && bytes.is_some_and(|bytes| weight.dim(1) * bytes % CHUNK_BYTES == 0)
    }

    /// `x`, the product's second input, and the matrix.
    pub(crate) fn run(
        &self,
        product: Product,
        [x, other, weight]: [&Array; 3],
    ) -> Result<Array, Exception> {
        let rows = match product {
            Product::Plain | Product::Onto => weight.dim(0),
            Product::Gated => weight.dim(0) / 2,
        };
        if other.ndim() != product as usize {
            return Err(Exception::custom(format!("a product with {} axes", other.ndim())));
        }
        let per_block = PRODUCT_THREADS / 32;
        let launch = Launch {
            dtype: weight.dtype(),
            constants: &[(c"EPS", bits(self.eps))],
            outputs: &[(&[1, 1, rows], weight.dtype())],
            blocks: [(rows + per_block - 1) / per_block, 1],
            threads: PRODUCT_THREADS,
        };
        self.kernel.launch(&[x, other, weight], &launch)
    }
}

/// A float as a constant, which MLX has none of.
fn bits(value: f32) -> i32 {
    value.to_bits().cast_signed()
}

/// The heads that [`Attend`] is for.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Heads {
    /// Of queries.
    pub(crate) count: i32,
    pub(crate) kv_count: i32,
    pub(crate) dim: i32,
    /// Rotary positions turn neighbours together, else the two halves of a head.
    pub(crate) pairs: bool,
    /// What positions are multiplied with before.
    pub(crate) turns: f32,
    /// Of the scores.
    pub(crate) scale: f32,
}

/// Attention of one position of one sequence from the joint projection of queries, keys and values on.
pub(crate) struct Attend {
    kernel: Kernel,
    heads: Heads,
    /// Of the rotation, `[dim / 2]`, float32.
    periods: Array,
    /// Zeros between two launches.
    tickets: Array,
}

impl Attend {
    /// None if the kernel can't do it.
    pub(crate) fn new(
        heads: Heads,
        periods: Array,
        dtype: Dtype,
    ) -> Result<Option<Self>, Exception> {
        if !heads.fit(dtype) {
            return Ok(None);
        }
        let inputs = [c"heads", c"keys", c"values", c"periods", c"position", c"tickets"];
        let body = c"Attention<T, HEADS, KEY_HEADS, DIM, PAIRS != 0, COUNT>::run(heads, const_cast<T*>(keys), \
            const_cast<T*>(values), keys_shape[2], periods, position[0], __int_as_float(TURNS), \
            __int_as_float(SCALE), const_cast<unsigned*>(tickets), parts, out);";
        let source = include_str!("cuda/attend.cuh");
        let kernel = Kernel::new(c"exo_attend", &inputs, &[c"out", c"parts"], source, body)?;
        let tickets = vec![0_u32; heads.kv_count as usize];
        let tickets = Array::from_slice(&tickets, &[heads.kv_count]);
        Ok(Some(Self { kernel, heads, periods, tickets }))
    }

    /// What it has beside what it is given.
    pub(crate) fn constants(&self) -> [&Array; 2] {
        [&self.periods, &self.tickets]
    }

    /// `projected` `[1, 1, (heads + 2 · kv_heads) · dim]`, not yet rotated, to `[1, 1, heads · dim]`. Key and value are
    /// put in place number `position` `[1]` (int32) of the buffers `keys` and `values` `[1, kv_heads, capacity, dim]`,
    /// which MLX knows nothing of: nothing else may hold the buffers' memory, and who uses them later must come after
    /// the result.
    pub(crate) fn run(
        &self,
        projected: &Array,
        [keys, values]: [&Array; 2],
        position: &Array,
    ) -> Result<Array, Exception> {
        let Heads { count, kv_count, dim, pairs, turns, scale } = self.heads;
        let dtype = keys.dtype();
        let parts = (keys.dim(2) / PART_POSITIONS).clamp(1, PARTS_MAX);
        let left = [kv_count, parts, count / kv_count, dim + 2];
        let launch = Launch {
            dtype,
            constants: &[
                (c"HEADS", count),
                (c"KEY_HEADS", kv_count),
                (c"DIM", dim),
                (c"PAIRS", i32::from(pairs)),
                (c"COUNT", ATTEND_THREADS),
                (c"TURNS", bits(turns)),
                (c"SCALE", bits(scale)),
            ],
            outputs: &[(&[1, 1, count * dim], dtype), (&left, Dtype::Float32)],
            blocks: [kv_count, parts],
            threads: ATTEND_THREADS,
        };
        let projected = projected.as_dtype(dtype)?;
        let inputs = [&projected, keys, values, &self.periods, position, &self.tickets];
        self.kernel.launch(&inputs, &launch)
    }
}

impl Heads {
    /// Whether lanes can share a head evenly, and a block can keep a group.
    fn fit(self, dtype: Dtype) -> bool {
        let Self { count, kv_count, dim, .. } = self;
        let Some(bytes) = item_bytes(dtype) else { return false };
        let lanes = dim * bytes / CHUNK_BYTES;
        let group = count / kv_count;
        dim * bytes % CHUNK_BYTES == 0
            && dim % 2 == 0
            && (1..=32).contains(&lanes)
            && lanes.count_ones() == 1
            && count % kv_count == 0
            && group <= GROUP_MAX
            && group * dim <= GROUP_FEATURES_MAX
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn heads_that_a_block_can_not_serve_are_refused() {
        let heads = |count, kv_count, dim| Heads {
            count,
            kv_count,
            dim,
            pairs: false,
            turns: 1.0,
            scale: 1.0,
        };
        for (heads, dtype, fit) in [
            (heads(32, 8, 128), Dtype::Bfloat16, true),
            (heads(32, 8, 64), Dtype::Float32, true),
            (heads(28, 4, 128), Dtype::Float16, true),
            (heads(64, 8, 128), Dtype::Bfloat16, true),
            (heads(64, 4, 128), Dtype::Bfloat16, false),
            (heads(8, 8, 80), Dtype::Bfloat16, false),
            (heads(8, 8, 256), Dtype::Bfloat16, true),
            (heads(8, 8, 256), Dtype::Float32, false),
            (heads(8, 8, 64), Dtype::Int32, false),
        ] {
            assert_eq!(heads.fit(dtype), fit, "{heads:?} {dtype:?}");
        }
    }

    #[test]
    fn sources_lose_what_only_people_read() {
        assert_eq!(dense("// a\n\n  int b; // c\n"), "int b; // c");
    }
}
