//! The decoder of MAE, if a file has one: its names are the same in MAE's files and in this project's.

use pcae_kernel::config::{DecoderConfig, MAX_DEPTH, VitConfig};
use pcae_kernel::layout::{Layout, Tail};

use super::positions;
use super::take::Taker;
use crate::error::Error;

/// The decoder of masked pre-training.
#[derive(Clone, Debug, PartialEq)]
pub struct Decoder {
    /// Its configuration.
    pub config: DecoderConfig,
    /// Width of a prediction.
    pub target_dim: usize,
    /// Its parameters: what follows the encoder in [`Layout::with_decoder`].
    pub values: Vec<f32>,
    /// Whether it predicts pixels standardised per patch, where that is known.
    pub norm_pix: Option<bool>,
}

/// Takes the decoder that goes with `vit`, whose position table in the file is for the grid `from`. Nothing but a note comes of a
/// decoder whose number of heads is not known, or that is not whole.
pub(super) fn decoder(
    taker: &mut Taker<'_>,
    vit: &VitConfig,
    from: Option<[usize; 2]>,
    num_heads: Option<usize>,
    norm_pix: Option<bool>,
    notes: &mut Vec<String>,
) -> Result<Option<Decoder>, Error> {
    let Some(&[embed_dim, _]) = taker.shape("decoder_embed.weight") else {
        // DINOv2's files have one for the patches that its training hides.
        let tokens = ["mask_token", "embeddings.mask_token"].map(|name| taker.whole_name(name));
        if tokens.iter().any(|name| taker.whole_shape(name).is_some()) {
            taker.ignore(|name| tokens.iter().any(|token| token == name));
            notes.push("mask_token left out: it has a part in training alone".to_owned());
        }
        return Ok(None);
    };
    let Some(num_heads) = num_heads else {
        notes.push("decoder left out: give --decoder-num-heads to keep it".to_owned());
        return Ok(None);
    };
    let depth = (0..=MAX_DEPTH)
        .find(|index| {
            let name = format!("decoder_blocks.{index}.norm1.weight");
            taker.shape(&name).is_none()
        })
        .unwrap_or(0);
    let config = DecoderConfig {
        embed_dim,
        depth,
        num_heads,
    };
    let target_dim = match taker.shape("decoder_pred.weight") {
        Some(&[target_dim, _]) => target_dim,
        _ => 0,
    };
    if let Err(error) = config.check(vit) {
        return Err(Error::Setting {
            name: "--decoder-num-heads".to_owned(),
            reason: format!("the decoder cannot be built: {error}"),
        });
    }
    let layout = Layout::with_decoder(vit, &config, target_dim);
    let Tail::Decoder(params) = layout.tail else {
        return Ok(None);
    };
    let mut tensors = Vec::new();
    layout.for_each(|tensor| tensors.push(tensor));
    tensors.retain(|tensor| tensor.span.start >= layout.encoder_len());
    // All of it or nothing, and no memory for what is not there.
    let absent = tensors.iter().find(|tensor| {
        let shape = taker.shape(&tensor.name.to_string());
        shape.is_none_or(|shape| tensor.span != params.pos_embed && shape != tensor.shape())
    });
    if let Some(tensor) = absent {
        notes.push(format!(
            "decoder left out: expected {} of shape {:?}, found {:?}",
            tensor.name,
            tensor.shape(),
            taker.shape(&tensor.name.to_string())
        ));
        return Ok(None);
    }
    let mut values = vec![0.0; layout.len() - layout.encoder_len()];
    for tensor in &tensors {
        let name = tensor.name.to_string();
        let to = tensor.span.start - layout.encoder_len();
        let out = &mut values[to..to + tensor.span.len];
        if tensor.span == params.pos_embed {
            let from = from.unwrap_or(vit.grid());
            let rows = from[0] * from[1] + 1;
            let Some(table) = taker.take(&name, &[1, rows, embed_dim])? else {
                continue;
            };
            let (cls, patches) = table.split_at(embed_dim);
            let patches = positions::resample(patches, embed_dim, from, vit.grid(), false);
            out[..embed_dim].copy_from_slice(cls);
            out[embed_dim..].copy_from_slice(&patches);
        } else if let Some(found) = taker.take(&name, tensor.shape())? {
            out.copy_from_slice(&found);
        }
    }
    Ok(Some(Decoder {
        config,
        target_dim,
        values,
        norm_pix,
    }))
}
