//! A trained network from a file: a classifier of `pcae finetune`, or any encoder, with the token budget that is its own.

use std::path::{Path, PathBuf};

use pcae_kernel::config::{Budget, ClassifierConfig, Pool, Reduction};
use serde_json::{Value, json};

use crate::checkpoint::deployment::Deployment;
use crate::checkpoint::exchange::{self, Hints, Pooling};
use crate::checkpoint::weights::Weights;
use crate::checkpoint::{TASK_CLASSIFY, TASK_ENCODE, Which};
use crate::encoder;
use crate::error::Error;
use crate::finetune::FinetuneSettings;
use crate::network::Network;

/// A network and its parameters.
#[derive(Clone, Debug, PartialEq)]
pub struct Trained {
    /// The file.
    pub path: PathBuf,
    /// What it computes, at the token budget that its file names: the one that `pcae deploy` chose, or else the one that a
    /// classifier was trained with, or else all tokens.
    pub network: Network,
    /// Its parameters, in the order of [`Network::layout`].
    pub values: Vec<f32>,
    /// Settings and classes of a classifier of `pcae finetune`.
    pub finetuned: Option<Finetuned>,
    /// What `pcae deploy` chose.
    pub deployment: Option<Deployment>,
    /// What was read, in a line.
    pub origin: String,
    /// Metadata that say what it is, to be written again.
    pub(crate) metadata: Vec<(String, String)>,
}

/// What a classifier of `pcae finetune` knows of itself.
#[derive(Clone, Debug, PartialEq)]
pub struct Finetuned {
    /// The settings of its run.
    pub settings: FinetuneSettings,
    /// Names of its classes.
    pub classes: Vec<String>,
}

impl Trained {
    /// Reads the network at `path`: of a run directory its best or else its newest checkpoint. `hints` are for encoders of
    /// others.
    ///
    /// # Errors
    /// [`Error::File`] if the file is damaged, [`Error::Checkpoint`] if it does not fit, [`Error::Setting`] if hints are
    /// missing or can have no part.
    pub fn load(path: &Path, which: Which, hints: &Hints) -> Result<Self, Error> {
        let weights = Weights::open(path)?;
        match weights.classes()? {
            Some(classes) => Self::finetuned(&weights, classes, which, hints),
            None => Self::encoder(&weights, which, hints),
        }
    }

    fn finetuned(
        weights: &Weights,
        classes: Vec<String>,
        which: Which,
        hints: &Hints,
    ) -> Result<Self, Error> {
        if *hints != Hints::default() {
            return Err(weights.wrong(
                "expected nothing said about a classifier of `pcae finetune`, which says all itself; leave --img-size, \
                 --num-heads, --prefix, --mean and --std out",
            ));
        }
        let Some(mut config) = weights.config()? else {
            return Err(weights.wrong(
                "expected the settings of its run beside its classes, found none; give a checkpoint of `pcae finetune`",
            ));
        };
        let settings = FinetuneSettings::from_recipe(config.clone())
            .map_err(|reason| weights.wrong(&reason))?;
        let task = settings.task(classes.len())?;
        let mut network = Network::Classifier(task);
        let deployment = weights.deployment()?;
        if let Some(deployment) = &deployment {
            network = network.with(deployment.reduction(&task.reduction, task.vit.depth)?)?;
        }
        let layout = network.layout();
        let mut values = vec![0.0; layout.len()];
        let loaded = weights.load(&layout, which, true, &mut values)?;
        if let Some(first) = loaded.fresh.first() {
            return Err(weights.wrong(&format!(
                "{} of {} tensors of the classifier found; the first missing is {first}; give a checkpoint of `pcae \
                 finetune`",
                loaded.found, loaded.total
            )));
        }
        forget_data(&mut config);
        let names = json!(classes).to_string();
        Ok(Self {
            path: weights.path().to_owned(),
            network,
            values,
            origin: format!(
                "{}: {} of {} tensors loaded, a classifier of {} classes",
                weights.path().display(),
                loaded.found,
                loaded.total,
                classes.len()
            ),
            deployment,
            metadata: metadata(TASK_CLASSIFY, weights, which, &config, Some(names)),
            finetuned: Some(Finetuned { settings, classes }),
        })
    }

    fn encoder(weights: &Weights, which: Which, hints: &Hints) -> Result<Self, Error> {
        let mut hints = hints.clone();
        if which == Which::Teacher && hints.prefix.is_none() {
            hints.prefix = Some("teacher.".to_owned());
        }
        let read = exchange::read(weights.path(), &hints)?;
        let vit = read.vit;
        let dense = encoder::reduction(&vit, 0.0, None)?;
        let deployment = weights.deployment()?;
        let reduction = match &deployment {
            Some(deployment) => deployment.reduction(&dense, vit.depth)?,
            None => dense,
        };
        let mut config = exchange::config(&read);
        if let Some(own) = weights.config()? {
            config = merged(own, config);
        }
        forget_data(&mut config);
        let mut values = read.values;
        let (network, task) = match read.head {
            Some(head) => {
                values.extend_from_slice(&head.weight);
                values.extend_from_slice(&head.bias);
                let config = ClassifierConfig {
                    vit,
                    num_classes: head.num_classes,
                    pool: match head.pooling {
                        Pooling::MeanThenNorm => Pool::Mean,
                        Pooling::ClassToken => Pool::ClsToken,
                    },
                    reduction,
                };
                (Network::Classifier(config), TASK_CLASSIFY)
            }
            None => (Network::Encoder { vit, reduction }, TASK_ENCODE),
        };
        Ok(Self {
            path: read.path,
            network: network.with(reduction)?,
            values,
            origin: format!("{}: {}", weights.path().display(), read.report),
            deployment,
            metadata: metadata(task, weights, which, &config, None),
            finetuned: None,
        })
    }
}

/// The token reduction that a file names as its own, see [`Trained::network`]; `None` for an encoder that was not deployed.
///
/// # Errors
/// [`Error::File`], [`Error::Checkpoint`], or [`Error::Config`] for what cannot be.
pub fn own_reduction(path: &Path, depth: usize) -> Result<Option<Reduction>, Error> {
    let weights = Weights::open(path)?;
    let trained = match (weights.classes()?, weights.config()?) {
        (Some(classes), Some(config)) => {
            let settings = FinetuneSettings::from_recipe(config);
            let settings = settings.map_err(|reason| weights.wrong(&reason))?;
            Some(settings.task(classes.len())?.reduction)
        }
        _ => None,
    };
    match weights.deployment()? {
        Some(deployment) => {
            let base = trained.unwrap_or(Reduction {
                budget: Budget::Drop(0.0),
                ..Reduction::NONE
            });
            Ok(Some(deployment.reduction(&base, depth)?))
        }
        None => Ok(trained),
    }
}

/// `own` with the sizes of `read` in it, which hints may have changed.
fn merged(mut own: Value, read: Value) -> Value {
    if let (Some(own), Value::Object(read)) = (own.as_object_mut(), read) {
        for (key, value) in read {
            // The decoder is left behind, and with it what was predicted.
            if key != "model" && key != "method" && !key.starts_with("decoder") {
                own.insert(key, value);
            }
        }
    }
    own
}

/// A path of the machine that trained it tells nothing to others.
fn forget_data(config: &mut Value) {
    if let Some(config) = config.as_object_mut() {
        config.remove("data");
    }
}

fn metadata(
    task: &str,
    weights: &Weights,
    which: Which,
    config: &Value,
    classes: Option<String>,
) -> Vec<(String, String)> {
    let mut metadata = vec![
        ("task".to_owned(), task.to_owned()),
        ("weights".to_owned(), which.to_string()),
        ("config".to_owned(), config.to_string()),
    ];
    metadata.extend(classes.map(|classes| ("classes".to_owned(), classes)));
    for key in ["step", "top1"] {
        let value = weights.metadata(key);
        metadata.extend(value.map(|value| (key.to_owned(), value.to_owned())));
    }
    metadata
}
