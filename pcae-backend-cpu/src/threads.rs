//! Work split over threads.
//!
//! Work comes in units, such as the rows of a matrix, each with its own pieces of the outputs. What a unit computes does
//! not depend on the others, so the number of threads decides who runs it, not what comes out.

use crate::error::Error;

/// Elements that are worth handing to another thread: 64 KiB at about 10 GB/s and core take some 6 µs, many times what
/// the hand-over costs, and small enough that many threads find work.
#[cfg(feature = "rayon")]
const GRAIN: usize = 16 * 1024;

/// A pool of threads, or none.
#[derive(Debug)]
pub(crate) struct Threads {
    count: usize,
    #[cfg(feature = "rayon")]
    pool: Option<rayon::ThreadPool>,
}

/// What the units write to.
pub(crate) trait Parts: Send + Sized {
    /// The piece of one unit.
    type Piece;

    /// The pieces of the first `units` units and the rest.
    fn split(self, units: usize) -> (Self, Self);

    /// The last piece.
    fn piece(self) -> Self::Piece;
}

/// A slice in pieces of `len` elements.
pub(crate) struct Pieces<'a, T> {
    data: &'a mut [T],
    len: usize,
}

impl<'a, T> Pieces<'a, T> {
    pub(crate) fn new(data: &'a mut [T], len: usize) -> Self {
        Self { data, len }
    }
}

impl<'a, T: Send> Parts for Pieces<'a, T> {
    type Piece = &'a mut [T];

    fn split(self, units: usize) -> (Self, Self) {
        let at = units.saturating_mul(self.len).min(self.data.len());
        let (first, rest) = self.data.split_at_mut(at);
        (Self::new(first, self.len), Self::new(rest, self.len))
    }

    fn piece(self) -> &'a mut [T] {
        self.data
    }
}

impl Parts for () {
    type Piece = ();

    fn split(self, _: usize) -> (Self, Self) {
        ((), ())
    }

    fn piece(self) {}
}

impl<A: Parts> Parts for Option<A> {
    type Piece = Option<A::Piece>;

    fn split(self, units: usize) -> (Self, Self) {
        self.map(|parts| parts.split(units)).unzip()
    }

    fn piece(self) -> Self::Piece {
        self.map(A::piece)
    }
}

impl<A: Parts, B: Parts> Parts for (A, B) {
    type Piece = (A::Piece, B::Piece);

    fn split(self, units: usize) -> (Self, Self) {
        let (a, b) = (self.0.split(units), self.1.split(units));
        ((a.0, b.0), (a.1, b.1))
    }

    fn piece(self) -> Self::Piece {
        (self.0.piece(), self.1.piece())
    }
}

impl Threads {
    /// `count` threads.
    pub(crate) fn new(count: usize) -> Result<Self, Error> {
        if count == 0 {
            return Err(Error::Threads { asked: count });
        }
        #[cfg(feature = "rayon")]
        {
            let pool = if count == 1 {
                None
            } else {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(count).build();
                Some(pool.map_err(|_| Error::Threads { asked: count })?)
            };
            Ok(Self { count, pool })
        }
        #[cfg(not(feature = "rayon"))]
        {
            if count == 1 {
                Ok(Self { count })
            } else {
                Err(Error::Threads { asked: count })
            }
        }
    }

    /// The caller's thread alone.
    pub(crate) fn one() -> Self {
        Self {
            count: 1,
            #[cfg(feature = "rayon")]
            pool: None,
        }
    }

    pub(crate) fn count(&self) -> usize {
        self.count
    }

    /// Calls `work(i, piece i of parts)` for every `i` below `units`; each reads or writes about `cost` elements.
    pub(crate) fn for_each<P: Parts>(
        &self,
        units: usize,
        cost: usize,
        parts: P,
        work: impl Fn(usize, P::Piece) + Sync,
    ) {
        #[cfg(feature = "rayon")]
        {
            let grain = (GRAIN / cost.max(1)).max(1);
            if units > grain
                && let Some(pool) = &self.pool
            {
                return pool.install(|| halve(0, units, grain, parts, &work));
            }
        }
        #[cfg(not(feature = "rayon"))]
        let _ = cost;
        each(0, units, parts, &work);
    }
}

/// One after the other.
fn each<P: Parts>(at: usize, units: usize, parts: P, work: &impl Fn(usize, P::Piece)) {
    let mut rest = parts;
    for i in at..at + units {
        let (first, after) = rest.split(1);
        work(i, first.piece());
        rest = after;
    }
}

/// In halves for as long as there are more than `grain`.
#[cfg(feature = "rayon")]
fn halve<P: Parts>(
    at: usize,
    units: usize,
    grain: usize,
    parts: P,
    work: &(impl Fn(usize, P::Piece) + Sync),
) {
    if units <= grain {
        return each(at, units, parts, work);
    }
    let half = units / 2;
    let (first, rest) = parts.split(half);
    rayon::join(
        || halve(at, half, grain, first, work),
        || halve(at + half, units - half, grain, rest, work),
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_unit_comes_once() {
        let mut pools = vec![Threads::one()];
        if cfg!(feature = "rayon") {
            pools.extend([2, 3].map(|n| Threads::new(n).unwrap()));
        }
        for pool in pools {
            for (units, len, cost) in [(7, 3, 1 << 14), (1, 5, 1), (801, 2, 300), (0, 4, 4)] {
                let (mut a, mut b) = (vec![0; units * len], vec![0; units]);
                let parts = (Pieces::new(&mut a, len), Some(Pieces::new(&mut b, 1)));
                pool.for_each(units, cost, parts, |i, (a, b)| {
                    a.fill(i + 1);
                    b.unwrap()[0] += i + 1;
                });
                assert!((0..units).all(|i| b[i] == i + 1));
                assert!((0..units * len).all(|i| a[i] == i / len + 1));
            }
        }
        assert_eq!(Threads::new(0).unwrap_err(), Error::Threads { asked: 0 });
    }
}
