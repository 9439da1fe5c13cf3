//! An encoder or a classifier as an ONNX file (opset 17), dense or with token reduction, for runtimes that are not this project's.
//!
//! | input or output | shape | what |
//! |---|---|---|
//! | `images` | `[batch, channels, height, width]` | pixels, normalised with the `mean` and `std` among the metadata |
//! | `logits` | `[batch, classes]` | of a classifier |
//! | `tokens` | `[batch, 1 + patches, width]` | of an encoder: class token and patches after the last norm |
//! | `ids` | `[batch, patches]` | of an encoder with token reduction: which patches are left, in the order of `tokens` |
//!
//! Among the metadata are also the `drop_ratio`, and the names of a classifier's `classes` as JSON, in the order of `logits`.
//!
//! The number of tokens is static, as it is here: a reduction really leaves fewer rows to compute.

mod graph;
mod proto;

use std::io;
use std::path::Path;

use pcae_kernel::backend::{Linear, NORM_EPS, Norm, SCORE_EPS, Span};
use pcae_kernel::config::{Budget, Reduction, VitConfig};
use pcae_kernel::layout::{BlockParams, Layout};
use prost::Message;

use crate::checkpoint::exchange::{Encoder, Head, Pooling};
use crate::durable::atomic_write;
use crate::error::Error;
use graph::{Attr, Graph};
use proto::{DataType, IR_VERSION, ModelProto, OPSET, OperatorSetIdProto, StringStringEntryProto};

pub use graph::Batch;

/// What protocol buffers can hold, with room for names.
const MAX_BYTES: usize = (1 << 31) - (1 << 20);

/// Writes `encoder`, or the classifier that it is part of if `with_head` is set and there is one, atomically.
///
/// # Errors
/// [`Error::Setting`] or [`Error::Config`] if the reduction does not fit or the file would be too large for the format;
/// [`Error::Io`] if the disk fails, a previous file is then intact.
pub fn export(
    path: &Path,
    encoder: &Encoder,
    reduction: &Reduction,
    batch: Batch,
    with_head: bool,
) -> Result<(), Error> {
    let vit = &encoder.vit;
    reduction.check(vit.num_patches(), vit.depth)?;
    let head = encoder.head.as_ref().filter(|_| with_head);
    let bytes = 4 * (encoder.values.len() + head.map_or(0, |head| head.weight.len()));
    if bytes > MAX_BYTES {
        return Err(Error::Setting {
            name: "--out".to_owned(),
            reason: format!(
                "expected an encoder of at most {MAX_BYTES} bytes, which one ONNX file can hold, found {bytes}; use a smaller one"
            ),
        });
    }
    let model = model(encoder, reduction, batch, head);
    atomic_write(path, |out| out.write_all(&model.encode_to_vec())).map_err(|error: io::Error| {
        Error::Io {
            what: format!("--out '{}'", path.display()),
            error,
        }
    })
}

fn model(
    encoder: &Encoder,
    reduction: &Reduction,
    batch: Batch,
    head: Option<&Head>,
) -> ModelProto {
    let vit = &encoder.vit;
    let mut builder = Builder {
        graph: Graph::default(),
        layout: Layout::encoder(vit),
        vit,
        values: &encoder.values,
        batch,
    };
    builder.network(reduction, head);
    let mut metadata = vec![(
        "img_size".to_owned(),
        format!("{},{}", vit.img_size[0], vit.img_size[1]),
    )];
    if let Some(preprocessing) = &encoder.preprocessing {
        for (key, values) in [("mean", &preprocessing.mean), ("std", &preprocessing.std)] {
            let values: Vec<String> = values.iter().map(f32::to_string).collect();
            metadata.push((key.to_owned(), values.join(",")));
        }
    }
    if let (Some(_), Some(classifier)) = (head, &encoder.classifier) {
        let classes = serde_json::json!(classifier.classes).to_string();
        metadata.push(("classes".to_owned(), classes));
    }
    if let Budget::Drop(drop_ratio) = reduction.budget {
        metadata.push(("drop_ratio".to_owned(), drop_ratio.to_string()));
    }
    ModelProto {
        ir_version: IR_VERSION,
        producer_name: "pcae".to_owned(),
        producer_version: env!("CARGO_PKG_VERSION").to_owned(),
        graph: Some(builder.graph.finish("vit")),
        opset_import: vec![OperatorSetIdProto {
            domain: String::new(),
            version: OPSET,
        }],
        metadata_props: metadata
            .into_iter()
            .map(|(key, value)| StringStringEntryProto { key, value })
            .collect(),
    }
}

struct Builder<'a> {
    graph: Graph,
    layout: Layout,
    vit: &'a VitConfig,
    values: &'a [f32],
    batch: Batch,
}

impl Builder<'_> {
    fn network(&mut self, reduction: &Reduction, head: Option<&Head>) {
        let (vit, encoder) = (self.vit, self.layout.encoder);
        let d = vit.embed_dim;
        let mut tokens = vit.num_patches();
        let mut x = self.embed();
        let mut ids = None;
        for block in 0..vit.depth {
            self.graph.scope = format!("blocks.{block}.");
            x = self.block(&x, encoder.blocks.block(block), block);
            if let Some(keep) = reduction.stage(Some(block), tokens) {
                self.graph.scope = format!("reduce.{block}.");
                x = self.reduce(&x, keep, &mut ids);
                tokens = keep;
            }
        }
        self.graph.scope = String::new();
        let Some(head) = head else {
            let normed = self.layer_norm("norm", &x, encoder.norm);
            self.graph.output(
                "tokens",
                &normed,
                DataType::Float,
                self.batch,
                &[1 + tokens, d],
            );
            if let Some(ids) = ids {
                self.graph
                    .output("ids", &ids, DataType::Int64, self.batch, &[tokens]);
            }
            return;
        };
        let seen = match head.pooling {
            Pooling::MeanThenNorm => {
                let patches = self.slice(&x, 1, i64::MAX);
                let over_tokens = [("axes", Attr::Ints(&[1])), ("keepdims", Attr::Int(0))];
                let mean = self.graph.node("ReduceMean", &[&patches], &over_tokens);
                self.layer_norm("fc_norm", &mean, encoder.norm)
            }
            Pooling::ClassToken => {
                let normed = self.layer_norm("norm", &x, encoder.norm);
                let first = self.graph.ints("index", &[0], false);
                self.graph
                    .node("Gather", &[&normed, &first], &[("axis", Attr::Int(1))])
            }
        };
        let weight = self
            .graph
            .floats("head.weight", &[head.num_classes, d], &head.weight);
        let bias = self
            .graph
            .floats("head.bias", &[head.num_classes], &head.bias);
        let logits = self.graph.node(
            "Gemm",
            &[&seen, &weight, &bias],
            &[("transB", Attr::Int(1))],
        );
        self.graph.output(
            "logits",
            &logits,
            DataType::Float,
            self.batch,
            &[head.num_classes],
        );
    }

    fn span(&self, span: Span) -> &[f32] {
        &self.values[span.start..span.end()]
    }

    /// Patches, positions, class token: `[batch, 1 + patches, dim]`.
    fn embed(&mut self) -> String {
        let (vit, encoder) = (self.vit, self.layout.encoder);
        let (d, patch, patches) = (vit.embed_dim, vit.patch_size, vit.num_patches());
        let [height, width] = vit.img_size;
        let images = self
            .graph
            .input("images", self.batch, &[vit.in_chans, height, width]);
        let shape = [d, vit.in_chans, patch, patch];
        let weight = self.span(encoder.patch_embed.weight).to_vec();
        let weight = self
            .graph
            .floats("patch_embed.proj.weight", &shape, &weight);
        let bias = self.span(encoder.patch_embed.bias).to_vec();
        let bias = self.graph.floats("patch_embed.proj.bias", &[d], &bias);
        let edges = [patch as i64, patch as i64];
        let attrs = [
            ("kernel_shape", Attr::Ints(&edges)),
            ("strides", Attr::Ints(&edges)),
        ];
        let x = self.graph.node("Conv", &[&images, &weight, &bias], &attrs);
        let x = self.reshape(&x, &[0, d as i64, patches as i64]);
        let x = self
            .graph
            .node("Transpose", &[&x], &[("perm", Attr::Ints(&[0, 2, 1]))]);
        let (first, rest) = self.span(encoder.pos_embed).split_at(d);
        let cls: Vec<f32> = first
            .iter()
            .zip(self.span(encoder.cls_token))
            .map(|(position, token)| position + token)
            .collect();
        let rest = rest.to_vec();
        let positions = self.graph.floats("pos_embed", &[1, patches, d], &rest);
        let x = self.graph.node("Add", &[&x, &positions], &[]);
        // As many class tokens as pictures.
        let cls = self.graph.floats("cls_token", &[1, 1, d], &cls);
        let batch = self.graph.node(
            "Shape",
            &[&images],
            &[("start", Attr::Int(0)), ("end", Attr::Int(1))],
        );
        let one = self.graph.ints("shape", &[1, d as i64], true);
        let shape = self
            .graph
            .node("Concat", &[&batch, &one], &[("axis", Attr::Int(0))]);
        let cls = self.graph.node("Expand", &[&cls, &shape], &[]);
        self.graph
            .node("Concat", &[&cls, &x], &[("axis", Attr::Int(1))])
    }

    fn block(&mut self, x: &str, params: BlockParams, index: usize) -> String {
        let (d, heads, hidden) = (
            self.vit.embed_dim,
            self.vit.num_heads,
            self.vit.mlp_hidden(),
        );
        let head_dim = d / heads;
        let name = |rest: &str| format!("blocks.{index}.{rest}");

        let y = self.layer_norm(&name("norm1"), x, params.norm1);
        let qkv = self.linear(&name("attn.qkv"), &y, params.qkv, [d, 3 * d]);
        let qkv = self.reshape(&qkv, &[0, 0, 3, heads as i64, head_dim as i64]);
        // [3, batch, heads, tokens, head_dim]
        let qkv = self.graph.node(
            "Transpose",
            &[&qkv],
            &[("perm", Attr::Ints(&[2, 0, 3, 1, 4]))],
        );
        let part = |graph: &mut Graph, part: i64| {
            let index = graph.ints("index", &[part], false);
            graph.node("Gather", &[&qkv, &index], &[("axis", Attr::Int(0))])
        };
        let (q, k, v) = (
            part(&mut self.graph, 0),
            part(&mut self.graph, 1),
            part(&mut self.graph, 2),
        );
        let scale = self.scalar("scale", 1.0 / (head_dim as f32).sqrt());
        let q = self.graph.node("Mul", &[&q, &scale], &[]);
        let k = self
            .graph
            .node("Transpose", &[&k], &[("perm", Attr::Ints(&[0, 1, 3, 2]))]);
        let scores = self.graph.node("MatMul", &[&q, &k], &[]);
        let weights = self
            .graph
            .node("Softmax", &[&scores], &[("axis", Attr::Int(-1))]);
        let y = self.graph.node("MatMul", &[&weights, &v], &[]);
        let y = self
            .graph
            .node("Transpose", &[&y], &[("perm", Attr::Ints(&[0, 2, 1, 3]))]);
        let y = self.reshape(&y, &[0, 0, d as i64]);
        let y = self.linear(&name("attn.proj"), &y, params.proj, [d, d]);
        let x = self.graph.node("Add", &[x, &y], &[]);

        let y = self.layer_norm(&name("norm2"), &x, params.norm2);
        let y = self.linear(&name("mlp.fc1"), &y, params.fc1, [d, hidden]);
        let y = self.gelu(&y);
        let y = self.linear(&name("mlp.fc2"), &y, params.fc2, [hidden, d]);
        self.graph.node("Add", &[&x, &y], &[])
    }

    /// Keeps the class token and the `keep` patch tokens least similar to their mean, in ascending order of similarity.
    fn reduce(&mut self, x: &str, keep: usize, ids: &mut Option<String>) -> String {
        let d = self.vit.embed_dim;
        let cls = self.slice(x, 0, 1);
        let patches = self.slice(x, 1, i64::MAX);
        let over = |axis: i64| [axis];
        let norm = self
            .graph
            .node("ReduceL2", &[&patches], &[("axes", Attr::Ints(&over(-1)))]);
        let least = self.scalar("eps", SCORE_EPS as f32);
        let norm = self.graph.node("Max", &[&norm, &least], &[]);
        let unit = self.graph.node("Div", &[&patches, &norm], &[]);
        let mean = self
            .graph
            .node("ReduceMean", &[&unit], &[("axes", Attr::Ints(&over(1)))]);
        let mean = self
            .graph
            .node("Transpose", &[&mean], &[("perm", Attr::Ints(&[0, 2, 1]))]);
        let scores = self.graph.node("MatMul", &[&unit, &mean], &[]);
        let picked = self.graph.least(&scores, keep, 1);
        let shape = self.graph.ints("shape", &[1, 1, d as i64], true);
        let everywhere = self.graph.node("Expand", &[&picked, &shape], &[]);
        let along = [("axis", Attr::Int(1))];
        let kept = self
            .graph
            .node("GatherElements", &[&patches, &everywhere], &along);
        let axis = self.graph.ints("axes", &[2], true);
        let picked = self.graph.node("Squeeze", &[&picked, &axis], &[]);
        *ids = Some(match ids {
            None => picked,
            Some(ids) => self.graph.node("GatherElements", &[ids, &picked], &along),
        });
        self.graph.node("Concat", &[&cls, &kept], &along)
    }

    /// Tokens `start..end`.
    fn slice(&mut self, x: &str, start: i64, end: i64) -> String {
        let [start, end, axis] = [("start", start), ("end", end), ("axes", 1)]
            .map(|(name, v)| self.graph.ints(name, &[v], true));
        self.graph.node("Slice", &[x, &start, &end, &axis], &[])
    }

    /// To a shape in which 0 stands for the dimension that is there.
    fn reshape(&mut self, x: &str, shape: &[i64]) -> String {
        let shape = self.graph.ints("shape", shape, true);
        self.graph.node("Reshape", &[x, &shape], &[])
    }

    fn scalar(&mut self, name: &str, value: f32) -> String {
        let name = format!("{}{name}", self.graph.scope);
        self.graph.floats(&name, &[], &[value])
    }

    fn layer_norm(&mut self, name: &str, x: &str, norm: Norm) -> String {
        let dim = [self.vit.embed_dim];
        let (weight, bias) = (
            self.span(norm.weight).to_vec(),
            self.span(norm.bias).to_vec(),
        );
        let weight = self.graph.floats(&format!("{name}.weight"), &dim, &weight);
        let bias = self.graph.floats(&format!("{name}.bias"), &dim, &bias);
        let attrs = [
            ("axis", Attr::Int(-1)),
            ("epsilon", Attr::Float(NORM_EPS as f32)),
        ];
        self.graph
            .node("LayerNormalization", &[x, &weight, &bias], &attrs)
    }

    /// `x @ weight^T + bias`, the weight stored transposed.
    fn linear(&mut self, name: &str, x: &str, linear: Linear, [from, to]: [usize; 2]) -> String {
        let weight = self.span(linear.weight);
        let transposed: Vec<f32> = (0..from * to)
            .map(|at| weight[(at % to) * from + at / to])
            .collect();
        let bias = self.span(linear.bias).to_vec();
        let weight = self
            .graph
            .floats(&format!("{name}.weight"), &[from, to], &transposed);
        let bias = self.graph.floats(&format!("{name}.bias"), &[to], &bias);
        let product = self.graph.node("MatMul", &[x, &weight], &[]);
        self.graph.node("Add", &[&product, &bias], &[])
    }

    /// `x / 2 * (1 + erf(x / sqrt(2)))`, in the form that runtimes recognise.
    fn gelu(&mut self, x: &str) -> String {
        let root = self.scalar("sqrt2", std::f32::consts::SQRT_2);
        let one = self.scalar("one", 1.0);
        let half = self.scalar("half", 0.5);
        let y = self.graph.node("Div", &[x, &root], &[]);
        let y = self.graph.node("Erf", &[&y], &[]);
        let y = self.graph.node("Add", &[&y, &one], &[]);
        let y = self.graph.node("Mul", &[x, &y], &[]);
        self.graph.node("Mul", &[&y, &half], &[])
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use pcae_kernel::config::{Criterion, DropLayers, Place};
    use serde_json::Value;

    use super::*;
    use crate::checkpoint::exchange::{Classifier, Report};

    const VIT: VitConfig = VitConfig {
        img_size: [6, 9],
        in_chans: 2,
        patch_size: 3,
        embed_dim: 8,
        depth: 3,
        num_heads: 2,
        mlp_ratio: 1.5,
    };

    fn encoder(pooling: Option<Pooling>) -> Encoder {
        let len = Layout::encoder(&VIT).len();
        Encoder {
            path: "x".into(),
            title: "x".to_owned(),
            kept: std::collections::BTreeMap::new(),
            vit: VIT,
            values: (0..len).map(|i| i as f32).collect(),
            preprocessing: None,
            head: pooling.map(|pooling| Head {
                num_classes: 5,
                weight: vec![0.5; 40],
                bias: vec![0.25; 5],
                pooling,
            }),
            classifier: pooling.map(|_| Classifier {
                classes: ["a", "b", "c, d", "\"", "0"].map(str::to_owned).to_vec(),
                config: Value::Null,
            }),
            decoder: None,
            report: Report::default(),
        }
    }

    fn reduction(drop_ratio: f64) -> Reduction {
        Reduction {
            criterion: Criterion::MeanSimilarity,
            place: Place::Progressive,
            drop_layers: DropLayers::new(&[0, 2], 3).unwrap(),
            budget: Budget::Drop(drop_ratio),
        }
    }

    /// Writes and decodes again; every value is made before it is used, once, and every constant is used.
    fn written(encoder: &Encoder, reduction: &Reduction, batch: Batch) -> ModelProto {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.onnx");
        export(&path, encoder, reduction, batch, true).unwrap();
        let model = ModelProto::decode(&std::fs::read(path).unwrap()[..]).unwrap();
        let graph = model.graph.as_ref().unwrap();
        let mut made: BTreeSet<&str> = graph
            .input
            .iter()
            .map(|input| input.name.as_str())
            .collect();
        for constant in &graph.initializer {
            assert!(made.insert(&constant.name), "{}", constant.name);
            let size = if constant.data_type() == DataType::Float {
                4
            } else {
                8
            };
            let elements: i64 = constant.dims.iter().product();
            assert_eq!(
                constant.raw_data.len() as i64,
                size * elements,
                "{}",
                constant.name
            );
        }
        let mut used = BTreeSet::new();
        for node in &graph.node {
            for input in &node.input {
                assert!(made.contains(input.as_str()), "{} needs {input}", node.name);
                used.insert(input.as_str());
            }
            for output in &node.output {
                assert!(made.insert(output), "{output} is made twice");
            }
        }
        for constant in &graph.initializer {
            assert!(
                used.contains(constant.name.as_str()),
                "{} is not used",
                constant.name
            );
        }
        for output in &graph.output {
            assert!(made.contains(output.name.as_str()));
        }
        model
    }

    fn shape(value: &proto::ValueInfoProto) -> Vec<String> {
        let tensor = value.r#type.as_ref().unwrap().tensor_type.as_ref().unwrap();
        let dims = tensor.shape.as_ref().unwrap().dim.iter();
        dims.map(|dim| match (&dim.dim_value, &dim.dim_param) {
            (Some(size), None) => size.to_string(),
            (None, Some(name)) => name.clone(),
            other => panic!("{other:?}"),
        })
        .collect()
    }

    #[test]
    fn graphs_are_whole() {
        let graph = |model: ModelProto| model.graph.unwrap();
        let count = |graph: &proto::GraphProto, op: &str| {
            graph.node.iter().filter(|node| node.op_type == op).count()
        };
        let dense = written(&encoder(None), &reduction(0.0), Batch::Dynamic);
        assert_eq!((dense.ir_version, dense.opset_import[0].version), (8, 17));
        let dense = graph(dense);
        assert_eq!(shape(&dense.input[0]), ["batch", "2", "6", "9"]);
        assert_eq!(dense.output.len(), 1);
        assert_eq!(shape(&dense.output[0]), ["batch", "7", "8"]);
        assert_eq!((count(&dense, "TopK"), count(&dense, "Softmax")), (0, 3));

        // ceil(6 * 0.6) = 4 and ceil(4 * 0.6) = 3 patches stay.
        let reduced = graph(written(&encoder(None), &reduction(0.4), Batch::Fixed(2)));
        assert_eq!(count(&reduced, "TopK"), 2);
        assert_eq!(shape(&reduced.output[0]), ["2", "4", "8"]);
        assert_eq!(reduced.output[1].name, "ids");
        assert_eq!(shape(&reduced.output[1]), ["2", "3"]);

        for pooling in [Pooling::MeanThenNorm, Pooling::ClassToken] {
            let model = written(&encoder(Some(pooling)), &reduction(0.4), Batch::Dynamic);
            let classes = model
                .metadata_props
                .iter()
                .find(|entry| entry.key == "classes");
            let classes: Vec<String> = serde_json::from_str(&classes.unwrap().value).unwrap();
            assert_eq!(classes, ["a", "b", "c, d", "\"", "0"]);
            let classifier = graph(model);
            assert_eq!(classifier.output[0].name, "logits");
            assert_eq!(shape(&classifier.output[0]), ["batch", "5"]);
        }
    }

    #[test]
    fn weights_are_those_of_the_checkpoint() {
        let encoder = encoder(None);
        let model = written(&encoder, &reduction(0.4), Batch::Dynamic);
        let graph = model.graph.unwrap();
        let fc1 = Layout::encoder(&VIT)
            .find("blocks.1.mlp.fc1.weight")
            .unwrap();
        let found = graph
            .initializer
            .iter()
            .find(|c| c.name == "blocks.1.mlp.fc1.weight")
            .unwrap();
        assert_eq!(found.dims, [8, 12]);
        let (values, _) = found.raw_data.as_chunks::<4>();
        for (at, value) in values.iter().enumerate() {
            let (input, output) = (at / 12, at % 12);
            let want = encoder.values[fc1.span.start + output * 8 + input];
            assert_eq!(f32::from_le_bytes(*value), want);
        }
    }

    #[test]
    fn a_reduction_that_leaves_nothing_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.onnx");
        let error =
            export(&path, &encoder(None), &reduction(1.0), Batch::Dynamic, true).unwrap_err();
        assert!(
            error.is_usage() && error.to_string().contains("--drop-ratio"),
            "{error}"
        );
        assert!(!path.exists());
    }
}
