//! What shapes do not tell: from the metadata in the file, and from `config.json` and `preprocessor_config.json` beside it, as
//! Hugging Face's hub and timm store them.

use std::path::Path;

use pcae_kernel::config::VitConfig;
use serde_json::Value;

use super::Shapes;
use crate::checkpoint::file::Reader;
use crate::checkpoint::{FORMAT, expect_version};
use crate::error::Error;

/// What is known; every field may be missing.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Known {
    pub(super) img_size: Option<[usize; 2]>,
    pub(super) num_heads: Option<usize>,
    pub(super) decoder_num_heads: Option<usize>,
    pub(super) layer_norm_eps: Option<f64>,
    pub(super) activation: Option<String>,
    pub(super) norm_pix: Option<bool>,
    pub(super) mean: Option<Vec<f32>>,
    pub(super) std: Option<Vec<f32>>,
    /// Width and blocks, of a file of this program.
    pub(super) embed_dim: Option<usize>,
    pub(super) depth: Option<usize>,
}

/// Heads by the beginning of timm's names of architectures.
const TIMM_HEADS: [(&str, usize); 8] = [
    ("vit_tiny_", 3),
    ("vit_small_", 6),
    ("vit_base_", 12),
    ("vit_large_", 16),
    ("vit_huge_", 16),
    ("deit_tiny_", 3),
    ("deit_small_", 6),
    ("deit_base_", 12),
];

/// A configuration is a few kilobytes; what is much larger is none.
const MAX_BYTES: u64 = 1 << 20;

impl Known {
    /// Collects what is known about `file`.
    pub(super) fn about(file: &Path, reader: &Reader) -> Result<Self, Error> {
        let mut known = Self::default();
        let metadata = reader.metadata();
        if metadata.get("format") == Some(&FORMAT)
            && let Some(config) = metadata.get("config")
        {
            expect_version(file, metadata.get("version").copied())?;
            known.ours(&parse(file, config)?);
            return Ok(known);
        }
        if let Some(config) = read(&file.with_file_name("config.json"))? {
            known.hugging_face(&config);
            known.timm(&config);
        }
        if let Some(config) = read(&file.with_file_name("preprocessor_config.json"))? {
            known.mean = floats(&config["image_mean"]).or(known.mean);
            known.std = floats(&config["image_std"]).or(known.std);
        }
        Ok(known)
    }

    /// Holds the sizes that the tensors tell against what a file of this program says of itself.
    pub(super) fn check(&self, file: &Path, shapes: &Shapes) -> Result<(), Error> {
        let (width, depth) = (shapes.embed_dim, shapes.depth);
        let mut sizes = vec![
            ("width", self.embed_dim, width),
            ("blocks", self.depth, depth),
        ];
        if let (Some(img_size), Some(_)) = (self.img_size, self.depth) {
            let patches: usize = img_size
                .iter()
                .map(|edge| edge / shapes.patch_size.max(1))
                .fold(1, usize::saturating_mul);
            sizes.push(("positions", patches.checked_add(1), shapes.positions));
        }
        for (what, said, found) in sizes {
            if let Some(said) = said.filter(|said| *said != found) {
                return Err(Error::Checkpoint {
                    path: file.to_owned(),
                    reason: format!(
                        "expected {what} of {said} by the file's own metadata, found {found}; copy the file again or use another \
                         checkpoint"
                    ),
                });
            }
        }
        Ok(())
    }

    fn ours(&mut self, config: &Value) {
        let preset = config["model"].as_str().and_then(VitConfig::preset);
        self.img_size = size(&config["img_size"]).or(preset.map(|preset| preset.img_size));
        self.num_heads = count(&config["num_heads"]).or(preset.map(|preset| preset.num_heads));
        self.embed_dim = count(&config["embed_dim"]).or(preset.map(|preset| preset.embed_dim));
        self.depth = count(&config["depth"]).or(preset.map(|preset| preset.depth));
        // As `VitConfig::default_decoder` has it.
        self.decoder_num_heads = count(&config["decoder_num_heads"]).or(self.num_heads);
        self.norm_pix = config["norm_pix"].as_bool();
        self.mean = floats(&config["mean"]);
        self.std = floats(&config["std"]);
    }

    fn hugging_face(&mut self, config: &Value) {
        self.img_size = size(&config["image_size"]);
        self.num_heads = count(&config["num_attention_heads"]);
        self.decoder_num_heads = count(&config["decoder_num_attention_heads"]);
        self.layer_norm_eps = config["layer_norm_eps"].as_f64();
        self.activation = config["hidden_act"].as_str().map(str::to_owned);
        self.norm_pix = config["norm_pix_loss"].as_bool();
    }

    fn timm(&mut self, config: &Value) {
        let (args, pretrained) = (&config["model_args"], &config["pretrained_cfg"]);
        let input = pretrained["input_size"].as_array();
        let input = input.and_then(|input| match &input[..] {
            [_, height, width] => Some([count(height)?, count(width)?]),
            _ => None,
        });
        let architecture = config["architecture"].as_str().unwrap_or_default();
        let by_name = TIMM_HEADS
            .iter()
            .find(|(start, _)| architecture.starts_with(start));
        self.img_size = self.img_size.or(size(&args["img_size"])).or(input);
        self.num_heads = self
            .num_heads
            .or(count(&args["num_heads"]))
            .or(by_name.map(|(_, heads)| *heads));
        self.mean = floats(&pretrained["mean"]);
        self.std = floats(&pretrained["std"]);
    }
}

fn read(path: &Path) -> Result<Option<Value>, Error> {
    let Ok(metadata) = std::fs::metadata(path) else {
        return Ok(None);
    };
    if metadata.len() > MAX_BYTES {
        return Err(Error::Checkpoint {
            path: path.to_owned(),
            reason: format!(
                "expected a configuration of at most {MAX_BYTES} bytes, found {}; move the file away",
                metadata.len()
            ),
        });
    }
    let text = std::fs::read_to_string(path).map_err(|error| Error::Io {
        what: format!("'{}'", path.display()),
        error,
    })?;
    parse(path, &text).map(Some)
}

fn parse(path: &Path, text: &str) -> Result<Value, Error> {
    serde_json::from_str(text).map_err(|error| Error::Checkpoint {
        path: path.to_owned(),
        reason: format!("its configuration is no JSON: {error}; mend it or move it away"),
    })
}

fn count(value: &Value) -> Option<usize> {
    usize::try_from(value.as_u64()?).ok()
}

/// `224` or `[224, 192]`.
fn size(value: &Value) -> Option<[usize; 2]> {
    match value.as_array().map(Vec::as_slice) {
        Some([height, width]) => Some([count(height)?, count(width)?]),
        Some(_) => None,
        None => count(value).map(|edge| [edge, edge]),
    }
}

fn floats(value: &Value) -> Option<Vec<f32>> {
    let values = value.as_array()?.iter();
    values
        .map(|value| value.as_f64().map(|value| value as f32))
        .collect()
}
