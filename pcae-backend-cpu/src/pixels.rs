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
    use super::*;

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
