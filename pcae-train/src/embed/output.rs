//! The formats of features. All are written from a file of raw values, a block at a time.

use std::fs::File;
use std::io::{self, BufRead, BufReader, BufWriter, Read, Write};
use std::path::Path;
use std::sync::Arc;

use parquet::basic::{Encoding, LogicalType, Repetition, Type as PhysicalType};
use parquet::data_type::{ByteArray, ByteArrayType, FloatType};
use parquet::file::metadata::KeyValue;
use parquet::file::properties::WriterProperties;
use parquet::file::writer::SerializedFileWriter;
use parquet::schema::types::Type;
use serde_json::json;

/// Bytes of a block.
const BLOCK_BYTES: usize = 1 << 20;
/// Values of a row group of Parquet: a reader's unit, 16 MiB.
const GROUP_VALUES: usize = 1 << 22;

/// How features are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Format {
    Safetensors,
    Npy,
    Csv,
    Parquet,
}

impl Format {
    pub(super) const EXTENSIONS: [(&'static str, Self); 4] = [
        ("safetensors", Self::Safetensors),
        ("npy", Self::Npy),
        ("csv", Self::Csv),
        ("parquet", Self::Parquet),
    ];

    /// By the extension of a file's name.
    pub(super) fn of(path: &Path) -> Option<Self> {
        let extension = path.extension()?;
        Self::EXTENSIONS
            .iter()
            .find(|(name, _)| extension.eq_ignore_ascii_case(name))
            .map(|(_, format)| *format)
    }
}

/// Features in raw files, and what they are.
pub(super) struct Raw<'a> {
    /// Values as little-endian f32, `[rows, tokens, dim]`.
    pub(super) features: &'a Path,
    /// Patch positions as little-endian u32, `[rows, tokens - 1]`, where tokens were dropped.
    pub(super) positions: Option<&'a Path>,
    /// A name in each line.
    pub(super) names: &'a Path,
    pub(super) rows: usize,
    /// `None` where a picture is one vector.
    pub(super) tokens: Option<usize>,
    pub(super) dim: usize,
    /// What else a reader may want to know.
    pub(super) metadata: Vec<(&'static str, String)>,
}

impl Raw<'_> {
    /// Values of a picture.
    fn row(&self) -> usize {
        self.tokens.unwrap_or(1) * self.dim
    }

    pub(super) fn shape(&self) -> Vec<usize> {
        let mut shape = vec![self.rows];
        shape.extend(self.tokens);
        shape.push(self.dim);
        shape
    }

    fn features(&self) -> io::Result<BufReader<File>> {
        Ok(BufReader::with_capacity(
            BLOCK_BYTES,
            File::open(self.features)?,
        ))
    }

    fn names(&self) -> io::Result<io::Lines<BufReader<File>>> {
        Ok(BufReader::new(File::open(self.names)?).lines())
    }

    /// Writes everything to `path` and syncs it.
    pub(super) fn write(&self, format: Format, path: &Path) -> io::Result<()> {
        let (expected, found) = (
            4 * self.rows * self.row(),
            std::fs::metadata(self.features)?.len(),
        );
        if found != expected as u64 {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                format!("expected {expected} bytes of features, found {found}; start anew"),
            ));
        }
        let mut out = BufWriter::with_capacity(BLOCK_BYTES, File::create(path)?);
        match format {
            Format::Safetensors => self.safetensors(&mut out)?,
            Format::Npy => self.npy(&mut out)?,
            Format::Csv => self.csv(&mut out)?,
            Format::Parquet => self.parquet(&mut out).map_err(io::Error::other)?,
        }
        out.into_inner()
            .map_err(io::IntoInnerError::into_error)?
            .sync_all()
    }

    /// `features` as F32, `names` as U8 with a newline after each, `positions` as U32.
    fn safetensors(&self, out: &mut dyn Write) -> io::Result<()> {
        let mut header = serde_json::Map::new();
        let metadata = self.metadata.iter();
        let metadata = metadata.map(|(key, value)| ((*key).to_owned(), json!(value)));
        header.insert("__metadata__".to_owned(), metadata.collect());
        let mut files = vec![("features", "F32", self.shape(), self.features)];
        if let Some(positions) = self.positions {
            let tokens = self.tokens.unwrap_or(1) - 1;
            files.push(("positions", "U32", vec![self.rows, tokens], positions));
        }
        let names = std::fs::metadata(self.names)?.len() as usize;
        files.push(("names", "U8", vec![names], self.names));
        let mut start = 0;
        for (name, dtype, shape, file) in &files {
            let end = start + std::fs::metadata(file)?.len();
            header.insert(
                (*name).to_owned(),
                json!({"dtype": dtype, "shape": shape, "data_offsets": [start, end]}),
            );
            start = end;
        }
        let mut header = serde_json::to_vec(&header)?;
        // Spaces, so that the tensors start at a multiple of 8 bytes.
        header.resize(header.len().next_multiple_of(8), b' ');
        out.write_all(&(header.len() as u64).to_le_bytes())?;
        out.write_all(&header)?;
        for (.., file) in files {
            io::copy(&mut File::open(file)?, out)?;
        }
        Ok(())
    }

    /// NumPy's format, version 1.0.
    fn npy(&self, out: &mut dyn Write) -> io::Result<()> {
        let shape: Vec<String> = self.shape().iter().map(usize::to_string).collect();
        let mut header = format!(
            "{{'descr': '<f4', 'fortran_order': False, 'shape': ({}), }}",
            shape.join(", ")
        );
        // Magic, version, length and header end with a newline at a multiple of 64 bytes.
        let prefix = 10;
        let padding = (prefix + header.len() + 1).next_multiple_of(64) - prefix - header.len() - 1;
        header.extend(std::iter::repeat_n(' ', padding));
        header.push('\n');
        out.write_all(b"\x93NUMPY\x01\x00")?;
        out.write_all(&(header.len() as u16).to_le_bytes())?;
        out.write_all(header.as_bytes())?;
        io::copy(&mut self.features()?, out)?;
        Ok(())
    }

    /// A line for each picture, or for each token of it with its number: 0 is the class token.
    fn csv(&self, out: &mut dyn Write) -> io::Result<()> {
        let mut out = csv::Writer::from_writer(out);
        let mut line = vec!["name".to_owned()];
        line.extend(self.tokens.map(|_| "token".to_owned()));
        line.extend((0..self.dim).map(|i| format!("f{i}")));
        out.write_record(&line)?;
        let mut values = Values::new(self.features()?, self.dim);
        for name in self.names()? {
            let name = name?;
            for token in 0..self.tokens.unwrap_or(1) {
                line.clear();
                line.push(name.clone());
                line.extend(self.tokens.map(|_| token.to_string()));
                // The shortest text that reads back as the same number.
                line.extend(values.next()?.iter().map(f32::to_string));
                out.write_record(&line)?;
            }
        }
        out.flush()
    }

    /// Columns `name` and `features`, a list of floats; the shape of a picture's features is in the metadata.
    fn parquet(&self, out: impl Write + Send) -> parquet::errors::Result<()> {
        let name = Type::primitive_type_builder("name", PhysicalType::BYTE_ARRAY)
            .with_repetition(Repetition::REQUIRED)
            .with_logical_type(Some(LogicalType::String))
            .build()?;
        let element = Type::primitive_type_builder("element", PhysicalType::FLOAT)
            .with_repetition(Repetition::REQUIRED)
            .build()?;
        let list = Type::group_type_builder("list")
            .with_repetition(Repetition::REPEATED)
            .with_fields(vec![Arc::new(element)])
            .build()?;
        let features = Type::group_type_builder("features")
            .with_repetition(Repetition::REQUIRED)
            .with_logical_type(Some(LogicalType::List))
            .with_fields(vec![Arc::new(list)])
            .build()?;
        let schema = Type::group_type_builder("schema")
            .with_fields(vec![Arc::new(name), Arc::new(features)])
            .build()?;
        let entry = |(key, value): &(&str, String)| KeyValue::new((*key).to_owned(), value.clone());
        let shape = ("shape", format!("{:?}", &self.shape()[1..]));
        let metadata = self.metadata.iter().chain([&shape]).map(entry);
        // Features hardly ever repeat.
        let properties = WriterProperties::builder()
            .set_dictionary_enabled(false)
            .set_encoding(Encoding::PLAIN)
            .set_key_value_metadata(Some(metadata.collect()))
            .build();
        let mut writer = SerializedFileWriter::new(out, Arc::new(schema), Arc::new(properties))?;
        let mut values = Values::new(self.features()?, self.row());
        let mut names = self.names()?;
        let group_rows = (GROUP_VALUES / self.row().max(1)).max(1);
        let definition = vec![1; self.row()];
        // The first value of a list begins it.
        let repetition: Vec<i16> = (0..self.row()).map(|i| i16::from(i > 0)).collect();
        for start in (0..self.rows).step_by(group_rows) {
            let rows = group_rows.min(self.rows - start);
            let mut group = writer.next_row_group()?;
            if let Some(mut column) = group.next_column()? {
                let names: Vec<ByteArray> = names
                    .by_ref()
                    .take(rows)
                    .map(|name| Ok(ByteArray::from(name?.into_bytes())))
                    .collect::<io::Result<_>>()?;
                column
                    .typed::<ByteArrayType>()
                    .write_batch(&names, None, None)?;
                column.close()?;
            }
            if let Some(mut column) = group.next_column()? {
                let typed = column.typed::<FloatType>();
                for _ in 0..rows {
                    typed.write_batch(values.next()?, Some(&definition), Some(&repetition))?;
                }
                column.close()?;
            }
            group.close()?;
        }
        writer.close()?;
        Ok(())
    }
}

/// Raw values, so many at a time.
struct Values<R> {
    from: R,
    bytes: Vec<u8>,
    values: Vec<f32>,
}

impl<R: Read> Values<R> {
    fn new(from: R, count: usize) -> Self {
        Self {
            from,
            bytes: vec![0; 4 * count],
            values: vec![0.0; count],
        }
    }

    fn next(&mut self) -> io::Result<&[f32]> {
        self.from.read_exact(&mut self.bytes)?;
        let (elements, _) = self.bytes.as_chunks();
        for (value, bytes) in self.values.iter_mut().zip(elements) {
            *value = f32::from_le_bytes(*bytes);
        }
        Ok(&self.values)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::file::Reader;
    use parquet::file::reader::{FileReader, SerializedFileReader};
    use parquet::record::RowAccessor;
    use std::path::PathBuf;

    const NAMES: [&str; 3] = ["a.png", "b, \"c\".png", "ü/d.png"];
    const DIM: usize = 5;

    struct Place {
        folder: tempfile::TempDir,
        values: Vec<f32>,
        tokens: Option<usize>,
    }

    impl Place {
        fn new(tokens: Option<usize>) -> Self {
            let count = NAMES.len() * tokens.unwrap_or(1) * DIM;
            // Numbers whose shortest decimal texts are long, of either sign, and the extremes.
            let mut values: Vec<f32> = (0..count).map(|i| (i as f32 - 7.3) / 3.0).collect();
            (values[0], values[1], values[2]) = (f32::MAX, f32::MIN_POSITIVE, -0.0);
            let place = Self {
                folder: tempfile::tempdir().unwrap(),
                values,
                tokens,
            };
            let bytes = place.values.iter().flat_map(|value| value.to_le_bytes());
            std::fs::write(place.path("features"), bytes.collect::<Vec<u8>>()).unwrap();
            std::fs::write(
                place.path("names"),
                NAMES.map(|name| format!("{name}\n")).concat(),
            )
            .unwrap();
            let positions = (0..6_u32).flat_map(u32::to_le_bytes);
            std::fs::write(place.path("positions"), positions.collect::<Vec<u8>>()).unwrap();
            place
        }

        fn path(&self, name: &str) -> PathBuf {
            self.folder.path().join(name)
        }

        fn write(&self, format: Format) -> PathBuf {
            let out = self.path("out");
            let positions = self.tokens.map(|_| self.path("positions"));
            let raw = Raw {
                features: &self.path("features"),
                positions: positions.as_deref(),
                names: &self.path("names"),
                rows: NAMES.len(),
                tokens: self.tokens,
                dim: DIM,
                metadata: vec![("pool", "cls".to_owned())],
            };
            raw.write(format, &out).unwrap();
            out
        }

        fn bits(&self) -> Vec<u32> {
            self.values.iter().map(|value| value.to_bits()).collect()
        }
    }

    fn bits(values: &[f32]) -> Vec<u32> {
        values.iter().map(|value| value.to_bits()).collect()
    }

    #[test]
    fn safetensors_are_read_back() {
        for tokens in [None, Some(3)] {
            let place = Place::new(tokens);
            let out = place.write(Format::Safetensors);
            let reader = Reader::open(&out).unwrap();
            let shape = tokens.map_or(vec![3, 5], |tokens| vec![3, tokens, 5]);
            let values = reader.tensor_f32("features", &shape).unwrap();
            assert_eq!(bits(&values), place.bits());
            assert_eq!(reader.metadata()["pool"], "cls");
            assert_eq!(reader.shape("positions"), tokens.map(|_| &[3, 2][..]));
            let file = std::fs::read(&out).unwrap();
            let parsed = safetensors::SafeTensors::deserialize(&file).unwrap();
            let names = parsed.tensor("names").unwrap();
            let names = std::str::from_utf8(names.data()).unwrap();
            assert!(names.lines().eq(NAMES));
        }
    }

    #[test]
    fn npy_is_numpys_format() {
        for tokens in [None, Some(3)] {
            let place = Place::new(tokens);
            let file = std::fs::read(place.write(Format::Npy)).unwrap();
            assert_eq!(&file[..8], b"\x93NUMPY\x01\x00");
            let end = 10 + usize::from(u16::from_le_bytes([file[8], file[9]]));
            assert_eq!(end % 64, 0);
            let header = std::str::from_utf8(&file[10..end]).unwrap();
            let shape = tokens.map_or("(3, 5)".to_owned(), |tokens| format!("(3, {tokens}, 5)"));
            assert_eq!(
                header.trim_end(),
                format!("{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}")
            );
            assert!(header.ends_with('\n'));
            let values: Vec<u32> = file[end..]
                .as_chunks()
                .0
                .iter()
                .map(|b| u32::from_le_bytes(*b))
                .collect();
            assert_eq!(values, place.bits());
        }
    }

    #[test]
    fn csv_is_read_back_to_the_same_bits() {
        for tokens in [None, Some(3)] {
            let place = Place::new(tokens);
            let mut reader = csv::Reader::from_path(place.write(Format::Csv)).unwrap();
            let first = 1 + usize::from(tokens.is_some());
            assert_eq!(reader.headers().unwrap().len(), first + DIM);
            let mut values = Vec::new();
            for (i, record) in reader.records().enumerate() {
                let record = record.unwrap();
                assert_eq!(&record[0], NAMES[i / tokens.unwrap_or(1)]);
                if let Some(tokens) = tokens {
                    assert_eq!(record[1], (i % tokens).to_string());
                }
                values.extend(
                    record
                        .iter()
                        .skip(first)
                        .map(|text| text.parse::<f32>().unwrap()),
                );
            }
            assert_eq!(bits(&values), place.bits());
        }
    }

    #[test]
    fn parquet_is_read_back() {
        for tokens in [None, Some(3)] {
            let place = Place::new(tokens);
            let file = File::open(place.write(Format::Parquet)).unwrap();
            let reader = SerializedFileReader::new(file).unwrap();
            let metadata = reader.metadata().file_metadata();
            let entries = metadata.key_value_metadata().unwrap();
            let shape = entries.iter().find(|entry| entry.key == "shape").unwrap();
            let want = tokens.map_or("[5]".to_owned(), |tokens| format!("[{tokens}, 5]"));
            assert_eq!(shape.value.as_deref(), Some(want.as_str()));
            let mut values = Vec::new();
            for (row, name) in reader.get_row_iter(None).unwrap().zip(NAMES) {
                let row = row.unwrap();
                assert_eq!(row.get_string(0).unwrap(), name);
                let list = row.get_list(1).unwrap();
                for element in list.elements() {
                    let parquet::record::Field::Float(value) = element else {
                        panic!("{element:?}");
                    };
                    values.push(*value);
                }
            }
            assert_eq!(bits(&values), place.bits());
        }
    }

    /// A file that is shorter than its state says is an error, not a shorter output.
    #[test]
    fn missing_values_are_noticed() {
        let place = Place::new(None);
        std::fs::write(place.path("features"), [0; 8]).unwrap();
        let raw = |features: &Path| {
            let (names, out) = (place.path("names"), place.path("out"));
            let raw = Raw {
                features,
                positions: None,
                names: &names,
                rows: 3,
                tokens: None,
                dim: DIM,
                metadata: Vec::new(),
            };
            Format::EXTENSIONS.map(|(_, format)| raw.write(format, &out).is_err())
        };
        assert_eq!(raw(&place.path("features")), [true; 4]);
    }

    #[test]
    fn extensions_say_the_format() {
        assert_eq!(Format::of(Path::new("a/b.CSV")), Some(Format::Csv));
        assert_eq!(Format::of(Path::new("a.csv/b")), None);
        assert_eq!(Format::of(Path::new("b.txt")), None);
    }
}
