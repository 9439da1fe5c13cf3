//! Every operation of the reference on dimensions, spans, indices and buffers that fit or do not: it answers `Ok` or
//! `Err`, never panics, never takes long over nothing, and after an `Err` every buffer is as it was.

use pcae_kernel::backend::{
    Accum, AdamW, AttentionDims, Backend, Clip, DecoderDims, EmbedParams, Epilogue, Linear,
    LinearDims, Norm, PatchDims, PixelDims, Pixels, RowDims, Segment, Span, TokenDims,
    TrainBackend,
};
use pcae_kernel::error::Error;
use pcae_kernel::reference::{Heap, Reference};
use pcae_kernel::resize::Crop;
use proptest::array::{uniform4, uniform6};
use proptest::prelude::*;

type Single = Reference<f32, Heap<f32>>;

/// The arguments of one call. Each operation takes what it needs.
#[derive(Clone, Debug)]
struct Case {
    /// Dimensions.
    n: [usize; 6],
    spans: [Span; 4],
    flag: bool,
    /// Position in a vector.
    at: usize,
}

/// Every buffer that a call may touch.
#[derive(Clone, Debug)]
struct Memory {
    floats: [Vec<f32>; 6],
    ids: [Vec<u32>; 4],
}

impl Memory {
    /// Bits, so that a NaN equals itself.
    fn bits(&self) -> (Vec<Vec<u32>>, &[Vec<u32>; 4]) {
        let bits = |x: &Vec<f32>| x.iter().map(|x| x.to_bits()).collect();
        (self.floats.iter().map(bits).collect(), &self.ids)
    }
}

impl Case {
    const fn rows(&self) -> RowDims {
        RowDims {
            rows: self.n[0],
            dim: self.n[1],
        }
    }

    const fn linear(&self) -> LinearDims {
        LinearDims {
            rows: self.n[0],
            in_features: self.n[1],
            out_features: self.n[2],
        }
    }

    const fn tokens(&self) -> TokenDims {
        TokenDims {
            batch: self.n[0],
            prefix: self.n[1],
            tokens: self.n[2],
            dim: self.n[3],
        }
    }

    const fn decoder(&self) -> DecoderDims {
        DecoderDims {
            batch: self.n[0],
            visible: self.n[1],
            targets: self.n[2],
            dim: self.n[3],
        }
    }

    const fn attention(&self) -> AttentionDims {
        AttentionDims {
            batch: self.n[0],
            tokens: self.n[1],
            num_heads: self.n[2],
            head_dim: self.n[3],
        }
    }

    const fn patches(&self) -> PatchDims {
        PatchDims {
            batch: self.n[0],
            channels: self.n[1],
            height: self.n[2],
            width: self.n[3],
            patch_size: self.n[4],
            taken: self.n[5],
        }
    }

    const fn layer(&self) -> Linear {
        Linear {
            weight: self.spans[0],
            bias: self.spans[1],
        }
    }

    const fn norm(&self) -> Norm {
        Norm {
            weight: self.spans[0],
            bias: self.spans[1],
        }
    }

    fn embed(&self) -> EmbedParams {
        EmbedParams {
            cls_token: self.flag.then_some(self.spans[0]),
            pos_embed: self.spans[1],
        }
    }

    const fn keep(&self) -> usize {
        self.n[4]
    }
}

type Operation = fn(&mut Single, &Case, &mut Memory) -> Result<(), Error>;

const OPERATIONS: &[(&str, Operation)] = &[
    ("write", |be, _, m| {
        let [a, b, ..] = &mut m.floats;
        be.write(a, b)
    }),
    ("read", |be, _, m| {
        let [a, b, ..] = &mut m.floats;
        be.read(a, b)
    }),
    ("write_ids", |be, _, m| {
        let [a, b, ..] = &mut m.ids;
        be.write_ids(a, b)
    }),
    ("read_ids", |be, _, m| {
        let [a, b, ..] = &mut m.ids;
        be.read_ids(a, b)
    }),
    ("gather_patches", |be, c, m| {
        let [a, b, ..] = &mut m.floats;
        be.gather_patches(c.patches(), a, b, c.flag.then_some(&m.ids[0]))
    }),
    ("pixel_targets", |be, c, m| {
        let [a, b, ..] = &mut m.floats;
        be.pixel_targets(c.patches(), a, b, &m.ids[0])
    }),
    ("embed_tokens", |be, c, m| {
        let [a, b, p, ..] = &mut m.floats;
        let ids = (c.at > 1).then_some(&m.ids[0]);
        be.embed_tokens(c.tokens(), a, b, ids, p, c.embed())
    }),
    ("linear", |be, c, m| {
        let [a, b, p, ..] = &mut m.floats;
        let epilogues = [
            Epilogue::Bias,
            Epilogue::BiasQkv,
            Epilogue::BiasGelu,
            Epilogue::BiasResidual,
        ];
        be.linear(c.linear(), a, b, p, c.layer(), epilogues[c.at % 4])
    }),
    ("layer_norm", |be, c, m| {
        let [a, b, p, ..] = &mut m.floats;
        be.layer_norm(c.rows(), a, b, p, c.norm())
    }),
    ("attention", |be, c, m| {
        let [a, b, ..] = &mut m.floats;
        be.attention(c.attention(), a, b)
    }),
    ("mean_similarity", |be, c, m| {
        let [a, b, ..] = &mut m.floats;
        be.mean_similarity(c.tokens(), a, b)
    }),
    ("select", |be, c, m| {
        be.select(c.n[0], c.n[1], c.n[2], &mut m.ids[0], &m.floats[0])
    }),
    ("gather_tokens", |be, c, m| {
        let [a, b, ..] = &mut m.floats;
        be.gather_tokens(c.tokens(), c.keep(), a, b, &m.ids[0])
    }),
    ("gather_ids", |be, c, m| {
        let [out, ids, picked, _] = &mut m.ids;
        let ids = c.flag.then_some(&*ids);
        be.gather_ids(c.n[0], c.n[1], c.n[2], out, ids, picked)
    }),
    ("mean_pool", |be, c, m| {
        let [a, b, ..] = &mut m.floats;
        be.mean_pool(c.tokens(), a, b)
    }),
    ("write_vector", |be, c, m| {
        let [a, b, ..] = &mut m.floats;
        be.write_vector(a, c.at, b)
    }),
    ("read_vector", |be, c, m| {
        let [a, b, ..] = &mut m.floats;
        be.read_vector(a, b, c.at)
    }),
    ("read_params", |be, c, m| {
        let [a, b, ..] = &mut m.floats;
        be.read_params(a, b, c.spans[0])
    }),
    ("linear_gelu_saving", |be, c, m| {
        let [a, b, x, p, ..] = &mut m.floats;
        be.linear_gelu_saving(c.linear(), a, b, x, p, c.layer())
    }),
    ("linear_residual", |be, c, m| {
        let [out, residual, x, p, scale, _] = &mut m.floats;
        let scale = c.flag.then_some((&*scale, c.at));
        be.linear_residual(c.linear(), out, residual, x, p, c.layer(), scale)
    }),
    ("scale_rows", |be, c, m| {
        let [out, x, scale, ..] = &mut m.floats;
        be.scale_rows(c.rows(), out, x, scale, c.at)
    }),
    ("linear_backward_input", |be, c, m| {
        let [d_x, d_y, p, pre, ..] = &mut m.floats;
        let pre = c.flag.then_some(&*pre);
        be.linear_backward_input(c.linear(), d_x, d_y, p, c.layer(), pre)
    }),
    ("linear_backward_params", |be, c, m| {
        let [grads, d_y, x, ..] = &mut m.floats;
        be.linear_backward_params(c.linear(), grads, c.layer(), d_y, x)
    }),
    ("layer_norm_saving", |be, c, m| {
        let [out, stats, x, p, ..] = &mut m.floats;
        be.layer_norm_saving(c.rows(), out, stats, x, p, c.norm())
    }),
    ("layer_norm_backward", |be, c, m| {
        let [d_x, grads, d_y, x, stats, p] = &mut m.floats;
        let accum = if c.flag { Accum::Add } else { Accum::Replace };
        be.layer_norm_backward(c.rows(), d_x, accum, grads, d_y, x, stats, p, c.norm())
    }),
    ("attention_saving", |be, c, m| {
        let [out, lse, qkv, ..] = &mut m.floats;
        be.attention_saving(c.attention(), out, lse, qkv)
    }),
    ("attention_backward", |be, c, m| {
        let [d_qkv, d_out, qkv, out, lse, _] = &mut m.floats;
        be.attention_backward(c.attention(), d_qkv, d_out, qkv, out, lse)
    }),
    ("embed_tokens_backward", |be, c, m| {
        let [d_x, grads, d_out, ..] = &mut m.floats;
        be.embed_tokens_backward(c.tokens(), d_x, grads, d_out, c.embed())
    }),
    ("decoder_tokens", |be, c, m| {
        let [out, x, p, ..] = &mut m.floats;
        let [visible, targets, ..] = &m.ids;
        let [mask_token, pos_embed, ..] = c.spans;
        be.decoder_tokens(
            c.decoder(),
            out,
            x,
            visible,
            targets,
            p,
            mask_token,
            pos_embed,
        )
    }),
    ("decoder_tokens_backward", |be, c, m| {
        let [d_x, grads, d_out, ..] = &mut m.floats;
        be.decoder_tokens_backward(c.decoder(), d_x, grads, d_out, c.spans[0])
    }),
    ("strip_prefix", |be, c, m| {
        let [a, b, ..] = &mut m.floats;
        be.strip_prefix(c.tokens(), a, b)
    }),
    ("strip_prefix_backward", |be, c, m| {
        let [a, b, ..] = &mut m.floats;
        be.strip_prefix_backward(c.tokens(), a, b)
    }),
    ("gather_tokens_backward", |be, c, m| {
        let [a, b, ..] = &mut m.floats;
        be.gather_tokens_backward(c.tokens(), c.keep(), a, b, &m.ids[0])
    }),
    ("mean_pool_backward", |be, c, m| {
        let [a, b, ..] = &mut m.floats;
        be.mean_pool_backward(c.tokens(), a, b)
    }),
    ("pivoted_qr_scores", |be, c, m| {
        let [a, b, ..] = &mut m.floats;
        be.pivoted_qr_scores(c.tokens(), a, b)
    }),
    ("standardise", |be, c, m| {
        let [a, b, ..] = &mut m.floats;
        be.standardise(c.rows(), a, b)
    }),
    ("feature_spread", |be, c, m| {
        let [a, b, ..] = &mut m.floats;
        be.feature_spread(c.rows(), a, c.at, b)
    }),
    ("cosine_loss", |be, c, m| {
        let [d, losses, pred, target, ..] = &mut m.floats;
        be.cosine_loss(c.rows(), d, losses, c.at, pred, target, 0.5)
    }),
    ("mse_loss", |be, c, m| {
        let [d, losses, pred, target, ..] = &mut m.floats;
        be.mse_loss(c.rows(), d, losses, c.at, pred, target, 0.5)
    }),
    ("cross_entropy", |be, c, m| {
        let [d, losses, pred, target, ..] = &mut m.floats;
        be.cross_entropy(c.rows(), d, losses, c.at, pred, target, 0.5)
    }),
    ("zero", |be, c, m| be.zero(&mut m.floats[0], c.spans[0])),
    ("norm", |be, c, m| {
        let [out, x, ..] = &mut m.floats;
        be.norm(out, c.at, x)
    }),
    ("adamw_ema", |be, c, m| {
        let [student, teacher, grads, m1, m2, norms] = &mut m.floats;
        let segment = |span| Segment {
            span,
            weight_decay: 0.1,
            lr_scale: 1.0,
            ema: c.at % 2 == 0,
        };
        let step = AdamW {
            lr: 0.1,
            beta1: 0.9,
            beta2: 0.95,
            eps: 1e-8,
            step: c.n[0] as u64,
            momentum: 0.9,
        };
        let clip = (c.n[1] % 2 == 0).then_some(Clip {
            norms,
            at: c.at,
            max_norm: 1.0,
        });
        let teacher = c.flag.then_some(teacher);
        let segments = [segment(c.spans[0]), segment(c.spans[1])];
        be.adamw_ema(student, teacher, grads, m1, m2, &segments, &step, clip)
    }),
];

/// Mostly sizes that fit, some that no memory holds, and pairs of those whose product overflows to something small.
fn size() -> impl Strategy<Value = usize> {
    prop_oneof![
        12 => 0..5usize,
        1 => Just(1 << 32),
        1 => Just(1 << 63),
        1 => Just(usize::MAX),
        1 => Just(usize::MAX / 3 + 1),
    ]
}

fn any_span() -> impl Strategy<Value = Span> {
    let span = |(start, len)| Span { start, len };
    prop_oneof![
        8 => (0..40usize, 0..40usize).prop_map(span),
        1 => (size(), size()).prop_map(span),
    ]
}

fn case() -> impl Strategy<Value = Case> {
    let at = prop_oneof![9 => 0..4usize, 1 => size()];
    (uniform6(size()), uniform4(any_span()), any::<bool>(), at)
        .prop_map(|(n, spans, flag, at)| Case { n, spans, flag, at })
}

fn float() -> impl Strategy<Value = f32> {
    prop_oneof![30 => -4.0..4.0f32, 2 => Just(0.0), 1 => proptest::num::f32::ANY]
}

fn memory() -> impl Strategy<Value = Memory> {
    // Lengths that are empty, a little too short or long enough for the sizes above.
    let lengths = || prop_oneof![1 => Just(0..1usize), 2 => Just(1..30), 5 => Just(300..400)];
    let floats = lengths().prop_flat_map(|len| prop::collection::vec(float(), len));
    let ids = lengths().prop_flat_map(|len| {
        let id = prop_oneof![60 => 0..3u32, 1 => any::<u32>()];
        prop::collection::vec(id, len)
    });
    (uniform6(floats), uniform4(ids)).prop_map(|(floats, ids)| Memory { floats, ids })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 800, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn operations_refuse_what_does_not_fit(case in case(), memory in memory()) {
        for (name, operation) in OPERATIONS {
            let mut after = memory.clone();
            let run = std::panic::AssertUnwindSafe(|| operation(&mut Single::owned(), &case, &mut after));
            let result = std::panic::catch_unwind(run);
            prop_assert!(result.is_ok(), "{name} panicked");
            if result.is_ok_and(|result| result.is_err()) {
                prop_assert_eq!(memory.bits(), after.bits(), "{} wrote before it refused", name);
            }
        }
    }
}

/// Which operations the strategies above make succeed and fail: all of both, else the property says nothing about them.
#[test]
fn every_operation_is_seen_to_work_and_to_refuse() {
    use proptest::strategy::ValueTree;
    use proptest::test_runner::TestRunner;
    let mut runner = TestRunner::deterministic();
    let mut seen = vec![[0; 2]; OPERATIONS.len()];
    for _ in 0..1500 {
        let case = case().new_tree(&mut runner).unwrap().current();
        let memory = memory().new_tree(&mut runner).unwrap().current();
        for ((_, operation), seen) in OPERATIONS.iter().zip(&mut seen) {
            let result = operation(&mut Single::owned(), &case, &mut memory.clone());
            seen[usize::from(result.is_ok())] += 1;
        }
    }
    for ((name, _), seen) in OPERATIONS.iter().zip(seen) {
        assert!(
            seen[0] > 0 && seen[1] > 0,
            "{name}: refused, worked: {seen:?}"
        );
    }
}

/// An index out of range is refused by name, wherever it stands.
#[test]
fn indices_out_of_range_are_named() {
    let dims = TokenDims {
        batch: 2,
        prefix: 1,
        tokens: 3,
        dim: 2,
    };
    let (mut out, x) = (vec![7.0; 12], vec![1.0; 16]);
    let error = Single::owned().gather_tokens(dims, 2, &mut out, &x, &vec![0, 1, 2, 3]);
    let expected = Error::IndexOutOfRange {
        op: "gather_tokens",
        what: "picked",
        limit: 3,
        found: 3,
    };
    assert_eq!(error, Err(expected));
    assert_eq!(
        expected.to_string(),
        "gather_tokens: `picked` holds index 3, expected less than 3"
    );
    assert!(out.iter().all(|&x| x == 7.0));
}

/// A position table that lacks the class token's row is refused, though no patch asks for a position.
#[test]
fn the_class_tokens_position_is_needed() {
    let dims = TokenDims {
        batch: 1,
        prefix: 1,
        tokens: 0,
        dim: 4,
    };
    let params = vec![1.0; 8];
    let short = Span { start: 4, len: 3 };
    let embed = EmbedParams {
        cls_token: Some(Span { start: 0, len: 4 }),
        pos_embed: short,
    };
    let mut out = vec![7.0; 4];
    let result = Single::owned().embed_tokens(dims, &mut out, &vec![], None, &params, embed);
    assert!(matches!(
        result,
        Err(Error::TooShort {
            what: "pos_embed",
            ..
        })
    ));
    let dims = DecoderDims {
        batch: 1,
        visible: 0,
        targets: 0,
        dim: 4,
    };
    let (x, none) = (vec![1.0; 4], vec![]);
    let mask_token = Span { start: 0, len: 4 };
    let result = Single::owned()
        .decoder_tokens(dims, &mut out, &x, &none, &none, &params, mask_token, short);
    assert!(matches!(
        result,
        Err(Error::TooShort {
            what: "pos_embed",
            ..
        })
    ));
    assert_eq!(out, [7.0; 4]);
}

/// Two tokens of prefix cannot both be the class token.
#[test]
fn embedding_backward_wants_the_prefix_that_the_forward_made() {
    let embed = EmbedParams {
        cls_token: Some(Span { start: 0, len: 2 }),
        pos_embed: Span { start: 2, len: 6 },
    };
    let dims = TokenDims {
        batch: 2,
        prefix: 2,
        tokens: 2,
        dim: 2,
    };
    let (mut d_x, mut grads) = (vec![7.0; 8], vec![7.0; 8]);
    let result =
        Single::owned().embed_tokens_backward(dims, &mut d_x, &mut grads, &vec![1.0; 16], embed);
    assert!(matches!(result, Err(Error::Dimensions { found: 2, .. })));
    assert_eq!((d_x, grads), (vec![7.0; 8], vec![7.0; 8]));
}

/// Crops that are empty, too large or beyond the values, and too few of them.
#[test]
fn crops_that_do_not_fit_are_refused() {
    let dims = PixelDims {
        batch: 2,
        channels: 1,
        height: 3,
        width: 5,
    };
    let crop = |start, height, width| Crop {
        start,
        height,
        width,
    };
    let good = crop(0, 1, 2);
    let most = usize::MAX;
    let [found, needs] = [format!("found {most}"), format!("`values` needs {most}")];
    let cases: [(&[Crop], &str); 8] = [
        (&[good, crop(0, 0, 3)], "found 0"),
        (&[good, crop(0, 3, 0)], "found 0"),
        (&[good, crop(0, 13, 1)], "found 13"),
        (&[crop(0, 1, 21), good], "found 21"),
        (&[good, crop(0, 8, 8)], "found 64"),
        (&[good, crop(0, most, 2)], &found),
        (&[good, crop(most, 1, 1)], &needs),
        (&[good], "`crops` needs 2 elements, has 1"),
    ];
    let write = |crops: &[Crop]| {
        let mut to = vec![7.0; dims.len()];
        let pixels = Pixels {
            values: &[9; 60],
            crops: Some(crops),
            flips: None,
            mean: &[0.5],
            std: &[0.5],
        };
        let result = Single::owned().write_pixels(dims, &mut to, pixels);
        (result, to)
    };
    for (crops, want) in cases {
        let (result, to) = write(crops);
        let error = result.unwrap_err().to_string();
        assert!(error.contains(want), "{error}");
        assert_eq!(to, vec![7.0; dims.len()]);
    }
    // The last values there are, and as large as may be.
    let (result, to) = write(&[crop(58, 1, 2), crop(0, 12, 5)]);
    assert_eq!(result, Ok(()));
    let value = (9.0 / 255.0 - 0.5) / 0.5;
    assert_eq!(to, vec![value; dims.len()]);
}
