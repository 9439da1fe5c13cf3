//! The kernel's conformance suite on every instruction set and several numbers of threads.

use pcae_backend_cpu::{Bf16Unit, Cpu, Error, Isa, Precision};
use pcae_kernel::conformance::{Tolerance, run};

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
            let params = cpu.params(&layout, &values).unwrap();
            let result = cpu.linear(dims, &mut out, &x, &params, layer, Epilogue::Bias);
            if Bf16Unit::available(isa).any(|other| other == unit) {
                result.unwrap();
                assert!(out.iter().all(|x| *x == 0.5), "{isa} {unit}");
            } else {
                assert_eq!(result, Err(Error::Unit { unit, isa }));
                let frozen = cpu.frozen_params(&layout, &values);
                assert!(matches!(frozen, Err(Error::Unit { .. })));
                refused += 1;
            }
        }
    }
    println!("{refused} pairs refused");
}

#[test]
fn frozen_parameters_give_the_same_bits_forward_and_nothing_else() {
    use pcae_kernel::backend::{Backend, Epilogue, Linear, LinearDims, TrainBackend};
    use pcae_kernel::config::{Reduction, VitConfig};
    use pcae_kernel::layout::Layout;
    use pcae_kernel::model::{MeanSimilarity, Vit};

    let vit = VitConfig::preset("vit-micro").unwrap();
    let layout = Layout::encoder(&vit);
    let mut values = vec![0.0; layout.len()];
    pcae_kernel::init::init(&layout, 7, &mut values).unwrap();
    let isas: Vec<Isa> = Isa::available().collect();
    for &isa in &isas {
        let mut cpu = Cpu::with(isa, 1).unwrap();
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
        assert_eq!(features[0], features[1], "{isa}");

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
        for &other in isas.iter().filter(|&&other| other != isa) {
            let mut other = Cpu::with(other, 1).unwrap();
            let result = other.linear(dims, &mut out, &x, &all[1], layer, Epilogue::Bias);
            assert!(matches!(result, Err(Error::Frozen { op: "linear" })));
        }
    }
}
