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
