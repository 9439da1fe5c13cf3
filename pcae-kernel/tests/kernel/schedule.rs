//! Masks, learning rate, momentum, stochastic depth, and the random numbers behind them.

use pcae_kernel::config::len_keep;
use pcae_kernel::error::Error;
use pcae_kernel::rng::{Purpose, Stream};
use pcae_kernel::schedule::{
    drop_path_rate, drop_path_scale, learning_rate, momentum, random_masking,
};
use proptest::prelude::*;

use crate::support::close;

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    /// Visible and masked patches are all patches, each once; no masked one has less noise than a visible one; equal
    /// noise keeps the order of the patches; the same noise gives the same masks.
    #[test]
    fn masking_parts_the_patches(coarse in prop::collection::vec(0..20u8, 1..60), mask_ratio in 0.0..1.0f64) {
        let noise: Vec<f32> = coarse.iter().map(|&x| f32::from(x) / 20.0).collect();
        let mut order = vec![u32::MAX; noise.len() + 1];
        random_masking(&noise, &mut order).unwrap();
        prop_assert_eq!(order.pop(), Some(u32::MAX), "nothing is written behind the patches");
        let mut sorted: Vec<u32> = (0..noise.len() as u32).collect();
        sorted.sort_by_key(|&patch| coarse[patch as usize]);
        prop_assert_eq!(&order, &sorted);
        let (visible, masked) = order.split_at(len_keep(noise.len(), mask_ratio));
        let of = |patch: &u32| coarse[*patch as usize];
        prop_assert!(visible.iter().map(of).max() <= masked.iter().map(of).min() || masked.is_empty());
    }
}

#[test]
fn masking_refuses_nan_and_short_orders() {
    let mut order = [9; 3];
    let error = random_masking(&[0.5, 0.1, f32::NAN], &mut order);
    assert!(matches!(error, Err(Error::NotANumber { at: 2, .. })));
    let error = random_masking(&[0.0; 4], &mut order);
    assert!(matches!(
        error,
        Err(Error::TooShort {
            expected: 4,
            found: 3,
            ..
        })
    ));
    assert_eq!(order, [9; 3]);
    random_masking(&[], &mut order).unwrap();
    random_masking(&[0.0, -0.0, -1.0], &mut order).unwrap();
    assert_eq!(order, [2, 0, 1], "zeros of both signs are equal");
}

/// Warm-up reaches the peak with its last step, the cosine starts there and ends at the floor.
#[test]
fn learning_rate_by_hand() {
    let rate = |step| learning_rate(step, 30, 10, 2.0, 0.5);
    for (step, want) in [
        (0, 0.2),
        (4, 1.0),
        (9, 2.0),
        (10, 2.0),
        (20, 1.25),
        (30, 0.5),
    ] {
        close("rate", rate(step), want, 1e-15, 1e-15);
    }
    assert_eq!(rate(u64::MAX), 0.5);
    // Half way down to either side the cosine is at 3/4 and 1/4 less its curvature: cos(45°) = 0.7071.
    close(
        "rate",
        rate(15),
        0.5 + 1.5 * 0.853_553_390_593_273_8,
        0.0,
        1e-14,
    );
    assert!((10..30).all(|step| rate(step + 1) < rate(step)));
    // No warm-up, nothing but warm-up, no steps at all.
    assert_eq!(learning_rate(0, 10, 0, 2.0, 0.0), 2.0);
    assert_eq!(learning_rate(10, 10, 10, 2.0, 0.25), 0.25);
    assert_eq!(learning_rate(0, 0, 0, 2.0, 0.25), 0.25);
    assert_eq!(
        learning_rate(u64::MAX - 1, u64::MAX, u64::MAX, 1.0, 0.0),
        1.0
    );
}

#[test]
fn momentum_by_hand() {
    let at = |step| momentum(step, 8, 0.99, 1.0);
    for (step, want) in [(0, 0.99), (4, 0.995), (8, 1.0), (9, 1.0)] {
        close("momentum", at(step), want, 0.0, 1e-15);
    }
    assert!((0..8).all(|step| at(step) < at(step + 1)));
    assert_eq!(momentum(0, 0, 0.99, 1.0), 1.0);
}

/// From 0 at the first block to the rate at the last; factors have the mean 1 that the formula promises.
#[test]
fn stochastic_depth() {
    let rates: Vec<f64> = (0..5).map(|block| drop_path_rate(block, 5, 0.2)).collect();
    for (found, want) in rates.iter().zip([0.0, 0.05, 0.1, 0.15, 0.2]) {
        close("rate", *found, want, 1e-16, 1e-15);
    }
    assert_eq!(drop_path_rate(0, 1, 0.2), 0.2);
    let mut stream = Stream::new(1, 2, 3, Purpose::DropPath);
    let scales: Vec<f32> = (0..4000)
        .map(|_| drop_path_scale(&mut stream, 0.2))
        .collect();
    assert!(scales.iter().all(|&s| s == 0.0 || s == 1.25));
    let dropped = scales.iter().filter(|&&s| s == 0.0).count() as f64 / 4000.0;
    // Five standard errors of a share of 0.2 of 4000.
    close("share", dropped, 0.2, 5.0 * (0.16f64 / 4000.0).sqrt(), 0.0);
    assert_eq!(drop_path_scale(&mut stream, 0.0), 1.0);
    assert_eq!(drop_path_scale(&mut stream, 1.0), 0.0);
    // A number is drawn at every rate, so that what follows is the same.
    let next = |rate| {
        let mut stream = Stream::new(1, 2, 3, Purpose::DropPath);
        drop_path_scale(&mut stream, rate);
        stream.next_u32()
    };
    assert_eq!(next(0.0), next(0.9));
}

const PURPOSES: [Purpose; 7] = [
    Purpose::Init,
    Purpose::Shuffle,
    Purpose::Mask,
    Purpose::Augment,
    Purpose::DropPath,
    Purpose::Selection,
    Purpose::Split,
];

fn first(seed: u64, epoch: u64, sample: u64, purpose: Purpose) -> [u32; 4] {
    let mut stream = Stream::new(seed, epoch, sample, purpose);
    std::array::from_fn(|_| stream.next_u32())
}

/// Streams of neighbouring keys, near and far from zero, have no four numbers in common.
#[test]
fn every_key_has_its_own_stream() {
    let mut seen = std::collections::HashSet::new();
    for seed in [0, 1, 1 << 32] {
        for epoch in [0, 1, 7, 8, (1 << 29) - 1] {
            for sample in [0, 1, 2, 1 << 31, 1 << 32, (1 << 32) + 1, u64::MAX] {
                for purpose in PURPOSES {
                    let key = (seed, epoch, sample, purpose);
                    assert!(seen.insert(first(seed, epoch, sample, purpose)), "{key:?}");
                }
            }
        }
        // Epochs beyond 2²⁹ are told apart for samples below 2³².
        for epoch in [1 << 29, 1 << 30, 1 << 45, u64::MAX] {
            assert!(seen.insert(first(seed, epoch, 5, Purpose::Mask)), "{epoch}");
        }
    }
}

/// A stream goes on: no four numbers in a row come again within the first thousands.
#[test]
fn a_stream_does_not_repeat() {
    let mut stream = Stream::new(9, 0, 0, Purpose::Mask);
    let mut seen = std::collections::HashSet::new();
    for _ in 0..5000 {
        let block: [u32; 4] = std::array::from_fn(|_| stream.next_u32());
        assert!(seen.insert(block));
    }
}

/// Bounded numbers stay below their bound and reach all of them; each about as often.
#[test]
fn bounded_numbers() {
    let mut stream = Stream::new(9, 0, 1, Purpose::Shuffle);
    let mut counts = [0; 6];
    for _ in 0..6000 {
        counts[stream.below(6) as usize] += 1;
    }
    // Six standard deviations of a count of 1000: 29 each.
    assert!(
        counts.iter().all(|count| (826..1174).contains(count)),
        "{counts:?}"
    );
    assert_eq!((stream.below(0), stream.below(1)), (0, 0));
    assert!((0..100).all(|_| stream.below(u32::MAX) < u32::MAX));
    assert!((0..10_000).all(|_| (0.0..1.0).contains(&stream.uniform())));
    assert!((0..10_000).all(|_| stream.normal().is_finite()));
}
