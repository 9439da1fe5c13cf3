//! Encoders of others: files with the names of timm, MAE, DINOv2 and Hugging Face, read into this project's order.
//!
//! Width, depth, patch size, MLP and position grid follow from the shapes. The number of heads does not, nor do the pictures'
//! mean and deviation: they come from the file's own metadata, from `config.json` and `preprocessor_config.json` beside it, or
//! from [`Hints`]. Split queries, keys and values are joined; layer scale is folded into the layer before it, exactly but for
//! one rounding; positions are resampled to another picture size. What this project's networks cannot compute is refused.

mod beside;
mod filler;
mod hugging_face;
mod mae;
mod names;
pub mod positions;
mod shapes;
mod take;
mod timm;
mod write;

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};

use pcae_kernel::backend::NORM_EPS;
use pcae_kernel::config::{ConfigError, VitConfig};
use pcae_kernel::init::init;
use pcae_kernel::layout::Layout;
use serde_json::Value;

pub use mae::Decoder;
pub(crate) use write::config;
pub use write::write;

use super::file::Reader;
use super::{FORMAT, TEACHER, Which, deployment, locate, prefix, title};
use crate::error::Error;
use beside::Known;
use filler::Filler;
use names::{Names, Scheme};
use shapes::Shapes;
use take::Taker;

/// Names listed in a report before "and N more".
const LISTED: usize = 8;

/// What the user says about a file; it comes before what the file says.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Hints {
    /// Height and width of the pictures that the encoder is wanted for.
    pub img_size: Option<[usize; 2]>,
    /// Heads of each attention.
    pub num_heads: Option<usize>,
    /// Heads of each attention of a decoder in the file.
    pub decoder_num_heads: Option<usize>,
    /// Epsilon of the norms: only the one of this project can be had.
    pub layer_norm_eps: Option<f64>,
    /// What stands before the names of the encoder, such as `teacher.`.
    pub prefix: Option<String>,
    /// Whether missing tensors get their initial values.
    pub allow_missing: bool,
    /// Mean of each channel of the pictures, of pixels from 0 to 1.
    pub mean: Option<Vec<f32>>,
    /// Standard deviation of each channel.
    pub std: Option<Vec<f32>>,
}

/// An encoder from a file.
#[derive(Clone, Debug, PartialEq)]
pub struct Encoder {
    /// The safetensors file.
    pub path: PathBuf,
    /// The file and which of its weights, in words.
    pub title: String,
    /// Metadata of a file of this program that [`write()`] keeps: what was trained for how long, on what, and for which budget.
    pub kept: BTreeMap<String, String>,
    /// Its configuration.
    pub vit: VitConfig,
    /// Its parameters, in the order of [`Layout::encoder`].
    pub values: Vec<f32>,
    /// How its pictures were normalised, where that is known.
    pub preprocessing: Option<Preprocessing>,
    /// A classifier on top of it, if there is one.
    pub head: Option<Head>,
    /// What that says of itself, if it is one of `pcae finetune`.
    pub classifier: Option<Classifier>,
    /// A decoder of masked pre-training, if there is one and its heads are known.
    pub decoder: Option<Decoder>,
    /// What was found in the file.
    pub report: Report,
}

/// How pictures become the input: `(pixel - mean) / std` for each channel of pixels from 0 to 1.
#[derive(Clone, Debug, PartialEq)]
pub struct Preprocessing {
    /// Mean of each channel.
    pub mean: Vec<f32>,
    /// Standard deviation of each channel.
    pub std: Vec<f32>,
}

/// What a head sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pooling {
    /// The mean of the patch tokens, then the norm: this project's classifiers.
    MeanThenNorm,
    /// The class token after the norm.
    ClassToken,
}

/// The linear layer of a classifier.
#[derive(Clone, Debug, PartialEq)]
pub struct Head {
    /// Number of classes.
    pub num_classes: usize,
    /// `[num_classes, embed_dim]`
    pub weight: Vec<f32>,
    /// `[num_classes]`
    pub bias: Vec<f32>,
    /// What it sees.
    pub pooling: Pooling,
}

/// What a classifier of `pcae finetune` says of itself.
#[derive(Clone, Debug, PartialEq)]
pub struct Classifier {
    /// Names of its classes.
    pub classes: Vec<String>,
    /// The settings of its run.
    pub config: Value,
}

impl Classifier {
    /// From the metadata of a file that holds `head`.
    fn of(reader: &Reader, head: Option<&Head>) -> Option<Self> {
        let metadata = reader.metadata();
        let classes: Vec<String> = serde_json::from_str(metadata.get("classes")?).ok()?;
        let config = serde_json::from_str(metadata.get("config")?).ok()?;
        (classes.len() == head?.num_classes).then_some(Self { classes, config })
    }
}

/// Which tensors a file gave.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// The naming, in words.
    pub naming: &'static str,
    /// Tensors loaded.
    pub loaded: usize,
    /// Names of those the architecture has and the file has not.
    pub missing: Vec<String>,
    /// Names of those the file has and that were left alone.
    pub unexpected: Vec<String>,
    /// What was changed on the way, and what is to be known about it.
    pub notes: Vec<String>,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let total = self.loaded + self.missing.len();
        write!(
            f,
            "{} names: {} of {total} tensors loaded, {} missing, {} unexpected",
            self.naming,
            self.loaded,
            self.missing.len(),
            self.unexpected.len()
        )?;
        for (what, names) in [("missing", &self.missing), ("unexpected", &self.unexpected)] {
            if !names.is_empty() {
                write!(f, "\n  {what}: {}", listed(names))?;
            }
        }
        for note in &self.notes {
            write!(f, "\n  {note}")?;
        }
        Ok(())
    }
}

fn listed(names: &[String]) -> String {
    let shown: Vec<String> = names
        .iter()
        .take(LISTED)
        .map(|name| name.escape_default().to_string())
        .collect();
    let more = match names.len().saturating_sub(LISTED) {
        0 => String::new(),
        more => format!(" and {more} more"),
    };
    shown.join(", ") + &more
}

/// What encoder a file holds, in one line; `None` if there is none that [`read`] knows.
pub fn identify(path: &Path, reader: &Reader) -> Option<String> {
    let schemes = Scheme::all(reader);
    let scheme = schemes.first()?;
    let known = Known::about(path, reader).unwrap_or_default();
    let shapes = Shapes::find(path, reader, scheme).ok()?;
    let heads = known
        .num_heads
        .map_or_else(String::new, |heads| format!(", {heads} heads"));
    let scaled = if shapes.layer_scale {
        ", layer scale"
    } else {
        ""
    };
    let more: Vec<String> = schemes[1..]
        .iter()
        .map(|scheme| scheme.prefix.escape_default().to_string())
        .collect();
    let more = if more.is_empty() {
        String::new()
    } else {
        format!("; more under {}", more.join(", "))
    };
    Some(format!(
        "encoder with {} names: {} wide, {} blocks{heads}, patches of {}x{}, {} channels, {} positions{scaled}{more}",
        scheme.title(reader),
        shapes.embed_dim,
        shapes.depth,
        shapes.patch_size,
        shapes.patch_size,
        shapes.in_chans,
        shapes.positions
    ))
}

/// [`read`]s one of the encoders of a checkpoint of this program; of a file of others it is the one that `hints` tell, and
/// [`Which::Student`] stands for it.
///
/// # Errors
/// As [`read`], or [`Error::Checkpoint`] if it has not those weights.
pub fn read_which(path: &Path, which: Which, hints: &Hints) -> Result<Encoder, Error> {
    let path = locate(path)?;
    let reader = Reader::open(&path)?;
    let mut hints = hints.clone();
    if hints.prefix.is_none() {
        let prefix = prefix(&path, &reader, which)?;
        hints.prefix = (!prefix.is_empty()).then(|| prefix.to_owned());
    }
    read(&path, &hints)
}

/// Reads the encoder at `path`, which [`locate`] may look for.
///
/// # Errors
/// [`Error::File`] if the file is damaged; [`Error::Checkpoint`] if it holds no encoder that this project can compute, or
/// not all of it; [`Error::Setting`] naming the flag, if the file does not tell what is needed.
pub fn read(path: &Path, hints: &Hints) -> Result<Encoder, Error> {
    let path = locate(path)?;
    let reader = Reader::open(&path)?;
    let wrong = |reason: String| Error::Checkpoint {
        path: path.clone(),
        reason,
    };
    let schemes = Scheme::all(&reader);
    let prefixes: Vec<String> = schemes.iter().map(|one| one.prefix.clone()).collect();
    let scheme = choose(&path, schemes, hints.prefix.as_deref())?;
    let shapes = Shapes::find(&path, &reader, &scheme)?;
    let known = Known::about(&path, &reader)?;
    let mut notes = Vec::new();
    check_norms(&path, hints, &known, &mut notes)?;
    if let Some(activation) = known.activation.as_deref().filter(|name| *name != "gelu") {
        return Err(wrong(format!(
            "expected the activation gelu, found {}; this program cannot compute it, use another checkpoint",
            activation.escape_default()
        )));
    }

    let Some(num_heads) = hints.num_heads.or(known.num_heads) else {
        return Err(setting(
            "--num-heads",
            format!(
                "expected the number of heads of '{}', which its shapes do not tell, found none there nor in a config.json \
                 beside it; give it (heads of 64, the most common, would be {})",
                path.display(),
                shapes.embed_dim / 64
            ),
        ));
    };
    known.check(&path, &shapes)?;
    let (with_cls, from) = match shapes.grid([known.img_size, hints.img_size]) {
        Some((with_cls, grid)) => (with_cls, Some(grid)),
        None if shapes.positions == 0 => (true, None),
        None => {
            return Err(setting(
                "--img-size",
                format!(
                    "expected the size that the {} positions of '{}' are for, since they are no square, found none that fits; \
                     give its own HEIGHT,WIDTH",
                    shapes.positions,
                    path.display()
                ),
            ));
        }
    };
    let own_size = from.map(|grid| grid.map(|edge| edge.saturating_mul(shapes.patch_size)));
    let Some(img_size) = hints.img_size.or(own_size).or(known.img_size) else {
        return Err(setting(
            "--img-size",
            format!(
                "expected the size of pictures, which '{}' does not tell, found none; give HEIGHT,WIDTH",
                path.display()
            ),
        ));
    };
    let vit = VitConfig {
        img_size,
        in_chans: shapes.in_chans,
        patch_size: shapes.patch_size,
        embed_dim: shapes.embed_dim,
        depth: shapes.depth,
        num_heads,
        mlp_ratio: ratio(shapes.hidden, shapes.embed_dim),
    };
    vit.check()
        .map_err(|error| config_error(&path, hints, &vit, error))?;
    let layout = Layout::encoder(&vit);
    let elements: usize = reader
        .names()
        .iter()
        .filter_map(|name| reader.shape(name))
        .map(|shape| shape.iter().product::<usize>())
        .sum();
    // Before there is memory for it: what is missing has whatever size the rest makes believe.
    let table = (1 + vit.num_patches()) * vit.embed_dim;
    if layout.len() - table > elements.saturating_mul(2) {
        return Err(wrong(format!(
            "expected an encoder of {} values, found {elements} in the whole file; most of it is missing, copy it again",
            layout.len()
        )));
    }

    let mut taker = Taker::new(&path, &reader, &scheme.prefix);
    let mut encoder = Filler {
        names: &scheme.names,
        layout,
        values: vec![0.0; layout.len()],
        taker: &mut taker,
    };
    if hints.allow_missing {
        init(&layout, 0, &mut encoder.values).map_err(|error| wrong(error.to_string()))?;
    }
    encoder.tokens(with_cls, from)?;
    let mean_pooled = encoder.norm()?;
    for index in 0..vit.depth {
        encoder.block(index, shapes.layer_scale)?;
    }
    let values = encoder.values;
    if shapes.layer_scale {
        notes.push("layer scale folded into attn.proj and mlp.fc2".to_owned());
    }
    if let Some(from) = from.filter(|from| *from != vit.grid()) {
        let to = vit.grid();
        notes.push(format!(
            "positions resampled from {}x{} to {}x{}",
            from[0], from[1], to[0], to[1]
        ));
    }
    let head = head(&mut taker, &scheme.names, &vit, mean_pooled, &mut notes)?;
    let decoder_heads = hints.decoder_num_heads.or(known.decoder_num_heads);
    let decoder = mae::decoder(
        &mut taker,
        &vit,
        from,
        decoder_heads,
        known.norm_pix,
        &mut notes,
    )?;
    // Not of this encoder, but no surprise: the others of the file, and the moments of this project's optimizer.
    for other in prefixes.iter().filter(|other| **other != scheme.prefix) {
        match other.as_str() {
            "" => taker.ignore(|name| !name.starts_with(&scheme.prefix)),
            other => taker.ignore(|name| name.starts_with(other)),
        }
    }
    if scheme.title(&reader) == "pcae" {
        taker.ignore(|name| name.starts_with("adamw."));
    }
    let preprocessing = preprocessing(hints, &known, &vit, &mut notes)?;
    let (loaded, missing, unexpected) = taker.finish();
    let report = Report {
        naming: scheme.title(&reader),
        loaded,
        missing,
        unexpected,
        notes,
    };
    if !report.missing.is_empty() && !hints.allow_missing {
        return Err(wrong(format!(
            "{} of {} tensors found, {} missing: {}; give the whole checkpoint, or --allow-missing to start those from their \
             initial values",
            report.loaded,
            report.loaded + report.missing.len(),
            report.missing.len(),
            listed(&report.missing)
        )));
    }
    if let Some(name) = report.unexpected.iter().find(|name| {
        let local = name.strip_prefix(&scheme.prefix);
        local.is_some_and(|name| scheme.names.block_of(name).is_some())
    }) {
        return Err(wrong(format!(
            "expected plain blocks, found {}; this program cannot compute what it is for, use another checkpoint",
            name.escape_default()
        )));
    }
    let which = match scheme.prefix.as_str() {
        TEACHER => Which::Teacher,
        _ => Which::Student,
    };
    Ok(Encoder {
        title: title(&path, &reader, which),
        kept: kept(&reader, &scheme, own_size == Some(img_size)),
        path,
        vit,
        values,
        preprocessing,
        classifier: Classifier::of(&reader, head.as_ref()),
        head,
        decoder,
        report,
    })
}

/// What a file of this program says of its training, and the budget that `pcae deploy` chose, which is that of one size.
fn kept(reader: &Reader, scheme: &Scheme, at_own_size: bool) -> BTreeMap<String, String> {
    let metadata = reader.metadata();
    if metadata.get("format") != Some(&FORMAT) {
        return BTreeMap::new();
    }
    let alone = scheme.prefix.is_empty();
    let keys = [
        ("step", true),
        ("data", true),
        ("weights", alone),
        ("top1", alone && at_own_size),
        (deployment::KEY, alone && at_own_size),
    ];
    let of = |key| metadata.get(key).map(|value| (*value).to_owned());
    keys.into_iter()
        .filter(|(_, is_kept)| *is_kept)
        .filter_map(|(key, _)| Some((key.to_owned(), of(key)?)))
        .collect()
}

fn setting(name: &str, reason: String) -> Error {
    Error::Setting {
        name: name.to_owned(),
        reason,
    }
}

/// The scheme to read: the one that was asked for, or the only one, or the one without a prefix.
fn choose(path: &Path, schemes: Vec<Scheme>, prefix: Option<&str>) -> Result<Scheme, Error> {
    let there: Vec<String> = schemes
        .iter()
        .map(|scheme| format!("{:?}", scheme.prefix))
        .collect();
    let there = there.join(", ");
    if schemes.is_empty() {
        return Err(Error::Checkpoint {
            path: path.to_owned(),
            reason: "expected a vision transformer with the names of timm, MAE, DINOv2 or Hugging Face, found neither \
                     patch_embed.proj.weight nor embeddings.patch_embeddings.projection.weight; see `pcae inspect` for what \
                     it holds"
                .to_owned(),
        });
    }
    if let Some(prefix) = prefix {
        let found = schemes.into_iter().find(|scheme| scheme.prefix == prefix);
        return found.ok_or_else(|| {
            setting(
                "--prefix",
                format!("expected one of {there}, found {prefix:?}"),
            )
        });
    }
    match <[Scheme; 1]>::try_from(schemes) {
        Ok([scheme]) => Ok(scheme),
        Err(schemes) => schemes
            .into_iter()
            .find(|scheme| scheme.prefix.is_empty())
            .ok_or_else(|| {
                setting(
                    "--prefix",
                    format!(
                        "expected which of the encoders in '{}' to read, found none; give one of {there}",
                        path.display()
                    ),
                )
            }),
    }
}

fn check_norms(
    path: &Path,
    hints: &Hints,
    known: &Known,
    notes: &mut Vec<String>,
) -> Result<(), Error> {
    let same = |eps: f64| (eps - NORM_EPS).abs() <= 1e-3 * NORM_EPS;
    if let Some(eps) = hints.layer_norm_eps {
        return if same(eps) {
            Ok(())
        } else {
            Err(setting(
                "--layer-norm-eps",
                format!("expected {NORM_EPS:e}, which this program's norms have, found {eps:e}"),
            ))
        };
    }
    match known.layer_norm_eps {
        Some(eps) if eps > 1.001 * NORM_EPS => Err(setting(
            "--layer-norm-eps",
            format!(
                "expected {NORM_EPS:e}, which this program's norms have, found {eps:e} for '{}'; give --layer-norm-eps 1e-6 to \
                 compute it with that (a change of at most {:e} / variance of the token)",
                path.display(),
                0.5 * (eps - NORM_EPS)
            ),
        )),
        Some(eps) if !same(eps) => {
            notes.push(format!(
                "norms computed with epsilon {NORM_EPS:e} instead of {eps:e}: a change of at most {:e} / variance of the token",
                0.5 * (NORM_EPS - eps)
            ));
            Ok(())
        }
        _ => Ok(()),
    }
}

/// Names the flag that can mend a configuration, if there is one.
fn config_error(path: &Path, hints: &Hints, vit: &VitConfig, error: ConfigError) -> Error {
    let text = error.to_string();
    let flag = if text.starts_with("img_size") && hints.img_size.is_some() {
        "--img-size"
    } else if vit.num_heads == 0 || !vit.embed_dim.is_multiple_of(vit.num_heads) {
        "--num-heads"
    } else {
        return Error::Checkpoint {
            path: path.to_owned(),
            reason: format!("{text}; this program cannot compute such a network"),
        };
    };
    setting(flag, text)
}

/// `hidden / dim`, such that [`VitConfig::mlp_hidden`] gives back `hidden`.
fn ratio(hidden: usize, dim: usize) -> f64 {
    let exact = hidden as f64 / dim as f64;
    if (dim as f64 * exact) as usize == hidden {
        exact
    } else {
        (hidden as f64 + 0.25) / dim as f64
    }
}

fn preprocessing(
    hints: &Hints,
    known: &Known,
    vit: &VitConfig,
    notes: &mut Vec<String>,
) -> Result<Option<Preprocessing>, Error> {
    let fits = |values: &[f32]| values.len() == vit.in_chans;
    for (flag, values) in [("--mean", &hints.mean), ("--std", &hints.std)] {
        let lowest = if flag == "--std" {
            f32::MIN_POSITIVE
        } else {
            f32::MIN
        };
        if let Some(values) = values
            && !(fits(values) && values.iter().all(|v| v.is_finite() && *v >= lowest))
        {
            let positive = if flag == "--std" { ", above zero" } else { "" };
            return Err(setting(
                flag,
                format!(
                    "expected {} finite numbers{positive}, one for each channel, found {values:?}",
                    vit.in_chans
                ),
            ));
        }
    }
    let both = [
        ("--std", &hints.mean, &hints.std, &known.std),
        ("--mean", &hints.std, &hints.mean, &known.mean),
    ];
    for (flag, given, other, of_file) in both {
        if given.is_some() && other.is_none() && of_file.is_none() {
            return Err(setting(
                flag,
                format!(
                    "expected {} numbers, one for each channel, beside the other of --mean and --std, found none there nor in the file",
                    vit.in_chans
                ),
            ));
        }
    }
    let usable = |values: &Option<Vec<f32>>| {
        values
            .clone()
            .filter(|values| fits(values) && values.iter().all(|value| value.is_finite()))
    };
    let mean = hints.mean.clone().or(usable(&known.mean));
    let std = hints.std.clone().or(usable(&known.std));
    let std = std.filter(|std| std.iter().all(|value| *value > 0.0));
    match (mean, std) {
        (Some(mean), Some(std)) => Ok(Some(Preprocessing { mean, std })),
        _ => {
            notes.push(
                "mean and deviation of its pictures are not known; give --mean and --std"
                    .to_owned(),
            );
            Ok(None)
        }
    }
}

/// The classifier's last layer, if the file has one that sees `embed_dim` values.
fn head(
    taker: &mut Taker<'_>,
    names: &Names,
    vit: &VitConfig,
    mean_pooled: bool,
    notes: &mut Vec<String>,
) -> Result<Option<Head>, Error> {
    let Some(weight) = taker.nested_or_beside(&format!("{}.weight", names.head)) else {
        return Ok(None);
    };
    let bias = weight.replace(".weight", ".bias");
    let (num_classes, in_features) = match taker.whole_shape(&weight) {
        Some(&[num_classes, in_features]) if num_classes > 0 => (num_classes, in_features),
        _ => return Ok(None),
    };
    if in_features != vit.embed_dim {
        notes.push(format!(
            "head left out: it sees {in_features} values, not the {} of a token",
            vit.embed_dim
        ));
        return Ok(None);
    }
    let Some(weight) = taker.take_whole(weight, &[num_classes, in_features])? else {
        return Ok(None);
    };
    let bias = taker
        .take_whole(bias, &[num_classes])?
        .unwrap_or_else(|| vec![0.0; num_classes]);
    let pooling = if mean_pooled {
        Pooling::MeanThenNorm
    } else {
        notes.push(
            "its head sees the class token, as with --set pool=token of `pcae finetune`".to_owned(),
        );
        Pooling::ClassToken
    };
    Ok(Some(Head {
        num_classes,
        weight,
        bias,
        pooling,
    }))
}
