//! Weights to start from or to deploy: the encoder of a pre-training run, a fine-tuned classifier, or any file with
//! tensors under the names of timm's `state_dict`s.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use pcae_kernel::layout::{Layout, Tail};

use super::deployment::{self, Deployment};
use super::file::{FileError, Reader};
use super::{FORMAT, Which, expect_version, locate, prefix, tensors, title};
use crate::error::Error;

/// An open file of weights.
#[derive(Debug)]
pub struct Weights {
    path: PathBuf,
    reader: Reader,
    metadata: BTreeMap<String, String>,
}

/// What [`Weights::load`] did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Loaded {
    /// Tensors that came from the file.
    pub found: usize,
    /// Tensors of the layout.
    pub total: usize,
    /// Those that keep the values they had.
    pub fresh: Vec<String>,
}

impl Weights {
    /// Opens a safetensors file, or the best or else the last checkpoint of a run directory.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] if the directory has none, or [`Error::File`].
    pub fn open(path: &Path) -> Result<Self, Error> {
        let path = locate(path)?;
        let reader = Reader::open(&path)?;
        let metadata = reader
            .metadata()
            .into_iter()
            .map(|(key, value)| (key.to_owned(), value.to_owned()))
            .collect();
        Ok(Self {
            path,
            reader,
            metadata,
        })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The settings of the run that wrote it; `None` for a file of another program.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] if what is there is no JSON object, or of another version.
    pub fn config(&self) -> Result<Option<serde_json::Value>, Error> {
        let (Some(config), Some(FORMAT)) = (
            self.metadata.get("config"),
            self.metadata.get("format").map(String::as_str),
        ) else {
            return Ok(None);
        };
        expect_version(&self.path, self.metadata("version"))?;
        match serde_json::from_str::<serde_json::Value>(config) {
            Ok(value) if value.is_object() => Ok(Some(value)),
            _ => Err(self.wrong("expected settings as JSON in the metadata, found something else; copy the file again")),
        }
    }

    /// The token budget that `pcae deploy` chose; `None` if it did not write the file.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] if what is there is none.
    pub fn deployment(&self) -> Result<Option<Deployment>, Error> {
        let Some(text) = self.metadata(deployment::KEY) else {
            return Ok(None);
        };
        serde_json::from_str(text).map(Some).map_err(|error| {
            self.wrong(&format!(
                "expected what `pcae deploy` writes as metadata {:?}, found something else: {}; copy the file again",
                deployment::KEY,
                error.to_string().escape_default()
            ))
        })
    }

    /// The file and which of its weights, in words.
    pub(crate) fn title(&self, which: Which) -> String {
        title(&self.path, &self.reader, which)
    }

    /// An entry of the metadata.
    pub(crate) fn metadata(&self, key: &str) -> Option<&str> {
        self.metadata.get(key).map(String::as_str)
    }

    /// The names of a classifier's classes; `None` for what is no classifier of ours.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] if what is there is no list of names.
    pub fn classes(&self) -> Result<Option<Vec<String>>, Error> {
        let Some(classes) = self.metadata.get("classes") else {
            return Ok(None);
        };
        serde_json::from_str(classes).map(Some).map_err(|_| {
            self.wrong("expected a list of names as metadata \"classes\", found something else; copy the file again")
        })
    }

    /// Copies the tensors of `layout` into `values`, by name. The encoder up to its last block must be whole; its last norm
    /// may be missing, since a classifier's is another one, and the head is left as it is unless `with_head`.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] for another architecture, or where there is no `which`; [`Error::File`].
    pub fn load(
        &self,
        layout: &Layout,
        which: Which,
        with_head: bool,
        values: &mut [f32],
    ) -> Result<Loaded, Error> {
        let prefix = prefix(&self.path, &self.reader, which)?;
        let names = self.reader.names();
        let optional = layout.encoder.norm.weight.start;
        let head = match layout.tail {
            Tail::Head(head, _) => head.weight.start,
            Tail::Encoder | Tail::Decoder(_) => layout.len(),
        };
        let tensors = tensors(layout);
        let (mut fresh, mut missing) = (Vec::new(), Vec::new());
        for tensor in &tensors {
            let name = format!("{prefix}{}", tensor.name);
            if (tensor.span.start >= head && !with_head) || names.binary_search(&name).is_err() {
                fresh.push(tensor.name.to_string());
                if tensor.span.start < optional {
                    missing.push(name);
                }
                continue;
            }
            let read = self.reader.tensor_f32(&name, tensor.shape());
            let from_file = read.map_err(|error| match error {
                FileError::WrongShape { name, expected, found, .. } => self.wrong(&format!(
                    "tensor {name}: expected shape {expected:?}, found {found:?}; the weights are of another architecture \
                     or another size of picture: give its --model and --set img_size"
                )),
                other => other.into(),
            })?;
            values[tensor.span.start..tensor.span.end()].copy_from_slice(&from_file);
        }
        let loaded = Loaded {
            found: tensors.len() - fresh.len(),
            total: tensors.len(),
            fresh,
        };
        if let Some(first) = missing.first() {
            return Err(self.wrong(&format!(
                "{} of {} tensors of the model found; the first missing of the encoder is {first}; the weights are of \
                 another architecture: give its --model",
                loaded.found, loaded.total
            )));
        }
        Ok(loaded)
    }

    pub(crate) fn wrong(&self, reason: &str) -> Error {
        Error::Checkpoint {
            path: self.path.clone(),
            reason: reason.to_owned(),
        }
    }
}
