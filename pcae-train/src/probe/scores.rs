//! From logits to accuracies.

use ndarray::{Array1, Array2, ArrayView2, Axis};

/// A linear classifier.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Head {
    /// `[classes, dim]`
    pub(super) weight: Array2<f32>,
    /// `[classes]`
    pub(super) bias: Array1<f32>,
}

impl Head {
    /// # Shapes
    /// `x: [pictures, dim]`, result `[pictures, classes]`.
    pub(super) fn logits(&self, x: ArrayView2<'_, f32>) -> Array2<f32> {
        x.dot(&self.weight.t()) + &self.bias
    }
}

/// How right a classifier is.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Scores {
    pub(super) top1: f64,
    /// Part of the pictures whose class is among the five likeliest; `None` of five classes or fewer.
    pub(super) top5: Option<f64>,
    /// Pictures of each class, and how many of them are classified right.
    pub(super) per_class: Vec<(usize, usize)>,
}

impl Scores {
    /// # Shapes
    /// `logits: [pictures, classes]`, `labels: [pictures]`.
    pub(super) fn of(logits: &Array2<f32>, labels: &[u32]) -> Self {
        let mut per_class = vec![(0, 0); logits.ncols()];
        let mut in_five = 0;
        for (row, &label) in logits.axis_iter(Axis(0)).zip(labels) {
            let label = label as usize;
            let own = row[label];
            // Of equal logits the lower class comes first.
            let before = row
                .iter()
                .enumerate()
                .filter(|&(class, &logit)| logit > own || (logit == own && class < label));
            let rank = before.count();
            per_class[label].0 += 1;
            per_class[label].1 += usize::from(rank == 0);
            in_five += usize::from(rank < 5);
        }
        let part = |count: usize| count as f64 / labels.len() as f64;
        Self {
            top1: part(per_class.iter().map(|(_, right)| right).sum()),
            top5: (logits.ncols() > 5).then(|| part(in_five)),
            per_class,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ndarray::array;

    #[test]
    fn ranks_are_counted() {
        let logits = array![
            [9.0, 1.0, 2.0, 3.0, 4.0, 5.0],
            [9.0, 1.0, 2.0, 3.0, 4.0, 5.0],
            [9.0, 1.0, 2.0, 3.0, 4.0, 5.0],
            [7.0, 7.0, 0.0, 0.0, 0.0, 0.0],
        ];
        // Ranks 0, 5, 4, and 1 by a tie.
        let scores = Scores::of(&logits, &[0, 1, 2, 1]);
        assert_eq!((scores.top1, scores.top5), (0.25, Some(0.75)));
        assert_eq!(scores.per_class[..3], [(1, 1), (2, 0), (1, 0)]);
        assert_eq!(Scores::of(&array![[0.0, 1.0]], &[1]).top5, None);
    }

    #[test]
    fn a_head_is_a_product_and_a_bias() {
        let head = Head {
            weight: array![[1.0, 2.0], [0.0, -1.0], [3.0, 0.5]],
            bias: array![0.5, 0.0, -1.0],
        };
        assert_eq!(
            head.logits(array![[2.0, 4.0]].view()),
            array![[10.5, -4.0, 7.0]]
        );
    }
}
