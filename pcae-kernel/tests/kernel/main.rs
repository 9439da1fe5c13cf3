//! Tests of the kernel through its public interface: gradients, selection, optimizer, configuration, layout, refusals.
#![cfg(feature = "train")]
#![allow(
    clippy::unwrap_used,
    reason = "a test stops at what it does not expect"
)]

mod arena;
mod config;
mod end_to_end;
mod gradients;
mod layers;
mod layout;
mod no_panic;
mod optimizer;
mod schedule;
mod selection;
mod support;
mod taps;
