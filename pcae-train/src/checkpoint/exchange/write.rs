//! Writing an encoder with timm's names, for this program and for others.

use std::path::Path;

use pcae_kernel::config::{ClassifierConfig, Pool, Reduction, VitConfig};
use pcae_kernel::layout::Layout;
use serde_json::{Value, json};

use super::{Encoder, Pooling};
use crate::checkpoint::file::{self, TensorData};
use crate::checkpoint::{FORMAT, TASK_CLASSIFY, VERSION};
use crate::error::Error;
use crate::trained::{forget_data, merged};

/// Writes `encoder`, with its head and its decoder if it has them, under timm's and MAE's names. The metadata say what
/// [`super::read`] wants to know: under `config` the settings of the model, by their names in `config.toml`. A classifier of
/// `pcae finetune` keeps its settings and its classes, and so is one for `pcae evaluate`; a deployed file keeps its budget.
///
/// # Errors
/// [`Error::File`] if the disk fails; a previous file is then intact.
pub fn write(path: &Path, encoder: &Encoder) -> Result<(), Error> {
    let vit = &encoder.vit;
    let base = Layout::encoder(vit);
    let mut values = encoder.values.clone();
    let mut layout = base;
    let mut extra: Vec<(&str, Vec<usize>, &[f32])> = Vec::new();
    match (&encoder.head, &encoder.decoder) {
        (Some(head), _) if head.pooling == Pooling::MeanThenNorm => {
            layout = Layout::classifier(&ClassifierConfig {
                vit: *vit,
                num_classes: head.num_classes,
                reduction: Reduction::NONE,
                pool: Pool::Mean,
            });
            values.extend_from_slice(&head.weight);
            values.extend_from_slice(&head.bias);
        }
        (head, decoder) => {
            if let Some(head) = head {
                let classes = head.num_classes;
                extra.push(("head.weight", vec![classes, vit.embed_dim], &head.weight));
                extra.push(("head.bias", vec![classes], &head.bias));
            }
            if let Some(decoder) = decoder {
                layout = Layout::with_decoder(vit, &decoder.config, decoder.target_dim);
                values.extend_from_slice(&decoder.values);
            }
        }
    }
    let mut tensors = Vec::new();
    layout.for_each(|tensor| {
        tensors.push(file::Tensor {
            name: tensor.name.to_string(),
            shape: tensor.shape().to_vec(),
            data: TensorData::F32(&values[tensor.span.start..tensor.span.end()]),
        });
    });
    for (name, shape, values) in extra {
        tensors.push(file::Tensor {
            name: name.to_owned(),
            shape,
            data: TensorData::F32(values),
        });
    }
    let mut metadata = encoder.kept.clone();
    metadata.extend([
        ("format".to_owned(), FORMAT.to_owned()),
        ("version".to_owned(), VERSION.to_owned()),
        ("source".to_owned(), encoder.report.naming.to_owned()),
    ]);
    let mut config = config(encoder);
    if let Some(classifier) = &encoder.classifier {
        config = merged(classifier.config.clone(), config);
        forget_data(&mut config);
        metadata.insert("task".to_owned(), TASK_CLASSIFY.to_owned());
        metadata.insert("classes".to_owned(), json!(classifier.classes).to_string());
    }
    metadata.insert("config".to_owned(), config.to_string());
    Ok(file::write(path, &metadata, &tensors)?)
}

/// The settings of the model as JSON.
pub(crate) fn config(encoder: &Encoder) -> Value {
    let vit = &encoder.vit;
    let nearest = VitConfig::PRESETS.into_iter().find(|name| {
        VitConfig::preset(name)
            .is_some_and(|preset| (preset.embed_dim, preset.depth) == (vit.embed_dim, vit.depth))
    });
    let mut config = json!({
        "model": nearest.unwrap_or("vit-b16"),
        "img_size": vit.img_size,
        "in_chans": vit.in_chans,
        "patch_size": vit.patch_size,
        "embed_dim": vit.embed_dim,
        "depth": vit.depth,
        "num_heads": vit.num_heads,
        "mlp_ratio": vit.mlp_ratio,
    });
    if let Some(preprocessing) = &encoder.preprocessing {
        config["mean"] = json!(preprocessing.mean);
        config["std"] = json!(preprocessing.std);
    }
    if let Some(decoder) = &encoder.decoder {
        config["decoder_embed_dim"] = json!(decoder.config.embed_dim);
        config["decoder_depth"] = json!(decoder.config.depth);
        config["decoder_num_heads"] = json!(decoder.config.num_heads);
        if decoder.target_dim == vit.patch_len() {
            config["method"] = json!("mae");
        }
        if let Some(norm_pix) = decoder.norm_pix {
            config["norm_pix"] = json!(norm_pix);
        }
    }
    config
}
