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

mod finish;
mod pack;
mod small;
mod tile;

use core::ops::Range;

use crate::cpu::Scratch;
use crate::error::Error;
use crate::isa::Isa;
use crate::threads::{Pieces, Threads};

pub(crate) use finish::{Finish, Mode};
pub(crate) use pack::pack_weight;
pub(crate) use small::{Matrix, Shared, small_gemm};

use finish::FinishTile;
use pack::{PackColumns, PackLeft, PackRows};
use tile::{Shape, Tile};

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
}

/// Panels that a thread uses together take at most so many elements: 768 KiB of its level-2 cache.
const GROUP: usize = 192 * 1024;
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
    fn new(dims: Dims, width: usize, threads: usize) -> Self {
        let Dims { m, n, inner } = dims;
        let panels = n.div_ceil(width);
        let fits = (GROUP / (inner * width).max(1)).clamp(1, panels.min(MAX_GROUP));
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
/// If an operand is shorter than `dims` say.
pub(crate) fn gemm(
    isa: Isa,
    threads: &Threads,
    scratch: &mut Scratch,
    dims: Dims,
    left: Left<'_>,
    right: Right<'_>,
    finish: &Finish<'_>,
) -> Result<(), Error> {
    let Dims { m, n, inner } = dims;
    let (Left::Rows(l) | Left::Columns(l)) = left;
    let (Right::Rows(r) | Right::Columns(r) | Right::Panels(r)) = right;
    assert!(
        l.len() >= m * inner && r.len() >= inner * n,
        "the operands of a product are as long as it says"
    );
    finish.check(m, n);
    if m == 0 || n == 0 {
        return Ok(());
    }
    let shape = Shape::of(isa);
    let block = (BLOCK / inner.max(1))
        .max(MIN_BLOCK)
        .next_multiple_of(LEFT_ROWS)
        .min(m);
    let panel = inner * shape.width;
    let most = Cuts::new(Dims { m: block, ..dims }, shape.width, threads.count()).group * panel;
    let left_len = (block * inner).next_multiple_of(shape.lanes);
    let scratch = scratch.floats(left_len + threads.count() * most)?;
    let (packed_left, packed_right) = scratch.split_at_mut(left_len);
    for start in (0..m).step_by(block) {
        let rows = block.min(m - start);
        let cuts = Cuts::new(Dims { m: rows, ..dims }, shape.width, threads.count());
        let pieces = Pieces::new(&mut packed_left[..rows * inner], LEFT_ROWS * inner);
        threads.for_each(
            rows.div_ceil(LEFT_ROWS),
            LEFT_ROWS * inner,
            pieces,
            |i, to| {
                let first = i * LEFT_ROWS;
                let rows = LEFT_ROWS.min(rows - first);
                isa.run(PackLeft {
                    to,
                    left,
                    m,
                    first: start + first,
                    rows,
                    inner,
                });
            },
        );
        let packed_left = &*packed_left;
        threads.for_each_with(
            cuts.groups * cuts.row_chunks,
            usize::MAX,
            (),
            Pieces::new(&mut *packed_right, most),
            |unit, (), packed_right| {
                let first = unit / cuts.row_chunks * cuts.group;
                let count = cuts.group.min(cuts.panels - first);
                let mut panels = [&[][..]; MAX_GROUP];
                let places = packed_right
                    .chunks_mut(panel.max(1))
                    .map(Some)
                    .chain(core::iter::repeat_with(|| None));
                for (i, (at, place)) in panels.iter_mut().take(count).zip(places).enumerate() {
                    let col = (first + i) * shape.width;
                    let columns = col..n.min(col + shape.width);
                    *at = pack_right(isa, shape, dims, right, columns, place.unwrap_or_default());
                }
                let chunk = unit % cuts.row_chunks * cuts.rows;
                let mut sums = [0.0; tile::MAX_ELEMENTS];
                for row in (chunk..rows.min(chunk + cuts.rows)).step_by(shape.rows) {
                    let height = shape.rows.min(rows - row);
                    let left = &packed_left[row * inner..][..height * inner];
                    for (i, right) in panels[..count].iter().enumerate() {
                        let col = (first + i) * shape.width;
                        let width = shape.width.min(n - col);
                        isa.run(Tile {
                            inner,
                            left,
                            right,
                            rows: height,
                            vectors: width.div_ceil(shape.lanes),
                            sums: &mut sums,
                        });
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

/// One panel of the right operand: its part that is one already, or a copy in `to`.
fn pack_right<'a>(
    isa: Isa,
    shape: Shape,
    dims: Dims,
    right: Right<'a>,
    columns: Range<usize>,
    to: &'a mut [f32],
) -> &'a [f32] {
    let Dims { n, inner, .. } = dims;
    let (col, width, step) = (columns.start, columns.len(), shape.width);
    match right {
        Right::Panels(data) => {
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
        Right::Rows(data) => {
            let data = &data[col.min(data.len())..];
            isa.run(PackRows {
                to,
                step,
                data,
                stride: n,
                width,
                inner,
            });
        }
        Right::Columns(data) => {
            let data = &data[col * inner..][..inner * width];
            isa.run(PackColumns {
                to,
                step,
                data,
                width,
                inner,
            });
        }
    }
    to
}

#[cfg(test)]
mod tests {
    use super::*;
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
                    gemm(isa, pool, &mut scratch, dims, left, right, &finish).unwrap();
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
