//! A trained encoder, for use: whatever wrote it, one function reads it.

use std::path::{Path, PathBuf};

use pcae_kernel::config::{Budget, Criterion, DropLayers, Place, Reduction, VitConfig};
use pcae_kernel::init::init;
use pcae_kernel::layout::Layout;

use crate::checkpoint::exchange::{self, Hints, Preprocessing};
use crate::checkpoint::file::Reader;
use crate::checkpoint::{Which, locate};
use crate::data;
use crate::data::augment::Transform;
use crate::error::Error;
use crate::run_settings::RunSettings;
use crate::settings::shared::Crops;
use crate::settings::{DropLayersSpec, Settings};

/// An encoder and what its pictures go through.
#[derive(Clone, Debug, PartialEq)]
pub struct Encoder {
    /// Its sizes.
    pub vit: VitConfig,
    /// Its parameters, in the order of [`Layout::encoder`].
    pub values: Vec<f32>,
    /// Size and normalisation of its pictures, and the random crops that it was trained on.
    pub transform: Transform,
    /// The pictures that it was trained on; `None` for the embedded ones, or where the file does not say.
    pub data: Option<PathBuf>,
    /// Their fingerprint, if the file has it.
    pub data_fingerprint: Option<String>,
    /// The file.
    pub path: PathBuf,
    /// What was read, in a line: file, weights, `N of M tensors loaded`.
    pub origin: String,
}

/// Least and greatest area of the random crops of others' encoders: those of this project's recipe.
const CROP_SCALE: [f64; 2] = [0.2, 1.0];

/// Reads the encoder at `path`: of a run directory its best or else its newest checkpoint, a checkpoint, what `pcae export`,
/// `pcae deploy` or `pcae convert` wrote, or a file with the names of timm, MAE, DINOv2 or Hugging Face, of which `hints` tell
/// what it does not.
///
/// It is strict, see [`exchange::read`].
///
/// # Errors
/// As this, [`Error::Checkpoint`] for weights that the file has not, or [`Error::Setting`] if nothing says how its pictures
/// were normalised.
pub fn load(path: &Path, which: Which, hints: &Hints) -> Result<Encoder, Error> {
    let path = locate(path)?;
    let wrong = |reason: String| Error::Checkpoint {
        path: path.clone(),
        reason,
    };
    let reader = Reader::open(&path)?;
    let run = RunSettings::of(&path, &reader)?;
    // The initial values have the sizes and the pictures of the trained ones, whichever of them there are.
    let there = match which {
        Which::Untrained if reader.metadata().get("weights") == Some(&"teacher") => Which::Teacher,
        Which::Untrained => Which::Student,
        Which::Student | Which::Teacher => which,
    };
    let read = exchange::read_which(&path, there, hints)?;
    let mut origin = format!("{}: {}", read.title, read.report);
    let mut values = read.values;
    if which == Which::Untrained {
        let pretrained = run.as_ref().and_then(RunSettings::pretraining);
        // Also `convert` writes settings, but no run had them: those have crops.
        let is_of_run =
            |settings: &&Settings| settings.crop_scale.is_some() && *hints == Hints::default();
        let Some(settings) = pretrained.filter(is_of_run) else {
            return Err(wrong(
                "expected a checkpoint of `pcae pretrain`, which tells its initial values, and nothing said about it besides, found \
                 another's or more; use --which student"
                    .to_owned(),
            ));
        };
        let layout = Layout::encoder(&read.vit);
        init(&layout, settings.seed, &mut values).map_err(|error| wrong(error.to_string()))?;
        let seed = settings.seed;
        origin = format!("the untrained one of {}, seed {seed}", path.display());
    }
    let Some(preprocessing) = read.preprocessing else {
        return Err(Error::Setting {
            name: "--mean".to_owned(),
            reason: format!(
                "expected the mean of each channel that '{}' was trained with, and --std, found none; for most it is \
                 0.485,0.456,0.406 and 0.229,0.224,0.225",
                path.display()
            ),
        });
    };
    let transform = transform(run.as_ref(), &read.vit, preprocessing).map_err(wrong)?;
    Ok(Encoder {
        vit: read.vit,
        values,
        transform,
        data: run.and_then(|run| run.data().map(Path::to_owned)),
        data_fingerprint: read.kept.get("data").cloned(),
        origin,
        path,
    })
}

impl Encoder {
    /// The folder of pictures to take, see [`pictures`].
    ///
    /// # Errors
    /// As that.
    pub(crate) fn pictures<'a>(
        &'a self,
        asked: Option<&'a Path>,
    ) -> Result<Option<&'a Path>, Error> {
        let fingerprint = self.data_fingerprint.as_deref();
        pictures(
            &self.path,
            asked.or(self.data.as_deref()),
            fingerprint,
            self.vit.in_chans,
        )
    }
}

/// The folder of pictures to take where `data` is what was asked for, or else what the network at `path` was trained on; `None`
/// for the embedded ones. What is exported, deployed or converted leaves the folder out on purpose, and keeps the `fingerprint`
/// of its pictures: of others than the embedded ones it has to be given.
///
/// # Errors
/// [`Error::Setting`] then.
pub(crate) fn pictures<'a>(
    path: &Path,
    data: Option<&'a Path>,
    fingerprint: Option<&str>,
    in_chans: usize,
) -> Result<Option<&'a Path>, Error> {
    let (None, Some(fingerprint)) = (data, fingerprint) else {
        return Ok(data);
    };
    let embedded = data::open(None, Some(in_chans))?.train.fingerprint()?;
    if fingerprint == embedded {
        return Ok(None);
    }
    Err(Error::Setting {
        name: "--data".to_owned(),
        reason: format!(
            "expected the folder of the pictures, found none: '{}' does not name it (exported, deployed and converted files leave \
             paths out), and was trained on others than the embedded ones ({}); give it",
            path.display(),
            fingerprint.escape_default()
        ),
    })
}

/// What pictures go through: as in the run, or else as in this project's recipe.
fn transform(
    run: Option<&RunSettings>,
    vit: &VitConfig,
    Preprocessing { mean, std }: Preprocessing,
) -> Result<Transform, String> {
    let default = Settings::default();
    let crops = run.and_then(RunSettings::crops).unwrap_or(Crops {
        scale: CROP_SCALE,
        ratio: default.crop_ratio,
        flip: default.flip,
    });
    let transform = Transform {
        height: vit.img_size[0],
        width: vit.img_size[1],
        channels: vit.in_chans,
        scale: (crops.scale[0], crops.scale[1]),
        ratio: (crops.ratio[0], crops.ratio[1]),
        flip: crops.flip,
        mean,
        std,
    };
    transform.check().map_err(|error| error.to_string())?;
    Ok(transform)
}

/// What is dropped on the way through a frozen encoder: after each of `drop_layers` (by default blocks 0, 7 and 10 of 12,
/// as in the paper's downstream tasks) the `drop_ratio` most redundant of the patch tokens.
///
/// # Errors
/// [`Error::Config`] for a ratio or a block that cannot be.
pub fn reduction(
    vit: &VitConfig,
    drop_ratio: f64,
    drop_layers: Option<&DropLayersSpec>,
) -> Result<Reduction, Error> {
    let depth = vit.depth;
    let drop_layers = match drop_layers {
        None => DropLayers::classification(depth)?,
        Some(asked) => asked.layers(depth)?,
    };
    let reduction = Reduction {
        criterion: Criterion::MeanSimilarity,
        place: Place::Progressive,
        drop_layers,
        budget: Budget::Drop(drop_ratio),
    };
    reduction.check(vit.num_patches(), depth)?;
    Ok(reduction)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::file::{self, TensorData};
    use std::collections::BTreeMap;

    struct Checkpoint {
        settings: Settings,
        metadata: BTreeMap<String, String>,
        tensors: Vec<(String, Vec<usize>, Vec<f32>)>,
    }

    /// Initial values as the student, twice those as the teacher, of pretraining's layout.
    fn checkpoint() -> Checkpoint {
        let settings = Settings {
            embed_dim: Some(8),
            depth: Some(3),
            num_heads: Some(2),
            decoder_depth: Some(1),
            in_chans: Some(3),
            img_size: Some([28, 20]),
            crop_scale: Some([0.3, 1.0]),
            mean: Some(vec![0.1, 0.2, 0.3]),
            std: Some(vec![0.4, 0.5, 0.6]),
            data: Some("photos".into()),
            seed: 5,
            ..Settings::default()
        };
        let layout = Layout::pretrain(&settings.task().unwrap());
        let mut values = vec![0.0; layout.len()];
        init(&layout, 6, &mut values).unwrap();
        let mut tensors = Vec::new();
        layout.for_each(|tensor| {
            let own = &values[tensor.span.start..tensor.span.end()];
            let (name, shape) = (tensor.name.to_string(), tensor.shape().to_vec());
            if tensor.span.end() <= layout.encoder_len() {
                let twice = own.iter().map(|value| 2.0 * value).collect();
                tensors.push((format!("teacher.{name}"), shape.clone(), twice));
            }
            tensors.push((name, shape, own.to_vec()));
        });
        let metadata = [
            ("format".to_owned(), "pcae".to_owned()),
            ("version".to_owned(), "1".to_owned()),
            ("config".to_owned(), settings.recipe_json()),
        ];
        Checkpoint {
            settings,
            metadata: metadata.into(),
            tensors,
        }
    }

    impl Checkpoint {
        fn load(&self, which: Which) -> Result<Encoder, String> {
            self.load_with(which, &Hints::default())
        }

        fn load_with(&self, which: Which, hints: &Hints) -> Result<Encoder, String> {
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("checkpoints").join("last.safetensors");
            std::fs::create_dir(folder.path().join("checkpoints")).unwrap();
            let tensors: Vec<file::Tensor<'_>> = self
                .tensors
                .iter()
                .map(|(name, shape, values)| file::Tensor {
                    name: name.clone(),
                    shape: shape.clone(),
                    data: TensorData::F32(values),
                })
                .collect();
            file::write(&path, &self.metadata, &tensors).unwrap();
            let by_folder = load(folder.path(), which, hints).map_err(|error| error.to_string());
            let by_file = load(&path, which, hints).map_err(|error| error.to_string());
            assert_eq!(by_folder, by_file);
            by_file
        }
    }

    #[test]
    fn student_teacher_and_initial_values() {
        let checkpoint = checkpoint();
        let task = checkpoint.settings.task().unwrap();
        let (whole, layout) = (Layout::pretrain(&task), Layout::encoder(&task.vit));
        let initial = |seed| {
            let mut values = vec![0.0; whole.len()];
            init(&whole, seed, &mut values).unwrap();
            values.truncate(layout.len());
            values
        };
        let student = checkpoint.load(Which::Student).unwrap();
        assert_eq!(student.vit, task.vit);
        assert_eq!(student.values, initial(6));
        assert!(
            student.origin.contains(
                "last.safetensors: pcae names: 62 of 62 tensors loaded, 0 missing, 0 unexpected"
            ),
            "{}",
            student.origin
        );
        assert_eq!(student.data.as_deref(), Some(Path::new("photos")));
        let transform = &student.transform;
        assert_eq!(
            (transform.height, transform.width, transform.channels),
            (28, 20, 3)
        );
        assert_eq!(
            (transform.mean[2], transform.std[0], transform.scale.0),
            (0.3, 0.4, 0.3)
        );
        let teacher = checkpoint.load(Which::Teacher).unwrap();
        let twice: Vec<f32> = initial(6).iter().map(|value| 2.0 * value).collect();
        assert_eq!(teacher.values, twice);
        assert_eq!(
            checkpoint.load(Which::Untrained).unwrap().values,
            initial(5)
        );
    }

    #[test]
    fn what_pictures_went_through_must_be_known() {
        for (spoil, named) in [
            ((|s| s.mean = None) as fn(&mut Settings), "--mean"),
            (|s| s.std = Some(vec![0.0; 3]), "std"),
            (|s| s.crop_scale = None, "--which student"),
        ] {
            let mut checkpoint = checkpoint();
            spoil(&mut checkpoint.settings);
            let config = checkpoint.settings.recipe_json();
            checkpoint.metadata.insert("config".to_owned(), config);
            let error = checkpoint.load(Which::Untrained).unwrap_err();
            assert!(error.contains(named), "{named} in {error}");
        }
    }

    /// A file with timm's names and nothing said in it: heads, size and normalisation are told.
    #[test]
    fn encoders_of_others() {
        let mut checkpoint = checkpoint();
        checkpoint.metadata.clear();
        checkpoint.tensors.retain(|(name, ..)| {
            !["teacher.", "decoder_", "mask_token"]
                .iter()
                .any(|other| name.starts_with(other))
        });
        let own = [28, 20];
        let hints = Hints {
            num_heads: Some(2),
            img_size: Some(own),
            mean: Some(vec![0.1, 0.2, 0.3]),
            std: Some(vec![0.4, 0.5, 0.6]),
            ..Hints::default()
        };
        let read = checkpoint.load_with(Which::Student, &hints).unwrap();
        let ours = self::checkpoint().load(Which::Student).unwrap();
        assert_eq!((&read.values, read.vit), (&ours.values, ours.vit));
        assert_eq!(read.transform.mean, [0.1, 0.2, 0.3]);
        assert_eq!((read.transform.scale, read.data), ((0.2, 1.0), None));
        for (which, hints, named) in [
            (
                Which::Student,
                Hints {
                    mean: None,
                    std: None,
                    ..hints.clone()
                },
                "--mean",
            ),
            (
                Which::Student,
                Hints {
                    num_heads: None,
                    ..hints.clone()
                },
                "--num-heads",
            ),
            (Which::Teacher, hints.clone(), "--prefix"),
            (Which::Untrained, hints.clone(), "--which student"),
        ] {
            let error = checkpoint.load_with(which, &hints).unwrap_err();
            assert!(error.contains(named), "{named} in {error}");
        }
        // A run's own checkpoint at another size, of which it says the rest.
        let at = |which| {
            let hints = Hints {
                img_size: Some([56, 40]),
                ..Hints::default()
            };
            self::checkpoint().load_with(which, &hints)
        };
        let (student, teacher) = (at(Which::Student).unwrap(), at(Which::Teacher).unwrap());
        assert_eq!(
            (student.vit.num_patches(), student.transform.height),
            (140, 56)
        );
        assert_eq!(student.transform.scale, (0.3, 1.0));
        let last = student.values.len() - 1;
        assert_eq!(teacher.values[last - 9], 2.0 * student.values[last - 9]);
        assert!(at(Which::Untrained).is_err());
    }

    #[test]
    fn stages_are_where_they_are_asked_for() {
        let vit = VitConfig::preset("vit-b16").unwrap();
        let blocks = |reduction: Reduction| reduction.drop_layers.iter().collect::<Vec<_>>();
        assert_eq!(blocks(reduction(&vit, 0.2, None).unwrap()), [0, 7, 10]);
        let own = DropLayersSpec::Blocks(vec![3, 5]);
        let own = reduction(&vit, 0.2, Some(&own)).unwrap();
        assert_eq!(blocks(own), [3, 5]);
        // 196, 157, 126.
        assert_eq!(own.remaining(196, 12), 126);
        assert!(reduction(&vit, 1.0, None).is_err());
        assert!(reduction(&vit, 0.1, Some(&DropLayersSpec::Blocks(vec![12]))).is_err());
    }
}
