//! PCAE on the CPU: [`Cpu`], a [`TrainBackend`](pcae_kernel::backend::TrainBackend) in f32.
//!
//! - Vector instructions are chosen when the backend is built: AVX-512, AVX2 with FMA, NEON, or plain Rust ([`Isa`]).
//! - Matrix products of linear layers are `matrixmultiply`'s, cut over threads; bias, GELU and residual are applied to
//!   each slab while it is in cache. Attention runs head by head on kernels of this crate.
//! - The same input gives the same bits for any number of threads.
//!
//! # Features
//! `rayon` (default): threads. Without it everything runs on the caller's thread.

mod attention;
mod cpu;
mod error;
mod gemm;
mod isa;
mod math;
mod peak;
mod rows;
mod simd;
mod threads;
mod train;

pub use cpu::{Cpu, Params};
pub use error::Error;
pub use isa::Isa;
