//! PCAE on NVIDIA's devices: [`Cuda`], a [`TrainBackend`](pcae_kernel::backend::TrainBackend) in f32, or with activations and
//! products in bf16.

mod attention;
mod buffers;
mod compile;
mod cuda;
mod driver;
mod error;
mod gemm;
mod infer;
pub mod kernels;
mod memory;
mod optimizer;
mod queue;
mod ring;
mod rows;
#[cfg(test)]
mod testing;
mod tokens;
mod train;

pub use buffers::{Buf, Ids, Params, Scores, Vector};
pub use compile::Compiler;
pub use cuda::{Cuda, Precision};
pub use driver::device_count;
pub use error::Error;
pub use memory::Memory;
pub use queue::Runs;
