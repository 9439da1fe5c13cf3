//! Where a product is cut.

use core::ops::Range;

use crate::cpu::LINE;
use crate::memory;

use super::tile::{Shape, Strips};
use super::{Dims, Precision};

/// Chunks begin at a multiple of it, the side of the squares of AMX.
const CHUNK_STEP: usize = 16;
/// Multiply-adds that are worth handing to another thread: some 10 µs.
const GRAIN: usize = 1 << 19;

/// Where a product is cut. Sizes are in elements of 4 bytes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Cuts {
    /// Words of the inner dimension of a chunk, at most.
    pub(super) chunk: usize,
    /// Words that a tile goes through before the next of its run does, at most. The run's tiles take turns until the chunk
    /// is done.
    pub(super) depth: usize,
    /// Tiles of a run, at most.
    pub(super) run: usize,
    /// The left operand's part that a thread goes through for each panel, and the sums that wait meanwhile, at most: half
    /// of its level-2 cache, which a panel's chunk, the next one, and what is written take the rest of.
    pub(super) left: usize,
    /// Panels of a group, at most. Where the left operand exceeds the cache, a thread reads it once for each group.
    pub(super) group: usize,
    /// The left operand is packed in blocks of so many elements, but of `min_block` rows at least: each block packs the
    /// right operand anew, where it comes unpacked.
    pub(super) block: usize,
    pub(super) min_block: usize,
}

impl Cuts {
    pub(super) fn of_this_machine(precision: Precision) -> Self {
        let cache = memory::level2_cache() / size_of::<f32>();
        let cuts = Self {
            // Few enough for many rows of the left operand to stay in a level-2 cache, many enough for the sums to wait
            // seldom.
            chunk: 1024,
            depth: usize::MAX,
            run: 1,
            left: cache / 2,
            group: 8,
            block: 4 << 20,
            min_block: 512,
        };
        match precision {
            // AMX is done with its operands many times as fast as multiply-adds: 16 KiB of a panel come from the level-1 cache
            // for all tiles of a run but the first, the sums that wait meanwhile stay there too, and the left operand is
            // read from beyond the level-2 cache seldom.
            Precision::Bf16(unit) if unit.wants_squares() => Self {
                chunk: 512,
                depth: 128,
                run: 4,
                left: cache * 5 / 8,
                group: 32,
                ..cuts
            },
            _ => cuts,
        }
    }
}

/// How a block of rows is cut into units of work, chunks of rows of tiles times groups of panels, and each unit again.
#[derive(Clone, Copy, Debug)]
pub(super) struct Plan {
    pub(super) strips: Strips,
    /// Parts of the rows of tiles, each a unit with each group.
    pub(super) row_chunks: usize,
    /// Rows of tiles that stay in the cache.
    pub(super) cached: usize,
    pub(super) panels: usize,
    pub(super) group: usize,
    pub(super) groups: usize,
    /// Parts of the inner dimension.
    pub(super) chunks: usize,
    /// As in [`Cuts`].
    depth: usize,
    run: usize,
}

impl Plan {
    pub(super) fn new(cuts: &Cuts, dims: Dims, shape: &Shape, threads: usize) -> Self {
        let Dims { m, n, inner } = dims;
        let strips = Strips::new(m, shape);
        let chunks = shape.words.div_ceil(cuts.chunk).max(1);
        let chunk = shape.words.div_ceil(chunks).max(1);
        let panels = n.div_ceil(shape.width);
        let fits = cuts.group.clamp(1, panels.max(1));
        // Of a row of tiles: the left operand, and the sums that wait between chunks.
        let waiting = match chunks {
            1 => 0,
            _ => fits * shape.width,
        };
        let cached = (cuts.left / ((chunk + waiting) * shape.rows)).clamp(1, strips.count.max(1));
        // Four units per thread even out what disturbs one of them.
        let worth = m.saturating_mul(n).saturating_mul(inner) / GRAIN;
        let wanted = match threads {
            1 => 1,
            _ => worth.clamp(1, 4 * threads),
        };
        let cut = |row_chunks: usize| {
            let groups = wanted.div_ceil(row_chunks).min(panels).max(1);
            let group = panels.div_ceil(groups).min(fits).max(1);
            (group, panels.div_ceil(group))
        };
        // Rows of the left operand that come from another core's cache or from memory: all of them to every thread, unless
        // each has rows of its own, and to every group where a thread's cache does not hold them. And columns of the right
        // operand, which every chunk of rows packs anew: a fifth of the price, as measured.
        let cost = |row_chunks: usize| {
            let (_, groups) = cut(row_chunks);
            let visits = match strips.count.div_ceil(row_chunks) <= cached {
                true => groups.min(threads.div_ceil(row_chunks)),
                false => groups,
            };
            5 * visits * m + row_chunks * n
        };
        let row_chunks = (1..=wanted.min(strips.count.max(1)))
            .min_by_key(|&row_chunks| cost(row_chunks))
            .unwrap_or(1);
        // Few panels are not units enough.
        let (group, groups) = cut(row_chunks);
        let row_chunks = row_chunks.max((wanted / groups.max(1)).clamp(1, strips.count.max(1)));
        Self {
            strips,
            row_chunks,
            cached,
            panels,
            group,
            groups,
            chunks,
            depth: cuts.depth,
            run: cuts.run,
        }
    }

    /// Runs of the tiles `tiles`.
    pub(super) fn runs(&self, tiles: &Range<usize>) -> impl Iterator<Item = Range<usize>> + use<> {
        cut(tiles, self.run)
    }

    /// The words `words` of a chunk, in the pieces that a tile goes through at once.
    pub(super) fn each_depth(
        &self,
        words: &Range<usize>,
    ) -> impl Iterator<Item = Range<usize>> + use<> {
        cut(words, self.depth)
    }

    /// The number of these pieces.
    pub(super) fn depths(&self, words: &Range<usize>) -> usize {
        words.len().div_ceil(self.depth)
    }

    /// How often a unit goes through its panels.
    pub(super) fn passes(&self) -> usize {
        self.strips
            .count
            .div_ceil(self.row_chunks)
            .div_ceil(self.cached)
    }

    /// Scratch of a thread: packed panels of a group, or one that is used once, and sums between chunks, or of one tile.
    pub(super) fn scratch(&self, shape: &Shape) -> (usize, usize) {
        let panels = match self.passes() {
            1 => 1,
            _ => self.group,
        };
        let sums = match self.chunks {
            1 => self.run,
            _ => self.group * self.cached,
        };
        (panels * shape.panel(), sums * shape.rows * shape.width)
    }

    /// The words of a chunk.
    pub(super) fn words(&self, shape: &Shape, chunk: usize) -> Range<usize> {
        let start = |i: usize| (shape.words * i / self.chunks).next_multiple_of(CHUNK_STEP);
        let end = match chunk + 1 == self.chunks {
            true => shape.words,
            false => start(chunk + 1),
        };
        start(chunk).min(end)..end
    }
}

/// The scratch of a product, in elements.
pub(super) struct Room {
    /// Rows that are packed at a time.
    pub(super) block: usize,
    /// Of the packed left operand.
    pub(super) left: usize,
    /// Of a thread's packed panels.
    pub(super) panels: usize,
    /// Of all that a thread has.
    pub(super) per_thread: usize,
}

impl Room {
    /// `dims.m` must not be 0. `packed` is the left operand or not.
    pub(super) fn new(
        cuts: &Cuts,
        dims: Dims,
        shape: &Shape,
        threads: usize,
        packed: bool,
    ) -> Self {
        let m = dims.m;
        let block = (cuts.block / shape.words.max(1))
            .max(cuts.min_block)
            .next_multiple_of(shape.rows)
            .min(m);
        let block = if packed { block } else { m };
        // The last block may be smaller and be cut otherwise.
        let lens = [block, m - (m - 1) / block * block]
            .map(|rows| Plan::new(cuts, Dims { m: rows, ..dims }, shape, threads).scratch(shape));
        let panels = lens[0].0.max(lens[1].0).next_multiple_of(LINE);
        Self {
            block,
            left: match packed {
                true => block.next_multiple_of(shape.least_rows) * shape.words,
                false => 0,
            }
            .next_multiple_of(LINE),
            panels,
            per_thread: panels + lens[0].1.max(lens[1].1).next_multiple_of(LINE),
        }
    }
}

/// Part `i` of `count` parts of `all`, as even as can be.
pub(super) fn part(all: &Range<usize>, i: usize, count: usize) -> Range<usize> {
    all.start + all.len() * i / count..all.start + all.len() * (i + 1) / count
}

/// `all` in pieces of `len`; one, if it is empty.
fn cut(all: &Range<usize>, len: usize) -> impl Iterator<Item = Range<usize>> + use<> {
    let Range { start, end } = *all;
    let pieces = (end - start).div_ceil(len).max(1);
    (0..pieces).map(move |i| {
        let from = start + i * len.min(end - start);
        from..end.min(from.saturating_add(len))
    })
}
