//! What an embedding has done so far, in a folder beside its output: an interrupted one goes on from there.
//!
//! ```text
//! OUT.partial/state.json             what is computed, how much of it is done, and how long the files are then
//! OUT.partial/features, positions    raw values
//! OUT.partial/names, unreadable      a line for each picture
//! OUT.partial/lock                   held by the process that writes here
//! ```
//!
//! The files are synced before the state says so. After a crash they may be longer than it says: they are cut back.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, BufWriter, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::durable::{atomic_write, remove_leftovers};

/// Where an embedding is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct State {
    /// What is computed, from what.
    pub(super) job: String,
    /// Pictures looked at.
    pub(super) done: usize,
    /// Pictures embedded.
    pub(super) rows: usize,
    /// Pictures that could not be read.
    pub(super) unreadable: usize,
    /// Bytes of each file.
    lengths: [u64; 4],
}

/// Files that grow together.
pub(super) struct Partial {
    folder: PathBuf,
    pub(super) state: State,
    files: [BufWriter<File>; 4],
    /// The lock goes when the file is closed, also by `kill -9`.
    _lock: File,
}

const FILES: [&str; 4] = ["features", "positions", "names", "unreadable"];

impl Partial {
    /// The folder for what goes to `out` in the end.
    pub(super) fn folder_of(out: &Path) -> PathBuf {
        let mut name = out.as_os_str().to_owned();
        name.push(".partial");
        name.into()
    }

    /// Opens or makes `folder`. What is done there may be another job's: the caller compares.
    pub(super) fn open(folder: PathBuf, job: &str) -> io::Result<Self> {
        fs::create_dir_all(&folder)?;
        let open = |name: &str| {
            let mut options = OpenOptions::new();
            options.read(true).write(true).create(true).truncate(false);
            options.open(folder.join(name))
        };
        let lock = open("lock")?;
        lock.try_lock().map_err(|error| match error {
            TryLockError::Error(error) => error,
            TryLockError::WouldBlock => io::Error::other("another process writes there"),
        })?;
        remove_leftovers(&folder)?;
        let state = match fs::read(folder.join("state.json")) {
            Ok(json) => serde_json::from_slice(&json)?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => State {
                job: job.to_owned(),
                ..State::default()
            },
            Err(error) => return Err(error),
        };
        let mut files = Vec::new();
        for (name, length) in FILES.iter().zip(state.lengths) {
            let mut file = open(name)?;
            let found = file.metadata()?.len();
            if state.job == job {
                if found < length {
                    return Err(io::Error::other(format!(
                        "{name} has {found} bytes, not the {length} that were written"
                    )));
                }
                file.set_len(length)?;
            }
            file.seek(SeekFrom::End(0))?;
            files.push(BufWriter::new(file));
        }
        let files = files
            .try_into()
            .map_err(|_| io::Error::other("as many files as lengths"))?;
        Ok(Self {
            folder,
            state,
            files,
            _lock: lock,
        })
    }

    /// Where one of the raw files is.
    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// Adds the pictures up to `done`, of which `names` have `features` (and `positions`) in their order.
    pub(super) fn add(
        &mut self,
        done: usize,
        features: &[f32],
        positions: &[u32],
        names: &[String],
        unreadable: &[(String, String)],
    ) -> io::Result<()> {
        let [to_features, to_positions, to_names, to_unreadable] = &mut self.files;
        for value in features {
            to_features.write_all(&value.to_le_bytes())?;
        }
        for value in positions {
            to_positions.write_all(&value.to_le_bytes())?;
        }
        for name in names {
            writeln!(to_names, "{name}")?;
        }
        for (name, reason) in unreadable {
            writeln!(to_unreadable, "{name}\t{reason}")?;
        }
        self.state.done = done;
        self.state.rows += names.len();
        self.state.unreadable += unreadable.len();
        Ok(())
    }

    /// Makes everything added so far survive a crash.
    pub(super) fn save(&mut self) -> io::Result<()> {
        for (file, length) in self.files.iter_mut().zip(&mut self.state.lengths) {
            file.flush()?;
            file.get_ref().sync_all()?;
            *length = file.get_ref().metadata()?.len();
        }
        let json = serde_json::to_vec(&self.state)?;
        atomic_write(&self.path("state.json"), |out| out.write_all(&json))
    }

    /// Removes the folder.
    pub(super) fn remove(self) -> io::Result<()> {
        fs::remove_dir_all(&self.folder)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn add(partial: &mut Partial, done: usize) {
        let name = format!("{done}.png");
        let features = [done as f32, 0.5];
        let unreadable = [(format!("{done}.txt"), "no picture".to_owned())];
        partial
            .add(done, &features, &[done as u32], &[name], &unreadable)
            .unwrap();
    }

    fn contents(folder: &Path) -> Vec<Vec<u8>> {
        FILES
            .map(|name| fs::read(folder.join(name)).unwrap())
            .to_vec()
    }

    /// What a crash leaves beyond the last state is cut off, whichever file it reached.
    #[test]
    fn what_was_not_saved_is_done_again() {
        let place = tempfile::tempdir().unwrap();
        let folder = Partial::folder_of(&place.path().join("out.npy"));
        assert_eq!(folder, place.path().join("out.npy.partial"));
        let mut partial = Partial::open(folder.clone(), "job").unwrap();
        assert_eq!(partial.state.done, 0);
        add(&mut partial, 1);
        partial.save().unwrap();
        let saved = contents(&folder);
        let state = partial.state.clone();
        add(&mut partial, 2);
        drop(partial);
        assert_ne!(
            contents(&folder),
            saved,
            "the files are longer than the state says"
        );

        let mut partial = Partial::open(folder.clone(), "job").unwrap();
        assert_eq!(partial.state, state);
        assert_eq!(contents(&folder), saved);
        add(&mut partial, 2);
        partial.save().unwrap();
        assert_eq!((partial.state.rows, partial.state.unreadable), (2, 2));
        let names = fs::read_to_string(folder.join("names")).unwrap();
        assert_eq!(names, "1.png\n2.png\n");
        let list = fs::read_to_string(folder.join("unreadable")).unwrap();
        assert_eq!(list, "1.txt\tno picture\n2.txt\tno picture\n");
        partial.remove().unwrap();
        assert!(!folder.exists());
    }

    #[test]
    fn another_job_changes_nothing() {
        let place = tempfile::tempdir().unwrap();
        let folder = place.path().join("x.partial");
        let mut partial = Partial::open(folder.clone(), "one").unwrap();
        add(&mut partial, 1);
        partial.save().unwrap();
        // Beyond the state: not for another job to cut off.
        add(&mut partial, 2);
        drop(partial);
        let saved = contents(&folder);
        let partial = Partial::open(folder.clone(), "another").unwrap();
        assert_eq!(partial.state.job, "one");
        drop(partial);
        assert_eq!(contents(&folder), saved);
    }

    #[test]
    fn two_writers_and_lost_bytes_are_noticed() {
        let place = tempfile::tempdir().unwrap();
        let folder = place.path().join("x.partial");
        let mut partial = Partial::open(folder.clone(), "job").unwrap();
        add(&mut partial, 1);
        partial.save().unwrap();
        let error = Partial::open(folder.clone(), "job").err().unwrap();
        assert!(error.to_string().contains("another process"), "{error}");
        drop(partial);
        fs::write(folder.join("features"), "").unwrap();
        let error = Partial::open(folder, "job").err().unwrap();
        assert!(
            error.to_string().contains("features has 0 bytes"),
            "{error}"
        );
    }
}
