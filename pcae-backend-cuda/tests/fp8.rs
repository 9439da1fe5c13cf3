//! A teacher in fp8: its weights, its products, its blocks, and who cannot have one.
#![allow(
    clippy::unwrap_used,
    reason = "a test stops at what it does not expect"
)]

use std::process::Command;

use pcae_backend_cuda::{Buf, Cuda, Error, Params, Precision};
use pcae_kernel::backend::{
    AdamW, AttentionDims, Backend, BlockDims, Epilogue, Linear, LinearDims, Segment, TrainBackend,
    block_by_layers,
};
use pcae_kernel::config::VitConfig;
use pcae_kernel::layout::Layout;

mod emulated;

#[test]
fn on_the_emulator() {
    emulated::run_again();
}

/// A backend with such a teacher, if there is a device for it.
fn device() -> Option<Cuda> {
    if !emulated::has_device() {
        return None;
    }
    let cuda = Cuda::new(0, Precision::Bf16).unwrap();
    if cuda.capability() < (8, 9) {
        println!("skipped: fp8 is for compute capability 8.9 and newer");
        return None;
    }
    Some(cuda.with_fp8_teacher().unwrap())
}

const DIM: usize = 48;
const HIDDEN: usize = 80;

/// Two blocks, whose products have the same sizes and other scales.
fn layout(num_heads: usize) -> Layout {
    Layout::encoder(&VitConfig {
        img_size: [8, 12],
        in_chans: 1,
        patch_size: 4,
        embed_dim: DIM,
        depth: 2,
        num_heads,
        mlp_ratio: HIDDEN as f64 / DIM as f64,
    })
}

/// Numbers of both signs, most of them small, some a thousand times smaller.
fn noise(len: usize, seed: u32) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        f64::from(state) / 2f64.powi(32) - 0.5
    };
    let value = |_| {
        let (sum, size) = (next() + next() + next(), next());
        (if size > 0.45 { sum / 1000.0 } else { sum }) as f32
    };
    (0..len).map(value).collect()
}

fn bf16(x: f32) -> f32 {
    let bits = x.to_bits();
    f32::from_bits((bits + 0x7fff + (bits >> 16 & 1)) & 0xffff_0000)
}

/// The number of e4m3 that is nearest, by its definition: 4 significant bits from 2^-6 on, multiples of 2^-9 below, 448 at most.
fn e4m3(x: f64) -> f64 {
    let exponent = x.abs().log2().floor().max(-6.0);
    let step = 2f64.powf(exponent - 3.0);
    ((x / step).round_ties_even() * step).clamp(-448.0, 448.0)
}

/// What a weight becomes.
fn quantised(weight: &[f32]) -> Vec<f64> {
    let largest = weight
        .iter()
        .fold(0.0_f32, |most, w| most.max(bf16(*w).abs()));
    let mut scale = 2f64.powi(64);
    while f64::from(largest) * scale > 448.0 {
        scale /= 2.0;
    }
    let one = |w: &f32| e4m3(f64::from(bf16(*w)) * scale) / scale;
    weight.iter().map(one).collect()
}

fn upload(cuda: &mut Cuda, values: &[f32]) -> Buf {
    let mut buf = cuda.buf(values.len()).unwrap();
    cuda.write(&mut buf, values).unwrap();
    buf
}

fn download(cuda: &mut Cuda, buf: &Buf, len: usize) -> Vec<f32> {
    let mut values = vec![0.0; len];
    cuda.read(&mut values, buf).unwrap();
    values
}

fn linear(
    cuda: &mut Cuda,
    dims: LinearDims,
    x: &[f32],
    params: &Params,
    layer: Linear,
) -> Vec<f32> {
    let x = upload(cuda, x);
    let mut out = cuda.buf(dims.out_len()).unwrap();
    cuda.linear(dims, &mut out, &x, params, layer, Epilogue::Bias)
        .unwrap();
    download(cuda, &out, dims.out_len())
}

fn layers() -> Vec<(LinearDims, Linear)> {
    let sizes = [(DIM, 3 * DIM), (DIM, DIM), (DIM, HIDDEN), (HIDDEN, DIM)];
    let blocks = layout(3).encoder.blocks;
    let linears = (0..blocks.depth).flat_map(|index| blocks.block(index).linears());
    let dims = sizes.iter().map(|(in_features, out_features)| LinearDims {
        rows: 0,
        in_features: *in_features,
        out_features: *out_features,
    });
    dims.cycle().zip(linears).collect()
}

/// A product with the unit matrix is the weight, as it is multiplied.
fn weights(cuda: &mut Cuda, params: &Params) -> Vec<Vec<f32>> {
    let weight = |(dims, layer): (LinearDims, Linear)| {
        let n = dims.in_features;
        let unit: Vec<f32> = (0..n * n).map(|i| f32::from(i / n == i % n)).collect();
        let dims = LinearDims { rows: n, ..dims };
        linear(cuda, dims, &unit, params, layer)
    };
    layers().into_iter().map(weight).collect()
}

/// No bias, and weights of sizes that are far apart.
fn parameters() -> Vec<f32> {
    let mut values = noise(layout(3).len(), 1);
    let factors = [1.0, 1e-4, 700.0, 0.0, 3e4, 0.02, 1e-12, 5.0];
    for ((_, layer), factor) in layers().iter().zip(factors) {
        values[layer.bias.start..layer.bias.end()].fill(0.0);
        values[layer.weight.start..layer.weight.end()]
            .iter_mut()
            .for_each(|w| *w *= factor);
    }
    values
}

#[test]
fn weights_are_scaled_by_a_power_of_two_and_rounded() {
    let Some(mut cuda) = device() else { return };
    let values = parameters();
    let params = cuda.teacher_params(&layout(3), &values).unwrap();
    for ((dims, layer), got) in layers().into_iter().zip(weights(&mut cuda, &params)) {
        let (n, m) = (dims.in_features, dims.out_features);
        let want = quantised(&values[layer.weight.start..layer.weight.end()]);
        for i in 0..n {
            for j in 0..m {
                // All have few bits, so nothing else rounds.
                assert_eq!(
                    f64::from(got[i * m + j]),
                    want[j * n + i],
                    "[{i}, {j}] of {dims:?}"
                );
            }
        }
    }
}

/// Inputs are rounded too, and beyond 448 end there; sums, bias and what is added are not rounded but at the end.
#[test]
fn products_are_those_of_the_rounded_operands() {
    let Some(mut cuda) = device() else { return };
    let mut values = noise(layout(3).len(), 2);
    for (_, layer) in layers() {
        values[layer.weight.start..layer.weight.end()]
            .iter_mut()
            .for_each(|w| *w /= 5.0);
    }
    let params = cuda.teacher_params(&layout(3), &values).unwrap();
    for (seed, (dims, layer)) in (3..).zip(layers()) {
        // A number of rows that is a multiple of nothing.
        let dims = LinearDims { rows: 37, ..dims };
        let (n, m) = (dims.in_features, dims.out_features);
        let mut x = noise(dims.in_len(), seed);
        (x[0], x[n + 1]) = (1e4, -449.0);
        let got = linear(&mut cuda, dims, &x, &params, layer);
        let add = noise(dims.out_len(), 9);
        let (input, mut out) = (upload(&mut cuda, &x), upload(&mut cuda, &add));
        cuda.linear(
            dims,
            &mut out,
            &input,
            &params,
            layer,
            Epilogue::BiasResidual,
        )
        .unwrap();
        let added = download(&mut cuda, &out, dims.out_len());

        let weight = quantised(&values[layer.weight.start..layer.weight.end()]);
        let x: Vec<f64> = x.iter().map(|x| e4m3(f64::from(bf16(*x)))).collect();
        for i in 0..dims.rows {
            for j in 0..m {
                let terms = (0..n).map(|k| x[i * n + k] * weight[j * n + k]);
                let size: f64 = terms.clone().map(f64::abs).sum();
                let want = terms.sum::<f64>() + f64::from(bf16(values[layer.bias.start + j]));
                // One rounding to bf16, half a unit of 8 bits. In the sum before, f32 on the emulator, and a device's fast sums keep 13
                // bits below the largest term at least: up to 6 such steps of 16 or 32 terms each here.
                let near = |got: f32, want: f64| {
                    (f64::from(got) - want).abs() <= want.abs() / 256.0 + size * 6.0 / 8192.0 + 1e-6
                };
                let at = i * m + j;
                assert!(
                    near(got[at], want),
                    "[{i}, {j}] of {dims:?}: {} {want}",
                    got[at]
                );
                let want = want + f64::from(bf16(add[at]));
                assert!(
                    near(added[at], want),
                    "[{i}, {j}] of {dims:?}, added: {} {want}",
                    added[at]
                );
            }
        }
    }
}

/// Layers that hand each other e4m3 give the bits of layers that write bf16; heads of 16 are written so by attention itself, heads of 12 are not.
#[test]
fn a_block_is_its_layers() {
    let Some(mut cuda) = device() else { return };
    for num_heads in [3, 4] {
        let layout = layout(num_heads);
        let params = cuda
            .teacher_params(&layout, &noise(layout.len(), 4))
            .unwrap();
        let dims = BlockDims {
            attention: AttentionDims {
                batch: 3,
                tokens: 21,
                num_heads,
                head_dim: DIM / num_heads,
            },
            hidden: HIDDEN,
        };
        let rows = dims.rows();
        let start = noise(rows.len(), 5);
        let block = layout.encoder.blocks.block(0);
        let mut run = |fused: bool| {
            let mut x = upload(&mut cuda, &start);
            let mut y = cuda.buf(rows.len()).unwrap();
            let mut wide = cuda.buf(3 * rows.len()).unwrap();
            let scratch = [&mut y, &mut wide];
            match fused {
                true => cuda.block(dims, &mut x, scratch, &params, block).unwrap(),
                false => block_by_layers(&mut cuda, dims, &mut x, scratch, &params, block).unwrap(),
            }
            download(&mut cuda, &x, rows.len())
        };
        let (fused, by_layers) = (run(true), run(false));
        assert!(fused.iter().all(|x| x.is_finite()) && fused != start);
        assert_eq!(fused, by_layers, "{num_heads} heads");
    }
}

/// The optimizer's pass makes them anew, and what it makes depends on the parameters alone: a run that is resumed from these has the same bits.
#[test]
fn weights_follow_the_teacher_and_are_the_same_after_a_resume() {
    let Some(mut cuda) = device() else { return };
    let layout = layout(3);
    let len = layout.len();
    let mut student = cuda.params(&layout, &noise(len, 6)).unwrap();
    let mut teacher = cuda.teacher_params(&layout, &parameters()).unwrap();
    let before = weights(&mut cuda, &teacher);
    let [mut grads, mut exp_avg, mut exp_avg_sq] = [7, 8, 9].map(|seed| {
        let mut vector = cuda.vector(len).unwrap();
        let values: Vec<f32> = noise(len, seed).iter().map(|x| x.abs()).collect();
        cuda.write_vector(&mut vector, 0, &values).unwrap();
        vector
    });
    let segments = [Segment {
        span: pcae_kernel::backend::Span { start: 0, len },
        weight_decay: 0.05,
        lr_scale: 1.0,
        ema: true,
    }];
    // So often that steps are graphs.
    for step in 1..=4 {
        let adamw = AdamW {
            lr: 1e-2,
            beta1: 0.9,
            beta2: 0.95,
            eps: 1e-8,
            step,
            momentum: 0.5,
        };
        let vectors = (&mut grads, &mut exp_avg, &mut exp_avg_sq);
        cuda.adamw_ema(
            &mut student,
            Some(&mut teacher),
            vectors.0,
            vectors.1,
            vectors.2,
            &segments,
            &adamw,
            None,
        )
        .unwrap();
    }
    let runs = cuda.runs();
    assert!(runs.graphs >= 2 && runs.refused == 0, "{runs:?}");
    let after = weights(&mut cuda, &teacher);
    let mut values = vec![0.0; len];
    cuda.read_params(&mut values, &teacher, segments[0].span)
        .unwrap();
    let resumed = cuda.teacher_params(&layout, &values).unwrap();
    assert_ne!(before, after);
    assert_eq!(weights(&mut cuda, &resumed), after);
}

#[test]
fn a_teacher_of_other_widths_or_in_f32_is_refused() {
    let Some(mut cuda) = device() else { return };
    let vit = VitConfig::preset("vit-micro").unwrap();
    let layout = Layout::encoder(&VitConfig {
        embed_dim: 24,
        num_heads: 3,
        ..vit
    });
    let refused = cuda
        .teacher_params(&layout, &vec![0.0; layout.len()])
        .unwrap_err();
    assert!(refused.to_string().contains("multiples of 16"), "{refused}");
    let cuda = Cuda::new(0, Precision::F32).unwrap();
    let refused = cuda.with_fp8_teacher().unwrap_err();
    assert!(matches!(refused, Error::NoFp8 { .. }), "{refused}");
}

/// In a process of its own, whose cuBLASLt has nothing for fp8.
#[test]
#[ignore = "a child process: the test below runs it, and says so where it cannot"]
fn what_is_said() {
    match Cuda::new(0, Precision::Bf16).unwrap().with_fp8_teacher() {
        Ok(cuda) => println!("works: {}", cuda.has_fp8_teacher()),
        Err(error) => println!("refused: {error}"),
    }
}

#[test]
fn a_library_without_fp8_is_refused_with_what_it_takes() {
    if !cfg!(all(target_os = "linux", target_pointer_width = "64")) {
        println!("skipped: the emulator is for Linux");
        return;
    }
    let Some(folder) = emulated::libraries() else {
        return;
    };
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "what_is_said", "--ignored", "--nocapture"])
        .env("PCAE_EMULATED_FP8", "none")
        .env("LD_LIBRARY_PATH", &folder)
        .env("PCAE_CACHE", folder.join("images"))
        .output()
        .unwrap();
    let found = String::from_utf8_lossy(&output.stdout).into_owned();
    for part in [
        "refused",
        "emulated sm_90",
        "cuBLASLt",
        "--teacher-precision bf16",
    ] {
        assert!(found.contains(part), "{part:?} is missing in {found}");
    }
}
