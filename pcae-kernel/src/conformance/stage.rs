//! Makes one call: its arguments, the call, its outputs.

use alloc::string::{String, ToString};
use alloc::vec;
use alloc::vec::Vec;

use super::cases::Op;
use super::{FailureKind, Outcome};
use crate::backend::{Linear, Norm, Span, TrainBackend};
use crate::layout::{Kind, Layout};
use crate::rng::{Purpose, Stream};

/// Makes the arguments of a call and keeps what the outputs held.
pub(super) struct Stage<'a, B: TrainBackend> {
    pub(super) backend: &'a mut B,
    pub(super) layout: &'a Layout,
    /// Number of the argument to spoil.
    pub(super) fault: Option<usize>,
    pub(super) arguments: Vec<&'static str>,
    pub(super) before: Vec<Vec<f32>>,
    pub(super) after: Vec<Vec<f32>>,
    pub(super) error: Option<String>,
    /// Whether outputs are anything: the error came with a read after the call, or in the midst of a block.
    pub(super) is_undefined: bool,
    pub(super) made: u64,
    /// Whether numbers have 8 significant bits, which any format holds.
    pub(super) coarse: bool,
}

/// Whether the backend's activations hold less than an f32. Numbers are coarse for it: what is compared are then its operations,
/// and not how an input was rounded.
pub(super) fn is_narrow<B: TrainBackend>(backend: &mut B) -> Result<bool, FailureKind> {
    let value = 1.0 + 8.0 * f32::EPSILON;
    let mut buf = backend.buf(1).map_err(buffer_error)?;
    backend.write(&mut buf, &[value]).map_err(buffer_error)?;
    let mut held = [0.0];
    backend.read(&mut held, &buf).map_err(buffer_error)?;
    Ok(held != [value])
}

/// Elements of an output beyond those that the call may use.
pub(super) const BEYOND: usize = 3;

/// `x`, or what its first 8 significant bits are.
pub(super) fn held(x: f32, coarse: bool) -> f32 {
    match coarse {
        true => f32::from_bits(x.to_bits() & 0xffff_0000),
        false => x,
    }
}

pub(super) fn buffer_error(error: impl core::error::Error) -> FailureKind {
    FailureKind::Buffer {
        error: error.to_string(),
    }
}

impl<B: TrainBackend> Stage<'_, B> {
    pub(super) fn rng(&mut self) -> Stream {
        self.made += 1;
        Stream::new(1, 0, self.made, Purpose::Init)
    }

    /// Numbers of mean 0 and variance 1.
    pub(super) fn noise(&mut self, len: usize) -> Vec<f32> {
        let mut rng = self.rng();
        let wide = 2.0 * 1.732_050_8;
        let coarse = self.coarse;
        (0..len)
            .map(|_| held((rng.uniform() - 0.5) * wide, coarse))
            .collect()
    }

    /// Whether to spoil the argument that comes now.
    pub(super) fn spoil(&mut self, name: &'static str) -> bool {
        self.arguments.push(name);
        self.fault == Some(self.arguments.len() - 1)
    }

    /// `values` without its last element if this is the argument to spoil.
    pub(super) fn shorten<'v, T>(&mut self, name: &'static str, values: &'v [T]) -> &'v [T] {
        match values.split_last() {
            Some((_, shorter)) if self.spoil(name) => shorter,
            _ => values,
        }
    }

    pub(super) fn buf_of(&mut self, values: &[f32]) -> Result<B::Buf, FailureKind> {
        let mut buf = self.backend.buf(values.len()).map_err(buffer_error)?;
        self.backend.write(&mut buf, values).map_err(buffer_error)?;
        Ok(buf)
    }

    pub(super) fn scores_of(&mut self, values: &[f32]) -> Result<B::Scores, FailureKind> {
        let mut scores = self.backend.scores(values.len()).map_err(buffer_error)?;
        self.backend
            .write_scores(&mut scores, values)
            .map_err(buffer_error)?;
        Ok(scores)
    }

    pub(super) fn vector_of(&mut self, values: &[f32]) -> Result<B::Vector, FailureKind> {
        let mut vector = self.backend.vector(values.len()).map_err(buffer_error)?;
        self.backend
            .write_vector(&mut vector, 0, values)
            .map_err(buffer_error)?;
        Ok(vector)
    }

    pub(super) fn ids_of(&mut self, values: &[u32]) -> Result<B::Ids, FailureKind> {
        let mut ids = self.backend.ids(values.len()).map_err(buffer_error)?;
        self.backend
            .write_ids(&mut ids, values)
            .map_err(buffer_error)?;
        Ok(ids)
    }

    pub(super) fn input_of(
        &mut self,
        name: &'static str,
        values: &[f32],
    ) -> Result<B::Buf, FailureKind> {
        let values = self.shorten(name, values);
        self.buf_of(values)
    }

    pub(super) fn input(&mut self, name: &'static str, len: usize) -> Result<B::Buf, FailureKind> {
        let values = self.noise(len);
        self.input_of(name, &values)
    }

    pub(super) fn vector_input_of(
        &mut self,
        name: &'static str,
        values: &[f32],
    ) -> Result<B::Vector, FailureKind> {
        let values = self.shorten(name, values);
        self.vector_of(values)
    }

    pub(super) fn vector_input(
        &mut self,
        name: &'static str,
        len: usize,
    ) -> Result<B::Vector, FailureKind> {
        let values = self.noise(len);
        self.vector_input_of(name, &values)
    }

    /// What an output of `len` elements holds at first.
    pub(super) fn before(&mut self, name: &'static str, len: usize) -> Vec<f32> {
        let mut values = self.noise(len + BEYOND);
        if len > 0 && self.spoil(name) {
            values.truncate(len - 1);
        }
        self.before.push(values.clone());
        values
    }

    pub(super) fn output(&mut self, name: &'static str, len: usize) -> Result<B::Buf, FailureKind> {
        let values = self.before(name, len);
        self.buf_of(&values)
    }

    pub(super) fn scores_output(
        &mut self,
        name: &'static str,
        len: usize,
    ) -> Result<B::Scores, FailureKind> {
        let values = self.before(name, len);
        self.scores_of(&values)
    }

    pub(super) fn vector_output(
        &mut self,
        name: &'static str,
        len: usize,
    ) -> Result<B::Vector, FailureKind> {
        let values = self.before(name, len);
        self.vector_of(&values)
    }

    /// The gradient of all parameters.
    pub(super) fn grads(&mut self) -> Result<B::Vector, FailureKind> {
        let values = self.noise(self.layout.len());
        self.before.push(values.clone());
        self.vector_of(&values)
    }

    pub(super) fn ids_output(
        &mut self,
        name: &'static str,
        len: usize,
    ) -> Result<B::Ids, FailureKind> {
        let mut values: Vec<u32> = (0..len + BEYOND).map(|i| 1000 + i as u32).collect();
        if len > 0 && self.spoil(name) {
            values.truncate(len - 1);
        }
        self.before
            .push(values.iter().map(|&id| id as f32).collect());
        self.ids_of(&values)
    }

    /// For each of `batch` sequences `count` different ids below `limit`, the largest among them.
    pub(super) fn ids_input(
        &mut self,
        name: &'static str,
        batch: usize,
        count: usize,
        limit: usize,
    ) -> Result<B::Ids, FailureKind> {
        let mut rng = self.rng();
        let mut values = Vec::new();
        for _ in 0..batch {
            let mut ids: Vec<u32> = (0..limit as u32).collect();
            rng.shuffle(&mut ids);
            let last = ids.iter().position(|&id| id as usize + 1 == limit);
            if let Some(last) = last
                && last >= count
                && count > 0
            {
                ids.swap(0, last);
            }
            values.extend(ids.into_iter().take(count));
        }
        if let Some(last) = values.last_mut()
            && self.spoil(name)
        {
            *last = limit as u32;
        }
        let values = self.shorten(name, &values);
        self.ids_of(values)
    }

    pub(super) fn span(&mut self, name: &'static str, span: Span) -> Span {
        self.span_of(name, span, true)
    }

    /// `needed`: whether the last element is.
    pub(super) fn span_of(&mut self, name: &'static str, span: Span, needed: bool) -> Span {
        if needed && self.spoil(name) {
            return Span {
                len: span.len - 1,
                ..span
            };
        }
        if self.spoil(name) {
            return Span {
                start: self.layout.len() - span.len + 1,
                ..span
            };
        }
        span
    }

    pub(super) fn linear(&mut self, layer: Linear) -> Linear {
        Linear {
            weight: self.span("layer.weight", layer.weight),
            bias: self.span("layer.bias", layer.bias),
        }
    }

    pub(super) fn norm(&mut self, norm: Norm) -> Norm {
        Norm {
            weight: self.span("norm.weight", norm.weight),
            bias: self.span("norm.bias", norm.bias),
        }
    }

    /// Parameters around 0, of the size that keeps sums near 1.
    pub(super) fn params_of(&mut self, layout: &Layout) -> Result<B::Params, FailureKind> {
        let mut values = self.noise(layout.len());
        layout.for_each(|tensor| {
            if tensor.kind == Kind::Weight {
                for value in &mut values[tensor.span.start..tensor.span.end()] {
                    *value = held(*value * 0.3, self.coarse);
                }
            }
        });
        let short = &values[..values.len() - 1];
        let taken = [
            self.backend.params(layout, short).is_ok(),
            self.backend.teacher_params(layout, short).is_ok(),
            self.backend.frozen_params(layout, short).is_ok(),
        ];
        if taken.contains(&true) {
            let argument = Some("values");
            return Err(FailureKind::Accepted { argument });
        }
        self.backend.params(layout, &values).map_err(buffer_error)
    }

    pub(super) fn params(&mut self) -> Result<B::Params, FailureKind> {
        self.params_of(self.layout)
    }

    pub(super) fn done(&mut self, result: Result<(), B::Error>) {
        self.error = result.err().map(|error| error.to_string());
    }

    /// Reads once more if the first read reports what a device saw in the call.
    fn reading(
        &mut self,
        mut read: impl FnMut(&mut B) -> Result<(), B::Error>,
    ) -> Result<(), FailureKind> {
        match read(self.backend) {
            Err(error) if self.error.is_none() => {
                self.error = Some(error.to_string());
                self.is_undefined = true;
                read(self.backend).map_err(buffer_error)
            }
            done => done.map_err(buffer_error),
        }
    }

    /// Reads the next output back. Outputs are read in the order in which they were made.
    pub(super) fn read(&mut self, buf: &B::Buf) -> Result<(), FailureKind> {
        let mut values = self.blank();
        self.reading(|backend| backend.read(&mut values, buf))?;
        self.after.push(values);
        Ok(())
    }

    /// [`Stage::read`] of working memory, of which elements from `len` on alone are compared.
    pub(super) fn read_beyond(&mut self, buf: &B::Buf, len: usize) -> Result<(), FailureKind> {
        let at = self.after.len();
        self.read(buf)?;
        for values in [&mut self.before, &mut self.after] {
            if let Some(values) = values.get_mut(at) {
                values.drain(..len.min(values.len()));
            }
        }
        Ok(())
    }

    pub(super) fn read_scores(&mut self, scores: &B::Scores) -> Result<(), FailureKind> {
        let mut values = self.blank();
        self.reading(|backend| backend.read_scores(&mut values, scores))?;
        self.after.push(values);
        Ok(())
    }

    pub(super) fn read_vector(&mut self, vector: &B::Vector) -> Result<(), FailureKind> {
        let mut values = self.blank();
        self.reading(|backend| backend.read_vector(&mut values, vector, 0))?;
        self.after.push(values);
        Ok(())
    }

    pub(super) fn read_ids(&mut self, ids: &B::Ids) -> Result<(), FailureKind> {
        let mut values: Vec<u32> = self.blank().iter().map(|_| 0).collect();
        self.reading(|backend| backend.read_ids(&mut values, ids))?;
        self.after
            .push(values.into_iter().map(|id| id as f32).collect());
        Ok(())
    }

    /// Room for the output that is read next.
    pub(super) fn blank(&self) -> Vec<f32> {
        vec![0.0; self.before.get(self.after.len()).map_or(0, Vec::len)]
    }

    pub(super) fn all_params(&mut self, params: &B::Params) -> Result<Vec<f32>, FailureKind> {
        self.params_values(self.layout, params)
    }

    pub(super) fn params_values(
        &mut self,
        layout: &Layout,
        params: &B::Params,
    ) -> Result<Vec<f32>, FailureKind> {
        let mut values = Vec::new();
        let mut spans = Vec::new();
        layout.for_each(|tensor| spans.push(tensor.span));
        for span in spans {
            let mut tensor = vec![0.0; span.len];
            self.reading(|backend| backend.read_params(&mut tensor, params, span))?;
            values.extend(tensor);
        }
        Ok(values)
    }
}

/// Makes the arguments, calls the operation and reads its outputs back.
pub(super) fn call<B: TrainBackend>(
    backend: &mut B,
    layout: &Layout,
    op: &Op,
    fault: Option<usize>,
    coarse: bool,
) -> Result<Outcome, FailureKind> {
    let mut stage = Stage {
        backend,
        layout,
        fault,
        arguments: Vec::new(),
        before: Vec::new(),
        after: Vec::new(),
        error: None,
        is_undefined: false,
        made: 0,
        coarse,
    };
    stage.call(*op)?;
    Ok(Outcome {
        error: stage.error,
        is_undefined: stage.is_undefined,
        outputs: stage.before.into_iter().zip(stage.after).collect(),
        arguments: stage.arguments,
    })
}
