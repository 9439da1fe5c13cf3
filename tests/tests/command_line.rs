//! The commands as a user types them, and what they say when they are typed wrong.

use std::fs;
use std::path::Path;

use pcae_tests::{TINY, fixture, idx_folder, pcae, stderr, stdout};
use pcae_train::checkpoint::file::Reader;

const BINARY: &str = env!("CARGO_BIN_EXE_pcae-under-test");

/// A folder with a small data set in `data`.
struct Place {
    folder: tempfile::TempDir,
}

impl Place {
    fn new() -> Self {
        let place = Self {
            folder: tempfile::tempdir().expect("a temporary folder can be made"),
        };
        idx_folder(Path::new(&place.path("data")), 64, 30);
        place
    }

    fn path(&self, name: &str) -> String {
        self.folder.path().join(name).to_string_lossy().into_owned()
    }

    /// `pcae pretrain` of a few steps with `more` after.
    fn pretrain(&self, more: &[&str]) -> std::process::Output {
        let data = self.path("data");
        let mut args = vec![
            "pretrain",
            "--data",
            &data,
            "--batch-size",
            "8",
            "--steps",
            "4",
        ];
        args.extend_from_slice(TINY);
        args.extend_from_slice(more);
        pcae(BINARY, &args)
    }
}

#[test]
fn a_run_leaves_what_the_design_says() {
    let place = Place::new();
    let out = place.path("run");
    let output = place.pretrain(&["--out", &out, "--set", "eval_every=1", "--lr", "1e-3"]);
    assert!(output.status.success(), "{}", stderr(&output));
    let text = stdout(&output);
    for expected in [
        "kNN top-1: trained",
        "untrained",
        "raw pixels",
        "next:",
        "inspect",
        "curves.png",
    ] {
        assert!(text.contains(expected), "{expected} in {text}");
    }
    for file in [
        "config.toml",
        "metrics.jsonl",
        "curves.png",
        "checkpoints/last.safetensors",
    ] {
        assert!(Path::new(&out).join(file).is_file(), "{file}");
    }
    assert!(
        fs::read_dir(Path::new(&out).join("tensorboard"))
            .unwrap()
            .count()
            > 0
    );
    let config = fs::read_to_string(Path::new(&out).join("config.toml")).unwrap();
    for resolved in [
        "mean = [",
        "momentum = ",
        "warmup_steps = ",
        "lr = 0.001",
        "embed_dim = 16",
        "in_chans = 1",
    ] {
        assert!(config.contains(resolved), "{resolved} in {config}");
    }

    let reader = Reader::open(&Path::new(&out).join("checkpoints/last.safetensors")).unwrap();
    let names = reader.names();
    for name in [
        "blocks.0.attn.qkv.weight",
        "patch_embed.proj.weight",
        "decoder_pred.bias",
        "teacher.blocks.2.mlp.fc1.weight",
        "adamw.exp_avg.mask_token",
        "adamw.exp_avg_sq.norm.bias",
    ] {
        assert!(names.contains(&name.to_owned()), "{name}");
    }
    assert_eq!(
        reader.shape("patch_embed.proj.weight"),
        Some(&[16, 1, 4, 4][..])
    );
    assert_eq!(reader.metadata()["step"], "4");

    let output = pcae(BINARY, &["inspect", &out]);
    assert!(output.status.success(), "{}", stderr(&output));
    assert!(
        stdout(&output).contains("blocks.0.attn.qkv.weight") && stdout(&output).contains("step 4")
    );
    let output = pcae(BINARY, &["inspect", &place.path("data")]);
    assert!(
        stdout(&output).contains("64 pictures"),
        "{}",
        stdout(&output)
    );

    // The resolved settings make the same run again.
    let again = place.path("again");
    let output = pcae(
        BINARY,
        &[
            "pretrain",
            "--config",
            &format!("{out}/config.toml"),
            "--out",
            &again,
            "--json",
        ],
    );
    assert!(output.status.success(), "{}", stderr(&output));
    let summary: serde_json::Value = serde_json::from_str(&stdout(&output)).unwrap();
    assert_eq!(
        (summary["step"].as_u64(), summary["steps"].as_u64()),
        (Some(4), Some(4))
    );
    let bytes = |out: &str| fs::read(Path::new(out).join("checkpoints/last.safetensors")).unwrap();
    assert!(bytes(&out) == bytes(&again));
}

/// Every ablation and option trains, and gives another result than the plain run.
#[test]
fn every_option_does_something() {
    let place = Place::new();
    let plain = place.path("plain");
    assert!(place.pretrain(&["--out", &plain]).status.success());
    let tensors = |out: &str| {
        let reader = Reader::open(&Path::new(out).join("checkpoints/last.safetensors")).unwrap();
        let name = "blocks.0.attn.qkv.weight";
        reader
            .tensor_f32(name, reader.shape(name).unwrap())
            .unwrap()
    };
    let options: [&[&str]; 19] = [
        &["--method", "mae"],
        &["--method", "mae", "--set", "norm_pix=false"],
        &["--set", "criterion=random"],
        &["--set", "criterion=pivoted-qr"],
        &["--set", "drop_place=input"],
        &["--set", "drop_place=1"],
        &["--drop-layers", "ends:2"],
        &["--drop-layers", "none"],
        &["--keep-ratio", "0.7"],
        &["--mask-ratio", "0.6"],
        &["--accum", "2"],
        &["--set", "clip_grad=0.001"],
        &["--set", "drop_path=0.5"],
        &["--set", "weight_decay=5"],
        &["--set", "warmup_steps=3"],
        &["--set", "flip=false"],
        &["--set", "crop_scale=[0.9,1.0]"],
        &["--set", "momentum=0.5"],
        &["--seed", "5"],
    ];
    for (i, option) in options.into_iter().enumerate() {
        let out = place.path(&format!("run{i}"));
        let output = place.pretrain(&[option, &["--out", &out]].concat());
        assert!(output.status.success(), "{option:?}: {}", stderr(&output));
        assert_ne!(tensors(&plain), tensors(&out), "{option:?}");
    }
    let reference = place.path("reference");
    let output = place.pretrain(&[
        "--backend",
        "reference",
        "--precision",
        "f64",
        "--out",
        &reference,
    ]);
    assert!(output.status.success(), "{}", stderr(&output));
    for (a, b) in tensors(&plain).iter().zip(tensors(&reference)) {
        // Four AdamW steps in f32 and f64: a step is at most lr = 3e-5 large whatever the gradient's rounding.
        assert!((a - b).abs() < 1e-4, "{a} {b}");
    }
}

#[test]
fn pictures_of_any_kind_can_be_trained_on() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path().join("photos");
    for class in ["cat", "dog"] {
        fs::create_dir_all(root.join(class)).unwrap();
        for i in 0..12_u32 {
            let picture = pcae_tests::png(40 + i, 33, |x, y| {
                [(x * 5) as u8, (y * 7) as u8, (i * 20) as u8]
            });
            fs::write(root.join(class).join(format!("{i}.png")), picture).unwrap();
        }
    }
    let out = folder.path().join("run");
    let mut args = vec![
        "pretrain",
        "--data",
        root.to_str().unwrap(),
        "--out",
        out.to_str().unwrap(),
    ];
    args.extend([
        "--batch-size",
        "4",
        "--steps",
        "3",
        "--set",
        "img_size=[32,24]",
        "--set",
        "knn_k=3",
    ]);
    args.extend_from_slice(TINY);
    let output = pcae(BINARY, &args);
    assert!(output.status.success(), "{}", stderr(&output));
    let reader = Reader::open(&out.join("checkpoints/last.safetensors")).unwrap();
    assert_eq!(
        reader.shape("patch_embed.proj.weight"),
        Some(&[16, 3, 4, 4][..])
    );
    assert_eq!(reader.shape("pos_embed"), Some(&[1, 49, 16][..]));
}

#[test]
fn parity_tells_by_its_exit_code() {
    for backend in ["cpu", "reference"] {
        let path = fixture("classify_ptr");
        let output = pcae(
            BINARY,
            &["parity", path.to_str().unwrap(), "--backend", backend],
        );
        assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
        let text = stdout(&output);
        let last = text.lines().last().unwrap();
        assert!(
            last.starts_with("parity: ") && last.contains(" tensors, worst "),
            "{last}"
        );
    }
    let output = pcae(BINARY, &["parity", "/nowhere.safetensors"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(
        stderr(&output).contains("/nowhere.safetensors"),
        "{}",
        stderr(&output)
    );
}

/// A reader that closes early is no failure; names in a file cannot drive the terminal.
#[cfg(unix)]
#[test]
fn output_is_safe() {
    use std::process::{Command, Stdio};
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("odd.safetensors");
    let metadata = [("a\x1b[2J".to_owned(), "b\nc".to_owned())].into();
    pcae_train::checkpoint::file::write(&path, &metadata, &[]).unwrap();
    let output = pcae(BINARY, &["inspect", path.to_str().unwrap()]);
    assert!(output.status.success(), "{}", stderr(&output));
    assert!(
        stdout(&output).contains("a\\u{1b}[2J: b\\nc") && !stdout(&output).contains('\x1b'),
        "{}",
        stdout(&output)
    );

    let fixture = fixture("pcae_small");
    let mut child = Command::new(BINARY)
        .args(["inspect", fixture.to_str().unwrap()])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert!(
        output.status.success() && output.stderr.is_empty(),
        "{}",
        stderr(&output)
    );
}

#[test]
fn bench_measures() {
    let folder = tempfile::tempdir().unwrap();
    let json = folder.path().join("bench.json");
    let mut args = vec![
        "bench",
        "--model",
        "vit-micro",
        "--batch-size",
        "2",
        "--threads",
        "1,2",
        "--repeats",
        "1",
    ];
    args.extend(["--drop-ratio", "0,0.4", "--json", json.to_str().unwrap()]);
    args.extend_from_slice(TINY);
    let output = pcae(BINARY, &args);
    assert!(output.status.success(), "{}", stderr(&output));
    let report: serde_json::Value = serde_json::from_slice(&fs::read(json).unwrap()).unwrap();
    let results = report["results"].as_array().unwrap();
    assert_eq!(
        results.len(),
        2 * (2 + 1),
        "threads, times drop ratios and a step: {report}"
    );
    for result in results {
        let share = result["share_of_peak"].as_f64().unwrap();
        // The peak is what registers reach: nothing is above it but by the noise of a shared machine.
        assert!(share > 0.0 && share < 2.0, "{result}");
        assert!(result["images_per_s"].as_f64().unwrap() > 0.0);
    }
    assert!(
        report["machine"]["peak_gflops"]["f32"]["2"]
            .as_f64()
            .unwrap()
            > 0.1
    );
}

/// A fine-tuning step at each drop ratio: its figures, and more memory than a forward's.
#[test]
fn bench_measures_fine_tuning() {
    let folder = tempfile::tempdir().unwrap();
    let json = folder.path().join("bench.json");
    let mut args = vec!["bench", "--model", "vit-micro", "--what", "infer,finetune"];
    args.extend(["--batch-size", "3", "--threads", "1", "--repeats", "1"]);
    args.extend(["--precision", "f32,bf16", "--drop-ratio", "0,0.4"]);
    args.extend(["--breakdown", "--json", json.to_str().unwrap()]);
    args.extend_from_slice(TINY);
    let output = pcae(BINARY, &args);
    assert!(output.status.success(), "{}", stderr(&output));
    for line in [
        "finetune vit-micro drop 0, batch 3",
        "finetune vit-micro drop 0.4, batch 3",
    ] {
        let said = stderr(&output);
        let planned = said.lines().filter(|it| it.starts_with(line));
        assert_eq!(
            planned.filter(|it| it.contains("planned memory")).count(),
            2,
            "{said}"
        );
    }
    assert!(stdout(&output).contains("finetune vit-micro drop 0.4 "));

    let report: serde_json::Value = serde_json::from_slice(&fs::read(json).unwrap()).unwrap();
    let results = report["results"].as_array().unwrap();
    let of = |what: &str, precision: &str, drop_ratio: f64| {
        let mut found = results.iter().filter(|it| {
            it["what"] == what && it["precision"] == precision && it["drop_ratio"] == drop_ratio
        });
        let (one, more) = (found.next(), found.next());
        assert!(more.is_none(), "{report}");
        one.unwrap_or_else(|| panic!("no {what} in {precision} at {drop_ratio}: {report}"))
    };
    assert_eq!(results.len(), 8, "{report}");
    for precision in ["f32", "bf16"] {
        for drop_ratio in [0.0, 0.4] {
            let [step, forward] = ["finetune", "infer"].map(|it| of(it, precision, drop_ratio));
            let [macs, once] = [step, forward].map(|it| it["multiply_adds"].as_u64().unwrap());
            assert_eq!(macs, 3 * once, "{step}");
            assert_eq!(step["tokens"], forward["tokens"]);
            let rate = step["images_per_s"].as_f64().unwrap();
            let gflops = step["gflops"].as_f64().unwrap();
            assert!(rate > 0.0, "{step}");
            assert!(
                (2.0 * macs as f64 * rate / 1e9 / gflops - 1.0).abs() < 1e-9,
                "{step}"
            );
            let [planned, least] = [step, forward].map(|it| it["planned_bytes"].as_u64().unwrap());
            assert!(planned > 2 * least, "{planned} and {least}");
            let parts = step["breakdown"].as_array().unwrap();
            for (operation, calls) in [
                ("linear input gradient", 13.0),
                ("linear parameter gradient", 14.0),
                ("attention backward", 3.0),
                ("target and loss", 1.0),
                ("AdamW and moving average", 1.0),
                // Pictures, labels, stochastic depth of six branches, and the loss read.
                ("transfer", 9.0),
            ] {
                let part = parts.iter().find(|part| part["operation"] == operation);
                let part = part.unwrap_or_else(|| panic!("no {operation} in {step}"));
                assert_eq!(part["calls"], calls, "{part}");
            }
        }
        let [dense, reduced] = [0.0, 0.4].map(|ratio| {
            let step = of("finetune", precision, ratio);
            step["planned_bytes"].as_u64().unwrap()
        });
        assert!(reduced < dense, "{reduced} and {dense}");
    }
}

#[test]
fn bench_takes_a_step_apart_and_draws() {
    let folder = tempfile::tempdir().unwrap();
    let (json, png) = (folder.path().join("b.json"), folder.path().join("r.png"));
    let mut args = vec!["bench", "--model", "vit-micro", "--what"];
    args.extend(["peak,gemm,block,step", "--threads", "1", "--repeats", "2"]);
    args.extend([
        "--batch-size",
        "2",
        "--precision",
        "f32,bf16",
        "--breakdown",
    ]);
    args.extend(["--variant", "method=mae,drop_layers=0,1,mask_ratio=0.5"]);
    args.extend(["--json", json.to_str().unwrap()]);
    args.extend(["--roofline", png.to_str().unwrap()]);
    args.extend_from_slice(TINY);
    let output = pcae(BINARY, &args);
    assert!(output.status.success(), "{}", stderr(&output));
    assert!(stderr(&output).contains("planned memory"));
    assert_eq!(image::open(png).unwrap().width(), 1200);

    let report: serde_json::Value = serde_json::from_slice(&fs::read(json).unwrap()).unwrap();
    let results = report["results"].as_array().unwrap();
    let of = |what: &str| -> Vec<_> {
        results
            .iter()
            .filter(|result| result["what"] == what)
            .collect()
    };
    // Five layers in four passes, but for the gradient of pictures.
    assert_eq!(of("gemm").len(), 2 * 19);
    assert_eq!((of("block").len(), of("step").len()), (2, 4));
    assert!(of("peak").len() >= 2);
    for precision in ["f32", "bf16"] {
        let peak = &report["machine"]["peak_gflops"][precision]["1"];
        assert!(peak.as_f64().unwrap() > 0.1, "{report}");
    }
    let mae = of("step")
        .into_iter()
        .find(|step| step["method"] == "mae")
        .unwrap();
    assert_eq!(mae["mask_ratio"], 0.5);
    for step in of("step") {
        let parts = step["breakdown"].as_array().unwrap();
        let sum = |key: &str| -> f64 { parts.iter().map(|part| part[key].as_f64().unwrap()).sum() };
        assert!((sum("share") - 1.0).abs() < 1e-9, "{step}");
        let optimizer = parts
            .iter()
            .find(|part| part["operation"] == "AdamW and moving average")
            .unwrap();
        assert!(optimizer["share_of_bandwidth"].as_f64().unwrap() > 0.0);
        assert!(step["planned_bytes"].as_u64().unwrap() > 100_000);
    }
    for result in results {
        // The form that other tools read.
        for key in [
            "model",
            "method",
            "mask_ratio",
            "batch",
            "drop_ratio",
            "isa",
        ] {
            assert!(result.get(key).is_some(), "{key}: {result}");
        }
    }
}

/// A run that diverges says so, whichever operation meets it first, and leaves no broken checkpoint.
#[test]
fn divergence() {
    let place = Place::new();
    for method in ["pcae", "mae"] {
        for lr in ["1e30", "1e10"] {
            let out = place.path(&format!("{method}{lr}"));
            let more = [
                "--out",
                &out,
                "--method",
                method,
                "--lr",
                lr,
                "--steps",
                "50",
                "--set",
                "warmup_steps=0",
            ];
            let output = place.pretrain(&more);
            let text = stderr(&output);
            assert_eq!(output.status.code(), Some(1), "{method} {lr}: {text}");
            let last = text.trim_end().lines().last().unwrap();
            assert!(
                last.contains("--lr") && last.contains("start anew"),
                "{method} {lr}: {last}"
            );
            if let Ok(reader) = Reader::open(&Path::new(&out).join("checkpoints/last.safetensors"))
            {
                for name in reader.names() {
                    let values = reader
                        .tensor_f32(&name, reader.shape(&name).unwrap())
                        .unwrap();
                    assert!(
                        name.starts_with("adamw") || values.iter().all(|value| value.is_finite()),
                        "{name}"
                    );
                }
            }
        }
    }
}

#[test]
fn an_encoder_is_exported() {
    let place = Place::new();
    let (run, encoder, again) = (
        place.path("run"),
        place.path("encoder.safetensors"),
        place.path("again.safetensors"),
    );
    assert!(place.pretrain(&["--out", &run]).status.success());
    let teacher = ["--which", "teacher", "--dtype", "bf16", "--out"];
    let export = |source: &str, more: &[&str]| {
        let mut args = vec!["export", source];
        args.extend_from_slice(more);
        pcae(BINARY, &args)
    };
    let output = export(&run, &[&teacher[..], &[&encoder]].concat());
    assert!(output.status.success(), "{}", stderr(&output));
    let text = stdout(&output);
    for expected in [
        ", the teacher of step 4: pcae names: 42 of 42 tensors loaded",
        "bf16",
        &encoder,
    ] {
        assert!(text.contains(expected), "{expected} in {text}");
    }
    // A checkpoint again: a second export needs no flags but whose parameters these are, and has the same ones.
    let output = export(&encoder, &["--which", "teacher", "--out", &again]);
    assert!(output.status.success(), "{}", stderr(&output));
    let trained = Reader::open(&Path::new(&run).join("checkpoints/last.safetensors")).unwrap();
    let [encoder_file, again_file] =
        [&encoder, &again].map(|path| Reader::open(Path::new(path)).unwrap());
    assert_eq!(encoder_file.names(), again_file.names());
    for name in encoder_file.names() {
        let shape = encoder_file.shape(&name).unwrap();
        let found = encoder_file.tensor_f32(&name, shape).unwrap();
        assert_eq!(found, again_file.tensor_f32(&name, shape).unwrap());
        let exact = trained
            .tensor_f32(&format!("teacher.{name}"), shape)
            .unwrap();
        for (found, exact) in found.iter().zip(exact) {
            // Half a unit in the last of 8 places.
            assert!((found - exact).abs() <= exact.abs() / 256.0, "{name}");
        }
    }

    let before = fs::read(&encoder).unwrap();
    for (args, code, expected) in [
        (vec![&encoder[..], "--out", &encoder], 1, "--which teacher"),
        (
            vec![&encoder, "--which", "teacher", "--out", &encoder],
            2,
            "another file",
        ),
        (vec![&run, "--dtype", "f64", "--out", &encoder], 2, "f64"),
        (vec![&run], 2, "--out"),
        (
            vec![&place.path("data"), "--out", &encoder],
            1,
            "checkpoints/last.safetensors",
        ),
    ] {
        let output = export(args[0], &args[1..]);
        let text = stderr(&output);
        assert_eq!(output.status.code(), Some(code), "{args:?}: {text}");
        assert!(text.contains(expected), "{expected} in {text}");
        assert_eq!(text.trim_end().lines().count(), 1, "{text}");
    }
    assert!(before == fs::read(&encoder).unwrap());
}

#[test]
fn every_command_has_help_with_an_example() {
    for command in [
        "pretrain",
        "finetune",
        "evaluate",
        "knn",
        "probe",
        "embed",
        "parity",
        "export",
        "inspect",
        "bench",
        "convert",
        "onnx",
        "visualize",
    ] {
        let output = pcae(BINARY, &[command, "--help"]);
        assert!(output.status.success());
        assert!(stdout(&output).contains("Example"), "{command}");
        assert!(
            stdout(&output).contains(&format!("pcae {command}")),
            "{command}"
        );
    }
}

/// What is typed wrong gets one line that names it, exit code 2, and leaves nothing behind.
#[test]
fn wrong_flags_and_settings() {
    let place = Place::new();
    let cases: [(&[&str], &[&str]); 35] = [
        (&["--workers", "100000"], &["--workers", "1024", "100000"]),
        (&["--threads", "100000"], &["--threads", "1024", "100000"]),
        (&["--batch-size", "65"], &["--batch-size", "1 to 64", "65"]),
        (&["--batch-size", "0"], &["--batch-size", "1 to 64"]),
        (&["--batch-size", "many"], &["--batch-size", "many"]),
        (
            &["--set", "img_size=[30,28]"],
            &["img_size", "patch_size", "30"],
        ),
        (
            &["--set", "patch_size=5"],
            &["img_size", "patch_size (5)", "28"],
        ),
        (
            &["--mask-ratio", "0.99"],
            &["--mask-ratio", "0.99", "visible patch", "49"],
        ),
        (&["--mask-ratio", "0"], &["--mask-ratio", "masked patch"]),
        (
            &["--mask-ratio", "1.5"],
            &["--mask-ratio", "between 0 and 1", "1.5"],
        ),
        (
            &["--mask-ratio", "nan"],
            &["--mask-ratio", "between 0 and 1", "NaN"],
        ),
        (
            &["--keep-ratio", "0.01"],
            &["--keep-ratio", "0.01", "leaves no token"],
        ),
        (&["--keep-ratio", "0"], &["--keep-ratio", "more than 0"]),
        (
            &["--set", "num_heads=3"],
            &["embed_dim", "num_heads (3)", "16"],
        ),
        (
            &["--set", "decoder_num_heads=3"],
            &["decoder_embed_dim", "decoder_num_heads (3)", "8"],
        ),
        (&["--set", "depth=0"], &["depth", "1 to 64", "0"]),
        (&["--drop-layers", "0,7"], &["--drop-layers", "0 to 2", "7"]),
        (
            &["--drop-layers", "some"],
            &["--drop-layers", "starts:N", "some"],
        ),
        (&["--set", "drop_place=9"], &["drop_place", "0 to 2", "9"]),
        (&["--model", "vit-x"], &["--model", "vit-micro", "vit-x"]),
        (&["--method", "simmim"], &["--method", "pcae", "simmim"]),
        (&["--backend", "gpu"], &["--backend", "cpu", "gpu"]),
        (
            &["--precision", "f64"],
            &["--precision", "f32", "f64", "reference"],
        ),
        (&["--set", "isa=mmx"], &["isa", "portable", "mmx"]),
        (&["--epochs", "2"], &["--epochs", "--steps"]),
        (&["--steps", "0"], &["--steps", "at least 1", "0"]),
        (&["--accum", "0"], &["--accum", "1 to", "0"]),
        (&["--lr", "-1"], &["--lr", "-1"]),
        (
            &["--set", "lr=0.1", "--set", "blr=0.1"],
            &["--lr", "blr", "both"],
        ),
        (
            &["--set", "warmup_steps=5"],
            &["warmup_steps", "number of steps", "5"],
        ),
        (&["--set", "momentum=1.5"], &["momentum", "0 to 1", "1.5"]),
        (&["--set", "colour=red"], &["colour", "unknown field"]),
        (&["--set", "flip"], &["--set", "KEY=VALUE", "flip"]),
        (&["--set", "crop_scale=[0.9,0.2]"], &["scale", "0.9"]),
        (&["--seed", "-3"], &["--seed", "-3"]),
    ];
    let out = place.path("run");
    for (args, expected) in cases {
        let output = place.pretrain(&[args, &["--out", &out]].concat());
        let text = stderr(&output);
        assert_eq!(output.status.code(), Some(2), "{args:?}: {text}");
        for expected in expected {
            assert!(text.contains(expected), "{args:?}: {expected:?} in {text}");
        }
        assert_eq!(text.trim_end().lines().count(), 1, "{args:?}: {text}");
        assert!(!Path::new(&out).exists(), "{args:?} left a run behind");
    }
}

/// Files and folders that are not what they should be: one line that names them, exit code 1, nothing overwritten.
#[test]
fn wrong_files_and_folders() {
    let place = Place::new();
    let fails = |args: &[&str], expected: &[&str]| {
        let output = pcae(BINARY, args);
        let text = stderr(&output);
        assert_eq!(output.status.code(), Some(1), "{args:?}: {text}");
        for expected in expected {
            assert!(text.contains(expected), "{args:?}: {expected:?} in {text}");
        }
        assert_eq!(text.trim_end().lines().count(), 1, "{args:?}: {text}");
    };
    // Data.
    let missing = place.path("missing");
    fails(&["pretrain", "--data", &missing], &["--data", &missing]);
    let empty = place.path("empty");
    fs::create_dir(&empty).unwrap();
    fails(&["pretrain", "--data", &empty], &["--data", &empty]);
    let truncated = place.path("truncated");
    idx_folder(Path::new(&truncated), 20, 10);
    let images = Path::new(&truncated).join("train-images-idx3-ubyte");
    let bytes = fs::read(&images).unwrap();
    fs::write(&images, &bytes[..bytes.len() - 1]).unwrap();
    fails(
        &["pretrain", "--data", &truncated],
        &["train-images-idx3-ubyte", "15680", "15679"],
    );

    // Run directories.
    let out = place.path("run");
    assert!(place.pretrain(&["--out", &out]).status.success());
    let before = fs::read(Path::new(&out).join("checkpoints/last.safetensors")).unwrap();
    let output = place.pretrain(&["--out", &out]);
    assert_eq!(output.status.code(), Some(1));
    assert!(
        stderr(&output).contains("--out") && stderr(&output).contains("--resume"),
        "{}",
        stderr(&output)
    );
    assert!(before == fs::read(Path::new(&out).join("checkpoints/last.safetensors")).unwrap());
    let file = place.path("file");
    fs::write(&file, "text").unwrap();
    let output = place.pretrain(&["--out", &file]);
    assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
    assert!(stderr(&output).contains(&file));
    fails(&["pretrain", "--resume", &empty], &["--resume", &empty]);

    #[cfg(target_os = "linux")]
    {
        let output = place.pretrain(&["--out", "/proc/pcae"]);
        assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
        assert!(
            stderr(&output)
                .lines()
                .last()
                .unwrap()
                .contains("/proc/pcae")
        );
    }

    // Other pictures under the same name.
    let images = Path::new(&place.path("data")).join("train-images-idx3-ubyte");
    let pictures = fs::read(&images).unwrap();
    let mut others = pictures.clone();
    *others.last_mut().unwrap() ^= 1;
    fs::write(&images, others).unwrap();
    fails(
        &["pretrain", "--resume", &out],
        &["last.safetensors", "training pictures", "--data"],
    );
    fs::write(&images, pictures).unwrap();

    // Checkpoints.
    let path = Path::new(&out).join("checkpoints/last.safetensors");
    fs::write(&path, &before[..before.len() / 2]).unwrap();
    fails(&["pretrain", "--resume", &out], &["last.safetensors"]);
    fails(&["inspect", path.to_str().unwrap()], &["last.safetensors"]);
    let other = place.path("other");
    assert!(
        place
            .pretrain(&["--out", &other, "--set", "embed_dim=24"])
            .status
            .success()
    );
    fs::copy(
        Path::new(&other).join("checkpoints/last.safetensors"),
        &path,
    )
    .unwrap();
    fails(
        &["pretrain", "--resume", &out],
        &["last.safetensors", "16]", "24]", "architecture"],
    );
    let mae = place.path("mae");
    assert!(
        place
            .pretrain(&["--out", &mae, "--method", "mae"])
            .status
            .success()
    );
    fs::copy(Path::new(&mae).join("checkpoints/last.safetensors"), &path).unwrap();
    fails(
        &["pretrain", "--resume", &out],
        &["last.safetensors", "tensors of the architecture"],
    );
    fs::copy(fixture("encode"), &path).unwrap();
    fails(
        &["pretrain", "--resume", &out],
        &["last.safetensors", "metadata"],
    );
    fs::write(&path, &before).unwrap();

    // Settings of a run that goes on.
    let output = pcae(BINARY, &["pretrain", "--resume", &out, "--lr", "0.1"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).contains("--resume"), "{}", stderr(&output));
    let config = Path::new(&out).join("config.toml");
    let text = fs::read_to_string(&config).unwrap();
    fs::write(
        &config,
        text.replace("weight_decay = 0.05", "weight_decay = 0.06"),
    )
    .unwrap();
    fails(
        &["pretrain", "--resume", &out],
        &["last.safetensors", "config.toml"],
    );
    fs::write(
        &config,
        text.replace("weight_decay = 0.05", "weight_decay = "),
    )
    .unwrap();
    let output = pcae(BINARY, &["pretrain", "--resume", &out]);
    assert!(
        stderr(&output).contains("config.toml"),
        "{}",
        stderr(&output)
    );
    fs::write(&config, text).unwrap();
    assert!(
        pcae(BINARY, &["pretrain", "--resume", &out])
            .status
            .success(),
        "all put back, it goes on"
    );
    fails(&["inspect", &missing], &[&missing]);
}
