//! Initial parameters, as MAE's: Xavier-uniform weights (the patch projection as a linear layer), normal tokens of standard
//! deviation 0.02, norms 1, biases 0, fixed sine-cosine positions.

use crate::error::{Error, expect_len};
use crate::layout::{Kind, Layout, sincos_2d};
use crate::rng::{Purpose, Stream};

/// Fills the parameters of `layout`.
///
/// # Shapes
/// `out: [layout.len()]`.
///
/// # Errors
/// If `out` is shorter.
pub fn init(layout: &Layout, seed: u64, out: &mut [f32]) -> Result<(), Error> {
    expect_len("init", "out", out.len(), layout.len())?;
    let mut index = 0;
    let mut result = Ok(());
    layout.for_each(|tensor| {
        let mut stream = Stream::new(seed, 0, index, Purpose::Init);
        index += 1;
        let values = &mut out[tensor.span.start..tensor.span.end()];
        match tensor.kind {
            Kind::Weight => {
                let fan_out = tensor.shape().first().copied().unwrap_or(1);
                let fan_in = values.len() / fan_out.max(1);
                let bound = libm::sqrt(6.0 / (fan_in + fan_out) as f64);
                values.fill_with(|| ((2.0 * stream.uniform_f64() - 1.0) * bound) as f32);
            }
            Kind::Bias => values.fill(0.0),
            Kind::Norm => values.fill(1.0),
            Kind::Token => values.fill_with(|| 0.02 * stream.normal()),
            Kind::Position => {
                let dim = tensor.shape().last().copied().unwrap_or(0);
                result = result.and(sincos_2d(values, dim, layout.vit.grid()));
            }
        }
    });
    result
}
