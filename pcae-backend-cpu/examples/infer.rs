//! Features of a picture, with the model and a backend alone: no training code, no command line.
//!
//! ```sh
//! pcae export runs/pretrain --out encoder.safetensors      # or `pcae deploy`, whose token budget is kept
//! convert photo.jpg -resize 224x224! -depth 8 rgb:photo.raw     # rows of pixels, a byte for each channel
//! cargo run --release -p pcae-backend-cpu --example infer -- encoder.safetensors photo.raw
//! ```

use pcae_backend_cpu::Cpu;
use pcae_kernel::backend::{Backend, TrainBackend};
use pcae_kernel::config::{Budget, DropLayers, Reduction, VitConfig};
use pcae_kernel::layout::Layout;
use pcae_kernel::model::{MeanSimilarity, Vit};
use safetensors::{Dtype, SafeTensors};
use serde::Deserialize;

/// What the metadata of an exported file say, among more.
#[derive(Deserialize)]
struct Config {
    img_size: [usize; 2],
    in_chans: usize,
    patch_size: usize,
    embed_dim: usize,
    depth: usize,
    num_heads: usize,
    mlp_ratio: f64,
    mean: Vec<f32>,
    std: Vec<f32>,
}

/// What `pcae deploy` adds.
#[derive(Deserialize)]
struct Deployment {
    drop_ratio: f64,
    drop_layers: Vec<usize>,
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut args = std::env::args().skip(1);
    let usage = "expected an exported encoder and a file of pixels";
    let file = std::fs::read(args.next().ok_or(usage)?)?;
    let pixels = std::fs::read(args.next().ok_or(usage)?)?;

    // Sizes, and how many tokens are dropped on the way.
    let (_, header) = SafeTensors::read_metadata(&file)?;
    let metadata = header.metadata().clone().unwrap_or_default();
    let config: Config = serde_json::from_str(metadata.get("config").ok_or("no config")?)?;
    let vit = VitConfig {
        img_size: config.img_size,
        in_chans: config.in_chans,
        patch_size: config.patch_size,
        embed_dim: config.embed_dim,
        depth: config.depth,
        num_heads: config.num_heads,
        mlp_ratio: config.mlp_ratio,
    };
    vit.check()?;
    let mut reduction = Reduction::NONE;
    if let Some(text) = metadata.get("deployment") {
        let deployment: Deployment = serde_json::from_str(text)?;
        reduction.budget = Budget::Drop(deployment.drop_ratio);
        reduction.drop_layers = DropLayers::new(&deployment.drop_layers, vit.depth)?;
    }
    reduction.check(vit.num_patches(), vit.depth)?;

    // Parameters: each tensor to its place.
    let tensors = SafeTensors::deserialize(&file)?;
    let layout = Layout::encoder(&vit);
    let mut places = Vec::new();
    layout.for_each(|tensor| places.push(tensor));
    let mut values = vec![0.0; layout.len()];
    for place in places {
        let name = place.name.to_string();
        let tensor = tensors.tensor(&name)?;
        if (tensor.dtype(), tensor.shape()) != (Dtype::F32, place.shape()) {
            let (dtype, shape) = (tensor.dtype(), tensor.shape());
            let expected = place.shape();
            return Err(
                format!("{name}: expected f32 {expected:?}, found {dtype:?} {shape:?}").into(),
            );
        }
        let bytes = tensor.data().chunks_exact(4);
        for (value, bytes) in values[place.span.start..].iter_mut().zip(bytes) {
            *value = f32::from_le_bytes(bytes.try_into()?);
        }
    }

    // The picture, from rows of pixels to planes of normalised numbers.
    let area = vit.img_size[0] * vit.img_size[1];
    if pixels.len() != area * vit.in_chans {
        let [height, width] = vit.img_size;
        let channels = vit.in_chans;
        return Err(format!(
            "expected {height}x{width}x{channels} bytes, found {}",
            pixels.len()
        )
        .into());
    }
    let mut picture = vec![0.0; pixels.len()];
    for (i, &byte) in pixels.iter().enumerate() {
        let (pixel, channel) = (i / vit.in_chans, i % vit.in_chans);
        let value = f32::from(byte) / 255.0;
        picture[channel * area + pixel] = (value - config.mean[channel]) / config.std[channel];
    }

    // All memory is taken here; `forward` may then be called for any number of pictures.
    let mut cpu = Cpu::new();
    let params = cpu.frozen_params(&layout, &values)?;
    let mut model = Vit::new(&mut cpu, &vit, 1, vit.num_patches(), true, reduction)?;
    let mut images = cpu.buf(picture.len())?;
    cpu.write(&mut images, &picture)?;
    model.forward(&mut cpu, &params, 1, &images, None, &mut MeanSimilarity)?;
    let left = model.dims().tokens;
    let mut tokens = vec![0.0; (1 + left) * vit.embed_dim];
    let normed = model.final_norm(&mut cpu, &params)?;
    cpu.read(&mut tokens, normed)?;

    // The mean of the patch tokens: what `pcae embed` writes.
    let mut mean = vec![0.0; vit.embed_dim];
    for token in tokens[vit.embed_dim..].chunks_exact(vit.embed_dim) {
        for (sum, value) in mean.iter_mut().zip(token) {
            *sum += value / left as f32;
        }
    }
    println!(
        "{left} of {} patch tokens left; their mean: {mean:?}",
        vit.num_patches()
    );
    Ok(())
}
