//! The settings of the run that a checkpoint is of, whichever kind of run: the one way from a file to what it was trained on.

use std::path::Path;

use serde::Deserialize;

use crate::checkpoint::FORMAT;
use crate::checkpoint::file::Reader;
use crate::finetune::FinetuneSettings;
use crate::settings::Settings;
use crate::settings::shared::Crops;

/// The settings of a run.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum RunSettings {
    /// Of `pcae pretrain`.
    Pretrain(Box<Settings>),
    /// Of `pcae finetune`.
    Finetune(Box<FinetuneSettings>),
}

impl RunSettings {
    /// Those in the metadata of a file, which `convert` writes too, as far as it knows them; `None` if there are none.
    pub(crate) fn of(reader: &Reader) -> Option<Self> {
        let metadata = reader.metadata();
        let ours = metadata.get("format") == Some(&FORMAT);
        let config = metadata.get("config").filter(|_| ours)?;
        let config: serde_json::Value = serde_json::from_str(config).ok()?;
        if metadata.contains_key("classes") {
            let settings = FinetuneSettings::from_recipe(config).ok()?;
            return Some(Self::Finetune(Box::new(settings)));
        }
        let settings = Settings::deserialize(config).ok()?;
        Some(Self::Pretrain(Box::new(settings)))
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
