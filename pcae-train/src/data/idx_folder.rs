//! Data sets in IDX files, and the embedded one.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use flate2::read::MultiGzDecoder;

use super::{Classes, DataError, Picture, Source, Splits, idx, join, luma, split, whole};

/// A tenth of the pictures is held out where no test files say otherwise.
const HELD_OUT_EVERY: usize = 10;

/// The embedded set is split 8,000 to 2,000.
const EMBEDDED_HELD_OUT_EVERY: usize = 5;

/// A compressed file may unpack to this many bytes: memory is bounded whatever a small file claims.
const MAX_UNPACKED: u64 = 1 << 32;

const EMBEDDED_IMAGES: &[u8] =
    include_bytes!("../../assets/fashion-mnist/t10k-images-idx3-ubyte.gz");
const EMBEDDED_LABELS: &[u8] =
    include_bytes!("../../assets/fashion-mnist/t10k-labels-idx1-ubyte.gz");
const EMBEDDED_CLASSES: [&str; 10] = [
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
];

/// Kinds of files with pictures.
const PICTURES: [&str; 2] = ["idx3", "idx4"];

/// Pictures of one size, in memory.
#[derive(Debug)]
pub(super) struct Array {
    pub(super) path: PathBuf,
    pub(super) len: usize,
    pub(super) height: usize,
    pub(super) width: usize,
    channels: usize,
    /// `[len, height, width, channels]`.
    pixels: Vec<u8>,
    pub(super) labels: Option<Vec<u8>>,
}

impl Array {
    fn new(images: IdxFile, labels: Option<IdxFile>) -> Result<Self, DataError> {
        let (len, height, width, channels) = match *images.shape {
            [n, h, w] if h > 0 && w > 0 => (n, h, w, 1),
            [n, h, w, c @ (1 | 3)] if h > 0 && w > 0 => (n, h, w, c),
            _ => {
                return Err(DataError::Layout {
                    path: images.path,
                    expected:
                        "pictures of shape [n, height, width] or [n, height, width, 1 or 3], not empty"
                            .to_owned(),
                    found: format!("{:?}", images.shape),
                    advice: "check which file this is",
                });
            }
        };
        let labels = match labels {
            None => None,
            Some(labels) if labels.shape == [len] => Some(labels.data),
            Some(labels) => {
                return Err(DataError::Layout {
                    expected: format!(
                        "labels of shape [{len}], one for each picture in {}",
                        images.path.display()
                    ),
                    found: format!("{:?}", labels.shape),
                    path: labels.path,
                    advice: "give the labels that belong to the pictures, or remove the file to go without labels",
                });
            }
        };
        Ok(Self {
            path: images.path,
            len,
            height,
            width,
            channels,
            pixels: images.data,
            labels,
        })
    }

    /// Copies picture `place`, which must be below `len`, as `channels` channels.
    pub(super) fn picture(&self, place: usize, channels: usize, picture: &mut Picture) {
        picture.width = self.width;
        picture.height = self.height;
        picture.channels = channels;
        picture.pixels.clear();
        let size = self.height * self.width * self.channels;
        let pixels = &self.pixels[place * size..][..size];
        match (self.channels, channels) {
            (1, 3) => picture
                .pixels
                .extend(pixels.iter().flat_map(|&grey| [grey; 3])),
            (3, 1) => picture
                .pixels
                .extend(pixels.as_chunks().0.iter().map(|&rgb| luma(rgb))),
            _ => picture.pixels.extend_from_slice(pixels),
        }
    }

    fn num_classes(&self) -> usize {
        let largest = self.labels.iter().flatten().max();
        largest.map_or(0, |&label| usize::from(label) + 1)
    }
}

/// Opens the embedded pictures, a fifth of each class held out.
pub(super) fn open_embedded(channels: Option<usize>) -> Result<Splits, DataError> {
    let title = "Fashion-MNIST (embedded)";
    let file = |kind: &str, packed: &[u8]| {
        let path = Path::new("fashion-mnist").join(kind);
        let bytes = unpack(&path, MultiGzDecoder::new(packed), MAX_UNPACKED)?;
        IdxFile::new(path, bytes)
    };
    let array = Array::new(
        file("t10k-images", EMBEDDED_IMAGES)?,
        Some(file("t10k-labels", EMBEDDED_LABELS)?),
    )?;
    let channels = channels.unwrap_or(array.channels);
    let classes = Classes {
        empty: Arc::from([]),
        count: EMBEDDED_CLASSES.len(),
        names: EMBEDDED_CLASSES.map(String::from).into(),
    };
    let parts = split(
        Path::new(title),
        title,
        Source::Array(array),
        channels,
        EMBEDDED_HELD_OUT_EVERY,
    )?;
    Ok(join(parts, classes))
}

/// Opens a folder of IDX files; `None` if it holds none.
pub(super) fn open(path: &Path, channels: Option<usize>) -> Result<Option<Splits>, DataError> {
    let train = read_part(path, "train")?;
    let test = read_part(path, "t10k")?;
    let Some(train) = train else {
        return match test {
            None => Ok(None),
            Some(_) => Err(DataError::Layout {
                path: path.to_owned(),
                expected: "train-images-idx3-ubyte or train-images-idx3-ubyte.gz".to_owned(),
                found: "only t10k files".to_owned(),
                advice: "add the training files, or rename t10k- to train- to train on these",
            }),
        };
    };
    let channels = channels.unwrap_or(train.channels);
    let count = train
        .num_classes()
        .max(test.as_ref().map_or(0, Array::num_classes));
    let title = path.display().to_string();
    let parts = match test {
        None => split(path, &title, Source::Array(train), channels, HELD_OUT_EVERY)?,
        Some(test) => {
            for part in [&train, &test] {
                if part.len == 0 {
                    return Err(DataError::Layout {
                        path: part.path.clone(),
                        expected: "at least 1 picture".to_owned(),
                        found: "none".to_owned(),
                        advice: "download or unpack the file again",
                    });
                }
            }
            let part =
                |name, array| whole(format!("{title}, {name}"), Source::Array(array), channels);
            (part("train", train), part("t10k", test))
        }
    };
    let classes = Classes {
        empty: Arc::from([]),
        count,
        names: Arc::default(),
    };
    Ok(Some(join(parts, classes)))
}

/// Whether [`open`] finds something to open.
pub(super) fn is_one(path: &Path) -> bool {
    ["train", "t10k"]
        .iter()
        .any(|part| find(path, part, "images", &PICTURES).is_some())
}

fn read_part(folder: &Path, part: &str) -> Result<Option<Array>, DataError> {
    let Some(images) = find(folder, part, "images", &PICTURES) else {
        return Ok(None);
    };
    let images = IdxFile::read(images)?;
    let labels = find(folder, part, "labels", &["idx1"])
        .map(IdxFile::read)
        .transpose()?;
    Array::new(images, labels).map(Some)
}

/// The file of this kind in one of the spellings that are in use.
fn find(folder: &Path, part: &str, kind: &str, ranks: &[&str]) -> Option<PathBuf> {
    for rank in ranks {
        for separator in ['-', '.'] {
            for suffix in ["", ".gz"] {
                let name = format!("{part}-{kind}{separator}{rank}-ubyte{suffix}");
                let path = folder.join(name);
                if path.is_file() {
                    return Some(path);
                }
            }
        }
    }
    None
}

/// An IDX file, read and checked.
struct IdxFile {
    path: PathBuf,
    shape: Vec<usize>,
    data: Vec<u8>,
}

impl IdxFile {
    fn new(path: PathBuf, mut bytes: Vec<u8>) -> Result<Self, DataError> {
        match idx::parse(&bytes) {
            Ok(idx::Idx { shape, data }) => {
                let header = bytes.len() - data.len();
                bytes.drain(..header);
                Ok(Self {
                    path,
                    shape,
                    data: bytes,
                })
            }
            Err(error) => Err(DataError::Idx { path, error }),
        }
    }

    fn read(path: PathBuf) -> Result<Self, DataError> {
        let bytes = if path.extension().is_some_and(|extension| extension == "gz") {
            let file = File::open(&path).map_err(|error| DataError::Read {
                path: path.clone(),
                error,
            })?;
            unpack(&path, MultiGzDecoder::new(file), MAX_UNPACKED)?
        } else {
            std::fs::read(&path).map_err(|error| DataError::Read {
                path: path.clone(),
                error,
            })?
        };
        Self::new(path, bytes)
    }
}

/// Reads `unpacked` to its end, at most `limit` bytes.
fn unpack(path: &Path, unpacked: impl Read, limit: u64) -> Result<Vec<u8>, DataError> {
    let mut bytes = Vec::new();
    unpacked
        .take(limit.saturating_add(1))
        .read_to_end(&mut bytes)
        .map_err(|error| DataError::Layout {
            path: path.to_owned(),
            expected: "a complete gzip file".to_owned(),
            found: error.to_string(),
            advice: "download the file again",
        })?;
    if bytes.len() as u64 > limit {
        return Err(DataError::Layout {
            path: path.to_owned(),
            expected: format!("at most {limit} bytes after unpacking"),
            found: "more".to_owned(),
            advice: "unpack the file with gunzip if it is what it should be",
        });
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::super::idx::tests::serialize;
    use super::*;
    use crate::data::Dataset;
    use flate2::Compression;
    use flate2::write::GzEncoder;
    use std::io::Write;

    fn gzip(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    fn class_counts(dataset: &Dataset) -> Vec<usize> {
        let mut counts = vec![0; dataset.num_classes()];
        for i in 0..dataset.len() {
            counts[dataset.label(i).unwrap() as usize] += 1;
        }
        counts
    }

    #[test]
    fn embedded_counts() {
        let Splits { train, held_out } = crate::data::open(None, None).unwrap();
        assert_eq!((train.len(), held_out.len()), (8_000, 2_000));
        assert_eq!(class_counts(&train), [800; 10]);
        assert_eq!(class_counts(&held_out), [200; 10]);
        assert_eq!(train.class_name(9), Some("Ankle boot"));
        assert_eq!(train.class_name(10), None);
        assert_eq!(
            held_out.describe(),
            "Fashion-MNIST (embedded), held out: 2000 pictures, 28x28, grey, 10 classes"
        );
        let names: std::collections::BTreeSet<String> = (0..8_000)
            .map(|i| train.name(i))
            .chain((0..2_000).map(|i| held_out.name(i)))
            .collect();
        assert_eq!(names.len(), 10_000);
    }

    #[test]
    fn grey_becomes_rgb_by_repeating() {
        let grey = crate::data::open(None, None).unwrap().train;
        let rgb = crate::data::open(None, Some(3)).unwrap().train;
        let (mut a, mut b) = (Picture::default(), Picture::default());
        grey.picture(17, &mut a).unwrap();
        rgb.picture(17, &mut b).unwrap();
        assert_eq!((a.width, a.height, a.channels), (28, 28, 1));
        assert_eq!((b.width, b.height, b.channels), (28, 28, 3));
        assert!(a.pixels.iter().any(|&v| v > 0));
        for (grey, rgb) in a.pixels.iter().zip(b.pixels.as_chunks::<3>().0) {
            assert_eq!(*rgb, [*grey; 3]);
        }
    }

    #[test]
    fn both_spellings_and_gzip() {
        let dir = tempfile::tempdir().unwrap();
        let write =
            |name: &str, bytes: &[u8]| std::fs::write(dir.path().join(name), bytes).unwrap();
        write(
            "train-images.idx4-ubyte.gz",
            &gzip(&serialize(&[4, 2, 1, 3], &[255, 0, 0, 9, 9, 9].repeat(4))),
        );
        write("train-labels-idx1-ubyte", &serialize(&[4], &[0, 1, 2, 6]));
        write(
            "t10k-images-idx3-ubyte",
            &serialize(&[2, 2, 1], &[1, 2, 3, 4]),
        );
        let Splits { train, held_out } = crate::data::open(Some(dir.path()), Some(1)).unwrap();
        assert_eq!((train.len(), held_out.len()), (4, 2));
        assert_eq!((train.num_classes(), held_out.num_classes()), (7, 7));
        assert_eq!((train.label(3), held_out.label(1)), (Some(6), None));
        let mut picture = Picture::default();
        train.picture(2, &mut picture).unwrap();
        assert_eq!(picture.pixels, [76, 9]);
        held_out.picture(1, &mut picture).unwrap();
        assert_eq!(picture.pixels, [3, 4]);
    }

    #[test]
    fn a_tenth_is_held_out_without_test_files() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("train-images-idx3-ubyte");
        std::fs::write(&path, serialize(&[30, 1, 1], &[0; 30])).unwrap();
        let splits = crate::data::open(Some(dir.path()), None).unwrap();
        assert_eq!((splits.train.len(), splits.held_out.len()), (27, 3));
        assert!(splits.train.describe().ends_with("1x1, grey, no labels"));

        std::fs::write(&path, serialize(&[1, 1, 1], &[0])).unwrap();
        let error = crate::data::open(Some(dir.path()), None).unwrap_err();
        assert!(error.to_string().contains("at least 2 pictures"), "{error}");
    }

    #[test]
    fn damage_is_an_error_that_names_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let message = || {
            let error = crate::data::open(Some(dir.path()), None)
                .unwrap_err()
                .to_string();
            assert!(!error.contains('\n'));
            error
        };
        let write =
            |name: &str, bytes: &[u8]| std::fs::write(dir.path().join(name), bytes).unwrap();
        write("t10k-images-idx3-ubyte", &serialize(&[1, 1, 1], &[1]));
        assert!(message().contains("found only t10k files"));
        let images = gzip(&serialize(&[3, 2, 2], &[0; 12]));
        write("train-images-idx3-ubyte.gz", &images[..images.len() - 9]);
        let error = message();
        assert!(error.contains("train-images-idx3-ubyte.gz"), "{error}");
        assert!(error.contains("complete gzip file"), "{error}");
        write("train-images-idx3-ubyte.gz", &images);
        write("train-labels-idx1-ubyte", &serialize(&[2], &[0; 2]));
        let error = message();
        assert!(error.contains("labels of shape [3]"), "{error}");
        assert!(error.contains("found [2]"), "{error}");
        write("train-labels-idx1-ubyte", &[0, 0, 8]);
        assert!(message().contains("header of 4 bytes, found 3"));
    }

    #[test]
    fn unpacking_is_bounded() {
        let path = Path::new("bomb.gz");
        assert_eq!(unpack(path, &[0; 100][..], 100).unwrap().len(), 100);
        let error = unpack(path, std::io::repeat(0), 100).unwrap_err();
        assert!(error.to_string().contains("at most 100 bytes"), "{error}");
    }
}
