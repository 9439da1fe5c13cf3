//! The directory of one run, and the rule that one process at a time writes it.
//!
//! ```text
//! OUT/config.toml                    the resolved configuration; its presence makes OUT a run
//! OUT/metrics.jsonl                  one JSON object a line
//! OUT/tensorboard/                   the same values as TensorBoard events
//! OUT/checkpoints/last.safetensors   the newest checkpoint
//! OUT/checkpoints/best.safetensors   of fine-tuning: the weights that were best on the held-out pictures
//! OUT/confusion.csv                  of fine-tuning: which classes those take for which
//! OUT/curves.png                     the curves so far
//! OUT/.lock                          held, by `flock`, by the process that writes the run
//! ```
//!
//! A process may be killed at any moment. Before `config.toml` is there, `OUT` counts as empty and can be created
//! again; afterwards it can be resumed, from step 0 if the first checkpoint was not saved yet.

use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use crate::durable::{atomic_write, is_leftover, remove_leftovers, sync_folder};

const CONFIG: &str = "config.toml";
const LOCK: &str = ".lock";
const CHECKPOINTS: &str = "checkpoints";
const LAST_CHECKPOINT: &str = "last.safetensors";
const BEST_CHECKPOINT: &str = "best.safetensors";
const TENSORBOARD: &str = "tensorboard";
const METRICS: &str = "metrics.jsonl";
const CONFUSION: &str = "confusion.csv";
const CURVES: &str = "curves.png";

/// Why a run directory cannot be used. Every message is one line and says what to do.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RunDirError {
    /// The directory for a new run already holds one.
    #[error(
        "--out '{out}' already holds a run ({CONFIG} found); continue it with `--resume '{out}'`, choose another --out, or remove it",
        out = path.display()
    )]
    HoldsRun {
        /// The directory.
        path: PathBuf,
    },
    /// The directory for a new run holds something else.
    #[error("--out '{}' is not empty (found '{found}'); choose another --out", path.display())]
    NotEmpty {
        /// The directory.
        path: PathBuf,
        /// One of the entries found in it.
        found: String,
    },
    /// The path for a new run is a file.
    #[error("--out '{}' is not a directory; choose another --out", path.display())]
    NotADirectory {
        /// The directory.
        path: PathBuf,
    },
    /// The directory to resume holds no run.
    #[error(
        "--resume '{}' holds no run (no {CONFIG} found); give the --out of an earlier run, or start one with --out",
        path.display()
    )]
    NoRun {
        /// The directory.
        path: PathBuf,
    },
    /// Another process writes the run.
    #[error("run '{}' is in use by process {owner}; wait for it or stop it first", path.display())]
    InUse {
        /// The directory.
        path: PathBuf,
        /// The process id, or `?`.
        owner: String,
    },
    /// The file system failed.
    #[error(
        "run directory '{}': cannot {action}: {cause}; check permissions and free space, or choose another --out",
        path.display()
    )]
    Io {
        /// The directory.
        path: PathBuf,
        /// What was tried.
        action: &'static str,
        /// What the file system said.
        cause: io::Error,
    },
}

/// What an opened run holds, and so where it continues.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RunState {
    /// From step 0: the run ended before its first checkpoint was saved.
    Fresh,
    /// From this checkpoint.
    HasCheckpoint(PathBuf),
}

/// A run directory that this process alone writes, for as long as the value lives.
#[derive(Debug)]
pub struct RunDir {
    path: PathBuf,
    /// The lock goes when the file is closed, also by `kill -9`: no stale locks.
    _lock: File,
}

/// Whether `path` is, or would be, one of the files that a run directory holds of its run.
pub(crate) fn is_own(path: &Path) -> bool {
    let folder = match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    };
    let (Ok(folder), Some(name)) = (folder.canonicalize(), path.file_name()) else {
        return false;
    };
    let is_run = |folder: &Path| folder.join(CONFIG).is_file();
    let own = [CONFIG, METRICS, CONFUSION, CURVES].map(OsStr::new);
    let checkpoints = [LAST_CHECKPOINT, BEST_CHECKPOINT].map(OsStr::new);
    (own.contains(&name) && is_run(&folder))
        || (checkpoints.contains(&name)
            && folder.ends_with(CHECKPOINTS)
            && folder.parent().is_some_and(is_run))
}

impl RunDir {
    /// Makes a new run at `path`, with `config` as its `config.toml`.
    ///
    /// The directory and its parents are made as needed. It may exist if it is empty, or holds no more than a
    /// process killed inside this function left.
    ///
    /// # Errors
    /// [`RunDirError`] in all its variants but `NoRun`; nothing of the user's was changed.
    pub fn create(path: &Path, config: &str) -> Result<Self, RunDirError> {
        if path.exists() && !path.is_dir() {
            return Err(RunDirError::NotADirectory {
                path: path.to_owned(),
            });
        }
        fs::create_dir_all(path).context(path, "make it")?;
        // Before the lock, which would leave its file among the user's, and after it, against a rival.
        refuse_content(path)?;
        let lock = lock(path)?;
        refuse_content(path)?;

        let run = Self {
            path: path.to_owned(),
            _lock: lock,
        };
        remove_leftovers(path).context(path, "remove temporary files")?;
        for folder in [run.checkpoints(), run.tensorboard()] {
            fs::create_dir_all(folder).context(path, "make folders in it")?;
        }
        // Last, because it makes the directory a run. Its sync covers the folders made above.
        atomic_write(&run.config(), |out| out.write_all(config.as_bytes()))
            .context(path, "write config.toml")?;
        sync_folder(&path.join("..")).context(path, "sync its parent")?;
        Ok(run)
    }

    /// Opens the run at `path` to continue it, and removes temporary files that a killed process left.
    ///
    /// # Errors
    /// [`RunDirError::NoRun`], [`RunDirError::InUse`] or [`RunDirError::Io`].
    pub fn open(path: &Path) -> Result<(Self, RunState), RunDirError> {
        if !path.join(CONFIG).is_file() {
            return Err(RunDirError::NoRun {
                path: path.to_owned(),
            });
        }
        let run = Self {
            path: path.to_owned(),
            _lock: lock(path)?,
        };
        for folder in [run.checkpoints(), run.tensorboard()] {
            fs::create_dir_all(&folder).context(path, "make folders in it")?;
            remove_leftovers(&folder).context(path, "remove temporary files")?;
        }
        remove_leftovers(path).context(path, "remove temporary files")?;

        let checkpoint = run.last_checkpoint();
        let exists = checkpoint.try_exists();
        let state = if exists.context(path, "look for a checkpoint")? {
            RunState::HasCheckpoint(checkpoint)
        } else {
            RunState::Fresh
        };
        Ok((run, state))
    }

    /// The directory, as the user named it.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// `config.toml`
    pub fn config(&self) -> PathBuf {
        self.path.join(CONFIG)
    }

    /// `metrics.jsonl`
    pub fn metrics(&self) -> PathBuf {
        self.path.join(METRICS)
    }

    /// `checkpoints`, the folder
    pub fn checkpoints(&self) -> PathBuf {
        self.path.join(CHECKPOINTS)
    }

    /// `checkpoints/last.safetensors`
    pub fn last_checkpoint(&self) -> PathBuf {
        self.checkpoints().join(LAST_CHECKPOINT)
    }

    /// `checkpoints/best.safetensors`
    pub fn best_checkpoint(&self) -> PathBuf {
        self.checkpoints().join(BEST_CHECKPOINT)
    }

    /// `confusion.csv`
    pub fn confusion(&self) -> PathBuf {
        self.path.join(CONFUSION)
    }

    /// `tensorboard`, the folder of the event files
    pub fn tensorboard(&self) -> PathBuf {
        self.path.join(TENSORBOARD)
    }

    /// `curves.png`
    pub fn curves(&self) -> PathBuf {
        self.path.join(CURVES)
    }
}

/// Adds to a file system error the run directory and what was tried.
trait Context<T> {
    fn context(self, path: &Path, action: &'static str) -> Result<T, RunDirError>;
}

impl<T> Context<T> for io::Result<T> {
    fn context(self, path: &Path, action: &'static str) -> Result<T, RunDirError> {
        self.map_err(|cause| RunDirError::Io {
            path: path.to_owned(),
            action,
            cause,
        })
    }
}

/// Fails if `path` holds anything but what an unfinished [`RunDir::create`] leaves.
fn refuse_content(path: &Path) -> Result<(), RunDirError> {
    if path.join(CONFIG).exists() {
        return Err(RunDirError::HoldsRun {
            path: path.to_owned(),
        });
    }
    for entry in fs::read_dir(path).context(path, "list it")? {
        let entry = entry.context(path, "list it")?;
        let name = entry.file_name().to_string_lossy().into_owned();
        let ours = match name.as_str() {
            LOCK => true,
            CHECKPOINTS | TENSORBOARD => is_empty_folder(&entry.path()),
            name => is_leftover(name),
        };
        if !ours {
            return Err(RunDirError::NotEmpty {
                path: path.to_owned(),
                found: name,
            });
        }
    }
    Ok(())
}

fn is_empty_folder(path: &Path) -> bool {
    fs::read_dir(path).is_ok_and(|mut entries| entries.next().is_none())
}

/// Takes the lock of the run, and writes our process id into it for the message that a rival gets.
fn lock(path: &Path) -> Result<File, RunDirError> {
    let mut file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(path.join(LOCK))
        .context(path, "open the lock file")?;
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            let mut owner = String::new();
            // Without the number the message is still worth giving.
            let known = file.read_to_string(&mut owner).is_ok() && !owner.is_empty();
            return Err(RunDirError::InUse {
                path: path.to_owned(),
                owner: if known { owner } else { "?".to_owned() },
            });
        }
        Err(TryLockError::Error(error)) if error.kind() == io::ErrorKind::Unsupported => {
            log::warn!(
                "'{}' is on a file system without locks: do not run two processes on it",
                path.display()
            );
        }
        Err(TryLockError::Error(error)) => return Err(error).context(path, "take the lock"),
    }
    file.set_len(0)
        .and_then(|()| write!(file, "{}", std::process::id()))
        .context(path, "write the lock file")?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    const CONFIG_TEXT: &str = "steps = 10\n";

    #[test]
    fn a_run_is_fresh_until_it_has_a_checkpoint() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a/b");
        drop(RunDir::create(&path, CONFIG_TEXT).unwrap());

        let (run, state) = RunDir::open(&path).unwrap();
        assert_eq!(fs::read_to_string(run.config()).unwrap(), CONFIG_TEXT);
        assert_eq!(state, RunState::Fresh);
        fs::write(run.last_checkpoint(), "").unwrap();
        drop(run);

        let (run, state) = RunDir::open(&path).unwrap();
        let checkpoint = path.join("checkpoints/last.safetensors");
        assert_eq!(state, RunState::HasCheckpoint(checkpoint));
        assert!(run.tensorboard().is_dir());
    }

    #[test]
    fn an_existing_run_is_not_overwritten() {
        let folder = tempfile::tempdir().unwrap();
        drop(RunDir::create(folder.path(), CONFIG_TEXT).unwrap());
        let error = RunDir::create(folder.path(), "").unwrap_err();
        let message = error.to_string();
        assert!(matches!(error, RunDirError::HoldsRun { .. }), "{message}");
        assert!(message.contains("--resume") && message.contains("--out"));
        let config = fs::read_to_string(folder.path().join(CONFIG)).unwrap();
        assert_eq!(config, CONFIG_TEXT);
    }

    #[test]
    fn other_content_is_refused_and_nothing_is_added() {
        for (name, is_folder) in [("holiday.jpg", false), ("photos", true), (".git", true)] {
            let folder = tempfile::tempdir().unwrap();
            let other = folder.path().join(name);
            if is_folder {
                fs::create_dir(&other).unwrap();
            } else {
                fs::write(&other, "").unwrap();
            }
            let error = RunDir::create(folder.path(), CONFIG_TEXT).unwrap_err();
            assert!(
                matches!(&error, RunDirError::NotEmpty { found, .. } if found == name),
                "{error}"
            );
            assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
        }
    }

    #[test]
    fn checkpoints_without_a_config_are_not_overwritten() {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join(CHECKPOINTS)).unwrap();
        fs::write(folder.path().join(CHECKPOINTS).join(LAST_CHECKPOINT), "").unwrap();
        let error = RunDir::create(folder.path(), CONFIG_TEXT).unwrap_err();
        assert!(matches!(error, RunDirError::NotEmpty { .. }), "{error}");
    }

    #[test]
    fn a_creation_that_was_killed_can_be_repeated() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join(LOCK), "4242").unwrap();
        fs::create_dir(folder.path().join(CHECKPOINTS)).unwrap();
        let leftover = folder.path().join(".config.toml.tmp-4242");
        fs::write(&leftover, "ste").unwrap();
        let error = RunDir::open(folder.path()).unwrap_err();
        assert!(matches!(error, RunDirError::NoRun { .. }), "{error}");
        RunDir::create(folder.path(), CONFIG_TEXT).unwrap();
        assert!(!leftover.exists());
    }

    #[test]
    fn a_path_that_is_a_file_or_below_one_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("file");
        fs::write(&file, "").unwrap();
        let error = RunDir::create(&file, CONFIG_TEXT).unwrap_err();
        assert!(
            matches!(error, RunDirError::NotADirectory { .. }),
            "{error}"
        );
        let error = RunDir::create(&file.join("run"), CONFIG_TEXT).unwrap_err();
        assert!(matches!(error, RunDirError::Io { .. }), "{error}");
        assert!(error.to_string().contains("--out"), "{error}");
    }

    #[test]
    fn a_missing_run_cannot_be_resumed() {
        let folder = tempfile::tempdir().unwrap();
        for path in [folder.path().to_owned(), folder.path().join("absent")] {
            let error = RunDir::open(&path).unwrap_err();
            assert!(matches!(error, RunDirError::NoRun { .. }), "{error}");
        }
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_run_has_one_owner() {
        let folder = tempfile::tempdir().unwrap();
        let run = RunDir::create(folder.path(), CONFIG_TEXT).unwrap();
        let error = RunDir::open(folder.path()).unwrap_err();
        assert!(
            matches!(&error, RunDirError::InUse { owner, .. } if *owner == std::process::id().to_string()),
            "{error}"
        );
        drop(run);
        RunDir::open(folder.path()).unwrap();
    }

    #[test]
    fn opening_removes_temporary_files() {
        let folder = tempfile::tempdir().unwrap();
        let run = RunDir::create(folder.path(), CONFIG_TEXT).unwrap();
        let leftover = run.checkpoints().join(".last.safetensors.tmp-4242");
        drop(run);
        fs::write(&leftover, "half a checkpoint").unwrap();
        let (_run, state) = RunDir::open(folder.path()).unwrap();
        assert!(!leftover.exists());
        assert_eq!(state, RunState::Fresh);
    }
}
