//! RandAugment (Cubuk et al., 2020) with operations that grow with the magnitude, as `timm`'s `rand-mM-mstd0.5-inc1`
//! has them in the recipes of DeiT, BEiT and MAE.
//!
//! Results are within one level of Pillow's, but for geometry, which is always bilinear here.

use pcae_kernel::rng::Stream;

use super::luma;

/// Operations on a picture, drawn with replacement.
const OPERATIONS: usize = 2;
/// Probability that a drawn operation is applied.
const PROBABILITY: f32 = 0.5;
/// Standard deviation of the magnitude.
const MAGNITUDE_STD: f64 = 0.5;
/// The greatest magnitude.
pub(super) const MAX_MAGNITUDE: f64 = 10.0;

/// A picture, and room for another.
pub(super) struct Pixels<'a> {
    pub(super) width: usize,
    pub(super) height: usize,
    /// 1 or 3.
    pub(super) channels: usize,
    /// `[height, width, channels]`.
    pub(super) values: &'a mut Vec<u8>,
    pub(super) spare: &'a mut Vec<u8>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Operation {
    AutoContrast,
    Equalize,
    Invert,
    Rotate,
    Posterize,
    Solarize,
    SolarizeAdd,
    Color,
    Contrast,
    Brightness,
    Sharpness,
    ShearX,
    ShearY,
    TranslateX,
    TranslateY,
}

const ALL: [Operation; 15] = [
    Operation::AutoContrast,
    Operation::Equalize,
    Operation::Invert,
    Operation::Rotate,
    Operation::Posterize,
    Operation::Solarize,
    Operation::SolarizeAdd,
    Operation::Color,
    Operation::Contrast,
    Operation::Brightness,
    Operation::Sharpness,
    Operation::ShearX,
    Operation::ShearY,
    Operation::TranslateX,
    Operation::TranslateY,
];

/// Applies random operations of about `magnitude`; what comes into view from outside is `fill`.
pub(super) fn rand_augment(
    mut pixels: Pixels<'_>,
    magnitude: f64,
    fill: [u8; 3],
    stream: &mut Stream,
) {
    for _ in 0..OPERATIONS {
        let operation = ALL[stream.below(ALL.len() as u32) as usize];
        let is_applied = stream.uniform() < PROBABILITY;
        let magnitude = magnitude + MAGNITUDE_STD * f64::from(stream.normal());
        let sign = if stream.uniform() < 0.5 { -1.0 } else { 1.0 };
        if is_applied {
            let level = magnitude.clamp(0.0, MAX_MAGNITUDE) / MAX_MAGNITUDE;
            apply(&mut pixels, operation, level, sign, fill);
        }
    }
}

/// One operation at `level`, 0 to 1, towards less or more by `sign`.
fn apply(pixels: &mut Pixels<'_>, operation: Operation, level: f64, sign: f64, fill: [u8; 3]) {
    let factor = (1.0 + sign * 0.9 * level).max(0.1);
    match operation {
        Operation::AutoContrast => pixels.map_channels(auto_contrast),
        Operation::Equalize => pixels.map_channels(equalize),
        Operation::Invert => pixels.map(|v| 255 - v),
        Operation::Posterize => {
            // One bit at least: none would leave a black picture.
            let bits = (4 - (4.0 * level) as u32).max(1);
            let mask = !(0xff_u8 >> bits);
            pixels.map(|v| v & mask);
        }
        Operation::Solarize => {
            let threshold = 256 - (256.0 * level) as u32;
            pixels.map(|v| if u32::from(v) < threshold { v } else { 255 - v });
        }
        Operation::SolarizeAdd => {
            let add = (110.0 * level) as u8;
            pixels.map(|v| if v < 128 { v.saturating_add(add) } else { v });
        }
        Operation::Color => pixels.saturate(factor),
        Operation::Contrast => {
            let mean = pixels.mean_luma();
            pixels.map(|v| blend(mean, f64::from(v), factor));
        }
        Operation::Brightness => pixels.map(|v| blend(0.0, f64::from(v), factor)),
        Operation::Sharpness => pixels.sharpen(factor),
        Operation::Rotate => pixels.rotate(sign * 30.0 * level, fill),
        Operation::ShearX => pixels.affine([1.0, sign * 0.3 * level, 0.0, 0.0, 1.0, 0.0], fill),
        Operation::ShearY => pixels.affine([1.0, 0.0, 0.0, sign * 0.3 * level, 1.0, 0.0], fill),
        Operation::TranslateX => {
            let by = sign * 0.45 * level * pixels.width as f64;
            pixels.affine([1.0, 0.0, by, 0.0, 1.0, 0.0], fill);
        }
        Operation::TranslateY => {
            let by = sign * 0.45 * level * pixels.height as f64;
            pixels.affine([1.0, 0.0, 0.0, 0.0, 1.0, by], fill);
        }
    }
}

/// Between `from` (factor 0) and `to` (factor 1), or beyond.
fn blend(from: f64, to: f64, factor: f64) -> u8 {
    (from + factor * (to - from)).round() as u8
}

/// The least value becomes 0, the greatest 255.
fn auto_contrast(counts: &[u32; 256]) -> [u8; 256] {
    let mut table: [u8; 256] = std::array::from_fn(|v| v as u8);
    let low = counts.iter().position(|&count| count > 0).unwrap_or(0);
    let high = counts.iter().rposition(|&count| count > 0).unwrap_or(0);
    if high > low {
        let scale = 255.0 / (high - low) as f64;
        for (v, to) in table.iter_mut().enumerate() {
            *to = ((v as f64 - low as f64) * scale) as u8;
        }
    }
    table
}

/// Values become as evenly frequent as a table can make them.
fn equalize(counts: &[u32; 256]) -> [u8; 256] {
    let mut table: [u8; 256] = std::array::from_fn(|v| v as u8);
    let total: u32 = counts.iter().sum();
    let last = counts.iter().rev().find(|&&count| count > 0).unwrap_or(&0);
    let step = (total - last) / 255;
    if step == 0 {
        return table;
    }
    let mut below = step / 2;
    for (to, count) in table.iter_mut().zip(counts) {
        *to = (below / step).min(255) as u8;
        below += count;
    }
    table
}

impl Pixels<'_> {
    fn map(&mut self, to: impl Fn(u8) -> u8) {
        for v in self.values.iter_mut() {
            *v = to(*v);
        }
    }

    /// Maps each channel by a table made from how often its values occur.
    fn map_channels(&mut self, table: fn(&[u32; 256]) -> [u8; 256]) {
        for channel in 0..self.channels {
            let mut counts = [0; 256];
            let values = self.values.iter().skip(channel).step_by(self.channels);
            values.for_each(|&v| counts[usize::from(v)] += 1);
            let table = table(&counts);
            let values = self.values.iter_mut().skip(channel).step_by(self.channels);
            values.for_each(|v| *v = table[usize::from(*v)]);
        }
    }

    fn mean_luma(&self) -> f64 {
        let count = (self.width * self.height) as f64;
        let sum: u64 = if self.channels == 1 {
            self.values.iter().map(|&v| u64::from(v)).sum()
        } else {
            let colours = self.values.as_chunks().0.iter();
            colours.map(|&rgb| u64::from(luma(rgb))).sum()
        };
        (sum as f64 / count).round()
    }

    /// Towards or away from grey; grey pictures have nothing to change.
    fn saturate(&mut self, factor: f64) {
        if self.channels == 3 {
            for rgb in self.values.as_chunks_mut::<3>().0 {
                let grey = f64::from(luma(*rgb));
                for v in rgb {
                    *v = blend(grey, f64::from(*v), factor);
                }
            }
        }
    }

    /// Towards or away from a smoothed picture; the edge, where smoothing is not defined, stays.
    fn sharpen(&mut self, factor: f64) {
        self.spare.clone_from(self.values);
        let (row, step) = (self.width * self.channels, self.channels);
        for y in 1..self.height.saturating_sub(1) {
            for i in y * row + step..(y + 1) * row - step {
                let around = |at: usize| u32::from(self.spare[at]);
                let line = |at: usize| around(at - step) + around(at) + around(at + step);
                let sum = line(i - row) + line(i) + line(i + row) + 4 * around(i);
                let smooth = (f64::from(sum) / 13.0).round();
                self.values[i] = blend(smooth, f64::from(self.spare[i]), factor);
            }
        }
    }

    /// By `degrees` about the centre.
    fn rotate(&mut self, degrees: f64, fill: [u8; 3]) {
        let (sine, cosine) = (
            libm::sin(degrees.to_radians()),
            libm::cos(degrees.to_radians()),
        );
        let (cx, cy) = (self.width as f64 / 2.0, self.height as f64 / 2.0);
        let matrix = [
            cosine,
            sine,
            cx - cosine * cx - sine * cy,
            -sine,
            cosine,
            cy + sine * cx - cosine * cy,
        ];
        self.affine(matrix, fill);
    }

    /// Takes the value at `(x, y)` from `(m0 x + m1 y + m2, m3 x + m4 y + m5)`, bilinearly; coordinates are of the
    /// centres of pixels, which lie at halves.
    fn affine(&mut self, m: [f64; 6], fill: [u8; 3]) {
        self.spare.clone_from(self.values);
        let (width, height, channels) = (self.width, self.height, self.channels);
        for y in 0..height {
            for x in 0..width {
                let (xo, yo) = (x as f64 + 0.5, y as f64 + 0.5);
                let xi = m[0] * xo + m[1] * yo + m[2];
                let yi = m[3] * xo + m[4] * yo + m[5];
                let out = &mut self.values[(y * width + x) * channels..][..channels];
                let is_inside = |at: f64, size: usize| at >= 0.0 && at < size as f64;
                if !(is_inside(xi, width) && is_inside(yi, height)) {
                    out.copy_from_slice(&fill[..channels]);
                    continue;
                }
                let (x0, x1, wx) = neighbours(xi, width);
                let (y0, y1, wy) = neighbours(yi, height);
                for (channel, out) in out.iter_mut().enumerate() {
                    let at = |y: usize, x: usize| {
                        f64::from(self.spare[(y * width + x) * channels + channel])
                    };
                    let line = |y: usize| at(y, x0) + wx * (at(y, x1) - at(y, x0));
                    *out = (line(y0) + wy * (line(y1) - line(y0))).round() as u8;
                }
            }
        }
    }
}

/// The pixels before and after a place, and the weight of the second; the edge goes on outside.
fn neighbours(at: f64, size: usize) -> (usize, usize, f64) {
    let at = (at - 0.5).max(0.0);
    let first = (at as usize).min(size - 1);
    (first, (first + 1).min(size - 1), at - first as f64)
}

#[cfg(test)]
mod tests {
    use pcae_kernel::rng::Purpose;

    use super::*;

    const FILL: [u8; 3] = [7, 8, 9];

    /// A picture of 5 x 4 pixels after an operation.
    fn after(
        channels: usize,
        values: &[u8],
        operation: Operation,
        level: f64,
        sign: f64,
    ) -> Vec<u8> {
        let mut values = values.to_vec();
        let mut pixels = Pixels {
            width: 5,
            height: 4,
            channels,
            values: &mut values,
            spare: &mut Vec::new(),
        };
        apply(&mut pixels, operation, level, sign, FILL);
        values
    }

    fn ramp() -> Vec<u8> {
        (0..20).map(|i| 10 + 5 * i).collect()
    }

    fn colours() -> Vec<u8> {
        let mut stream = Stream::new(3, 0, 0, Purpose::Init);
        (0..60).map(|_| stream.next_u32() as u8).collect()
    }

    #[test]
    fn tables() {
        let ramp = ramp();
        let stretched = after(1, &ramp, Operation::AutoContrast, 0.9, 1.0);
        assert_eq!((stretched[0], stretched[19]), (0, 255));
        // 40 is 30 of 95 above the least: 30 * 255 / 95 = 80.5.
        assert_eq!(stretched[6], 80);
        let inverted = after(1, &ramp, Operation::Invert, 0.9, 1.0);
        assert_eq!(inverted[3], 255 - 25);
        // One bit at magnitude 9, 2 bits at 5.
        let posterized = after(1, &ramp, Operation::Posterize, 0.9, 1.0);
        assert!(posterized.iter().all(|v| [0, 128].contains(v)));
        let posterized = after(1, &ramp, Operation::Posterize, 0.5, 1.0);
        assert_eq!(posterized[19], 105 & 0b1100_0000);
        assert_eq!(after(1, &ramp, Operation::Posterize, 1.0, 1.0)[19], 0);
        // From 256 - 230 = 26 on.
        let solarized = after(1, &ramp, Operation::Solarize, 0.9, 1.0);
        assert_eq!((solarized[3], solarized[4]), (25, 225));
        let added = after(1, &[127, 128, 250], Operation::SolarizeAdd, 0.5, 1.0);
        assert_eq!(added, [182, 128, 250]);
    }

    /// Values at equal distances become so, whatever the distances were; a single value stays.
    #[test]
    fn equalizing() {
        let two = |i: usize| if i < 10 { 100 } else { 101 };
        // 510 of each, so that there are enough for a step of 2.
        let mut values: Vec<u8> = (0..1020).map(|i| two(i % 20)).collect();
        let mut pixels = Pixels {
            width: 51,
            height: 20,
            channels: 1,
            values: &mut values,
            spare: &mut Vec::new(),
        };
        apply(&mut pixels, Operation::Equalize, 1.0, 1.0, FILL);
        // (510 + 0) / 2 is 255: the lower half becomes 0, the upper one 255.
        assert!(values.iter().all(|v| [0, 255].contains(v)));
        assert_eq!(values.iter().filter(|&&v| v == 255).count(), 510);
        assert_eq!(after(1, &[9; 20], Operation::Equalize, 1.0, 1.0), [9; 20]);
    }

    /// At level 0 every enhancement is the identity; geometry too.
    #[test]
    fn nothing_at_level_zero() {
        for operation in ALL {
            let is_fixed = matches!(
                operation,
                Operation::AutoContrast | Operation::Equalize | Operation::Invert
            );
            if !is_fixed && operation != Operation::Posterize {
                for sign in [-1.0, 1.0] {
                    assert_eq!(after(3, &colours(), operation, 0.0, sign), colours());
                    assert_eq!(after(1, &ramp(), operation, 0.0, sign), ramp());
                }
            }
        }
    }

    #[test]
    fn enhancements() {
        let rgb = [200, 100, 50];
        let grey = f64::from(luma(rgb));
        let values: Vec<u8> = rgb.repeat(20);
        // Factors 0.55 and 1.45 at level 0.5.
        for (sign, factor) in [(-1.0, 0.55), (1.0, 1.45)] {
            let coloured = after(3, &values, Operation::Color, 0.5, sign);
            let bright = after(3, &values, Operation::Brightness, 0.5, sign);
            let contrasted = after(3, &values, Operation::Contrast, 0.5, sign);
            for channel in 0..3 {
                let v = f64::from(rgb[channel]);
                let want = (grey + factor * (v - grey)).round() as u8;
                assert_eq!((coloured[channel], contrasted[channel]), (want, want));
                assert_eq!(bright[channel], (factor * v).round() as u8);
            }
        }
        // A point of 130 in black smooths to 5 * 130 / 13 = 50, its neighbours to 10.
        let mut point = vec![0; 20];
        point[7] = 130;
        let smooth = after(1, &point, Operation::Sharpness, 1.0, -1.0);
        assert_eq!((smooth[7], smooth[6]), (58, 9), "{smooth:?}");
        assert_eq!(smooth[2], 0, "the edge stays");
        let sharp = after(1, &point, Operation::Sharpness, 1.0, 1.0);
        assert_eq!((sharp[7], sharp[6]), (202, 0));
    }

    #[test]
    fn geometry() {
        let ramp = ramp();
        // 0.45 of 5 columns at level 4 / 9: one pixel.
        let shifted = after(1, &ramp, Operation::TranslateX, 1.0 / 2.25, 1.0);
        assert_eq!(shifted[..5], [15, 20, 25, 30, 7]);
        let shifted = after(1, &ramp, Operation::TranslateX, 1.0 / 2.25, -1.0);
        assert_eq!(shifted[..5], [7, 10, 15, 20, 25]);
        let shifted = after(1, &ramp, Operation::TranslateY, 1.0 / 1.8, 1.0);
        assert_eq!(shifted[..5], ramp[5..10]);
        assert_eq!(shifted[15..], [7; 5]);
        // Half a pixel between neighbours: their mean.
        let between = after(1, &ramp, Operation::TranslateX, 0.5 / 2.25, 1.0);
        assert_eq!(between[..3], [13, 18, 23]);
        // A row at 2.5 shears by 0.3 * 2.5 = 0.75 pixels of 5.
        let sheared = after(1, &ramp, Operation::ShearX, 1.0, 1.0);
        assert_eq!(sheared[10], (60.0_f64 + 0.75 * 5.0).round() as u8);
        // A half turn about the centre, which the operation never does, is exact.
        let mut turned = ramp.clone();
        let mut pixels = Pixels {
            width: 5,
            height: 4,
            channels: 1,
            values: &mut turned,
            spare: &mut Vec::new(),
        };
        pixels.rotate(180.0, FILL);
        // The sine of 180 degrees is not quite 0: the outermost may fall outside by a rounding.
        let want: Vec<u8> = ramp.iter().rev().copied().collect();
        assert_eq!(turned[6..9], want[6..9]);
    }

    /// Every operation takes part, most pictures change, and none of any size panics.
    #[test]
    fn any_picture_can_be_augmented() {
        let mut changed = 0;
        for sample in 0..3000 {
            let mut stream = Stream::new(5, 0, sample, Purpose::Augment);
            let (width, height) = (1 + stream.below(9) as usize, 1 + stream.below(9) as usize);
            let channels = if stream.uniform() < 0.5 { 1 } else { 3 };
            let count = width * height * channels;
            let mut values: Vec<u8> = (0..count).map(|_| stream.next_u32() as u8).collect();
            let before = values.clone();
            let pixels = Pixels {
                width,
                height,
                channels,
                values: &mut values,
                spare: &mut Vec::new(),
            };
            rand_augment(pixels, 9.0, FILL, &mut stream);
            assert_eq!(values.len(), count);
            changed += u32::from(values != before);
        }
        // A quarter draws no operation that is applied; tiny and grey pictures have fewer that do anything.
        assert!((1500..2400).contains(&changed), "{changed}");
    }
}
