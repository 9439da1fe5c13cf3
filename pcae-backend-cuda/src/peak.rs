//! What the device can do at most, measured: what figures of a run are held against.

use crate::Cuda;
use crate::buffers::Buf;
use crate::driver::DevicePtr;
use crate::error::Error;
use crate::gemm::Matmul;

/// Sides of the square products that are tried, as long as one takes less than [`LEAST_SECONDS`].
const SIDES: [usize; 6] = [256, 512, 1024, 2048, 4096, 8192];

/// Bytes that are copied, as long as that takes less than [`LEAST_SECONDS`]: the first more than the cache of many devices, the last more
/// than ten times that of any.
const COPIES: [usize; 6] = [32 << 20, 64 << 20, 128 << 20, 256 << 20, 512 << 20, 1 << 30];

/// From which on what comes before and after does not count.
const LEAST_SECONDS: f64 = 6e-4;

/// Timings of the largest, of which the best counts.
const TIMINGS: usize = 5;

/// Values of an operand that come from the host; more are copies of these.
const DIFFERENT: usize = 1 << 16;

impl Cuda {
    /// Operations per second of large products by cuBLASLt, in this backend's precision: two for each multiply-add, the best of some,
    /// timed on the device. Operands are no zeros, with which a device runs faster than with any others.
    ///
    /// # Errors
    /// If the device fails, or has not even memory for a small one.
    pub fn peak_flops(&mut self) -> Result<f64, Error> {
        let mut best = 0.0_f64;
        for side in SIDES {
            match self.product(side) {
                Ok((rate, seconds)) => {
                    best = best.max(rate);
                    if seconds >= LEAST_SECONDS {
                        break;
                    }
                }
                // As far as the memory goes.
                Err(Error::OutOfMemory { .. }) if best > 0.0 => break,
                Err(error) => return Err(error),
            }
        }
        Ok(best)
    }

    /// Operations per second of a product of two squares, and the least seconds that it took.
    fn product(&mut self, side: usize) -> Result<(f64, f64), Error> {
        let len = side * side;
        let new = |cuda: &mut Self| Buf::new(&mut cuda.queue, cuda.precision, len);
        let (a, b, out) = (new(self)?, new(self)?, new(self)?);
        for (seed, to) in [(1, &a), (2, &b)] {
            self.fill(to.at(0), len, seed)?;
        }
        let matmul = Matmul {
            m: side,
            n: side,
            k: side,
            a: a.at(0),
            a_transposed: false,
            a_row: side,
            b: b.at(0),
            b_transposed: true,
            b_row: side,
            bias: None,
            add: None,
            out: out.at(0),
            out_f32: false,
            scale: None,
        };
        let seconds = self.least_seconds(|cuda| cuda.queue.matmul(matmul))?;
        Ok((2.0 * (len * side) as f64 / seconds, seconds))
    }

    /// Bytes per second, read and written both, of a copy within the device's memory: the best of some, timed on the device.
    ///
    /// # Errors
    /// If the device fails, or has no memory for 64 MiB.
    pub fn memory_bandwidth(&mut self) -> Result<f64, Error> {
        let mut last = 0.0;
        for bytes in COPIES {
            match self.copied(bytes) {
                Ok((rate, seconds)) => {
                    // Smaller ones may have stayed in a cache.
                    last = rate;
                    if seconds >= LEAST_SECONDS {
                        break;
                    }
                }
                // As far as the memory goes.
                Err(Error::OutOfMemory { .. }) if last > 0.0 => break,
                Err(error) => return Err(error),
            }
        }
        Ok(last)
    }

    /// Bytes per second of a copy of so many, and the least seconds that it took.
    fn copied(&mut self, bytes: usize) -> Result<(f64, f64), Error> {
        let (from, to) = (self.queue.allocate(bytes)?, self.queue.allocate(bytes)?);
        let seconds = self.least_seconds(|cuda| cuda.queue.copy(to.at(), from.at(), bytes))?;
        Ok((2.0 * bytes as f64 / seconds, seconds))
    }

    /// Of one timing, or of [`TIMINGS`] where it takes long enough, after one that does not count.
    fn least_seconds(
        &mut self,
        mut work: impl FnMut(&mut Self) -> Result<(), Error>,
    ) -> Result<f64, Error> {
        let mut timed = |cuda: &mut Self| {
            cuda.queue.start_clock()?;
            work(cuda)?;
            cuda.queue.stop_clock()
        };
        timed(self)?;
        let mut least = timed(self)?;
        if least >= LEAST_SECONDS {
            for _ in 1..TIMINGS {
                least = least.min(timed(self)?);
            }
        }
        Ok(least)
    }

    /// Fills activations with numbers from -1 to 1 in no order.
    fn fill(&mut self, to: DevicePtr, len: usize, seed: u32) -> Result<(), Error> {
        let mut state = seed;
        let values: Vec<f32> = (0..len.min(DIFFERENT))
            .map(|_| {
                // Marsaglia's xorshift.
                state ^= state << 13;
                state ^= state >> 17;
                state ^= state << 5;
                state as f32 / (u32::MAX / 2) as f32 - 1.0
            })
            .collect();
        self.queue.write_act(to, &values)?;
        let size = self.precision.size();
        let mut filled = values.len();
        while filled < len {
            let more = filled.min(len - filled);
            self.queue.copy(to.plus(filled * size), to, more * size)?;
            filled += more;
        }
        Ok(())
    }
}
