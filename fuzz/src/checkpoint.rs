use std::collections::BTreeMap;
use std::io::Cursor;
use std::path::Path;

use pcae_train::checkpoint::file::{Dtype, FileError, Reader, Tensor, TensorData, write};

use crate::allocations::peak;

/// Blocks of the reader and messages of errors.
const CONSTANT: usize = 1 << 18;
/// The header `[0,0,0,…` is the worst: two bytes become a buffered JSON value of 32 in a vector that doubles.
const PER_BYTE: usize = 64;

/// A tensor's values.
#[derive(Debug)]
enum Values {
    F32(Vec<f32>),
    I64(Vec<i64>),
    U64(Vec<u64>),
}

impl Values {
    fn data(&self) -> TensorData<'_> {
        match self {
            Self::F32(values) => TensorData::F32(values),
            Self::I64(values) => TensorData::I64(values),
            Self::U64(values) => TensorData::U64(values),
        }
    }

    /// Equal values have equal bits, NaN too.
    fn bits(&self) -> Vec<u64> {
        match self {
            Self::F32(values) => values.iter().map(|x| x.to_bits().into()).collect(),
            Self::I64(values) => values.iter().map(|&x| x as u64).collect(),
            Self::U64(values) => values.clone(),
        }
    }
}

/// A tensor in whatever type the reader supports; an error for the others.
fn read<R: std::io::Read + std::io::Seek>(
    reader: &Reader<R>,
    name: &str,
) -> Result<Values, FileError> {
    let shape = reader.shape(name).expect("a listed tensor has a shape");
    match reader.dtype(name).expect("a listed tensor has a type") {
        Dtype::I64 => reader.tensor_i64(name).map(Values::I64),
        Dtype::U64 => reader.tensor_u64(name).map(Values::U64),
        _ => reader.tensor_f32(name, shape).map(Values::F32),
    }
}

fn check_message(error: &FileError) {
    let message = error.to_string();
    assert!(!message.contains('\n'), "{message}");
}

/// Opens the bytes as a checkpoint and reads everything in it.
///
/// Oracle: memory is bounded by the file's length, every tensor of a supported type is read and has as many values as
/// its shape says, and a file written from them reads back equal to the bit.
pub fn checkpoint(bytes: &[u8]) {
    let limit = CONSTANT + PER_BYTE * bytes.len();
    let (opened, memory) = peak(|| Reader::new(Path::new("fuzzed"), Cursor::new(bytes)));
    assert!(memory <= limit, "{memory} bytes to open {}", bytes.len());
    let reader = match opened {
        Ok(reader) => reader,
        Err(error) => return check_message(&error),
    };
    let metadata: BTreeMap<String, String> = reader
        .metadata()
        .into_iter()
        .map(|(key, value)| (key.to_owned(), value.to_owned()))
        .collect();

    let mut read_values = Vec::new();
    for name in reader.names() {
        let (values, memory) = peak(|| read(&reader, &name));
        assert!(
            memory <= limit,
            "{memory} bytes to read {name:?} of {}",
            bytes.len()
        );
        let shape = reader.shape(&name).expect("a listed tensor has a shape");
        let mut other_shape = shape.to_vec();
        other_shape.push(1);
        let error = reader.tensor_f32(&name, &other_shape).unwrap_err();
        assert!(matches!(error, FileError::WrongShape { .. }), "{error}");
        match values {
            Ok(values) => {
                assert_eq!(values.bits().len(), shape.iter().product::<usize>());
                read_values.push((name, shape.to_vec(), values));
            }
            Err(error) => {
                check_message(&error);
                let wrong_type = matches!(error, FileError::WrongDtype { .. });
                assert!(
                    wrong_type,
                    "a tensor that the header describes cannot be read: {error}"
                );
            }
        }
    }

    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("copy.safetensors");
    let tensors: Vec<Tensor<'_>> = read_values
        .iter()
        .map(|(name, shape, values)| Tensor {
            name: name.clone(),
            shape: shape.clone(),
            data: values.data(),
        })
        .collect();
    write(&path, &metadata, &tensors).expect("what was read can be written");
    let copy = Reader::open(&path).expect("what was written can be read");
    let copied: BTreeMap<String, String> = copy
        .metadata()
        .into_iter()
        .map(|(key, value)| (key.to_owned(), value.to_owned()))
        .collect();
    assert_eq!(copied, metadata);
    let names: Vec<&String> = read_values.iter().map(|(name, ..)| name).collect();
    assert_eq!(copy.names().iter().collect::<Vec<_>>(), names);
    for (name, shape, values) in &read_values {
        assert_eq!(copy.shape(name), Some(shape.as_slice()));
        let found = read(&copy, name).expect("what was written can be read");
        assert_eq!(found.bits(), values.bits(), "{name:?}");
    }
}
