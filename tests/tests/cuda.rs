//! The command on CUDA: golden fixtures, and runs that go on with another backend.
//!
//! On a device where there is one, and on the emulator of the backend's own tests where there is a C++ compiler.

#![cfg(target_os = "linux")]
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use pcae_tests::{FIXTURES, TINY, fixture, from_scratch, idx_folder, stderr, stdout};
use pcae_train::checkpoint::file::Reader;

const BINARY: &str = env!("CARGO_BIN_EXE_pcae-under-test");

/// Where the command finds a device.
struct Place {
    name: &'static str,
    environment: Vec<(&'static str, OsString)>,
}

impl Place {
    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(BINARY);
        command.args(args).envs(self.environment.iter().cloned());
        command
    }

    fn pcae(&self, args: &[&str]) -> Output {
        self.command(args).output().unwrap()
    }

    fn run(&self, args: &[&str]) -> Output {
        let output = self.pcae(args);
        assert!(
            output.status.success(),
            "{}: {args:?}: {}",
            self.name,
            stderr(&output)
        );
        output
    }
}

/// Every place there is; says what is missing.
fn places() -> Vec<Place> {
    let real = Place {
        name: "the device",
        environment: Vec::new(),
    };
    let encode = fixture("encode");
    let tried = real.pcae(&["parity", encode.to_str().unwrap(), "--backend", "cuda"]);
    let mut places = Vec::new();
    if stderr(&tried).contains("backend cuda: no CUDA") {
        println!("skipped: no CUDA device ({})", stderr(&tried).trim_end());
    } else {
        places.push(real);
    }
    let into = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("emulator");
    let built = Command::new("sh")
        .arg(concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/../pcae-backend-cuda/tests/emulator/build"
        ))
        .arg(into)
        .output()
        .unwrap();
    if built.status.code() == Some(3) {
        println!("skipped: the emulator needs a C++ compiler");
        return places;
    }
    assert!(built.status.success(), "{}", stderr(&built));
    let folder = PathBuf::from(stdout(&built).trim_end());
    places.push(Place {
        name: "the emulator",
        environment: vec![
            ("PCAE_CACHE", folder.join("images").into()),
            ("LD_LIBRARY_PATH", folder.into()),
        ],
    });
    places
}

#[test]
fn golden_fixtures() {
    for place in places() {
        for name in FIXTURES {
            for precision in ["f32", "bf16"] {
                let path = fixture(name);
                let args = ["parity", path.to_str().unwrap(), "--backend", "cuda"];
                let output = place.pcae(&[&args[..], &["--precision", precision]].concat());
                assert!(
                    output.status.success(),
                    "{}, {name}, {precision}:\n{}{}",
                    place.name,
                    stdout(&output),
                    stderr(&output)
                );
                let last = stdout(&output);
                println!(
                    "{}, {precision}: {}",
                    place.name,
                    last.trim_end().lines().last().unwrap()
                );
            }
        }
    }
}

fn losses(out: &Path) -> Vec<f64> {
    let text = fs::read_to_string(out.join("metrics.jsonl")).unwrap_or_default();
    let records = text
        .lines()
        .map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
    records
        .filter_map(|record| record["loss"].as_f64())
        .collect()
}

/// A run that another backend began goes on: same checkpoint, same losses but for rounding. The scalars of several steps
/// are read together on CUDA, and none is lost.
#[test]
fn runs_go_on_with_another_backend() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let data = path("data");
    idx_folder(Path::new(&data), 40, 10);
    let arguments = |out: &str, backend: &str| {
        let mut args = vec![
            "pretrain",
            "--data",
            &data,
            "--out",
            out,
            "--backend",
            backend,
        ];
        let fixed = ["--batch-size", "2", "--steps", "40", "--precision", "f32"];
        args.extend_from_slice(&fixed);
        args.extend_from_slice(&["--set", "eval_every=0", "--set", "save_every=3"]);
        args.extend_from_slice(TINY);
        args.into_iter().map(str::to_owned).collect::<Vec<_>>()
    };
    for place in places() {
        let whole = path("whole");
        if !Path::new(&whole).exists() {
            let args = arguments(&whole, "cpu");
            place.run(&args.iter().map(String::as_str).collect::<Vec<_>>());
        }
        let want = losses(Path::new(&whole));
        assert_eq!(want.len(), 40);
        for (first, second) in [("cuda", "cpu"), ("reference", "cuda")] {
            let out = path(&format!("{}-{first}-{second}", place.name));
            let args = arguments(&out, first);
            let child = place
                .command(&args.iter().map(String::as_str).collect::<Vec<_>>())
                .stdout(Stdio::null())
                .stderr(Stdio::piped())
                .spawn()
                .unwrap();
            let began = Instant::now();
            while losses(Path::new(&out)).is_empty() {
                assert!(began.elapsed() < Duration::from_secs(300), "no step yet");
                std::thread::sleep(Duration::from_millis(2));
            }
            Command::new("kill")
                .args(["-INT", &child.id().to_string()])
                .status()
                .unwrap();
            let output = child.wait_with_output().unwrap();
            let when = losses(Path::new(&out)).len();
            println!(
                "{}: {first} did {when} steps, {second} the others",
                place.name
            );
            // It may have been quicker than the signal, which then tests the end alone.
            let code = output.status.code();
            assert!(code == Some(130) || code == Some(0), "{}", stderr(&output));
            place.run(&["pretrain", "--resume", &out, "--backend", second]);
            let got = losses(Path::new(&out));
            assert_eq!(got.len(), want.len());
            for (step, (got, want)) in got.iter().zip(&want).enumerate() {
                // Ten steps of the fixtures agree to 1e-6; rounding grows with the steps.
                assert!(
                    (got - want).abs() <= 1e-4 * want.abs(),
                    "{}: {first}, {second}, step {}: {got}, expected {want}",
                    place.name,
                    step + 1
                );
            }
        }
    }
}

/// Steps that cannot become graphs have the same losses, and are warned of once.
#[test]
fn steps_without_graphs_are_the_same_and_said() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let data = path("data");
    idx_folder(Path::new(&data), 40, 10);
    for place in places() {
        let is_emulated = place.name == "the emulator";
        if !is_emulated {
            continue;
        }
        let run = |out: &str, refused: bool| {
            let out = path(out);
            let mut args = vec!["pretrain", "--data", &data, "--out", &out];
            args.extend_from_slice(&["--backend", "cuda", "--batch-size", "2", "--steps", "12"]);
            args.extend_from_slice(&["--set", "eval_every=0", "--set", "save_every=1000"]);
            args.extend_from_slice(TINY);
            let mut command = place.command(&args);
            if refused {
                command.env("PCAE_EMULATED_NO_GRAPHS", "1");
            }
            let output = command.output().unwrap();
            assert!(output.status.success(), "{}", stderr(&output));
            (losses(Path::new(&out)), stderr(&output))
        };
        let (graphs, said) = run("graphs", false);
        assert!(!said.contains("does not become a graph"), "{said}");
        let (issued, said) = run("issued", true);
        assert_eq!(said.matches("does not become a graph").count(), 1, "{said}");
        assert!(said.contains("warning: work"), "{said}");
        assert!(said.contains("CUDA_ERROR_NOT_SUPPORTED"), "{said}");
        assert_eq!(graphs.len(), 12);
        assert_eq!(graphs, issued);
        println!("{said}");
    }
}

/// Losses that are read while later steps run are those that are read after each step.
#[test]
fn losses_that_come_late_are_the_same() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let data = path("data");
    idx_folder(Path::new(&data), 40, 10);
    for place in places() {
        let [often, seldom] = ["1", "1000"].map(|save_every| {
            let out = path(&format!("{}-{save_every}", place.name));
            let save_every = format!("save_every={save_every}");
            let mut args = vec!["pretrain", "--data", &data, "--out", &out];
            args.extend_from_slice(&["--backend", "cuda", "--batch-size", "2", "--steps", "37"]);
            args.extend_from_slice(&["--set", "eval_every=0", "--set", &save_every]);
            args.extend_from_slice(TINY);
            place.run(&args);
            losses(Path::new(&out))
        });
        assert_eq!(often.len(), 37);
        assert_eq!(often, seldom, "{}", place.name);
    }
}

/// Whether a place has tensor cores for fp8.
fn has_fp8(place: &Place) -> bool {
    let path = fixture("pcae_gray_rect");
    let args = ["parity", path.to_str().unwrap(), "--backend", "cuda"];
    let output = place.pcae(&[&args[..], &["--teacher-precision", "fp8"]].concat());
    let found = !stderr(&output).contains("compute capability 8.9");
    if !found {
        println!("skipped on {}: {}", place.name, stderr(&output));
    }
    found
}

/// A step with a teacher in fp8 is that of the fixture but for the teacher's rounding, and not that of a teacher in bf16.
#[test]
fn a_golden_fixture_with_a_teacher_in_fp8() {
    for place in places() {
        if !has_fp8(&place) {
            continue;
        }
        let path = fixture("pcae_gray_rect");
        let args = ["parity", path.to_str().unwrap(), "--backend", "cuda"];
        let run = |teacher| place.run(&[&args[..], &["--teacher-precision", teacher]].concat());
        let error = |output: &Output| {
            let text = stdout(output);
            let row = text.lines().find(|row| row.starts_with("expect.target"));
            let error = row.unwrap().split_whitespace().nth(2).unwrap();
            error.parse::<f64>().unwrap()
        };
        let [fp8, bf16] = ["fp8", "bf16"].map(|teacher| error(&run(teacher)));
        println!("{}: targets {fp8:.1e}, in bf16 {bf16:.1e}", place.name);
        assert!(fp8 > 3.0 * bf16, "{}: {fp8} {bf16}", place.name);
        // Widths of 24.
        let path = fixture("pcae_small");
        let args = ["parity", path.to_str().unwrap(), "--backend", "cuda"];
        let output = place.pcae(&[&args[..], &["--teacher-precision", "fp8"]].concat());
        assert_eq!(output.status.code(), Some(1));
        assert!(
            stderr(&output).contains("multiples of 16"),
            "{}",
            stderr(&output)
        );
    }
}

/// A run with a teacher in fp8 that goes on after an end, whose weights in e4m3 are made from the checkpoint, has the losses of one without.
#[test]
fn a_teacher_in_fp8_has_the_same_bits_after_a_resume() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let data = path("data");
    idx_folder(Path::new(&data), 40, 10);
    for place in places() {
        if !has_fp8(&place) {
            continue;
        }
        let arguments = |out: &str, teacher: &str| {
            let mut args = vec![
                "pretrain",
                "--data",
                &data,
                "--out",
                out,
                "--backend",
                "cuda",
            ];
            args.extend([
                "--batch-size",
                "2",
                "--steps",
                "12",
                "--teacher-precision",
                teacher,
            ]);
            args.extend(["--set", "eval_every=0", "--set", "save_every=3"]);
            args.extend_from_slice(TINY);
            args.into_iter().map(str::to_owned).collect::<Vec<_>>()
        };
        let start = |out: &str, teacher: &str| {
            let args = arguments(out, teacher);
            place.command(&args.iter().map(String::as_str).collect::<Vec<_>>())
        };
        let [whole, other, cut] =
            ["whole", "other", "cut"].map(|name| path(&format!("{}-{name}", place.name)));
        for (out, teacher) in [(&whole, "fp8"), (&other, "bf16")] {
            let output = start(out, teacher).output().unwrap();
            assert!(output.status.success(), "{}", stderr(&output));
        }
        let want = losses(Path::new(&whole));
        assert_eq!(want.len(), 12);
        assert_ne!(want, losses(Path::new(&other)), "{}", place.name);

        let mut child = start(&cut, "fp8")
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let began = Instant::now();
        while !Path::new(&cut)
            .join("checkpoints/last.safetensors")
            .exists()
        {
            assert!(
                began.elapsed() < Duration::from_secs(300),
                "no checkpoint yet"
            );
            std::thread::sleep(Duration::from_millis(2));
        }
        child.kill().unwrap();
        child.wait().unwrap();
        let config = fs::read_to_string(Path::new(&cut).join("config.toml")).unwrap();
        assert!(config.contains("teacher_precision = \"fp8\""), "{config}");
        place.run(&["pretrain", "--resume", &cut]);
        assert_eq!(losses(Path::new(&cut)), want, "{}", place.name);
    }
}

/// Wherever fp8 is not to be had, the command says what it takes and what to do, before it makes anything.
#[test]
fn fp8_where_it_is_not_to_be_had_is_typed_wrong() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("run");
    let fixed = ["pretrain", "--steps", "1", "--out", out.to_str().unwrap()];
    for place in places() {
        let cases: [(&[&str], bool, &[&str]); 5] = [
            (
                &["--precision", "fp8"],
                true,
                &["--precision", "teacher alone", "--teacher-precision fp8"],
            ),
            (
                &["--precision", "f32", "--teacher-precision", "fp8"],
                true,
                &[
                    "--teacher-precision",
                    "beside bf16",
                    "use --teacher-precision f32",
                ],
            ),
            (
                &["--teacher-precision", "f32"],
                true,
                &["--teacher-precision", "or fp8 beside bf16", "found f32"],
            ),
            (
                &["--teacher-precision", "fp8", "--set", "embed_dim=24"],
                true,
                &[
                    "--teacher-precision",
                    "multiples of 16",
                    "found 24",
                    "use --teacher-precision bf16",
                ],
            ),
            (
                &["--teacher-precision", "fp8"],
                false,
                &["cuBLASLt", "use --teacher-precision bf16"],
            ),
        ];
        // The second says whether the libraries have fp8.
        for (flags, has_fp8, said) in cases {
            if !has_fp8 && place.name != "the emulator" {
                continue;
            }
            let mut command = place.command(&[&fixed[..], &["--backend", "cuda"], flags].concat());
            if !has_fp8 {
                command.env("PCAE_EMULATED_FP8", "none");
            }
            let output = command.output().unwrap();
            let text = stderr(&output);
            assert_eq!(output.status.code(), Some(2), "{flags:?}: {text}");
            for part in said {
                assert!(
                    text.contains(part),
                    "{flags:?}: {part:?} is missing in {text}"
                );
            }
            assert!(!out.exists(), "{flags:?}");
        }
    }
}

/// What every command below adds: one format on both backends.
const F32: [&str; 2] = ["--precision", "f32"];

/// What a command prints with `--json` on a backend.
fn json(place: &Place, backend: &str, args: &[&str]) -> serde_json::Value {
    let output = place.run(&[args, &["--backend", backend, "--json"], &F32].concat());
    serde_json::from_str(&stdout(&output)).unwrap()
}

/// A run of a few steps on the CPU, and 60 pictures to train on and 120 held out beside it.
fn pretrained(place: &Place, folder: &Path) -> String {
    let path = |name: &str| folder.join(name).to_str().unwrap().to_owned();
    let (data, out) = (path("data"), path("run"));
    if !Path::new(&out).exists() {
        idx_folder(Path::new(&data), 60, 120);
        let mut args = vec!["pretrain", "--data", &data, "--out", &out];
        args.extend(["--batch-size", "10", "--steps", "6"]);
        args.extend(["--set", "eval_every=0"]);
        args.extend_from_slice(TINY);
        json(place, "cpu", &args);
    }
    out
}

/// From random weights, with dropped tokens, accumulation and the evaluations: the losses of the CPU but for rounding.
#[test]
fn finetune_has_the_losses_of_the_cpu() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let data = path("data");
    idx_folder(Path::new(&data), 200, 20);
    for place in places() {
        let [cuda, cpu] = ["cuda", "cpu"].map(|backend| {
            let out = path(&format!("{}-{backend}", place.name));
            let mut args = from_scratch(&data, &out).to_vec();
            args.extend(["--batch-size", "5", "--accum", "2", "--steps", "12"]);
            args.extend(["--drop-ratio", "0.3", "--set", "mixup=0.8"]);
            // No decoder.
            args.extend_from_slice(&TINY[..6]);
            let report = json(&place, backend, &args);
            (losses(Path::new(&out)), report)
        });
        assert_eq!((cuda.0.len(), cpu.0.len()), (12, 12));
        let most = cuda.0.iter().zip(&cpu.0);
        let most = most.map(|(got, want)| (got / want - 1.0).abs());
        let most = most.fold(0.0, f64::max);
        println!("{}: {most:.1e}; {} {}", place.name, cuda.1, cpu.1);
        assert!(cuda.0.iter().all(|loss| *loss > 0.1), "{:?}", cuda.0);
        assert!(most < 1e-5, "{}: {:?} {:?}", place.name, cuda.0, cpu.0);
        for what in ["top1", "best_top1"] {
            let [cuda, cpu] = [&cuda.1, &cpu.1].map(|report| report[what].as_f64().unwrap());
            // One picture of the 20 may be as near to one class as to another.
            assert!((cuda - cpu).abs() < 0.051, "{what}: {cuda} {cpu}");
        }
    }
}

/// Features of all tokens and of those that are left, at a layer in the midst and at the end.
#[test]
fn embed_writes_the_features_of_the_cpu() {
    let folder = tempfile::tempdir().unwrap();
    for place in places() {
        let run = pretrained(&place, folder.path());
        let cases: [(&[&str], &[usize]); 3] = [
            (&["--pool", "tokens"], &[180, 50, 16]),
            (
                &["--pool", "tokens", "--layer", "1", "--drop-ratio", "0.25"],
                &[180, 29, 16],
            ),
            (&["--pool", "mean"], &[180, 16]),
        ];
        for (flags, shape) in cases {
            let [cuda, cpu] = ["cuda", "cpu"].map(|backend| {
                let out = folder.path().join(format!("{backend}.safetensors"));
                let fixed = ["embed", &run, "--out", out.to_str().unwrap()];
                // The last batch is a shorter one.
                let fixed = [&fixed[..], &["--batch-size", "32"]].concat();
                json(&place, backend, &[&fixed[..], flags].concat());
                let features = Reader::open(&out).unwrap().tensor_f32("features", shape);
                fs::remove_file(out).unwrap();
                features.unwrap()
            });
            let most = cuda
                .iter()
                .zip(&cpu)
                .map(|(got, want)| (got - want).abs())
                .fold(0.0, f32::max);
            println!("{}, {flags:?}: {most:.1e}", place.name);
            assert!(cpu.iter().any(|x| x.abs() > 0.5), "{flags:?}");
            // Values of order 1.
            assert!(most < 2e-5, "{}, {flags:?}: {most}", place.name);
        }
    }
}

/// The same neighbours at every layer.
#[test]
fn knn_has_the_accuracies_of_the_cpu() {
    let folder = tempfile::tempdir().unwrap();
    for place in places() {
        let run = pretrained(&place, folder.path());
        let flags = ["--layer", "2,0", "--pool", "mean,cls", "--k", "1,5,20"];
        let [cuda, cpu] = ["cuda", "cpu"].map(|backend| {
            let report = json(&place, backend, &[&["knn", &run][..], &flags].concat());
            let rows = report["rows"].as_array().unwrap().iter();
            let of = |row: &serde_json::Value| row["top1"].as_array().unwrap().clone();
            rows.flat_map(of)
                .map(|top1| top1["weighted"].as_f64().unwrap())
                .collect::<Vec<_>>()
        });
        println!("{}: {cuda:?} {cpu:?}", place.name);
        assert_eq!((cuda.len(), cpu.len()), (12, 12));
        // Not what is guessed, of ten classes.
        assert!(cpu.iter().any(|top1| *top1 > 0.3), "{cpu:?}");
        for (cuda, cpu) in cuda.iter().zip(&cpu) {
            // One picture of the 120 may be as near to one class as to another.
            assert!((cuda - cpu).abs() < 0.009, "{cuda} {cpu}");
        }
    }
}

/// A batch that no device has room for is refused before anything is allocated, and says what was planned.
#[test]
fn a_batch_that_does_not_fit_says_what_it_would_take() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("run").to_str().unwrap().to_owned();
    for place in places() {
        // Its memory is known.
        if place.name != "the emulator" {
            continue;
        }
        for more in [&["pretrain"][..], &["finetune", "--weights", "none"]] {
            let mut args = more.to_vec();
            args.extend(["--backend", "cuda", "--out", &out]);
            args.extend(["--batch-size", "8000", "--precision", "f32"]);
            let output = place.command(&args).output().unwrap();
            let said = stderr(&output);
            assert_eq!(output.status.code(), Some(2), "{said}");
            for word in [
                "--batch-size",
                "4.29 GB",
                "are planned",
                "activations",
                "--batch-size auto",
            ] {
                assert!(said.contains(word), "{more:?}: {said}");
            }
            assert!(!Path::new(&out).exists());
        }
    }
}
