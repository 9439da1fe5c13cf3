//! Multinomial logistic regression with an L2 penalty, on features that stay as they are: the fast probe.

use ndarray::linalg::general_mat_mul;
use ndarray::{Array1, Array2, ArrayView2, ArrayViewMut2, Axis, s};
use rayon::prelude::*;
use serde::Serialize;

use super::condition::Condition;
use super::lbfgs::{Minimum, minimize};
use super::middle;
use super::scores::{Head, Scores};

/// Pieces whose gradients are added in order, so that sums do not depend on threads.
const PIECES: usize = 32;
/// Rows at a time within a piece: their f64 copies stay in the cache.
const BLOCK: usize = 256;
/// A gradient by [`Condition`]'s coordinates whose elements are all below this moves no prediction: in them each class has the unit
/// matrix as its Hessian. Measured on 60,000 pictures with features of 96 (penalty 1e-6): the loss is within 3e-6 of the one after three
/// times as many iterations. What is left below is along shifts of all classes together, of which only the penalty knows.
const TOLERANCE: f64 = 1e-5;
/// A thousand where a fit from the next stronger penalty takes 30 to 250.
const ITERATIONS: usize = 1000;
/// Iterations after which coordinates are those of the place that was come to: one that is far from the start has another Hessian.
const CONDITION_EVERY: usize = 200;
/// Most elements of a Hessian's blocks, 256 MiB; of more there is their mean.
const MOST_ELEMENTS: usize = 1 << 25;

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

    /// The Hessian's block of each class at `params`, without the penalty: `Xᵀ diag(p (1 - p)) X / n` with a column of ones for
    /// the bias. Of many classes with many features the mean of all blocks.
    fn hessians(&self, params: &[f64]) -> Vec<Array2<f64>> {
        let (rows, dim) = self.x.dim();
        let (weight, bias) = params.split_at(self.classes * dim);
        let blocks = if self.classes * (dim + 1) * (dim + 1) <= MOST_ELEMENTS {
            self.classes
        } else {
            1
        };
        let mut hessians = vec![Array2::zeros((dim + 1, dim + 1)); blocks];
        let Ok(weight) = ArrayView2::from_shape((self.classes, dim), weight) else {
            return hessians;
        };
        for start in (0..rows).step_by(BLOCK) {
            let range = start..(start + BLOCK).min(rows);
            let mut x = Array2::ones((range.len(), dim + 1));
            x.slice_mut(s![.., ..dim])
                .assign(&self.x.slice(s![range, ..]).mapv(f64::from));
            let mut spread = x.slice(s![.., ..dim]).dot(&weight.t());
            for mut row in spread.axis_iter_mut(Axis(0)) {
                row.iter_mut().zip(bias).for_each(|(l, bias)| *l += bias);
                let most = row.fold(f64::NEG_INFINITY, |most, &logit| most.max(logit));
                row.mapv_inplace(|logit| (logit - most).exp());
                let sum = row.sum();
                row.mapv_inplace(|p| p / sum * (1.0 - p / sum));
                if blocks == 1 {
                    row[0] = row.sum() / self.classes as f64;
                }
            }
            // Each block by one thread, in the order of the rows.
            hessians
                .par_iter_mut()
                .enumerate()
                .for_each(|(class, hessian)| {
                    let scale = spread.column(class).to_owned().insert_axis(Axis(1)) / rows as f64;
                    general_mat_mul(1.0, &x.t(), &(&x * &scale), 1.0, hessian);
                });
        }
        hessians
    }

    /// The best parameters, looked for from `start` on.
    fn fit(&self, start: Option<Vec<f64>>) -> Minimum {
        let dim = self.x.ncols();
        let weights = self.classes * dim;
        // The weights of a class and its bias in a row, and back.
        let gather = |params: &[f64]| -> Vec<f64> {
            let rows = params[..weights].chunks_exact(dim).zip(&params[weights..]);
            rows.flat_map(|(w, bias)| w.iter().chain([bias]).copied())
                .collect()
        };
        let scatter = |rows: &[f64], params: &mut [f64]| {
            let (weight, bias) = params.split_at_mut(weights);
            let to = weight.chunks_exact_mut(dim).zip(bias);
            for ((weight, bias), row) in to.zip(rows.chunks_exact(dim + 1)) {
                weight.copy_from_slice(&row[..dim]);
                *bias = row[dim];
            }
        };
        let mut params = start.unwrap_or_else(|| vec![0.0; self.len()]);
        let mut iterations = 0;
        loop {
            let hessians = self.hessians(&params);
            let conditions: Vec<Condition> = hessians
                .iter()
                .map(|hessian| Condition::new(hessian, self.l2))
                .collect();
            let each = |rows: &mut [f64], change: fn(&Condition, &mut [f64])| {
                let conditions = conditions.iter().cycle();
                rows.chunks_exact_mut(dim + 1)
                    .zip(conditions)
                    .for_each(|(row, condition)| change(condition, row));
            };
            let mut start = gather(&params);
            each(&mut start, Condition::coordinates);
            let mut d_params = vec![0.0; self.len()];
            let most = CONDITION_EVERY.min(ITERATIONS - iterations);
            let mut end = minimize(start, most, TOLERANCE, |coordinates, gradient| {
                let mut rows = coordinates.to_vec();
                each(&mut rows, Condition::weights);
                scatter(&rows, &mut params);
                let value = self.value(&params, &mut d_params);
                gradient.copy_from_slice(&gather(&d_params));
                each(gradient, Condition::gradient);
                value
            });
            each(&mut end.x, Condition::weights);
            scatter(&end.x, &mut params);
            iterations += end.iterations;
            if end.converged || iterations >= ITERATIONS {
                return Minimum {
                    x: params,
                    iterations,
                    ..end
                };
            }
        }
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

/// Fits `fit` with each of the penalties, keeps the one that classifies `choose` best (of equals the strongest; the middle one
/// where there is nothing in `choose`), and fits all of `x` with it.
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
    let mut l2 = middle(&penalties).unwrap_or(0.0);
    if penalties.len() > 1 && !choose.is_empty() {
        let ((x, labels), (unseen, unseen_labels)) = (part(fit), part(choose));
        for &penalty in &penalties {
            let problem = Problem {
                x: x.view(),
                labels: &labels,
                classes,
                l2: penalty,
            };
            // From the strong to the weak, each from where the one before ended.
            let end = problem.fit(start.take());
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
    let end = problem.fit(start);
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
        let end = problem.fit(None);
        let bias = &end.x[6..];
        // A gradient of 1e-5 by coordinates over roots of curvatures, 0.4 to 0.5.
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
            let end = problem.fit(None);
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

    /// Features of which each is nearly the one before it, with next to no penalty.
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
        let end = problem.fit(None);
        assert!(end.converged && end.iterations < 200, "{}", end.iterations);
    }

    /// Central differences of the gradient by each class's own weights; the mean of the blocks where there is no room for all.
    #[test]
    fn hessians_are_those_of_the_value() {
        let (x, labels) = data(BLOCK + 61, 4, 3, 0.7);
        let problem = Problem {
            x: x.view(),
            labels: &labels,
            classes: 3,
            l2: 0.0,
        };
        let mut stream = Stream::new(9, 0, 0, Purpose::Init);
        let params: Vec<f64> = (0..problem.len())
            .map(|_| f64::from(stream.normal()))
            .collect();
        let hessians = problem.hessians(&params);
        let place = |class: usize, i: usize| if i < 4 { class * 4 + i } else { 12 + class };
        for (class, hessian) in hessians.iter().enumerate() {
            for i in 0..5 {
                let at = |step: f64| {
                    let (mut moved, mut gradient) = (params.clone(), vec![0.0; params.len()]);
                    moved[place(class, i)] += step;
                    problem.value(&moved, &mut gradient);
                    gradient
                };
                let (above, below) = (at(1e-5), at(-1e-5));
                for j in 0..5 {
                    let numeric = (above[place(class, j)] - below[place(class, j)]) / 2e-5;
                    // As the gradient's: some 1e-11 of rounding, and the step squared.
                    let error = (hessian[(i, j)] - numeric).abs();
                    assert!(error < 1e-9, "{class} {i} {j}: {error}");
                }
            }
        }
    }

    /// Confusable classes, features of very different weight, next to no penalty and a start far away: 243 iterations. With the
    /// Hessian of a guess alone, and ten pairs in L-BFGS, 606.
    #[test]
    fn a_weak_penalty_is_no_reason_not_to_converge() {
        let (mut x, labels) = data(4000, 40, 8, 0.0);
        let mut stream = Stream::new(11, 0, 0, Purpose::Init);
        let centres = Array2::from_shape_fn((8, 40), |_| stream.normal());
        for (mut row, &label) in x.axis_iter_mut(Axis(0)).zip(&labels) {
            // Pairs of classes differ in the last columns alone.
            let (pair, odd) = (label as usize / 2 * 2, label % 2 == 1);
            for (column, x) in row.iter_mut().enumerate() {
                let far = 4.0 * centres[(pair, column)];
                *x = 0.05 * *x * (column + 1) as f32
                    + far
                    + if odd && column > 36 { 1.0 } else { 0.0 };
            }
        }
        let problem = Problem {
            x: x.view(),
            labels: &labels,
            classes: 8,
            l2: 1e-7,
        };
        let end = problem.fit(None);
        assert!(end.converged && end.iterations < 400, "{}", end.iterations);
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
            pool.install(|| problem.fit(None).x)
        };
        assert_eq!(on(1), on(3));
    }
}
