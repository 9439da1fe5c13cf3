//! The scalar reference backend: every operation as its formula, one loop after the other, written to be read.
//!
//! It computes in f32 or f64, on owned buffers ([`Heap`]) or in one slice of the caller's ([`Arena`]), where no
//! allocator exists. Other backends are held against it by [`crate::conformance`].

mod infer;
#[cfg(feature = "train")]
mod train;

use core::marker::PhantomData;

use crate::backend::Span;
use crate::error::{Error, expect_len};
use crate::float::Float;

/// Where buffers come from.
pub trait Storage<T> {
    /// Activations.
    type Buf: AsRef<[T]> + AsMut<[T]>;
    /// Indices.
    type Ids: AsRef<[u32]> + AsMut<[u32]>;
    /// All parameters of a model in the order of its [`crate::layout::Layout`].
    type Params: AsRef<[T]>;

    /// A buffer of `len` zeros.
    ///
    /// # Errors
    /// [`Error::ArenaFull`] if there is no room for it.
    fn buf(&mut self, len: usize) -> Result<Self::Buf, Error>;

    /// An index buffer of `len` zeros.
    ///
    /// # Errors
    /// [`Error::ArenaFull`] if there is no room for it.
    fn ids(&mut self, len: usize) -> Result<Self::Ids, Error>;
}

/// Buffers carved one after the other out of slices of the caller's; parameters that are only borrowed, from flash for
/// example.
#[derive(Debug)]
pub struct Arena<'a, T> {
    floats: &'a mut [T],
    ids: &'a mut [u32],
}

impl<'a, T> Arena<'a, T> {
    /// Takes over both slices.
    pub const fn new(floats: &'a mut [T], ids: &'a mut [u32]) -> Self {
        Self { floats, ids }
    }
}

fn carve<'a, T: Copy + Default>(from: &mut &'a mut [T], len: usize) -> Result<&'a mut [T], Error> {
    if len > from.len() {
        return Err(Error::ArenaFull {
            expected: len,
            found: from.len(),
        });
    }
    let (taken, rest) = core::mem::take(from).split_at_mut(len);
    *from = rest;
    taken.fill(T::default());
    Ok(taken)
}

impl<'a, T: Float> Storage<T> for Arena<'a, T> {
    type Buf = &'a mut [T];
    type Ids = &'a mut [u32];
    type Params = &'a [T];

    fn buf(&mut self, len: usize) -> Result<Self::Buf, Error> {
        carve(&mut self.floats, len)
    }

    fn ids(&mut self, len: usize) -> Result<Self::Ids, Error> {
        carve(&mut self.ids, len)
    }
}

/// Owned buffers.
#[cfg(feature = "alloc")]
#[derive(Debug, Default)]
pub struct Heap<T> {
    /// Working copy of the tokens in the pivoted QR decomposition; grows to the largest sequence once.
    #[cfg(feature = "train")]
    scratch: alloc::vec::Vec<T>,
    format: PhantomData<T>,
}

#[cfg(feature = "alloc")]
fn zeroed<T: Copy + Default>(len: usize) -> Result<alloc::vec::Vec<T>, Error> {
    let mut owned = alloc::vec::Vec::new();
    owned.try_reserve_exact(len).map_err(|_| Error::ArenaFull {
        expected: len,
        found: 0,
    })?;
    owned.resize(len, T::default());
    Ok(owned)
}

#[cfg(feature = "alloc")]
impl<T: Float> Storage<T> for Heap<T> {
    type Buf = alloc::vec::Vec<T>;
    type Ids = alloc::vec::Vec<u32>;
    type Params = alloc::vec::Vec<T>;

    fn buf(&mut self, len: usize) -> Result<Self::Buf, Error> {
        zeroed(len)
    }

    fn ids(&mut self, len: usize) -> Result<Self::Ids, Error> {
        zeroed(len)
    }
}

/// The reference backend, computing in `T` (f32 or f64) with buffers of `S`.
#[derive(Debug, Default)]
pub struct Reference<T, S> {
    storage: S,
    format: PhantomData<T>,
}

impl<T: Float, S: Storage<T>> Reference<T, S> {
    /// A backend that takes its buffers from `storage`.
    pub const fn new(storage: S) -> Self {
        Self {
            storage,
            format: PhantomData,
        }
    }
}

#[cfg(feature = "alloc")]
impl<T: Float> Reference<T, Heap<T>> {
    /// A backend with owned buffers.
    pub fn owned() -> Self {
        Self::default()
    }
}

/// The parameters of `span`, of which `expected` are needed.
fn param<'a, T>(
    op: &'static str,
    what: &'static str,
    params: &'a [T],
    span: Span,
    expected: usize,
) -> Result<&'a [T], Error> {
    expect_len(op, what, span.len, expected)?;
    expect_len(op, "params", params.len(), span.end())?;
    Ok(&params[span.start..][..expected])
}

/// Rows of `dim` elements.
fn rows<T>(x: &[T], dim: usize) -> core::slice::ChunksExact<'_, T> {
    x.chunks_exact(dim.max(1))
}

/// Rows of `dim` elements.
fn rows_mut<T>(x: &mut [T], dim: usize) -> core::slice::ChunksExactMut<'_, T> {
    x.chunks_exact_mut(dim.max(1))
}

fn dot<T: Float>(a: &[T], b: &[T]) -> T {
    a.iter().zip(b).fold(T::ZERO, |sum, (&a, &b)| sum + a * b)
}

fn sum<T: Float>(x: &[T]) -> T {
    x.iter().fold(T::ZERO, |sum, &x| sum + x)
}

/// `x * Phi(x)`, the exact GELU (Hendrycks & Gimpel, 2016).
fn gelu<T: Float>(x: T) -> T {
    x * normal_cdf(x)
}

/// Distribution function of the standard normal.
fn normal_cdf<T: Float>(x: T) -> T {
    T::from_f64(0.5) * (T::ONE + (x * T::from_f64(core::f64::consts::FRAC_1_SQRT_2)).erf())
}

/// Mean and `1 / sqrt(variance + eps)`, the variance over `len - degrees`.
fn mean_rstd<T: Float>(x: &[T], degrees: usize) -> (T, T) {
    let mean = sum(x) / T::from_usize(x.len());
    let squares = x
        .iter()
        .fold(T::ZERO, |sum, &x| sum + (x - mean) * (x - mean));
    let variance = squares / T::from_usize(x.len() - degrees);
    (
        mean,
        T::ONE / (variance + T::from_f64(crate::backend::NORM_EPS)).sqrt(),
    )
}

/// Refuses the first id that is not below `limit`.
fn check_ids(op: &'static str, what: &'static str, ids: &[u32], limit: usize) -> Result<(), Error> {
    match ids.iter().find(|&&id| id as usize >= limit) {
        Some(&id) => Err(Error::IndexOutOfRange {
            op,
            what,
            limit,
            found: id as usize,
        }),
        None => Ok(()),
    }
}
