//! Commands that read encoders of others, or write encoders for others.

use std::path::PathBuf;
use std::process::ExitCode;

use pcae_kernel::config::{Budget, Criterion, Place, Reduction};

use super::write_out;
use crate::checkpoint::deployment;
use crate::checkpoint::exchange::{self, Hints};
use crate::checkpoint::weights::Weights;
use crate::error::Error;
use crate::network::{budget, drop_ratio};
use crate::onnx::{self, Batch};
use crate::output::{self, Kind};
use crate::settings::{BackendKind, CriterionSpec, DropLayersSpec, Machine, PlaceSpec};
use crate::trained::own_reduction;
use crate::{backends, encoder, visualize};

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
    /// What stands before the names of the encoder, its dot included: "teacher."
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

/// The file and which of its weights, their budget, and what was found.
fn taken(encoder: &exchange::Encoder, reduction: &Reduction) -> String {
    format!(
        "encoder   {}: {}\nbudget    {}\n",
        encoder.title,
        encoder.report,
        budget(&encoder.vit, reduction)
    )
}

#[derive(Debug, clap::Args)]
pub(super) struct ConvertArgs {
    /// A safetensors file, a folder with model.safetensors in it, or a run directory (its best checkpoint, else its newest)
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
        output::check("--out", &self.out, Kind::Safetensors, &[&encoder.path])?;
        let own = own_reduction(&encoder.path, encoder.vit.depth)?;
        let dense = encoder::reduction(&encoder.vit, 0.0, None)?;
        write_out(&taken(&encoder, &own.unwrap_or(dense)))?;
        let is_deployed = Weights::open(&encoder.path)?.deployment()?.is_some();
        if is_deployed && !encoder.kept.contains_key(deployment::KEY) {
            write_out(
                "what `pcae deploy` chose is left out: it is of another size of picture, or of other weights\n",
            )?;
        }
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

#[derive(Debug, clap::Args)]
pub(super) struct OnnxArgs {
    /// A run directory (its best checkpoint, else its newest), a safetensors file, or a folder with model.safetensors in it
    source: PathBuf,
    /// The file to write
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    /// Part of the patch tokens that each stage drops [default: as deployed or trained, else 0]
    #[arg(long)]
    drop_ratio: Option<f64>,
    /// After which blocks they are dropped [default: as deployed or trained, else 0, 7 and 10 of 12]
    #[arg(long)]
    drop_layers: Option<DropLayersSpec>,
    /// Pictures at a time: a number, or dynamic
    #[arg(long, default_value = "dynamic", value_parser = batch)]
    batch: Batch,
    /// Leave the classifier's head out
    #[arg(long)]
    encoder: bool,
    #[command(flatten)]
    hints: HintArgs,
}

/// `dynamic` or `8`.
fn batch(text: &str) -> Result<Batch, String> {
    match text.parse() {
        Ok(size) if size > 0 => Ok(Batch::Fixed(size)),
        _ if text == "dynamic" => Ok(Batch::Dynamic),
        _ => Err(format!(
            "expected dynamic, or a number of at least 1, found {text:?}"
        )),
    }
}

impl OnnxArgs {
    pub(super) fn run(&self) -> Result<ExitCode, Error> {
        let encoder = exchange::read(&self.source, &self.hints.hints())?;
        output::check("--out", &self.out, Kind::Onnx, &[&encoder.path])?;
        let reduction = self.reduction(&encoder)?;
        onnx::export(&self.out, &encoder, &reduction, self.batch, !self.encoder)?;
        write_out(&taken(&encoder, &reduction))?;
        let what = match encoder.head.filter(|_| !self.encoder) {
            Some(head) => format!("classifier of {} classes", head.num_classes),
            None => "encoder".to_owned(),
        };
        write_out(&format!("wrote {}: {what}\n", self.out.display()))?;
        Ok(ExitCode::SUCCESS)
    }

    /// What was asked for, over the file's own.
    fn reduction(&self, encoder: &exchange::Encoder) -> Result<Reduction, Error> {
        let vit = &encoder.vit;
        let own = own_reduction(&encoder.path, vit.depth)?;
        if let (Some(own), None) = (&own, self.drop_ratio)
            && own.stages(vit.depth) > 0
            && (own.criterion, own.place) != (Criterion::MeanSimilarity, Place::Progressive)
        {
            return Err(Error::Setting {
                name: "--drop-ratio".to_owned(),
                reason: format!(
                    "expected one, since the classifier drops tokens by {} at {}, which an ONNX file cannot, found none; give 0 \
                     or a ratio to drop by mean-similarity, block by block",
                    CriterionSpec(own.criterion),
                    PlaceSpec(own.place)
                ),
            });
        }
        let drop_ratio = self.drop_ratio.or(own.as_ref().map(drop_ratio));
        let blocks = own.map(|own| DropLayersSpec::Blocks(own.drop_layers.iter().collect()));
        let drop_layers = self.drop_layers.as_ref().or(blocks.as_ref());
        encoder::reduction(vit, drop_ratio.unwrap_or(0.0), drop_layers)
    }
}

#[derive(Debug, clap::Args)]
pub(super) struct VisualizeArgs {
    /// A run directory (its best checkpoint, else its newest), a safetensors file, or a folder with model.safetensors in it
    source: PathBuf,
    /// Files and folders of pictures [default: held-out pictures of --data]
    pictures: Vec<PathBuf>,
    /// Folder of a data set [default: the run's own, else the embedded Fashion-MNIST]
    #[arg(long, value_name = "DIR", conflicts_with = "pictures")]
    data: Option<PathBuf>,
    /// At most as many pictures
    #[arg(long, default_value = "4")]
    count: usize,
    /// Part of the tokens that each stage keeps, as the teacher of pre-training does [default: as a run's teacher, else 0.5]
    #[arg(long, conflicts_with = "drop_ratio")]
    keep_ratio: Option<f64>,
    /// Part of the tokens that each stage drops, as a classifier does [default: as a classifier was trained or deployed]
    #[arg(long)]
    drop_ratio: Option<f64>,
    /// After which blocks tokens are dropped [default: the run's, else starts:3, or 0,7,10 of 12 for --drop-ratio]
    #[arg(long)]
    drop_layers: Option<DropLayersSpec>,
    /// Also draw 1 - similarity of each token
    #[arg(long, conflicts_with = "masked")]
    heat: bool,
    /// Draw a step of pre-training: what is seen, retained and predicted
    #[arg(long, conflicts_with_all = ["keep_ratio", "drop_ratio", "drop_layers", "prefix"])]
    masked: bool,
    /// Seed of the masks
    #[arg(long, default_value = "0")]
    seed: u64,
    #[command(flatten)]
    hints: HintArgs,
    /// What computes
    #[arg(long, value_enum, default_value = "cpu")]
    backend: BackendKind,
    /// The PNG to write
    #[arg(long, value_name = "FILE", default_value = "visualize.png")]
    out: PathBuf,
}

impl VisualizeArgs {
    pub(super) fn run(&self) -> Result<ExitCode, Error> {
        let count = visualize::draw(&visualize::Plan {
            source: self.source.clone(),
            hints: self.hints.hints(),
            pictures: self.pictures.clone(),
            data: self.data.clone(),
            count: self.count,
            budget: self
                .keep_ratio
                .map(Budget::Keep)
                .or(self.drop_ratio.map(Budget::Drop)),
            drop_layers: self.drop_layers.clone(),
            heat: self.heat,
            masked: self.masked,
            machine: Machine {
                backend: self.backend,
                ..Machine::default()
            },
            seed: self.seed,
            out: self.out.clone(),
        })?;
        write_out(&format!(
            "{} of {} in {}\n",
            if self.masked { "a step" } else { "the stages" },
            backends::count(count, "picture"),
            self.out.display()
        ))?;
        Ok(ExitCode::SUCCESS)
    }
}
