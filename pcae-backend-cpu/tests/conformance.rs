//! The kernel's conformance suite on every instruction set and several numbers of threads.

use pcae_backend_cpu::{Bf16Unit, Cpu, Error, Isa, Precision};
use pcae_kernel::conformance::{Tolerance, run, run_teacher};

/// The bits of every output.
fn outputs(isa: Isa, precision: Precision, threads: usize) -> Vec<(String, Vec<u32>)> {
    let mut cpu = Cpu::with(isa, threads)
        .expect("threads can be started")
        .precision(precision);
    assert_eq!((cpu.isa(), cpu.threads()), (isa, threads));
    let tolerance = match precision {
        Precision::F32 => Tolerance::F32,
        Precision::Bf16(_) => Tolerance::BF16,
    };
    let (mut all, mut worst) = (vec![], (0.0, String::new()));
    let result = run(&mut cpu, tolerance, |compared| {
        let name = format!("{} {}", compared.case, compared.output);
        if compared.worst > worst.0 {
            worst = (compared.worst, name.clone());
        }
        all.push((name, compared.got.iter().map(|x| x.to_bits()).collect()));
    });
    println!(
        "{isa}, {precision:?}, {threads} threads: {} outputs, worst {worst:?}",
        all.len()
    );
    if let Err(failure) = result {
        panic!("{isa}, {precision:?}, {threads} threads: {failure}");
    }
    all
}

#[test]
fn conforms_with_the_same_bits_for_any_number_of_threads() {
    let more: &[usize] = if cfg!(feature = "threads") {
        &[2, 3]
    } else {
        &[]
    };
    for isa in Isa::available() {
        let units = Bf16Unit::available(isa).map(Precision::Bf16);
        for precision in [Precision::F32].into_iter().chain(units) {
            let one = outputs(isa, precision, 1);
            for &threads in more {
                for ((name, a), (_, b)) in one.iter().zip(outputs(isa, precision, threads)) {
                    let with = format!("{isa}, {precision:?}");
                    assert!(*a == b, "{with}: {name} differs on {threads} threads");
                }
            }
        }
    }
}

/// A teacher's blocks in bf16 beside a student in f32.
#[test]
fn a_teacher_in_bf16_conforms() {
    for isa in Isa::available() {
        for unit in Bf16Unit::available(isa) {
            let mut cpu = Cpu::with(isa, 1)
                .unwrap()
                .teacher_precision(Precision::Bf16(unit));
            let (mut outputs, mut worst) = (0, 0.0_f64);
            let result = run_teacher(&mut cpu, Tolerance::BF16, |compared| {
                outputs += 1;
                worst = worst.max(compared.worst);
            });
            println!("{isa}, {unit}: {outputs} outputs, worst {worst}");
            if let Err(failure) = result {
                panic!("{isa}, {unit}: {failure}");
            }
            assert!(outputs >= 30);
            // It is not the student's precision.
            assert!(run_teacher(&mut cpu, Tolerance::F32, |_| ()).is_err());
        }
    }
}

#[test]
fn a_unit_of_another_instruction_set_is_refused() {
    use pcae_kernel::backend::{Backend, Epilogue, LinearDims, TrainBackend};
    use pcae_kernel::config::VitConfig;
    use pcae_kernel::layout::Layout;

    let layout = Layout::encoder(&VitConfig::preset("vit-micro").unwrap());
    let values = vec![0.5; layout.len()];
    let layer = layout.encoder.blocks.block(0).proj;
    let dims = LinearDims {
        rows: 10,
        in_features: 96,
        out_features: 96,
    };
    let mut refused = 0;
    for unit in Bf16Unit::available(Isa::detect()) {
        for isa in Isa::available() {
            let mut cpu = Cpu::with(isa, 1).unwrap().precision(Precision::Bf16(unit));
            let (x, mut out) = (cpu.buf(960).unwrap(), cpu.buf(960).unwrap());
            let params = cpu.params(&layout, &values);
            if !Bf16Unit::available(isa).any(|other| other == unit) {
                assert!(
                    matches!(params, Err(Error::Unit { unit: u, isa: i }) if (u, i) == (unit, isa))
                );
                // Of another backend, in this precision.
                let params = Cpu::with(Isa::detect(), 1).unwrap();
                let params = params
                    .precision(Precision::Bf16(unit))
                    .params(&layout, &values);
                let result =
                    cpu.linear(dims, &mut out, &x, &params.unwrap(), layer, Epilogue::Bias);
                assert_eq!(result, Err(Error::Unit { unit, isa }));
                refused += 1;
                continue;
            }
            let result = cpu.linear(dims, &mut out, &x, &params.unwrap(), layer, Epilogue::Bias);
            result.unwrap();
            let mut values = [0.0; 960];
            cpu.read(&mut values, &out).unwrap();
            assert!(values.iter().all(|x| *x == 0.5), "{isa} {unit}");
        }
    }
    println!("{refused} pairs refused");
}

#[test]
fn frozen_parameters_give_the_same_bits_forward_and_nothing_else() {
    use pcae_kernel::backend::{
        Backend, Epilogue, Linear, LinearDims, Norm, RowDims, Span, TrainBackend,
    };
    use pcae_kernel::config::{Reduction, VitConfig};
    use pcae_kernel::layout::Layout;
    use pcae_kernel::model::{MeanSimilarity, Vit};

    let vit = VitConfig::preset("vit-micro").unwrap();
    let layout = Layout::encoder(&vit);
    let mut values = vec![0.0; layout.len()];
    pcae_kernel::init::init(&layout, 7, &mut values).unwrap();
    let isas: Vec<Isa> = Isa::available().collect();
    let precisions = isas.iter().flat_map(|&isa| {
        let units = Bf16Unit::available(isa).map(Precision::Bf16);
        let all = [Precision::F32].into_iter().chain(units);
        all.map(move |precision| (isa, precision))
    });
    for (isa, precision) in precisions {
        let mut cpu = Cpu::with(isa, 1).unwrap().precision(precision);
        let mut images = cpu.buf(28 * 28).unwrap();
        let pixels: Vec<f32> = (0..28 * 28).map(|i| (i % 13) as f32 / 13.0).collect();
        cpu.write(&mut images, &pixels).unwrap();
        let mut features = [vec![0.0; 50 * 96], vec![0.0; 50 * 96]];
        let all = [
            cpu.params(&layout, &values).unwrap(),
            cpu.frozen_params(&layout, &values).unwrap(),
        ];
        for (params, features) in all.iter().zip(&mut features) {
            let mut model = Vit::new(&mut cpu, &vit, 1, 49, true, Reduction::NONE).unwrap();
            model
                .forward(&mut cpu, params, 1, &images, None, &mut MeanSimilarity)
                .unwrap();
            let tokens = model.final_norm(&mut cpu, params).unwrap();
            cpu.read(features, tokens).unwrap();
        }
        assert!(features[0].iter().any(|x| *x != 0.0));
        assert_eq!(features[0], features[1], "{isa} {precision:?}");

        let span = layout.encoder.norm.weight;
        let read = cpu.read_params(&mut vec![0.0; span.len], &all[1], span);
        assert!(matches!(read, Err(Error::Frozen { op: "read_params" })));
        let dims = LinearDims {
            rows: 1,
            in_features: 96,
            out_features: 96,
        };
        let layer: Linear = layout.encoder.blocks.block(0).proj;
        let (x, mut out) = (cpu.buf(96).unwrap(), cpu.buf(96).unwrap());
        let back = cpu.linear_backward_input(dims, &mut out, &x, &all[1], layer, None);
        assert!(matches!(back, Err(Error::Frozen { .. })));
        // As many weights in another shape.
        let dims_turned = LinearDims {
            in_features: 32,
            out_features: 288,
            ..dims
        };
        let mut wide = cpu.buf(288).unwrap();
        let turned = cpu.linear(dims_turned, &mut wide, &x, &all[1], layer, Epilogue::Bias);
        assert!(matches!(turned, Err(Error::Frozen { op: "linear" })));
        // Where nothing but products reads a weight, it is there in bf16 alone.
        let block = layout.encoder.blocks.block(0);
        let (weight, bias) = (block.norm1.weight, block.qkv.weight);
        let norm = Norm {
            weight,
            bias: Span { len: 96, ..bias },
        };
        let rows = RowDims { rows: 1, dim: 96 };
        let found = cpu.layer_norm(rows, &mut out, &x, &all[1], norm);
        match precision {
            Precision::F32 => found.unwrap(),
            Precision::Bf16(_) => {
                assert!(matches!(found, Err(Error::Frozen { op: "layer_norm" })));
            }
        }
        for &other in isas.iter().filter(|&&other| other != isa) {
            let mut other = Cpu::with(other, 1).unwrap();
            let result = other.linear(dims, &mut out, &x, &all[1], layer, Epilogue::Bias);
            assert!(matches!(result, Err(Error::Frozen { op: "linear" })));
        }
    }
}

#[test]
fn what_is_stored_in_bf16_gives_the_bits_of_rounding_as_it_is_read() {
    use pcae_kernel::backend::{AttentionDims, Backend, Epilogue, LinearDims, TrainBackend};
    use pcae_kernel::config::VitConfig;
    use pcae_kernel::layout::Layout;

    const ROWS: usize = 2 * 19;
    let vit = VitConfig::preset("vit-micro").unwrap();
    let (d, hidden) = (vit.embed_dim, vit.mlp_hidden());
    let layout = Layout::encoder(&vit);
    let mut values = vec![0.0; layout.len()];
    pcae_kernel::init::init(&layout, 7, &mut values).unwrap();
    let block = layout.encoder.blocks.block(0);
    let linear = |in_features, out_features| LinearDims {
        rows: ROWS,
        in_features,
        out_features,
    };
    let attention = AttentionDims {
        batch: 2,
        tokens: ROWS / 2,
        num_heads: vit.num_heads,
        head_dim: d / vit.num_heads,
    };
    for isa in Isa::available() {
        for unit in Bf16Unit::available(isa) {
            let mut cpu = Cpu::with(isa, 1).unwrap().precision(Precision::Bf16(unit));
            let params = cpu.params(&layout, &values).unwrap();
            let mut buf = |len: usize| {
                let mut buf = cpu.buf(len).unwrap();
                let values: Vec<f32> = (0..len).map(|i| (i as f32).sin()).collect();
                cpu.write(&mut buf, &values).unwrap();
                buf
            };
            let (x, mut wide, mut narrow) = (buf(ROWS * d), buf(ROWS * hidden), buf(ROWS * hidden));
            let (mut attended, mut y) = (
                [buf(ROWS * d), buf(ROWS * d)],
                [buf(ROWS * d), buf(ROWS * d)],
            );
            let read = |cpu: &mut Cpu, buf: &pcae_backend_cpu::Buf| {
                let mut values = vec![0.0; ROWS * d];
                cpu.read(&mut values, buf).unwrap();
                values
            };

            // Queries, keys and values in f32, and in bf16.
            let dims = linear(d, 3 * d);
            for (out, epilogue) in [
                (&mut wide, Epilogue::Bias),
                (&mut narrow, Epilogue::BiasQkv),
            ] {
                cpu.linear(dims, out, &x, &params, block.qkv, epilogue)
                    .unwrap();
            }
            assert_ne!(
                read(&mut cpu, &wide),
                read(&mut cpu, &narrow),
                "{isa} {unit}"
            );
            for ((attended, out), qkv) in attended.iter_mut().zip(&mut y).zip([&wide, &narrow]) {
                cpu.attention(attention, attended, qkv).unwrap();
                let (dims, residual) = (linear(d, d), Epilogue::BiasResidual);
                cpu.linear(dims, out, attended, &params, block.proj, residual)
                    .unwrap();
            }
            let [a, b] = &attended;
            assert_ne!(read(&mut cpu, a), read(&mut cpu, b), "{isa} {unit}");
            let [a, b] = &y;
            assert_eq!(read(&mut cpu, a), read(&mut cpu, b), "{isa} {unit}");

            // A hidden layer in bf16, and what it holds in f32.
            let dims = linear(d, hidden);
            cpu.linear(
                dims,
                &mut narrow,
                &attended[0],
                &params,
                block.fc1,
                Epilogue::BiasGelu,
            )
            .unwrap();
            let mut held = vec![0.0; ROWS * hidden];
            cpu.read(&mut held, &narrow).unwrap();
            assert!(
                held.iter().all(|x| x.to_bits() & 0xffff == 0),
                "{isa} {unit}"
            );
            cpu.write(&mut wide, &held).unwrap();
            for (out, hidden_layer) in y.iter_mut().zip([&wide, &narrow]) {
                let (dims, residual) = (linear(hidden, d), Epilogue::BiasResidual);
                cpu.linear(dims, out, hidden_layer, &params, block.fc2, residual)
                    .unwrap();
            }
            let [a, b] = &y;
            assert_eq!(read(&mut cpu, a), read(&mut cpu, b), "{isa} {unit}");

            // Nobody else takes it.
            let [out, _] = &mut y;
            let rows = pcae_kernel::backend::RowDims { rows: ROWS, dim: d };
            let refused = cpu.layer_norm(rows, out, &narrow, &params, block.norm1);
            let op = "layer_norm";
            assert_eq!(refused, Err(Error::Narrow { op, what: "x" }));
        }
    }
}

#[test]
fn a_teacher_may_have_a_precision_of_its_own_and_either_is_run() {
    use pcae_kernel::backend::{Backend, TrainBackend};
    use pcae_kernel::config::{Reduction, VitConfig};
    use pcae_kernel::layout::Layout;
    use pcae_kernel::model::{MeanSimilarity, Vit};

    let vit = VitConfig::preset("vit-micro").unwrap();
    let layout = Layout::encoder(&vit);
    let mut values = vec![0.0; layout.len()];
    pcae_kernel::init::init(&layout, 7, &mut values).unwrap();
    let pixels: Vec<f32> = (0..28 * 28).map(|i| (i % 13) as f32 / 13.0).collect();
    let isa = Isa::detect();
    let bf16 = Precision::Bf16(Bf16Unit::detect(isa));
    let features = |student, teacher, of_teacher: bool| {
        let mut cpu = Cpu::with(isa, 1)
            .unwrap()
            .precision(student)
            .teacher_precision(teacher);
        let params = match of_teacher {
            true => cpu.teacher_params(&layout, &values).unwrap(),
            false => cpu.params(&layout, &values).unwrap(),
        };
        let mut images = cpu.buf(28 * 28).unwrap();
        cpu.write(&mut images, &pixels).unwrap();
        let mut model = Vit::new(&mut cpu, &vit, 1, 49, true, Reduction::NONE).unwrap();
        model
            .forward(&mut cpu, &params, 1, &images, None, &mut MeanSimilarity)
            .unwrap();
        let tokens = model.final_norm(&mut cpu, &params).unwrap();
        let mut features = vec![0.0; 50 * 96];
        cpu.read(&mut features, tokens).unwrap();
        features
    };
    let exact = features(Precision::F32, Precision::F32, false);
    for (student, teacher) in [(Precision::F32, bf16), (bf16, Precision::F32), (bf16, bf16)] {
        for of_teacher in [false, true] {
            let features = features(student, teacher, of_teacher);
            let pairs = features.iter().zip(&exact);
            let worst = pairs.map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            // Features are of size 1; some 20 roundings to 2^-9 each, one after the other, move them by a few hundredths at most.
            assert!(worst < 0.1, "{student:?} {teacher:?} {of_teacher}: {worst}");
        }
    }
}

#[test]
fn backwards_read_bf16_as_the_same_numbers_in_f32() {
    use pcae_kernel::backend::{AttentionDims, Backend, Epilogue, LinearDims, TrainBackend};
    use pcae_kernel::config::VitConfig;
    use pcae_kernel::layout::Layout;

    const ROWS: usize = 2 * 19;
    let vit = VitConfig::preset("vit-micro").unwrap();
    let (d, hidden, heads) = (vit.embed_dim, vit.mlp_hidden(), vit.num_heads);
    let layout = Layout::encoder(&vit);
    let mut values = vec![0.0; layout.len()];
    pcae_kernel::init::init(&layout, 7, &mut values).unwrap();
    let block = layout.encoder.blocks.block(0);
    let linear = |in_features, out_features| LinearDims {
        rows: ROWS,
        in_features,
        out_features,
    };
    let attention = AttentionDims {
        batch: 2,
        tokens: ROWS / 2,
        num_heads: heads,
        head_dim: d / heads,
    };
    for isa in Isa::available() {
        for unit in Bf16Unit::available(isa) {
            let mut cpu = Cpu::with(isa, 1).unwrap().precision(Precision::Bf16(unit));
            let params = cpu.params(&layout, &values).unwrap();
            let mut buf = |len: usize| {
                let mut buf = cpu.buf(len).unwrap();
                let values: Vec<f32> = (0..len).map(|i| (i as f32).sin()).collect();
                cpu.write(&mut buf, &values).unwrap();
                buf
            };
            let (x, d_out) = (buf(ROWS * d), buf(ROWS * d));
            let (mut layer, mut pre_gelu) = (buf(ROWS * hidden), buf(ROWS * hidden));
            let (mut d_layer, mut qkv) = (buf(ROWS * hidden), buf(ROWS * 3 * d));
            let (mut attended, mut d_qkv, mut d_x) =
                (buf(ROWS * d), buf(ROWS * 3 * d), buf(ROWS * d));
            let mut lse = cpu.vector(ROWS * heads).unwrap();
            let up = linear(d, hidden);
            cpu.linear_gelu_saving(up, &mut layer, &mut pre_gelu, &x, &params, block.fc1)
                .unwrap();
            cpu.linear(
                linear(d, 3 * d),
                &mut qkv,
                &x,
                &params,
                block.qkv,
                Epilogue::BiasQkv,
            )
            .unwrap();
            cpu.attention_saving(attention, &mut attended, &mut lse, &qkv)
                .unwrap();
            // In bf16 as they were stored, then in f32.
            let mut all = Vec::new();
            for pass in 0..2 {
                let mut grads = cpu.vector(layout.len()).unwrap();
                let down = linear(hidden, d);
                cpu.linear_backward_params(down, &mut grads, block.fc2, &d_out, &layer)
                    .unwrap();
                let saved = Some(&pre_gelu);
                cpu.linear_backward_input(down, &mut d_layer, &d_out, &params, block.fc2, saved)
                    .unwrap();
                cpu.attention_backward(attention, &mut d_qkv, &d_out, &qkv, &attended, &lse)
                    .unwrap();
                for (len, gradient) in [(hidden, &mut d_layer), (3 * d, &mut d_qkv)] {
                    let mut held = vec![0.0; ROWS * len];
                    cpu.read(&mut held, gradient).unwrap();
                    let is_narrow = held.iter().all(|x| x.to_bits() & 0xffff == 0);
                    assert!(is_narrow, "{isa} {unit}");
                    if pass == 1 {
                        cpu.write(gradient, &held).unwrap();
                    }
                    all.push((pass, held));
                }
                cpu.linear_backward_params(up, &mut grads, block.fc1, &d_layer, &x)
                    .unwrap();
                cpu.linear_backward_params(linear(d, 3 * d), &mut grads, block.qkv, &d_qkv, &x)
                    .unwrap();
                let mut held = vec![0.0; layout.len()];
                cpu.read_vector(&mut held, &grads, 0).unwrap();
                assert!(held.iter().any(|x| *x != 0.0), "{isa} {unit}");
                all.push((pass, held));
                for (dims, d_y, layer) in [
                    (up, &d_layer, block.fc1),
                    (linear(d, 3 * d), &d_qkv, block.qkv),
                ] {
                    cpu.linear_backward_input(dims, &mut d_x, d_y, &params, layer, None)
                        .unwrap();
                    let mut held = vec![0.0; ROWS * d];
                    cpu.read(&mut held, &d_x).unwrap();
                    all.push((pass, held));
                }
                for (len, saved) in [
                    (hidden, &mut layer),
                    (hidden, &mut pre_gelu),
                    (3 * d, &mut qkv),
                ] {
                    let mut held = vec![0.0; ROWS * len];
                    cpu.read(&mut held, saved).unwrap();
                    let is_narrow = held.iter().all(|x| x.to_bits() & 0xffff == 0);
                    assert!(is_narrow, "{isa} {unit}, saved");
                    cpu.write(saved, &held).unwrap();
                }
            }
            let (narrow, wide): (Vec<_>, Vec<_>) =
                all.into_iter().partition(|(pass, _)| *pass == 0);
            let values = |all: Vec<(i32, Vec<f32>)>| all.into_iter().map(|(_, x)| x).collect();
            let (narrow, wide): (Vec<_>, Vec<_>) = (values(narrow), values(wide));
            assert!(narrow == wide, "{isa} {unit}");
        }
    }
}
