//! What is done with frozen features: nearest neighbours, probes, files of features.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use pcae_backend_cpu::Cpu;
use pcae_kernel::backend::{Backend, TrainBackend};
use pcae_kernel::config::Reduction;
use pcae_kernel::layout::Layout;
use pcae_kernel::model::{MeanSimilarity, Vit};
use pcae_tests::{TINY, idx_folder, pcae, png, stderr, stdout};
use pcae_train::checkpoint::Which;
use pcae_train::checkpoint::exchange::Hints;
use pcae_train::checkpoint::file::Reader;
use pcae_train::data::{self, Picture, augment::Scratch};
use pcae_train::encoder;

const BINARY: &str = env!("CARGO_BIN_EXE_pcae-under-test");

/// A run of a few steps and its data.
struct Run {
    folder: tempfile::TempDir,
    knn_top1: f64,
}

impl Run {
    /// One for all tests.
    fn get() -> &'static Self {
        static RUN: OnceLock<Run> = OnceLock::new();
        RUN.get_or_init(|| {
            let folder = tempfile::tempdir().unwrap();
            let data = folder.path().join("data");
            idx_folder(&data, 160, 50);
            let out = folder.path().join("run");
            let mut args = vec!["pretrain", "--data", data.to_str().unwrap(), "--json"];
            args.extend(["--batch-size", "16", "--steps", "8", "--set", "knn_k=7"]);
            args.extend(["--out", out.to_str().unwrap()]);
            args.extend_from_slice(TINY);
            let output = pcae(BINARY, &args);
            assert!(output.status.success(), "{}", stderr(&output));
            let summary: serde_json::Value = serde_json::from_str(&stdout(&output)).unwrap();
            Run {
                folder,
                knn_top1: summary["knn_top1"].as_f64().unwrap(),
            }
        })
    }

    fn path(&self, name: &str) -> String {
        self.folder.path().join(name).to_str().unwrap().to_owned()
    }

    /// `pcae COMMAND RUN MORE`
    fn pcae(&self, command: &str, more: &[&str]) -> std::process::Output {
        pcae(BINARY, &[&[command, &self.path("run")], more].concat())
    }

    fn json(&self, command: &str, more: &[&str]) -> serde_json::Value {
        let output = self.pcae(command, &[more, &["--json"]].concat());
        assert!(output.status.success(), "{more:?}: {}", stderr(&output));
        serde_json::from_str(&stdout(&output)).unwrap()
    }

    /// `[picture][tokens, dim]` of all pictures, by the model itself, one at a time.
    fn tokens(&self) -> Vec<Vec<f32>> {
        let encoder = encoder::load(
            Path::new(&self.path("run")),
            Which::Student,
            &Hints::default(),
        )
        .unwrap();
        let splits = data::open(Some(Path::new(&self.path("data"))), Some(1)).unwrap();
        let layout = Layout::encoder(&encoder.vit);
        let backend = &mut Cpu::new();
        let params = backend.params(&layout, &encoder.values).unwrap();
        let mut vit = Vit::new(backend, &encoder.vit, 1, 49, true, Reduction::NONE).unwrap();
        let mut on_device = backend.buf(28 * 28).unwrap();
        let (mut picture, mut pixels) = (Picture::default(), vec![0.0; 28 * 28]);
        let mut features = Vec::new();
        for part in [splits.train, splits.held_out] {
            for i in 0..part.len() {
                part.picture(i, &mut picture).unwrap();
                let scratch = &mut Scratch::default();
                encoder
                    .transform
                    .eval(&picture, scratch, &mut pixels)
                    .unwrap();
                backend.write(&mut on_device, &pixels).unwrap();
                let scorer = &mut MeanSimilarity;
                vit.forward(backend, &params, 1, &on_device, None, scorer)
                    .unwrap();
                let tokens = vit.final_norm(backend, &params).unwrap();
                let mut read = vec![0.0; 50 * encoder.vit.embed_dim];
                backend.read(&mut read, tokens).unwrap();
                features.push(read);
            }
        }
        features
    }
}

fn close(found: &[f32], want: &[f32]) {
    assert_eq!(found.len(), want.len());
    for (found, want) in found.iter().zip(want) {
        // Two orders of summation in f32, of values of order 1.
        assert!((found - want).abs() < 2e-5, "{found} {want}");
    }
}

fn npy(path: &str, shape: &str) -> Vec<f32> {
    let bytes = fs::read(path).unwrap();
    let end = 10 + usize::from(u16::from_le_bytes([bytes[8], bytes[9]]));
    let header = String::from_utf8_lossy(&bytes[10..end]).into_owned();
    assert!(header.contains(shape), "{header}");
    let values = bytes[end..].as_chunks().0.iter();
    values.map(|bytes| f32::from_le_bytes(*bytes)).collect()
}

/// Of an uneven last batch too, in every pooling.
#[test]
fn embedded_features_are_the_models() {
    let run = Run::get();
    let tokens = run.tokens();
    let dim = 16;
    let out = run.path("tokens.safetensors");
    let report = run.json(
        "embed",
        &["--pool", "tokens", "--out", &out, "--batch-size", "64"],
    );
    assert_eq!(report["shape"], serde_json::json!([210, 50, dim]));
    assert_eq!(report["unreadable"], 0);
    let reader = Reader::open(Path::new(&out)).unwrap();
    let found = reader.tensor_f32("features", &[210, 50, dim]).unwrap();
    close(&found, &tokens.concat());
    assert_eq!(reader.metadata()["layer"], "2");

    let out = run.path("cls.npy");
    run.json("embed", &["--pool", "cls", "--out", &out]);
    let cls: Vec<f32> = tokens
        .iter()
        .flat_map(|tokens| tokens[..dim].to_vec())
        .collect();
    close(&npy(&out, "(210, 16)"), &cls);
    let names = fs::read_to_string(out + ".names.txt").unwrap();
    assert_eq!(names.lines().count(), 210);
    assert!(
        names
            .lines()
            .nth(160)
            .unwrap()
            .contains("t10k-images-idx3-ubyte[0]")
    );

    let out = run.path("mean.csv");
    run.json("embed", &["--out", &out]);
    let text = fs::read_to_string(&out).unwrap();
    let lines = text.lines().skip(1);
    let found = lines.flat_map(|line| line.split(',').skip(1).map(|x| x.parse().unwrap()));
    let mean = tokens.iter().flat_map(|tokens| {
        (0..dim).map(|i| tokens[dim..].iter().skip(i).step_by(dim).sum::<f32>() / 49.0)
    });
    close(&found.collect::<Vec<f32>>(), &mean.collect::<Vec<f32>>());
    assert!(
        run.pcae("embed", &["--out", &run.path("m.parquet")])
            .status
            .success()
    );
}

/// Dropped tokens, in the middle of the encoder: the backends agree on which are left and what they are.
#[test]
fn tokens_that_are_left_have_positions() {
    let run = Run::get();
    let embed = |backend: &str, out: &str| {
        let flags = [
            "--backend",
            backend,
            "--pool",
            "tokens",
            "--layer",
            "1",
            "--drop-ratio",
            "0.25",
        ];
        run.json("embed", &[&flags[..], &["--out", out]].concat());
        let reader = Reader::open(Path::new(out)).unwrap();
        let bytes = fs::read(out).unwrap();
        // 49 patches, 37 after block 0 and 28 after block 1.
        assert_eq!(reader.shape("positions"), Some(&[210, 28][..]));
        let features = reader.tensor_f32("features", &[210, 29, 16]).unwrap();
        // The header says where they are.
        let header = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        let start = header + 4 * features.len();
        let positions = bytes[start..][..4 * 210 * 28].as_chunks().0.iter();
        (
            features,
            positions
                .map(|b| u32::from_le_bytes(*b))
                .collect::<Vec<u32>>(),
        )
    };
    let (features, positions) = embed("cpu", &run.path("cpu.safetensors"));
    let (want, want_positions) = embed("reference", &run.path("reference.safetensors"));
    assert_eq!(positions, want_positions);
    close(&features, &want);
    for positions in positions.chunks(28) {
        let mut sorted = positions.to_vec();
        sorted.sort_unstable();
        sorted.dedup();
        assert!(sorted.len() == 28 && sorted[27] < 49);
    }
    let output = run.pcae(
        "embed",
        &["--pool", "tokens", "--drop-ratio", "0.25", "--out", "x.npy"],
    );
    assert_eq!(output.status.code(), Some(2), "{}", stderr(&output));
}

/// Unreadable files are counted and listed, in the order they come; the others are all there.
#[test]
fn unreadable_pictures_are_left_out() {
    let run = Run::get();
    let album = run.folder.path().join("album");
    fs::create_dir_all(album.join("sub")).unwrap();
    for i in 0..7_u32 {
        let picture = png(30 + i, 40, |x, y| {
            [(x * 5) as u8, (y * 3) as u8, (i * 30) as u8]
        });
        fs::write(album.join("sub").join(format!("{i}.png")), picture).unwrap();
    }
    let (whole, broken) = (run.path("whole.csv"), run.path("broken.csv"));
    let embed = |out: &str| {
        let flags = [
            "--data",
            album.to_str().unwrap(),
            "--batch-size",
            "3",
            "--workers",
            "2",
        ];
        run.json("embed", &[&flags[..], &["--out", out]].concat())
    };
    assert_eq!(embed(&whole)["pictures"], 7);
    fs::write(album.join("sub/2.png"), "not a picture").unwrap();
    fs::write(album.join("0.jpg"), "").unwrap();
    let report = embed(&broken);
    assert_eq!(
        (&report["pictures"], &report["unreadable"]),
        (&8.into(), &2.into())
    );
    assert_eq!(report["shape"], serde_json::json!([6, 16]));
    let list = fs::read_to_string(broken.clone() + ".unreadable.txt").unwrap();
    let lines: Vec<&str> = list.lines().collect();
    assert!(
        lines.len() == 2 && lines[0].starts_with("0.jpg\t") && lines[1].starts_with("sub/2.png\t"),
        "{list}"
    );
    let text = fs::read_to_string(&whole).unwrap();
    let kept: Vec<&str> = text
        .lines()
        .filter(|line| !line.starts_with("sub/2.png,"))
        .collect();
    let found = fs::read_to_string(&broken).unwrap();
    assert_eq!(found.lines().collect::<Vec<_>>(), kept);
    assert!(!Path::new(&(broken + ".partial")).exists());

    let all = run.folder.path().join("all-broken");
    fs::create_dir_all(&all).unwrap();
    fs::write(all.join("a.png"), "").unwrap();
    let out = run.path("none.npy");
    let output = run.pcae("embed", &["--data", all.to_str().unwrap(), "--out", &out]);
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("a.png"), "{}", stderr(&output));
    assert!(!Path::new(&out).exists() && !Path::new(&(out + ".partial")).exists());
}

/// A signal ends it after a batch with what was done saved; the same command goes on to the same bytes, another is
/// refused.
#[cfg(unix)]
#[test]
fn an_interrupted_embedding_goes_on() {
    use std::process::{Command, Stdio};
    let run = Run::get();
    let (whole, out) = (run.path("whole.npy"), run.path("stopped.npy"));
    let flags = [
        "--backend",
        "reference",
        "--batch-size",
        "1",
        "--pool",
        "cls",
    ];
    run.json("embed", &[&flags[..], &["--out", &whole]].concat());
    let mut child = Command::new(BINARY)
        .args(["embed", &run.path("run"), "--out", &out])
        .args(flags)
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let partial = PathBuf::from(out.clone() + ".partial");
    while !partial.exists() && child.try_wait().unwrap().is_none() {
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
    let kill = Command::new("kill")
        .args(["-INT", &child.id().to_string()])
        .status();
    assert!(kill.unwrap().success());
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(130), "{}", stdout(&output));
    assert!(stdout(&output).contains("the same command goes on"));
    assert!(!Path::new(&out).exists());
    let state: serde_json::Value =
        serde_json::from_slice(&fs::read(partial.join("state.json")).unwrap()).unwrap();
    let done = state["done"].as_u64().unwrap();
    assert!((1..210).contains(&done), "{done}");

    let other = run.pcae(
        "embed",
        &["--backend", "reference", "--layer", "0", "--out", &out],
    );
    assert_eq!(other.status.code(), Some(2));
    assert!(
        stderr(&other).contains("not finished"),
        "{}",
        stderr(&other)
    );
    let output = run.pcae("embed", &[&flags[..], &["--out", &out]].concat());
    assert!(output.status.success(), "{}", stderr(&output));
    assert!(
        stderr(&output).contains(&format!("going on after {done} picture")),
        "{}",
        stderr(&output)
    );
    assert!(fs::read(&out).unwrap() == fs::read(&whole).unwrap());
    assert!(!partial.exists());
}

/// The same figure as in pre-training, and a row for each layer and pooling.
#[test]
fn knn_of_every_layer() {
    let run = Run::get();
    let report = run.json("knn", &["--k", "7"]);
    assert_eq!(
        report["rows"][0]["top1"][0]["weighted"].as_f64(),
        Some(run.knn_top1)
    );
    assert_eq!(
        (&report["train"], &report["held_out"]),
        (&160.into(), &50.into())
    );
    let report = run.json("knn", &["--layer", "2,0", "--pool", "mean,cls"]);
    let rows = report["rows"].as_array().unwrap();
    let what: Vec<(u64, &str)> = rows
        .iter()
        .map(|row| {
            (
                row["layer"].as_u64().unwrap(),
                row["pool"].as_str().unwrap(),
            )
        })
        .collect();
    assert_eq!(what, [(2, "mean"), (2, "cls"), (0, "mean"), (0, "cls")]);
    let ks = |row: &serde_json::Value| {
        let top1 = row["top1"].as_array().unwrap().iter();
        top1.map(|accuracy| accuracy["k"].as_u64().unwrap())
            .collect::<Vec<_>>()
    };
    // Of the usual numbers those that there are pictures for.
    assert_eq!(ks(&rows[3]), [1, 5, 10, 20, 100]);
    let figures: Vec<String> = rows.iter().map(|row| row["top1"].to_string()).collect();
    assert!(
        (0..4).all(|i| !figures[..i].contains(&figures[i])),
        "{figures:?}"
    );
    for more in [
        &["--which", "untrained"][..],
        &["--which", "teacher"],
        &["--scaling", "raw"],
    ] {
        let other = run.json("knn", &[&["--layer", "2", "--pool", "cls"], more].concat());
        assert_ne!(other["rows"][0]["top1"], rows[1]["top1"], "{more:?}");
    }
    let output = run.pcae("knn", &["--layer", "0,1"]);
    let text = stdout(&output);
    assert!(text.contains("weighted") && text.contains("k=20"), "{text}");
    assert!(
        stderr(&output).contains(": pcae names: 62 of 62 tensors loaded"),
        "{}",
        stderr(&output)
    );
}

/// Each solver learns something, the same twice, and something else with another seed or crops.
#[test]
fn probes() {
    let run = Run::get();
    let top1 = |report: &serde_json::Value| report["top1"].as_f64().unwrap();
    for solver in ["logistic", "sgd", "lars"] {
        // The usual rates are for more steps than these 150.
        let steps: &[&str] = match solver {
            "logistic" => &[],
            "sgd" => &["--epochs", "30", "--batch-size", "32", "--lr", "0.5"],
            _ => &["--epochs", "30", "--batch-size", "32", "--lr", "20"],
        };
        let probe = |more: &[&str]| {
            let mut report = run.json("probe", &[&["--solver", solver], steps, more].concat());
            report["seconds"] = 0.into();
            report
        };
        let report = probe(&[]);
        // Ten classes: by chance a tenth.
        assert!(top1(&report) > 0.3, "{report}");
        assert!(report["train_top1"].as_f64().unwrap() > 0.5, "{report}");
        assert!(report["top5"].as_f64().unwrap() > top1(&report));
        let classes = report["per_class"].as_array().unwrap();
        let pictures: u64 = classes
            .iter()
            .map(|class| class["pictures"].as_u64().unwrap())
            .sum();
        assert_eq!((classes.len(), pictures), (10, 50));
        assert_eq!(probe(&[]), report);
        if solver == "logistic" {
            assert_eq!(report["tried"].as_array().unwrap().len(), 9);
            let one = probe(&["--l2", "0.5", "--layer", "0", "--pool", "cls"]);
            assert_eq!(
                (&one["l2"], &one["layer"], &one["pool"]),
                (&0.5.into(), &0.into(), &"cls".into())
            );
        } else {
            assert_ne!(probe(&["--seed", "1"])["loss"], report["loss"]);
            let decayed = probe(&["--weight-decay", "0.1"]);
            assert_ne!(decayed["loss"], report["loss"]);
            let augmented = probe(&["--augment"]);
            assert_ne!(augmented["loss"], report["loss"]);
            assert_eq!(probe(&["--augment", "--workers", "2"]), augmented);
        }
    }
    let output = run.pcae("probe", &["--l2", "0.1,0.01"]);
    let text = stdout(&output);
    assert!(
        text.contains("taken") && text.lines().last().unwrap().contains("top-5"),
        "{text}"
    );
}

/// What is typed wrong gets one line that names it, exit code 2, and leaves nothing behind.
#[test]
fn wrong_flags() {
    let run = Run::get();
    let out = run.path("never.npy");
    let out = out.as_str();
    let cases: [(&str, &[&str], &[&str]); 24] = [
        ("knn", &["--k", "161"], &["--k", "1 to 160", "161"]),
        ("knn", &["--k", "0"], &["--k", "found 0"]),
        ("knn", &["--k", "many"], &["--k", "many"]),
        ("knn", &["--layer", "3"], &["--layer", "0 to 2", "found 3"]),
        ("knn", &["--pool", "tokens"], &["--pool", "cls or mean"]),
        (
            "knn",
            &["--drop-ratio", "1"],
            &["--drop-ratio", "less than 1"],
        ),
        ("knn", &["--drop-layers", "3"], &["--drop-layers", "0 to 2"]),
        (
            "knn",
            &["--drop-layers", "x"],
            &["--drop-layers", "starts:N"],
        ),
        ("knn", &["--which", "best"], &["--which", "best"]),
        ("knn", &["--batch-size", "0"], &["--batch-size", "found 0"]),
        ("knn", &["--val", "x"], &["--val", "t10k"]),
        ("probe", &["--layer", "3"], &["--layer", "0 to 2"]),
        ("probe", &["--pool", "tokens"], &["--pool", "tokens"]),
        (
            "probe",
            &["--epochs", "3"],
            &["--epochs", "--solver sgd or lars"],
        ),
        (
            "probe",
            &["--augment"],
            &["--augment", "--solver sgd or lars"],
        ),
        (
            "probe",
            &["--solver", "sgd", "--l2", "1"],
            &["--l2", "--weight-decay"],
        ),
        ("probe", &["--l2", "-1"], &["--l2", "positive", "-1"]),
        (
            "probe",
            &["--solver", "sgd", "--lr", "-1"],
            &["--lr", "positive"],
        ),
        (
            "probe",
            &["--solver", "lars", "--batch-size", "1"],
            &["--batch-size", "2 to 160"],
        ),
        (
            "probe",
            &["--solver", "lars", "--epochs", "0"],
            &["--epochs", "found 0"],
        ),
        (
            "probe",
            &["--solver", "sgd", "--lr", "1e30"],
            &["--lr", "lower it"],
        ),
        ("embed", &["--out", "features.txt"], &["--out", ".parquet"]),
        (
            "embed",
            &["--out", out, "--layer", "9"],
            &["--layer", "0 to 2"],
        ),
        (
            "embed",
            &["--out", out, "--workers", "5000"],
            &["--workers", "1024"],
        ),
    ];
    for (command, flags, parts) in cases {
        let output = run.pcae(command, flags);
        let text = stderr(&output);
        assert_eq!(output.status.code(), Some(2), "{command} {flags:?}: {text}");
        let last = text.trim_end().lines().last().unwrap();
        for part in parts {
            assert!(last.contains(part), "{command} {flags:?}: {part} in {last}");
        }
    }
    assert!(!Path::new(out).exists() && !Path::new(&format!("{out}.partial")).exists());
    // Not typed wrong, but not there.
    for (command, flags) in [
        ("knn", &["--data", "/nowhere"][..]),
        ("embed", &["--data", "/nowhere", "--out", out]),
    ] {
        let output = run.pcae(command, flags);
        assert_eq!(output.status.code(), Some(1));
        assert!(stderr(&output).contains("/nowhere"), "{}", stderr(&output));
    }
    let existing = run.path("there.csv");
    fs::write(&existing, "mine").unwrap();
    let output = run.pcae("embed", &["--out", &existing]);
    assert!(output.status.code() == Some(2) && stderr(&output).contains("--out"));
    assert_eq!(fs::read_to_string(existing).unwrap(), "mine");
}
