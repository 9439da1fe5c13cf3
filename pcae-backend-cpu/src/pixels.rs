//! Pixels of 8 bits as values.

use pcae_kernel::backend::{PixelDims, Pixels};
use pcae_kernel::resize::{Axis, MAX_SHRINK, MAX_TAPS};

/// Pixels from which on all 256 values are computed first: two divisions for each take longer than to look one up.
const MANY: usize = 1024;

/// Columns of a resized picture that are made together.
const COLUMNS: usize = 64;

/// Columns of a crop that count for those.
const COUNTING: usize = MAX_SHRINK * COLUMNS + MAX_TAPS;

/// `to[i]` is what [`Pixels::normalise`] makes of `from[i * stride]`, to the bit.
pub(crate) fn normalise(to: &mut [f32], from: &[u8], stride: usize, mean: f32, std: f32) {
    let pixels = from.iter().step_by(stride);
    if to.len() < MANY {
        for (to, &pixel) in to.iter_mut().zip(pixels) {
            *to = Pixels::normalise(pixel, mean, std);
        }
        return;
    }
    let table: [f32; 256] = core::array::from_fn(|i| Pixels::normalise(i as u8, mean, std));
    for (to, &pixel) in to.iter_mut().zip(pixels) {
        *to = table[usize::from(pixel)];
    }
}

/// A plane of picture `b` of `pixels`, which were checked: resized, not mirrored.
pub(crate) fn resize(
    to: &mut [f32],
    dims: PixelDims,
    pixels: Pixels<'_>,
    b: usize,
    channel: usize,
) {
    let (channels, width) = (dims.channels, dims.width);
    let crop = pixels.crop(b, dims);
    let from = &pixels.values[crop.start + channel..];
    let rows = Axis::new(crop.height, dims.height);
    let columns = Axis::new(crop.width, width);
    let (mean, std) = (pixels.mean[channel], pixels.std[channel]);
    let table: [f32; 256] = core::array::from_fn(|i| Pixels::normalise(i as u8, mean, std));
    for left in (0..width).step_by(COLUMNS) {
        let taps: [_; COLUMNS] = core::array::from_fn(|x| columns.taps((left + x).min(width - 1)));
        let first = taps[0].start;
        let last = taps[COLUMNS - 1];
        let count = last.start + last.count - first;
        for (y, to) in to.chunks_exact_mut(width).enumerate() {
            let row = rows.taps(y);
            let mut line = [0; COUNTING];
            for (j, pixel) in line[..count].iter_mut().enumerate() {
                *pixel = row.blend(|i| from[(i * crop.width + first + j) * channels]);
            }
            for (taps, to) in taps.iter().zip(&mut to[left..]) {
                *to = table[usize::from(taps.blend(|j| line[j - first]))];
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use pcae_kernel::resize::Crop;

    use super::*;

    /// In as many steps as the width takes, and from as many columns as may count for one of them, pixels are those of the formula.
    #[test]
    fn wide_pictures_are_resized_as_narrow_ones() {
        for (width, crop_width) in [
            (1, 1),
            (COLUMNS, 90),
            (COLUMNS + 1, 40),
            (3 * COLUMNS - 2, 760),
        ] {
            let dims = PixelDims {
                batch: 1,
                channels: 2,
                height: 3,
                width,
            };
            let crop = Crop {
                start: 5,
                height: 3,
                width: crop_width,
            };
            assert!(crop.fits(dims));
            let values: Vec<u8> = (0..5 + 6 * crop_width)
                .map(|i| (i * i * 37 % 251) as u8)
                .collect();
            let pixels = Pixels {
                values: &values,
                crops: Some(&[crop]),
                flips: None,
                mean: &[0.5, 0.4],
                std: &[0.2, 0.3],
            };
            let columns = Axis::new(crop_width, width);
            for channel in 0..2 {
                let mut to = vec![f32::NAN; 3 * width];
                resize(&mut to, dims, pixels, 0, channel);
                for (i, to) in to.iter().enumerate() {
                    let (y, x) = (i / width, i % width);
                    let pixel = |j: usize| values[5 + 2 * (y * crop_width + j) + channel];
                    let value = columns.taps(x).blend(pixel);
                    let want = Pixels::normalise(value, pixels.mean[channel], pixels.std[channel]);
                    assert_eq!(
                        to.to_bits(),
                        want.to_bits(),
                        "{y}, {x} of {crop_width} to {width}"
                    );
                }
            }
        }
    }

    /// Looked up or computed, at any stride, and no further than the values go.
    #[test]
    fn both_ways_give_the_same_bits() {
        for len in [0, 1, 7, MANY - 1, MANY, MANY + 3] {
            for stride in 1..=3 {
                let from: Vec<u8> = (0..len * stride).map(|i| (i * 37 % 251) as u8).collect();
                let mut to = vec![f32::NAN; len];
                normalise(&mut to, &from, stride, 0.485, 0.229);
                for (i, to) in to.iter().enumerate() {
                    let want = (f32::from(from[i * stride]) / 255.0 - 0.485) / 0.229;
                    assert_eq!(to.to_bits(), want.to_bits(), "{i} of {len}");
                }
            }
        }
    }
}
