//! Weighted nearest neighbours on features (Wu et al., 2018), the evaluation that needs no training.

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
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scaling {
    /// None: for pixels, whose columns share a scale already.
    Raw,
    /// Mean 0 and standard deviation 1 of each column over the training features: for networks, where a few columns
    /// would otherwise decide alone.
    Standardised,
}

/// Part of `held_out` that the `k` most similar features of `train`, weighted by `exp(cosine / 0.07)`, classify right.
/// Ties between classes go to the lower one.
///
/// Returns NaN where either is empty.
pub fn top1(train: &Features, held_out: &Features, scaling: Scaling, k: usize) -> f64 {
    if train.labels.is_empty() || held_out.labels.is_empty() {
        return f64::NAN;
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
    let right: usize = (0..held_out.labels.len().div_ceil(BLOCK))
        .into_par_iter()
        .map(|block| {
            let range = block * BLOCK..((block + 1) * BLOCK).min(held_out.labels.len());
            let queries = unit_rows(held_out.x.slice(s![range.clone(), ..]), &shift, &scale);
            let similarities = queries.dot(&bank.t());
            let pairs = similarities.axis_iter(Axis(0)).zip(&held_out.labels[range]);
            let mut order: Vec<u32> = Vec::with_capacity(train.labels.len());
            pairs
                .filter(|(row, label)| {
                    let row = row.as_slice().unwrap_or_default();
                    vote(row, &train.labels, k, classes, &mut order) == **label
                })
                .count()
        })
        .sum();
    right as f64 / held_out.labels.len() as f64
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

fn vote(
    similarities: &[f32],
    labels: &[u32],
    k: usize,
    classes: usize,
    order: &mut Vec<u32>,
) -> u32 {
    let k = k.clamp(1, similarities.len());
    order.clear();
    order.extend(0..similarities.len() as u32);
    let most_similar_first = |&a: &u32, &b: &u32| {
        similarities[b as usize]
            .total_cmp(&similarities[a as usize])
            .then(a.cmp(&b))
    };
    order.select_nth_unstable_by(k - 1, most_similar_first);
    // In a fixed order, so that the sums do not depend on how the selection went.
    order[..k].sort_unstable_by(most_similar_first);
    let mut votes = vec![0.0_f32; classes];
    for &i in &order[..k] {
        votes[labels[i as usize] as usize] +=
            ((similarities[i as usize] - 1.0) / TEMPERATURE).exp();
    }
    let best = votes
        .iter()
        .enumerate()
        .max_by(|(i, a), (j, b)| a.total_cmp(b).then(j.cmp(i)));
    best.map_or(0, |(class, _)| class as u32)
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
}
