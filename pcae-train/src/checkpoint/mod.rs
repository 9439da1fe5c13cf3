//! Checkpoints.

pub mod file;
