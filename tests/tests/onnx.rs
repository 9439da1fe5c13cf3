//! Exported files against ONNX Runtime, where there is one: `pip install onnxruntime numpy`, and the interpreter's name in
//! `PCAE_PYTHON` if it is not `python3`.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use pcae_backend_cpu::Cpu;
use pcae_kernel::backend::{Backend, TrainBackend};
use pcae_kernel::config::{
    Budget, ClassifierConfig, Criterion, DropLayers, Place, Pool, Reduction, VitConfig,
};
use pcae_kernel::layout::Layout;
use pcae_kernel::model::{Classifier, MeanSimilarity, Vit};
use pcae_kernel::rng::{Purpose, Stream};
use pcae_tests::{pcae, stderr};
use pcae_train::checkpoint::exchange::{self, Encoder, Head, Pooling, Report};

const BINARY: &str = env!("CARGO_BIN_EXE_pcae-under-test");
const SCRIPT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/onnx_runtime.py");
const PICTURES: usize = 3;
const CLASSES: usize = 7;

const VIT: VitConfig = VitConfig {
    img_size: [40, 56],
    in_chans: 3,
    patch_size: 8,
    embed_dim: 48,
    depth: 4,
    num_heads: 3,
    mlp_ratio: 2.5,
};

fn normal(seed: u64, len: usize, scale: f32) -> Vec<f32> {
    let mut stream = Stream::new(seed, 0, 0, Purpose::Init);
    (0..len).map(|_| scale * stream.normal()).collect()
}

fn encoder() -> Encoder {
    let layout = Layout::encoder(&VIT);
    let mut values = normal(1, layout.len(), 0.15);
    layout.for_each(|tensor| {
        let name = tensor.name.to_string();
        if name.contains("norm") && name.ends_with("weight") {
            values[tensor.span.start..tensor.span.end()]
                .iter_mut()
                .for_each(|value| *value += 1.0);
        }
    });
    Encoder {
        path: PathBuf::new(),
        title: String::new(),
        kept: std::collections::BTreeMap::new(),
        vit: VIT,
        values,
        preprocessing: None,
        head: Some(Head {
            num_classes: CLASSES,
            weight: normal(2, CLASSES * VIT.embed_dim, 0.3),
            bias: normal(3, CLASSES, 0.3),
            pooling: Pooling::MeanThenNorm,
        }),
        classifier: None,
        decoder: None,
        report: Report::default(),
    }
}

/// Our own tokens, positions and logits.
fn ours(encoder: &Encoder, reduction: Reduction, images: &[f32]) -> (Vec<f32>, Vec<u32>, Vec<f32>) {
    let mut cpu = Cpu::new();
    let patches = VIT.num_patches();
    let left = reduction.remaining(patches, VIT.depth);
    let mut buf = cpu.buf(images.len()).unwrap();
    cpu.write(&mut buf, images).unwrap();
    let params = cpu.params(&Layout::encoder(&VIT), &encoder.values).unwrap();
    let mut model = Vit::new(&mut cpu, &VIT, PICTURES, patches, true, reduction).unwrap();
    model
        .forward(&mut cpu, &params, PICTURES, &buf, None, &mut MeanSimilarity)
        .unwrap();
    let mut ids = vec![0; PICTURES * left];
    if left < patches {
        cpu.read_ids(&mut ids, model.ids()).unwrap();
    }
    let mut tokens = vec![0.0; PICTURES * (1 + left) * VIT.embed_dim];
    let normed = model.final_norm(&mut cpu, &params).unwrap();
    cpu.read(&mut tokens, normed).unwrap();

    let config = ClassifierConfig {
        vit: VIT,
        num_classes: CLASSES,
        reduction,
        pool: Pool::Mean,
    };
    let head = encoder.head.as_ref().unwrap();
    let values = [&encoder.values[..], &head.weight, &head.bias].concat();
    let params = cpu.params(&Layout::classifier(&config), &values).unwrap();
    let mut model = Classifier::new(&mut cpu, &config, PICTURES).unwrap();
    let logits = model
        .forward(&mut cpu, &params, PICTURES, &buf, &mut MeanSimilarity)
        .unwrap();
    let mut out = vec![0.0; PICTURES * CLASSES];
    cpu.read(&mut out, logits).unwrap();
    (tokens, ids, out)
}

fn floats(path: &Path) -> Vec<f32> {
    let bytes = fs::read(path).unwrap();
    let (values, rest) = bytes.as_chunks::<4>();
    assert!(rest.is_empty());
    values
        .iter()
        .map(|value| f32::from_le_bytes(*value))
        .collect()
}

fn largest_difference(found: &[f32], want: &[f32]) -> f32 {
    assert_eq!(found.len(), want.len());
    let differences = found.iter().zip(want).map(|(a, b)| (a - b).abs());
    differences.fold(0.0, f32::max)
}

#[test]
fn onnx_runtime_agrees() {
    let python = std::env::var("PCAE_PYTHON").unwrap_or_else(|_| "python3".to_owned());
    let there = Command::new(&python)
        .args(["-c", "import numpy, onnxruntime"])
        .output();
    if !there.is_ok_and(|output| output.status.success()) {
        println!(
            "SKIPPED: {python} has no onnxruntime and numpy; install them, or name another interpreter in PCAE_PYTHON"
        );
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let text = |name: &str| path(name).to_str().unwrap().to_owned();
    let encoder = encoder();
    exchange::write(&path("model.safetensors"), &encoder).unwrap();
    let [height, width] = VIT.img_size;
    let images = normal(4, PICTURES * 3 * height * width, 1.0);
    let bytes: Vec<u8> = images
        .iter()
        .flat_map(|value| value.to_le_bytes())
        .collect();
    fs::write(path("images"), bytes).unwrap();
    for (drop_ratio, batch) in [("0", "dynamic"), ("0.4", "dynamic"), ("0.25", "3")] {
        let reduction = Reduction {
            criterion: Criterion::MeanSimilarity,
            place: Place::Progressive,
            drop_layers: DropLayers::new(&[0, 2], VIT.depth).unwrap(),
            budget: Budget::Drop(drop_ratio.parse().unwrap()),
        };
        let (tokens, ids, logits) = ours(&encoder, reduction, &images);
        for part in ["encoder", "classifier"] {
            let (source, out) = (text("model.safetensors"), text("model.onnx"));
            let mut args = vec!["onnx", &source, "--out", &out, "--drop-layers", "0,2"];
            args.extend(["--drop-ratio", drop_ratio, "--batch", batch]);
            let mut outputs = vec![text("first")];
            if part == "encoder" {
                args.push("--encoder");
                if drop_ratio != "0" {
                    outputs.push(text("ids"));
                }
            }
            let output = pcae(BINARY, &args);
            assert!(output.status.success(), "{}", stderr(&output));
            let run = Command::new(&python)
                .args([SCRIPT, &out, &text("images")])
                .arg(format!("{PICTURES},3,{height},{width}"))
                .args(&outputs)
                .output()
                .unwrap();
            assert!(run.status.success(), "{}", stderr(&run));
            let found = floats(&path("first"));
            let want = if part == "encoder" { &tokens } else { &logits };
            let difference = largest_difference(&found, want);
            let largest = want.iter().fold(0.0, |a: f32, b| a.max(b.abs()));
            println!(
                "{part}, drop ratio {drop_ratio}: {difference:.2e} of values up to {largest:.2}"
            );
            // Both round f32 sums of up to 192 terms, in another order: 3e-6 was measured.
            assert!(difference < 2e-5, "{part} {drop_ratio}: {difference}");
            if outputs.len() == 2 {
                let bytes = fs::read(path("ids")).unwrap();
                let found = bytes
                    .as_chunks::<8>()
                    .0
                    .iter()
                    .map(|id| i64::from_le_bytes(*id));
                assert!(
                    found.eq(ids.iter().map(|&id| i64::from(id))),
                    "{drop_ratio}"
                );
            }
        }
    }
}

#[test]
fn wrong_flags() {
    let folder = tempfile::tempdir().unwrap();
    let source = folder.path().join("model.safetensors");
    exchange::write(&source, &encoder()).unwrap();
    let (source, out) = (source.to_str().unwrap(), folder.path().join("model.onnx"));
    for (flag, value) in [
        ("--drop-ratio", "1"),
        ("--drop-ratio", "-0.1"),
        ("--drop-layers", "4"),
        ("--batch", "0"),
        ("--batch", "many"),
        ("--out", source),
    ] {
        let output = pcae(
            BINARY,
            &["onnx", source, "--out", out.to_str().unwrap(), flag, value],
        );
        assert_eq!(output.status.code(), Some(2), "{flag} {value}");
        assert!(
            stderr(&output).contains(flag),
            "{flag} {value}: {}",
            stderr(&output)
        );
        assert!(!out.exists());
    }
}
