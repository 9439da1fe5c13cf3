//! Inference in an arena, from the making of the model to its answer, asks the allocator for nothing.

use std::alloc::{GlobalAlloc, Layout as MemoryLayout, System};
use std::cell::Cell;

use pcae_kernel::config::{
    Budget, ClassifierConfig, Criterion, DropLayers, Place, Pool, Reduction, VitConfig,
};
use pcae_kernel::init::init;
use pcae_kernel::layout::Layout;
use pcae_kernel::model::{Classifier, MeanSimilarity};
use pcae_kernel::reference::{Arena, Reference};

thread_local! {
    /// Allocations of this thread: the test harness has threads of its own.
    static COUNT: Cell<usize> = const { Cell::new(0) };
}

struct Counting;

// SAFETY: every call is passed on unchanged to the system's allocator, which keeps the contract.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: MemoryLayout) -> *mut u8 {
        // A thread that is going away has no counter left, and is not the one that is watched.
        let _ = COUNT.try_with(|count| count.set(count.get() + 1));
        // SAFETY: the caller keeps `alloc`'s contract.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: MemoryLayout) {
        // SAFETY: the caller keeps `dealloc`'s contract, and `alloc` took the pointer from `System`.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn count() -> usize {
    COUNT.with(Cell::get)
}

#[test]
fn inference_allocates_nothing() {
    for pool in [Pool::Mean, Pool::ClsToken] {
        let config = ClassifierConfig {
            vit: VitConfig {
                img_size: [8, 12],
                in_chans: 1,
                patch_size: 4,
                embed_dim: 8,
                depth: 3,
                num_heads: 2,
                mlp_ratio: 2.0,
            },
            num_classes: 3,
            pool,
            reduction: Reduction {
                criterion: Criterion::MeanSimilarity,
                place: Place::Progressive,
                drop_layers: DropLayers::new(&[0, 1], 3).unwrap(),
                budget: Budget::Drop(0.3),
            },
        };
        const BATCH: usize = 2;
        let layout = Layout::classifier(&config);
        let plan = Classifier::<Reference<f32, Arena<'_, f32>>>::plan(&config, BATCH);
        let mut params = vec![0.0; layout.len()];
        let (mut floats, mut ids) = (vec![0.0; plan.floats], vec![0; plan.ids]);
        let mut images = vec![0.5; BATCH * 8 * 12];
        images[10] = -1.0;
        let images = &mut images[..];

        let before = count();
        config.check().unwrap();
        init(&layout, 1, &mut params).unwrap();
        let params = &params[..];
        let backend = &mut Reference::new(Arena::new(&mut floats, &mut ids));
        let mut model = Classifier::new(backend, &config, BATCH).unwrap();
        for _ in 0..2 {
            model
                .forward(backend, &params, BATCH, &images, &mut MeanSimilarity)
                .unwrap();
        }
        let allocations = count() - before;
        assert_eq!(allocations, 0);

        // The counter counts.
        drop(std::hint::black_box(Box::new(1)));
        assert_eq!(count() - before, 1);
    }
}
