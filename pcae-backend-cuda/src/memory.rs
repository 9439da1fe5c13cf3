//! How much memory a task takes on the device, before it takes any.

use pcae_kernel::error::product;
use pcae_kernel::op::Op;
use pcae_kernel::sizing::{Memory, Sizing};

use crate::Precision;
use crate::fp8;
use crate::gemm;
use crate::infer;
use crate::padding;
use crate::queue;

/// What the task that `sizing` has seen takes from the device. The driver's own is not counted: its context, the kernels and the
/// graphs, some hundred megabytes. Working memory is at most as said. `fp8_teacher`: of a backend
/// [with such a teacher](crate::Cuda::with_fp8_teacher).
pub fn memory(sizing: &Sizing, precision: Precision, fp8_teacher: bool) -> Memory {
    let sizes = &sizing.sizes;
    // Parameters lie there in f32 and, for products, in bf16 too.
    let parameter = match precision {
        Precision::F32 => size_of::<f32>(),
        Precision::Bf16 => size_of::<f32>() + precision.size(),
    };
    let words = sizes.ids.saturating_add(sizes.scores);
    let parameters = sizes.params.saturating_add(sizes.frozen);
    Memory {
        activations: product(&[sizes.bufs, precision.size()])
            .saturating_add(product(&[words, size_of::<u32>()])),
        state: product(&[sizes.vectors, size_of::<f32>()])
            .saturating_add(product(&[parameters, parameter]))
            // A byte each.
            .saturating_add(if fp8_teacher {
                sizes.teacher_weights
            } else {
                0
            }),
        scratch: scratch(sizing.ops(), sizes.values, precision, fp8_teacher),
    }
}

/// One workspace, as large as the largest that an operation has asked for, beside what every backend has.
fn scratch(ops: &[Op], values: usize, precision: Precision, fp8_teacher: bool) -> usize {
    /// Groups of rows that are summed each by itself, at most, in whichever kernel of `rows.rs` and `tokens.rs`.
    const GROUPS: usize = 3 * 132;
    /// Blocks of a sum over all elements, at most.
    const BLOCKS: usize = 8 * 132;
    const F32: usize = size_of::<f32>();

    let mut workspace = 0;
    let mut table = 0;
    let mut stages = queue::stages_of_values(values, precision);
    let mut crops = 0;
    for op in ops {
        workspace = workspace.max(match *op {
            Op::LayerNormBackward(dims) => product(&[GROUPS, 3, dims.dim, F32]),
            // The gradient of the bias, or of the one before a GELU.
            Op::LinearParams(dims) => product(&[GROUPS, dims.out_features, F32])
                .max(padding::bytes(precision, dims, false)),
            // Which are the teacher's is not noted; it has more tokens than the student, or nearly as many.
            Op::Linear(dims) => padding::bytes(precision, dims, true).max(if fp8_teacher {
                fp8::workspace(dims)
            } else {
                0
            }),
            Op::LinearInput(dims) => product(&[GROUPS, dims.in_features, F32]),
            Op::Target(dims) => product(&[GROUPS, 3, dims.dim, F32]),
            Op::Loss(dims) => product(&[dims.rows.max(BLOCKS), F32]),
            Op::Vector { .. } => product(&[BLOCKS, F32]),
            Op::PivotedQr(dims) => product(&[dims.batch, dims.tokens, dims.dim, size_of::<f64>()]),
            Op::MeanSimilarity(dims) => infer::score_sums(dims),
            Op::AdamW { elements, .. } => {
                // Five words for each 4096 of them, and where segments begin.
                table = table.max(product(&[elements.div_ceil(4096), 2, 5 * F32]));
                0
            }
            Op::Pixels(dims) => {
                stages = stages.max(queue::stages(dims));
                0
            }
            Op::Crops(dims) => {
                stages = stages.max(queue::stages(dims));
                crops = crops.max(queue::crops(dims));
                0
            }
            // The sums of class and mask tokens have fewer groups than a layer norm's backward of the same width, which comes with
            // them.
            Op::Tokens { .. }
            | Op::LayerNorm(_)
            | Op::Attention(_)
            | Op::AttentionBackward(_)
            | Op::Select { .. }
            | Op::Transfer { .. } => 0,
        });
    }
    workspace
        .saturating_add(table)
        .saturating_add(stages)
        .saturating_add(crops)
        .saturating_add(gemm::WORKSPACE)
        .saturating_add(queue::OWN)
}

#[cfg(test)]
mod tests {
    use super::*;
    use pcae_kernel::backend::LinearDims;

    /// What the GELU before a teacher's layer hands it, a byte an element, and nothing where there is no such teacher.
    #[test]
    fn a_teacher_in_fp8_takes_room_for_its_largest_input() {
        let layer = |in_features, out_features| {
            Op::Linear(LinearDims {
                rows: 1000,
                in_features,
                out_features,
            })
        };
        let ops = [layer(48, 144), layer(192, 48), layer(48, 192)];
        let without = scratch(&ops, 0, Precision::Bf16, false);
        let with = scratch(&ops, 0, Precision::Bf16, true);
        assert_eq!(with - without, 1000 * 192);
    }
}
