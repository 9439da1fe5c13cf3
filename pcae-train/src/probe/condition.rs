//! The scale of a logistic regression's weights: coordinates in which features are alike, so that L-BFGS needs few iterations.

use ndarray::linalg::general_mat_mul;
use ndarray::{Array2, ArrayView2, Axis, s};
use rayon::prelude::*;

/// Rows whose products are added in f64 at a time.
const BLOCK: usize = 256;
/// Pieces that are added in order, so that sums do not depend on threads.
const PIECES: usize = 16;
/// The least that is added to the diagonal, relative to features of unit variance: far above what rounding makes of zeros.
const LEAST: f64 = 1e-9;

/// Mean products of the columns of `x`.
///
/// # Shapes
/// `x: [pictures, dim]`; returns `[dim, dim]`.
pub(super) fn products(x: ArrayView2<'_, f32>) -> Array2<f64> {
    let (rows, dim) = x.dim();
    let piece = rows.div_ceil(PIECES).max(BLOCK);
    let starts: Vec<usize> = (0..rows).step_by(piece).collect();
    let pieces: Vec<Array2<f64>> = starts
        .into_par_iter()
        .map(|start| {
            let piece = x.slice(s![start..(start + piece).min(rows), ..]);
            let mut sum = Array2::zeros((dim, dim));
            for block in piece.axis_chunks_iter(Axis(0), BLOCK) {
                let block = block.mapv(f64::from);
                general_mat_mul(1.0, &block.t(), &block, 1.0, &mut sum);
            }
            sum
        })
        .collect();
    let mut sum = Array2::zeros((dim, dim));
    pieces.iter().for_each(|piece| sum += piece);
    sum / rows.max(1) as f64
}

/// Coordinates `v` of weights `w = v L⁻¹`, where `L Lᵀ` is the Hessian that a guess has for each class, `p (1 - p) XᵀX / n + l2`.
/// In them it is the identity, and that of a fit is close to a multiple of it.
pub(super) struct Condition {
    dim: usize,
    /// `L`, and its transpose, row by row.
    lower: Vec<f64>,
    upper: Vec<f64>,
}

impl Condition {
    /// By Cholesky's decomposition.
    pub(super) fn new(products: &Array2<f64>, classes: usize, l2: f64) -> Self {
        let dim = products.nrows();
        let p = 1.0 / classes.max(2) as f64;
        let mut lower = vec![0.0; dim * dim];
        for i in 0..dim {
            for j in 0..=i {
                let (row_i, row_j) = (&lower[i * dim..][..j], &lower[j * dim..][..j]);
                let dot: f64 = row_i.iter().zip(row_j).map(|(a, b)| a * b).sum();
                let hessian = p * (1.0 - p) * products[(i, j)];
                lower[i * dim + j] = if i == j {
                    let least = l2.max(LEAST);
                    // Rounding may leave less than the sum of squares that it is.
                    (hessian + least - dot).max(least).sqrt()
                } else {
                    (hessian - dot) / lower[j * dim + j]
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

    /// Weights from their coordinates, for each class: `w L = v`.
    pub(super) fn weights(&self, v: &mut [f64]) {
        for row in v.chunks_exact_mut(self.dim) {
            for i in (0..self.dim).rev() {
                let upper = &self.upper[i * self.dim..][..self.dim];
                let known = dot(&upper[i + 1..], &row[i + 1..]);
                row[i] = (row[i] - known) / upper[i];
            }
        }
    }

    /// Coordinates of weights, for each class: `v = w L`.
    pub(super) fn coordinates(&self, w: &mut [f64]) {
        for row in w.chunks_exact_mut(self.dim) {
            for i in 0..self.dim {
                row[i] = dot(&self.upper[i * self.dim + i..][..self.dim - i], &row[i..]);
            }
        }
    }

    /// The gradient by the coordinates from that by the weights, for each class: `d_v Lᵀ = d_w`.
    pub(super) fn gradient(&self, d_w: &mut [f64]) {
        for row in d_w.chunks_exact_mut(self.dim) {
            for i in 0..self.dim {
                let lower = &self.lower[i * self.dim..][..self.dim];
                let known = dot(&lower[..i], &row[..i]);
                row[i] = (row[i] - known) / lower[i];
            }
        }
    }
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use pcae_kernel::rng::{Purpose, Stream};

    /// There and back, and the gradient by the chain rule; also where columns are copies of each other, or zero.
    #[test]
    fn coordinates_are_of_the_weights() {
        let mut stream = Stream::new(1, 0, 0, Purpose::Init);
        let mut x = Array2::from_shape_fn((700, 5), |_| stream.normal());
        let copy = x.column(0).to_owned();
        x.column_mut(3).assign(&copy);
        x.column_mut(4).fill(0.0);
        let products = products(x.view());
        for row in 0..700 {
            assert_eq!(x[(row, 3)], x[(row, 0)]);
        }
        let want: f64 = x.column(1).iter().map(|&x| f64::from(x).powi(2)).sum();
        assert!((products[(1, 1)] - want / 700.0).abs() < 1e-12);
        let condition = Condition::new(&products, 3, 1e-3);
        let w: Vec<f64> = (0..15).map(|_| f64::from(stream.normal())).collect();
        let mut v = w.clone();
        condition.coordinates(&mut v);
        // |v|² is what the Hessian says of w.
        for class in 0..3 {
            let w = &w[class * 5..][..5];
            let mut hessian = 0.0;
            for i in 0..5 {
                for j in 0..5 {
                    let ridge = if i == j { 1e-3 } else { 0.0 };
                    hessian += w[i] * w[j] * (2.0 / 9.0 * products[(i, j)] + ridge);
                }
            }
            let square: f64 = v[class * 5..][..5].iter().map(|v| v * v).sum();
            assert!(
                (hessian - square).abs() < 1e-12 * (1.0 + square),
                "{hessian} {square}"
            );
        }
        // A linear function of the weights, d·w, is (d L⁻ᵀ)·v.
        let d: Vec<f64> = (0..15).map(|_| f64::from(stream.normal())).collect();
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
