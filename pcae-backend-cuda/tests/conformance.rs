//! The kernel's conformance suite on a device, and on the emulator.

use pcae_backend_cuda::{Cuda, Precision};
use pcae_kernel::conformance::{Tolerance, run};

mod emulated;

#[test]
fn on_the_emulator() {
    emulated::run_again();
}

/// Numbers that go in are held exactly by bf16 (the suite sees to it), and sums are f32. So an output is off by its rounding, by
/// at most 2^-9 of itself, and by that of what lies between two kernels: the product before a residual or the derivative of a GELU
/// is added or multiplied, probabilities of attention. That makes three roundings, 6e-3, of numbers that may be
/// larger than the output where they cancel. Measured: 0.7 of this.
const BF16: Tolerance = Tolerance {
    atol: 2e-2,
    rtol: 8e-3,
};

/// The bits of every output.
fn outputs(precision: Precision) -> Vec<(String, Vec<u32>)> {
    let mut cuda = Cuda::new(0, precision).unwrap_or_else(|error| panic!("{error}"));
    let tolerance = match precision {
        Precision::F32 => Tolerance::F32,
        Precision::Bf16 => BF16,
    };
    let (mut all, mut worst) = (vec![], (0.0, String::new()));
    let result = run(&mut cuda, tolerance, |compared| {
        let name = format!("{} {}", compared.case, compared.output);
        if compared.worst > worst.0 {
            worst = (compared.worst, name.clone());
        }
        all.push((name, compared.got.iter().map(|x| x.to_bits()).collect()));
    });
    println!(
        "{}, {precision:?}: {} outputs, worst {worst:?}",
        cuda.name(),
        all.len()
    );
    if let Err(failure) = result {
        panic!("{}, {precision:?}: {failure}", cuda.name());
    }
    all
}

/// Twice with the same bits: blocks and warps do not run in the same order the next time.
fn conforms(precision: Precision) {
    if !emulated::has_device() {
        return;
    }
    let first = outputs(precision);
    assert!(first.len() > 500);
    for ((name, a), (_, b)) in first.iter().zip(outputs(precision)) {
        assert!(*a == b, "{precision:?}: {name} differs the second time");
    }
}

#[test]
fn conforms_in_f32() {
    conforms(Precision::F32);
}

#[test]
fn conforms_in_bf16() {
    conforms(Precision::Bf16);
}
