//! PCAE on NVIDIA's devices: [`Cuda`], a [`TrainBackend`](pcae_kernel::backend::TrainBackend) in f32, or with activations and
//! products in bf16, and a teacher whose products are in fp8.
//!
//! - It builds without CUDA. Driver, NVRTC and cuBLASLt are looked for when a [`Cuda`] is made, and an error says what was looked
//!   for. Devices from Ampere on (compute capability 8.0).
//! - Kernels (`kernels/*.cu`) are compiled by NVRTC for the device that is there, and kept in `PCAE_CACHE`, or `pcae` in
//!   `XDG_CACHE_HOME` or `~/.cache`. Products go to cuBLASLt.
//! - Operations are noted and run together when the host wants to see something; work that comes again is launched as one graph. So
//!   buffers are read, written and dropped as on any backend, and a training step costs one launch.
//! - Indices out of range and scores that are no numbers are found on the device; the next read returns the error.
//! - The same input gives the same bits in every run on the same kind of device: no kernel here adds with atomics.
//! - [`memory()`] says what a task will take, before it takes it; after the first steps nothing is allocated.
//!
//! ```no_run
//! use pcae_backend_cuda::{Cuda, Precision};
//! use pcae_kernel::backend::Backend;
//!
//! let mut cuda = Cuda::new(0, Precision::Bf16)?;
//! let mut x = cuda.buf(3)?;
//! cuda.write(&mut x, &[1.0, 2.0, 3.0])?;
//! let mut back = [0.0; 3];
//! cuda.read(&mut back, &x)?;
//! assert_eq!(back, [1.0, 2.0, 3.0]);
//! # Ok::<(), pcae_backend_cuda::Error>(())
//! ```

mod attention;
mod buffers;
mod bytes;
mod checks;
mod compile;
mod cuda;
mod driver;
mod error;
mod fp8;
mod gemm;
mod infer;
pub mod kernels;
mod memory;
mod optimizer;
mod padding;
mod peak;
mod queue;
mod ring;
mod rows;
mod sums;
#[cfg(test)]
mod testing;
mod tokens;
mod train;
mod versions;
mod warnings;

pub use buffers::{Buf, Ids, Params, Scores, Vector};
pub use bytes::bytes;
pub use compile::Compiler;
pub use cuda::{Cuda, Precision};
pub use driver::{device_count, free_memory};
pub use error::Error;
pub use fp8::WIDTH as FP8_WIDTH;
pub use memory::memory;
pub use queue::{KernelTime, Runs};
