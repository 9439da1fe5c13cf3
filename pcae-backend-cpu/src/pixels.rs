//! Pixels of 8 bits as values.

use pcae_kernel::backend::Pixels;

/// Pixels from which on all 256 values are computed first: two divisions for each take longer than to look one up.
const MANY: usize = 1024;

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
