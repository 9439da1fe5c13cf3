//! How a file calls the tensors of an encoder, and which of a file's namings it is.

use std::collections::BTreeSet;

use super::{hugging_face, timm};
use crate::checkpoint::file::Reader;

/// What the tensors of a plain vision transformer are called. Linear layers and norms have a `.weight` and a `.bias`; what is
/// said of a block comes after `blocks.<number>.`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Names {
    pub(super) cls_token: &'static str,
    pub(super) pos_embed: &'static str,
    pub(super) patch_embed: &'static str,
    pub(super) blocks: &'static str,
    pub(super) norm1: &'static str,
    pub(super) qkv: Qkv,
    pub(super) proj: &'static str,
    /// Factors of the attention's output, one a channel (layer scale); a whole name.
    pub(super) scale1: &'static str,
    pub(super) norm2: &'static str,
    pub(super) fc1: &'static str,
    pub(super) fc2: &'static str,
    /// The same of the MLP's.
    pub(super) scale2: &'static str,
    pub(super) norm: &'static str,
    pub(super) head: &'static str,
    /// Whether the naming's home smooths positions when it makes their grid smaller.
    pub(super) antialias: bool,
}

/// Queries, keys and values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Qkv {
    /// In one layer.
    Joined(&'static str),
    /// In a layer each, in this order.
    Split([&'static str; 3]),
}

impl Names {
    /// The name of a tensor of block `index`.
    pub(super) fn in_block(&self, index: usize, name: &str) -> String {
        format!("{}.{index}.{name}", self.blocks)
    }

    /// The block number and the rest of a name, if it is one of a block's.
    pub(super) fn block_of<'a>(&self, name: &'a str) -> Option<(usize, &'a str)> {
        let (number, rest) = name
            .strip_prefix(self.blocks)?
            .strip_prefix('.')?
            .split_once('.')?;
        Some((number.parse().ok()?, rest))
    }
}

/// A naming found in a file, and what stands before every name of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Scheme {
    pub(super) names: Names,
    pub(super) prefix: String,
}

impl Scheme {
    /// The encoders of a file. Moments of an optimizer are none, though their names end alike.
    pub(super) fn all(reader: &Reader) -> Vec<Self> {
        let names: BTreeSet<String> = reader.names().into_iter().collect();
        let mut found = Vec::new();
        for family in [timm::NAMES, hugging_face::VIT] {
            let anchor = format!("{}.weight", family.patch_embed);
            for name in &names {
                let Some(prefix) = name.strip_suffix(&anchor) else {
                    continue;
                };
                let whole = prefix.is_empty() || prefix.ends_with('.');
                if !whole || prefix.starts_with("adamw.") {
                    continue;
                }
                let is_dinov2 = family == hugging_face::VIT
                    && names.contains(&format!(
                        "{prefix}{}.weight",
                        hugging_face::DINOV2.in_block(0, hugging_face::DINOV2.norm1)
                    ));
                found.push(Self {
                    names: if is_dinov2 {
                        hugging_face::DINOV2
                    } else {
                        family
                    },
                    prefix: prefix.to_owned(),
                });
            }
        }
        found.sort_by_key(|scheme| scheme.prefix.len());
        found
    }

    /// The naming in words.
    pub(super) fn title(&self, reader: &Reader) -> &'static str {
        let has = |name: &str| reader.shape(&format!("{}{name}", self.prefix)).is_some();
        if reader.metadata().get("format") == Some(&"pcae") {
            "pcae"
        } else if self.names == hugging_face::DINOV2 {
            "Hugging Face DINOv2"
        } else if self.names == hugging_face::VIT {
            "Hugging Face ViT"
        } else if has("decoder_embed.weight") {
            "MAE with decoder"
        } else if has("mask_token") || has("register_tokens") {
            "DINOv2"
        } else {
            "timm"
        }
    }
}

/// Why a tensor outside of the blocks makes the network another one, if it does.
pub(super) fn obstacle(name: &str) -> Option<&'static str> {
    let parts = [
        ("register_tokens", "register tokens"),
        ("reg_token", "register tokens"),
        ("dist_token", "a distillation token"),
        ("distillation_token", "a distillation token"),
        ("norm_pre.weight", "a norm before the first block"),
        ("pre_layrnorm.weight", "a norm before the first block"),
        ("patch_embed.norm.weight", "a norm of the patches"),
        (
            "rel_pos_bias.relative_position_bias_table",
            "relative positions",
        ),
        ("rope.freqs", "rotary positions"),
    ];
    parts
        .iter()
        .find(|(part, _)| name == *part || name.ends_with(&format!(".{part}")))
        .map(|(_, what)| *what)
}
