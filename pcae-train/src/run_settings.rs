//! The settings of the run that a checkpoint is of, whichever kind of run: the one way from a file to what it was trained on.

use std::path::Path;

use serde_json::Value;

use crate::checkpoint::FORMAT;
use crate::checkpoint::file::Reader;
use crate::error::Error;
use crate::finetune::FinetuneSettings;
use crate::settings::Settings;
use crate::settings::shared::{Crops, from_recipe};

/// The settings of a run.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum RunSettings {
    /// Of `pcae pretrain`.
    Pretrain(Box<Settings>),
    /// Of `pcae finetune`.
    Finetune(Box<FinetuneSettings>),
}

impl RunSettings {
    /// Those in the metadata of `file`, which `convert` writes too, as far as it knows them; `None` if there are none.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] if this version cannot read them.
    pub(crate) fn of(file: &Path, reader: &Reader) -> Result<Option<Self>, Error> {
        let wrong = |reason| Error::Checkpoint {
            path: file.to_owned(),
            reason,
        };
        let metadata = reader.metadata();
        let ours = metadata.get("format") == Some(&FORMAT);
        let Some(config) = metadata.get("config").filter(|_| ours) else {
            return Ok(None);
        };
        let config: Value = serde_json::from_str(config).map_err(|error| {
            wrong(format!(
                "its configuration is no JSON: {error}; copy the file again"
            ))
        })?;
        Ok(Some(if metadata.contains_key("classes") {
            Self::Finetune(from_recipe(config).map_err(wrong)?)
        } else {
            Self::Pretrain(from_recipe(config).map_err(wrong)?)
        }))
    }

    /// Those of a run of `pcae pretrain`.
    pub(crate) fn pretraining(&self) -> Option<&Settings> {
        match self {
            Self::Pretrain(settings) => Some(settings),
            Self::Finetune(_) => None,
        }
    }

    /// The folder of its pictures; `None` for the embedded ones.
    pub(crate) fn data(&self) -> Option<&Path> {
        match self {
            Self::Pretrain(settings) => settings.data.as_deref(),
            Self::Finetune(settings) => settings.data.as_deref(),
        }
    }

    /// How its pictures were cropped, where it says so.
    pub(crate) fn crops(&self) -> Option<Crops> {
        let (scale, ratio, flip) = match self {
            Self::Pretrain(settings) => (settings.crop_scale, settings.crop_ratio, settings.flip),
            Self::Finetune(settings) => (settings.crop_scale, settings.crop_ratio, settings.flip),
        };
        let scale = scale?;
        Some(Crops { scale, ratio, flip })
    }
}
