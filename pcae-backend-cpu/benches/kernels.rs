//! The kernels through the contract, on the best instruction set and one thread: `cargo bench -p pcae-backend-cpu`.
//!
//! Throughput is in floating-point operations per second for products and attention, else in elements. For shares of the
//! machine's peak, and whole models, see `pcae bench`.

#![expect(clippy::unwrap_used, reason = "a benchmark fails by panicking")]

use std::time::Duration;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use pcae_backend_cpu::{Bf16Unit, Buf, Cpu, Isa, Params, Precision};
use pcae_kernel::backend::{
    Accum, AdamW, AttentionDims, Backend, Epilogue, LinearDims, RowDims, Segment, Span,
    TrainBackend,
};
use pcae_kernel::config::VitConfig;
use pcae_kernel::init::init;
use pcae_kernel::layout::{BlockParams, Layout};
use pcae_kernel::op::Op;

/// One block of a model, on the tokens of a picture.
struct Block {
    cpu: Cpu,
    layout: Layout,
    params: Params,
    frozen: Params,
    vit: VitConfig,
}

const TOKENS: usize = 197;

impl Block {
    fn new(model: &str, precision: Precision) -> Self {
        let vit = VitConfig {
            depth: 1,
            ..VitConfig::preset(model).unwrap()
        };
        let layout = Layout::encoder(&vit);
        let mut values = vec![0.0; layout.len()];
        init(&layout, 0, &mut values).unwrap();
        let mut cpu = Cpu::with(Isa::detect(), 1).unwrap().precision(precision);
        Self {
            params: cpu.params(&layout, &values).unwrap(),
            frozen: cpu.frozen_params(&layout, &values).unwrap(),
            cpu,
            layout,
            vit,
        }
    }

    fn block(&self) -> BlockParams {
        self.layout.encoder.blocks.block(0)
    }
}

/// Values in no order that a predictor could learn, none of them tiny.
fn filled(cpu: &mut Cpu, len: usize) -> Buf {
    let values: Vec<f32> = (0..len).map(|i| (i as f32 * 0.7).sin()).collect();
    let mut buf = cpu.buf(len).unwrap();
    cpu.write(&mut buf, &values).unwrap();
    buf
}

fn operations(op: Op) -> Throughput {
    Throughput::Elements(2 * op.macs())
}

fn precisions() -> [(&'static str, Precision); 2] {
    let unit = Bf16Unit::detect(Isa::detect());
    [("f32", Precision::F32), ("bf16", Precision::Bf16(unit))]
}

/// The four linear layers of a block of ViT-B and ViT-Ti: forward, and both products of the backward.
fn products(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("products");
    for model in ["vit-b16", "vit-ti16"] {
        for (format, precision) in precisions() {
            let mut bench = Block::new(model, precision);
            let (d, hidden) = (bench.vit.embed_dim, bench.vit.mlp_hidden());
            let block = bench.block();
            let (cpu, widest) = (&mut bench.cpu, TOKENS * hidden);
            let (x, mut y) = (filled(cpu, widest), filled(cpu, widest));
            let pre_gelu = filled(cpu, widest);
            let mut grads = cpu.vector(bench.layout.len()).unwrap();
            for (name, layer, in_features, out_features, epilogue) in [
                ("qkv", block.qkv, d, 3 * d, Epilogue::BiasQkv),
                ("proj", block.proj, d, d, Epilogue::BiasResidual),
                ("fc1", block.fc1, d, hidden, Epilogue::BiasGelu),
                ("fc2", block.fc2, hidden, d, Epilogue::BiasResidual),
            ] {
                let dims = LinearDims {
                    rows: TOKENS,
                    in_features,
                    out_features,
                };
                group.throughput(operations(Op::Linear(dims)));
                let id = |pass| BenchmarkId::new(pass, format!("{model} {name} {format}"));
                let (params, frozen) = (&bench.params, &bench.frozen);
                group.bench_function(id("forward"), |bencher| {
                    bencher.iter(|| {
                        cpu.linear(dims, &mut y, &x, frozen, layer, epilogue)
                            .unwrap()
                    });
                });
                let pre_gelu = (name == "fc2").then_some(&pre_gelu);
                group.bench_function(id("input gradient"), |bencher| {
                    bencher.iter(|| {
                        cpu.linear_backward_input(dims, &mut y, &x, params, layer, pre_gelu)
                            .unwrap();
                    });
                });
                group.bench_function(id("parameter gradient"), |bencher| {
                    bencher.iter(|| {
                        cpu.linear_backward_params(dims, &mut grads, layer, &y, &x)
                            .unwrap();
                    });
                });
            }
        }
    }
    group.finish();
}

/// ViT-B's heads on the sequences of a training step: the teacher's late stages, the student, the decoder, and a whole
/// picture. About as many tokens in all.
fn attention(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("attention");
    let mut cpu = Cpu::with(Isa::detect(), 1).unwrap();
    for tokens in [6, 20, 50, 197] {
        let dims = AttentionDims {
            batch: 400 / tokens,
            tokens,
            num_heads: 12,
            head_dim: 64,
        };
        let qkv = filled(&mut cpu, dims.qkv_len());
        let d_out = filled(&mut cpu, dims.out_len());
        let (mut out, mut d_qkv) = (
            cpu.buf(dims.out_len()).unwrap(),
            cpu.buf(dims.qkv_len()).unwrap(),
        );
        let mut lse = cpu.vector(dims.lse_len()).unwrap();
        group.throughput(operations(Op::Attention(dims)));
        group.bench_function(BenchmarkId::new("forward", tokens), |bencher| {
            bencher.iter(|| {
                cpu.attention_saving(dims, &mut out, &mut lse, &qkv)
                    .unwrap()
            });
        });
        group.throughput(operations(Op::AttentionBackward(dims)));
        group.bench_function(BenchmarkId::new("backward", tokens), |bencher| {
            bencher.iter(|| {
                cpu.attention_backward(dims, &mut d_qkv, &d_out, &qkv, &out, &lse)
                    .unwrap();
            });
        });
    }
    group.finish();
}

fn layer_norm(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("layer norm");
    for model in ["vit-b16", "vit-ti16"] {
        let mut bench = Block::new(model, Precision::F32);
        let norm = bench.block().norm1;
        let dims = RowDims {
            rows: TOKENS,
            dim: bench.vit.embed_dim,
        };
        let (cpu, params) = (&mut bench.cpu, &bench.params);
        let (x, d_y) = (filled(cpu, dims.len()), filled(cpu, dims.len()));
        let (mut out, mut d_x) = (cpu.buf(dims.len()).unwrap(), cpu.buf(dims.len()).unwrap());
        let mut stats = cpu.vector(2 * dims.rows).unwrap();
        let mut grads = cpu.vector(bench.layout.len()).unwrap();
        group.throughput(Throughput::Elements(dims.len() as u64));
        group.bench_function(BenchmarkId::new("forward", model), |bencher| {
            bencher.iter(|| {
                cpu.layer_norm_saving(dims, &mut out, &mut stats, &x, params, norm)
                    .unwrap();
            });
        });
        group.bench_function(BenchmarkId::new("backward", model), |bencher| {
            bencher.iter(|| {
                let accum = Accum::Replace;
                cpu.layer_norm_backward(
                    dims, &mut d_x, accum, &mut grads, &d_y, &x, &stats, params, norm,
                )
                .unwrap();
            });
        });
    }
    group.finish();
}

/// AdamW and moving average over all parameters of ViT-B with one block: 30 MB in each of five vectors. In bf16 it packs the weights.
fn adamw(criterion: &mut Criterion) {
    for (name, precision) in precisions() {
        adamw_in(criterion, name, precision);
    }
}

fn adamw_in(criterion: &mut Criterion, name: &str, precision: Precision) {
    let mut bench = Block::new("vit-b16", precision);
    let layout = bench.layout;
    let mut segments = Vec::new();
    layout.for_each(|tensor| {
        if tensor.is_trained() {
            segments.push(Segment {
                span: tensor.span,
                weight_decay: 0.05,
                lr_scale: 1.0,
                ema: true,
            });
        }
    });
    let (cpu, student) = (&mut bench.cpu, &mut bench.params);
    let mut values = vec![0.0; layout.len()];
    let all = Span {
        start: 0,
        len: layout.len(),
    };
    cpu.read_params(&mut values, student, all).unwrap();
    let mut teacher = cpu.teacher_params(&layout, &values).unwrap();
    let mut vector = || cpu.vector(layout.len()).unwrap();
    let (mut grads, mut exp_avg, mut exp_avg_sq) = (vector(), vector(), vector());
    let mut step = AdamW {
        lr: 1e-4,
        beta1: 0.9,
        beta2: 0.95,
        eps: 1e-8,
        step: 0,
        momentum: 0.999,
    };
    let mut group = criterion.benchmark_group("adamw and moving average");
    group.throughput(Throughput::Elements(layout.len() as u64));
    group.bench_function(format!("vit-b16, 1 block, {name}"), |bencher| {
        bencher.iter(|| {
            step.step += 1;
            cpu.adamw_ema(
                student,
                Some(&mut teacher),
                &mut grads,
                &mut exp_avg,
                &mut exp_avg_sq,
                &segments,
                &step,
                None,
            )
            .unwrap();
        });
    });
    group.finish();
}

criterion_group! {
    name = kernels;
    config = Criterion::default()
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_secs(1))
        .sample_size(20);
    targets = products, attention, layer_norm, adamw
}
criterion_main!(kernels);
