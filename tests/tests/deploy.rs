//! From a trained network to one with a token budget of its own, as a user types it: what is chosen, what is written, and who
//! goes by it.

use std::fs;
use std::path::Path;
use std::process::Command;

use pcae_tests::{Place, Program, TINY, stderr, stdout};
use pcae_train::checkpoint::Which;
use pcae_train::checkpoint::exchange::Hints;
use pcae_train::checkpoint::file::{Dtype, Reader};
use pcae_train::trained::Trained;
use serde_json::{Value, json};

const PCAE: Program = Program(env!("CARGO_BIN_EXE_pcae-under-test"));

/// A classifier of three blocks, trained with a fifth of the tokens dropped after each.
fn classifier(place: &Place) -> String {
    let (data, out) = (place.path("data"), place.path("classifier"));
    let mut args = vec!["finetune", "--weights", "none", "--data", &data];
    args.extend(["--out", &out, "--drop-ratio", "0.2", "--epochs", "2"]);
    args.extend(["--batch-size", "16", "--lr", "3e-3"]);
    args.extend_from_slice(&TINY[..6]);
    PCAE.succeeds(&args);
    out
}

fn encoder(place: &Place) -> String {
    let (data, out) = (place.path("data"), place.path("encoder"));
    let mut args = vec!["pretrain", "--data", &data, "--out", &out, "--steps", "3"];
    args.extend(["--batch-size", "16"]);
    args.extend_from_slice(TINY);
    PCAE.succeeds(&args);
    out
}

/// Exits so, with one line that says each of `expected`.
fn fails(code: i32, args: &[&str], expected: &[&str]) {
    let text = PCAE.fails(code, args, expected);
    assert_eq!(text.trim_end().lines().count(), 1, "{args:?}: {text}");
}

/// ceil(0.7 n) after each of three blocks.
const KEPT: [usize; 4] = [49, 35, 25, 18];

#[test]
fn a_classifier_and_all_that_go_by_its_budget() {
    let place = Place::new(200, 60);
    let (classifier, data) = (classifier(&place), place.path("data"));
    let (out, half) = (
        place.path("out.safetensors"),
        place.path("half.safetensors"),
    );
    let fast = ["--repeats", "2", "--threads", "1"];
    let deploy = ["deploy", &classifier, "--drop-ratio", "0.3", "--out", &out];
    let report = PCAE.json(&[&deploy[..], &fast].concat());
    let chosen = &report["deployment"];
    assert_eq!(chosen["drop_ratio"], 0.3);
    assert_eq!(chosen["drop_layers"], json!([0, 1, 2]));
    assert_eq!(chosen["tokens"], json!(KEPT));
    assert!(chosen["latency_ms"].as_f64().unwrap() > 0.0);
    assert_eq!(chosen["measured_on"]["batch_size"], 1);
    let backend = chosen["measured_on"]["backend"].as_str().unwrap();
    assert!(backend.contains("1 thread, f32"), "{backend}");
    // Beside all tokens.
    let round = report["rounds"][0].as_array().unwrap();
    assert_eq!((round.len(), &round[0]["drop_ratio"]), (2, &json!(0.0)));

    // What the file says is what was printed, and its values are those of the best checkpoint.
    let reader = Reader::open(Path::new(&out)).unwrap();
    let written: Value = serde_json::from_str(reader.metadata()["deployment"]).unwrap();
    assert_eq!(written, *chosen);
    assert!(!reader.metadata()["config"].contains("\"data\""));
    let evaluate = |more: &[&str]| PCAE.json(&[&["evaluate"], more].concat())["results"][0].clone();
    let own = evaluate(&[&out, "--data", &data]);
    let same = evaluate(&[&classifier, "--drop-ratio", "0.3"]);
    let trained = evaluate(&[&classifier]);
    assert_eq!(
        (&own["tokens"], &own["loss"]),
        (&json!(KEPT), &same["loss"])
    );
    assert_eq!(own["multiply_adds"], chosen["multiply_adds"]);
    assert_ne!(own["loss"], trained["loss"]);
    let asked = evaluate(&[&out, "--data", &data, "--drop-ratio", "0.2"]);
    assert_eq!(asked["loss"], trained["loss"]);

    // In half the space.
    let deploy = ["deploy", &classifier, "--drop-ratio", "0.3", "--out", &half];
    let text = stdout(&PCAE.succeeds(&[&deploy[..], &fast, &["--dtype", "bf16"]].concat()));
    assert!(text.contains("49 -> 35 -> 25 -> 18"), "{text}");
    let reader = Reader::open(Path::new(&half)).unwrap();
    assert_eq!(reader.dtype("head.weight"), Some(Dtype::BF16));
    assert_eq!(evaluate(&[&half, "--data", &data])["tokens"], json!(KEPT));

    // The others.
    let text = stdout(&PCAE.succeeds(&["inspect", &out]));
    let line = "deployed: drop ratio 0.3 after blocks [0, 1, 2], 49 -> 35 -> 25 -> 18 patches";
    assert!(text.contains(line), "{text}");
    let file = place.path("model.onnx");
    for (source, more, tokens) in [
        (&out, &[][..], "49 -> 35 -> 25 -> 18"),
        (&out, &["--drop-ratio", "0"], "all 49"),
        (&classifier, &[], "49 -> 40 -> 32 -> 26"),
    ] {
        let args = [&["onnx", source, "--out", &file], more].concat();
        let text = stdout(&PCAE.succeeds(&args));
        assert!(
            text.contains(&format!("budget    {tokens} patch tokens")),
            "{text}"
        );
    }
    let knn = PCAE.json(&["knn", &out, "--data", &data, "--k", "5"]);
    assert_eq!(knn["drop_ratio"], 0.3);
    assert_eq!(
        PCAE.json(&["knn", &classifier, "--data", &data])["drop_ratio"],
        0.0
    );
}

/// The paper's table: one trained model at many budgets, what `pcae evaluate` finds beside what `pcae bench` times.
#[test]
fn bench_tells_speed_and_accuracy_of_budgets() {
    let place = Place::new(200, 60);
    let (classifier, file) = (classifier(&place), place.path("bench.json"));
    let mut args = vec!["bench", &classifier, "--drop-ratio", "0,0.2,0.4"];
    args.extend(["--accuracy", "--repeats", "2", "--batch-size", "2"]);
    args.extend(["--threads", "1", "--json", &file]);
    let text = stdout(&PCAE.succeeds(&args));
    let report: Value = serde_json::from_slice(&fs::read(&file).unwrap()).unwrap();
    // Header and rows on one side, plans on the other: together in the order of their coming.
    let both = Command::new("sh")
        .args(["-c", r#""$0" "$@" 2>&1"#, PCAE.0])
        .args(&args)
        .output()
        .unwrap();
    let both = stdout(&both);
    let lines: Vec<&str> = both.lines().collect();
    let last_plan = lines
        .iter()
        .rposition(|line| line.contains("planned memory"));
    let header = lines.iter().position(|line| line.contains("M mult-adds"));
    assert!(last_plan < header, "{both}");
    let mut wrong = vec!["bench", &classifier, "--accuracy", "--data", "nowhere"];
    wrong.extend(["--repeats", "1"]);
    let output = PCAE.run(&wrong);
    assert!(
        stdout(&output).is_empty() && stderr(&output).contains("nowhere"),
        "{output:?}"
    );
    let evaluated = PCAE.json(&["evaluate", &classifier, "--drop-ratio", "0,0.2,0.4"]);
    let rows = report["results"].as_array().unwrap();
    assert_eq!(rows.len(), 3);
    for (row, evaluated) in rows.iter().zip(evaluated["results"].as_array().unwrap()) {
        for key in ["drop_ratio", "tokens", "multiply_adds", "top1", "top5"] {
            assert_eq!(row[key], evaluated[key], "{key}");
        }
        assert!(row["images_per_s"].as_f64().unwrap() > 0.0);
        let top1 = format!("{:.2}", 100.0 * row["top1"].as_f64().unwrap());
        assert!(text.contains(&top1), "{top1} in {text}");
    }
    for column in ["top-1 %", "M mult-adds", "images/s", "49 -> 30 -> 18 -> 11"] {
        assert!(text.contains(column), "{column} in {text}");
    }
    // At the budget of its training, and without pictures nothing is said of them.
    let args = ["bench", &classifier, "--repeats", "1", "--batch-size", "1"];
    PCAE.succeeds(&[&args[..], &["--json", &file]].concat());
    let report: Value = serde_json::from_slice(&fs::read(&file).unwrap()).unwrap();
    assert_eq!(report["results"][0]["drop_ratio"], 0.2);
    assert_eq!(report["results"][0]["top1"], Value::Null);

    fails(
        2,
        &["bench", &classifier, "--what", "step"],
        &["--what", "peak or infer"],
    );
    fails(
        2,
        &["bench", &classifier, "--what", "infer,finetune"],
        &["--what", "peak or infer", "found finetune"],
    );
    fails(
        2,
        &["bench", &classifier, "--model", "vit-b16"],
        &["--model"],
    );
    fails(2, &["bench", "--accuracy"], &["CHECKPOINT"]);
    let encoder = encoder(&place);
    fails(
        1,
        &["bench", &encoder, "--accuracy"],
        &["classifier", "fine-tune"],
    );
}

/// The largest budget within the multiply-adds, and not one more.
#[test]
fn by_multiply_adds() {
    let place = Place::new(200, 60);
    let (classifier, out) = (classifier(&place), place.path("out.safetensors"));
    let network = Trained::load(Path::new(&classifier), Which::Student, &Hints::default());
    let network = network.unwrap().network;
    let dense = network.at(0.0).unwrap().multiply_adds();
    for part in [1.0, 0.75, 0.5] {
        let limit = part * dense as f64 / 1e9;
        let mut args = vec!["deploy", &classifier, "--out", &out, "--repeats", "1"];
        let text = limit.to_string();
        args.extend(["--gflops", &text]);
        let report = PCAE.json(&args);
        let ratio = report["deployment"]["drop_ratio"].as_f64().unwrap();
        let macs = network.at(ratio).unwrap().multiply_adds();
        assert_eq!(report["deployment"]["multiply_adds"], macs);
        assert!(macs as f64 <= 1e9 * limit, "{ratio}: {macs}");
        if ratio > 0.0 {
            let before = network.at(ratio - 0.01).unwrap().multiply_adds();
            assert!(before as f64 > 1e9 * limit, "{ratio}: {before}");
        } else {
            assert_eq!(part, 1.0);
        }
        fs::remove_file(&out).unwrap();
    }
    let args = ["deploy", &classifier, "--out", &out, "--gflops", "1e-6"];
    fails(1, &args, &["--gflops", "at the least", "drop ratio 0.98"]);
    assert!(!Path::new(&out).exists());
}

/// Whatever the machine, all tokens are computed within a minute and a single one is not within a nanosecond.
#[test]
fn by_latency() {
    let place = Place::new(200, 60);
    let (classifier, out) = (classifier(&place), place.path("out.safetensors"));
    let deploy = ["deploy", &classifier, "--out", &out, "--repeats", "1"];
    let report = PCAE.json(&[&deploy[..], &["--latency", "60s", "--batch-size", "3"]].concat());
    assert_eq!(report["deployment"]["tokens"], json!([49]));
    assert_eq!(report["deployment"]["measured_on"]["batch_size"], 3);
    // All over the range, and the chosen one anew.
    let rounds = report["rounds"].as_array().unwrap();
    assert!(rounds[0].as_array().unwrap().len() >= 10);
    let chosen = &rounds[1][0];
    assert_eq!(chosen["latency_ms"], report["deployment"]["latency_ms"]);
    fs::remove_file(&out).unwrap();
    let args = [&deploy[..], &["--latency", "0.001us", "--json"]].concat();
    fails(
        1,
        &args,
        &["--latency", "at the fastest", "of 49 patches left"],
    );
    assert!(!Path::new(&out).exists());
}

#[test]
fn encoders() {
    let place = Place::new(200, 60);
    let (encoder, out) = (encoder(&place), place.path("out.safetensors"));
    let deploy = |source: &str, more: &[&str]| {
        let args = ["deploy", source, "--out", &out, "--repeats", "1"];
        let mut args = args.to_vec();
        args.extend(["--drop-ratio", "0.3", "--drop-layers", "0,1,2"]);
        args.extend_from_slice(more);
        PCAE.json(&args)["deployment"]["tokens"].clone()
    };
    assert_eq!(deploy(&encoder, &["--which", "teacher"]), json!(KEPT));
    fails(
        1,
        &["embed", &out, "--out", "x.npy"],
        &["the teacher alone", "--which teacher"],
    );
    let features = place.path("features.safetensors");
    let data = place.path("data");
    let args = ["embed", &out, "--which", "teacher", "--data", &data];
    let shape =
        PCAE.json(&[&args[..], &["--pool", "tokens", "--out", &features]].concat())["shape"]
            .clone();
    assert_eq!(shape, json!([260, 19, 16]));
    let json_file = place.path("bench.json");
    let args = ["bench", &out, "--which", "teacher", "--repeats", "1"];
    PCAE.succeeds(&[&args[..], &["--batch-size", "1", "--json", &json_file]].concat());
    let report: Value = serde_json::from_slice(&fs::read(&json_file).unwrap()).unwrap();
    assert_eq!(report["results"][0]["tokens"], json!(KEPT));

    // One with the names of timm, which tells nothing but its heads.
    let converted = place.path("converted.safetensors");
    PCAE.succeeds(&["convert", &encoder, "--out", &converted]);
    assert_eq!(deploy(&converted, &["--dtype", "f16"]), json!(KEPT));
    let text = stdout(&PCAE.succeeds(&["onnx", &out, "--out", &place.path("x.onnx")]));
    for part in [
        "budget    49 -> 35 -> 25 -> 18 patch tokens",
        ", the student of step 3:",
        "wrote",
        ": encoder",
    ] {
        assert!(text.contains(part), "{part} in {text}");
    }
}

/// What is read from a file says which weights and which budget they are, as far as the file keeps them; the folder of the pictures
/// it does not keep, and where they are wanted it is asked for.
#[test]
fn what_a_deployed_file_keeps() {
    let place = Place::new(200, 60);
    let (classifier, data) = (classifier(&place), place.path("data"));
    let [out, converted, exported, larger] = ["out", "converted", "exported", "larger"]
        .map(|name| place.path(&format!("{name}.safetensors")));
    let args = [
        "deploy",
        &classifier,
        "--out",
        &out,
        "--repeats",
        "1",
        "--drop-ratio",
        "0.3",
    ];
    PCAE.succeeds(&args);
    let text = stdout(&PCAE.succeeds(&["convert", &out, "--out", &converted]));
    for part in [
        "encoder   ",
        ", the student of step ",
        "budget    49 -> 35 -> 25 -> 18 patch tokens: drop ratio 0.3",
    ] {
        assert!(text.contains(part), "{part} in {text}");
    }
    PCAE.succeeds(&["export", &classifier, "--out", &exported]);
    let best = Path::new(&classifier).join("checkpoints/best.safetensors");
    let run = Reader::open(&best).unwrap();
    for (file, is_deployed) in [(&out, true), (&converted, true), (&exported, false)] {
        let reader = Reader::open(Path::new(file)).unwrap();
        let metadata = reader.metadata();
        for key in ["step", "data", "weights", "top1", "classes"] {
            assert_eq!(metadata.get(key), run.metadata().get(key), "{file}: {key}");
        }
        assert_eq!(metadata.contains_key("deployment"), is_deployed, "{file}");
        assert!(!metadata["config"].contains("\"data\""), "{file}");
    }
    // Chosen for one size of picture.
    let args = ["convert", &out, "--out", &larger, "--img-size", "56"];
    let text = stdout(&PCAE.succeeds(&args));
    assert!(text.contains("`pcae deploy` chose is left out"), "{text}");
    assert!(
        !Reader::open(Path::new(&larger))
            .unwrap()
            .metadata()
            .contains_key("deployment")
    );

    let features = place.path("features.npy");
    let sheet = place.path("sheet.png");
    let embed = ["embed", &out, "--out", &features];
    let visualize = ["visualize", &out, "--count", "1", "--out", &sheet];
    for args in [
        &embed[..],
        &visualize,
        &["evaluate", &converted],
        &["knn", &exported],
        &["probe", &exported],
    ] {
        fails(
            2,
            args,
            &[
                "--data",
                "does not name it",
                "out.safetensors",
                "200 pictures",
            ]
            .map(|part| match part {
                "out.safetensors" => args[1],
                part => part,
            }),
        );
        assert!(!Path::new(&sheet).exists());
    }
    let output = PCAE.succeeds(&[&embed[..], &["--data", &data]].concat());
    let text = stderr(&output);
    assert!(
        text.contains(
            "budget    49 -> 35 -> 25 -> 18 patch tokens: drop ratio 0.3 after blocks 0, 1, 2"
        ),
        "{text}"
    );
    PCAE.succeeds(&[&visualize[..], &["--data", &data]].concat());
    // Four columns: the input and three stages, as deployed.
    let of_budget = fs::read(&sheet).unwrap();
    let asked = [
        "--data",
        &data,
        "--drop-ratio",
        "0.3",
        "--drop-layers",
        "0,1,2",
    ];
    PCAE.succeeds(&[&visualize[..], &asked].concat());
    assert!(fs::read(&sheet).unwrap() == of_budget, "another budget");
}

#[test]
fn wrong_flags() {
    let place = Place::new(200, 60);
    let encoder = encoder(&place);
    let last = format!("{encoder}/checkpoints/last.safetensors");
    let out = place.path("out.safetensors");
    let cases: [(&[&str], &[&str]); 10] = [
        (&[], &["--latency", "--gflops", "--drop-ratio"]),
        (&["--latency", "1ms", "--drop-ratio", "0"], &["--latency"]),
        (&["--latency", "20"], &["--latency", "20ms", "\"20\""]),
        (&["--gflops", "0"], &["--gflops", "more than 0"]),
        (&["--drop-ratio", "1"], &["--drop-ratio", "less than 1"]),
        (&["--drop-ratio", "-1"], &["--drop-ratio", "at least 0"]),
        (
            &["--drop-ratio", "0", "--drop-layers", "3"],
            &["--drop-layers", "0 to 2"],
        ),
        (
            &["--drop-ratio", "0", "--batch-size", "0"],
            &["--batch-size", "1 to"],
        ),
        (
            &["--drop-ratio", "0", "--repeats", "0"],
            &["--repeats", "1 to"],
        ),
        (
            &["--drop-ratio", "0", "--out", &last],
            &["--out", "another file"],
        ),
    ];
    for (more, expected) in cases {
        fails(
            2,
            &[&["deploy", &encoder, "--out", &out], more].concat(),
            expected,
        );
    }
    assert!(!Path::new(&out).exists());
}
