//! A run that is killed and resumed ends in the same bits as one that is not.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use pcae_kernel::rng::{Purpose, Stream};
use pcae_tests::{TINY, idx_folder, pcae, stderr, stdout};

const BINARY: &str = env!("CARGO_BIN_EXE_pcae-under-test");

fn arguments<'a>(data: &'a str, out: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    let mut args = vec![
        "pretrain",
        "--data",
        data,
        "--out",
        out,
        "--batch-size",
        "16",
        "--set",
        "eval_every=0",
    ];
    args.extend_from_slice(TINY);
    args.extend_from_slice(more);
    args
}

fn run(args: &[&str]) {
    let output = pcae(BINARY, args);
    assert!(output.status.success(), "{args:?}: {}", stderr(&output));
}

fn checkpoint(out: &Path) -> Vec<u8> {
    fs::read(out.join("checkpoints/last.safetensors")).unwrap()
}

/// Step and bits of the loss, of every record that has one.
fn losses(out: &Path) -> Vec<(u64, u64)> {
    let text = fs::read_to_string(out.join("metrics.jsonl")).unwrap();
    let records = text
        .lines()
        .map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
    records
        .filter_map(|record| Some((record["step"].as_u64()?, record["loss"].as_f64()?.to_bits())))
        .collect()
}

fn start(args: &[&str]) -> Child {
    Command::new(BINARY)
        .args(args)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap()
}

#[test]
fn killed_at_ten_random_moments() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let (data, whole, killed) = (path("data"), path("whole"), path("killed"));
    idx_folder(Path::new(&data), 200, 40);
    // Everything random at once: accumulation, stochastic depth, several epochs, saves that fall between epochs.
    let settings = [
        "--steps",
        "400",
        "--accum",
        "2",
        "--set",
        "drop_path=0.2",
        "--set",
        "save_every=7",
    ];
    run(&arguments(
        &data,
        &whole,
        &[&settings[..], &["--threads", "1"]].concat(),
    ));

    let mut moments = Stream::new(std::process::id().into(), 0, 0, Purpose::Split);
    let (mut kills, mut patience) = (0, 1);
    while kills < 10 {
        // A busy machine may take longer to begin a run than a moment lasts: kills count from the run directory on, and
        // moments grow until there is one.
        let exists = Path::new(&killed).join("config.toml").exists();
        let mut child = if exists {
            start(&[
                "pretrain",
                "--resume",
                &killed,
                "--threads",
                ["1", "2"][kills % 2],
            ])
        } else {
            start(&arguments(&data, &killed, &settings))
        };
        let moment = Duration::from_millis(20 + u64::from(moments.below(150)));
        std::thread::sleep(moment * if exists { 1 } else { patience });
        let ended = child.try_wait().unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
        match ended {
            Some(status) => {
                assert!(status.success(), "a resumed run failed: {status}");
                // It was quicker than its killer: the remaining kills come to a finished run.
            }
            None if exists => kills += 1,
            None => patience += 1,
        }
    }
    let output = pcae(BINARY, &["pretrain", "--resume", &killed, "--threads", "2"]);
    assert!(output.status.success(), "{}", stderr(&output));
    assert!(
        checkpoint(Path::new(&whole)) == checkpoint(Path::new(&killed)),
        "the final checkpoints differ"
    );
    assert_eq!(losses(Path::new(&whole)), losses(Path::new(&killed)));
    assert_eq!(losses(Path::new(&whole)).len(), 400);
    let leftovers = fs::read_dir(Path::new(&killed).join("checkpoints"))
        .unwrap()
        .count();
    assert_eq!(leftovers, 1, "only the last checkpoint stays");
}

/// Threads and workers do not change a bit; the seed does.
#[test]
fn bits_do_not_depend_on_threads_or_workers() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let data = path("data");
    idx_folder(Path::new(&data), 100, 20);
    let result = |name: &str, more: &[&str]| {
        let out = path(name);
        run(&arguments(
            &data,
            &out,
            &[&["--steps", "12"], more].concat(),
        ));
        checkpoint(Path::new(&out))
    };
    let one = result("one", &["--threads", "1", "--workers", "0"]);
    assert!(one == result("two", &["--threads", "2", "--workers", "2"]));
    assert!(one == result("three", &["--threads", "3", "--workers", "1"]));
    assert!(one != result("other", &["--seed", "1"]));
    let mae = ["--method", "mae"];
    assert!(result("mae1", &[&mae[..], &["--threads", "1"]].concat()) == result("mae2", &mae));
}

/// A signal ends a run after its step, with a checkpoint and advice; resumed, it ends in the same bits.
#[cfg(unix)]
#[test]
fn interrupted_and_resumed() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let (data, whole, stopped) = (path("data"), path("whole"), path("stopped"));
    idx_folder(Path::new(&data), 100, 20);
    // No save before the signal: what is resumed is what the signal saved.
    let settings = ["--steps", "3000", "--set", "save_every=100000"];
    run(&arguments(&data, &whole, &settings));
    for signal in ["-INT", "-TERM"] {
        let out = format!("{stopped}{signal}");
        let child = Command::new(BINARY)
            .args(arguments(&data, &out, &settings))
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let metrics = Path::new(&out).join("metrics.jsonl");
        let began = Instant::now();
        while fs::read_to_string(&metrics).map_or(0, |text| text.lines().count()) < 5 {
            assert!(began.elapsed() < Duration::from_secs(60));
            std::thread::sleep(Duration::from_millis(5));
        }
        assert!(
            Command::new("kill")
                .args([signal, &child.id().to_string()])
                .status()
                .unwrap()
                .success()
        );
        let output = child.wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(130), "{}", stderr(&output));
        assert!(stdout(&output).contains("--resume"), "{}", stdout(&output));
        run(&["pretrain", "--resume", &out]);
        assert!(
            checkpoint(Path::new(&whole)) == checkpoint(Path::new(&out)),
            "{signal}"
        );
        assert_eq!(losses(Path::new(&whole)), losses(Path::new(&out)));
    }
}

/// Resuming a finished run changes nothing and says so.
#[test]
fn finished_runs_stay() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let (data, out) = (path("data"), path("out"));
    idx_folder(Path::new(&data), 100, 20);
    run(&arguments(&data, &out, &["--steps", "5"]));
    let before = checkpoint(Path::new(&out));
    let output = pcae(BINARY, &["pretrain", "--resume", &out, "--json"]);
    assert!(output.status.success(), "{}", stderr(&output));
    assert!(before == checkpoint(Path::new(&out)));
    let summary: serde_json::Value = serde_json::from_str(&stdout(&output)).unwrap();
    assert_eq!(summary["step"], 5);
    assert!(summary["knn_top1"].as_f64().is_some(), "{summary}");
}
