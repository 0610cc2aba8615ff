//! Process groups and collectives of MLX (`ring`, `jaccl`, `nccl`). Owns the group handle; never decides who
//! sends what to whom.
//!
//! A process has one group. Collectives are lazy like every operation: they run when their result is evaluated, and
//! all ranks must evaluate them in the same order. A dead peer can block an evaluation for ever: whoever runs this
//! process keeps the deadline.

use std::ffi::CString;
use std::rc::Rc;

use mlx_rs::error::Exception;
use mlx_rs::{Array, Dtype, Stream};

use super::array::finish;
pub use super::peers::{gone, suspects};
use super::peers::{remember_ring, ring_is_formed, trouble};
use super::reader::is_cuda;
use super::{init, reason, take_error};

/// How the ranks of a group reach each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backend {
    /// TCP. Hosts from `MLX_HOSTFILE`. Only neighbours (rank ± 1, round the ring) can send to each other.
    Ring,
    /// RDMA over Thunderbolt. Devices from `MLX_IBV_DEVICES`.
    Jaccl,
    /// NVIDIA GPUs. Rendezvous from `NCCL_HOST_IP` and `NCCL_PORT`.
    Nccl,
}

impl Backend {
    /// MLX's name of the backend.
    pub fn name(self) -> &'static str {
        match self {
            Self::Ring => "ring",
            Self::Jaccl => "jaccl",
            Self::Nccl => "nccl",
        }
    }

    /// The backend that MLX's environment variables describe; none for a process on its own.
    pub fn from_env() -> Option<Self> {
        let set = |name| std::env::var_os(name).is_some_and(|v| !v.is_empty());
        if !set("MLX_RANK") {
            None
        } else if set("MLX_IBV_DEVICES") {
            Some(Self::Jaccl)
        } else if set("MLX_HOSTFILE") {
            Some(Self::Ring)
        } else if set("NCCL_HOST_IP") {
            Some(Self::Nccl)
        } else {
            None
        }
    }

    /// Whether a rank can send to one other rank: MLX's NCCL has collectives of all ranks only.
    pub fn has_messages(self) -> bool {
        match self {
            Self::Ring | Self::Jaccl => true,
            Self::Nccl => false,
        }
    }

    /// Whether this build of MLX has the backend.
    pub fn is_available(self) -> bool {
        init();
        let name = CString::new(self.name()).expect("names have no zero byte");
        // SAFETY: the name outlives the call.
        unsafe { mlx_sys::mlx_distributed_is_available(name.as_ptr()) }
    }
}

/// Why a group failed. Never permanent: peers come and go.
#[derive(Debug, thiserror::Error)]
pub enum GroupError {
    #[error("this build of MLX has no '{backend}' backend")]
    Unavailable { backend: &'static str },
    #[error("the '{backend}' group could not be formed: {reason}")]
    Init { backend: &'static str, reason: String },
    #[error("{operation} failed: {reason}")]
    Collective { operation: &'static str, reason: String },
    #[error("the group's self-test failed: {operation} of {size} numbers: {reason}")]
    SelfTest { operation: &'static str, size: usize, reason: String },
}

impl GroupError {
    pub(crate) fn collective(operation: &'static str, error: &Exception) -> Self {
        Self::Collective { operation, reason: explained(reason(error.what())) }
    }
}

/// MLX's reason behind the peer whose fault it is, where one is known.
fn explained(reason: &str) -> String {
    trouble().map_or_else(|| reason.to_owned(), |peers| format!("{peers}: {reason}"))
}

struct Handle(mlx_sys::mlx_distributed_group);

impl Drop for Handle {
    fn drop(&mut self) {
        // SAFETY: the handle was made by `init` and is freed once.
        unsafe { mlx_sys::mlx_distributed_group_free(self.0) };
    }
}

/// The ranks that run one model together. Cheap to clone; stays on the thread that made it.
#[derive(Clone)]
pub struct Group {
    handle: Rc<Handle>,
    /// Where collectives run: NCCL's on the GPU, the others on the CPU, whatever the default device is.
    stream: Rc<Stream>,
    backend: Backend,
    rank: usize,
    size: usize,
}

impl Group {
    /// Connects to the other ranks as MLX's environment variables say. Blocks until they are there; MLX gives up
    /// after some seconds on most backends.
    ///
    /// # Errors
    /// The backend is not in this build, or the group could not be formed.
    pub fn init(backend: Backend) -> Result<Self, GroupError> {
        init();
        let backend_name = backend.name();
        if !backend.is_available() {
            return Err(GroupError::Unavailable { backend: backend_name });
        }
        if backend == Backend::Ring {
            remember_ring();
        }
        let name = CString::new(backend_name).expect("names have no zero byte");
        // SAFETY: the name outlives the call; the handle is owned by `Handle` from here on.
        let (handle, status) = unsafe {
            let mut group = mlx_sys::mlx_distributed_group_new();
            let status = mlx_sys::mlx_distributed_init(&mut group, true, name.as_ptr());
            (Rc::new(Handle(group)), status)
        };
        if status != 0 {
            let reason = explained(&take_error());
            return Err(GroupError::Init { backend: backend_name, reason });
        }
        ring_is_formed();
        // SAFETY: the handle is a formed group.
        let (rank, size) = unsafe {
            (
                mlx_sys::mlx_distributed_group_rank(handle.0),
                mlx_sys::mlx_distributed_group_size(handle.0),
            )
        };
        let stream = match backend {
            Backend::Nccl => Stream::default(),
            Backend::Ring | Backend::Jaccl => Stream::cpu(),
        };
        Ok(Self {
            handle,
            stream: Rc::new(stream),
            backend,
            rank: usize::try_from(rank).unwrap_or(0),
            size: usize::try_from(size).unwrap_or(1),
        })
    }

    /// The group that the environment describes, or none for a process on its own.
    ///
    /// # Errors
    /// As [`Group::init`].
    pub fn from_env() -> Result<Option<Self>, GroupError> {
        Backend::from_env().map(Self::init).transpose()
    }

    pub fn rank(&self) -> usize {
        self.rank
    }

    pub fn size(&self) -> usize {
        self.size
    }

    pub fn backend(&self) -> Backend {
        self.backend
    }

    /// Element-wise sum over all ranks; same shape as `array`.
    ///
    /// # Errors
    /// The operation could not be put into the graph.
    pub fn all_sum(&self, array: &Array) -> Result<Array, GroupError> {
        self.call("all_sum", |result| {
            // SAFETY: all handles are live.
            unsafe {
                mlx_sys::mlx_distributed_all_sum(
                    result,
                    array.as_ptr(),
                    self.handle.0,
                    self.stream.as_ptr(),
                )
            }
        })
    }

    /// The ranks' arrays joined along the first axis, in rank order.
    ///
    /// # Errors
    /// As [`Group::all_sum`].
    pub fn all_gather(&self, array: &Array) -> Result<Array, GroupError> {
        self.call("all_gather", |result| {
            // SAFETY: all handles are live.
            unsafe {
                mlx_sys::mlx_distributed_all_gather(
                    result,
                    array.as_ptr(),
                    self.handle.0,
                    self.stream.as_ptr(),
                )
            }
        })
    }

    /// Sends `array` to rank `to`; the result is `array` again and must be evaluated for the send to happen.
    ///
    /// # Errors
    /// As [`Group::all_sum`].
    pub fn send(&self, array: &Array, to: usize) -> Result<Array, GroupError> {
        self.call("send", |result| {
            // SAFETY: all handles are live; MLX refuses ranks outside the group.
            unsafe {
                mlx_sys::mlx_distributed_send(
                    result,
                    array.as_ptr(),
                    to as i32,
                    self.handle.0,
                    self.stream.as_ptr(),
                )
            }
        })
    }

    /// What rank `from` sends next; shape and type must be exactly those that it sends.
    ///
    /// # Errors
    /// As [`Group::all_sum`].
    pub fn recv(&self, shape: &[i32], dtype: Dtype, from: usize) -> Result<Array, GroupError> {
        self.call("recv", |result| {
            // SAFETY: the shape outlives the call; MLX refuses ranks outside the group.
            unsafe {
                mlx_sys::mlx_distributed_recv(
                    result,
                    shape.as_ptr(),
                    shape.len(),
                    dtype.into(),
                    from as i32,
                    self.handle.0,
                    self.stream.as_ptr(),
                )
            }
        })
    }

    /// Whether work may be handed over that waits for other ranks, while the host goes on to other work. On CUDA not
    /// where messages run on the CPU: the device waits for them by a kernel that spins, and what the host does
    /// meanwhile (giving back memory, loading a kernel) can wait for the device, while the message's end waits for the
    /// host.
    pub(crate) fn runs_beside_the_host(&self) -> bool {
        self.backend == Backend::Nccl || !is_cuda()
    }

    /// Waits until all collectives that were handed over so far are done.
    pub(crate) fn synchronize(&self) {
        // SAFETY: the stream is live. The result says only whether the work failed, which its arrays say as well.
        unsafe { mlx_sys::mlx_synchronize(self.stream.as_ptr()) };
    }

    fn call(
        &self,
        operation: &'static str,
        f: impl FnOnce(*mut mlx_sys::mlx_array) -> i32,
    ) -> Result<Array, GroupError> {
        // SAFETY: a new empty handle, passed to `finish` once.
        unsafe {
            let mut result = mlx_sys::mlx_array_new();
            let status = f(&mut result);
            finish(status, result).map_err(|e| GroupError::collective(operation, &e))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ring_is_always_there_and_errors_come_back_as_values() {
        assert!(Backend::Ring.is_available());
        // No MLX_HOSTFILE in tests: MLX must say so, not end the process.
        let error = Group::init(Backend::Ring).err().expect("no host file");
        assert!(error.to_string().contains("ring"), "{error}");
    }
}
