//! The scale of a logistic regression's weights: coordinates in which features are alike, so that L-BFGS needs few iterations.

use ndarray::Array2;

/// The least that is added to the diagonal, relative to features of unit variance: far above what rounding makes of zeros.
const LEAST: f64 = 1e-9;

/// Coordinates `v` of the weights and the bias of a class, `w = v L⁻¹`, where `L Lᵀ` is a block of a Hessian. In them it is the
/// identity.
pub(super) struct Condition {
    dim: usize,
    /// `L`, and its transpose, row by row.
    lower: Vec<f64>,
    upper: Vec<f64>,
}

impl Condition {
    /// By Cholesky's decomposition of `hessian + l2`, whose last row is the bias's, which has no penalty.
    pub(super) fn new(hessian: &Array2<f64>, l2: f64) -> Self {
        let dim = hessian.nrows();
        let mut lower = vec![0.0; dim * dim];
        for i in 0..dim {
            let least = if i + 1 < dim { l2.max(LEAST) } else { LEAST };
            for j in 0..=i {
                let dot = dot(&lower[i * dim..][..j], &lower[j * dim..][..j]);
                lower[i * dim + j] = if i == j {
                    // Rounding may leave less than the sum of squares that it is.
                    (hessian[(i, i)] + least - dot).max(least).sqrt()
                } else {
                    (hessian[(i, j)] - dot) / lower[j * dim + j]
                };
            }
        }
        let mut upper = vec![0.0; dim * dim];
        for i in 0..dim {
            for j in i..dim {
                upper[i * dim + j] = lower[j * dim + i];
            }
        }
        Self { dim, lower, upper }
    }

    /// Weights from their coordinates: `w L = v`.
    pub(super) fn weights(&self, v: &mut [f64]) {
        for i in (0..self.dim).rev() {
            let upper = &self.upper[i * self.dim..][..self.dim];
            v[i] = (v[i] - dot(&upper[i + 1..], &v[i + 1..])) / upper[i];
        }
    }

    /// Coordinates of weights: `v = w L`.
    pub(super) fn coordinates(&self, w: &mut [f64]) {
        for i in 0..self.dim {
            w[i] = dot(&self.upper[i * self.dim + i..][..self.dim - i], &w[i..]);
        }
    }

    /// The gradient by the coordinates from that by the weights: `d_v Lᵀ = d_w`.
    pub(super) fn gradient(&self, d_w: &mut [f64]) {
        for i in 0..self.dim {
            let lower = &self.lower[i * self.dim..][..self.dim];
            d_w[i] = (d_w[i] - dot(&lower[..i], &d_w[..i])) / lower[i];
        }
    }
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use ndarray::Array2;
    use pcae_kernel::rng::{Purpose, Stream};

    /// There and back, and the gradient by the chain rule; also where columns are copies of each other, or zero.
    #[test]
    fn coordinates_are_of_the_weights() {
        let mut stream = Stream::new(1, 0, 0, Purpose::Init);
        let mut x = Array2::from_shape_fn((700, 5), |_| f64::from(stream.normal()));
        let copy = x.column(0).to_owned();
        x.column_mut(3).assign(&copy);
        x.column_mut(2).fill(0.0);
        let hessian = x.t().dot(&x) / 700.0;
        let condition = Condition::new(&hessian, 1e-3);
        let w: Vec<f64> = (0..5).map(|_| f64::from(stream.normal())).collect();
        let mut v = w.clone();
        condition.coordinates(&mut v);
        // |v|² is what the Hessian says of w.
        let mut want = 0.0;
        for i in 0..5 {
            for j in 0..5 {
                let ridge = if i == j && i < 4 { 1e-3 } else { 0.0 };
                want += w[i] * w[j] * (hessian[(i, j)] + ridge);
            }
        }
        // The bias has the least that is added, 1e-9.
        let square = dot(&v, &v);
        assert!((want - square).abs() < 1e-8 * want, "{want} {square}");
        // A linear function of the weights, d·w, is (d L⁻ᵀ)·v.
        let d: Vec<f64> = (0..5).map(|_| f64::from(stream.normal())).collect();
        let mut d_v = d.clone();
        condition.gradient(&mut d_v);
        assert!((dot(&d, &w) - dot(&d_v, &v)).abs() < 1e-11);
        condition.weights(&mut v);
        for (back, w) in v.iter().zip(&w) {
            // Conditions of 1e3 and less: a few digits of sixteen are lost.
            assert!((back - w).abs() < 1e-11, "{back} {w}");
        }
    }
}
