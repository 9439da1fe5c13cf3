//! Every golden fixture on every backend and instruction set there is, and proof that a wrong value is seen.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::BTreeMap;

use pcae_backend_cpu::{Bf16Unit, Cpu, Isa, Precision};
use pcae_kernel::backend::TrainBackend;
use pcae_kernel::reference::Reference;
use pcae_tests::{FIXTURES, fixture};
use pcae_train::checkpoint::file::{Dtype, Reader, Tensor, TensorData, write};
use pcae_train::parity::{Report, Tolerance, replay};

fn all_fixtures<B: TrainBackend>(what: &str, backend: impl FnMut() -> B) -> Vec<Report> {
    all_fixtures_within(Tolerance::F32, what, backend)
}

fn all_fixtures_within<B: TrainBackend>(
    tolerance: Tolerance,
    what: &str,
    mut backend: impl FnMut() -> B,
) -> Vec<Report> {
    let replay = |name: &&str| {
        let report = replay(&mut backend(), &fixture(name), tolerance).unwrap();
        assert!(report.passes(), "{what}, {name}\n{report}");
        report
    };
    FIXTURES.iter().map(replay).collect()
}

#[test]
fn reference_f64() {
    for report in all_fixtures("reference f64", Reference::<f64, _>::owned) {
        // The fixtures are rounded to f32: half a unit in the last place, and sums of such in the losses.
        let worst = report.worst().unwrap();
        assert!(worst.relative < 1e-6, "{worst:?}");
    }
}

#[test]
fn reference_f32() {
    all_fixtures("reference f32", Reference::<f32, _>::owned);
}

#[test]
fn cpu_on_every_instruction_set_and_threads() {
    for isa in Isa::available() {
        let one = all_fixtures(&format!("{isa}, 1 thread"), || Cpu::with(isa, 1).unwrap());
        for threads in [2, 3] {
            // The same bits, so the same errors to the last digit.
            let more = all_fixtures(&format!("{isa}, {threads} threads"), || {
                Cpu::with(isa, threads).unwrap()
            });
            assert_eq!(one, more, "{isa}, {threads} threads");
        }
    }
}

#[test]
fn bf16_of_every_unit_stays_within_its_own_tolerance() {
    for isa in Isa::available() {
        for unit in Bf16Unit::available(isa) {
            let what = format!("{isa}, {unit}");
            let reports = all_fixtures_within(Tolerance::BF16, &what, || {
                let cpu = Cpu::with(isa, 1).unwrap();
                cpu.precision(Precision::Bf16(unit))
            });
            for report in &reports {
                let floats = report.rows.iter().filter(|row| row.tolerance < 0.1);
                let worst = floats.map(|row| row.relative).fold(0.0, f64::max);
                println!("{what}: {worst:.1e}");
                // Rounded to 8 bits, not to 24.
                assert!(worst > 1e-3, "{what}: {worst}");
            }
        }
    }
}

#[test]
fn trajectories_are_replayed() {
    let report = replay(&mut Cpu::new(), &fixture("pcae_small"), Tolerance::F32).unwrap();
    let losses = report
        .rows
        .iter()
        .find(|row| row.name == "expect.losses")
        .unwrap();
    assert!(
        losses.relative > 0.0 && losses.relative < 1e-5,
        "{losses:?}"
    );
}

/// The tensors and metadata of a fixture, to write a changed one.
struct Contents {
    metadata: BTreeMap<String, String>,
    floats: BTreeMap<String, (Vec<usize>, Vec<f32>)>,
    integers: BTreeMap<String, (Vec<usize>, Vec<i64>)>,
}

impl Contents {
    fn of(name: &str) -> Self {
        let reader = Reader::open(&fixture(name)).unwrap();
        let metadata = reader
            .metadata()
            .into_iter()
            .map(|(key, value)| (key.to_owned(), value.to_owned()))
            .collect();
        let (mut floats, mut integers) = (BTreeMap::new(), BTreeMap::new());
        for name in reader.names() {
            let shape = reader.shape(&name).unwrap().to_vec();
            if reader.dtype(&name) == Some(Dtype::I64) {
                integers.insert(name.clone(), (shape, reader.tensor_i64(&name).unwrap()));
            } else {
                floats.insert(
                    name.clone(),
                    (shape.clone(), reader.tensor_f32(&name, &shape).unwrap()),
                );
            }
        }
        Self {
            metadata,
            floats,
            integers,
        }
    }

    fn replay(&self) -> Result<Report, pcae_train::parity::ParityError> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("changed.safetensors");
        let mut tensors = Vec::new();
        for (name, (shape, values)) in &self.floats {
            tensors.push(Tensor {
                name: name.clone(),
                shape: shape.clone(),
                data: TensorData::F32(values),
            });
        }
        for (name, (shape, values)) in &self.integers {
            tensors.push(Tensor {
                name: name.clone(),
                shape: shape.clone(),
                data: TensorData::I64(values),
            });
        }
        write(&path, &self.metadata, &tensors).unwrap();
        replay(&mut Cpu::new(), &path, Tolerance::F32)
    }
}

/// A thousandth more in any expected tensor, or one other id, fails that tensor and no other.
#[test]
fn every_changed_expectation_is_seen() {
    for name in ["pcae_gray_rect", "mae_small", "classify_ptr"] {
        let mut contents = Contents::of(name);
        assert!(contents.replay().unwrap().passes());
        let is_result = |name: &str| {
            name.contains('.') && !name.starts_with("input.") && !name.starts_with("param.")
        };
        let changed: Vec<String> = contents
            .floats
            .keys()
            .filter(|name| is_result(name) && !name.starts_with("teacher."))
            .cloned()
            .collect();
        assert!(changed.len() > 60);
        for tensor in &changed {
            let original = contents.floats[tensor].1.clone();
            for value in &mut contents.floats.get_mut(tensor).unwrap().1 {
                *value = *value * 1.001 + 1e-30;
            }
            let report = contents.replay().unwrap();
            let failing: Vec<_> = report
                .rows
                .iter()
                .filter(|row| !row.passes())
                .map(|row| &row.name)
                .collect();
            assert_eq!(failing, [tensor], "{name}");
            contents.floats.get_mut(tensor).unwrap().1 = original;
        }
        let ids: Vec<String> = contents
            .integers
            .keys()
            .filter(|name| is_result(name))
            .cloned()
            .collect();
        for tensor in &ids {
            let last = contents
                .integers
                .get_mut(tensor)
                .unwrap()
                .1
                .last_mut()
                .unwrap();
            *last += 1;
            let report = contents.replay().unwrap();
            assert!(!report.passes(), "{name} {tensor}");
            assert!(
                report.to_string().contains("1 beyond tolerance"),
                "{report}"
            );
            *contents
                .integers
                .get_mut(tensor)
                .unwrap()
                .1
                .last_mut()
                .unwrap() -= 1;
        }
    }
}

/// Another constant of the method fails: the fixture's own configuration with one value changed.
#[test]
fn every_changed_constant_is_seen() {
    for (fixture, from, to) in [
        ("pcae_small", "\"lr\": 0.001", "\"lr\": 0.00101"),
        (
            "pcae_small",
            "\"weight_decay\": 0.05",
            "\"weight_decay\": 0.0",
        ),
        (
            "pcae_small",
            "\"ema_momentum\": 0.9",
            "\"ema_momentum\": 0.89",
        ),
        (
            "pcae_small",
            "\"drop_layers\": [0, 1, 2]",
            "\"drop_layers\": [0, 1, 3]",
        ),
        ("pcae_small", "\"num_heads\": 3", "\"num_heads\": 2"),
        ("mae_small", "\"norm_pix\": true", "\"norm_pix\": false"),
        (
            "classify_ptr",
            "\"drop_layers\": [0, 1, 2]",
            "\"drop_layers\": [1, 2, 3]",
        ),
        ("encode", "\"num_heads\": 3", "\"num_heads\": 6"),
    ] {
        let mut contents = Contents::of(fixture);
        let config = contents.metadata.get_mut("config").unwrap();
        assert!(config.contains(from), "{fixture}: {config}");
        *config = config.replace(from, to);
        assert!(
            !contents.replay().is_ok_and(|report| report.passes()),
            "{fixture}: {to}"
        );
    }
}

/// A result that nothing is compared with is refused rather than passed over; so is a missing one.
#[test]
fn unknown_and_missing_expectations_are_refused() {
    let mut contents = Contents::of("encode");
    contents
        .floats
        .insert("expect.surprise".to_owned(), (vec![1], vec![1.0]));
    let error = contents.replay().unwrap_err().to_string();
    assert!(error.contains("expect.surprise"), "{error}");
    contents.floats.remove("expect.surprise");
    contents.floats.remove("expect.tokens");
    let error = contents.replay().unwrap_err().to_string();
    assert!(error.contains("expect.tokens"), "{error}");
}

/// Sizes come from the file: absurd ones are refused before there is memory for them.
#[test]
fn absurd_sizes_are_refused() {
    let mut contents = Contents::of("encode");
    let config = contents.metadata.get_mut("config").unwrap();
    *config = config
        .replace("\"embed_dim\": 24", "\"embed_dim\": 24576")
        .replace("\"depth\": 4", "\"depth\": 64");
    let error = contents.replay().unwrap_err().to_string();
    assert!(
        error.contains("param.cls_token") && error.contains("24576"),
        "{error}"
    );
}
