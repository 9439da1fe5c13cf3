//! train

pub mod checkpoint;
pub mod durable;
