//! Nearest neighbours on features (Wu et al., 2018), the evaluation that needs no training.

pub mod command;

use ndarray::{Array2, ArrayView2, Axis, s};
use rayon::prelude::*;

/// Softmax temperature of the votes, as in DINO's evaluation.
const TEMPERATURE: f32 = 0.07;
/// Queries compared at a time: their similarities to 60,000 features take 61 MB.
const BLOCK: usize = 256;

/// Features with their labels, one row per picture.
#[derive(Clone, Debug)]
pub struct Features {
    /// `[pictures, dim]`
    pub x: Array2<f32>,
    /// The class of each.
    pub labels: Vec<u32>,
}

/// How columns are brought to one scale before the comparison.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Scaling {
    /// None: for pixels, whose columns share a scale already, and as DINO's evaluation does it.
    Raw,
    /// Mean 0 and standard deviation 1 of each column over the training features: for networks, where a few columns
    /// would otherwise decide alone.
    #[default]
    Standardised,
}

/// What a number of neighbours comes to.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize)]
pub struct Accuracy {
    /// Neighbours that vote.
    pub k: usize,
    /// Part classified right with votes of weight `exp(cosine / 0.07)`.
    pub weighted: f64,
    /// Part classified right with votes of equal weight.
    pub plain: f64,
}

/// Part of `held_out` that the `k` most similar features of `train`, weighted by `exp(cosine / 0.07)`, classify right.
/// Ties between classes go to the lower one.
///
/// Returns NaN where either is empty.
pub fn top1(train: &Features, held_out: &Features, scaling: Scaling, k: usize) -> f64 {
    grid(train, held_out, scaling, &[k])
        .first()
        .map_or(f64::NAN, |accuracy| accuracy.weighted)
}

/// [`top1`] for each of `ks`, with weighted and with equal votes.
pub fn grid(
    train: &Features,
    held_out: &Features,
    scaling: Scaling,
    ks: &[usize],
) -> Vec<Accuracy> {
    let of = |k, [weighted, plain]: [f64; 2]| Accuracy { k, weighted, plain };
    if train.labels.is_empty() || held_out.labels.is_empty() {
        return ks.iter().map(|&k| of(k, [f64::NAN; 2])).collect();
    }
    let (shift, scale) = match scaling {
        Scaling::Raw => (vec![0.0; train.x.ncols()], vec![1.0; train.x.ncols()]),
        Scaling::Standardised => column_stats(train.x.view()),
    };
    let bank = unit_rows(train.x.view(), &shift, &scale);
    let classes = train
        .labels
        .iter()
        .max()
        .map_or(0, |&label| label as usize + 1);
    let add = |mut a: Vec<[usize; 2]>, b: Vec<[usize; 2]>| {
        for (a, b) in a.iter_mut().zip(b) {
            *a = [a[0] + b[0], a[1] + b[1]];
        }
        a
    };
    let right = (0..held_out.labels.len().div_ceil(BLOCK))
        .into_par_iter()
        .map(|block| {
            let range = block * BLOCK..((block + 1) * BLOCK).min(held_out.labels.len());
            let queries = unit_rows(held_out.x.slice(s![range.clone(), ..]), &shift, &scale);
            let similarities = queries.dot(&bank.t());
            let pairs = similarities.axis_iter(Axis(0)).zip(&held_out.labels[range]);
            let mut order: Vec<u32> = Vec::with_capacity(train.labels.len());
            let mut right = vec![[0; 2]; ks.len()];
            for (row, &label) in pairs {
                let row = row.as_slice().unwrap_or_default();
                let votes = vote(row, &train.labels, ks, classes, &mut order);
                for (right, votes) in right.iter_mut().zip(votes) {
                    right[0] += usize::from(votes[0] == label);
                    right[1] += usize::from(votes[1] == label);
                }
            }
            right
        })
        .reduce(|| vec![[0; 2]; ks.len()], add);
    let part = |right: usize| right as f64 / held_out.labels.len() as f64;
    ks.iter()
        .zip(right)
        .map(|(&k, right)| of(k, right.map(part)))
        .collect()
}

/// Mean and reciprocal standard deviation of each column, summed in f64.
fn column_stats(x: ArrayView2<'_, f32>) -> (Vec<f32>, Vec<f32>) {
    let count = x.nrows() as f64;
    let stats = x.axis_iter(Axis(1)).map(|column| {
        let mean = column.iter().map(|&x| f64::from(x)).sum::<f64>() / count;
        let variance = column
            .iter()
            .map(|&x| (f64::from(x) - mean).powi(2))
            .sum::<f64>()
            / count;
        // A constant column says nothing: it stays zero.
        let scale = if variance > 1e-12 {
            variance.sqrt().recip()
        } else {
            0.0
        };
        (mean as f32, scale as f32)
    });
    stats.unzip()
}

/// Brings the columns of both to mean 0 and standard deviation 1 over `train`.
pub(crate) fn standardise(train: &mut Array2<f32>, held_out: &mut Array2<f32>) {
    let (shift, scale) = column_stats(train.view());
    for x in [train, held_out] {
        for mut row in x.axis_iter_mut(Axis(0)) {
            for ((x, shift), scale) in row.iter_mut().zip(&shift).zip(&scale) {
                *x = (*x - shift) * scale;
            }
        }
    }
}

fn unit_rows(x: ArrayView2<'_, f32>, shift: &[f32], scale: &[f32]) -> Array2<f32> {
    let mut out = x.to_owned();
    for mut row in out.axis_iter_mut(Axis(0)) {
        for ((x, shift), scale) in row.iter_mut().zip(shift).zip(scale) {
            *x = (*x - shift) * scale;
        }
        let norm = row.iter().map(|x| x * x).sum::<f32>().sqrt().max(1e-12);
        row.mapv_inplace(|x| x / norm);
    }
    out
}

/// The class that the nearest neighbours choose by weighted and by equal votes, for each of `ks`.
fn vote(
    similarities: &[f32],
    labels: &[u32],
    ks: &[usize],
    classes: usize,
    order: &mut Vec<u32>,
) -> Vec<[u32; 2]> {
    let bounded = |k: usize| k.clamp(1, similarities.len());
    let most = ks.iter().copied().map(bounded).max().unwrap_or(1);
    order.clear();
    order.extend(0..similarities.len() as u32);
    let most_similar_first = |&a: &u32, &b: &u32| {
        similarities[b as usize]
            .total_cmp(&similarities[a as usize])
            .then(a.cmp(&b))
    };
    order.select_nth_unstable_by(most - 1, most_similar_first);
    // In a fixed order, so that the sums do not depend on how the selection went.
    order[..most].sort_unstable_by(most_similar_first);
    let mut votes = vec![[0.0_f32; 2]; classes];
    let count = |range: std::ops::Range<usize>, votes: &mut Vec<[f32; 2]>| {
        for &i in &order[range] {
            let vote = &mut votes[labels[i as usize] as usize];
            vote[0] += ((similarities[i as usize] - 1.0) / TEMPERATURE).exp();
            vote[1] += 1.0;
        }
    };
    let best = |votes: &[[f32; 2]], kind: usize| {
        let best = votes
            .iter()
            .enumerate()
            .max_by(|(i, a), (j, b)| a[kind].total_cmp(&b[kind]).then(j.cmp(i)));
        best.map_or(0, |(class, _)| class as u32)
    };
    let mut chosen = vec![[0; 2]; ks.len()];
    let mut ascending: Vec<usize> = (0..ks.len()).collect();
    ascending.sort_by_key(|&i| ks[i]);
    let mut counted = 0;
    for i in ascending {
        count(counted..bounded(ks[i]), &mut votes);
        counted = bounded(ks[i]);
        chosen[i] = [best(&votes, 0), best(&votes, 1)];
    }
    chosen
}

#[cfg(test)]
mod tests {
    use super::*;

    fn clusters(per_class: usize, offset: f32) -> Features {
        let centres = [[1.0, 0.0, 0.1], [0.0, 1.0, 0.1], [-1.0, 0.0, 0.1]];
        let mut x = Vec::new();
        let mut labels = Vec::new();
        for i in 0..per_class {
            for (label, centre) in centres.iter().enumerate() {
                let wobble = (i as f32 * 0.37 + offset).sin() * 0.1;
                x.extend(centre.iter().map(|c| c + wobble));
                labels.push(label as u32);
            }
        }
        Features {
            x: Array2::from_shape_vec((labels.len(), 3), x).unwrap(),
            labels,
        }
    }

    #[test]
    fn separate_clusters_are_told_apart() {
        for scaling in [Scaling::Raw, Scaling::Standardised] {
            assert_eq!(top1(&clusters(20, 0.0), &clusters(9, 1.0), scaling, 5), 1.0);
        }
    }

    #[test]
    fn wrong_labels_are_found_wrong() {
        let mut shifted = clusters(9, 1.0);
        shifted.labels.rotate_left(1);
        assert_eq!(top1(&clusters(20, 0.0), &shifted, Scaling::Raw, 5), 0.0);
    }

    /// One column on a scale of its own hides the others unless columns are standardised.
    #[test]
    fn standardising_uncovers_small_columns() {
        let spoil = |mut features: Features, phase: f32| {
            for (i, mut row) in features.x.axis_iter_mut(Axis(0)).enumerate() {
                row[2] = 1e6 * (i as f32 * 0.7 + phase).sin();
            }
            features
        };
        let (train, held_out) = (spoil(clusters(20, 0.0), 0.0), spoil(clusters(9, 1.0), 2.0));
        let raw = top1(&train, &held_out, Scaling::Raw, 5);
        let standardised = top1(&train, &held_out, Scaling::Standardised, 5);
        assert!(standardised > 0.8 && raw < 0.7, "{raw} {standardised}");
    }

    /// More neighbours asked for than there are; a single one; nobody.
    #[test]
    fn odd_sizes() {
        let few = clusters(1, 0.0);
        assert!(top1(&few, &clusters(3, 1.0), Scaling::Raw, 100) > 0.0);
        assert_eq!(top1(&few, &few, Scaling::Raw, 1), 1.0);
        let none = Features {
            x: Array2::zeros((0, 3)),
            labels: Vec::new(),
        };
        assert!(top1(&none, &few, Scaling::Raw, 1).is_nan());
    }

    /// The definition, one query and one k at a time, in f64.
    fn naive(train: &Features, query: &[f32], k: usize, weighted: bool) -> u32 {
        let cosine = |a: &[f32], b: &[f32]| {
            let dot = |a: &[f32], b: &[f32]| -> f64 {
                let products = a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b));
                products.sum()
            };
            dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()
        };
        let rows = train.x.rows();
        let mut neighbours: Vec<(f64, u32)> = rows
            .into_iter()
            .zip(&train.labels)
            .map(|(row, &label)| (cosine(row.as_slice().unwrap(), query), label))
            .collect();
        neighbours.sort_by(|a, b| b.0.total_cmp(&a.0));
        let score = |class: u32| -> f64 {
            let of_class = neighbours[..k].iter().filter(|(_, label)| *label == class);
            of_class
                .map(|(cosine, _)| if weighted { (cosine / 0.07).exp() } else { 1.0 })
                .sum()
        };
        (0..5)
            .rev()
            .max_by(|&a, &b| score(a).total_cmp(&score(b)))
            .unwrap()
    }

    #[test]
    fn the_grid_is_the_definition() {
        use pcae_kernel::rng::{Purpose, Stream};
        let mut stream = Stream::new(3, 0, 0, Purpose::Init);
        let mut features = |rows: usize| {
            let labels: Vec<u32> = (0..rows).map(|_| stream.below(5)).collect();
            let mut x = Array2::zeros((rows, 7));
            for (mut row, &label) in x.axis_iter_mut(Axis(0)).zip(&labels) {
                // Classes overlap, so that votes are close and right and wrong both occur.
                row.mapv_inplace(|_: f32| stream.normal());
                row[label as usize] += 1.2;
            }
            Features { x, labels }
        };
        let (train, held_out) = (features(211), features(300));
        // Neither sorted nor without repetition, and one beyond the set.
        let ks = [20, 1, 7, 20, 211, 1000];
        let grid = grid(&train, &held_out, Scaling::Raw, &ks);
        for accuracy in grid {
            for (weighted, found) in [(true, accuracy.weighted), (false, accuracy.plain)] {
                let rows = held_out.x.rows().into_iter().zip(&held_out.labels);
                let right = rows.filter(|(row, label)| {
                    naive(
                        &train,
                        row.as_slice().unwrap(),
                        accuracy.k.min(211),
                        weighted,
                    ) == **label
                });
                assert_eq!(found, right.count() as f64 / 300.0, "{accuracy:?}");
            }
        }
    }
}
