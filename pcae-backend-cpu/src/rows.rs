//! Kernels on rows: what is not a matrix product.

use crate::cpu::LINE;
use crate::isa::kernel;
use crate::math::{exp, exp2};
use crate::simd::Simd;

/// Sum of a row in vectors, two at a time to hide the latency of an addition.
#[inline(always)]
fn sum<S: Simd>(s: S, x: &[f32]) -> f32 {
    let (mut even, mut odd) = (s.splat(0.0), s.splat(0.0));
    for pair in x.chunks(2 * S::LANES) {
        let (first, second) = pair.split_at(S::LANES.min(pair.len()));
        even = s.add(even, s.load(first));
        odd = s.add(odd, s.load(second));
    }
    s.sum(s.add(even, odd))
}

/// `sum of (x[i] - mean)^2`
///
/// # Accuracy
/// Relative error at most `(dim + 3) * f32::EPSILON / 2`: the difference is rounded once and squared, the rest adds
/// non-negative terms.
#[inline(always)]
fn sum_squares_about<S: Simd>(s: S, x: &[f32], mean: f32) -> f32 {
    let mean = s.splat(mean);
    let (mut even, mut odd) = (s.splat(0.0), s.splat(0.0));
    for pair in x.chunks(2 * S::LANES) {
        let (first, second) = pair.split_at(S::LANES.min(pair.len()));
        let a = s.sub(s.load_or(first, mean), mean);
        let b = s.sub(s.load_or(second, mean), mean);
        even = s.mul_add(a, a, even);
        odd = s.mul_add(b, b, odd);
    }
    s.sum(s.add(even, odd))
}

/// Mean and `1 / sqrt(sum of squares / count + eps)`.
#[inline(always)]
fn moments<S: Simd>(s: S, x: &[f32], count: usize, eps: f64) -> (f32, f32) {
    let mean = sum(s, x) / x.len() as f32;
    let var = f64::from(sum_squares_about(s, x, mean)) / count as f64;
    (mean, (1.0 / (var + eps).sqrt()) as f32)
}

/// Squares that are summed in f32: of at most 1024 with 8 partial sums or more, the error stays below 1e-5 and is
/// typically a hundred times less, at the speed of memory.
const SQUARES: usize = 1024;
/// Lanes of the sums in f64, the same for every instruction set.
const WIDE: usize = 8;

/// `sum of f(a[i], b[i])` in f64, in a fixed order.
#[inline(always)]
fn sum_wide(a: &[f32], b: &[f32], f: impl Fn(f64, f64) -> f64) -> f64 {
    let (a, a_rest) = a.as_chunks::<WIDE>();
    let (b, b_rest) = b.as_chunks::<WIDE>();
    let mut sums = [0.0; WIDE];
    for (a, b) in a.iter().zip(b) {
        for ((sum, a), b) in sums.iter_mut().zip(a).zip(b) {
            *sum += f(f64::from(*a), f64::from(*b));
        }
    }
    for ((sum, a), b) in sums.iter_mut().zip(a_rest).zip(b_rest) {
        *sum += f(f64::from(*a), f64::from(*b));
    }
    sums.iter().sum()
}

/// `x[i] = exp(scale * x[i] - max)` for `i < count`, `max` the largest of `scale * x[i]`: a softmax but for its divisor.
/// Gives `max` and the sum, which is NaN if an element is. `scale` is positive, `count` is not 0, and `x` ends with the
/// vector of its last element; what lies behind that element is lost.
///
/// # Accuracy
/// Relative error at most `3e-7 + 2e-7 * |scale * x[i] - max|` (three roundings of the exponent, and that of its factor),
/// but nothing is below `2^-125`.
#[inline(always)]
pub(crate) fn exp_row<S: Simd>(s: S, x: &mut [f32], count: usize, scale: f32) -> (f32, f32) {
    let lowest = s.splat(f32::NEG_INFINITY);
    // Whole vectors are loaded and stored: what comes next reads them again, and would wait for a masked store.
    let last = (count - 1) / S::LANES * S::LANES;
    let cap = s.load_or(&[f32::INFINITY; 16][..count - last], lowest);
    let (body, tail) = x.split_at_mut(last);
    let mut max = s.min(s.load(tail), cap);
    for x in body.chunks_exact(S::LANES) {
        max = s.max(max, s.load(x));
    }
    let max = s.max_lane(max);
    let (slope, shift) = (s.splat(scale * core::f32::consts::LOG2_E), s.splat(max));
    let mut total = exp_from(s, s.min(s.load(tail), cap), shift, slope);
    s.store(tail, total);
    for x in body.chunks_exact_mut(S::LANES) {
        let e = exp_from(s, s.load(x), shift, slope);
        total = s.add(total, e);
        s.store(x, e);
    }
    (max * scale, s.sum(total))
}

/// `2^(slope * (x - shift))`, at least `2^-125`. Not a closure: those are inlined as the compiler likes, and outside of the function
/// that enables the instructions each of them is a call.
#[inline(always)]
fn exp_from<S: Simd>(s: S, x: S::V, shift: S::V, slope: S::V) -> S::V {
    // Beside the sum, which is 1 at least, less is nothing, whereas a subnormal number costs some processors a hundred
    // cycles. NaN is the second operand, and so passes. The difference first: it is 0 at the maximum however large that is.
    exp2(s, s.max(s.splat(-125.0), s.mul(s.sub(x, shift), slope)))
}

/// `p = exp(scale * p - lse)`, the softmax again from its log-sum-exp, and `d_p = scale * p * (d_p - delta)`, its backward. Held by the
/// conformance suite within that of attention.
#[inline(always)]
pub(crate) fn softmax_backward_row<S: Simd>(
    s: S,
    p: &mut [f32],
    d_p: &mut [f32],
    scale: f32,
    lse: f32,
    delta: f32,
) {
    let (scale, lse, delta) = (s.splat(scale), s.splat(lse), s.splat(delta));
    for (p, d_p) in p.chunks_mut(S::LANES).zip(d_p.chunks_mut(S::LANES)) {
        let e = exp(s, s.sub(s.mul(s.load(p), scale), lse));
        s.store(p, e);
        s.store(d_p, s.mul(s.mul(e, scale), s.sub(s.load(d_p), delta)));
    }
}

/// `sum of a[i] * b[i]`
#[inline(always)]
pub(crate) fn dot_row<S: Simd>(s: S, a: &[f32], b: &[f32]) -> f32 {
    let mut total = s.splat(0.0);
    for (a, b) in a.chunks(S::LANES).zip(b.chunks(S::LANES)) {
        total = s.mul_add(s.load(a), s.load(b), total);
    }
    s.sum(total)
}

kernel! {
    /// Layer norm of one row; gives mean and reciprocal standard deviation.
    ///
    /// # Accuracy
    /// With `u = f32::EPSILON / 2`, `k = dim / 8 + 8` (roundings of a sum in vectors), `h` the normalised element and
    /// `m = k * u * mean(|x|) * rstd` (what rounding of the mean makes of it), the error is at most
    /// `|weight| * (m + |h| * ((k / 2 + 5) * u + m^2)) + u * |out|`, for `m < 1` and as long as `sum(x^2)` is in f32's range.
    fn layer_norm<'a, S>(s; out: &'a mut [f32], x: &'a [f32], weight: &'a [f32], bias: &'a [f32], eps: f64) -> (f32, f32) {
        let (mean, rstd) = moments(s, x, x.len(), eps);
        let (m, r) = (s.splat(mean), s.splat(rstd));
        let params = weight.chunks(S::LANES).zip(bias.chunks(S::LANES));
        for ((out, x), (weight, bias)) in out.chunks_mut(S::LANES).zip(x.chunks(S::LANES)).zip(params) {
            let h = s.mul(s.sub(s.load(x), m), r);
            s.store(out, s.mul_add(h, s.load(weight), s.load(bias)));
        }
        (mean, rstd)
    }

    /// Gradients of layer norm for one row: `d_x` is overwritten, or added to where `add` is set; `d_weight` and
    /// `d_bias` are added to. Held by the conformance suite within the tolerance of that operation.
    fn layer_norm_backward<'a, S>(
        s;
        d_x: &'a mut [f32], add: bool, d_weight: &'a mut [f32], d_bias: &'a mut [f32],
        d_y: &'a [f32], x: &'a [f32], weight: &'a [f32], mean: f32, rstd: f32,
    ) -> () {
        let (m, r) = (s.splat(mean), s.splat(rstd));
        let (mut sum_g, mut sum_gh) = (s.splat(0.0), s.splat(0.0));
        let grads = d_weight.chunks_mut(S::LANES).zip(d_bias.chunks_mut(S::LANES));
        let inputs = d_y.chunks(S::LANES).zip(x.chunks(S::LANES)).zip(weight.chunks(S::LANES));
        for ((d_weight, d_bias), ((d_y, x), weight)) in grads.zip(inputs) {
            let d_y = s.load(d_y);
            let h = s.mul(s.sub(s.load(x), m), r);
            // Past the end of the row `d_y` is 0, and so is all that is added.
            let g = s.mul(d_y, s.load(weight));
            sum_g = s.add(sum_g, g);
            sum_gh = s.mul_add(g, h, sum_gh);
            s.store(d_weight, s.mul_add(d_y, h, s.load(d_weight)));
            s.store(d_bias, s.add(d_y, s.load(d_bias)));
        }
        let mean_g = s.splat(s.sum(sum_g) / x.len() as f32);
        let mean_gh = s.splat(s.sum(sum_gh) / x.len() as f32);
        let inputs = d_y.chunks(S::LANES).zip(x.chunks(S::LANES)).zip(weight.chunks(S::LANES));
        for (d_x, ((d_y, x), weight)) in d_x.chunks_mut(S::LANES).zip(inputs) {
            let g = s.mul(s.load(d_y), s.load(weight));
            let h = s.mul(s.sub(s.load(x), m), r);
            let d = s.mul(r, s.neg_mul_add(h, mean_gh, s.sub(g, mean_g)));
            let d = if add { s.add(s.load(d_x), d) } else { d };
            s.store(d_x, d);
        }
    }

    /// `(x - mean) / sqrt(var + eps)` of one row, with the unbiased variance.
    ///
    /// # Accuracy
    /// As [`layer_norm`]'s with a weight of 1 and no bias.
    fn standardise<'a, S>(s; out: &'a mut [f32], x: &'a [f32], eps: f64) -> () {
        let (mean, rstd) = moments(s, x, x.len().saturating_sub(1), eps);
        let (m, r) = (s.splat(mean), s.splat(rstd));
        for (out, x) in out.chunks_mut(S::LANES).zip(x.chunks(S::LANES)) {
            s.store(out, s.mul(s.sub(s.load(x), m), r));
        }
    }

    /// `out = a + b`
    fn add_to<'a, S>(s; out: &'a mut [f32], a: &'a [f32], b: &'a [f32]) -> () {
        for ((out, a), b) in out.chunks_mut(S::LANES).zip(a.chunks(S::LANES)).zip(b.chunks(S::LANES)) {
            s.store(out, s.add(s.load(a), s.load(b)));
        }
    }

    /// `out = scale * x`
    fn scale<'a, S>(s; out: &'a mut [f32], x: &'a [f32], scale: f32) -> () {
        let scale = s.splat(scale);
        for (out, x) in out.chunks_mut(S::LANES).zip(x.chunks(S::LANES)) {
            s.store(out, s.mul(scale, s.load(x)));
        }
    }

    /// `total += sum over rows of x[row * stride..]`, as wide as `total`.
    ///
    /// # Accuracy
    /// Rows are added in groups of 32, whose sums are then added: the error grows as the number of groups, not of rows.
    fn sum_rows<'a, S>(s; total: &'a mut [f32], x: &'a [f32], rows: usize, stride: usize) -> () {
        // Four vectors of each row at a time, and rows to come on their way: they lie far apart.
        for (i, total) in total.chunks_mut(4 * S::LANES).enumerate() {
            let (at, len) = (4 * i * S::LANES, total.len());
            let mut all = [s.splat(0.0); 4];
            for first in (0..rows).step_by(32) {
                let mut group = [s.splat(0.0); 4];
                for row in first..(first + 32).min(rows) {
                    for line in (0..len).step_by(LINE) {
                        s.prefetch_near(x.as_ptr().wrapping_add((row + 16) * stride + at + line));
                    }
                    let columns = x[row * stride + at..][..len].chunks(S::LANES);
                    for (group, columns) in group.iter_mut().zip(columns) {
                        *group = s.add(*group, s.load(columns));
                    }
                }
                for (all, group) in all.iter_mut().zip(group) {
                    *all = s.add(*all, group);
                }
            }
            for (total, all) in total.chunks_mut(S::LANES).zip(all) {
                s.store(total, s.add(s.load(total), all));
            }
        }
    }

    /// Cosine of one row, and its gradient times `factor`; norms are at least `eps`.
    ///
    /// # Accuracy
    /// Sums are in f64: the cosine is exact to `dim * f64::EPSILON`. The gradient is the difference of two products, each
    /// right to `2 * f32::EPSILON` of itself.
    fn cosine<'a, S>(s; d_pred: &'a mut [f32], pred: &'a [f32], target: &'a [f32], eps: f64, factor: f64) -> f64 {
        let norm_pred = sum_wide(pred, pred, |a, b| a * b).sqrt();
        let norm_target = sum_wide(target, target, |a, b| a * b).sqrt().max(eps);
        let product = 1.0 / (norm_pred.max(eps) * norm_target);
        let cosine = sum_wide(pred, target, |a, b| a * b) * product;
        // A norm at its lower bound is a constant.
        let own = if norm_pred > eps { cosine / (norm_pred * norm_pred) } else { 0.0 };
        let (toward, own) = (s.splat((factor * product) as f32), s.splat((factor * own) as f32));
        let inputs = pred.chunks(S::LANES).zip(target.chunks(S::LANES));
        for (d, (pred, target)) in d_pred.chunks_mut(S::LANES).zip(inputs) {
            s.store(d, s.neg_mul_add(own, s.load(pred), s.mul(toward, s.load(target))));
        }
        cosine
    }

    /// Sum of `(pred - target)^2`, and `d_pred = factor * (pred - target)`.
    fn squared_error<'a, S>(s; d_pred: &'a mut [f32], pred: &'a [f32], target: &'a [f32], factor: f32) -> f64 {
        let factor = s.splat(factor);
        let inputs = pred.chunks(S::LANES).zip(target.chunks(S::LANES));
        for (d, (pred, target)) in d_pred.chunks_mut(S::LANES).zip(inputs) {
            s.store(d, s.mul(factor, s.sub(s.load(pred), s.load(target))));
        }
        sum_wide(pred, target, |a, b| (a - b) * (a - b))
    }

    /// Cross-entropy of one row, and `d_logits = factor * (softmax(logits) * sum(target) - target)`.
    ///
    /// # Accuracy
    /// With `u = f32::EPSILON / 2` and `k = dim / 4 + 8`, the cross-entropy is right to `sum(target) * (k + 3) * u`, and each
    /// element of the gradient to `factor * (sum(target) * p * (k + 7 + |x - max|) * u + 2 * u * |difference|)`, `p` its
    /// probability; nothing below `f32::MIN_POSITIVE` counts.
    fn cross_entropy<'a, S>(s; d_logits: &'a mut [f32], logits: &'a [f32], target: &'a [f32], factor: f32) -> f64 {
        let lowest = s.splat(f32::NEG_INFINITY);
        let mut max = lowest;
        for x in logits.chunks(S::LANES) {
            max = s.max(max, s.load_or(x, lowest));
        }
        let max = s.max_lane(max);
        let shift = s.splat(max);
        let mut total = s.splat(0.0);
        for (d, x) in d_logits.chunks_mut(S::LANES).zip(logits.chunks(S::LANES)) {
            let e = exp(s, s.sub(s.load_or(x, lowest), shift));
            total = s.add(total, e);
            s.store(d, e);
        }
        let total = s.sum(total);
        let mass = sum_wide(target, target, |t, _| t);
        let (probability, factor) = (s.splat((mass / f64::from(total)) as f32), s.splat(factor));
        for (d, t) in d_logits.chunks_mut(S::LANES).zip(target.chunks(S::LANES)) {
            let difference = s.sub(s.mul(s.load(d), probability), s.load(t));
            s.store(d, s.mul(factor, difference));
        }
        let (log_total, max) = (f64::from(total).ln(), f64::from(max));
        sum_wide(logits, target, |x, t| t * (log_total - (x - max)))
    }

    /// Redundancy of each token of one sequence, in f64 throughout: selection must not see rounding.
    /// `mean: [dim]` and `inverse: [tokens]` are scratch.
    fn mean_similarity<'a, S>(_s; scores: &'a mut [f32], x: &'a [f32], mean: &'a mut [f64], inverse: &'a mut [f64], eps: f64) -> () {
        let dim = mean.len();
        mean.fill(0.0);
        for (x, inverse) in x.chunks(dim).zip(&mut *inverse) {
            *inverse = 1.0 / sum_wide(x, x, |a, b| a * b).sqrt().max(eps);
            for (mean, x) in mean.iter_mut().zip(x) {
                *mean += f64::from(*x) * *inverse;
            }
        }
        let count = inverse.len() as f64;
        for ((score, x), inverse) in scores.iter_mut().zip(x.chunks(dim)).zip(&*inverse) {
            let mut sums = [0.0; WIDE];
            for (x, mean) in x.chunks(WIDE).zip(mean.chunks(WIDE)) {
                for ((sum, x), mean) in sums.iter_mut().zip(x).zip(mean) {
                    *sum += f64::from(*x) * mean;
                }
            }
            *score = (sums.iter().sum::<f64>() * inverse / count) as f32;
        }
    }

    /// Order of the tokens of one sequence in a pivoted QR decomposition. `residual: [tokens, dim]` and
    /// `direction: [dim]` are scratch.
    fn pivoted_qr<'a, S>(_s; scores: &'a mut [f32], x: &'a [f32], residual: &'a mut [f64], direction: &'a mut [f64]) -> () {
        let dim = direction.len();
        for (residual, x) in residual.iter_mut().zip(x) {
            *residual = f64::from(*x);
        }
        scores.fill(-1.0);
        for rank in 0..scores.len() {
            let mut best: Option<(usize, f64)> = None;
            for (token, row) in residual.chunks(dim).enumerate() {
                let length = sum_squares_wide(row);
                if scores[token] < 0.0 && best.is_none_or(|(_, longest)| length > longest) {
                    best = Some((token, length));
                }
            }
            let Some((token, length)) = best else { return };
            scores[token] = rank as f32;
            if length == 0.0 {
                continue;
            }
            direction.copy_from_slice(&residual[token * dim..][..dim]);
            for (row, score) in residual.chunks_mut(dim).zip(&*scores) {
                if *score < 0.0 {
                    let along = dot_wide(row, direction) / length;
                    for (r, d) in row.iter_mut().zip(&*direction) {
                        *r -= along * d;
                    }
                }
            }
        }
    }

    /// Sum over the columns of the standard deviation of each: `columns` columns from `x[at]`, rows `stride` apart.
    fn sum_of_spreads<'a, S>(_s; x: &'a [f32], rows: usize, stride: usize, columns: usize) -> f64 {
        let mut total = 0.0;
        let mut at = 0;
        while at < columns {
            let width = WIDE.min(columns - at);
            let mut mean = [0.0; WIDE];
            for row in x.chunks(stride).take(rows) {
                for (mean, x) in mean.iter_mut().zip(&row[at..][..width]) {
                    *mean += f64::from(*x) / rows as f64;
                }
            }
            let mut var = [0.0; WIDE];
            for row in x.chunks(stride).take(rows) {
                for ((var, x), mean) in var.iter_mut().zip(&row[at..][..width]).zip(mean) {
                    *var += (f64::from(*x) - mean) * (f64::from(*x) - mean);
                }
            }
            total += var.iter().map(|var| (var / rows as f64).sqrt()).sum::<f64>();
            at += width;
        }
        total
    }

    /// `sum of x[i]^2`: pieces in f32, their sums in f64.
    fn sum_squares<'a, S>(s; x: &'a [f32]) -> f64 {
        let mut total = 0.0;
        for piece in x.chunks(SQUARES) {
            total += f64::from(sum_squares_about(s, piece, 0.0));
        }
        total
    }

    /// AdamW, the teacher's moving average and zeroing of the gradient, in one pass.
    ///
    /// # Accuracy
    /// With `u = f32::EPSILON / 2`: the moments are right to `4 * u` of the sizes of their two terms, the parameter to
    /// `2 * u * |w|` and `16 * u` of the update that those sizes would make. Gradients beyond 1e-15 to 1e18 lose their square.
    fn adamw<'a, S>(
        s;
        student: &'a mut [f32], teacher: Option<&'a mut [f32]>, grads: &'a mut [f32],
        exp_avg: &'a mut [f32], exp_avg_sq: &'a mut [f32], c: AdamWConstants,
    ) -> () {
        let [beta1, one_minus_beta1, beta2, one_minus_beta2] =
            [c.beta1, 1.0 - c.beta1, c.beta2, 1.0 - c.beta2].map(|x| s.splat(x as f32));
        let [clip, decay, step, unbias2, eps] =
            [c.clip, c.decay, c.step, c.unbias2, c.eps].map(|x| s.splat(x as f32));
        let one_minus_momentum = s.splat(c.one_minus_momentum as f32);
        let moments = exp_avg.chunks_mut(S::LANES).zip(exp_avg_sq.chunks_mut(S::LANES));
        let outputs = student.chunks_mut(S::LANES).zip(grads.chunks_mut(S::LANES)).zip(moments);
        let mut teacher = teacher.map(|teacher| teacher.chunks_mut(S::LANES));
        for ((w_out, g_out), (m_out, v_out)) in outputs {
            let g = s.mul(s.load(g_out), clip);
            let m = s.mul_add(beta1, s.load(m_out), s.mul(one_minus_beta1, g));
            let v = s.mul_add(beta2, s.load(v_out), s.mul(one_minus_beta2, s.mul(g, g)));
            let root = s.add(s.sqrt(s.mul(v, unbias2)), eps);
            let w = s.load(w_out);
            let w = s.neg_mul_add(decay, w, w);
            let w = s.neg_mul_add(step, s.div(m, root), w);
            s.store(m_out, m);
            s.store(v_out, v);
            s.store(w_out, w);
            s.store(g_out, s.splat(0.0));
            if let Some(teacher) = teacher.as_mut().and_then(Iterator::next) {
                let t = s.load(teacher);
                s.store(teacher, s.mul_add(one_minus_momentum, s.sub(w, t), t));
            }
        }
    }
}

#[inline(always)]
fn sum_squares_wide(x: &[f64]) -> f64 {
    dot_wide(x, x)
}

/// `sum of a[i] * b[i]`, in a fixed order.
#[inline(always)]
fn dot_wide(a: &[f64], b: &[f64]) -> f64 {
    let mut sums = [0.0; WIDE];
    for (a, b) in a.chunks(WIDE).zip(b.chunks(WIDE)) {
        for ((sum, a), b) in sums.iter_mut().zip(a).zip(b) {
            *sum += a * b;
        }
    }
    sums.iter().sum()
}

/// What [`adamw`] does to every element of a segment.
#[derive(Clone, Copy, Debug)]
pub(crate) struct AdamWConstants {
    pub(crate) beta1: f64,
    pub(crate) beta2: f64,
    pub(crate) eps: f64,
    /// Factor on the gradient.
    pub(crate) clip: f64,
    /// `lr' * weight_decay`
    pub(crate) decay: f64,
    /// `lr' / (1 - beta1^t)`
    pub(crate) step: f64,
    /// `1 / (1 - beta2^t)`
    pub(crate) unbias2: f64,
    pub(crate) one_minus_momentum: f64,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::isa::Isa;
    use proptest::collection::vec;
    use proptest::prelude::*;

    fn values() -> impl Strategy<Value = Vec<f32>> {
        (0usize..=65).prop_flat_map(|len| vec(-3.0f32..3.0, len))
    }

    fn assert_close(got: &[f32], want: impl Iterator<Item = f64>, tolerance: f64) {
        for (i, (got, want)) in got.iter().zip(want).enumerate() {
            let error = (f64::from(*got) - want).abs();
            assert!(
                error <= tolerance * want.abs().max(1.0),
                "{i}: {got} {want}"
            );
        }
    }

    /// Mean and sum of squares about it.
    fn moments_exact(x: &[f32]) -> (f64, f64) {
        let mean = x.iter().map(|&x| f64::from(x)).sum::<f64>() / x.len() as f64;
        let squares = x.iter().map(|&x| (f64::from(x) - mean).powi(2)).sum();
        (mean, squares)
    }

    kernel! {
        /// The softmax of `x`, and its log-sum-exp.
        fn softmax<'a, S>(s; x: &'a mut [f32], scale: f32) -> f32 {
            let mut padded = [f32::NAN; 96];
            padded[..x.len()].copy_from_slice(x);
            let end = x.len().next_multiple_of(S::LANES);
            let (max, total) = exp_row(s, &mut padded[..end], x.len(), scale);
            for (x, e) in x.iter_mut().zip(padded) {
                *x = e / total;
            }
            max + total.ln()
        }

        /// `exp(scale * x - max)`.
        fn exps<'a, S>(s; x: &'a mut [f32; 96], scale: f32) -> (f32, f32) {
            exp_row(s, x, 96, scale)
        }

        fn softmax_backward<'a, S>(s; p: &'a mut [f32], d_p: &'a mut [f32], scale: f32, lse: f32, delta: f32) -> () {
            softmax_backward_row(s, p, d_p, scale, lse, delta);
        }

        fn dot<'a, S>(s; a: &'a [f32], b: &'a [f32]) -> f32 {
            dot_row(s, a, b)
        }
    }

    #[test]
    fn exponentials_have_their_stated_error() {
        for isa in Isa::available() {
            let mut worst = 0.0_f64;
            for start in 0..1000 {
                let top = start as f32 * 0.37 - 180.0;
                let x: [f32; 96] =
                    core::array::from_fn(|i| top - (i * i) as f32 * (0.0131 + start as f32 * 5e-7));
                let (mut e, scale) = (x, 0.7);
                let (max, total) = exps(isa, &mut e, scale);
                assert_eq!(max, scale * top);
                let mut sum = 0.0;
                for (e, x) in e.into_iter().zip(x) {
                    let exponent = f64::from(scale) * (f64::from(x) - f64::from(top));
                    let error = (f64::from(e) / exponent.exp() - 1.0).abs();
                    worst = worst.max(error / (3e-7 + 2e-7 * exponent.abs()));
                    sum += exponent.exp();
                }
                // 96 roundings of a sum, at most.
                assert!((f64::from(total) / sum - 1.0).abs() < 96.0 * 6e-8);
            }
            assert!(worst <= 1.0, "{isa}: {worst}");
            println!("{isa}: {worst} of the stated error");
        }
    }

    const U: f64 = f32::EPSILON as f64 / 2.0;

    /// Rows of any length, offset and scale, seldom of zeros or one value alone.
    fn rows() -> impl Strategy<Value = Vec<f32>> {
        let len = prop_oneof![1usize..70, 700usize..1600];
        let (shift, scale) = (-4i32..=4, -12i32..=12);
        (len, shift, scale).prop_flat_map(|(len, shift, scale)| {
            let (shift, scale) = (10.0_f32.powi(shift), 10.0_f32.powi(scale));
            vec(-1.0f32..1.0, len)
                .prop_map(move |x| x.into_iter().map(|x| (x + shift) * scale).collect())
        })
    }

    /// What `layer_norm` states, for a weight, the exact mean and the exact reciprocal deviation.
    fn stated_norm_error(x: &[f32], i: usize, weight: f64, mean: f64, rstd: f64) -> f64 {
        let k = x.len() as f64 / 8.0 + 8.0;
        let size = x.iter().map(|&x| f64::from(x).abs()).sum::<f64>() / x.len() as f64;
        let m = k * U * size * rstd;
        let h = ((f64::from(x[i]) - mean) * rstd).abs();
        weight.abs() * (m + h * ((k / 2.0 + 5.0) * U + m * m))
    }

    /// Each error is at most the one stated beside it.
    fn assert_stated(
        isa: Isa,
        shares: impl Iterator<Item = (f64, f64)>,
    ) -> Result<(), TestCaseError> {
        for (i, (error, stated)) in shares.enumerate() {
            prop_assert!(error <= stated, "{isa}, {i}: {error} of {stated}");
        }
        Ok(())
    }

    /// Far beyond where a product of the maximum and a constant is exact: its error must not become an exponent.
    #[test]
    fn softmax_of_huge_scores_is_finite() {
        for isa in Isa::available() {
            for max in [1e4, 1e30, 3e38] {
                let mut p = vec![1.0, max, -max, 0.0];
                softmax(isa, &mut p, 0.3);
                assert_close(&p, [0.0, 1.0, 0.0, 0.0].into_iter(), 1e-30);
            }
        }
    }

    proptest! {
        #[test]
        fn norms_have_their_stated_error(x in rows()) {
            let (mean, squares) = moments_exact(&x);
            let len = x.len() as f64;
            let weight: Vec<f32> = (0..x.len()).map(|i| 1.0 - i as f32 * 0.03).collect();
            let bias: Vec<f32> = (0..x.len()).map(|i| i as f32 * 0.02).collect();
            for eps in [1e-6, 1e-3] {
                for isa in Isa::available() {
                    let rstd = 1.0 / (squares / len + eps).sqrt();
                    let mut out = vec![f32::NAN; x.len()];
                    layer_norm(isa, &mut out, &x, &weight, &bias, eps);
                    assert_stated(isa, out.iter().enumerate().map(|(i, &out)| {
                        let w = f64::from(weight[i]);
                        let want = (f64::from(x[i]) - mean) * rstd * w + f64::from(bias[i]);
                        let error = (f64::from(out) - want).abs();
                        (error, stated_norm_error(&x, i, w, mean, rstd) + U * want.abs())
                    }))?;
                    if x.len() > 1 {
                        let rstd = 1.0 / (squares / (len - 1.0) + eps).sqrt();
                        standardise(isa, &mut out, &x, eps);
                        assert_stated(isa, out.iter().enumerate().map(|(i, &out)| {
                            let want = (f64::from(x[i]) - mean) * rstd;
                            let error = (f64::from(out) - want).abs();
                            (error, stated_norm_error(&x, i, 1.0, mean, rstd) + U * want.abs())
                        }))?;
                    }
                }
            }
        }

        #[test]
        fn cosine_has_its_stated_error(pred in rows(), scale in -12i32..=12) {
            let target: Vec<f32> = pred.iter().enumerate()
                .map(|(i, &x)| (x.signum() * (i % 7) as f32 - 1.0) * 10.0_f32.powi(scale)).collect();
            let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum::<f64>();
            let norms = [&pred, &target].map(|x| dot(x, x).sqrt());
            let bounded = norms.map(|norm| norm.max(1e-8));
            let cosine = dot(&pred, &target) / (bounded[0] * bounded[1]);
            for isa in Isa::available() {
                let mut d_pred = vec![f32::NAN; pred.len()];
                let found = super::cosine(isa, &mut d_pred, &pred, &target, 1e-8, 0.37);
                prop_assert!((found - cosine).abs() <= pred.len() as f64 * f64::EPSILON, "{isa}: {found} {cosine}");
                assert_stated(isa, d_pred.iter().enumerate().map(|(i, &found)| {
                    let toward = 0.37 / (bounded[0] * bounded[1]) * f64::from(target[i]);
                    let own = if norms[0] > 1e-8 { 0.37 * cosine / (norms[0] * norms[0]) * f64::from(pred[i]) } else { 0.0 };
                    let error = (f64::from(found) - (toward - own)).abs();
                    // Products of f64 sums that nearly vanish carry the error of those.
                    let sums = pred.len() as f64 * f64::EPSILON * 0.37 / norms[0].max(1e-8);
                    (error, 2.0 * f64::from(f32::EPSILON) * (toward.abs() + own.abs()) + sums + f64::from(f32::MIN_POSITIVE))
                }))?;
            }
        }

        #[test]
        fn cross_entropy_has_its_stated_error(logits in vec(-1.0f32..1.0, 1..300), scale in -3i32..=4, chosen in 0usize..300) {
            let logits: Vec<f32> = logits.iter().map(|x| x * 10.0_f32.powi(scale)).collect();
            let (len, k) = (logits.len(), logits.len() as f64 / 4.0 + 8.0);
            let target: Vec<f32> = (0..len).map(|i| if i == chosen % len { 0.9 } else { 0.1 / len as f32 }).collect();
            let max = logits.iter().fold(f64::NEG_INFINITY, |max, &x| max.max(f64::from(x)));
            let total: f64 = logits.iter().map(|&x| (f64::from(x) - max).exp()).sum();
            let mass: f64 = target.iter().map(|&t| f64::from(t)).sum();
            let want: f64 = logits.iter().zip(&target)
                .map(|(&x, &t)| f64::from(t) * (total.ln() - (f64::from(x) - max))).sum();
            for isa in Isa::available() {
                let mut d = vec![f32::NAN; len];
                let found = cross_entropy(isa, &mut d, &logits, &target, 0.6);
                let error = (found - want).abs();
                prop_assert!(error <= mass * (k + 3.0) * U + 1e-12 * want, "{isa}: {found} {want}");
                assert_stated(isa, d.iter().enumerate().map(|(i, &d)| {
                    let y = max - f64::from(logits[i]);
                    let (p, factor) = ((-y).exp() / total, f64::from(0.6_f32));
                    let difference = p * mass - f64::from(target[i]);
                    let error = (f64::from(d) - factor * difference).abs();
                    let stated = factor * (mass * p * (k + 7.0 + y) * U + 2.0 * U * difference.abs());
                    (error, stated + f64::from(f32::MIN_POSITIVE))
                }))?;
            }
        }

        #[test]
        fn adamw_has_its_stated_error(
            elements in vec((-2.0f32..2.0, -1.0f32..1.0, -15i32..=15, -1.0f32..1.0, 0.0f32..1.0), 1..70),
            step in 1i32..2000, momentum in 0.9f64..1.0,
        ) {
            let (beta1, beta2, lr) = (0.9, 0.95, 1e-3);
            let c = AdamWConstants {
                beta1, beta2, eps: 1e-8, clip: 0.75, decay: lr * 0.05, step: lr / (1.0 - f64::powi(beta1, step)),
                unbias2: 1.0 / (1.0 - f64::powi(beta2, step)), one_minus_momentum: 1.0 - momentum,
            };
            for isa in Isa::available() {
                let size = |e: i32| 10.0_f32.powi(e);
                let mut w: Vec<f32> = elements.iter().map(|e| e.0).collect();
                let mut t: Vec<f32> = elements.iter().map(|e| e.0 * 0.9).collect();
                let mut g: Vec<f32> = elements.iter().map(|e| e.1 * size(e.2)).collect();
                let mut m: Vec<f32> = elements.iter().map(|e| e.3 * size(e.2)).collect();
                let mut v: Vec<f32> = elements.iter().map(|e| e.4 * size(e.2) * size(e.2)).collect();
                let before = [&w, &t, &g, &m, &v].map(|x| x.iter().map(|&x| f64::from(x)).collect::<Vec<_>>());
                adamw(isa, &mut w, Some(&mut t), &mut g, &mut m, &mut v, c);
                prop_assert!(g.iter().all(|&g| g == 0.0));
                for i in 0..w.len() {
                    let [w0, t0, g0, m0, v0] = [0, 1, 2, 3, 4].map(|k: usize| before[k][i]);
                    let g0 = g0 * c.clip;
                    let mean = [beta1 * m0, (1.0 - beta1) * g0];
                    let square = [beta2 * v0, (1.0 - beta2) * g0 * g0];
                    let root = ((square[0] + square[1]) * c.unbias2).sqrt() + c.eps;
                    let want = w0 * (1.0 - c.decay) - c.step * (mean[0] + mean[1]) / root;
                    let sizes = mean[0].abs() + mean[1].abs();
                    let w_error = 2.0 * U * w0.abs().max(want.abs()) + 16.0 * U * c.step * sizes / root;
                    let follow = t0 + c.one_minus_momentum * (want - t0);
                    assert_stated(isa, [
                        ((f64::from(m[i]) - mean[0] - mean[1]).abs(), 4.0 * U * sizes),
                        ((f64::from(v[i]) - square[0] - square[1]).abs(), 4.0 * U * (square[0] + square[1]) + f64::from(f32::MIN_POSITIVE)),
                        ((f64::from(w[i]) - want).abs(), w_error),
                        ((f64::from(t[i]) - follow).abs(), c.one_minus_momentum * (w_error + 3.0 * U * (want - t0).abs()) + 2.0 * U * follow.abs()),
                    ].into_iter())?;
                }
            }
        }

        #[test]
        fn softmax_matches_f64(x in values(), scale in 0.01f32..20.0) {
            let scaled = || x.iter().map(|&x| f64::from(x) * f64::from(scale));
            let max = scaled().fold(f64::NEG_INFINITY, f64::max);
            let total: f64 = scaled().map(|x| (x - max).exp()).sum();
            for isa in Isa::available().filter(|_| !x.is_empty()) {
                let mut p = x.clone();
                let lse = softmax(isa, &mut p, scale);
                // Scores up to 60 are rounded to 2^-19.
                assert_close(&[lse], [max + total.ln()].into_iter(), 1e-5);
                assert_close(&p, scaled().map(|x| (x - max).exp() / total), 1e-5);
                let (mut again, mut d_p) = (x.clone(), x.clone());
                softmax_backward(isa, &mut again, &mut d_p, scale, lse, 0.5);
                assert_close(&again, p.iter().map(|&p| f64::from(p)), 1e-5);
                let want = |i: usize| f64::from(scale) * f64::from(p[i]) * (f64::from(x[i]) - 0.5);
                assert_close(&d_p, (0..x.len()).map(want), 1e-4);
            }
        }

        #[test]
        fn sums_match_f64(x in values(), rows in 0usize..70) {
            let squares: f64 = x.iter().map(|&x| f64::from(x).powi(2)).sum();
            let matrix: Vec<f32> = (0..rows).flat_map(|row| x.iter().map(move |x| x * row as f32)).collect();
            let times = (rows * rows.saturating_sub(1)) as f64 / 2.0;
            for isa in Isa::available() {
                assert_close(&[dot(isa, &x, &x)], [squares].into_iter(), 1e-5);
                // Non-negative terms: the error is a few roundings of the sum.
                let found = sum_squares(isa, &x);
                assert!((found - squares).abs() <= 1e-6 * squares, "{isa}: {found} {squares}");
                let mut total = x.clone();
                sum_rows(isa, &mut total, &matrix, rows, x.len());
                assert_close(&total, x.iter().map(|&x| f64::from(x) * (1.0 + times)), 1e-5);
            }
        }

        #[test]
        fn a_nan_reaches_every_probability(x in values(), at in 0usize..65) {
            for isa in Isa::available().filter(|_| at < x.len()) {
                let mut p = x.clone();
                p[at] = f32::NAN;
                softmax(isa, &mut p, 0.5);
                assert!(p.iter().all(|p| p.is_nan()));
            }
        }
    }
}
