//! Where tensors lie, what they are called, and that the fixtures call them so too.

use std::collections::BTreeMap;
use std::path::Path;

use pcae_kernel::backend::Span;
use pcae_kernel::config::{ClassifierConfig, Pool, PretrainConfig, Reduction, Target};
use pcae_kernel::config::{DecoderConfig, VitConfig};
use pcae_kernel::error::Error;
use pcae_kernel::init::init;
use pcae_kernel::layout::{Kind, Layout, Tensor, sincos_2d};
use safetensors::SafeTensors;
use serde_json::Value;

const VIT: VitConfig = VitConfig {
    img_size: [12, 20],
    in_chans: 3,
    patch_size: 4,
    embed_dim: 8,
    depth: 2,
    num_heads: 2,
    mlp_ratio: 2.5,
};

const DECODER: DecoderConfig = DecoderConfig {
    embed_dim: 12,
    depth: 3,
    num_heads: 3,
};

fn classifier(vit: VitConfig, num_classes: usize) -> ClassifierConfig {
    ClassifierConfig {
        vit,
        num_classes,
        pool: Pool::Mean,
        reduction: Reduction::NONE,
    }
}

fn layouts() -> [Layout; 4] {
    [
        Layout::encoder(&VIT),
        Layout::with_decoder(&VIT, &DECODER, 7),
        Layout::classifier(&classifier(VIT, 5)),
        Layout::classifier(&ClassifierConfig {
            pool: Pool::ClsToken,
            ..classifier(VIT, 6)
        }),
    ]
}

fn tensors(layout: &Layout) -> Vec<Tensor> {
    let mut tensors = Vec::new();
    layout.for_each(|tensor| tensors.push(tensor));
    tensors
}

/// Spans follow each other in the order of the visit, without gap or overlap, from 0 to `len`; each holds its shape.
#[test]
fn spans_tile_the_vector() {
    for layout in layouts() {
        let mut end = 0;
        for tensor in tensors(&layout) {
            assert_eq!(tensor.span.start, end, "{}", tensor.name);
            let elements: usize = tensor.shape().iter().product();
            assert_eq!(tensor.span.len, elements, "{}", tensor.name);
            end = tensor.span.end();
        }
        assert_eq!(end, layout.len());
        assert!(!layout.is_empty());
    }
}

/// The encoder has the same spans in all layouts, so that a teacher's parameters are a student's front.
#[test]
fn the_encoder_is_the_front_of_every_layout() {
    let encoder = Layout::encoder(&VIT);
    assert_eq!(encoder.encoder_len(), encoder.len());
    for layout in layouts() {
        assert_eq!(layout.encoder_len(), encoder.len());
        assert_eq!(layout.encoder, encoder.encoder);
        for (ours, its) in tensors(&encoder).iter().zip(tensors(&layout)) {
            assert_eq!((ours.span, ours.kind), (its.span, its.kind));
        }
    }
}

/// A mean of tokens has a norm of its own; the class token has the encoder's.
#[test]
fn the_last_norm_is_named_by_what_it_norms() {
    let [.., mean, cls_token] = layouts();
    assert!(mean.find("fc_norm.weight").is_some() && mean.find("norm.weight").is_none());
    assert!(cls_token.find("fc_norm.weight").is_none() && cls_token.find("norm.weight").is_some());
}

/// A moving average covers all but a decoder.
#[test]
fn what_a_teacher_holds() {
    let [encoder, pretrain, mean, cls_token] = layouts();
    assert_eq!(encoder.teacher(), encoder);
    assert_eq!(pretrain.teacher(), encoder);
    assert_eq!(mean.teacher(), mean);
    assert_eq!(cls_token.teacher(), cls_token);
}

/// What operations name by span is what the visit names by text.
#[test]
fn blocks_and_names_agree() {
    let layout = Layout::with_decoder(&VIT, &DECODER, 7);
    let span = |name: &str| layout.find(name).unwrap().span;
    let second = layout.encoder.blocks.block(1);
    assert_eq!(second.norm1.weight, span("blocks.1.norm1.weight"));
    assert_eq!(second.qkv.bias, span("blocks.1.attn.qkv.bias"));
    assert_eq!(second.proj.weight, span("blocks.1.attn.proj.weight"));
    assert_eq!(second.norm2.bias, span("blocks.1.norm2.bias"));
    assert_eq!(second.fc1.weight, span("blocks.1.mlp.fc1.weight"));
    assert_eq!(second.fc2.weight, span("blocks.1.mlp.fc2.weight"));
    let pcae_kernel::layout::Tail::Decoder(decoder) = layout.tail else {
        panic!("a decoder was asked for");
    };
    let third = decoder.blocks.block(2);
    assert_eq!(third.fc2.bias, span("decoder_blocks.2.mlp.fc2.bias"));
    assert_eq!(decoder.mask_token, span("mask_token"));
    assert_eq!(decoder.pred.weight, span("decoder_pred.weight"));
    assert_eq!(decoder.target_dim, 7);
    assert_eq!(
        layout.encoder.embed(true).cls_token,
        Some(span("cls_token"))
    );
    assert_eq!(layout.encoder.embed(false).cls_token, None);
}

/// Every tensor is found by its own name and no other, and prefixes or longer texts are no names.
#[test]
fn names_are_unique() {
    for layout in layouts() {
        let all = tensors(&layout);
        for tensor in &all {
            let text = tensor.name.to_string();
            assert_eq!(all.iter().filter(|other| other.name.is(&text)).count(), 1);
            assert_eq!(layout.find(&text), Some(*tensor));
            assert!(!tensor.name.is(&format!("{text}x")) && !tensor.name.is(&text[1..]));
            assert!(!tensor.name.is(&text[..text.len() - 1]));
        }
        for text in [
            "",
            ".",
            "blocks",
            "blocks.2.norm1.weight",
            "blocks.01.norm1.weight",
        ] {
            assert_eq!(layout.find(text), None, "{text}");
        }
    }
    let block = |name: &str| layouts()[1].find(name).unwrap().name.block();
    assert_eq!(block("blocks.1.mlp.fc1.bias"), Some((1, true)));
    assert_eq!(block("decoder_blocks.2.mlp.fc1.bias"), Some((2, false)));
    assert_eq!(block("decoder_norm.bias"), None);
}

/// Weights decay; biases, norms, tokens, the fixed positions and what is a vector in truth do not.
#[test]
fn decay_and_training_by_kind() {
    for layout in layouts() {
        for tensor in tensors(&layout) {
            let name = tensor.name.to_string();
            let is_weight = name.ends_with(".weight") && !name.contains("norm");
            assert_eq!(tensor.decays(), is_weight, "{name}");
            assert_eq!(tensor.is_trained(), !name.ends_with("pos_embed"), "{name}");
            let kind = match name.rsplit('.').next().unwrap() {
                "bias" => Kind::Bias,
                "weight" if is_weight => Kind::Weight,
                "weight" => Kind::Norm,
                "cls_token" | "mask_token" => Kind::Token,
                _ => Kind::Position,
            };
            assert_eq!(tensor.kind, kind, "{name}");
        }
    }
    // One class: a head of shape [1, dim] is a vector, which the oracle squeezes before it counts dimensions.
    let head = Layout::classifier(&classifier(VIT, 1));
    assert!(!head.find("head.weight").unwrap().decays());
}

struct Fixture {
    name: String,
    bytes: Vec<u8>,
}

impl Fixture {
    fn all() -> Vec<Self> {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures");
        let mut fixtures = Vec::new();
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.extension().is_some_and(|end| end == "safetensors") {
                let bytes = std::fs::read(&path).unwrap();
                let name = path.display().to_string();
                fixtures.push(Self { name, bytes });
            }
        }
        assert!(fixtures.len() >= 6, "the golden fixtures are gone");
        fixtures
    }

    fn layout(&self) -> Layout {
        let (_, metadata) = SafeTensors::read_metadata(&self.bytes).unwrap();
        let text = &metadata.metadata().as_ref().unwrap()["config"];
        let config: Value = serde_json::from_str(text).unwrap();
        let size = |value: &Value| value.as_u64().unwrap() as usize;
        let get = |key: &str| size(&config[key]);
        let vit = VitConfig {
            img_size: [size(&config["img_size"][0]), size(&config["img_size"][1])],
            in_chans: get("in_chans"),
            patch_size: get("patch_size"),
            embed_dim: get("embed_dim"),
            depth: get("depth"),
            num_heads: get("num_heads"),
            mlp_ratio: config["mlp_ratio"].as_f64().unwrap(),
        };
        let pretrain = |target| PretrainConfig {
            vit,
            decoder: DecoderConfig {
                embed_dim: get("decoder_embed_dim"),
                depth: get("decoder_depth"),
                num_heads: get("decoder_num_heads"),
            },
            mask_ratio: config["mask_ratio"].as_f64().unwrap(),
            target,
        };
        match config["task"].as_str().unwrap() {
            "pcae" => Layout::pretrain(&pretrain(Target::Teacher(Reduction::NONE))),
            "mae" => Layout::pretrain(&pretrain(Target::Pixels { norm_pix: true })),
            "classify" => Layout::classifier(&classifier(vit, get("num_classes"))),
            "encode" => Layout::encoder(&vit),
            other => panic!("a new task, {other}"),
        }
    }

    /// Shapes by name of the tensors whose names start with `prefix`.
    fn shapes(&self, prefix: &str) -> BTreeMap<String, Vec<usize>> {
        let file = SafeTensors::deserialize(&self.bytes).unwrap();
        let of = |(name, view): (&str, safetensors::tensor::TensorView<'_>)| {
            let name = name.strip_prefix(prefix)?.to_string();
            Some((name, view.shape().to_vec()))
        };
        file.iter().filter_map(of).collect()
    }

    fn values(&self, name: &str) -> Vec<f32> {
        let file = SafeTensors::deserialize(&self.bytes).unwrap();
        let bytes = file.tensor(name).unwrap();
        let words = bytes.data().chunks_exact(4);
        words
            .map(|word| f32::from_le_bytes(word.try_into().unwrap()))
            .collect()
    }
}

fn shapes_of(tensors: &[Tensor], pick: impl Fn(&Tensor) -> bool) -> BTreeMap<String, Vec<usize>> {
    let picked = tensors.iter().filter(|tensor| pick(tensor));
    picked
        .map(|tensor| (tensor.name.to_string(), tensor.shape().to_vec()))
        .collect()
}

/// Names and shapes of the oracle's parameters, teacher and gradients, all of them and no other.
#[test]
fn fixtures_have_these_names_and_shapes() {
    for fixture in Fixture::all() {
        let name = &fixture.name;
        let layout = fixture.layout();
        let all = tensors(&layout);
        assert_eq!(
            fixture.shapes("param."),
            shapes_of(&all, |_| true),
            "{name}"
        );
        let teacher = fixture.shapes("teacher.");
        if !teacher.is_empty() {
            let front = |tensor: &Tensor| tensor.span.end() <= layout.encoder_len();
            assert_eq!(teacher, shapes_of(&all, front), "{name}");
        }
        let grads = fixture.shapes("grad.");
        if !grads.is_empty() {
            assert_eq!(grads, shapes_of(&all, Tensor::is_trained), "{name}");
        }
    }
}

/// The fixed positions are the oracle's: both are rounded to f32 once, from values that differ by a few roundings in f64,
/// so that one unit in the last place is all they may differ by (and where a sine is nearly 0, its argument's rounding).
#[test]
fn positions_of_the_fixtures() {
    for fixture in Fixture::all() {
        let layout = fixture.layout();
        let mut values = vec![f32::NAN; layout.len()];
        init(&layout, 0, &mut values).unwrap();
        for tensor in tensors(&layout)
            .iter()
            .filter(|tensor| !tensor.is_trained())
        {
            let want = fixture.values(&format!("param.{}", tensor.name));
            let found = &values[tensor.span.start..tensor.span.end()];
            assert_eq!(found.len(), want.len());
            for (i, (&found, &want)) in found.iter().zip(&want).enumerate() {
                let allowed = f32::EPSILON * want.abs() + 1e-14;
                let name = tensor.name;
                assert!(
                    (found - want).abs() <= allowed,
                    "{name}[{i}]: {found:e}, not {want:e}"
                );
            }
        }
    }
}

/// Columns come before rows, sines before cosines, by values written out.
#[test]
fn positions_by_hand() {
    let mut table = [f32::NAN; 7 * 8 + 1];
    sincos_2d(&mut table, 8, [2, 3]).unwrap();
    assert_eq!(table[..8], [0.0; 8], "the class token has no position");
    // Patch 5 of 2 rows of 3 is at column 2, row 1; frequencies are 1 and 1/100.
    let angles: [f64; 4] = [2.0, 0.02, 1.0, 0.01];
    let want = [
        angles[0].sin(),
        angles[1].sin(),
        angles[0].cos(),
        angles[1].cos(),
        angles[2].sin(),
        angles[3].sin(),
        angles[2].cos(),
        angles[3].cos(),
    ];
    for (found, want) in table[6 * 8..7 * 8].iter().zip(want) {
        assert!((f64::from(*found) - want).abs() < f64::from(f32::EPSILON));
    }
    assert!(table[7 * 8].is_nan(), "nothing is written behind the table");

    let mut short = [f32::NAN; 55];
    for (dim, grid) in [(0, [2, 3]), (6, [2, 3]), (8, [2, 3]), (8, [usize::MAX; 2])] {
        sincos_2d(&mut short, dim, grid).unwrap_err();
    }
    assert!(short.iter().all(|x| x.is_nan()));
    sincos_2d(&mut short, 8, [0, 3]).unwrap();
}

/// Each tensor starts as its kind does, from its own stream: another seed, or another tensor, has other numbers.
#[test]
fn initial_parameters() {
    let layout = Layout::with_decoder(&VIT, &DECODER, 7);
    let (mut values, mut other) = (vec![f32::NAN; layout.len()], vec![0.0; layout.len()]);
    init(&layout, 1, &mut values).unwrap();
    init(&layout, 2, &mut other).unwrap();
    for tensor in tensors(&layout) {
        let name = tensor.name;
        let of = |values: &[f32]| values[tensor.span.start..tensor.span.end()].to_vec();
        let (values, other) = (of(&values), of(&other));
        match tensor.kind {
            Kind::Bias => assert!(values.iter().all(|&x| x == 0.0), "{name}"),
            Kind::Norm => assert!(values.iter().all(|&x| x == 1.0), "{name}"),
            Kind::Position => assert_eq!(values, other, "{name}"),
            Kind::Token => {
                // Twelve numbers of standard deviation 0.02: six of them would be 0.12 away by chance 1 in 10⁹.
                assert!(values.iter().all(|x| x.abs() < 0.12), "{name}");
                assert_ne!(values, other, "{name}");
            }
            Kind::Weight => {
                let fan_out = tensor.shape()[0];
                let bound = (6.0 / (fan_out + values.len() / fan_out) as f64).sqrt() as f32;
                let largest = values.iter().fold(0f32, |a, b| a.max(b.abs()));
                // The largest of at least 84 uniform numbers is below 0.9 of the bound by chance 1 in 7000.
                assert!(largest <= bound && largest > 0.9 * bound, "{name}");
                assert_ne!(values, other, "{name}");
            }
        }
    }
    let first = layout.find("blocks.0.attn.proj.weight").unwrap().span.start;
    let second = layout.find("blocks.1.attn.proj.weight").unwrap().span.start;
    assert_ne!(values[first..][..64], values[second..][..64]);
    let error = init(&layout, 1, &mut values[1..]).unwrap_err();
    assert!(matches!(error, Error::TooShort { op: "init", .. }));
}

/// A span that no memory holds ends at the largest number, not at a small one.
#[test]
fn spans_saturate() {
    let span = Span {
        start: usize::MAX,
        len: 2,
    };
    assert_eq!(span.end(), usize::MAX);
}
