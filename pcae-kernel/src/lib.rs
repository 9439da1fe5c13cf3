//! PCAE's model, without an operating system: `no_std`, no unsafe code, and for inference no allocator.
//!
//! | for | start at |
//! |---|---|
//! | reading the method | [`model::Pretrainer`], [`mod@reference`] |
//! | running a trained encoder | [`model::Vit`], [`model::Classifier`] on [`backend::Backend`] |
//! | writing a backend | [`backend`], then `conformance` |
//!
//! # Features
//! - `alloc`: owned buffers for the reference backend.
//! - `train` (default, implies `alloc`): backward, losses, optimizer, the conformance suite.
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
pub mod op;
pub mod reference;
pub mod resize;
pub mod rng;
pub mod schedule;
#[cfg(feature = "train")]
pub mod sizing;
