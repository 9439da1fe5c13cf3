//! Pictures: where they come from ([`open`]), how they are cropped and normalised ([`augment`]) and how batches of them
//! reach the training loop ([`loader`]).
//!
//! Everything random here is keyed by (seed, epoch, sample, purpose), so batches do not depend on the number of workers
//! or on where a run was resumed.

pub mod augment;
mod crops;
mod error;
pub(crate) mod folder;
pub mod idx;
mod idx_folder;
pub mod images;
pub mod loader;
pub mod mix;
mod rand_augment;
pub mod regularize;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use pcae_kernel::rng::{Purpose, Stream};

use crate::backends::count;

pub use error::DataError;

/// Splits do not follow a run's seed: figures of runs with different seeds are about the same held-out pictures.
const SPLIT_SEED: u64 = 0;

/// What [`Dataset::load`] does with an unreadable picture, in words.
const REPLACED: &str = "the next readable picture takes its place";

/// How many pictures in a row may be unreadable before [`Dataset::load`] gives up.
const MAX_SUBSTITUTIONS: usize = 100;

/// The two parts of a data set.
#[derive(Clone, Debug)]
pub struct Splits {
    /// What is learned from.
    pub train: Arc<Dataset>,
    /// What is only measured on.
    pub held_out: Arc<Dataset>,
}

/// A decoded picture. Reused from sample to sample, it stops allocating at the largest picture.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Picture {
    /// Pixels in a row.
    pub width: usize,
    /// Rows.
    pub height: usize,
    /// 1 (grey) or 3 (RGB).
    pub channels: usize,
    /// `[height, width, channels]`.
    pub pixels: Vec<u8>,
}

/// A list of pictures, decoded on demand, from any number of threads.
#[derive(Debug)]
pub struct Dataset {
    title: String,
    source: Arc<Source>,
    /// Places in `source` of this part's samples.
    members: Vec<usize>,
    channels: usize,
    classes: Classes,
    /// Places in `source` of samples that could not be decoded so far, by this part or one thinned from it.
    broken: Arc<Mutex<BTreeSet<usize>>>,
}

#[derive(Debug)]
enum Source {
    Array(idx_folder::Array),
    Files(folder::Files),
}

/// The classes of both parts of a data set: a label means the same in each.
#[derive(Clone, Debug, Default)]
struct Classes {
    count: usize,
    /// As many as `count`, or none.
    names: Arc<[String]>,
    /// Folders like those of classes without a picture in either part.
    empty: Arc<[String]>,
}

impl Source {
    fn len(&self) -> usize {
        match self {
            Source::Array(array) => array.len,
            Source::Files(files) => files.entries.len(),
        }
    }

    fn label(&self, place: usize) -> Option<u32> {
        match self {
            Source::Array(array) => array.labels.as_ref().map(|labels| labels[place].into()),
            Source::Files(files) => files.entries[place].label,
        }
    }
}

impl Dataset {
    fn new(title: String, source: Arc<Source>, members: Vec<usize>, channels: usize) -> Self {
        Self {
            title,
            source,
            members,
            channels,
            classes: Classes::default(),
            broken: Arc::default(),
        }
    }

    /// Number of samples.
    pub fn len(&self) -> usize {
        self.members.len()
    }

    /// Whether there are no samples. Never so for a data set from [`open`].
    pub fn is_empty(&self) -> bool {
        self.members.is_empty()
    }

    /// Channels of every decoded picture: 1 (grey) or 3 (RGB).
    pub fn channels(&self) -> usize {
        self.channels
    }

    /// The class of sample `i`, below [`Self::num_classes`]; `None` in a data set without labels.
    ///
    /// # Panics
    /// If `i` is not below [`Self::len`].
    pub fn label(&self, i: usize) -> Option<u32> {
        self.source.label(self.members[i])
    }

    /// Number of classes, the same in both parts of a data set; 0 without labels.
    pub fn num_classes(&self) -> usize {
        self.classes.count
    }

    /// The name of class `label`, where classes have names.
    pub fn class_name(&self, label: u32) -> Option<&str> {
        let name = self.classes.names.get(usize::try_from(label).ok()?)?;
        Some(name)
    }

    /// Names of folders that lie beside those of the classes, but have no picture in either part of the data set: no classes.
    pub fn empty_classes(&self) -> &[String] {
        &self.classes.empty
    }

    /// Names, or numbers, of the classes that have none of `labels`.
    pub(crate) fn classes_without(&self, labels: impl IntoIterator<Item = u32>) -> Vec<String> {
        let mut has_any = vec![false; self.num_classes()];
        for label in labels {
            has_any[label as usize] = true;
        }
        let missing = (0..).zip(has_any).filter(|&(_, has_any)| !has_any);
        missing
            .map(|(label, _)| {
                let name = self.class_name(label).map(str::to_owned);
                name.unwrap_or_else(|| label.to_string())
            })
            .collect()
    }

    /// The name of sample `i` for messages: its file, or its place in the file.
    ///
    /// # Panics
    /// If `i` is not below [`Self::len`].
    pub fn name(&self, i: usize) -> String {
        let place = self.members[i];
        match &*self.source {
            Source::Array(array) => format!("{}[{place}]", array.path.display()),
            Source::Files(files) => files.entries[place].path.display().to_string(),
        }
    }

    /// At most `count` of the samples, evenly spaced, so that each class of sorted files keeps its share.
    pub fn thinned(&self, count: usize) -> Self {
        let taken = count.min(self.len());
        let members = (0..taken).map(|i| self.members[i * self.len() / taken]);
        Self {
            title: self.title.clone(),
            source: self.source.clone(),
            members: members.collect(),
            channels: self.channels,
            classes: self.classes.clone(),
            broken: self.broken.clone(),
        }
    }

    /// Tells data sets apart: the number of pictures and a checksum of all of them, or of the names and sizes of their
    /// files.
    ///
    /// # Errors
    /// [`DataError::Read`] if a file is gone.
    pub fn fingerprint(&self) -> Result<String, DataError> {
        let mut sum = 0;
        match &*self.source {
            Source::Array(array) => {
                let mut picture = Picture::default();
                for &place in &self.members {
                    array.picture(place, self.channels, &mut picture);
                    sum = crc32c::crc32c_append(sum, &picture.pixels);
                }
            }
            Source::Files(files) => {
                for &place in &self.members {
                    let path = &files.entries[place].path;
                    let read_error = |error| DataError::Read {
                        path: path.clone(),
                        error,
                    };
                    let len = std::fs::metadata(path).map_err(read_error)?.len();
                    let name = path.file_name().unwrap_or_default();
                    sum = crc32c::crc32c_append(sum, name.as_encoded_bytes());
                    sum = crc32c::crc32c_append(sum, &len.to_le_bytes());
                }
            }
        }
        Ok(format!("{} pictures, crc32c {sum:08x}", self.len()))
    }

    /// The data set in one line, for logs.
    pub fn describe(&self) -> String {
        let size = match &*self.source {
            Source::Array(array) => format!("{}x{}", array.height, array.width),
            Source::Files(_) => "any size".to_owned(),
        };
        let colour = if self.channels == 1 { "grey" } else { "RGB" };
        let classes = match self.num_classes() {
            0 => "no labels".to_owned(),
            1 => "1 class".to_owned(),
            count => format!("{count} classes"),
        };
        format!(
            "{}: {}, {size}, {colour}, {classes}",
            self.title,
            count(self.len(), "picture")
        )
    }

    /// How many different samples could not be decoded so far, and were replaced or left out.
    pub fn num_broken(&self) -> usize {
        self.broken
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .len()
    }

    /// Decodes sample `i`.
    ///
    /// # Errors
    /// If the sample's file cannot be read or decoded; `picture` is then unspecified.
    ///
    /// # Panics
    /// If `i` is not below [`Self::len`].
    pub fn picture(&self, i: usize, picture: &mut Picture) -> Result<(), DataError> {
        let place = self.members[i];
        match &*self.source {
            Source::Array(array) => {
                array.picture(place, self.channels, picture);
                Ok(())
            }
            Source::Files(files) => {
                folder::decode(&files.entries[place].path, self.channels, picture)
            }
        }
    }

    /// Decodes sample `i` or, if that is unreadable, the first readable one after it, and returns which it was.
    ///
    /// A long run so survives a broken file. The choice depends on the files alone; each broken file is logged once.
    ///
    /// # Errors
    /// If a hundred samples in a row (or all) are unreadable.
    ///
    /// # Panics
    /// If `i` is not below [`Self::len`].
    pub fn load(&self, i: usize, picture: &mut Picture) -> Result<usize, DataError> {
        let tried = MAX_SUBSTITUTIONS.min(self.len());
        let first = match self.picture(i, picture) {
            Ok(()) => return Ok(i),
            Err(error) => error,
        };
        self.note_broken(i, &first, REPLACED);
        for step in 1..tried {
            let substitute = (i + step) % self.len();
            match self.picture(substitute, picture) {
                Ok(()) => return Ok(substitute),
                Err(error) => self.note_broken(substitute, &error, REPLACED),
            }
        }
        Err(DataError::Unreadable {
            tried,
            first: Box::new(first),
        })
    }

    /// Logs an unreadable sample, once, with what becomes of it.
    fn note_broken(&self, i: usize, error: &DataError, what: &str) {
        let new = self
            .broken
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(self.members[i]);
        if new {
            log::warn!("{error} ({what})");
        }
    }
}

/// What is to be said about classes without a picture, if there are any.
pub(crate) fn no_pictures_of(classes: &[String]) -> Option<String> {
    const SHOWN: usize = 8;
    let (shown, more) = classes.split_at(classes.len().min(SHOWN));
    let more = match more.len() {
        0 => String::new(),
        more => format!(" and {more} more"),
    };
    (!shown.is_empty()).then(|| format!("no pictures of: {}{more}", shown.join(", ")))
}

/// Opens the data set at `path`, or the embedded one.
///
/// | `path` | what it is | held out |
/// |---|---|---|
/// | `None` | the 10,000 test pictures of Fashion-MNIST, embedded | a fifth |
/// | folder with `train-images-idx3-ubyte` | IDX files, also `.gz`, `.idx3-ubyte`, `idx4`; labels optional | the `t10k-` files, or a tenth |
/// | folder with `train/` | pictures, see below | `val/`, or `test/`, or a tenth |
/// | any other folder | a folder for each class, or pictures without labels | a tenth |
///
/// Pictures are `.jpg`, `.jpeg`, `.png` and `.webp`, upper or lower case. Below a class folder they may lie at any depth;
/// names that start with a dot are left out. Only names are read here: a broken picture shows when it is decoded. A
/// split is a shuffle with a fixed key, balanced over the classes, the same in every run.
///
/// `channels` is 1 (grey) or 3 (RGB); by default what an IDX file has, and 3 for folders of pictures. Grey pictures
/// become RGB by repeating, RGB becomes grey by the luma of ITU-R BT.601; transparent pictures are laid on white.
///
/// # Errors
/// If `path` is no folder that holds such a data set, a file in it is damaged, or `channels` is neither 1 nor 3.
pub fn open(path: Option<&Path>, channels: Option<usize>) -> Result<Splits, DataError> {
    if let Some(channels) = channels
        && channels != 1
        && channels != 3
    {
        return Err(DataError::Setting {
            name: "channels",
            expected: "1 (grey) or 3 (RGB)".to_owned(),
            found: channels.to_string(),
        });
    }
    let Some(path) = path else {
        return idx_folder::open_embedded(channels);
    };
    let metadata = std::fs::metadata(path).map_err(|error| DataError::Read {
        path: path.to_owned(),
        error,
    })?;
    if !metadata.is_dir() {
        return Err(DataError::Layout {
            path: path.to_owned(),
            expected: "a folder".to_owned(),
            found: "a file".to_owned(),
            advice: "give the folder that holds the IDX files or the pictures",
        });
    }
    match idx_folder::open(path, channels)? {
        Some(splits) => Ok(splits),
        None => folder::open(path, channels.unwrap_or(3)),
    }
}

/// The files of pictures at `path`: that file itself, or those at any depth below a folder, in the order of names.
///
/// # Errors
/// [`DataError::Read`] if there is nothing there, [`DataError::Layout`] if a folder holds no picture.
pub fn picture_files(path: &Path) -> Result<Vec<PathBuf>, DataError> {
    folder::files(path)
}

/// Decodes one file to `channels` (1 or 3) channels, see [`open`].
///
/// # Errors
/// [`DataError::Picture`] if it is none; `picture` is then unspecified.
pub fn read_picture(path: &Path, channels: usize, picture: &mut Picture) -> Result<(), DataError> {
    folder::decode(path, channels, picture)
}

/// Opens class folders or pictures at `train` and `held_out` as the two parts of one data set: all of either, and a class
/// of one name is the same in both. A `train/` within `train` is taken for it.
///
/// # Errors
/// As [`open`], and if `train` holds IDX files, which bring their own held-out part.
pub fn open_pair(
    train: &Path,
    held_out: &Path,
    channels: Option<usize>,
) -> Result<Splits, DataError> {
    if is_idx_folder(train) {
        return Err(DataError::Setting {
            name: "--val",
            expected: "a folder of pictures as --data".to_owned(),
            found: "IDX files there; put the held-out ones beside them as t10k-images-idx3-ubyte"
                .to_owned(),
        });
    }
    folder::open_pair(train, held_out, channels.unwrap_or(3))
}

/// Whether a folder holds pictures in IDX files.
pub(crate) fn is_idx_folder(path: &Path) -> bool {
    idx_folder::is_one(path)
}

/// Makes a pair of one source, holding out every `every`-th sample of each class, and at least one in all.
///
/// # Errors
/// If there are fewer than two samples.
fn split(
    path: &Path,
    title: &str,
    source: Source,
    channels: usize,
    every: usize,
) -> Result<(Dataset, Dataset), DataError> {
    let source = Arc::new(source);
    if source.len() < 2 {
        return Err(DataError::Layout {
            path: path.to_owned(),
            expected: "at least 2 pictures, one of them to hold out".to_owned(),
            found: source.len().to_string(),
            advice: "add pictures",
        });
    }
    let mut order: Vec<usize> = (0..source.len()).collect();
    Stream::new(SPLIT_SEED, 0, 0, Purpose::Split).shuffle(&mut order);
    // Stable: the shuffled order stays within a class, and dealing round takes the same share of each.
    order.sort_by_key(|&place| source.label(place));
    let (mut train, mut held_out) = (Vec::new(), Vec::new());
    for (turn, place) in order.into_iter().enumerate() {
        if turn % every == 0 {
            held_out.push(place);
        } else {
            train.push(place);
        }
    }
    train.sort_unstable();
    held_out.sort_unstable();
    let part = |name, members| {
        Dataset::new(
            format!("{title}, {name}"),
            Arc::clone(&source),
            members,
            channels,
        )
    };
    Ok((part("train", train), part("held out", held_out)))
}

/// All samples of one source.
fn whole(title: String, source: Source, channels: usize) -> Dataset {
    let members = (0..source.len()).collect();
    Dataset::new(title, Arc::new(source), members, channels)
}

/// Gives both parts the same classes.
fn join((mut train, mut held_out): (Dataset, Dataset), classes: Classes) -> Splits {
    train.classes = classes.clone();
    held_out.classes = classes;
    Splits {
        train: Arc::new(train),
        held_out: Arc::new(held_out),
    }
}

/// Grey from RGB by the luma of ITU-R BT.601, in the fixed-point arithmetic of Pillow's `convert("L")`.
fn luma([r, g, b]: [u8; 3]) -> u8 {
    let weighted = u32::from(r) * 19_595 + u32::from(g) * 38_470 + u32::from(b) * 7_471;
    ((weighted + 0x8000) >> 16) as u8
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn datasets_are_shared_between_threads() {
        fn shared<T: Send + Sync>() {}
        shared::<Dataset>();
        shared::<DataError>();
    }

    #[test]
    fn classes_without_pictures_are_named_up_to_a_length() {
        let names: Vec<String> = (0..10).map(|i| format!("c{i}")).collect();
        assert_eq!(no_pictures_of(&[]), None);
        assert_eq!(
            no_pictures_of(&names[..2]).unwrap(),
            "no pictures of: c0, c1"
        );
        let many = no_pictures_of(&names).unwrap();
        assert!(many.ends_with("c6, c7 and 2 more"), "{many}");
    }

    #[test]
    fn luma_keeps_grey() {
        for v in 0..=255 {
            assert_eq!(luma([v; 3]), v);
        }
        assert_eq!(luma([255, 0, 0]), 76);
    }

    #[test]
    fn channels_and_paths_are_checked() {
        let message = |path: Option<&Path>, channels| open(path, channels).unwrap_err().to_string();
        assert_eq!(
            message(None, Some(4)),
            "channels: expected 1 (grey) or 3 (RGB), found 4"
        );
        let dir = tempfile::tempdir().unwrap();
        let missing = dir.path().join("missing");
        assert!(message(Some(&missing), None).contains("missing cannot be read"));
        assert!(message(Some(dir.path()), None).contains("expected pictures"));
        let file = dir.path().join("file");
        std::fs::write(&file, "").unwrap();
        assert!(message(Some(&file), None).contains("expected a folder, found a file"));
    }
}
