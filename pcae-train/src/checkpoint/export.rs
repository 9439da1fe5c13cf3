//! An encoder alone, for deployment: no decoder, no optimizer, in f32 or in half the space.
//!
//! The file has the names of timm's `state_dict` and the metadata of a checkpoint: `format` (`pcae`), `version`, `step`,
//! `task` (`encode`), `weights` (`student` or `teacher`) and `config`, the recipe with every size of the encoder filled in, so
//! that nothing has to be told to read it again, and without the folder of the pictures.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::{Path, PathBuf};

use half::{bf16, f16};
use pcae_kernel::config::VitConfig;
use pcae_kernel::layout::Layout;

use super::file::{self, Reader, TensorData};
use super::{EXP_AVG, EXP_AVG_SQ, FORMAT, TASK_ENCODE, TEACHER, VERSION, Which, locate, tensors};
use crate::error::Error;
use crate::settings::Settings;

/// Names listed in a report before "and N more".
const LISTED: usize = 4;

/// Number format of stored parameters.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
#[value(rename_all = "lowercase")]
pub enum Storage {
    /// 32 bits: the parameters as they are.
    #[default]
    F32,
    /// 16 bits, 11 of them significant, up to 65504.
    F16,
    /// 16 bits, 8 of them significant, with the range of f32.
    Bf16,
}

impl fmt::Display for Storage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
        })
    }
}

/// An encoder from a checkpoint.
#[derive(Clone, Debug, PartialEq)]
pub struct Encoder {
    /// The file that was read.
    pub path: PathBuf,
    /// Its sizes.
    pub vit: VitConfig,
    /// Its parameters, in the order of [`Layout::encoder`].
    pub values: Vec<f32>,
    /// The settings of its run, every size of the encoder filled in.
    pub settings: Settings,
    /// Whose they are.
    pub which: Which,
    /// Optimizer steps done, where the file tells.
    pub step: Option<String>,
    /// Names of tensors that belong to no checkpoint of this program, and were left alone.
    pub unexpected: Vec<String>,
}

impl Encoder {
    /// What was read, in a line.
    pub fn report(&self) -> String {
        let total = tensors(&Layout::encoder(&self.vit)).len();
        let step = self
            .step
            .as_ref()
            .map_or_else(String::new, |step| format!(" of step {step}"));
        let mut text = format!(
            "{}: {total} of {total} tensors loaded, the {}{step}",
            self.path.display(),
            self.which
        );
        if !self.unexpected.is_empty() {
            let shown: Vec<String> = self.unexpected.iter().take(LISTED).cloned().collect();
            text += &format!(
                "; {} unexpected: {}",
                self.unexpected.len(),
                shown.join(", ").escape_default()
            );
            if self.unexpected.len() > LISTED {
                text += &format!(" and {} more", self.unexpected.len() - LISTED);
            }
        }
        text
    }
}

/// Reads the encoder at `path`: the newest checkpoint of a run directory, a checkpoint, or what [`write()`] wrote; in
/// whichever number format.
///
/// Every parameter must be there, in its shape, and finite.
///
/// # Errors
/// [`Error::File`] if the file is damaged, [`Error::Checkpoint`] if it does not fit.
pub fn read(path: &Path, which: Which) -> Result<Encoder, Error> {
    let path = locate(path)?;
    let reader = Reader::open(&path)?;
    let wrong = |reason: String| Error::Checkpoint {
        path: path.clone(),
        reason,
    };
    let metadata = reader.metadata();
    let entry = |key: &str| metadata.get(key).copied().unwrap_or("none");
    let version = (entry("format"), entry("version"));
    if version != (FORMAT, VERSION) {
        let (format, version) = (version.0.escape_default(), version.1.escape_default());
        return Err(wrong(format!(
            "expected metadata format {FORMAT} {VERSION}, found {format} {version}; give a checkpoint of `pcae pretrain`"
        )));
    }
    let mut settings: Settings = serde_json::from_str(entry("config")).map_err(|error| {
        let error = error.to_string();
        wrong(format!(
            "expected the settings of a pre-training run as metadata \"config\", found others: {}; use the program that \
             wrote it",
            error.escape_default()
        ))
    })?;
    let vit = settings
        .task()
        .map_err(|error| wrong(format!("its metadata \"config\": {error}")))?
        .vit;
    let VitConfig {
        img_size,
        in_chans,
        patch_size,
        embed_dim,
        depth,
        num_heads,
        mlp_ratio,
    } = vit;
    settings.img_size = Some(img_size);
    settings.in_chans = Some(in_chans);
    settings.patch_size = Some(patch_size);
    settings.embed_dim = Some(embed_dim);
    settings.depth = Some(depth);
    settings.num_heads = Some(num_heads);
    settings.mlp_ratio = Some(mlp_ratio);

    // An exported teacher is the only encoder of its file, under plain names.
    let alone = entry("task") == TASK_ENCODE;
    if alone && entry("weights") != which.to_string() {
        let found = entry("weights").escape_default();
        return Err(wrong(format!(
            "expected the {which}, found the {found} alone; give --which {found}, or the run's checkpoint"
        )));
    }
    let prefix = if which == Which::Teacher && !alone {
        TEACHER
    } else {
        ""
    };
    let layout = Layout::encoder(&vit);
    let expected: Vec<_> = tensors(&layout)
        .into_iter()
        .map(|tensor| (format!("{prefix}{}", tensor.name), tensor))
        .collect();
    let missing: Vec<&str> = expected
        .iter()
        .filter(|(name, _)| reader.shape(name).is_none())
        .map(|(name, _)| name.as_str())
        .collect();
    if let Some(first) = missing.first() {
        let (total, found) = (expected.len(), expected.len() - missing.len());
        let advice = if found == 0 && which == Which::Teacher {
            "a run of --method mae has no teacher: use --which student"
        } else {
            "give a whole checkpoint of `pcae pretrain`"
        };
        return Err(wrong(format!(
            "{found} of {total} tensors of the encoder found, the first missing is {first}; {advice}"
        )));
    }
    // Shapes before memory: as much is taken as the file holds, not as its metadata claim.
    for (name, tensor) in &expected {
        let found = reader.shape(name).unwrap_or_default();
        if found != tensor.shape() {
            return Err(wrong(format!(
                "tensor {name}: expected shape {:?} by the file's own metadata, found {found:?}; copy the file again or use \
                 another checkpoint",
                tensor.shape()
            )));
        }
    }
    let mut values = vec![0.0; layout.len()];
    for (name, tensor) in &expected {
        let read = reader.tensor_f32(name, tensor.shape())?;
        if let Some(value) = read.iter().find(|value| !value.is_finite()) {
            return Err(wrong(format!(
                "tensor {name}: expected finite numbers, found {value}; use a checkpoint from before the run diverged"
            )));
        }
        values[tensor.span.start..tensor.span.end()].copy_from_slice(&read);
    }
    let plain: BTreeSet<String> = expected
        .iter()
        .map(|(_, tensor)| tensor.name.to_string())
        .collect();
    let others = ["decoder_", "mask_token", TEACHER, EXP_AVG, EXP_AVG_SQ];
    let mut unexpected = reader.names();
    unexpected.retain(|name| {
        !plain.contains(name) && !others.iter().any(|start| name.starts_with(start))
    });
    Ok(Encoder {
        vit,
        values,
        settings,
        which,
        step: metadata.get("step").map(|step| (*step).to_owned()),
        unexpected,
        path: path.clone(),
    })
}

/// What was written.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Written {
    /// Tensors.
    pub tensors: usize,
    /// Parameters, fixed positions included.
    pub elements: usize,
    /// Norm of the rounding error over the norm of the parameters.
    pub rounding: f64,
}

impl fmt::Display for Written {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let millions = self.elements as f64 / 1e6;
        write!(f, "{} tensors, {millions:.2} M parameters", self.tensors)?;
        if self.rounding > 0.0 {
            write!(f, ", relative rounding error {:.1e}", self.rounding)?;
        }
        Ok(())
    }
}

/// Writes `encoder` to `path`, atomically; each parameter is rounded to the nearest of `storage`, halfway cases to the even
/// one.
///
/// # Errors
/// [`Error::Checkpoint`] naming the tensor and the value, if one is beyond the largest of `storage`; [`Error::File`] if the
/// disk fails. A previous file at `path` is then intact.
pub fn write(path: &Path, encoder: &Encoder, storage: Storage) -> Result<Written, Error> {
    let mut settings = encoder.settings.clone();
    // A path of the machine that trained it tells nothing to others.
    settings.data = None;
    let mut metadata = BTreeMap::from([
        ("task".to_owned(), TASK_ENCODE.to_owned()),
        ("weights".to_owned(), encoder.which.to_string()),
        ("config".to_owned(), settings.recipe_json()),
    ]);
    metadata.extend(encoder.step.clone().map(|step| ("step".to_owned(), step)));
    let model = (&Layout::encoder(&encoder.vit), &encoder.values[..]);
    write_model(path, &encoder.path, model, metadata, storage)
}

/// Writes the parameters of a model as [`write()`] does, with `metadata` besides format and version. `source` is the file that
/// they are of.
///
/// # Errors
/// As [`write()`].
pub(crate) fn write_model(
    path: &Path,
    source: &Path,
    (layout, values): (&Layout, &[f32]),
    mut metadata: BTreeMap<String, String>,
    storage: Storage,
) -> Result<Written, Error> {
    metadata.insert("format".to_owned(), FORMAT.to_owned());
    metadata.insert("version".to_owned(), VERSION.to_owned());
    let (mut halves, mut brains) = (Vec::new(), Vec::new());
    match storage {
        Storage::F32 => {}
        Storage::F16 => halves.extend(values.iter().map(|&value| f16::from_f32(value))),
        Storage::Bf16 => brains.extend(values.iter().map(|&value| bf16::from_f32(value))),
    }
    let rounded = |index: usize| match storage {
        Storage::F32 => values[index],
        Storage::F16 => halves[index].to_f32(),
        Storage::Bf16 => brains[index].to_f32(),
    };
    let (mut views, mut error, mut norm) = (Vec::new(), 0.0, 0.0);
    for tensor in tensors(layout) {
        let range = tensor.span.start..tensor.span.end();
        for index in range.clone() {
            let (value, rounded) = (values[index], rounded(index));
            if !rounded.is_finite() {
                let wider = if storage == Storage::F16 {
                    "bf16"
                } else {
                    "f32"
                };
                let reason = format!(
                    "tensor {}: {value} is beyond the largest number of {storage}; use --dtype {wider}",
                    tensor.name
                );
                return Err(Error::Checkpoint {
                    path: source.to_owned(),
                    reason,
                });
            }
            error += (f64::from(rounded) - f64::from(value)).powi(2);
            norm += f64::from(value).powi(2);
        }
        views.push(file::Tensor {
            name: tensor.name.to_string(),
            shape: tensor.shape().to_vec(),
            data: match storage {
                Storage::F32 => TensorData::F32(&values[range]),
                Storage::F16 => TensorData::F16(&halves[range]),
                Storage::Bf16 => TensorData::BF16(&brains[range]),
            },
        });
    }
    file::write(path, &metadata, &views)?;
    Ok(Written {
        tensors: views.len(),
        elements: values.len(),
        // Where all parameters are 0, so are all errors.
        rounding: if norm > 0.0 {
            (error / norm).sqrt()
        } else {
            0.0
        },
    })
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::file::Dtype;
    use super::*;

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
        for (weights, sign) in [(Which::Student, 1.0), (Which::Teacher, -1.0)] {
            for storage in [Storage::F32, Storage::F16, Storage::Bf16] {
                let encoder = read(&source, weights).unwrap();
                assert_eq!(encoder.values, values(sign));
                let written = write(&out, &encoder, storage).unwrap();
                let back = read(&out, weights).unwrap();
                assert_eq!(back.vit, encoder.vit);
                assert_eq!(back.step.as_deref(), Some("7"));
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
                write(&source.with_extension("again"), &back, storage).unwrap();
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
        assert!(encoder.unexpected.is_empty(), "{:?}", encoder.unexpected);
        write(&out, &encoder, Storage::Bf16).unwrap();
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
            match write(&out, &encoder, storage) {
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
        let says = |weights, parts: &[&str]| {
            let error = read(&source, weights).unwrap_err().to_string();
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
        with("format", "other".to_owned());
        says(
            Which::Student,
            &["expected metadata format pcae 1", "other 1"],
        );
        with("config", "{\"x\":\n1}".to_owned());
        says(
            Which::Student,
            &["expected the settings of a pre-training run"],
        );
        with("config", recipe(|settings| settings.num_heads = Some(5)));
        says(
            Which::Student,
            &["its metadata \"config\"", "num_heads", "found 24"],
        );
        with("config", recipe(|settings| settings.depth = Some(4)));
        let all = tensors(&layout()).len();
        let part = format!("{all} of {} tensors", all + 12);
        says(
            Which::Teacher,
            &[&part, "the first missing is teacher.blocks.3.norm1.weight"],
        );
        with("config", recipe(|settings| settings.embed_dim = Some(48)));
        says(
            Which::Student,
            &[
                "cls_token",
                "expected shape [1, 1, 48] by the file's own metadata, found [1, 1, 24]",
            ],
        );
        checkpoint(&source, |_, student| {
            student[layout().encoder.norm.bias.start] = f32::NAN;
        });
        says(
            Which::Student,
            &["norm.bias", "expected finite numbers, found NaN"],
        );
        let error = read(folder.path(), Which::Student).unwrap_err();
        assert!(
            error.to_string().contains("checkpoints/last.safetensors"),
            "{error}"
        );
    }
}
