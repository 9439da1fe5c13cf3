//! What an operation checks before it queues anything: kernels believe what they are told.

use std::sync::Arc;

use pcae_kernel::backend::{Linear, LinearDims, Norm, RowDims, Span};
use pcae_kernel::error::{Error as KernelError, expect_len};

use crate::buffers::{Buf, Buffer, Params, Vector};
use crate::error::Error;
use crate::queue::Queue;

/// What kernels count in 32 bits.
pub(crate) fn small(op: &'static str, len: usize) -> Result<u32, KernelError> {
    u32::try_from(len).map_err(|_| KernelError::Dimensions {
        op,
        expected: "fewer than 2^32 elements",
        found: len,
    })
}

impl Queue {
    /// That `buffer` has at least `len` elements, and is this queue's: nothing orders the work of another behind this one's, nor
    /// would its memory be freed behind it.
    pub(crate) fn expect<T: Buffer>(
        &self,
        op: &'static str,
        what: &'static str,
        buffer: &T,
        len: usize,
    ) -> Result<(), Error> {
        expect_len(op, what, buffer.len(), len)?;
        let owner = buffer.memory().heap();
        if Arc::ptr_eq(owner, &self.heap) {
            return Ok(());
        }
        Err(Error::Foreign {
            op,
            what,
            expected: self.context.name.clone(),
            found: owner.device().to_owned(),
        })
    }

    /// That `len` parameters of `span` are there, of those in `params`, or their gradients.
    pub(crate) fn expect_span<T: Buffer>(
        &self,
        op: &'static str,
        what: &'static str,
        params: &T,
        span: Span,
        len: usize,
    ) -> Result<(), Error> {
        expect_len(op, what, span.len, len)?;
        self.expect(op, "params", params, span.end())
    }

    /// That a layer's weight and bias are there.
    pub(crate) fn expect_layer<T: Buffer>(
        &self,
        op: &'static str,
        params: &T,
        layer: Linear,
        dims: LinearDims,
    ) -> Result<(), Error> {
        self.expect_span(op, "weight", params, layer.weight, dims.weight_len())?;
        self.expect_span(op, "bias", params, layer.bias, dims.out_features)
    }

    /// That a norm's weight and bias are there.
    pub(crate) fn expect_norm(
        &self,
        op: &'static str,
        params: &Params,
        norm: Norm,
        dim: usize,
    ) -> Result<(), Error> {
        self.expect_span(op, "weight", params, norm.weight, dim)?;
        self.expect_span(op, "bias", params, norm.bias, dim)
    }

    /// How many patches have a position in the table `span`; row 0 is the class token's.
    pub(crate) fn positions(
        &self,
        op: &'static str,
        params: &Params,
        span: Span,
        dim: usize,
    ) -> Result<usize, Error> {
        self.expect_span(op, "pos_embed", params, span, span.len)?;
        Ok((span.len / dim.max(1)).saturating_sub(1))
    }

    /// `rows_per_scale` divides `rows`, and there is a scale for each group.
    pub(crate) fn expect_scale(
        &self,
        op: &'static str,
        rows: usize,
        scale: &Buf,
        rows_per_scale: usize,
    ) -> Result<(), Error> {
        if rows_per_scale == 0 || !rows.is_multiple_of(rows_per_scale) {
            return Err(Error::Kernel(KernelError::Dimensions {
                op,
                expected: "rows that `rows_per_scale` divides",
                found: rows_per_scale,
            }));
        }
        self.expect(op, "scale", scale, rows / rows_per_scale)
    }

    /// There is something to take the mean of, and room for the result.
    pub(crate) fn expect_loss(
        &self,
        op: &'static str,
        dims: RowDims,
        losses: &Vector,
        at: usize,
    ) -> Result<(), Error> {
        if dims.is_empty() {
            return Err(Error::Kernel(KernelError::Dimensions {
                op,
                expected: "at least one row and column",
                found: 0,
            }));
        }
        self.expect(op, "losses", losses, at.saturating_add(1))
    }

    /// A prediction, its target and the gradient have the size of `dims`.
    pub(crate) fn expect_pair(
        &self,
        op: &'static str,
        dims: RowDims,
        gradient: &Buf,
        prediction: &Buf,
        target: &Buf,
    ) -> Result<(), Error> {
        self.expect(op, "gradient", gradient, dims.len())?;
        self.expect(op, "prediction", prediction, dims.len())?;
        self.expect(op, "target", target, dims.len())
    }
}
