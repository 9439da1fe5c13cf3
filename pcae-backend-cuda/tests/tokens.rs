//! Tokens, scores and selection at sizes beyond those of the conformance suite: counts on both sides of each way to select,
//! widths with and without whole vectors, rows longer than a warp's registers.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod emulated;

use pcae_backend_cuda::{Cuda, Precision};
use pcae_kernel::backend::{
    Backend, DecoderDims, EmbedParams, PatchDims, Span, TokenDims, TrainBackend,
};
use pcae_kernel::config::VitConfig;
use pcae_kernel::layout::Layout;
use pcae_kernel::reference::Reference;
use pcae_kernel::rng::{Purpose, Stream};

/// Numbers of mean 0 and variance 1 that bf16 holds.
fn noise(key: u64, len: usize) -> Vec<f32> {
    let mut rng = Stream::new(2, 0, key, Purpose::Init);
    let number = |_| (rng.uniform() - 0.5) * 3.464_101_6;
    let short = |x: f32| f32::from_bits(x.to_bits() & 0xffff_0000);
    (0..len).map(number).map(short).collect()
}

fn buf<B: Backend>(backend: &mut B, values: &[f32]) -> B::Buf {
    let mut buf = backend.buf(values.len()).unwrap();
    backend.write(&mut buf, values).unwrap();
    buf
}

fn ids<B: Backend>(backend: &mut B, values: &[u32]) -> B::Ids {
    let mut ids = backend.ids(values.len()).unwrap();
    backend.write_ids(&mut ids, values).unwrap();
    ids
}

fn contents<B: Backend>(backend: &mut B, buf: &B::Buf, len: usize) -> Vec<f32> {
    let mut values = vec![0.0; len];
    backend.read(&mut values, buf).unwrap();
    values
}

/// In both formats, if there is a device.
fn both(mut check: impl FnMut(Cuda, Precision)) {
    if emulated::has_device() {
        for precision in [Precision::F32, Precision::Bf16] {
            check(Cuda::new(0, precision).unwrap(), precision);
        }
    }
}

#[test]
fn on_the_emulator() {
    emulated::run_again();
}

#[test]
fn any_number_of_tokens_is_selected_in_the_order_of_a_stable_sort() {
    both(|mut cuda, _| {
        for (batch, tokens, keep) in [
            (3, 1, 1),
            (2, 147, 73),
            (2, 255, 255),
            (2, 256, 1),
            (3, 257, 100),
            (1, 1024, 512),
            (2, 1025, 1025),
            (1, 3000, 700),
            (1, 4096, 4096),
            (1, 16_400, 40),
        ] {
            // Few different values, zeros of both signs and infinities among them.
            let scores: Vec<f32> = noise(tokens as u64, batch * tokens)
                .into_iter()
                .map(|x| match x {
                    x if x > 1.7 => f32::INFINITY,
                    x if x < -1.7 => f32::NEG_INFINITY,
                    x => (x * 40.0).round() / 40.0,
                })
                .collect();
            let mut on_device = cuda.scores(scores.len()).unwrap();
            cuda.write_scores(&mut on_device, &scores).unwrap();
            let mut picked = cuda.ids(batch * keep).unwrap();
            cuda.select(batch, tokens, keep, &mut picked, &on_device)
                .unwrap();
            let mut got = vec![0; batch * keep];
            cuda.read_ids(&mut got, &picked).unwrap();
            for (got, scores) in got.chunks(keep).zip(scores.chunks(tokens)) {
                let mut order: Vec<u32> = (0..tokens as u32).collect();
                order
                    .sort_by(|&i, &j| scores[i as usize].partial_cmp(&scores[j as usize]).unwrap());
                assert_eq!(got, &order[..keep], "{tokens} tokens");
            }
        }
    });
}

#[test]
fn a_nan_among_scores_is_reported_with_its_place() {
    both(|mut cuda, _| {
        for (tokens, at) in [(200, 399), (1500, 1501)] {
            let mut scores = noise(1, 2 * tokens);
            // Of all NaNs the one with the largest bits.
            scores[at] = f32::from_bits(0x7fff_ffff);
            let mut on_device = cuda.scores(scores.len()).unwrap();
            cuda.write_scores(&mut on_device, &scores).unwrap();
            let mut picked = cuda.ids(2 * tokens).unwrap();
            let result = cuda
                .select(2, tokens, tokens, &mut picked, &on_device)
                .and_then(|()| cuda.read_ids(&mut vec![0; 2 * tokens], &picked));
            let message = result.unwrap_err().to_string();
            let expected = format!("select: `scores` is NaN at element {at}");
            assert!(message.starts_with(&expected), "{message}");
            // Said once, and all tokens have a place: what follows reads nothing that is not there.
            let mut got = vec![0; 2 * tokens];
            cuda.read_ids(&mut got, &picked).unwrap();
            for got in got.chunks_mut(tokens) {
                got.sort_unstable();
                assert!(got.iter().enumerate().all(|(i, &id)| i == id as usize));
            }
        }
    });
}

#[test]
fn an_index_out_of_range_is_reported_and_reads_nothing() {
    both(|mut cuda, _| {
        let x = buf(&mut cuda, &noise(1, 2 * 4 * 8));
        let dims = TokenDims {
            batch: 2,
            prefix: 1,
            tokens: 3,
            dim: 8,
        };
        let picked = ids(&mut cuda, &[0, 2, u32::MAX, 1]);
        let mut out = cuda.buf(2 * 3 * 8).unwrap();
        cuda.gather_tokens(dims, 2, &mut out, &x, &picked).unwrap();
        let mut values = vec![1.0; 48];
        let error = cuda.read(&mut values, &out).unwrap_err();
        assert_eq!(
            error.to_string(),
            "gather_tokens: `picked` holds index 4294967295, expected less than 3"
        );
        assert_eq!(values, vec![1.0; 48]);
        cuda.read(&mut values, &out).unwrap();
    });
}

#[test]
fn similarity_to_the_mean_is_exact_at_any_width() {
    both(|mut cuda, precision| {
        let mut worst = 0.0f32;
        for (batch, prefix, tokens, dim) in [
            (1, 0, 1, 1),
            (2, 1, 257, 7),
            (3, 0, 5, 8),
            (2, 1, 40, 33),
            (1, 1, 197, 384),
            (2, 0, 18, 768),
            (1, 0, 17, 1023),
            (1, 1, 19, 1024),
            (2, 1, 18, 1280),
            (1, 0, 3, 2053),
            // As many sequences as keep a device busy, a block each.
            (133, 1, 19, 40),
            (133, 0, 17, 1025),
        ] {
            let dims = TokenDims {
                batch,
                prefix,
                tokens,
                dim,
            };
            // Alike, as trained tokens are: what they share is as large as what they do not.
            let mut values = noise(dim as u64, dims.len());
            let shared = noise(77, dim);
            for row in values.chunks_mut(dim) {
                for (x, y) in row.iter_mut().zip(&shared) {
                    *x = f32::from_bits((*x + y).to_bits() & 0xffff_0000);
                }
            }
            let mut want = vec![0.0; batch * tokens];
            let mut reference = Reference::<f64, _>::owned();
            let x = buf(&mut reference, &values);
            let mut scores = reference.scores(want.len()).unwrap();
            reference.mean_similarity(dims, &mut scores, &x).unwrap();
            reference.read_scores(&mut want, &scores).unwrap();
            let mut got = vec![0.0; batch * tokens];
            let x = buf(&mut cuda, &values);
            let mut scores = cuda.scores(got.len() + 1).unwrap();
            cuda.write_scores(&mut scores, &vec![7.0; got.len() + 1])
                .unwrap();
            cuda.mean_similarity(dims, &mut scores, &x).unwrap();
            cuda.read_scores(&mut got, &scores).unwrap();
            for (got, want) in got.iter().zip(&want) {
                worst = worst.max((got - want).abs());
            }
            let mut all = vec![0.0; got.len() + 1];
            cuda.read_scores(&mut all, &scores).unwrap();
            assert_eq!(all[got.len()], 7.0);
        }
        // Scores are cosines, at most 1: a few roundings of 6e-8.
        println!("{precision:?}: {worst:e}");
        assert!(worst < 4e-7, "{precision:?}: {worst:e}");
    });
}

/// A sequence is cut into parts for several blocks; equal tokens of different parts have equal scores, and the first of them is selected.
#[test]
fn ties_between_parts_of_a_sequence_are_kept() {
    both(|mut cuda, precision| {
        for (batch, dim) in [(1, 384), (3, 40), (1, 33)] {
            let dims = TokenDims {
                batch,
                prefix: 1,
                tokens: 197,
                dim,
            };
            // Five different ones.
            let five = noise(dim as u64, 5 * dim);
            let token = |i: usize| five[i % 5 * dim..][..dim].to_vec();
            let values: Vec<f32> = (0..batch * 198).flat_map(|i| token(i % 198)).collect();
            let x = buf(&mut cuda, &values);
            let mut scores = cuda.scores(batch * 197).unwrap();
            cuda.mean_similarity(dims, &mut scores, &x).unwrap();
            let mut got = vec![0.0; batch * 197];
            cuda.read_scores(&mut got, &scores).unwrap();
            for (i, score) in got.iter().enumerate() {
                assert_eq!(
                    score.to_bits(),
                    got[i % 197 % 5].to_bits(),
                    "{precision:?} {i}"
                );
            }
            let mut picked = cuda.ids(batch * 90).unwrap();
            cuda.select(batch, 197, 90, &mut picked, &scores).unwrap();
            let mut found = vec![0; batch * 90];
            cuda.read_ids(&mut found, &picked).unwrap();

            let mut reference = Reference::<f64, _>::owned();
            let x = buf(&mut reference, &values);
            let mut scores = reference.scores(batch * 197).unwrap();
            reference.mean_similarity(dims, &mut scores, &x).unwrap();
            let mut picked = reference.ids(batch * 90).unwrap();
            reference
                .select(batch, 197, 90, &mut picked, &scores)
                .unwrap();
            let mut expected = vec![0; batch * 90];
            reference.read_ids(&mut expected, &picked).unwrap();
            assert_eq!(found, expected, "{precision:?} {dims:?}");
        }
    });
}

/// What the reference and the device make of the same call, copies to the bit.
fn same(precision: Precision, got: &[f32], want: &[f32], what: &str, exact: bool) {
    let allowed = |want: f32| match (exact, precision) {
        (true, _) => 0.0,
        (false, Precision::F32) => 2e-6 * (1.0 + want.abs()),
        // Half a unit in the last of 8 bits.
        (false, Precision::Bf16) => want.abs() / 256.0 + 1e-6,
    };
    for (i, (got, want)) in got.iter().zip(want).enumerate() {
        assert!(
            (got - want).abs() <= allowed(*want),
            "{precision:?} {what}: {got} at {i}, expected {want}"
        );
    }
}

#[test]
fn tokens_are_gathered_and_pooled_at_any_width() {
    fn run<B: Backend>(backend: &mut B, dims: TokenDims, keep: usize) -> [Vec<f32>; 2] {
        let x = buf(backend, &noise(dims.dim as u64, dims.len()));
        let picked: Vec<u32> = (0..dims.batch * keep)
            .map(|i| (7 * i % dims.tokens) as u32)
            .collect();
        let picked = ids(backend, &picked);
        let kept = dims.with_tokens(keep).len();
        let mut out = buf(backend, &vec![9.0; kept + 3]);
        backend
            .gather_tokens(dims, keep, &mut out, &x, &picked)
            .unwrap();
        let pooled_len = dims.batch * dims.dim;
        let mut pooled = buf(backend, &vec![9.0; pooled_len + 3]);
        backend.mean_pool(dims, &mut pooled, &x).unwrap();
        [
            contents(backend, &out, kept + 3),
            contents(backend, &pooled, pooled_len + 3),
        ]
    }
    both(|mut cuda, precision| {
        for (batch, prefix, tokens, dim, keep) in [
            (2, 1, 257, 7, 130),
            (1, 0, 147, 768, 73),
            (3, 1, 20, 12, 20),
            (2, 2, 9, 264, 40),
            (1, 1, 5, 1025, 2),
            (70, 0, 3, 4, 1),
        ] {
            let dims = TokenDims {
                batch,
                prefix,
                tokens,
                dim,
            };
            let [gathered, pooled] = run(&mut cuda, dims, keep);
            let [want_gathered, want_pooled] = run(&mut Reference::<f64, _>::owned(), dims, keep);
            same(precision, &gathered, &want_gathered, "gather_tokens", true);
            same(precision, &pooled, &want_pooled, "mean_pool", false);
        }
    });
}

#[test]
fn patches_of_any_size_are_cut_out() {
    /// As they are, and in the order of MAE's target if there are ids.
    fn run<B: TrainBackend>(
        backend: &mut B,
        dims: PatchDims,
        picked: Option<&[u32]>,
    ) -> [Vec<f32>; 2] {
        let images = buf(backend, &noise(dims.patch_size as u64, dims.images_len()));
        let picked = picked.map(|picked| ids(backend, picked));
        let len = dims.patches_len() + 3;
        let [mut out, mut targets] = [0; 2].map(|_| buf(backend, &vec![9.0; len]));
        backend
            .gather_patches(dims, &mut out, &images, picked.as_ref())
            .unwrap();
        if let Some(picked) = &picked {
            backend
                .pixel_targets(dims, &mut targets, &images, picked)
                .unwrap();
        }
        [out, targets].map(|x| contents(backend, &x, len))
    }
    both(|mut cuda, precision| {
        // Words of 2, 4, 8 and 16 bytes in one format or the other.
        for (channels, patch_size, rows, columns, taken) in [
            (3, 14, 3, 2, 4),
            (1, 4, 7, 7, 30),
            (3, 16, 2, 5, 7),
            (2, 8, 3, 3, 2),
            (3, 7, 2, 3, 6),
            (4, 1, 9, 5, 20),
        ] {
            let dims = PatchDims {
                batch: 3,
                channels,
                height: rows * patch_size,
                width: columns * patch_size,
                patch_size,
                taken,
            };
            let picked: Vec<u32> = (0..3 * taken)
                .map(|i| (5 * i % (rows * columns)) as u32)
                .collect();
            let all = PatchDims {
                taken: rows * columns,
                ..dims
            };
            for (dims, picked) in [(dims, Some(&picked[..])), (all, None)] {
                let got = run(&mut cuda, dims, picked);
                let want = run(&mut Reference::<f64, _>::owned(), dims, picked);
                same(precision, &got[0], &want[0], "gather_patches", true);
                same(precision, &got[1], &want[1], "pixel_targets", true);
            }
        }
    });
}

/// A token and a table of positions behind three other parameters: at no multiple of 16 bytes.
fn table<B: TrainBackend>(backend: &mut B, dim: usize, positions: usize) -> (B::Params, [Span; 2]) {
    // A layout that is long enough.
    let layout = Layout::encoder(&VitConfig::preset("vit-micro").unwrap());
    let values = noise(5, layout.len());
    assert!(layout.len() > (2 + positions) * dim + 3);
    let token = Span { start: 3, len: dim };
    let pos_embed = Span {
        start: 3 + dim,
        len: (1 + positions) * dim,
    };
    let params = backend.params(&layout, &values).unwrap();
    (params, [token, pos_embed])
}

#[test]
fn tokens_are_embedded_with_parameters_at_any_address() {
    fn run<B: TrainBackend>(backend: &mut B, dims: DecoderDims, positions: usize) -> [Vec<f32>; 2] {
        let (params, [token, pos_embed]) = table(backend, dims.dim, positions);
        let places = |count: usize, key: usize| -> Vec<u32> {
            let place = |i| (key * i % positions) as u32;
            (0..count).map(place).collect()
        };
        let visible = ids(backend, &places(dims.batch * dims.visible, 5));
        let target = ids(backend, &places(dims.batch * dims.targets, 11));
        let x = buf(backend, &noise(1, dims.latent_len()));
        let mut decoder = buf(backend, &vec![9.0; dims.len() + 3]);
        backend
            .decoder_tokens(
                dims,
                &mut decoder,
                &x,
                &visible,
                &target,
                &params,
                token,
                pos_embed,
            )
            .unwrap();
        let tokens = TokenDims {
            batch: dims.batch,
            prefix: 1,
            tokens: dims.visible,
            dim: dims.dim,
        };
        let embed = EmbedParams {
            cls_token: Some(token),
            pos_embed,
        };
        let mut embedded = buf(backend, &vec![9.0; tokens.len() + 3]);
        backend
            .embed_tokens(tokens, &mut embedded, &x, Some(&visible), &params, embed)
            .unwrap();
        [
            contents(backend, &decoder, dims.len() + 3),
            contents(backend, &embedded, tokens.len() + 3),
        ]
    }
    both(|mut cuda, precision| {
        for (batch, visible, targets, dim) in [
            (2, 49, 18, 768),
            (3, 5, 7, 33),
            (1, 12, 1, 96),
            (40, 3, 2, 4),
        ] {
            let dims = DecoderDims {
                batch,
                visible,
                targets,
                dim,
            };
            let got = run(&mut cuda, dims, 60);
            let want = run(&mut Reference::<f64, _>::owned(), dims, 60);
            same(precision, &got[0], &want[0], "decoder_tokens", false);
            same(precision, &got[1], &want[1], "embed_tokens", false);
        }
    });
}

#[test]
fn gradients_of_tokens_go_where_they_came_from() {
    fn run<B: TrainBackend>(backend: &mut B, dims: TokenDims, keep: usize) -> Vec<Vec<f32>> {
        let TokenDims {
            batch,
            prefix,
            tokens,
            dim,
        } = dims;
        // Different ones in a sequence.
        let step = (1..)
            .find(|step| tokens % step != 0 || tokens == 1)
            .unwrap();
        let picked: Vec<u32> = (0..batch)
            .flat_map(|b| (0..keep).map(move |i| ((step * i + b) % tokens) as u32))
            .collect();
        let picked = ids(backend, &picked);
        let mut results = vec![];
        let d_kept = buf(backend, &noise(1, dims.with_tokens(keep).len()));
        let blank = vec![9.0; dims.len() + 3];
        let mut d_x = buf(backend, &blank);
        backend
            .gather_tokens_backward(dims, keep, &mut d_x, &d_kept, &picked)
            .unwrap();
        results.push(contents(backend, &d_x, blank.len()));
        let d_pooled = buf(backend, &noise(2, batch * dim));
        backend
            .mean_pool_backward(dims, &mut d_x, &d_pooled)
            .unwrap();
        results.push(contents(backend, &d_x, blank.len()));
        let full = buf(backend, &noise(3, dims.len()));
        let stripped = TokenDims { prefix: 0, ..dims }.len();
        let mut patches = buf(backend, &blank);
        backend.strip_prefix(dims, &mut patches, &full).unwrap();
        results.push(contents(backend, &patches, stripped + 3));
        backend
            .strip_prefix_backward(dims, &mut d_x, &patches)
            .unwrap();
        results.push(contents(backend, &d_x, blank.len()));
        if prefix > 0 {
            // The same tokens as a decoder's: some visible ones, then masks.
            let targets = keep.min(tokens - 1);
            let decoder = DecoderDims {
                batch,
                visible: tokens - targets,
                targets,
                dim,
            };
            let mut grads = backend.vector(dim + 5).unwrap();
            backend
                .write_vector(&mut grads, 0, &noise(4, dim + 5))
                .unwrap();
            let span = Span { start: 3, len: dim };
            let x = buf(backend, &noise(3, decoder.len()));
            backend
                .decoder_tokens_backward(decoder, &mut d_x, &mut grads, &x, span)
                .unwrap();
            results.push(contents(backend, &d_x, decoder.latent_len() + 3));
            let mut sums = vec![0.0; dim + 5];
            backend.read_vector(&mut sums, &grads, 0).unwrap();
            results.push(sums);
        }
        results
    }
    let names = [
        "gather_tokens_backward",
        "mean_pool_backward",
        "strip_prefix",
        "strip_prefix_backward",
        "decoder_tokens_backward",
        "the mask token's gradient",
    ];
    both(|mut cuda, precision| {
        for (batch, prefix, tokens, dim, keep) in [
            (2, 1, 257, 8, 130),
            (1, 0, 147, 768, 73),
            (3, 1, 20, 7, 20),
            (130, 1, 40, 33, 37),
            (1, 1, 1, 1025, 1),
        ] {
            let dims = TokenDims {
                batch,
                prefix,
                tokens,
                dim,
            };
            let got = run(&mut cuda, dims, keep);
            let want = run(&mut Reference::<f64, _>::owned(), dims, keep);
            for (i, (got, want)) in got.iter().zip(&want).enumerate() {
                match i {
                    // Summed in f32 whatever the activations are, 4810 of variance 1 at most.
                    5 => {
                        for (got, want) in got.iter().zip(want) {
                            assert!((got - want).abs() < 1e-4, "{names:?} {got} {want}");
                        }
                    }
                    _ => same(precision, got, want, names[i], i != 1),
                }
            }
        }
    });
}

#[test]
fn tokens_are_ordered_as_a_decomposition_in_f64_does() {
    fn run<B: TrainBackend>(backend: &mut B, dims: TokenDims, precision: Precision) -> Vec<f32> {
        // Tokens that have almost everything in common, as far as the format shows: in f32 a rounding of the tokens is half a
        // hundredth of what remains of them when that is removed.
        let mut values = noise(1, dims.len());
        let shared = noise(2, dims.dim);
        for row in values.chunks_mut(dims.dim) {
            for (x, y) in row.iter_mut().zip(&shared) {
                *x = match precision {
                    Precision::F32 => *x / 65536.0 + y,
                    Precision::Bf16 => f32::from_bits((*x / 16.0 + y).to_bits() & 0xffff_0000),
                };
            }
        }
        let x = buf(backend, &values);
        let mut order = vec![0.0; dims.batch * dims.tokens];
        let mut scores = backend.scores(order.len()).unwrap();
        backend.pivoted_qr_scores(dims, &mut scores, &x).unwrap();
        backend.read_scores(&mut order, &scores).unwrap();
        order
    }
    both(|mut cuda, precision| {
        for (batch, prefix, tokens, dim) in [(2, 1, 60, 96), (1, 0, 21, 770), (3, 1, 7, 9)] {
            let dims = TokenDims {
                batch,
                prefix,
                tokens,
                dim,
            };
            let want = run(&mut Reference::<f64, _>::owned(), dims, precision);
            assert_eq!(run(&mut cuda, dims, precision), want, "{tokens} tokens");
        }
    });
}
