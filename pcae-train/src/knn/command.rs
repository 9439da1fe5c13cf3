//! `pcae knn`: nearest neighbours on an encoder's features, for layers, poolings and numbers of neighbours.

use std::fmt::{self, Write as _};
use std::path::PathBuf;

use pcae_kernel::backend::TrainBackend;
use pcae_kernel::config::Reduction;
use serde::Serialize;

use super::{Accuracy, Features, Scaling, grid};
use crate::backends::{self, Job, count};
use crate::data::{Splits, no_pictures_of};
use crate::encoder::Encoder;
use crate::error::Error;
use crate::features::{Extractor, Frozen, Pool, Tap, extract_all, layer, open_labelled};
use crate::network::{budget, drop_ratio};

/// What votes where nobody says how many: DINO's grid with two small numbers, as far as there are training pictures.
const DEFAULT_KS: [usize; 6] = [1, 5, 10, 20, 100, 200];

/// What to evaluate, and on what.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The encoder.
    pub frozen: Frozen,
    /// The pictures; what the encoder was trained on if `None`.
    pub data: Option<PathBuf>,
    /// Pictures to classify, in place of those that `data` holds out.
    pub val: Option<PathBuf>,
    /// Numbers of neighbours; empty for the usual ones.
    pub ks: Vec<usize>,
    /// Blocks after which features are taken; empty for the last one.
    pub layers: Vec<usize>,
    /// What of the tokens there.
    pub pools: Vec<Pool>,
    /// How features are brought to one scale.
    pub scaling: Scaling,
}

/// What came out.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Report {
    /// What was evaluated.
    pub encoder: String,
    /// Training pictures.
    pub train: usize,
    /// Pictures classified.
    pub held_out: usize,
    /// Pictures left out because they could not be read.
    pub unreadable: usize,
    /// How features were brought to one scale.
    pub scaling: Scaling,
    /// Part of the patch tokens that each stage dropped.
    pub drop_ratio: f64,
    /// A row for each layer and pooling.
    pub rows: Vec<Row>,
}

/// The accuracies of one kind of features.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Row {
    /// The block, from 0.
    pub layer: usize,
    /// What of the tokens.
    pub pool: Pool,
    /// For each number of neighbours.
    pub top1: Vec<Accuracy>,
}

/// Evaluates.
///
/// # Errors
/// [`Error`] for an encoder, data or settings that cannot be used.
pub fn run(plan: &Plan) -> Result<Report, Error> {
    let (encoder, reduction) = plan.frozen.load()?;
    let depth = encoder.vit.depth;
    let mut layers = Vec::new();
    for &asked in &plan.layers {
        layers.push(layer(Some(asked), depth)?);
    }
    if layers.is_empty() {
        layers.push(layer(None, depth)?);
    }
    if plan.pools.contains(&Pool::Tokens) {
        return Err(Error::Setting {
            name: "--pool".to_owned(),
            reason: "expected cls or mean, one vector a picture, found tokens".to_owned(),
        });
    }
    let splits = open_labelled(&encoder, plan.data.as_deref(), plan.val.as_deref())?;
    let ks = ks(&plan.ks, splits.train.len())?;
    let taps = layers.iter().flat_map(|&layer| {
        let tap = move |&pool: &Pool| Tap { layer, pool };
        plan.pools.iter().map(tap)
    });
    let evaluation = Evaluation {
        plan,
        taps: taps.collect(),
        ks,
        encoder,
        reduction,
        splits,
    };
    backends::run(&plan.frozen.machine, evaluation)
}

/// The numbers of neighbours, checked against the number of training pictures.
fn ks(asked: &[usize], train: usize) -> Result<Vec<usize>, Error> {
    if let Some(&k) = asked.iter().find(|&&k| k == 0 || k > train) {
        return Err(Error::Setting {
            name: "--k".to_owned(),
            reason: format!("expected 1 to {train}, the number of training pictures, found {k}"),
        });
    }
    if !asked.is_empty() {
        return Ok(asked.to_vec());
    }
    let fitting = DEFAULT_KS.into_iter().filter(|&k| k <= train);
    Ok(fitting.collect())
}

struct Evaluation<'a> {
    plan: &'a Plan,
    taps: Vec<Tap>,
    ks: Vec<usize>,
    encoder: Encoder,
    reduction: Reduction,
    splits: Splits,
}

impl Job for Evaluation<'_> {
    type Output = Report;

    fn run<B: TrainBackend>(self, backend: &mut B, name: &str) -> Result<Report, Error> {
        let Self {
            plan,
            taps,
            ks,
            encoder,
            reduction,
            splits,
        } = self;
        eprintln!("encoder   {}", encoder.origin);
        eprintln!("budget    {}", budget(&encoder.vit, &reduction));
        eprintln!(
            "data      {}; held out {}",
            splits.train.describe(),
            splits.held_out.len()
        );
        eprintln!("backend   {name}");
        let batch_size = plan.frozen.batch_size;
        let mut extractor = Extractor::new(backend, &encoder, batch_size, reduction)
            .map_err(|error| Error::backend(name, error))?;
        let mut extract = |dataset| {
            extract_all(
                backend,
                name,
                &mut extractor,
                dataset,
                &encoder.transform,
                batch_size,
                &taps,
            )
        };
        let (train, held_out) = (extract(&splits.train)?, extract(&splits.held_out)?);
        let missing = splits
            .held_out
            .classes_without(held_out.labels.iter().copied());
        if let Some(missing) = no_pictures_of(&missing) {
            eprintln!("held out  {missing}");
        }
        let mut rows = Vec::new();
        let (mut bank, mut queries) = (
            Features {
                x: Default::default(),
                labels: train.labels,
            },
            Features {
                x: Default::default(),
                labels: held_out.labels,
            },
        );
        for (tap, (train, held_out)) in taps
            .iter()
            .zip(train.features.into_iter().zip(held_out.features))
        {
            (bank.x, queries.x) = (train, held_out);
            rows.push(Row {
                layer: tap.layer,
                pool: tap.pool,
                top1: grid(&bank, &queries, plan.scaling, &ks),
            });
        }
        Ok(Report {
            encoder: encoder.origin,
            train: bank.labels.len(),
            held_out: queries.labels.len(),
            unreadable: train.unreadable + held_out.unreadable,
            scaling: plan.scaling,
            drop_ratio: drop_ratio(&reduction),
            rows,
        })
    }
}

impl fmt::Display for Report {
    /// A table, a column for each number of neighbours.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut head = format!("{:>5} {:<5} {:<9}", "layer", "pool", "votes");
        for accuracy in self.rows.first().map_or(&[][..], |row| &row.top1) {
            let _ = write!(head, " {:>8}", format!("k={}", accuracy.k));
        }
        writeln!(f, "{head}")?;
        for row in &self.rows {
            for (votes, weighted) in [("weighted", true), ("equal", false)] {
                write!(f, "{:>5} {:<5} {votes:<9}", row.layer, row.pool.to_string())?;
                for accuracy in &row.top1 {
                    let value = if weighted {
                        accuracy.weighted
                    } else {
                        accuracy.plain
                    };
                    write!(f, " {:>7.2}%", 100.0 * value)?;
                }
                writeln!(f)?;
            }
        }
        write!(
            f,
            "kNN top-1 on {} by {}",
            count(self.held_out, "picture"),
            count(self.train, "training picture")
        )?;
        if self.unreadable > 0 {
            write!(
                f,
                "; {} could not be read",
                count(self.unreadable, "picture")
            )?;
        }
        writeln!(f)
    }
}
