//! What is timed: made once, run many times, on any backend.

use std::any::Any;
use std::sync::Arc;

use pcae_backend_cuda::{Cuda, KernelTime};
use pcae_kernel::backend::{
    AdamW, AttentionDims, Backend, BlockDims, Epilogue, Linear, LinearDims, PixelDims, Pixels,
    TrainBackend,
};
use pcae_kernel::config::{ClassifierConfig, PretrainConfig, Target, VitConfig};
use pcae_kernel::flops;
use pcae_kernel::init::init;
use pcae_kernel::layout::Layout;
use pcae_kernel::model::{
    ClassifierTrainer, CriterionScorer, MeanSimilarity, Pretrainer, TrainState,
};
use pcae_kernel::op::{Op, OpKind};
use pcae_kernel::resize::Crop;
use pcae_kernel::rng::{Purpose, Stream};
use pcae_kernel::schedule::random_masking;
use pcae_kernel::sizing::Sizing;

use super::Launches;
use super::timed::{Tally, Timed};
use crate::backends::Build;
use crate::data::augment::random_resized_crop;
use crate::data::mix::{Mix, Shape};
use crate::error::Error;
use crate::finetune::FinetuneSettings;
use crate::network::{Network, Runner};
use crate::settings::PAPER_CROP_SCALE;
use crate::training::draws::{self, Key};

/// What to make, for `batch` pictures.
#[derive(Clone, Copy)]
pub(super) enum Task {
    /// The matrix products of the linear layers.
    Products(VitConfig),
    /// A block's forward.
    Block(VitConfig),
    /// A network's forward.
    Infer(Network),
    /// A pre-training step.
    Step(PretrainConfig),
    /// A fine-tuning step.
    Finetune(ClassifierConfig),
}

/// Something that is timed by itself.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Track {
    /// Layer and pass, of a matrix product.
    pub(super) product: Option<(&'static str, &'static str, LinearDims)>,
    /// Multiply-adds that it needs, as [`flops`] counts.
    pub(super) macs: u64,
}

/// A task on its backend.
pub(super) trait Workload {
    fn tracks(&self) -> &[Track];

    /// Whether [`Workload::run`] returns before the work is done.
    fn is_queued(&self) -> bool;

    /// Whether each run brings pictures, which a device copies while it works on the run before.
    fn uploads(&self) -> bool;

    /// What comes before the runs of a timing: on a backend that makes graphs of work that comes again, each timing is the same.
    fn begin(&mut self);

    /// Runs one of the tracks once.
    fn run(&mut self, track: usize) -> Result<(), Error>;

    /// Waits for what was run.
    fn wait(&mut self) -> Result<(), Error>;

    /// See [`Timed::start`].
    fn start(&mut self);

    /// See [`Timed::stop`].
    fn stop(&mut self);

    fn tallies(&self) -> Vec<(OpKind, Tally)>;

    /// Runs one of the tracks once, and returns how long each kernel took, on a device.
    fn profile(&mut self, track: usize) -> Result<Vec<KernelTime>, Error>;

    /// How work ran so far, on a device.
    fn launches(&self) -> Option<Launches>;

    /// What the backend warns of and has not told yet.
    fn warnings(&mut self) -> Vec<String>;
}

/// Makes a [`Workload`] on the backend it is given.
pub(super) struct Make {
    pub(super) task: Task,
    pub(super) batch: usize,
    /// Parameters of a trained network, in place of initial values.
    pub(super) values: Option<Arc<[f32]>>,
    /// Whether a step's pictures are crops that the backend resizes, as they are in training.
    pub(super) crops: bool,
    /// What an operation reads and writes.
    pub(super) bytes: fn(&Op) -> u64,
}

impl Make {
    /// What it asks a backend for.
    pub(super) fn sizing(&self) -> Result<Sizing, Error> {
        let failed = |error| Error::backend("sizing", error);
        let (mut backend, host) = (
            Timed::new(Sizing::default(), self.bytes),
            Host { empty: true },
        );
        let mut work = self.work(&mut backend, host).map_err(failed)?;
        for track in 0..work.tracks().len() {
            work.run(&mut backend, track).map_err(failed)?;
        }
        Ok(backend.into_inner())
    }

    fn work<B: TrainBackend + 'static>(
        &self,
        backend: &mut Timed<B>,
        host: Host,
    ) -> Result<Box<dyn Work<B>>, B::Error> {
        let batch = self.batch;
        Ok(match &self.task {
            Task::Products(vit) => Box::new(Products::new(backend, host, vit, batch)?),
            Task::Block(vit) => Box::new(Block::new(backend, host, vit, batch)?),
            Task::Infer(network) => {
                let values = self.values.as_deref();
                Box::new(Infer::new(backend, host, network, values, batch)?)
            }
            Task::Step(config) => Box::new(Step::new(backend, host, config, batch, self.crops)?),
            Task::Finetune(config) => {
                Box::new(Finetune::new(backend, host, config, batch, self.crops)?)
            }
        })
    }
}

impl Build for Make {
    type Output = Box<dyn Workload>;

    fn build<B: TrainBackend + 'static>(
        self,
        backend: B,
        name: &str,
    ) -> Result<Box<dyn Workload>, Error> {
        let mut backend = Timed::new(backend, self.bytes);
        let work = self.work(&mut backend, Host { empty: false });
        let work = work.map_err(|error| Error::backend(name, error))?;
        Ok(Box::new(Live {
            backend,
            work,
            name: name.to_owned(),
        }))
    }
}

/// Values of the host.
#[derive(Clone, Copy)]
struct Host {
    /// For a backend that does not look at them.
    empty: bool,
}

impl Host {
    fn params(self, layout: &Layout) -> Result<Vec<f32>, pcae_kernel::error::Error> {
        if self.empty {
            return Ok(Vec::new());
        }
        let mut params = vec![0.0; layout.len()];
        init(layout, 0, &mut params)?;
        Ok(params)
    }

    fn normal(self, len: usize) -> Vec<f32> {
        if self.empty {
            return Vec::new();
        }
        let mut stream = Stream::new(0, 0, 0, Purpose::Augment);
        (0..len).map(|_| stream.normal()).collect()
    }

    fn bytes(self, len: usize) -> Vec<u8> {
        if self.empty {
            return Vec::new();
        }
        let mut stream = Stream::new(0, 0, 0, Purpose::Augment);
        (0..len).map(|_| stream.next_u32() as u8).collect()
    }
}

trait Work<B: TrainBackend> {
    fn tracks(&self) -> &[Track];

    /// See [`Workload::uploads`].
    fn uploads(&self) -> bool {
        false
    }

    /// See [`Workload::begin`].
    fn begin(&mut self) {}

    fn run(&mut self, backend: &mut Timed<B>, track: usize) -> Result<(), B::Error>;
}

struct Live<B: TrainBackend> {
    backend: Timed<B>,
    work: Box<dyn Work<B>>,
    name: String,
}

impl<B: TrainBackend + 'static> Workload for Live<B> {
    fn tracks(&self) -> &[Track] {
        self.work.tracks()
    }

    fn is_queued(&self) -> bool {
        self.backend.is_queued()
    }

    fn uploads(&self) -> bool {
        self.work.uploads()
    }

    fn begin(&mut self) {
        if self.is_queued() {
            self.work.begin();
        }
    }

    fn wait(&mut self) -> Result<(), Error> {
        self.backend
            .wait()
            .map_err(|error| Error::backend(&self.name, error))
    }

    fn run(&mut self, track: usize) -> Result<(), Error> {
        self.work
            .run(&mut self.backend, track)
            .map_err(|error| Error::backend(&self.name, error))
    }

    fn start(&mut self) {
        self.backend.start();
    }

    fn stop(&mut self) {
        self.backend.stop();
    }

    fn tallies(&self) -> Vec<(OpKind, Tally)> {
        self.backend.tallies().collect()
    }

    fn profile(&mut self, track: usize) -> Result<Vec<KernelTime>, Error> {
        let failed = |error| Error::backend(&self.name, error);
        let Some(cuda) = device(&mut self.backend) else {
            return Ok(Vec::new());
        };
        cuda.start_profile().map_err(failed)?;
        self.run(track)?;
        match device(&mut self.backend) {
            Some(cuda) => cuda
                .stop_profile()
                .map_err(|error| Error::backend(&self.name, error)),
            None => Ok(Vec::new()),
        }
    }

    fn launches(&self) -> Option<Launches> {
        let backend: &dyn Any = self.backend.inner();
        Some(backend.downcast_ref::<Cuda>()?.runs().into())
    }

    fn warnings(&mut self) -> Vec<String> {
        std::iter::from_fn(|| self.backend.warning().map(str::to_owned)).collect()
    }
}

/// The backend, if it is a device.
fn device<B: TrainBackend + 'static>(backend: &mut Timed<B>) -> Option<&mut Cuda> {
    let backend: &mut dyn Any = backend.inner_mut();
    backend.downcast_mut()
}

/// A network's forward, its answer read.
struct Infer<B: TrainBackend> {
    track: Track,
    params: B::Params,
    runner: Runner<Timed<B>>,
}

impl<B: TrainBackend> Infer<B> {
    fn new(
        backend: &mut Timed<B>,
        host: Host,
        network: &Network,
        values: Option<&[f32]>,
        batch: usize,
    ) -> Result<Self, B::Error> {
        let layout = network.layout();
        let params = match values {
            Some(values) if !host.empty => backend.frozen_params(&layout, values)?,
            _ => backend.frozen_params(&layout, &host.params(&layout)?)?,
        };
        let mut runner = Runner::new(backend, network, batch)?;
        runner.load(backend, &host.normal(network.images_len(batch)))?;
        Ok(Self {
            track: Track {
                product: None,
                macs: batch as u64 * network.multiply_adds(),
            },
            params,
            runner,
        })
    }
}

impl<B: TrainBackend> Work<B> for Infer<B> {
    fn tracks(&self) -> &[Track] {
        std::slice::from_ref(&self.track)
    }

    fn run(&mut self, backend: &mut Timed<B>, _track: usize) -> Result<(), B::Error> {
        self.runner.forward(backend, &self.params)
    }
}

/// Pictures of noise, as a loader hands them over.
struct Pictures {
    values: Vec<u8>,
    crops: Option<Vec<Crop>>,
    flips: Option<Vec<bool>>,
    /// Of every channel: values of mean 0 and variance 1.
    mean: Vec<f32>,
    std: Vec<f32>,
}

/// Height and width of the photographs that crops are cut out of, for a network that sees `PHOTO_SEEN` pixels square: the commonest of
/// ImageNet. For others photographs are larger or smaller by the same factor.
const PHOTO: [usize; 2] = [375, 500];
const PHOTO_SEEN: usize = 224;

impl Pictures {
    /// With `crops` each picture is a random crop of a photograph, drawn and mirrored as pre-training on photographs does without
    /// other settings: on average 1.9 times the pixels of the result, each of another size.
    fn new(host: Host, dims: PixelDims, crops: bool) -> Self {
        let mean = vec![0.5; dims.channels];
        let std = vec![1.0 / 12_f32.sqrt(); dims.channels];
        if !crops {
            return Self {
                values: host.bytes(dims.len()),
                crops: None,
                flips: None,
                mean,
                std,
            };
        }
        let photo = |side: usize, seen: usize| (side * seen / PHOTO_SEEN).max(1);
        let (height, width) = (photo(PHOTO[0], dims.height), photo(PHOTO[1], dims.width));
        let scale = (PAPER_CROP_SCALE[0], PAPER_CROP_SCALE[1]);
        let (mut places, mut flips, mut start) = (Vec::new(), Vec::new(), 0);
        for sample in 0..dims.batch {
            let mut stream = Stream::new(0, 0, sample as u64, Purpose::Augment);
            let cut = random_resized_crop(width, height, scale, (0.75, 4.0 / 3.0), &mut stream);
            places.push(Crop {
                start,
                height: cut.height,
                width: cut.width,
            });
            flips.push(stream.uniform() < 0.5);
            start += cut.height * cut.width * dims.channels;
        }
        Self {
            values: host.bytes(start),
            crops: Some(places),
            flips: Some(flips),
            mean,
            std,
        }
    }

    fn pixels(&self) -> Pixels<'_> {
        Pixels {
            values: &self.values,
            crops: self.crops.as_deref(),
            flips: self.flips.as_deref(),
            mean: &self.mean,
            std: &self.std,
        }
    }
}

/// A pre-training step as the training loop does it: its loss read, or kept on a device that is not waited for.
struct Step<B: TrainBackend> {
    track: Track,
    state: TrainState<Timed<B>>,
    model: Pretrainer<Timed<B>>,
    pictures: Pictures,
    keep: Vec<u32>,
    remove: Vec<u32>,
    adamw: AdamW,
}

impl<B: TrainBackend> Step<B> {
    fn new(
        backend: &mut Timed<B>,
        host: Host,
        config: &PretrainConfig,
        batch: usize,
        crops: bool,
    ) -> Result<Self, B::Error> {
        let layout = Layout::pretrain(config);
        let values = host.params(&layout)?;
        let student = backend.params(&layout, &values)?;
        let teacher = match config.target {
            Target::Teacher(_) => {
                let layout = layout.teacher();
                let len = values.len().min(layout.len());
                Some(backend.teacher_params(&layout, &values[..len])?)
            }
            Target::Pixels { .. } => None,
        };
        drop(values);
        let (mut keep, mut remove) = (Vec::new(), Vec::new());
        let mut order = vec![0; config.vit.num_patches()];
        for sample in 0..batch {
            let mut stream = Stream::new(0, 0, sample as u64, Purpose::Mask);
            let noise: Vec<f32> = order.iter().map(|_| stream.uniform()).collect();
            random_masking(&noise, &mut order)?;
            keep.extend_from_slice(&order[..config.visible()]);
            remove.extend_from_slice(&order[config.visible()..]);
        }
        Ok(Self {
            track: Track {
                product: None,
                macs: batch as u64 * flops::Step::new(config).total(),
            },
            model: Pretrainer::new(backend, config, batch, false)?,
            state: TrainState::with_params(backend, layout, student, teacher, 0.05)?,
            pictures: Pictures::new(host, config.vit.pixels(batch), crops),
            keep,
            remove,
            adamw: adamw([0.9, 0.95], 0.9999),
        })
    }
}

impl<B: TrainBackend> Work<B> for Step<B> {
    fn tracks(&self) -> &[Track] {
        std::slice::from_ref(&self.track)
    }

    fn uploads(&self) -> bool {
        true
    }

    fn run(&mut self, backend: &mut Timed<B>, _track: usize) -> Result<(), B::Error> {
        self.adamw.step += 1;
        self.state.begin_step(backend)?;
        self.model
            .load_pixels(backend, self.pictures.pixels(), &self.keep, &self.remove)?;
        self.model
            .accumulate(backend, &mut self.state, 1.0, &mut MeanSimilarity)?;
        update(backend, &mut self.state, &self.adamw)
    }
}

/// Before the first step of a run.
const fn adamw([beta1, beta2]: [f64; 2], momentum: f64) -> AdamW {
    AdamW {
        lr: 1e-4,
        beta1,
        beta2,
        eps: 1e-8,
        step: 0,
        momentum,
    }
}

/// The end of a step: its loss read, or kept on a device that is not waited for.
fn update<B: TrainBackend>(
    backend: &mut Timed<B>,
    state: &mut TrainState<Timed<B>>,
    adamw: &AdamW,
) -> Result<(), B::Error> {
    state.update(backend, adamw, None)?;
    if backend.is_queued() {
        return state.record(backend, 0, 0);
    }
    state.scalars(backend).map(|_| ())
}

/// Multiply-adds of a picture's fine-tuning step: a backward counts twice its forward, as in [`flops::Step::total`].
pub(super) fn finetune_macs(config: &ClassifierConfig) -> u64 {
    3 * flops::classifier(config)
}

/// Of MAE's recipe for ViT-B, on trained weights, for every model: narrow ones have no stochastic depth by default, and a step with it
/// runs everything that fine-tuning may.
const DROP_PATH: f64 = 0.1;
const LAYER_DECAY: f64 = 0.65;

/// A fine-tuning step as the training loop does it, on pictures that are not mixed.
struct Finetune<B: TrainBackend> {
    track: Track,
    state: TrainState<Timed<B>>,
    model: ClassifierTrainer<Timed<B>>,
    scorer: CriterionScorer<Timed<B>>,
    pictures: Pictures,
    /// A smoothed label of each picture.
    targets: Vec<f32>,
    drop_path: Vec<f32>,
    adamw: AdamW,
}

impl<B: TrainBackend> Finetune<B> {
    fn new(
        backend: &mut Timed<B>,
        host: Host,
        config: &ClassifierConfig,
        batch: usize,
        crops: bool,
    ) -> Result<Self, B::Error> {
        let (usual, vit) = (FinetuneSettings::default(), &config.vit);
        let (depth, classes, reduction) = (vit.depth, config.num_classes, &config.reduction);
        let layout = Layout::classifier(config);
        let values = host.params(&layout)?;
        let student = backend.params(&layout, &values)?;
        drop(values);
        let state = TrainState::with_params(backend, layout, student, None, usual.weight_decay);
        let mut state = state?;
        state.set_layer_decay(LAYER_DECAY);
        let mut targets = Vec::new();
        if !host.empty {
            let labels: Vec<u32> = (0..batch).map(|sample| (sample % classes) as u32).collect();
            let mix = Mix {
                mixup: 0.0,
                cutmix: 0.0,
                smoothing: usual.smoothing,
            };
            let shape = Shape {
                channels: vit.in_chans,
                height: vit.img_size[0],
                width: vit.img_size[1],
            };
            let mut stream = Stream::new(0, 0, 0, Purpose::Mix);
            mix.apply(&mut stream, &mut [], shape, &labels, classes, &mut targets);
        }
        let samples: Vec<u64> = (0..batch as u64).collect();
        let key = Key {
            seed: 0,
            epoch: 0,
            samples: &samples,
        };
        let mut drop_path = Vec::new();
        draws::drop_path(key, depth, DROP_PATH, &mut drop_path);
        let patches = vit.num_patches();
        let mut scorer = CriterionScorer::new(backend, reduction, batch, patches, depth)?;
        draws::selection(backend, key, reduction, patches, depth, &mut scorer)?;
        Ok(Self {
            track: Track {
                product: None,
                macs: batch as u64 * finetune_macs(config),
            },
            model: ClassifierTrainer::new(backend, config, batch, true)?,
            state,
            scorer,
            pictures: Pictures::new(host, vit.pixels(batch), crops),
            targets,
            drop_path,
            adamw: adamw([usual.beta1, usual.beta2], usual.ema),
        })
    }
}

impl<B: TrainBackend> Work<B> for Finetune<B> {
    fn tracks(&self) -> &[Track] {
        std::slice::from_ref(&self.track)
    }

    fn uploads(&self) -> bool {
        true
    }

    fn run(&mut self, backend: &mut Timed<B>, _track: usize) -> Result<(), B::Error> {
        self.adamw.step += 1;
        self.state.begin_step(backend)?;
        self.model
            .load_pixels(backend, self.pictures.pixels(), &self.targets)?;
        self.model.set_drop_path(backend, &self.drop_path)?;
        self.model
            .accumulate(backend, &mut self.state, 1.0, &mut self.scorer)?;
        update(backend, &mut self.state, &self.adamw)
    }
}

/// How a linear layer is used.
#[derive(Clone, Copy)]
enum Pass {
    /// Of inference: frozen weights.
    Forward,
    /// Of training: weights as they are updated, saving what the backward needs.
    TrainingForward,
    InputGradient,
    ParamsGradient,
}

impl Pass {
    const ALL: [Self; 4] = [
        Self::Forward,
        Self::TrainingForward,
        Self::InputGradient,
        Self::ParamsGradient,
    ];

    const fn name(self) -> &'static str {
        match self {
            Self::Forward => "forward",
            Self::TrainingForward => "training forward",
            Self::InputGradient => "input gradient",
            Self::ParamsGradient => "parameter gradient",
        }
    }
}

/// Every linear layer of the encoder, on all tokens of the pictures, in each [`Pass`]. A track goes from block to block,
/// so that weights come from memory as they do in a model.
struct Products<B: TrainBackend> {
    tracks: Vec<Track>,
    /// Layer, pass and epilogue of each track.
    calls: Vec<(usize, Pass)>,
    layout: Layout,
    params: B::Params,
    frozen: B::Params,
    grads: B::Vector,
    x: B::Buf,
    y: B::Buf,
    pre_gelu: B::Buf,
    residual: B::Buf,
    block: usize,
}

/// The linear layers of a block, and the patch embedding.
const LAYERS: [(&str, Epilogue); 5] = [
    ("patch_embed", Epilogue::Bias),
    ("qkv", Epilogue::BiasQkv),
    ("proj", Epilogue::BiasResidual),
    ("fc1", Epilogue::BiasGelu),
    ("fc2", Epilogue::BiasResidual),
];

impl<B: TrainBackend> Products<B> {
    fn new(
        backend: &mut Timed<B>,
        host: Host,
        vit: &VitConfig,
        batch: usize,
    ) -> Result<Self, B::Error> {
        let (d, hidden, patches) = (vit.embed_dim, vit.mlp_hidden(), vit.num_patches());
        let tokens = batch * (1 + patches);
        let dims = |rows, in_features, out_features| LinearDims {
            rows,
            in_features,
            out_features,
        };
        let sizes = [
            dims(batch * patches, vit.patch_len(), d),
            dims(tokens, d, 3 * d),
            dims(tokens, d, d),
            dims(tokens, d, hidden),
            dims(tokens, hidden, d),
        ];
        let (mut tracks, mut calls) = (Vec::new(), Vec::new());
        for (layer, ((name, _), dims)) in LAYERS.into_iter().zip(sizes).enumerate() {
            for pass in Pass::ALL {
                // Pictures have no gradient.
                if layer == 0 && matches!(pass, Pass::InputGradient) {
                    continue;
                }
                tracks.push(Track {
                    product: Some((name, pass.name(), dims)),
                    macs: Op::Linear(dims).macs(),
                });
                calls.push((layer, pass));
            }
        }
        let widest = sizes
            .iter()
            .map(|dims| dims.in_len().max(dims.out_len()))
            .max()
            .unwrap_or(0);
        let layout = Layout::encoder(vit);
        let values = host.params(&layout)?;
        let mut filled = || {
            let mut buf = backend.buf(widest)?;
            backend.write(&mut buf, &host.normal(widest))?;
            Ok::<_, B::Error>(buf)
        };
        let (x, y, pre_gelu, residual) = (filled()?, filled()?, filled()?, filled()?);
        Ok(Self {
            tracks,
            calls,
            params: backend.params(&layout, &values)?,
            frozen: backend.frozen_params(&layout, &values)?,
            grads: backend.vector(layout.len())?,
            layout,
            x,
            y,
            pre_gelu,
            residual,
            block: 0,
        })
    }

    /// Parameters of a layer of the next block.
    fn next(&mut self, layer: usize) -> Linear {
        let blocks = self.layout.encoder.blocks;
        self.block = (self.block + 1) % blocks.depth;
        let block = blocks.block(self.block);
        match layer {
            0 => self.layout.encoder.patch_embed,
            1 => block.qkv,
            2 => block.proj,
            3 => block.fc1,
            _ => block.fc2,
        }
    }
}

impl<B: TrainBackend> Work<B> for Products<B> {
    fn tracks(&self) -> &[Track] {
        &self.tracks
    }

    fn begin(&mut self) {
        self.block = 0;
    }

    fn run(&mut self, backend: &mut Timed<B>, track: usize) -> Result<(), B::Error> {
        let (layer, pass) = self.calls[track];
        let Some((_, _, dims)) = self.tracks[track].product else {
            return Ok(());
        };
        let linear = self.next(layer);
        let epilogue = LAYERS[layer].1;
        let Self {
            params,
            frozen,
            grads,
            x,
            y,
            pre_gelu,
            residual,
            ..
        } = self;
        match (pass, epilogue) {
            (Pass::Forward, _) => backend.linear(dims, y, x, frozen, linear, epilogue),
            (Pass::TrainingForward, Epilogue::Bias | Epilogue::BiasQkv) => {
                backend.linear(dims, y, x, params, linear, epilogue)
            }
            (Pass::TrainingForward, Epilogue::BiasGelu) => {
                backend.linear_gelu_saving(dims, y, pre_gelu, x, params, linear)
            }
            (Pass::TrainingForward, Epilogue::BiasResidual) => {
                backend.linear_residual(dims, y, residual, x, params, linear, None)
            }
            (Pass::InputGradient, _) => {
                // The input of the MLP's second layer comes out of a GELU.
                let pre_gelu = (layer == 4).then_some(&*pre_gelu);
                backend.linear_backward_input(dims, y, x, params, linear, pre_gelu)
            }
            (Pass::ParamsGradient, _) => backend.linear_backward_params(dims, grads, linear, y, x),
        }
    }
}

/// A block's forward on all tokens of the pictures, from block to block.
struct Block<B: TrainBackend> {
    track: Track,
    vit: VitConfig,
    batch: usize,
    layout: Layout,
    params: B::Params,
    x: B::Buf,
    y: B::Buf,
    wide: B::Buf,
    block: usize,
}

impl<B: TrainBackend> Block<B> {
    fn new(
        backend: &mut Timed<B>,
        host: Host,
        vit: &VitConfig,
        batch: usize,
    ) -> Result<Self, B::Error> {
        let (d, hidden, tokens) = (vit.embed_dim, vit.mlp_hidden(), 1 + vit.num_patches());
        let layout = Layout::encoder(vit);
        let len = batch * tokens * d;
        let mut x = backend.buf(len)?;
        backend.write(&mut x, &host.normal(len))?;
        Ok(Self {
            track: Track {
                product: None,
                macs: batch as u64 * flops::block(tokens, d, hidden),
            },
            vit: *vit,
            batch,
            params: backend.frozen_params(&layout, &host.params(&layout)?)?,
            layout,
            x,
            y: backend.buf(len)?,
            wide: backend.buf(batch * tokens * hidden.max(3 * d))?,
            block: 0,
        })
    }
}

impl<B: TrainBackend> Work<B> for Block<B> {
    fn tracks(&self) -> &[Track] {
        std::slice::from_ref(&self.track)
    }

    fn begin(&mut self) {
        self.block = 0;
    }

    fn run(&mut self, backend: &mut Timed<B>, _track: usize) -> Result<(), B::Error> {
        let blocks = self.layout.encoder.blocks;
        self.block = (self.block + 1) % blocks.depth;
        let block = blocks.block(self.block);
        let dims = BlockDims {
            attention: AttentionDims {
                batch: self.batch,
                tokens: 1 + self.vit.num_patches(),
                num_heads: blocks.num_heads,
                head_dim: blocks.dim / blocks.num_heads,
            },
            hidden: blocks.hidden,
        };
        let Self {
            params, x, y, wide, ..
        } = self;
        backend.block(dims, x, [y, wide], params, block)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn crops_are_those_of_photographs() {
        for (height, width, channels, expected) in [
            (224, 224, 3, 1.86),
            (384, 384, 3, 1.86),
            (28, 28, 1, 1.8),
            (64, 128, 3, 1.26),
        ] {
            let dims = PixelDims {
                batch: 500,
                channels,
                height,
                width,
            };
            let pictures = Pictures::new(Host { empty: false }, dims, true);
            let pixels = pictures.pixels();
            pixels.check("test", dims).unwrap();
            let crops = pixels.crops.unwrap();
            let end = |crop: &Crop| crop.start + crop.height * crop.width * channels;
            let starts = crops.windows(2).map(|pair| (end(&pair[0]), pair[1].start));
            assert!(starts.into_iter().all(|(end, start)| end == start));
            assert_eq!(crops.last().map(end), Some(pixels.values.len()));
            // Of 1.67 x 2.23 times the pixels of the result, 0.2 to 1: large parts fit less often, of broad pictures least.
            let mean = pixels.values.len() as f64 / dims.len() as f64;
            assert!((mean - expected).abs() < 0.1, "{mean} of {dims:?}");
            let sizes: std::collections::BTreeSet<_> =
                crops.iter().map(|crop| (crop.height, crop.width)).collect();
            assert!(sizes.len() > 100, "{}", sizes.len());
            let flipped = (0..500).filter(|b| pixels.is_flipped(*b)).count();
            assert!((200..300).contains(&flipped), "{flipped}");
        }
    }
}
