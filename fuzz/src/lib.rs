//! The bodies of the fuzz targets. Each takes arbitrary bytes and compares what the crates make of them with an oracle
//! that is naive enough to be believed; a difference is a panic. `replay.rs` runs them without a fuzzer.
#![warn(missing_docs)]

pub mod allocations;
mod checkpoint;
mod config;
mod idx;
mod masking_selection;
#[cfg(test)]
mod replay;

pub use checkpoint::checkpoint;
pub use config::config;
pub use idx::idx;
pub use masking_selection::masking_selection;
