//! The font of all pictures: embedded, so that they look the same on every machine, also on one without fonts.

use plotters::style::{FontStyle, register_font};

/// The name to draw text with, once [`register`] was called.
pub(crate) const FONT: &str = "sans-serif";

/// Makes [`FONT`] known to the drawing library; calling it again changes nothing.
///
/// # Errors
/// If the embedded file is no font.
pub(crate) fn register() -> Result<(), &'static str> {
    let bytes = include_bytes!("../../assets/fonts/DejaVuSans-subset.ttf");
    register_font(FONT, FontStyle::Normal, bytes).map_err(|_| "the embedded font does not parse")
}
