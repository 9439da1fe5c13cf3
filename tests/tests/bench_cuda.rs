//! `pcae bench --backend cuda`: on the emulated driver, what it reports; without any, what it refuses. Times mean nothing there.

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use pcae_tests::{TINY, pcae, stderr, stdout};

const BINARY: &str = env!("CARGO_BIN_EXE_pcae-under-test");

/// Where the emulated libraries are; says why if there are none.
fn emulator() -> Option<String> {
    if !cfg!(all(target_os = "linux", target_pointer_width = "64")) {
        println!("skipped: the emulator is for Linux");
        return None;
    }
    let build = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../pcae-backend-cuda/tests/emulator/build"
    );
    let into = Path::new(env!("CARGO_TARGET_TMPDIR")).join("emulator");
    let built = match Command::new("sh").arg(build).arg(into).output() {
        Ok(built) => built,
        Err(error) => {
            println!("skipped: no shell to build the emulator with ({error})");
            return None;
        }
    };
    let said = String::from_utf8_lossy(&built.stderr);
    if built.status.code() == Some(3) {
        println!("skipped: the emulator needs a C++ compiler: {said}");
        return None;
    }
    assert!(built.status.success(), "the emulator is not built: {said}");
    let folder = String::from_utf8(built.stdout).expect("a path");
    Some(folder.trim_end().to_owned())
}

/// `pcae bench --backend cuda` of a tiny model.
fn bench(folder: &str, more: &[&str]) -> Output {
    command(folder, more).output().expect("the command starts")
}

fn command(folder: &str, more: &[&str]) -> Command {
    let mut args = vec!["bench", "--backend", "cuda", "--model", "vit-micro"];
    args.extend(["--repeats", "1", "--batch-size", "2"]);
    args.extend_from_slice(TINY);
    args.extend_from_slice(more);
    let mut command = Command::new(BINARY);
    command
        .args(args)
        .env("LD_LIBRARY_PATH", folder)
        // Images live and go with the emulator that made them.
        .env("PCAE_CACHE", format!("{folder}/images"));
    command
}

#[test]
fn everything_is_measured() {
    let Some(emulator) = emulator() else { return };
    let folder = tempfile::tempdir().expect("a temporary folder can be made");
    let (json, png) = (folder.path().join("b.json"), folder.path().join("r.png"));
    let output = bench(
        &emulator,
        &[
            "--what",
            "peak,gemm,block,infer,step",
            "--precision",
            "f32,bf16",
            "--breakdown",
            "--json",
            &json.to_string_lossy(),
            "--roofline",
            &png.to_string_lossy(),
        ],
    );
    assert!(output.status.success(), "{}", stderr(&output));
    assert!(stderr(&output).contains("batch 2, cuda, bf16: planned memory"));
    assert!(stdout(&output).contains("peak bf16, cuda: "));
    assert!(stdout(&output).contains("copy, cuda: "));
    assert_eq!(image::open(png).expect("a picture").width(), 1200);

    let text = fs::read(json).expect("the report is there");
    let report: serde_json::Value = serde_json::from_slice(&text).expect("JSON");
    let machine = &report["machine"];
    assert!(machine["device"].is_string(), "{machine}");
    assert!(machine["copy_gbytes_per_s"]["cuda"].as_f64() > Some(0.0));
    assert!(machine["update_gbytes_per_s"].is_null());
    let results = report["results"].as_array().expect("results");
    for precision in ["f32", "bf16"] {
        let peak = machine["peak_gflops"][precision]["cuda"].as_f64();
        assert!(peak > Some(0.0), "{machine}");
        let of = |what: &str| {
            let is = |it: &&serde_json::Value| it["what"] == what && it["precision"] == precision;
            results.iter().filter(is).count()
        };
        // Five layers in four passes, but for the gradient of pictures.
        let counts = ["peak", "gemm", "block", "infer", "step"].map(of);
        assert_eq!(counts, [1, 19, 1, 1, 1], "{precision}");
    }
    for result in results {
        assert!(result["threads"].is_null() && result["isa"].is_null());
        assert!(result["gflops"].as_f64() > Some(0.0), "{result}");
        let has_share = result["share_of_peak"].as_f64() > Some(0.0);
        assert_eq!(has_share, result["what"] != "peak", "{result}");
        assert!(result["share_of_peak_beside"].is_null());
    }
    for result in results {
        let launches = &result["launches"];
        assert_eq!(launches.is_null(), result["what"] == "peak", "{result}");
        if !launches.is_null() {
            assert!(launches["graphs"].as_u64() > Some(0), "{result}");
            assert_eq!(launches["refused"], 0, "{result}");
        }
    }
    for step in results.iter().filter(|it| it["what"] == "step") {
        let parts = step["breakdown"].as_array().expect("parts");
        let shares = parts.iter().filter_map(|part| part["share"].as_f64());
        assert!((shares.sum::<f64>() - 1.0).abs() < 1e-9, "{step}");
        let part = |name: &str| {
            let part = parts.iter().find(|part| part["operation"] == name);
            part.unwrap_or_else(|| panic!("no {name} in {step}"))
        };
        let linear = part("linear forward");
        assert!(linear["share_of_peak"].as_f64() > Some(0.0), "{linear}");
        assert!(linear["gbytes_per_s"].is_null(), "{linear}");
        // One update, apart from the runs that the figures are of.
        let update = part("AdamW and moving average");
        assert_eq!(update["calls"], 1.0);
        assert!(update["gbytes_per_s"].is_null(), "{update}");
        kernels_are_told(step);
    }
    assert!(stdout(&output).contains("adamw_ema"));
}

/// Each kernel of a step, those that memory bounds with their bandwidth.
fn kernels_are_told(step: &serde_json::Value) {
    let kernels = step["kernels"].as_array().expect("kernels");
    let shares = kernels.iter().filter_map(|part| part["share"].as_f64());
    assert!((shares.sum::<f64>() - 1.0).abs() < 1e-9, "{step}");
    for pair in kernels.windows(2) {
        assert!(pair[0]["seconds"].as_f64() >= pair[1]["seconds"].as_f64());
    }
    let bound_by_memory = [
        ("adamw_ema", 1.0),
        ("attention_32", 7.0),
        ("attention_backward_32", 4.0),
        ("cosine_loss", 1.0),
        ("decoder_tokens", 1.0),
        ("embed_tokens", 2.0),
        ("gather_patches", 2.0),
        ("gelu_backward", 4.0),
        ("gelu_in_place", 3.0),
        ("gelu_of", 4.0),
        ("normalise_pixels", 1.0),
        ("sum_squares", 1.0),
    ];
    kernels_have_bandwidths(step, &bound_by_memory);
    for name in ["products", "resize_crops", "select_by_rank"] {
        let part = kernels.iter().find(|part| part["kernel"] == name);
        let part = part.unwrap_or_else(|| panic!("no {name} in {step}"));
        assert!(part["bytes"].is_null() && part["seconds"].as_f64() > Some(0.0));
    }
}

/// Kernels that memory bounds, with so many launches each.
fn kernels_have_bandwidths(result: &serde_json::Value, expected: &[(&str, f64)]) {
    let kernels = result["kernels"].as_array().expect("kernels");
    for &(name, launches) in expected {
        let part = kernels.iter().find(|part| part["kernel"] == name);
        let part = part.unwrap_or_else(|| panic!("no {name} in {result}"));
        assert_eq!(part["launches"], launches, "{part}");
        let [bytes, seconds, rate] =
            ["bytes", "seconds", "gbytes_per_s"].map(|it| part[it].as_f64().expect("a number"));
        assert!(bytes > 0.0 && (rate * 1e9 * seconds / bytes - 1.0).abs() < 1e-9);
        assert!(part["share_of_bandwidth"].as_f64() > Some(0.0), "{part}");
    }
}

/// Kernels that fine-tuning alone uses, with their bandwidth.
#[test]
fn kernels_of_fine_tuning_are_told() {
    let Some(emulator) = emulator() else { return };
    let folder = tempfile::tempdir().expect("a temporary folder can be made");
    let json = folder.path().join("b.json");
    let path = json.to_string_lossy();
    let args = ["--what", "finetune", "--drop-ratio", "0,0.4", "--breakdown"];
    let output = bench(&emulator, &[&args[..], &["--json", &path]].concat());
    assert!(output.status.success(), "{}", stderr(&output));
    let text = fs::read(&json).expect("the report is there");
    let report: serde_json::Value = serde_json::from_slice(&text).expect("JSON");
    let results = report["results"].as_array().expect("results");
    assert_eq!(results.len(), 2, "{report}");
    for (result, drop_ratio) in results.iter().zip([0.0, 0.4]) {
        assert_eq!(result["what"], "finetune", "{result}");
        assert_eq!(result["drop_ratio"], drop_ratio, "{result}");
        assert!(result["launches"]["graphs"].as_u64() > Some(0), "{result}");
        assert_eq!(result["launches"]["refused"], 0, "{result}");
        // Whatever the number of stages: each step goes through the same buffers.
        assert_eq!(result["launches"]["made"], 1, "{result}");
    }
    let result = &results[1];
    kernels_have_bandwidths(
        result,
        &[
            ("adamw_ema", 1.0),
            // Two branches of each of three blocks.
            ("add_scaled_rows", 6.0),
            ("scale_rows", 6.0),
            ("cross_entropy", 1.0),
            ("mean_pool", 1.0),
            ("mean_pool_backward", 1.0),
            // Tokens are dropped after each block.
            ("gather_tokens_backward", 3.0),
            ("normalise_pixels", 1.0),
        ],
    );
    let kernels = result["kernels"].as_array().expect("kernels");
    assert!(kernels.iter().any(|it| it["kernel"] == "resize_crops"));
}

/// Work that cannot become a graph runs all the same, and the figures say how they came to be.
#[test]
fn refused_graphs_and_slow_products_are_said() {
    let Some(emulator) = emulator() else { return };
    let folder = tempfile::tempdir().expect("a temporary folder can be made");
    let json = folder.path().join("b.json");
    let output = command(
        &emulator,
        // The last product has as many columns as the decoder predicts, of which cuBLASLt adds no bias there.
        &["--what", "step", "--json", &json.to_string_lossy()],
    )
    .env("PCAE_EMULATED_NO_GRAPHS", "1")
    .output()
    .expect("the command starts");
    assert!(output.status.success(), "{}", stderr(&output));
    let text = fs::read(json).expect("the report is there");
    let report: serde_json::Value = serde_json::from_slice(&text).expect("JSON");
    let result = &report["results"][0];
    let launches = &result["launches"];
    assert_eq!(launches["graphs"], 0, "{report}");
    assert!(launches["refused"].as_u64() > Some(0), "{report}");
    assert!(launches["issued"].as_u64() > launches["refused"].as_u64());
    let warnings = result["warnings"].as_array().expect("warnings");
    let first = warnings[0].as_str().expect("a text");
    assert!(
        first.contains("does not become a graph") && first.contains("CUDA_ERROR_NOT_SUPPORTED"),
        "{report}"
    );
    assert!(stderr(&output).contains(first), "{}", stderr(&output));
}

/// On the emulator the fastest algorithm is never the first.
#[test]
fn algorithms_are_timed_where_that_is_asked_for() {
    let Some(emulator) = emulator() else { return };
    let folder = tempfile::tempdir().expect("a temporary folder can be made");
    let json = folder.path().join("b.json");
    let seconds = |more: &[&str], tuned: bool| {
        let path = json.to_string_lossy();
        let args = ["--what", "infer", "--breakdown", "--json", &path];
        let output = bench(&emulator, &[&args, more].concat());
        assert!(output.status.success(), "{}", stderr(&output));
        let text = fs::read(&json).expect("the report is there");
        let report: serde_json::Value = serde_json::from_slice(&text).expect("JSON");
        let result = &report["results"][0];
        assert_eq!(result["tuned"], tuned, "{report}");
        let parts = result["breakdown"].as_array().expect("parts");
        let linear = parts.iter().find(|it| it["operation"] == "linear forward");
        let linear = linear.expect("linear layers");
        linear["seconds"].as_f64().expect("seconds") / linear["calls"].as_f64().expect("calls")
    };
    // By the device's clock, to which the emulator adds a tenth of a second where the algorithm is not the fastest.
    let (first, fastest) = (seconds(&[], false), seconds(&["--tune"], true));
    assert!(first > fastest + 5e-2, "{first} {fastest}");
}

#[test]
fn what_a_device_has_not_is_refused() {
    let fails = |args: &[&str], expected: &[&str]| {
        let output = pcae(BINARY, &[&["bench", "--backend", "cuda"], args].concat());
        assert_eq!(output.status.code(), Some(2), "{args:?}");
        let text = stderr(&output);
        for expected in expected {
            assert!(text.contains(expected), "{args:?}: {text}");
        }
        assert_eq!(text.trim_end().lines().count(), 1, "{text}");
    };
    fails(&["--threads", "0,2"], &["--threads", "--backend cuda", "2"]);
    fails(
        &["--isa", "avx2"],
        &["--isa", "--backend cuda", "avx2", "--backend cpu"],
    );
    fails(
        &["--precision", "f64"],
        &["--precision", "f32 or bf16", "f64"],
    );
}
