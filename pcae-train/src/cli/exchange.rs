//! Commands that read encoders of others, or write encoders for others.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use super::write_out;
use crate::checkpoint::exchange::{self, Hints};
use crate::error::Error;

/// What a file may not tell about its encoder.
#[derive(Debug, clap::Args)]
#[command(allow_negative_numbers = true)]
pub(super) struct HintArgs {
    /// Heads of each attention, if neither the file nor a config.json beside it tells
    #[arg(long, value_name = "N")]
    num_heads: Option<usize>,
    /// Size of pictures: N or HEIGHT,WIDTH; positions are resampled [default: the file's own]
    #[arg(long, value_name = "N", value_parser = size)]
    img_size: Option<[usize; 2]>,
    /// Compute norms with 1e-6, whatever the file says
    #[arg(long, value_name = "EPS")]
    layer_norm_eps: Option<f64>,
    /// What stands before the names of the encoder, such as teacher.
    #[arg(long, value_name = "TEXT")]
    prefix: Option<String>,
    /// Mean of each channel, of pixels from 0 to 1 [default: the file's own]
    #[arg(long, value_delimiter = ',', value_name = "X,Y,Z")]
    mean: Option<Vec<f32>>,
    /// Standard deviation of each channel [default: the file's own]
    #[arg(long, value_delimiter = ',', value_name = "X,Y,Z")]
    std: Option<Vec<f32>>,
}

impl HintArgs {
    pub(super) fn hints(&self) -> Hints {
        Hints {
            img_size: self.img_size,
            num_heads: self.num_heads,
            layer_norm_eps: self.layer_norm_eps,
            prefix: self.prefix.clone(),
            mean: self.mean.clone(),
            std: self.std.clone(),
            ..Hints::default()
        }
    }
}

/// `224` or `224,192`.
fn size(text: &str) -> Result<[usize; 2], String> {
    let edges: Result<Vec<usize>, _> = text.split(',').map(|edge| edge.trim().parse()).collect();
    match edges.as_deref() {
        Ok(&[edge]) => Ok([edge, edge]),
        Ok(&[height, width]) => Ok([height, width]),
        _ => Err(format!(
            "expected a number of pixels, or HEIGHT,WIDTH, found {text:?}"
        )),
    }
}

#[derive(Debug, clap::Args)]
pub(super) struct ConvertArgs {
    /// A safetensors file, a folder with model.safetensors in it, or a run directory
    source: PathBuf,
    /// The file to write
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    #[command(flatten)]
    hints: HintArgs,
    /// Heads of each attention of the decoder, to keep it
    #[arg(long, value_name = "N")]
    decoder_num_heads: Option<usize>,
    /// Give tensors that are missing their initial values
    #[arg(long)]
    allow_missing: bool,
}

impl ConvertArgs {
    pub(super) fn run(&self) -> Result<ExitCode, Error> {
        let hints = Hints {
            decoder_num_heads: self.decoder_num_heads,
            allow_missing: self.allow_missing,
            ..self.hints.hints()
        };
        let encoder = exchange::read(&self.source, &hints)?;
        refuse_same(&encoder.path, &self.out)?;
        write_out(&format!("{}\n", encoder.report))?;
        exchange::write(&self.out, &encoder)?;
        let vit = &encoder.vit;
        let head = encoder.head.as_ref().map_or_else(String::new, |head| {
            format!(", {} classes", head.num_classes)
        });
        let decoder = encoder
            .decoder
            .as_ref()
            .map_or_else(String::new, |decoder| {
                let config = decoder.config;
                format!(", decoder {} x {}", config.depth, config.embed_dim)
            });
        write_out(&format!(
            "wrote {}: {} wide, {} blocks, {} heads, patches of {}, pictures of {}x{}x{}{head}{decoder}\n",
            self.out.display(),
            vit.embed_dim,
            vit.depth,
            vit.num_heads,
            vit.patch_size,
            vit.in_chans,
            vit.img_size[0],
            vit.img_size[1],
        ))?;
        Ok(ExitCode::SUCCESS)
    }
}

/// A file must not be overwritten by what was read from it.
fn refuse_same(source: &Path, out: &Path) -> Result<(), Error> {
    let same = match (source.canonicalize(), out.canonicalize()) {
        (Ok(source), Ok(out)) => source == out,
        _ => false,
    };
    if same {
        return Err(Error::Setting {
            name: "--out".to_owned(),
            reason: format!(
                "expected another file than the one that is read, found '{}'",
                out.display()
            ),
        });
    }
    Ok(())
}
