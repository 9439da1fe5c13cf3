//! Attention at sizes beyond those of the conformance suite, and with scores that a naive softmax does not survive.
//!
//! Every element is held against f64, and its error against the sum of the magnitudes of what it is a sum of.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod emulated;

use pcae_backend_cuda::{Cuda, Precision};
use pcae_kernel::backend::{AttentionDims, Backend, TrainBackend};
use pcae_kernel::rng::{Purpose, Stream};

/// Numbers of mean 0 and variance `scale^2` that bf16 holds.
fn noise(key: u64, len: usize, scale: f32) -> Vec<f32> {
    let mut rng = Stream::new(2, 0, key, Purpose::Init);
    let number = |_| (rng.uniform() - 0.5) * 3.464_101_6 * scale;
    let short = |x: f32| f32::from_bits(x.to_bits() & 0xffff_0000);
    (0..len).map(number).map(short).collect()
}

fn buf(cuda: &mut Cuda, values: &[f32]) -> <Cuda as Backend>::Buf {
    let mut buf = cuda.buf(values.len()).unwrap();
    cuda.write(&mut buf, values).unwrap();
    buf
}

/// A value in f64, and how far a result may be from it.
#[derive(Clone, Copy, Default)]
struct Within {
    value: f64,
    error: f64,
}

/// What comes of a forward and a backward: output, log-sum-exp, gradient.
struct Exact {
    out: Vec<Within>,
    lse: Vec<Within>,
    d_qkv: Vec<Within>,
}

/// Relative error of one rounding to the format of activations, to nearest.
fn unit(precision: Precision) -> f64 {
    match precision {
        Precision::F32 => 2f64.powi(-24),
        Precision::Bf16 => 2f64.powi(-8),
    }
}

/// Formulas as in `pcae_kernel::reference`. Errors, in first order: sums of n terms are off by sqrt(n) roundings of f32 of their
/// magnitude (n at worst; roundings have either sign), a score moves its probability by as much as it is off itself, and what a product
/// or a buffer rounds to bf16 by 2^-8.
fn exact(dims: AttentionDims, precision: Precision, qkv: &[f32], d_out: &[f32]) -> Exact {
    let (n, heads, width) = (dims.tokens, dims.num_heads, dims.head_dim);
    let scale = 1.0 / (width as f64).sqrt();
    let f32_sum = |terms: usize| unit(Precision::F32) * (4.0 + 3.0 * (terms as f64).sqrt());
    let unit = unit(precision);
    let mut all = Exact {
        out: vec![Within::default(); dims.out_len()],
        lse: vec![Within::default(); dims.lse_len()],
        d_qkv: vec![Within::default(); dims.qkv_len()],
    };
    for b in 0..dims.batch {
        for h in 0..heads {
            let at = |part: usize, token: usize| (((b * n + token) * 3 + part) * heads + h) * width;
            let place = |token: usize| ((b * n + token) * heads + h) * width;
            let of = |part, token| &qkv[at(part, token)..][..width];
            // Sum of products, and of their magnitudes.
            let dot = |x: &[f32], y: &[f32]| {
                x.iter().zip(y).fold((0.0, 0.0), |(sum, size), (x, y)| {
                    let term = f64::from(*x) * f64::from(*y);
                    (sum + term, size + term.abs())
                })
            };
            for i in 0..n {
                let scores: Vec<(f64, f64)> = (0..n)
                    .map(|j| dot(of(0, i), of(1, j)))
                    .map(|(sum, size)| (sum * scale, size * scale))
                    .collect();
                let top = scores.iter().fold(f64::MIN, |top, s| top.max(s.0));
                let total: f64 = scores.iter().map(|s| (s.0 - top).exp()).sum();
                let lse = top + total.ln();
                // The largest error of a score, and of what is subtracted from it.
                let moved = scores.iter().map(|s| s.1).fold(0.0, f64::max) * f32_sum(width)
                    + lse.abs() * f32_sum(1);
                all.lse[(b * heads + h) * n + i] = Within {
                    value: lse,
                    error: moved + f32_sum(n),
                };
                let p: Vec<f64> = scores.iter().map(|s| (s.0 - lse).exp()).collect();
                let off = 2.0 * moved + f32_sum(n);
                let d_row = &d_out[place(i)..][..width];
                let (mut through, mut through_size) = (0.0, 0.0);
                for (e, d) in d_row.iter().enumerate() {
                    let (mut value, mut size) = (0.0, 0.0);
                    for (j, p) in p.iter().enumerate() {
                        let term = p * f64::from(of(2, j)[e]);
                        value += term;
                        size += term.abs();
                    }
                    let error = size * (off + 2.0 * unit);
                    all.out[place(i) + e] = Within { value, error };
                    let d = f64::from(*d);
                    through += d * value;
                    through_size += d.abs() * (error + size * f32_sum(width));
                }
                for (j, p) in p.iter().enumerate() {
                    let (d_p, d_p_size) = dot(d_row, of(2, j));
                    let d_s = p * (d_p - through) * scale;
                    let d_s_error = p * scale * (d_p_size * f32_sum(width) + through_size)
                        + d_s.abs() * (off + unit);
                    let p_error = p * (off + unit);
                    for (e, d) in d_row.iter().enumerate() {
                        let mut add = |part, token, factor: f64, error: f64, with: f32| {
                            let to = &mut all.d_qkv[at(part, token) + e];
                            let with = f64::from(with);
                            to.value += factor * with;
                            to.error += (error + factor.abs() * f32_sum(n)) * with.abs();
                        };
                        add(0, i, d_s, d_s_error, of(1, j)[e]);
                        add(1, j, d_s, d_s_error, of(0, i)[e]);
                        add(2, j, *p, p_error, *d);
                    }
                }
            }
        }
    }
    for to in &mut all.d_qkv {
        to.error += to.value.abs() * unit;
    }
    all
}

/// The largest error of `got`, as a part of what is allowed.
fn worst(what: &str, got: &[f32], want: &[Within]) -> f64 {
    let mut worst = 0.0f64;
    for (i, (got, want)) in got.iter().zip(want).enumerate() {
        let error = (f64::from(*got) - want.value).abs();
        // A subnormal is 0, in exp2 and products alike.
        let allowed = want.error + 1e-37;
        assert!(
            error <= allowed,
            "{what} {i}: {got}, expected {} +- {allowed}",
            want.value
        );
        worst = worst.max(error / allowed);
    }
    worst
}

/// Forward with and without log-sum-exp, and the backward of what that gave.
fn check(cuda: &mut Cuda, precision: Precision, dims: AttentionDims, scale: f32) -> f64 {
    let name = format!("{precision:?} {dims:?} x {scale}");
    let qkv = noise(1, dims.qkv_len(), scale);
    let d_out = noise(2, dims.out_len(), 1.0);
    let want = exact(dims, precision, &qkv, &d_out);
    // One element more, which no operation may touch.
    let guarded = |len: usize| vec![7.0; len + 1];
    let on_device = buf(cuda, &qkv);
    let mut out = buf(cuda, &guarded(dims.out_len()));
    let mut again = buf(cuda, &guarded(dims.out_len()));
    let mut d_qkv = buf(cuda, &guarded(dims.qkv_len()));
    let mut lse = cuda.vector(dims.lse_len() + 1).unwrap();
    cuda.write_vector(&mut lse, 0, &guarded(dims.lse_len()))
        .unwrap();
    let d_out = buf(cuda, &d_out);
    cuda.attention_saving(dims, &mut out, &mut lse, &on_device)
        .unwrap();
    cuda.attention(dims, &mut again, &on_device).unwrap();
    cuda.attention_backward(dims, &mut d_qkv, &d_out, &on_device, &out, &lse)
        .unwrap();

    let mut got = guarded(dims.out_len());
    cuda.read(&mut got, &out).unwrap();
    let mut other = guarded(dims.out_len());
    cuda.read(&mut other, &again).unwrap();
    assert_eq!(got, other, "{name}: with and without log-sum-exp");
    assert_eq!(got.pop(), Some(7.0), "{name}: beyond the output");
    let mut largest = worst(&format!("{name}: output"), &got, &want.out);
    let mut got = guarded(dims.lse_len());
    cuda.read_vector(&mut got, &lse, 0).unwrap();
    assert_eq!(got.pop(), Some(7.0), "{name}: beyond the log-sum-exp");
    largest = largest.max(worst(&format!("{name}: log-sum-exp"), &got, &want.lse));
    let mut got = guarded(dims.qkv_len());
    cuda.read(&mut got, &d_qkv).unwrap();
    assert_eq!(got.pop(), Some(7.0), "{name}: beyond the gradient");
    largest.max(worst(&format!("{name}: gradient"), &got, &want.d_qkv))
}

/// In both formats, if there is a device.
fn both(sizes: impl Iterator<Item = (usize, usize, usize, usize, f32)> + Clone) {
    if !emulated::has_device() {
        return;
    }
    for precision in [Precision::F32, Precision::Bf16] {
        let mut cuda = Cuda::new(0, precision).unwrap();
        let mut largest = 0.0f64;
        for (batch, tokens, num_heads, head_dim, scale) in sizes.clone() {
            let dims = AttentionDims {
                batch,
                tokens,
                num_heads,
                head_dim,
            };
            largest = largest.max(check(&mut cuda, precision, dims, scale));
        }
        println!("{precision:?}: {largest} of the error that is allowed");
    }
}

#[test]
fn on_the_emulator() {
    emulated::run_again();
}

#[test]
fn any_number_of_tokens_up_to_some() {
    both((1..=70).map(|tokens| (1, tokens, 2, [8, 20, 32][tokens % 3], 1.0)));
}

#[test]
fn every_width_of_a_kernel() {
    both(
        [1, 2, 7, 8, 20, 31, 32, 33, 40, 64, 72, 80, 88, 96, 99, 128]
            .into_iter()
            .flat_map(|width| [(2, 19, 3, width, 1.0), (1, 50, 1, width, 1.0)]),
    );
}

#[test]
fn long_sequences() {
    both(
        [
            (1, 197, 1, 64, 1.0),
            (1, 257, 1, 80, 1.0),
            (1, 270, 1, 128, 1.0),
            (1, 210, 1, 99, 1.0),
            (1, 350, 1, 20, 1.0),
        ]
        .into_iter(),
    );
}

#[test]
fn more_heads_than_blocks_fit() {
    // A block then takes all rows of its head, one round after the other, with columns that stay.
    both([(3, 70, 4, 8, 1.0), (1, 100, 11, 16, 1.0)].into_iter());
}

#[test]
fn scores_far_beyond_the_range_of_exp() {
    // Queries and keys of 16 make scores of some 256 * sqrt(width), of 2^12 some 2^24 * sqrt(width). With one token, half of the
    // heads have a log-sum-exp that far below 0.
    both(
        [
            (1, 1, 8, 32, 4096.0),
            (1, 40, 2, 64, 16.0),
            (1, 70, 1, 20, 16.0),
            (1, 70, 1, 80, 4096.0),
        ]
        .into_iter(),
    );
}

#[test]
fn a_head_that_is_too_wide_is_refused() {
    if !emulated::has_device() {
        return;
    }
    let mut cuda = Cuda::new(0, Precision::F32).unwrap();
    let dims = AttentionDims {
        batch: 1,
        tokens: 2,
        num_heads: 1,
        head_dim: 129,
    };
    let qkv = buf(&mut cuda, &vec![1.0; dims.qkv_len()]);
    let mut out = cuda.buf(dims.out_len()).unwrap();
    assert_eq!(
        cuda.attention(dims, &mut out, &qkv)
            .unwrap_err()
            .to_string(),
        "attention: expected heads of a width up to 128, found 129"
    );
}
