//! What changes from step to step: learning rate, teacher momentum, stochastic depth, masks.

use core::f64::consts::PI;

use crate::error::{Error, expect_len};
use crate::rng::Stream;

/// Learning rate of `step` (from 0) out of `steps`: linear to `peak` over `warmup` steps, then half a cosine to `floor`.
///
/// The first step already has `peak / warmup`; a step past the end has `floor`.
pub fn learning_rate(step: u64, steps: u64, warmup: u64, peak: f64, floor: f64) -> f64 {
    if step < warmup {
        return peak * (step + 1) as f64 / warmup as f64;
    }
    floor + (peak - floor) * half_cosine(step - warmup, steps.saturating_sub(warmup))
}

/// Momentum of the teacher at `step` (from 0) out of `steps`: half a cosine from `start` to `end`.
pub fn momentum(step: u64, steps: u64, start: f64, end: f64) -> f64 {
    end - (end - start) * half_cosine(step, steps)
}

/// Falls from 1 at step 0 to 0 at `steps`.
fn half_cosine(step: u64, steps: u64) -> f64 {
    let progress = if steps == 0 {
        1.0
    } else {
        (step as f64 / steps as f64).min(1.0)
    };
    0.5 * (1.0 + libm::cos(PI * progress))
}

/// Probability that stochastic depth drops a branch of `block`: linear from 0 at the first block to `rate` at the last.
pub fn drop_path_rate(block: usize, depth: usize, rate: f64) -> f64 {
    if depth < 2 {
        rate
    } else {
        rate * block as f64 / (depth - 1) as f64
    }
}

/// Factor of one residual branch of one sample: 0 with probability `rate`, else `1 / (1 - rate)` (Huang et al., 2016).
pub fn drop_path_scale(stream: &mut Stream, rate: f64) -> f32 {
    // Drawn at every rate, so that the numbers of later branches do not depend on it.
    if stream.uniform_f64() < rate {
        0.0
    } else {
        (1.0 / (1.0 - rate)) as f32
    }
}

/// Sorts the patches of one picture by noise: the first [`crate::config::len_keep`] of `order` are visible, the rest masked.
///
/// Equal noise keeps the order of the patches, as a stable sort does.
///
/// # Shapes
/// `noise: [num_patches]`, `order: [num_patches]`.
///
/// # Errors
/// If `order` is shorter than `noise`, or a noise is NaN.
pub fn random_masking(noise: &[f32], order: &mut [u32]) -> Result<(), Error> {
    const OP: &str = "random_masking";
    expect_len(OP, "order", order.len(), noise.len())?;
    if let Some(at) = noise.iter().position(|x| x.is_nan()) {
        return Err(Error::NotANumber {
            op: OP,
            what: "noise",
            at,
        });
    }
    let order = &mut order[..noise.len()];
    for (place, patch) in order.iter_mut().zip(0..) {
        *place = patch;
    }
    // The index decides between equals, so the unstable sort, which needs no memory, gives the stable one's order.
    order.sort_unstable_by(|&a, &b| {
        noise[a as usize]
            .partial_cmp(&noise[b as usize])
            .unwrap_or(core::cmp::Ordering::Equal)
            .then(a.cmp(&b))
    });
    Ok(())
}
