//! A trained network from a file: a classifier of `pcae finetune`, or any encoder, with the token budget that is its own.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use pcae_kernel::config::{Budget, ClassifierConfig, Pool, Reduction};
use serde_json::{Value, json};

use crate::checkpoint::deployment::{self, Deployment};
use crate::checkpoint::exchange::{self, Hints, Pooling};
use crate::checkpoint::export::{self, Storage, Written};
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
    /// Fingerprint of the pictures that it was trained on, if the file has it.
    pub data_fingerprint: Option<String>,
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
                weights.title(which),
                loaded.found,
                loaded.total,
                classes.len()
            ),
            deployment,
            data_fingerprint: weights.metadata("data").map(str::to_owned),
            metadata: metadata(TASK_CLASSIFY, weights, which, &config, Some(names)),
            finetuned: Some(Finetuned { settings, classes }),
        })
    }

    fn encoder(weights: &Weights, which: Which, hints: &Hints) -> Result<Self, Error> {
        let read = exchange::read_which(weights.path(), which, hints)?;
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
            origin: format!("{}: {}", read.title, read.report),
            deployment,
            data_fingerprint: weights.metadata("data").map(str::to_owned),
            metadata: metadata(task, weights, which, &config, None),
            finetuned: None,
        })
    }
}

impl Trained {
    /// Writes the network to `path` in the number format `storage`, atomically, as [`Trained::load`] reads it, with `deployment`
    /// among the metadata.
    ///
    /// # Errors
    /// As [`export::write`].
    pub fn write(
        &self,
        path: &Path,
        storage: Storage,
        deployment: Option<&Deployment>,
    ) -> Result<Written, Error> {
        let mut metadata: BTreeMap<String, String> = self.metadata.iter().cloned().collect();
        if let Some(deployment) = deployment {
            let json = serde_json::to_string(deployment).unwrap_or_default();
            metadata.insert(deployment::KEY.to_owned(), json);
        }
        let model = (&self.network.layout(), &self.values[..]);
        export::write(path, &self.path, model, metadata, storage)
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
pub(crate) fn merged(mut own: Value, read: Value) -> Value {
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
pub(crate) fn forget_data(config: &mut Value) {
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
        (
            "weights".to_owned(),
            // Of the best of a run that may be the average.
            weights
                .metadata("weights")
                .map_or_else(|| which.to_string(), str::to_owned),
        ),
        ("config".to_owned(), config.to_string()),
    ];
    metadata.extend(classes.map(|classes| ("classes".to_owned(), classes)));
    for key in ["step", "top1", "data"] {
        let value = weights.metadata(key);
        metadata.extend(value.map(|value| (key.to_owned(), value.to_owned())));
    }
    metadata
}

#[cfg(test)]
mod tests {
    use std::fs;

    use half::{bf16, f16};
    use pcae_kernel::layout::{Layout, Tensor};

    use super::*;
    use crate::checkpoint::deployment::MeasuredOn;
    use crate::checkpoint::file::{self, Dtype, Reader, TensorData};
    use crate::settings::Settings;

    const TEACHER: &str = "teacher.";

    /// Values, and the nearest of f16 and of bf16 as bits: above 2048 f16 has the even integers, above 256 bf16.
    const NEAREST: [(f32, u16, u16); 8] = [
        (1.5, 0x3e00, 0x3fc0),
        (-0.0, 0x8000, 0x8000),
        (2049.0, 0x6800, 0x4500), // half way between 2048 and 2050, and 2048 is the even one
        (2051.0, 0x6802, 0x4500), // half way between 2050 and 2052, and 2052 is the even one
        (257.0, 0x5c04, 0x4380),  // half way between 256 and 258 of bf16
        (-259.0, 0xdc0c, 0xc382), // half way between 258 and 260 of bf16
        (65504.0, 0x7bff, 0x4780), // the largest f16
        (2.0e-8, 0x0000, 0x32ac), // below half of the least f16
    ];

    fn settings() -> Settings {
        Settings {
            img_size: Some([16, 12]),
            embed_dim: Some(24),
            depth: Some(3),
            num_heads: Some(3),
            data: Some("of/one/machine".into()),
            ..Settings::default()
        }
    }

    fn layout() -> Layout {
        Layout::encoder(&settings().task().unwrap().vit)
    }

    fn tensors(layout: &Layout) -> Vec<Tensor> {
        let mut tensors = Vec::new();
        layout.for_each(|tensor| tensors.push(tensor));
        tensors
    }

    fn read(path: &Path, which: Which) -> Result<Trained, Error> {
        Trained::load(path, which, &Hints::default())
    }

    /// A different value for every parameter, those of [`NEAREST`] first: the class token.
    fn values(sign: f32) -> Vec<f32> {
        let mut values: Vec<f32> = (0..layout().len())
            .map(|i| sign * (i as f32 * 0.37).sin())
            .collect();
        for (value, (special, ..)) in values.iter_mut().zip(NEAREST) {
            *value = special;
        }
        values
    }

    /// What a run leaves: two encoders, one tensor of the decoder, one of the optimizer.
    fn checkpoint(path: &Path, change: impl Fn(&mut BTreeMap<String, String>, &mut Vec<f32>)) {
        let mut metadata = BTreeMap::from(
            [
                ("format", "pcae"),
                ("version", "1"),
                ("step", "7"),
                ("config", &settings().recipe_json()),
            ]
            .map(|(key, value)| (key.to_owned(), value.to_owned())),
        );
        let mut student = values(1.0);
        change(&mut metadata, &mut student);
        let teacher = values(-1.0);
        let mut stored = Vec::new();
        for tensor in tensors(&layout()) {
            for (prefix, values) in [("", &student), (TEACHER, &teacher)] {
                stored.push(file::Tensor {
                    name: format!("{prefix}{}", tensor.name),
                    shape: tensor.shape().to_vec(),
                    data: TensorData::F32(&values[tensor.span.start..tensor.span.end()]),
                });
            }
        }
        for name in ["decoder_norm.bias", "adamw.exp_avg.norm.bias"] {
            stored.push(file::Tensor {
                name: name.to_owned(),
                shape: vec![1],
                data: TensorData::F32(&[0.5]),
            });
        }
        file::write(path, &metadata, &stored).unwrap();
    }

    fn place() -> (tempfile::TempDir, PathBuf, PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let (source, out) = (
            folder.path().join("a.safetensors"),
            folder.path().join("b.safetensors"),
        );
        (folder, source, out)
    }

    #[test]
    fn the_encoder_comes_back_rounded_to_nearest_even() {
        let (_folder, source, out) = place();
        checkpoint(&source, |_, _| ());
        for (which, sign) in [(Which::Student, 1.0), (Which::Teacher, -1.0)] {
            for storage in [Storage::F32, Storage::F16, Storage::Bf16] {
                let encoder = read(&source, which).unwrap();
                assert_eq!(encoder.values, values(sign));
                let written = encoder.write(&out, storage, None).unwrap();
                let back = read(&out, which).unwrap();
                assert_eq!(back.network, encoder.network);
                let title = format!(", the {which} of step 7: ");
                assert!(back.origin.contains(&title), "{}", back.origin);
                // Relative to each value at most half a unit in the last of 11 or 8 places; f16 has fewer below 2^-14,
                // where it is off by at most half of its least number.
                let (unit, least) = match storage {
                    Storage::F32 => (0.0, 0.0),
                    Storage::F16 => (f32::exp2(-11.0), f32::exp2(-25.0)),
                    Storage::Bf16 => (f32::exp2(-8.0), 0.0),
                };
                for (found, value) in back.values.iter().zip(values(sign)) {
                    let error = (found - value).abs();
                    assert!(
                        error <= (unit * value.abs()).max(least),
                        "{storage}: {value} {found}"
                    );
                }
                assert!(written.rounding <= f64::from(unit), "{}", written.rounding);
                assert_eq!(written.rounding > 0.0, storage != Storage::F32);
                for (found, (value, half, brain)) in back.values.iter().zip(NEAREST) {
                    let want = match storage {
                        Storage::F32 => value,
                        Storage::F16 => f16::from_bits(half).to_f32(),
                        Storage::Bf16 => bf16::from_bits(brain).to_f32(),
                    };
                    assert_eq!(found.to_bits(), want.to_bits(), "{storage}: {value}");
                }
                // What is rounded stays as it is.
                back.write(&source.with_extension("again"), storage, None)
                    .unwrap();
                assert_eq!(
                    fs::read(source.with_extension("again")).unwrap(),
                    fs::read(&out).unwrap()
                );
            }
        }
    }

    #[test]
    fn the_file_holds_the_encoder_and_nothing_of_the_machine() {
        let (_folder, source, out) = place();
        checkpoint(&source, |_, _| ());
        let encoder = read(&source, Which::Teacher).unwrap();
        encoder.write(&out, Storage::Bf16, None).unwrap();
        let reader = Reader::open(&out).unwrap();
        let mut names: Vec<String> = tensors(&layout())
            .iter()
            .map(|tensor| tensor.name.to_string())
            .collect();
        names.sort();
        assert_eq!(reader.names(), names);
        for name in &names {
            assert_eq!(reader.dtype(name), Some(Dtype::BF16), "{name}");
        }
        let config = reader.metadata()["config"];
        assert!(!config.contains("machine"), "{config}");
        // Every size, so that no preset has to be known.
        for size in [
            "\"patch_size\":4",
            "\"in_chans\":1",
            "\"mlp_ratio\":4",
            "\"depth\":3",
        ] {
            assert!(config.contains(size), "{size} in {config}");
        }
        let error = read(&out, Which::Student).unwrap_err().to_string();
        assert!(
            error.contains("expected the student, found the teacher alone"),
            "{error}"
        );
    }

    #[test]
    fn what_f16_cannot_hold_names_the_tensor_and_leaves_the_old_file() {
        let (_folder, source, out) = place();
        let at = layout().encoder.norm.bias.start;
        // The least f32 that rounds to infinity, and the greatest that does not.
        for (value, storage, fits) in [
            (65520.0, Storage::F16, false),
            (-(65520.0_f32.next_down()), Storage::F16, true),
            (65520.0, Storage::Bf16, true),
            (f32::MIN, Storage::Bf16, false),
            (f32::MIN, Storage::F32, true),
        ] {
            checkpoint(&source, |_, student| student[at] = value);
            let encoder = read(&source, Which::Student).unwrap();
            fs::write(&out, "old").unwrap();
            match encoder.write(&out, storage, None) {
                Ok(_) => assert!(fits, "{value} {storage}"),
                Err(error) => {
                    assert!(!fits, "{error}");
                    let error = error.to_string();
                    let wider = if storage == Storage::F16 {
                        "bf16"
                    } else {
                        "f32"
                    };
                    for part in ["norm.bias", &value.to_string(), &format!("--dtype {wider}")] {
                        assert!(error.contains(part), "{part} in {error}");
                    }
                    assert_eq!(fs::read_to_string(&out).unwrap(), "old");
                }
            }
        }
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let (folder, source, _) = place();
        let says = |which, parts: &[&str]| {
            let error = read(&source, which).map(|_| ()).unwrap_err();
            let error = error.to_string();
            for part in parts {
                assert!(error.contains(part), "{part} in {error}");
            }
            assert!(!error.contains('\n'), "{error}");
        };
        let with = |key: &str, value: String| {
            checkpoint(&source, |metadata, _| {
                metadata.insert(key.to_owned(), value.clone());
            });
        };
        let recipe = |change: fn(&mut Settings)| {
            let mut settings = settings();
            change(&mut settings);
            settings.recipe_json()
        };
        with("version", "2".to_owned());
        says(
            Which::Student,
            &["expected metadata format pcae 1", "found pcae 2"],
        );
        with("config", "{\"x\":\n".to_owned());
        says(Which::Student, &["is no JSON"]);
        with("config", recipe(|settings| settings.num_heads = Some(5)));
        says(Which::Student, &["num_heads", "found 24"]);
        with("config", recipe(|settings| settings.depth = Some(4)));
        says(
            Which::Teacher,
            &["expected blocks of 4 by the file's own metadata, found 3"],
        );
        with("config", recipe(|settings| settings.embed_dim = Some(48)));
        says(
            Which::Student,
            &["expected width of 48 by the file's own metadata, found 24"],
        );
        with(
            "config",
            recipe(|settings| settings.img_size = Some([20, 12])),
        );
        says(
            Which::Student,
            &["expected positions of 16 by the file's own metadata, found 13"],
        );
        with("weights", "teacher".to_owned());
        says(
            Which::Student,
            &["found the teacher alone", "--which teacher"],
        );
        with("deployment", "{}".to_owned());
        says(Which::Student, &["metadata \"deployment\"", "drop_ratio"]);
        checkpoint(&source, |_, _| ());
        says(Which::Untrained, &["found --which untrained"]);
        checkpoint(&source, |_, student| {
            student[layout().encoder.norm.bias.start] = f32::NAN;
        });
        says(Which::Student, &["norm.bias", "holds NaN"]);
        let error = read(folder.path(), Which::Student).unwrap_err();
        assert!(
            error.to_string().contains("checkpoints/last.safetensors"),
            "{error}"
        );
    }

    /// A budget that was written is the network's own when it is read again, by every way to it.
    #[test]
    fn a_deployed_network_keeps_its_budget() {
        let (_folder, source, out) = place();
        checkpoint(&source, |_, _| ());
        let encoder = read(&source, Which::Student).unwrap();
        assert_eq!(encoder.deployment, None);
        assert_eq!(own_reduction(&source, 3).unwrap(), None);
        let chosen = Deployment {
            drop_ratio: 0.3,
            drop_layers: vec![0, 2],
            tokens: vec![12, 9, 7],
            multiply_adds: 5,
            latency_ms: 0.25,
            measured_on: MeasuredOn {
                cpu: "a processor".to_owned(),
                backend: "cpu".to_owned(),
                batch_size: 1,
                runs: 9,
                spread: 0.01,
                load_average: None,
                version: "0.1.0".to_owned(),
            },
        };
        encoder.write(&out, Storage::F16, Some(&chosen)).unwrap();
        let back = read(&out, Which::Student).unwrap();
        assert_eq!(back.deployment, Some(chosen));
        assert_eq!(back.network.tokens(), [12, 9, 7]);
        let reduction = *back.network.reduction();
        assert_eq!(own_reduction(&out, 3).unwrap(), Some(reduction));
        assert!(own_reduction(&out, 2).is_err());
        // Also what is exported from it.
        back.write(&source, Storage::F32, back.deployment.as_ref())
            .unwrap();
        assert_eq!(read(&source, Which::Student).unwrap().network, back.network);
    }
}
