//! Configuration: every way to be refused, budgets as Python computes them, stages, and no overflow behind a check.

use pcae_kernel::config::{
    Budget, ClassifierConfig, ConfigError, Criterion, DecoderConfig, DropLayers, MAX_DEPTH,
    MAX_ELEMENTS, Place, Pool, PretrainConfig, Reduction, StageLayout, Target, VitConfig, len_keep,
};
use pcae_kernel::flops;
use pcae_kernel::layout::Layout;
use pcae_kernel::model::Vit;
use pcae_kernel::reference::{Heap, Reference};
use proptest::prelude::*;

const VIT: VitConfig = VitConfig {
    img_size: [24, 32],
    in_chans: 3,
    patch_size: 8,
    embed_dim: 24,
    depth: 4,
    num_heads: 3,
    mlp_ratio: 4.0,
};

const REDUCTION: Reduction = Reduction {
    criterion: Criterion::MeanSimilarity,
    place: Place::Progressive,
    drop_layers: DropLayers::NONE,
    budget: Budget::Keep(0.5),
};

const PRETRAIN: PretrainConfig = PretrainConfig {
    vit: VIT,
    decoder: DecoderConfig {
        embed_dim: 16,
        depth: 2,
        num_heads: 2,
    },
    mask_ratio: 0.75,
    target: Target::Teacher(REDUCTION),
};

const CLASSIFIER: ClassifierConfig = ClassifierConfig {
    vit: VIT,
    num_classes: 10,
    pool: Pool::Mean,
    reduction: Reduction {
        budget: Budget::Drop(0.3),
        ..REDUCTION
    },
};

/// `layers` after which `budget` applies.
fn staged(layers: &[usize], budget: Budget) -> Reduction {
    Reduction {
        drop_layers: DropLayers::new(layers, MAX_DEPTH).unwrap(),
        budget,
        ..REDUCTION
    }
}

/// Every field of the encoder, out of range on both sides where it has two, with the message that the user reads.
#[test]
fn vit_refusals_name_field_expected_and_found() {
    VIT.check().unwrap();
    type Change = fn(&mut VitConfig);
    let cases: &[(Change, &str)] = &[
        (
            |c| c.patch_size = 0,
            "patch_size: expected 1 to 1048576, found 0",
        ),
        (
            |c| c.patch_size = usize::MAX,
            "patch_size: expected 1 to 1048576, found 18446744073709551615",
        ),
        (
            |c| c.img_size[0] = 0,
            "img_size: expected 1 to 1048576, found 0",
        ),
        (
            |c| c.img_size[1] = 0,
            "img_size: expected 1 to 1048576, found 0",
        ),
        (
            |c| c.img_size[1] = 1 << 21,
            "img_size: expected 1 to 1048576, found 2097152",
        ),
        (
            |c| c.img_size[0] = 25,
            "img_size: expected a multiple of patch_size (8), found 25",
        ),
        (
            |c| c.img_size[1] = 25,
            "img_size: expected a multiple of patch_size (8), found 25",
        ),
        (|c| c.in_chans = 0, "in_chans: expected 1 to 1024, found 0"),
        (
            |c| c.in_chans = 1025,
            "in_chans: expected 1 to 1024, found 1025",
        ),
        (
            |c| (c.img_size, c.patch_size) = ([1 << 11, 1 << 10], 1),
            "img_size / patch_size, the number of patches: expected 1 to 1048576, found 2097152",
        ),
        (
            |c| (c.img_size, c.patch_size) = ([1024, 1024], 1024),
            "patch_size, the elements of a patch: expected 1 to 1048576, found 3145728",
        ),
        (
            |c| c.embed_dim = 0,
            "embed_dim: expected 4 to 1048576, found 0",
        ),
        (
            |c| c.embed_dim = 1 << 21,
            "embed_dim: expected 4 to 1048576, found 2097152",
        ),
        (
            |c| c.embed_dim = 18,
            "embed_dim: expected a multiple of 4, as sine and cosine of two axes need (4), found 18",
        ),
        (|c| c.depth = 0, "depth: expected 1 to 64, found 0"),
        (|c| c.depth = 65, "depth: expected 1 to 64, found 65"),
        (|c| c.num_heads = 0, "num_heads: expected 1 to 24, found 0"),
        (
            |c| c.num_heads = 25,
            "num_heads: expected 1 to 24, found 25",
        ),
        (
            |c| c.num_heads = 5,
            "embed_dim: expected a multiple of num_heads (5), found 24",
        ),
        (
            |c| c.mlp_ratio = 0.0,
            "mlp_ratio: expected more than 0 and at most 1024, found 0",
        ),
        (
            |c| c.mlp_ratio = f64::NAN,
            "mlp_ratio: expected more than 0 and at most 1024, found NaN",
        ),
        (
            |c| c.mlp_ratio = 1025.0,
            "mlp_ratio: expected more than 0 and at most 1024, found 1025",
        ),
        (
            |c| c.mlp_ratio = 0.01,
            "mlp_ratio, the hidden width: expected 1 to 1048576, found 0",
        ),
        (
            |c| (c.embed_dim, c.mlp_ratio) = (3 << 10, 1000.0),
            "mlp_ratio, the hidden width: expected 1 to 1048576, found 3072000",
        ),
    ];
    for (change, message) in cases {
        let mut config = VIT;
        change(&mut config);
        assert_eq!(config.check().unwrap_err().to_string(), *message);
        // The tasks pass on what their encoder says.
        let pretrain = PretrainConfig {
            vit: config,
            ..PRETRAIN
        };
        assert_eq!(pretrain.check().unwrap_err().to_string(), *message);
        let classifier = ClassifierConfig {
            vit: config,
            ..CLASSIFIER
        };
        assert_eq!(classifier.check().unwrap_err().to_string(), *message);
    }
}

/// Each tensor alone can be too large, though each of its sides is fine.
#[test]
fn tensors_have_a_largest_size() {
    type Change = fn(&mut PretrainConfig);
    let cases: &[(Change, &str)] = &[
        (
            |c| (c.vit.img_size, c.vit.patch_size, c.vit.embed_dim) = ([1 << 10; 2], 1, 1 << 15),
            "img_size, the position table",
        ),
        (
            |c| (c.vit.img_size, c.vit.patch_size, c.vit.embed_dim) = ([512; 2], 512, 1 << 15),
            "embed_dim, the patch projection",
        ),
        (|c| c.vit.embed_dim = 3 << 15, "embed_dim, a weight"),
        (
            |c| (c.decoder.embed_dim, c.decoder.num_heads) = (1 << 17, 1),
            "decoder_embed_dim, a weight",
        ),
        (
            |c| {
                (c.decoder.embed_dim, c.decoder.num_heads) = (1 << 13, 1);
                (c.vit.img_size, c.vit.patch_size) = ([1 << 10; 2], 1);
            },
            "decoder_embed_dim, a weight",
        ),
    ];
    for (change, field) in cases {
        let mut config = PRETRAIN;
        config.vit.num_heads = 1;
        change(&mut config);
        match config.check().unwrap_err() {
            ConfigError::Size {
                field: found, max, ..
            } => assert_eq!((found, max), (*field, MAX_ELEMENTS)),
            other => panic!("{other}"),
        }
    }
    let config = ClassifierConfig {
        vit: VitConfig {
            embed_dim: 3 << 12,
            ..VIT
        },
        num_classes: 1 << 20,
        ..CLASSIFIER
    };
    match config.check().unwrap_err() {
        ConfigError::Size { field, max, .. } => {
            assert_eq!((field, max), ("num_classes, the head", MAX_ELEMENTS));
        }
        other => panic!("{other}"),
    }
}

#[test]
fn pretrain_refusals_name_field_expected_and_found() {
    PRETRAIN.check().unwrap();
    type Change = fn(&mut PretrainConfig);
    let cases: &[(Change, &str)] = &[
        (
            |c| c.decoder.embed_dim = 2,
            "decoder_embed_dim: expected 4 to 1048576, found 2",
        ),
        (
            |c| c.decoder.embed_dim = 14,
            "decoder_embed_dim: expected a multiple of 4, as sine and cosine of two axes need (4), found 14",
        ),
        (
            |c| c.decoder.depth = 0,
            "decoder_depth: expected 1 to 64, found 0",
        ),
        (
            |c| c.decoder.depth = usize::MAX,
            "decoder_depth: expected 1 to 64, found 18446744073709551615",
        ),
        (
            |c| c.decoder.num_heads = 0,
            "decoder_num_heads: expected 1 to 16, found 0",
        ),
        (
            |c| c.decoder.num_heads = 3,
            "decoder_embed_dim: expected a multiple of decoder_num_heads (3), found 16",
        ),
        (
            |c| (c.vit.mlp_ratio, c.decoder.embed_dim) = (0.05, 16),
            "mlp_ratio, the decoder's hidden width: expected 1 to 1048576, found 0",
        ),
        (
            |c| c.mask_ratio = f64::NAN,
            "mask_ratio: expected between 0 and 1, found NaN",
        ),
        (
            |c| c.mask_ratio = -0.5,
            "mask_ratio: expected between 0 and 1, found -0.5",
        ),
        (
            |c| c.mask_ratio = 1.5,
            "mask_ratio: expected between 0 and 1, found 1.5",
        ),
        (
            |c| c.mask_ratio = 0.95,
            "mask_ratio: 0.95 leaves no visible patch out of 12; choose a ratio further from the extreme",
        ),
        (
            |c| c.mask_ratio = 0.0,
            "mask_ratio: 0 leaves no masked patch out of 12; choose a ratio further from the extreme",
        ),
        (
            |c| c.target = Target::Teacher(staged(&[0, 1, 2, 3], Budget::Keep(0.5))),
            "keep_ratio: 0.5 leaves no token after the last stage out of 9; choose a ratio further from the extreme",
        ),
        (
            |c| c.target = Target::Teacher(staged(&[0], Budget::Keep(0.0))),
            "keep_ratio: expected more than 0 and at most 1, found 0",
        ),
        (
            |c| c.target = Target::Teacher(staged(&[0], Budget::Keep(1.01))),
            "keep_ratio: expected more than 0 and at most 1, found 1.01",
        ),
        (
            |c| c.target = Target::Teacher(staged(&[0], Budget::Keep(f64::NAN))),
            "keep_ratio: expected more than 0 and at most 1, found NaN",
        ),
        (
            |c| c.target = Target::Teacher(staged(&[1, 4], Budget::Keep(0.9))),
            "drop_layers: expected block numbers from 0 to 3, found 4",
        ),
        (
            |c| {
                let place = Place::OneStage(4);
                c.target = Target::Teacher(Reduction { place, ..REDUCTION });
            },
            "drop_place: expected block numbers from 0 to 3, found 4",
        ),
        (
            |c| {
                (c.vit.img_size, c.vit.patch_size, c.vit.in_chans) = ([3, 4], 1, 1);
                c.target = Target::Pixels { norm_pix: true };
            },
            "patch_size, the elements of a patch: expected 2 to 1048576, found 1",
        ),
    ];
    for (change, message) in cases {
        let mut config = PRETRAIN;
        if message.contains("the decoder's hidden width") {
            // The encoder is wide enough for such a ratio, the decoder is not.
            config.vit.embed_dim = 48;
        }
        change(&mut config);
        assert_eq!(config.check().unwrap_err().to_string(), *message);
    }
}

#[test]
fn classifier_refusals_name_field_expected_and_found() {
    CLASSIFIER.check().unwrap();
    type Change = fn(&mut ClassifierConfig);
    let cases: &[(Change, &str)] = &[
        (
            |c| c.num_classes = 0,
            "num_classes: expected 1 to 1048576, found 0",
        ),
        (
            |c| c.num_classes = 1 << 21,
            "num_classes: expected 1 to 1048576, found 2097152",
        ),
        (
            |c| c.reduction.budget = Budget::Drop(1.0),
            "drop_ratio: expected at least 0 and less than 1, found 1",
        ),
        (
            |c| c.reduction.budget = Budget::Drop(-0.1),
            "drop_ratio: expected at least 0 and less than 1, found -0.1",
        ),
        (
            |c| c.reduction.budget = Budget::Drop(f64::NAN),
            "drop_ratio: expected at least 0 and less than 1, found NaN",
        ),
        (
            |c| c.reduction = staged(&[5], Budget::Drop(0.5)),
            "drop_layers: expected block numbers from 0 to 3, found 5",
        ),
        (
            // What is left is less than the offset that forgives rounding.
            |c| c.reduction = staged(&[0], Budget::Drop(1.0 - 1e-12)),
            "drop_ratio: 0.999999999999 leaves no token after the last stage out of 12; choose a ratio further from the extreme",
        ),
    ];
    for (change, message) in cases {
        let mut config = CLASSIFIER;
        change(&mut config);
        assert_eq!(config.check().unwrap_err().to_string(), *message);
    }
}

/// Presets exist under the names that are listed, pass, and have the sizes of the papers.
#[test]
fn presets() {
    for name in VitConfig::PRESETS {
        let vit = VitConfig::preset(name).unwrap();
        vit.check().unwrap();
        vit.default_decoder().check(&vit).unwrap();
        assert_eq!(vit.default_decoder().embed_dim, vit.embed_dim);
    }
    assert_eq!(VitConfig::preset("vit-b17"), None);
    let count = |name| {
        let vit = VitConfig::preset(name).unwrap();
        let mut count = 0;
        Layout::encoder(&vit).for_each(|tensor| count += tensor.span.len);
        // timm's counts are of models with a trained position table, and without a head.
        count
    };
    assert_eq!(count("vit-ti16"), 5_524_416);
    assert_eq!(count("vit-s16"), 21_665_664);
    assert_eq!(count("vit-b16"), 85_798_656);
    assert_eq!(count("vit-l16"), 303_301_632);
    assert_eq!(count("vit-h14"), 630_764_800);
}

/// `int(n * keep_ratio)` and `int(n * (1 - mask_ratio))` in binary floating point, truncated, as the oracle computes.
#[test]
fn token_counts_as_documented() {
    for (mask_ratio, visible, masked, after) in [
        (0.75, 49, 147, [73, 36, 18]),
        (0.85, 29, 167, [83, 41, 20]),
        (0.90, 19, 177, [88, 44, 22]),
    ] {
        let vit = VitConfig::preset("vit-b16").unwrap();
        let reduction = staged(&[0, 4, 8], Budget::Keep(0.5));
        let config = PretrainConfig {
            vit,
            decoder: vit.default_decoder(),
            mask_ratio,
            target: Target::Teacher(reduction),
        };
        config.check().unwrap();
        assert_eq!((config.visible(), config.masked()), (visible, masked));
        assert_eq!(config.targets(), after[2]);
        let mut left = masked;
        for (block, want) in [0, 4, 8].into_iter().zip(after) {
            left = reduction.stage(Some(block), left).unwrap();
            assert_eq!(left, want);
        }
        // The ablations predict as many positions.
        for place in [Place::Input, Place::OneStage(11)] {
            let reduction = Reduction { place, ..reduction };
            assert_eq!(reduction.remaining(masked, 12), after[2]);
            assert_eq!(reduction.stages(12), 1);
        }
        assert_eq!(reduction.stages(12), 3);
    }
    // 100 * (1 - 0.9) is 9.999…98 in binary.
    assert_eq!(len_keep(100, 0.9), 9);
    assert_eq!(len_keep(10, 0.7), 3);
    assert_eq!(len_keep(7, 0.0), 7);
    // 10 * (1 - 0.9) is 0.999…98 and 50 * (1 - 0.9) 4.99…9: the next whole number, not the one after it.
    for (n, drop_ratio, left) in [(196, 0.1, 177), (49, 0.9, 5), (50, 0.9, 5), (10, 0.7, 3)] {
        assert_eq!(Budget::Drop(drop_ratio).apply(n), left);
    }
    assert_eq!(Budget::Drop(0.0).apply(5), 5);
}

/// A drop ratio of 0 is the dense model; a keep ratio of 1 is a stage that keeps, and sorts, everything.
#[test]
fn stages_that_drop_nothing() {
    assert_eq!(staged(&[0, 2], Budget::Drop(0.0)).stages(4), 0);
    assert_eq!(staged(&[0, 2], Budget::Keep(1.0)).stages(4), 2);
    assert_eq!(staged(&[0, 2], Budget::Keep(1.0)).remaining(9, 4), 9);
    assert_eq!(Reduction::NONE.stages(64), 0);
    assert_eq!(Reduction::NONE.remaining(9, 64), 9);
}

/// A set of blocks is what was put in, in ascending order, each once.
#[test]
fn drop_layers_are_a_set() {
    let layers = DropLayers::new(&[8, 0, 63, 4, 8], 64).unwrap();
    assert_eq!(layers.iter().collect::<Vec<_>>(), [0, 4, 8, 63]);
    assert_eq!(layers.len(), 4);
    assert!(layers.contains(63) && !layers.contains(64) && !layers.contains(usize::MAX));
    assert!(DropLayers::NONE.is_empty() && !layers.is_empty());
    for (blocks, depth) in [([12], 12), ([64], 100), ([0], 0)] {
        let error = DropLayers::new(&blocks, depth).unwrap_err();
        assert!(matches!(error, ConfigError::Block { found, .. } if found == blocks[0]));
    }
}

#[test]
fn stage_presets() {
    let blocks = |layout| {
        let layers = DropLayers::preset(layout, 3, 12).unwrap();
        layers.iter().collect::<Vec<_>>()
    };
    assert_eq!(blocks(StageLayout::Starts), [0, 4, 8]);
    assert_eq!(blocks(StageLayout::Ends), [3, 7, 11]);
    assert_eq!(blocks(StageLayout::Even), [2, 5, 8]);
    assert_eq!(blocks(StageLayout::First), [0, 1, 2]);
    for layout in [
        StageLayout::Starts,
        StageLayout::Ends,
        StageLayout::Even,
        StageLayout::First,
    ] {
        for depth in 1..=MAX_DEPTH {
            for stages in 1..=depth {
                let layers = DropLayers::preset(layout, stages, depth).unwrap();
                assert_eq!(layers.len(), stages, "{layout:?} {stages} of {depth}");
                assert!(layers.iter().all(|block| block < depth));
                // Parts start with the first block and end with the last, whether or not they are of one length.
                assert!(layout != StageLayout::Starts || layers.contains(0));
                assert!(layout != StageLayout::Ends || layers.contains(depth - 1));
            }
            let error = DropLayers::preset(layout, depth + 1, depth).unwrap_err();
            assert!(matches!(
                error,
                ConfigError::Size {
                    field: "drop_layers, the number of stages",
                    ..
                }
            ));
        }
        for (stages, depth) in [(0, 3), (1, 0), (1, 65), (1, usize::MAX), (usize::MAX, 64)] {
            DropLayers::preset(layout, stages, depth).unwrap_err();
        }
    }
}

/// Sizes from everywhere, near the bounds most of all.
fn size() -> impl Strategy<Value = usize> {
    prop_oneof![
        4 => 0..70usize,
        4 => (0..64u32).prop_map(|shift| 1usize << shift),
        2 => ((0..64u32), 0..4usize).prop_map(|(shift, less)| (1usize << shift).wrapping_sub(less)),
        1 => Just(usize::MAX),
        1 => any::<usize>(),
    ]
}

fn ratio() -> impl Strategy<Value = f64> {
    prop_oneof![4 => 0.0..=1.0, 1 => 0.0..2000.0, 1 => proptest::num::f64::ANY]
}

fn any_vit() -> impl Strategy<Value = VitConfig> {
    let sizes = (size(), size(), size(), size());
    (sizes, size(), size(), size(), ratio()).prop_map(
        |((height, width, in_chans, patch_size), embed_dim, depth, num_heads, mlp_ratio)| {
            VitConfig {
                img_size: [height, width],
                in_chans,
                patch_size,
                embed_dim,
                depth,
                num_heads,
                mlp_ratio,
            }
        },
    )
}

/// Multiples of what they must be multiples of, so that most pass all but the bounds.
fn plausible_vit() -> impl Strategy<Value = VitConfig> {
    let power = |most: u32| (0..=most).prop_map(|shift| 1usize << shift);
    let sizes = (power(12), power(10), power(10), 1..1025usize);
    (sizes, power(20), 0..4u32, 1..65usize, 0.001..1024.0f64).prop_map(
        |((patch_size, rows, cols, in_chans), embed_dim, heads, depth, mlp_ratio)| VitConfig {
            img_size: [patch_size * rows, patch_size * cols],
            in_chans,
            patch_size,
            embed_dim,
            depth,
            num_heads: 1 << heads,
            mlp_ratio,
        },
    )
}

fn any_reduction() -> impl Strategy<Value = Reduction> {
    let place = prop_oneof![
        Just(Place::Progressive),
        Just(Place::Input),
        size().prop_map(Place::OneStage)
    ];
    let budget = prop_oneof![
        ratio().prop_map(Budget::Keep),
        ratio().prop_map(Budget::Drop)
    ];
    let layers = prop::collection::vec(0..64usize, 0..6);
    (place, budget, layers).prop_map(|(place, budget, layers)| Reduction {
        place,
        ..staged(&layers, budget)
    })
}

fn any_pretrain() -> impl Strategy<Value = PretrainConfig> {
    let vit = prop_oneof![any_vit(), plausible_vit()];
    let target = prop_oneof![
        any_reduction().prop_map(Target::Teacher),
        any::<bool>().prop_map(|norm_pix| Target::Pixels { norm_pix })
    ];
    let decoder =
        (size(), size(), size()).prop_map(|(embed_dim, depth, num_heads)| DecoderConfig {
            embed_dim,
            depth,
            num_heads,
        });
    (vit, prop::option::of(decoder), ratio(), target).prop_map(
        |(vit, decoder, mask_ratio, target)| PretrainConfig {
            vit,
            decoder: decoder.unwrap_or(vit.default_decoder()),
            mask_ratio,
            target,
        },
    )
}

/// The spans of `layout` follow each other without a wrap, up to its length.
fn check_layout(layout: &Layout) {
    let mut end = 0;
    layout.for_each(|tensor| {
        assert_eq!(tensor.span.start, end);
        end += tensor.span.len;
    });
    assert_eq!(end, layout.len());
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 4000, failure_persistence: None, ..ProptestConfig::default() })]

    /// No check panics, whatever it is given; what passes can be laid out, counted and planned without overflow.
    #[test]
    fn checks_never_panic(config in any_pretrain(), num_classes in size(), reduction in any_reduction()) {
        let vit = config.vit;
        let classifier = ClassifierConfig { vit, num_classes, pool: Pool::Mean, reduction };
        let _ = config.decoder.check(&vit);
        let _ = reduction.check(num_classes, config.decoder.depth);
        if vit.check().is_ok() {
            check_layout(&Layout::encoder(&vit));
            type B = Reference<f32, Heap<f32>>;
            for batch in [1, num_classes, usize::MAX] {
                Vit::<B>::plan(&vit, batch, vit.num_patches(), true);
            }
        }
        if config.check().is_ok() {
            check_layout(&Layout::pretrain(&config));
            let step = flops::Step::new(&config);
            prop_assert!(step.total() > step.teacher);
            prop_assert!(config.targets() > 0 && config.targets() <= config.masked());
            prop_assert_eq!(config.visible() + config.masked(), vit.num_patches());
        }
        if classifier.check().is_ok() {
            check_layout(&Layout::classifier(&classifier));
            prop_assert!(flops::classifier(&classifier) > 0);
        }
    }

    /// Against the oracle's formulas, in the same f64 arithmetic.
    #[test]
    fn budgets_as_python_computes_them(n in 0..5000usize, percent in 0..=100u32, fine in 0.0..1.0f64) {
        for ratio in [f64::from(percent) / 100.0, fine] {
            prop_assert_eq!(Budget::Keep(ratio).apply(n), (n as f64 * ratio).trunc() as usize);
            prop_assert_eq!(len_keep(n, ratio), (n as f64 * (1.0 - ratio)).trunc() as usize);
            let ceil = (n as f64 * (1.0 - ratio) - 1e-9).ceil().max(0.0) as usize;
            prop_assert_eq!(Budget::Drop(ratio).apply(n), ceil);
        }
        // In whole per cent the result is that of exact arithmetic: the offset forgives every rounding.
        let exact = (n * (100 - percent as usize)).div_ceil(100);
        prop_assert_eq!(Budget::Drop(f64::from(percent) / 100.0).apply(n), exact);
    }
}

/// The largest configurations that pass are still counted without overflow.
#[test]
fn multiply_adds_of_the_largest_models() {
    let mut largest = 0;
    for shift in 2..=20 {
        for (rows, cols) in [(1 << 10, 1 << 10), (1 << 8, 1 << 8), (1, 1)] {
            for mlp_ratio in [0.5, 4.0, 16.0, 1024.0] {
                let vit = VitConfig {
                    img_size: [rows, cols],
                    in_chans: 1,
                    patch_size: 1,
                    embed_dim: 1 << shift,
                    depth: MAX_DEPTH,
                    num_heads: 1,
                    mlp_ratio,
                };
                let config = PretrainConfig {
                    vit,
                    decoder: DecoderConfig {
                        depth: MAX_DEPTH,
                        ..vit.default_decoder()
                    },
                    mask_ratio: 1e-5,
                    target: Target::Pixels { norm_pix: false },
                };
                if config.check().is_ok() {
                    largest = largest.max(flops::Step::new(&config).total());
                    check_layout(&Layout::pretrain(&config));
                }
            }
        }
    }
    assert!(largest > 1 << 60, "the bounds are nearly reached");
}
