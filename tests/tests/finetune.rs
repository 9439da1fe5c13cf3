//! Fine-tuning as a user types it: what a run leaves, what survives a kill, what is said when something is wrong.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use pcae_kernel::rng::{Purpose, Stream};
use pcae_tests::{Place, from_scratch, pcae, png, stderr, stdout};
use pcae_train::checkpoint::file::Reader;
use serde_json::Value;

const BINARY: &str = env!("CARGO_BIN_EXE_pcae-under-test");

/// A classifier that trains in milliseconds.
const TINY: &[&str] = &[
    "--set",
    "embed_dim=16",
    "--set",
    "depth=3",
    "--set",
    "num_heads=2",
    "--batch-size",
    "16",
];

/// Everything random at once, and everything that is saved.
const ALL: &[&str] = &[
    "--accum",
    "2",
    "--drop-ratio",
    "0.3",
    "--set",
    "criterion=random",
    "--set",
    "drop_path=0.2",
    "--set",
    "mixup=0.8",
    "--set",
    "cutmix=1",
    "--set",
    "rand_augment=9",
    "--set",
    "erase_prob=0.25",
    "--set",
    "ema=0.9",
];

/// `pcae finetune` from random weights to `out`, with `more` after.
fn args(place: &Place, out: &str, more: &[&str]) -> Vec<String> {
    let (data, out) = (place.path("data"), place.path(out));
    let mut args = from_scratch(&data, &out).to_vec();
    args.extend_from_slice(TINY);
    args.extend_from_slice(more);
    args.into_iter().map(str::to_owned).collect()
}

fn finetune(place: &Place, out: &str, more: &[&str]) {
    succeeds(&args(place, out, more));
}

fn file(place: &Place, out: &str, name: &str) -> Vec<u8> {
    fs::read(Path::new(&place.path(out)).join(name)).unwrap()
}

/// What a run ends in.
fn results(place: &Place, out: &str) -> [Vec<u8>; 3] {
    [
        "checkpoints/last.safetensors",
        "checkpoints/best.safetensors",
        "confusion.csv",
    ]
    .map(|name| file(place, out, name))
}

fn run<S: AsRef<str>>(args: &[S]) -> Output {
    let args: Vec<&str> = args.iter().map(AsRef::as_ref).collect();
    pcae(BINARY, &args)
}

fn succeeds<S: AsRef<str>>(args: &[S]) -> Output {
    let output = run(args);
    assert!(output.status.success(), "{}", stderr(&output));
    output
}

fn json<S: AsRef<str>>(args: &[S]) -> Value {
    serde_json::from_str(&stdout(&succeeds(args))).unwrap()
}

/// The end is the same whatever killed the run on the way, and whatever computes.
#[test]
fn killed_at_random_moments() {
    let place = Place::new(200, 60);
    let settings = [ALL, &["--steps", "150", "--set", "save_every=7"]].concat();
    finetune(
        &place,
        "whole",
        &[&settings[..], &["--threads", "1"]].concat(),
    );
    let killed = place.path("killed");
    let mut moments = Stream::new(std::process::id().into(), 0, 0, Purpose::Split);
    let began = Instant::now();
    let mut kills = 0;
    while kills < 5 {
        assert!(began.elapsed() < Duration::from_secs(120), "{kills} kills");
        let args = if Path::new(&killed).join("config.toml").exists() {
            [
                "finetune",
                "--resume",
                &killed,
                "--threads",
                "2",
                "--workers",
                "2",
            ]
            .map(str::to_owned)
            .to_vec()
        } else {
            args(&place, "killed", &settings)
        };
        let mut child = Command::new(BINARY)
            .args(args)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        std::thread::sleep(Duration::from_millis(20 + u64::from(moments.below(200))));
        let ended = child.try_wait().unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
        match ended {
            Some(status) => assert!(status.success(), "a resumed run failed: {status}"),
            None => kills += 1,
        }
        if ended.is_some() {
            break;
        }
    }
    succeeds(&["finetune", "--resume", &killed]);
    for (whole, killed) in results(&place, "whole")
        .iter()
        .zip(results(&place, "killed"))
    {
        assert!(*whole == killed, "a final file differs");
    }
}

/// A run that is killed between two evaluations knows the best one so far when it goes on: a worse one takes nothing's place.
#[test]
fn killed_between_evaluations() {
    let place = Place::new(200, 60);
    let mut attempts = (0..10).map(|attempt| format!("run{attempt}"));
    // An evaluation and a checkpoint every 60 steps of 360; killed a little after the first, unless it ended before that was seen.
    let settings = ["--epochs", "30", "--set", "eval_every=5"];
    let (out, metrics) = attempts
        .find_map(|name| {
            let metrics = Path::new(&place.path(&name)).join("metrics.jsonl");
            let mut child = Command::new(BINARY)
                .args(args(&place, &name, &settings))
                .args(["--set", "save_every=100000"])
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .spawn()
                .unwrap();
            let mut ended = false;
            while !ended && fs::read_to_string(&metrics).map_or(0, |text| text.lines().count()) < 65
            {
                std::thread::sleep(Duration::from_millis(1));
                ended = child.try_wait().unwrap().is_some();
            }
            child.kill().unwrap();
            let killed = !child.wait().unwrap().success();
            killed.then(|| (place.path(&name), metrics))
        })
        .unwrap();
    // As if nothing could have been better: then nothing may replace it.
    let lines = fs::read_to_string(&metrics).unwrap();
    let mut best_step = None;
    let better = lines.lines().filter_map(|line| {
        let mut record: Value = serde_json::from_str(line).ok()?;
        if record["top1"].is_number() && best_step.is_none() {
            record["top1"] = 1.0.into();
            best_step = record["step"].as_u64();
        }
        Some(record.to_string() + "\n")
    });
    let better: String = better.collect();
    fs::write(&metrics, better).unwrap();
    let best = Path::new(&out).join("checkpoints/best.safetensors");
    fs::write(&best, "the best").unwrap();
    let summary = json(&["finetune", "--resume", &out, "--json"]);
    assert_eq!(fs::read(&best).unwrap(), b"the best");
    assert_eq!(
        (&summary["best_top1"], summary["best_step"].as_u64()),
        (&1.0.into(), best_step)
    );
    assert!(summary["top1"].as_f64().unwrap() < 1.0);
}

/// Each setting has a part in the numbers, and none without being turned on.
#[test]
fn every_setting_does_something() {
    let place = Place::new(200, 60);
    let plain = [
        "--steps",
        "6",
        "--lr",
        "1e-3",
        "--set",
        "drop_path=0",
        "--set",
        "mixup=0",
        "--set",
        "cutmix=0",
        "--set",
        "erase_prob=0",
        "--set",
        "rand_augment=0",
        "--set",
        "smoothing=0",
        "--set",
        "layer_decay=1",
    ];
    let weights = |out: &str, more: &[&str]| {
        finetune(&place, out, &[&plain[..], more].concat());
        let path = Path::new(&place.path(out)).join("checkpoints/last.safetensors");
        let reader = Reader::open(&path).unwrap();
        reader.tensor_f32("head.weight", &[10, 16]).unwrap()
    };
    let base = weights("base", &[]);
    let cases: [&[&str]; 15] = [
        &["--set", "drop_path=0.5"],
        &["--set", "mixup=0.8"],
        &["--set", "cutmix=1"],
        &["--set", "erase_prob=1"],
        &["--set", "rand_augment=9"],
        &["--set", "smoothing=0.1"],
        &["--set", "layer_decay=0.5"],
        &["--set", "pool=token"],
        &["--set", "weight_decay=0.5"],
        &["--set", "crop_scale=[0.2,0.3]"],
        &["--set", "clip_grad=0.1"],
        &["--drop-ratio", "0.4"],
        &["--drop-ratio", "0.4", "--drop-layers", "0,1"],
        &["--drop-ratio", "0.4", "--set", "criterion=random"],
        &["--seed", "1"],
    ];
    let mut seen = vec![base.clone()];
    for (i, case) in cases.iter().enumerate() {
        let found = weights(&format!("case{i}"), case);
        assert!(!seen.contains(&found), "{case:?} changes nothing");
        seen.push(found);
    }
    // What only looks on changes nothing that is trained.
    assert!(base == weights("average", &["--set", "ema=0.9"]));
    assert!(base == weights("often", &["--set", "save_every=2"]));
}

/// One checkpoint, any budget: without flags it gives the run's own figure, and each ratio its own tokens and costs.
#[test]
fn evaluated_at_any_drop_ratio() {
    let place = Place::new(200, 60);
    let settings = [
        "--epochs",
        "3",
        "--drop-ratio",
        "0.2",
        "--set",
        "ema=0.5",
        "--lr",
        "3e-3",
    ];
    let out = place.path("run");
    let summary = json(&[&args(&place, "run", &settings)[..], &["--json".to_owned()]].concat());
    let own = json(&["evaluate", &out, "--json"]);
    assert_eq!(own["results"][0]["top1"], summary["best_top1"]);
    assert_eq!(own["results"][0]["drop_ratio"], 0.2);
    assert_eq!(own["classes"][9], "9");
    assert!(own["data"].as_str().unwrap().contains("60 pictures"));
    // The last of the run's figures, of the trained weights and of their average.
    let last = format!("{out}/checkpoints/last.safetensors");
    let trained = json(&["evaluate", &last, "--json"]);
    assert_eq!(trained["results"][0]["top1"], summary["top1"]);
    let average = json(&["evaluate", &last, "--json", "--which", "teacher"]);
    assert_eq!(average["results"][0]["top1"], summary["ema_top1"]);

    let report = json(&[
        "evaluate",
        &out,
        "--drop-ratio",
        "0,0.2,0.4",
        "--criterion",
        "mean-similarity,random",
        "--json",
    ]);
    let rows = report["results"].as_array().unwrap();
    assert_eq!(rows.len(), 6);
    let tokens = |row: &Value| row["tokens"].as_array().unwrap().len();
    assert_eq!(rows[0]["tokens"], serde_json::json!([49]));
    // ceil(0.8 n) after blocks 0, 1 and 2 of 3.
    assert_eq!(rows[1]["tokens"], serde_json::json!([49, 40, 32, 26]));
    assert_eq!(tokens(&rows[4]), 4);
    for pair in rows[..3].windows(2) {
        let macs = |row: &Value| row["multiply_adds"].as_u64().unwrap();
        assert!(macs(&pair[1]) < macs(&pair[0]));
    }
    assert_eq!(rows[1]["loss"], own["results"][0]["loss"]);
    // Without dropping it does not matter which; with it, it does.
    assert_eq!(rows[0]["loss"], rows[3]["loss"]);
    assert_ne!(rows[2]["loss"], rows[5]["loss"]);
    let other = json(&[
        "evaluate",
        &out,
        "--drop-ratio",
        "0.4",
        "--criterion",
        "random",
        "--seed",
        "7",
        "--json",
    ]);
    assert_ne!(other["results"][0]["loss"], rows[5]["loss"]);

    // The size of a batch is no part of the figures.
    let confusion = place.path("confusion.csv");
    let small = succeeds(&[
        "evaluate",
        &out,
        "--batch-size",
        "7",
        "--confusion",
        &confusion,
    ]);
    let top1 = 100.0 * own["results"][0]["top1"].as_f64().unwrap();
    assert!(
        stdout(&small).contains(&format!("{top1:.2}")),
        "{}",
        stdout(&small)
    );
    assert_eq!(
        fs::read(confusion).unwrap(),
        file(&place, "run", "confusion.csv")
    );
}

/// The encoder comes from pre-training, its student or its teacher, and a classifier is a start too.
#[test]
fn weights_of_other_runs() {
    let place = Place::new(200, 60);
    let (data, pretrained) = (place.path("data"), place.path("pretrained"));
    let mut args = vec![
        "pretrain",
        "--data",
        &data,
        "--out",
        &pretrained,
        "--steps",
        "5",
    ];
    args.extend_from_slice(TINY);
    args.extend([
        "--set",
        "decoder_embed_dim=8",
        "--set",
        "decoder_num_heads=1",
    ]);
    args.extend(["--set", "momentum=0.5"]);
    succeeds(&args);
    let last = Path::new(&pretrained).join("checkpoints/last.safetensors");
    let reader = Reader::open(&last).unwrap();
    // One step of no size leaves what was loaded.
    let start = |out: &str, weights: &str, more: &[&str]| {
        let out = place.path(out);
        let mut args = vec![
            "finetune",
            "--weights",
            weights,
            "--data",
            &data,
            "--out",
            &out,
        ];
        args.extend(["--steps", "1", "--lr", "1e-30", "--set", "warmup_steps=0"]);
        args.extend(["--batch-size", "16"]);
        args.extend_from_slice(more);
        let output = succeeds(&args);
        let path = Path::new(&out).join("checkpoints/last.safetensors");
        (Reader::open(&path).unwrap(), stderr(&output))
    };
    let name = "blocks.1.attn.proj.weight";
    let values = |reader: &Reader, name: &str| reader.tensor_f32(name, &[16, 16]).unwrap();
    let (student, text) = start("a", &pretrained, &[]);
    assert!(
        text.contains(
            "40 of 44 tensors loaded; new: fc_norm.weight, fc_norm.bias, head.weight, head.bias"
        ),
        "{text}"
    );
    assert_eq!(values(&student, name), values(&reader, name));
    let (teacher, _) = start("b", &pretrained, &["--which", "teacher"]);
    assert_eq!(
        values(&teacher, name),
        values(&reader, &format!("teacher.{name}"))
    );
    assert_ne!(values(&teacher, name), values(&student, name));
    // The class token's norm is the encoder's.
    let (_, text) = start("c", &pretrained, &["--set", "pool=token"]);
    assert!(
        text.contains("42 of 44 tensors loaded; new: head.weight, head.bias"),
        "{text}"
    );
    let (again, text) = start("d", &place.path("a"), &[]);
    assert!(text.contains("44 of 44 tensors loaded"), "{text}");
    let head = |reader: &Reader| reader.tensor_f32("head.weight", &[10, 16]).unwrap();
    assert_eq!(head(&again), head(&student));
}

/// Class folders under `root`: `(class, pictures)`.
fn class_folders(root: &str, classes: &[(&str, u32)]) {
    for (class, count) in classes {
        let folder = Path::new(root).join(class);
        fs::create_dir_all(&folder).unwrap();
        for i in 0..*count {
            let picture = png(28, 28, |x, y| {
                [(x * 9 + i) as u8, (y * 9) as u8, class.len() as u8]
            });
            fs::write(folder.join(format!("{i}.png")), picture).unwrap();
        }
    }
}

/// One line that names the thing, what was expected, what was found and what to do; nothing is left behind.
#[test]
fn what_cannot_be_trained_on_or_evaluated() {
    let place = Place::new(200, 60);
    finetune(&place, "run", &["--steps", "2"]);
    let (out, run_dir, data) = (place.path("out"), place.path("run"), place.path("data"));
    let one = place.path("one");
    class_folders(&one, &[("cats", 30)]);
    let missing = place.path("missing");
    class_folders(&format!("{missing}/train"), &[("cats", 20), ("dogs", 20)]);
    class_folders(&format!("{missing}/val"), &[("cats", 3), ("cows", 3)]);
    let empty = place.path("empty");
    fs::create_dir(&empty).unwrap();
    let flat = place.path("flat");
    class_folders(&place.path(""), &[("flat", 40)]);
    let many = place.path("many");
    let names: Vec<String> = (0..12).map(|i| format!("class{i}")).collect();
    let classes: Vec<(&str, u32)> = names.iter().map(|name| (name.as_str(), 2)).collect();
    class_folders(&many, &classes);
    let checks = |code: i32, args: &[&str], expected: &[&str]| {
        let output = run(args);
        let text = stderr(&output);
        assert_eq!(output.status.code(), Some(code), "{args:?}: {text}");
        for expected in expected {
            assert!(text.contains(expected), "{args:?}: {expected:?} in {text}");
        }
        assert_eq!(text.trim_end().lines().count(), 1, "{args:?}: {text}");
        assert!(!Path::new(&out).exists(), "{args:?} left a run behind");
    };
    let finetune = |code: i32, more: &[&str], expected: &[&str]| {
        let mut args = vec![
            "finetune",
            "--out",
            &out,
            "--batch-size",
            "4",
            "--steps",
            "3",
        ];
        args.extend_from_slice(more);
        checks(code, &args, expected);
    };
    let random = ["--weights", "none", "--data"];
    finetune(2, &[], &["--weights", "none", "pcae pretrain"]);
    finetune(
        1,
        &[&random[..], &[&one]].concat(),
        &["at least 2 classes", "1 (cats)", "another class"],
    );
    finetune(
        1,
        &[&random[..], &[&missing]].concat(),
        &["3 classes", "none of class \"cows\"", "remove the class"],
    );
    finetune(
        1,
        &[&random[..], &[&empty]].concat(),
        &["expected pictures"],
    );
    finetune(
        1,
        &[&random[..], &[&flat]].concat(),
        &["a label for each picture", "folder for each class"],
    );
    finetune(
        1,
        &["--weights", &empty],
        &["run directory", "without checkpoints"],
    );
    finetune(1, &["--weights", "nowhere"], &["nowhere", "check the path"]);
    finetune(
        1,
        &[
            "--weights",
            &run_dir,
            "--data",
            &data,
            "--model",
            "vit-micro",
        ],
        &["cls_token", "[1, 1, 96]", "[1, 1, 16]", "--model"],
    );
    finetune(
        1,
        &["--weights", &run_dir, "--data", &data, "--set", "depth=5"],
        &["blocks.3", "another architecture"],
    );
    finetune(
        1,
        &["--weights", &run_dir, "--data", &data, "--which", "teacher"],
        &["moving average", "none"],
    );
    let wrong: [(&[&str], &[&str]); 16] = [
        (&["--drop-ratio", "1"], &["--drop-ratio", "less than 1"]),
        (
            &["--drop-ratio", "-0.1"],
            &["--drop-ratio", "at least 0", "-0.1"],
        ),
        (&["--drop-layers", "0,9"], &["--drop-layers", "0 to 3", "9"]),
        (&["--set", "layer_decay=0"], &["layer_decay", "more than 0"]),
        (&["--set", "drop_path=1"], &["drop_path", "less than 1"]),
        (&["--set", "smoothing=1"], &["smoothing", "less than 1"]),
        (&["--set", "ema=1"], &["ema", "less than 1"]),
        (&["--set", "mixup=-1"], &["mixup", "0 (none)"]),
        (&["--set", "cutmix=nan"], &["cutmix", "0 (none)"]),
        (
            &["--set", "rand_augment=11"],
            &["rand_augment", "0 (none) to 10", "11"],
        ),
        (&["--set", "erase_prob=2"], &["erase_prob", "0 to 1", "2"]),
        (&["--set", "pool=max"], &["pool", "mean or token", "max"]),
        (
            &["--set", "mask_ratio=0.5"],
            &["mask_ratio", "unknown field"],
        ),
        (&["--which", "both"], &["--which", "student", "both"]),
        (&["--model", "vit-x"], &["--model", "vit-micro", "vit-x"]),
        (&["--batch-size", "0"], &["--batch-size", "1 to"]),
    ];
    for (more, expected) in wrong {
        finetune(2, &[&["--weights", "none"], more].concat(), expected);
    }
    checks(
        2,
        &["finetune", "--resume", &run_dir, "--lr", "1"],
        &["--resume", "keeps its settings"],
    );
    checks(1, &["finetune", "--resume", &empty], &["holds no run"]);

    checks(1, &["evaluate", &empty], &["without checkpoints"]);
    checks(
        1,
        &["evaluate", &run_dir, "--data", &many],
        &["expected 10 classes", "12 (class0, "],
    );
    checks(
        1,
        &["evaluate", &run_dir, "--data", &flat],
        &["a label for each picture"],
    );
    checks(
        2,
        &["evaluate", &run_dir, "--drop-ratio", "0,1"],
        &["--drop-ratio", "less than 1"],
    );
    checks(
        2,
        &["evaluate", &run_dir, "--criterion", "norm"],
        &["--criterion", "random", "norm"],
    );
    checks(
        2,
        &["evaluate", &run_dir, "--drop-layers", "5"],
        &["--drop-layers", "0 to 2", "5"],
    );
    checks(
        2,
        &["evaluate", &run_dir, "--batch-size", "0"],
        &["--batch-size", "at least 1"],
    );
}

/// Classes are matched by their names; a folder with fewer of them will do, one with another will not.
#[test]
fn classes_are_known_by_name() {
    let place = Place::new(200, 60);
    let (data, out) = (place.path("folders"), place.path("named"));
    class_folders(&data, &[("a", 40), ("bb", 40), ("cccc", 40)]);
    let mut args = from_scratch(&data, &out).to_vec();
    args.extend_from_slice(TINY);
    args.extend(["--set", "img_size=[28,28]", "--steps", "8", "--lr", "3e-3"]);
    succeeds(&args);
    let (some, other) = (place.path("some"), place.path("other"));
    class_folders(&some, &[("bb", 20), ("cccc", 20)]);
    class_folders(&other, &[("bb", 20), ("dd", 20)]);
    let confusion = place.path("confusion.csv");
    succeeds(&["evaluate", &out, "--data", &some, "--confusion", &confusion]);
    let text = fs::read_to_string(&confusion).unwrap();
    let counts: Vec<u32> = text
        .lines()
        .skip(1)
        .map(|line| {
            line.split(',')
                .skip(1)
                .map(|n| n.parse::<u32>().unwrap())
                .sum()
        })
        .collect();
    assert_eq!(counts, [0, 2, 2], "{text}");
    let output = run(&["evaluate", &out, "--data", &other]);
    let text = stderr(&output);
    assert_eq!(output.status.code(), Some(1));
    assert!(
        text.contains("a, bb, cccc") && text.contains("\"dd\""),
        "{text}"
    );
}

/// Puts `new` for `old` into the header of a safetensors file.
fn edit_header(path: &Path, old: &str, new: &str) {
    let bytes = fs::read(path).unwrap();
    let len = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let header = std::str::from_utf8(&bytes[8..8 + len]).unwrap();
    assert!(header.contains(old), "{old} in {header}");
    let mut header = header.trim_end().replace(old, new);
    // The tensors stay aligned.
    header.push_str(&" ".repeat(header.len().next_multiple_of(8) - header.len()));
    let mut edited = (header.len() as u64).to_le_bytes().to_vec();
    edited.extend_from_slice(header.as_bytes());
    edited.extend_from_slice(&bytes[8 + len..]);
    fs::write(path, edited).unwrap();
}

/// A run from before `which` was called so is read, and goes on; one with a key that nobody knows says that another version
/// wrote it, wherever it is read.
#[test]
fn runs_of_other_versions() {
    let place = Place::new(200, 60);
    finetune(&place, "run", &["--steps", "4"]);
    let out = place.path("run");
    let rename = |old: &str, new: &str| {
        let config = Path::new(&out).join("config.toml");
        let text = fs::read_to_string(&config).unwrap();
        assert!(text.contains(&format!("\n{old} = ")), "{text}");
        let text = text.replace(&format!("\n{old} = "), &format!("\n{new} = "));
        fs::write(&config, text).unwrap();
        for name in ["best", "last"] {
            let path = Path::new(&out).join(format!("checkpoints/{name}.safetensors"));
            edit_header(&path, &format!(r#"\"{old}\":"#), &format!(r#"\"{new}\":"#));
        }
    };
    let own = json(&["evaluate", &out, "--json"]);
    rename("which", "weights_from");
    assert_eq!(
        json(&["evaluate", &out, "--json"])["results"][0]["loss"],
        own["results"][0]["loss"]
    );
    succeeds(&["finetune", "--resume", &out]);
    // Its settings are a start, over which flags go.
    let (config, again) = (format!("{out}/config.toml"), place.path("again"));
    let args = [
        "finetune", "--config", &config, "--which", "teacher", "--out", &again,
    ];
    succeeds(&args);
    let written = fs::read_to_string(Path::new(&again).join("config.toml")).unwrap();
    assert!(
        written.contains("which = \"teacher\"") && !written.contains("weights_from"),
        "{written}"
    );
    // What is made of it is of today.
    let half = place.path("half.safetensors");
    succeeds(&["export", &out, "--out", &half, "--dtype", "bf16"]);
    assert!(
        stdout(&succeeds(&[
            "evaluate",
            &half,
            "--data",
            &place.path("data")
        ]))
        .contains("top-1")
    );

    rename("weights_from", "weights_of");
    let embedded = place.path("features.npy");
    let commands: [&[&str]; 6] = [
        &["evaluate", &out],
        &["knn", &out],
        &["embed", &out, "--out", &embedded],
        &["visualize", &out, "--out", &place.path("sheet.png")],
        &["bench", &out, "--accuracy"],
        &["finetune", "--resume", &out],
    ];
    for args in commands {
        let output = run(args);
        let text = stderr(&output);
        assert_ne!(output.status.code(), Some(0), "{args:?}");
        for part in ["weights_of", "another version of pcae"] {
            assert!(text.contains(part), "{args:?}: {part:?} in {text}");
        }
    }
}
