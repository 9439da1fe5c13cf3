//! Rows of odd lengths, put on multiples of 16 bytes for tensor cores.
//!
//! Patches of 14 x 14 pixels in three colours are 588 elements long, in bf16 no multiple of 16 bytes, and what fetches tiles for tensor
//! cores takes no such rows: cuBLASLt falls back to much slower kernels, or to none. So large operands are copied into rows that
//! are, with zeros between them. A forward product has these as terms too, so that its inner size is a multiple as well, and they
//! add nothing. The weight's gradient is as wide as the weight itself: whether that costs it the fast kernels was not measured.

use pcae_kernel::backend::LinearDims;
use pcae_kernel::error::product;

use crate::Precision;
use crate::checks::small;
use crate::driver::DevicePtr;
use crate::error::Error;
use crate::kernels;
use crate::queue::{Queue, Shape};
use crate::rows::BUSY;

/// Rows, columns and terms from which on a copy costs less than it saves.
const LEAST: [usize; 3] = [128, 128, 64];

/// How far apart rows of `in_features` lie in a copy, if that is worth one.
pub(crate) fn padded(precision: Precision, dims: LinearDims) -> Option<usize> {
    let lanes = 16 / precision.size();
    let sizes = [dims.rows, dims.out_features, dims.in_features];
    let is_large = sizes.iter().zip(LEAST).all(|(size, least)| *size >= least);
    // In f32 nothing is multiplied by tensor cores.
    (precision == Precision::Bf16 && is_large && !dims.in_features.is_multiple_of(lanes))
        .then(|| dims.in_features.next_multiple_of(lanes))
}

/// Bytes of the copies, of the input alone or of the weight too.
pub(crate) fn bytes(precision: Precision, dims: LinearDims, with_weight: bool) -> usize {
    let rows = match with_weight {
        true => dims.rows.saturating_add(dims.out_features),
        false => dims.rows,
    };
    padded(precision, dims).map_or(0, |row| product(&[rows, row, precision.size()]))
}

impl Queue {
    /// `to = from`, `rows` rows of `dim` that are put `row` apart.
    pub(crate) fn widen_rows(
        &mut self,
        op: &'static str,
        to: DevicePtr,
        from: DevicePtr,
        [rows, dim, row]: [usize; 3],
    ) -> Result<(), Error> {
        let kernel = kernels::WIDEN_ROWS;
        let blocks = rows.div_ceil(kernel.threads as usize / 32).min(BUSY);
        let shape = Shape {
            grid: [small(op, blocks)?, 1, 1],
            block: kernel.threads,
            shared: 0,
        };
        let args = [
            to.into(),
            from.into(),
            small(op, rows)?.into(),
            small(op, dim)?.into(),
            small(op, row)?.into(),
        ];
        let bytes = self.act_bytes(product(&[rows, dim + row]));
        self.launch(kernel, shape, bytes, &args)
    }
}
