//! Tensors and string metadata in one [safetensors](https://github.com/huggingface/safetensors) file.
//!
//! Both directions stream: writing borrows the tensors and converts a block at a time, and [`Reader`] holds the
//! header alone and reads a tensor when it is asked for. Plain reads serve this as well as a memory map would (every byte is read
//! once), need no `unsafe`, and turn a file that shrinks under the reader into an error instead of a signal.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use half::{bf16, f16};
pub use safetensors::tensor::Dtype;
use safetensors::tensor::{Metadata, TensorInfo};
use serde::ser::{Serialize, SerializeMap, Serializer};

use crate::durable::atomic_write;
use crate::error::advice;

/// Bytes of the header's length, in front of the header.
const LENGTH_BYTES: u64 = 8;
/// The format's own limit: a longer header is a sign of another kind of file.
const MAX_HEADER_BYTES: u64 = 100_000_000;
/// The key of the string metadata among the tensors of the header.
const METADATA_KEY: &str = "__metadata__";
/// Block of the conversion between values and bytes; a multiple of every element size.
const BLOCK_BYTES: usize = 1 << 16;

/// Why a file could not be written or read. Every message is one line and says what to do.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FileError {
    /// The file system failed while reading.
    #[error("cannot read '{}': {cause}; check the path and its permissions", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the file system said.
        cause: io::Error,
    },
    /// The file system failed while writing; a previous file at `path` is intact.
    #[error("cannot write '{}': {cause}{}", path.display(), advice(cause))]
    Write {
        /// The file.
        path: PathBuf,
        /// What the file system said.
        cause: io::Error,
    },
    /// The list of tensors makes no valid file: an error of the calling code.
    #[error("cannot write '{}': tensor {name:?} {reason}", path.display())]
    InvalidTensor {
        /// The file.
        path: PathBuf,
        /// The tensor.
        name: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The file ends before its header or its tensors do.
    #[error(
        "'{}' is cut off: expected {expected} bytes, found {found}; copy it again or use another checkpoint",
        path.display()
    )]
    Truncated {
        /// The file.
        path: PathBuf,
        /// Bytes it should have, at least.
        expected: u64,
        /// Bytes it has.
        found: u64,
    },
    /// The content is not that of a safetensors file.
    #[error("'{}' is no valid safetensors file: {reason}; check the path or copy the file again", path.display())]
    Invalid {
        /// The file.
        path: PathBuf,
        /// The first thing found wrong.
        reason: String,
    },
    /// There is no tensor of this name.
    #[error(
        "'{}' has no tensor {name:?} among its {count}; was it written for another model or method?",
        path.display()
    )]
    MissingTensor {
        /// The file.
        path: PathBuf,
        /// The tensor asked for.
        name: String,
        /// How many tensors the file holds.
        count: usize,
    },
    /// The tensor has another shape.
    #[error(
        "tensor {name:?} of '{}': expected shape {expected:?}, found {found:?}; \
         use the model settings that the file was written with",
        path.display()
    )]
    WrongShape {
        /// The file.
        path: PathBuf,
        /// The tensor.
        name: String,
        /// The shape asked for.
        expected: Vec<usize>,
        /// The shape in the file.
        found: Vec<usize>,
    },
    /// The tensor has elements that cannot stand for the type asked for.
    #[error("tensor {name:?} of '{}': expected {expected}, found {found}; convert the file", path.display())]
    WrongDtype {
        /// The file.
        path: PathBuf,
        /// The tensor.
        name: String,
        /// The element types that would do.
        expected: &'static str,
        /// The element type in the file.
        found: Dtype,
    },
}

/// A tensor to write: borrowed values in row-major order.
#[derive(Debug, Clone)]
pub struct Tensor<'a> {
    /// Its name, unique in the file and not `__metadata__`.
    pub name: String,
    /// Its shape; `[]` for a scalar.
    pub shape: Vec<usize>,
    /// As many values as the product of `shape`.
    pub data: TensorData<'a>,
}

/// The values of a [`Tensor`], stored in the type they have.
#[derive(Debug, Clone, Copy)]
pub enum TensorData<'a> {
    /// Parameters, moments, features.
    F32(&'a [f32]),
    /// Parameters for deployment, in half the space.
    F16(&'a [f16]),
    /// The same, with the range of `F32`.
    BF16(&'a [bf16]),
    /// Indices and labels, as PyTorch has them.
    I64(&'a [i64]),
    /// Counters.
    U64(&'a [u64]),
}

impl TensorData<'_> {
    fn dtype(&self) -> Dtype {
        match self {
            Self::F32(_) => Dtype::F32,
            Self::F16(_) => Dtype::F16,
            Self::BF16(_) => Dtype::BF16,
            Self::I64(_) => Dtype::I64,
            Self::U64(_) => Dtype::U64,
        }
    }

    fn len(&self) -> usize {
        match self {
            Self::F32(values) => values.len(),
            Self::F16(values) => values.len(),
            Self::BF16(values) => values.len(),
            Self::I64(values) => values.len(),
            Self::U64(values) => values.len(),
        }
    }

    fn write_to(&self, out: &mut dyn Write) -> io::Result<()> {
        match self {
            Self::F32(values) => write_values(out, values, f32::to_le_bytes),
            Self::F16(values) => write_values(out, values, f16::to_le_bytes),
            Self::BF16(values) => write_values(out, values, bf16::to_le_bytes),
            Self::I64(values) => write_values(out, values, i64::to_le_bytes),
            Self::U64(values) => write_values(out, values, u64::to_le_bytes),
        }
    }
}

fn write_values<T: Copy, const SIZE: usize>(
    out: &mut dyn Write,
    values: &[T],
    to_le_bytes: fn(T) -> [u8; SIZE],
) -> io::Result<()> {
    let mut block = Vec::with_capacity(BLOCK_BYTES);
    for chunk in values.chunks(BLOCK_BYTES / SIZE) {
        block.clear();
        block.extend(chunk.iter().copied().flat_map(to_le_bytes));
        out.write_all(&block)?;
    }
    Ok(())
}

/// Writes `tensors` and `metadata` to a safetensors file, atomically ([`atomic_write`]).
///
/// Equal content gives equal bytes, whatever the order of `tensors`: they are stored by falling alignment, then by
/// name, as the `safetensors` crate does it, and the metadata by key.
///
/// # Errors
/// [`FileError::InvalidTensor`] if a name occurs twice or is reserved, or if shape and number of values differ;
/// [`FileError::Write`] if the file system fails. A previous file at `path` is then intact.
pub fn write(
    path: &Path,
    metadata: &BTreeMap<String, String>,
    tensors: &[Tensor<'_>],
) -> Result<(), FileError> {
    check(path, tensors)?;
    let write_error = |cause| FileError::Write {
        path: path.to_owned(),
        cause,
    };

    let mut sorted: Vec<_> = tensors.iter().collect();
    sorted.sort_by(|a, b| {
        let by_alignment = b.data.dtype().cmp(&a.data.dtype());
        by_alignment.then_with(|| a.name.cmp(&b.name))
    });
    let header = Header {
        metadata,
        tensors: &sorted,
    };
    let mut header = serde_json::to_vec(&header).map_err(|error| write_error(error.into()))?;
    // Spaces, so that the tensors start at a multiple of 8 bytes.
    header.resize(header.len().next_multiple_of(LENGTH_BYTES as usize), b' ');

    atomic_write(path, |out| {
        out.write_all(&(header.len() as u64).to_le_bytes())?;
        out.write_all(&header)?;
        sorted
            .iter()
            .try_for_each(|tensor| tensor.data.write_to(out))
    })
    .map_err(write_error)
}

fn check(path: &Path, tensors: &[Tensor<'_>]) -> Result<(), FileError> {
    let mut names = BTreeSet::new();
    for Tensor { name, shape, data } in tensors {
        let reason = if name == METADATA_KEY {
            "has a reserved name".to_owned()
        } else if !names.insert(name) {
            "is listed twice".to_owned()
        } else if shape.iter().product::<usize>() != data.len() {
            format!("has shape {shape:?} and {} values", data.len())
        } else {
            continue;
        };
        return Err(FileError::InvalidTensor {
            path: path.to_owned(),
            name: name.clone(),
            reason,
        });
    }
    Ok(())
}

/// The JSON header. The crate's own [`Metadata`] would write the metadata in the random order of a `HashMap`.
struct Header<'a> {
    metadata: &'a BTreeMap<String, String>,
    tensors: &'a [&'a Tensor<'a>],
}

impl Serialize for Header<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(None)?;
        if !self.metadata.is_empty() {
            map.serialize_entry(METADATA_KEY, self.metadata)?;
        }
        let mut start = 0;
        for tensor in self.tensors {
            let dtype = tensor.data.dtype();
            let end = start + tensor.data.len() * dtype.bitsize() / 8;
            let info = TensorInfo {
                dtype,
                shape: tensor.shape.clone(),
                data_offsets: (start, end),
            };
            map.serialize_entry(&tensor.name, &info)?;
            start = end;
        }
        map.end()
    }
}

/// An open safetensors file: our checkpoints, fixtures, weights published by others.
///
/// The file is untrusted: whatever its bytes, every method returns a value or an error, and allocates no more than
/// a small multiple of the file's length.
#[derive(Debug)]
pub struct Reader<R = File> {
    path: PathBuf,
    /// Behind a lock, so that metadata and shapes can stay borrowed while tensors are read.
    source: Mutex<R>,
    header: Metadata,
    /// Where the tensors start in `source`.
    data_start: u64,
}

impl Reader {
    /// Opens the file and checks its header against its length.
    ///
    /// # Errors
    /// [`FileError::Read`], [`FileError::Truncated`] or [`FileError::Invalid`].
    pub fn open(path: &Path) -> Result<Self, FileError> {
        let file = File::open(path).map_err(|cause| FileError::Read {
            path: path.to_owned(),
            cause,
        })?;
        Self::new(path, file)
    }
}

impl<R: Read + Seek> Reader<R> {
    /// Reads the header from `source`; `path` is only its name in error messages.
    ///
    /// # Errors
    /// As [`Reader::open`].
    pub fn new(path: &Path, mut source: R) -> Result<Self, FileError> {
        let read_error = |cause| FileError::Read {
            path: path.to_owned(),
            cause,
        };
        let truncated = |expected, found| FileError::Truncated {
            path: path.to_owned(),
            expected,
            found,
        };
        let invalid = |reason: String| FileError::Invalid {
            path: path.to_owned(),
            reason: single_line(&reason),
        };

        let found = source.seek(SeekFrom::End(0)).map_err(read_error)?;
        source.rewind().map_err(read_error)?;
        if found < LENGTH_BYTES {
            return Err(truncated(LENGTH_BYTES, found));
        }
        let mut length = [0; LENGTH_BYTES as usize];
        source.read_exact(&mut length).map_err(read_error)?;
        let header_bytes = u64::from_le_bytes(length);
        if header_bytes > MAX_HEADER_BYTES {
            return Err(invalid(format!(
                "its header would have {header_bytes} bytes"
            )));
        }
        let data_start = LENGTH_BYTES + header_bytes;
        if found < data_start {
            return Err(truncated(data_start, found));
        }
        let mut header = vec![0; header_bytes as usize];
        source.read_exact(&mut header).map_err(read_error)?;
        // Not `SafeTensors::read_metadata`: it adds untrusted lengths unchecked.
        let header: Metadata =
            serde_json::from_slice(&header).map_err(|error| invalid(error.to_string()))?;

        let expected = data_start
            .checked_add(header.data_len() as u64)
            .ok_or_else(|| invalid("its tensors have more than 2^64 bytes".to_owned()))?;
        if found < expected {
            return Err(truncated(expected, found));
        }
        if found > expected {
            return Err(invalid(format!(
                "its header describes {expected} bytes, but there are {found}"
            )));
        }
        Ok(Self {
            path: path.to_owned(),
            source: Mutex::new(source),
            header,
            data_start,
        })
    }

    /// The string metadata, by key.
    pub fn metadata(&self) -> BTreeMap<&str, &str> {
        let entries = self.header.metadata().iter().flatten();
        entries
            .map(|(key, value)| (key.as_str(), value.as_str()))
            .collect()
    }

    /// The names of all tensors, sorted.
    pub fn names(&self) -> Vec<String> {
        let mut names = self.header.offset_keys();
        names.sort_unstable();
        names
    }

    /// The shape of a tensor, if there is one of that name.
    pub fn shape(&self, name: &str) -> Option<&[usize]> {
        self.header.info(name).map(|info| info.shape.as_slice())
    }

    /// The element type of a tensor, if there is one of that name.
    pub fn dtype(&self, name: &str) -> Option<Dtype> {
        self.header.info(name).map(|info| info.dtype)
    }

    /// Reads a tensor of `F32`, `F64` (rounded to nearest), `F16` or `BF16` elements, in row-major order.
    ///
    /// # Errors
    /// [`FileError::MissingTensor`], [`FileError::WrongShape`] if its shape is not `expected_shape`,
    /// [`FileError::WrongDtype`], or [`FileError::Read`].
    pub fn tensor_f32(&self, name: &str, expected_shape: &[usize]) -> Result<Vec<f32>, FileError> {
        let info = self.info(name)?;
        if info.shape != expected_shape {
            return Err(FileError::WrongShape {
                path: self.path.clone(),
                name: name.to_owned(),
                expected: expected_shape.to_vec(),
                found: info.shape,
            });
        }
        match info.dtype {
            Dtype::F32 => self.values(&info, f32::from_le_bytes),
            Dtype::F64 => self.values(&info, |bytes| f64::from_le_bytes(bytes) as f32),
            Dtype::F16 => self.values(&info, |bytes| f16::from_le_bytes(bytes).to_f32()),
            Dtype::BF16 => self.values(&info, |bytes| bf16::from_le_bytes(bytes).to_f32()),
            _ => Err(self.wrong_dtype(name, "F32, F64, F16 or BF16", &info)),
        }
    }

    /// Reads a tensor of `I64` elements, in row-major order; [`Reader::shape`] tells its shape.
    ///
    /// # Errors
    /// [`FileError::MissingTensor`], [`FileError::WrongDtype`] or [`FileError::Read`].
    pub fn tensor_i64(&self, name: &str) -> Result<Vec<i64>, FileError> {
        let info = self.info(name)?;
        match info.dtype {
            Dtype::I64 => self.values(&info, i64::from_le_bytes),
            _ => Err(self.wrong_dtype(name, "I64", &info)),
        }
    }

    /// Reads a tensor of `U64` elements, in row-major order; [`Reader::shape`] tells its shape.
    ///
    /// # Errors
    /// [`FileError::MissingTensor`], [`FileError::WrongDtype`] or [`FileError::Read`].
    pub fn tensor_u64(&self, name: &str) -> Result<Vec<u64>, FileError> {
        let info = self.info(name)?;
        match info.dtype {
            Dtype::U64 => self.values(&info, u64::from_le_bytes),
            _ => Err(self.wrong_dtype(name, "U64", &info)),
        }
    }

    fn info(&self, name: &str) -> Result<TensorInfo, FileError> {
        let info = self.header.info(name).cloned();
        info.ok_or_else(|| FileError::MissingTensor {
            path: self.path.clone(),
            name: name.to_owned(),
            count: self.header.offset_keys().len(),
        })
    }

    fn wrong_dtype(&self, name: &str, expected: &'static str, info: &TensorInfo) -> FileError {
        FileError::WrongDtype {
            path: self.path.clone(),
            name: name.to_owned(),
            expected,
            found: info.dtype,
        }
    }

    fn values<T, const SIZE: usize>(
        &self,
        info: &TensorInfo,
        from_le_bytes: impl Fn([u8; SIZE]) -> T,
    ) -> Result<Vec<T>, FileError> {
        let (start, end) = info.data_offsets;
        // The header was checked: the range lies in the file and is a multiple of the element size.
        let mut values = Vec::with_capacity((end - start) / SIZE);
        let mut read = || -> io::Result<()> {
            // Every read seeks first, so the state a panicking thread left does not matter.
            let mut source = self.source.lock().unwrap_or_else(PoisonError::into_inner);
            source.seek(SeekFrom::Start(self.data_start + start as u64))?;
            let mut block = vec![0; BLOCK_BYTES.min(end - start)];
            let mut left = end - start;
            while left > 0 {
                let block = &mut block[..BLOCK_BYTES.min(left)];
                source.read_exact(block)?;
                let (elements, _) = block.as_chunks::<SIZE>();
                values.extend(elements.iter().map(|bytes| from_le_bytes(*bytes)));
                left -= block.len();
            }
            Ok(())
        };
        read().map_err(|cause| FileError::Read {
            path: self.path.clone(),
            cause,
        })?;
        Ok(values)
    }
}

/// Escapes control characters: messages of the JSON parser quote the file.
fn single_line(text: &str) -> String {
    let mut line = String::with_capacity(text.len());
    for character in text.chars() {
        if character.is_control() {
            line.extend(character.escape_default());
        } else {
            line.push(character);
        }
    }
    line
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::io::Cursor;

    use proptest::prelude::*;
    use safetensors::tensor::{SafeTensors, TensorView, serialize};

    use super::*;

    const WEIGHT: [f32; 6] = [
        0.0,
        -0.0,
        1.5,
        f32::MIN_POSITIVE / 2.0,
        f32::INFINITY,
        -3e38,
    ];
    const IDS: [i64; 3] = [0, -1, i64::MAX];

    fn content() -> Vec<Tensor<'static>> {
        let tensor = |name: &str, shape: &[usize], data| Tensor {
            name: name.to_owned(),
            shape: shape.to_vec(),
            data,
        };
        vec![
            tensor("blocks.0.weight", &[3, 2], TensorData::F32(&WEIGHT)),
            tensor("ids_keep", &[1, 3], TensorData::I64(&IDS)),
            tensor("loss", &[], TensorData::F32(&[0.25])),
            tensor("step", &[], TensorData::U64(&[u64::MAX])),
            tensor("empty", &[0, 7], TensorData::F32(&[])),
        ]
    }

    fn metadata() -> BTreeMap<String, String> {
        let pairs = [("config", "{\"depth\": 4}"), ("seed", "7"), ("é\n", "")];
        pairs
            .map(|(key, value)| (key.to_owned(), value.to_owned()))
            .into()
    }

    fn written(metadata: &BTreeMap<String, String>, tensors: &[Tensor<'_>]) -> Vec<u8> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.safetensors");
        write(&path, metadata, tensors).unwrap();
        fs::read(&path).unwrap()
    }

    fn reader(bytes: &[u8]) -> Result<Reader<Cursor<&[u8]>>, FileError> {
        Reader::new(Path::new("a.safetensors"), Cursor::new(bytes))
    }

    /// A file with one tensor `x` of any type, made by the `safetensors` crate.
    fn foreign(dtype: Dtype, shape: &[usize], data: &[u8]) -> Vec<u8> {
        let view = TensorView::new(dtype, shape.to_vec(), data).unwrap();
        serialize([("x", view)], None).unwrap()
    }

    /// A file of this header and `data_bytes` zeros.
    fn raw(header: &str, data_bytes: usize) -> Vec<u8> {
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend(header.as_bytes());
        bytes.resize(bytes.len() + data_bytes, 0);
        bytes
    }

    #[test]
    fn reads_what_it_wrote() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.safetensors");
        write(&path, &metadata(), &content()).unwrap();
        let reader = Reader::open(&path).unwrap();

        let names = ["blocks.0.weight", "empty", "ids_keep", "loss", "step"];
        assert_eq!(reader.names(), names);
        assert_eq!(reader.metadata()["config"], "{\"depth\": 4}");
        assert_eq!(reader.metadata().len(), 3);
        assert_eq!(reader.shape("ids_keep"), Some([1, 3].as_slice()));
        assert_eq!(reader.shape("loss"), Some([].as_slice()));
        assert_eq!(reader.dtype("step"), Some(Dtype::U64));
        assert_eq!(reader.shape("absent"), None);

        let weight = reader.tensor_f32("blocks.0.weight", &[3, 2]).unwrap();
        assert_eq!(bits(&weight), bits(&WEIGHT));
        assert_eq!(reader.tensor_i64("ids_keep").unwrap(), IDS);
        assert_eq!(reader.tensor_f32("loss", &[]).unwrap(), [0.25]);
        assert_eq!(reader.tensor_u64("step").unwrap(), [u64::MAX]);
        assert!(reader.tensor_f32("empty", &[0, 7]).unwrap().is_empty());
    }

    fn bits(values: &[f32]) -> Vec<u32> {
        values.iter().map(|value| value.to_bits()).collect()
    }

    #[test]
    fn equal_content_gives_equal_bytes() {
        let mut reversed = content();
        reversed.reverse();
        assert_eq!(
            written(&metadata(), &content()),
            written(&metadata(), &reversed)
        );
    }

    #[test]
    fn bytes_are_those_of_the_safetensors_crate() {
        let ids: Vec<u8> = IDS.iter().flat_map(|id| id.to_le_bytes()).collect();
        let weight: Vec<u8> = WEIGHT
            .iter()
            .flat_map(|value| value.to_le_bytes())
            .collect();
        let views = [
            ("weight", Dtype::F32, vec![2, 3], &weight),
            ("ids", Dtype::I64, vec![3], &ids),
        ]
        .map(|(name, dtype, shape, data)| (name, TensorView::new(dtype, shape, data).unwrap()));
        let metadata = BTreeMap::from([("seed".to_owned(), "1".to_owned())]);
        let want = serialize(views, Some(metadata.clone().into_iter().collect())).unwrap();

        let tensor = |name: &str, shape: &[usize], data| Tensor {
            name: name.to_owned(),
            shape: shape.to_vec(),
            data,
        };
        let tensors = [
            tensor("weight", &[2, 3], TensorData::F32(&WEIGHT)),
            tensor("ids", &[3], TensorData::I64(&IDS)),
        ];
        assert_eq!(written(&metadata, &tensors), want);
        SafeTensors::deserialize(&written(&self::metadata(), &content())).unwrap();
    }

    #[test]
    fn blocks_join_without_seams() {
        let values: Vec<f32> = (0..BLOCK_BYTES as u32 / 2 + 3).map(|i| i as f32).collect();
        let tensor = Tensor {
            name: "x".to_owned(),
            shape: vec![values.len()],
            data: TensorData::F32(&values),
        };
        let bytes = written(&BTreeMap::new(), &[tensor]);
        let read = reader(&bytes)
            .unwrap()
            .tensor_f32("x", &[values.len()])
            .unwrap();
        assert!(read == values);
    }

    #[test]
    fn converts_other_floats() {
        // 1.5 and -2 are exact in every type; 0.1 in f64 must round to the nearest f32.
        let f64s: Vec<u8> = [0.1, -2.0_f64]
            .iter()
            .flat_map(|v| v.to_le_bytes())
            .collect();
        for (dtype, data, want) in [
            (Dtype::F16, vec![0x00, 0x3e, 0x00, 0xc0], [1.5, -2.0]),
            (Dtype::BF16, vec![0xc0, 0x3f, 0x00, 0xc0], [1.5, -2.0]),
            (Dtype::F64, f64s, [0.1, -2.0]),
        ] {
            let bytes = foreign(dtype, &[2], &data);
            let read = reader(&bytes).unwrap().tensor_f32("x", &[2]).unwrap();
            assert_eq!(read, want, "{dtype}");
        }
    }

    #[test]
    fn every_truncation_is_an_error() {
        let bytes = written(&metadata(), &content());
        for length in 0..bytes.len() {
            let error = reader(&bytes[..length]).unwrap_err();
            assert!(
                matches!(error, FileError::Truncated { found, .. } if found == length as u64),
                "{length}: {error}"
            );
        }
        let mut longer = bytes;
        longer.push(0);
        assert!(matches!(
            reader(&longer).unwrap_err(),
            FileError::Invalid { .. }
        ));
    }

    #[test]
    fn errors_name_file_tensor_expected_and_found() {
        let bytes = written(&metadata(), &content());
        let reader = reader(&bytes).unwrap();
        let messages = [
            reader.tensor_f32("absent\n", &[]).unwrap_err().to_string(),
            reader.tensor_f32("loss", &[1]).unwrap_err().to_string(),
            reader
                .tensor_f32("ids_keep", &[1, 3])
                .unwrap_err()
                .to_string(),
            reader.tensor_i64("loss").unwrap_err().to_string(),
        ];
        assert_eq!(
            messages,
            [
                "'a.safetensors' has no tensor \"absent\\n\" among its 5; was it written for another model or \
                 method?",
                "tensor \"loss\" of 'a.safetensors': expected shape [1], found []; use the model settings that the \
                 file was written with",
                "tensor \"ids_keep\" of 'a.safetensors': expected F32, F64, F16 or BF16, found I64; convert the file",
                "tensor \"loss\" of 'a.safetensors': expected I64, found F32; convert the file",
            ]
        );
    }

    #[test]
    fn other_files_are_refused_in_one_line() {
        let png = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR";
        let not_json = raw("not JSON", 0);
        let bad_dtype = raw(
            r#"{"x":{"dtype":"a\nb","shape":[1],"data_offsets":[0,4]}}"#,
            4,
        );
        let hole = raw(
            r#"{"a\nb":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}"#,
            8,
        );
        for bytes in [png.as_slice(), &not_json, &bad_dtype, &hole] {
            let error = reader(bytes).unwrap_err();
            assert!(matches!(error, FileError::Invalid { .. }), "{error}");
            assert!(!error.to_string().contains('\n'), "{error}");
        }
    }

    #[test]
    fn lengths_near_the_limit_of_u64_are_an_error() {
        // 64 tensors of 2^64 - 64 bytes together: the sum with the header's length overflows.
        let chunk = u64::MAX / 64; // 2^58 - 1
        let mut entries = Vec::new();
        let mut start = 0_u64;
        for i in 0..64 {
            let end = start + chunk;
            entries.push(format!(
                r#""{i}":{{"dtype":"U8","shape":[{chunk}],"data_offsets":[{start},{end}]}}"#
            ));
            start = end;
        }
        let bytes = raw(&format!("{{{}}}", entries.join(",")), 0);
        assert!(matches!(
            reader(&bytes).unwrap_err(),
            FileError::Invalid { .. }
        ));
    }

    #[test]
    fn invalid_lists_are_refused_before_anything_is_written() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.safetensors");
        let tensor = |name: &str, shape: &[usize]| Tensor {
            name: name.to_owned(),
            shape: shape.to_vec(),
            data: TensorData::F32(&WEIGHT),
        };
        for tensors in [
            vec![tensor(METADATA_KEY, &[6])],
            vec![tensor("x", &[6]), tensor("x", &[2, 3])],
            vec![tensor("x", &[7])],
        ] {
            let error = write(&path, &BTreeMap::new(), &tensors).unwrap_err();
            assert!(matches!(error, FileError::InvalidTensor { .. }), "{error}");
        }
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    }

    #[test]
    fn missing_files_are_named() {
        let error = Reader::open(Path::new("no/such.safetensors")).unwrap_err();
        assert!(
            error.to_string().contains("'no/such.safetensors'"),
            "{error}"
        );
    }

    /// Reads everything a file claims to hold; the oracle is that nothing panics.
    fn read_all(bytes: &[u8]) {
        let Ok(reader) = reader(bytes) else {
            return;
        };
        reader.metadata();
        for name in reader.names() {
            let shape = reader.shape(&name).unwrap();
            let _ = reader.tensor_f32(&name, shape);
            let _ = reader.tensor_i64(&name);
        }
    }

    proptest! {
        #[test]
        fn changed_bytes_never_panic(changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8)) {
            let mut bytes = written(&metadata(), &content());
            for (at, byte) in changes {
                let at = at.index(bytes.len());
                bytes[at] = byte;
            }
            read_all(&bytes);
        }

        #[test]
        fn any_header_never_panics(header in "[\\[\\]{}:,\"a-z0-9F]{0,60}", data_bytes in 0_usize..9) {
            read_all(&raw(&header, data_bytes));
        }
    }
}
