//! The update of a step, in one pass over memory.

use core::ops::Range;

use pcae_kernel::backend::{AdamW, Clip, Segment};
use pcae_kernel::error::expect_len;

use crate::buf::Floats;
use crate::cpu::Cpu;
use crate::error::Error;
use crate::gemm::WeightPairs;
use crate::isa::Isa;
use crate::params::{Params, Trainable, Weight};
use crate::rows::{self, AdamWConstants};
use crate::threads::{Pieces, Threads};
use crate::train::PIECE;

impl Cpu {
    /// `adamw_ema` of [`TrainBackend`](pcae_kernel::backend::TrainBackend), which also packs weights in bf16 anew: some rows at a
    /// time, while what was computed of them is in the cache.
    pub(crate) fn update(
        &mut self,
        student: &mut Params,
        teacher: Option<&mut Params>,
        grads: &mut Floats,
        [exp_avg, exp_avg_sq]: [&mut Floats; 2],
        segments: &[Segment],
        step: &AdamW,
        clip: Option<Clip<'_, Floats>>,
    ) -> Result<(), Error> {
        const OP: &str = "adamw_ema";
        let student = student.trainable(OP)?;
        let teacher = match teacher {
            Some(teacher) => Some(teacher.trainable(OP)?),
            None => None,
        };
        for Segment { span, ema, .. } in segments {
            for (what, len) in [
                ("student", student.values.len()),
                ("grads", grads.len()),
                ("exp_avg", exp_avg.len()),
                ("exp_avg_sq", exp_avg_sq.len()),
            ] {
                expect_len(OP, what, len, span.end())?;
            }
            if let Some(teacher) = &teacher
                && *ema
            {
                expect_len(OP, "teacher", teacher.values.len(), span.end())?;
            }
        }
        let mut factor = 1.0;
        if let Some(clip) = clip {
            expect_len(OP, "norms", clip.norms.len(), clip.at.saturating_add(1))?;
            let norm = f64::from(clip.norms[clip.at]);
            if norm > clip.max_norm {
                factor = clip.max_norm / norm;
            }
        }
        let count = step.step as f64;
        let mut state = State {
            isa: self.isa,
            threads: &self.threads,
            student,
            teacher,
            grads,
            exp_avg,
            exp_avg_sq,
        };
        for segment in segments {
            let lr = step.lr * segment.lr_scale;
            let constants = AdamWConstants {
                beta1: step.beta1,
                beta2: step.beta2,
                eps: step.eps,
                clip: factor,
                decay: lr * segment.weight_decay,
                step: lr / (1.0 - step.beta1.powf(count)),
                unbias2: 1.0 / (1.0 - step.beta2.powf(count)),
                one_minus_momentum: 1.0 - step.momentum,
            };
            state.segment(segment, constants);
        }
        // A caller may cut segments as it likes, and through a weight.
        for params in [Some(&mut state.student), state.teacher.as_mut()] {
            if let Some(Trainable {
                values,
                packed: Some((unit, packed)),
            }) = params
            {
                packed.repack_stale(*unit, values);
            }
        }
        // The kernel has zeroed the gradients of the segments; what lies between them is left.
        let mut at = 0;
        for Segment { span, .. } in segments {
            if span.start > at {
                self.zero_all(&mut grads[at..span.start]);
            }
            at = at.max(span.end());
        }
        self.zero_all(&mut grads[at..]);
        Ok(())
    }

    pub(crate) fn zero_all(&self, x: &mut [f32]) {
        let pieces = x.len().div_ceil(PIECE);
        self.threads
            .for_each(pieces, PIECE, Pieces::new(x, PIECE), |_, x| x.fill(0.0));
    }
}

/// What an update reads and writes.
struct State<'a> {
    isa: Isa,
    threads: &'a Threads,
    student: Trainable<'a>,
    teacher: Option<Trainable<'a>>,
    grads: &'a mut [f32],
    exp_avg: &'a mut [f32],
    exp_avg_sq: &'a mut [f32],
}

impl State<'_> {
    /// The packed weights that a segment is cut by: the student's, if it has some.
    fn weights(&self) -> &[Weight] {
        let mut both = [Some(&self.student), self.teacher.as_ref()].into_iter();
        let packed = both.find_map(|params| params?.packed.as_ref());
        packed.map_or(&[], |(_, packed)| packed.weights())
    }

    /// Updates a segment, weight by weight where they are packed and lie within it.
    fn segment(&mut self, segment: &Segment, constants: AdamWConstants) {
        let (mut at, end) = (segment.span.start, segment.span.end());
        let teacher = self.teacher.as_mut().filter(|_| segment.ema);
        for params in [Some(&mut self.student), teacher].into_iter().flatten() {
            if let Some((_, packed)) = &mut params.packed {
                packed.mark_stale(at..end);
            }
        }
        let first = self.weights().partition_point(|w| w.range().start < at);
        for i in first.. {
            let weights = self.weights();
            let Some(weight) = weights.get(i).copied().filter(|w| w.range().end <= end) else {
                break;
            };
            self.range(at..weight.range().start, None, segment.ema, constants);
            self.range(weight.range(), Some(&weight), segment.ema, constants);
            at = weight.range().end;
        }
        self.range(at..end, None, segment.ema, constants);
    }

    /// Updates these parameters, and the pairs of the weight that they are.
    fn range(
        &mut self,
        range: Range<usize>,
        weight: Option<&Weight>,
        ema: bool,
        constants: AdamWConstants,
    ) {
        fn split<'a>(
            params: &'a mut Trainable<'_>,
            weight: Option<&Weight>,
        ) -> (&'a mut [f32], Option<WeightPairs<'a>>) {
            let pairs = match (&mut params.packed, weight) {
                (Some((unit, packed)), Some(weight)) => packed.pairs(*unit, weight),
                _ => None,
            };
            (&mut *params.values, pairs)
        }

        let isa = self.isa;
        let (student, student_pairs) = split(&mut self.student, weight);
        let (teacher, teacher_pairs) = match self.teacher.as_mut().filter(|_| ema) {
            Some(teacher) => {
                let (values, pairs) = split(teacher, weight);
                (Some(values), pairs)
            }
            None => (None, None),
        };
        // Rows of a weight that are whole panels of both.
        let steps = [&student_pairs, &teacher_pairs].map(|pairs| pairs.as_ref().map(|p| p.step()));
        let rows = match steps {
            [Some(a), Some(b)] if a != b => a * b,
            [a, b] => a.or(b).unwrap_or(1),
        };
        let piece = match weight {
            Some(weight) => rows * weight.inner(),
            None => PIECE,
        };
        let units = range.len().div_ceil(piece.max(1));
        let pieces = |vector| Pieces::new(vector, piece);
        let parts = (
            (
                pieces(&mut student[range.clone()]),
                teacher.map(|teacher| pieces(&mut teacher[range.clone()])),
            ),
            (
                pieces(&mut self.grads[range.clone()]),
                (
                    pieces(&mut self.exp_avg[range.clone()]),
                    pieces(&mut self.exp_avg_sq[range]),
                ),
            ),
        );
        self.threads.for_each(
            units,
            5 * piece,
            parts,
            |unit, ((student, mut teacher), (grads, (exp_avg, exp_avg_sq)))| {
                rows::adamw(
                    isa,
                    student,
                    teacher.as_deref_mut(),
                    grads,
                    exp_avg,
                    exp_avg_sq,
                    constants,
                );
                if let Some(pairs) = &student_pairs {
                    // SAFETY: rows of one unit, which one thread has.
                    unsafe { pairs.pack(unit * rows, student) };
                }
                if let (Some(pairs), Some(teacher)) = (&teacher_pairs, teacher) {
                    // SAFETY: as above.
                    unsafe { pairs.pack(unit * rows, teacher) };
                }
            },
        );
    }
}
