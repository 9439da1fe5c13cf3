//! AdamW over all parameters at once: what of them is treated how.

use pcae_kernel::backend::{AdamW, Segment};
use pcae_kernel::error::Error as KernelError;
use pcae_kernel::op::Op;

use crate::Cuda;
use crate::buffers::{Buffer, Ids, Params, Vector};
use crate::bytes::bytes;
use crate::checks::small;
use crate::driver::DevicePtr;
use crate::error::Error;
use crate::kernels;
use crate::queue::{Arg, Queue, Shape};

/// Parameters of a block of the kernel.
const PIECE: usize = 4096;

/// Words of a piece: the kernel's `struct Piece`.
const WORDS: usize = 5;

/// Bits of a piece's flags.
const TRAINED: u32 = 1;
const FOLLOWED: u32 = 2;

/// All gradients, cut so that a piece is treated alike: in device memory, made when segments first come.
#[derive(Debug)]
pub(crate) struct Pieces {
    segments: Vec<Segment>,
    len: usize,
    table: Ids,
    count: u32,
}

impl Pieces {
    fn new(queue: &mut Queue, segments: &[Segment], len: usize) -> Result<Self, Error> {
        let words = table("adamw_ema", segments, len)?;
        let table = Ids::new(queue, words.len())?;
        queue.write_u32(table.at(0), &words)?;
        Ok(Self {
            segments: segments.to_vec(),
            len,
            table,
            count: small("adamw_ema", words.len() / WORDS)?,
        })
    }

    fn are_of(&self, segments: &[Segment], len: usize) -> bool {
        self.len == len && self.segments == segments
    }
}

/// Words of the pieces of `len` gradients.
fn table(op: &'static str, segments: &[Segment], len: usize) -> Result<Vec<u32>, KernelError> {
    small(op, len)?;
    let mut sorted: Vec<&Segment> = segments.iter().collect();
    sorted.sort_by_key(|segment| segment.span.start);
    let mut words = Vec::new();
    let mut add = |start: usize, end: usize, weight_decay: f64, lr_scale: f64, flags: u32| {
        let mut at = start;
        while at < end {
            // At multiples of a piece, so that whole vectors are.
            let next = end.min((at / PIECE + 1) * PIECE);
            words.extend([
                at as u32,
                (next - at) as u32,
                (weight_decay as f32).to_bits(),
                (lr_scale as f32).to_bits(),
                flags,
            ]);
            at = next;
        }
    };
    let mut at = 0;
    for segment in sorted {
        let (start, end) = (segment.span.start, segment.span.end());
        add(at, start, 0.0, 0.0, 0);
        let flags = TRAINED | if segment.ema { FOLLOWED } else { 0 };
        add(start, end, segment.weight_decay, segment.lr_scale, flags);
        at = at.max(end);
    }
    add(at, len, 0.0, 0.0, 0);
    Ok(words)
}

impl Cuda {
    /// See [`pcae_kernel::backend::TrainBackend::adamw_ema`]; `clip` is where the norm is, and its bound.
    pub(crate) fn adamw(
        &mut self,
        student: &Params,
        teacher: Option<&Params>,
        [grads, exp_avg, exp_avg_sq]: [&Vector; 3],
        segments: &[Segment],
        step: &AdamW,
        clip: Option<(DevicePtr, f64)>,
    ) -> Result<(), Error> {
        let queue = &mut self.queue;
        let pieces = match &mut self.pieces {
            Some(pieces) if pieces.are_of(segments, grads.len()) => pieces,
            pieces => pieces.insert(Pieces::new(queue, segments, grads.len())?),
        };
        let (table, count) = (pieces.table.at(0), pieces.count);
        let steps = step.step as f64;
        let changing = queue.changing(&[
            step.lr as f32,
            (step.lr / (1.0 - step.beta1.powf(steps))) as f32,
            (1.0 / (1.0 - step.beta2.powf(steps))) as f32,
            (1.0 - step.momentum) as f32,
        ])?;
        let float = |x: f64| Arg::from(x as f32);
        let shape = Shape {
            grid: [count, 1, 1],
            block: 256,
            shared: 0,
        };
        queue.launch(
            kernels::ADAMW_EMA,
            shape,
            bytes(&Op::adamw(segments, teacher.is_some()), self.precision) as usize,
            &[
                student.at(0).into(),
                student.half(0).into(),
                teacher.map(|teacher| teacher.at(0)).into(),
                teacher.and_then(|teacher| teacher.half(0)).into(),
                grads.at(0).into(),
                exp_avg.at(0).into(),
                exp_avg_sq.at(0).into(),
                table.into(),
                changing.into(),
                clip.map(|(norm, _)| norm).into(),
                float(clip.map_or(0.0, |(_, max_norm)| max_norm)),
                float(step.beta1),
                float(1.0 - step.beta1),
                float(step.beta2),
                float(1.0 - step.beta2),
                float(step.eps),
            ],
        )?;
        if let Some(teacher) = teacher {
            teacher.renew_e4m3(queue)?;
        }
        // The end of a step: what was noted so far becomes one graph.
        queue.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pcae_kernel::backend::Span;

    /// Unsorted segments of any alignment: every gradient lies in one piece, with the constants of its segment.
    #[test]
    fn pieces_cover_all_gradients_once() {
        let segment = |start, len, ema| Segment {
            span: Span { start, len },
            weight_decay: start as f64,
            lr_scale: len as f64,
            ema,
        };
        let segments = [
            segment(9000, 11, false),
            segment(3, 8190, true),
            segment(8193, 1, false),
            segment(8500, 0, true),
        ];
        let len = 9500;
        let mut owner = vec![None; len];
        for piece in table("op", &segments, len).unwrap().chunks_exact(WORDS) {
            let (start, count) = (piece[0] as usize, piece[1] as usize);
            assert!(count > 0 && start / PIECE == (start + count - 1) / PIECE);
            for owner in &mut owner[start..start + count] {
                assert_eq!(*owner, None);
                *owner = Some((f32::from_bits(piece[2]), f32::from_bits(piece[3]), piece[4]));
            }
        }
        for (at, owner) in owner.into_iter().enumerate() {
            let of = |s: &&Segment| (s.span.start..s.span.end()).contains(&at);
            let want = match segments.iter().find(of) {
                Some(s) => (
                    s.weight_decay as f32,
                    s.lr_scale as f32,
                    if s.ema { TRAINED | FOLLOWED } else { TRAINED },
                ),
                None => (0.0, 0.0, 0),
            };
            assert_eq!(owner, Some(want), "{at}");
        }
    }
}
