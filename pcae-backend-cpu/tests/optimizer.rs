//! Weights in bf16 are packed as they are updated: whatever comes after an update is what parameters made of the new values give.
#![allow(
    clippy::unwrap_used,
    reason = "a test stops at what it does not expect"
)]

use pcae_backend_cpu::{Bf16Unit, Buf, Cpu, Isa, Params, Precision};
use pcae_kernel::backend::{
    AdamW, Backend, Epilogue, Linear, LinearDims, Segment, Span, TrainBackend,
};
use pcae_kernel::config::VitConfig;
use pcae_kernel::layout::Layout;
use proptest::prelude::*;

const ROWS: usize = 5;

fn tiny() -> VitConfig {
    VitConfig {
        embed_dim: 36,
        depth: 2,
        num_heads: 3,
        ..VitConfig::preset("vit-micro").unwrap()
    }
}

fn wave(len: usize, factor: f32) -> Vec<f32> {
    (0..len).map(|i| (i as f32 * factor).sin()).collect()
}

fn buf(cpu: &mut Cpu, len: usize) -> Buf {
    let mut buf = cpu.buf(len).unwrap();
    cpu.write(&mut buf, &wave(len, 0.7)).unwrap();
    buf
}

/// What the layers give, and the gradients of their inputs.
fn results(cpu: &mut Cpu, params: &Params, layers: &[(Linear, usize)], backward: bool) -> Vec<f32> {
    let mut all = Vec::new();
    for &(layer, out_features) in layers {
        let dims = LinearDims {
            rows: ROWS,
            in_features: layer.weight.len / out_features,
            out_features,
        };
        let (x, y) = (buf(cpu, dims.in_len()), buf(cpu, dims.out_len()));
        let (mut out, mut d_x) = (
            cpu.buf(dims.out_len()).unwrap(),
            cpu.buf(dims.in_len()).unwrap(),
        );
        cpu.linear(dims, &mut out, &x, params, layer, Epilogue::Bias)
            .unwrap();
        if backward {
            cpu.linear_backward_input(dims, &mut d_x, &y, params, layer, None)
                .unwrap();
        }
        for (buf, len) in [(&out, dims.out_len()), (&d_x, dims.in_len())] {
            let mut values = vec![0.0; len];
            cpu.read(&mut values, buf).unwrap();
            all.extend(values);
        }
    }
    all
}

fn values_of(cpu: &mut Cpu, params: &Params, len: usize) -> Vec<f32> {
    let mut values = vec![0.0; len];
    cpu.read_params(&mut values, params, Span { start: 0, len })
        .unwrap();
    values
}

/// The backends of this machine: one precision for all, or f32 beside a teacher in bf16; one or two threads.
fn backends() -> Vec<Cpu> {
    let mut all = Vec::new();
    for isa in Isa::available() {
        for unit in Bf16Unit::available(isa).map(Precision::Bf16) {
            for threads in if cfg!(feature = "threads") {
                1..=2
            } else {
                1..=1
            } {
                let cpu = || Cpu::with(isa, threads).unwrap();
                all.push(cpu().precision(unit));
                all.push(cpu().teacher_precision(unit));
                // Panels of another width.
                let other = Bf16Unit::available(isa).last().map(Precision::Bf16);
                all.push(cpu().precision(unit).teacher_precision(other.unwrap()));
            }
        }
    }
    all
}

/// A segment that ends within a weight or begins there, by one parameter at least, changes what is packed of it.
#[test]
fn a_single_parameter_of_a_weight_is_packed_anew() {
    let layout = Layout::encoder(&tiny());
    let (len, layer) = (layout.len(), layout.encoder.blocks.block(0).fc1);
    let layers = [(layer, layer.bias.len)];
    let Span { start, .. } = layer.weight;
    let last = layer.weight.end() - 1;
    let values = wave(len, 0.013);
    let step = AdamW {
        lr: 0.5,
        momentum: 0.5,
        beta1: 0.9,
        beta2: 0.95,
        eps: 1e-8,
        step: 1,
    };
    for mut cpu in backends() {
        // The parameter before and the first; the first alone; the last alone; the last and the one behind.
        for (at, count) in [(start - 1, 2), (start, 1), (last, 1), (last, 2)] {
            let mut student = cpu.params(&layout, &values).unwrap();
            let mut teacher = cpu.teacher_params(&layout, &values).unwrap();
            let before =
                [&student, &teacher].map(|params| results(&mut cpu, params, &layers, false));
            let [mut grads, mut m, mut v] = [(); 3].map(|()| cpu.vector(len).unwrap());
            cpu.write_vector(&mut grads, 0, &vec![1.0; len]).unwrap();
            let segments = [Segment {
                span: Span {
                    start: at,
                    len: count,
                },
                weight_decay: 0.0,
                lr_scale: 1.0,
                ema: true,
            }];
            cpu.adamw_ema(
                &mut student,
                Some(&mut teacher),
                &mut grads,
                &mut m,
                &mut v,
                &segments,
                &step,
                None,
            )
            .unwrap();
            let new = values_of(&mut cpu, &student, len);
            let fresh = cpu.params(&layout, &new).unwrap();
            let [got, want] =
                [&student, &fresh].map(|params| results(&mut cpu, params, &layers, true));
            assert!(got == want, "{cpu:?}, student, {count} from {at}");
            let new = values_of(&mut cpu, &teacher, len);
            let fresh = cpu.teacher_params(&layout, &new).unwrap();
            let [got, want] =
                [&teacher, &fresh].map(|params| results(&mut cpu, params, &layers, false));
            assert!(got == want, "{cpu:?}, teacher, {count} from {at}");
            let after =
                [&student, &teacher].map(|params| results(&mut cpu, params, &layers, false));
            assert!(
                before[0] != after[0] && before[1] != after[1],
                "{cpu:?}, {at}"
            );
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(12) })]

    #[test]
    fn packed_weights_follow_their_values(
        cuts in prop::collection::vec(0.0f64..1.0, 0..6),
        emas in prop::collection::vec(any::<bool>(), 8),
        whole_layers in any::<bool>(),
    ) {
        let layout = Layout::encoder(&tiny());
        let len = layout.len();
        let values = wave(len, 0.013);
        let mut layers = Vec::new();
        for index in 0..2 {
            for layer in layout.encoder.blocks.block(index).linears() {
                layers.push((layer, layer.bias.len));
            }
        }
        // Pieces of everything, or each tensor for itself.
        let mut ends: Vec<usize> = cuts.iter().map(|cut| (cut * len as f64) as usize).collect();
        if whole_layers {
            ends.clear();
            layout.for_each(|tensor| ends.push(tensor.span.end()));
        }
        ends.push(len);
        ends.sort_unstable();
        let mut start = 0;
        let mut segments = Vec::new();
        for (i, end) in ends.into_iter().enumerate() {
            segments.push(Segment {
                span: Span { start, len: end - start },
                weight_decay: 0.05,
                lr_scale: 1.0,
                ema: emas[i % emas.len()],
            });
            start = end;
        }
        let step = AdamW { lr: 0.1, momentum: 0.5, beta1: 0.9, beta2: 0.95, eps: 1e-8, step: 1 };
        for mut cpu in backends() {
            let mut student = cpu.params(&layout, &values).unwrap();
            let mut teacher = cpu.teacher_params(&layout, &wave(len, 0.017)).unwrap();
            let [mut grads, mut m, mut v] = [(); 3].map(|()| cpu.vector(len).unwrap());
            cpu.write_vector(&mut grads, 0, &wave(len, 0.3)).unwrap();
            let before = results(&mut cpu, &teacher, &layers, false);
            cpu.adamw_ema(&mut student, Some(&mut teacher), &mut grads, &mut m, &mut v, &segments, &step, None).unwrap();
            let new = values_of(&mut cpu, &student, len);
            prop_assert!(new.iter().zip(&values).any(|(a, b)| a != b));
            let fresh = cpu.params(&layout, &new).unwrap();
            let [got, want] = [&student, &fresh].map(|params| results(&mut cpu, params, &layers, true));
            prop_assert!(got == want, "{cpu:?}, student");
            let new = values_of(&mut cpu, &teacher, len);
            let fresh = cpu.teacher_params(&layout, &new).unwrap();
            let [got, want] = [&teacher, &fresh].map(|params| results(&mut cpu, params, &layers, false));
            prop_assert!(got == want, "{cpu:?}, teacher");
            // Norms, the embedding and the class token are not among the layers.
            let is_read = |span: Span| layers.iter().any(|(layer, _)| {
                [layer.weight, layer.bias].into_iter().any(|read| span.start < read.end() && read.start < span.end())
            });
            prop_assert_eq!(got != before, segments.iter().any(|s| s.ema && is_read(s.span)));
        }
    }
}
