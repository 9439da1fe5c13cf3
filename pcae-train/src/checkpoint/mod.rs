//! Checkpoints: a run's whole state in one safetensors file.
//!
//! | tensor | what |
//! |---|---|
//! | `<name>` | student (encoder and decoder, or classifier), by its name in timm/MAE `state_dict`s |
//! | `teacher.<name>` | the moving average that follows it: of the encoder, or of a whole classifier |
//! | `adamw.exp_avg.<name>`, `adamw.exp_avg_sq.<name>` | moments of what is trained |
//!
//! Metadata: `format` (`pcae`), `version` (`1`), `step`, `batches` (micro-batches consumed: the position in the data),
//! `config` (the recipe as JSON, without the machine's settings), `data` (fingerprint of the training pictures); of a
//! classifier also `task` (`classify`) and `classes` (names as JSON); of a file of `pcae deploy` also `deployment`, see
//! [`deployment`]. Nothing in it depends on the machine or on time, so
//! equal runs have equal files. Everything is stored in f32, so that a resumed run goes on in the same bits; [`export`] writes
//! an encoder alone, in f16 or bf16 if wanted.

pub mod deployment;
pub mod exchange;
pub mod export;
pub mod file;
pub mod weights;

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};

use pcae_kernel::backend::TrainBackend;
use pcae_kernel::layout::{Layout, Tensor};
use pcae_kernel::model::TrainState;
use serde::{Deserialize, Serialize};

use crate::error::Error;
use crate::settings::shared::is_same_recipe;
use file::{FileError, Reader};

pub(crate) const FORMAT: &str = "pcae";
const VERSION: &str = "1";

/// Of the metadata of a file of this format.
fn expect_version(path: &Path, version: Option<&str>) -> Result<(), Error> {
    match version {
        Some(VERSION) => Ok(()),
        other => Err(Error::Checkpoint {
            path: path.to_owned(),
            reason: format!(
                "expected metadata format {FORMAT} {VERSION}, found {FORMAT} {}; use the program that wrote it",
                other.unwrap_or("of no version").escape_default()
            ),
        }),
    }
}
const TEACHER: &str = "teacher.";
/// The metadata `task` of a classifier.
pub(crate) const TASK_CLASSIFY: &str = "classify";
/// The metadata `task` of an encoder alone.
pub(crate) const TASK_ENCODE: &str = "encode";
/// The metadata `weights` of the best of a fine-tuned run, if that was the moving average.
pub(crate) const AVERAGE: &str = "average";
const EXP_AVG: &str = "adamw.exp_avg.";
const EXP_AVG_SQ: &str = "adamw.exp_avg_sq.";

/// Which weights of a checkpoint to take.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Which {
    /// Those that were trained.
    #[default]
    Student,
    /// Their moving average.
    Teacher,
    /// Those that a run of pre-training began with: what training has to beat.
    Untrained,
}

impl fmt::Display for Which {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Student => "student",
            Self::Teacher => "teacher",
            Self::Untrained => "untrained",
        })
    }
}

/// Finds the safetensors file: `path` itself, the best or else the newest checkpoint of a run directory, or
/// `model.safetensors` in a folder as the hub has it.
///
/// # Errors
/// [`Error::Checkpoint`] if the folder holds none of them.
pub fn locate(path: &Path) -> Result<PathBuf, Error> {
    if !path.is_dir() {
        return Ok(path.to_owned());
    }
    let candidates = [
        "checkpoints/best.safetensors",
        "checkpoints/last.safetensors",
        "model.safetensors",
    ];
    let found = candidates
        .map(|name| path.join(name))
        .into_iter()
        .find(|path| path.is_file());
    found.ok_or_else(|| Error::Checkpoint {
        path: path.to_owned(),
        reason: format!(
            "expected a run directory, or a safetensors file, found a folder without {}; give the --out of an earlier run, or \
             the file itself",
            candidates.join(", ")
        ),
    })
}

/// What stands before the names of the weights that are asked for in the file at `path`. One that was exported or deployed, and
/// the best of a fine-tuned run, holds those of its metadata `weights` alone, under plain names. The best of a run stands for
/// it whichever weights it has: for [`Which::Student`] it may be the average.
///
/// # Errors
/// [`Error::Checkpoint`] if it has not those.
fn prefix(path: &Path, reader: &Reader, which: Which) -> Result<&'static str, Error> {
    let wrong = |reason: &str| {
        Err(Error::Checkpoint {
            path: path.to_owned(),
            reason: reason.to_owned(),
        })
    };
    let alone = reader.metadata().get("weights").copied();
    match which {
        Which::Student if alone == Some("teacher") => wrong(
            "expected the student, found the teacher alone; give --which teacher, or the run's checkpoint",
        ),
        Which::Teacher if !matches!(alone, Some("teacher" | AVERAGE)) => {
            if reader.names().iter().any(|name| name.starts_with(TEACHER)) {
                return Ok(TEACHER);
            }
            if alone.is_some() {
                return wrong(
                    "expected a moving average, found none: it holds the student alone, as the best of a run does if that was \
                     the student's; use --which student, or give the run's checkpoints/last.safetensors if it has --set ema",
                );
            }
            wrong(
                "expected a moving average (teacher.…), found none, as in a run of --method mae or one of others; use --which \
                 student, or --prefix where its names begin with one",
            )
        }
        Which::Untrained => wrong(
            "expected the student or the teacher of a checkpoint, found --which untrained, which only frozen encoders of \
             `pcae pretrain` have; use --which student",
        ),
        Which::Student | Which::Teacher => Ok(""),
    }
}

/// The file and which of its weights, in words.
fn title(path: &Path, reader: &Reader, which: Which) -> String {
    let step = reader
        .metadata()
        .get("step")
        .map(|step| step.escape_default());
    // Of one that holds some alone it is the file that knows.
    let which = reader
        .metadata()
        .get("weights")
        .map_or_else(|| which.to_string(), |own| own.escape_default().to_string());
    let step = step.map_or_else(String::new, |step| format!(", the {which} of step {step}"));
    format!("{}{step}", path.display())
}

/// Where a run is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Position {
    /// Optimizer steps done.
    pub step: u64,
    /// Micro-batches consumed.
    pub batches: u64,
}

/// What a checkpoint says about its run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// The recipe as JSON, without the machine's settings.
    pub config: String,
    /// Fingerprint of the training pictures.
    pub data: String,
    /// More metadata; a resumed run does not compare it.
    pub more: BTreeMap<String, String>,
}

impl Identity {
    fn metadata(&self) -> BTreeMap<String, String> {
        let mut metadata = self.more.clone();
        let own = [
            ("format", FORMAT),
            ("version", VERSION),
            ("config", &self.config),
            ("data", &self.data),
        ];
        metadata.extend(own.map(|(key, value)| (key.to_owned(), value.to_owned())));
        metadata
    }
}

/// Saves the whole state, atomically: a kill at any moment leaves the old file or the new one.
///
/// # Errors
/// [`Error::Backend`], or [`Error::File`] if the disk fails; the previous checkpoint is then intact.
pub fn save<B: TrainBackend>(
    path: &Path,
    backend: &mut B,
    name: &str,
    state: &TrainState<B>,
    identity: &Identity,
    position: Position,
) -> Result<(), Error> {
    let mut metadata = identity.metadata();
    metadata.insert("step".to_owned(), position.step.to_string());
    metadata.insert("batches".to_owned(), position.batches.to_string());
    let failed = |error: B::Error| Error::backend(name, error);
    let tensors = tensors(&state.layout);
    let follows = state.layout.teacher().len();
    let mut stored: Vec<(String, Vec<usize>, Vec<f32>)> = Vec::new();
    let mut store = |prefix: &str, tensor: &Tensor, values: &[f32]| {
        let name = format!("{prefix}{}", tensor.name);
        if let Some(value) = values.iter().find(|value| !value.is_finite()) {
            let reason = format!(
                "not saved, because {name} holds {value}: the run diverged; what was saved before is intact. Lower --lr, or \
                 set clip_grad, and start anew"
            );
            return Err(Error::Checkpoint {
                path: path.to_owned(),
                reason,
            });
        }
        stored.push((name, tensor.shape().to_vec(), values.to_vec()));
        Ok(())
    };
    for tensor in &tensors {
        let mut values = vec![0.0; tensor.span.len];
        backend
            .read_params(&mut values, &state.student, tensor.span)
            .map_err(failed)?;
        store("", tensor, &values)?;
        if let Some(teacher) = state
            .teacher
            .as_ref()
            .filter(|_| tensor.span.end() <= follows)
        {
            backend
                .read_params(&mut values, teacher, tensor.span)
                .map_err(failed)?;
            store(TEACHER, tensor, &values)?;
        }
        if tensor.is_trained() {
            for (prefix, vector) in [(EXP_AVG, &state.exp_avg), (EXP_AVG_SQ, &state.exp_avg_sq)] {
                backend
                    .read_vector(&mut values, vector, tensor.span.start)
                    .map_err(failed)?;
                store(prefix, tensor, &values)?;
            }
        }
    }
    write(path, &metadata, &stored)
}

/// Saves parameters alone, as they are deployed, atomically: with `<name>` for each, and the metadata of `identity` and
/// `more`.
///
/// # Errors
/// As [`save`].
pub fn save_model<B: TrainBackend>(
    path: &Path,
    backend: &mut B,
    name: &str,
    (layout, params): (&Layout, &B::Params),
    identity: &Identity,
    more: &[(&str, String)],
) -> Result<(), Error> {
    let mut metadata = identity.metadata();
    metadata.extend(
        more.iter()
            .map(|(key, value)| ((*key).to_owned(), value.clone())),
    );
    let mut stored = Vec::new();
    for tensor in tensors(layout) {
        let mut values = vec![0.0; tensor.span.len];
        backend
            .read_params(&mut values, params, tensor.span)
            .map_err(|error| Error::backend(name, error))?;
        stored.push((tensor.name.to_string(), tensor.shape().to_vec(), values));
    }
    write(path, &metadata, &stored)
}

fn write(
    path: &Path,
    metadata: &BTreeMap<String, String>,
    stored: &[(String, Vec<usize>, Vec<f32>)],
) -> Result<(), Error> {
    let views: Vec<file::Tensor<'_>> = stored
        .iter()
        .map(|(name, shape, values)| file::Tensor {
            name: name.clone(),
            shape: shape.clone(),
            data: file::TensorData::F32(values),
        })
        .collect();
    Ok(file::write(path, metadata, &views)?)
}

/// The values of a checkpoint, in the order of the layout.
#[derive(Clone, Debug, PartialEq)]
pub struct Values {
    /// Where the run was.
    pub position: Position,
    student: Vec<f32>,
    teacher: Option<Vec<f32>>,
    exp_avg: Vec<f32>,
    exp_avg_sq: Vec<f32>,
}

impl Values {
    /// A state on `backend`, as it was saved.
    ///
    /// # Errors
    /// What the backend reports.
    pub fn into_state<B: TrainBackend>(
        self,
        backend: &mut B,
        layout: Layout,
        weight_decay: f64,
    ) -> Result<TrainState<B>, B::Error> {
        // Each copy of the host's goes when the backend has its own.
        let student = backend.params(&layout, &self.student)?;
        drop(self.student);
        let teacher = match self.teacher {
            Some(values) => Some(backend.teacher_params(&layout.teacher(), &values)?),
            None => None,
        };
        let mut state = TrainState::with_params(backend, layout, student, teacher, weight_decay)?;
        backend.write_vector(&mut state.exp_avg, 0, &self.exp_avg)?;
        backend.write_vector(&mut state.exp_avg_sq, 0, &self.exp_avg_sq)?;
        Ok(state)
    }
}

/// Loads what [`save`] wrote, strictly: the architecture of `layout`, all of its tensors and no others.
///
/// # Errors
/// [`Error::File`] if the file is damaged, [`Error::Checkpoint`] if it is another run's or another architecture's.
pub fn load(
    path: &Path,
    layout: &Layout,
    has_teacher: bool,
    identity: &Identity,
) -> Result<Values, Error> {
    let reader = Reader::open(path)?;
    let wrong = |reason: String| Error::Checkpoint {
        path: path.to_owned(),
        reason,
    };
    let metadata: BTreeMap<String, String> = reader
        .metadata()
        .into_iter()
        .map(|(key, value)| (key.to_owned(), value.to_owned()))
        .collect();
    let entry = |key: &str| {
        let missing = || {
            wrong(format!(
                "expected metadata {key:?}, found none; give a checkpoint of a run"
            ))
        };
        metadata.get(key).ok_or_else(missing)
    };
    let format = entry("format")?;
    if format != FORMAT {
        return Err(wrong(format!(
            "expected format {FORMAT}, found {}; use the program that wrote it",
            format.escape_default()
        )));
    }
    expect_version(path, metadata.get("version").map(String::as_str))?;
    let number = |key: &str| -> Result<u64, Error> {
        let text = entry(key)?;
        text.parse().map_err(|_| {
            wrong(format!(
                "expected a number as metadata {key:?}, found {text:?}"
            ))
        })
    };
    let position = Position {
        step: number("step")?,
        batches: number("batches")?,
    };

    let tensors = tensors(layout);
    let follows = if has_teacher {
        layout.teacher().len()
    } else {
        0
    };
    let mut expected: Vec<(String, usize, usize)> = Vec::new();
    for (index, tensor) in tensors.iter().enumerate() {
        expected.push((tensor.name.to_string(), 0, index));
        if tensor.span.end() <= follows {
            expected.push((format!("{TEACHER}{}", tensor.name), 1, index));
        }
        if tensor.is_trained() {
            expected.push((format!("{EXP_AVG}{}", tensor.name), 2, index));
            expected.push((format!("{EXP_AVG_SQ}{}", tensor.name), 3, index));
        }
    }
    let names = reader.names();
    let missing: Vec<_> = expected
        .iter()
        .filter(|(name, ..)| names.binary_search(name).is_err())
        .collect();
    let unknown: Vec<_> = names
        .iter()
        .filter(|name| !expected.iter().any(|(other, ..)| other == *name))
        .collect();
    if let Some(name) = missing
        .first()
        .map(|(name, ..)| name)
        .or(unknown.first().copied())
    {
        let problem = if missing.is_empty() {
            "unexpected"
        } else {
            "missing"
        };
        let (total, found) = (expected.len(), expected.len() - missing.len());
        return Err(wrong(format!(
            "{found} of {total} tensors of the architecture found, {} unexpected; the first {problem} is {name}; the \
             checkpoint is of another architecture or task: give its own settings",
            unknown.len()
        )));
    }
    let mut groups = [layout.len(), follows, layout.len(), layout.len()].map(|len| vec![0.0; len]);
    for (name, group, index) in &expected {
        let tensor = &tensors[*index];
        let values = reader.tensor_f32(name, tensor.shape()).map_err(|error| match error {
            FileError::WrongShape { name, expected, found, .. } => wrong(format!(
                "tensor {name}: expected shape {expected:?}, found {found:?}; the checkpoint is of another \
                 architecture: give its own settings"
            )),
            other => other.into(),
        })?;
        groups[*group][tensor.span.start..tensor.span.end()].copy_from_slice(&values);
    }
    if !is_same_recipe(entry("config")?, &identity.config) {
        return Err(wrong(
            "expected the settings of the run's config.toml, found others; restore config.toml or start a new run"
                .to_owned(),
        ));
    }
    let (trained_on, data) = (entry("data")?, &identity.data);
    if trained_on != data {
        return Err(wrong(format!(
            "expected the run's training pictures ({trained_on}), found others ({data}); restore --data or start a new run"
        )));
    }
    let [student, teacher, exp_avg, exp_avg_sq] = groups;
    let teacher = has_teacher.then_some(teacher);
    Ok(Values {
        position,
        student,
        teacher,
        exp_avg,
        exp_avg_sq,
    })
}

fn tensors(layout: &Layout) -> Vec<Tensor> {
    let mut tensors = Vec::new();
    layout.for_each(|tensor| tensors.push(tensor));
    tensors
}
