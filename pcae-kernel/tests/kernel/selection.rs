//! What is redundant, and what stays: scores, order, counts, ablations.

use pcae_kernel::backend::{Backend, TokenDims, TrainBackend};
use pcae_kernel::config::{Budget, Criterion, DropLayers, Place, Reduction, VitConfig};
use pcae_kernel::error::Error;
use pcae_kernel::init::init;
use pcae_kernel::layout::Layout;
use pcae_kernel::model::{CriterionScorer, Scorer, Selection, Vit};
use pcae_kernel::reference::{Heap, Reference};
use proptest::prelude::*;

use crate::support::{Double, close, dot, random};

fn dims(tokens: usize, dim: usize) -> TokenDims {
    TokenDims {
        batch: 1,
        prefix: 0,
        tokens,
        dim,
    }
}

fn scores(x: &[f64], dim: usize) -> Vec<f64> {
    let mut scores = vec![f64::NAN; x.len() / dim];
    let dims = dims(scores.len(), dim);
    Double::owned()
        .mean_similarity(dims, &mut scores, &x.to_vec())
        .unwrap();
    scores
}

fn select(scores: &[f64], keep: usize) -> Vec<u32> {
    let mut picked = vec![u32::MAX; keep];
    Double::owned()
        .select(1, scores.len(), keep, &mut picked, &scores.to_vec())
        .unwrap();
    picked
}

/// The definition, step by step: unit tokens, their mean, dot products.
fn scores_by_definition(x: &[f64], dim: usize) -> Vec<f64> {
    let unit = |token: &[f64]| {
        let norm = dot(token, token).sqrt().max(1e-12);
        token.iter().map(|x| x / norm).collect::<Vec<_>>()
    };
    let units: Vec<Vec<f64>> = x.chunks(dim).map(unit).collect();
    let mut mean = vec![0.0; dim];
    for unit in &units {
        for (mean, x) in mean.iter_mut().zip(unit) {
            *mean += x / units.len() as f64;
        }
    }
    units.iter().map(|unit| dot(unit, &mean)).collect()
}

/// The order of a greedy Gram-Schmidt: `ranks[token]` is when the token is chosen.
fn pivots_by_definition(x: &[f64], dim: usize) -> Vec<f64> {
    let mut basis: Vec<Vec<f64>> = Vec::new();
    let mut ranks = vec![f64::NAN; x.len() / dim];
    for rank in 0..ranks.len() {
        let mut best: Option<(usize, Vec<f64>)> = None;
        for token in (0..ranks.len()).filter(|&token| ranks[token].is_nan()) {
            let mut residual = x[token * dim..][..dim].to_vec();
            for direction in &basis {
                let along = dot(&residual, direction);
                for (residual, direction) in residual.iter_mut().zip(direction) {
                    *residual -= along * direction;
                }
            }
            if best
                .as_ref()
                .is_none_or(|(_, largest)| dot(&residual, &residual) > dot(largest, largest))
            {
                best = Some((token, residual));
            }
        }
        let (token, residual) = best.unwrap();
        ranks[token] = rank as f64;
        let norm = dot(&residual, &residual).sqrt();
        // What is left of a dependent token is rounding.
        if norm > 1e-9 {
            basis.push(residual.iter().map(|x| x / norm).collect());
        }
    }
    ranks
}

fn pivots(x: &[f64], dim: usize) -> Vec<f64> {
    let mut ranks = vec![f64::NAN; x.len() / dim];
    let dims = dims(ranks.len(), dim);
    Double::owned()
        .pivoted_qr_scores(dims, &mut ranks, &x.to_vec())
        .unwrap();
    ranks
}

/// Several tokens of several elements.
fn tokens() -> impl Strategy<Value = (Vec<f64>, usize)> {
    (1..12usize, 2..7usize).prop_flat_map(|(tokens, dim)| {
        let element = -3.0..3.0f64;
        (prop::collection::vec(element, tokens * dim), Just(dim))
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 500, failure_persistence: None, ..ProptestConfig::default() })]

    /// Both sum some ten products of numbers up to 1: a few roundings apart. No unit token is more like a mean of unit
    /// tokens than 1.
    #[test]
    fn scores_are_the_definition((x, dim) in tokens()) {
        let found = scores(&x, dim);
        for (found, want) in found.iter().zip(scores_by_definition(&x, dim)) {
            close("score", *found, want, 1e-14, 0.0);
            prop_assert!(found.abs() <= 1.0 + 1e-14);
        }
    }

    /// Length does not matter, only direction. (A power of two scales exactly, so that scores are equal to the bit.)
    #[test]
    fn scores_ignore_length((x, dim) in tokens(), token in 0..12usize) {
        let mut longer = x.clone();
        let token = token % (x.len() / dim);
        longer[token * dim..][..dim].iter_mut().for_each(|x| *x *= 16.0);
        prop_assert_eq!(scores(&x, dim), scores(&longer, dim));
    }

    /// As many as asked for, each once, in ascending score, of equal ones the lower index first; none that was left out
    /// is lower than one that was taken.
    #[test]
    fn selection_is_the_front_of_a_stable_sort(
        coarse in prop::collection::vec(0..6u8, 1..40),
        keep in 0..40usize,
    ) {
        let scores: Vec<f64> = coarse.iter().map(|&x| f64::from(x) - 2.5).collect();
        let keep = keep.min(scores.len());
        let mut order: Vec<u32> = (0..scores.len() as u32).collect();
        order.sort_by(|&a, &b| scores[a as usize].total_cmp(&scores[b as usize]));
        order.truncate(keep);
        prop_assert_eq!(select(&scores, keep), order);
    }

    /// Who is selected does not depend on who stands where. Scores are sums in another order then, so they differ by
    /// roundings; only clearly different scores make a claim.
    #[test]
    fn selection_follows_a_permutation((x, dim) in tokens(), seed in any::<u64>(), keep in 1..12usize) {
        let count = x.len() / dim;
        let keep = keep.min(count);
        let before = scores(&x, dim);
        let mut sorted = before.clone();
        sorted.sort_by(f64::total_cmp);
        prop_assume!(sorted.windows(2).all(|pair| pair[1] - pair[0] > 1e-9));
        let mut place: Vec<usize> = (0..count).collect();
        pcae_kernel::rng::Stream::new(seed, 0, 0, pcae_kernel::rng::Purpose::Shuffle).shuffle(&mut place);
        let moved: Vec<f64> = place.iter().flat_map(|&from| x[from * dim..][..dim].to_vec()).collect();
        let picked = select(&before, keep);
        let after: Vec<u32> = select(&scores(&moved, dim), keep)
            .iter()
            .map(|&token| place[token as usize] as u32)
            .collect();
        prop_assert_eq!(picked, after);
    }

    /// Copies of one token are as redundant as can be; the one that is different stays, by either criterion.
    #[test]
    fn copies_go_before_what_is_distinct(copies in 2..9usize, at in 0..9usize, dim in 2..7usize, seed in 0..1000u64) {
        let common = random(seed, dim);
        let mut distinct = random(seed + 1000, dim);
        // Orthogonal to the others, and shorter, so that it does not win by its length.
        let along = dot(&distinct, &common) / dot(&common, &common);
        for (x, common) in distinct.iter_mut().zip(&common) {
            *x = 0.5 * (*x - along * common);
        }
        prop_assume!(dot(&distinct, &distinct) > 1e-3 && dot(&common, &common) > 1e-3);
        let at = at % (copies + 1);
        let x: Vec<f64> = (0..=copies)
            .flat_map(|token| if token == at { distinct.clone() } else { common.clone() })
            .collect();
        prop_assert_eq!(select(&scores(&x, dim), 1), [at as u32]);
        prop_assert!(select(&pivots(&x, dim), 2).contains(&(at as u32)));
    }

    /// The decomposition works in place on residuals, the definition orthogonalises against a basis each time. With more
    /// tokens than dimensions the rest are rounding errors, and their order is not compared.
    #[test]
    fn pivots_are_a_greedy_gram_schmidt((x, dim) in tokens()) {
        let (found, want) = (pivots(&x, dim), pivots_by_definition(&x, dim));
        for (found, want) in found.iter().zip(&want).filter(|(_, want)| **want < dim as f64) {
            prop_assert_eq!(found, want);
        }
        let mut ranks = found;
        ranks.sort_by(f64::total_cmp);
        let all: Vec<f64> = (0..x.len() / dim).map(|rank| rank as f64).collect();
        prop_assert_eq!(ranks, all, "each rank once");
    }
}

/// The class token and other sequences take no part in a sequence's scores.
#[test]
fn scores_see_their_own_patch_tokens_only() {
    let both = TokenDims {
        batch: 2,
        prefix: 2,
        tokens: 3,
        dim: 4,
    };
    let x = random(60, both.len());
    let mut found = vec![f64::NAN; 6];
    let mut ranks = vec![f64::NAN; 6];
    let mut backend = Double::owned();
    backend.mean_similarity(both, &mut found, &x).unwrap();
    backend.pivoted_qr_scores(both, &mut ranks, &x).unwrap();
    for b in 0..2 {
        let own = &x[(b * 5 + 2) * 4..][..12];
        assert_eq!(found[b * 3..][..3], scores(own, 4));
        assert_eq!(ranks[b * 3..][..3], pivots(own, 4));
    }
}

/// A token of zeros has a direction of zeros, and no division by its length.
#[test]
fn a_zero_token_has_score_zero() {
    assert_eq!(scores(&[0.0, 0.0, 3.0, 4.0], 2), [0.0, 0.5]);
    assert_eq!(pivots(&[0.0, 0.0, 3.0, 4.0, 0.0, 0.0], 2), [1.0, 0.0, 2.0]);
}

/// Equal residuals: the lower index is chosen first.
#[test]
fn pivots_break_ties_by_index() {
    let ones = [0.0, 1.0, 1.0, 0.0, -1.0, 0.0];
    assert_eq!(pivots(&ones, 2), [0.0, 1.0, 2.0]);
}

/// A score that is not a number has no place in an order; the first one is named, and nothing is picked.
#[test]
fn nan_scores_are_named() {
    let mut picked = vec![9; 4];
    let scores = vec![1.0, 2.0, 3.0, 0.5, f64::NAN, f64::NAN];
    let error = Double::owned().select(2, 3, 2, &mut picked, &scores);
    let expected = Error::NotANumber {
        op: "select",
        what: "scores",
        at: 4,
    };
    assert_eq!(error, Err(expected));
    assert!(
        expected
            .to_string()
            .contains("`scores` is NaN at element 4")
    );
    assert_eq!(picked, [9; 4]);
    // Elements behind the last score are none of its business.
    Double::owned()
        .select(1, 3, 2, &mut picked, &scores)
        .unwrap();
    assert_eq!(picked[..2], [0, 1]);
    let (mut ranks, x) = (vec![9.0; 2], vec![1.0, 2.0, f64::NAN, 4.0]);
    let error = Double::owned().pivoted_qr_scores(dims(2, 2), &mut ranks, &x);
    assert!(matches!(error, Err(Error::NotANumber { at: 2, .. })));
    assert_eq!(ranks, [9.0; 2]);
}

/// More cannot be kept than there are.
#[test]
fn keeping_too_many_is_refused() {
    let error = Double::owned().select(1, 2, 3, &mut vec![0; 3], &vec![0.0; 3]);
    assert!(matches!(error, Err(Error::Dimensions { found: 3, .. })));
}

/// Infinite scores have an order, and zeros of both signs are equal.
#[test]
fn infinities_and_signed_zeros_are_ordered() {
    let scores = [f64::INFINITY, 0.0, -0.0, f64::NEG_INFINITY];
    assert_eq!(select(&scores, 4), [3, 1, 2, 0]);
}

/// Positions through two selections.
#[test]
fn ids_are_followed() {
    let mut backend = Double::owned();
    let (mut first, mut second) = (vec![0; 6], vec![0; 4]);
    let ids = vec![10, 11, 12, 13, 20, 21, 22, 23];
    backend
        .gather_ids(2, 4, 3, &mut first, Some(&ids), &vec![3, 0, 2, 1, 2, 0])
        .unwrap();
    assert_eq!(first, [13, 10, 12, 21, 22, 20]);
    backend
        .gather_ids(2, 3, 2, &mut second, Some(&first), &vec![2, 0, 0, 1])
        .unwrap();
    assert_eq!(second, [12, 13, 21, 22]);
    backend
        .gather_ids(2, 3, 2, &mut second, None, &vec![2, 0, 0, 1])
        .unwrap();
    assert_eq!(
        second,
        [2, 0, 0, 1],
        "without ids the index is the position"
    );
}

const VIT: VitConfig = VitConfig {
    img_size: [16, 24],
    in_chans: 1,
    patch_size: 4,
    embed_dim: 8,
    depth: 4,
    num_heads: 2,
    mlp_ratio: 2.0,
};

/// Any criterion, and what each stage decided.
struct Recorder {
    inner: CriterionScorer<Single>,
    stages: Vec<Stage>,
}

struct Stage {
    number: usize,
    tokens: usize,
    keep: usize,
    scores: Vec<f32>,
    ids: Vec<u32>,
}

type Single = Reference<f32, Heap<f32>>;

impl Scorer<Single> for Recorder {
    fn score(
        &mut self,
        backend: &mut Single,
        stage: usize,
        dims: TokenDims,
        scores: &mut Vec<f32>,
        x: &Vec<f32>,
    ) -> Result<(), Error> {
        self.inner.score(backend, stage, dims, scores, x)
    }

    fn selected(
        &mut self,
        _backend: &mut Single,
        selection: Selection<'_, Single>,
    ) -> Result<(), Error> {
        let Selection {
            stage,
            tokens,
            keep,
            scores,
            ids,
        } = selection;
        let (scores, ids) = (scores[..2 * tokens].to_vec(), ids[..2 * keep].to_vec());
        self.stages.push(Stage {
            number: stage,
            tokens,
            keep,
            scores,
            ids,
        });
        Ok(())
    }
}

const BATCH: usize = 2;
const PATCHES: usize = 18;

/// Patches 0 to 17 of the first picture, 6 to 23 of the second, in an order that is not their own.
fn patches() -> Vec<u32> {
    let picture = |from: u32| (0..18).map(move |i| from + i * 7 % 18);
    picture(0).chain(picture(6)).collect()
}

fn run(reduction: Reduction) -> (Vit<Single>, Recorder) {
    reduction.check(PATCHES, VIT.depth).unwrap();
    let backend = &mut Single::owned();
    let layout = Layout::encoder(&VIT);
    let mut params = vec![0.0; layout.len()];
    init(&layout, 3, &mut params).unwrap();
    let images: Vec<f32> = random(61, BATCH * 16 * 24)
        .iter()
        .map(|&x| x as f32)
        .collect();
    let mut vit = Vit::new(backend, &VIT, BATCH, PATCHES, false, reduction).unwrap();
    let inner = CriterionScorer::new(backend, &reduction, BATCH, PATCHES, VIT.depth).unwrap();
    let mut recorder = Recorder {
        inner,
        stages: Vec::new(),
    };
    if reduction.criterion == Criterion::Random {
        for stage in 0..reduction.stages(VIT.depth) {
            let noise: Vec<f32> = random(62 + stage as u64, BATCH * PATCHES)
                .iter()
                .map(|&x| x as f32)
                .collect();
            recorder.inner.set_noise(backend, stage, &noise).unwrap();
        }
    }
    let ids = patches();
    vit.forward(backend, &params, BATCH, &images, Some(&ids), &mut recorder)
        .unwrap();
    (vit, recorder)
}

/// For every criterion and place: stages have the counts that the configuration says, each stage's patches are among
/// those of the stage before, none twice, and scores ascend along them.
#[test]
fn stages_select_nested_subsets() {
    for criterion in [
        Criterion::MeanSimilarity,
        Criterion::Random,
        Criterion::PivotedQr,
    ] {
        for place in [Place::Progressive, Place::OneStage(1), Place::Input] {
            for budget in [Budget::Keep(0.6), Budget::Drop(0.35)] {
                let reduction = Reduction {
                    criterion,
                    place,
                    drop_layers: DropLayers::new(&[0, 1, 3], VIT.depth).unwrap(),
                    budget,
                };
                let (vit, recorder) = run(reduction);
                assert_eq!(recorder.stages.len(), reduction.stages(VIT.depth));
                let (mut before, mut count) = (patches(), PATCHES);
                for (index, stage) in recorder.stages.iter().enumerate() {
                    let Stage {
                        number,
                        tokens,
                        keep,
                        scores,
                        ids,
                    } = stage;
                    assert_eq!((*number, *tokens), (index, count));
                    for b in 0..BATCH {
                        let ids = &ids[b * keep..][..*keep];
                        let before = &before[b * tokens..][..*tokens];
                        let scores = &scores[b * tokens..][..*tokens];
                        let at: Vec<usize> = ids
                            .iter()
                            .map(|id| before.iter().position(|old| old == id).unwrap())
                            .collect();
                        let mut unique = at.clone();
                        unique.sort_unstable();
                        unique.dedup();
                        assert_eq!(unique.len(), *keep, "no patch twice");
                        assert!(at.windows(2).all(|pair| scores[pair[0]] <= scores[pair[1]]));
                        let highest = scores[at[keep - 1]];
                        let left_out = (0..*tokens).filter(|token| !at.contains(token));
                        assert!(left_out.into_iter().all(|token| scores[token] >= highest));
                    }
                    (before, count) = (ids.clone(), *keep);
                }
                assert_eq!(count, reduction.remaining(PATCHES, VIT.depth));
                assert_eq!(vit.dims().tokens, count);
                assert_eq!(vit.ids()[..BATCH * count], before);
            }
        }
    }
}

/// There is noise for each random stage and no other.
#[test]
fn noise_is_for_random_stages() {
    let backend = &mut Single::owned();
    let random = Reduction {
        criterion: Criterion::Random,
        drop_layers: DropLayers::new(&[0, 2], 4).unwrap(),
        budget: Budget::Keep(0.5),
        place: Place::Progressive,
    };
    let mut scorer = CriterionScorer::new(backend, &random, 1, 6, 4).unwrap();
    scorer.set_noise(backend, 1, &[0.0; 6]).unwrap();
    scorer.set_noise(backend, 1, &[0.0; 7]).unwrap_err();
    let error = scorer.set_noise(backend, 2, &[0.0; 1]);
    assert!(matches!(
        error,
        Err(Error::IndexOutOfRange {
            limit: 2,
            found: 2,
            ..
        })
    ));
}
