//! Encoders of others: small files with foreign names, made from known parameters, give the same features.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use pcae_backend_cpu::Cpu;
use pcae_kernel::backend::{Backend, TrainBackend};
use pcae_kernel::config::{DecoderConfig, Reduction, VitConfig};
use pcae_kernel::layout::Layout;
use pcae_kernel::model::{MeanSimilarity, Vit};
use pcae_kernel::rng::{Purpose, Stream};
use pcae_tests::{TINY, idx_folder, pcae, stderr, stdout};
use pcae_train::checkpoint::exchange::{self, Encoder, Hints, Pooling};
use pcae_train::checkpoint::file::Reader;
use pcae_train::error::Error;

const BINARY: &str = env!("CARGO_BIN_EXE_pcae-under-test");

/// 3 x 3 patches; all sizes differ.
const VIT: VitConfig = VitConfig {
    img_size: [15, 15],
    in_chans: 3,
    patch_size: 5,
    embed_dim: 16,
    depth: 2,
    num_heads: 2,
    mlp_ratio: 2.5,
};

type Tensors = BTreeMap<String, (Vec<usize>, Vec<f32>)>;

/// Random tensors of `layout`, all of them: norms near 1, biases and positions near 0.
fn tensors(layout: &Layout) -> Tensors {
    let mut tensors = Tensors::new();
    let mut stream = Stream::new(3, 0, 0, Purpose::Init);
    layout.for_each(|tensor| {
        let name = tensor.name.to_string();
        let base = if name.contains("norm") && name.ends_with("weight") {
            1.0
        } else {
            0.0
        };
        let values = (0..tensor.span.len).map(|_| base + 0.25 * stream.normal());
        tensors.insert(name, (tensor.shape().to_vec(), values.collect()));
    });
    tensors
}

fn flat(layout: &Layout, tensors: &Tensors) -> Vec<f32> {
    let mut values = Vec::new();
    layout.for_each(|tensor| values.extend(&tensors[&tensor.name.to_string()].1));
    values
}

/// The names of Hugging Face's `ViTModel`, or of its `Dinov2Model`.
fn hugging_face(tensors: &Tensors, dinov2: bool, prefix: &str) -> Tensors {
    let mut out = Tensors::new();
    for (name, (shape, values)) in tensors {
        let simple = match name.as_str() {
            "cls_token" => "embeddings.cls_token".to_owned(),
            "pos_embed" => "embeddings.position_embeddings".to_owned(),
            _ if name.starts_with("patch_embed.proj.") => {
                name.replace("patch_embed.proj", "embeddings.patch_embeddings.projection")
            }
            _ if name.starts_with("norm.") => name.replace("norm.", "layernorm."),
            _ => {
                let (index, rest) = name
                    .strip_prefix("blocks.")
                    .unwrap()
                    .split_once('.')
                    .unwrap();
                let block = format!("{prefix}encoder.layer.{index}.");
                if let Some(leaf) = rest.strip_prefix("attn.qkv.") {
                    let third = values.len() / 3;
                    for (part, values) in ["query", "key", "value"].iter().zip(values.chunks(third))
                    {
                        let mut shape = shape.clone();
                        shape[0] /= 3;
                        let name = format!("{block}attention.attention.{part}.{leaf}");
                        out.insert(name, (shape, values.to_vec()));
                    }
                    continue;
                }
                let rest = rest
                    .replace("attn.proj", "attention.output.dense")
                    .replace("ls1.gamma", "layer_scale1.lambda1")
                    .replace("ls2.gamma", "layer_scale2.lambda1");
                let rest = if dinov2 {
                    rest
                } else {
                    rest.replace("norm1", "layernorm_before")
                        .replace("norm2", "layernorm_after")
                        .replace("mlp.fc1", "intermediate.dense")
                        .replace("mlp.fc2", "output.dense")
                };
                out.insert(block + &rest, (shape.clone(), values.clone()));
                continue;
            }
        };
        out.insert(format!("{prefix}{simple}"), (shape.clone(), values.clone()));
    }
    out
}

/// Element types of a file.
#[derive(Clone, Copy)]
enum As {
    F32,
    F16,
    Bf16,
}

/// A safetensors file, written here byte by byte.
fn write(path: &Path, tensors: &Tensors, kind: As) {
    let (mut header, mut data) = (serde_json::Map::new(), Vec::new());
    for (name, (shape, values)) in tensors {
        let start = data.len();
        let dtype = match kind {
            As::F32 => {
                data.extend(values.iter().flat_map(|v| v.to_le_bytes()));
                "F32"
            }
            // These values are multiples of 2⁻⁵ below 2: the top bits say it all.
            As::F16 => {
                data.extend(values.iter().flat_map(|v| f16_bits(*v).to_le_bytes()));
                "F16"
            }
            As::Bf16 => {
                data.extend(
                    values
                        .iter()
                        .flat_map(|v| ((v.to_bits() >> 16) as u16).to_le_bytes()),
                );
                "BF16"
            }
        };
        let info = serde_json::json!({"dtype": dtype, "shape": shape, "data_offsets": [start, data.len()]});
        header.insert(name.clone(), info);
    }
    let mut header = serde_json::to_vec(&header).unwrap();
    header.resize(header.len().next_multiple_of(8), b' ');
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header);
    bytes.extend(data);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, bytes).unwrap();
}

/// Half precision of a value that it holds exactly and that is not subnormal there.
fn f16_bits(value: f32) -> u16 {
    let bits = value.to_bits();
    let sign = (bits >> 16 & 0x8000) as u16;
    match bits >> 23 & 0xff {
        0 => sign,
        exponent => sign | ((exponent as u16 - 112) << 10) | (bits >> 13 & 0x3ff) as u16,
    }
}

struct Place(tempfile::TempDir);

impl Place {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// A file of `tensors`, read with the heads of [`VIT`].
    fn read(&self, tensors: &Tensors) -> Result<Encoder, Error> {
        self.read_with(tensors, &heads())
    }

    fn read_with(&self, tensors: &Tensors, hints: &Hints) -> Result<Encoder, Error> {
        let path = self.path("read/model.safetensors");
        write(&path, tensors, As::F32);
        exchange::read(&path, hints)
    }
}

fn heads() -> Hints {
    Hints {
        num_heads: Some(2),
        ..Hints::default()
    }
}

fn images(vit: &VitConfig) -> Vec<f32> {
    let mut stream = Stream::new(5, 0, 0, Purpose::Augment);
    let [height, width] = vit.img_size;
    (0..2 * vit.in_chans * height * width)
        .map(|_| stream.normal())
        .collect()
}

/// Tokens of two pictures after the last norm, class token first.
fn features(vit: &VitConfig, values: &[f32]) -> Vec<f32> {
    let mut cpu = Cpu::new();
    let patches = vit.num_patches();
    let params = cpu.params(&Layout::encoder(vit), values).unwrap();
    let mut model = Vit::new(&mut cpu, vit, 2, patches, true, Reduction::NONE).unwrap();
    let images = images(vit);
    let mut buf = cpu.buf(images.len()).unwrap();
    cpu.write(&mut buf, &images).unwrap();
    model
        .forward(&mut cpu, &params, 2, &buf, None, &mut MeanSimilarity)
        .unwrap();
    let mut out = vec![0.0; 2 * (1 + patches) * vit.embed_dim];
    let tokens = model.final_norm(&mut cpu, &params).unwrap();
    cpu.read(&mut out, tokens).unwrap();
    out
}

#[test]
fn timm_and_hugging_face_give_the_same_features() {
    let place = Place::new();
    let layout = Layout::encoder(&VIT);
    let ours = tensors(&layout);
    let want = flat(&layout, &ours);
    let prefixed = |prefix: &str| -> Tensors {
        ours.iter()
            .map(|(name, tensor)| (format!("{prefix}{name}"), tensor.clone()))
            .collect()
    };
    let files = [
        ("timm", ours.clone()),
        ("timm", prefixed("model.")),
        ("Hugging Face ViT", hugging_face(&ours, false, "")),
        ("Hugging Face ViT", hugging_face(&ours, false, "vit.")),
        ("Hugging Face DINOv2", hugging_face(&ours, true, "dinov2.")),
    ];
    for (naming, file) in files {
        let encoder = place.read(&file).unwrap();
        assert_eq!(encoder.report.naming, naming);
        assert_eq!(encoder.vit, VIT, "{naming}");
        assert!(encoder.values == want, "{naming}");
        assert_eq!(
            features(&encoder.vit, &encoder.values),
            features(&VIT, &want)
        );
        let count = file.len();
        assert_eq!(
            encoder.report.to_string().lines().next().unwrap(),
            format!("{naming} names: {count} of {count} tensors loaded, 0 missing, 0 unexpected")
        );
    }
}

#[test]
fn half_precision_is_widened_exactly() {
    let place = Place::new();
    let layout = Layout::encoder(&VIT);
    let mut ours = tensors(&layout);
    for (_, values) in ours.values_mut() {
        values
            .iter_mut()
            .for_each(|v| *v = (*v * 32.0).round() / 32.0);
        assert!(values.iter().all(|v| v.abs() < 2.0));
    }
    for kind in [As::F16, As::Bf16] {
        let path = place.path("half.safetensors");
        write(&path, &ours, kind);
        let encoder = exchange::read(&path, &heads()).unwrap();
        assert!(encoder.values == flat(&layout, &ours));
    }
}

/// One picture through a vision transformer with layer scale, as its formulas say, in f64.
fn formula(vit: &VitConfig, p: &Tensors, image: &[f32]) -> Vec<Vec<f64>> {
    let get = |name: &str| -> Vec<f64> { p[name].1.iter().map(|&v| v.into()).collect() };
    let linear = |x: &[f64], name: &str| -> Vec<f64> {
        let (weight, bias) = (get(&format!("{name}.weight")), get(&format!("{name}.bias")));
        let rows = weight.chunks(x.len()).zip(bias);
        rows.map(|(row, b)| b + row.iter().zip(x).map(|(w, x)| w * x).sum::<f64>())
            .collect()
    };
    let norm = |x: &[f64], name: &str| -> Vec<f64> {
        let n = x.len() as f64;
        let mean = x.iter().sum::<f64>() / n;
        let var = x.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / n;
        let affine = get(&format!("{name}.weight"))
            .into_iter()
            .zip(get(&format!("{name}.bias")));
        x.iter()
            .zip(affine)
            .map(|(v, (w, b))| (v - mean) / (var + 1e-6).sqrt() * w + b)
            .collect()
    };
    // erf by its series, which converges everywhere: the arguments here are small.
    let erf = |x: f64| {
        let (mut term, mut sum) = (x, x);
        for n in 1..200 {
            term *= -x * x / f64::from(n);
            sum += term / f64::from(2 * n + 1);
        }
        sum * 2.0 / std::f64::consts::PI.sqrt()
    };
    let gelu = |x: f64| 0.5 * x * (1.0 + erf(x / 2.0_f64.sqrt()));

    let [height, width] = vit.img_size;
    let (patch, d) = (vit.patch_size, vit.embed_dim);
    let positions = get("pos_embed");
    let mut tokens = vec![get("cls_token")];
    for top in (0..height).step_by(patch) {
        for left in (0..width).step_by(patch) {
            let mut pixels = Vec::new();
            for channel in image.chunks(height * width) {
                for row in top..top + patch {
                    let row = &channel[row * width + left..][..patch];
                    pixels.extend(row.iter().map(|&v| f64::from(v)));
                }
            }
            tokens.push(linear(&pixels, "patch_embed.proj"));
        }
    }
    for (token, position) in tokens.iter_mut().zip(positions.chunks(d)) {
        token.iter_mut().zip(position).for_each(|(t, p)| *t += p);
    }
    for block in 0..vit.depth {
        let name = |rest: &str| format!("blocks.{block}.{rest}");
        let qkv: Vec<Vec<f64>> = tokens
            .iter()
            .map(|x| linear(&norm(x, &name("norm1")), &name("attn.qkv")))
            .collect();
        let head_dim = d / vit.num_heads;
        let scale1 = get(&name("ls1.gamma"));
        let scale2 = get(&name("ls2.gamma"));
        let mut next = Vec::new();
        for (token, query) in tokens.iter().zip(&qkv) {
            let mut mixed = vec![0.0; d];
            for head in 0..vit.num_heads {
                let at = |part: usize| part * d + head * head_dim..part * d + (head + 1) * head_dim;
                let score = |key: &Vec<f64>| {
                    let dot: f64 = query[at(0)]
                        .iter()
                        .zip(&key[at(1)])
                        .map(|(q, k)| q * k)
                        .sum();
                    (dot / (head_dim as f64).sqrt()).exp()
                };
                let scores: Vec<f64> = qkv.iter().map(score).collect();
                let total: f64 = scores.iter().sum();
                for (key, score) in qkv.iter().zip(&scores) {
                    for (out, value) in mixed[head * head_dim..].iter_mut().zip(&key[at(2)]) {
                        *out += score / total * value;
                    }
                }
            }
            let branch = linear(&mixed, &name("attn.proj"));
            let mut token: Vec<f64> = (0..d).map(|i| token[i] + scale1[i] * branch[i]).collect();
            let hidden = linear(&norm(&token, &name("norm2")), &name("mlp.fc1"));
            let hidden: Vec<f64> = hidden.into_iter().map(gelu).collect();
            let branch = linear(&hidden, &name("mlp.fc2"));
            (0..d).for_each(|i| token[i] += scale2[i] * branch[i]);
            next.push(token);
        }
        tokens = next;
    }
    tokens.iter().map(|token| norm(token, "norm")).collect()
}

#[test]
fn layer_scale_is_folded() {
    let place = Place::new();
    let layout = Layout::encoder(&VIT);
    let mut dinov2 = tensors(&layout);
    let mut stream = Stream::new(4, 0, 0, Purpose::Init);
    for block in 0..VIT.depth {
        for scale in ["ls1.gamma", "ls2.gamma"] {
            // From -0.4 to 2.4: far from 1, so that a scale that is left out shows.
            let values = (0..VIT.embed_dim).map(|_| 1.0 + 0.7 * stream.normal().clamp(-2.0, 2.0));
            let name = format!("blocks.{block}.{scale}");
            dinov2.insert(name, (vec![VIT.embed_dim], values.collect()));
        }
    }
    let images = images(&VIT);
    let want: Vec<f64> = images
        .chunks(images.len() / 2)
        .flat_map(|image| formula(&VIT, &dinov2, image))
        .flatten()
        .collect();
    let mask = (vec![1, VIT.embed_dim], vec![0.5; VIT.embed_dim]);
    let mut theirs = hugging_face(&dinov2, true, "");
    theirs.insert("embeddings.mask_token".to_owned(), mask.clone());
    let mut original = dinov2;
    original.insert("mask_token".to_owned(), mask);
    for (naming, file) in [("Hugging Face DINOv2", theirs), ("DINOv2", original)] {
        let encoder = place.read(&file).unwrap();
        assert_eq!(encoder.report.naming, naming);
        let text = encoder.report.to_string();
        assert!(
            text.contains("layer scale folded") && text.contains("mask_token"),
            "{text}"
        );
        assert!(
            text.contains(&format!("{0} of {0} tensors", file.len() - 1)),
            "{text}"
        );
        let found = features(&encoder.vit, &encoder.values);
        let square = |it: &mut dyn Iterator<Item = f64>| it.map(|v| v * v).sum::<f64>().sqrt();
        let error = square(&mut found.iter().zip(&want).map(|(a, b)| f64::from(*a) - b))
            / square(&mut want.iter().copied());
        println!("{naming}: relative error {error:.2e}");
        // That of activations elsewhere; 2e-7 was measured.
        assert!(error < 1e-6, "{naming}: {error}");
    }
}

#[test]
fn positions_follow_the_picture_size() {
    let place = Place::new();
    let layout = Layout::encoder(&VIT);
    let ours = tensors(&layout);
    let wider = VitConfig {
        img_size: [20, 10],
        ..VIT
    };
    let hints = Hints {
        img_size: Some(wider.img_size),
        ..heads()
    };
    let table = &ours["pos_embed"].1;
    let (cls, patches) = table.split_at(16);
    for (file, antialias) in [
        (ours.clone(), true),
        (hugging_face(&ours, false, ""), false),
    ] {
        let encoder = place.read_with(&file, &hints).unwrap();
        assert_eq!(encoder.vit, wider);
        assert!(encoder.report.to_string().contains("from 3x3 to 4x2"));
        let span = Layout::encoder(&wider).encoder.pos_embed;
        let found = &encoder.values[span.start..span.end()];
        assert_eq!(&found[..16], cls, "the class position is kept");
        let want = exchange::positions::resample(patches, 16, [3, 3], [4, 2], antialias);
        assert_eq!(&found[16..], want);
    }
    // A table without a row for the class token, as in DeiT III.
    let mut without = ours.clone();
    without.insert("pos_embed".to_owned(), (vec![1, 9, 16], patches.to_vec()));
    let encoder = place.read(&without).unwrap();
    let span = layout.encoder.pos_embed;
    assert_eq!(&encoder.values[span.start..][..16], [0.0; 16]);
    assert_eq!(&encoder.values[span.start + 16..span.end()], patches);
    // Not square: its own size must be said, by the flag or by a file beside it.
    let oblong = VitConfig {
        img_size: [10, 15],
        ..VIT
    };
    let file = tensors(&Layout::encoder(&oblong));
    let error = place.read(&file).unwrap_err();
    assert!(
        error.is_usage() && error.to_string().contains("--img-size"),
        "{error}"
    );
    let hints = Hints {
        img_size: Some([10, 15]),
        ..heads()
    };
    assert_eq!(place.read_with(&file, &hints).unwrap().vit, oblong);
    fs::write(
        place.path("read/config.json"),
        r#"{"image_size": [10, 15], "num_attention_heads": 4, "hidden_act": "gelu", "layer_norm_eps": 1e-6}"#,
    )
    .unwrap();
    let encoder = place.read_with(&file, &Hints::default()).unwrap();
    assert_eq!((encoder.vit.img_size, encoder.vit.num_heads), ([10, 15], 4));
}

#[test]
fn what_lies_beside_the_file_is_read() {
    let place = Place::new();
    let file = hugging_face(&tensors(&Layout::encoder(&VIT)), false, "");
    write(&place.path("hub/model.safetensors"), &file, As::F32);
    let read = |config: &str, hints: &Hints| {
        fs::write(place.path("hub/config.json"), config).unwrap();
        exchange::read(&place.path("hub"), hints)
    };
    let none = Hints::default();
    let error = read("{}", &none).unwrap_err();
    assert!(
        error.is_usage() && error.to_string().starts_with("--num-heads: expected"),
        "{error}"
    );
    fs::write(
        place.path("hub/preprocessor_config.json"),
        r#"{"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}"#,
    )
    .unwrap();
    let encoder = read(
        r#"{"num_attention_heads": 4, "layer_norm_eps": 1e-12}"#,
        &none,
    )
    .unwrap();
    assert_eq!(encoder.vit.num_heads, 4);
    assert_eq!(encoder.preprocessing.unwrap().std, [0.4, 0.5, 0.6]);
    assert!(
        encoder.report.notes[0].contains("1e-12"),
        "{:?}",
        encoder.report.notes
    );
    let timm = r#"{"architecture": "vit_small_patch14_dinov2", "pretrained_cfg":
        {"input_size": [3, 15, 15], "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}}"#;
    let error = read(timm, &none).unwrap_err();
    assert!(
        error
            .to_string()
            .contains("--num-heads: embed_dim: expected a multiple"),
        "{error}"
    );
    let timm = timm.replace("\"pre", "\"model_args\": {\"num_heads\": 8}, \"pre");
    assert_eq!(read(&timm, &none).unwrap().vit.num_heads, 8);

    let eps = r#"{"num_attention_heads": 2, "layer_norm_eps": 1e-5}"#;
    let error = read(eps, &none).unwrap_err();
    assert!(
        error.is_usage() && error.to_string().contains("--layer-norm-eps"),
        "{error}"
    );
    let ours = Hints {
        layer_norm_eps: Some(1e-6),
        ..Hints::default()
    };
    assert!(read(eps, &ours).is_ok());
    let act = r#"{"num_attention_heads": 2, "hidden_act": "quick_gelu"}"#;
    assert!(
        read(act, &none)
            .unwrap_err()
            .to_string()
            .contains("quick_gelu")
    );
    assert!(
        read("{", &none)
            .unwrap_err()
            .to_string()
            .contains("config.json")
    );
}

/// What this program would compute wrongly, or not at all, is refused by its name.
#[test]
fn other_networks_are_refused() {
    let place = Place::new();
    let ours = tensors(&Layout::encoder(&VIT));
    let d = VIT.embed_dim;
    let with = |name: &str, shape: &[usize]| {
        let mut file = ours.clone();
        let len = shape.iter().product();
        file.insert(name.to_owned(), (shape.to_vec(), vec![0.5; len]));
        file
    };
    let without = |name: &str| {
        let mut file = ours.clone();
        file.remove(name).unwrap();
        file
    };
    let mut nan = ours.clone();
    nan.get_mut("norm.bias").unwrap().1[3] = f32::NAN;
    let cases = [
        (with("register_tokens", &[1, 4, d]), "register tokens"),
        (with("reg_token", &[1, 4, d]), "register tokens"),
        (with("dist_token", &[1, 1, d]), "distillation"),
        (with("norm_pre.weight", &[d]), "norm before the first block"),
        (with("blocks.0.mlp.w12.weight", &[80, d]), "SwiGLU"),
        (with("blocks.0.mlp.fc1.weight", &[80, d]), "SwiGLU"),
        (
            with("blocks.1.attn.q_norm.weight", &[8]),
            "blocks.1.attn.q_norm.weight",
        ),
        (
            with("blocks.1.mlp.fc1.weight", &[41, d]),
            "blocks.1.mlp.fc1.weight",
        ),
        (with("blocks.4000000000.norm1.weight", &[d]), "4000000001"),
        (
            with("patch_embed.proj.weight", &[d, 3, 5, 4]),
            "square patches",
        ),
        (
            without("patch_embed.proj.weight"),
            "patch_embed.proj.weight",
        ),
        (without("blocks.1.attn.proj.bias"), "29 of 30"),
        (without("cls_token"), "cls_token"),
        (nan, "norm.bias holds NaN"),
    ];
    for (file, named) in cases {
        let error = place.read(&file).unwrap_err();
        assert!(
            !error.is_usage() && error.to_string().contains(named),
            "{named}: {error}"
        );
    }
    let hints = Hints {
        allow_missing: true,
        ..heads()
    };
    let encoder = place
        .read_with(&without("blocks.1.attn.proj.bias"), &hints)
        .unwrap();
    assert_eq!(encoder.report.missing, ["blocks.1.attn.proj.bias"]);
    // A claim of many blocks makes no memory be taken.
    let error = place
        .read_with(&with("blocks.63.norm1.weight", &[d]), &hints)
        .unwrap_err();
    assert!(
        error.to_string().contains("most of it is missing"),
        "{error}"
    );
}

#[test]
fn heads_of_classifiers() {
    let place = Place::new();
    let ours = tensors(&Layout::encoder(&VIT));
    let head = (vec![5, 16], (0..80).map(|i| i as f32).collect::<Vec<f32>>());
    let bias = (vec![5], vec![0.5; 5]);
    let mut token = hugging_face(&ours, false, "vit.");
    token.insert("classifier.weight".to_owned(), head.clone());
    token.insert("classifier.bias".to_owned(), bias.clone());
    let mut mean: Tensors = ours
        .into_iter()
        .map(|(name, tensor)| (name.replace("norm.", "fc_norm."), tensor))
        .filter(|(name, _)| !name.starts_with("blocks") || !name.contains("fc_norm"))
        .collect();
    mean.insert("head.weight".to_owned(), head.clone());
    mean.insert("head.bias".to_owned(), bias);
    for (file, pooling) in [(token, Pooling::ClassToken), (mean, Pooling::MeanThenNorm)] {
        let encoder = place.read(&file).unwrap();
        let found = encoder.head.clone().unwrap();
        assert_eq!((found.num_classes, found.pooling), (5, pooling));
        assert_eq!(found.weight, head.1);
        assert!(encoder.report.unexpected.is_empty(), "{}", encoder.report);
        let out = place.path("head.safetensors");
        exchange::write(&out, &encoder).unwrap();
        let again = exchange::read(&out, &Hints::default()).unwrap();
        assert_eq!((again.head, again.values), (encoder.head, encoder.values));
        let norm = Reader::open(&out)
            .unwrap()
            .shape("fc_norm.weight")
            .is_some();
        assert_eq!(norm, pooling == Pooling::MeanThenNorm);
    }
}

#[test]
fn mae_with_and_without_its_decoder() {
    let place = Place::new();
    let decoder = DecoderConfig {
        embed_dim: 8,
        depth: 3,
        num_heads: 2,
    };
    let layout = Layout::with_decoder(&VIT, &decoder, VIT.patch_len());
    let file = tensors(&layout);
    let hints = Hints {
        decoder_num_heads: Some(2),
        ..heads()
    };
    let encoder = place.read_with(&file, &hints).unwrap();
    let found = encoder.decoder.clone().unwrap();
    assert_eq!((found.config, found.target_dim), (decoder, VIT.patch_len()));
    assert_eq!(
        [encoder.values.clone(), found.values].concat(),
        flat(&layout, &file)
    );
    assert_eq!(encoder.report.naming, "MAE with decoder");
    assert_eq!(encoder.report.loaded, file.len());
    let out = place.path("mae.safetensors");
    exchange::write(&out, &encoder).unwrap();
    let again = exchange::read(&out, &Hints::default()).unwrap();
    assert_eq!(
        (again.decoder, again.values),
        (encoder.decoder, encoder.values.clone())
    );
    let alone = place.read(&file).unwrap();
    assert!(alone.decoder.is_none() && alone.values == encoder.values);
    assert!(alone.report.to_string().contains("--decoder-num-heads"));
}

/// `pcae convert` and `pcae inspect` on a file of others and on a run.
#[test]
fn the_commands() {
    let place = Place::new();
    let text = |path: &Path| path.to_str().unwrap().to_owned();
    let layout = Layout::encoder(&VIT);
    let ours = tensors(&layout);
    let source = place.path("foreign.safetensors");
    write(&source, &hugging_face(&ours, false, ""), As::F32);
    let (source, out) = (text(&source), text(&place.path("out.safetensors")));
    let output = pcae(BINARY, &["inspect", &source]);
    let line = "encoder with Hugging Face ViT names: 16 wide, 2 blocks, patches of 5x5, 3 channels, 10 positions";
    assert!(stdout(&output).contains(line), "{}", stdout(&output));
    let convert = |more: &[&str]| {
        pcae(
            BINARY,
            &[&["convert", &source, "--out", &out], more].concat(),
        )
    };
    let cases: [(&[&str], i32, &str); 8] = [
        (&[], 2, "--num-heads"),
        // Half of a normalisation is none.
        (&["--num-heads", "2", "--mean", "0,0,0"], 2, "--std"),
        (&["--num-heads", "2", "--std", "1,1,1"], 2, "--mean"),
        (&["--num-heads", "3"], 2, "--num-heads"),
        (&["--num-heads", "2", "--img-size", "21"], 2, "--img-size"),
        (&["--num-heads", "2", "--img-size", "x"], 2, "--img-size"),
        (&["--num-heads", "2", "--std", "0,1,1"], 2, "--std"),
        (&["--num-heads", "2", "--prefix", "vit."], 2, "--prefix"),
    ];
    for (more, code, named) in cases {
        let output = convert(more);
        assert_eq!(
            output.status.code(),
            Some(code),
            "{more:?}: {}",
            stderr(&output)
        );
        assert!(
            stderr(&output).contains(named),
            "{more:?}: {}",
            stderr(&output)
        );
        assert!(!Path::new(&out).exists());
    }
    let output = convert(&[
        "--num-heads",
        "2",
        "--mean",
        "0.1,0.2,0.3",
        "--std",
        "1,2,3",
    ]);
    assert!(output.status.success(), "{}", stderr(&output));
    assert!(
        stdout(&output).contains("38 of 38 tensors loaded"),
        "{}",
        stdout(&output)
    );
    let encoder = exchange::read(Path::new(&out), &Hints::default()).unwrap();
    assert_eq!(
        (encoder.vit, encoder.values == flat(&layout, &ours)),
        (VIT, true)
    );
    assert_eq!(encoder.preprocessing.unwrap().mean, [0.1, 0.2, 0.3]);
    let output = pcae(BINARY, &["convert", &out, "--out", &out]);
    assert_eq!(output.status.code(), Some(2));

    let data = place.path("data");
    idx_folder(&data, 16, 8);
    let run = text(&place.path("run"));
    let fixed = ["pretrain", "--data", data.to_str().unwrap(), "--out", &run];
    let few = ["--batch-size", "8", "--steps", "2", "--set", "momentum=0.5"];
    let output = pcae(BINARY, &[&fixed[..], &few, TINY].concat());
    assert!(output.status.success(), "{}", stderr(&output));
    let checkpoint = Path::new(&run).join("checkpoints/last.safetensors");
    let reader = Reader::open(&checkpoint).unwrap();
    for prefix in ["", "teacher."] {
        let output = pcae(
            BINARY,
            &["convert", &run, "--prefix", prefix, "--out", &out],
        );
        assert!(output.status.success(), "{}", stderr(&output));
        assert!(
            stdout(&output).contains("0 missing, 0 unexpected"),
            "{}",
            stdout(&output)
        );
        let encoder = exchange::read(Path::new(&out), &Hints::default()).unwrap();
        let mut want = Vec::new();
        Layout::encoder(&encoder.vit).for_each(|tensor| {
            let name = format!("{prefix}{}", tensor.name);
            want.extend(reader.tensor_f32(&name, tensor.shape()).unwrap());
        });
        assert!(encoder.values == want, "{prefix:?}");
        assert_eq!(encoder.decoder.is_some(), prefix.is_empty());
        assert!(encoder.preprocessing.is_some());
    }
}
