//! Random values, and central differences.

use pcae_kernel::backend::{Linear, Norm, Span};
use pcae_kernel::reference::{Heap, Reference};
use pcae_kernel::rng::{Purpose, Stream};

/// The reference in double precision, on which every formula is checked.
pub(crate) type Double = Reference<f64, Heap<f64>>;

/// Step of the central differences.
///
/// With values of order 1 their truncation error is about `STEP² / 6 = 2e-11` times a third derivative, their rounding
/// error about `f64::EPSILON / STEP = 2e-11`: a smaller step makes the second larger, a larger one the first.
pub(crate) const STEP: f64 = 1e-5;
/// Allowed difference of a gradient: a few hundred times the errors above, since third derivatives reach some hundred and
/// a sum of some hundred terms is rounded as often. A wrong term is wrong by far more.
pub(crate) const ATOL: f64 = 1e-8;
/// The same, relative to the gradient.
pub(crate) const RTOL: f64 = 1e-7;

/// `len` numbers uniform in (-1, 1), others for every `seed`.
pub(crate) fn random(seed: u64, len: usize) -> Vec<f64> {
    let mut stream = Stream::new(seed, 0, 0, Purpose::Init);
    (0..len).map(|_| 2.0 * stream.uniform_f64() - 1.0).collect()
}

pub(crate) fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// Panics unless `found` is `want` within the tolerance.
pub(crate) fn close(what: &str, found: f64, want: f64, atol: f64, rtol: f64) {
    let error = (found - want).abs();
    assert!(
        error <= atol + rtol * want.abs(),
        "{what}: found {found:e}, expected {want:e}, off by {error:e}"
    );
}

/// Holds `gradient`, element by element, against central differences of `f` at `x`.
pub(crate) fn check_gradient(
    what: &str,
    x: &[f64],
    gradient: &[f64],
    mut f: impl FnMut(&[f64]) -> f64,
) {
    assert_eq!(x.len(), gradient.len(), "{what}");
    let mut moved = x.to_vec();
    for i in 0..x.len() {
        moved[i] = x[i] + STEP;
        let above = f(&moved);
        moved[i] = x[i] - STEP;
        let below = f(&moved);
        moved[i] = x[i];
        let numeric = (above - below) / (2.0 * STEP);
        close(&format!("{what}[{i}]"), gradient[i], numeric, ATOL, RTOL);
    }
}

/// A span.
pub(crate) const fn span(start: usize, len: usize) -> Span {
    Span { start, len }
}

/// A linear layer's parameters from `start` on, with one unused element between weight and bias.
pub(crate) const fn linear_at(start: usize, in_features: usize, out_features: usize) -> Linear {
    let weight = span(start, in_features * out_features);
    Linear {
        weight,
        bias: span(weight.end() + 1, out_features),
    }
}

/// A norm's parameters from `start` on, with one unused element between weight and bias.
pub(crate) const fn norm_at(start: usize, dim: usize) -> Norm {
    Norm {
        weight: span(start, dim),
        bias: span(start + dim + 1, dim),
    }
}
