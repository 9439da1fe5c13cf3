//! Reading tensors by name and keeping account of them.

use std::collections::BTreeSet;
use std::path::Path;

use crate::checkpoint::file::{FileError, Reader};
use crate::error::Error;

/// Takes tensors out of a file; in the end it knows which were not there, and which nobody asked for.
pub(super) struct Taker<'a> {
    path: &'a Path,
    reader: &'a Reader,
    prefix: &'a str,
    taken: BTreeSet<String>,
    ignored: BTreeSet<String>,
    missing: Vec<String>,
}

impl<'a> Taker<'a> {
    /// For the names that start with `prefix`, which is left out of what is asked for.
    pub(super) fn new(path: &'a Path, reader: &'a Reader, prefix: &'a str) -> Self {
        Self {
            path,
            reader,
            prefix,
            taken: BTreeSet::new(),
            ignored: BTreeSet::new(),
            missing: Vec::new(),
        }
    }

    /// The shape of a tensor, if it is there.
    pub(super) fn shape(&self, name: &str) -> Option<&'a [usize]> {
        self.reader.shape(&self.whole_name(name))
    }

    /// A name with the prefix.
    pub(super) fn whole_name(&self, name: &str) -> String {
        format!("{}{name}", self.prefix)
    }

    /// The shape of a tensor by its whole name.
    pub(super) fn whole_shape(&self, name: &str) -> Option<&'a [usize]> {
        self.reader.shape(name)
    }

    /// The whole name of `name`, which stands under the prefix, or beside what Hugging Face nests in its models.
    pub(super) fn nested_or_beside(&self, name: &str) -> Option<String> {
        let parts = ["vit.", "dinov2."];
        let outer = parts.iter().find_map(|part| self.prefix.strip_suffix(part));
        [Some(self.prefix), outer]
            .into_iter()
            .flatten()
            .map(|prefix| format!("{prefix}{name}"))
            .find(|name| self.reader.shape(name).is_some())
    }

    /// A tensor's values; `None`, and noted, if it is not there.
    ///
    /// # Errors
    /// If it has another shape, or cannot be read.
    pub(super) fn take(&mut self, name: &str, shape: &[usize]) -> Result<Option<Vec<f32>>, Error> {
        self.take_whole(self.whole_name(name), shape)
    }

    /// [`Taker::take`] by the whole name.
    ///
    /// # Errors
    /// As there.
    pub(super) fn take_whole(
        &mut self,
        name: String,
        shape: &[usize],
    ) -> Result<Option<Vec<f32>>, Error> {
        if self.reader.shape(&name).is_none() {
            self.missing.push(name);
            return Ok(None);
        }
        let values = self
            .reader
            .tensor_f32(&name, shape)
            .map_err(|error| match error {
                FileError::WrongShape {
                    name,
                    expected,
                    found,
                    ..
                } => Error::Checkpoint {
                    path: self.path.to_owned(),
                    reason: format!(
                        "tensor {}: expected shape {expected:?} as the patch projection and the first block make it, found \
                         {found:?}; it is no plain vision transformer",
                        name.escape_default()
                    ),
                },
                other => other.into(),
            })?;
        if let Some(value) = values.iter().find(|value| !value.is_finite()) {
            return Err(Error::Checkpoint {
                path: self.path.to_owned(),
                reason: format!(
                    "tensor {} holds {value}; use a checkpoint from before it diverged",
                    name.escape_default()
                ),
            });
        }
        self.taken.insert(name);
        Ok(Some(values))
    }

    /// Marks what is no part of the encoder, but known, by whole names; tensors that were taken stay so.
    pub(super) fn ignore(&mut self, is_known: impl Fn(&str) -> bool) {
        let names = self.reader.names();
        self.ignored
            .extend(names.into_iter().filter(|name| is_known(name)));
    }

    /// How many were taken, the names of those that were missing, and of those left over.
    pub(super) fn finish(self) -> (usize, Vec<String>, Vec<String>) {
        let mut left = self.reader.names();
        left.retain(|name| !self.taken.contains(name) && !self.ignored.contains(name));
        (self.taken.len(), self.missing, left)
    }
}
