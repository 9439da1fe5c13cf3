//! The kernel's conformance suite on every instruction set and several numbers of threads.

use pcae_backend_cpu::{Cpu, Isa};
use pcae_kernel::conformance::{Tolerance, run};

/// The bits of every output.
fn outputs(isa: Isa, threads: usize) -> Vec<(String, Vec<u32>)> {
    let mut cpu = Cpu::with(isa, threads).expect("threads can be started");
    assert_eq!((cpu.isa(), cpu.threads()), (isa, threads));
    let (mut all, mut worst) = (vec![], (0.0, String::new()));
    let result = run(&mut cpu, Tolerance::F32, |compared| {
        let name = format!("{} {}", compared.case, compared.output);
        if compared.worst > worst.0 {
            worst = (compared.worst, name.clone());
        }
        all.push((name, compared.got.iter().map(|x| x.to_bits()).collect()));
    });
    println!(
        "{isa}, {threads} threads: {} outputs, worst {worst:?}",
        all.len()
    );
    if let Err(failure) = result {
        panic!("{isa}, {threads} threads: {failure}");
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
        let one = outputs(isa, 1);
        for &threads in more {
            for ((name, a), (_, b)) in one.iter().zip(outputs(isa, threads)) {
                assert!(*a == b, "{isa}: {name} differs on {threads} threads");
            }
        }
    }
}

#[test]
fn frozen_parameters_give_the_same_bits_forward_and_nothing_else() {
    use pcae_backend_cpu::Error;
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
        for &other in isas.iter().filter(|&&other| other != isa) {
            let mut other = Cpu::with(other, 1).unwrap();
            let result = other.linear(dims, &mut out, &x, &all[1], layer, Epilogue::Bias);
            assert!(matches!(result, Err(Error::Frozen { op: "linear" })));
        }
    }
}
