//! Inference in a caller's slices: plans are exact, and neither the place of the buffers nor their size changes a bit.

use pcae_kernel::backend::Backend;
use pcae_kernel::config::{
    Budget, ClassifierConfig, Criterion, DropLayers, Place, Pool, Reduction, VitConfig,
};
use pcae_kernel::error::Error;
use pcae_kernel::init::init;
use pcae_kernel::layout::Layout;
use pcae_kernel::model::{Classifier, MeanSimilarity, Plan, Vit};
use pcae_kernel::reference::{Arena, Heap, Reference};

use crate::support::random;

type OnHeap = Reference<f32, Heap<f32>>;
type InArena<'a> = Reference<f32, Arena<'a, f32>>;

/// What is widest decides the plan: queries with keys and values, the hidden layer, the patch.
fn vits() -> [VitConfig; 3] {
    let vit = VitConfig {
        img_size: [12, 20],
        in_chans: 2,
        patch_size: 4,
        embed_dim: 16,
        depth: 3,
        num_heads: 2,
        mlp_ratio: 2.0,
    };
    [
        vit,
        VitConfig {
            mlp_ratio: 4.5,
            ..vit
        },
        VitConfig { in_chans: 6, ..vit },
    ]
}

fn reduction() -> Reduction {
    Reduction {
        criterion: Criterion::MeanSimilarity,
        place: Place::Progressive,
        drop_layers: DropLayers::new(&[0, 2], 3).unwrap(),
        budget: Budget::Drop(0.4),
    }
}

fn single(seed: u64, len: usize) -> Vec<f32> {
    random(seed, len).iter().map(|&x| x as f32).collect()
}

fn parameters(layout: &Layout) -> Vec<f32> {
    let mut params = vec![0.0; layout.len()];
    init(layout, 8, &mut params).unwrap();
    params
}

fn images(vit: &VitConfig, batch: usize) -> Vec<f32> {
    single(95, batch * vit.in_chans * vit.img_size[0] * vit.img_size[1])
}

/// The patches of each picture: 9 of 15, others for each.
fn patches(batch: usize) -> Vec<u32> {
    (0..batch as u32 * 9)
        .map(|i| (i * 4 + i / 9) % 15)
        .collect()
}

fn vit_on_heap(vit: &VitConfig, room: usize, batch: usize, with_cls: bool) -> Vec<f32> {
    let backend = &mut OnHeap::owned();
    let params = parameters(&Layout::encoder(vit));
    let mut model = Vit::new(backend, vit, room, 9, with_cls, reduction()).unwrap();
    let (images, ids) = (images(vit, batch), patches(batch));
    // Buffers that were used before, for more pictures, leave no trace.
    if room > batch {
        let (images, ids) = (single(96, room * images.len() / batch), patches(room));
        model
            .forward(
                backend,
                &params,
                room,
                &images,
                Some(&ids),
                &mut MeanSimilarity,
            )
            .unwrap();
        model.final_norm(backend, &params).unwrap();
    }
    model
        .forward(
            backend,
            &params,
            batch,
            &images,
            Some(&ids),
            &mut MeanSimilarity,
        )
        .unwrap();
    let len = model.dims().len();
    model.final_norm(backend, &params).unwrap()[..len].to_vec()
}

fn vit_in_arena(
    vit: &VitConfig,
    batch: usize,
    with_cls: bool,
    plan: Plan,
) -> Result<Vec<f32>, Error> {
    // What lies in the arena before does not matter.
    let (mut floats, mut indices) = (vec![f32::NAN; plan.floats], vec![u32::MAX; plan.ids]);
    let mut images = images(vit, batch);
    let mut ids = patches(batch);
    let params = parameters(&Layout::encoder(vit));
    let (images, ids) = (&mut images[..], &mut ids[..]);
    let backend = &mut InArena::new(Arena::new(&mut floats, &mut indices));
    let mut model = Vit::new(backend, vit, batch, 9, with_cls, reduction())?;
    model.forward(
        backend,
        &&params[..],
        batch,
        &images,
        Some(&ids),
        &mut MeanSimilarity,
    )?;
    let len = model.dims().len();
    Ok(model.final_norm(backend, &&params[..])?[..len].to_vec())
}

/// As many elements as planned are enough, one less of either kind is not, and the numbers are those of the heap.
#[test]
fn a_vits_plan_is_exact() {
    for vit in vits() {
        vit.check().unwrap();
        for (batch, with_cls) in [(1, true), (3, false)] {
            let plan = Vit::<InArena<'_>>::plan(&vit, batch, 9, with_cls);
            let found = vit_in_arena(&vit, batch, with_cls, plan).unwrap();
            assert_eq!(found, vit_on_heap(&vit, batch, batch, with_cls));
            assert!(found.iter().all(|x| x.is_finite()));
            let less = [
                Plan {
                    floats: plan.floats - 1,
                    ..plan
                },
                Plan {
                    ids: plan.ids - 1,
                    ..plan
                },
            ];
            for plan in less {
                let error = vit_in_arena(&vit, batch, with_cls, plan).unwrap_err();
                let Error::ArenaFull { expected, found } = error else {
                    panic!("{error}");
                };
                assert_eq!(expected, found + 1);
            }
        }
    }
}

fn classify_in_arena(
    config: &ClassifierConfig,
    batch: usize,
    plan: Plan,
) -> Result<Vec<f32>, Error> {
    let (mut floats, mut indices) = (vec![f32::NAN; plan.floats], vec![u32::MAX; plan.ids]);
    let params = parameters(&Layout::classifier(config));
    let mut images = images(&config.vit, batch);
    let images = &mut images[..];
    let backend = &mut InArena::new(Arena::new(&mut floats, &mut indices));
    let mut model = Classifier::new(backend, config, batch)?;
    let logits = model.forward(backend, &&params[..], batch, &images, &mut MeanSimilarity)?;
    Ok(logits.to_vec())
}

#[test]
fn a_classifiers_plan_is_exact() {
    let pools = [Pool::Mean, Pool::ClsToken];
    for (vit, pool) in vits()
        .into_iter()
        .flat_map(|vit| pools.map(|pool| (vit, pool)))
    {
        let config = ClassifierConfig {
            vit,
            num_classes: 5,
            pool,
            reduction: reduction(),
        };
        config.check().unwrap();
        let plan = Classifier::<InArena<'_>>::plan(&config, 2);
        let found = classify_in_arena(&config, 2, plan).unwrap();
        let backend = &mut OnHeap::owned();
        let params = parameters(&Layout::classifier(&config));
        let mut model = Classifier::new(backend, &config, 2).unwrap();
        let images = images(&vit, 2);
        let want = model
            .forward(backend, &params, 2, &images, &mut MeanSimilarity)
            .unwrap();
        assert_eq!(&found, want);
        for plan in [
            Plan {
                floats: plan.floats - 1,
                ..plan
            },
            Plan {
                ids: plan.ids - 1,
                ..plan
            },
        ] {
            let error = classify_in_arena(&config, 2, plan).unwrap_err();
            assert!(matches!(error, Error::ArenaFull { .. }));
        }
    }
}

/// A smaller batch in a larger room has the bits of a room of its own.
#[test]
fn a_smaller_batch_is_computed_alike() {
    for vit in vits() {
        for with_cls in [true, false] {
            let want = vit_on_heap(&vit, 2, 2, with_cls);
            assert_eq!(vit_on_heap(&vit, 5, 2, with_cls), want);
        }
    }
    let backend = &mut OnHeap::owned();
    let vit = vits()[0];
    let mut model = Vit::new(backend, &vit, 2, 15, true, reduction()).unwrap();
    let params = parameters(&Layout::encoder(&vit));
    let error = model.forward(
        backend,
        &params,
        3,
        &images(&vit, 3),
        None,
        &mut MeanSimilarity,
    );
    assert!(matches!(error, Err(Error::Dimensions { found: 3, .. })));
}

/// One model, many budgets: after the change it drops what a model made for it drops.
#[test]
fn the_budget_can_change() {
    let vit = vits()[0];
    let backend = &mut OnHeap::owned();
    let params = parameters(&Layout::encoder(&vit));
    let (images, ids) = (images(&vit, 2), patches(2));
    let mut changed = Vit::new(backend, &vit, 2, 9, true, Reduction::NONE).unwrap();
    for budget in [Budget::Drop(0.4), Budget::Drop(0.1), Budget::Drop(0.0)] {
        let reduction = Reduction {
            budget,
            ..reduction()
        };
        changed.set_reduction(reduction);
        let mut own = Vit::new(backend, &vit, 2, 9, true, reduction).unwrap();
        for model in [&mut changed, &mut own] {
            model
                .forward(
                    backend,
                    &params,
                    2,
                    &images,
                    Some(&ids),
                    &mut MeanSimilarity,
                )
                .unwrap();
        }
        assert_eq!(changed.dims(), own.dims());
        assert_eq!(changed.dims().tokens, reduction.remaining(9, 3));
        let len = own.dims().len();
        assert_eq!(changed.tokens()[..len], own.tokens()[..len]);
    }
}

/// Memory that there is not is an error, not an abort.
#[test]
fn the_heap_refuses_what_it_has_not() {
    let error = OnHeap::owned().buf(usize::MAX);
    assert!(matches!(
        error,
        Err(Error::ArenaFull {
            expected: usize::MAX,
            ..
        })
    ));
    let vit = vits()[0];
    let error = Vit::new(&mut OnHeap::owned(), &vit, usize::MAX, 9, true, reduction());
    assert!(matches!(error.err(), Some(Error::ArenaFull { .. })));
}

/// Buffers are zeros whatever lay there before, follow each other, and end with the slices.
#[test]
fn buffers_are_carved_and_zeroed() {
    let (mut floats, mut indices) = ([f32::NAN; 5], [u32::MAX; 3]);
    let backend = &mut InArena::new(Arena::new(&mut floats, &mut indices));
    assert_eq!(backend.buf(2).unwrap(), [0.0; 2]);
    assert_eq!(backend.ids(3).unwrap(), [0; 3]);
    assert_eq!(
        backend.buf(4),
        Err(Error::ArenaFull {
            expected: 4,
            found: 3
        })
    );
    assert_eq!(backend.buf(3).unwrap(), [0.0; 3]);
    assert!(backend.buf(0).unwrap().is_empty());
    backend.ids(1).unwrap_err();
}
