//! The kernel's conformance suite on a device, and on the emulator.

use pcae_backend_cuda::{Cuda, Precision};
use pcae_kernel::conformance::{Compared, Failure, Tolerance, run, run_teacher};

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

/// Operands of a teacher's products in fp8 have 4 significant bits: rounding moves one by at most 2^-4 of itself, by 2.3e-2 in the mean
/// square, and so a product of two by 3.3e-2 of its own root mean square, which is 1 or less in the suite's blocks. Such an error of the
/// first layer goes on into the second: that makes 0.04 for what attention adds to the stream and as much for the MLP, 0.06 in all, and the
/// largest of some thousand outputs is four times that away. Measured: 0.59 of this.
const FP8: Tolerance = Tolerance {
    atol: 0.25,
    rtol: 2e-2,
};

/// The bits of every output.
fn outputs(kind: Kind) -> Vec<(String, Vec<u32>)> {
    let precision = match kind {
        Kind::F32 => Precision::F32,
        Kind::Bf16 | Kind::Fp8Teacher => Precision::Bf16,
    };
    let mut cuda = Cuda::new(0, precision).unwrap_or_else(|error| panic!("{error}"));
    let (mut all, mut worst) = (vec![], (0.0, String::new()));
    let report = |compared: Compared<'_>| {
        let name = format!("{} {}", compared.case, compared.output);
        if compared.worst > worst.0 {
            worst = (compared.worst, name.clone());
        }
        all.push((name, compared.got.iter().map(|x| x.to_bits()).collect()));
    };
    let result: Result<(), Failure> = match kind {
        Kind::F32 => run(&mut cuda, Tolerance::F32, report),
        Kind::Bf16 => run(&mut cuda, BF16, report),
        Kind::Fp8Teacher => {
            cuda = cuda
                .with_fp8_teacher()
                .unwrap_or_else(|error| panic!("{error}"));
            run_teacher(&mut cuda, FP8, report)
        }
    };
    println!(
        "{}, {kind:?}: {} outputs, worst {worst:?}",
        cuda.name(),
        all.len()
    );
    if let Err(failure) = result {
        panic!("{}, {kind:?}: {failure}", cuda.name());
    }
    all
}

/// What is held against the reference.
#[derive(Clone, Copy, Debug)]
enum Kind {
    F32,
    Bf16,
    Fp8Teacher,
}

/// Twice with the same bits: blocks and warps do not run in the same order the next time.
fn conforms(kind: Kind, least: usize) {
    if !emulated::has_device() {
        return;
    }
    let first = outputs(kind);
    assert!(first.len() >= least);
    for ((name, a), (_, b)) in first.iter().zip(outputs(kind)) {
        assert!(*a == b, "{kind:?}: {name} differs the second time");
    }
}

#[test]
fn conforms_in_f32() {
    conforms(Kind::F32, 500);
}

#[test]
fn conforms_in_bf16() {
    conforms(Kind::Bf16, 500);
}

#[test]
fn a_teacher_in_fp8_conforms() {
    if emulated::has_device() {
        let cuda = Cuda::new(0, Precision::Bf16).unwrap_or_else(|error| panic!("{error}"));
        if cuda.capability() < (8, 9) {
            println!("skipped: fp8 is for compute capability 8.9 and newer");
            return;
        }
    }
    conforms(Kind::Fp8Teacher, 30);
}
