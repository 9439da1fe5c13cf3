//! `pcae-backend-cuda/gpu/run.py`, which is for a GPU's machine: what it makes of figures, and a rehearsal on the emulator. Where there is
//! Python 3.11.

#![cfg(all(target_os = "linux", target_pointer_width = "64"))]

use std::fs;
use std::path::Path;
use std::process::Command;

use pcae_tests::{stderr, stdout};

const BINARY: &str = env!("CARGO_BIN_EXE_pcae-under-test");
const CUDA: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../pcae-backend-cuda");

/// Python, if it is new enough; says so if not.
fn python() -> Option<Command> {
    let is_new = "import sys; sys.exit(sys.version_info < (3, 11))";
    let tried = Command::new("python3").args(["-c", is_new]).output();
    if !tried.is_ok_and(|output| output.status.success()) {
        println!("skipped: no Python 3.11");
        return None;
    }
    let mut python = Command::new("python3");
    // Leaves nothing beside the scripts.
    python.arg("-B");
    Some(python)
}

#[test]
fn what_it_makes_of_figures() {
    let Some(mut python) = python() else { return };
    let script = format!("{CUDA}/tests/gpu_scripts.py");
    let output = python.arg(script).output().unwrap();
    assert!(output.status.success(), "{}", stderr(&output));
}

/// Every part whose commands no other test runs, without PyTorch.
#[test]
fn a_rehearsal_goes_through() {
    let Some(mut python) = python() else { return };
    let into = Path::new(env!("CARGO_TARGET_TMPDIR")).join("emulator");
    let built = Command::new("sh")
        .arg(format!("{CUDA}/tests/emulator/build"))
        .arg(into)
        .output()
        .unwrap();
    if built.status.code() == Some(3) {
        println!("skipped: the emulator needs a C++ compiler");
        return;
    }
    assert!(built.status.success(), "{}", stderr(&built));
    let folder = tempfile::tempdir().unwrap();
    let output = python
        .arg(format!("{CUDA}/gpu/run.py"))
        .args(["--rehearse", stdout(&built).trim_end(), "--pcae", BINARY])
        .args(["--parts", "device,breakdown,infer,step,curve,large"])
        .args(["--variants", "", "--rounds", "1", "--batch-size", "2"])
        .args(["--infer-batch", "1", "--out"])
        .arg(folder.path())
        .output()
        .unwrap();
    let said = stdout(&output) + &stderr(&output);
    assert!(output.status.success(), "{said}");
    let text = fs::read(folder.path().join("report.json")).unwrap();
    let report: serde_json::Value = serde_json::from_slice(&text).unwrap();
    for part in ["device", "breakdown", "infer", "step", "curve", "large"] {
        assert_eq!(report["parts"][part]["status"], "passed", "{said}");
    }
    let targets = report["targets"].as_object().unwrap();
    for (name, row) in targets {
        assert!(row["met"].is_null(), "{name}: {row}");
        let needs_more = ["PyTorch", "parity", "256", "peak", "vit-", "sanitizer"];
        let is_measured = row["found"] != "not measured";
        let should = !needs_more.iter().any(|word| name.contains(word));
        assert_eq!(is_measured, should, "{name}: {row}");
        let what = row["what"].as_str().unwrap();
        assert_eq!(said.matches(what).count(), 1, "{name}: {said}");
    }
}
