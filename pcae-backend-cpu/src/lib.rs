//! PCAE on the CPU: [`Cpu`], a [`TrainBackend`](pcae_kernel::backend::TrainBackend) in f32, or in bf16 what goes
//! into products.
//!
//! - Vector instructions are chosen when the backend is built: AVX-512, AVX2 with FMA, NEON, or plain Rust ([`Isa`]).
//! - Matrix products of linear layers keep their sums in registers and read packed operands; bias, GELU and residual are
//!   applied to each tile before it is stored. Attention works through blocks of queries, head by head, without an N by N matrix.
//! - bf16 is multiplied by AMX or AVX512-BF16 where the processor has them, else by f32 multiply-adds ([`Bf16Unit`]).
//! - [`memory`] says what a task will take, before it takes it.
//! - The same input gives the same bits for any number of threads.
//!
//! ```
//! use pcae_backend_cpu::Cpu;
//! use pcae_kernel::backend::{Backend, TrainBackend};
//! use pcae_kernel::config::{Reduction, VitConfig};
//! use pcae_kernel::{init::init, layout::Layout, model::{MeanSimilarity, Vit}};
//!
//! let vit = VitConfig::preset("vit-micro").ok_or("no such preset")?;
//! let layout = Layout::encoder(&vit);
//! let mut values = vec![0.0; layout.len()];
//! init(&layout, 0, &mut values)?; // or read them from a checkpoint
//!
//! let mut cpu = Cpu::new();
//! let params = cpu.frozen_params(&layout, &values)?;
//! let mut model = Vit::new(&mut cpu, &vit, 1, vit.num_patches(), true, Reduction::NONE)?;
//! let mut images = cpu.buf(28 * 28)?;
//! cpu.write(&mut images, &[0.5; 28 * 28])?;
//! model.forward(&mut cpu, &params, 1, &images, None, &mut MeanSimilarity)?;
//! let mut features = vec![0.0; 50 * vit.embed_dim]; // class token and 49 patches
//! let tokens = model.final_norm(&mut cpu, &params)?;
//! cpu.read(&mut features, tokens)?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! `examples/infer.rs` reads the parameters from a file of `pcae export`, and a picture.
//!
//! # Features
//! `threads` (default): threads. Without it everything runs on the caller's thread.

mod attention;
mod buf;
mod checks;
mod cpu;
mod element;
mod error;
mod gemm;
mod isa;
mod math;
mod memory;
mod optimizer;
mod params;
mod peak;
mod pixels;
mod plan;
mod rows;
mod simd;
mod threads;
mod train;

pub use buf::{Buf, Floats};
pub use cpu::Cpu;
pub use error::Error;
pub use gemm::{Bf16Unit, Precision};
pub use isa::Isa;
pub use params::Params;
pub use peak::Bandwidth;
pub use plan::memory;
