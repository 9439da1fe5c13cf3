//! Matrix products of linear layers.
//!
//! A product is cut into tiles of a few rows by [`Simd::VECTORS`](crate::simd::Simd::VECTORS) vectors, whose sums stay
//! in registers. Both operands are read in the order of a tile's needs, without gaps: the right one in *panels*, one
//! column of tiles each, `[inner, width of a tile]`; the left one in rows of tiles, `[inner, height of a tile]`. Weights
//! come in panels already ([`pack_weight`], [`WeightPairs`]) or, of f32 in training, are packed by the thread that needs them, just
//! before: a step uses each weight once forward and once backward, so packing them all beforehand would only add a trip through memory.
//!
//! A tile reads its operands from the level-2 cache, and so the product is also cut where that would overflow: a thread
//! works on a *group* of panels, for some of the rows of tiles at a time, in *chunks* of the inner dimension. Between
//! chunks the sums wait in the thread's scratch. ([Goto and van de Geijn](https://doi.org/10.1145/1356052.1356053)
//! explain such cuts.)
//!
//! Each element adds its products in ascending order of the inner index, in one accumulator (of bf16, in the order of the
//! unit that multiplies them): its bits depend neither on the cuts nor on the number of threads.

mod bf16;
mod finish;
mod pack;
mod plan;
mod small;
mod tile;
#[cfg(target_arch = "x86_64")]
mod x86;

use core::ops::Range;

use crate::buf::View;
use crate::cpu::{LINE, Scratch};
use crate::element::{Bf16, Element};
use crate::error::Error;
use crate::isa::Isa;
use crate::threads::{Pieces, Shared, Threads};

pub use bf16::Bf16Unit;
#[cfg(test)]
pub(crate) use bf16::{narrowed, rounded};
pub(crate) use finish::{Finish, Mode, Out};
pub(crate) use pack::{PairsLen, WeightPairs, pack_weight, pairs_len};
pub(crate) use small::{Ready, SmallProduct};

use bf16::{PackRight, TilePairs, Turned, Unit};
use finish::{FetchTile, FinishTile, Flush};
use pack::{PackColumns, PackLeft, PackRows};
use plan::{Cuts, Plan, Room, part};
use tile::{Fetch, FetchLines, Shape, Strip, Strips, Tile, lines_of};

/// The number format of a product's operands; sums are f32.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Precision {
    /// f32.
    F32,
    /// bf16, rounded as they are packed where they are f32.
    Bf16(Bf16Unit),
}

impl Precision {
    /// # Errors
    /// If it is that of another instruction set.
    pub(crate) fn check(self, isa: Isa) -> Result<(), Error> {
        match self {
            Self::Bf16(unit) if !unit.fits(isa) => Err(Error::Unit { unit, isa }),
            _ => Ok(()),
        }
    }
}

/// `[m, inner] @ [inner, n]`
#[derive(Clone, Copy, Debug)]
pub(crate) struct Dims {
    pub(crate) m: usize,
    pub(crate) n: usize,
    pub(crate) inner: usize,
}

/// The operand on the left, `[m, inner]`.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Left<D> {
    /// As it is.
    Rows(D),
    /// Transposed: `[inner, m]`.
    Columns(D),
}

impl<D> Left<D> {
    fn map<T>(self, of: impl FnOnce(D) -> T) -> Left<T> {
        match self {
            Self::Rows(data) => Left::Rows(of(data)),
            Self::Columns(data) => Left::Columns(of(data)),
        }
    }
}

/// The operand on the right, `[inner, n]`.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Right<'a> {
    /// As it is.
    Rows(&'a [f32]),
    /// As it is, in bf16.
    NarrowRows(&'a [Bf16]),
    /// Transposed: `[n, inner]`, as a weight is.
    Columns(&'a [f32]),
    /// In panels: the work of [`pack_weight`].
    Panels(&'a [f32]),
    /// In panels of pairs: the work of [`WeightPairs`].
    Pairs(&'a [f32]),
}

/// Rows of the left operand that are packed at a time: runs of some cache lines where it comes transposed.
const PACKED_ROWS: usize = 64;
const PACKED_OTHERWISE: &str = "an operand is of the precision it is used with";

/// Elements of a row of the left operand that is read where it lies: rows of a tile then stay in the level-1 cache while they are
/// multiplied with all panels, and packing them would only be a trip through the cache more.
const IN_PLACE: usize = 512;

/// Whether the left operand is packed.
fn packs<D>(precision: Precision, dims: Dims, left: &Left<D>) -> bool {
    precision != Precision::F32 || matches!(left, Left::Columns(_)) || dims.inner > IN_PLACE
}

/// Elements of scratch that [`gemm`] takes, whatever is in `left`.
pub(crate) fn scratch_len(
    isa: Isa,
    precision: Precision,
    threads: usize,
    dims: Dims,
    left: Left<()>,
) -> usize {
    if dims.m == 0 || dims.n == 0 {
        return 0;
    }
    let shape = Shape::of(isa, precision, dims.inner);
    let packed = packs(precision, dims, &left);
    let cuts = Cuts::of_this_machine(precision);
    let room = Room::new(&cuts, dims, &shape, threads, packed);
    room.left + threads * room.per_thread
}

/// `left @ right`, each tile of which goes to `finish`.
///
/// # Errors
/// If there is no memory for the packed operands, the first time that a product this large is asked for, or if the
/// precision is that of another instruction set.
///
/// # Panics
/// If an operand is shorter than `dims` say, packed for another precision, or bf16 in a product of f32.
pub(crate) fn gemm(
    isa: Isa,
    precision: Precision,
    threads: &Threads,
    scratch: &mut Scratch,
    dims: Dims,
    left: Left<View<'_>>,
    right: Right<'_>,
    finish: &Finish<'_>,
) -> Result<(), Error> {
    precision.check(isa)?;
    let product = Product {
        isa,
        precision,
        shape: Shape::of(isa, precision, dims.inner),
        dims,
        left,
        right,
        finish,
    };
    product.run(&Cuts::of_this_machine(precision), threads, scratch)
}

/// A block of rows of the left operand.
#[derive(Clone, Copy)]
enum Rows<'a> {
    /// Row of tiles by row of tiles, as they are packed.
    Packed(&'a [f32]),
    /// `[rows, inner]`
    InPlace(&'a [f32]),
}

struct Product<'a> {
    isa: Isa,
    precision: Precision,
    shape: Shape,
    dims: Dims,
    left: Left<View<'a>>,
    right: Right<'a>,
    finish: &'a Finish<'a>,
}

impl Product<'_> {
    fn run(&self, cuts: &Cuts, threads: &Threads, scratch: &mut Scratch) -> Result<(), Error> {
        let Dims { m, n, inner } = self.dims;
        let shape = &self.shape;
        let (Left::Rows(l) | Left::Columns(l)) = self.left;
        let (len, right_len) = match self.right {
            Right::Rows(r) | Right::Columns(r) | Right::Panels(r) => (r.len(), inner * n),
            Right::NarrowRows(r) => (r.len(), inner * n),
            Right::Pairs(r) => (r.len(), n.div_ceil(shape.width) * shape.panel()),
        };
        assert!(
            l.len() >= m * inner && len >= right_len,
            "the operands of a product are as long as it says"
        );
        self.finish.check(m, n);
        if m == 0 || n == 0 && self.finish.row_sums.is_none() {
            return Ok(());
        }
        let plan = |rows| {
            Plan::new(
                cuts,
                Dims {
                    m: rows,
                    ..self.dims
                },
                shape,
                threads.count(),
            )
        };
        let packed = packs(self.precision, self.dims, &self.left);
        let Room {
            block,
            left: left_len,
            panels: panels_len,
            per_thread,
        } = Room::new(cuts, self.dims, shape, threads.count(), packed);
        let scratch = scratch.floats(left_len + threads.count() * per_thread)?;
        let (packed_left, scratch) = scratch.split_at_mut(left_len);
        for first in (0..m).step_by(block) {
            let plan = plan(block.min(m - first));
            let rows = match self.left {
                Left::Rows(View::F32(data)) if !packed => Rows::InPlace(&data[first * inner..]),
                _ => {
                    self.pack_left(threads, &plan, first, packed_left);
                    Rows::Packed(packed_left)
                }
            };
            let per_thread = Pieces::new(&mut *scratch, per_thread);
            threads.for_each_with(
                plan.groups * plan.row_chunks,
                usize::MAX,
                (),
                per_thread,
                |unit, (), scratch| {
                    let (panels, sums) = scratch.split_at_mut(panels_len);
                    self.unit(&plan, unit, first, rows, panels, sums);
                },
            );
        }
        Ok(())
    }

    /// The rows of a block from row `first`.
    fn pack_left(&self, threads: &Threads, plan: &Plan, first: usize, to: &mut [f32]) {
        let Dims { m, inner, .. } = self.dims;
        let (strips, words, left) = (plan.strips, self.shape.words, self.left);
        let place = Shared::new(to);
        let each = (PACKED_ROWS / self.shape.rows).max(1);
        let cost = each * self.shape.rows * words;
        let pieces = strips.count.div_ceil(each);
        threads.for_each(pieces, cost, (), |i, ()| {
            let tiles = i * each..strips.count.min((i + 1) * each);
            let start = strips.start(tiles.start);
            let end = strips
                .start(tiles.end)
                .next_multiple_of(self.shape.least_rows);
            // SAFETY: tiles do not overlap, and each belongs to one piece.
            let to = unsafe { place.part(start * words, (end - start) * words) };
            // SAFETY: the rows of these tiles, of one piece too.
            let sums = self.finish.row_sums.map(|sums| unsafe {
                let end = strips.start(tiles.end);
                sums.part(first + start, end - start)
            });
            let data = match left {
                Left::Rows(data) | Left::Columns(data) => data,
            };
            match (self.precision, data) {
                (Precision::F32, View::F32(data)) => self.isa.run(PackLeft {
                    to,
                    sums,
                    left: left.map(|_| data),
                    m,
                    first,
                    strips,
                    tiles,
                    inner,
                }),
                (Precision::Bf16(unit), View::F32(data)) => {
                    let left = left.map(|_| data);
                    self.pack_pairs(unit, to, sums, left, first, strips, tiles);
                }
                (Precision::Bf16(unit), View::Bf16(data)) => {
                    let left = left.map(|_| data);
                    self.pack_pairs(unit, to, sums, left, first, strips, tiles);
                }
                (Precision::F32, View::Bf16(_)) => panic!("{PACKED_OTHERWISE}"),
            }
        });
    }

    /// Tiles of the left operand, in pairs.
    fn pack_pairs<T: Element>(
        &self,
        unit: Bf16Unit,
        to: &mut [f32],
        sums: Option<&mut [f32]>,
        left: Left<&[T]>,
        first: usize,
        strips: Strips,
        tiles: Range<usize>,
    ) {
        let Dims { m, inner, .. } = self.dims;
        self.isa.run(bf16::PackLeft {
            to,
            sums,
            words: self.shape.words,
            squares: unit.wants_squares(),
            left,
            stride: match left {
                Left::Rows(_) => inner,
                Left::Columns(_) => m,
            },
            first,
            strips,
            tiles,
            inner,
        });
    }

    /// A unit of work of the block from row `first`.
    fn unit(
        &self,
        plan: &Plan,
        unit: usize,
        first: usize,
        rows: Rows<'_>,
        panels: &mut [f32],
        sums: &mut [f32],
    ) {
        let Dims { n, .. } = self.dims;
        let shape = &self.shape;
        let (row_chunk, group) = (unit / plan.groups, unit % plan.groups);
        let group = group * plan.group..plan.panels.min((group + 1) * plan.group);
        // The first panel of what this thread will probably take next.
        let next = match group.end == plan.panels {
            true => 0,
            false => group.end,
        };
        let all = part(&(0..plan.strips.count), row_chunk, plan.row_chunks);
        let passes = plan.passes();
        let place = |i: usize, words: &Range<usize>| {
            let panel = if passes == 1 { 0 } else { i * shape.panel() };
            panel + words.start * shape.width..panel + words.end * shape.width
        };
        let ready = Tiles::new(self.isa, self.precision);
        for pass in 0..passes {
            let tiles = part(&all, pass, passes);
            let top = plan.strips.start(tiles.start);
            for chunk in 0..plan.chunks {
                let words = plan.words(shape, chunk);
                let last = chunk + 1 == plan.chunks;
                for (i, panel) in group.clone().enumerate() {
                    let columns = panel * shape.width..n.min((panel + 1) * shape.width);
                    if pass == 0 && self.panel(&columns, &words).is_none() {
                        self.pack_panel(&columns, &words, &mut panels[place(i, &words)]);
                    }
                    // What comes next is fetched evenly over the tiles.
                    let (next_pass, next_chunk, next_i) = match (i + 1 < group.len(), last) {
                        (true, _) => (pass, chunk, i + 1),
                        (false, false) => (pass, chunk + 1, 0),
                        (false, true) => (pass + 1, 0, 0),
                    };
                    let next_words = plan.words(shape, next_chunk);
                    let (mut fetch, lines) = if next_pass == passes {
                        self.lines(next, next_words)
                    } else if next_pass > 0 && self.panel(&columns, &next_words).is_none() {
                        let panel = &panels[place(next_i, &next_words)];
                        (
                            Fetch::new(panel, panel.len(), 0),
                            panel.len().div_ceil(LINE),
                        )
                    } else {
                        self.lines(group.start + next_i, next_words)
                    };
                    let lines = lines.div_ceil((tiles.len() * plan.depths(&words)).max(1));
                    let right = match self.panel(&columns, &words) {
                        Some(panel) => panel,
                        None => &panels[place(i, &words)],
                    };
                    for run in plan.runs(&tiles) {
                        // Sums that wait: between the depths of a run, between chunks those of all its tiles.
                        let waiting = |row: usize| match plan.chunks {
                            1 => (row - plan.strips.start(run.start)) * shape.width,
                            _ => (i * plan.cached * shape.rows + row - top) * shape.width,
                        };
                        for depth in plan.each_depth(&words) {
                            let finished = depth.end == shape.words;
                            for tile in run.clone() {
                                let (row, end) =
                                    (plan.strips.start(tile), plan.strips.start(tile + 1));
                                let sums = &mut sums[waiting(row)..];
                                let height = (end - row).next_multiple_of(shape.least_rows);
                                if finished {
                                    self.isa.run(FetchTile {
                                        finish: self.finish,
                                        row: first + row,
                                        rows: end - row,
                                        col: columns.start,
                                        width: columns.len(),
                                    });
                                }
                                ready.sum(
                                    shape,
                                    self.strip(rows, row, height),
                                    &right[(depth.start - words.start) * shape.width..],
                                    &depth,
                                    height,
                                    columns.len(),
                                    &mut fetch,
                                    lines,
                                    sums,
                                );
                                if finished {
                                    self.isa.run(FinishTile {
                                        finish: self.finish,
                                        row: first + row,
                                        rows: end - row,
                                        col: columns.start,
                                        width: columns.len(),
                                        step: shape.width,
                                        sums,
                                    });
                                }
                            }
                        }
                    }
                }
            }
        }
        if self.finish.streamed {
            self.isa.run(Flush);
        }
    }

    /// Rows of the left operand for a tile, `count` from `first`.
    fn strip<'a>(&self, rows: Rows<'a>, first: usize, count: usize) -> Strip<'a> {
        match rows {
            Rows::Packed(data) => Strip {
                data: &data[first * self.shape.words..][..count * self.shape.words],
                row: 1,
                word: count,
            },
            Rows::InPlace(data) => Strip {
                data: &data[first * self.dims.inner..][..count * self.dims.inner],
                row: self.dims.inner,
                word: 1,
            },
        }
    }

    /// The cache lines of the words `words` of a panel, as the right operand is given, and their number.
    fn lines(&self, panel: usize, words: Range<usize>) -> (Fetch, usize) {
        let Dims { n, inner, .. } = self.dims;
        let width = self.shape.width;
        let columns = (panel * width).min(n)..((panel + 1) * width).min(n);
        let per_word = match self.precision {
            Precision::F32 => 1,
            Precision::Bf16(_) => 2,
        };
        let rows = (words.start * per_word).min(inner)..(words.end * per_word).min(inner);
        if columns.is_empty() || rows.is_empty() {
            return (Fetch::NONE, 0);
        }
        let (data, start, len, count, stride) = match self.right {
            Right::Rows(data) => {
                let start = rows.start * n + columns.start;
                (data, start, columns.len(), rows.len(), n)
            }
            Right::NarrowRows(data) => {
                let data = &data[rows.start * n + columns.start..];
                let lines = rows.len() * lines_of::<Bf16>(columns.len());
                return (Fetch::new(data, columns.len(), n), lines);
            }
            Right::Columns(data) => {
                let start = columns.start * inner + rows.start;
                (data, start, rows.len(), columns.len(), inner)
            }
            Right::Panels(data) | Right::Pairs(data) => {
                let start = panel * self.shape.panel() + words.start * width;
                (data, start, words.len() * width, 1, 0)
            }
        };
        (
            Fetch::new(&data[start.min(data.len())..], len, stride),
            count * len.div_ceil(LINE),
        )
    }

    /// The words `words` of the panel of some columns, if it lies ready in the right operand.
    fn panel(&self, columns: &Range<usize>, words: &Range<usize>) -> Option<&[f32]> {
        let width = self.shape.width;
        let start = columns.start * self.shape.words + words.start * width;
        match self.right {
            // The last panel of weights in place is as narrow as its columns; a tile wants zeros behind them.
            Right::Panels(data) if columns.len() == width => {
                Some(&data[start..][..words.len() * width])
            }
            Right::Pairs(data) => Some(&data[start..][..words.len() * width]),
            _ => None,
        }
    }

    /// Packs the words `words` of the panel of some columns.
    fn pack_panel(&self, columns: &Range<usize>, words: &Range<usize>, to: &mut [f32]) {
        let Dims { n, inner, .. } = self.dims;
        let (isa, step, col, width) = (self.isa, self.shape.width, columns.start, columns.len());
        match self.precision {
            Precision::F32 => {
                let (data, stride) = match self.right {
                    Right::Rows(data) => (&data[(words.start * n + col).min(data.len())..], n),
                    Right::Panels(data) => (&data[col * inner + words.start * width..], width),
                    Right::Columns(data) => {
                        return isa.run(PackColumns {
                            to,
                            step,
                            data: &data[col * inner + words.start..],
                            stride: inner,
                            width,
                            inner: words.len(),
                        });
                    }
                    Right::NarrowRows(_) | Right::Pairs(_) => panic!("{PACKED_OTHERWISE}"),
                };
                isa.run(PackRows {
                    to,
                    step,
                    data,
                    stride,
                    width,
                    inner: words.len(),
                });
            }
            Precision::Bf16(_) => {
                let start = (2 * words.start).min(inner);
                let (words, inner_left) = (words.len(), (inner - start).min(2 * words.len()));
                let (data, stride) = match self.right {
                    Right::Rows(data) => {
                        (Turned::Rows(&data[(start * n + col).min(data.len())..]), n)
                    }
                    Right::NarrowRows(data) => {
                        return isa.run(PackRight {
                            to,
                            step,
                            words,
                            data: Turned::Rows(&data[(start * n + col).min(data.len())..]),
                            stride: n,
                            width,
                            inner: inner_left,
                            streamed: false,
                        });
                    }
                    Right::Columns(data) => {
                        let start = (col * inner + start).min(data.len());
                        (Turned::Columns(&data[start..]), inner)
                    }
                    Right::Panels(_) | Right::Pairs(_) => {
                        panic!("{PACKED_OTHERWISE}")
                    }
                };
                isa.run(PackRight {
                    to,
                    step,
                    words,
                    data,
                    stride,
                    width,
                    inner: inner_left,
                    streamed: false,
                });
            }
        }
    }
}

/// What sums tiles, ready on this thread.
enum Tiles {
    F32(Isa),
    Pairs(Isa),
    #[cfg(target_arch = "x86_64")]
    Dot(Isa, x86::Avx512Bf16),
    #[cfg(target_arch = "x86_64")]
    Amx(Isa, x86::AmxTiles),
}

impl Tiles {
    fn new(isa: Isa, precision: Precision) -> Self {
        match precision {
            Precision::F32 => Self::F32(isa),
            Precision::Bf16(unit) => match unit.0 {
                Unit::Emulated => Self::Pairs(isa),
                #[cfg(target_arch = "x86_64")]
                Unit::Avx512Bf16(dot) => Self::Dot(isa, dot),
                #[cfg(target_arch = "x86_64")]
                Unit::Amx(amx) => Self::Amx(isa, amx.configure()),
            },
        }
    }

    /// Adds the words `words` of `left @ right` to the first `width` columns of `sums`, or stores them there if they are
    /// the first. `left` has all words of its `rows` rows, packed unless all is f32; `right` has those words.
    fn sum(
        &self,
        shape: &Shape,
        left: Strip<'_>,
        right: &[f32],
        words: &Range<usize>,
        rows: usize,
        width: usize,
        fetch: &mut Fetch,
        lines: usize,
        sums: &mut [f32],
    ) {
        let vectors = width.div_ceil(shape.lanes);
        let (count, add) = (words.len(), words.start > 0);
        let tile = &left.data[(words.start * left.word).min(left.data.len())..];
        match self {
            Self::F32(isa) => isa.run(Tile {
                inner: count,
                left: Strip { data: tile, ..left },
                right,
                rows,
                vectors,
                add,
                fetch,
                lines,
                sums,
            }),
            Self::Pairs(isa) => {
                isa.run(FetchLines { fetch, lines });
                isa.run(TilePairs {
                    words: count,
                    left: tile,
                    right,
                    rows,
                    vectors,
                    add,
                    sums,
                });
            }
            #[cfg(target_arch = "x86_64")]
            Self::Dot(isa, dot) => {
                isa.run(FetchLines { fetch, lines });
                dot.tile(count, tile, right, rows, add, sums);
            }
            #[cfg(target_arch = "x86_64")]
            Self::Amx(isa, amx) => {
                // Within the tile: many lines at once would hold up its loads.
                let (next, run) = fetch.run(lines);
                isa.run(FetchLines {
                    fetch,
                    lines: lines - run,
                });
                let left = &left.data[words.start * x86::TILE..];
                let step = shape.words * x86::TILE;
                amx.tile(count, left, step, right, rows, add, next, run, sums);
            }
        }
    }
}

#[cfg(test)]
mod tests;
