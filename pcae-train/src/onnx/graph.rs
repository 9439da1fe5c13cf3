//! Building a graph node by node.

use super::proto::{
    AttributeProto, AttributeType, DataType, Dimension, GraphProto, NodeProto, TensorProto,
    TensorShapeProto, TensorType, TypeProto, ValueInfoProto,
};

/// A value of an attribute.
pub(super) enum Attr<'a> {
    Int(i64),
    Float(f32),
    Ints(&'a [i64]),
}

/// The first dimension of inputs and outputs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Batch {
    /// Any number of pictures.
    Dynamic,
    /// This number.
    Fixed(usize),
}

/// A graph under construction. Values are known by their names.
#[derive(Default)]
pub(super) struct Graph {
    proto: GraphProto,
    /// In front of the names of nodes.
    pub(super) scope: String,
}

impl Graph {
    /// Adds a node with one output, and returns that.
    pub(super) fn node(&mut self, op: &str, inputs: &[&str], attrs: &[(&str, Attr<'_>)]) -> String {
        let name = self.next_name(op);
        self.push(op, name.clone(), inputs, vec![name.clone()], attrs);
        name
    }

    /// Adds a `TopK` of the `k` least values along `axis`, sorted, and returns their indices.
    pub(super) fn least(&mut self, x: &str, k: usize, axis: i64) -> String {
        let k = self.ints("k", &[k as i64], true);
        let name = self.next_name("TopK");
        let (values, indices) = (format!("{name}.values"), format!("{name}.indices"));
        let attrs = [
            ("axis", Attr::Int(axis)),
            ("largest", Attr::Int(0)),
            ("sorted", Attr::Int(1)),
        ];
        self.push(
            "TopK",
            name,
            &[x, &k],
            vec![values, indices.clone()],
            &attrs,
        );
        indices
    }

    fn next_name(&self, op: &str) -> String {
        format!("{}{op}_{}", self.scope, self.proto.node.len())
    }

    fn push(
        &mut self,
        op: &str,
        name: String,
        inputs: &[&str],
        outputs: Vec<String>,
        attrs: &[(&str, Attr<'_>)],
    ) {
        let attribute = attrs.iter().map(|(name, value)| {
            let mut attribute = AttributeProto {
                name: (*name).to_owned(),
                ..AttributeProto::default()
            };
            let kind = match *value {
                Attr::Int(value) => {
                    attribute.i = Some(value);
                    AttributeType::Int
                }
                Attr::Float(value) => {
                    attribute.f = Some(value);
                    AttributeType::Float
                }
                Attr::Ints(values) => {
                    attribute.ints = values.to_vec();
                    AttributeType::Ints
                }
            };
            attribute.set_type(kind);
            attribute
        });
        self.proto.node.push(NodeProto {
            input: inputs.iter().map(|&input| input.to_owned()).collect(),
            output: outputs,
            name,
            op_type: op.to_owned(),
            attribute: attribute.collect(),
        });
    }

    /// Adds a constant of f32 and returns its name.
    pub(super) fn floats(&mut self, name: &str, shape: &[usize], values: &[f32]) -> String {
        let raw = values
            .iter()
            .flat_map(|value| value.to_le_bytes())
            .collect();
        let dims = shape.iter().map(|&dim| dim as i64).collect();
        self.constant(name, dims, DataType::Float, raw)
    }

    /// Adds a constant of integers, a vector or a single one, and returns its name.
    pub(super) fn ints(&mut self, name: &str, values: &[i64], vector: bool) -> String {
        let raw = values
            .iter()
            .flat_map(|value| value.to_le_bytes())
            .collect();
        let dims = if vector {
            vec![values.len() as i64]
        } else {
            Vec::new()
        };
        // Which have no name in the checkpoint, and may occur often.
        let name = format!("{}{name}_{}", self.scope, self.proto.initializer.len());
        self.constant(&name, dims, DataType::Int64, raw)
    }

    fn constant(&mut self, name: &str, dims: Vec<i64>, kind: DataType, raw: Vec<u8>) -> String {
        self.proto.initializer.push(TensorProto {
            dims,
            data_type: kind.into(),
            name: name.to_owned(),
            raw_data: raw,
        });
        name.to_owned()
    }

    /// Declares an input of f32.
    pub(super) fn input(&mut self, name: &str, batch: Batch, shape: &[usize]) -> String {
        self.proto
            .input
            .push(value_info(name, DataType::Float, batch, shape));
        name.to_owned()
    }

    /// Declares `value` as an output called `name`.
    pub(super) fn output(
        &mut self,
        name: &str,
        value: &str,
        kind: DataType,
        batch: Batch,
        shape: &[usize],
    ) {
        self.push(
            "Identity",
            format!("output {name}"),
            &[value],
            vec![name.to_owned()],
            &[],
        );
        self.proto.output.push(value_info(name, kind, batch, shape));
    }

    pub(super) fn finish(self, name: &str) -> GraphProto {
        GraphProto {
            name: name.to_owned(),
            ..self.proto
        }
    }
}

fn value_info(name: &str, kind: DataType, batch: Batch, shape: &[usize]) -> ValueInfoProto {
    let fixed = |size: usize| Dimension {
        dim_value: Some(size as i64),
        dim_param: None,
    };
    let batch = match batch {
        Batch::Fixed(size) => fixed(size),
        Batch::Dynamic => Dimension {
            dim_value: None,
            dim_param: Some("batch".to_owned()),
        },
    };
    let dim = std::iter::once(batch).chain(shape.iter().map(|&size| fixed(size)));
    ValueInfoProto {
        name: name.to_owned(),
        r#type: Some(TypeProto {
            tensor_type: Some(TensorType {
                elem_type: kind.into(),
                shape: Some(TensorShapeProto { dim: dim.collect() }),
            }),
        }),
    }
}
