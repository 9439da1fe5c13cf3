//! Arguments held against what dimensions say, before anything is written.

use pcae_kernel::backend::{EmbedParams, RowDims, Span, TokenDims};
use pcae_kernel::error::{Error as KernelError, expect_len};

use crate::buf::{Buf, View};
use crate::error::Error;
use crate::gemm::Precision;

/// The first `len` elements.
pub(crate) fn front<'a, T>(
    op: &'static str,
    what: &'static str,
    x: &'a [T],
    len: usize,
) -> Result<&'a [T], KernelError> {
    expect_len(op, what, x.len(), len)?;
    Ok(&x[..len])
}

/// The first `len` elements.
pub(crate) fn front_mut<'a, T>(
    op: &'static str,
    what: &'static str,
    x: &'a mut [T],
    len: usize,
) -> Result<&'a mut [T], KernelError> {
    expect_len(op, what, x.len(), len)?;
    Ok(&mut x[..len])
}

/// Where the first `len` elements of `span` lie in a vector of `total`.
pub(crate) fn check_span(
    op: &'static str,
    what: &'static str,
    total: usize,
    span: Span,
    len: usize,
) -> Result<core::ops::Range<usize>, KernelError> {
    expect_len(op, what, span.len, len)?;
    expect_len(op, what, total, span.end())?;
    Ok(span.start..span.start + len)
}

/// The first `len` ids, all below `limit`.
pub(crate) fn checked_ids<'a>(
    op: &'static str,
    what: &'static str,
    ids: &'a [u32],
    len: usize,
    limit: usize,
) -> Result<&'a [u32], KernelError> {
    let ids = front(op, what, ids, len)?;
    match ids.iter().find(|&&id| id as usize >= limit) {
        Some(&id) => Err(KernelError::IndexOutOfRange {
            op,
            what,
            limit,
            found: id as usize,
        }),
        None => Ok(ids),
    }
}

/// The first `len` elements of `x`, as products of `precision` take them.
pub(crate) fn operand<'a>(
    op: &'static str,
    what: &'static str,
    x: &'a Buf,
    len: usize,
    precision: Precision,
) -> Result<View<'a>, Error> {
    match precision {
        Precision::F32 => x.floats(op, what, len).map(View::F32),
        Precision::Bf16(_) => x.view(op, what, len),
    }
}

/// The prefix is 1 with a class token and 0 without.
pub(crate) fn check_prefix(
    op: &'static str,
    dims: TokenDims,
    embed: EmbedParams,
) -> Result<(), KernelError> {
    if dims.prefix == usize::from(embed.cls_token.is_some()) {
        return Ok(());
    }
    Err(KernelError::Dimensions {
        op,
        expected: "a prefix of 1 with a class token, of 0 without",
        found: dims.prefix,
    })
}

/// No element is NaN.
pub(crate) fn check_numbers(
    op: &'static str,
    what: &'static str,
    x: &[f32],
) -> Result<(), KernelError> {
    match x.iter().position(|x| x.is_nan()) {
        Some(at) => Err(KernelError::NotANumber { op, what, at }),
        None => Ok(()),
    }
}

/// The scales of groups of `rows_per_scale` rows, which divides `rows`.
pub(crate) fn check_scale<'a>(
    op: &'static str,
    rows: usize,
    scale: &'a Buf,
    rows_per_scale: usize,
) -> Result<&'a [f32], Error> {
    if rows_per_scale == 0 || !rows.is_multiple_of(rows_per_scale) {
        return Err(KernelError::Dimensions {
            op,
            expected: "rows that `rows_per_scale` divides",
            found: rows_per_scale,
        }
        .into());
    }
    scale.floats(op, "scale", rows / rows_per_scale)
}

/// There is something to take the mean of, and room for the result.
pub(crate) fn check_loss(
    op: &'static str,
    dims: RowDims,
    losses: &[f32],
    at: usize,
) -> Result<(), KernelError> {
    if dims.is_empty() {
        return Err(KernelError::Dimensions {
            op,
            expected: "at least one row and column",
            found: 0,
        });
    }
    expect_len(op, "losses", losses.len(), at.saturating_add(1))
}
