//! The settings of a run: defaults, a TOML file, `--set` and flags over it, and what follows from them.

pub(crate) mod shared;

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use pcae_kernel::config::{
    Budget, ConfigError, Criterion, DecoderConfig, DropLayers, Place, PretrainConfig, Reduction,
    StageLayout, Target,
};
use serde::{Deserialize, Serialize};

use crate::data::Splits;
use crate::data::augment::Transform;
use crate::error::Error;
use crate::fit::BatchSize;
use crate::training::Plan;
use crate::training::plan::{Defaults, Knobs, require};
use shared::{Architecture, Crops, transform};

/// What is predicted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Method {
    /// Teacher's features at the tokens it retains.
    #[default]
    Pcae,
    /// Pixels of all masked patches.
    Mae,
}

impl fmt::Display for Method {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Pcae => "pcae",
            Self::Mae => "mae",
        })
    }
}

/// Everything that defines a run. As TOML it is flat, with the names of the flags in snake case.
///
/// What is `None` follows from the rest and from the data: [`Settings::resolve`] fills it in.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Settings {
    /// Preset of the encoder.
    pub model: String,
    /// What is predicted.
    pub method: Method,
    /// Height and width of the pictures that the model sees.
    pub img_size: Option<[usize; 2]>,
    /// Channels of the pictures.
    pub in_chans: Option<usize>,
    /// Edge of a patch in pixels.
    pub patch_size: Option<usize>,
    /// Width of the encoder.
    pub embed_dim: Option<usize>,
    /// Blocks of the encoder.
    pub depth: Option<usize>,
    /// Heads of the encoder.
    pub num_heads: Option<usize>,
    /// Hidden width of the MLPs over the width.
    pub mlp_ratio: Option<f64>,
    /// Width of the decoder.
    pub decoder_embed_dim: Option<usize>,
    /// Blocks of the decoder.
    pub decoder_depth: Option<usize>,
    /// Heads of the decoder.
    pub decoder_num_heads: Option<usize>,
    /// Part of the patches that the student does not see.
    pub mask_ratio: f64,
    /// Part of the teacher's tokens that each stage keeps.
    pub keep_ratio: f64,
    /// After which blocks the teacher drops tokens.
    pub drop_layers: DropLayersSpec,
    /// Where it drops them: `progressive`, `input`, or the number of a block for all at once.
    pub drop_place: PlaceSpec,
    /// Which tokens it drops.
    pub criterion: CriterionSpec,
    /// Whether MAE's target is standardised per patch.
    pub norm_pix: bool,

    /// Folder of the pictures; without one the embedded Fashion-MNIST.
    pub data: Option<PathBuf>,
    /// Least and greatest area of the random crops, as a part of the picture's.
    pub crop_scale: Option<[f64; 2]>,
    /// Least and greatest aspect ratio of the random crops.
    pub crop_ratio: [f64; 2],
    /// Whether pictures are mirrored half of the time.
    pub flip: bool,
    /// Mean of each channel, of pixels from 0 to 1.
    pub mean: Option<Vec<f32>>,
    /// Standard deviation of each channel.
    pub std: Option<Vec<f32>>,

    /// Passes over the data, unless `steps` is given.
    pub epochs: Option<u64>,
    /// Optimizer steps.
    pub steps: Option<u64>,
    /// Pictures in a micro-batch.
    pub batch_size: BatchSize,
    /// Micro-batches in a step.
    pub accum: u64,
    /// Peak learning rate per 256 pictures of a step.
    pub blr: Option<f64>,
    /// Peak learning rate.
    pub lr: Option<f64>,
    /// Last learning rate.
    pub min_lr: f64,
    /// Steps in which the learning rate rises to its peak.
    pub warmup_steps: Option<u64>,
    /// Decoupled weight decay of the weights of linear layers.
    pub weight_decay: f64,
    /// AdamW's decay of the mean gradient.
    pub beta1: f64,
    /// AdamW's decay of the mean squared gradient.
    pub beta2: f64,
    /// Bound on the norm of the gradient; 0 for none.
    pub clip_grad: f64,
    /// Probability that stochastic depth drops a branch of the student's last block.
    pub drop_path: f64,
    /// First momentum of the teacher.
    pub momentum: Option<f64>,
    /// Last momentum of the teacher.
    pub momentum_end: f64,
    /// Seed of everything random.
    pub seed: u64,

    /// Epochs between two evaluations; 0 for none but the first and the last.
    pub eval_every: u64,
    /// Neighbours that vote in the evaluation.
    pub knn_k: usize,
    /// Steps between two checkpoints.
    pub save_every: Option<u64>,

    /// Where the run is computed; changes no number but by rounding.
    #[serde(flatten)]
    pub machine: Machine,
}

/// Where a run is computed and stored: what another machine may choose anew.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Machine {
    /// What computes.
    pub backend: BackendKind,
    /// Number format of the computation; f32 if `None`, but bf16 on a GPU.
    pub precision: Option<Precision>,
    /// Number format of the teacher's, if not the same: it has no gradient.
    pub teacher_precision: Option<Precision>,
    /// Instruction set of the CPU backend; the best there is if `None`.
    pub isa: Option<String>,
    /// Whether a GPU times the algorithms of each matrix product and keeps the fastest: the last bits of results may then change
    /// from start to start.
    pub tune: bool,
    /// Threads that compute; 0 for all.
    pub threads: usize,
    /// Threads that prepare batches, 0 to do so between the steps; one if `None`, but on a GPU all cores but one.
    pub workers: Option<usize>,
    /// The run directory.
    pub out: PathBuf,
}

/// What computes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum BackendKind {
    /// SIMD and threads.
    #[default]
    Cpu,
    /// An NVIDIA GPU, the first that CUDA_VISIBLE_DEVICES allows.
    Cuda,
    /// The scalar reference, slow.
    Reference,
}

/// Number format of a computation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// 32 bits.
    #[default]
    F32,
    /// 64 bits, on the reference alone.
    F64,
    /// 16 bits with the range of f32, for what linear layers and attention read: on the CPU but for the residual stream, on a GPU
    /// with it. Sums, norms, softmax, loss, and the parameters that are trained stay f32.
    Bf16,
    /// 8 bits (e4m3), for the linear layers of a teacher on a GPU, beside a student in bf16.
    Fp8,
}

/// As typed: `0,4,8`, or `LAYOUT:STAGES` with a layout of `starts`, `ends`, `even`, `first`, or `none`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DropLayersSpec {
    /// These blocks.
    Blocks(Vec<usize>),
    /// As many, laid out so.
    Preset(StageLayout, usize),
}

/// As typed: `progressive`, `input`, or a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PlaceSpec(pub Place);

/// As typed: `mean-similarity`, `random`, `pivoted-qr`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CriterionSpec(pub Criterion);

const LAYOUTS: [(&str, StageLayout); 4] = [
    ("starts", StageLayout::Starts),
    ("ends", StageLayout::Ends),
    ("even", StageLayout::Even),
    ("first", StageLayout::First),
];

const CRITERIA: [(&str, Criterion); 3] = [
    ("mean-similarity", Criterion::MeanSimilarity),
    ("random", Criterion::Random),
    ("pivoted-qr", Criterion::PivotedQr),
];

impl DropLayersSpec {
    /// The blocks of an encoder of `depth`.
    ///
    /// # Errors
    /// [`ConfigError`] if there are not as many.
    pub fn layers(&self, depth: usize) -> Result<DropLayers, ConfigError> {
        match self {
            Self::Blocks(blocks) => DropLayers::new(blocks, depth),
            Self::Preset(layout, stages) => DropLayers::preset(*layout, *stages, depth),
        }
    }
}

impl FromStr for DropLayersSpec {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || {
            format!(
                "expected block numbers such as 0,4,8, \"none\", or starts:N, ends:N, even:N or first:N with N the number \
                 of stages, found {text:?}"
            )
        };
        if text == "none" {
            return Ok(Self::Blocks(Vec::new()));
        }
        if let Some((layout, stages)) = text.split_once(':') {
            let (_, layout) = LAYOUTS
                .iter()
                .find(|(name, _)| *name == layout)
                .ok_or_else(wrong)?;
            return Ok(Self::Preset(*layout, stages.parse().map_err(|_| wrong())?));
        }
        let blocks = text
            .split(',')
            .map(|block| block.trim().parse().map_err(|_| wrong()));
        Ok(Self::Blocks(blocks.collect::<Result<_, _>>()?))
    }
}

impl fmt::Display for DropLayersSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Preset(layout, stages) => {
                let name = LAYOUTS
                    .iter()
                    .find(|(_, other)| other == layout)
                    .map_or("", |(name, _)| name);
                write!(f, "{name}:{stages}")
            }
            Self::Blocks(blocks) if blocks.is_empty() => f.write_str("none"),
            Self::Blocks(blocks) => {
                let blocks: Vec<String> = blocks.iter().map(usize::to_string).collect();
                f.write_str(&blocks.join(","))
            }
        }
    }
}

impl FromStr for PlaceSpec {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "progressive" => Ok(Self(Place::Progressive)),
            "input" => Ok(Self(Place::Input)),
            block => match block.parse() {
                Ok(block) => Ok(Self(Place::OneStage(block))),
                Err(_) => Err(format!(
                    "expected \"progressive\", \"input\" or the number of a block, found {text:?}"
                )),
            },
        }
    }
}

impl fmt::Display for PlaceSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Place::Progressive => f.write_str("progressive"),
            Place::Input => f.write_str("input"),
            Place::OneStage(block) => write!(f, "{block}"),
        }
    }
}

impl FromStr for CriterionSpec {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match CRITERIA.iter().find(|(name, _)| *name == text) {
            Some((_, criterion)) => Ok(Self(*criterion)),
            None => Err(format!(
                "expected mean-similarity, random or pivoted-qr, found {text:?}"
            )),
        }
    }
}

impl fmt::Display for CriterionSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(
            CRITERIA
                .iter()
                .find(|(_, criterion)| *criterion == self.0)
                .map_or("", |(name, _)| name),
        )
    }
}

macro_rules! serde_as_text {
    ($($type:ty),*) => {$(
        impl Serialize for $type {
            fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }

        impl<'de> Deserialize<'de> for $type {
            fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
            }
        }
    )*};
}

pub(crate) use serde_as_text;

serde_as_text!(DropLayersSpec, PlaceSpec, CriterionSpec);

impl Default for Settings {
    fn default() -> Self {
        Self {
            model: "vit-micro".to_owned(),
            method: Method::Pcae,
            img_size: None,
            in_chans: None,
            patch_size: None,
            embed_dim: None,
            depth: None,
            num_heads: None,
            mlp_ratio: None,
            decoder_embed_dim: None,
            decoder_depth: None,
            decoder_num_heads: None,
            mask_ratio: 0.75,
            keep_ratio: 0.5,
            drop_layers: DropLayersSpec::Preset(StageLayout::Starts, 3),
            drop_place: PlaceSpec(Place::Progressive),
            criterion: CriterionSpec(Criterion::MeanSimilarity),
            norm_pix: true,
            data: None,
            crop_scale: None,
            crop_ratio: [3.0 / 4.0, 4.0 / 3.0],
            flip: true,
            mean: None,
            std: None,
            epochs: None,
            steps: None,
            batch_size: BatchSize::Pictures(64),
            accum: 1,
            blr: None,
            lr: None,
            min_lr: 0.0,
            warmup_steps: None,
            weight_decay: 0.05,
            beta1: 0.9,
            beta2: 0.95,
            clip_grad: 0.0,
            drop_path: 0.0,
            momentum: None,
            momentum_end: 1.0,
            seed: 0,
            eval_every: 5,
            knn_k: 20,
            save_every: None,
            machine: Machine::default(),
        }
    }
}

/// Where a pre-training run goes.
const DEFAULT_OUT: &str = "runs/pretrain";

impl Default for Machine {
    fn default() -> Self {
        Self {
            backend: BackendKind::Cpu,
            precision: None,
            teacher_precision: None,
            isa: None,
            tune: false,
            threads: 0,
            workers: None,
            out: PathBuf::from(DEFAULT_OUT),
        }
    }
}

impl Machine {
    /// The number format that is computed in.
    pub fn precision(&self) -> Precision {
        self.precision.unwrap_or(match self.backend {
            BackendKind::Cuda => Precision::Bf16,
            BackendKind::Cpu | BackendKind::Reference => Precision::F32,
        })
    }

    /// Threads that prepare batches. The CPU backend has a thread on every core already. A GPU waits for nothing else, and one core
    /// drives it; more than the most that are taken here would wait for each other.
    pub fn workers(&self) -> usize {
        const MOST: usize = 64;
        self.workers.unwrap_or_else(|| match self.backend {
            BackendKind::Cuda => {
                let cores = std::thread::available_parallelism().map_or(1, usize::from);
                cores.saturating_sub(1).clamp(1, MOST)
            }
            BackendKind::Cpu | BackendKind::Reference => 1,
        })
    }

    /// The keys of these settings.
    pub const KEYS: [&'static str; 8] = [
        "backend",
        "precision",
        "teacher_precision",
        "isa",
        "tune",
        "threads",
        "workers",
        "out",
    ];
}

/// What a run needs, all of it checked.
#[derive(Clone, Debug, PartialEq)]
pub struct Recipe {
    /// The model and its task.
    pub task: PretrainConfig,
    /// What happens to a picture on its way in.
    pub transform: Transform,
    /// The numbers of the loop.
    pub plan: Plan,
    /// First momentum of the teacher.
    pub momentum: f64,
}

impl Settings {
    /// Defaults, under the TOML of `config`, under `overrides` (`key`, value as TOML or plain text).
    ///
    /// # Errors
    /// [`Error::Setting`] naming the key, or [`Error::ConfigFile`] naming the file.
    pub fn load(config: Option<&Path>, overrides: &[(String, String)]) -> Result<Self, Error> {
        shared::load(config, overrides, DEFAULT_OUT)
    }

    /// Reads the text of a `config.toml`; `path` is its name in errors.
    ///
    /// # Errors
    /// [`Error::ConfigFile`].
    pub fn parse(path: &Path, text: &str) -> Result<Self, Error> {
        shared::parse(path, text)
    }

    /// As TOML.
    ///
    /// # Errors
    /// [`Error::Setting`] for values that TOML cannot hold, such as a path that is no text.
    pub fn to_toml(&self) -> Result<String, Error> {
        shared::to_toml(self)
    }

    /// The settings without those of the machine, as one line of JSON: what a checkpoint carries. Equal runs on different
    /// machines have equal ones.
    pub fn recipe_json(&self) -> String {
        shared::recipe_json(self)
    }

    /// The encoder and decoder, once [`Settings::resolve`] has filled in what depends on the data.
    ///
    /// # Errors
    /// [`Error::Setting`] or [`Error::Config`].
    pub fn task(&self) -> Result<PretrainConfig, Error> {
        let vit = Architecture {
            model: &self.model,
            img_size: self.img_size,
            in_chans: self.in_chans,
            patch_size: self.patch_size,
            embed_dim: self.embed_dim,
            depth: self.depth,
            num_heads: self.num_heads,
            mlp_ratio: self.mlp_ratio,
        }
        .vit()?;
        let default = vit.default_decoder();
        let decoder = DecoderConfig {
            embed_dim: self.decoder_embed_dim.unwrap_or(default.embed_dim),
            depth: self.decoder_depth.unwrap_or(default.depth),
            num_heads: self.decoder_num_heads.unwrap_or(default.num_heads),
        };
        let drop_layers = self.drop_layers.layers(vit.depth)?;
        let target = match self.method {
            Method::Mae => Target::Pixels {
                norm_pix: self.norm_pix,
            },
            Method::Pcae => Target::Teacher(Reduction {
                criterion: self.criterion.0,
                place: self.drop_place.0,
                drop_layers,
                budget: Budget::Keep(self.keep_ratio),
            }),
        };
        let task = PretrainConfig {
            vit,
            decoder,
            mask_ratio: self.mask_ratio,
            target,
        };
        task.check()?;
        Ok(task)
    }

    /// Checks everything, and fills in what follows from the data and from other settings.
    ///
    /// # Errors
    /// [`Error::Setting`], [`Error::Config`] or [`Error::Data`].
    pub fn resolve(&mut self, splits: &Splits) -> Result<Recipe, Error> {
        self.in_chans = Some(splits.train.channels());
        self.machine.precision = Some(self.machine.precision());
        let task = self.task()?;
        self.img_size = Some(task.vit.img_size);
        let is_small = task.vit.embed_dim < SMALL_BELOW;
        let plan = Knobs {
            epochs: &mut self.epochs,
            steps: self.steps,
            lr: self.lr,
            blr: &mut self.blr,
            min_lr: self.min_lr,
            warmup_steps: &mut self.warmup_steps,
            beta1: self.beta1,
            beta2: self.beta2,
            weight_decay: self.weight_decay,
            clip_grad: self.clip_grad,
            drop_path: self.drop_path,
            batch_size: self.batch_size.pictures()?,
            accum: self.accum,
            eval_every: self.eval_every,
            save_every: &mut self.save_every,
            seed: self.seed,
            workers: self.machine.workers(),
        }
        .resolve(
            &Defaults {
                epochs: DEFAULT_EPOCHS,
                blr: if is_small { SMALL_BLR } else { PAPER_BLR },
                steps_per_warmup_step: 20,
            },
            splits.train.len(),
        )?;
        let end = self.momentum_end;
        require("momentum_end", (0.0..=1.0).contains(&end), "0 to 1", &end)?;
        require("knn_k", self.knn_k >= 1, "at least 1", &self.knn_k)?;
        let momentum = *self.momentum.get_or_insert(default_momentum(plan.steps));
        require(
            "momentum",
            (0.0..=1.0).contains(&momentum),
            "0 to 1",
            &momentum,
        )?;
        let crop_scale = *self.crop_scale.get_or_insert(if is_small {
            SMALL_CROP_SCALE
        } else {
            PAPER_CROP_SCALE
        });
        let crops = Crops {
            scale: crop_scale,
            ratio: self.crop_ratio,
            flip: self.flip,
        };
        let transform = transform(
            &task.vit,
            &splits.train,
            crops,
            &mut self.mean,
            &mut self.std,
        )?;
        Ok(Recipe {
            task,
            transform,
            plan,
            momentum,
        })
    }
}

/// About three minutes on two cores with the embedded set.
const DEFAULT_EPOCHS: u64 = 24;
/// Of the paper's family of methods, for ViT-Ti and larger on photographs.
const PAPER_BLR: f64 = 1.5e-4;
pub(crate) const PAPER_CROP_SCALE: [f64; 2] = [0.2, 1.0];
/// Encoders narrower than this, ViT-Ti's width, are for small pictures.
pub(crate) const SMALL_BELOW: usize = 192;
/// For those, chosen by trial on the embedded set.
const SMALL_BLR: f64 = 4e-3;
const SMALL_CROP_SCALE: [f64; 2] = [0.5, 1.0];

/// The teacher averages over `1 / (1 - momentum)` steps: a twelfth of the run. An ImageNet-length run of 120,000 steps then
/// has the paper's 0.9999. Below 0.996, where runs of up to 3,000 steps stay, the teacher follows so fast that it collapses
/// (seen on the embedded set).
fn default_momentum(steps: u64) -> f64 {
    (1.0 - 12.0 / steps as f64).clamp(0.996, 0.9999)
}
