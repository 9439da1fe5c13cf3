//! Launches of what goes row by row, column by column or element by element. The caller has checked all lengths.

use pcae_kernel::backend::RowDims;
use pcae_kernel::error::{Error as KernelError, product};

use crate::checks::small;
use crate::driver::DevicePtr;
use crate::error::Error;
use crate::kernels::{self, Kernel};
use crate::queue::{Arg, Queue, Shape, UNCOUNTED};
use crate::sums::ColumnSums;

/// Threads of a block of every kernel here that does not say otherwise.
pub(crate) const BLOCK: u32 = 256;
/// Blocks that keep any device busy: eight on each of 132 multiprocessors.
pub(crate) const BUSY: usize = 8 * 132;

/// A kernel that keeps rows of up to `dim` elements in registers.
struct Kept {
    dim: usize,
    /// Threads of a block.
    block: u32,
    /// Warps that share a row, and elements that a thread has of it.
    warps: u32,
    elements: u32,
    kernel: Kernel,
}

impl Kept {
    const fn new(warps: u32, elements: u32, block: u32, kernel: Kernel) -> Self {
        Self {
            dim: (32 * warps * elements) as usize,
            block,
            warps,
            elements,
            kernel,
        }
    }

    /// Rows that a block keeps at a time.
    const fn rows(&self) -> u32 {
        self.block / (32 * self.warps)
    }
}

/// Rows of whole vectors, as their widths and parameters are aligned; then any others.
const LAYER_NORM: [&[Kept]; 2] = [
    &[
        Kept::new(1, 8, 256, kernels::LAYER_NORM_256),
        Kept::new(1, 16, 256, kernels::LAYER_NORM_512),
        Kept::new(1, 24, 256, kernels::LAYER_NORM_768),
        Kept::new(1, 32, 256, kernels::LAYER_NORM_1024),
        Kept::new(2, 24, 256, kernels::LAYER_NORM_1536),
        Kept::new(2, 32, 256, kernels::LAYER_NORM_2048),
        Kept::new(4, 32, 256, kernels::LAYER_NORM_4096),
        WIDEST,
    ],
    &[Kept::new(1, 32, 256, kernels::LAYER_NORM_ODD_1024), WIDEST],
];
const WIDEST: Kept = Kept::new(32, 16, 1024, kernels::LAYER_NORM_ODD_16384);

const LAYER_NORM_BACKWARD: [&[Kept]; 2] = [
    &[
        Kept::new(1, 8, 128, kernels::LAYER_NORM_BACKWARD_256),
        Kept::new(1, 16, 128, kernels::LAYER_NORM_BACKWARD_512),
        Kept::new(1, 24, 128, kernels::LAYER_NORM_BACKWARD_768),
        Kept::new(1, 32, 128, kernels::LAYER_NORM_BACKWARD_1024),
        Kept::new(2, 24, 128, kernels::LAYER_NORM_BACKWARD_1536),
        Kept::new(2, 32, 128, kernels::LAYER_NORM_BACKWARD_2048),
        Kept::new(4, 32, 128, kernels::LAYER_NORM_BACKWARD_4096),
    ],
    &[
        Kept::new(1, 8, 128, kernels::LAYER_NORM_BACKWARD_ODD_256),
        Kept::new(16, 8, 512, kernels::LAYER_NORM_BACKWARD_ODD_4096),
    ],
];

/// The kernel for rows of `dim`.
fn kept(
    op: &'static str,
    kernels: &[&'static [Kept]; 2],
    whole: bool,
    dim: usize,
) -> Result<&'static Kept, KernelError> {
    let kernels = kernels[usize::from(!whole)];
    let fits = |kept: &&Kept| dim <= kept.dim;
    kernels.iter().find(fits).ok_or(KernelError::Dimensions {
        op,
        expected: match kernels.last() {
            Some(Kept { dim: 4096, .. }) => "rows of at most 4096 elements",
            _ => "rows of at most 16384 elements",
        },
        found: dim,
    })
}

fn line(blocks: u32) -> Shape {
    Shape {
        grid: [blocks, 1, 1],
        block: BLOCK,
        shared: 0,
    }
}

/// Element `at` of the f32 that start here.
fn float(at: DevicePtr, index: usize) -> DevicePtr {
    at.plus(index * size_of::<f32>())
}

/// How rows are cut into groups that are summed each by itself. It depends on the sizes alone, and so do the bits of the sum.
pub(crate) struct Groups {
    pub(crate) rows_each: usize,
    pub(crate) count: u32,
}

impl Groups {
    /// At most `most` groups of at least `least` rows, of a multiple of `turn`.
    pub(crate) fn new(rows: usize, most: usize, least: usize, turn: usize) -> Self {
        let rows_each = rows.div_ceil(most).max(least).next_multiple_of(turn);
        // At most as many as asked for.
        let count = rows.div_ceil(rows_each) as u32;
        Self { rows_each, count }
    }
}

/// Where gradients of a norm's weight and bias go, or the parameters themselves come from.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Affine {
    pub(crate) weight: DevicePtr,
    pub(crate) bias: DevicePtr,
}

impl Affine {
    /// Whether rows of them can be read as vectors.
    fn is_aligned(self) -> bool {
        (self.weight.0 | self.bias.0).is_multiple_of(16)
    }
}

impl Queue {
    /// Elements of 16 bytes.
    pub(crate) fn lanes(&self) -> usize {
        16 / self.precision.size()
    }

    /// Blocks for a kernel that goes through `len` elements, 4 vectors a thread.
    pub(crate) fn elements(&self, len: usize) -> Shape {
        let blocks = len.div_ceil(self.lanes() * 4 * BLOCK as usize);
        line(blocks.min(i32::MAX as usize) as u32)
    }

    /// `out[i] = (x[i] - mean) * rstd * weight + bias`, and `stats[i] = (mean, rstd)`; without parameters standardised by the
    /// unbiased variance. `to_e4m3`: `out` is left in e4m3.
    pub(crate) fn layer_norm(
        &mut self,
        op: &'static str,
        dims: RowDims,
        (out, to_e4m3): (DevicePtr, bool),
        stats: Option<DevicePtr>,
        x: DevicePtr,
        affine: Option<Affine>,
    ) -> Result<(), Error> {
        if dims.is_empty() {
            return Ok(());
        }
        let whole = dims.dim.is_multiple_of(self.lanes())
            && affine.is_none_or(|affine| affine.is_aligned());
        let kept = kept(op, &LAYER_NORM, whole, dims.dim)?;
        let rows = small(op, dims.rows)?;
        let shape = Shape {
            grid: [rows.div_ceil(kept.rows()), 1, 1],
            block: kept.block,
            shared: 0,
        };
        let each = self.precision.size() + if to_e4m3 { 1 } else { self.precision.size() };
        self.launch(
            kept.kernel,
            shape,
            dims.len() * each,
            &[
                out.into(),
                stats.into(),
                x.into(),
                affine.map(|affine| affine.weight).into(),
                affine.map(|affine| affine.bias).into(),
                rows.into(),
                small(op, dims.dim)?.into(),
                u32::from(to_e4m3).into(),
            ],
        )
    }

    /// Gradients of a layer norm, `d_x` added to where `add`; those of the parameters always.
    pub(crate) fn layer_norm_backward(
        &mut self,
        op: &'static str,
        dims: RowDims,
        (d_x, add): (DevicePtr, bool),
        d_affine: Affine,
        [d_y, x, stats]: [DevicePtr; 3],
        weight: DevicePtr,
    ) -> Result<(), Error> {
        if dims.is_empty() {
            return Ok(());
        }
        let whole = dims.dim.is_multiple_of(self.lanes()) && weight.0.is_multiple_of(16);
        let kept = kept(op, &LAYER_NORM_BACKWARD, whole, dims.dim)?;
        let (rows, dim) = (small(op, dims.rows)?, small(op, dims.dim)?);
        // Three blocks on each of 132 multiprocessors, which is how many fit beside each other.
        let turn = kept.rows() as usize;
        let groups = Groups::new(dims.rows, 3 * 132, 2 * turn, turn);
        let sums = product(&[groups.count as usize, dims.dim, size_of::<f32>()]);
        let partial = self.workspace(sums.saturating_mul(3))?;
        let shape = Shape {
            grid: [groups.count, 1, 1],
            block: kept.block,
            // Three sums for each element of half of the threads.
            shared: match kept.rows() {
                1 => 0,
                _ => kept.block / 2 * kept.elements * 3 * size_of::<f32>() as u32,
            },
        };
        self.launch(
            kept.kernel,
            shape,
            self.act_bytes((3 + usize::from(add)) * dims.len()) + 3 * sums,
            &[
                d_x.into(),
                partial.into(),
                d_y.into(),
                x.into(),
                stats.into(),
                weight.into(),
                rows.into(),
                dim.into(),
                small(op, groups.rows_each)?.into(),
                u32::from(add).into(),
            ],
        )?;
        let shape = Shape {
            grid: [dim.div_ceil(32), 2, 1],
            block: BLOCK,
            shared: 0,
        };
        self.launch(
            kernels::ADD_COLUMN_SUMS,
            shape,
            2 * (sums + 2 * dims.dim * size_of::<f32>()),
            &[
                d_affine.weight.into(),
                d_affine.bias.into(),
                partial.into(),
                groups.count.into(),
                dim.into(),
                3_u32.into(),
            ],
        )?;
        self.remember_sums(ColumnSums {
            of: d_x,
            dims,
            partial: float(partial, 2 * dims.dim),
            groups: groups.count,
            sums: 3,
        });
        Ok(())
    }

    /// `out = mean over columns of the standard deviation of x`.
    pub(crate) fn spread(
        &mut self,
        op: &'static str,
        dims: RowDims,
        out: DevicePtr,
        x: DevicePtr,
    ) -> Result<(), Error> {
        let (tiles, groups) = self.column_groups(op, dims)?;
        let (rows, dim) = (small(op, dims.rows)?, small(op, dims.dim)?);
        let moments = product(&[groups.count as usize, 2, dims.dim]);
        let sums = moments.saturating_mul(size_of::<f32>());
        let blocks = dim.div_ceil(32);
        let partial = self.workspace(
            (moments.saturating_add(blocks as usize)).saturating_mul(size_of::<f32>()),
        )?;
        let spreads = float(partial, moments);
        let shape = Shape {
            grid: [tiles, groups.count, 1],
            block: BLOCK,
            shared: 0,
        };
        self.launch(
            kernels::COLUMN_MOMENTS,
            shape,
            self.act_bytes(dims.len()) + sums,
            &[
                partial.into(),
                x.into(),
                rows.into(),
                dim.into(),
                small(op, groups.rows_each)?.into(),
            ],
        )?;
        self.launch(
            kernels::COLUMN_SPREADS,
            line(blocks),
            sums,
            &[
                spreads.into(),
                partial.into(),
                groups.count.into(),
                rows.into(),
                dim.into(),
            ],
        )?;
        let sum = Sum {
            factor: 1.0 / dims.dim as f64,
            ..Sum::default()
        };
        self.finish(sum, out, spreads, blocks)
    }

    /// `out = gelu(x)`
    pub(crate) fn gelu(&mut self, len: usize, out: DevicePtr, x: DevicePtr) -> Result<(), Error> {
        let args = [out.into(), x.into(), Arg::from(len as u64)];
        let bytes = self.act_bytes(2 * len);
        self.launch(kernels::GELU_OF, self.elements(len), bytes, &args)
    }

    /// `out = scale * x`, a factor for each `share` elements.
    pub(crate) fn scale(
        &mut self,
        len: usize,
        out: DevicePtr,
        x: DevicePtr,
        (scale, share): (DevicePtr, usize),
    ) -> Result<(), Error> {
        let args = [
            out.into(),
            x.into(),
            scale.into(),
            Arg::from(len as u64),
            Arg::from(share as u64),
        ];
        let bytes = self.act_bytes(2 * len);
        self.launch(kernels::SCALE_ROWS, self.elements(len), bytes, &args)
    }

    /// `out = residual + scale * out`, a factor for each `share` elements.
    pub(crate) fn add_scaled(
        &mut self,
        len: usize,
        out: DevicePtr,
        residual: DevicePtr,
        (scale, share): (DevicePtr, usize),
    ) -> Result<(), Error> {
        let args = [
            out.into(),
            residual.into(),
            scale.into(),
            Arg::from(len as u64),
            Arg::from(share as u64),
        ];
        let bytes = self.act_bytes(3 * len);
        self.launch(kernels::ADD_SCALED_ROWS, self.elements(len), bytes, &args)
    }

    /// See [`pcae_kernel::backend::TrainBackend::cosine_loss`]. `[d_pred, pred, target]`
    pub(crate) fn cosine_loss(
        &mut self,
        op: &'static str,
        dims: RowDims,
        [d_pred, pred, target]: [DevicePtr; 3],
        loss: DevicePtr,
        scale: f64,
    ) -> Result<(), Error> {
        let (rows, dim) = (small(op, dims.rows)?, small(op, dims.dim)?);
        let cosines = self.workspace(product(&[dims.rows, size_of::<f32>()]))?;
        let kernel = match dims.dim.is_multiple_of(self.lanes()) {
            true => kernels::COSINE_LOSS,
            false => kernels::COSINE_LOSS_ODD,
        };
        let factor = -scale / dims.rows as f64;
        self.launch(
            kernel,
            line(rows.div_ceil(BLOCK / 32)),
            self.act_bytes(3 * dims.len()),
            &[
                d_pred.into(),
                cosines.into(),
                pred.into(),
                target.into(),
                rows.into(),
                dim.into(),
                Arg::from(factor as f32),
            ],
        )?;
        let sum = Sum {
            keep: true,
            offset: scale,
            factor,
            ..Sum::default()
        };
        self.finish(sum, loss, cosines, rows)
    }

    /// See [`pcae_kernel::backend::TrainBackend::mse_loss`]. `[d_pred, pred, target]`
    pub(crate) fn mse_loss(
        &mut self,
        dims: RowDims,
        [d_pred, pred, target]: [DevicePtr; 3],
        loss: DevicePtr,
        scale: f64,
    ) -> Result<(), Error> {
        let blocks = self.sums(dims.len() / self.lanes());
        let squares = self.workspace(blocks as usize * size_of::<f32>())?;
        let factor = scale / dims.len() as f64;
        self.launch(
            kernels::MSE_LOSS,
            line(blocks),
            self.act_bytes(3 * dims.len()),
            &[
                d_pred.into(),
                squares.into(),
                pred.into(),
                target.into(),
                Arg::from(dims.len() as u64),
                Arg::from((2.0 * factor) as f32),
            ],
        )?;
        let sum = Sum {
            keep: true,
            factor,
            ..Sum::default()
        };
        self.finish(sum, loss, squares, blocks)
    }

    /// See [`pcae_kernel::backend::TrainBackend::cross_entropy`]. `[d_logits, logits, target]`
    pub(crate) fn cross_entropy(
        &mut self,
        op: &'static str,
        dims: RowDims,
        [d_logits, logits, target]: [DevicePtr; 3],
        loss: DevicePtr,
        scale: f64,
    ) -> Result<(), Error> {
        let rows = small(op, dims.rows)?;
        let losses = self.workspace(product(&[dims.rows, size_of::<f32>()]))?;
        let factor = scale / dims.rows as f64;
        // A vector for each thread, where there are few classes.
        let threads = small(op, dims.dim.div_ceil(self.lanes()))?;
        let shape = Shape {
            grid: [rows, 1, 1],
            block: threads.clamp(1, BLOCK).next_multiple_of(32),
            shared: 0,
        };
        self.launch(
            kernels::CROSS_ENTROPY,
            shape,
            self.act_bytes(3 * dims.len()),
            &[
                d_logits.into(),
                losses.into(),
                logits.into(),
                target.into(),
                small(op, dims.dim)?.into(),
                Arg::from(factor as f32),
            ],
        )?;
        let sum = Sum {
            keep: true,
            factor,
            ..Sum::default()
        };
        self.finish(sum, loss, losses, rows)
    }

    /// `out = sqrt(sum of x[i]^2)` of `len` f32.
    pub(crate) fn norm(&mut self, len: usize, out: DevicePtr, x: DevicePtr) -> Result<(), Error> {
        let blocks = self.sums(len / 4);
        let squares = self.workspace(blocks as usize * size_of::<f32>())?;
        let args = [squares.into(), x.into(), Arg::from(len as u64)];
        let bytes = len * size_of::<f32>();
        self.launch(kernels::SUM_SQUARES, line(blocks), bytes, &args)?;
        let sum = Sum {
            factor: 1.0,
            root: true,
            ..Sum::default()
        };
        self.finish(sum, out, squares, blocks)
    }

    /// Blocks that sum `vectors` of 16 bytes, each to one number.
    fn sums(&self, vectors: usize) -> u32 {
        vectors.div_ceil(4 * BLOCK as usize).clamp(1, BUSY) as u32
    }

    /// See [`Sum`].
    fn finish(
        &mut self,
        sum: Sum,
        out: DevicePtr,
        values: DevicePtr,
        count: u32,
    ) -> Result<(), Error> {
        let shape = Shape {
            grid: [1, 1, 1],
            block: 1024,
            shared: 0,
        };
        self.launch(
            kernels::FINISH_SUM,
            shape,
            // One block, and one sum after the other.
            UNCOUNTED,
            &[
                out.into(),
                values.into(),
                count.into(),
                Arg::from(if sum.keep { 1.0f32 } else { 0.0 }),
                Arg::from(sum.offset.to_bits()),
                Arg::from(sum.factor.to_bits()),
                u32::from(sum.root).into(),
            ],
        )
    }
}

/// `out (=, +=) offset + factor * sum of values`, or the root of that.
#[derive(Clone, Copy, Debug, Default)]
struct Sum {
    /// Added to what is there.
    keep: bool,
    offset: f64,
    factor: f64,
    root: bool,
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every row is in one group, and none is empty.
    #[test]
    fn groups_cover_the_rows() {
        for turn in [1, 2, 4, 8] {
            for most in [1, 3, 264] {
                for rows in (1..300).chain([9216, 1_000_003]) {
                    let groups = Groups::new(rows, most, 2 * turn, turn);
                    let count = groups.count as usize;
                    assert!(
                        count * groups.rows_each >= rows && (count - 1) * groups.rows_each < rows
                    );
                    assert!(count <= most && groups.rows_each.is_multiple_of(turn));
                }
            }
        }
    }

    /// The narrowest kernel that holds a row, and an error beyond the widest.
    #[test]
    fn kernels_hold_their_rows() {
        for (kernels, widest) in [(&LAYER_NORM, 16384), (&LAYER_NORM_BACKWARD, 4096)] {
            for whole in [false, true] {
                for dim in [1, 256, 257, 768, 1025, 1280, 4096] {
                    let kept = kept("op", kernels, whole, dim).unwrap();
                    assert!(dim <= kept.dim && kept.block == kept.rows() * 32 * kept.warps);
                    for narrower in kernels[usize::from(!whole)] {
                        assert!(narrower.dim >= kept.dim || narrower.dim < dim);
                    }
                }
                assert!(kept("op", kernels, whole, widest).is_ok());
                assert_eq!(
                    kept("op", kernels, whole, widest + 1).err(),
                    Some(KernelError::Dimensions {
                        op: "op",
                        expected: if widest == 4096 {
                            "rows of at most 4096 elements"
                        } else {
                            "rows of at most 16384 elements"
                        },
                        found: widest + 1,
                    })
                );
            }
        }
    }
}
