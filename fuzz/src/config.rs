use std::collections::BTreeSet;

use arbitrary::{Result, Unstructured};
use pcae_kernel::config::{
    Budget, ClassifierConfig, ConfigError, Criterion, DecoderConfig, DropLayers, MAX_DEPTH,
    MAX_ELEMENTS, MAX_SIZE, Place, Pool, PretrainConfig, Reduction, StageLayout, Target, VitConfig,
};
use pcae_kernel::flops;
use pcae_kernel::layout::Layout;
use pcae_kernel::model::Classifier;
use pcae_kernel::reference::{Heap, Reference};

/// Checks a configuration with arbitrary fields, and computes every size of those that pass.
///
/// Oracle: checking never panics; what passes has the token counts, the tensors and the multiply-adds that a naive
/// computation in `u128` gives, and tensors that lie one after the other.
pub fn config(bytes: &[u8]) {
    let u = &mut Unstructured::new(bytes);
    let Ok((pretrain, classifier, batch)) = configs(u) else {
        return;
    };
    match pretrain.check() {
        Ok(()) => check_pretrain(&pretrain),
        Err(error) => check_message(error),
    }
    match classifier.check() {
        Ok(()) => check_classifier(&classifier, batch),
        Err(error) => check_message(error),
    }
}

/// The configurations that the bytes stand for, and a batch size.
pub(crate) fn configs(
    u: &mut Unstructured<'_>,
) -> Result<(PretrainConfig, ClassifierConfig, usize)> {
    let patch_size = size(u)?;
    let edge = |u: &mut Unstructured<'_>| {
        let edge = patch_size.wrapping_mul(size(u)?);
        Ok(if u.ratio(1, 16)? {
            edge.wrapping_add(1)
        } else {
            edge
        })
    };
    let img_size = [edge(u)?, edge(u)?];
    let [embed_dim, depth, num_heads] = trunk(u)?;
    let vit = VitConfig {
        img_size,
        in_chans: size(u)?,
        patch_size,
        embed_dim,
        depth,
        num_heads,
        mlp_ratio: if u.arbitrary()? { 4.0 } else { ratio(u)? },
    };
    let reduction = reduction(u, depth)?;
    let decoder = if u.arbitrary()? {
        vit.default_decoder()
    } else {
        let [embed_dim, depth, num_heads] = trunk(u)?;
        DecoderConfig {
            embed_dim,
            depth,
            num_heads,
        }
    };
    let target = if u.arbitrary()? {
        Target::Teacher(reduction)
    } else {
        Target::Pixels {
            norm_pix: u.arbitrary()?,
        }
    };
    let pretrain = PretrainConfig {
        vit,
        decoder,
        mask_ratio: ratio(u)?,
        target,
    };
    let classifier = ClassifierConfig {
        vit,
        num_classes: size(u)?,
        pool: Pool::Mean,
        reduction,
    };
    Ok((pretrain, classifier, u.arbitrary()?))
}

/// Width, depth and heads.
fn trunk(u: &mut Unstructured<'_>) -> Result<[usize; 3]> {
    let num_heads = size(u)?;
    let embed_dim = if u.ratio(15, 16)? {
        num_heads.wrapping_mul(size(u)?)
    } else {
        size(u)?
    };
    Ok([
        embed_dim,
        if u.arbitrary()? {
            u.int_in_range(0..=MAX_DEPTH + 1)?
        } else {
            size(u)?
        },
        num_heads,
    ])
}

fn size(u: &mut Unstructured<'_>) -> Result<usize> {
    Ok(match u.int_in_range(0..=7)? {
        0..=2 => u.int_in_range(0..=32)?,
        3 => u.int_in_range(0..=MAX_SIZE + 1)?,
        4 | 5 => 1 << u.int_in_range(0..=20)?,
        6 => 3 << u.int_in_range(0..=19)?,
        _ => u.arbitrary()?,
    })
}

fn ratio(u: &mut Unstructured<'_>) -> Result<f64> {
    Ok(match u.int_in_range(0..=3)? {
        0 | 1 => f64::from(u.int_in_range(0..=100)?) / 100.0,
        2 => *u.choose(&[
            0.0,
            -0.0,
            1.0,
            4.0,
            1024.0,
            1.0 - f64::EPSILON / 2.0,
            f64::MIN_POSITIVE,
            f64::NAN,
            f64::INFINITY,
        ])?,
        _ => f64::from_bits(u.arbitrary()?),
    })
}

fn reduction(u: &mut Unstructured<'_>, depth: usize) -> Result<Reduction> {
    let drop_layers = if u.arbitrary()? {
        let layouts = [
            StageLayout::Starts,
            StageLayout::Ends,
            StageLayout::Even,
            StageLayout::First,
        ];
        let (layout, stages) = (*u.choose(&layouts)?, size(u)?);
        match DropLayers::preset(layout, stages, depth) {
            Ok(set) => {
                assert!(
                    set.len() == stages && set.iter().all(|block| block < depth),
                    "{set:?}"
                );
                set
            }
            Err(error) => {
                check_message(error);
                DropLayers::NONE
            }
        }
    } else {
        let bits: u64 = u.arbitrary()?;
        let blocks: Vec<usize> = (0..MAX_DEPTH)
            .filter(|&block| bits >> block & 1 == 1)
            .collect();
        let set = DropLayers::new(&blocks, MAX_DEPTH).expect("every block is below the depth");
        assert!(set.iter().eq(blocks), "{set:?}");
        set
    };
    Ok(Reduction {
        criterion: *u.choose(&[
            Criterion::MeanSimilarity,
            Criterion::Random,
            Criterion::PivotedQr,
        ])?,
        place: match u.int_in_range(0..=2)? {
            0 => Place::Progressive,
            1 => Place::OneStage(size(u)?),
            _ => Place::Input,
        },
        drop_layers,
        budget: if u.arbitrary()? {
            Budget::Keep(ratio(u)?)
        } else {
            Budget::Drop(ratio(u)?)
        },
    })
}

fn check_message(error: ConfigError) {
    let message = error.to_string();
    assert!(!message.is_empty() && !message.contains('\n'), "{message}");
}

fn check_pretrain(config: &PretrainConfig) {
    let vit = &config.vit;
    let patches = patches(vit);
    let visible = (patches as f64 * (1.0 - config.mask_ratio)) as u128;
    let masked = patches - visible;
    assert!(visible > 0 && masked > 0);
    assert_eq!(
        (config.visible() as u128, config.masked() as u128),
        (visible, masked)
    );
    let (teacher, targets, target_dim) = match config.target {
        Target::Teacher(reduction) => {
            let tokens = tokens(&reduction, masked, vit.depth);
            check_reduction(&reduction, masked, vit.depth);
            (
                encoder(vit, 0, masked, &tokens),
                tokens[vit.depth],
                vit.embed_dim as u128,
            )
        }
        Target::Pixels { .. } => (0, masked, patch_len(vit)),
    };
    assert!(targets > 0);
    assert_eq!(config.targets() as u128, targets);
    assert_eq!(config.target_dim() as u128, target_dim);

    let (d, e) = (vit.embed_dim as u128, config.decoder.embed_dim as u128);
    let decoder_hidden = hidden(config.decoder.embed_dim, vit.mlp_ratio);
    let decoder = (visible + 1) * d * e
        + config.decoder.depth as u128 * block(1 + visible + targets, e, decoder_hidden)
        + targets * e * target_dim;
    let student = encoder(vit, 1, visible, &vec![visible; vit.depth + 1]);
    let step = flops::Step::new(config);
    assert_eq!(
        [step.student, step.decoder, step.teacher, step.total()].map(u128::from),
        [student, decoder, teacher, 3 * (student + decoder) + teacher].map(saturated),
    );

    let tail = e
        + (1 + patches) * e
        + (d + 1) * e
        + trunk_len(e, decoder_hidden, config.decoder.depth)
        + 2 * e
        + (e + 1) * target_dim;
    check_layout(&Layout::pretrain(config), encoder_len(vit), tail);
}

fn check_classifier(config: &ClassifierConfig, batch: usize) {
    let vit = &config.vit;
    let (d, classes) = (vit.embed_dim as u128, config.num_classes as u128);
    let tokens = tokens(&config.reduction, patches(vit), vit.depth);
    check_reduction(&config.reduction, patches(vit), vit.depth);
    let want = encoder(vit, 1, patches(vit), &tokens) + d * classes;
    assert_eq!(u128::from(flops::classifier(config)), saturated(want));
    check_layout(
        &Layout::classifier(config),
        encoder_len(vit),
        (d + 1) * classes,
    );

    let plan = Classifier::<Reference<f32, Heap<f32>>>::plan(config, batch);
    let batch = batch as u128;
    let widest = (3 * d)
        .max(hidden(vit.embed_dim, vit.mlp_ratio))
        .max(patch_len(vit));
    let floats = (1 + patches(vit)) * (2 * d + widest) + patches(vit) + 2 * d + classes;
    let fits = |want: u128| usize::try_from(want).unwrap_or(usize::MAX);
    assert_eq!(plan.floats, fits(batch.saturating_mul(floats)));
    assert_eq!(plan.ids, fits(batch * 3 * patches(vit)));
}

/// Each tensor follows the one before and has as many elements as its shape says; together they are all there are.
fn check_layout(layout: &Layout, encoder: u128, tail: u128) {
    let (mut at, mut names) = (0, BTreeSet::new());
    layout.for_each(|tensor| {
        let elements: u128 = tensor.shape().iter().map(|&n| n as u128).product();
        assert_eq!(
            (tensor.span.start as u128, tensor.span.len as u128),
            (at, elements),
            "{}",
            tensor.name
        );
        assert!(
            (1..=MAX_ELEMENTS as u128).contains(&elements),
            "{}: {elements}",
            tensor.name
        );
        at += elements;
        assert!(
            names.insert(tensor.name.to_string()),
            "{} twice",
            tensor.name
        );
    });
    assert_eq!((at, layout.len() as u128), (encoder + tail, encoder + tail));
    assert_eq!(layout.encoder_len() as u128, encoder);
    let last = names.last().expect("there are tensors");
    assert_eq!(
        layout
            .find(last)
            .map(|tensor| tensor.name.to_string())
            .as_ref(),
        Some(last)
    );
}

fn check_reduction(reduction: &Reduction, n: u128, depth: usize) {
    let tokens = tokens(reduction, n, depth);
    assert!(tokens[depth] > 0, "{reduction:?} leaves nothing of {n}");
    assert!(tokens.is_sorted_by(|a, b| a >= b), "{tokens:?}");
    assert_eq!(
        reduction.remaining(n as usize, depth) as u128,
        tokens[depth]
    );
    assert!(reduction.stages(depth) <= depth + 1);
}

/// Tokens that enter each of `depth` blocks, and those that are left.
fn tokens(reduction: &Reduction, n: u128, depth: usize) -> Vec<u128> {
    let once = |n: u128| match reduction.budget {
        Budget::Keep(ratio) => (n as f64 * ratio) as u128,
        Budget::Drop(0.0) => n,
        Budget::Drop(ratio) => (n as f64 * (1.0 - ratio) - 1e-9).ceil() as u128,
    };
    let all = |n: u128| (0..reduction.drop_layers.len()).fold(n, |n, _| once(n));
    let mut left = if reduction.place == Place::Input {
        all(n)
    } else {
        n
    };
    let mut tokens = vec![left];
    for block in 0..depth {
        left = match reduction.place {
            Place::Progressive if reduction.drop_layers.contains(block) => once(left),
            Place::OneStage(at) if at == block => all(left),
            _ => left,
        };
        tokens.push(left);
    }
    tokens
}

fn patches(vit: &VitConfig) -> u128 {
    (vit.img_size[0] / vit.patch_size) as u128 * (vit.img_size[1] / vit.patch_size) as u128
}

fn patch_len(vit: &VitConfig) -> u128 {
    vit.in_chans as u128 * (vit.patch_size as u128).pow(2)
}

fn hidden(dim: usize, mlp_ratio: f64) -> u128 {
    (dim as f64 * mlp_ratio) as u128
}

/// Multiply-adds of a block: queries, keys and values; scores; mixing; projection; MLP.
fn block(n: u128, d: u128, hidden: u128) -> u128 {
    n * d * 3 * d + n * n * d + n * n * d + n * d * d + n * d * hidden + n * hidden * d
}

fn encoder(vit: &VitConfig, prefix: u128, patches: u128, tokens: &[u128]) -> u128 {
    let (d, hidden) = (vit.embed_dim as u128, hidden(vit.embed_dim, vit.mlp_ratio));
    let blocks: u128 = tokens[..vit.depth]
        .iter()
        .map(|&n| block(prefix + n, d, hidden))
        .sum();
    patches * patch_len(vit) * d + blocks
}

/// Multiply-adds are counted in 64 bits; what exceeds them reads as the most there is.
fn saturated(count: u128) -> u128 {
    count.min(u64::MAX.into())
}

fn trunk_len(d: u128, hidden: u128, depth: usize) -> u128 {
    let norms = 4 * d;
    depth as u128 * (norms + (d + 1) * 3 * d + (d + 1) * d + (d + 1) * hidden + (hidden + 1) * d)
}

fn encoder_len(vit: &VitConfig) -> u128 {
    let d = vit.embed_dim as u128;
    let tokens = d + (1 + patches(vit)) * d;
    tokens
        + (patch_len(vit) + 1) * d
        + trunk_len(d, hidden(vit.embed_dim, vit.mlp_ratio), vit.depth)
        + 2 * d
}
