//! kernel
#![no_std]
#![forbid(unsafe_code)]

#[cfg(feature = "alloc")]
extern crate alloc;

pub mod backend;
pub mod config;
#[cfg(feature = "train")]
pub mod conformance;
pub mod error;
pub mod float;
pub mod flops;
pub mod init;
pub mod layout;
pub mod model;
pub mod reference;
pub mod rng;
pub mod schedule;
