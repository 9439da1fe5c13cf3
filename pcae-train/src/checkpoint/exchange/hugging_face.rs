//! The names of Hugging Face's `ViTModel` (also inside `ViTMAEForPreTraining`) and `Dinov2Model`.

use super::names::{Names, Qkv};

/// `ViTModel`.
pub(super) const VIT: Names = Names {
    cls_token: "embeddings.cls_token",
    pos_embed: "embeddings.position_embeddings",
    patch_embed: "embeddings.patch_embeddings.projection",
    blocks: "encoder.layer",
    norm1: "layernorm_before",
    qkv: Qkv::Split([
        "attention.attention.query",
        "attention.attention.key",
        "attention.attention.value",
    ]),
    proj: "attention.output.dense",
    scale1: "layer_scale1.lambda1",
    norm2: "layernorm_after",
    fc1: "intermediate.dense",
    fc2: "output.dense",
    scale2: "layer_scale2.lambda1",
    norm: "layernorm",
    head: "classifier",
    antialias: false,
};

/// `Dinov2Model`.
pub(super) const DINOV2: Names = Names {
    norm1: "norm1",
    norm2: "norm2",
    fc1: "mlp.fc1",
    fc2: "mlp.fc2",
    ..VIT
};
