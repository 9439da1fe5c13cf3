//! The settings of fine-tuning: defaults, a TOML file, `--set` and flags over it, and what follows from them.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use pcae_kernel::config::{
    Budget, ClassifierConfig, Criterion, DropLayers, Place, Pool, Reduction, VitConfig,
};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::classes;
use crate::checkpoint::Which;
use crate::data::Splits;
use crate::data::mix::Mix;
use crate::data::regularize::Augmentation;
use crate::error::Error;
use crate::fit::BatchSize;
use crate::settings::shared::{self, Architecture, Crops, typed};
use crate::settings::{CriterionSpec, DropLayersSpec, Machine, PlaceSpec, SMALL_BELOW};
use crate::training::Plan;
use crate::training::plan::{Defaults, Knobs, require, require_fraction};

/// Everything that defines a run. As TOML it is flat, with the names of the flags in snake case.
///
/// What is `None` follows from the rest, from the weights and from the data: [`FinetuneSettings::resolve`] fills it in.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct FinetuneSettings {
    /// A run directory or a safetensors file to start from, or `none`.
    pub weights: Option<WeightsSpec>,
    /// Which of its weights.
    #[serde(alias = "weights_from")]
    pub which: Which,
    /// Preset of the encoder.
    pub model: Option<String>,
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
    /// What the head sees: `mean` of the patch tokens or the class `token`.
    pub pool: PoolSpec,
    /// Part of the patch tokens that each stage drops, in training.
    pub drop_ratio: f64,
    /// After which blocks; as the paper's 0, 7 and 10 of 12 if `None`.
    pub drop_layers: Option<DropLayersSpec>,
    /// Where they are dropped: `progressive`, `input`, or the number of a block for all at once.
    pub drop_place: PlaceSpec,
    /// Which tokens are dropped.
    pub criterion: CriterionSpec,

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
    /// Magnitude of RandAugment, 0 (none) to 10.
    pub rand_augment: Option<f64>,
    /// Probability that a rectangle is erased.
    pub erase_prob: Option<f64>,
    /// Parameter of mixup's beta distribution; 0 for none.
    pub mixup: Option<f64>,
    /// Parameter of CutMix's beta distribution; 0 for none.
    pub cutmix: Option<f64>,
    /// Part of each label that is spread over all classes.
    pub smoothing: f64,

    /// Passes over the data, unless `steps` is given.
    pub epochs: Option<u64>,
    /// Optimizer steps.
    pub steps: Option<u64>,
    /// Pictures in a micro-batch; if `None` 64, or all of a smaller data set.
    pub batch_size: Option<BatchSize>,
    /// Micro-batches in a step.
    pub accum: u64,
    /// Peak learning rate of the head per 256 pictures of a step.
    pub blr: Option<f64>,
    /// Peak learning rate of the head.
    pub lr: Option<f64>,
    /// Last learning rate.
    pub min_lr: f64,
    /// Steps in which the learning rate rises to its peak.
    pub warmup_steps: Option<u64>,
    /// Factor on the learning rate from each layer to the one below it; 1 for random weights if `None`.
    pub layer_decay: Option<f64>,
    /// Decoupled weight decay of the weights of linear layers.
    pub weight_decay: f64,
    /// AdamW's decay of the mean gradient.
    pub beta1: f64,
    /// AdamW's decay of the mean squared gradient.
    pub beta2: f64,
    /// Bound on the norm of the gradient; 0 for none.
    pub clip_grad: f64,
    /// Probability that stochastic depth drops a branch of the last block.
    pub drop_path: Option<f64>,
    /// Momentum of the moving average of all weights, which is evaluated too; 0 for none.
    pub ema: f64,
    /// Seed of everything random.
    pub seed: u64,

    /// Epochs between two evaluations; 0 for none but the last.
    pub eval_every: u64,
    /// Steps between two checkpoints.
    pub save_every: Option<u64>,

    /// Where the run is computed; changes no number but by rounding.
    #[serde(flatten)]
    pub machine: Machine,
}

/// As typed: a path, or `none` to start from random weights.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum WeightsSpec {
    /// Random ones.
    None,
    /// From here.
    Path(PathBuf),
}

/// As typed: `mean` or `token`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PoolSpec(pub Pool);

impl FromStr for WeightsSpec {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Ok(match text {
            "none" => Self::None,
            path => Self::Path(path.into()),
        })
    }
}

impl fmt::Display for WeightsSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::None => f.write_str("none"),
            Self::Path(path) => path.display().fmt(f),
        }
    }
}

impl FromStr for PoolSpec {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "mean" => Ok(Self(Pool::Mean)),
            "token" => Ok(Self(Pool::ClsToken)),
            _ => Err(format!("expected mean or token, found {text:?}")),
        }
    }
}

impl fmt::Display for PoolSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.0 {
            Pool::Mean => "mean",
            Pool::ClsToken => "token",
        })
    }
}

crate::settings::serde_as_text!(WeightsSpec, PoolSpec);

impl Default for FinetuneSettings {
    fn default() -> Self {
        Self {
            weights: None,
            which: Which::Student,
            model: None,
            img_size: None,
            in_chans: None,
            patch_size: None,
            embed_dim: None,
            depth: None,
            num_heads: None,
            mlp_ratio: None,
            pool: PoolSpec(Pool::Mean),
            drop_ratio: 0.0,
            drop_layers: None,
            drop_place: PlaceSpec(Place::Progressive),
            criterion: CriterionSpec(Criterion::MeanSimilarity),
            data: None,
            crop_scale: None,
            crop_ratio: [3.0 / 4.0, 4.0 / 3.0],
            flip: true,
            mean: None,
            std: None,
            rand_augment: None,
            erase_prob: None,
            mixup: None,
            cutmix: None,
            smoothing: 0.1,
            epochs: None,
            steps: None,
            batch_size: None,
            accum: 1,
            blr: None,
            lr: None,
            min_lr: 1e-6,
            warmup_steps: None,
            layer_decay: None,
            weight_decay: 0.05,
            beta1: 0.9,
            beta2: 0.999,
            clip_grad: 0.0,
            drop_path: None,
            ema: 0.0,
            seed: 0,
            eval_every: 1,
            save_every: None,
            machine: Machine {
                out: PathBuf::from(DEFAULT_OUT),
                ..Machine::default()
            },
        }
    }
}

const DEFAULT_OUT: &str = "runs/finetune";
const DEFAULT_BATCH_SIZE: usize = 64;

/// What depends on the size of the encoder where the settings say nothing.
struct Recipes {
    epochs: u64,
    blr: f64,
    layer_decay: f64,
    drop_path: f64,
    rand_augment: f64,
    erase_prob: f64,
    mixup: f64,
    cutmix: f64,
    crop_scale: [f64; 2],
}

/// MAE's for ViT-B on ImageNet.
const LARGE: Recipes = Recipes {
    epochs: 100,
    blr: 5e-4,
    layer_decay: 0.65,
    drop_path: 0.1,
    rand_augment: 9.0,
    erase_prob: 0.25,
    mixup: 0.8,
    cutmix: 1.0,
    crop_scale: [0.08, 1.0],
};

/// For narrower encoders on small pictures, chosen by trial on the embedded set: in runs as short as these, a model as
/// small as vit-micro learns less from pictures that are mixed, erased or cropped further.
const SMALL: Recipes = Recipes {
    epochs: 20,
    blr: 8e-3,
    layer_decay: 0.75,
    drop_path: 0.0,
    rand_augment: 0.0,
    erase_prob: 0.0,
    mixup: 0.0,
    cutmix: 0.0,
    crop_scale: [0.8, 1.0],
};

/// What a run needs, all of it checked.
#[derive(Clone, Debug, PartialEq)]
pub struct FinetuneRecipe {
    /// The classifier.
    pub task: ClassifierConfig,
    /// What happens to a training picture; its transform is evaluation's too.
    pub augmentation: Augmentation,
    /// How training pictures are mixed.
    pub mix: Mix,
    /// The numbers of the loop.
    pub plan: Plan,
    /// Names of the classes.
    pub classes: Vec<String>,
    /// Factor on the learning rate from each layer to the one below it.
    pub layer_decay: f64,
    /// Probability that stochastic depth drops a branch of the last block.
    pub drop_path: f64,
}

impl FinetuneSettings {
    /// Defaults, under the TOML of `config`, under `overrides` (`key`, value as TOML or plain text).
    ///
    /// # Errors
    /// [`Error::Setting`] naming the key, or [`Error::ConfigFile`] naming the file.
    pub fn load(config: Option<&Path>, overrides: &[(String, String)]) -> Result<Self, Error> {
        shared::load(config, overrides, DEFAULT_OUT)
    }

    /// The settings in the metadata of a checkpoint, see [`FinetuneSettings::recipe_json`].
    ///
    /// # Errors
    /// What is wrong with them and what to do, in words.
    pub fn from_recipe(config: Value) -> Result<Self, String> {
        shared::from_recipe(config)
    }

    /// As TOML.
    ///
    /// # Errors
    /// [`Error::Setting`] for values that TOML cannot hold, such as a path that is no text.
    pub fn to_toml(&self) -> Result<String, Error> {
        shared::to_toml(self)
    }

    /// The settings without those of the machine, as one line of JSON: what a checkpoint carries.
    pub fn recipe_json(&self) -> String {
        shared::recipe_json(self)
    }

    /// Takes the architecture and the normalisation from the settings that weights carry, where these say nothing.
    pub fn adopt(&mut self, config: &Value) {
        fn take<T: for<'de> Deserialize<'de>>(to: &mut Option<T>, config: &Value, key: &str) {
            if to.is_none()
                && let Some(value) = config.get(key)
            {
                *to = T::deserialize(value).ok();
            }
        }
        if self.model.is_none() {
            take(&mut self.img_size, config, "img_size");
            take(&mut self.in_chans, config, "in_chans");
            take(&mut self.patch_size, config, "patch_size");
            take(&mut self.embed_dim, config, "embed_dim");
            take(&mut self.depth, config, "depth");
            take(&mut self.num_heads, config, "num_heads");
            take(&mut self.mlp_ratio, config, "mlp_ratio");
        }
        take(&mut self.model, config, "model");
        // Of another architecture, which is refused later, they may be for other channels.
        let channels = self.vit().map_or(0, |vit| vit.in_chans);
        let fits = |key: &str| config[key].as_array().is_some_and(|x| x.len() == channels);
        if fits("mean") && fits("std") {
            take(&mut self.mean, config, "mean");
            take(&mut self.std, config, "std");
        }
    }

    /// The encoder, once the architecture is known.
    ///
    /// # Errors
    /// [`Error::Setting`] or [`Error::Config`].
    pub fn vit(&self) -> Result<VitConfig, Error> {
        Architecture {
            model: self.model.as_deref().unwrap_or(DEFAULT_MODEL),
            img_size: self.img_size,
            in_chans: self.in_chans,
            patch_size: self.patch_size,
            embed_dim: self.embed_dim,
            depth: self.depth,
            num_heads: self.num_heads,
            mlp_ratio: self.mlp_ratio,
        }
        .vit()
    }

    /// The classifier of `num_classes`, once the architecture is known.
    ///
    /// # Errors
    /// [`Error::Setting`] or [`Error::Config`].
    pub fn task(&self, num_classes: usize) -> Result<ClassifierConfig, Error> {
        let vit = self.vit()?;
        let drop_layers = match &self.drop_layers {
            Some(layers) => layers.layers(vit.depth)?,
            None => DropLayers::classification(vit.depth)?,
        };
        let task = ClassifierConfig {
            vit,
            num_classes,
            pool: self.pool.0,
            reduction: Reduction {
                criterion: self.criterion.0,
                place: self.drop_place.0,
                drop_layers,
                budget: Budget::Drop(self.drop_ratio),
            },
        };
        task.check()?;
        Ok(task)
    }

    /// Checks everything, and fills in what follows from the data and from other settings.
    ///
    /// # Errors
    /// [`Error::Setting`], [`Error::Config`], [`Error::Labels`] or [`Error::Data`].
    pub fn resolve(&mut self, splits: &Splits) -> Result<FinetuneRecipe, Error> {
        let classes = classes::check(splits)?;
        self.model.get_or_insert_with(|| DEFAULT_MODEL.to_owned());
        self.in_chans = Some(splits.train.channels());
        let task = self.task(classes.len())?;
        self.img_size = Some(task.vit.img_size);
        let blocks = task.reduction.drop_layers.iter().collect();
        self.drop_layers = Some(DropLayersSpec::Blocks(blocks));
        let defaults = if task.vit.embed_dim < SMALL_BELOW {
            SMALL
        } else {
            LARGE
        };
        let drop_path = *self.drop_path.get_or_insert(defaults.drop_path);
        let pictures = splits.train.len();
        let batch_size = self
            .batch_size
            .get_or_insert(BatchSize::Pictures(DEFAULT_BATCH_SIZE.min(pictures)))
            .pictures()?;
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
            drop_path,
            batch_size,
            accum: self.accum,
            eval_every: self.eval_every,
            save_every: &mut self.save_every,
            seed: self.seed,
            workers: self.machine.workers(),
        }
        .resolve(
            &Defaults {
                epochs: defaults.epochs,
                blr: defaults.blr,
                steps_per_warmup_step: 20,
            },
            pictures,
        )?;
        // Random layers all have as much to learn.
        let layer_decay = *self.layer_decay.get_or_insert(match self.weights {
            Some(WeightsSpec::Path(_)) => defaults.layer_decay,
            Some(WeightsSpec::None) | None => 1.0,
        });
        let holds = layer_decay > 0.0 && layer_decay <= 1.0;
        require(
            "layer_decay",
            holds,
            "more than 0 and at most 1",
            &layer_decay,
        )?;
        require_fraction("ema", self.ema)?;
        require_fraction("smoothing", self.smoothing)?;
        let mix = Mix {
            mixup: *self.mixup.get_or_insert(defaults.mixup),
            cutmix: *self.cutmix.get_or_insert(defaults.cutmix),
            smoothing: self.smoothing,
        };
        for (name, parameter) in [("mixup", mix.mixup), ("cutmix", mix.cutmix)] {
            let holds = (0.0..=1000.0).contains(&parameter);
            require(name, holds, "0 (none) to 1000", &parameter)?;
        }
        let crops = Crops {
            scale: *self.crop_scale.get_or_insert(defaults.crop_scale),
            ratio: self.crop_ratio,
            flip: self.flip,
        };
        let (mean, std) = (&mut self.mean, &mut self.std);
        let augmentation = Augmentation {
            transform: shared::transform(&task.vit, &splits.train, crops, mean, std)?,
            rand_augment: *self.rand_augment.get_or_insert(defaults.rand_augment),
            erase_prob: *self.erase_prob.get_or_insert(defaults.erase_prob),
            mixes: mix.mixes_images(),
        };
        augmentation.check().map_err(typed)?;
        Ok(FinetuneRecipe {
            task,
            augmentation,
            mix,
            plan,
            classes,
            layer_decay,
            drop_path,
        })
    }
}

/// Without weights that say otherwise.
const DEFAULT_MODEL: &str = "vit-micro";
