//! Features of a frozen encoder, batch by batch, on any backend.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use ndarray::Array2;
use pcae_kernel::backend::{Backend, TrainBackend};
use pcae_kernel::config::Reduction;
use pcae_kernel::layout::Layout;
use pcae_kernel::model::{MeanSimilarity, Vit};
use serde::Serialize;

use crate::checkpoint::Which;
use crate::checkpoint::exchange::Hints;
use crate::checkpoint::weights::Weights;
use crate::data::augment::Transform;
use crate::data::images::View;
use crate::data::loader::eval_batches;
use crate::data::{self, Dataset, Splits};
use crate::encoder::{self, Encoder};
use crate::error::Error;
use crate::progress::Progress;
use crate::settings::{DropLayersSpec, Machine};
use crate::training::plan::MAX_THREADS;

/// What becomes of a picture's tokens, after the final norm.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Pool {
    /// The class token.
    Cls,
    /// Mean of the patch tokens.
    #[default]
    Mean,
    /// All of them: the class token, then the patch tokens.
    Tokens,
}

impl fmt::Display for Pool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Cls => "cls",
            Self::Mean => "mean",
            Self::Tokens => "tokens",
        })
    }
}

/// Where features are taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Tap {
    /// The number of the block after which, from 0.
    pub layer: usize,
    /// What of the tokens there.
    pub pool: Pool,
}

/// A frozen encoder, and how its features are computed: what `knn`, `probe` and `embed` have in common.
#[derive(Clone, Debug)]
pub struct Frozen {
    /// A run directory, a checkpoint, or another's encoder, see [`encoder::load`].
    pub encoder: PathBuf,
    /// Which of its parameters.
    pub which: Which,
    /// What its file does not tell.
    pub hints: Hints,
    /// Part of the patch tokens that each stage drops; `None` for the one that it was deployed with, or none.
    pub drop_ratio: Option<f64>,
    /// Where the stages are; `None` for those that it was deployed with, or the usual ones.
    pub drop_layers: Option<DropLayersSpec>,
    /// Pictures at a time.
    pub batch_size: usize,
    /// What computes.
    pub machine: Machine,
}

impl Frozen {
    /// Reads the encoder, and checks what is dropped in it.
    ///
    /// # Errors
    /// As [`encoder::load`], or [`Error::Setting`] and [`Error::Config`] for settings that cannot be.
    pub fn load(&self) -> Result<(Encoder, Reduction), Error> {
        let workers = self.machine.workers();
        let checks = [
            ("--batch-size", self.batch_size, 1..=1 << 20),
            ("--workers", workers, 0..=MAX_THREADS),
        ];
        for (name, found, range) in checks {
            if !range.contains(&found) {
                let (least, most) = range.into_inner();
                return Err(Error::Setting {
                    name: name.to_owned(),
                    reason: format!("expected {least} to {most}, found {found}"),
                });
            }
        }
        let encoder = encoder::load(&self.encoder, self.which, &self.hints)?;
        let own = Weights::open(&self.encoder)?.deployment()?;
        let drop_ratio = self.drop_ratio.or(own.as_ref().map(|own| own.drop_ratio));
        let blocks = own.map(|own| DropLayersSpec::Blocks(own.drop_layers));
        let drop_layers = self.drop_layers.as_ref().or(blocks.as_ref());
        let reduction = encoder::reduction(&encoder.vit, drop_ratio.unwrap_or(0.0), drop_layers)?;
        Ok((encoder, reduction))
    }
}

/// Checks a `--layer` against an encoder of `depth` blocks; without one it is the last block.
///
/// # Errors
/// [`Error::Setting`] for a block that there is not.
pub fn layer(layer: Option<usize>, depth: usize) -> Result<usize, Error> {
    let last = depth.saturating_sub(1);
    match layer {
        None => Ok(last),
        Some(layer) if layer <= last => Ok(layer),
        Some(layer) => Err(Error::Setting {
            name: "--layer".to_owned(),
            reason: format!(
                "expected 0 to {last}, a block of this encoder of {depth}, found {layer}"
            ),
        }),
    }
}

/// A frozen encoder on a backend, with room for a batch of pictures.
pub struct Extractor<B: Backend> {
    vit: Vit<B>,
    params: B::Params,
    depth: usize,
    images: B::Buf,
    pooled: B::Buf,
    /// No patch token is picked: only class tokens are left.
    none: B::Ids,
    reduction: Reduction,
}

impl<B: TrainBackend> Extractor<B> {
    /// Makes room for `batch` pictures. `reduction` must have been checked.
    ///
    /// # Errors
    /// If the backend has no memory left.
    pub fn new(
        backend: &mut B,
        encoder: &Encoder,
        batch: usize,
        reduction: Reduction,
    ) -> Result<Self, B::Error> {
        let vit = &encoder.vit;
        let layout = Layout::encoder(vit);
        Ok(Self {
            params: backend.frozen_params(&layout, &encoder.values)?,
            vit: Vit::new(backend, vit, batch, vit.num_patches(), true, reduction)?,
            depth: vit.depth,
            images: backend.buf(batch * encoder.transform.output_len())?,
            pooled: backend.buf(batch * vit.embed_dim)?,
            none: backend.ids(0)?,
            reduction,
        })
    }
}

impl<B: Backend> Extractor<B> {
    /// Appends the features of `batch` pictures to `out`, one vector for each of `taps`.
    ///
    /// # Shapes
    /// `images: [batch, in_chans, height, width]`, or bytes; appends `[batch, embed_dim]`, or for [`Pool::Tokens`]
    /// `[batch, 1 + tokens, embed_dim]`, where `tokens` are those that the stages up to the tap left.
    ///
    /// # Errors
    /// If there is no room for `batch`, a tap is at no block, or what the backend reports.
    pub fn extract<'a>(
        &mut self,
        backend: &mut B,
        images: impl Into<View<'a>>,
        batch: usize,
        taps: &[Tap],
        out: &mut [Vec<f32>],
    ) -> Result<(), B::Error> {
        images.into().write(backend, &mut self.images)?;
        let scorer = &mut MeanSimilarity;
        self.vit
            .start(backend, &self.params, batch, &self.images, None, scorer)?;
        for layer in 0..self.depth {
            let mut here = taps
                .iter()
                .zip(&mut *out)
                .filter(|(tap, _)| tap.layer == layer)
                .peekable();
            if here.peek().is_none() {
                continue;
            }
            self.vit
                .advance(backend, &self.params, layer + 1, None, scorer)?;
            let dims = self.vit.dims();
            let tokens = self.vit.final_norm(backend, &self.params)?;
            for (tap, out) in here {
                let from = out.len();
                match tap.pool {
                    Pool::Tokens => {
                        out.resize(from + dims.len(), 0.0);
                        backend.read(&mut out[from..], tokens)?;
                        continue;
                    }
                    Pool::Mean => backend.mean_pool(dims, &mut self.pooled, tokens)?,
                    Pool::Cls => {
                        backend.gather_tokens(dims, 0, &mut self.pooled, tokens, &self.none)?;
                    }
                }
                out.resize(from + batch * dims.dim, 0.0);
                backend.read(&mut out[from..], &self.pooled)?;
            }
        }
        Ok(())
    }

    /// Appends the patch positions of the patch tokens that the last [`Extractor::extract`] ended with, if its last tap was
    /// at `layer`.
    ///
    /// # Shapes
    /// Appends `[batch, tokens]`.
    ///
    /// # Errors
    /// What the backend reports.
    pub fn positions(
        &mut self,
        backend: &mut B,
        layer: usize,
        out: &mut Vec<u32>,
    ) -> Result<(), B::Error> {
        let dims = self.vit.dims();
        let from = out.len();
        if self.reduction.stages(layer + 1) > 0 {
            out.resize(from + dims.batch * dims.tokens, 0);
            return backend.read_ids(&mut out[from..], self.vit.ids());
        }
        for _ in 0..dims.batch {
            out.extend(0..dims.tokens as u32);
        }
        Ok(())
    }
}

/// Features of a data set, one row for each picture that could be read.
#[derive(Clone, Debug)]
pub struct Extracted {
    /// For each tap `[pictures, embed_dim]`.
    pub features: Vec<Array2<f32>>,
    /// The class of each picture.
    pub labels: Vec<u32>,
    /// Pictures left out because they could not be read.
    pub unreadable: usize,
}

/// Passes a labelled data set through the encoder; all that is read stays in memory.
///
/// # Errors
/// [`Error::Data`] if a hundred pictures in a row cannot be read, [`Error::Backend`].
pub fn extract_all<B: TrainBackend>(
    backend: &mut B,
    name: &str,
    extractor: &mut Extractor<B>,
    dataset: &Dataset,
    transform: &Transform,
    batch_size: usize,
    taps: &[Tap],
) -> Result<Extracted, Error> {
    let mut out = vec![Vec::new(); taps.len()];
    let mut labels = Vec::with_capacity(dataset.len());
    let mut progress = Progress::of("picture", 0, dataset.len() as u64);
    let began = Instant::now();
    let (mut done, mut unreadable) = (0, 0);
    for batch in eval_batches(dataset, transform, batch_size)? {
        let batch = batch?;
        let count = batch.samples.len();
        labels.extend(batch.labels.unwrap_or_default());
        unreadable += batch.unreadable;
        done += (count + batch.unreadable) as u64;
        if count > 0 {
            extractor
                .extract(backend, &batch.images, count, taps, &mut out)
                .map_err(|error| Error::backend(name, error))?;
        }
        progress.count(done, done as f64 / began.elapsed().as_secs_f64());
    }
    progress.finish();
    let features = out.into_iter().map(|x| matrix(labels.len(), x));
    Ok(Extracted {
        features: features.collect::<Result<_, _>>()?,
        labels,
        unreadable,
    })
}

/// Features as a matrix with a row for each picture.
///
/// # Errors
/// [`Error::Setting`] if one of them is not finite.
pub fn matrix(rows: usize, x: Vec<f32>) -> Result<Array2<f32>, Error> {
    let wrong = |reason: String| Error::Setting {
        name: "features".to_owned(),
        reason,
    };
    if let Some(value) = x.iter().find(|value| !value.is_finite()) {
        return Err(wrong(format!(
            "expected finite numbers, found {value}; use another --precision, or weights that have not diverged"
        )));
    }
    let columns = x.len().checked_div(rows).unwrap_or(0);
    Array2::from_shape_vec((rows, columns), x).map_err(|error| wrong(error.to_string()))
}

/// Opens what features are evaluated on: `data` with the part of it that is held out (see [`data::open`]), or with the
/// pictures of `val` held out and all of `data` for training. Without `data` it is what the encoder was trained on.
///
/// # Errors
/// [`Error::Data`], or [`Error::Labels`] where there are no two classes to tell apart or one cannot be learned.
pub fn open_labelled(
    encoder: &Encoder,
    data: Option<&Path>,
    val: Option<&Path>,
) -> Result<Splits, Error> {
    let data = encoder.pictures(data)?;
    let channels = Some(encoder.vit.in_chans);
    let splits = match (data, val) {
        (_, None) => data::open(data, channels)?,
        (Some(data), Some(val)) => data::open_pair(data, val, channels)?,
        (None, Some(_)) => {
            return Err(Error::Setting {
                name: "--val".to_owned(),
                reason:
                    "expected --data with it, found the embedded pictures, which hold out their own"
                        .to_owned(),
            });
        }
    };
    check_classes(&splits)?;
    Ok(splits)
}

fn check_classes(splits: &Splits) -> Result<(), Error> {
    let wrong = |part: &Dataset, reason: String| Error::Labels {
        data: part.describe(),
        reason,
    };
    let count = |part: &Dataset| {
        let mut counts = vec![0_usize; part.num_classes()];
        for i in 0..part.len() {
            *counts.get_mut(part.label(i)? as usize)? += 1;
        }
        Some(counts)
    };
    let parts = [("training", &splits.train), ("held-out", &splits.held_out)];
    let mut counts = Vec::new();
    for (name, part) in parts {
        counts.push(count(part).ok_or_else(|| {
            wrong(
                part,
                format!(
                    "expected a class for every picture, found none in the {name} part; give class folders, or IDX files \
                     with their labels"
                ),
            )
        })?);
    }
    let trained = counts[0].iter().filter(|&&count| count > 0).count();
    if trained < 2 {
        return Err(wrong(
            &splits.train,
            format!(
                "expected pictures of at least 2 classes to tell apart, found {trained}; add a class"
            ),
        ));
    }
    for (class, (&train, &held_out)) in counts[0].iter().zip(&counts[1]).enumerate() {
        if train == 0 && held_out > 0 {
            return Err(wrong(
                &splits.train,
                format!(
                    "expected training pictures of every class, found none of {:?} beside {held_out} held-out ones; add some, \
                     or take the class out of both",
                    class_name(&splits.train, class)
                ),
            ));
        }
    }
    Ok(())
}

/// The name of a class, or its number.
pub fn class_name(dataset: &Arc<Dataset>, class: usize) -> String {
    let name = u32::try_from(class)
        .ok()
        .and_then(|class| dataset.class_name(class));
    name.map_or_else(|| class.to_string(), str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::augment::Transform;
    use pcae_backend_cpu::Cpu;
    use pcae_kernel::config::VitConfig;
    use pcae_kernel::init::init;
    use pcae_kernel::reference::Reference;
    use pcae_kernel::rng::{Purpose, Stream};

    const BATCH: usize = 3;

    fn encoder() -> Encoder {
        let vit = VitConfig {
            img_size: [20, 12],
            in_chans: 3,
            patch_size: 4,
            embed_dim: 24,
            depth: 4,
            num_heads: 3,
            mlp_ratio: 2.0,
        };
        let layout = Layout::encoder(&vit);
        let mut values = vec![0.0; layout.len()];
        init(&layout, 1, &mut values).unwrap();
        let mut stream = Stream::new(2, 0, 0, Purpose::Init);
        values
            .iter_mut()
            .for_each(|value| *value += 0.1 * stream.normal());
        let transform = Transform {
            height: 20,
            width: 12,
            channels: 3,
            scale: (1.0, 1.0),
            ratio: (1.0, 1.0),
            flip: false,
            mean: vec![0.5; 3],
            std: vec![0.3; 3],
        };
        Encoder {
            vit,
            values,
            transform,
            data: None,
            data_fingerprint: None,
            path: PathBuf::new(),
            origin: String::new(),
        }
    }

    fn images(encoder: &Encoder) -> Vec<f32> {
        let mut stream = Stream::new(3, 0, 0, Purpose::Init);
        let len = BATCH * encoder.transform.output_len();
        (0..len).map(|_| stream.normal()).collect()
    }

    fn taps() -> Vec<Tap> {
        // Not in order, one layer twice, one not at all.
        let tap = |layer, pool| Tap { layer, pool };
        vec![
            tap(3, Pool::Mean),
            tap(0, Pool::Cls),
            tap(0, Pool::Tokens),
            tap(2, Pool::Tokens),
            tap(2, Pool::Mean),
            tap(3, Pool::Cls),
        ]
    }

    fn extract<B: TrainBackend>(backend: &mut B, drop_ratio: f64) -> (Vec<Vec<f32>>, Vec<u32>) {
        let encoder = encoder();
        let reduction = encoder::reduction(&encoder.vit, drop_ratio, None).unwrap();
        let taps = taps();
        let mut out = vec![Vec::new(); taps.len()];
        let mut extractor = Extractor::new(backend, &encoder, BATCH + 2, reduction).unwrap();
        extractor
            .extract(backend, &images(&encoder)[..], BATCH, &taps, &mut out)
            .unwrap();
        let mut positions = Vec::new();
        extractor.positions(backend, 3, &mut positions).unwrap();
        (out, positions)
    }

    /// The oracle's fixture holds the reference to the method at the last layer; here the CPU is held to the reference at
    /// the others, with and without tokens dropped. The tolerance is that of the fixtures' activations.
    #[test]
    fn every_layer_is_that_of_the_reference() {
        for drop_ratio in [0.0, 0.3] {
            let (want, positions) = extract(&mut Reference::<f64, _>::owned(), drop_ratio);
            let (found, on_cpu) = extract(&mut Cpu::new(), drop_ratio);
            assert_eq!(positions, on_cpu);
            for (found, want) in found.iter().zip(&want) {
                assert_eq!(found.len(), want.len());
                let norm = |x: &mut dyn Iterator<Item = f32>| x.map(|x| x * x).sum::<f32>().sqrt();
                let error = norm(&mut found.iter().zip(want).map(|(a, b)| a - b));
                assert!(error <= 1e-5 * norm(&mut want.iter().copied()), "{error}");
            }
        }
    }

    /// Class token and mean, from all tokens.
    #[test]
    fn pools_are_of_the_tokens() {
        for (drop_ratio, left) in [(0.0, [15, 15]), (0.3, [11, 8])] {
            let (out, positions) = extract(&mut Reference::<f64, _>::owned(), drop_ratio);
            assert_eq!(out[2].len(), BATCH * (1 + left[0]) * 24);
            assert_eq!(out[3].len(), BATCH * (1 + left[1]) * 24);
            for picture in 0..BATCH {
                let of = |x: &[f32], count: usize| x[picture * count..][..count].to_vec();
                assert_eq!(of(&out[1], 24), of(&out[2], (1 + left[0]) * 24)[..24]);
                let tokens = of(&out[3], (1 + left[1]) * 24);
                for (i, mean) in of(&out[4], 24).into_iter().enumerate() {
                    let sum: f32 = tokens[24..].iter().skip(i).step_by(24).sum();
                    assert!((mean - sum / left[1] as f32).abs() < 1e-6);
                }
            }
            let last = positions.len() / BATCH;
            for positions in positions.chunks(last) {
                let mut sorted = positions.to_vec();
                sorted.sort_unstable();
                sorted.dedup();
                assert!(
                    sorted.len() == last && sorted[last - 1] < 15,
                    "{positions:?}"
                );
                assert_eq!(drop_ratio == 0.0, last == 15 && positions.is_sorted());
            }
        }
    }

    #[test]
    fn layers_are_checked() {
        assert_eq!(layer(None, 4).unwrap(), 3);
        assert_eq!(layer(Some(0), 4).unwrap(), 0);
        let error = layer(Some(4), 4).unwrap_err();
        assert!(
            error.is_usage() && error.to_string().contains("expected 0 to 3"),
            "{error}"
        );
        let error = matrix(1, vec![1.0, f32::NAN]).unwrap_err().to_string();
        assert!(error.contains("NaN"), "{error}");
    }

    fn class_folder(root: &Path, classes: &[(&str, u32)]) {
        for (class, count) in classes {
            std::fs::create_dir_all(root.join(class)).unwrap();
            for i in 0..*count {
                image::RgbImage::from_pixel(4, 4, image::Rgb([i as u8, 0, 0]))
                    .save(root.join(class).join(format!("{i}.png")))
                    .unwrap();
            }
        }
    }

    /// Pictures without labels, one class, a class that nothing teaches.
    #[test]
    fn data_without_two_classes_is_refused() {
        let place = tempfile::tempdir().unwrap();
        let open = |data: &str, val: Option<&str>| {
            let path = |name: &str| place.path().join(name);
            let val = val.map(path);
            open_labelled(&encoder(), Some(&path(data)), val.as_deref())
        };
        class_folder(place.path(), &[("flat", 3)]);
        class_folder(&place.path().join("one"), &[("cat", 4)]);
        class_folder(&place.path().join("two"), &[("cat", 4), ("dog", 5)]);
        class_folder(
            &place.path().join("three"),
            &[("cat", 1), ("dog", 1), ("owl", 2)],
        );
        for (data, val, parts) in [
            (
                "flat",
                None,
                ["expected a class for every picture", "class folders"],
            ),
            ("one", None, ["at least 2 classes", "found 1"]),
            ("one", Some("two"), ["at least 2 classes", "found 1"]),
            ("two", Some("three"), ["\"owl\"", "2 held-out"]),
            (
                "two",
                Some("flat"),
                ["expected a class for every picture", "held-out part"],
            ),
        ] {
            let error = open(data, val).unwrap_err();
            // The data is at fault, not the command.
            assert!(!error.is_usage(), "{error}");
            for part in parts {
                assert!(error.to_string().contains(part), "{data} {val:?}: {error}");
            }
        }
        let splits = open("three", Some("two")).unwrap();
        assert_eq!((splits.train.len(), splits.held_out.len()), (4, 9));
        // One name is one class in both.
        assert_eq!(splits.held_out.label(8), Some(1));
        assert_eq!(class_name(&splits.train, 2), "owl");
        let error = open_labelled(&encoder(), None, Some(place.path())).unwrap_err();
        assert!(error.to_string().contains("--val"), "{error}");
    }
}
