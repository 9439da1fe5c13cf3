//! Attention: which kernel, of how many blocks, with how much shared memory.

use pcae_kernel::backend::AttentionDims;
use pcae_kernel::error::{Error as KernelError, product};

use crate::buffers::{Buf, Vector};
use crate::checks::small;
use crate::error::Error;
use crate::kernels::{self, Kernel};
use crate::queue::Shape;
use crate::{Cuda, Precision};

/// Rows of a warp.
const ROWS: usize = 16;

/// Warps of a block at most.
const WARPS: usize = 4;

/// Columns in a tile of the f32 kernels.
const TILE: usize = 32;

/// What a block may have on every device since compute capability 8.0: 8.6, 8.9 and 12.0 have least.
const SHARED: usize = 99 * 1024;

/// A third of what a multiprocessor of an H100 has, less what every block costs.
const THIRD: usize = (228 / 3 - 1) * 1024;

/// Kernels for heads up to a width: forward, backward.
const WIDTHS: [(usize, Kernel, Kernel); 5] = [
    (32, kernels::ATTENTION_32, kernels::ATTENTION_BACKWARD_32),
    (64, kernels::ATTENTION_64, kernels::ATTENTION_BACKWARD_64),
    (80, kernels::ATTENTION_80, kernels::ATTENTION_BACKWARD_80),
    (96, kernels::ATTENTION_96, kernels::ATTENTION_BACKWARD_96),
    (128, kernels::ATTENTION_128, kernels::ATTENTION_BACKWARD_128),
];

/// Forward or backward.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Pass {
    Forward,
    Backward,
}

/// How a head's rows and columns are cut. See `attention.cu`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Cut {
    /// Warps of a block.
    warps: usize,
    /// Columns that lie in shared memory at once; all, or two such pieces in turn.
    chunk: usize,
    /// Blocks that share a head's rows.
    splits: usize,
    /// Bytes of shared memory.
    shared: usize,
}

impl Cut {
    /// For `tokens` tokens, at least one, and heads filled up to `width`; `wanted` is how many blocks should share a head's
    /// rows where all columns fit into each.
    fn new(pass: Pass, precision: Precision, width: usize, tokens: usize, wanted: usize) -> Self {
        let tiles = tokens.div_ceil(ROWS);
        // Warps have the same number of tiles where that is possible.
        let warps = tiles.div_ceil(tiles.div_ceil(WARPS));
        let all = tokens.next_multiple_of(columns(precision));
        let of = |chunk: usize, warps: usize| Self {
            warps,
            chunk,
            splits: match chunk >= tokens {
                true => wanted.clamp(1, tiles.div_ceil(warps)),
                false => tiles.div_ceil(warps),
            },
            shared: shared(pass, precision, width, tokens, chunk, warps),
        };
        let whole = of(all, warps);
        if whole.shared <= SHARED {
            return whole;
        }
        let mut smaller = [(64, WARPS, THIRD), (32, WARPS, THIRD), (32, WARPS, SHARED)]
            .into_iter()
            .chain([(32, 2, SHARED), (32, 1, SHARED)])
            .map(|(chunk, warps, limit)| (of(chunk, warps.min(tiles)), limit));
        smaller
            .find(|(cut, limit)| cut.shared <= *limit)
            .map_or(whole, |(cut, _)| cut)
    }
}

/// Columns in a tile.
const fn columns(precision: Precision) -> usize {
    match precision {
        Precision::F32 => TILE,
        Precision::Bf16 => ROWS,
    }
}

/// Bytes of shared memory that a block needs: what the kernels put there, in their order.
fn shared(
    pass: Pass,
    precision: Precision,
    width: usize,
    tokens: usize,
    chunk: usize,
    warps: usize,
) -> usize {
    let halves = if chunk < tokens { 2 } else { 1 };
    let row = width * precision.size();
    let f32_tile = match precision {
        Precision::F32 => ROWS * TILE * size_of::<f32>(),
        Precision::Bf16 => 0,
    };
    match pass {
        Pass::Forward => halves * 2 * chunk * row + warps * (ROWS * row + f32_tile),
        Pass::Backward => {
            let sums = |rows| 2 * rows * size_of::<f32>();
            halves * (2 * chunk * row + sums(chunk))
                + warps * (2 * ROWS * row + sums(ROWS) + 2 * f32_tile)
        }
    }
}

/// The kernel and what it is told, from `tokens` on.
struct Launch {
    kernel: Kernel,
    shape: Shape,
    tokens: u32,
    heads: u32,
    width: u32,
    chunk: u32,
    splits: u32,
    scale: f32,
}

impl Launch {
    fn new(
        op: &'static str,
        pass: Pass,
        precision: Precision,
        multiprocessors: u32,
        dims: AttentionDims,
    ) -> Result<Self, Error> {
        let (width, forward, backward) = WIDTHS
            .into_iter()
            .find(|(width, ..)| dims.head_dim <= *width)
            .ok_or(KernelError::Dimensions {
                op,
                expected: "heads of a width up to 128",
                found: dims.head_dim,
            })?;
        let (kernel, kinds) = match pass {
            Pass::Forward => (forward, 1),
            Pass::Backward => (backward, 2),
        };
        let heads = product(&[dims.batch, dims.num_heads, kinds]);
        // A small batch has fewer heads than the device has multiprocessors, which take some blocks each.
        let cut = Cut::new(
            pass,
            precision,
            width,
            dims.tokens,
            2 * multiprocessors as usize / heads,
        );
        let blocks = product(&[heads, cut.splits]);
        Ok(Self {
            kernel,
            shape: Shape {
                grid: [small(op, blocks)?, 1, 1],
                block: small(op, 32 * cut.warps)?,
                shared: small(op, cut.shared)?,
            },
            tokens: small(op, dims.tokens)?,
            heads: small(op, dims.num_heads)?,
            width: small(op, dims.head_dim)?,
            chunk: small(op, cut.chunk)?,
            splits: small(op, cut.splits)?,
            scale: (1.0 / (dims.head_dim as f64).sqrt()) as f32,
        })
    }
}

impl Cuda {
    /// Attention, saving the log-sum-exp where `lse` is given. `to_e4m3`: `out` is left in e4m3, for heads of whole vectors.
    pub(crate) fn attention_forward(
        &mut self,
        op: &'static str,
        dims: AttentionDims,
        out: &mut Buf,
        lse: Option<&mut Vector>,
        qkv: &Buf,
        to_e4m3: bool,
    ) -> Result<(), Error> {
        self.queue.expect(op, "qkv", qkv, dims.qkv_len())?;
        self.queue.expect(op, "out", out, dims.out_len())?;
        if let Some(lse) = lse.as_deref() {
            self.queue.expect(op, "lse", lse, dims.lse_len())?;
        }
        if dims.out_len() == 0 {
            return Ok(());
        }
        let launch = Launch::new(
            op,
            Pass::Forward,
            self.precision,
            self.queue.context.multiprocessors,
            dims,
        )?;
        let written = dims.out_len() * if to_e4m3 { 1 } else { self.precision.size() };
        self.queue.launch(
            launch.kernel,
            launch.shape,
            self.queue.act_bytes(dims.qkv_len()) + written,
            &[
                out.at(0).into(),
                lse.map(|lse| lse.at(0)).into(),
                qkv.at(0).into(),
                launch.tokens.into(),
                launch.heads.into(),
                launch.width.into(),
                launch.chunk.into(),
                launch.splits.into(),
                launch.scale.into(),
                u32::from(to_e4m3).into(),
            ],
        )
    }

    /// The gradient of `qkv`.
    pub(crate) fn attention_backward(
        &mut self,
        dims: AttentionDims,
        d_qkv: &mut Buf,
        d_out: &Buf,
        qkv: &Buf,
        out: &Buf,
        lse: &Vector,
    ) -> Result<(), Error> {
        const OP: &str = "attention_backward";
        self.queue.expect(OP, "d_qkv", d_qkv, dims.qkv_len())?;
        self.queue.expect(OP, "d_out", d_out, dims.out_len())?;
        self.queue.expect(OP, "qkv", qkv, dims.qkv_len())?;
        self.queue.expect(OP, "out", out, dims.out_len())?;
        self.queue.expect(OP, "lse", lse, dims.lse_len())?;
        if dims.out_len() == 0 {
            return Ok(());
        }
        let launch = Launch::new(
            OP,
            Pass::Backward,
            self.precision,
            self.queue.context.multiprocessors,
            dims,
        )?;
        self.queue.launch(
            launch.kernel,
            launch.shape,
            self.queue.act_bytes(2 * (dims.qkv_len() + dims.out_len())),
            &[
                d_qkv.at(0).into(),
                d_out.at(0).into(),
                qkv.at(0).into(),
                out.at(0).into(),
                lse.at(0).into(),
                launch.tokens.into(),
                launch.heads.into(),
                launch.width.into(),
                launch.chunk.into(),
                launch.splits.into(),
                launch.scale.into(),
            ],
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every cut fits every device, and its blocks cover all rows.
    #[test]
    fn every_number_of_tokens_fits() {
        for pass in [Pass::Forward, Pass::Backward] {
            for precision in [Precision::F32, Precision::Bf16] {
                for (width, ..) in WIDTHS {
                    for tokens in (1..300).chain([577, 1025, 4097, 100_000]) {
                        for wanted in [0, 3, 1000] {
                            let cut = Cut::new(pass, precision, width, tokens, wanted);
                            let name = format!("{pass:?} {precision:?} {width} {tokens}: {cut:?}");
                            assert!(cut.shared <= SHARED, "{name}");
                            assert!((1..=WARPS).contains(&cut.warps), "{name}");
                            assert_eq!(cut.chunk % columns(precision), 0, "{name}");
                            let rounds = tokens.div_ceil(ROWS * cut.warps);
                            match cut.chunk < tokens {
                                true => assert_eq!(cut.splits, rounds, "{name}"),
                                false => assert!((1..=rounds).contains(&cut.splits), "{name}"),
                            }
                        }
                    }
                }
            }
        }
    }
}
