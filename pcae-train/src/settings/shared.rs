//! What every kind of settings is read, written and resolved by.

use std::fmt;
use std::path::Path;

use pcae_kernel::config::VitConfig;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::Machine;
use crate::data::augment::{Transform, channel_stats};
use crate::data::{DataError, Dataset};
use crate::error::{Error, flag};

/// Keys that earlier versions wrote, each of which is also an alias of its field, and what they are called now.
const RENAMED: [(&str, &str); 1] = [("weights_from", "which")];

/// Defaults, under the TOML of `config`, under `overrides` (`key`, value as TOML or plain text). Where nothing names a run
/// directory, it is `out`.
///
/// # Errors
/// [`Error::Setting`] naming the key, or [`Error::ConfigFile`] naming the file.
pub(crate) fn load<T: DeserializeOwned>(
    config: Option<&Path>,
    overrides: &[(String, String)],
    out: &str,
) -> Result<T, Error> {
    let mut table = match config {
        Some(path) => {
            let text = std::fs::read_to_string(path).map_err(|error| Error::ConfigFile {
                path: path.to_owned(),
                reason: error.to_string(),
            })?;
            parse::<T>(path, &text)?;
            parse::<toml::Table>(path, &text)?
        }
        None => toml::Table::new(),
    };
    for (old, new) in RENAMED {
        if let Some(value) = table.remove(old) {
            table.insert(new.to_owned(), value);
        }
    }
    for (key, text) in overrides {
        let mut one = toml::Table::new();
        one.insert(key.clone(), value(text));
        if let Err(error) = T::deserialize(one.clone()) {
            // What reads as a number may be meant as text: a block for `drop_place`, a folder called 2024.
            one.insert(key.clone(), toml::Value::String(text.clone()));
            if T::deserialize(one.clone()).is_err() {
                return Err(Error::Setting {
                    name: flag(key),
                    reason: one_line(&error),
                });
            }
        }
        // One of a pair takes the place of the other.
        for (a, b) in [("epochs", "steps"), ("lr", "blr")] {
            for (given, other) in [(a, b), (b, a)] {
                if key == given && !overrides.iter().any(|(key, _)| key == other) {
                    table.remove(other);
                }
            }
        }
        table.extend(one);
    }
    // Not a default of the field: that would be the same for every kind of settings.
    table
        .entry("out")
        .or_insert_with(|| toml::Value::String(out.to_owned()));
    T::deserialize(table).map_err(|error| settings_error(&error))
}

/// Reads the text of a `config.toml`; `path` is its name in errors.
///
/// # Errors
/// [`Error::ConfigFile`].
pub(crate) fn parse<T: DeserializeOwned>(path: &Path, text: &str) -> Result<T, Error> {
    toml::from_str(text).map_err(|error| {
        let mut reason = one_line(&error);
        if reason.contains("unknown field") {
            reason += "; correct it, or if another version of pcae wrote the file, use that one";
        }
        Error::ConfigFile {
            path: path.to_owned(),
            reason,
        }
    })
}

/// As TOML.
///
/// # Errors
/// [`Error::Setting`] for values that TOML cannot hold, such as a path that is no text.
pub(crate) fn to_toml(settings: &impl Serialize) -> Result<String, Error> {
    toml::to_string(settings).map_err(|error| settings_error(&error))
}

/// The settings without those of the machine, as one line of JSON.
pub(crate) fn recipe_json(settings: &impl Serialize) -> String {
    let mut value = serde_json::to_value(settings).unwrap_or_default();
    if let Some(fields) = value.as_object_mut() {
        fields.retain(|key, value| !Machine::KEYS.contains(&key.as_str()) && !value.is_null());
    }
    value.to_string()
}

/// The settings in the metadata of a checkpoint, see [`recipe_json`].
///
/// # Errors
/// What is wrong with them and what to do, in words.
pub(crate) fn from_recipe<T: DeserializeOwned>(config: Value) -> Result<T, String> {
    T::deserialize(config).map_err(|error| {
        // Of an unknown key also all known ones are said, which help only whoever typed it.
        let found = error.to_string();
        let found = found.split(", expected").next().unwrap_or_default();
        format!(
            "expected in its metadata settings that this version of pcae knows, found {}; another version of pcae wrote it: \
             use that one",
            found.escape_default()
        )
    })
}

/// Whether two recipes are one, whichever version of this program wrote them.
pub(crate) fn is_same_recipe(a: &str, b: &str) -> bool {
    let parsed = |recipe| {
        let mut fields: serde_json::Map<String, Value> = serde_json::from_str(recipe).ok()?;
        for (old, new) in RENAMED {
            if let Some(value) = fields.remove(old) {
                fields.insert(new.to_owned(), value);
            }
        }
        Some(fields)
    };
    a == b || matches!((parsed(a), parsed(b)), (Some(a), Some(b)) if a == b)
}

fn settings_error(error: &dyn fmt::Display) -> Error {
    Error::Setting {
        name: "settings".to_owned(),
        reason: one_line(error),
    }
}

/// A value as typed: TOML if it reads as TOML, else text.
fn value(text: &str) -> toml::Value {
    match format!("x = {text}").parse::<toml::Table>() {
        Ok(mut table) => table
            .remove("x")
            .unwrap_or(toml::Value::String(text.to_owned())),
        Err(_) => toml::Value::String(text.to_owned()),
    }
}

/// A TOML error without the picture of the place.
fn one_line(error: &dyn fmt::Display) -> String {
    let text = error.to_string();
    let lines = text
        .lines()
        .map(str::trim)
        .filter(|line| !line.is_empty() && !line.contains('|'));
    lines.collect::<Vec<_>>().join("; ")
}

/// A preset of an encoder, and what differs from it.
pub(crate) struct Architecture<'a> {
    pub(crate) model: &'a str,
    pub(crate) img_size: Option<[usize; 2]>,
    pub(crate) in_chans: Option<usize>,
    pub(crate) patch_size: Option<usize>,
    pub(crate) embed_dim: Option<usize>,
    pub(crate) depth: Option<usize>,
    pub(crate) num_heads: Option<usize>,
    pub(crate) mlp_ratio: Option<f64>,
}

impl Architecture<'_> {
    /// The encoder.
    ///
    /// # Errors
    /// [`Error::Setting`] or [`Error::Config`].
    pub(crate) fn vit(self) -> Result<VitConfig, Error> {
        let Some(preset) = VitConfig::preset(self.model) else {
            let reason = format!(
                "expected one of {}, found {:?}",
                VitConfig::PRESETS.join(", "),
                self.model
            );
            return Err(Error::Setting {
                name: "--model".to_owned(),
                reason,
            });
        };
        let vit = VitConfig {
            img_size: self.img_size.unwrap_or(preset.img_size),
            in_chans: self.in_chans.unwrap_or(preset.in_chans),
            patch_size: self.patch_size.unwrap_or(preset.patch_size),
            embed_dim: self.embed_dim.unwrap_or(preset.embed_dim),
            depth: self.depth.unwrap_or(preset.depth),
            num_heads: self.num_heads.unwrap_or(preset.num_heads),
            mlp_ratio: self.mlp_ratio.unwrap_or(preset.mlp_ratio),
        };
        vit.check()?;
        Ok(vit)
    }
}

/// How training pictures are cropped.
pub(crate) struct Crops {
    pub(crate) scale: [f64; 2],
    pub(crate) ratio: [f64; 2],
    pub(crate) flip: bool,
}

/// The transform to the pictures that `vit` takes, checked; fills in mean and standard deviation where there are none.
///
/// # Errors
/// [`Error::Setting`] or [`Error::Data`].
pub(crate) fn transform(
    vit: &VitConfig,
    train: &Dataset,
    crops: Crops,
    mean: &mut Option<Vec<f32>>,
    std: &mut Option<Vec<f32>>,
) -> Result<Transform, Error> {
    let [height, width] = vit.img_size;
    if mean.is_none() || std.is_none() {
        let stats = channel_stats(train, height, width)?;
        mean.get_or_insert(stats.0);
        std.get_or_insert(stats.1);
    }
    let transform = Transform {
        height,
        width,
        channels: vit.in_chans,
        scale: (crops.scale[0], crops.scale[1]),
        ratio: (crops.ratio[0], crops.ratio[1]),
        flip: crops.flip,
        mean: mean.clone().unwrap_or_default(),
        std: std.clone().unwrap_or_default(),
    };
    transform.check().map_err(typed)?;
    Ok(transform)
}

/// A setting of the data pipeline by its name in the settings.
pub(crate) fn typed(error: DataError) -> Error {
    match error {
        DataError::Setting {
            name,
            expected,
            found,
        } => Error::Setting {
            name: flag(&name.replace(' ', "_")),
            reason: format!("expected {expected}, found {found}"),
        },
        other => other.into(),
    }
}
