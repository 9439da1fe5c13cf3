//! Training in bf16: the same curve as in f32, and who can compute in what.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;

use pcae_tests::{pcae, stderr};

const BINARY: &str = env!("CARGO_BIN_EXE_pcae-under-test");

/// The losses of 200 steps of the default recipe.
fn losses(precision: &[&str]) -> Vec<f64> {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("run");
    let fixed = [
        "pretrain",
        "--steps",
        "200",
        "--set",
        "eval_every=0",
        "--out",
        out.to_str().unwrap(),
    ];
    let output = pcae(BINARY, &[&fixed, precision].concat());
    assert!(output.status.success(), "{}", stderr(&output));
    let text = fs::read_to_string(out.join("metrics.jsonl")).unwrap();
    let records = text
        .lines()
        .map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
    let losses: Vec<f64> = records.filter_map(|r| r["loss"].as_f64()).collect();
    assert_eq!(losses.len(), 200);
    losses
}

/// Rounding makes single steps differ, by up to 5 % where the loss is smallest; what counts is the curve, here the means
/// of 40 steps.
#[test]
fn bf16_follows_the_curve_of_f32() {
    let exact = losses(&[]);
    for precision in [["--precision", "bf16"], ["--teacher-precision", "bf16"]] {
        let rounded = losses(&precision);
        assert_ne!(exact, rounded, "{precision:?}");
        for (at, (exact, rounded)) in exact.chunks(40).zip(rounded.chunks(40)).enumerate() {
            let mean = |losses: &[f64]| losses.iter().sum::<f64>() / losses.len() as f64;
            let difference = mean(rounded) / mean(exact) - 1.0;
            println!("{precision:?}, steps from {}: {difference:+.4}", 40 * at);
            assert!(difference.abs() < 0.01, "{precision:?} {at}: {difference}");
        }
    }
}

#[test]
fn a_precision_that_a_backend_lacks_is_refused() {
    for (flags, named) in [
        (
            ["--backend", "reference", "--precision", "bf16"],
            "--precision",
        ),
        (["--backend", "cpu", "--precision", "f64"], "--precision"),
        (
            ["--backend", "cpu", "--teacher-precision", "f64"],
            "--teacher-precision",
        ),
        (
            ["--backend", "reference", "--teacher-precision", "f32"],
            "--teacher-precision",
        ),
        (
            ["--backend", "reference", "--precision", "fp8"],
            "--precision bf16",
        ),
        (
            ["--backend", "cpu", "--precision", "fp8"],
            "--precision bf16",
        ),
        (
            ["--backend", "cpu", "--teacher-precision", "fp8"],
            "--teacher-precision bf16",
        ),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let out = folder.path().join("run");
        let fixed = ["pretrain", "--steps", "1", "--out", out.to_str().unwrap()];
        let output = pcae(BINARY, &[&fixed[..], &flags].concat());
        assert_eq!(output.status.code(), Some(2), "{flags:?}");
        let text = stderr(&output);
        assert!(
            text.contains(named) && text.contains("expected"),
            "{flags:?}: {text}"
        );
        assert!(!out.exists(), "{flags:?}");
    }
}
