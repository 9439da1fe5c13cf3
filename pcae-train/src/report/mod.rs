//! Pictures of what a run did.

pub mod curves;
mod font;
pub mod roofline;
pub mod sheet;
