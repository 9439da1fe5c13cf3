//! What an operation checks before it queues anything: kernels believe what they are told.

use pcae_kernel::backend::{Linear, LinearDims, Norm, RowDims, Span};
use pcae_kernel::error::{Error as KernelError, expect_len};

use crate::buffers::{Buf, Params, Vector};

/// What kernels count in 32 bits.
pub(crate) fn small(op: &'static str, len: usize) -> Result<u32, KernelError> {
    u32::try_from(len).map_err(|_| KernelError::Dimensions {
        op,
        expected: "fewer than 2^32 elements",
        found: len,
    })
}

/// That `len` parameters of `span` are there, of `total`.
pub(crate) fn check_span(
    op: &'static str,
    what: &'static str,
    total: usize,
    span: Span,
    len: usize,
) -> Result<(), KernelError> {
    expect_len(op, what, span.len, len)?;
    expect_len(op, "params", total, span.end())
}

/// That a layer's weight and bias are there, of `total` parameters.
pub(crate) fn check_layer(
    op: &'static str,
    total: usize,
    layer: Linear,
    dims: LinearDims,
) -> Result<(), KernelError> {
    check_span(op, "weight", total, layer.weight, dims.weight_len())?;
    check_span(op, "bias", total, layer.bias, dims.out_features)
}

/// That a norm's weight and bias are there, of `total` parameters.
pub(crate) fn check_norm(
    op: &'static str,
    total: usize,
    norm: Norm,
    dim: usize,
) -> Result<(), KernelError> {
    check_span(op, "weight", total, norm.weight, dim)?;
    check_span(op, "bias", total, norm.bias, dim)
}

/// How many patches have a position in the table `span`; row 0 is the class token's.
pub(crate) fn positions(
    op: &'static str,
    params: &Params,
    span: Span,
    dim: usize,
) -> Result<usize, KernelError> {
    check_span(op, "pos_embed", params.len, span, span.len)?;
    Ok((span.len / dim.max(1)).saturating_sub(1))
}

/// `rows_per_scale` divides `rows`, and there is a scale for each group.
pub(crate) fn check_scale(
    op: &'static str,
    rows: usize,
    scale: &Buf,
    rows_per_scale: usize,
) -> Result<(), KernelError> {
    if rows_per_scale == 0 || !rows.is_multiple_of(rows_per_scale) {
        return Err(KernelError::Dimensions {
            op,
            expected: "rows that `rows_per_scale` divides",
            found: rows_per_scale,
        });
    }
    expect_len(op, "scale", scale.len, rows / rows_per_scale)
}

/// There is something to take the mean of, and room for the result.
pub(crate) fn check_loss(
    op: &'static str,
    dims: RowDims,
    losses: &Vector,
    at: usize,
) -> Result<(), KernelError> {
    if dims.is_empty() {
        return Err(KernelError::Dimensions {
            op,
            expected: "at least one row and column",
            found: 0,
        });
    }
    expect_len(op, "losses", losses.len, at.saturating_add(1))
}

/// A prediction, its target and the gradient have the size of `dims`.
pub(crate) fn check_pair(
    op: &'static str,
    dims: RowDims,
    gradient: &Buf,
    prediction: &Buf,
    target: &Buf,
) -> Result<(), KernelError> {
    expect_len(op, "gradient", gradient.len, dims.len())?;
    expect_len(op, "prediction", prediction.len, dims.len())?;
    expect_len(op, "target", target.len, dims.len())
}
