//! Counter-based randomness (Philox4x32-10; Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).
//!
//! A number depends on its key alone: (seed, epoch, sample index, purpose) and its position in the stream. So a
//! resumed run, another number of threads or another backend sees the same masks, crops and drop-paths.

/// What random numbers are for. Streams of different purposes are independent of each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Purpose {
    /// Initial parameters.
    Init = 0,
    /// Order of the samples within an epoch.
    Shuffle = 1,
    /// Masking noise of one sample.
    Mask = 2,
    /// Crop, flip and whatever else is done to the pixels of one sample.
    Augment = 3,
    /// Stochastic depth of one sample.
    DropPath = 4,
    /// Selection at random, the ablation of [`crate::config::Criterion::Random`].
    Selection = 5,
    /// Split of a data set into parts.
    Split = 6,
    /// Mixing of the pictures of one micro-batch.
    Mix = 7,
}

/// The numbers of one (seed, epoch, sample, purpose), in order.
#[derive(Clone, Debug)]
pub struct Stream {
    key: [u32; 2],
    counter: [u32; 4],
    block: [u32; 4],
    used: usize,
}

impl Stream {
    /// Starts the stream of `purpose` for one sample in one epoch.
    ///
    /// Any 64-bit `epoch` and `sample` give their own stream as long as not both exceed 2²⁹ and 2³²; a stream has 2³² blocks of four numbers.
    pub fn new(seed: u64, epoch: u64, sample: u64, purpose: Purpose) -> Self {
        // The purposes fit in three bits: the epoch's low 29 bits share their word.
        let place = ((epoch as u32) << 3) | purpose as u32;
        let high = ((sample >> 32) as u32) ^ ((epoch >> 29) as u32).rotate_left(16);
        Self {
            key: [seed as u32, (seed >> 32) as u32],
            counter: [0, place, sample as u32, high],
            block: [0; 4],
            used: 4,
        }
    }

    /// The next 32 random bits.
    pub fn next_u32(&mut self) -> u32 {
        if self.used == 4 {
            self.block = philox4x32_10(self.counter, self.key);
            self.counter[0] = self.counter[0].wrapping_add(1);
            self.used = 0;
        }
        let bits = self.block[self.used];
        self.used += 1;
        bits
    }

    /// Uniform in `[0, 1)`, a multiple of 2⁻²⁴.
    pub fn uniform(&mut self) -> f32 {
        (self.next_u32() >> 8) as f32 * (1.0 / 16_777_216.0)
    }

    /// Uniform in `[0, 1)`, a multiple of 2⁻⁵³.
    pub fn uniform_f64(&mut self) -> f64 {
        let high = u64::from(self.next_u32() >> 5);
        let low = u64::from(self.next_u32() >> 6);
        ((high << 26) | low) as f64 * (1.0 / 9_007_199_254_740_992.0)
    }

    /// Uniform in `0..n`; 0 when `n` is 0. Unbiased (Lemire's multiplication with rejection).
    pub fn below(&mut self, n: u32) -> u32 {
        let mut product = u64::from(self.next_u32()) * u64::from(n);
        if (product as u32) < n {
            let threshold = n.wrapping_neg() % n.max(1);
            while (product as u32) < threshold {
                product = u64::from(self.next_u32()) * u64::from(n);
            }
        }
        (product >> 32) as u32
    }

    /// Normal with mean 0 and standard deviation 1 (Box-Muller).
    pub fn normal(&mut self) -> f32 {
        let radius = libm::sqrt(-2.0 * libm::log(1.0 - self.uniform_f64()));
        (radius * libm::cos(core::f64::consts::TAU * self.uniform_f64())) as f32
    }

    /// Puts `items` in random order (Fisher-Yates). At most 2³² items.
    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for i in (1..items.len()).rev() {
            let j = self.below(i as u32 + 1) as usize;
            items.swap(i, j);
        }
    }
}

fn philox4x32_10(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for _ in 0..10 {
        let a = u64::from(counter[0]) * 0xD251_1F53;
        let b = u64::from(counter[2]) * 0xCD9E_8D57;
        counter = [
            (b >> 32) as u32 ^ counter[1] ^ key[0],
            b as u32,
            (a >> 32) as u32 ^ counter[3] ^ key[1],
            a as u32,
        ];
        key = [
            key[0].wrapping_add(0x9E37_79B9),
            key[1].wrapping_add(0xBB67_AE85),
        ];
    }
    counter
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The known answers published with Random123 1.14 (`kat_vectors`).
    #[test]
    fn philox_known_answers() {
        assert_eq!(
            philox4x32_10([0; 4], [0; 2]),
            [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]
        );
        assert_eq!(
            philox4x32_10([u32::MAX; 4], [u32::MAX; 2]),
            [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]
        );
        assert_eq!(
            philox4x32_10(
                [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344],
                [0xa409_3822, 0x299f_31d0]
            ),
            [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]
        );
    }

    #[test]
    fn every_part_of_the_key_matters() {
        let first =
            |seed, epoch, sample, purpose| Stream::new(seed, epoch, sample, purpose).next_u32();
        let base = first(1, 2, 3, Purpose::Mask);
        assert_eq!(base, first(1, 2, 3, Purpose::Mask));
        assert_ne!(base, first(1 << 32 | 1, 2, 3, Purpose::Mask));
        assert_ne!(base, first(1, 3, 3, Purpose::Mask));
        assert_ne!(base, first(1, 2, 4, Purpose::Mask));
        assert_ne!(base, first(1, 2, 3, Purpose::Augment));
    }

    #[test]
    fn moments() {
        let mut stream = Stream::new(7, 0, 0, Purpose::Init);
        let n = 100_000;
        let (mut mean, mut square, mut uniform) = (0.0, 0.0, 0.0);
        for _ in 0..n {
            let x = f64::from(stream.normal());
            mean += x / f64::from(n);
            square += x * x / f64::from(n);
            uniform += f64::from(stream.uniform()) / f64::from(n);
        }
        // Five standard errors of each estimate.
        assert!(mean.abs() < 5.0 / 316.0, "{mean}");
        assert!((square - 1.0).abs() < 5.0 * 1.42 / 316.0, "{square}");
        assert!((uniform - 0.5).abs() < 5.0 * 0.29 / 316.0, "{uniform}");
    }

    #[test]
    fn shuffle_is_a_permutation() {
        let mut items: [u32; 100] = core::array::from_fn(|i| i as u32);
        Stream::new(3, 1, 4, Purpose::Shuffle).shuffle(&mut items);
        assert_ne!(items, core::array::from_fn(|i| i as u32));
        items.sort_unstable();
        assert_eq!(items, core::array::from_fn(|i| i as u32));
    }
}
