//! How much memory a task takes, before it takes any.

use pcae_kernel::backend::{AttentionDims, LinearDims};
use pcae_kernel::error::product;
use pcae_kernel::op::Op;
use pcae_kernel::sizing::{Memory, Role, Sizing};

use crate::attention::Attention;
use crate::cpu::LINE;
use crate::gemm::{Dims, Left, Precision, pairs_len, scratch_len};
use crate::isa::Isa;
use crate::threads::Threads;
use crate::train::{COLUMNS, INNER, PIECE, layer_norm_sums};

/// What the task that `sizing` has seen takes, from a backend with this instruction set, number of threads, and
/// precisions of trained parameters and a teacher's.
pub fn memory(
    sizing: &Sizing,
    isa: Isa,
    threads: usize,
    precisions: (Precision, Precision),
) -> Memory {
    let sizes = &sizing.sizes;
    // Weights in bf16, two to an element, lie beside those in f32, and of frozen ones instead of them.
    let (mut packed, mut gone) = (0_usize, 0_usize);
    for weight in sizing.weights() {
        let precision = match weight.role {
            Role::Trained | Role::Frozen => precisions.0,
            Role::Teacher => precisions.1,
        };
        let (n, inner) = (weight.out_features, weight.in_features);
        if let Precision::Bf16(unit) = precision {
            let pairs = pairs_len(isa, unit, n, inner, weight.role).total();
            packed = packed.saturating_add(pairs);
            if weight.role == Role::Frozen {
                gone = gone.saturating_add(product(&[n, inner]));
            }
        }
    }
    let frozen = sizes.frozen.saturating_sub(gone);
    let parameters = sizes.params.saturating_add(frozen);
    Memory {
        activations: bytes::<f32>(sizes.bufs)
            .saturating_add(bytes::<f32>(sizes.scores))
            .saturating_add(bytes::<u32>(sizes.ids)),
        state: bytes::<f32>(sizes.vectors.saturating_add(parameters))
            .saturating_add(bytes::<f32>(packed)),
        scratch: scratch(sizing.ops(), isa, threads, precisions),
    }
}

const fn bytes<T>(elements: usize) -> usize {
    elements.saturating_mul(size_of::<T>())
}

/// The backend keeps one scratch of each type, as long as the longest that an operation has asked for.
fn scratch(ops: &[Op], isa: Isa, threads: usize, precisions: (Precision, Precision)) -> usize {
    let (student, teacher) = precisions;
    let mut floats = 0;
    let (mut doubles, mut indices) = (0, 0);
    let matmul = |precision, m, n, inner, left| {
        scratch_len(isa, precision, threads, Dims { m, n, inner }, left)
    };
    for op in ops {
        match *op {
            Op::Linear(LinearDims {
                rows,
                in_features,
                out_features,
            }) => {
                // Whose parameters they are is not known: what differs is small.
                for precision in [student, teacher] {
                    floats = floats.max(matmul(
                        precision,
                        rows,
                        out_features,
                        in_features,
                        Left::Rows(()),
                    ));
                }
            }
            Op::LinearInput(LinearDims {
                rows,
                in_features,
                out_features,
            }) => {
                floats = floats.max(matmul(
                    student,
                    rows,
                    in_features,
                    out_features,
                    Left::Rows(()),
                ))
            }
            Op::LinearParams(LinearDims {
                rows,
                in_features,
                out_features,
            }) => {
                // Rows are summed in chunks of `INNER`, of which the last is shorter.
                for inner in [rows.min(INNER), rows % INNER] {
                    floats = floats.max(matmul(
                        student,
                        out_features,
                        in_features,
                        inner,
                        Left::Columns(()),
                    ));
                }
            }
            Op::Attention(dims) => {
                let len = |attention: Attention<'_>| attention.forward_scratch();
                // Of a student, and of a teacher or in inference.
                for precision in [Precision::F32, teacher] {
                    floats = floats.max(attention(isa, threads, precision, dims, len));
                }
            }
            Op::AttentionBackward(dims) => {
                let len = |attention: Attention<'_>| attention.backward_scratch();
                floats = floats.max(attention(isa, threads, Precision::F32, dims, len));
            }
            Op::MeanSimilarity(dims) => {
                doubles = doubles.max(product(&[dims.batch, dims.dim.saturating_add(dims.tokens)]));
            }
            Op::PivotedQr(dims) => {
                let tokens = dims.tokens.saturating_add(1);
                doubles = doubles.max(product(&[dims.batch, tokens, dims.dim]));
            }
            Op::Select { batch, tokens } => indices = indices.max(product(&[batch, tokens])),
            Op::Loss(dims) => doubles = doubles.max(dims.rows),
            Op::Target(dims) => doubles = doubles.max(dims.dim.div_ceil(COLUMNS)),
            Op::Vector { elements } => doubles = doubles.max(elements.div_ceil(PIECE)),
            Op::LayerNormBackward(dims) => floats = floats.max(layer_norm_sums(dims).1),
            Op::LayerNorm(_)
            | Op::Tokens { .. }
            | Op::AdamW { .. }
            | Op::Transfer { .. }
            | Op::Pixels(_)
            | Op::Crops(_) => {}
        }
    }
    bytes::<f32>(floats.saturating_add(LINE))
        .saturating_add(bytes::<f64>(doubles))
        .saturating_add(bytes::<u32>(indices))
}

fn attention(
    isa: Isa,
    threads: usize,
    precision: Precision,
    dims: AttentionDims,
    len: impl Fn(Attention<'_>) -> usize,
) -> usize {
    if dims.out_len() == 0 {
        return 0;
    }
    // Of one thread, times as many.
    threads.saturating_mul(len(Attention::new(
        isa,
        &Threads::one(),
        precision,
        dims,
        &[],
    )))
}
