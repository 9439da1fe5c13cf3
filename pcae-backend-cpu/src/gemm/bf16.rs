//! Products of bf16: how operands are packed, and the units that multiply them.
//!
//! Operands are rounded to bf16 as they are packed, where they do not hold it already: two neighbours of the inner dimension to one 32-bit word, the first
//! in the lower half. The product of two bf16 is exact in f32; sums are f32.

use core::fmt;
use core::ops::Range;

use crate::element::Element;
use crate::isa::{Isa, Kernel};
use crate::simd::Simd;

use super::Left;
use super::finish::put;
use super::pack::RowSums;
use super::tile::Strips;
#[cfg(target_arch = "x86_64")]
use super::x86::{Amx, Avx512Bf16};

/// What multiplies pairs of bf16: holding one is the proof that this processor has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bf16Unit(pub(super) Unit);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Unit {
    /// Tiles of 16 by 16 sums, AMX-BF16.
    #[cfg(target_arch = "x86_64")]
    Amx(Amx),
    /// Dot products of pairs, AVX512-BF16.
    #[cfg(target_arch = "x86_64")]
    Avx512Bf16(Avx512Bf16),
    /// Multiply-adds in f32, of each half in turn: the sums of AVX512-BF16 but for subnormal numbers, which that unit takes
    /// for zeros.
    Emulated,
}

impl Bf16Unit {
    /// The units that this processor has beside `isa`, the fastest first.
    pub fn available(isa: Isa) -> impl Iterator<Item = Self> {
        let found = [
            #[cfg(target_arch = "x86_64")]
            Amx::new(isa).map(Unit::Amx),
            #[cfg(target_arch = "x86_64")]
            Avx512Bf16::new(isa).map(Unit::Avx512Bf16),
            Some(Unit::Emulated),
        ];
        let _ = isa;
        found.into_iter().flatten().map(Self)
    }

    /// The fastest unit that this processor has beside `isa`.
    pub fn detect(isa: Isa) -> Self {
        Self::available(isa).next().unwrap_or(Self(Unit::Emulated))
    }

    /// Whether products of `isa` can use it: the units of x86-64 work beside AVX-512.
    pub(crate) fn fits(self, isa: Isa) -> bool {
        match self.0 {
            #[cfg(target_arch = "x86_64")]
            Unit::Amx(_) | Unit::Avx512Bf16(_) => isa.is_avx512(),
            Unit::Emulated => {
                let _ = isa;
                true
            }
        }
    }

    /// Whether the left operand comes in squares, of AMX.
    pub(super) fn wants_squares(self) -> bool {
        match self.0 {
            #[cfg(target_arch = "x86_64")]
            Unit::Amx(_) => true,
            _ => false,
        }
    }

    /// `rounds` of multiply-adds in registers, and the floating-point operations in them; `None` where there is no
    /// such unit and f32 does the work.
    pub(crate) fn spin(self, rounds: usize) -> Option<usize> {
        let _ = rounds;
        match self.0 {
            #[cfg(target_arch = "x86_64")]
            Unit::Amx(amx) => Some(amx.spin(rounds)),
            #[cfg(target_arch = "x86_64")]
            Unit::Avx512Bf16(dot) => Some(dot.spin(rounds)),
            Unit::Emulated => None,
        }
    }
}

impl fmt::Display for Bf16Unit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.0 {
            #[cfg(target_arch = "x86_64")]
            Unit::Amx(_) => "amx",
            #[cfg(target_arch = "x86_64")]
            Unit::Avx512Bf16(_) => "avx512bf16",
            Unit::Emulated => "emulated bf16",
        })
    }
}

/// `x` rounded to bf16.
#[cfg(test)]
pub(crate) fn rounded(x: f32) -> f32 {
    use crate::simd::Portable;
    Portable.lower(Portable.pair_bf16([x; 8], [0.0; 8]))[0]
}

/// `x` as bf16 in memory.
#[cfg(test)]
pub(crate) fn narrowed(x: &[f32]) -> Vec<crate::element::Bf16> {
    let half = |x| (rounded(x).to_bits() >> 16) as u16;
    x.iter().map(|&x| crate::element::Bf16(half(x))).collect()
}

/// Side of the squares that are transposed, in words: at least that of any instruction set's.
const SQUARE: usize = 16;

/// `to[j] = words of row j` for the square whose first word is `word`, of `rows` rows of `inner` elements, `stride`
/// apart; zeros beyond the last row and element.
#[inline(always)]
fn gather<S: Simd, T: Element>(
    s: S,
    square: &mut [f32],
    data: &[T],
    stride: usize,
    inner: usize,
    rows: usize,
    word: usize,
) {
    for (j, to) in square.chunks_exact_mut(SQUARE).take(SQUARE).enumerate() {
        if j >= rows {
            to.fill(0.0);
            continue;
        }
        let row = &data[j * stride..][..inner];
        for (i, to) in to.chunks_exact_mut(S::LANES).enumerate() {
            let from = 2 * (word + i * S::LANES);
            s.store(to, T::words(s, &row[from.min(inner)..]));
        }
    }
}

/// `to[i * step + col + j] = square[j][i]`
#[inline(always)]
fn transpose<S: Simd>(s: S, to: &mut [f32], step: usize, col: usize, square: &[f32]) {
    assert!(
        col + SQUARE <= step && to.len() >= SQUARE * step && square.len() >= SQUARE * SQUARE,
        "a square lies within what it is written to"
    );
    for j in (0..SQUARE).step_by(S::LANES) {
        for i in (0..SQUARE).step_by(S::LANES) {
            // SAFETY: `LANES` divides 16, so the squares lie within both; the length is checked above.
            unsafe {
                let from = square.as_ptr().add(j * SQUARE + i);
                let to = to.as_mut_ptr().add(i * step + col + j);
                s.transpose(to, step, from, SQUARE);
            }
        }
    }
}

/// How the right operand of [`PackRight`] lies.
#[derive(Clone, Copy)]
pub(super) enum Turned<'a, T = f32> {
    /// `[inner, stride]`
    Rows(&'a [T]),
    /// `[width, stride]`
    Columns(&'a [T]),
}

/// A panel of pairs, `[words, step]`, of the columns `..width` of the right operand: zeros beyond its last row and
/// column.
pub(super) struct PackRight<'a, T = f32> {
    pub(super) to: &'a mut [f32],
    pub(super) step: usize,
    pub(super) words: usize,
    pub(super) data: Turned<'a, T>,
    pub(super) stride: usize,
    pub(super) width: usize,
    pub(super) inner: usize,
    /// Past the caches: of what is read much later.
    pub(super) streamed: bool,
}

impl<T: Element> Kernel for PackRight<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        match self.data {
            Turned::Rows(data) => self.rows(s, data),
            Turned::Columns(data) => self.columns(s, data),
        }
    }
}

impl<T: Element> PackRight<'_, T> {
    #[inline(always)]
    fn columns<S: Simd>(self, s: S, data: &[T]) {
        let Self {
            to,
            step,
            words,
            stride,
            width,
            inner,
            streamed,
            ..
        } = self;
        let (mut square, mut out) = ([0.0; SQUARE * SQUARE], [0.0; SQUARE * SQUARE]);
        for col in (0..step).step_by(SQUARE) {
            let rows = width.saturating_sub(col).min(SQUARE);
            let data = &data[(col * stride).min(data.len())..];
            for word in (0..words).step_by(SQUARE) {
                gather(s, &mut square, data, stride, inner, rows, word);
                let to = &mut to[word * step..];
                if words - word >= SQUARE && step - col >= SQUARE && !streamed {
                    transpose(s, to, step, col, &square);
                    continue;
                }
                transpose(s, &mut out, SQUARE, 0, &square);
                let len = SQUARE.min(step - col);
                for (to, row) in to
                    .chunks_mut(step)
                    .take(words - word)
                    .zip(out.chunks(SQUARE))
                {
                    let row = row[..len].chunks(S::LANES);
                    for (to, row) in to[col..][..len].chunks_mut(S::LANES).zip(row) {
                        put(s, streamed, to, s.load(row));
                    }
                }
            }
        }
    }

    #[inline(always)]
    fn rows<S: Simd>(self, s: S, data: &[T]) {
        let Self {
            to,
            step,
            words,
            stride,
            width,
            inner,
            streamed,
            ..
        } = self;
        for (word, to) in to.chunks_exact_mut(step).take(words).enumerate() {
            let row = |i: usize| match i < inner {
                true => &data[i * stride..][..width],
                false => &[],
            };
            pair_lines(s, to, row(2 * word), row(2 * word + 1), streamed);
        }
    }
}

/// `to = words of each element of lower and upper`, zeros beyond the end of either.
#[inline(always)]
fn pair_lines<S: Simd, T: Element>(s: S, to: &mut [f32], lower: &[T], upper: &[T], streamed: bool) {
    for (i, to) in to.chunks_mut(S::LANES).enumerate() {
        let load = |line: &[T]| T::load(s, &line[(i * S::LANES).min(line.len())..]);
        put(s, streamed, to, s.pair_bf16(load(lower), load(upper)));
    }
}

/// Tiles of the left operand in pairs, one after the other: each `[words, height]`, or rows of squares of 16 rows by 16
/// words, filled up with zeros.
pub(super) struct PackLeft<'a, T = f32> {
    /// The place of these tiles.
    pub(super) to: &'a mut [f32],
    /// As in [`super::pack::PackLeft`].
    pub(super) sums: Option<&'a mut [f32]>,
    pub(super) words: usize,
    pub(super) squares: bool,
    pub(super) left: Left<&'a [T]>,
    /// Between the rows of the operand, or its columns where it comes transposed.
    pub(super) stride: usize,
    /// Row of the operand that is row 0 of `strips`.
    pub(super) first: usize,
    pub(super) strips: Strips,
    pub(super) tiles: Range<usize>,
    pub(super) inner: usize,
}

impl<T: Element> Kernel for PackLeft<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self {
            to,
            mut sums,
            words,
            squares,
            left,
            stride,
            first,
            strips,
            tiles,
            inner,
        } = self;
        let start = strips.start(tiles.start);
        let (mut square, mut turned) = ([0.0; SQUARE * SQUARE], [0.0; SQUARE * SQUARE]);
        for tile in tiles {
            let (top, end) = (strips.start(tile), strips.start(tile + 1));
            for row in (top..end).step_by(SQUARE) {
                let height = SQUARE.min(end - row);
                let to = &mut to[(row - start) * words..];
                if let (Left::Columns(data), Some(sums)) = (left, &mut sums) {
                    let sums = &mut sums[row - start..][..height];
                    sum_columns(s, sums, &data[first + row..], stride, inner);
                }
                for word in (0..words).step_by(SQUARE) {
                    if squares {
                        let to = &mut to[word * SQUARE..];
                        match left {
                            Left::Rows(data) => {
                                let data = &data[(first + row) * stride..];
                                gather(s, to, data, stride, inner, height, word);
                            }
                            Left::Columns(data) => {
                                turn(
                                    s,
                                    &mut square,
                                    &data[first + row..],
                                    stride,
                                    inner,
                                    height,
                                    word,
                                );
                                transpose(s, to, SQUARE, 0, &square);
                            }
                        }
                        continue;
                    }
                    match left {
                        Left::Rows(data) => {
                            let data = &data[(first + row) * stride..];
                            gather(s, &mut square, data, stride, inner, height, word);
                            transpose(s, &mut turned, SQUARE, 0, &square);
                        }
                        Left::Columns(data) => {
                            turn(
                                s,
                                &mut turned,
                                &data[first + row..],
                                stride,
                                inner,
                                height,
                                word,
                            );
                        }
                    }
                    let lines = to[word * height..].chunks_exact_mut(height);
                    for (to, from) in lines.zip(turned.chunks_exact(SQUARE)).take(words - word) {
                        to.copy_from_slice(&from[..height]);
                    }
                }
            }
        }
    }
}

/// Adds the sums of the first columns of `data`, `[inner, stride]`, to `sums`.
#[inline(always)]
fn sum_columns<S: Simd, T: Element>(s: S, to: &mut [f32], data: &[T], stride: usize, inner: usize) {
    let mut sums = RowSums::default();
    for i in 0..inner {
        sums.add(s, i, &data[i * stride..][..to.len()]);
    }
    sums.finish(s, to);
}

/// `out[i] = word + i of each of height columns` of `data`, `[inner, stride]`; zeros beyond the last column and row.
#[inline(always)]
fn turn<S: Simd, T: Element>(
    s: S,
    out: &mut [f32],
    data: &[T],
    stride: usize,
    inner: usize,
    height: usize,
    word: usize,
) {
    for (i, to) in out.chunks_exact_mut(SQUARE).take(SQUARE).enumerate() {
        let line = |i: usize| match i < inner {
            true => &data[i * stride..][..height],
            false => &[],
        };
        let (lower, upper) = (line(2 * (word + i)), line(2 * (word + i) + 1));
        pair_lines(s, to, lower, upper, false);
    }
}

/// Adds the products of one half of each word. A parameter and no function chooses it: that would be called.
#[inline(always)]
fn add_half<S: Simd, const R: usize, const V: usize, const UPPER: bool>(
    s: S,
    sums: &mut [[S::V; V]; R],
    left: &[f32],
    words: [S::V; V],
) {
    let mut vectors = words;
    for vector in &mut vectors {
        *vector = if UPPER {
            s.upper(*vector)
        } else {
            s.lower(*vector)
        };
    }
    for (x, sums) in left.iter().zip(sums) {
        let x = s.splat(*x);
        let x = if UPPER { s.upper(x) } else { s.lower(x) };
        for (sum, vector) in sums.iter_mut().zip(vectors) {
            *sum = s.mul_add(x, vector, *sum);
        }
    }
}

/// [`super::tile::Tile`] for pairs, on any instruction set.
pub(super) struct TilePairs<'a> {
    pub(super) words: usize,
    /// `[words, rows]`
    pub(super) left: &'a [f32],
    /// `[words, width of a full tile]`
    pub(super) right: &'a [f32],
    pub(super) rows: usize,
    pub(super) vectors: usize,
    pub(super) add: bool,
    pub(super) sums: &'a mut [f32],
}

impl Kernel for TilePairs<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        match self.vectors {
            3 => self.with_vectors::<S, 3>(s),
            2 => self.with_vectors::<S, 2>(s),
            _ => self.with_vectors::<S, 1>(s),
        }
    }
}

impl TilePairs<'_> {
    #[inline(always)]
    fn with_vectors<S: Simd, const V: usize>(self, s: S) {
        match self.rows {
            8 => self.with_rows::<S, 8, V>(s),
            7 => self.with_rows::<S, 7, V>(s),
            6 => self.with_rows::<S, 6, V>(s),
            5 => self.with_rows::<S, 5, V>(s),
            4 => self.with_rows::<S, 4, V>(s),
            3 => self.with_rows::<S, 3, V>(s),
            2 => self.with_rows::<S, 2, V>(s),
            _ => self.with_rows::<S, 1, V>(s),
        }
    }

    #[inline(always)]
    fn with_rows<S: Simd, const R: usize, const V: usize>(self, s: S) {
        if R > S::ROWS || V > S::VECTORS {
            return;
        }
        let width = S::VECTORS * S::LANES;
        let mut sums = [[s.splat(0.0); V]; R];
        if self.add {
            // Counted by constants: an iterator over the slice would keep the sums out of registers.
            for (r, sums) in sums.iter_mut().enumerate() {
                for (v, sum) in sums.iter_mut().enumerate() {
                    *sum = s.load(&self.sums[r * width + v * S::LANES..][..S::LANES]);
                }
            }
        }
        let lines = self
            .right
            .chunks_exact(width)
            .zip(self.left.chunks_exact(R));
        for (right, left) in lines.take(self.words) {
            let words: [S::V; V] =
                core::array::from_fn(|v| s.load(&right[v * S::LANES..][..S::LANES]));
            // The upper halves first, as AVX512-BF16 does.
            add_half::<S, R, V, true>(s, &mut sums, left, words);
            add_half::<S, R, V, false>(s, &mut sums, left, words);
        }
        for (row, sums) in self.sums.chunks_exact_mut(width).zip(sums) {
            for (lanes, sum) in row.chunks_exact_mut(S::LANES).zip(sums) {
                s.store(lanes, sum);
            }
        }
    }
}
