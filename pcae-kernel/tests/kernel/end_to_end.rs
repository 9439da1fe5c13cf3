//! The gradient of whole training steps against central differences in f64, for every parameter tensor.

use pcae_kernel::backend::TrainBackend;
use pcae_kernel::backend::{Backend, TokenDims};
use pcae_kernel::config::{
    Budget, ClassifierConfig, Criterion, DecoderConfig, DropLayers, Place, Pool, PretrainConfig,
    Reduction, Target, VitConfig,
};
use pcae_kernel::error::Error;
use pcae_kernel::init::init;
use pcae_kernel::layout::{Kind, Layout};
use pcae_kernel::model::{
    Classifier, ClassifierTrainer, MeanSimilarity, Pretrainer, Scorer, Selection, TrainState,
};
use pcae_kernel::schedule::random_masking;

use crate::support::{Double, STEP, close, random};

/// Elements checked of each tensor.
const SAMPLES: usize = 3;
/// The loss goes through some ten layers and is rounded in each: its central difference is off by
/// some 1e-15 / STEP = 1e-10, its truncation by STEP² times a third derivative of a few dozen.
const ATOL: f64 = 2e-9;
const RTOL: f64 = 1e-6;

const VIT: VitConfig = VitConfig {
    img_size: [20, 12],
    in_chans: 2,
    patch_size: 4,
    embed_dim: 12,
    depth: 3,
    num_heads: 3,
    mlp_ratio: 1.5,
};
const BATCH: usize = 2;

fn reduction(blocks: &[usize], budget: Budget) -> Reduction {
    Reduction {
        criterion: Criterion::MeanSimilarity,
        place: Place::Progressive,
        drop_layers: DropLayers::new(blocks, VIT.depth).unwrap(),
        budget,
    }
}

fn pretrain(target: Target) -> PretrainConfig {
    let decoder = DecoderConfig {
        embed_dim: 8,
        depth: 2,
        num_heads: 2,
    };
    let config = PretrainConfig {
        vit: VIT,
        decoder,
        mask_ratio: 0.6,
        target,
    };
    config.check().unwrap();
    config
}

/// Parameters that are not special: biases and norms differ from 0 and 1 too.
fn parameters(layout: &Layout, seed: u64) -> Vec<f32> {
    let mut values = vec![0.0; layout.len()];
    init(layout, seed, &mut values).unwrap();
    let noise = random(seed, layout.len());
    layout.for_each(|tensor| {
        if tensor.kind != Kind::Position {
            for i in tensor.span.start..tensor.span.end() {
                values[i] += 0.1 * noise[i] as f32;
            }
        }
    });
    values
}

fn images() -> Vec<f32> {
    random(40, BATCH * 2 * 20 * 12)
        .iter()
        .map(|&x| x as f32)
        .collect()
}

/// Visible and masked patches of each picture.
fn masks(config: &PretrainConfig) -> (Vec<u32>, Vec<u32>) {
    let (mut keep, mut remove) = (Vec::new(), Vec::new());
    for picture in 0..BATCH as u64 {
        let noise: Vec<f32> = random(50 + picture, 15).iter().map(|&x| x as f32).collect();
        let mut order = [0; 15];
        random_masking(&noise, &mut order).unwrap();
        keep.extend(&order[..config.visible()]);
        remove.extend(&order[config.visible()..]);
    }
    (keep, remove)
}

/// Stochastic depth with dropped, kept and scaled branches: `[depth, 2, batch]`.
fn drop_path() -> Vec<f32> {
    vec![
        1.0, 1.0, 1.0, 1.0, 1.25, 0.0, 1.25, 1.25, 1.5, 1.5, 0.0, 1.5,
    ]
}

/// Holds `gradient(student)` against differences of `loss(student)` at some elements of every tensor.
fn check_tensors(
    layout: &Layout,
    state: &mut TrainState<Double>,
    mut loss: impl FnMut(&mut TrainState<Double>) -> f64,
) {
    state.grads.fill(0.0);
    loss(state);
    let gradient = state.grads.clone();
    layout.for_each(|tensor| {
        let span = tensor.span;
        if !tensor.is_trained() {
            let mut fixed = gradient[span.start..span.end()].iter();
            assert!(
                fixed.all(|&g| g == 0.0),
                "{}: fixed, yet has a gradient",
                tensor.name
            );
            return;
        }
        for sample in 0..SAMPLES.min(span.len) {
            // First, last and one between: of stacked queries, keys and values one of each.
            let at = span.start + sample * (span.len - 1) / (SAMPLES - 1);
            let here = state.student[at];
            state.student[at] = here + STEP;
            let above = loss(state);
            state.student[at] = here - STEP;
            let below = loss(state);
            state.student[at] = here;
            let numeric = (above - below) / (2.0 * STEP);
            let what = format!("{} at {}", tensor.name, at - span.start);
            close(&what, gradient[at], numeric, ATOL, RTOL);
        }
    });
    assert!(
        gradient.iter().any(|g| g.abs() > 1e-3),
        "gradients too small to say anything"
    );
}

fn check_pretrain(target: Target, with_drop_path: bool) {
    let config = pretrain(target);
    let layout = Layout::pretrain(&config);
    let student = parameters(&layout, 1);
    let teacher = parameters(&Layout::encoder(&VIT), 2);
    let backend = &mut Double::owned();
    let teacher = matches!(target, Target::Teacher(_)).then_some(&teacher[..]);
    let mut state = TrainState::new(backend, layout, &student, teacher, 0.0).unwrap();
    let mut task = Pretrainer::new(backend, &config, BATCH, with_drop_path).unwrap();
    let (keep, remove) = masks(&config);
    task.load(backend, &images(), &keep, &remove).unwrap();
    if with_drop_path {
        task.set_drop_path(backend, &drop_path()).unwrap();
    }
    check_tensors(&layout, &mut state, |state| {
        state.begin_step(backend).unwrap();
        task.accumulate(backend, state, 1.0, &mut MeanSimilarity)
            .unwrap();
        state.scalars[0]
    });
}

/// The teacher is a copy, so that what it selects does not depend on the parameters that are moved.
#[test]
fn pcae() {
    let target = Target::Teacher(reduction(&[0, 2], Budget::Keep(0.6)));
    check_pretrain(target, false);
    check_pretrain(target, true);
}

/// Targets dropped at the input and all at once: other shapes of the same graph.
#[test]
fn pcae_ablations() {
    for place in [Place::Input, Place::OneStage(1)] {
        let stages = reduction(&[0, 2], Budget::Keep(0.6));
        check_pretrain(Target::Teacher(Reduction { place, ..stages }), false);
    }
    check_pretrain(Target::Teacher(Reduction::NONE), false);
}

#[test]
fn mae() {
    check_pretrain(Target::Pixels { norm_pix: false }, false);
    check_pretrain(Target::Pixels { norm_pix: true }, true);
}

/// The method's criterion, which remembers what was selected.
#[derive(Default)]
struct Recorder {
    ids: Vec<u32>,
}

impl Scorer<Double> for Recorder {
    fn score(
        &mut self,
        backend: &mut Double,
        _stage: usize,
        dims: TokenDims,
        scores: &mut Vec<f64>,
        x: &Vec<f64>,
    ) -> Result<(), Error> {
        backend.mean_similarity(dims, scores, x)
    }

    fn selected(
        &mut self,
        _backend: &mut Double,
        selection: Selection<'_, Double>,
    ) -> Result<(), Error> {
        self.ids.extend(&selection.ids[..BATCH * selection.keep]);
        Ok(())
    }
}

fn check_classifier(pool: Pool, reduction: Reduction, with_drop_path: bool) {
    let config = ClassifierConfig {
        vit: VIT,
        num_classes: 5,
        pool,
        reduction,
    };
    config.check().unwrap();
    let layout = Layout::classifier(&config);
    let backend = &mut Double::owned();
    let student = parameters(&layout, 3);
    let mut state = TrainState::new(backend, layout, &student, None, 0.0).unwrap();
    let mut task = ClassifierTrainer::new(backend, &config, BATCH, with_drop_path).unwrap();
    let labels = [0.9, 0.0, 0.0, 0.1, 0.0, 0.0, 0.25, 0.75, 0.0, 0.0];
    task.load(backend, &images(), &labels).unwrap();
    if with_drop_path {
        task.set_drop_path(backend, &drop_path()).unwrap();
    }
    let mut first: Option<Vec<u32>> = None;
    check_tensors(&layout, &mut state, |state| {
        state.begin_step(backend).unwrap();
        let mut recorder = Recorder::default();
        task.accumulate(backend, state, 1.0, &mut recorder).unwrap();
        // The loss jumps where the selection changes: no difference may reach over such a place.
        assert_eq!(first.get_or_insert(recorder.ids.clone()), &recorder.ids);
        state.scalars[0]
    });
    let dropped = first.unwrap();
    assert_eq!(dropped.is_empty(), reduction == dense());
}

fn dense() -> Reduction {
    reduction(&[0, 2], Budget::Drop(0.0))
}

#[test]
fn classifier() {
    for pool in [Pool::Mean, Pool::ClsToken] {
        check_classifier(pool, dense(), true);
        check_classifier(pool, reduction(&[0, 2], Budget::Drop(0.3)), false);
    }
    check_classifier(Pool::Mean, reduction(&[0, 1, 2], Budget::Drop(0.3)), true);
    let at_input = Reduction {
        place: Place::Input,
        ..reduction(&[0, 1], Budget::Drop(0.4))
    };
    check_classifier(Pool::Mean, at_input, false);
}

/// What is trained and what is deployed give the same logits.
#[test]
fn trainer_and_classifier_agree() {
    for pool in [Pool::Mean, Pool::ClsToken] {
        let config = ClassifierConfig {
            vit: VIT,
            num_classes: 5,
            pool,
            reduction: reduction(&[0, 2], Budget::Drop(0.3)),
        };
        let layout = Layout::classifier(&config);
        let backend = &mut Double::owned();
        let student = parameters(&layout, 6);
        let mut state = TrainState::new(backend, layout, &student, None, 0.0).unwrap();
        let mut task = ClassifierTrainer::new(backend, &config, BATCH, false).unwrap();
        let labels = [0.2; BATCH * 5];
        task.load(backend, &images(), &labels).unwrap();
        task.accumulate(backend, &mut state, 1.0, &mut MeanSimilarity)
            .unwrap();
        let mut deployed = Classifier::new(backend, &config, BATCH).unwrap();
        let mut on_device = backend.buf(images().len()).unwrap();
        backend.write(&mut on_device, &images()).unwrap();
        let scorer = &mut MeanSimilarity;
        let logits = deployed
            .forward(backend, &state.student, BATCH, &on_device, scorer)
            .unwrap();
        for (&trained, &deployed) in task.logits().iter().zip(logits) {
            close("logit", deployed, trained, 1e-14, 1e-13);
        }
    }
}

/// With decoder blocks that pass everything on unchanged, a prediction is a function of the mask token and its position
/// alone: the positions are those that the teacher retained, or for MAE all that were masked.
#[test]
fn predictions_are_made_at_the_targets_positions() {
    for target in [
        Target::Teacher(reduction(&[0, 2], Budget::Keep(0.6))),
        Target::Teacher(Reduction::NONE),
        Target::Pixels { norm_pix: false },
    ] {
        let config = pretrain(target);
        let layout = Layout::pretrain(&config);
        let mut student = parameters(&layout, 6);
        layout.for_each(|tensor| {
            let name = tensor.name.to_string();
            let ends_branch = name.contains("attn.proj") || name.contains("mlp.fc2");
            if name.starts_with("decoder_blocks") && ends_branch {
                student[tensor.span.start..tensor.span.end()].fill(0.0);
            }
        });
        let teacher = parameters(&Layout::encoder(&VIT), 7);
        let backend = &mut Double::owned();
        let teacher = matches!(target, Target::Teacher(_)).then_some(&teacher[..]);
        let mut state = TrainState::new(backend, layout, &student, teacher, 0.0).unwrap();
        let mut task = Pretrainer::new(backend, &config, BATCH, false).unwrap();
        let (keep, remove) = masks(&config);
        task.load(backend, &images(), &keep, &remove).unwrap();
        let mut recorder = Recorder::default();
        task.accumulate(backend, &mut state, 1.0, &mut recorder)
            .unwrap();

        let (targets, width) = (config.targets(), config.target_dim());
        let last = recorder.ids.len().saturating_sub(BATCH * targets);
        let ids = if recorder.ids.is_empty() {
            &remove
        } else {
            &recorder.ids[last..]
        };
        assert_eq!(ids.len(), BATCH * targets);
        let of = |name: &str| {
            let span = layout.find(name).unwrap().span;
            &state.student[span.start..span.end()]
        };
        for (row, &id) in ids.iter().enumerate() {
            let pos = &of("decoder_pos_embed")[8 * (1 + id as usize)..][..8];
            let token: Vec<f64> = of("mask_token")
                .iter()
                .zip(pos)
                .map(|(m, p)| m + p)
                .collect();
            let mean = token.iter().sum::<f64>() / 8.0;
            let variance = token.iter().map(|x| (x - mean) * (x - mean)).sum::<f64>() / 8.0;
            for column in 0..width {
                let mut want = of("decoder_pred.bias")[column];
                for (i, x) in token.iter().enumerate() {
                    let normed = (x - mean) / (variance + 1e-6).sqrt()
                        * of("decoder_norm.weight")[i]
                        + of("decoder_norm.bias")[i];
                    want += of("decoder_pred.weight")[column * 8 + i] * normed;
                }
                // The same sums, rounded in another order.
                close(
                    "pred",
                    task.pred()[row * width + column],
                    want,
                    1e-13,
                    1e-13,
                );
            }
        }
    }
}

/// Micro-batches at half weight add up to the whole: the same one twice is the whole one once.
#[test]
fn micro_batches_accumulate() {
    let config = pretrain(Target::Teacher(reduction(&[1], Budget::Keep(0.5))));
    let layout = Layout::pretrain(&config);
    let (student, teacher) = (parameters(&layout, 4), parameters(&layout, 5));
    let backend = &mut Double::owned();
    let (keep, remove) = masks(&config);
    let mut results = Vec::new();
    for weights in [&[1.0][..], &[0.5, 0.5]] {
        let mut state = TrainState::new(backend, layout, &student, Some(&teacher), 0.0).unwrap();
        let mut task = Pretrainer::new(backend, &config, BATCH, false).unwrap();
        task.load(backend, &images(), &keep, &remove).unwrap();
        state.begin_step(backend).unwrap();
        for &weight in weights {
            task.accumulate(backend, &mut state, weight, &mut MeanSimilarity)
                .unwrap();
        }
        results.push((state.scalars[0], state.grads));
    }
    // Halving is exact, and so is adding two equal halves; only the order of additions within a gradient differs.
    close("loss", results[1].0, results[0].0, 0.0, 1e-14);
    for (&halves, &whole) in results[1].1.iter().zip(&results[0].1) {
        close("gradient", halves, whole, 1e-15, 1e-12);
    }
}

/// The spread of standardised features is 0 when all are equal, and reported beside the loss.
#[test]
fn feature_spread_shows_a_collapse() {
    use pcae_kernel::backend::RowDims;
    let backend = &mut Double::owned();
    let dims = RowDims { rows: 3, dim: 2 };
    let mut out = vec![9.0, 9.0];
    backend
        .feature_spread(dims, &mut out, 1, &vec![1.0, -1.0, 1.0, -1.0, 1.0, -1.0])
        .unwrap();
    assert_eq!(out, [9.0, 0.0]);
    // Columns (0, 3, 6) and (1, 1, 4): standard deviations sqrt(6) and sqrt(2).
    backend
        .feature_spread(dims, &mut out, 0, &vec![0.0, 1.0, 3.0, 1.0, 6.0, 4.0])
        .unwrap();
    close(
        "spread",
        out[0],
        (6f64.sqrt() + 2f64.sqrt()) / 2.0,
        0.0,
        1e-15,
    );
}
