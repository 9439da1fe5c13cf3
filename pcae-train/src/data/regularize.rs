//! What fine-tuning does to a training picture beyond its crop: RandAugment and random erasing.

use std::f64::consts::LN_10;

use pcae_kernel::rng::Stream;

use super::augment::{Scratch, Transform};
use super::rand_augment::{MAX_MAGNITUDE, Pixels, rand_augment};
use super::{DataError, Picture};

/// Least and greatest part of the picture that is erased, and tries to find a rectangle (Zhong et al., 2020).
const ERASED_AREA: (f64, f64) = (0.02, 1.0 / 3.0);
const ERASE_TRIES: usize = 10;

/// What happens to a training picture. From a [`Transform`] alone: its crop and flip, no more.
#[derive(Clone, Debug, PartialEq)]
pub struct Augmentation {
    /// Crop, flip, mean and standard deviation.
    pub transform: Transform,
    /// Magnitude of RandAugment's two operations, from 0 (none) to 10.
    pub rand_augment: f64,
    /// Probability that a rectangle is replaced by noise.
    pub erase_prob: f64,
    /// Whether pictures are mixed with each other afterwards, see [`super::mix`].
    pub mixes: bool,
}

impl From<Transform> for Augmentation {
    fn from(transform: Transform) -> Self {
        Self {
            transform,
            rand_augment: 0.0,
            erase_prob: 0.0,
            mixes: false,
        }
    }
}

impl Augmentation {
    /// Whether what comes of it are values: noise and mixtures are no bytes.
    pub(crate) fn makes_values(&self) -> bool {
        self.mixes || self.erase_prob > 0.0
    }

    /// Whether nothing follows the crop but what a backend can do.
    pub(crate) fn is_crop_alone(&self) -> bool {
        !self.makes_values() && self.rand_augment == 0.0
    }

    /// Checks every field.
    ///
    /// # Errors
    /// Names the first field that is out of range.
    pub fn check(&self) -> Result<(), DataError> {
        self.transform.check()?;
        let require = |holds: bool, name, expected: &str, found: f64| {
            if holds {
                return Ok(());
            }
            Err(DataError::Setting {
                name,
                expected: expected.to_owned(),
                found: found.to_string(),
            })
        };
        let magnitude = self.rand_augment;
        let holds = (0.0..=MAX_MAGNITUDE).contains(&magnitude);
        require(holds, "rand augment", "0 (none) to 10", magnitude)?;
        let probability = self.erase_prob;
        let holds = (0.0..=1.0).contains(&probability);
        require(holds, "erase prob", "0 to 1", probability)
    }

    /// [`Transform::train`], with RandAugment between crop and normalisation and erasing after it, as MAE and DeiT have
    /// it.
    ///
    /// # Errors
    /// As there.
    pub fn train(
        &self,
        picture: &Picture,
        stream: &mut Stream,
        scratch: &mut Scratch,
        out: &mut [f32],
    ) -> Result<(), DataError> {
        let transform = &self.transform;
        transform.check_shapes(picture, out.len())?;
        let flip = self.view(picture, stream, scratch)?;
        transform.normalize(&scratch.resized, flip, out);
        if self.erase_prob > 0.0 {
            erase(out, transform, self.erase_prob, stream);
        }
        Ok(())
    }

    /// [`Augmentation::train`] but for what is done to values: mirroring, of which it returns whether it is to be done,
    /// normalisation and erasing.
    ///
    /// # Shapes
    /// `out: [height, width, channels]`.
    ///
    /// # Errors
    /// As there.
    pub(super) fn train_bytes(
        &self,
        picture: &Picture,
        stream: &mut Stream,
        scratch: &mut Scratch,
        out: &mut [u8],
    ) -> Result<bool, DataError> {
        self.transform.check_shapes(picture, out.len())?;
        let flip = self.view(picture, stream, scratch)?;
        out.copy_from_slice(&scratch.resized);
        Ok(flip)
    }

    /// Leaves the crop, changed by RandAugment, in `scratch`, and returns whether it is to be mirrored.
    fn view(
        &self,
        picture: &Picture,
        stream: &mut Stream,
        scratch: &mut Scratch,
    ) -> Result<bool, DataError> {
        let transform = &self.transform;
        let flip = transform.crop(picture, stream, scratch)?;
        if self.rand_augment > 0.0 {
            let Scratch { resized, spare, .. } = scratch;
            let pixels = Pixels {
                width: transform.width,
                height: transform.height,
                channels: transform.channels,
                values: resized,
                spare,
            };
            // What normalises to about zero: the least conspicuous colour.
            let mut fill = [0; 3];
            for (fill, mean) in fill.iter_mut().zip(&transform.mean) {
                *fill = (255.0 * mean).round() as u8;
            }
            rand_augment(pixels, self.rand_augment, fill, stream);
        }
        Ok(flip)
    }
}

/// Replaces a random rectangle of a normalised picture by normal noise, with the given probability.
fn erase(out: &mut [f32], transform: &Transform, probability: f64, stream: &mut Stream) {
    if stream.uniform_f64() >= probability {
        return;
    }
    let (height, width) = (transform.height, transform.width);
    let area = (height * width) as f64;
    for _ in 0..ERASE_TRIES {
        let mut uniform = |low: f64, high: f64| low + (high - low) * stream.uniform_f64();
        let target = area * uniform(ERASED_AREA.0, ERASED_AREA.1);
        // Ratios of 0.3 to 10 / 3, evenly in their logarithm.
        let log_ratio = LN_10 - libm::log(3.0);
        let aspect = libm::exp(uniform(-log_ratio, log_ratio));
        let h = (target * aspect).sqrt().round_ties_even() as usize;
        let w = (target / aspect).sqrt().round_ties_even() as usize;
        if h == 0 || w == 0 || h >= height || w >= width {
            continue;
        }
        let top = stream.below((height - h + 1) as u32) as usize;
        let left = stream.below((width - w + 1) as u32) as usize;
        for plane in out.chunks_exact_mut(height * width) {
            for row in plane.chunks_exact_mut(width).skip(top).take(h) {
                row[left..left + w].fill_with(|| stream.normal());
            }
        }
        return;
    }
}

#[cfg(test)]
mod tests {
    use pcae_kernel::rng::Purpose;

    use super::*;

    fn augmentation() -> Augmentation {
        Transform {
            height: 12,
            width: 16,
            channels: 3,
            scale: (1.0, 1.0),
            ratio: (1.3, 1.4),
            flip: true,
            mean: vec![0.2, 0.4, 0.6],
            std: vec![0.5, 0.25, 0.125],
        }
        .into()
    }

    fn picture() -> Picture {
        let mut stream = Stream::new(1, 0, 0, Purpose::Init);
        Picture {
            width: 16,
            height: 12,
            channels: 3,
            pixels: (0..16 * 12 * 3).map(|_| stream.next_u32() as u8).collect(),
        }
    }

    fn train(augmentation: &Augmentation, sample: u64) -> Vec<f32> {
        let mut out = vec![0.0; augmentation.transform.output_len()];
        let mut stream = Stream::new(2, 0, sample, Purpose::Augment);
        let mut scratch = Scratch::default();
        augmentation
            .train(&picture(), &mut stream, &mut scratch, &mut out)
            .unwrap();
        out
    }

    /// Without either it is the transform, to the bit.
    #[test]
    fn nothing_more_is_the_transform() {
        let augmentation = augmentation();
        for sample in 0..20 {
            let mut want = vec![0.0; augmentation.transform.output_len()];
            let mut stream = Stream::new(2, 0, sample, Purpose::Augment);
            let scratch = &mut Scratch::default();
            augmentation
                .transform
                .train(&picture(), &mut stream, scratch, &mut want)
                .unwrap();
            assert_eq!(train(&augmentation, sample), want);
        }
    }

    /// One rectangle, the same in every channel, of an area and a shape within the bounds, as often as asked for; all
    /// else stays.
    #[test]
    fn erasing_replaces_one_rectangle() {
        let plain = augmentation();
        let erasing = Augmentation {
            erase_prob: 0.25,
            ..augmentation()
        };
        let mut erased = 0;
        let mut noise = Vec::new();
        for sample in 0..2000 {
            let (before, after) = (train(&plain, sample), train(&erasing, sample));
            let changed: Vec<usize> = (0..before.len())
                .filter(|&i| before[i] != after[i])
                .collect();
            let Some(&first) = changed.first() else {
                continue;
            };
            erased += 1;
            let plane = 16 * 12;
            let (top, left) = (first / 16, first % 16);
            let rows = changed
                .iter()
                .filter(|&&i| i < plane && i % 16 == left)
                .count();
            let cols = changed.iter().filter(|&&i| i / 16 == top).count();
            let want = (0..3).flat_map(|channel| {
                (top..top + rows).flat_map(move |y| {
                    (left..left + cols).map(move |x| channel * plane + y * 16 + x)
                })
            });
            assert!(changed.iter().copied().eq(want), "{sample}");
            // Half a row and a column of rounding.
            let (h, w) = (rows as f64, cols as f64);
            assert!((h + 0.5) * (w + 0.5) >= 0.02 * 192.0, "{rows} x {cols}");
            assert!((h - 0.5) * (w - 0.5) <= 192.0 / 3.0, "{rows} x {cols}");
            assert!((h - 0.5) / (w + 0.5) <= 10.0 / 3.0 && (h + 0.5) / (w - 0.5) >= 0.3);
            noise.extend(changed.iter().map(|&i| f64::from(after[i])));
        }
        // Five standard deviations about a quarter, and of the noise's moments.
        assert!((403..=597).contains(&erased), "{erased}");
        let count = noise.len() as f64;
        let mean = noise.iter().sum::<f64>() / count;
        let square = noise.iter().map(|x| x * x).sum::<f64>() / count;
        assert!(mean.abs() < 5.0 / count.sqrt(), "{mean}");
        assert!((square - 1.0).abs() < 5.0 * 1.42 / count.sqrt(), "{square}");
    }

    #[test]
    fn fields_are_checked() {
        let message = |change: fn(&mut Augmentation)| {
            let mut augmentation = augmentation();
            change(&mut augmentation);
            augmentation.check().unwrap_err().to_string()
        };
        assert!(message(|a| a.rand_augment = 11.0).starts_with("rand augment: expected 0 (none)"));
        assert!(message(|a| a.rand_augment = f64::NAN).starts_with("rand augment"));
        assert!(message(|a| a.erase_prob = -0.1).starts_with("erase prob: expected 0 to 1"));
        assert!(message(|a| a.transform.height = 0).starts_with("picture size"));
    }
}
