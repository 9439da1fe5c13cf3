//! L-BFGS (Liu and Nocedal, 1989), the optimizer of the logistic regression: smooth, convex, all data at once.

use std::collections::VecDeque;

/// Pairs of steps and changes of the gradient that are kept: with 10 the weak penalties take up to twice the iterations.
const MEMORY: usize = 25;
/// Parts of the slope that a step must win (Armijo) and may leave (weak Wolfe).
const WIN: f64 = 1e-4;
const LEAVE: f64 = 0.9;
/// Tries of a line search; each halves or doubles the step, so that more would be below rounding.
const TRIES: usize = 40;

/// Where a minimisation ended.
#[derive(Clone, Debug)]
pub(super) struct Minimum {
    pub(super) x: Vec<f64>,
    pub(super) value: f64,
    pub(super) iterations: usize,
    /// Whether it is one, as far as numbers tell, rather than the end of the iterations.
    pub(super) converged: bool,
}

/// Minimises `f`, which returns its value at a point and writes its gradient there, from `x` on, until no element of the
/// gradient is larger than `tolerance`, rounding stops the progress, or `iterations` are done.
pub(super) fn minimize(
    mut x: Vec<f64>,
    iterations: usize,
    tolerance: f64,
    mut f: impl FnMut(&[f64], &mut [f64]) -> f64,
) -> Minimum {
    let mut gradient = vec![0.0; x.len()];
    let mut value = f(&x, &mut gradient);
    let mut history: VecDeque<Pair> = VecDeque::with_capacity(MEMORY);
    let (mut done, mut is_stuck) = (0, false);
    let (mut next, mut next_gradient) = (x.clone(), gradient.clone());
    while done < iterations && largest(&gradient) > tolerance {
        let direction = direction(&gradient, &history);
        let slope = dot(&direction, &gradient);
        // A first step of length 1 at most: the gradient has no scale yet.
        let first = if history.is_empty() {
            1.0 / dot(&gradient, &gradient).sqrt().max(1.0)
        } else {
            1.0
        };
        // By bisection (Lewis and Overton, 2013): `low` wins enough and could go on, `high` does not win.
        let (mut low, mut high, mut step) = (0.0, f64::INFINITY, first);
        let mut found = None;
        for _ in 0..TRIES {
            for ((next, x), d) in next.iter_mut().zip(&x).zip(&direction) {
                *next = x + step * d;
            }
            let next_value = f(&next, &mut next_gradient);
            // A value that is no number wins nothing.
            if next_value.is_nan() || next_value > value + WIN * step * slope {
                high = step;
            } else if dot(&direction, &next_gradient) < LEAVE * slope {
                low = step;
            } else {
                found = Some(next_value);
                break;
            }
            step = if high.is_finite() {
                0.5 * (low + high)
            } else {
                2.0 * step
            };
        }
        let Some(next_value) = found else {
            is_stuck = true;
            break;
        };
        let pair = Pair::new(&x, &next, &gradient, &next_gradient);
        if pair.curvature > 0.0 {
            if history.len() == MEMORY {
                history.pop_front();
            }
            history.push_back(pair);
        }
        std::mem::swap(&mut x, &mut next);
        std::mem::swap(&mut gradient, &mut next_gradient);
        value = next_value;
        done += 1;
    }
    Minimum {
        converged: is_stuck || largest(&gradient) <= tolerance,
        x,
        value,
        iterations: done,
    }
}

/// A step and what it did to the gradient.
struct Pair {
    step: Vec<f64>,
    change: Vec<f64>,
    /// Their dot product.
    curvature: f64,
}

impl Pair {
    fn new(x: &[f64], next: &[f64], gradient: &[f64], next_gradient: &[f64]) -> Self {
        let difference = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a - b).collect();
        let (step, change): (Vec<f64>, Vec<f64>) =
            (difference(next, x), difference(next_gradient, gradient));
        Self {
            curvature: dot(&step, &change),
            step,
            change,
        }
    }
}

/// The two-loop recursion: minus the approximate inverse Hessian times the gradient.
fn direction(gradient: &[f64], history: &VecDeque<Pair>) -> Vec<f64> {
    let mut q: Vec<f64> = gradient.iter().map(|g| -g).collect();
    let mut along = Vec::with_capacity(history.len());
    for pair in history.iter().rev() {
        let a = dot(&pair.step, &q) / pair.curvature;
        add(&mut q, -a, &pair.change);
        along.push(a);
    }
    if let Some(pair) = history.back() {
        let scale = pair.curvature / dot(&pair.change, &pair.change);
        q.iter_mut().for_each(|q| *q *= scale);
    }
    for (pair, a) in history.iter().zip(along.into_iter().rev()) {
        let b = dot(&pair.change, &q) / pair.curvature;
        add(&mut q, a - b, &pair.step);
    }
    q
}

fn add(x: &mut [f64], a: f64, y: &[f64]) {
    for (x, y) in x.iter_mut().zip(y) {
        *x += a * y;
    }
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn largest(x: &[f64]) -> f64 {
    x.iter().fold(0.0, |largest, x| x.abs().max(largest))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Rosenbrock's valley, whose minimum is 0 at (1, 1): curved, badly scaled, the usual test.
    #[test]
    fn the_valley_is_followed_to_its_end() {
        let valley = |x: &[f64], g: &mut [f64]| {
            let (a, b) = (1.0 - x[0], x[1] - x[0] * x[0]);
            g[0] = -2.0 * a - 400.0 * x[0] * b;
            g[1] = 200.0 * b;
            a * a + 100.0 * b * b
        };
        let end = minimize(vec![-1.2, 1.0], 200, 1e-9, valley);
        assert!(end.value < 1e-16 && end.iterations < 100, "{end:?}");
        assert!(
            (end.x[0] - 1.0).abs() < 1e-8 && (end.x[1] - 1.0).abs() < 1e-8,
            "{end:?}"
        );
    }

    /// At this condition, 78,125, steepest descent takes some hundred thousand iterations.
    #[test]
    fn curvature_is_learned() {
        let scales: Vec<f64> = (0..8).map(|i| 5.0_f64.powi(i)).collect();
        let bowl = |x: &[f64], g: &mut [f64]| {
            let mut value = 0.0;
            for ((x, g), s) in x.iter().zip(g).zip(&scales) {
                *g = s * (x - 3.0);
                value += 0.5 * s * (x - 3.0).powi(2);
            }
            value
        };
        let end = minimize(vec![0.0; 8], 500, 1e-7, bowl);
        assert!(
            end.converged && end.iterations < 200 && end.value < 1e-9,
            "{end:?}"
        );
        // At the minimum already: nothing to do.
        assert_eq!(minimize(vec![3.0; 8], 500, 1e-7, bowl).iterations, 0);
        let early = minimize(vec![0.0; 8], 2, 1e-7, bowl);
        assert!(!early.converged && early.iterations == 2);
    }
}
