//! The sheet of a step of pre-training.

use std::path::Path;

use pcae_kernel::backend::TrainBackend;
use pcae_kernel::config::{Criterion, PretrainConfig, Reduction, Target};
use pcae_kernel::layout::Layout;
use pcae_kernel::model::{CriterionScorer, Pretrainer, TrainState};
use pcae_kernel::rng::{Purpose, Stream};
use pcae_kernel::schedule::random_masking;

use super::canvas::Canvas;
use super::{Named, Recorder, input};
use crate::backends::Job;
use crate::checkpoint::exchange::{self, Encoder, Hints, Preprocessing};
use crate::error::Error;
use crate::report::sheet::{Cell, Row, Sheet};
use crate::settings::Settings;

/// The epsilon of the standardisation of pixels.
const STANDARDISE_EPS: f32 = 1e-6;

pub(super) struct Step<'a> {
    pub(super) source: &'a Path,
    pub(super) encoder: &'a Encoder,
    pub(super) settings: Option<&'a Settings>,
    pub(super) preprocessing: &'a Preprocessing,
    pub(super) pictures: &'a [Named],
    pub(super) seed: u64,
}

/// A task and all of its parameters.
struct Parts {
    task: PretrainConfig,
    student: Vec<f32>,
    teacher: Option<Vec<f32>>,
}

impl Step<'_> {
    fn parts(&self) -> Result<Parts, Error> {
        let missing = |what: &str| Error::Checkpoint {
            path: self.encoder.path.clone(),
            reason: format!(
                "expected {what} for --masked, found none; give a run of `pcae pretrain`"
            ),
        };
        let settings = self
            .settings
            .ok_or_else(|| missing("the settings of a run"))?;
        let decoder = self
            .encoder
            .decoder
            .as_ref()
            .ok_or_else(|| missing("a decoder"))?;
        let task = PretrainConfig {
            vit: self.encoder.vit,
            decoder: decoder.config,
            ..settings.task()?
        };
        task.check()?;
        if decoder.target_dim != task.target_dim() {
            return Err(missing("a decoder of the method that its settings name"));
        }
        let student = [&self.encoder.values[..], &decoder.values].concat();
        let teacher = match task.target {
            Target::Teacher(_) => {
                let hints = Hints {
                    prefix: Some("teacher.".to_owned()),
                    num_heads: Some(task.vit.num_heads),
                    ..Hints::default()
                };
                Some(exchange::read(&self.encoder.path, &hints)?.values)
            }
            Target::Pixels { .. } => None,
        };
        Ok(Parts {
            task,
            student,
            teacher,
        })
    }

    fn stream(&self, picture: usize, purpose: Purpose) -> Stream {
        Stream::new(self.seed, 0, picture as u64, purpose)
    }
}

impl Job for Step<'_> {
    type Output = Sheet;

    fn run<B: TrainBackend>(self, backend: &mut B, name: &str) -> Result<Sheet, Error> {
        let failed = |error: B::Error| Error::backend(name, error);
        let Parts {
            task,
            student,
            teacher,
        } = self.parts()?;
        let (vit, visible, targets) = (&task.vit, task.visible(), task.targets());
        let patches = vit.num_patches();
        let reduction = match task.target {
            Target::Teacher(reduction) => reduction,
            Target::Pixels { .. } => Reduction::NONE,
        };
        let mut columns = vec![
            format!("input: {patches} patches"),
            format!("seen by the student: {visible}"),
        ];
        if teacher.is_some() {
            columns.push(format!("retained by the teacher: {targets}"));
            columns.push("cosine, predicted and true".to_owned());
        } else {
            columns.push(format!("predicted pixels: {targets}"));
        }
        let canvas = Canvas::new(vit, columns.len())?;
        let layout = Layout::pretrain(&task);
        let mut state =
            TrainState::new(backend, layout, &student, teacher.as_deref(), 0.0).map_err(failed)?;
        let mut model = Pretrainer::new(backend, &task, 1, false).map_err(failed)?;
        let scorer = CriterionScorer::new(backend, &reduction, 1, task.masked(), vit.depth);
        let mut recorder = Recorder {
            scorer: scorer.map_err(failed)?,
            stages: Vec::new(),
        };
        let mut rows = Vec::new();
        for (
            index,
            Named {
                name: label,
                picture,
            },
        ) in self.pictures.iter().enumerate()
        {
            let images = input(picture, vit, self.preprocessing)?;
            let mut stream = self.stream(index, Purpose::Mask);
            let noise: Vec<f32> = (0..patches).map(|_| stream.uniform()).collect();
            let mut order = vec![0; patches];
            random_masking(&noise, &mut order).map_err(|error| Error::backend(name, error))?;
            let (keep, remove) = order.split_at(visible);
            if reduction.criterion == Criterion::Random {
                let mut stages = Vec::new();
                reduction.for_each_stage(task.masked(), vit.depth, |tokens, _| stages.push(tokens));
                let mut stream = self.stream(index, Purpose::Selection);
                for (stage, tokens) in stages.into_iter().enumerate() {
                    let noise: Vec<f32> = (0..tokens).map(|_| stream.uniform()).collect();
                    recorder
                        .scorer
                        .set_noise(backend, stage, &noise)
                        .map_err(failed)?;
                }
            }
            recorder.stages.clear();
            model.load(backend, &images, keep, remove).map_err(failed)?;
            state.begin_step(backend).map_err(failed)?;
            model
                .accumulate(backend, &mut state, 1.0, &mut recorder)
                .map_err(failed)?;
            let mut pred = vec![0.0; targets * task.target_dim()];
            backend.read(&mut pred, model.pred()).map_err(failed)?;

            let pixels = canvas.picture(picture, vit)?;
            let captionless = |pixels| Cell {
                pixels,
                caption: String::new(),
            };
            let mut label = label.clone();
            let mut cells = vec![
                captionless(pixels.clone()),
                captionless(canvas.keep(&pixels, keep)),
            ];
            match task.target {
                Target::Teacher(_) => {
                    let retained = recorder.stages.last().map_or(remove, |stage| &stage.ids);
                    let mut target = vec![0.0; pred.len()];
                    backend.read(&mut target, model.target()).map_err(failed)?;
                    let rows = pred.chunks_exact(vit.embed_dim);
                    let cosines: Vec<f32> = rows
                        .zip(target.chunks_exact(vit.embed_dim))
                        .map(|(pred, target)| cosine(pred, target))
                        .collect();
                    let mean = cosines.iter().sum::<f32>() / targets as f32;
                    cells.push(captionless(canvas.keep(&pixels, retained)));
                    cells.push(canvas.heat(retained, &cosines));
                    // Below a cell there is no room for it.
                    label += &format!(": mean cosine {mean:.3}");
                }
                Target::Pixels { norm_pix } => {
                    let mut seen = Patches::new(vit.img_size, vit.patch_size, images);
                    for (&patch, pred) in remove.iter().zip(pred.chunks_exact(vit.patch_len())) {
                        seen.predict(patch as usize, pred, norm_pix);
                    }
                    cells.push(captionless(
                        canvas.planes(&seen.denormalised(self.preprocessing), vit.img_size),
                    ));
                }
            }
            rows.push(Row { label, cells });
        }
        Ok(Sheet {
            title: format!(
                "{}: a step of {}",
                self.source.display(),
                if teacher.is_some() { "PCAE" } else { "MAE" }
            ),
            columns,
            cell: canvas.cell(),
            rows,
        })
    }
}

fn cosine(a: &[f32], b: &[f32]) -> f32 {
    let dot = |a: &[f32], b: &[f32]| -> f32 { a.iter().zip(b).map(|(a, b)| a * b).sum() };
    dot(a, b) / (dot(a, a) * dot(b, b)).sqrt().max(f32::MIN_POSITIVE)
}

/// A normalised picture, `[channels, height, width]`, some patches of which are replaced.
struct Patches {
    size: [usize; 2],
    patch: usize,
    planes: Vec<f32>,
}

impl Patches {
    fn new(size: [usize; 2], patch: usize, planes: Vec<f32>) -> Self {
        Self {
            size,
            patch,
            planes,
        }
    }

    /// Puts a prediction, ordered by row, column and channel, in place of a patch. One that was to be standardised gets the mean
    /// and deviation that the patch itself has, as MAE shows it: it cannot know them.
    fn predict(&mut self, patch: usize, pred: &[f32], norm_pix: bool) {
        let [height, width] = self.size;
        let channels = self.planes.len() / (height * width);
        let edge = self.patch;
        let (top, left) = (patch / (width / edge) * edge, patch % (width / edge) * edge);
        let places: Vec<usize> = (0..pred.len())
            .map(|i| {
                let (channel, pixel) = (i % channels, i / channels);
                let (row, column) = (top + pixel / edge, left + pixel % edge);
                (channel * height + row) * width + column
            })
            .collect();
        let (mut mean, mut deviation) = (0.0, 1.0);
        if norm_pix {
            let count = places.len() as f32;
            mean = places.iter().map(|&at| self.planes[at]).sum::<f32>() / count;
            let squares = places.iter().map(|&at| (self.planes[at] - mean).powi(2));
            deviation = (squares.sum::<f32>() / (count - 1.0) + STANDARDISE_EPS).sqrt();
        }
        for (at, value) in places.into_iter().zip(pred) {
            self.planes[at] = value * deviation + mean;
        }
    }

    /// Values from 0 to 1.
    fn denormalised(mut self, preprocessing: &Preprocessing) -> Vec<f32> {
        let scales = preprocessing.mean.iter().zip(&preprocessing.std);
        let area = self.size[0] * self.size[1];
        for (plane, (mean, std)) in self.planes.chunks_exact_mut(area).zip(scales) {
            plane
                .iter_mut()
                .for_each(|value| *value = *value * std + mean);
        }
        self.planes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A prediction that is the target gives back the picture.
    #[test]
    fn a_perfect_prediction_is_the_picture() {
        let (size, edge, channels) = ([4, 6], 2, 3);
        let picture: Vec<f32> = (0..72).map(|i| ((i * 37) % 23) as f32 / 23.0).collect();
        for norm_pix in [false, true] {
            let mut patches = Patches::new(size, edge, picture.clone());
            for patch in [1, 5] {
                let (top, left) = (patch / 3 * edge, patch % 3 * edge);
                // Row, column, channel, as the oracle's `pixel_patches`.
                let mut target = Vec::new();
                for row in top..top + edge {
                    for column in left..left + edge {
                        for channel in 0..channels {
                            target.push(picture[(channel * size[0] + row) * size[1] + column]);
                        }
                    }
                }
                if norm_pix {
                    let n = target.len() as f32;
                    let mean = target.iter().sum::<f32>() / n;
                    let var = target.iter().map(|v| (v - mean).powi(2)).sum::<f32>() / (n - 1.0);
                    target
                        .iter_mut()
                        .for_each(|v| *v = (*v - mean) / (var + 1e-6).sqrt());
                }
                // Elsewhere than the patch's own pixels, it would show.
                patches.predict(patch, &target, norm_pix);
            }
            for (found, want) in patches.planes.iter().zip(&picture) {
                assert!((found - want).abs() < 1e-5, "{norm_pix}: {found} {want}");
            }
        }
    }

    #[test]
    fn cosine_of_parallel_and_orthogonal() {
        assert!((cosine(&[1.0, 2.0], &[2.0, 4.0]) - 1.0).abs() < 1e-6);
        assert_eq!(cosine(&[1.0, 0.0], &[0.0, 3.0]), 0.0);
        assert_eq!(cosine(&[0.0, 0.0], &[0.0, 3.0]), 0.0);
    }
}
