//! From a decoded picture to the network's input: crop, bicubic resize, flip, normalise.

use fast_image_resize::images::{TypedCroppedImage, TypedImage, TypedImageRef};
use fast_image_resize::pixels::{U8, U8x3};
use fast_image_resize::{FilterType, PixelTrait, ResizeAlg, ResizeOptions, Resizer};
use pcae_kernel::backend::{PixelDims, Pixels};
use pcae_kernel::rng::{Purpose, Stream};
use rayon::prelude::*;

use super::{DataError, Dataset, Picture, SPLIT_SEED};

/// [`channel_stats`] looks at no more pictures than this: the standard error of a mean is then below 1 % of the
/// standard deviation.
const MAX_STATS_PICTURES: usize = 10_000;

/// How many times larger than the result a picture may be that covers it: an aspect ratio of 16 to a square.
const MAX_COVER: u64 = 16;

/// What becomes of a picture, in training and in evaluation.
#[derive(Clone, Debug, PartialEq)]
pub struct Transform {
    /// Height of the result in pixels.
    pub height: usize,
    /// Width of the result in pixels.
    pub width: usize,
    /// Channels of picture and result: 1 or 3.
    pub channels: usize,
    /// Least and greatest share of the picture's area that a training crop covers, within `(0, 1]`.
    pub scale: (f64, f64),
    /// Least and greatest width / height of a training crop.
    pub ratio: (f64, f64),
    /// Whether training mirrors half of the pictures left to right.
    pub flip: bool,
    /// Mean of each channel, for pixels in `[0, 1]`.
    pub mean: Vec<f32>,
    /// Standard deviation of each channel, for pixels in `[0, 1]`; above zero.
    pub std: Vec<f32>,
}

/// Buffers that a thread reuses from picture to picture.
#[derive(Debug, Default)]
pub struct Scratch {
    resizer: Resizer,
    /// `[height, width, channels]` of the result.
    pub(super) resized: Vec<u8>,
    /// As large, for what cannot be done in place.
    pub(super) spare: Vec<u8>,
}

/// A part of a picture, in pixels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CropBox {
    /// Columns to its left.
    pub left: usize,
    /// Rows above it.
    pub top: usize,
    /// Columns in it.
    pub width: usize,
    /// Rows in it.
    pub height: usize,
}

/// Draws the crop of torchvision's `RandomResizedCrop`: ten tries at a random share of the area and a log-uniform ratio,
/// then the largest centred crop whose ratio is within range.
///
/// The picture must not be empty. The same numbers on every platform: `exp` and `log` come from `libm`.
pub fn random_resized_crop(
    width: usize,
    height: usize,
    scale: (f64, f64),
    ratio: (f64, f64),
    stream: &mut Stream,
) -> CropBox {
    let mut uniform = |low: f64, high: f64| low + (high - low) * stream.uniform_f64();
    let log_ratio = (libm::log(ratio.0), libm::log(ratio.1));
    let area = width as f64 * height as f64;
    let mut size = None;
    for _ in 0..10 {
        let target_area = area * uniform(scale.0, scale.1);
        let aspect = libm::exp(uniform(log_ratio.0, log_ratio.1));
        let w = (target_area * aspect).sqrt().round_ties_even() as usize;
        let h = (target_area / aspect).sqrt().round_ties_even() as usize;
        if 0 < w && w <= width && 0 < h && h <= height {
            size = Some((w, h));
            break;
        }
    }
    if let Some((crop_width, crop_height)) = size {
        // At most one more than the picture's size, which decoders keep below 2³².
        let top = stream.below((height - crop_height + 1) as u32) as usize;
        let left = stream.below((width - crop_width + 1) as u32) as usize;
        return CropBox {
            left,
            top,
            width: crop_width,
            height: crop_height,
        };
    }
    let aspect = width as f64 / height as f64;
    let (crop_width, crop_height) = if aspect < ratio.0 {
        (width, (width as f64 / ratio.0).round_ties_even() as usize)
    } else if aspect > ratio.1 {
        ((height as f64 * ratio.1).round_ties_even() as usize, height)
    } else {
        (width, height)
    };
    // Extreme ratios can round to nothing.
    let (crop_width, crop_height) = (crop_width.clamp(1, width), crop_height.clamp(1, height));
    CropBox {
        left: (width - crop_width) / 2,
        top: (height - crop_height) / 2,
        width: crop_width,
        height: crop_height,
    }
}

impl Transform {
    /// Number of values of one result: `channels * height * width`.
    pub fn output_len(&self) -> usize {
        self.channels * self.height * self.width
    }

    /// One result.
    pub(super) fn dims(&self) -> PixelDims {
        PixelDims {
            batch: 1,
            channels: self.channels,
            height: self.height,
            width: self.width,
        }
    }

    /// Checks every field.
    ///
    /// # Errors
    /// Names the first field that is out of range.
    pub fn check(&self) -> Result<(), DataError> {
        let require = |holds: bool, name, expected: &str, found: &dyn std::fmt::Debug| {
            if holds {
                Ok(())
            } else {
                Err(DataError::Setting {
                    name,
                    expected: expected.to_owned(),
                    found: format!("{found:?}"),
                })
            }
        };
        let size = (self.height, self.width);
        require(
            (1..=u32::from(u16::MAX) as usize).contains(&size.0)
                && (1..=u32::from(u16::MAX) as usize).contains(&size.1),
            "picture size",
            "height and width of 1 to 65535",
            &size,
        )?;
        require(
            matches!(self.channels, 1 | 3),
            "channels",
            "1 (grey) or 3 (RGB)",
            &self.channels,
        )?;
        let (low, high) = self.scale;
        require(
            0.0 < low && low <= high && high <= 1.0,
            "crop scale",
            "0 < least <= greatest <= 1",
            &self.scale,
        )?;
        let (low, high) = self.ratio;
        require(
            0.0 < low && low <= high && high.is_finite(),
            "crop ratio",
            "0 < least <= greatest",
            &self.ratio,
        )?;
        let per_channel = format!("{} finite values, one for each channel", self.channels);
        require(
            self.mean.len() == self.channels && self.mean.iter().all(|v| v.is_finite()),
            "mean",
            &per_channel,
            &self.mean,
        )?;
        require(
            self.std.len() == self.channels && self.std.iter().all(|v| v.is_finite() && *v > 0.0),
            "std",
            &format!("{per_channel}, above zero"),
            &self.std,
        )
    }

    /// Crops, resizes, flips and normalises `picture` at random, with numbers from `stream`.
    ///
    /// The resize is bicubic with antialiasing, as Pillow's, and sees nothing outside the crop. It differs from Pillow's
    /// by at most 1 of 255, but for hard edges, where either cuts off the overshoot of a different pass.
    ///
    /// # Shapes
    /// `out: [channels, height, width]`, values `(pixel / 255 - mean) / std`.
    ///
    /// # Errors
    /// If `picture` or `out` does not have the shape that `self` and the picture's fields say; before anything is
    /// written. The fields of `self` themselves are checked by [`Self::check`].
    pub fn train(
        &self,
        picture: &Picture,
        stream: &mut Stream,
        scratch: &mut Scratch,
        out: &mut [f32],
    ) -> Result<(), DataError> {
        self.check_shapes(picture, out.len())?;
        let flip = self.crop(picture, stream, scratch)?;
        self.normalize(&scratch.resized, flip, out);
        Ok(())
    }

    /// The random part of [`Self::train`]: the crop, and whether it is to be mirrored.
    pub(super) fn draw(&self, picture: &Picture, stream: &mut Stream) -> (CropBox, bool) {
        let crop = random_resized_crop(
            picture.width,
            picture.height,
            self.scale,
            self.ratio,
            stream,
        );
        (crop, self.flip && stream.uniform() < 0.5)
    }

    /// Leaves the crop, resized, in `scratch`, and returns whether it is to be mirrored.
    pub(super) fn crop(
        &self,
        picture: &Picture,
        stream: &mut Stream,
        scratch: &mut Scratch,
    ) -> Result<bool, DataError> {
        let (crop, flip) = self.draw(picture, stream);
        self.resize(picture, crop, (self.width, self.height), scratch)?;
        Ok(flip)
    }

    /// Resizes `picture` to the least size that covers the result, cuts out the centre and normalises it.
    ///
    /// As torchvision's `Resize` and `CenterCrop`, in one pass. A picture that covers the result already without resizing
    /// keeps its exact pixels.
    ///
    /// # Shapes
    /// `out: [channels, height, width]`, values `(pixel / 255 - mean) / std`.
    ///
    /// # Errors
    /// As [`Self::train`].
    pub fn eval(
        &self,
        picture: &Picture,
        scratch: &mut Scratch,
        out: &mut [f32],
    ) -> Result<(), DataError> {
        self.check_shapes(picture, out.len())?;
        self.resize_for_eval(picture, scratch)?;
        self.normalize(&scratch.resized, false, out);
        Ok(())
    }

    /// [`Self::eval`] but for the normalisation.
    ///
    /// # Shapes
    /// `out: [height, width, channels]`.
    ///
    /// # Errors
    /// As [`Self::train`].
    pub fn eval_bytes(
        &self,
        picture: &Picture,
        scratch: &mut Scratch,
        out: &mut [u8],
    ) -> Result<(), DataError> {
        self.check_shapes(picture, out.len())?;
        self.resize_for_eval(picture, scratch)?;
        out.copy_from_slice(&scratch.resized);
        Ok(())
    }

    fn resize_for_eval(&self, picture: &Picture, scratch: &mut Scratch) -> Result<(), DataError> {
        let (width, height) = (picture.width as u64, picture.height as u64);
        let (out_width, out_height) = (self.width as u64, self.height as u64);
        let wider = width * out_height >= height * out_width;
        let (full_width, full_height) = if wider {
            (width * out_height / height, out_height)
        } else {
            (out_width, height * out_width / width)
        };
        let whole = CropBox {
            left: 0,
            top: 0,
            width: picture.width,
            height: picture.height,
        };
        if full_width * full_height <= MAX_COVER * out_width * out_height {
            let (full_width, full_height) = (full_width as usize, full_height as usize);
            self.resize(picture, whole, (full_width, full_height), scratch)?;
            let middle =
                |full: usize, out: usize| ((full - out) as f64 / 2.0).round_ties_even() as usize;
            let (left, top) = (
                middle(full_width, self.width),
                middle(full_height, self.height),
            );
            let row = self.width * self.channels;
            for y in 0..self.height {
                // Never before what was written: rows only move to the front.
                let from = ((top + y) * full_width + left) * self.channels;
                scratch.resized.copy_within(from..from + row, y * row);
            }
            scratch.resized.truncate(self.output_len());
            return Ok(());
        }
        // A long strip, which would be enormous at the covering size: the middle of the picture itself, cut at whole
        // pixels, because with windows between pixels fast_image_resize 6.1 may read past the end of a row.
        let window = |size: u64, full: u64, out: u64| {
            let extent = ((out as f64 * size as f64 / full as f64).round() as u64).clamp(1, size);
            ((size - extent) as usize / 2, extent as usize)
        };
        let (left, width) = window(width, full_width, out_width);
        let (top, height) = window(height, full_height, out_height);
        self.resize(
            picture,
            CropBox {
                left,
                top,
                width,
                height,
            },
            (self.width, self.height),
            scratch,
        )
    }

    /// Checks a picture, and the elements there are for the result.
    pub(super) fn check_shapes(&self, picture: &Picture, room: usize) -> Result<(), DataError> {
        let setting = |name, expected, found| {
            Err(DataError::Setting {
                name,
                expected,
                found,
            })
        };
        let Picture {
            width,
            height,
            channels,
            ref pixels,
        } = *picture;
        if channels != self.channels {
            return setting(
                "channels of a picture",
                self.channels.to_string(),
                channels.to_string(),
            );
        }
        let most = u32::MAX as usize;
        let len = width
            .checked_mul(height)
            .and_then(|area| area.checked_mul(channels));
        if width == 0 || height == 0 || width >= most || height >= most || len != Some(pixels.len())
        {
            return setting(
                "pixels of a picture",
                format!("{height}x{width}x{channels} values, not none"),
                pixels.len().to_string(),
            );
        }
        if room != self.output_len() {
            return setting(
                "room for a picture",
                self.output_len().to_string(),
                room.to_string(),
            );
        }
        Ok(())
    }

    /// Resizes the part `view` of `picture` into `scratch.resized`.
    pub(super) fn resize(
        &self,
        picture: &Picture,
        view: CropBox,
        size: (usize, usize),
        scratch: &mut Scratch,
    ) -> Result<(), DataError> {
        scratch.resized.resize(size.0 * size.1 * self.channels, 0);
        let options =
            ResizeOptions::new().resize_alg(ResizeAlg::Convolution(FilterType::CatmullRom));
        let size = (size.0 as u32, size.1 as u32);
        let Scratch {
            resizer, resized, ..
        } = scratch;
        let done = match self.channels {
            1 => resize_typed::<U8>(resizer, picture, view, &options, resized, size),
            _ => resize_typed::<U8x3>(resizer, picture, view, &options, resized, size),
        };
        done.map_err(|error| DataError::Setting {
            name: "resize",
            expected: "a crop within the picture".to_owned(),
            found: format!("{error}"),
        })
    }

    pub(super) fn normalize(&self, pixels: &[u8], flip: bool, out: &mut [f32]) {
        let planes = out.chunks_exact_mut(self.height * self.width);
        for (channel, plane) in planes.enumerate() {
            let (mean, std) = (self.mean[channel], self.std[channel]);
            let normal = |&pixel: &u8| Pixels::normalise(pixel, mean, std);
            let rows = pixels.chunks_exact(self.width * self.channels);
            for (row, out) in rows.zip(plane.chunks_exact_mut(self.width)) {
                let values = row[channel..].iter().step_by(self.channels).map(normal);
                if flip {
                    out.iter_mut().rev().zip(values).for_each(|(o, v)| *o = v);
                } else {
                    out.iter_mut().zip(values).for_each(|(o, v)| *o = v);
                }
            }
        }
    }
}

fn resize_typed<P: PixelTrait>(
    resizer: &mut Resizer,
    picture: &Picture,
    view: CropBox,
    options: &ResizeOptions,
    out: &mut [u8],
    (width, height): (u32, u32),
) -> Result<(), Box<dyn std::error::Error>> {
    let whole = TypedImageRef::<P>::from_buffer(
        picture.width as u32,
        picture.height as u32,
        &picture.pixels,
    )?;
    let view = TypedCroppedImage::new(
        whole,
        view.left as u32,
        view.top as u32,
        view.width as u32,
        view.height as u32,
    )?;
    let mut out = TypedImage::<P>::from_buffer(width, height, out)?;
    resizer.resize_typed(&view, &mut out, options)?;
    Ok(())
}

/// Mean and standard deviation of each channel, for pixels in `[0, 1]`, as [`Transform::eval`] gives them at `height` x
/// `width`; from all pictures, or from 10,000 of them, always the same.
///
/// The sums are of integers: exact, in whatever order threads add them. A channel that never varies has the standard
/// deviation 1, so that normalising gives zeros.
///
/// # Errors
/// If the pictures cannot be read, or the size is out of range.
pub fn channel_stats(
    dataset: &Dataset,
    height: usize,
    width: usize,
) -> Result<(Vec<f32>, Vec<f32>), DataError> {
    let channels = dataset.channels();
    let transform = Transform {
        height,
        width,
        channels,
        scale: (1.0, 1.0),
        ratio: (1.0, 1.0),
        flip: false,
        mean: vec![0.0; channels],
        std: vec![1.0; channels],
    };
    transform.check()?;
    let mut samples: Vec<usize> = (0..dataset.len()).collect();
    if samples.len() > MAX_STATS_PICTURES {
        // Epoch 0 of this purpose is the split of the data set.
        Stream::new(SPLIT_SEED, 1, 0, Purpose::Split).shuffle(&mut samples);
        samples.truncate(MAX_STATS_PICTURES);
    }
    let add = |mut a: Vec<[u64; 2]>, b: Vec<[u64; 2]>| {
        for (a, b) in a.iter_mut().zip(b) {
            *a = [a[0] + b[0], a[1] + b[1]];
        }
        a
    };
    let sums = samples
        .par_iter()
        .map_init(
            || (Picture::default(), Scratch::default()),
            |(picture, scratch), &sample| {
                dataset.load(sample, picture)?;
                transform.resize_for_eval(picture, scratch)?;
                let mut sums = vec![[0_u64; 2]; channels];
                for pixel in scratch.resized.chunks_exact(channels) {
                    for (sum, &v) in sums.iter_mut().zip(pixel) {
                        *sum = [sum[0] + u64::from(v), sum[1] + u64::from(v) * u64::from(v)];
                    }
                }
                Ok(sums)
            },
        )
        .try_reduce(|| vec![[0; 2]; channels], |a, b| Ok(add(a, b)))?;
    let count = (samples.len() * height * width) as f64;
    let of_sums = |[sum, squares]: [u64; 2]| {
        let mean = sum as f64 / count;
        let variance = squares as f64 / count - mean * mean;
        let std = if variance > 0.0 {
            variance.sqrt() / 255.0
        } else {
            1.0
        };
        ((mean / 255.0) as f32, std as f32)
    };
    Ok(sums.into_iter().map(of_sums).unzip())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const CROP_SHRUNK: [u8; 60] = [
        143, 124, 134, 127, 124, 151, 119, 121, 135, 120, 138, 123, 141, 115, 131, 121, 140, 132,
        123, 144, 132, 116, 114, 137, 124, 118, 135, 130, 111, 118, 128, 120, 135, 115, 135, 118,
        132, 128, 133, 121, 122, 112, 123, 133, 125, 124, 136, 122, 128, 112, 121, 138, 151, 127,
        126, 124, 135, 117, 122, 138,
    ];
    const CROP_ENLARGED: [u8; 60] = [
        71, 116, 173, 80, 125, 188, 97, 142, 198, 113, 165, 124, 122, 179, 73, 84, 129, 147, 93,
        139, 161, 110, 155, 174, 127, 155, 124, 136, 152, 90, 109, 154, 98, 119, 169, 109, 137,
        182, 125, 154, 133, 126, 164, 100, 124, 122, 167, 72, 132, 183, 82, 150, 195, 101, 168,
        123, 126, 178, 73, 141,
    ];
    const EVAL_4X5: [u8; 60] = [
        111, 140, 140, 137, 132, 129, 121, 118, 139, 118, 134, 119, 128, 132, 129, 123, 125, 129,
        121, 138, 136, 120, 120, 135, 125, 117, 128, 122, 129, 133, 133, 135, 119, 122, 128, 124,
        131, 130, 130, 119, 126, 121, 119, 130, 138, 134, 128, 142, 122, 121, 123, 124, 136, 119,
        129, 134, 133, 122, 127, 125,
    ];
    const EVAL_6X6_RED: [u8; 36] = [
        113, 148, 139, 103, 112, 134, 149, 121, 118, 134, 109, 132, 108, 125, 121, 114, 130, 128,
        146, 101, 131, 123, 123, 122, 120, 130, 143, 134, 112, 113, 138, 107, 118, 118, 144, 124,
    ];

    /// A transform whose results are the pixels themselves.
    fn identity(height: usize, width: usize, channels: usize) -> Transform {
        Transform {
            height,
            width,
            channels,
            scale: (0.2, 1.0),
            ratio: (3.0 / 4.0, 4.0 / 3.0),
            flip: true,
            mean: vec![0.0; channels],
            std: vec![1.0 / 255.0; channels],
        }
    }

    fn noise(width: usize, height: usize, channels: usize) -> Picture {
        let mut stream = Stream::new(1, 2, 3, Purpose::Init);
        Picture {
            width,
            height,
            channels,
            pixels: (0..width * height * channels)
                .map(|_| stream.below(256) as u8)
                .collect(),
        }
    }

    fn eval(transform: &Transform, picture: &Picture) -> Vec<f32> {
        let mut out = vec![f32::NAN; transform.output_len()];
        transform
            .eval(picture, &mut Scratch::default(), &mut out)
            .unwrap();
        out
    }

    fn stream(sample: u64) -> Stream {
        Stream::new(5, 0, sample, Purpose::Augment)
    }

    #[test]
    fn eval_keeps_the_pixels_of_a_picture_that_fits() {
        let mut transform = identity(5, 7, 3);
        transform.mean = vec![0.1, 0.2, 0.3];
        transform.std = vec![0.5, 0.6, 0.7];
        // The same size, and one that only needs its sides cut off (10 - 7 = 3 columns, 2 of them left).
        for (width, left) in [(7, 0), (10, 2)] {
            let picture = noise(width, 5, 3);
            let out = eval(&transform, &picture);
            for c in 0..3 {
                for y in 0..5 {
                    for x in 0..7 {
                        let pixel = picture.pixels[(y * width + x + left) * 3 + c];
                        let want =
                            (f32::from(pixel) / 255.0 - transform.mean[c]) / transform.std[c];
                        assert_eq!(out[(c * 5 + y) * 7 + x], want);
                    }
                }
            }
        }
    }

    #[test]
    fn a_constant_picture_stays_constant() {
        for (width, height) in [(1, 1), (3, 50), (31, 17), (200, 120)] {
            for value in [0, 1, 100, 255] {
                let mut picture = noise(width, height, 3);
                picture.pixels.fill(value);
                let transform = identity(12, 20, 3);
                let constant = |out: &[f32]| {
                    assert!(
                        out.iter().all(|v| v.round() == f32::from(value)),
                        "{width}x{height}"
                    );
                };
                constant(&eval(&transform, &picture));
                let mut out = vec![0.0; transform.output_len()];
                transform
                    .train(&picture, &mut stream(0), &mut Scratch::default(), &mut out)
                    .unwrap();
                constant(&out);
            }
        }
    }

    /// Pillow 13.0.0: `Image.crop`, then `resize(.., BICUBIC)`; for evaluation `resize` to the covering size, then
    /// `crop`. The picture is `64 + ((37 x + 71 y + 5 x y + 90 c) mod 256) / 2`, 13 wide and 9 high: tame enough that no
    /// overshoot is cut off between the passes, which Pillow does rows first and the resizer here columns first.
    #[test]
    fn resizes_as_pillow_does() {
        let mut picture = noise(13, 9, 3);
        for (i, pixel) in picture.pixels.iter_mut().enumerate() {
            let (x, y, c) = (i / 3 % 13, i / 39, i % 3);
            *pixel = 64 + ((37 * x + 71 * y + 5 * x * y + 90 * c) % 256 / 2) as u8;
        }
        // Each pass rounds.
        let assert_close = |found: &[u8], want: &[u8]| {
            assert_eq!(found.len(), want.len());
            let worst = found.iter().zip(want).map(|(a, b)| a.abs_diff(*b)).max();
            assert!(worst <= Some(1), "{found:?}");
        };
        let mut scratch = Scratch::default();
        let transform = identity(4, 5, 3);
        let mut crop = |left, top, width, height| {
            let crop = CropBox {
                left,
                top,
                width,
                height,
            };
            transform
                .resize(&picture, crop, (5, 4), &mut scratch)
                .unwrap();
            scratch.resized.clone()
        };
        assert_close(&crop(2, 1, 9, 7), &CROP_SHRUNK);
        assert_close(&crop(3, 2, 3, 2), &CROP_ENLARGED);
        transform.resize_for_eval(&picture, &mut scratch).unwrap();
        assert_close(&scratch.resized, &EVAL_4X5);
        identity(6, 6, 3)
            .resize_for_eval(&picture, &mut scratch)
            .unwrap();
        let red: Vec<u8> = scratch.resized.iter().step_by(3).copied().collect();
        assert_close(&red, &EVAL_6X6_RED);
    }

    #[test]
    fn flips_are_mirror_images_and_about_half() {
        let mut transform = identity(6, 6, 1);
        (transform.scale, transform.ratio) = ((1.0, 1.0), (1.0, 1.0));
        let picture = noise(6, 6, 1);
        let straight = eval(&transform, &picture);
        let mirrored: Vec<f32> = straight
            .chunks(6)
            .flat_map(|row| row.iter().rev().copied())
            .collect();
        let mut flips = 0;
        let mut out = vec![0.0; 36];
        let mut scratch = Scratch::default();
        for sample in 0..1000 {
            transform
                .train(&picture, &mut stream(sample), &mut scratch, &mut out)
                .unwrap();
            assert!(out == straight || out == mirrored);
            flips += u32::from(out == mirrored);
        }
        // Five standard deviations.
        assert!((421..=579).contains(&flips), "{flips}");
    }

    #[test]
    fn the_fallback_is_the_largest_centred_crop_in_range() {
        // No crop of a 100x2 strip has the ratio 3/4 to 4/3 and more than 2 % of its area.
        let strip = random_resized_crop(100, 2, (0.5, 1.0), (0.75, 4.0 / 3.0), &mut stream(0));
        let want = CropBox {
            left: 48,
            top: 0,
            width: 3,
            height: 2,
        };
        assert_eq!(strip, want);
        let tall = random_resized_crop(3, 100, (0.5, 1.0), (0.75, 4.0 / 3.0), &mut stream(0));
        let want = CropBox {
            left: 0,
            top: 48,
            width: 3,
            height: 4,
        };
        assert_eq!(tall, want);
    }

    proptest! {
        #[test]
        fn crops_lie_inside_and_in_range(
            width in 1_usize..600,
            height in 1_usize..600,
            low in 0.01_f64..1.0,
            sample: u64,
        ) {
            let (scale, ratio) = ((low, 1.0), (0.75, 4.0 / 3.0));
            let crop = random_resized_crop(width, height, scale, ratio, &mut stream(sample));
            prop_assert!(crop.width > 0 && crop.left + crop.width <= width);
            prop_assert!(crop.height > 0 && crop.top + crop.height <= height);
            // Each side is rounded by at most a half: the exact crop lies between the two boxes.
            let (w, h) = (crop.width as f64, crop.height as f64);
            let (least, most) = ((w - 0.5) / (h + 0.5), (w + 0.5) / (h - 0.5));
            prop_assert!(most >= ratio.0 - 1e-9 && least <= ratio.1 + 1e-9, "{crop:?}");
            let area = (width * height) as f64;
            let aspect = width as f64 / height as f64;
            // The fallback, which thin pictures take, may be smaller than `scale`; others reach it in any ratio.
            if (0.75..=4.0 / 3.0).contains(&aspect) {
                prop_assert!((w + 0.5) * (h + 0.5) >= low * area - 1e-6, "{crop:?}");
            }
        }

        /// No size of picture makes the window leave it.
        #[test]
        fn eval_takes_any_size(
            width in 1_usize..300,
            height in 1_usize..300,
            out_width in 1_usize..40,
            out_height in 1_usize..40,
        ) {
            let picture = Picture { width, height, channels: 1, pixels: vec![9; width * height] };
            let out = eval(&identity(out_height, out_width, 1), &picture);
            prop_assert!(out.iter().all(|v| v.round() == 9.0));
        }
    }

    #[test]
    fn stats_match_a_naive_computation() {
        let dataset = crate::data::open(None, None).unwrap().held_out;
        let (mean, std) = channel_stats(&dataset, 28, 28).unwrap();
        let mut values = Vec::new();
        let mut picture = Picture::default();
        for i in 0..dataset.len() {
            dataset.picture(i, &mut picture).unwrap();
            values.extend(picture.pixels.iter().map(|&v| f64::from(v) / 255.0));
        }
        let naive_mean = values.iter().sum::<f64>() / values.len() as f64;
        let variance = values
            .iter()
            .map(|v| (v - naive_mean) * (v - naive_mean))
            .sum::<f64>()
            / values.len() as f64;
        assert!((f64::from(mean[0]) - naive_mean).abs() < 1e-7);
        assert!((f64::from(std[0]) - variance.sqrt()).abs() < 1e-7);
        // The published figures for the whole of Fashion-MNIST are 0.2860 and 0.3530.
        assert!((mean[0] - 0.286).abs() < 0.01 && (std[0] - 0.353).abs() < 0.01);
    }

    #[test]
    fn fields_and_shapes_are_checked() {
        let good = identity(4, 4, 3);
        good.check().unwrap();
        let message = |change: fn(&mut Transform)| {
            let mut transform = good.clone();
            change(&mut transform);
            transform.check().unwrap_err().to_string()
        };
        assert!(message(|t| t.height = 0).starts_with("picture size"));
        assert!(message(|t| t.channels = 2).starts_with("channels"));
        assert!(message(|t| t.scale = (0.0, 1.0)).starts_with("crop scale"));
        assert!(message(|t| t.ratio = (2.0, 1.0)).starts_with("crop ratio"));
        assert!(message(|t| t.mean = vec![0.0]).contains("expected 3 finite values"));
        assert!(message(|t| t.std[1] = 0.0).starts_with("std"));
        let mut out = vec![0.0; 48];
        let mut scratch = Scratch::default();
        let grey = noise(4, 4, 1);
        assert!(good.eval(&grey, &mut scratch, &mut out).is_err());
        let mut cut = noise(4, 4, 3);
        cut.pixels.pop();
        assert!(good.eval(&cut, &mut scratch, &mut out).is_err());
        assert!(
            good.eval(&noise(4, 4, 3), &mut scratch, &mut out[1..])
                .is_err()
        );
    }
}
