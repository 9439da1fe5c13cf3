//! Waiting for work, the device's clock, and what is measured with it; no figure of an emulated device means anything.
#![allow(
    clippy::unwrap_used,
    reason = "a test stops at what it does not expect"
)]

use pcae_backend_cuda::{Cuda, Error, Precision};
use pcae_kernel::backend::{
    Accum, AdamW, AttentionDims, Backend, BlockDims, DecoderDims, Epilogue, LinearDims, PatchDims,
    PixelDims, Pixels, RowDims, Segment, Span, TokenDims, TrainBackend,
};
use pcae_kernel::config::VitConfig;
use pcae_kernel::error::Error as KernelError;
use pcae_kernel::layout::Layout;
use pcae_kernel::resize::Crop;

mod emulated;

#[test]
fn on_the_emulator() {
    emulated::run_again();
}

const DIMS: RowDims = RowDims { rows: 4, dim: 8 };

/// Three of these are enough for a graph.
fn work(cuda: &mut Cuda, out: &mut <Cuda as Backend>::Buf, x: &<Cuda as Backend>::Buf) {
    for _ in 0..4 {
        cuda.standardise(DIMS, out, x).unwrap();
    }
}

#[test]
fn waiting_runs_what_is_queued_and_reports_faults() {
    if !emulated::has_device() {
        return;
    }
    let mut cuda = Cuda::new(0, Precision::F32).unwrap();
    let (x, mut out) = (cuda.buf(DIMS.len()).unwrap(), cuda.buf(DIMS.len()).unwrap());
    work(&mut cuda, &mut out, &x);
    let before = cuda.runs();
    cuda.wait().unwrap();
    assert_eq!(cuda.runs().issued, before.issued + 1);
    cuda.wait().unwrap();
    assert_eq!(cuda.runs().issued, before.issued + 1, "nothing is queued");

    let dims = TokenDims {
        batch: 1,
        prefix: 0,
        tokens: 4,
        dim: 8,
    };
    let mut ids = cuda.ids(2).unwrap();
    cuda.write_ids(&mut ids, &[0, 9]).unwrap();
    let gathered = cuda.gather_tokens(dims, 2, &mut out, &x, &ids);
    let found = gathered.and_then(|()| cuda.wait());
    assert!(
        matches!(
            found,
            Err(Error::Kernel(KernelError::IndexOutOfRange { found: 9, .. }))
        ),
        "{found:?}"
    );
    cuda.wait().unwrap();
}

#[test]
fn nothing_is_a_graph_while_the_clock_runs() {
    if !emulated::has_device() {
        return;
    }
    let mut cuda = Cuda::new(0, Precision::F32).unwrap();
    let (x, mut out) = (cuda.buf(DIMS.len()).unwrap(), cuda.buf(DIMS.len()).unwrap());
    for _ in 0..3 {
        cuda.start_clock().unwrap();
        work(&mut cuda, &mut out, &x);
        let seconds = cuda.stop_clock().unwrap();
        assert!(seconds.is_some_and(|it| it > 0.0), "{seconds:?}");
    }
    assert_eq!((cuda.runs().made, cuda.runs().graphs), (0, 0));
    for _ in 0..3 {
        work(&mut cuda, &mut out, &x);
        cuda.wait().unwrap();
    }
    assert_eq!((cuda.runs().made, cuda.runs().graphs), (1, 2));
}

#[test]
fn limits_are_measured_and_their_memory_given_back() {
    if !emulated::has_device() {
        return;
    }
    for precision in [Precision::F32, Precision::Bf16] {
        let mut cuda = Cuda::new(0, precision).unwrap();
        let own = cuda.taken();
        let (flops, bandwidth) = (cuda.peak_flops().unwrap(), cuda.memory_bandwidth().unwrap());
        assert!(flops.is_normal() && flops > 0.0, "{flops}");
        assert!(bandwidth.is_normal() && bandwidth > 0.0, "{bandwidth}");
        // What was dropped goes with the next that is made.
        let free = cuda.free().unwrap();
        let small = cuda.vector(1).unwrap();
        assert!(cuda.free().unwrap() > free);
        drop(small);
        assert!(cuda.taken() <= own + 512, "{} after {own}", cuda.taken());
    }
}

const STEP: AdamW = AdamW {
    lr: 1e-4,
    beta1: 0.9,
    beta2: 0.95,
    eps: 1e-8,
    step: 1,
    momentum: 0.99,
};

/// All of so many parameters, which a teacher follows.
fn followed(len: usize) -> [Segment; 1] {
    [Segment {
        span: Span { start: 0, len },
        weight_decay: 0.05,
        lr_scale: 1.0,
        ema: true,
    }]
}

/// What a profile of `work` finds: names, launches and bytes, by name.
fn profile(cuda: &mut Cuda, work: impl FnOnce(&mut Cuda)) -> Vec<(&'static str, u64, Option<u64>)> {
    cuda.start_profile().unwrap();
    work(cuda);
    let times = cuda.stop_profile().unwrap();
    for pair in times.windows(2) {
        assert!(pair[0].seconds >= pair[1].seconds, "{times:?}");
    }
    assert!(times.iter().all(|time| time.seconds > 0.0), "{times:?}");
    let mut found: Vec<_> = times
        .iter()
        .map(|time| (time.name, time.launches, time.bytes))
        .collect();
    found.sort_unstable();
    found
}

/// Bytes as the kernels' comments count them, at sizes where none is a multiple of another's.
#[test]
fn a_profile_counts_what_kernels_move() {
    if !emulated::has_device() {
        return;
    }
    for (precision, a) in [(Precision::F32, 4), (Precision::Bf16, 2)] {
        let mut cuda = Cuda::new(0, precision).unwrap();
        let vit = VitConfig {
            img_size: [8, 16],
            in_chans: 2,
            patch_size: 4,
            embed_dim: 24,
            depth: 1,
            num_heads: 3,
            mlp_ratio: 5.0,
        };
        let layout = Layout::encoder(&vit);
        let len = layout.len();
        let (norm, block) = (layout.encoder.norm, layout.encoder.blocks.block(0));
        let mut params = cuda.params(&layout, &vec![0.1; len]).unwrap();
        let mut teacher = cuda.teacher_params(&layout, &vec![0.2; len]).unwrap();
        let mut vectors = [0; 3].map(|_| cuda.vector(len).unwrap());
        let n = len as u64;

        // 5 rows, of one group.
        let rows = RowDims { rows: 5, dim: 24 };
        let size = 120;
        let [x, y, mut out] = [0; 3].map(|_| cuda.buf(120).unwrap());
        let mut stats = cuda.vector(10).unwrap();
        let found = profile(&mut cuda, |cuda| {
            cuda.layer_norm_saving(rows, &mut out, &mut stats, &x, &params, norm)
                .unwrap();
            let grads = &mut vectors[0];
            cuda.layer_norm_backward(
                rows,
                &mut out,
                Accum::Add,
                grads,
                &y,
                &x,
                &stats,
                &params,
                norm,
            )
            .unwrap();
        });
        let (sums, grads) = (24 * 4, 2 * 24 * 4);
        let expected = [
            ("add_column_sums", 1, Some(2 * (sums + grads))),
            ("layer_norm_256", 1, Some(2 * size * a)),
            ("layer_norm_backward_256", 1, Some(4 * size * a + 3 * sums)),
        ];
        assert_eq!(found, expected);

        // GELU of the MLP's middle, 120 wide.
        let dims = LinearDims {
            rows: 5,
            in_features: 24,
            out_features: 120,
        };
        let [mut wide, mut pre_gelu] = [0; 2].map(|_| cuda.buf(600).unwrap());
        let found = profile(&mut cuda, |cuda| {
            for _ in 0..2 {
                cuda.linear(dims, &mut wide, &x, &params, block.fc1, Epilogue::BiasGelu)
                    .unwrap();
            }
            cuda.linear_gelu_saving(dims, &mut wide, &mut pre_gelu, &x, &params, block.fc1)
                .unwrap();
        });
        let expected = [
            ("gelu_in_place", 2, Some(2 * 2 * 600 * a)),
            ("gelu_of", 1, Some(2 * 600 * a)),
            ("products", 3, None),
        ];
        assert_eq!(found, expected);

        // Its derivative sums the gradient over rows for the bias, which then only adds; without it that takes a kernel.
        let back = LinearDims {
            rows: 5,
            in_features: 120,
            out_features: 24,
        };
        let found = profile(&mut cuda, |cuda| {
            let (fc1, fc2) = (block.fc1, block.fc2);
            cuda.linear_backward_input(back, &mut wide, &y, &params, fc2, Some(&pre_gelu))
                .unwrap();
            let grads = &mut vectors[0];
            cuda.linear_backward_params(dims, grads, fc1, &wide, &x)
                .unwrap();
            cuda.linear_backward_params(back, grads, fc2, &y, &pre_gelu)
                .unwrap();
        });
        let (wide_sums, wide_grads) = (120 * 4, 2 * 120 * 4);
        let expected = [
            (
                "add_column_sums",
                2,
                Some(wide_sums + wide_grads + sums + grads),
            ),
            ("column_sums", 1, Some(size * a + sums)),
            ("gelu_backward", 1, Some(3 * 600 * a + wide_sums)),
            ("products", 3, None),
        ];
        assert_eq!(found, expected);

        // 3 heads of 8, 2 sequences of 5 tokens.
        let attention = AttentionDims {
            batch: 2,
            tokens: 5,
            num_heads: 3,
            head_dim: 8,
        };
        let [mut qkv, d_qkv] = [0; 2].map(|_| cuda.buf(720).unwrap());
        let [mut attended, d_out] = [0; 2].map(|_| cuda.buf(240).unwrap());
        let mut lse = cuda.vector(30).unwrap();
        let found = profile(&mut cuda, |cuda| {
            cuda.attention_saving(attention, &mut attended, &mut lse, &d_qkv)
                .unwrap();
            cuda.attention_backward(attention, &mut qkv, &d_out, &d_qkv, &attended, &lse)
                .unwrap();
        });
        let expected = [
            ("attention_32", 1, Some(4 * 240 * a)),
            ("attention_backward_32", 1, Some(8 * 240 * a)),
        ];
        assert_eq!(found, expected);

        // Pictures, whole and as crops, and their patches.
        let pixels = PixelDims {
            batch: 3,
            channels: 2,
            height: 8,
            width: 16,
        };
        let mut images = cuda.buf(768).unwrap();
        let values: Vec<u8> = (0..3 * 2 * 10 * 20).map(|i| (i * 37) as u8).collect();
        let crops = [0, 1, 2].map(|b| Crop {
            start: b * 400,
            height: 10,
            width: 20,
        });
        let cut = PatchDims {
            batch: 3,
            channels: 2,
            height: 8,
            width: 16,
            patch_size: 4,
            taken: 8,
        };
        let mut patches = cuda.buf(768).unwrap();
        let found = profile(&mut cuda, |cuda| {
            for crops in [None, Some(&crops[..])] {
                let pictures = Pixels {
                    values: &values,
                    crops,
                    flips: None,
                    mean: &[0.5; 2],
                    std: &[0.25; 2],
                };
                cuda.write_pixels(pixels, &mut images, pictures).unwrap();
            }
            cuda.gather_patches(cut, &mut patches, &images, None)
                .unwrap();
        });
        let expected = [
            ("crop_taps", 1, None),
            ("gather_patches", 1, Some(2 * 768 * a)),
            ("normalise_pixels", 2, Some(2 * 768 * (1 + a))),
            ("resize_crops", 1, None),
        ];
        assert_eq!(found, expected);

        // 2 sequences of a class token and 4 patches, of which 3 stay.
        let tokens = TokenDims {
            batch: 2,
            prefix: 1,
            tokens: 4,
            dim: 24,
        };
        let (mut kept, mut picked) = (cuda.buf(192).unwrap(), cuda.ids(6).unwrap());
        let mut scores = cuda.scores(8).unwrap();
        let sequences = cuda.buf(240).unwrap();
        let found = profile(&mut cuda, |cuda| {
            cuda.mean_similarity(tokens, &mut scores, &sequences)
                .unwrap();
            cuda.select(2, 4, 3, &mut picked, &scores).unwrap();
            cuda.gather_tokens(tokens, 3, &mut kept, &sequences, &picked)
                .unwrap();
        });
        let scored: Vec<_> = found
            .iter()
            .filter(|(name, ..)| name.contains("simil"))
            .collect();
        assert!(!scored.is_empty());
        assert!(
            scored.iter().all(|(_, _, bytes)| *bytes == Some(192 * a)),
            "{found:?}"
        );
        assert!(found.contains(&("select_by_rank", 1, None)), "{found:?}");
        assert!(
            found.contains(&("gather_tokens", 1, Some(2 * 192 * a))),
            "{found:?}"
        );

        // And back, from buffers that are larger than need be.
        let [mut long, mut other] = [0; 2].map(|_| cuda.buf(1000).unwrap());
        let found = profile(&mut cuda, |cuda| {
            cuda.mean_pool(tokens, &mut other, &long).unwrap();
            cuda.mean_pool_backward(tokens, &mut long, &other).unwrap();
            cuda.gather_tokens_backward(tokens, 3, &mut long, &other, &picked)
                .unwrap();
            cuda.strip_prefix(tokens, &mut other, &long).unwrap();
            cuda.strip_prefix_backward(tokens, &mut long, &other)
                .unwrap();
        });
        let expected = [
            ("gather_tokens_backward", 1, Some((240 + 192) * a)),
            ("mean_pool", 1, Some((192 + 48) * a)),
            ("mean_pool_backward", 1, Some((240 + 48) * a)),
            ("shift_tokens", 2, Some(2 * 192 * a + (240 + 192) * a)),
        ];
        assert_eq!(found, expected);

        // Losses and targets, each with what finishes a sum.
        let [mut d, pred, target] = [0; 3].map(|_| cuda.buf(200).unwrap());
        let mut losses = cuda.vector(4).unwrap();
        let found = profile(&mut cuda, |cuda| {
            cuda.cosine_loss(rows, &mut d, &mut losses, 0, &pred, &target, 1.0)
                .unwrap();
            cuda.mse_loss(rows, &mut d, &mut losses, 1, &pred, &target, 1.0)
                .unwrap();
            cuda.cross_entropy(rows, &mut d, &mut losses, 2, &pred, &target, 1.0)
                .unwrap();
            cuda.feature_spread(rows, &mut losses, 3, &pred).unwrap();
        });
        let expected = [
            ("column_moments", 1, Some(size * a + 2 * sums)),
            ("column_spreads", 1, Some(2 * sums)),
            ("cosine_loss", 1, Some(3 * size * a)),
            ("cross_entropy", 1, Some(3 * size * a)),
            ("finish_sum", 4, None),
            ("mse_loss", 1, Some(3 * size * a)),
        ];
        assert_eq!(found, expected);

        // Stochastic depth, a factor for each row.
        let scale = cuda.buf(10).unwrap();
        let square = LinearDims {
            out_features: 24,
            ..dims
        };
        let found = profile(&mut cuda, |cuda| {
            cuda.scale_rows(rows, &mut d, &x, &scale, 1).unwrap();
            let scale = Some((&scale, 1));
            cuda.linear_residual(square, &mut d, &y, &x, &params, block.proj, scale)
                .unwrap();
        });
        let expected = [
            ("add_scaled_rows", 1, Some(3 * size * a)),
            ("products", 1, None),
            ("scale_rows", 1, Some(2 * size * a)),
        ];
        assert_eq!(found, expected);

        // Tokens of an encoder and of a decoder, whose table of positions has as many as the encoder's.
        let encoder = &layout.encoder;
        let embed = encoder.embed(true);
        let (mut whole, ids) = (cuda.buf(1000).unwrap(), cuda.ids(100).unwrap());
        let decoder = DecoderDims {
            batch: 2,
            visible: 3,
            targets: 4,
            dim: 24,
        };
        let mask_token = Span {
            len: 24,
            ..embed.pos_embed
        };
        let mut next = cuda.ids(100).unwrap();
        let found = profile(&mut cuda, |cuda| {
            cuda.embed_tokens(tokens, &mut whole, &long, Some(&ids), &params, embed)
                .unwrap();
            cuda.gather_ids(2, 4, 3, &mut next, None, &picked).unwrap();
            cuda.gather_ids(2, 4, 3, &mut next, Some(&ids), &picked)
                .unwrap();
            let positions = embed.pos_embed;
            cuda.decoder_tokens(
                decoder, &mut whole, &long, &ids, &ids, &params, mask_token, positions,
            )
            .unwrap();
            let grads = &mut vectors[0];
            cuda.decoder_tokens_backward(decoder, &mut long, grads, &whole, mask_token)
                .unwrap();
        });
        let (latent, sequence) = (2 * 4 * 24, 2 * 8 * 24);
        let expected = [
            ("add_column_sums", 1, Some(sums + grads)),
            ("decoder_tokens", 1, Some((latent + sequence) * a)),
            ("embed_tokens", 1, Some((240 + 192) * a)),
            ("gather_ids", 2, Some(4 * 6 * (2 + 3))),
            ("shift_tokens", 1, Some(2 * latent * a)),
            ("sum_tokens", 1, Some(2 * 4 * 24 * a + sums)),
        ];
        assert_eq!(found, expected);

        // All parameters, of which a teacher follows.
        let segments = followed(len);
        let mut scalar = cuda.vector(1).unwrap();
        let found = profile(&mut cuda, |cuda| {
            let [grads, exp_avg, exp_avg_sq] = &mut vectors;
            cuda.norm(&mut scalar, 0, grads).unwrap();
            let (student, teacher) = (&mut params, Some(&mut teacher));
            cuda.adamw_ema(
                student, teacher, grads, exp_avg, exp_avg_sq, &segments, &STEP, None,
            )
            .unwrap();
            cuda.zero(grads, Span { start: 0, len }).unwrap();
        });
        let copies = if precision == Precision::Bf16 { 4 } else { 0 };
        let expected = [
            ("adamw_ema", 1, Some((40 + copies) * n)),
            ("finish_sum", 1, None),
            ("sum_squares", 1, Some(4 * n)),
            ("zero", 1, Some(4 * n)),
        ];
        assert_eq!(found, expected);
        assert_eq!((cuda.runs().made, cuda.runs().graphs), (0, 0));
    }
}

/// What becomes e4m3 is written in one byte, and rows that are put apart are as long as that.
#[test]
fn a_profile_counts_conversions() {
    if !emulated::has_device() {
        return;
    }
    let cuda = Cuda::new(0, Precision::Bf16).unwrap();
    let mut cuda = match cuda.with_fp8_teacher() {
        Ok(cuda) => cuda,
        Err(error) => {
            println!("skipped: {error}");
            return;
        }
    };
    let vit = VitConfig {
        img_size: [8, 16],
        in_chans: 2,
        patch_size: 4,
        embed_dim: 32,
        depth: 1,
        num_heads: 1,
        mlp_ratio: 2.0,
    };
    let layout = Layout::encoder(&vit);
    let len = layout.len();
    let block = layout.encoder.blocks.block(0);
    let mut student = cuda.params(&layout, &vec![0.1; len]).unwrap();
    let mut teacher = cuda.teacher_params(&layout, &vec![0.1; len]).unwrap();
    let [mut x, mut y] = [0; 2].map(|_| cuda.buf(400).unwrap());
    let mut wide = cuda.buf(2000).unwrap();
    let attention = AttentionDims {
        batch: 2,
        tokens: 5,
        num_heads: 1,
        head_dim: 32,
    };
    let dims = BlockDims {
        attention,
        hidden: 64,
    };
    let found = profile(&mut cuda, |cuda| {
        cuda.block(dims, &mut x, [&mut y, &mut wide], &teacher, block)
            .unwrap();
        let qkv = dims.linear(32, 96);
        cuda.linear(qkv, &mut wide, &x, &teacher, block.qkv, Epilogue::Bias)
            .unwrap();
    });
    // 10 rows of 32, in two bytes and in one.
    let expected = [
        ("attention_32", 1, Some(320 * (3 * 2 + 1))),
        ("gelu_to_e4m3", 1, Some(640 * 3)),
        ("layer_norm_256", 2, Some(2 * 320 * 3)),
        ("products", 5, None),
        ("to_e4m3", 1, Some(320 * 3)),
    ];
    assert_eq!(found, expected);

    let mut vectors = [0; 3].map(|_| cuda.vector(len).unwrap());
    let segments = followed(len);
    let found = profile(&mut cuda, |cuda| {
        let [grads, exp_avg, exp_avg_sq] = &mut vectors;
        let (student, teacher) = (&mut student, Some(&mut teacher));
        cuda.adamw_ema(
            student, teacher, grads, exp_avg, exp_avg_sq, &segments, &STEP, None,
        )
        .unwrap();
    });
    // Weights of queries, keys, values, of their projection, and of the MLP.
    let weights = 32 * 32 * (3 + 1 + 2 + 2);
    let expected = [
        ("adamw_ema", 1, Some(44 * len as u64)),
        ("weight_maxima", 1, Some(2 * weights)),
        ("weights_to_e4m3", 1, Some(3 * weights)),
        ("zero", 1, Some(4 * 4)),
    ];
    assert_eq!(found, expected);
}

#[test]
fn a_profile_ends() {
    if !emulated::has_device() {
        return;
    }
    let mut cuda = Cuda::new(0, Precision::F32).unwrap();
    let mut x = cuda.buf(DIMS.len()).unwrap();
    let values: Vec<f32> = (0..DIMS.len()).map(|i| (i as f32).sin()).collect();
    cuda.write(&mut x, &values).unwrap();
    let mut out = cuda.buf(DIMS.len()).unwrap();
    let read = |cuda: &mut Cuda, out: &mut <Cuda as Backend>::Buf| {
        let mut to = vec![0.0; DIMS.len()];
        cuda.read(&mut to, out).unwrap();
        cuda.write(out, &vec![0.0; DIMS.len()]).unwrap();
        to
    };
    let mut seen = Vec::new();
    // The third would be a graph, and what was timed before is not there any more.
    for _ in 0..3 {
        let found = profile(&mut cuda, |cuda| work(cuda, &mut out, &x));
        assert_eq!(found, [("layer_norm_256", 4, Some(4 * 2 * 32 * 4))]);
        seen.push(read(&mut cuda, &mut out));
    }
    assert_eq!((cuda.runs().made, cuda.runs().graphs), (0, 0));
    assert!(cuda.stop_profile().unwrap().is_empty());
    for _ in 0..3 {
        work(&mut cuda, &mut out, &x);
        cuda.wait().unwrap();
        seen.push(read(&mut cuda, &mut out));
    }
    assert_eq!((cuda.runs().made, cuda.runs().graphs), (1, 2));
    assert!(seen[0].iter().any(|x| *x != 0.0));
    assert!(seen.iter().all(|x| *x == seen[0]), "{seen:?}");
}
