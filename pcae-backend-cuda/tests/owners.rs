//! Each operation refuses each buffer of another backend.
#![allow(
    clippy::unwrap_used,
    reason = "a test stops at what it does not expect"
)]

use pcae_backend_cuda::{Buf, Cuda, Error, Ids, Params, Precision, Scores, Vector};
use pcae_kernel::backend::{
    Accum, AdamW, AttentionDims, Backend, BlockDims, Clip, DecoderDims, Epilogue, LinearDims,
    PatchDims, PixelDims, Pixels, RowDims, Segment, Span, TokenDims, TrainBackend,
};
use pcae_kernel::config::{DecoderConfig, PretrainConfig, Target, VitConfig};
use pcae_kernel::layout::{DecoderParams, Layout, Tail};

mod emulated;

#[test]
fn on_the_emulator() {
    emulated::run_again();
}

/// Elements of every buffer, more than any operation here asks for.
const LEN: usize = 8192;

/// Two backends, and which buffer of an operation is the second one's.
struct Sides {
    cudas: [Cuda; 2],
    layout: Layout,
    foreign: usize,
    made: usize,
    name: &'static str,
}

impl Sides {
    /// Whose the next buffer is, an argument of that name.
    fn next(&mut self, name: &'static str) -> &mut Cuda {
        let is_foreign = self.made == self.foreign;
        if is_foreign {
            self.name = name;
        }
        self.made += 1;
        &mut self.cudas[usize::from(is_foreign)]
    }

    fn buf(&mut self, name: &'static str) -> Buf {
        self.next(name).buf(LEN).unwrap()
    }

    fn ids(&mut self, name: &'static str) -> Ids {
        self.next(name).ids(LEN).unwrap()
    }

    fn scores(&mut self, name: &'static str) -> Scores {
        self.next(name).scores(LEN).unwrap()
    }

    fn vector(&mut self, name: &'static str) -> Vector {
        self.next(name).vector(LEN).unwrap()
    }

    fn params(&mut self, name: &'static str) -> Params {
        let (layout, zeros) = (self.layout, vec![0.0; self.layout.len()]);
        self.next(name).teacher_params(&layout, &zeros).unwrap()
    }

    fn loss(&mut self) -> (Buf, Vector, Buf, Buf) {
        let (gradient, losses) = (self.buf("gradient"), self.vector("losses"));
        let (prediction, target) = (self.buf("prediction"), self.buf("target"));
        (gradient, losses, prediction, target)
    }

    fn cuda(&mut self) -> &mut Cuda {
        &mut self.cudas[0]
    }
}

fn task() -> PretrainConfig {
    PretrainConfig {
        vit: VitConfig {
            img_size: [4, 6],
            in_chans: 1,
            patch_size: 2,
            embed_dim: 16,
            depth: 1,
            num_heads: 2,
            mlp_ratio: 2.0,
        },
        decoder: DecoderConfig {
            embed_dim: 16,
            depth: 1,
            num_heads: 2,
        },
        mask_ratio: 0.5,
        target: Target::Pixels { norm_pix: true },
    }
}

#[test]
fn a_buffer_of_another_backend_is_refused() {
    if !emulated::has_device() {
        return;
    }
    let layout = Layout::pretrain(&task());
    for (precision, fp8_teacher) in [
        (Precision::F32, false),
        (Precision::Bf16, false),
        (Precision::Bf16, true),
    ] {
        let cuda = || {
            let cuda = Cuda::new(0, precision).unwrap();
            match fp8_teacher {
                true => cuda.with_fp8_teacher().unwrap(),
                false => cuda,
            }
        };
        let first = Cuda::new(0, precision).unwrap();
        if fp8_teacher && first.capability() < (8, 9) {
            println!("skipped: fp8 is for compute capability 8.9 and newer");
            return;
        }
        drop(first);
        let mut sides = Sides {
            cudas: [cuda(), cuda()],
            layout,
            foreign: 0,
            made: 0,
            name: "",
        };
        for (op, call) in operations() {
            for foreign in 0.. {
                (sides.foreign, sides.made) = (foreign, 0);
                let called = call(&mut sides, &layout);
                if foreign == sides.made {
                    assert!(foreign > 0, "{op} has buffers");
                    assert_eq!(called, Ok(()), "{op}");
                    break;
                }
                let name = sides.name;
                match &called {
                    Err(Error::Foreign { what, .. }) if name.is_empty() || *what == name => {}
                    _ => panic!("{op} with another's `{name}`: {called:?}"),
                }
            }
        }
        sides.cudas[0].wait().unwrap();
    }
}

#[test]
fn the_error_says_what_is_wrong() {
    if !emulated::has_device() {
        return;
    }
    let mut cuda = Cuda::new(0, Precision::F32).unwrap();
    let mut other = Cuda::new(0, Precision::F32).unwrap();
    let (mut out, x) = (cuda.buf(6).unwrap(), cuda.buf(6).unwrap());
    let scale = other.buf(3).unwrap();
    let dims = RowDims { rows: 3, dim: 2 };
    let refused = cuda.scale_rows(dims, &mut out, &x, &scale, 1).unwrap_err();
    let name = cuda.name();
    assert_eq!(
        refused.to_string(),
        format!(
            "scale_rows: `scale`: expected a buffer that this backend has made (on {name}), found one of another backend (on {name})"
        )
    );
}

type Call = fn(&mut Sides, &Layout) -> Result<(), Error>;

const ROWS: RowDims = RowDims { rows: 4, dim: 16 };
const TOKENS: TokenDims = TokenDims {
    batch: 1,
    prefix: 1,
    tokens: 3,
    dim: 16,
};
const SQUARE: LinearDims = LinearDims {
    rows: 4,
    in_features: 16,
    out_features: 16,
};
const HEADS: AttentionDims = AttentionDims {
    batch: 1,
    tokens: 4,
    num_heads: 2,
    head_dim: 8,
};
const PATCHES: PatchDims = PatchDims {
    batch: 1,
    channels: 1,
    height: 4,
    width: 6,
    patch_size: 2,
    taken: 6,
};
const DECODER: DecoderDims = DecoderDims {
    batch: 1,
    visible: 3,
    targets: 3,
    dim: 16,
};

fn decoder(layout: &Layout) -> DecoderParams {
    match layout.tail {
        Tail::Decoder(decoder) => decoder,
        _ => panic!("a layout of pre-training"),
    }
}

/// Every operation.
fn operations() -> Vec<(&'static str, Call)> {
    vec![
        ("write", |s, _| {
            let mut to = s.buf("to");
            s.cuda().write(&mut to, &[1.0])
        }),
        ("write_pixels", |s, _| {
            let mut to = s.buf("to");
            let dims = PixelDims {
                batch: 1,
                channels: 1,
                height: 2,
                width: 2,
            };
            let pixels = Pixels {
                values: &[1; 4],
                crops: None,
                flips: None,
                mean: &[0.5],
                std: &[0.5],
            };
            s.cuda().write_pixels(dims, &mut to, pixels)
        }),
        ("write_values", |s, _| {
            let mut to = s.buf("to");
            let dims = PixelDims {
                batch: 1,
                channels: 1,
                height: 1,
                width: 1,
            };
            s.cuda().write_values(dims, &mut to, &[1.0])
        }),
        ("read", |s, _| {
            let from = s.buf("from");
            s.cuda().read(&mut [0.0], &from)
        }),
        ("write_ids", |s, _| {
            let mut to = s.ids("to");
            s.cuda().write_ids(&mut to, &[1])
        }),
        ("read_ids", |s, _| {
            let from = s.ids("from");
            s.cuda().read_ids(&mut [0], &from)
        }),
        ("write_scores", |s, _| {
            let mut to = s.scores("to");
            s.cuda().write_scores(&mut to, &[1.0])
        }),
        ("read_scores", |s, _| {
            let from = s.scores("from");
            s.cuda().read_scores(&mut [0.0], &from)
        }),
        ("gather_patches", |s, _| {
            let (mut out, images, ids) = (s.buf("out"), s.buf("images"), s.ids("ids"));
            s.cuda()
                .gather_patches(PATCHES, &mut out, &images, Some(&ids))
        }),
        ("embed_tokens", |s, layout| {
            let (mut out, x, ids) = (s.buf("out"), s.buf("x"), s.ids("ids"));
            let (params, embed) = (s.params("params"), layout.encoder.embed(true));
            s.cuda()
                .embed_tokens(TOKENS, &mut out, &x, Some(&ids), &params, embed)
        }),
        ("linear", |s, layout| {
            let (mut out, x, params) = (s.buf("out"), s.buf("x"), s.params("params"));
            let layer = layout.encoder.blocks.block(0).proj;
            s.cuda()
                .linear(SQUARE, &mut out, &x, &params, layer, Epilogue::Bias)
        }),
        ("layer_norm", |s, layout| {
            let (mut out, x, params) = (s.buf("out"), s.buf("x"), s.params("params"));
            let norm = layout.encoder.norm;
            s.cuda().layer_norm(ROWS, &mut out, &x, &params, norm)
        }),
        ("attention", |s, _| {
            let (mut out, qkv) = (s.buf("out"), s.buf("qkv"));
            s.cuda().attention(HEADS, &mut out, &qkv)
        }),
        // Its names are those of its layers.
        ("block", |s, layout| {
            let (mut x, mut y, mut wide) = (s.buf(""), s.buf(""), s.buf(""));
            let params = s.params("");
            let dims = BlockDims {
                attention: HEADS,
                hidden: 32,
            };
            let (scratch, block) = ([&mut y, &mut wide], layout.encoder.blocks.block(0));
            s.cuda().block(dims, &mut x, scratch, &params, block)
        }),
        ("mean_similarity", |s, _| {
            let (mut scores, x) = (s.scores("scores"), s.buf("x"));
            s.cuda().mean_similarity(TOKENS, &mut scores, &x)
        }),
        ("select", |s, _| {
            let (mut picked, scores) = (s.ids("picked"), s.scores("scores"));
            s.cuda().select(1, 3, 2, &mut picked, &scores)
        }),
        ("gather_tokens", |s, _| {
            let (mut out, x, picked) = (s.buf("out"), s.buf("x"), s.ids("picked"));
            s.cuda().gather_tokens(TOKENS, 2, &mut out, &x, &picked)
        }),
        ("gather_ids", |s, _| {
            let (mut out, ids, picked) = (s.ids("out"), s.ids("ids"), s.ids("picked"));
            s.cuda().gather_ids(1, 3, 2, &mut out, Some(&ids), &picked)
        }),
        ("mean_pool", |s, _| {
            let (mut out, x) = (s.buf("out"), s.buf("x"));
            s.cuda().mean_pool(TOKENS, &mut out, &x)
        }),
        ("start_read", |s, _| {
            let from = s.vector("from");
            s.cuda().start_read(&from, 0, 1)
        }),
        ("finish_read", |s, _| {
            let from = s.vector("from");
            s.cuda().finish_read(&mut [0.0], &from, 0)
        }),
        ("write_vector", |s, _| {
            let mut to = s.vector("to");
            s.cuda().write_vector(&mut to, 0, &[1.0])
        }),
        ("read_vector", |s, _| {
            let from = s.vector("from");
            s.cuda().read_vector(&mut [0.0], &from, 0)
        }),
        ("read_params", |s, _| {
            let from = s.params("params");
            s.cuda()
                .read_params(&mut [0.0], &from, Span { start: 0, len: 1 })
        }),
        ("linear_gelu_saving", |s, layout| {
            let (mut out, mut pre_gelu) = (s.buf("out"), s.buf("pre_gelu"));
            let (x, params) = (s.buf("x"), s.params("params"));
            let layer = layout.encoder.blocks.block(0).proj;
            s.cuda()
                .linear_gelu_saving(SQUARE, &mut out, &mut pre_gelu, &x, &params, layer)
        }),
        ("linear_residual", |s, layout| {
            let (mut out, residual) = (s.buf("out"), s.buf("residual"));
            let (x, params, scale) = (s.buf("x"), s.params("params"), s.buf("scale"));
            let layer = layout.encoder.blocks.block(0).proj;
            let scale = Some((&scale, 2));
            s.cuda()
                .linear_residual(SQUARE, &mut out, &residual, &x, &params, layer, scale)
        }),
        ("scale_rows", |s, _| {
            let (mut out, x, scale) = (s.buf("out"), s.buf("x"), s.buf("scale"));
            s.cuda().scale_rows(ROWS, &mut out, &x, &scale, 2)
        }),
        ("linear_backward_input", |s, layout| {
            let (mut d_x, d_y) = (s.buf("d_x"), s.buf("d_y"));
            let (params, pre_gelu) = (s.params("params"), s.buf("pre_gelu"));
            let layer = layout.encoder.blocks.block(0).proj;
            let pre_gelu = Some(&pre_gelu);
            s.cuda()
                .linear_backward_input(SQUARE, &mut d_x, &d_y, &params, layer, pre_gelu)
        }),
        ("linear_backward_params", |s, layout| {
            let (mut grads, d_y, x) = (s.vector("grads"), s.buf("d_y"), s.buf("x"));
            let layer = layout.encoder.blocks.block(0).proj;
            s.cuda()
                .linear_backward_params(SQUARE, &mut grads, layer, &d_y, &x)
        }),
        ("layer_norm_saving", |s, layout| {
            let (mut out, mut stats) = (s.buf("out"), s.vector("stats"));
            let (x, params) = (s.buf("x"), s.params("params"));
            let norm = layout.encoder.norm;
            s.cuda()
                .layer_norm_saving(ROWS, &mut out, &mut stats, &x, &params, norm)
        }),
        ("layer_norm_backward", |s, layout| {
            let (mut d_x, mut grads, d_y) = (s.buf("d_x"), s.vector("grads"), s.buf("d_y"));
            let (x, stats, params) = (s.buf("x"), s.vector("stats"), s.params("params"));
            let (add, norm) = (Accum::Add, layout.encoder.norm);
            s.cuda().layer_norm_backward(
                ROWS, &mut d_x, add, &mut grads, &d_y, &x, &stats, &params, norm,
            )
        }),
        ("attention_saving", |s, _| {
            let (mut out, mut lse, qkv) = (s.buf("out"), s.vector("lse"), s.buf("qkv"));
            s.cuda().attention_saving(HEADS, &mut out, &mut lse, &qkv)
        }),
        ("attention_backward", |s, _| {
            let (mut d_qkv, d_out, qkv) = (s.buf("d_qkv"), s.buf("d_out"), s.buf("qkv"));
            let (out, lse) = (s.buf("out"), s.vector("lse"));
            TrainBackend::attention_backward(s.cuda(), HEADS, &mut d_qkv, &d_out, &qkv, &out, &lse)
        }),
        ("embed_tokens_backward", |s, layout| {
            let (mut d_x, mut grads, d_out) = (s.buf("d_x"), s.vector("grads"), s.buf("d_out"));
            let embed = layout.encoder.embed(true);
            s.cuda()
                .embed_tokens_backward(TOKENS, &mut d_x, &mut grads, &d_out, embed)
        }),
        ("decoder_tokens", |s, layout| {
            let (mut out, x) = (s.buf("out"), s.buf("x"));
            let (visible, target) = (s.ids("ids_visible"), s.ids("ids_target"));
            let params = s.params("params");
            let decoder = decoder(layout);
            let (mask, positions) = (decoder.mask_token, decoder.pos_embed);
            s.cuda().decoder_tokens(
                DECODER, &mut out, &x, &visible, &target, &params, mask, positions,
            )
        }),
        ("decoder_tokens_backward", |s, layout| {
            let (mut d_x, mut grads, d_out) = (s.buf("d_x"), s.vector("grads"), s.buf("d_out"));
            let mask = decoder(layout).mask_token;
            s.cuda()
                .decoder_tokens_backward(DECODER, &mut d_x, &mut grads, &d_out, mask)
        }),
        ("strip_prefix", |s, _| {
            let (mut out, x) = (s.buf("out"), s.buf("x"));
            s.cuda().strip_prefix(TOKENS, &mut out, &x)
        }),
        ("strip_prefix_backward", |s, _| {
            let (mut d_x, d_out) = (s.buf("d_x"), s.buf("d_out"));
            s.cuda().strip_prefix_backward(TOKENS, &mut d_x, &d_out)
        }),
        ("gather_tokens_backward", |s, _| {
            let (mut d_x, d_out, picked) = (s.buf("d_x"), s.buf("d_out"), s.ids("picked"));
            s.cuda()
                .gather_tokens_backward(TOKENS, 2, &mut d_x, &d_out, &picked)
        }),
        ("mean_pool_backward", |s, _| {
            let (mut d_x, d_out) = (s.buf("d_x"), s.buf("d_out"));
            s.cuda().mean_pool_backward(TOKENS, &mut d_x, &d_out)
        }),
        ("pivoted_qr_scores", |s, _| {
            let (mut scores, x) = (s.scores("scores"), s.buf("x"));
            s.cuda().pivoted_qr_scores(TOKENS, &mut scores, &x)
        }),
        ("standardise", |s, _| {
            let (mut out, x) = (s.buf("out"), s.buf("x"));
            s.cuda().standardise(ROWS, &mut out, &x)
        }),
        ("feature_spread", |s, _| {
            let (mut out, x) = (s.vector("losses"), s.buf("x"));
            s.cuda().feature_spread(ROWS, &mut out, 0, &x)
        }),
        ("cosine_loss", |s, _| {
            let (mut d, mut losses, pred, target) = s.loss();
            s.cuda()
                .cosine_loss(ROWS, &mut d, &mut losses, 0, &pred, &target, 1.0)
        }),
        ("mse_loss", |s, _| {
            let (mut d, mut losses, pred, target) = s.loss();
            s.cuda()
                .mse_loss(ROWS, &mut d, &mut losses, 0, &pred, &target, 1.0)
        }),
        ("cross_entropy", |s, _| {
            let (mut d, mut losses, pred, target) = s.loss();
            s.cuda()
                .cross_entropy(ROWS, &mut d, &mut losses, 0, &pred, &target, 1.0)
        }),
        ("pixel_targets", |s, _| {
            let (mut out, images, ids) = (s.buf("out"), s.buf("images"), s.ids("ids"));
            s.cuda().pixel_targets(PATCHES, &mut out, &images, &ids)
        }),
        ("zero", |s, _| {
            let mut x = s.vector("x");
            s.cuda().zero(&mut x, Span { start: 0, len: 4 })
        }),
        ("copy_vector", |s, _| {
            let (mut to, from) = (s.vector("to"), s.vector("from"));
            s.cuda()
                .copy_vector(&mut to, 0, &from, Span { start: 0, len: 4 })
        }),
        ("norm", |s, _| {
            let (mut out, x) = (s.vector("out"), s.vector("x"));
            s.cuda().norm(&mut out, 0, &x)
        }),
        ("adamw_ema", |s, _| {
            let (mut student, mut teacher) = (s.params("student"), s.params("teacher"));
            let (mut grads, mut m, mut v) = (
                s.vector("grads"),
                s.vector("exp_avg"),
                s.vector("exp_avg_sq"),
            );
            let norms = s.vector("norms");
            let clip = Some(Clip {
                norms: &norms,
                at: 0,
                max_norm: 1.0,
            });
            let segments = [Segment {
                span: Span { start: 0, len: 16 },
                weight_decay: 0.1,
                lr_scale: 1.0,
                ema: true,
            }];
            let step = AdamW {
                lr: 1e-3,
                beta1: 0.9,
                beta2: 0.95,
                eps: 1e-8,
                step: 1,
                momentum: 0.9,
            };
            let teacher = Some(&mut teacher);
            s.cuda().adamw_ema(
                &mut student,
                teacher,
                &mut grads,
                &mut m,
                &mut v,
                &segments,
                &step,
                clip,
            )
        }),
    ]
}
