//! What operations move, to hold a kernel's speed against that of a copy.

use pcae_kernel::op::Op;

use crate::Precision;

/// Bytes that cross the bus of the device's memory at least, each operand once: activations in `precision`, gradients, moments
/// and scores in f32, parameters in f32 and in the bf16 that products read.
///
/// A gradient of layer norm counts as stored; where it is added there is a third more. What kernels hand to each other
/// (sums of groups of rows), statistics, indices and vectors of the width are left out: they are small beside it.
pub fn bytes(op: &Op, precision: Precision) -> u64 {
    let (act, float) = (precision.size() as u64, size_of::<f32>() as u64);
    let elements = op.elements();
    match op {
        Op::LinearParams(dims) => {
            let d_weight = 2 * dims.weight_len() as u64;
            (elements - d_weight) * act + d_weight * float
        }
        Op::Linear(_)
        | Op::LinearInput(_)
        | Op::Attention(_)
        | Op::AttentionBackward(_)
        | Op::LayerNorm(_)
        | Op::LayerNormBackward(_)
        | Op::Tokens { .. }
        | Op::MeanSimilarity(_)
        | Op::PivotedQr(_)
        | Op::Loss(_)
        | Op::Target(_) => elements * act,
        Op::Select { .. } | Op::Vector { .. } => elements * float,
        Op::AdamW {
            elements: trained,
            followed,
        } => {
            let copies = match precision {
                Precision::F32 => 0,
                Precision::Bf16 => (*trained + *followed) as u64 * act,
            };
            elements * float + copies
        }
        // They arrive, are read, and become values.
        Op::Pixels(dims) => dims.len() as u64 * (2 + act),
        // Of whatever size they arrive, pixels are written, read again, and become values.
        Op::Crops(dims) => dims.len() as u64 * (2 + act),
        // On the host's side it is no bus of the device's.
        Op::Transfer { elements } => *elements as u64 * act,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pcae_kernel::backend::{LinearDims, RowDims};

    #[test]
    fn bytes_are_those_of_the_kernels_comments() {
        let rows = RowDims { rows: 5, dim: 7 };
        let adamw = Op::AdamW {
            elements: 100,
            followed: 100,
        };
        let linear = LinearDims {
            rows: 3,
            in_features: 5,
            out_features: 7,
        };
        for (op, f32, bf16) in [
            (Op::LayerNorm(rows), 2 * 35 * 4, 2 * 35 * 2),
            (Op::LayerNormBackward(rows), 3 * 35 * 4, 3 * 35 * 2),
            (Op::Loss(rows), 3 * 35 * 4, 3 * 35 * 2),
            (Op::Vector { elements: 9 }, 36, 36),
            (adamw, 4000, 4400),
            // Two operands, and a gradient that is read and written.
            (
                Op::LinearParams(linear),
                (15 + 21) * 4 + 2 * 35 * 4,
                (15 + 21) * 2 + 2 * 35 * 4,
            ),
        ] {
            assert_eq!(bytes(&op, Precision::F32), f32, "{op:?}");
            assert_eq!(bytes(&op, Precision::Bf16), bf16, "{op:?}");
        }
    }
}
