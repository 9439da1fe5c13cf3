//! Matrix products of linear layers.
//!
//! A product is cut into tiles of a few rows by [`Simd::VECTORS`](crate::simd::Simd::VECTORS) vectors, whose sums stay
//! in registers over the whole inner dimension. Both operands are read in the order of a tile's needs, without gaps: the
//! right one in *panels*, one column of tiles each, `[inner, width of a tile]`, which stay in a thread's level-2 cache; the
//! left one in rows of tiles, `[inner, height of a tile]` (read where it lies, in as many streams as rows, it costs 10 %
//! more than packing it). Weights come in panels already ([`pack_weight`]) or are packed by the thread that needs them,
//! just before: a training step uses each weight once forward and once backward, so packing them all beforehand would only
//! add a trip through memory.
//!
//! Each element adds its products in ascending order of the inner index, in one accumulator: its bits depend neither
//! on the cuts nor on the number of threads.

mod bf16;
mod finish;
mod pack;
mod tile;
#[cfg(target_arch = "x86_64")]
mod x86;

use core::ops::Range;

use crate::cpu::{LINE, Scratch};
use crate::error::Error;
use crate::isa::Isa;
use crate::threads::{Pieces, Threads};

pub use bf16::Bf16Unit;
pub(crate) use finish::{Finish, Mode};
pub(crate) use pack::{pack_weight, pack_weight_bf16, packed_len_bf16};

use bf16::{PackRight, TilePairs, Unit};
use finish::FinishTile;
use pack::{PackColumns, PackLeft, PackRows};
use tile::{Fetch, FetchLines, Shape, Tile};

/// The number format of a product's operands; sums are f32.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Precision {
    /// f32.
    F32,
    /// bf16, rounded as they are packed.
    Bf16(Bf16Unit),
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
pub(crate) enum Left<'a> {
    /// As it is.
    Rows(&'a [f32]),
    /// Transposed: `[inner, m]`.
    Columns(&'a [f32]),
}

/// The operand on the right, `[inner, n]`.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Right<'a> {
    /// As it is.
    Rows(&'a [f32]),
    /// Transposed: `[n, inner]`, as a weight is.
    Columns(&'a [f32]),
    /// In panels: the work of [`pack_weight`].
    Panels(&'a [f32]),
    /// In panels of pairs: the work of [`pack_weight_bf16`].
    Pairs(&'a [f32]),
}

/// Panels that a thread uses together take at most so many elements: 256 KiB of its level-2 cache, which also holds the
/// next ones, that are being fetched, and the left operand of a small batch.
const GROUP: usize = 64 * 1024;
/// Panels in a group at most; a group's share of the cache is reached before, but for tiny inner dimensions.
const MAX_GROUP: usize = 64;
/// The left operand is packed in pieces of so many rows, a multiple of all tiles' heights ...
const LEFT_ROWS: usize = 64;
/// ... and used in blocks of so many elements (8 MiB), but of `MIN_BLOCK` rows at least: each block packs the right
/// operand anew, where it comes unpacked.
const BLOCK: usize = 2 << 20;
const MIN_BLOCK: usize = 512;
/// Multiply-adds that are worth handing to another thread: some 10 µs.
const GRAIN: usize = 1 << 19;

/// How a block of rows is cut into units of work: chunks of rows times groups of panels.
#[derive(Clone, Copy, Debug)]
struct Cuts {
    rows: usize,
    row_chunks: usize,
    panels: usize,
    group: usize,
    groups: usize,
}

impl Cuts {
    fn new(dims: Dims, shape: &Shape, threads: usize) -> Self {
        let Dims { m, n, inner } = dims;
        let panels = n.div_ceil(shape.width);
        let fits = (GROUP / shape.panel().max(1)).clamp(1, panels.min(MAX_GROUP));
        if threads == 1 {
            let groups = panels.div_ceil(fits);
            let group = panels.div_ceil(groups);
            return Self {
                rows: m,
                row_chunks: 1,
                panels,
                group,
                groups: panels.div_ceil(group),
            };
        }
        // Four units per thread even out what disturbs one of them.
        let worth = m.saturating_mul(n).saturating_mul(inner) / GRAIN;
        let wanted = worth.clamp(1, 4 * threads);
        let group = fits.min(panels.div_ceil(wanted));
        let groups = panels.div_ceil(group);
        // Rows are cut only where panels do not suffice: every chunk of rows packs its panels anew.
        let row_chunks = (wanted / groups).clamp(1, m.div_ceil(LEFT_ROWS));
        let rows = m.div_ceil(row_chunks).next_multiple_of(LEFT_ROWS).min(m);
        Self {
            rows,
            row_chunks: m.div_ceil(rows),
            panels,
            group,
            groups,
        }
    }
}

/// `left @ right`, each tile of which goes to `finish`.
///
/// # Errors
/// If there is no memory for the packed operands, the first time that a product this large is asked for.
///
/// # Panics
/// If an operand is shorter than `dims` say, or packed for another precision.
pub(crate) fn gemm(
    isa: Isa,
    precision: Precision,
    threads: &Threads,
    scratch: &mut Scratch,
    dims: Dims,
    left: Left<'_>,
    right: Right<'_>,
    finish: &Finish<'_>,
) -> Result<(), Error> {
    let Dims { m, n, inner } = dims;
    let shape = Shape::of(isa, precision, inner);
    let (Left::Rows(l) | Left::Columns(l)) = left;
    let (len, right_len) = match right {
        Right::Rows(r) | Right::Columns(r) | Right::Panels(r) => (r.len(), inner * n),
        Right::Pairs(r) => (r.len(), n.div_ceil(shape.width) * shape.panel()),
    };
    assert!(
        l.len() >= m * inner && len >= right_len,
        "the operands of a product are as long as it says"
    );
    finish.check(m, n);
    if m == 0 || n == 0 {
        return Ok(());
    }
    let block = (BLOCK / shape.words.max(1))
        .max(MIN_BLOCK)
        .next_multiple_of(LEFT_ROWS)
        .min(m);
    let cut = |rows| Cuts::new(Dims { m: rows, ..dims }, &shape, threads.count());
    let most = cut(block).group * shape.panel();
    let left_len = (block.next_multiple_of(shape.least_rows) * shape.words).next_multiple_of(LINE);
    let scratch = scratch.floats(left_len + threads.count() * most)?;
    let (packed_left, packed_right) = scratch.split_at_mut(left_len);
    for start in (0..m).step_by(block) {
        let rows = block.min(m - start);
        let cuts = cut(rows);
        let len = rows.next_multiple_of(shape.least_rows) * shape.words;
        let piece = LEFT_ROWS * shape.words;
        let pieces = Pieces::new(&mut packed_left[..len], piece);
        threads.for_each(rows.div_ceil(LEFT_ROWS), piece, pieces, |i, to| {
            let rows = i * LEFT_ROWS..rows.min((i + 1) * LEFT_ROWS);
            pack_left(
                isa,
                precision,
                &shape,
                dims,
                left,
                start + rows.start,
                rows.len(),
                to,
            );
        });
        let packed_left = &*packed_left;
        let packed_right = Pieces::new(&mut *packed_right, most);
        let units = cuts.groups * cuts.row_chunks;
        threads.for_each_with(
            units,
            usize::MAX,
            (),
            packed_right,
            |unit, (), packed_right| {
                let first = unit / cuts.row_chunks * cuts.group;
                let count = cuts.group.min(cuts.panels - first);
                let mut panels = [&[][..]; MAX_GROUP];
                let mut places = packed_right.chunks_mut(shape.panel().max(1));
                for (i, panel) in panels.iter_mut().take(count).enumerate() {
                    let col = (first + i) * shape.width;
                    let columns = col..n.min(col + shape.width);
                    let place = places.next().unwrap_or_default();
                    *panel = pack_right(isa, precision, &shape, dims, right, columns, place);
                }
                let tiles = Tiles::new(isa, precision);
                let chunk = unit % cuts.row_chunks * cuts.rows;
                let mut sums = [0.0; tile::MAX_ELEMENTS];
                // The group that this thread will probably take next, fetched evenly over the tiles of this one.
                let next = (first + cuts.group * threads.count()).min(cuts.panels);
                let next_end = (next + cuts.group).min(cuts.panels);
                let (mut fetch, total) = next_group(&shape, dims, right, next..next_end);
                let tiles_here = cuts.rows.div_ceil(shape.rows) * count;
                let lines = if cuts.row_chunks == 1 {
                    total.div_ceil(tiles_here)
                } else {
                    0
                };
                for row in (chunk..rows.min(chunk + cuts.rows)).step_by(shape.rows) {
                    let height = shape.rows.min(rows - row);
                    let packed = height.next_multiple_of(shape.least_rows);
                    let left = &packed_left[row * shape.words..][..packed * shape.words];
                    for (i, right) in panels[..count].iter().enumerate() {
                        let col = (first + i) * shape.width;
                        let width = shape.width.min(n - col);
                        tiles.sum(
                            isa, &shape, left, right, packed, width, &mut fetch, lines, &mut sums,
                        );
                        isa.run(FinishTile {
                            finish,
                            row: start + row,
                            rows: height,
                            col,
                            width,
                            step: shape.width,
                            sums: &sums,
                        });
                    }
                }
            },
        );
    }
    Ok(())
}

/// The cache lines of the panels `panels` of the right operand, as it is given, and their number.
fn next_group(shape: &Shape, dims: Dims, right: Right<'_>, panels: Range<usize>) -> (Fetch, usize) {
    let Dims { n, inner, .. } = dims;
    let columns = (panels.start * shape.width).min(n)..(panels.end * shape.width).min(n);
    let (data, start, len, rows, stride) = match right {
        Right::Rows(data) => (data, columns.start, columns.len(), inner, n),
        Right::Panels(data) | Right::Columns(data) => {
            (data, columns.start * inner, columns.len() * inner, 1, 0)
        }
        Right::Pairs(data) => (
            data,
            panels.start * shape.panel(),
            panels.len() * shape.panel(),
            1,
            0,
        ),
    };
    if columns.is_empty() {
        return (Fetch::new(&[], 0, 0), 0);
    }
    (
        Fetch::new(&data[start.min(data.len())..], len, stride),
        rows * len.div_ceil(LINE),
    )
}

/// What sums tiles, ready on this thread.
enum Tiles {
    F32(Isa),
    Pairs(Isa),
    #[cfg(target_arch = "x86_64")]
    Dot(x86::Avx512Bf16),
    #[cfg(target_arch = "x86_64")]
    Amx(x86::AmxTiles),
}

impl Tiles {
    fn new(isa: Isa, precision: Precision) -> Self {
        match precision {
            Precision::F32 => Self::F32(isa),
            Precision::Bf16(unit) => match unit.0 {
                Unit::Emulated => Self::Pairs(isa),
                #[cfg(target_arch = "x86_64")]
                Unit::Avx512Bf16(dot) => Self::Dot(dot),
                #[cfg(target_arch = "x86_64")]
                Unit::Amx(amx) => Self::Amx(amx.configure()),
            },
        }
    }

    /// `sums = left @ right`, the first `width` columns.
    fn sum(
        &self,
        isa: Isa,
        shape: &Shape,
        left: &[f32],
        right: &[f32],
        rows: usize,
        width: usize,
        fetch: &mut Fetch,
        lines: usize,
        sums: &mut [f32; tile::MAX_ELEMENTS],
    ) {
        let (words, vectors) = (shape.words, width.div_ceil(shape.lanes));
        if let Self::F32(isa) = self {
            let inner = words;
            return isa.run(Tile {
                inner,
                left,
                right,
                rows,
                vectors,
                fetch,
                lines,
                sums,
            });
        }
        isa.run(FetchLines { fetch, lines });
        match self {
            Self::F32(_) => {}
            Self::Pairs(isa) => isa.run(TilePairs {
                words,
                left,
                right,
                rows,
                vectors,
                sums,
            }),
            #[cfg(target_arch = "x86_64")]
            Self::Dot(dot) => dot.tile(words, left, right, rows, sums),
            #[cfg(target_arch = "x86_64")]
            Self::Amx(tiles) => tiles.tile(words, left, right, rows, sums),
        }
    }
}

/// Rows `first..first + rows` of the left operand.
fn pack_left(
    isa: Isa,
    precision: Precision,
    shape: &Shape,
    dims: Dims,
    left: Left<'_>,
    first: usize,
    rows: usize,
    to: &mut [f32],
) {
    let Dims { m, inner, .. } = dims;
    match precision {
        Precision::F32 => isa.run(PackLeft {
            to,
            left,
            m,
            first,
            rows,
            inner,
        }),
        Precision::Bf16(_) => {
            // AMX takes squares.
            let tile = (shape.least_rows == 1).then_some(shape.rows);
            let words = shape.words;
            isa.run(bf16::PackLeft {
                to,
                words,
                tile,
                left,
                m,
                first,
                rows,
                inner,
            });
        }
    }
}

/// One panel of the right operand: its part that is one already, or a copy in `to`.
fn pack_right<'a>(
    isa: Isa,
    precision: Precision,
    shape: &Shape,
    dims: Dims,
    right: Right<'a>,
    columns: Range<usize>,
    to: &'a mut [f32],
) -> &'a [f32] {
    let Dims { n, inner, .. } = dims;
    let (col, width, step, words) = (columns.start, columns.len(), shape.width, shape.words);
    match (right, precision) {
        (Right::Panels(data), Precision::F32) => {
            let data = &data[col * inner..][..inner * width];
            if width == step {
                return data;
            }
            // The last panel is as narrow as its columns; a tile wants zeros behind them.
            isa.run(PackRows {
                to,
                step,
                data,
                stride: width,
                width,
                inner,
            });
        }
        (Right::Pairs(data), Precision::Bf16(_)) => return &data[col * words..][..shape.panel()],
        (Right::Rows(data), _) => {
            let data = &data[col.min(data.len())..];
            match precision {
                Precision::F32 => isa.run(PackRows {
                    to,
                    step,
                    data,
                    stride: n,
                    width,
                    inner,
                }),
                Precision::Bf16(_) => isa.run(PackRight {
                    to,
                    step,
                    words,
                    data,
                    stride: n,
                    width,
                    inner,
                }),
            }
        }
        (Right::Columns(data), _) => {
            let data = &data[col * inner..][..inner * width];
            match precision {
                Precision::F32 => isa.run(PackColumns {
                    to,
                    step,
                    data,
                    width,
                    inner,
                }),
                Precision::Bf16(_) => isa.run(PackRight {
                    to,
                    step,
                    words,
                    data,
                    stride: 0,
                    width,
                    inner,
                }),
            }
        }
        (Right::Panels(_), Precision::Bf16(_)) | (Right::Pairs(_), Precision::F32) => {
            panic!("an operand is packed for the precision it is used with")
        }
    }
    to
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::threads::Shared;
    use proptest::prelude::*;

    fn values(len: usize, seed: u64) -> Vec<f32> {
        (0..len as u64)
            .map(|i| ((i * 7 + seed) * 2_654_435_761 % 1009) as f32 / 504.5 - 1.0)
            .collect()
    }

    fn transposed(x: &[f32], rows: usize, cols: usize) -> Vec<f32> {
        (0..rows * cols)
            .map(|i| x[i % rows * cols + i / rows])
            .collect()
    }

    fn exact(dims: Dims, left: &[f32], right: &[f32]) -> Vec<f64> {
        let Dims { m, n, inner } = dims;
        let at = |i: usize, j: usize| {
            let terms =
                (0..inner).map(|l| f64::from(left[i * inner + l]) * f64::from(right[l * n + j]));
            terms.sum()
        };
        (0..m * n).map(|i| at(i / n, i % n)).collect()
    }

    /// All ways to give the operands, on pools of 1, 2 and 3 threads: one result, bit by bit, close to `want`.
    fn check(isa: Isa, pools: &[Threads], dims: Dims) {
        let Dims { m, n, inner } = dims;
        let (left, right, bias, start) = (
            values(m * inner, 1),
            values(inner * n, 2),
            values(n, 3),
            values(m * n, 4),
        );
        let (left_t, right_t) = (transposed(&left, m, inner), transposed(&right, inner, n));
        let mut panels = right_t.clone();
        pack_weight(isa, &mut panels, &mut vec![0.0; n * inner], n, inner);
        let mut first: Option<Vec<f32>> = None;
        let product = exact(dims, &left, &right);
        for pool in pools {
            let mut scratch = Scratch::default();
            for left in [Left::Rows(&left), Left::Columns(&left_t)] {
                for right in [
                    Right::Rows(&right),
                    Right::Columns(&right_t),
                    Right::Panels(&panels),
                ] {
                    let mut out = start.clone();
                    let finish = Finish::new(&mut out, n, &bias, Mode::Add);
                    gemm(
                        isa,
                        Precision::F32,
                        pool,
                        &mut scratch,
                        dims,
                        left,
                        right,
                        &finish,
                    )
                    .unwrap();
                    for (i, (got, want)) in out.iter().zip(&product).enumerate() {
                        let want = want + f64::from(bias[i % n]) + f64::from(start[i]);
                        // Sums of inner products of numbers below 1, each rounded once or twice.
                        let bound = (inner + 3) as f64 * f64::from(f32::EPSILON) * 2.0;
                        assert!(
                            (f64::from(*got) - want).abs() <= bound,
                            "{isa} {dims:?} {i}: {got} {want}"
                        );
                    }
                    match &first {
                        None => first = Some(out),
                        Some(first) => assert!(
                            first
                                .iter()
                                .zip(&out)
                                .all(|(a, b)| a.to_bits() == b.to_bits()),
                            "{isa} {dims:?} {left:?} {right:?}"
                        ),
                    }
                }
            }
        }
    }

    /// [`check`] for bf16: close to the exact product of the rounded operands.
    fn check_bf16(isa: Isa, unit: Bf16Unit, pools: &[Threads], dims: Dims) {
        let Dims { m, n, inner } = dims;
        let (left, right) = (values(m * inner, 1), values(inner * n, 2));
        let (left_t, right_t) = (transposed(&left, m, inner), transposed(&right, inner, n));
        let mut packed = vec![f32::NAN; packed_len_bf16(isa, unit, n, inner)];
        pack_weight_bf16(isa, unit, &mut packed, &right_t, n, inner);
        let round = |x: &[f32]| x.iter().map(|&x| bf16::rounded(x)).collect::<Vec<_>>();
        let product = exact(dims, &round(&left), &round(&right));
        let mut first: Option<Vec<f32>> = None;
        for pool in pools {
            let mut scratch = Scratch::default();
            for left in [Left::Rows(&left), Left::Columns(&left_t)] {
                for right in [
                    Right::Rows(&right),
                    Right::Columns(&right_t),
                    Right::Pairs(&packed),
                ] {
                    let mut out = vec![f32::NAN; m * n];
                    let finish = Finish::new(&mut out, n, &[], Mode::Store);
                    let precision = Precision::Bf16(unit);
                    gemm(
                        isa,
                        precision,
                        pool,
                        &mut scratch,
                        dims,
                        left,
                        right,
                        &finish,
                    )
                    .unwrap();
                    for (i, (got, want)) in out.iter().zip(&product).enumerate() {
                        // Exact products of numbers below 1, whose sum is rounded at each.
                        let bound = (inner + 3) as f64 * f64::from(f32::EPSILON) * 2.0;
                        assert!(
                            (f64::from(*got) - want).abs() <= bound,
                            "{isa} {unit} {dims:?} {i}: {got} {want}"
                        );
                    }
                    match &first {
                        None => first = Some(out),
                        Some(first) => assert!(
                            first
                                .iter()
                                .zip(&out)
                                .all(|(a, b)| a.to_bits() == b.to_bits()),
                            "{isa} {unit} {dims:?} {left:?} {right:?}"
                        ),
                    }
                }
            }
        }
    }

    #[test]
    fn bf16_products_match_the_exact_ones_of_rounded_operands() {
        let pools = pools();
        for isa in Isa::available() {
            for unit in Bf16Unit::available(isa) {
                println!("{isa}: {unit}");
                let shapes = [
                    (1, 1, 1),
                    (17, 33, 31),
                    (40, 100, 64),
                    (131, 517, 300),
                    (700, 70, 113),
                    (3, 5, 0),
                ];
                for (m, n, inner) in shapes {
                    check_bf16(isa, unit, &pools, Dims { m, n, inner });
                }
            }
        }
    }

    #[test]
    fn rounding_to_bf16_is_to_nearest_even() {
        let cases = [
            (1.0, 1.0),
            (1.0 + 1.0 / 256.0, 1.0),
            (1.0 + 3.0 / 256.0, 1.0 + 4.0 / 256.0),
            (1.0 + 1.1 / 256.0, 1.0 + 2.0 / 256.0),
            (-3.0e38, -3.004e38),
            (f32::MAX, f32::INFINITY),
            (f32::NEG_INFINITY, f32::NEG_INFINITY),
            (0.0, 0.0),
        ];
        for (x, want) in cases {
            let got = bf16::rounded(x);
            assert!(
                got == want || (got / want - 1.0).abs() < 1e-3,
                "{x}: {got} {want}"
            );
        }
        assert!(bf16::rounded(f32::NAN).is_nan());
        assert!(bf16::rounded(f32::from_bits(0x7f80_0001)).is_nan());
    }

    fn pools() -> Vec<Threads> {
        let counts: &[usize] = if cfg!(feature = "threads") {
            &[1, 2, 3]
        } else {
            &[1]
        };
        counts.iter().map(|&n| Threads::new(n).unwrap()).collect()
    }

    proptest! {
        #[test]
        fn products_match_f64(m in 0usize..40, n in 0usize..110, inner in 0usize..40) {
            for isa in Isa::available() {
                check(isa, &pools()[..1], Dims { m, n, inner });
            }
        }
    }

    #[test]
    fn bits_do_not_depend_on_operands_order_or_threads() {
        let pools = pools();
        for isa in Isa::available() {
            for (m, n, inner) in [
                (131, 517, 300),
                (1, 1200, 700),
                (700, 70, 113),
                (257, 33, 1),
                (150, 700, 17),
            ] {
                check(isa, &pools, Dims { m, n, inner });
            }
        }
    }

    #[test]
    fn modes_match_their_formulas() {
        let dims = Dims {
            m: 21,
            n: 75,
            inner: 30,
        };
        let Dims { m, n, inner } = dims;
        let (left, right, bias) = (values(m * inner, 1), values(inner * n, 2), values(n, 3));
        let (other, scale) = (values(m * n, 4), values(3, 5));
        let y: Vec<f64> = exact(dims, &left, &right)
            .iter()
            .enumerate()
            .map(|(i, y)| y + f64::from(bias[i % n]))
            .collect();
        let gelu = |y: f64| y * 0.5 * libm::erfc(-y / 2f64.sqrt());
        let density = |y: f64| (-y * y / 2.0).exp() / (2.0 * std::f64::consts::PI).sqrt();
        let gelu_grad = |y: f64| 0.5 * libm::erfc(-y / 2f64.sqrt()) + y * density(y);
        for isa in Isa::available() {
            let mut pre = vec![f32::NAN; m * n];
            let scaled = Mode::Residual {
                residual: &other,
                scale: Some((&scale, 7)),
            };
            let modes = [
                Mode::Store,
                Mode::Gelu,
                Mode::GeluSaving {
                    pre_gelu: Shared::new(&mut pre),
                },
                Mode::Residual {
                    residual: &other,
                    scale: None,
                },
                scaled,
                Mode::GeluGrad { pre_gelu: &other },
            ];
            for (which, mode) in modes.into_iter().enumerate() {
                let mut out = vec![f32::NAN; m * n];
                let finish = Finish::new(&mut out, n, &bias, mode);
                let (left, right) = (Left::Rows(&left), Right::Rows(&right));
                gemm(
                    isa,
                    Precision::F32,
                    &Threads::one(),
                    &mut Scratch::default(),
                    dims,
                    left,
                    right,
                    &finish,
                )
                .unwrap();
                for (i, got) in out.iter().enumerate() {
                    let (y, other) = (y[i], f64::from(other[i]));
                    let want = match which {
                        0 => y,
                        1 | 2 => gelu(y),
                        3 => other + y,
                        4 => other + f64::from(scale[i / n / 7]) * y,
                        _ => y * gelu_grad(other),
                    };
                    // 30 products of numbers below 1, and the errors stated for GELU.
                    assert!(
                        (f64::from(*got) - want).abs() < 2e-5,
                        "{isa} {which} {i}: {got} {want}"
                    );
                }
            }
            assert!(
                pre.iter()
                    .zip(&y)
                    .all(|(got, want)| (f64::from(*got) - want).abs() < 1e-5)
            );
        }
    }
}
