//! Mixup (Zhang et al., 2018) and CutMix (Yun et al., 2019) of a micro-batch, and its smoothed targets.

use pcae_kernel::rng::Stream;

/// How pictures are mixed: either way half of the time, or the one that is on.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Mix {
    /// Both parameters of the beta distribution of mixup's weight; 0 for none.
    pub mixup: f64,
    /// Both parameters of the beta distribution of the part that CutMix leaves; 0 for none.
    pub cutmix: f64,
    /// Part of each label that is spread over all classes.
    pub smoothing: f64,
}

/// Shape of a picture in a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Channels.
    pub channels: usize,
    /// Rows.
    pub height: usize,
    /// Columns.
    pub width: usize,
}

impl Mix {
    /// Whether pictures change, and not their targets alone.
    pub fn mixes_images(&self) -> bool {
        self.mixup > 0.0 || self.cutmix > 0.0
    }

    /// Mixes each picture with the one as far from the other end of the batch, all by the same weight, as `timm` does by
    /// default, and writes what they show.
    ///
    /// # Shapes
    /// `images: [labels.len(), channels, height, width]`; `targets: [labels.len(), classes]`, each row a distribution.
    ///
    /// # Panics
    /// If a label is not below `classes`, or `images` is shorter and [`Mix::mixes_images`].
    pub fn apply(
        &self,
        stream: &mut Stream,
        images: &mut [f32],
        shape: Shape,
        labels: &[u32],
        classes: usize,
        targets: &mut Vec<f32>,
    ) {
        let own = self.mix_images(stream, images, shape, labels.len());
        targets.clear();
        let spread = self.smoothing / classes as f64;
        targets.resize(labels.len() * classes, spread as f32);
        for (i, row) in targets.chunks_exact_mut(classes).enumerate() {
            let (first, second) = (labels[i] as usize, labels[labels.len() - 1 - i] as usize);
            let whole = 1.0 - self.smoothing;
            if first == second {
                row[first] = (spread + whole) as f32;
            } else {
                row[first] = (spread + whole * own) as f32;
                row[second] = (spread + whole * (1.0 - own)) as f32;
            }
        }
    }

    /// Returns how much of each picture is its own.
    fn mix_images(
        &self,
        stream: &mut Stream,
        images: &mut [f32],
        shape: Shape,
        count: usize,
    ) -> f64 {
        let cuts = match (self.mixup > 0.0, self.cutmix > 0.0) {
            (false, false) => return 1.0,
            (true, true) => stream.uniform() < 0.5,
            (_, cuts) => cuts,
        };
        let own = beta(stream, if cuts { self.cutmix } else { self.mixup });
        let Shape {
            channels,
            height,
            width,
        } = shape;
        let len = channels * height * width;
        let (front, back) = images[..count * len].split_at_mut(count / 2 * len);
        let pairs = front
            .chunks_exact_mut(len)
            .zip(back.chunks_exact_mut(len).rev());
        if !cuts {
            let weight = own as f32;
            for (a, b) in pairs.flat_map(|(a, b)| a.iter_mut().zip(b)) {
                (*a, *b) = (
                    weight * *a + (1.0 - weight) * *b,
                    weight * *b + (1.0 - weight) * *a,
                );
            }
            return own;
        }
        let edge = (1.0 - own).sqrt();
        let mut span = |size: usize| {
            let (half, middle) = (
                (size as f64 * edge) as usize / 2,
                stream.below(size as u32) as usize,
            );
            middle.saturating_sub(half)..(middle + half).min(size)
        };
        let (rows, columns) = (span(height), span(width));
        for (a, b) in pairs {
            for row in (0..channels).flat_map(|c| rows.clone().map(move |y| c * height + y)) {
                let cut = row * width + columns.start..row * width + columns.end;
                a[cut.clone()].swap_with_slice(&mut b[cut]);
            }
        }
        // The box may reach over the edge of the picture.
        1.0 - (rows.len() * columns.len()) as f64 / (height * width) as f64
    }
}

/// A draw from the beta distribution with both parameters `a`, above 0.
fn beta(stream: &mut Stream, a: f64) -> f64 {
    let (x, y) = (log_gamma_variate(stream, a), log_gamma_variate(stream, a));
    // Both may be too small for a number of their own, when `a` is; their ratio is not.
    1.0 / (1.0 + libm::exp(y - x))
}

/// The logarithm of a draw from the gamma distribution of shape `a` (Marsaglia & Tsang, 2000).
fn log_gamma_variate(stream: &mut Stream, a: f64) -> f64 {
    if a < 1.0 {
        let boost = libm::log(1.0 - stream.uniform_f64()) / a;
        return log_gamma_variate(stream, a + 1.0) + boost;
    }
    let d = a - 1.0 / 3.0;
    let c = 1.0 / (9.0 * d).sqrt();
    loop {
        let x = f64::from(stream.normal());
        let v = 1.0 + c * x;
        let u = 1.0 - stream.uniform_f64();
        if v > 0.0 {
            let cube = v * v * v;
            if libm::log(u) < 0.5 * x * x + d - d * cube + d * libm::log(cube) {
                return libm::log(d * cube);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use pcae_kernel::rng::Purpose;

    use super::*;

    const SHAPE: Shape = Shape {
        channels: 2,
        height: 6,
        width: 5,
    };
    const LEN: usize = 60;

    fn stream(sample: u64) -> Stream {
        Stream::new(9, 0, sample, Purpose::Mix)
    }

    /// Five pictures, each of one value.
    fn images() -> Vec<f32> {
        (0..5 * LEN).map(|i| (i / LEN) as f32 + 1.0).collect()
    }

    fn apply(mix: Mix, sample: u64) -> (Vec<f32>, Vec<f32>) {
        let (mut images, mut targets) = (images(), Vec::new());
        let labels = [0, 2, 1, 3, 0];
        mix.apply(
            &mut stream(sample),
            &mut images,
            SHAPE,
            &labels,
            4,
            &mut targets,
        );
        for row in targets.chunks_exact(4) {
            assert!((row.iter().sum::<f32>() - 1.0).abs() < 1e-6, "{row:?}");
        }
        (images, targets)
    }

    #[test]
    fn smoothing_alone() {
        let mix = Mix {
            mixup: 0.0,
            cutmix: 0.0,
            smoothing: 0.2,
        };
        let (mixed, targets) = apply(mix, 0);
        assert_eq!(mixed, images());
        assert_eq!(targets[4..8], [0.05, 0.05, 0.85, 0.05]);
        let (_, targets) = apply(
            Mix {
                smoothing: 0.0,
                ..mix
            },
            0,
        );
        assert_eq!(targets[..8], [1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0]);
    }

    /// Targets have the weights that the pictures have; the middle one of an odd batch stays.
    #[test]
    fn mixup_mixes_pictures_and_targets_alike() {
        let mix = Mix {
            mixup: 0.8,
            cutmix: 0.0,
            smoothing: 0.0,
        };
        let mut mixed_well = 0;
        for sample in 0..100 {
            let (mixed, targets) = apply(mix, sample);
            // Pictures 1 and 3 have the values 2 and 4 and the labels 2 and 3.
            let own = targets[4 + 2];
            mixed_well += u32::from((0.1..0.9).contains(&own));
            assert!((targets[4 + 3] - (1.0 - own)).abs() < 1e-6);
            assert!(
                mixed[LEN..2 * LEN]
                    .iter()
                    .all(|v| (v - (4.0 - 2.0 * own)).abs() < 1e-5)
            );
            assert!(
                mixed[3 * LEN..4 * LEN]
                    .iter()
                    .all(|v| (v - (2.0 + 2.0 * own)).abs() < 1e-5)
            );
            assert!(mixed[2 * LEN..3 * LEN].iter().all(|v| *v == 3.0));
            // Both ends of the batch have the same label.
            assert_eq!(targets[..4], [1.0, 0.0, 0.0, 0.0]);
        }
        // Three quarters, with a standard deviation of 4.3.
        assert!((53..=97).contains(&mixed_well), "{mixed_well}");
    }

    #[test]
    fn cutmix_swaps_a_box_of_the_size_that_targets_say() {
        let mix = Mix {
            mixup: 0.0,
            cutmix: 1.0,
            smoothing: 0.0,
        };
        let mut sizes = std::collections::BTreeSet::new();
        for sample in 0..300 {
            let (mixed, targets) = apply(mix, sample);
            let theirs: Vec<bool> = mixed[LEN..2 * LEN].iter().map(|&v| v == 4.0).collect();
            assert!(mixed[LEN..2 * LEN].iter().all(|&v| v == 2.0 || v == 4.0));
            let back = mixed[3 * LEN..4 * LEN].iter().map(|&v| v == 2.0);
            assert!(back.eq(theirs.iter().copied()), "a swap");
            assert_eq!(theirs[..30], theirs[30..], "the same in every channel");
            let area = theirs[..30].iter().filter(|&&cut| cut).count();
            assert!((targets[4 + 3] - area as f32 / 30.0).abs() < 1e-6);
            let rows = theirs[..30]
                .chunks_exact(5)
                .filter(|row| row.contains(&true));
            let shapes: std::collections::BTreeSet<_> = rows.clone().collect();
            assert!(shapes.len() <= 1, "a box");
            sizes.insert(area);
        }
        assert!(sizes.len() > 8, "{sizes:?}");
    }

    #[test]
    fn each_half_of_the_time() {
        let mix = Mix {
            mixup: 1.0,
            cutmix: 1.0,
            smoothing: 0.0,
        };
        let is_cut = |sample: &u64| {
            apply(mix, *sample).0[LEN..2 * LEN]
                .iter()
                .all(|v| v.fract() == 0.0)
        };
        let cut = (0..1000).filter(is_cut).count();
        // Five standard deviations about a half.
        assert!((421..=579).contains(&cut), "{cut}");
    }

    /// Mean 1/2 and variance 1 / (4 (2 a + 1)).
    #[test]
    fn moments_of_beta() {
        for a in [0.01, 0.2, 0.8, 1.0, 3.0] {
            let mut stream = stream(0);
            let n = 40_000;
            let draws: Vec<f64> = (0..n).map(|_| beta(&mut stream, a)).collect();
            assert!(draws.iter().all(|x| (0.0..=1.0).contains(x)));
            let mean = draws.iter().sum::<f64>() / f64::from(n);
            let variance = draws.iter().map(|x| (x - 0.5) * (x - 0.5)).sum::<f64>() / f64::from(n);
            let want = 0.25 / (2.0 * a + 1.0);
            // Five standard errors; a square deviation of at most 1/4 has one of at most 1/8.
            let root = f64::from(n).sqrt();
            assert!((mean - 0.5).abs() < 5.0 * want.sqrt() / root, "{a}: {mean}");
            assert!(
                (variance - want).abs() < 5.0 * 0.125 / root,
                "{a}: {variance}"
            );
        }
    }
}
