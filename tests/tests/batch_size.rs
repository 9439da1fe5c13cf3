//! `--batch-size auto`: chosen when a run starts, and kept.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::path::Path;

use pcae_tests::{TINY, idx_folder, pcae, stderr};

const BINARY: &str = env!("CARGO_BIN_EXE_pcae-under-test");

/// What a run says about its batch, if it says anything. So large a batch leaves one step, of which it warns.
fn said(args: &[&str]) -> Option<String> {
    let output = pcae(BINARY, args);
    let stderr = stderr(&output);
    assert!(output.status.success(), "{args:?}: {stderr}");
    let line = stderr.lines().find(|line| line.starts_with("batch "));
    let warns = stderr.contains("--batch-size auto: 1 step of 120 pictures");
    assert_eq!(warns, line.is_some(), "{args:?}: {stderr}");
    line.map(str::to_owned)
}

fn value(out: &str, key: &str) -> String {
    let config = fs::read_to_string(format!("{out}/config.toml")).unwrap();
    let mut lines = config.lines().filter_map(|line| line.split_once(" = "));
    let found = lines.find(|(name, _)| *name == key);
    found.unwrap_or_else(|| panic!("{config}")).1.to_owned()
}

/// All of so few pictures fit, and 120 is the largest size up to their number. What follows from a batch follows from that one, and a run
/// that goes on does not choose again.
#[test]
#[cfg_attr(
    not(target_os = "linux"),
    ignore = "only Linux says what memory is free"
)]
fn the_batch_is_chosen_once() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let (data, pretrained, finetuned) = (path("data"), path("pretrain"), path("finetune"));
    idx_folder(Path::new(&data), 125, 25);
    let auto = ["--data", &data, "--batch-size", "auto", "--steps", "3"];
    let first = [&["pretrain", "--out", &pretrained], &auto[..], TINY].concat();
    let line = said(&first).unwrap();
    assert!(
        line.starts_with("batch     120 pictures, no more are of use: ")
            && line.contains(" free on this machine, "),
        "{line}"
    );
    assert_eq!(value(&pretrained, "batch_size"), "120");
    assert_eq!(value(&pretrained, "save_every"), "1");
    // Ended after its three steps: there is nothing to do, and the batch is what it was.
    assert_eq!(said(&["pretrain", "--resume", &pretrained]), None);

    let more = ["finetune", "--weights", &pretrained, "--out", &finetuned];
    assert!(said(&[&more[..], &auto].concat()).is_some());
    assert_eq!(value(&finetuned, "batch_size"), "120");
    assert_eq!(said(&["finetune", "--resume", &finetuned]), None);
}

#[test]
fn what_is_no_number_is_refused() {
    let output = pcae(
        BINARY,
        &["pretrain", "--batch-size", "most", "--steps", "1"],
    );
    assert_eq!(output.status.code(), Some(2));
    let stderr = stderr(&output);
    assert!(
        stderr.contains("--batch-size")
            && stderr.contains("\"auto\" for as many as there is memory for"),
        "{stderr}"
    );
}
