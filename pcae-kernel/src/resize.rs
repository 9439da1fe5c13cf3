//! Resizing pictures of 8 bits, as [`write_pixels`](crate::backend::Backend::write_pixels) states it.
//!
//! Bicubic with antialiasing: Keys' filter with a = -1/2 (Catmull-Rom), as wide as the picture shrinks, and weights as integers, so
//! that whoever computes the sums gets the same bytes. It is the convolution of Pillow's `resize`, in the order and with the
//! integers of the crate `fast_image_resize`: columns of a picture first, each pass rounded to 8 bits.
//!
//! The weights of output pixel `i`, of `to` made from `from`, with `scale = from / to` and `width = max(scale, 1)`:
//!
//! - its centre lies at `c = (i + 1/2) scale`, and pixels `floor(c - 2 width)..ceil(c + 2 width)` count, as far as there are any;
//! - pixel `j` has the weight `w[j] = keys((j - (c - 1/2)) * (1 / width))`, divided by the sum of all of them, where `keys(x)` is
//!   `((1.5 |x| - 2.5) |x|) |x| + 1` below 1, and `(((|x| - 5) |x| + 8) |x| - 4) / -2` from there to 2;
//! - `round(w[j] * 2^shift)` is the integer, with the greatest `shift` up to 21 for which no pixel's weight reaches 2^15.
//!
//! Everything is in f64, rounded after each operation, and sums begin at the first pixel.

use crate::backend::PixelDims;

/// A picture may have this many times as many pixels as what becomes of it, and be as many times as high and as wide. What is larger
/// costs more to move than to resize where it is.
pub const MAX_SHRINK: usize = 4;

/// Pixels of a row or column that count for one pixel of the output, at most.
pub const MAX_TAPS: usize = 4 * MAX_SHRINK + 1;

/// Weights are integers below this.
const WEIGHT_LIMIT: f64 = 32768.0;

/// The greatest shift: 8 bits of a pixel and two for sums beyond its range are left of 32.
const MAX_SHIFT: u32 = 21;

/// Where a picture lies among the values of others, and its size.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Crop {
    /// Its first value.
    pub start: usize,
    /// Rows of pixels.
    pub height: usize,
    /// Columns of pixels.
    pub width: usize,
}

impl Crop {
    /// Whether there is a pixel, and no side or area is more than [`MAX_SHRINK`] times that of a picture of `dims`.
    pub fn fits(self, dims: PixelDims) -> bool {
        let most = |len: usize| MAX_SHRINK.saturating_mul(len);
        let area = self.height.saturating_mul(self.width);
        area > 0
            && self.height <= most(dims.height)
            && self.width <= most(dims.width)
            && area <= most(dims.height.saturating_mul(dims.width))
    }
}

/// One direction of a resize.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Axis {
    from: usize,
    scale: f64,
    width: f64,
    shift: u32,
}

/// The pixels that count for one of the output.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Taps {
    /// The first of them.
    pub start: usize,
    /// How many there are.
    pub count: usize,
    /// Their weights, times `2^shift`.
    weights: [i16; MAX_TAPS],
    shift: u32,
}

/// Keys' cubic filter, a = -1/2.
fn keys(x: f64) -> f64 {
    let x = libm::fabs(x);
    if x < 1.0 {
        (1.5 * x - 2.5) * x * x + 1.0
    } else if x < 2.0 {
        (((x - 5.0) * x + 8.0) * x - 4.0) * -0.5
    } else {
        0.0
    }
}

impl Axis {
    /// From `from` pixels to `to`, of which neither is 0, and `from` at most [`MAX_SHRINK`] times the other.
    pub fn new(from: usize, to: usize) -> Self {
        let scale = from as f64 / to as f64;
        let mut axis = Self {
            from,
            scale,
            width: scale.max(1.0),
            shift: MAX_SHIFT,
        };
        let mut greatest = 0.0_f64;
        for i in 0..to {
            let (start, end, sum) = axis.window(i);
            for j in start..end {
                greatest = greatest.max(axis.weight(i, j) / sum);
            }
        }
        let reaches = |shift: u32| libm::round(greatest * f64::from(1 << shift)) >= WEIGHT_LIMIT;
        while axis.shift > 1 && reaches(axis.shift) {
            axis.shift -= 1;
        }
        axis
    }

    /// The centre of output pixel `i`.
    fn centre(&self, i: usize) -> f64 {
        (i as f64 + 0.5) * self.scale
    }

    /// The weight of pixel `j` before weights are divided by their sum.
    fn weight(&self, i: usize, j: usize) -> f64 {
        keys((j as f64 - (self.centre(i) - 0.5)) * (1.0 / self.width))
    }

    /// The pixels that count, and the sum of their weights.
    fn window(&self, i: usize) -> (usize, usize, f64) {
        let (centre, radius) = (self.centre(i), 2.0 * self.width);
        // Below zero becomes zero.
        let start = libm::floor(centre - radius) as usize;
        let end = self.from.min(libm::ceil(centre + radius) as usize);
        let sum = (start..end).map(|j| self.weight(i, j)).sum();
        (start, end, sum)
    }

    /// The weights of output pixel `i`.
    pub fn taps(&self, i: usize) -> Taps {
        let (start, end, sum) = self.window(i);
        let mut taps = Taps {
            start,
            count: end.saturating_sub(start).min(MAX_TAPS),
            weights: [0; MAX_TAPS],
            shift: self.shift,
        };
        let unit = f64::from(1 << self.shift);
        for (weight, j) in taps.weights.iter_mut().zip(start..end) {
            *weight = libm::round(self.weight(i, j) / sum * unit) as i16;
        }
        taps
    }
}

impl Taps {
    /// `clamp((2^(shift - 1) + sum over j of weights[j] pixel(start + j)) >> shift, 0, 255)`
    #[inline]
    pub fn blend(&self, mut pixel: impl FnMut(usize) -> u8) -> u8 {
        let weights = self.weights.iter().take(self.count).enumerate();
        let sum: i32 = weights
            .map(|(j, &weight)| i32::from(weight) * i32::from(pixel(self.start + j)))
            .sum();
        ((sum + (1 << (self.shift - 1))) >> self.shift).clamp(0, 255) as u8
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// To the same size nothing changes.
    #[test]
    fn the_same_size_is_the_same_picture() {
        for len in [1, 2, 7, 64] {
            let axis = Axis::new(len, len);
            for i in 0..len {
                let taps = axis.taps(i);
                assert_eq!(taps.blend(|j| if j == i { 201 } else { 97 }), 201);
            }
        }
    }

    /// At any size no more pixels count than there is room for, all of them exist, a picture of one colour stays it, and the greatest
    /// weight has 14 bits at least.
    #[test]
    fn windows_lie_within_the_picture() {
        for to in 1..=40 {
            for from in 1..=MAX_SHRINK * to {
                let axis = Axis::new(from, to);
                let mut greatest = 0;
                for i in 0..to {
                    let (start, end, _) = axis.window(i);
                    assert!(start < end && end <= from && end - start <= MAX_TAPS);
                    let taps = axis.taps(i);
                    for value in [0, 1, 128, 255] {
                        assert_eq!(taps.blend(|_| value), value, "{from} to {to}");
                    }
                    greatest = greatest.max(*taps.weights.iter().max().unwrap());
                }
                assert!((1 << 14..1 << 15).contains(&i32::from(greatest)));
            }
        }
    }

    /// Halving: the filter at odd quarters, twice as wide, from either side; at the border what lies beyond it does not count.
    #[test]
    fn weights_are_those_of_the_formula() {
        let axis = Axis::new(64, 32);
        let taps = axis.taps(10);
        let (start, count) = (taps.start, taps.count);
        assert_eq!((start, count), (17, 8));
        let keys = |x: f64| match x {
            x if x < 1.0 => 1.5 * x.powi(3) - 2.5 * x.powi(2) + 1.0,
            x => -0.5 * x.powi(3) + 2.5 * x.powi(2) - 4.0 * x + 2.0,
        };
        let want = [1.75, 1.25, 0.75, 0.25, 0.25, 0.75, 1.25, 1.75].map(keys);
        let sum: f64 = want.iter().sum();
        for (weight, want) in taps.weights.iter().zip(want) {
            let unit = f64::from(1 << axis.shift);
            assert!((f64::from(*weight) / unit - want / sum).abs() <= 0.5 / unit);
        }
        assert_eq!(axis.taps(0).start, 0);
        assert_eq!(axis.taps(0).count, 5);
    }

    /// To the nearest integer, at any size.
    #[test]
    fn weights_are_rounded() {
        for (from, to) in [(7, 5), (5, 7), (64, 17), (3, 40)] {
            let axis = Axis::new(from, to);
            let unit = f64::from(1 << axis.shift);
            for i in 0..to {
                let (start, end, sum) = axis.window(i);
                for (weight, j) in axis.taps(i).weights.iter().zip(start..end) {
                    let exact = axis.weight(i, j) / sum * unit;
                    assert!((f64::from(*weight) - exact).abs() <= 0.5, "{from} to {to}");
                }
            }
        }
    }

    /// Beside an edge the sums leave the range of 8 bits at either end, and pixels do not.
    #[test]
    fn what_leaves_the_range_is_cut() {
        for (from, to) in [(8, 32), (32, 16)] {
            let axis = Axis::new(from, to);
            let edge = |j: usize| if j < from / 2 { 0 } else { 255 };
            let (mut least, mut most) = (0.0_f64, 0.0_f64);
            for i in 0..to {
                let (start, end, sum) = axis.window(i);
                let term = |j: usize| axis.weight(i, j) / sum * f64::from(edge(j));
                let exact: f64 = (start..end).map(term).sum();
                let pixel = f64::from(axis.taps(i).blend(edge));
                assert!((pixel - exact.clamp(0.0, 255.0)).abs() < 0.51, "{exact}");
                (least, most) = (least.min(exact), most.max(exact));
            }
            assert!(least < -1.0 && most > 256.0, "{least}..{most}");
        }
    }

    #[test]
    fn large_crops_do_not_fit() {
        let dims = PixelDims {
            batch: 1,
            channels: 3,
            height: 10,
            width: 20,
        };
        let fits = |height, width| {
            let crop = Crop {
                start: 0,
                height,
                width,
            };
            crop.fits(dims)
        };
        assert!(fits(1, 1) && fits(40, 20) && fits(10, 80) && fits(20, 40));
        assert!(!fits(0, 1) && !fits(1, 0));
        assert!(!fits(41, 1) && !fits(1, 81) && !fits(21, 40) && !fits(20, 41));
        assert!(!fits(usize::MAX, usize::MAX));
    }
}
