//! Pictures of what a network keeps, and of what it predicts.
//!
//! One sheet shows, for each picture, what is left of it after each stage of a token reduction, as the figure of the paper does;
//! another one shows a step of pre-training: what the student sees, what the teacher retains, what is predicted.

mod canvas;
mod step;

use std::path::{Path, PathBuf};

use pcae_kernel::backend::{Backend, TokenDims, TrainBackend};
use pcae_kernel::config::{Budget, Criterion, DropLayers, Place, Reduction, VitConfig};
use pcae_kernel::layout::Layout;
use pcae_kernel::model::{MeanSimilarity, Scorer, Selection, Vit};

use crate::backends::{self, Job, count};
use crate::checkpoint::exchange::{self, Encoder, Hints, Preprocessing};
use crate::checkpoint::file::Reader;
use crate::checkpoint::locate;
use crate::data::augment::{Scratch, Transform};
use crate::data::{self, DataError, Picture};
use crate::encoder;
use crate::error::Error;
use crate::network::budget;
use crate::output::{self, Kind};
use crate::report::sheet::{Cell, Row, Sheet, write_png};
use crate::run_settings::RunSettings;
use crate::settings::{DropLayersSpec, Machine, Settings};
use crate::trained::own_reduction;
use canvas::{Canvas, plain};

/// Most pictures of a sheet: beyond, it would be a wall rather than a page.
pub const MAX_PICTURES: usize = 64;

/// What to draw.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Whose encoder: a safetensors file, or a run directory.
    pub source: PathBuf,
    /// What the file does not tell.
    pub hints: Hints,
    /// Files and folders of pictures; if empty, the first held-out ones of `data`.
    pub pictures: Vec<PathBuf>,
    /// The data set; if `None` the one of the run, or the embedded one.
    pub data: Option<PathBuf>,
    /// At most as many pictures.
    pub count: usize,
    /// Tokens that each stage leaves; if `None` as a classifier that drops some, or as the run's teacher does, or half of them.
    pub budget: Option<Budget>,
    /// The blocks that stages come after; if `None` those of the run, or else the paper's: of classifiers for a budget that drops, of
    /// teachers for one that keeps.
    pub drop_layers: Option<DropLayersSpec>,
    /// Whether the redundancy of each token is drawn too.
    pub heat: bool,
    /// Whether a step of pre-training is drawn instead of stages.
    pub masked: bool,
    /// What machine computes.
    pub machine: Machine,
    /// Seed of the masks.
    pub seed: u64,
    /// The PNG to write.
    pub out: PathBuf,
}

/// A picture and its name.
struct Named {
    name: String,
    picture: Picture,
}

/// Draws `plan`; returns the number of pictures on the sheet.
///
/// # Errors
/// [`Error`]: a setting, the checkpoint, the pictures, the disk.
pub fn draw(plan: &Plan) -> Result<usize, Error> {
    if !(1..=MAX_PICTURES).contains(&plan.count) {
        return Err(Error::Setting {
            name: "--count".to_owned(),
            reason: format!("expected 1 to {MAX_PICTURES}, found {}", plan.count),
        });
    }
    let path = locate(&plan.source)?;
    let reader = Reader::open(&path)?;
    let run = RunSettings::of(&path, &reader)?;
    let mut hints = plan.hints.clone();
    let settings = run.as_ref().and_then(RunSettings::pretraining);
    // It is the teacher that drops tokens.
    let has_teacher = settings.is_some() && reader.shape("teacher.cls_token").is_some();
    if !plan.masked && hints.prefix.is_none() && has_teacher {
        hints.prefix = Some("teacher.".to_owned());
    }
    let data = plan
        .data
        .as_deref()
        .or(run.as_ref().and_then(RunSettings::data));
    let mut inputs: Vec<&Path> = plan.pictures.iter().map(PathBuf::as_path).collect();
    if inputs.is_empty() {
        inputs.extend(data);
    }
    inputs.push(&path);
    output::check("--out", &plan.out, Kind::Png, &inputs)?;
    let encoder = exchange::read(&path, &hints)?;
    let Some(preprocessing) = encoder.preprocessing.clone() else {
        return Err(Error::Setting {
            name: "--mean".to_owned(),
            reason: format!(
                "expected the mean of each channel that '{}' was trained with, and --std, found none; for most it is \
                 0.485,0.456,0.406 and 0.229,0.224,0.225",
                path.display()
            ),
        });
    };
    let data = if plan.pictures.is_empty() {
        let fingerprint = encoder.kept.get("data").map(String::as_str);
        encoder::pictures(&path, data, fingerprint, encoder.vit.in_chans)?
    } else {
        data
    };
    let (pictures, described) = pictures(plan, &encoder.vit, data)?;
    let number = pictures.len();
    eprintln!("encoder   {}: {}", encoder.title, encoder.report);
    let sheet = if plan.masked {
        eprintln!("data      {described}");
        let job = step::Step {
            source: &plan.source,
            encoder: &encoder,
            settings,
            preprocessing: &preprocessing,
            pictures: &pictures,
            seed: plan.seed,
        };
        backends::run(&plan.machine, job)?
    } else {
        let reduction = reduction(plan, &path, &encoder.vit, settings)?;
        eprintln!("budget    {}", budget(&encoder.vit, &reduction));
        eprintln!("data      {described}");
        let job = Stages {
            reduction,
            title: format!(
                "{}{}: tokens that stay",
                hints.prefix.as_deref().map_or(String::new(), |prefix| {
                    format!("{} of ", prefix.trim_end_matches('.'))
                }),
                plan.source.display()
            ),
            encoder: &encoder,
            preprocessing: &preprocessing,
            pictures: &pictures,
            heat: plan.heat,
        };
        backends::run(&plan.machine, job)?
    };
    write_png(&plan.out, &sheet).map_err(|error| Error::Io {
        what: format!("--out '{}'", plan.out.display()),
        error,
    })?;
    Ok(number)
}

/// What was asked for, over what the file's own is. Stages that drop a part are those of a classifier, stages that keep a part
/// those of a teacher, as in every other command.
fn reduction(
    plan: &Plan,
    path: &Path,
    vit: &VitConfig,
    settings: Option<&Settings>,
) -> Result<Reduction, Error> {
    let own = own_reduction(path, vit.depth)?;
    let dropping = own.filter(|own| own.stages(vit.depth) > 0);
    let budget = plan
        .budget
        .or(dropping.map(|own| own.budget))
        .unwrap_or(Budget::Keep(
            settings.map_or(0.5, |settings| settings.keep_ratio),
        ));
    let drop_layers = match (&plan.drop_layers, budget) {
        (Some(asked), _) => asked.layers(vit.depth)?,
        (None, Budget::Drop(_)) => match own {
            Some(own) => own.drop_layers,
            None => DropLayers::classification(vit.depth)?,
        },
        (None, Budget::Keep(_)) => {
            let default = Settings::default().drop_layers;
            let of_run = settings.map(|settings| &settings.drop_layers);
            of_run.unwrap_or(&default).layers(vit.depth)?
        }
    };
    let reduction = Reduction {
        criterion: Criterion::MeanSimilarity,
        place: Place::Progressive,
        drop_layers,
        budget,
    };
    reduction.check(vit.num_patches(), vit.depth)?;
    Ok(reduction)
}

/// The pictures to draw: those of the plan, or else held-out ones of `data`. Unreadable ones are logged and left out. Also what
/// they are of, in words.
fn pictures(
    plan: &Plan,
    vit: &VitConfig,
    data: Option<&Path>,
) -> Result<(Vec<Named>, String), Error> {
    let mut described = "those given".to_owned();
    let mut found = Vec::new();
    let mut first_error = None;
    let mut add =
        |found: &mut Vec<Named>, name: String, read: Result<Picture, DataError>| match read {
            Ok(picture) => found.push(Named { name, picture }),
            Err(error) => {
                log::warn!("{error} (left out)");
                first_error.get_or_insert(error);
            }
        };
    if plan.pictures.is_empty() {
        let held_out = data::open(data, Some(vit.in_chans))?.held_out;
        let dataset = held_out.thinned(plan.count);
        described = format!("held out of {}", held_out.describe());
        for i in 0..dataset.len() {
            let mut picture = Picture::default();
            let read = dataset.picture(i, &mut picture).map(|()| picture);
            let class = dataset.label(i).and_then(|label| dataset.class_name(label));
            let name = class.map_or_else(|| file_name(Path::new(&dataset.name(i))), str::to_owned);
            add(&mut found, name, read);
        }
    }
    'all: for path in &plan.pictures {
        for file in data::picture_files(path)? {
            if found.len() == plan.count {
                break 'all;
            }
            let mut picture = Picture::default();
            let read = data::read_picture(&file, vit.in_chans, &mut picture).map(|()| picture);
            add(&mut found, file_name(&file), read);
        }
    }
    match first_error {
        Some(error) if found.is_empty() => Err(error.into()),
        _ => {
            let shown = count(found.len(), "picture");
            Ok((found, format!("{shown} of {described}")))
        }
    }
}

fn file_name(path: &Path) -> String {
    path.file_name()
        .map_or_else(String::new, |name| name.to_string_lossy().into_owned())
}

/// The model's input of a picture.
fn input(
    picture: &Picture,
    vit: &VitConfig,
    preprocessing: &Preprocessing,
) -> Result<Vec<f32>, Error> {
    let transform = Transform {
        mean: preprocessing.mean.clone(),
        std: preprocessing.std.clone(),
        ..plain(vit.in_chans, vit.img_size)
    };
    transform.check()?;
    let mut out = vec![0.0; transform.output_len()];
    transform.eval(picture, &mut Scratch::default(), &mut out)?;
    Ok(out)
}

/// What one stage decided about one picture.
struct Stage {
    /// Similarity to the mean of the tokens before it.
    scores: Vec<f32>,
    /// Patches that stay.
    ids: Vec<u32>,
}

/// Records the stages of one picture, judged by `scorer`.
struct Recorder<S> {
    scorer: S,
    stages: Vec<Stage>,
}

impl<B: Backend, S: Scorer<B>> Scorer<B> for Recorder<S> {
    fn score(
        &mut self,
        backend: &mut B,
        stage: usize,
        dims: TokenDims,
        scores: &mut B::Scores,
        x: &B::Buf,
    ) -> Result<(), B::Error> {
        self.scorer.score(backend, stage, dims, scores, x)
    }

    fn selected(&mut self, backend: &mut B, selection: Selection<'_, B>) -> Result<(), B::Error> {
        let mut stage = Stage {
            scores: vec![0.0; selection.tokens],
            ids: vec![0; selection.keep],
        };
        backend.read_scores(&mut stage.scores, selection.scores)?;
        backend.read_ids(&mut stage.ids, selection.ids)?;
        self.stages.push(stage);
        Ok(())
    }

    fn take_back(&mut self, stage: usize, scores: &mut B::Scores) -> Result<(), B::Error> {
        self.scorer.take_back(stage, scores)
    }
}

/// The sheet of what stays.
struct Stages<'a> {
    encoder: &'a Encoder,
    preprocessing: &'a Preprocessing,
    reduction: Reduction,
    pictures: &'a [Named],
    heat: bool,
    title: String,
}

impl Job for Stages<'_> {
    type Output = Sheet;

    fn run<B: TrainBackend>(self, backend: &mut B, name: &str) -> Result<Sheet, Error> {
        let failed = |error: B::Error| Error::backend(name, error);
        let vit = &self.encoder.vit;
        let patches = vit.num_patches();
        let mut columns = vec![format!("input: {patches} tokens")];
        self.reduction
            .for_each_stage(patches, vit.depth, |_, keep| {
                columns.push(format!("stage {}: {keep} tokens", columns.len()));
            });
        let canvas = Canvas::new(vit, columns.len())?;
        // A classifier keeps its class token; the teacher has none.
        let with_cls = matches!(self.reduction.budget, Budget::Drop(_));
        let layout = Layout::encoder(vit);
        let params = backend
            .params(&layout, &self.encoder.values)
            .map_err(failed)?;
        let mut model =
            Vit::new(backend, vit, 1, patches, with_cls, self.reduction).map_err(failed)?;
        let mut images = backend
            .buf(vit.in_chans * vit.img_size[0] * vit.img_size[1])
            .map_err(failed)?;
        let mut rows = Vec::new();
        for Named { name, picture } in self.pictures {
            let values = input(picture, vit, self.preprocessing)?;
            backend.write(&mut images, &values).map_err(failed)?;
            let mut recorder = Recorder {
                scorer: MeanSimilarity,
                stages: Vec::new(),
            };
            model
                .forward(backend, &params, 1, &images, None, &mut recorder)
                .map_err(failed)?;
            let pixels = canvas.picture(picture, vit)?;
            let captionless = |pixels| Cell {
                pixels,
                caption: String::new(),
            };
            let mut cells = vec![captionless(pixels.clone())];
            for stage in &recorder.stages {
                cells.push(captionless(canvas.keep(&pixels, &stage.ids)));
            }
            rows.push(Row {
                label: name.clone(),
                cells,
            });
            if self.heat {
                rows.push(heat(canvas, patches, &pixels, &recorder.stages));
            }
        }
        Ok(Sheet {
            title: self.title,
            columns,
            cell: canvas.cell(),
            rows,
        })
    }
}

/// `1 - similarity` of the tokens before each stage.
fn heat(canvas: Canvas, patches: usize, pixels: &[u8], stages: &[Stage]) -> Row {
    let mut before: Vec<u32> = (0..patches as u32).collect();
    let mut cells = vec![Cell {
        pixels: canvas.keep(pixels, &[]),
        caption: "1 - similarity before each stage:".to_owned(),
    }];
    for stage in stages {
        let values: Vec<f32> = stage.scores.iter().map(|score| 1.0 - score).collect();
        cells.push(canvas.heat(&before, &values));
        before.clone_from(&stage.ids);
    }
    Row {
        label: String::new(),
        cells,
    }
}
