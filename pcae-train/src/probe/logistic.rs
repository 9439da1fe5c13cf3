//! Multinomial logistic regression with an L2 penalty, on features that stay as they are: the fast probe.

use ndarray::linalg::general_mat_mul;
use ndarray::{Array1, Array2, ArrayView2, ArrayViewMut2, Axis, s};
use rayon::prelude::*;
use serde::Serialize;

use super::condition::{Condition, products};
use super::lbfgs::{Minimum, minimize};
use super::scores::{Head, Scores};

/// Pieces whose gradients are added in order, so that sums do not depend on threads.
const PIECES: usize = 32;
/// Rows at a time within a piece: their f64 copies stay in the cache.
const BLOCK: usize = 256;
/// A gradient by [`Condition`]'s coordinates whose elements are all below this moves no prediction: in them a guess has the unit
/// matrix as its Hessian.
const TOLERANCE: f64 = 1e-6;
/// The same while penalties are compared, of which each is ten times the next.
const ROUGH_TOLERANCE: f64 = 1e-5;
const ITERATIONS: usize = 1000;

/// A fit's data and penalty.
pub(super) struct Problem<'a> {
    /// `[pictures, dim]`
    pub(super) x: ArrayView2<'a, f32>,
    pub(super) labels: &'a [u32],
    pub(super) classes: usize,
    /// Of half the sum of the squared weights; the biases have none.
    pub(super) l2: f64,
}

impl Problem<'_> {
    /// Elements of `params`.
    fn len(&self) -> usize {
        self.classes * (self.x.ncols() + 1)
    }

    /// `mean(cross entropy) + l2 / 2 * |W|²`, and its gradient.
    ///
    /// # Shapes
    /// `params, gradient: [classes * dim + classes]`, the weights and then the biases.
    fn value(&self, params: &[f64], gradient: &mut [f64]) -> f64 {
        let (rows, dim) = self.x.dim();
        let weights = self.classes * dim;
        let piece = rows.div_ceil(PIECES).max(BLOCK);
        let starts: Vec<usize> = (0..rows).step_by(piece).collect();
        let sums: Vec<(f64, Vec<f64>)> = starts
            .into_par_iter()
            .map(|start| self.piece(start..(start + piece).min(rows), params))
            .collect();
        let scale = 1.0 / rows as f64;
        gradient.fill(0.0);
        let mut loss = 0.0;
        for (piece_loss, piece) in sums {
            loss += piece_loss;
            for (gradient, piece) in gradient.iter_mut().zip(piece) {
                *gradient += scale * piece;
            }
        }
        let mut squares = 0.0;
        for (gradient, w) in gradient.iter_mut().zip(&params[..weights]) {
            *gradient += self.l2 * w;
            squares += w * w;
        }
        scale * loss + 0.5 * self.l2 * squares
    }

    /// Sums of the loss and of its gradient over some rows.
    fn piece(&self, rows: std::ops::Range<usize>, params: &[f64]) -> (f64, Vec<f64>) {
        let (classes, dim) = (self.classes, self.x.ncols());
        let (weight, bias) = params.split_at(classes * dim);
        let mut gradient = vec![0.0; params.len()];
        let (d_weight, d_bias) = gradient.split_at_mut(classes * dim);
        let shape = (classes, dim);
        let (Ok(weight), Ok(mut d_weight)) = (
            ArrayView2::from_shape(shape, weight),
            ArrayViewMut2::from_shape(shape, d_weight),
        ) else {
            return (f64::NAN, gradient);
        };
        let mut loss = 0.0;
        for start in rows.clone().step_by(BLOCK) {
            let range = start..(start + BLOCK).min(rows.end);
            let x = self.x.slice(s![range.clone(), ..]).mapv(f64::from);
            let mut d_logits = x.dot(&weight.t());
            for (mut row, &label) in d_logits.axis_iter_mut(Axis(0)).zip(&self.labels[range]) {
                for (logit, bias) in row.iter_mut().zip(bias) {
                    *logit += bias;
                }
                let label = label as usize;
                let most = row.fold(f64::NEG_INFINITY, |most, &logit| most.max(logit));
                let right = row[label] - most;
                row.mapv_inplace(|logit| (logit - most).exp());
                let sum = row.sum();
                loss += sum.ln() - right;
                row.mapv_inplace(|p| p / sum);
                row[label] -= 1.0;
                for (d_bias, d) in d_bias.iter_mut().zip(&row) {
                    *d_bias += d;
                }
            }
            general_mat_mul(1.0, &d_logits.t(), &x, 1.0, &mut d_weight);
        }
        (loss, gradient)
    }

    /// The best parameters, looked for from `start` on. `products` are those of `x`.
    fn fit(&self, products: &Array2<f64>, start: Option<Vec<f64>>, tolerance: f64) -> Minimum {
        let weights = self.classes * self.x.ncols();
        let condition = Condition::new(products, self.classes, self.l2);
        let mut start = start.unwrap_or_else(|| vec![0.0; self.len()]);
        condition.coordinates(&mut start[..weights]);
        let mut params = vec![0.0; self.len()];
        let mut end = minimize(start, ITERATIONS, tolerance, |coordinates, gradient| {
            params.copy_from_slice(coordinates);
            condition.weights(&mut params[..weights]);
            let value = self.value(&params, gradient);
            condition.gradient(&mut gradient[..weights]);
            value
        });
        condition.weights(&mut end.x[..weights]);
        end
    }

    fn head(&self, params: &[f64]) -> Head {
        let dim = self.x.ncols();
        let mut weight = Array2::zeros((self.classes, dim));
        let mut bias = Array1::zeros(self.classes);
        let targets = weight.iter_mut().chain(bias.iter_mut());
        for (to, from) in targets.zip(params) {
            *to = *from as f32;
        }
        Head { weight, bias }
    }
}

/// A penalty that was tried.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Tried {
    /// The penalty.
    pub l2: f64,
    /// Top-1 on the part of the training pictures that was not fitted.
    pub top1: f64,
    /// Iterations of L-BFGS.
    pub iterations: usize,
    /// Whether it came to the minimum in them.
    pub converged: bool,
}

/// A fitted classifier and how its penalty was chosen.
pub(super) struct Fitted {
    pub(super) head: Head,
    pub(super) l2: f64,
    pub(super) tried: Vec<Tried>,
    /// The objective at the end, on all training pictures.
    pub(super) loss: f64,
    pub(super) iterations: usize,
    pub(super) converged: bool,
}

/// Fits `fit` with each of the penalties, keeps the one that classifies `choose` best (of equals the strongest), and fits
/// all of `x` with it.
///
/// # Shapes
/// `x: [pictures, dim]`; `fit` and `choose` are rows of it.
pub(super) fn fit(
    x: ArrayView2<'_, f32>,
    labels: &[u32],
    classes: usize,
    (fit, choose): (&[usize], &[usize]),
    penalties: &[f64],
) -> Fitted {
    let mut penalties = penalties.to_vec();
    penalties.sort_by(|a, b| b.total_cmp(a));
    let part = |rows: &[usize]| {
        let of = rows.iter().map(|&row| labels[row]);
        (x.select(Axis(0), rows), of.collect::<Vec<u32>>())
    };
    let mut tried: Vec<Tried> = Vec::new();
    let mut best: Option<(f64, Vec<f64>)> = None;
    let mut start = None;
    let mut l2 = penalties.first().copied().unwrap_or(0.0);
    if penalties.len() > 1 {
        let ((x, labels), (unseen, unseen_labels)) = (part(fit), part(choose));
        let products = products(x.view());
        for &penalty in &penalties {
            let problem = Problem {
                x: x.view(),
                labels: &labels,
                classes,
                l2: penalty,
            };
            // From the strong to the weak, each from where the one before ended.
            let end = problem.fit(&products, start.take(), ROUGH_TOLERANCE);
            let scores = Scores::of(&problem.head(&end.x).logits(unseen.view()), &unseen_labels);
            tried.push(Tried {
                l2: penalty,
                top1: scores.top1,
                iterations: end.iterations,
                converged: end.converged,
            });
            if best.as_ref().is_none_or(|(most, _)| scores.top1 > *most) {
                best = Some((scores.top1, end.x.clone()));
                l2 = penalty;
            }
            start = Some(end.x);
        }
    }
    let problem = Problem {
        x,
        labels,
        classes,
        l2,
    };
    let start = best.map(|(_, params)| params);
    let end = problem.fit(&products(x), start, TOLERANCE);
    Fitted {
        head: problem.head(&end.x),
        l2,
        tried,
        loss: end.value,
        iterations: end.iterations,
        converged: end.converged,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pcae_kernel::rng::{Purpose, Stream};

    fn data(rows: usize, dim: usize, classes: u32, shift: f32) -> (Array2<f32>, Vec<u32>) {
        let mut stream = Stream::new(7, 0, 0, Purpose::Init);
        let labels: Vec<u32> = (0..rows).map(|_| stream.below(classes)).collect();
        let mut x = Array2::zeros((rows, dim));
        for (mut row, &label) in x.axis_iter_mut(Axis(0)).zip(&labels) {
            row.mapv_inplace(|_: f32| stream.normal());
            row[label as usize] += shift;
        }
        (x, labels)
    }

    /// Central differences with a step of 1e-5: their error is some 1e-11 (rounding of a value of order 1 over the step,
    /// and the step squared times a third derivative below 1). Rows beyond a block and a piece, so that those are added up.
    #[test]
    fn the_gradient_is_that_of_the_value() {
        let (x, labels) = data(2 * BLOCK + 37, 5, 3, 0.5);
        let problem = Problem {
            x: x.view(),
            labels: &labels,
            classes: 3,
            l2: 0.03,
        };
        let mut stream = Stream::new(8, 0, 0, Purpose::Init);
        let params: Vec<f64> = (0..problem.len())
            .map(|_| f64::from(stream.normal()))
            .collect();
        let mut gradient = vec![f64::NAN; params.len()];
        problem.value(&params, &mut gradient);
        let mut ignored = vec![0.0; params.len()];
        for i in 0..params.len() {
            let mut at = |step: f64| {
                let mut moved = params.clone();
                moved[i] += step;
                problem.value(&moved, &mut ignored)
            };
            let numeric = (at(1e-5) - at(-1e-5)) / 2e-5;
            assert!(
                (gradient[i] - numeric).abs() < 1e-9,
                "{i}: {} {numeric}",
                gradient[i]
            );
        }
    }

    /// Constant features: the optimum is known in closed form, biases equal to the logarithms of the frequencies up to a
    /// constant, and the loss is the entropy.
    #[test]
    fn without_information_the_frequencies_are_learned() {
        let labels: Vec<u32> = (0..100)
            .map(|i| [0, 0, 0, 0, 0, 1, 1, 1, 2, 2][i % 10])
            .collect();
        let x = Array2::zeros((100, 2));
        let problem = Problem {
            x: x.view(),
            labels: &labels,
            classes: 3,
            l2: 1e-3,
        };
        let end = problem.fit(&products(x.view()), None, TOLERANCE);
        let bias = &end.x[6..];
        // A gradient of 1e-6 over curvatures of 0.1 to 0.25.
        assert!(
            (bias[0] - bias[1] - (0.5_f64 / 0.3).ln()).abs() < 1e-4,
            "{bias:?}"
        );
        assert!(
            (bias[0] - bias[2] - (0.5_f64 / 0.2).ln()).abs() < 1e-4,
            "{bias:?}"
        );
        let entropy = -(0.5_f64 * 0.5_f64.ln() + 0.3 * 0.3_f64.ln() + 0.2 * 0.2_f64.ln());
        assert!((end.value - entropy).abs() < 1e-9);
        assert!(end.x[..6].iter().all(|w| w.abs() < 1e-6));
    }

    /// Two classes, one feature of +1 and -1, four in five on the right side. By symmetry the weights are ±w with
    /// `sigmoid(-2w) - 0.2 + l2 * w = 0` (half the derivative with respect to each), solved here by bisection.
    #[test]
    fn the_optimum_is_the_known_one() {
        let labels: Vec<u32> = (0..40).map(|i| u32::from(i >= 20)).collect();
        let x = Array2::from_shape_fn((40, 1), |(i, _)| {
            let right = i % 5 != 0;
            if (i >= 20) == right { 1.0 } else { -1.0 }
        });
        for l2 in [1e-4, 0.1, 2.0] {
            let problem = Problem {
                x: x.view(),
                labels: &labels,
                classes: 2,
                l2,
            };
            let end = problem.fit(&products(x.view()), None, TOLERANCE);
            let slope = |w: f64| 0.8 - 1.0 / (1.0 + (-2.0 * w).exp()) - l2 * w;
            let (mut low, mut high) = (0.0, 10.0);
            for _ in 0..100 {
                let middle = 0.5 * (low + high);
                if slope(middle) > 0.0 {
                    low = middle
                } else {
                    high = middle
                }
            }
            assert!((end.x[1] - low).abs() < 1e-5, "{l2}: {:?} {low}", end.x);
            assert!((end.x[0] + low).abs() < 1e-5, "{l2}: {:?} {low}", end.x);
        }
    }

    /// Features of which each is nearly the one before it, with next to no penalty: without
    /// [`Condition`] it takes 738 iterations.
    #[test]
    fn alike_features_are_told_apart_in_few_iterations() {
        let (mut x, labels) = data(600, 24, 3, 1.0);
        for column in 1..24 {
            let before = x.column(column - 1).to_owned();
            let mut own = x.column_mut(column);
            own *= 0.05;
            own += &before;
        }
        let problem = Problem {
            x: x.view(),
            labels: &labels,
            classes: 3,
            l2: 1e-6,
        };
        let end = problem.fit(&products(x.view()), None, TOLERANCE);
        assert!(end.converged && end.iterations < 200, "{}", end.iterations);
    }

    #[test]
    fn the_penalty_is_chosen_on_what_was_not_fitted() {
        // Few rows in many dimensions: without a penalty noise is learned.
        let (x, labels) = data(160, 60, 3, 1.0);
        let fit_rows: Vec<usize> = (0..160).filter(|i| i % 4 != 0).collect();
        let choose: Vec<usize> = (0..160).step_by(4).collect();
        let penalties = [1e-6, 10.0, 0.1];
        let fitted = fit(x.view(), &labels, 3, (&fit_rows, &choose), &penalties);
        let order: Vec<f64> = fitted.tried.iter().map(|tried| tried.l2).collect();
        assert_eq!(order, [10.0, 0.1, 1e-6]);
        let best = fitted
            .tried
            .iter()
            .map(|tried| tried.top1)
            .fold(0.0, f64::max);
        let chosen = fitted
            .tried
            .iter()
            .find(|tried| tried.top1 == best)
            .unwrap();
        assert_eq!(fitted.l2, chosen.l2);
        assert!(fitted.tried[2].top1 < best, "{:?}", fitted.tried);
        // One penalty needs no choice.
        let fitted = fit(x.view(), &labels, 3, (&fit_rows, &choose), &[0.1]);
        assert!(fitted.tried.is_empty() && fitted.l2 == 0.1);
    }

    #[test]
    fn bits_do_not_depend_on_threads() {
        let (x, labels) = data(3000, 9, 4, 1.0);
        let problem = Problem {
            x: x.view(),
            labels: &labels,
            classes: 4,
            l2: 1e-3,
        };
        let on = |threads| {
            let pool = rayon::ThreadPoolBuilder::new()
                .num_threads(threads)
                .build()
                .unwrap();
            pool.install(|| problem.fit(&products(x.view()), None, TOLERANCE).x)
        };
        assert_eq!(on(1), on(3));
    }
}
