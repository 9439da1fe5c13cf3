//! The linear probe of MAE (He et al., 2022, appendix A.1): batch norm without affine parameters, a linear layer, LARS or
//! SGD.

use ndarray::{Array1, Array2, ArrayView2, Axis};
use pcae_kernel::rng::{Purpose, Stream};
use serde::Serialize;

use super::scores::Head;

/// As MAE's code has it.
const BATCH_NORM_EPS: f32 = 1e-6;
/// Part of the running statistics that each batch replaces, PyTorch's default.
const RUNNING: f32 = 0.1;
/// Standard deviation of the initial weights, cut off at two of it.
const INIT_STD: f32 = 0.01;
/// LARS: part of a weight's norm that a step of rate 1 moves it by.
const TRUST: f32 = 0.001;

/// What updates the head.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Optimizer {
    /// Momentum.
    Sgd,
    /// Momentum with a rate for each weight matrix by its norm (You et al., 2017).
    Lars,
}

/// Momentum and weight decay.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Recipe {
    pub(super) optimizer: Optimizer,
    pub(super) momentum: f32,
    pub(super) weight_decay: f32,
}

impl Recipe {
    /// One step on one tensor.
    ///
    /// `d = g + weight_decay * p`, under LARS times `0.001 |p| / |d|`; `v = momentum * v + d`; `p = p - lr * v`. Under LARS a
    /// bias (`is_bias`) has neither decay nor trust ratio, as in MAE's code.
    fn update(&self, lr: f32, is_bias: bool, p: &mut [f32], v: &mut [f32], g: &[f32]) {
        let adapts = self.optimizer == Optimizer::Lars;
        let decay = if adapts && is_bias {
            0.0
        } else {
            self.weight_decay
        };
        let mut scale = 1.0;
        if adapts && !is_bias {
            let norm = |x: &mut dyn Iterator<Item = f32>| x.map(|x| x * x).sum::<f32>().sqrt();
            let of_p = norm(&mut p.iter().copied());
            let of_d = norm(&mut p.iter().zip(g).map(|(p, g)| g + decay * p));
            if of_p > 0.0 && of_d > 0.0 {
                scale = TRUST * of_p / of_d;
            }
        }
        for ((p, v), g) in p.iter_mut().zip(v).zip(g) {
            *v = self.momentum * *v + scale * (g + decay * *p);
            *p -= lr * *v;
        }
    }
}

/// A probe in training.
pub(super) struct Probe {
    recipe: Recipe,
    head: Head,
    velocity: Head,
    running_mean: Array1<f32>,
    running_var: Array1<f32>,
}

impl Probe {
    pub(super) fn new(recipe: Recipe, dim: usize, classes: usize, seed: u64) -> Self {
        let mut stream = Stream::new(seed, 0, 0, Purpose::Init);
        let mut truncated = || {
            loop {
                let x = stream.normal();
                if x.abs() <= 2.0 {
                    return INIT_STD * x;
                }
            }
        };
        Self {
            recipe,
            head: Head {
                weight: Array2::from_shape_simple_fn((classes, dim), &mut truncated),
                bias: Array1::zeros(classes),
            },
            velocity: Head {
                weight: Array2::zeros((classes, dim)),
                bias: Array1::zeros(classes),
            },
            running_mean: Array1::zeros(dim),
            running_var: Array1::ones(dim),
        }
    }

    /// One step on a batch; returns its mean cross entropy before the step.
    ///
    /// # Shapes
    /// `x: [batch, dim]` with at least two rows, `labels: [batch]`.
    pub(super) fn step(&mut self, x: ArrayView2<'_, f32>, labels: &[u32], lr: f32) -> f32 {
        let x = self.normalize(x);
        let mut d_logits = self.head.logits(x.view());
        let rows = labels.len() as f32;
        let mut loss = 0.0;
        for (mut row, &label) in d_logits.axis_iter_mut(Axis(0)).zip(labels) {
            let label = label as usize;
            let most = row.fold(f32::NEG_INFINITY, |most, &logit| most.max(logit));
            let right = row[label] - most;
            row.mapv_inplace(|logit| (logit - most).exp());
            let sum = row.sum();
            loss += f64::from(sum.ln() - right);
            row.mapv_inplace(|p| p / sum);
            row[label] -= 1.0;
            row.mapv_inplace(|d| d / rows);
        }
        let d_weight = d_logits.t().dot(&x);
        let d_bias = d_logits.sum_axis(Axis(0));
        let Self {
            recipe,
            head,
            velocity,
            ..
        } = self;
        if let (Some(p), Some(v), Some(g)) = (
            head.weight.as_slice_mut(),
            velocity.weight.as_slice_mut(),
            d_weight.as_standard_layout().as_slice(),
        ) {
            recipe.update(lr, false, p, v, g);
        }
        if let (Some(p), Some(v), Some(g)) = (
            head.bias.as_slice_mut(),
            velocity.bias.as_slice_mut(),
            d_bias.as_slice(),
        ) {
            recipe.update(lr, true, p, v, g);
        }
        (loss / f64::from(rows)) as f32
    }

    /// Batch norm by the batch's own mean and variance, which the running ones follow.
    fn normalize(&mut self, x: ArrayView2<'_, f32>) -> Array2<f32> {
        let rows = x.nrows() as f32;
        let mean = x.sum_axis(Axis(0)) / rows;
        let mut x = &x - &mean;
        let squares = x.map(|x| x * x).sum_axis(Axis(0));
        let follow = |running: &mut Array1<f32>, now: Array1<f32>| {
            running.zip_mut_with(&now, |running, now| *running += RUNNING * (now - *running));
        };
        follow(&mut self.running_mean, mean);
        // PyTorch normalises with the biased variance and keeps the unbiased one.
        follow(&mut self.running_var, &squares / (rows - 1.0));
        x /= &squares.mapv(|squares| (squares / rows + BATCH_NORM_EPS).sqrt());
        x
    }

    /// # Shapes
    /// `x: [pictures, dim]`, result `[pictures, classes]`.
    pub(super) fn logits(&self, x: ArrayView2<'_, f32>) -> Array2<f32> {
        let scale = self.running_var.mapv(|var| (var + BATCH_NORM_EPS).sqrt());
        self.head
            .logits(((&x - &self.running_mean) / &scale).view())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ndarray::array;

    fn close(a: &[f32], b: &[f32]) {
        assert_eq!(a.len(), b.len());
        for (a, b) in a.iter().zip(b) {
            assert!((a - b).abs() <= 1e-6 * b.abs().max(1.0), "{a} {b}");
        }
    }

    const fn recipe(optimizer: Optimizer) -> Recipe {
        Recipe {
            optimizer,
            momentum: 0.5,
            weight_decay: 0.1,
        }
    }

    /// Two steps by hand.
    #[test]
    fn sgd_is_its_formula() {
        let (mut p, mut v) = ([1.0, -2.0], [0.0; 2]);
        recipe(Optimizer::Sgd).update(0.1, false, &mut p, &mut v, &[0.3, 0.4]);
        // d = [0.4, 0.2]
        close(&v, &[0.4, 0.2]);
        close(&p, &[0.96, -2.02]);
        recipe(Optimizer::Sgd).update(0.1, false, &mut p, &mut v, &[0.0, 1.0]);
        // d = [0.096, 0.798], v = [0.296, 0.898]
        close(&v, &[0.296, 0.898]);
        close(&p, &[0.9304, -2.1098]);
        // A bias decays too, as with torch.optim.SGD.
        let (mut p, mut v) = ([1.0], [0.0]);
        recipe(Optimizer::Sgd).update(0.1, true, &mut p, &mut v, &[0.0]);
        close(&p, &[0.99]);
    }

    #[test]
    fn lars_is_its_formula() {
        let (mut p, mut v) = ([3.0, 4.0], [0.5, 0.0]);
        // d = [0.6, 0.8] + 0.1 p - [0.3, 0.4] = [0.6, 0.8]: of norm 1, beside |p| = 5.
        recipe(Optimizer::Lars).update(2.0, false, &mut p, &mut v, &[0.3, 0.4]);
        close(&v, &[0.25 + 0.003, 0.004]);
        close(&p, &[3.0 - 0.506, 4.0 - 0.008]);
        // Neither decay nor trust ratio for a bias.
        let (mut p, mut v) = ([3.0], [0.0]);
        recipe(Optimizer::Lars).update(2.0, true, &mut p, &mut v, &[0.3]);
        close(&p, &[2.4]);
        // Without a norm there is no ratio.
        let (mut p, mut v) = ([0.0, 0.0], [0.0; 2]);
        recipe(Optimizer::Lars).update(1.0, false, &mut p, &mut v, &[0.3, 0.4]);
        close(&p, &[-0.3, -0.4]);
    }

    #[test]
    fn batch_norm_is_torchs() {
        let mut probe = Probe::new(recipe(Optimizer::Sgd), 2, 3, 0);
        let x = probe.normalize(array![[1.0, 10.0], [3.0, 10.0], [8.0, 10.0]].view());
        // Mean 4, biased variance 26 / 3, unbiased 13.
        let scale = (26.0_f32 / 3.0).sqrt();
        close(
            &x.column(0).to_vec(),
            &[-3.0 / scale, -1.0 / scale, 4.0 / scale],
        );
        close(&x.column(1).to_vec(), &[0.0; 3]);
        close(probe.running_mean.as_slice().unwrap(), &[0.4, 1.0]);
        close(probe.running_var.as_slice().unwrap(), &[0.9 + 1.3, 0.9]);
    }

    /// With a rate of 0 nothing moves; with a small one the loss falls by rate times the gradient's square, which the
    /// central difference of the loss along the gradient gives.
    #[test]
    fn the_gradient_is_that_of_the_loss() {
        let recipe = Recipe {
            optimizer: Optimizer::Sgd,
            momentum: 0.0,
            weight_decay: 0.0,
        };
        let x = array![
            [0.3, -1.0],
            [1.3, 0.2],
            [-0.4, 0.9],
            [0.8, 2.0],
            [-2.0, 0.1]
        ];
        let labels = [0, 2, 1, 1, 0];
        let new = || {
            let mut probe = Probe::new(recipe, 2, 3, 4);
            probe.head.weight *= 50.0;
            probe
        };
        let loss = |probe: &mut Probe| probe.step(x.view(), &labels, 0.0);
        let mut moved = new();
        moved.step(x.view(), &labels, 1.0);
        let d_weight = &new().head.weight - &moved.head.weight;
        let d_bias = &new().head.bias - &moved.head.bias;
        // In f32 a loss of order 1 is off by some 1e-7, over a step of 1e-2 by 1e-5; the third derivative is below 1.
        for i in 0..9 {
            let at = |step: f32| {
                let mut probe = new();
                match i {
                    0..6 => probe.head.weight[[i / 2, i % 2]] += step,
                    _ => probe.head.bias[i - 6] += step,
                }
                loss(&mut probe)
            };
            let numeric = (at(1e-2) - at(-1e-2)) / 2e-2;
            let gradient = if i < 6 {
                d_weight[[i / 2, i % 2]]
            } else {
                d_bias[i - 6]
            };
            assert!(
                (gradient - numeric).abs() < 5e-5,
                "{i}: {gradient} {numeric}"
            );
        }
    }

    #[test]
    fn separable_classes_are_learned_by_either() {
        for (optimizer, lr) in [(Optimizer::Sgd, 0.5), (Optimizer::Lars, 20.0)] {
            let recipe = Recipe {
                optimizer,
                momentum: 0.9,
                weight_decay: 0.0,
            };
            let labels: Vec<u32> = (0..60).map(|i| i % 3).collect();
            let x = Array2::from_shape_fn((60, 4), |(i, j)| {
                let wobble = ((i * 7 + j * 3) as f32).sin();
                40.0 + if i % 3 == j { 3.0 } else { 0.0 } + 0.3 * wobble
            });
            let mut probe = Probe::new(recipe, 4, 3, 1);
            for _ in 0..100 {
                probe.step(x.view(), &labels, lr);
            }
            let scores = super::super::scores::Scores::of(&probe.logits(x.view()), &labels);
            assert_eq!(scores.top1, 1.0, "{optimizer:?}");
        }
    }
}
