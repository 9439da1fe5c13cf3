use std::path::PathBuf;

use super::idx::IdxError;

/// What can go wrong with data. Each message is one line that says what was expected, what was found and what to do.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DataError {
    /// A file or folder cannot be read.
    #[error("--data: {} cannot be read: {error}; check the path and its permissions", path.display())]
    Read {
        /// What was to be read.
        path: PathBuf,
        /// What the system said.
        error: std::io::Error,
    },
    /// A folder does not hold a data set, or its parts do not belong together.
    #[error("--data {}: expected {expected}, found {found}; {advice}", path.display())]
    Layout {
        /// The folder or file.
        path: PathBuf,
        /// What belongs there.
        expected: String,
        /// What is there.
        found: String,
        /// What to do about it.
        advice: &'static str,
    },
    /// A file is not the IDX file its name says.
    #[error("--data: {}: {error}; download or unpack the file again", path.display())]
    Idx {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        error: IdxError,
    },
    /// A picture cannot be decoded.
    #[error("--data: {}: expected a JPEG, PNG or WebP picture, found: {reason}; remove the file or save it anew", path.display())]
    Picture {
        /// The file.
        path: PathBuf,
        /// What the decoder said.
        reason: String,
    },
    /// So many pictures in a row cannot be decoded that the data set is broken rather than a few files of it.
    #[error(
        "--data: expected at most a few unreadable pictures, found {tried} in a row; the first: {first}"
    )]
    Unreadable {
        /// How many were tried.
        tried: usize,
        /// The error of the first of them.
        first: Box<DataError>,
    },
    /// A batch would need more pictures than there are.
    #[error(
        "--batch-size {batch_size}: expected 1 to {len}, the number of pictures in {dataset}; lower --batch-size or give more pictures with --data"
    )]
    BatchSize {
        /// The size asked for.
        batch_size: usize,
        /// Pictures in the data set.
        len: usize,
        /// The data set, in words.
        dataset: String,
    },
    /// A setting of the data pipeline has a value outside its range, or does not fit the pictures.
    #[error("{name}: expected {expected}, found {found}")]
    Setting {
        /// The setting's name.
        name: &'static str,
        /// The values that are possible.
        expected: String,
        /// The value given.
        found: String,
    },
    /// The threads that prepare batches ended without giving the batch that was asked for.
    #[error("data workers: expected the next batch, found that they ended: {reason}")]
    Worker {
        /// The message of the panic, where there was one.
        reason: String,
    },
}
