//! The names of timm's `VisionTransformer`, which are also those of MAE, of DINOv2's own files and of this project.

use super::names::{Names, Qkv};

pub(super) const NAMES: Names = Names {
    cls_token: "cls_token",
    pos_embed: "pos_embed",
    patch_embed: "patch_embed.proj",
    blocks: "blocks",
    norm1: "norm1",
    qkv: Qkv::Joined("attn.qkv"),
    proj: "attn.proj",
    scale1: "ls1.gamma",
    norm2: "norm2",
    fc1: "mlp.fc1",
    fc2: "mlp.fc2",
    scale2: "ls2.gamma",
    norm: "norm",
    head: "head",
    antialias: true,
};

/// The norm after pooling over patches, in place of [`Names::norm`] before it.
pub(super) const FC_NORM: &str = "fc_norm";
