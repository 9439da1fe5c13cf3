//! What commands read and what they write over: which checkpoint a run means, which pictures, which files are safe.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::path::Path;

use pcae_tests::{Place, Program, TINY, from_scratch, png, stderr, stdout};
use pcae_train::checkpoint::file::Reader;

const PCAE: Program = Program(env!("CARGO_BIN_EXE_pcae-under-test"));

fn pretrained(place: &Place) -> String {
    let (data, out) = (place.path("data"), place.path("pre"));
    let args = ["pretrain", "--data", &data, "--out", &out, "--steps", "2"];
    PCAE.succeeds(&[&args[..], &["--batch-size", "8"], TINY].concat());
    out
}

/// A run whose best is after step 4 and whose newest checkpoint is after step 6: at this rate no figure changes, and of
/// equals the first is the best.
fn finetuned(place: &Place) -> String {
    let (data, out) = (place.path("data"), place.path("ft"));
    let args = [
        "finetune",
        "--weights",
        "none",
        "--data",
        &data,
        "--out",
        &out,
        "--steps",
        "6",
    ];
    let more = ["--batch-size", "16", "--lr", "1e-7", "--set", "ema=0.5"];
    let sizes: Vec<&str> = ["embed_dim=16", "depth=3", "num_heads=2"]
        .into_iter()
        .flat_map(|size| ["--set", size])
        .collect();
    PCAE.succeeds(&[&args[..], &more, &sizes].concat());
    out
}

fn photos(folder: &str, count: u8) {
    fs::create_dir_all(folder).unwrap();
    for i in 0..count {
        let picture = png(28, 28, |x, y| [(x * 9) as u8 + i, (y * 9) as u8, 99]);
        fs::write(format!("{folder}/{i}.png"), picture).unwrap();
    }
}

/// Neither what a command reads nor what a run needs is written over, nor a file of another kind.
#[test]
fn inputs_survive() {
    let place = Place::new(64, 20);
    let (pre, ft, album) = (pretrained(&place), finetuned(&place), place.path("album"));
    photos(&album, 2);
    let picture = format!("{album}/0.png");
    let (last, best) = (
        format!("{pre}/checkpoints/last.safetensors"),
        format!("{ft}/checkpoints/best.safetensors"),
    );
    let copy = place.path("copy.safetensors");
    fs::copy(&best, &copy).unwrap();
    let own = format!("{ft}/confusion.csv");
    let list = place.path("features.npy.names.txt");
    fs::write(&list, format!("{picture}\n")).unwrap();
    let all = [&picture, &last, &best, &copy, &own, &list];
    let before = all.map(|path| fs::read(path).unwrap());
    let features = place.path("features.npy");
    let cases: [&[&str]; 17] = [
        &["visualize", &pre, "--count", "1", "--out", &last],
        &[
            "visualize",
            &pre,
            "--count",
            "1",
            "--out",
            &format!("{pre}/curves.png"),
        ],
        &["visualize", &pre, &picture, "--out", &picture],
        &["visualize", &pre, &album, "--out", &picture],
        &["visualize", &pre, "--data", &album, "--out", &picture],
        &["visualize", &pre, "--count", "1", "--out", &list],
        &["evaluate", &ft, "--confusion", &best],
        &["evaluate", &ft, "--confusion", &own],
        &["evaluate", &ft, "--confusion", &picture],
        &["onnx", &ft, "--out", &picture],
        &["onnx", &copy, "--out", &copy],
        &["convert", &ft, "--out", &picture],
        &["convert", &copy, "--out", &copy],
        // Also those of another run.
        &["export", &pre, "--out", &best],
        &["deploy", &ft, "--drop-ratio", "0", "--out", &last],
        &["bench", &ft, "--json", &best],
        &["embed", &pre, "--data", &list, "--out", &features],
    ];
    for args in cases {
        PCAE.fails(2, args, &["expected", "found"]);
        for (path, before) in all.iter().zip(&before) {
            assert!(
                fs::read(path).unwrap() == *before,
                "{args:?} changed {path}"
            );
        }
    }
    // What is nobody's is written, folders and all, and written again.
    let sheet = place.path("new/sheet.png");
    for _ in 0..2 {
        PCAE.succeeds(&["visualize", &pre, "--count", "1", "--out", &sheet]);
    }
    PCAE.succeeds(&[
        "evaluate",
        &ft,
        "--confusion",
        &place.path("new/confusion.csv"),
    ]);
}

/// Every command takes the same checkpoint of a run and, unless told otherwise, the run's own pictures.
#[test]
fn a_run_means_its_best_and_its_data() {
    let place = Place::new(64, 20);
    let (ft, data) = (finetuned(&place), place.path("data"));
    let (best, last) = (
        format!("{ft}/checkpoints/best.safetensors"),
        format!("{ft}/checkpoints/last.safetensors"),
    );
    let steps = [&best, &last].map(|path| {
        let reader = Reader::open(Path::new(path)).unwrap();
        reader.metadata()["step"].to_owned()
    });
    assert_eq!(steps, ["4", "6"]);
    for (command, name) in [
        ("export", "a.safetensors"),
        ("convert", "b.safetensors"),
        ("onnx", "c.onnx"),
        ("embed", "d.npy"),
    ] {
        let of = |source: &str| {
            let out = place.path(name);
            PCAE.succeeds(&[command, source, "--out", &out]);
            let bytes = fs::read(&out).unwrap();
            fs::remove_file(&out).unwrap();
            bytes
        };
        let written = of(&ft);
        assert!(written == of(&best), "{command}");
        assert!(written != of(&last), "{command}");
    }
    for command in ["knn", "probe"] {
        for source in [&ft, &last] {
            let output = PCAE.succeeds(&[command, source]);
            assert!(
                stderr(&output).contains(&format!("data      {data}")),
                "{}",
                stderr(&output)
            );
        }
    }
    let sheet = place.path("sheet.png");
    let output = PCAE.succeeds(&["visualize", &ft, "--count", "50", "--out", &sheet]);
    assert!(
        stdout(&output).contains("20 pictures"),
        "{}",
        stdout(&output)
    );
    let text = stdout(&PCAE.succeeds(&["inspect", &ft]));
    for part in ["best.safetensors", "last.safetensors", "step: 4", "step: 6"] {
        assert!(text.contains(part), "{part} in {text}");
    }
    // The average is with the newest, or is the best itself.
    PCAE.fails(
        1,
        &["knn", &ft, "--which", "teacher"],
        &["moving average", "last.safetensors"],
    );
    let average = PCAE.succeeds(&["knn", &last, "--which", "teacher"]);
    assert!(
        stderr(&average).contains("the teacher of step 6"),
        "{}",
        stderr(&average)
    );
    let mut bytes = fs::read(&best).unwrap();
    // Of the same length, so that the header need not be moved.
    let at = bytes
        .windows(9)
        .position(|at| at == b"\"student\"")
        .unwrap();
    bytes[at..at + 9].copy_from_slice(b"\"average\"");
    fs::write(&best, bytes).unwrap();
    for which in ["student", "teacher"] {
        let average = PCAE.succeeds(&["knn", &ft, "--which", which]);
        assert!(
            stderr(&average).contains("the average of step 4"),
            "{}",
            stderr(&average)
        );
    }
}

/// What `convert` makes of a classifier is one for `evaluate`, at the tokens that it was trained with.
#[test]
fn a_converted_classifier_is_one() {
    let place = Place::new(64, 20);
    let (ft, out) = (finetuned(&place), place.path("converted.safetensors"));
    PCAE.succeeds(&["convert", &ft, "--out", &out]);
    let data = place.path("data");
    let (own, converted) = (
        PCAE.json(&["evaluate", &ft]),
        PCAE.json(&["evaluate", &out, "--data", &data]),
    );
    for key in ["classes", "unreadable"] {
        assert_eq!(own[key], converted[key]);
    }
    for key in ["top1", "loss", "drop_ratio", "tokens"] {
        assert_eq!(
            own["results"][0][key], converted["results"][0][key],
            "{key}"
        );
    }
    assert!(!String::from_utf8_lossy(&fs::read(&out).unwrap()).contains(&data));
}

/// A picture that cannot be read is left out of every figure, and counted.
#[test]
fn unreadable_pictures_are_no_others() {
    let place = Place::new(64, 20);
    let (data, out) = (place.path("folders"), place.path("run"));
    for (part, count) in [("train", 12), ("val", 4)] {
        for class in ["a", "b"] {
            photos(&format!("{data}/{part}/{class}"), count);
        }
    }
    fs::write(format!("{data}/val/a/1.png"), "no picture").unwrap();
    fs::write(format!("{data}/train/b/2.png"), "no picture").unwrap();
    // Fewer pictures than the usual batch.
    let args = from_scratch(&data, &out);
    let sizes = ["--set", "img_size=[28,28]", "--epochs", "1"];
    let summary = PCAE.json(&[&args[..], &sizes, &TINY[..6]].concat());
    assert_eq!(summary["unreadable"], 1);
    assert_eq!(summary["unreadable_train"], 1);
    let pretrained = place.path("pretrained");
    let batch = ["--batch-size", "24"];
    let args = ["pretrain", "--data", &data, "--out", &pretrained];
    let said = stdout(&PCAE.succeeds(&[&args[..], &batch, &sizes, TINY].concat()));
    assert!(
        said.contains("; 1 training picture could not be read\n"),
        "{said}"
    );
    let config = fs::read_to_string(format!("{out}/config.toml")).unwrap();
    assert!(config.contains("batch_size = 24"), "{config}");
    let confusion = place.path("confusion.csv");
    let report = PCAE.json(&[
        "evaluate",
        &out,
        "--batch-size",
        "1",
        "--confusion",
        &confusion,
    ]);
    assert_eq!(report["unreadable"], 1);
    let counts = |path: &str| -> Vec<u32> {
        let text = fs::read_to_string(path).unwrap();
        let rows = text.lines().skip(1).map(|line| {
            let counts = line.split(',').skip(1);
            counts.map(|n| n.parse::<u32>().unwrap()).sum()
        });
        rows.collect()
    };
    assert_eq!(counts(&confusion), [3, 4]);
    assert_eq!(counts(&format!("{out}/confusion.csv")), [3, 4]);
    let output = PCAE.succeeds(&["evaluate", &out]);
    assert!(
        stdout(&output).contains("1 picture left out"),
        "{}",
        stdout(&output)
    );
    // Once, though some pictures are classified twice.
    let warnings = stderr(&output).matches("(left out)").count();
    assert_eq!(warnings, 1, "{}", stderr(&output));
    let sheet = place.path("sheet.png");
    let output = PCAE.succeeds(&["visualize", &out, "--count", "8", "--out", &sheet]);
    assert!(
        stdout(&output).contains("7 pictures"),
        "{}",
        stdout(&output)
    );
    for line in ["budget    ", "data      7 pictures of held out of "] {
        assert!(stderr(&output).contains(line), "{}", stderr(&output));
    }
    // A class that is not there any more has no figure.
    fs::remove_dir_all(format!("{data}/val/b")).unwrap();
    let output = PCAE.succeeds(&["evaluate", &out]);
    assert!(
        stdout(&output).contains("no pictures of: b\n"),
        "{}",
        stdout(&output)
    );
}

/// A probe of very few pictures has figures, and says what it could not choose; classes and budget are named.
#[test]
fn few_pictures_are_probed() {
    let place = Place::new(64, 20);
    let (pre, data) = (pretrained(&place), place.path("few"));
    for class in ["a", "b"] {
        photos(&format!("{data}/train/{class}"), 1);
    }
    photos(&format!("{data}/val/a"), 1);
    let given = [&pre, "--data", &data, "--drop-ratio", "0.5"];
    let probe = |solver: &str| {
        let output = PCAE.succeeds(&[&["probe"], &given[..], &["--solver", solver]].concat());
        for line in ["budget    49 -> 25 ->", "no pictures of: b\n"] {
            assert!(stderr(&output).contains(line), "{}", stderr(&output));
        }
        let text = stdout(&output);
        assert!(!text.contains("NaN"), "{text}");
        text
    };
    let none = [("logistic", "l2 1e-4"), ("lars", "learning rate 0.0078125")];
    for (solver, value) in none {
        let text = probe(solver);
        let said = format!("too few pictures to choose by: {value}, the middle one");
        assert!(text.contains(&said), "{text}");
    }
    // One of two is held back.
    for class in ["a", "b"] {
        photos(&format!("{data}/train/{class}"), 2);
    }
    for (solver, _) in none {
        let text = probe(solver);
        assert!(text.contains("of the held-back training"), "{text}");
        assert!(!text.contains("too few"), "{text}");
    }
    let output = PCAE.succeeds(&[&["knn"], &given[..]].concat());
    for line in ["budget    49 -> 25 ->", "no pictures of: b\n"] {
        assert!(stderr(&output).contains(line), "{}", stderr(&output));
    }
}

/// A run that fails at its first pictures leaves nothing in the way of the next.
#[test]
fn a_run_without_a_step_leaves_nothing() {
    let place = Place::new(64, 20);
    let (data, out) = (place.path("folders"), place.path("run"));
    for class in ["a", "b"] {
        let folder = format!("{data}/{class}");
        photos(&folder, 10);
        for i in 0..10 {
            fs::write(format!("{folder}/{i}.png"), "no picture").unwrap();
        }
    }
    let args = from_scratch(&data, &out);
    let known = ["--set", "mean=[0,0,0]", "--set", "std=[1,1,1]"];
    PCAE.fails(1, &[&args[..], &known].concat(), &["in a row"]);
    assert!(!Path::new(&out).exists());
}

/// Folders as the hub has them are inspected too.
#[test]
fn inspect_reads_what_others_read() {
    let place = Place::new(64, 20);
    let (ft, hub) = (finetuned(&place), place.path("hub"));
    fs::create_dir(&hub).unwrap();
    let model = format!("{hub}/model.safetensors");
    fs::copy(format!("{ft}/checkpoints/best.safetensors"), &model).unwrap();
    let text = stdout(&PCAE.succeeds(&["inspect", &hub]));
    assert!(text.contains("encoder with pcae names"), "{text}");
}
