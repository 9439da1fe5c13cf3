//! Features of a block in the middle: the model stopped there is the model that ends there.

use pcae_kernel::backend::TrainBackend;
use pcae_kernel::config::{Budget, Criterion, DropLayers, Place, Reduction, VitConfig};
use pcae_kernel::error::Error;
use pcae_kernel::layout::Layout;
use pcae_kernel::model::{MeanSimilarity, Vit};

use crate::support::{Double, random};

const VIT: VitConfig = VitConfig {
    img_size: [8, 12],
    in_chans: 1,
    patch_size: 4,
    embed_dim: 8,
    depth: 4,
    num_heads: 2,
    mlp_ratio: 2.0,
};
const BATCH: usize = 2;

/// `values` of `from` for the tensors of `to`, by name.
fn by_name(from: &Layout, values: &[f32], to: &Layout) -> Vec<f32> {
    let mut named = std::collections::BTreeMap::new();
    from.for_each(|tensor| {
        let values = values[tensor.span.start..tensor.span.end()].to_vec();
        named.insert(tensor.name.to_string(), values);
    });
    let mut taken = vec![0.0; to.len()];
    to.for_each(|tensor| {
        let values = &named[&tensor.name.to_string()];
        taken[tensor.span.start..tensor.span.end()].copy_from_slice(values);
    });
    taken
}

fn reduction(depth: usize, blocks: &[usize]) -> Reduction {
    let blocks: Vec<usize> = blocks.iter().copied().filter(|b| *b < depth).collect();
    Reduction {
        criterion: Criterion::MeanSimilarity,
        place: Place::Progressive,
        drop_layers: DropLayers::new(&blocks, depth).unwrap(),
        budget: Budget::Drop(0.3),
    }
}

fn images() -> Vec<f64> {
    random(3, BATCH * 8 * 12)
}

#[test]
fn a_stopped_model_is_a_shorter_model() {
    let layout = Layout::encoder(&VIT);
    let values: Vec<f32> = random(1, layout.len()).iter().map(|&x| x as f32).collect();
    let (backend, images) = (&mut Double::owned(), images());
    let params = backend.params(&layout, &values).unwrap();
    for blocks in [&[][..], &[0, 2], &[1, 3]] {
        let reduction_of = |depth| reduction(depth, blocks);
        let mut whole = Vit::new(backend, &VIT, BATCH, 6, true, reduction_of(4)).unwrap();
        let mut scorer = MeanSimilarity;
        whole
            .start(backend, &params, BATCH, &images, None, &mut scorer)
            .unwrap();
        for depth in 1..=VIT.depth {
            let vit = VitConfig { depth, ..VIT };
            let shorter = Layout::encoder(&vit);
            let own = by_name(&layout, &values, &shorter);
            let own = backend.params(&shorter, &own).unwrap();
            let mut short = Vit::new(backend, &vit, BATCH, 6, true, reduction_of(depth)).unwrap();
            short
                .forward(backend, &own, BATCH, &images, None, &mut scorer)
                .unwrap();
            whole
                .advance(backend, &params, depth, None, &mut scorer)
                .unwrap();
            assert_eq!(whole.dims(), short.dims());
            let len = whole.dims().len();
            // The same operations on the same numbers.
            assert_eq!(whole.tokens()[..len], short.tokens()[..len]);
            let want = short.final_norm(backend, &own).unwrap()[..len].to_vec();
            assert_eq!(whole.final_norm(backend, &params).unwrap()[..len], want);
        }
    }
}

#[test]
fn blocks_run_forwards_and_no_further_than_the_last() {
    let layout = Layout::encoder(&VIT);
    let (backend, images) = (&mut Double::owned(), images());
    let params = backend.params(&layout, &vec![0.1; layout.len()]).unwrap();
    let mut vit = Vit::new(backend, &VIT, BATCH, 6, true, Reduction::NONE).unwrap();
    let mut scorer = MeanSimilarity;
    vit.start(backend, &params, BATCH, &images, None, &mut scorer)
        .unwrap();
    vit.advance(backend, &params, 2, None, &mut scorer).unwrap();
    let before = vit.tokens().clone();
    for found in [1, 5] {
        let error = vit.advance(backend, &params, found, None, &mut scorer);
        assert!(
            matches!(error, Err(Error::Dimensions { op: "advance", found: f, .. }) if f == found)
        );
    }
    vit.advance(backend, &params, 2, None, &mut scorer).unwrap();
    assert_eq!(vit.tokens(), &before);
    // A new batch begins at the first block again.
    vit.forward(backend, &params, BATCH, &images, None, &mut scorer)
        .unwrap();
    assert_ne!(vit.tokens(), &before);
}
