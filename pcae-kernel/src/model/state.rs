//! Everything that a training run carries from step to step.

use alloc::vec::Vec;

use crate::backend::{AdamW, Clip, Segment, Span, TrainBackend};
use crate::error::{Error, expect_len};
use crate::layout::{Layout, Tensor};

/// Student, teacher, gradients and moments, each one flat vector in the order of the layout.
pub struct TrainState<B: TrainBackend> {
    /// Where each tensor lies.
    pub layout: Layout,
    /// What is trained.
    pub student: B::Params,
    /// The moving average that follows it, laid out by [`Layout::teacher`], if the task has one.
    pub teacher: Option<B::Params>,
    /// Sum of the micro-batches' gradients; zero after an update.
    pub grads: B::Vector,
    /// AdamW's mean gradient.
    pub exp_avg: B::Vector,
    /// AdamW's mean squared gradient.
    pub exp_avg_sq: B::Vector,
    /// See [`Scalars`].
    pub scalars: B::Vector,
    /// Scalars of steps that nobody has read yet, in [`HALVES`].
    recorded: B::Vector,
    segments: Vec<Segment>,
}

/// Steps whose scalars are read together, see [`TrainState::record`].
pub const RECORDS: usize = 16;

/// While those of one half are read, steps leave theirs in the other.
pub const HALVES: usize = 2;

/// The numbers that a step leaves on the device.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Scalars {
    /// Loss, the mean over micro-batches.
    pub loss: f32,
    /// Spread of the targets, see [`TrainBackend::feature_spread`]; 0 where there is no teacher.
    pub spread: f32,
    /// Norm of the gradient before clipping; 0 before the first update.
    pub grad_norm: f32,
}

impl Scalars {
    pub(super) const LOSS: usize = 0;
    pub(super) const SPREAD: usize = 1;
    const GRAD_NORM: usize = 2;
    const COUNT: usize = 3;

    const fn new([loss, spread, grad_norm]: [f32; Self::COUNT]) -> Self {
        Self {
            loss,
            spread,
            grad_norm,
        }
    }
}

impl<B: TrainBackend> TrainState<B> {
    /// A state at step 0: moments zero. With `teacher`, the front of that vector is what follows the student.
    ///
    /// # Shapes
    /// `student: [layout.len()]`, `teacher: [layout.teacher().len()]`.
    ///
    /// # Errors
    /// If a vector is too short or memory is.
    pub fn new(
        backend: &mut B,
        layout: Layout,
        student: &[f32],
        teacher: Option<&[f32]>,
        weight_decay: f64,
    ) -> Result<Self, B::Error> {
        expect_len("TrainState::new", "student", student.len(), layout.len())?;
        let follows = layout.teacher();
        let teacher = match teacher {
            Some(values) => {
                expect_len("TrainState::new", "teacher", values.len(), follows.len())?;
                Some(backend.teacher_params(&follows, values)?)
            }
            None => None,
        };
        let student = backend.params(&layout, student)?;
        Self::with_params(backend, layout, student, teacher, weight_decay)
    }

    /// [`TrainState::new`] of parameters that the backend has already, laid out by `layout` and
    /// [`Layout::teacher`]: what they were made from need not be in memory any more.
    ///
    /// # Errors
    /// If memory is short.
    pub fn with_params(
        backend: &mut B,
        layout: Layout,
        student: B::Params,
        teacher: Option<B::Params>,
        weight_decay: f64,
    ) -> Result<Self, B::Error> {
        let follows = layout.teacher().len();
        let mut segments = Vec::new();
        layout.for_each(|tensor| {
            if tensor.is_trained() {
                segments.push(Segment {
                    span: tensor.span,
                    weight_decay: if tensor.decays() { weight_decay } else { 0.0 },
                    lr_scale: 1.0,
                    ema: tensor.span.end() <= follows,
                });
            }
        });
        Ok(Self {
            student,
            teacher,
            grads: backend.vector(layout.len())?,
            exp_avg: backend.vector(layout.len())?,
            exp_avg_sq: backend.vector(layout.len())?,
            scalars: backend.vector(Scalars::COUNT)?,
            recorded: backend.vector(Scalars::COUNT * RECORDS * HALVES)?,
            segments,
            layout,
        })
    }

    /// Gives each layer its own learning rate: `decay` to the power of the layers above it. The embedding is layer 0, the
    /// blocks are 1 to `depth`, and the norm and all after it `depth + 1` (Clark et al., 2020, as BEiT and MAE count).
    pub fn set_layer_decay(&mut self, decay: f64) {
        let depth = self.layout.vit.depth;
        let mut segments = self.segments.iter_mut();
        self.layout.for_each(|tensor| {
            if tensor.is_trained()
                && let Some(segment) = segments.next()
            {
                let above = depth + 1 - layer(&tensor, self.layout.encoder.norm.weight, depth);
                segment.lr_scale = libm::pow(decay, above as f64);
            }
        });
    }

    /// Applies the summed gradients and sets them to zero; clips their norm to `max_norm` if that is given.
    ///
    /// # Errors
    /// What the backend reports.
    pub fn update(
        &mut self,
        backend: &mut B,
        step: &AdamW,
        max_norm: Option<f64>,
    ) -> Result<(), B::Error> {
        backend.norm(&mut self.scalars, Scalars::GRAD_NORM, &self.grads)?;
        let clip = max_norm.map(|max_norm| Clip {
            norms: &self.scalars,
            at: Scalars::GRAD_NORM,
            max_norm,
        });
        backend.adamw_ema(
            &mut self.student,
            self.teacher.as_mut(),
            &mut self.grads,
            &mut self.exp_avg,
            &mut self.exp_avg_sq,
            &self.segments,
            step,
            clip,
        )
    }

    /// Reads the scalars; on a device, this waits for it.
    ///
    /// # Errors
    /// What the backend reports.
    pub fn scalars(&self, backend: &mut B) -> Result<Scalars, B::Error> {
        let mut values = [0.0; Scalars::COUNT];
        backend.read_vector(&mut values, &self.scalars, 0)?;
        Ok(Scalars::new(values))
    }

    /// Keeps the scalars on the device as number `record` of a half, to be read with those of other steps.
    ///
    /// # Errors
    /// If `record` is not below [`RECORDS`] or `half` not below [`HALVES`].
    pub fn record(&mut self, backend: &mut B, half: usize, record: usize) -> Result<(), B::Error> {
        let at = Self::half(half)?;
        if record >= RECORDS {
            return Err(B::Error::from(Error::IndexOutOfRange {
                op: "record",
                what: "record",
                limit: RECORDS,
                found: record,
            }));
        }
        let span = Span {
            start: 0,
            len: Scalars::COUNT,
        };
        let at = at + record * Scalars::COUNT;
        backend.copy_vector(&mut self.recorded, at, &self.scalars, span)
    }

    /// Starts to read a half, behind the steps so far; nothing may be recorded in it until that is finished.
    ///
    /// # Errors
    /// What the backend reports.
    pub fn start_records(&self, backend: &mut B, half: usize) -> Result<(), B::Error> {
        let len = Scalars::COUNT * RECORDS;
        backend.start_read(&self.recorded, Self::half(half)?, len)
    }

    /// Finishes what [`TrainState::start_records`] has started. Those records mean something that were kept by
    /// [`TrainState::record`].
    ///
    /// # Errors
    /// What the backend reports.
    pub fn finish_records(
        &self,
        backend: &mut B,
        half: usize,
    ) -> Result<[Scalars; RECORDS], B::Error> {
        let mut values = [[0.0; Scalars::COUNT]; RECORDS];
        let at = Self::half(half)?;
        backend.finish_read(values.as_flattened_mut(), &self.recorded, at)?;
        Ok(values.map(Scalars::new))
    }

    /// Where a half begins.
    fn half(half: usize) -> Result<usize, Error> {
        if half < HALVES {
            return Ok(half * RECORDS * Scalars::COUNT);
        }
        Err(Error::IndexOutOfRange {
            op: "record",
            what: "half",
            limit: HALVES,
            found: half,
        })
    }

    /// Sets the scalars to zero before the first micro-batch of a step.
    ///
    /// # Errors
    /// What the backend reports.
    pub fn begin_step(&mut self, backend: &mut B) -> Result<(), B::Error> {
        backend.zero(
            &mut self.scalars,
            Span {
                start: 0,
                len: Scalars::COUNT,
            },
        )
    }
}

/// Number of the layer that a tensor belongs to; the encoder's last norm lies at `norm`.
fn layer(tensor: &Tensor, norm: Span, depth: usize) -> usize {
    match tensor.name.block() {
        Some((block, true)) => block + 1,
        _ if tensor.span.start < norm.start => 0,
        _ => depth + 1,
    }
}

/// For tasks whose layout lacks what they need.
pub(super) fn wrong_layout(op: &'static str) -> Error {
    Error::Dimensions {
        op,
        expected: "the layout of this task",
        found: 0,
    }
}
