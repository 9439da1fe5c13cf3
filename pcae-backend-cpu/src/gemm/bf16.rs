//! Products of bf16: how operands are packed, and the units that multiply them.
//!
//! Operands are rounded to bf16 as they are packed, two neighbours of the inner dimension to one 32-bit word, the first
//! in the lower half. The product of two bf16 is exact in f32; sums are f32.

use core::fmt;
use core::ops::Range;

use crate::isa::{Isa, Kernel};
use crate::simd::Simd;

use super::Left;
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

/// The bits of `x` rounded to bf16, to nearest and ties to even; NaN stays NaN.
#[inline(always)]
fn round(x: f32) -> u32 {
    let bits = x.to_bits();
    let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16;
    if x.is_nan() {
        bits >> 16 | 0x40
    } else {
        rounded
    }
}

/// A word of two bf16, as the f32 with the same bits: packed operands share the memory of unpacked ones.
#[inline(always)]
fn pair(first: f32, second: f32) -> f32 {
    f32::from_bits(round(first) | round(second) << 16)
}

/// `x` rounded to bf16.
#[cfg(test)]
pub(super) fn rounded(x: f32) -> f32 {
    f32::from_bits(round(x) << 16)
}

/// Side of the squares that are transposed, in words: at least that of any instruction set's.
const SQUARE: usize = 16;

/// `to[j] = words of row j` for the square whose first word is `word`, of `rows` rows of `inner` elements, `stride`
/// apart; zeros beyond the last row and element.
#[inline(always)]
fn gather(
    square: &mut [[f32; SQUARE]; SQUARE],
    data: &[f32],
    stride: usize,
    inner: usize,
    rows: usize,
    word: usize,
) {
    for (j, to) in square.iter_mut().enumerate() {
        *to = [0.0; SQUARE];
        if j >= rows {
            continue;
        }
        let row = &data[j * stride..][..inner];
        if let Some(from) = row
            .get(2 * word..)
            .and_then(<[f32]>::first_chunk::<{ 2 * SQUARE }>)
        {
            for (i, to) in to.iter_mut().enumerate() {
                *to = pair(from[2 * i], from[2 * i + 1]);
            }
        } else {
            for (i, to) in to.iter_mut().enumerate() {
                let at = |i: usize| row.get(i).copied().unwrap_or(0.0);
                *to = pair(at(2 * (word + i)), at(2 * (word + i) + 1));
            }
        }
    }
}

/// `out[i][j] = square[j][i]`
#[inline(always)]
fn transpose<S: Simd>(s: S, out: &mut [[f32; SQUARE]; SQUARE], square: &[[f32; SQUARE]; SQUARE]) {
    for j in (0..SQUARE).step_by(S::LANES) {
        for i in (0..SQUARE).step_by(S::LANES) {
            // SAFETY: `LANES` divides 16, so the squares lie within both.
            unsafe {
                let from = square.as_ptr().cast::<f32>().add(j * SQUARE + i);
                let to = out.as_mut_ptr().cast::<f32>().add(i * SQUARE + j);
                s.transpose(to, SQUARE, from, SQUARE);
            }
        }
    }
}

/// How the right operand of [`PackRight`] lies.
#[derive(Clone, Copy)]
pub(super) enum Turned<'a> {
    /// `[inner, stride]`
    Rows(&'a [f32]),
    /// `[width, stride]`
    Columns(&'a [f32]),
}

/// A panel of pairs, `[words, step]`, of the columns `..width` of the right operand: zeros beyond its last row and
/// column.
pub(super) struct PackRight<'a> {
    pub(super) to: &'a mut [f32],
    pub(super) step: usize,
    pub(super) words: usize,
    pub(super) data: Turned<'a>,
    pub(super) stride: usize,
    pub(super) width: usize,
    pub(super) inner: usize,
}

impl Kernel for PackRight<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        match self.data {
            Turned::Rows(data) => self.rows(data),
            Turned::Columns(data) => self.columns(s, data),
        }
    }
}

impl PackRight<'_> {
    #[inline(always)]
    fn columns<S: Simd>(self, s: S, data: &[f32]) {
        let Self {
            to,
            step,
            words,
            stride,
            width,
            inner,
            ..
        } = self;
        let (mut square, mut out) = ([[0.0; SQUARE]; SQUARE], [[0.0; SQUARE]; SQUARE]);
        for col in (0..step).step_by(SQUARE) {
            let rows = width.saturating_sub(col).min(SQUARE);
            let data = &data[(col * stride).min(data.len())..];
            for word in (0..words).step_by(SQUARE) {
                gather(&mut square, data, stride, inner, rows, word);
                transpose(s, &mut out, &square);
                let to = to[word * step..].chunks_mut(step).take(words - word);
                for (to, row) in to.zip(&out) {
                    let len = SQUARE.min(step - col);
                    to[col..][..len].copy_from_slice(&row[..len]);
                }
            }
        }
    }

    #[inline(always)]
    fn rows(self, data: &[f32]) {
        let Self {
            to,
            step,
            words,
            stride,
            width,
            inner,
            ..
        } = self;
        for (word, to) in to.chunks_exact_mut(step).take(words).enumerate() {
            let row = |i: usize| match i < inner {
                true => &data[i * stride..][..width],
                false => &[],
            };
            let (first, second) = (row(2 * word), row(2 * word + 1));
            if second.is_empty() {
                // The last row of an odd number, or none.
                for (i, to) in to.iter_mut().enumerate() {
                    *to = pair(first.get(i).copied().unwrap_or(0.0), 0.0);
                }
            } else {
                let (columns, rest) = to.split_at_mut(width);
                for ((to, first), second) in columns.iter_mut().zip(first).zip(second) {
                    *to = pair(*first, *second);
                }
                rest.fill(0.0);
            }
        }
    }
}

/// Tiles of the left operand in pairs, one after the other: each `[words, height]`, or rows of squares of 16 rows by 16
/// words, filled up with zeros.
pub(super) struct PackLeft<'a> {
    /// The place of these tiles.
    pub(super) to: &'a mut [f32],
    pub(super) words: usize,
    pub(super) squares: bool,
    pub(super) left: Left<'a>,
    /// Rows of the whole operand.
    pub(super) m: usize,
    /// Row of the operand that is row 0 of `strips`.
    pub(super) first: usize,
    pub(super) strips: Strips,
    pub(super) tiles: Range<usize>,
    pub(super) inner: usize,
}

impl Kernel for PackLeft<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self {
            to,
            words,
            squares,
            left,
            m,
            first,
            strips,
            tiles,
            inner,
        } = self;
        let start = strips.start(tiles.start);
        let (mut square, mut out) = ([[0.0; SQUARE]; SQUARE], [[0.0; SQUARE]; SQUARE]);
        for tile in tiles {
            let (top, end) = (strips.start(tile), strips.start(tile + 1));
            for row in (top..end).step_by(SQUARE) {
                let height = SQUARE.min(end - row);
                let to = &mut to[(row - start) * words..];
                for word in (0..words).step_by(SQUARE) {
                    // `square[row][word]`, and `out[word][row]` where tiles want it.
                    match left {
                        Left::Rows(data) => {
                            let data = &data[(first + row) * inner..];
                            gather(&mut square, data, inner, inner, height, word);
                            if !squares {
                                transpose(s, &mut out, &square);
                            }
                        }
                        Left::Columns(data) => {
                            turn(&mut out, &data[first + row..], m, inner, height, word);
                            if squares {
                                transpose(s, &mut square, &out);
                            }
                        }
                    }
                    if squares {
                        to[word * SQUARE..][..SQUARE * SQUARE]
                            .copy_from_slice(square.as_flattened());
                    } else {
                        let lines = to[word * height..].chunks_exact_mut(height);
                        for (to, from) in lines.zip(&out).take(words - word) {
                            to.copy_from_slice(&from[..height]);
                        }
                    }
                }
            }
        }
    }
}

/// `out[i] = word + i of each of height columns` of `data`, `[inner, stride]`; zeros beyond the last column and row.
#[inline(always)]
fn turn(
    out: &mut [[f32; SQUARE]; SQUARE],
    data: &[f32],
    stride: usize,
    inner: usize,
    height: usize,
    word: usize,
) {
    for (i, to) in out.iter_mut().enumerate() {
        let line = |i: usize| match i < inner {
            true => &data[i * stride..][..height],
            false => &[],
        };
        let (a, b) = (line(2 * (word + i)), line(2 * (word + i) + 1));
        if let (Some(a), Some(b)) = (a.first_chunk::<SQUARE>(), b.first_chunk::<SQUARE>()) {
            for ((to, a), b) in to.iter_mut().zip(a).zip(b) {
                *to = pair(*a, *b);
            }
        } else {
            let at = |line: &[f32], j: usize| line.get(j).copied().unwrap_or(0.0);
            for (j, to) in to.iter_mut().enumerate() {
                *to = pair(at(a, j), at(b, j));
            }
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
            for half in [S::upper, S::lower] {
                let vectors = words.map(|words| half(s, words));
                for (x, sums) in left.iter().zip(&mut sums) {
                    let x = half(s, s.splat(*x));
                    for (sum, vector) in sums.iter_mut().zip(vectors) {
                        *sum = s.mul_add(x, vector, *sum);
                    }
                }
            }
        }
        for (row, sums) in self.sums.chunks_exact_mut(width).zip(sums) {
            for (lanes, sum) in row.chunks_exact_mut(S::LANES).zip(sums) {
                s.store(lanes, sum);
            }
        }
    }
}
