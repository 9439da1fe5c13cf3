//! What must hold of single layers whatever their numbers: patches, norms, attention.

use pcae_kernel::backend::{AttentionDims, Backend, PatchDims, RowDims, TokenDims, TrainBackend};
use pcae_kernel::error::Error;
use proptest::prelude::*;

use crate::support::{Double, close, norm_at, random};

const PATCHES: PatchDims = PatchDims {
    batch: 2,
    channels: 3,
    height: 4,
    width: 6,
    patch_size: 2,
    taken: 6,
};

/// Pixel `(channel, row, column)` of a picture is numbered, so that each shows where it went.
fn numbered() -> Vec<f64> {
    (0..2 * 3 * 4 * 6).map(f64::from).collect()
}

/// Patches row by row; inside, the order of a flattened kernel for the model and of MAE's pixels for the target.
#[test]
fn patches_are_in_the_documented_order() {
    let images = numbered();
    let mut backend = Double::owned();
    let (mut kernel, mut pixels) = (vec![0.0; 144], vec![0.0; 144]);
    backend
        .gather_patches(PATCHES, &mut kernel, &images, None)
        .unwrap();
    let all: Vec<u32> = (0..6).chain(0..6).collect();
    backend
        .pixel_targets(PATCHES, &mut pixels, &images, &all)
        .unwrap();
    for (i, (&kernel, &pixel)) in kernel.iter().zip(&pixels).enumerate() {
        let (b, patch, inside) = (i / 72, i / 12 % 6, i % 12);
        let number = |channel: usize, row: usize, col: usize| {
            let (row, col) = (patch / 3 * 2 + row, patch % 3 * 2 + col);
            (((b * 3 + channel) * 4 + row) * 6 + col) as f64
        };
        assert_eq!(kernel, number(inside / 4, inside / 2 % 2, inside % 2));
        assert_eq!(pixel, number(inside % 3, inside / 6, inside / 3 % 2));
    }
    // Some patches only, in any order, even twice.
    let some = PatchDims {
        taken: 2,
        ..PATCHES
    };
    let mut taken = vec![0.0; 48];
    backend
        .gather_patches(some, &mut taken, &images, Some(&vec![5, 1, 3, 3]))
        .unwrap();
    for (taken, patch) in taken.chunks(12).zip([5, 1, 9, 9]) {
        assert_eq!(taken, &kernel[patch * 12..][..12]);
    }
}

#[test]
fn patches_that_do_not_fit_are_refused() {
    let images = numbered();
    let mut out = vec![-1.0; 144];
    let cases = [
        PatchDims {
            patch_size: 0,
            ..PATCHES
        },
        PatchDims {
            patch_size: 4,
            ..PATCHES
        },
        PatchDims {
            taken: 5,
            ..PATCHES
        },
    ];
    for dims in cases {
        let error = Double::owned().gather_patches(dims, &mut out, &images, None);
        assert!(matches!(error, Err(Error::Dimensions { .. })));
    }
    assert!(out.iter().all(|&x| x == -1.0));
}

fn attend(dims: AttentionDims, qkv: &[f64]) -> Vec<f64> {
    let mut out = vec![f64::NAN; dims.out_len()];
    Double::owned()
        .attention(dims, &mut out, &qkv.to_vec())
        .unwrap();
    out
}

const ATTENTION: AttentionDims = AttentionDims {
    batch: 2,
    tokens: 5,
    num_heads: 3,
    head_dim: 4,
};

/// Adds `f(head, column)` to the queries (`part` 0), keys (1) or values (2) of all tokens.
fn shifted(qkv: &[f64], part: usize, f: impl Fn(usize, usize) -> f64) -> Vec<f64> {
    let moved = |(i, &x): (usize, &f64)| {
        let inside = i % 36;
        let at = inside % 12;
        if inside / 12 == part {
            x + f(at / 4, at % 4)
        } else {
            x
        }
    };
    qkv.iter().enumerate().map(moved).collect()
}

/// The same vector added to all keys adds the same to all scores of a row, which a softmax does not see. (This is why
/// the key's bias has no gradient.) Scores of some ten are rounded at 1e-15 each.
#[test]
fn attention_ignores_a_shift_of_all_keys() {
    let qkv = random(90, ATTENTION.qkv_len());
    let moved = shifted(&qkv, 1, |head, column| head as f64 - 0.7 * column as f64);
    let (before, after) = (attend(ATTENTION, &qkv), attend(ATTENTION, &moved));
    for (before, after) in before.iter().zip(&after) {
        close("out", *after, *before, 1e-13, 0.0);
    }
    // A shift of all values moves the output by as much, as weights sum to 1; each head by its own.
    let moved = attend(
        ATTENTION,
        &shifted(&qkv, 2, |head, column| (head * 4 + column) as f64),
    );
    for (i, (before, after)) in before.iter().zip(&moved).enumerate() {
        close("out", *after, before + (i % 12) as f64, 1e-13, 0.0);
    }
}

/// Equal keys: every query sees the mean of the values.
#[test]
fn attention_with_equal_keys_is_the_mean_of_the_values() {
    let mut qkv = random(91, ATTENTION.qkv_len());
    for token in qkv.chunks_mut(36) {
        token[12..24].copy_from_slice(&[0.25; 12]);
    }
    for (i, out) in attend(ATTENTION, &qkv).iter().enumerate() {
        let (b, column) = (i / 60, i % 12);
        let value = |token: usize| qkv[(b * 5 + token) * 36 + 24 + column];
        let mean = (0..5).map(value).sum::<f64>() / 5.0;
        close("out", *out, mean, 1e-15, 1e-14);
    }
}

/// One key that is like a query far more than all others takes all the weight, without overflow.
#[test]
fn attention_with_huge_scores_picks_the_best_key() {
    let dims = AttentionDims {
        batch: 1,
        tokens: 2,
        num_heads: 1,
        head_dim: 1,
    };
    let qkv = [1e4, 1e4, 3.0, -1e4, -1e4, 5.0];
    assert_eq!(attend(dims, &qkv), [3.0, 5.0]);
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    /// A softmax averages: every output lies within its values.
    #[test]
    fn attention_stays_within_the_values(qkv in prop::collection::vec(-20.0..20.0f64, ATTENTION.qkv_len())) {
        for (i, out) in attend(ATTENTION, &qkv).iter().enumerate() {
            let (b, column) = (i / 60, i % 12);
            let values = (0..5).map(|token| qkv[(b * 5 + token) * 36 + 24 + column]);
            let (low, high) = values.fold((f64::MAX, f64::MIN), |(l, h), v| (l.min(v), h.max(v)));
            prop_assert!(low - 1e-13 <= *out && *out <= high + 1e-13);
        }
    }

    /// With weight 1 and bias 0 a row has mean 0 and biased variance 1, less what the offset of the variance takes.
    #[test]
    fn layer_norm_has_zero_mean_and_unit_variance(x in prop::collection::vec(-50.0..50.0f64, 7)) {
        let params = [vec![1.0; 7], vec![0.0; 8]].concat();
        let dims = RowDims { rows: 1, dim: 7 };
        let mut out = vec![f64::NAN; 7];
        Double::owned().layer_norm(dims, &mut out, &x, &params, norm_at(0, 7)).unwrap();
        check_moments(&x, &out, 7.0);
    }

    /// The same with the unbiased variance.
    #[test]
    fn standardise_has_zero_mean_and_unit_unbiased_variance(x in prop::collection::vec(-50.0..50.0f64, 7)) {
        let dims = RowDims { rows: 1, dim: 7 };
        let mut out = vec![f64::NAN; 7];
        Double::owned().standardise(dims, &mut out, &x).unwrap();
        check_moments(&x, &out, 6.0);
    }
}

/// `out` has mean 0 and variance `v / (v + 1e-6)`, `v` being that of `x`, both over `degrees`.
fn check_moments(x: &[f64], out: &[f64], degrees: f64) {
    let variance = |x: &[f64]| {
        let mean = x.iter().sum::<f64>() / x.len() as f64;
        (
            mean,
            x.iter().map(|x| (x - mean) * (x - mean)).sum::<f64>() / degrees,
        )
    };
    let ((_, before), (mean, after)) = (variance(x), variance(out));
    // Numbers of up to 50 lose up to 1e-14 in the difference from their mean, a spread of 1e-3 makes that 1e-11.
    close("mean", mean, 0.0, 1e-10, 0.0);
    close("variance", after, before / (before + 1e-6), 1e-10, 0.0);
}

/// A row of one element has no variance to divide by, and constant rows none to speak of.
#[test]
fn standardise_refuses_single_elements() {
    let mut out = vec![9.0; 3];
    let mut backend = Double::owned();
    let error = backend.standardise(RowDims { rows: 3, dim: 1 }, &mut out, &vec![1.0; 3]);
    assert!(matches!(error, Err(Error::Dimensions { found: 1, .. })));
    assert_eq!(out, [9.0; 3]);
    backend
        .standardise(RowDims { rows: 1, dim: 3 }, &mut out, &vec![4.0; 3])
        .unwrap();
    assert_eq!(out, [0.0; 3]);
}

/// The mean is over the patch tokens alone, and needs one.
#[test]
fn mean_pool_leaves_out_the_prefix() {
    let dims = TokenDims {
        batch: 2,
        prefix: 1,
        tokens: 2,
        dim: 2,
    };
    let x = vec![
        100.0, 100.0, 1.0, 2.0, 3.0, 6.0, 100.0, 100.0, 5.0, 0.0, 7.0, 1.0,
    ];
    let mut out = vec![9.0; 5];
    let mut backend = Double::owned();
    backend.mean_pool(dims, &mut out, &x).unwrap();
    assert_eq!(out, [2.0, 4.0, 6.0, 0.5, 9.0]);
    let error = backend.mean_pool(dims.with_tokens(0), &mut out, &x);
    assert!(matches!(error, Err(Error::Dimensions { .. })));
}
