//! Pre-trains an encoder on one's own pictures, and writes it for deployment:
//!
//! ```sh
//! cargo run --release -p pcae-train --example pretrain_own_data -- photos 100
//! ```

use std::path::Path;

use pcae_train::checkpoint::{Which, exchange::Hints, export::Storage};
use pcae_train::{Machine, Settings, Trained, pretrain};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut args = std::env::args().skip(1);
    let usage = "expected a folder of pictures and a number of epochs";
    let (data, epochs) = (args.next().ok_or(usage)?, args.next().ok_or(usage)?);

    let summary = pretrain::start(Settings {
        data: Some(data.into()),
        model: "vit-ti16".into(), // 224 by 224; see `VitConfig::PRESETS`
        epochs: Some(epochs.parse()?),
        batch_size: 16.into(),
        machine: Machine {
            out: "runs/own".into(), // curves, metrics and checkpoints; `pretrain::resume` goes on
            ..Machine::default()
        },
        ..Settings::default()
    })?;
    let encoder = Trained::load(&summary.out, Which::Student, &Hints::default())?;
    let written = encoder.write(Path::new("encoder.safetensors"), Storage::F32, None)?;
    println!(
        "loss {:.4}; wrote encoder.safetensors: {written}",
        summary.loss
    );
    Ok(())
}
