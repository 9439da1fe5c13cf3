//! kernel
#![no_std]
#![forbid(unsafe_code)]

#[cfg(feature = "alloc")]
extern crate alloc;

pub mod backend;
pub mod config;
pub mod error;
pub mod float;
pub mod layout;
pub mod reference;
pub mod rng;
