//! A training step as a graph: the same bits as issued piece by piece, and gradients beside the reference's.
#![allow(
    clippy::unwrap_used,
    reason = "a test stops at what it does not expect"
)]

use pcae_backend_cuda::{Cuda, Precision};
use pcae_kernel::backend::{AdamW, Pixels, TrainBackend};
use pcae_kernel::config::{
    Budget, Criterion, DecoderConfig, DropLayers, Place, PretrainConfig, Reduction, Target,
    VitConfig,
};
use pcae_kernel::init::init;
use pcae_kernel::layout::{Kind, Layout};
use pcae_kernel::model::{CriterionScorer, MeanSimilarity, Pretrainer, Scorer, TrainState};
use pcae_kernel::reference::Reference;
use pcae_kernel::rng::{Purpose, Stream};

mod emulated;

#[test]
fn on_the_emulator() {
    emulated::run_again();
}

const BATCH: usize = 3;
const STEPS: u64 = 6;
/// Steps after which there is a graph for everything: in the first one working memory grows still.
const WARM: u64 = 3;
const PIXELS: Target = Target::Pixels { norm_pix: true };

fn teacher() -> Target {
    stages(Criterion::MeanSimilarity, &[0, 1])
}

fn stages(criterion: Criterion, after: &[usize]) -> Target {
    Target::Teacher(Reduction {
        criterion,
        place: Place::Progressive,
        drop_layers: DropLayers::new(after, 3).unwrap(),
        budget: Budget::Keep(0.6),
    })
}

fn config(target: Target) -> PretrainConfig {
    let config = PretrainConfig {
        vit: VitConfig {
            img_size: [24, 20],
            in_chans: 3,
            patch_size: 4,
            embed_dim: 48,
            depth: 3,
            num_heads: 3,
            mlp_ratio: 2.5,
        },
        decoder: DecoderConfig {
            embed_dim: 28,
            depth: 1,
            num_heads: 2,
        },
        mask_ratio: 0.6,
        target,
    };
    config.check().unwrap();
    config
}

/// All vectors of a state.
#[derive(Clone, Debug, PartialEq)]
struct Values {
    student: Vec<f32>,
    teacher: Option<Vec<f32>>,
    exp_avg: Vec<f32>,
    exp_avg_sq: Vec<f32>,
    /// Loss, spread and norm of the step before.
    scalars: Vec<f32>,
}

impl Values {
    fn start(layout: &Layout, has_teacher: bool) -> Self {
        let mut student = vec![0.0; layout.len()];
        init(layout, 1, &mut student).unwrap();
        // Biases and norms that differ from 0 and 1.
        let mut rng = Stream::new(2, 0, 0, Purpose::Init);
        layout.for_each(|tensor| {
            if tensor.kind != Kind::Position {
                for value in &mut student[tensor.span.start..tensor.span.end()] {
                    *value += 0.2 * (rng.uniform() - 0.5);
                }
            }
        });
        Self {
            teacher: has_teacher.then(|| student[..layout.teacher().len()].to_vec()),
            exp_avg: vec![0.0; layout.len()],
            exp_avg_sq: vec![0.0; layout.len()],
            scalars: vec![0.0; 3],
            student,
        }
    }
}

/// A task and its state on a backend.
struct Run<B: TrainBackend> {
    backend: B,
    config: PretrainConfig,
    task: Pretrainer<B>,
    state: TrainState<B>,
}

impl<B: TrainBackend> Run<B> {
    fn new(mut backend: B, config: PretrainConfig, values: &Values) -> Self {
        let layout = Layout::pretrain(&config);
        let task = Pretrainer::new(&mut backend, &config, BATCH, true).unwrap();
        let mut state = TrainState::new(
            &mut backend,
            layout,
            &values.student,
            values.teacher.as_deref(),
            0.05,
        )
        .unwrap();
        for (to, from) in [
            (&mut state.exp_avg, &values.exp_avg),
            (&mut state.exp_avg_sq, &values.exp_avg_sq),
        ] {
            backend.write_vector(to, 0, from).unwrap();
        }
        Self {
            backend,
            config,
            task,
            state,
        }
    }

    /// Forward and backward of two micro-batches.
    fn accumulate(&mut self, step: u64) {
        self.state.begin_step(&mut self.backend).unwrap();
        for micro in 0..2 {
            self.micro_batch([step, micro], 0.5, &mut MeanSimilarity);
        }
    }

    fn micro_batch(&mut self, [step, micro]: [u64; 2], scale: f64, scorer: &mut impl Scorer<B>) {
        let Self {
            backend,
            config,
            task,
            state,
        } = self;
        let mut rng = Stream::new(7, step, micro, Purpose::Init);
        let vit = &config.vit;
        let values: Vec<u8> = (0..vit.pixels(BATCH).len())
            .map(|_| rng.below(256) as u8)
            .collect();
        let pixels = Pixels {
            values: &values,
            crops: None,
            flips: Some(&[true, false, true]),
            mean: &[0.5; 3],
            std: &[0.33; 3],
        };
        let (mut keep, mut remove) = (vec![], vec![]);
        for _ in 0..BATCH {
            let mut ids: Vec<u32> = (0..vit.num_patches() as u32).collect();
            rng.shuffle(&mut ids);
            keep.extend_from_slice(&ids[..config.visible()]);
            remove.extend_from_slice(&ids[config.visible()..]);
        }
        task.load_pixels(backend, pixels, &keep, &remove).unwrap();
        let scales: Vec<f32> = (0..2 * vit.depth * BATCH)
            .map(|_| if rng.uniform() < 0.2 { 0.0 } else { 1.25 })
            .collect();
        task.set_drop_path(backend, &scales).unwrap();
        task.accumulate(backend, state, scale, scorer).unwrap();
    }

    fn update(&mut self, step: u64) {
        let constants = AdamW {
            lr: 1e-3 * (step + 1) as f64,
            beta1: 0.9,
            beta2: 0.95,
            eps: 1e-8,
            step: step + 1,
            momentum: 0.9 + 0.01 * step as f64,
        };
        self.state
            .update(&mut self.backend, &constants, Some(0.5))
            .unwrap();
        // Another place in every step, which is no other graph.
        self.state
            .record(&mut self.backend, 1, step as usize)
            .unwrap();
    }

    fn grads(&mut self) -> Vec<f32> {
        let mut values = vec![0.0; self.state.layout.len()];
        self.backend
            .read_vector(&mut values, &self.state.grads, 0)
            .unwrap();
        values
    }

    fn values(&mut self) -> Values {
        assert!(self.grads().iter().all(|x| *x == 0.0));
        let Self { backend, state, .. } = self;
        let len = state.layout.len();
        let mut params = |params: &B::Params, len| {
            let mut values = vec![0.0; len];
            let span = pcae_kernel::backend::Span { start: 0, len };
            backend.read_params(&mut values, params, span).unwrap();
            values
        };
        let student = params(&state.student, len);
        let teacher = state
            .teacher
            .as_ref()
            .map(|teacher| params(teacher, state.layout.teacher().len()));
        let mut vector = |vector, len| {
            let mut values = vec![0.0; len];
            backend.read_vector(&mut values, vector, 0).unwrap();
            values
        };
        Values {
            student,
            teacher,
            exp_avg: vector(&state.exp_avg, len),
            exp_avg_sq: vector(&state.exp_avg_sq, len),
            scalars: vector(&state.scalars, 3),
        }
    }
}

/// Steps on one backend, which soon launches graphs, against each step alone on a new backend, which knows none.
fn a_graph_is_what_it_was_made_of(precision: Precision, target: Target) {
    if !emulated::has_device() {
        return;
    }
    let config = config(target);
    let layout = Layout::pretrain(&config);
    let mut before = Values::start(&layout, matches!(target, Target::Teacher(_)));
    let mut graphs = Run::new(Cuda::new(0, precision).unwrap(), config, &before);
    for step in 0..STEPS {
        let runs = graphs.backend.runs();
        graphs.accumulate(step);
        graphs.update(step);
        // Asks for nothing in between: reading flushes.
        let after = graphs.values();
        let now = graphs.backend.runs();
        println!("step {step}: {now:?}");
        assert_eq!(now.refused, 0);
        if step >= WARM {
            // One for each micro-batch; the losses that are set to zero before are not worth one.
            assert_eq!((now.made, now.graphs), (runs.made, runs.graphs + 2));
        }

        let mut alone = Run::new(Cuda::new(0, precision).unwrap(), config, &before);
        alone.accumulate(step);
        alone.update(step);
        let expected = alone.values();
        assert_eq!(alone.backend.runs().made, 0);
        assert!(after == expected, "{precision:?}, step {step}");
        assert!(after.student != before.student);
        assert!(after.scalars.iter().all(|x| x.is_finite()));
        before = after;
    }
}

#[test]
fn a_graph_is_what_it_was_made_of_in_f32() {
    a_graph_is_what_it_was_made_of(Precision::F32, teacher());
}

#[test]
fn a_graph_is_what_it_was_made_of_in_bf16() {
    a_graph_is_what_it_was_made_of(Precision::Bf16, teacher());
}

/// Each forward and backward goes through the same buffers as the one before, whatever the number of stages.
#[test]
fn a_step_is_one_graph() {
    if !emulated::has_device() {
        return;
    }
    let by = |criterion| move |after| stages(criterion, after);
    let (similar, random) = (by(Criterion::MeanSimilarity), by(Criterion::Random));
    for target in [
        similar(&[]),
        similar(&[1]),
        similar(&[0, 1]),
        similar(&[0, 1, 2]),
        random(&[0]),
        random(&[0, 1, 2]),
        by(Criterion::PivotedQr)(&[2]),
        PIXELS,
    ] {
        let config = config(target);
        let layout = Layout::pretrain(&config);
        let is_teacher = matches!(target, Target::Teacher(_));
        let values = Values::start(&layout, is_teacher);
        let mut run = Run::new(Cuda::new(0, Precision::F32).unwrap(), config, &values);
        let (masked, depth) = (
            config.vit.num_patches() - config.visible(),
            config.vit.depth,
        );
        let reduction = match target {
            Target::Teacher(reduction) => reduction,
            Target::Pixels { .. } => Reduction::NONE,
        };
        let scorer = CriterionScorer::new(&mut run.backend, &reduction, BATCH, masked, depth);
        let mut scorer = scorer.unwrap();
        for step in 0..STEPS {
            let mut rng = Stream::new(8, step, 0, Purpose::Init);
            run.state.begin_step(&mut run.backend).unwrap();
            if reduction.criterion == Criterion::Random {
                for stage in 0..reduction.stages(depth) {
                    let noise: Vec<f32> = (0..BATCH * masked).map(|_| rng.uniform()).collect();
                    scorer.set_noise(&mut run.backend, stage, &noise).unwrap();
                }
            }
            run.micro_batch([step, 0], 1.0, &mut scorer);
            run.update(step);
        }
        run.backend.wait().unwrap();
        let runs = run.backend.runs();
        assert_eq!((runs.made, runs.refused), (1, 0), "{target:?}: {runs:?}");
        assert!(runs.graphs >= STEPS - WARM, "{target:?}: {runs:?}");
    }
}

/// Norm of the difference over norm of the expected, tensor by tensor; the largest.
fn worst(layout: &Layout, got: &[f32], want: &[f32]) -> (f64, String) {
    let mut worst = (0.0, String::new());
    layout.for_each(|tensor| {
        if !tensor.is_trained() {
            return;
        }
        let (mut error, mut norm) = (0.0, 0.0);
        for i in tensor.span.start..tensor.span.end() {
            error += (f64::from(got[i]) - f64::from(want[i])).powi(2);
            norm += f64::from(want[i]).powi(2);
        }
        let share = (error / norm).sqrt();
        if share.is_nan() || share > worst.0 {
            worst = (share, tensor.name.to_string());
        }
    });
    worst
}

/// Gradients of two micro-batches, with stochastic depth, beside those in f64.
fn gradients(precision: Precision, target: Target, tolerance: f64) {
    if !emulated::has_device() {
        return;
    }
    let config = config(target);
    let layout = Layout::pretrain(&config);
    let values = Values::start(&layout, matches!(target, Target::Teacher(_)));
    let mut cuda = Run::new(Cuda::new(0, precision).unwrap(), config, &values);
    let mut reference = Run::new(Reference::<f64, _>::owned(), config, &values);
    cuda.accumulate(0);
    reference.accumulate(0);
    let (worst, name) = worst(&layout, &cuda.grads(), &reference.grads());
    println!("{precision:?}, {target:?}: {worst:.1e} at {name}");
    assert!(worst < tolerance, "{precision:?}: {worst:.1e} at {name}");
    let losses = (
        cuda.state.scalars(&mut cuda.backend).unwrap().loss,
        reference
            .state
            .scalars(&mut reference.backend)
            .unwrap()
            .loss,
    );
    assert!(f64::from(losses.0 - losses.1).abs() < 0.1 * tolerance);
}

#[test]
fn gradients_are_the_references() {
    // The golden fixtures' tolerances. In bf16 a teacher may keep other tokens, and pixels are the target.
    gradients(Precision::F32, teacher(), 1e-4);
    gradients(Precision::F32, PIXELS, 1e-4);
    gradients(Precision::Bf16, PIXELS, 5e-2);
}
