//! The flags. One thing has one name in every command.

use std::path::{Path, PathBuf};

use clap::{Parser, Subcommand};

use super::deploy::DeployArgs;
use super::exchange::{ConvertArgs, OnnxArgs, VisualizeArgs};
use super::export::ExportArgs;
use super::features::{EmbedArgs, KnnArgs, ProbeArgs};
use super::finetune::{EvaluateArgs, FinetuneArgs};
use crate::bench::{Accuracy, Plan, What};
use crate::checkpoint::exchange::Hints;
use crate::checkpoint::{Which, locate};
use crate::error::Error;
use crate::settings::{BackendKind, Machine, Precision, Settings};
use crate::trained::Trained;

/// Pre-trains vision transformers on unlabelled pictures with PCAE, the progressively compressed autoencoder.
#[derive(Debug, Parser)]
#[command(
    name = "pcae",
    version,
    arg_required_else_help = true,
    args_override_self = true
)]
pub(super) struct Args {
    #[command(subcommand)]
    pub(super) command: Command,
}

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Pre-train an encoder on pictures without labels.
    #[command(after_help = "Examples:
  pcae pretrain                                   vit-micro on the embedded Fashion-MNIST, about three minutes
  pcae pretrain --data photos --model vit-s16 --epochs 100 --out runs/photos
  pcae pretrain --resume runs/photos              continue, to the same bits
  pcae pretrain --method mae --set clip_grad=1    the baseline; any setting of config.toml works with --set")]
    Pretrain(PretrainArgs),
    /// Train a classifier on a pre-trained encoder, with or without token reduction.
    #[command(after_help = "Examples:
  pcae finetune --weights runs/pretrain                              on the embedded Fashion-MNIST
  pcae finetune --weights runs/photos --data labelled --drop-ratio 0.3 --set ema=0.999
  pcae finetune --weights none --model vit-s16 --data labelled       from scratch
  pcae finetune --resume runs/finetune                               continue, to the same bits")]
    Finetune(FinetuneArgs),
    /// Measure a fine-tuned classifier at any drop ratio: accuracy, multiply-adds, images/s.
    #[command(after_help = "Examples:
  pcae evaluate runs/finetune --drop-ratio 0,0.1,0.2,0.3,0.4
  pcae evaluate runs/finetune --drop-ratio 0.2,0.4 --criterion mean-similarity,random
  pcae evaluate model.safetensors --data labelled --confusion confusion.csv")]
    Evaluate(EvaluateArgs),
    /// Classify by nearest neighbours among an encoder's features, without training.
    #[command(after_help = "Examples:
  pcae knn runs/pretrain                                what the run trained on, its last layer
  pcae knn runs/pretrain --layer 0,1,2,3 --pool mean,cls --k 5,20
  pcae knn runs/photos --data flowers --which teacher --json
  pcae knn runs/photos --which untrained              what training has to beat")]
    Knn(KnnArgs),
    /// Train a linear classifier on an encoder's features.
    #[command(after_help = "Examples:
  pcae probe runs/pretrain                              logistic regression, its penalty chosen on held-back pictures
  pcae probe runs/pretrain --solver lars --epochs 90    MAE's linear probe
  pcae probe runs/photos --data flowers --val flowers-test --pool cls")]
    Probe(ProbeArgs),
    /// Write an encoder's features of many pictures to a file.
    #[command(after_help = "Examples:
  pcae embed runs/photos --data album --out album.npy          a folder, at any depth
  pcae embed runs/photos --data files.txt --out files.csv      a list with the path of a picture in each line
  pcae embed runs/photos --data shards --pool tokens --layer 5 --out tokens.safetensors    WebDataset tar files
The same command goes on after an interruption. What cannot be read is listed in OUT.unreadable.txt.")]
    Embed(EmbedArgs),
    /// Time training steps and inference, and hold them against the machine's measured peak.
    #[command(after_help = "Examples:
  pcae bench                                                     vit-b16, batch 1 and 8, all threads
  pcae bench --what step --mask-ratio 0.85 --batch-size 8 --threads 1,2
  pcae bench --what infer --drop-ratio 0,0.1,0.2,0.3,0.4 --json bench.json
  pcae bench --what finetune --drop-ratio 0,0.4 --batch-size 16               memory and images/s of fine-tuning
  pcae bench runs/classifier --drop-ratio 0,0.1,0.2,0.3,0.4 --accuracy        one trained model, many budgets
  pcae bench --what peak,gemm,block --threads 1,2 --precision f32,bf16 --roofline roofline.png
  pcae bench --what step --breakdown --mask-ratio 0.85 --batch-size 16 \\
      --variant method=mae,mask_ratio=0.75,decoder_depth=8,decoder_embed_dim=512")]
    Bench(BenchArgs),
    /// Replay a golden fixture on a backend and print the largest error of every tensor.
    #[command(after_help = "Example:
  pcae parity tests/fixtures/pcae_small.safetensors --backend reference")]
    Parity(ParityArgs),
    /// Choose how many tokens a trained network may keep here, and write it with that budget.
    #[command(after_help = "Examples:
  pcae deploy runs/classifier --latency 20ms --threads 1        the most tokens that one core classifies in 20 ms
  pcae deploy runs/classifier --gflops 0.02 --dtype bf16 --out small.safetensors
  pcae deploy runs/photos --drop-ratio 0.3 --batch-size 8       an encoder
evaluate, bench, onnx, knn, probe and embed use the file's own budget unless told otherwise.")]
    Deploy(DeployArgs),
    /// Write the encoder or the classifier of a checkpoint alone, without the optimizer, in f32, f16 or bf16.
    #[command(after_help = "Examples:
  pcae export runs/pretrain --out encoder.safetensors
  pcae export runs/pretrain --which teacher --dtype bf16 --out teacher-bf16.safetensors")]
    Export(ExportArgs),
    /// Read an encoder with the names of timm, MAE, DINOv2 or Hugging Face, and write it for this program, with timm's names.
    #[command(after_help = "Examples:
  pcae convert dinov2-small --out dinov2-s14.safetensors --img-size 224   a folder with model.safetensors and config.json
  pcae convert mae_vit_base.safetensors --num-heads 12 --mean 0.485,0.456,0.406 --std 0.229,0.224,0.225 --out mae-b16.safetensors
  pcae convert runs/pretrain --prefix teacher. --out teacher.safetensors  the teacher of a run, without the optimizer")]
    Convert(ConvertArgs),
    /// Write an encoder or a classifier as an ONNX file, dense or with token reduction.
    #[command(after_help = "Examples:
  pcae onnx runs/classifier --out model.onnx                            logits of any number of pictures, tokens as trained
  pcae onnx classifier.safetensors --drop-ratio 0.4 --drop-layers 0,7,10 --out fast.onnx
  pcae onnx runs/pretrain --batch 1 --out encoder.onnx                  tokens of one picture")]
    Onnx(OnnxArgs),
    /// Draw what each stage of a token reduction keeps of pictures, or what a step of pre-training predicts.
    #[command(after_help = "Examples:
  pcae visualize runs/pretrain                                the teacher of a run, on held-out pictures
  pcae visualize dinov2-s14.safetensors photos --heat --out stages.png
  pcae visualize classifier.safetensors photo.jpg --drop-ratio 0.4 --drop-layers 0,7,10
  pcae visualize runs/pretrain --masked --count 8             what the student sees and predicts")]
    Visualize(VisualizeArgs),
    /// Say what a checkpoint, a data set or a run directory holds.
    #[command(after_help = "Example:
  pcae inspect runs/pretrain")]
    Inspect(InspectArgs),
}

#[derive(Debug, clap::Args)]
#[command(allow_negative_numbers = true)]
pub(super) struct PretrainArgs {
    /// Folder of pictures: IDX files, class folders or plain pictures [default: the embedded Fashion-MNIST]
    #[arg(long, value_name = "DIR")]
    data: Option<String>,
    /// Encoder: vit-micro, vit-ti16, vit-s16, vit-b16, vit-l16 or vit-h14 [default: vit-micro]
    #[arg(long)]
    model: Option<String>,
    /// What is predicted: pcae (teacher's features) or mae (pixels) [default: pcae]
    #[arg(long)]
    method: Option<String>,
    /// What computes: cpu, cuda or reference [default: cpu]
    #[arg(long)]
    backend: Option<String>,
    /// Number format of the computation: f32, bf16 (cpu, cuda), f64 (reference) [default: f32, or bf16 on cuda]
    #[arg(long)]
    precision: Option<String>,
    /// Number format of the teacher's computation: also fp8, beside bf16 on cuda [default: the same]
    #[arg(long, value_name = "FORMAT")]
    teacher_precision: Option<String>,
    /// On cuda, time the algorithms of each matrix product and keep the fastest; the run is then not the same to the last bit each time
    #[arg(long)]
    tune: bool,
    /// Passes over the data [default: 24]
    #[arg(long, conflicts_with = "steps")]
    epochs: Option<String>,
    /// Optimizer steps, instead of --epochs
    #[arg(long)]
    steps: Option<String>,
    /// Pictures in a micro-batch, or auto for as many as there is memory for, to four significant bits [default: 64]
    #[arg(long)]
    batch_size: Option<String>,
    /// Micro-batches in an optimizer step [default: 1]
    #[arg(long)]
    accum: Option<String>,
    /// Peak learning rate [default: blr * batch_size * accum / 256]
    #[arg(long)]
    lr: Option<String>,
    /// Part of the patches that the student does not see [default: 0.75]
    #[arg(long)]
    mask_ratio: Option<String>,
    /// Part of the teacher's tokens that each stage keeps [default: 0.5]
    #[arg(long)]
    keep_ratio: Option<String>,
    /// After which blocks the teacher drops tokens: 0,4,8 or starts:3, ends:3, even:3, first:3, none [default: starts:3]
    #[arg(long)]
    drop_layers: Option<String>,
    /// Threads that compute, 0 for all [default: 0]
    #[arg(long)]
    threads: Option<String>,
    /// Threads that prepare batches [default: 1; on cuda all cores but one]
    #[arg(long)]
    workers: Option<String>,
    /// Seed of everything random [default: 0]
    #[arg(long)]
    seed: Option<String>,
    /// Run directory to make [default: runs/pretrain]
    #[arg(long, value_name = "DIR")]
    out: Option<String>,
    /// Continue the run in this directory
    #[arg(long, value_name = "DIR", conflicts_with = "out")]
    pub(super) resume: Option<PathBuf>,
    /// Settings in TOML; flags and --set come over them
    #[arg(long, value_name = "FILE")]
    pub(super) config: Option<PathBuf>,
    /// Any setting of config.toml; may be repeated
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// Print the result as one line of JSON
    #[arg(long)]
    pub(super) json: bool,
}

impl PretrainArgs {
    /// Flags and `--set` as settings, the flags last.
    pub(super) fn overrides(&self) -> Result<Vec<(String, String)>, Error> {
        let mut overrides = key_values("--set", &self.set)?;
        let flags = [
            ("data", &self.data),
            ("model", &self.model),
            ("method", &self.method),
            ("backend", &self.backend),
            ("precision", &self.precision),
            ("teacher_precision", &self.teacher_precision),
            ("epochs", &self.epochs),
            ("steps", &self.steps),
            ("batch_size", &self.batch_size),
            ("accum", &self.accum),
            ("lr", &self.lr),
            ("mask_ratio", &self.mask_ratio),
            ("keep_ratio", &self.keep_ratio),
            ("drop_layers", &self.drop_layers),
            ("threads", &self.threads),
            ("workers", &self.workers),
            ("seed", &self.seed),
            ("out", &self.out),
        ];
        for (key, value) in flags {
            if let Some(value) = value {
                overrides.push((key.to_owned(), value.clone()));
            }
        }
        if self.tune {
            overrides.push(("tune".to_owned(), "true".to_owned()));
        }
        Ok(overrides)
    }
}

#[derive(Debug, clap::Args)]
pub(super) struct ParityArgs {
    /// The fixture, a safetensors file
    pub(super) fixture: PathBuf,
    /// What computes
    #[arg(long, value_enum, default_value = "cpu")]
    backend: BackendKind,
    /// Number format of the computation [default: f32, or bf16 on cuda]
    #[arg(long, value_enum)]
    precision: Option<Precision>,
    /// Number format of the teacher's computation: also fp8, beside bf16 on cuda [default: the same]
    #[arg(long, value_enum, value_name = "FORMAT")]
    teacher_precision: Option<Precision>,
    /// Instruction set of the CPU backend [default: the best there is]
    #[arg(long)]
    isa: Option<String>,
    /// Threads that compute, 0 for all
    #[arg(long, default_value = "0")]
    threads: usize,
}

impl ParityArgs {
    pub(super) fn machine(&self) -> Machine {
        Machine {
            backend: self.backend,
            precision: self.precision,
            teacher_precision: self.teacher_precision,
            isa: self.isa.clone(),
            threads: self.threads,
            ..Machine::default()
        }
    }
}

#[derive(Debug, clap::Args)]
pub(super) struct InspectArgs {
    /// A run directory, a safetensors file, a folder with model.safetensors in it, or a folder of pictures
    pub(super) path: PathBuf,
}

#[derive(Debug, clap::Args)]
pub(super) struct BenchArgs {
    /// A run directory (its best checkpoint) or a safetensors file, whose forward is timed in place of --model's
    #[arg(conflicts_with_all = ["model", "method", "mask_ratio", "variant", "teacher_precision", "set"])]
    pub(super) checkpoint: Option<PathBuf>,
    /// Which of the checkpoint's weights
    #[arg(long, value_enum, default_value = "student", requires = "checkpoint")]
    which: Which,
    /// What to time [default: infer,step, or infer for a checkpoint]
    #[arg(long, value_enum, value_delimiter = ',')]
    what: Vec<What>,
    /// Encoder: vit-micro, vit-ti16, vit-s16, vit-b16, vit-l16 or vit-h14
    #[arg(long, default_value = "vit-b16")]
    model: String,
    /// What a step predicts: pcae or mae
    #[arg(long, default_value = "pcae")]
    method: String,
    /// Part of the patches that the student does not see
    #[arg(long, default_value = "0.75")]
    mask_ratio: String,
    /// Also time a step with these settings in place of the others; may be repeated
    #[arg(long, value_name = "KEY=VALUE,...")]
    variant: Vec<String>,
    /// Also the accuracy of a fine-tuned classifier, at each drop ratio
    #[arg(long, requires = "checkpoint")]
    accuracy: bool,
    /// Folder of labelled pictures, whose held-out part is classified for --accuracy [default: that of the run]
    #[arg(long, value_name = "DIR", requires = "checkpoint")]
    data: Option<PathBuf>,
    /// Pictures at a time
    #[arg(long, value_delimiter = ',', default_values = ["1", "8"])]
    batch_size: Vec<usize>,
    /// Threads that compute, 0 for all; none on cuda
    #[arg(long, value_delimiter = ',', default_value = "0")]
    threads: Vec<usize>,
    /// Parts of the patch tokens that each stage drops in a forward and in fine-tuning [default: 0, or as the checkpoint was deployed or trained]
    #[arg(long, value_delimiter = ',')]
    drop_ratio: Vec<f64>,
    /// Timed runs, of which the median counts; all combinations take turns
    #[arg(long, default_value = "5")]
    repeats: usize,
    /// What computes
    #[arg(long, default_value = "cpu")]
    backend: String,
    /// Number formats of the computation [default: f32, or bf16 on cuda]
    #[arg(long, value_enum, value_delimiter = ',')]
    precision: Vec<Precision>,
    /// Number format of the teacher's computation: also fp8, beside bf16 on cuda [default: the same]
    #[arg(long, value_name = "FORMAT")]
    teacher_precision: Option<String>,
    /// Instruction set of the CPU backend [default: the best there is]
    #[arg(long)]
    isa: Option<String>,
    /// On cuda, time the algorithms of each matrix product and keep the fastest
    #[arg(long)]
    tune: bool,
    /// Any setting of the model, such as decoder_depth=8; may be repeated
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// Say where the time goes, by kind of operation; on cuda each is timed alone, and then each kernel, in runs apart without graphs
    #[arg(long)]
    breakdown: bool,
    /// Draw the figures under the machine's limits, to this PNG file
    #[arg(long, value_name = "FILE")]
    pub(super) roofline: Option<PathBuf>,
    /// Also write the figures to this file
    #[arg(long, value_name = "FILE")]
    pub(super) json: Option<PathBuf>,
}

/// Pictures at a time, and repeats: far more than a machine can do.
const MOST: usize = 1 << 16;

impl BenchArgs {
    /// What is read.
    pub(super) fn inputs(&self) -> Result<Vec<PathBuf>, Error> {
        let checkpoint = self.checkpoint.as_deref().map(locate).transpose()?;
        Ok(checkpoint.into_iter().chain(self.data.clone()).collect())
    }

    pub(super) fn plan(&self) -> Result<Plan, Error> {
        let mut overrides = key_values("--set", &self.set)?;
        let flags = [
            ("model", Some(&self.model)),
            ("method", Some(&self.method)),
            ("mask_ratio", Some(&self.mask_ratio)),
            ("backend", Some(&self.backend)),
            ("teacher_precision", self.teacher_precision.as_ref()),
            ("isa", self.isa.as_ref()),
        ];
        for (key, value) in flags {
            overrides.extend(value.map(|value| (key.to_owned(), value.clone())));
        }
        if self.tune {
            overrides.push(("tune".to_owned(), "true".to_owned()));
        }
        let mut settings = vec![Settings::load(None, &overrides)?];
        for variant in &self.variant {
            let mut overrides = overrides.clone();
            overrides.extend(key_values("--variant", &key_value_list(variant))?);
            settings.push(Settings::load(None, &overrides)?);
        }
        let counts = self
            .batch_size
            .iter()
            .map(|&batch| ("--batch-size", batch))
            .chain([("--repeats", self.repeats)]);
        for (name, count) in counts {
            if !(1..=MOST).contains(&count) {
                return Err(Error::Setting {
                    name: name.to_owned(),
                    reason: format!("expected 1 to {MOST}, found {count}"),
                });
            }
        }
        let trained = self.checkpoint.as_deref().map(|path| {
            let stray = self.what.iter().find(|what| !matches!(what, What::Peak | What::Infer));
            if let Some(what) = stray {
                return Err(Error::Setting {
                    name: "--what".to_owned(),
                    reason: format!(
                        "expected peak or infer for a checkpoint, found {}; leave the checkpoint out and give its --model",
                        format!("{what:?}").to_lowercase()
                    ),
                });
            }
            Trained::load(path, self.which, &Hints::default())
        });
        let trained = trained.transpose()?;
        let what = match (&self.what[..], &trained) {
            ([], None) => vec![What::Infer, What::Step],
            ([], Some(_)) => vec![What::Infer],
            (what, _) => what.to_vec(),
        };
        // A folder of pictures is for nothing else.
        let accuracy = (self.accuracy || self.data.is_some()).then(|| Accuracy {
            which: self.which,
            data: self.data.clone(),
        });
        let precision = settings.first().map(|first| first.machine.precision());
        Ok(Plan {
            settings,
            trained,
            accuracy,
            what,
            batch_sizes: self.batch_size.clone(),
            threads: self.threads.clone(),
            precisions: match self.precision.is_empty() {
                true => precision.into_iter().collect(),
                false => self.precision.clone(),
            },
            drop_ratios: self.drop_ratio.clone(),
            repeats: self.repeats,
            breakdown: self.breakdown,
            bandwidth: self.roofline.is_some(),
        })
    }
}

/// The parts of a list, of which each has a `=`: the commas of `drop_layers=0,4` are its value's.
fn key_value_list(text: &str) -> Vec<String> {
    let mut parts: Vec<String> = Vec::new();
    for part in text.split(',') {
        match parts.last_mut() {
            Some(last) if !part.contains('=') => {
                last.push(',');
                last.push_str(part);
            }
            _ => parts.push(part.to_owned()),
        }
    }
    parts
}

/// For `--resume`, which takes nothing but what has no part in the numbers.
pub(super) fn is_machine_alone(
    config: Option<&Path>,
    overrides: &[(String, String)],
) -> Result<(), Error> {
    let is_machine = |key: &str| key != "out" && Machine::KEYS.contains(&key);
    if config.is_none() && overrides.iter().all(|(key, _)| is_machine(key)) {
        return Ok(());
    }
    let reason = "expected alone, or with --backend, --precision, --threads, --workers, --tune or --set isa: the run keeps its \
                  settings";
    Err(Error::Setting {
        name: "--resume".to_owned(),
        reason: reason.to_owned(),
    })
}

/// `KEY=VALUE` of the flag `name`.
pub(super) fn key_values(name: &str, set: &[String]) -> Result<Vec<(String, String)>, Error> {
    let mut overrides = Vec::new();
    for text in set {
        let Some((key, value)) = text.split_once('=') else {
            let reason = format!("expected KEY=VALUE, found {text:?}");
            return Err(Error::Setting {
                name: name.to_owned(),
                reason,
            });
        };
        overrides.push((key.trim().to_owned(), value.trim().to_owned()));
    }
    Ok(overrides)
}
