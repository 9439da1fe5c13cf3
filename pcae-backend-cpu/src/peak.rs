//! The machine's own limit, to hold throughput against.

use std::hint::{black_box, spin_loop};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use crate::Cpu;
use crate::cpu::zeroed;
use crate::error::Error;
use crate::gemm::Precision;
use crate::isa::kernel;
use crate::threads::Pieces;

/// Independent sums: a multiply-add takes 4 to 5 cycles and two start per cycle, so 10 keep both units busy; 12 and the two
/// factors fit in 16 registers.
const CHAINS: usize = 12;
/// Multiply-adds of each chain in one measurement: about a tenth of a millisecond.
const ROUNDS: usize = 1 << 16;
/// The same of the units that multiply bf16, which take 16 to 64 cycles for a round.
const BF16_ROUNDS: usize = 1 << 13;
/// How long threads wait for each other, longer than one takes to wake.
const PATIENCE: Duration = Duration::from_millis(1);

kernel! {
    /// `ROUNDS` dependent multiply-adds on each of `CHAINS` vectors; returns the floating-point operations.
    fn multiply_adds<'a, S>(s; factors: &'a [f32; 2], out: &'a mut f32) -> usize {
        let (a, b) = (s.splat(factors[0]), s.splat(factors[1]));
        let mut sums = [s.splat(0.0); CHAINS];
        for _ in 0..ROUNDS {
            for sum in &mut sums {
                *sum = s.mul_add(*sum, a, b);
            }
        }
        let mut total = sums[0];
        for sum in &sums[1..] {
            total = s.add(total, *sum);
        }
        *out = s.sum(total);
        2 * CHAINS * S::LANES * ROUNDS
    }
}

impl Cpu {
    /// Floating-point operations per second of multiply-adds in registers, with this backend's instruction set, precision
    /// and threads: what no matrix product can exceed. The best of some 50 ms.
    pub fn peak_flops(&self) -> f64 {
        (0..500).map(|_| self.spin_rate()).fold(0.0, f64::max)
    }

    /// [`Cpu::peak_flops`] of about a tenth of a millisecond, now: at the clock that other work on the machine, and what ran
    /// just before, leave. A processor under heavy vector load lowers its clock, and raises it again within a millisecond.
    pub fn spin_rate(&self) -> f64 {
        let count = self.threads.count();
        let (ready, mut rates) = (AtomicUsize::new(0), vec![0.0; count]);
        let pieces = Pieces::new(&mut rates, 1);
        self.threads.for_each(count, usize::MAX, pieces, |_, rate| {
            // All at once, as a product would: alone, a thread may have the clock of two. One that another program holds up
            // is not waited for.
            ready.fetch_add(1, Ordering::Relaxed);
            let came = Instant::now();
            while ready.load(Ordering::Relaxed) < count && came.elapsed() < PATIENCE {
                spin_loop();
            }
            let began = Instant::now();
            let flops = self.spin();
            rate[0] = flops as f64 / began.elapsed().as_secs_f64();
        });
        rates.iter().sum()
    }

    /// Multiply-adds of one thread, and the floating-point operations in them.
    fn spin(&self) -> usize {
        if let Precision::Bf16(unit) = self.precision
            && let Some(flops) = unit.spin(BF16_ROUNDS)
        {
            return flops;
        }
        // Unknown to the compiler, and below 1 so that the sums stay finite.
        let factors = black_box([0.999_f32, 0.001]);
        let mut value = 0.0;
        let flops = multiply_adds(self.isa, &factors, &mut value);
        black_box(value);
        flops
    }
}

/// Elements of a vector that is copied: 256 MiB, more than most caches hold.
const COPIED: usize = 64 << 20;
/// Elements of a piece of that.
const COPIED_PIECE: usize = 64 << 10;

/// How fast memory is, in bytes per second, read and written ones together.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Bandwidth {
    /// Of a copy to another place. Where that has to be fetched before it is overwritten, a third of the traffic is not
    /// counted.
    pub copy: f64,
    /// Of an update in place, which fetches nothing else: what an optimizer's pass can reach.
    pub update: f64,
}

impl Cpu {
    /// Copies and updates long vectors with this backend's threads: the best of some passes.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`] if there is no room for two vectors, 512 MiB.
    pub fn memory_bandwidth(&self) -> Result<Bandwidth, Error> {
        let (mut from, mut to) = (zeroed::<f32>(COPIED)?, zeroed::<f32>(COPIED)?);
        // Pages of zeros may all be the same one until they are written.
        from.fill(1.0);
        let mut best = Bandwidth {
            copy: 0.0,
            update: 0.0,
        };
        for _ in 0..4 {
            let copied = self.pass(&mut to, |i, to| {
                to.copy_from_slice(&from[i * COPIED_PIECE..][..COPIED_PIECE]);
            });
            let updated = self.pass(&mut to, |_, to| {
                for to in to {
                    *to = 1.5 - 0.5 * *to;
                }
            });
            best.copy = best.copy.max(copied);
            best.update = best.update.max(updated);
        }
        Ok(best)
    }

    /// Bytes per second of `work` on all pieces of `to`, each element of which it writes and reads one for.
    fn pass(&self, to: &mut [f32], work: impl Fn(usize, &mut [f32]) + Sync) -> f64 {
        let began = Instant::now();
        let pieces = Pieces::new(&mut *to, COPIED_PIECE);
        self.threads
            .for_each(COPIED / COPIED_PIECE, usize::MAX, pieces, work);
        black_box(&to);
        (2 * COPIED * size_of::<f32>()) as f64 / began.elapsed().as_secs_f64()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Bf16Unit, Isa};

    #[test]
    fn memory_is_not_infinitely_fast() {
        let cpu = Cpu::with(Isa::detect(), 1).unwrap();
        let Bandwidth { copy, update } = cpu.memory_bandwidth().unwrap();
        for rate in [copy, update] {
            assert!((1e8..1e13).contains(&rate), "{rate}");
        }
    }

    #[test]
    fn every_chain_is_computed() {
        for isa in Isa::available() {
            let mut sum = 0.0;
            let flops = multiply_adds(isa, &[0.999, 0.001], &mut sum);
            // Each lane runs to the fixed point x = 0.999 x + 0.001 = 1.
            let lanes = flops / (2 * CHAINS * ROUNDS);
            let expected = (CHAINS * lanes) as f32;
            assert!(
                (sum / expected - 1.0).abs() < 1e-3,
                "{isa}: {sum} {expected}"
            );
            assert!(Cpu::with(isa, 1).unwrap().peak_flops() > 1e6);
            for unit in Bf16Unit::available(isa) {
                let cpu = Cpu::with(isa, 1).unwrap();
                assert!(cpu.precision(Precision::Bf16(unit)).peak_flops() > 1e6);
            }
        }
    }
}
