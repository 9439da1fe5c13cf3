//! What training adds, at sizes beyond those of the conformance suite: every kernel for rows at its widest and narrowest, with and
//! without whole vectors, sums in many groups, parameters in many pieces, GELU over its whole range.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod emulated;

use pcae_backend_cuda::{Cuda, Precision};
use pcae_kernel::backend::{
    Accum, AdamW, Backend, Clip, Epilogue, Linear, LinearDims, Norm, RowDims, Segment, Span,
    TrainBackend,
};
use pcae_kernel::config::VitConfig;
use pcae_kernel::layout::Layout;
use pcae_kernel::reference::Reference;
use pcae_kernel::rng::{Purpose, Stream};

/// The first 8 significant bits: what bf16 holds.
fn short(x: f32) -> f32 {
    f32::from_bits(x.to_bits() & 0xffff_0000)
}

/// Numbers of mean 0 and variance 1 that bf16 holds.
fn noise(key: u64, len: usize) -> Vec<f32> {
    let mut rng = Stream::new(3, 0, key, Purpose::Init);
    let number = |_| short((rng.uniform() - 0.5) * 3.464_101_6);
    (0..len).map(number).collect()
}

fn buf<B: Backend>(backend: &mut B, values: &[f32]) -> B::Buf {
    let mut buf = backend.buf(values.len()).unwrap();
    backend.write(&mut buf, values).unwrap();
    buf
}

fn vector<B: TrainBackend>(backend: &mut B, values: &[f32]) -> B::Vector {
    let mut vector = backend.vector(values.len()).unwrap();
    backend.write_vector(&mut vector, 0, values).unwrap();
    vector
}

fn contents<B: Backend>(backend: &mut B, buf: &B::Buf, len: usize) -> Vec<f32> {
    let mut values = vec![0.0; len];
    backend.read(&mut values, buf).unwrap();
    values
}

fn vector_contents<B: TrainBackend>(backend: &mut B, vector: &B::Vector, len: usize) -> Vec<f32> {
    let mut values = vec![0.0; len];
    backend.read_vector(&mut values, vector, 0).unwrap();
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

/// An encoder without blocks: `20 * dim` parameters before its norm.
fn layout(dim: usize) -> Layout {
    Layout::encoder(&VitConfig {
        img_size: [4, 4],
        patch_size: 4,
        in_chans: 1,
        embed_dim: dim,
        depth: 0,
        num_heads: 1,
        mlp_ratio: 1.0,
    })
}

/// `within` in f32; an activation of bf16 is also rounded once, by half a unit in the last of its 8 bits.
fn close(what: &str, got: &[f32], want: &[f32], activation: Option<Precision>, within: f32) {
    assert_eq!(got.len(), want.len());
    let rounded = match activation {
        Some(Precision::Bf16) => 1.0 / 256.0,
        _ => 0.0,
    };
    for (i, (got, want)) in got.iter().zip(want).enumerate() {
        let allowed = within + want.abs() * (within + rounded);
        assert!(
            (got - want).abs() <= allowed,
            "{what}: {got} at {i}, expected {want}"
        );
    }
}

#[test]
fn on_the_emulator() {
    emulated::run_again();
}

#[test]
fn norms_of_any_width() {
    struct Found {
        activations: Vec<(&'static str, Vec<f32>)>,
        floats: Vec<(&'static str, Vec<f32>)>,
    }
    fn run<B: TrainBackend>(backend: &mut B, dims: RowDims, shift: usize, accum: Accum) -> Found {
        let layout = layout(dims.dim);
        let at = |span: Span| Span {
            start: span.start - shift,
            ..span
        };
        let norm = Norm {
            weight: at(layout.encoder.norm.weight),
            bias: at(layout.encoder.norm.bias),
        };
        let params = backend.params(&layout, &noise(1, layout.len())).unwrap();
        let (len, key) = (dims.len(), dims.dim as u64);
        // Far from 0, where a variance that is not summed about the mean would cancel.
        let x: Vec<f32> = noise(key, len).iter().map(|x| short(8.0 + x)).collect();
        let x = buf(backend, &x);
        let d_y = buf(backend, &noise(key + 1, len));
        let mut out = buf(backend, &vec![9.0; len + 3]);
        let mut d_x = buf(backend, &noise(key + 2, len + 3));
        let mut stats = vector(backend, &vec![9.0; 2 * dims.rows + 3]);
        let mut grads = vector(backend, &noise(key + 3, layout.len()));
        backend
            .layer_norm_saving(dims, &mut out, &mut stats, &x, &params, norm)
            .unwrap();
        let normed = contents(backend, &out, len + 3);
        backend
            .layer_norm_backward(
                dims, &mut d_x, accum, &mut grads, &d_y, &x, &stats, &params, norm,
            )
            .unwrap();
        backend.standardise(dims, &mut out, &x).unwrap();
        Found {
            activations: vec![
                ("layer_norm_saving", normed),
                ("d_x", contents(backend, &d_x, len + 3)),
                ("standardise", contents(backend, &out, len + 3)),
            ],
            floats: vec![
                ("stats", vector_contents(backend, &stats, 2 * dims.rows + 3)),
                ("grads", vector_contents(backend, &grads, layout.len())),
            ],
        }
    }
    both(|mut cuda, precision| {
        for (rows, dim, shift, accum) in [
            (37, 32, 0, Accum::Add),
            (3, 33, 0, Accum::Replace),
            (9, 256, 0, Accum::Replace),
            (6, 257, 0, Accum::Add),
            (11, 384, 0, Accum::Add),
            (50, 768, 0, Accum::Add),
            // Whole vectors, but not of the parameters.
            (5, 768, 1, Accum::Replace),
            (5, 1000, 2, Accum::Add),
            (7, 1023, 0, Accum::Add),
            (21, 1024, 0, Accum::Replace),
            (2, 1025, 0, Accum::Replace),
            (9, 1280, 0, Accum::Add),
            (5, 1544, 0, Accum::Add),
            (5, 2048, 0, Accum::Replace),
            (3, 2056, 0, Accum::Replace),
            (2, 4095, 0, Accum::Add),
            (3, 4096, 0, Accum::Add),
            // In as many groups as there are.
            (1700, 8, 0, Accum::Add),
            (1601, 11, 0, Accum::Replace),
        ] {
            let dims = RowDims { rows, dim };
            let got = run(&mut cuda, dims, shift, accum);
            let want = run(&mut Reference::<f64, _>::owned(), dims, shift, accum);
            for ((what, got), (_, want)) in got.activations.iter().zip(&want.activations) {
                // A mean of 8 is rounded by 2^-22, and what is left of it divided by deviations that may be small in
                // short rows.
                let what = format!("{precision:?} {dims:?} {what}");
                close(&what, got, want, Some(precision), 2e-5);
            }
            for ((what, got), (_, want)) in got.floats.iter().zip(&want.floats) {
                let what = format!("{precision:?} {dims:?} {what}");
                close(&what, got, want, None, 1e-4);
            }
        }
    });
}

#[test]
fn rows_that_are_too_wide_are_refused() {
    both(|mut cuda, _| {
        let dims = RowDims {
            rows: 1,
            dim: 16_385,
        };
        let x = cuda.buf(dims.dim).unwrap();
        let mut out = cuda.buf(dims.dim).unwrap();
        let error = cuda.standardise(dims, &mut out, &x).unwrap_err();
        assert_eq!(
            error.to_string(),
            "standardise: expected rows of at most 16384 elements, found 16385"
        );
        let widest = RowDims {
            rows: 1,
            dim: 16_384,
        };
        cuda.write(&mut out, &vec![7.0; dims.dim]).unwrap();
        cuda.standardise(widest, &mut out, &x).unwrap();
        let values = contents(&mut cuda, &out, dims.dim);
        assert!(values[..16_384].iter().all(|x| *x == 0.0));
        assert_eq!(values[16_384], 7.0);
    });
}

#[test]
fn losses_of_any_width() {
    fn run<B: TrainBackend>(backend: &mut B, dims: RowDims) -> (Vec<Vec<f32>>, Vec<f32>) {
        let (len, key) = (dims.len(), dims.dim as u64);
        let x: Vec<f32> = noise(key, len).iter().map(|x| short(3.0 * x)).collect();
        let x = buf(backend, &x);
        let target = buf(backend, &noise(key + 1, len));
        let mut d_x = buf(backend, &vec![9.0; len + 3]);
        let mut losses = vector(backend, &[0.5; 5]);
        // Gradients near 1 show errors of their own, and not those of a mean over many.
        let many = dims.rows as f64;
        let mut found = vec![];
        backend
            .cosine_loss(dims, &mut d_x, &mut losses, 0, &x, &target, many)
            .unwrap();
        found.push(contents(backend, &d_x, len + 3));
        backend
            .mse_loss(dims, &mut d_x, &mut losses, 1, &x, &target, 0.75)
            .unwrap();
        found.push(contents(backend, &d_x, len + 3));
        let target: Vec<f32> = noise(key + 2, len).iter().map(|x| x.abs()).collect();
        let target = buf(backend, &target);
        backend
            .cross_entropy(dims, &mut d_x, &mut losses, 2, &x, &target, many)
            .unwrap();
        found.push(contents(backend, &d_x, len + 3));
        backend.feature_spread(dims, &mut losses, 3, &x).unwrap();
        (found, vector_contents(backend, &losses, 5))
    }
    both(|mut cuda, precision| {
        for (rows, dim) in [
            (1, 1),
            (5, 10),
            (300, 31),
            (9, 768),
            (3, 1000),
            (2, 1025),
            (2, 1280),
            (2, 4096),
            (1, 21_841),
            (3000, 8),
        ] {
            let dims = RowDims { rows, dim };
            let got = run(&mut cuda, dims);
            let want = run(&mut Reference::<f64, _>::owned(), dims);
            for (i, (got, want)) in got.0.iter().zip(&want.0).enumerate() {
                let what = format!("{precision:?} {dims:?} gradient {i}");
                close(&what, got, want, Some(precision), 3e-6);
            }
            let what = format!("{precision:?} {dims:?} losses");
            close(&what, &got.1, &want.1, None, 1e-5);
            assert_eq!(run(&mut cuda, dims), got, "{what}, again");
        }
    });
}

/// What all rows have in common is no spread, however large it is.
#[test]
fn equal_rows_have_no_spread() {
    both(|mut cuda, _| {
        let dims = RowDims {
            rows: 1000,
            dim: 40,
        };
        let x = buf(&mut cuda, &noise(1, dims.dim).repeat(dims.rows));
        let mut out = vector(&mut cuda, &[7.0; 2]);
        cuda.feature_spread(dims, &mut out, 0, &x).unwrap();
        assert_eq!(vector_contents(&mut cuda, &out, 2), [0.0, 7.0]);
    });
}

#[test]
fn biases_get_sums_over_many_rows() {
    fn run<B: TrainBackend>(backend: &mut B, dims: LinearDims) -> Vec<f32> {
        let layer = Linear {
            weight: Span {
                start: 1,
                len: dims.weight_len(),
            },
            bias: Span {
                start: 1 + dims.weight_len(),
                len: dims.out_features,
            },
        };
        let d_y = buf(backend, &noise(dims.rows as u64, dims.out_len()));
        let x = buf(backend, &noise(2, dims.in_len()));
        let len = layer.bias.end() + 1;
        let mut grads = vector(backend, &noise(3, len));
        backend
            .linear_backward_params(dims, &mut grads, layer, &d_y, &x)
            .unwrap();
        vector_contents(backend, &grads, len)
    }
    both(|mut cuda, precision| {
        for (rows, out_features) in [(1, 768), (33, 300), (129, 7), (1000, 264), (9000, 9)] {
            let dims = LinearDims {
                rows,
                in_features: 2,
                out_features,
            };
            let got = run(&mut cuda, dims);
            let want = run(&mut Reference::<f64, _>::owned(), dims);
            // Sums of up to 9000 terms near 1 are near 100; the products add them one after the other.
            let what = format!("{precision:?} {dims:?}");
            close(&what, &got, &want, None, 1e-4);
        }
    });
}

/// Rows of no multiple of 16 bytes, as patches of 14 x 14 pixels: copied apart for tensor cores where that is worth it, forward and backward.
#[test]
fn linear_layers_of_odd_inputs() {
    fn run<B: TrainBackend>(backend: &mut B, dims: LinearDims) -> [Vec<f32>; 2] {
        let layout = layout(dims.weight_len().div_ceil(8).max(dims.out_features));
        let layer = Linear {
            weight: Span {
                start: 3,
                len: dims.weight_len(),
            },
            bias: Span {
                start: 3 + dims.weight_len(),
                len: dims.out_features,
            },
        };
        let params = backend.params(&layout, &noise(1, layout.len())).unwrap();
        let x = buf(backend, &noise(2, dims.in_len()));
        let mut out = buf(backend, &vec![9.0; dims.out_len() + 3]);
        backend
            .linear(dims, &mut out, &x, &params, layer, Epilogue::Bias)
            .unwrap();
        let d_y = buf(backend, &noise(3, dims.out_len()));
        let mut grads = vector(backend, &noise(4, layout.len()));
        backend
            .linear_backward_params(dims, &mut grads, layer, &d_y, &x)
            .unwrap();
        [
            contents(backend, &out, dims.out_len() + 3),
            vector_contents(backend, &grads, layer.bias.end() + 5),
        ]
    }
    both(|mut cuda, precision| {
        for (rows, in_features, out_features) in [
            (130, 588, 128),
            (128, 65, 136),
            (127, 588, 130),
            (200, 100, 129),
        ] {
            let dims = LinearDims {
                rows,
                in_features,
                out_features,
            };
            let got = run(&mut cuda, dims);
            let want = run(&mut Reference::<f64, _>::owned(), dims);
            let what = format!("{precision:?} {dims:?}");
            // Sums of up to 600 terms near 1 are near 25, and their bias may be added to them rounded.
            let within = match precision {
                Precision::F32 => 2e-5,
                Precision::Bf16 => 0.01,
            };
            close(&what, &got[0], &want[0], Some(precision), within);
            close(&what, &got[1], &want[1], None, 2e-5);
        }
    });
}

/// What is queued between a gradient and those of the layer's parameters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Between {
    Nothing,
    /// A kernel writes over it.
    Kernel,
    /// It is written anew.
    Write,
    /// It is dropped, and another one takes its place.
    Other,
    /// The gradients of fewer rows are asked for.
    Fewer,
}

/// Kernels that make a gradient sum it too; those sums are only taken for the gradient that they are of.
#[test]
fn biases_get_the_sums_of_their_own_gradient() {
    fn run<B: TrainBackend>(
        backend: &mut B,
        dims: RowDims,
        of_norm: Option<Accum>,
        between: Between,
    ) -> Vec<f32> {
        let (rows, dim) = (dims.rows, dims.dim);
        let linear = |rows, in_features, out_features| LinearDims {
            rows,
            in_features,
            out_features,
        };
        let layout = layout(2 * dim);
        let params = backend.params(&layout, &noise(1, layout.len())).unwrap();
        let span = |start, len| Span { start, len };
        let layer = Linear {
            weight: span(8, dim),
            bias: span(0, 1),
        };
        let mut grads = vector(backend, &noise(2, layout.len()));
        let mut d = buf(backend, &noise(3, dims.len()));
        let (x, d_y) = (noise(4, dims.len()), noise(5, dims.len()));
        let x = buf(backend, &x);
        // A new buffer is a change, too.
        let (before, two) = (buf(backend, &noise(7, rows)), buf(backend, &[2.0]));
        if let Some(accum) = of_norm {
            let d_y = buf(backend, &d_y);
            let stats: Vec<f32> = (0..rows)
                .flat_map(|i| [0.1 * (i % 3) as f32, 1.5])
                .collect();
            let stats = vector(backend, &stats);
            let norm = Norm {
                weight: span(8, dim),
                bias: span(8 + dim, dim),
            };
            backend
                .layer_norm_backward(
                    dims, &mut d, accum, &mut grads, &d_y, &x, &stats, &params, norm,
                )
                .unwrap();
        } else {
            let d_y = buf(backend, &d_y[..rows]);
            backend
                .linear_backward_input(linear(rows, dim, 1), &mut d, &d_y, &params, layer, Some(&x))
                .unwrap();
        }
        let mut rows = rows;
        match between {
            Between::Nothing => {}
            Between::Kernel => {
                let whole = RowDims {
                    rows: 1,
                    dim: dims.len(),
                };
                backend.scale_rows(whole, &mut d, &x, &two, 1).unwrap();
            }
            Between::Write => backend.write(&mut d, &noise(6, dims.len())).unwrap(),
            Between::Other => {
                drop(d);
                d = backend.buf(dims.len()).unwrap();
            }
            Between::Fewer => rows -= 1,
        }
        let layer = Linear {
            weight: span(8, dim),
            bias: span(8 + dim, dim),
        };
        backend
            .linear_backward_params(linear(rows, 1, dim), &mut grads, layer, &d, &before)
            .unwrap();
        vector_contents(backend, &grads, layout.len())
    }
    both(|mut cuda, precision| {
        for (rows, dim) in [
            (1, 8),
            (70, 768),
            (33, 300),
            (7, 21),
            (900, 16),
            (5, 1280),
            (9, 2056),
        ] {
            let dims = RowDims { rows, dim };
            for of_norm in [None, Some(Accum::Replace), Some(Accum::Add)] {
                for between in [
                    Between::Nothing,
                    Between::Kernel,
                    Between::Write,
                    Between::Other,
                    Between::Fewer,
                ] {
                    let got = run(&mut cuda, dims, of_norm, between);
                    let want = run(&mut Reference::<f64, _>::owned(), dims, of_norm, between);
                    let what = format!("{precision:?} {dims:?} {of_norm:?} {between:?}");
                    // Gradients of up to 4 are rounded to bf16, by 2^-7 at most, and a product before; such errors have no sign.
                    let within = match precision {
                        Precision::F32 => 1e-4,
                        Precision::Bf16 => 0.02 * (rows as f32).sqrt(),
                    };
                    close(&what, &got, &want, None, within);
                }
            }
        }
    });
}

/// A linear layer of one weight, 1, and no bias leaves its input to GELU.
#[test]
fn gelu_and_its_derivative_over_their_whole_range() {
    let layer = Linear {
        weight: Span { start: 0, len: 1 },
        bias: Span { start: 1, len: 1 },
    };
    fn run<B: TrainBackend>(backend: &mut B, layer: Linear, x: &[f32]) -> [Vec<f32>; 3] {
        let dims = LinearDims {
            rows: x.len(),
            in_features: 1,
            out_features: 1,
        };
        let layout = layout(1);
        let mut values = vec![0.0; layout.len()];
        values[0] = 1.0;
        let params = backend.params(&layout, &values).unwrap();
        let x = buf(backend, x);
        let ones = buf(backend, &vec![1.0; dims.rows]);
        let [mut out, mut pre, mut d_x] = [(); 3].map(|()| buf(backend, &vec![9.0; dims.rows + 1]));
        backend
            .linear_gelu_saving(dims, &mut out, &mut pre, &x, &params, layer)
            .unwrap();
        backend
            .linear_backward_input(dims, &mut d_x, &ones, &params, layer, Some(&pre))
            .unwrap();
        let saved = contents(backend, &out, dims.rows + 1);
        backend
            .linear(dims, &mut out, &x, &params, layer, Epilogue::BiasGelu)
            .unwrap();
        [
            saved,
            contents(backend, &d_x, dims.rows + 1),
            contents(backend, &out, dims.rows + 1),
        ]
    }
    let x: Vec<f32> = (-6401..6402).map(|i| short(i as f32 / 512.0)).collect();
    both(|mut cuda, precision| {
        let got = run(&mut cuda, layer, &x);
        let want = run(&mut Reference::<f64, _>::owned(), layer, &x);
        for (i, (got, want)) in got.iter().zip(&want).enumerate() {
            // `erf` is right to some units of 6e-8, times x.
            let within = match precision {
                Precision::F32 => 4e-7,
                Precision::Bf16 => 3e-7,
            };
            close(
                &format!("{precision:?} {i}"),
                got,
                want,
                Some(precision),
                within,
            );
        }
    });
}

#[test]
fn a_factor_for_several_rows() {
    fn run<B: TrainBackend>(backend: &mut B, dims: RowDims, per: usize) -> [Vec<f32>; 2] {
        let x = buf(backend, &noise(1, dims.len()));
        let scale = buf(backend, &noise(2, dims.rows / per));
        let mut out = buf(backend, &vec![9.0; dims.len() + 3]);
        backend.scale_rows(dims, &mut out, &x, &scale, per).unwrap();
        let scaled = contents(backend, &out, dims.len() + 3);
        let linear = LinearDims {
            rows: dims.rows,
            in_features: 1,
            out_features: dims.dim,
        };
        let layout = layout(dims.dim);
        let params = backend.params(&layout, &noise(3, layout.len())).unwrap();
        let layer = Linear {
            weight: Span {
                start: 0,
                len: dims.dim,
            },
            bias: Span {
                start: dims.dim,
                len: dims.dim,
            },
        };
        let narrow = buf(backend, &noise(4, dims.rows));
        let scale = Some((&scale, per));
        backend
            .linear_residual(linear, &mut out, &x, &narrow, &params, layer, scale)
            .unwrap();
        [scaled, contents(backend, &out, dims.len() + 3)]
    }
    both(|mut cuda, precision| {
        for (rows, dim, per) in [(6, 768, 3), (6, 21, 2), (40, 4, 5), (394, 64, 197)] {
            let dims = RowDims { rows, dim };
            let got = run(&mut cuda, dims, per);
            let want = run(&mut Reference::<f64, _>::owned(), dims, per);
            let what = format!("{precision:?} {dims:?}");
            close(&what, &got[0], &want[0], Some(precision), 1e-6);
            // In bf16 the product is rounded before it is scaled, by at most 1.8 times its half unit of 2^-9 * 8.
            let within = match precision {
                Precision::F32 => 1e-6,
                Precision::Bf16 => 0.03,
            };
            close(&what, &got[1], &want[1], Some(precision), within);
        }
    });
}

#[test]
fn norms_of_long_vectors() {
    both(|mut cuda, _| {
        for len in [1, 1023, 4099, 300_001] {
            let values = noise(len as u64, len);
            let squares: f64 = values.iter().map(|&x| f64::from(x).powi(2)).sum();
            let x = vector(&mut cuda, &values);
            let mut out = vector(&mut cuda, &[7.0; 3]);
            cuda.norm(&mut out, 1, &x).unwrap();
            let found = vector_contents(&mut cuda, &out, 3);
            assert!((f64::from(found[1]) / squares.sqrt() - 1.0).abs() < 3e-7);
            assert_eq!([found[0], found[2]], [7.0, 7.0]);
        }
    });
}

/// Six steps over many pieces: the tape of a step comes again and becomes a graph, whose learning rate and momentum still change.
/// Afterwards products read what was trained.
#[test]
fn steps_over_many_pieces() {
    const DIM: usize = 1031;
    const PROBE: usize = 5;
    struct Found {
        student: Vec<f32>,
        teacher: Vec<f32>,
        vectors: [Vec<f32>; 3],
        products: [Vec<f32>; 2],
    }
    fn run<B: TrainBackend>(backend: &mut B) -> Found {
        let layout = layout(DIM);
        let all = layout.len();
        let segment = |start, end, ema| Segment {
            span: Span {
                start,
                len: end - start,
            },
            weight_decay: if ema { 0.05 } else { 0.0 },
            lr_scale: if start == 17 { 0.5 } else { 1.0 },
            ema,
        };
        // The first 17 and what lies between are frozen.
        let segments = [
            segment(9001, 9003, true),
            segment(17, 8195, true),
            segment(9003, all, false),
        ];
        let mut student = backend.params(&layout, &noise(1, all)).unwrap();
        let mut teacher = backend.teacher_params(&layout, &noise(2, all)).unwrap();
        let mut grads = vector(backend, &vec![0.0; all]);
        let mut exp_avg = vector(backend, &noise(3, all));
        let squares: Vec<f32> = noise(4, all).iter().map(|x| x * x).collect();
        let mut exp_avg_sq = vector(backend, &squares);
        let mut norms = backend.vector(1).unwrap();
        for step in 1..=6 {
            backend
                .write_vector(&mut grads, 0, &noise(10 + step, all))
                .unwrap();
            backend.norm(&mut norms, 0, &grads).unwrap();
            let constants = AdamW {
                lr: 0.001 * step as f64,
                beta1: 0.9,
                beta2: 0.95,
                eps: 1e-8,
                step,
                momentum: 0.9 + 0.01 * step as f64,
            };
            let clip = Clip {
                norms: &norms,
                at: 0,
                max_norm: 100.0,
            };
            backend
                .adamw_ema(
                    &mut student,
                    Some(&mut teacher),
                    &mut grads,
                    &mut exp_avg,
                    &mut exp_avg_sq,
                    &segments,
                    &constants,
                    Some(clip),
                )
                .unwrap();
        }
        let mut read = |params: &B::Params| {
            let span = Span { start: 0, len: all };
            let mut values = vec![0.0; all];
            backend.read_params(&mut values, params, span).unwrap();
            values
        };
        let (student_values, teacher_values) = (read(&student), read(&teacher));
        // One weight each of many outputs: the copies that products read, multiplied by 1.
        let dims = LinearDims {
            rows: 1,
            in_features: 1,
            out_features: all - PROBE,
        };
        let layer = Linear {
            weight: Span {
                start: PROBE,
                len: all - PROBE,
            },
            bias: Span {
                start: 0,
                len: all - PROBE,
            },
        };
        let one = buf(backend, &[1.0]);
        let mut product = |params: &B::Params| {
            let mut out = backend.buf(dims.out_features).unwrap();
            backend
                .linear(dims, &mut out, &one, params, layer, Epilogue::Bias)
                .unwrap();
            contents(backend, &out, dims.out_features)
        };
        let products = [product(&student), product(&teacher)];
        Found {
            student: student_values,
            teacher: teacher_values,
            vectors: [&grads, &exp_avg, &exp_avg_sq]
                .map(|vector| vector_contents(backend, vector, all)),
            products,
        }
    }
    both(|mut cuda, precision| {
        let got = run(&mut cuda);
        assert!(cuda.runs().graphs >= 3, "{:?}", cuda.runs());
        let want = run(&mut Reference::<f64, _>::owned());
        let what = |name: &str| format!("{precision:?} {name}");
        close(&what("student"), &got.student, &want.student, None, 2e-6);
        close(&what("teacher"), &got.teacher, &want.teacher, None, 1e-6);
        assert_eq!(got.student[..17], want.student[..17]);
        assert_eq!(got.student[8195..9001], want.student[8195..9001]);
        assert_eq!(got.teacher[9003..], want.teacher[9003..]);
        assert!(got.vectors[0].iter().all(|x| x.to_bits() == 0));
        for (got, want) in got.vectors.iter().zip(&want.vectors).skip(1) {
            close(&what("moments"), got, want, None, 1e-6);
        }
        for (params, product) in [
            (&got.student, &got.products[0]),
            (&got.teacher, &got.products[1]),
        ] {
            let sums: Vec<f32> = (PROBE..params.len())
                .map(|i| params[i] + params[i - PROBE])
                .collect();
            // Two roundings of at most 2^-9 * 4, and that of the sum.
            let within = match precision {
                Precision::F32 => 1e-6,
                Precision::Bf16 => 0.016,
            };
            close(&what("products"), product, &sums, Some(precision), within);
        }
    });
}
