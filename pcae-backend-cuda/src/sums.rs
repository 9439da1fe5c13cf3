//! Sums over rows: the gradients of biases.
//!
//! The kernels that make the gradient of a layer's output (the derivative of GELU, a layer norm's) sum it over rows as they go, in the
//! workspace; if the gradients of that layer's parameters are what is queued next, the sums are there and the gradient is not
//! read once more. Any other work in between may change either, and then they are forgotten.
//!
//! Attention's backward does not: its blocks have a head of a sequence each, and the sums of each would be written for every sequence. The
//! gradient of queries, keys and values is read once more instead, 1 % of a step of a ViT-B (derived: 35 MB for each block of 256 pictures).

use pcae_kernel::backend::RowDims;
use pcae_kernel::error::{Error as KernelError, product};

use crate::checks::small;
use crate::driver::DevicePtr;
use crate::error::Error;
use crate::kernels;
use crate::queue::{Arg, Queue, Shape};
use crate::rows::{BLOCK, BUSY, Groups};

/// Sums over groups of rows of a matrix, for `add_column_sums`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ColumnSums {
    /// The matrix.
    pub(crate) of: DevicePtr,
    pub(crate) dims: RowDims,
    /// Of the first group.
    pub(crate) partial: DevicePtr,
    pub(crate) groups: u32,
    /// From one group to the next, in rows of the matrix' width.
    pub(crate) sums: u32,
}

impl ColumnSums {
    /// Bytes of the sums of all groups.
    const fn bytes(&self) -> usize {
        product(&[self.groups as usize, self.dims.dim, size_of::<f32>()])
    }
}

impl Queue {
    /// Groups of rows for kernels that sum over them, 32 vectors of a row a block.
    pub(crate) fn column_groups(
        &self,
        op: &'static str,
        dims: RowDims,
    ) -> Result<(u32, Groups), KernelError> {
        let tiles = dims.dim.div_ceil(32 * self.lanes());
        let groups = Groups::new(dims.rows, (BUSY / tiles).clamp(1, 264), 32, 8);
        Ok((small(op, tiles)?, groups))
    }

    /// `d *= gelu'(x)`, with the sums over rows.
    pub(crate) fn gelu_backward(
        &mut self,
        op: &'static str,
        dims: RowDims,
        d: DevicePtr,
        x: DevicePtr,
    ) -> Result<(), Error> {
        if dims.is_empty() {
            return Ok(());
        }
        let kernel = match dims.dim.is_multiple_of(self.lanes()) {
            true => kernels::GELU_BACKWARD,
            false => kernels::GELU_BACKWARD_ODD,
        };
        let (shape, sums, [rows, dim, each]) = self.room_for_sums(op, dims, d)?;
        self.launch(
            kernel,
            shape,
            self.act_bytes(3 * dims.len()) + sums.bytes(),
            &[sums.partial.into(), d.into(), x.into(), rows, dim, each],
        )?;
        self.remember_sums(sums);
        Ok(())
    }

    /// Where sums over rows of `of` go, and how a kernel is launched that makes them: its shape and last arguments.
    fn room_for_sums(
        &mut self,
        op: &'static str,
        dims: RowDims,
        of: DevicePtr,
    ) -> Result<(Shape, ColumnSums, [Arg; 3]), Error> {
        let (tiles, groups) = self.column_groups(op, dims)?;
        let size = product(&[groups.count as usize, dims.dim, size_of::<f32>()]);
        let sums = ColumnSums {
            of,
            dims,
            partial: self.workspace(size)?,
            groups: groups.count,
            sums: 1,
        };
        let shape = Shape {
            grid: [tiles, groups.count, 1],
            block: BLOCK,
            shared: 0,
        };
        let args = [dims.rows, dims.dim, groups.rows_each];
        let [rows, dim, each] = args.map(|x| small(op, x));
        Ok((shape, sums, [rows?.into(), dim?.into(), each?.into()]))
    }

    /// `to += sum over rows of x`.
    pub(crate) fn add_rows(
        &mut self,
        op: &'static str,
        dims: RowDims,
        to: DevicePtr,
        x: DevicePtr,
    ) -> Result<(), Error> {
        if dims.is_empty() {
            return Ok(());
        }
        let sums = match self.sums_of(x, dims) {
            Some(sums) => sums,
            None => {
                let kernel = match dims.dim.is_multiple_of(self.lanes()) {
                    true => kernels::COLUMN_SUMS,
                    false => kernels::COLUMN_SUMS_ODD,
                };
                let (shape, sums, [rows, dim, each]) = self.room_for_sums(op, dims, x)?;
                let args = [sums.partial.into(), x.into(), rows, dim, each];
                let bytes = self.act_bytes(dims.len()) + sums.bytes();
                self.launch(kernel, shape, bytes, &args)?;
                sums
            }
        };
        let dim = small(op, dims.dim)?;
        let shape = Shape {
            grid: [dim.div_ceil(32), 1, 1],
            block: BLOCK,
            shared: 0,
        };
        self.launch(
            kernels::ADD_COLUMN_SUMS,
            shape,
            sums.bytes() + 2 * dims.dim * size_of::<f32>(),
            &[
                to.into(),
                Arg::NULL,
                sums.partial.into(),
                sums.groups.into(),
                dim.into(),
                sums.sums.into(),
            ],
        )
    }
}
