//! The kernel's conformance suite on a device, and on the emulator.

use pcae_backend_cuda::{Cuda, Precision};
use pcae_kernel::conformance::{Tolerance, run};

mod emulated;

#[test]
fn on_the_emulator() {
    emulated::run_again();
}

/// The bits of every output.
fn outputs(precision: Precision) -> Option<Vec<(String, Vec<u32>)>> {
    if !emulated::has_device() {
        return None;
    }
    let mut cuda = Cuda::new(0, precision).unwrap_or_else(|error| panic!("{error}"));
    let tolerance = match precision {
        Precision::F32 => Tolerance::F32,
        Precision::Bf16 => Tolerance::BF16,
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
    Some(all)
}

#[test]
fn conforms_in_f32() {
    outputs(Precision::F32);
}

#[test]
fn conforms_in_bf16() {
    outputs(Precision::Bf16);
}
