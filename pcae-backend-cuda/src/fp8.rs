//! A teacher in fp8: the linear layers of its blocks multiply in e4m3.
//!
//! e4m3 is a floating format, from 2^-9 to 448, and a norm, a softmax average and a GELU leave what lies well inside: activations are not
//! scaled. Weights are, each by the power of two that brings its largest magnitude below 448, found on the device whenever the
//! teacher has changed. That depends on the parameters alone, so a run that is resumed goes on with the same bits.
//!
//! Norms, attention and GELU write what the next layer multiplies in e4m3 instead of bf16 ([`Cuda::block_in_fp8`]): half of what they wrote,
//! and no pass of its own. A layer that is called alone converts its input first, which reads and writes 3 bytes an element once more.
//! Both round to bf16 first, so both have the same bits. Sums, the residual stream, norms, softmax and selection are those of bf16.

use pcae_kernel::backend::{AttentionDims, BlockDims, Linear, LinearDims};
use pcae_kernel::error::{Error as KernelError, product};
use pcae_kernel::layout::{BlockParams, Layout};

use crate::buffers::{Buf, Ids, Params, Scores};
use crate::checks::small;
use crate::driver::{DevicePtr, Memory};
use crate::error::Error;
use crate::gemm::Matmul;
use crate::kernels;
use crate::queue::{Arg, Queue, Shape};
use crate::rows::{BLOCK, BUSY};
use crate::{Cuda, Precision};

/// What widths are multiples of: cuBLASLt wants rows of e4m3 on multiples of 16 bytes (NVIDIA, cuBLAS Library, "Tensor Core Usage"). The
/// number of rows is free where, as here, the first operand is transposed and the second is not.
pub const WIDTH: usize = 16;

/// The first compute capability whose tensor cores take e4m3, Ada's; Hopper's is 9.0.
pub(crate) const CAPABILITY: u32 = 89;

/// The weights of a teacher's blocks in e4m3.
#[derive(Debug)]
pub(crate) struct Weights {
    /// Where each starts among parameters, ascending, and here.
    starts: Vec<(usize, usize)>,
    largest: usize,
    table: Ids,
    bits: Memory,
    maxima: Ids,
    scales: Scores,
}

impl Weights {
    /// Room for those of `layout`.
    pub(crate) fn new(queue: &mut Queue, layout: &Layout) -> Result<Self, Error> {
        const OP: &str = "teacher_params";
        let blocks = layout.encoder.blocks;
        for width in [blocks.dim, blocks.hidden] {
            if !width.is_multiple_of(WIDTH) {
                return Err(Error::Kernel(KernelError::Dimensions {
                    op: OP,
                    expected: "widths of multiples of 16, for a teacher in fp8",
                    found: width,
                }));
            }
        }
        let (mut starts, mut words, mut at, mut largest) = (Vec::new(), Vec::new(), 0, 0);
        for index in 0..blocks.depth {
            // `struct Weight` of `fp8.cu`.
            for Linear { weight, .. } in blocks.block(index).linears() {
                for word in [weight.start, at, weight.len] {
                    words.push(small(OP, word)?);
                }
                starts.push((weight.start, at));
                largest = largest.max(weight.len);
                at += weight.len;
            }
        }
        let table = Ids::new(queue, words.len())?;
        queue.write_u32(table.at(0), &words)?;
        Ok(Self {
            largest,
            table,
            bits: queue.allocate(at)?,
            maxima: Ids::new(queue, starts.len())?,
            scales: Scores::new(queue, starts.len())?,
            starts,
        })
    }

    /// Queues making them from parameters in bf16.
    pub(crate) fn make(&self, queue: &mut Queue, params: DevicePtr) -> Result<(), Error> {
        const OP: &str = "adamw_ema";
        let count = self.starts.len();
        if count == 0 {
            return Ok(());
        }
        // As many blocks in all as keep a device busy; a thread has four vectors under way.
        let each = self.largest.div_ceil(queue.lanes() * 4 * BLOCK as usize);
        let blocks = each.min(BUSY.div_ceil(count));
        let shape = Shape {
            grid: [small(OP, blocks)?, small(OP, count)?, 1],
            block: BLOCK,
            shared: 0,
        };
        let (maxima, table) = (Arg::from(self.maxima.at(0)), Arg::from(self.table.at(0)));
        queue.zero(self.maxima.at(0), count * size_of::<u32>())?;
        queue.launch(
            kernels::WEIGHT_MAXIMA,
            shape,
            self.bits.bytes() * size_of::<u16>(),
            &[maxima, params.into(), table],
        )?;
        let (bits, scales) = (self.bits.at().into(), self.scales.at(0).into());
        let args = [bits, scales, maxima, params.into(), table];
        let bytes = self.bits.bytes() * (size_of::<u16>() + 1);
        queue.launch(kernels::WEIGHTS_TO_E4M3, shape, bytes, &args)
    }

    /// Where a weight lies that starts at `start` among parameters, and its scale.
    pub(crate) fn find(&self, start: usize) -> Option<(DevicePtr, DevicePtr)> {
        let found = self
            .starts
            .binary_search_by_key(&start, |(start, _)| *start);
        let index = found.ok()?;
        let (_, at) = self.starts[index];
        Some((self.bits.at().plus(at), self.scales.at(index)))
    }
}

/// Whether a device has tensor cores for a teacher in fp8, beside a student of this precision.
fn check_device(device: &str, capability: u32, student: Precision) -> Result<(), Error> {
    let refuse = |needed, found| {
        Err(Error::NoFp8 {
            device: device.to_owned(),
            needed,
            found,
        })
    };
    if student != Precision::Bf16 {
        return refuse("a student in bf16", "one in f32".to_owned());
    }
    if capability < CAPABILITY {
        let found = format!("{}.{}", capability / 10, capability % 10);
        return refuse("compute capability 8.9 (Ada, Hopper) or newer", found);
    }
    Ok(())
}

impl Cuda {
    /// The same backend with [`teacher_params`](pcae_kernel::backend::TrainBackend::teacher_params) whose blocks multiply in fp8 (e4m3),
    /// for widths of multiples of 16. Their moving average stays f32, activations stay bf16.
    ///
    /// # Errors
    /// [`Error::NoFp8`] if the activations are not bf16, or the device has no tensor cores for it, or cuBLASLt no product.
    pub fn with_fp8_teacher(mut self) -> Result<Self, Error> {
        let device = self.name();
        check_device(device, self.queue.context.capability, self.precision)?;
        // Said now, and not after minutes of loading.
        if !self.queue.gemm.has_fp8()? {
            return Err(Error::NoFp8 {
                device: device.to_owned(),
                needed: "a cuBLASLt with products of e4m3 (CUDA 12 or newer)",
                found: "none that it offers".to_owned(),
            });
        }
        self.fp8_teacher = true;
        Ok(self)
    }

    /// Whether a teacher's blocks multiply in fp8.
    pub fn has_fp8_teacher(&self) -> bool {
        self.fp8_teacher
    }

    /// [`Backend::block`](pcae_kernel::backend::Backend::block) of a teacher in fp8.
    pub(crate) fn block_in_fp8(
        &mut self,
        dims: BlockDims,
        x: &mut Buf,
        [y, wide]: [&mut Buf; 2],
        params: &Params,
        block: BlockParams,
    ) -> Result<(), Error> {
        const OP: &str = "block";
        let (rows, d, hidden) = (dims.rows(), dims.rows().dim, dims.hidden);
        let (qkv, proj) = (dims.linear(d, 3 * d), dims.linear(d, d));
        let (fc1, fc2) = (dims.linear(d, hidden), dims.linear(hidden, d));
        self.queue.expect(OP, "x", x, rows.len())?;
        self.queue.expect(OP, "y", y, rows.len())?;
        self.queue
            .expect(OP, "wide", wide, qkv.out_len().max(fc1.out_len()))?;

        self.layer_norm_rows(OP, rows, (y, true), None, x, params, block.norm1)?;
        self.fp8_product(OP, qkv, wide.at(0), y.at(0), params, block.qkv, None)?;
        let attn = self.attention_to_e4m3(dims.attention, y, wide)?;
        let add = Some(x.at(0));
        self.fp8_product(OP, proj, x.at(0), attn, params, block.proj, add)?;

        self.layer_norm_rows(OP, rows, (y, true), None, x, params, block.norm2)?;
        self.fp8_product(OP, fc1, wide.at(0), y.at(0), params, block.fc1, None)?;
        // Not in place: blocks of the kernel read what others have not yet.
        let len = fc1.out_len();
        let room = self.queue.workspace(len)?;
        let shape = self.queue.elements(len);
        let args = [room.into(), wide.at(0).into(), (len as u64).into()];
        let bytes = self.queue.act_bytes(len) + len;
        self.queue
            .launch(kernels::GELU_TO_E4M3, shape, bytes, &args)?;
        self.fp8_product(OP, fc2, x.at(0), room, params, block.fc2, add)
    }

    /// Attention's result in e4m3, and where: in `y`, or beside it if the kernel writes no such heads.
    fn attention_to_e4m3(
        &mut self,
        dims: AttentionDims,
        y: &mut Buf,
        qkv: &Buf,
    ) -> Result<DevicePtr, Error> {
        let whole = dims.head_dim.is_multiple_of(self.queue.lanes());
        self.attention_forward("attention", dims, y, None, qkv, whole)?;
        match whole {
            true => Ok(y.at(0)),
            false => self.round_to_e4m3(dims.out_len(), y.at(0)),
        }
    }

    /// Activations in e4m3, in the workspace. Their number is a multiple of 16.
    pub(crate) fn round_to_e4m3(&mut self, len: usize, x: DevicePtr) -> Result<DevicePtr, Error> {
        let room = self.queue.workspace(len)?;
        let shape = self.queue.elements(len);
        let args = [room.into(), x.into(), (len as u64).into()];
        let bytes = self.queue.act_bytes(len) + len;
        self.queue.launch(kernels::TO_E4M3, shape, bytes, &args)?;
        Ok(room)
    }

    /// `out = x @ weight^T + bias (+ add)` with `x` and the layer's weight in e4m3; `out` and `x` are as large as `dims` says.
    pub(crate) fn fp8_product(
        &mut self,
        op: &'static str,
        dims: LinearDims,
        out: DevicePtr,
        x: DevicePtr,
        params: &Params,
        layer: Linear,
        add: Option<DevicePtr>,
    ) -> Result<(), Error> {
        self.queue.expect_layer(op, params, layer, dims)?;
        let Some((weight, scale)) = params.e4m3(layer) else {
            return Err(Error::Kernel(KernelError::Dimensions {
                op,
                expected: "a layer of a block of a teacher in fp8",
                found: layer.weight.start,
            }));
        };
        self.queue.matmul(Matmul {
            m: dims.rows,
            n: dims.out_features,
            k: dims.in_features,
            a: x,
            a_transposed: false,
            a_row: dims.in_features,
            b: weight,
            b_transposed: true,
            b_row: dims.in_features,
            bias: Some(params.product(layer.bias.start)),
            add,
            out,
            out_f32: false,
            scale: Some(scale),
        })
    }
}

/// Bytes of working memory that a layer of a teacher may take, or the GELU before it.
pub(crate) fn workspace(dims: LinearDims) -> usize {
    product(&[dims.rows, dims.in_features])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_without_tensor_cores_for_it_is_refused() {
        for capability in [89, 90, 100, 120] {
            assert_eq!(check_device("name", capability, Precision::Bf16), Ok(()));
        }
        let said = |capability, student| {
            let refused = check_device("A100", capability, student).unwrap_err();
            refused.to_string()
        };
        assert_eq!(
            said(80, Precision::Bf16),
            "a teacher in fp8 on A100: expected compute capability 8.9 (Ada, Hopper) or newer, found 8.0; use --teacher-precision bf16"
        );
        assert!(said(86, Precision::Bf16).contains("found 8.6"));
        assert!(said(90, Precision::F32).contains("a student in bf16"));
    }
}
