//! Files that are either wholly old or wholly new, whatever kills the process or the machine.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

/// Large enough that a checkpoint is written in few system calls.
const BUFFER_BYTES: usize = 1 << 20;

/// Replaces the file at `path` by what `write` writes, atomically and durably.
///
/// The content goes to a temporary file `.NAME.tmp-PID` in the same folder, which is synced and renamed over
/// `path`; then the folder is synced. A reader sees the old content or the new, never a mixture, and after this
/// returns the new content survives a power failure. Folders on the way to it are made. A process killed half way leaves the temporary file behind;
/// [`remove_leftovers`] deletes it.
///
/// Two threads must not write the same `path` at once: they would share the temporary file.
///
/// # Errors
/// The error of `write`, or of the file system. The old file is then untouched and the temporary one removed,
/// except that an error in the very last step, the sync of the folder, leaves the new content in place.
pub fn atomic_write(
    path: &Path,
    write: impl FnOnce(&mut dyn Write) -> io::Result<()>,
) -> io::Result<()> {
    let temporary = temporary_path(path)?;
    fs::create_dir_all(folder_of(path))?;
    let written = write_and_sync(&temporary, write).and_then(|()| fs::rename(&temporary, path));
    if let Err(error) = written {
        // The first error is the one worth reporting; a temporary file that stays does no harm.
        let _ = fs::remove_file(&temporary);
        return Err(error);
    }
    sync_folder(folder_of(path))
}

/// Whether [`atomic_write`] to `path` would find a folder that takes its file: makes and deletes one in the nearest folder
/// above it that is there.
///
/// # Errors
/// If that is no folder, or takes no file.
pub fn check_writable(path: &Path) -> io::Result<()> {
    let temporary = temporary_path(path)?;
    let name = temporary.file_name().unwrap_or_default();
    let there = folder_of(path)
        .ancestors()
        .find(|folder| folder.symlink_metadata().is_ok());
    let probe = there.unwrap_or(Path::new(".")).join(name);
    File::create(&probe)?;
    fs::remove_file(&probe)
}

fn write_and_sync(
    temporary: &Path,
    write: impl FnOnce(&mut dyn Write) -> io::Result<()>,
) -> io::Result<()> {
    // Not `create_new`: in containers process ids repeat, so a leftover may have our name.
    let mut buffered = BufWriter::with_capacity(BUFFER_BYTES, File::create(temporary)?);
    write(&mut buffered)?;
    buffered
        .into_inner()
        .map_err(io::IntoInnerError::into_error)?
        .sync_all()
}

/// Makes the creations, renames and removals in `folder` so far survive a power failure.
///
/// # Errors
/// If the folder cannot be opened or synced. Where folders cannot be synced (not Unix) it does nothing.
pub fn sync_folder(folder: &Path) -> io::Result<()> {
    if cfg!(unix) {
        File::open(folder)?.sync_all()?;
    }
    Ok(())
}

/// Deletes what writers killed inside [`atomic_write`] left in `folder`.
///
/// The caller must know that no such writer is alive.
///
/// # Errors
/// If the folder cannot be listed or a leftover not deleted.
pub fn remove_leftovers(folder: &Path) -> io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        if is_leftover(&entry.file_name().to_string_lossy()) {
            fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

/// Whether a file name is one that [`atomic_write`] gives to its temporary files.
pub(crate) fn is_leftover(name: &str) -> bool {
    name.starts_with('.')
        && name.rsplit_once(".tmp-").is_some_and(|(_, pid)| {
            !pid.is_empty() && pid.bytes().all(|digit| digit.is_ascii_digit())
        })
}

fn temporary_path(path: &Path) -> io::Result<PathBuf> {
    let name = path.file_name().ok_or_else(|| {
        io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("'{}' does not name a file", path.display()),
        )
    })?;
    let mut temporary = OsString::from(".");
    temporary.push(name);
    temporary.push(format!(".tmp-{}", std::process::id()));
    Ok(path.with_file_name(temporary))
}

/// The folder that holds `path`: `.` for a bare name.
fn folder_of(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names_in(folder: &Path) -> Vec<String> {
        let mut names: Vec<_> = fs::read_dir(folder)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn replaces_the_content() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.txt");
        for content in ["first, longer", "second"] {
            atomic_write(&path, |out| out.write_all(content.as_bytes())).unwrap();
            assert_eq!(fs::read_to_string(&path).unwrap(), content);
        }
        assert_eq!(names_in(folder.path()), ["a.txt"]);
    }

    #[test]
    fn folders_on_the_way_are_made() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("new/deep/a.txt");
        atomic_write(&path, |out| out.write_all(b"content")).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "content");
    }

    #[test]
    fn what_cannot_be_written_is_known_before() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        fs::write(at("file"), "content").unwrap();
        for fits in ["a.txt", "file", "new/deep/a.txt"] {
            check_writable(&at(fits)).unwrap();
        }
        for wrong in ["file/a.txt", "file/new/a.txt"] {
            assert!(check_writable(&at(wrong)).is_err(), "{wrong}");
        }
        assert_eq!(names_in(folder.path()), ["file"]);
        assert_eq!(fs::read_to_string(at("file")).unwrap(), "content");
    }

    #[test]
    fn a_failing_writer_leaves_the_old_file_and_no_temporary() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.txt");
        fs::write(&path, "old").unwrap();
        let error = atomic_write(&path, |out| {
            // More than the buffer, so that some of it has reached the disk.
            out.write_all(&vec![b'x'; 2 * BUFFER_BYTES])?;
            Err(io::Error::other("the writer failed"))
        })
        .unwrap_err();
        assert_eq!(error.to_string(), "the writer failed");
        assert_eq!(fs::read_to_string(&path).unwrap(), "old");
        assert_eq!(names_in(folder.path()), ["a.txt"]);
    }

    #[test]
    fn a_failing_rename_leaves_no_temporary() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a");
        fs::create_dir(&path).unwrap();
        atomic_write(&path, |out| out.write_all(b"new")).unwrap_err();
        assert_eq!(names_in(folder.path()), ["a"]);
    }

    #[test]
    fn a_path_without_a_file_name_is_refused() {
        let error = atomic_write(Path::new(".."), |_| Ok(())).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
    }

    #[test]
    fn leftovers_and_nothing_else_are_removed() {
        let folder = tempfile::tempdir().unwrap();
        let kept = [
            ".a.tmp-",
            ".a.tmp-1x",
            ".tmp-keep",
            "a.tmp-12",
            "last.safetensors",
        ];
        for name in kept.iter().chain(&[".last.safetensors.tmp-4242"]) {
            fs::write(folder.path().join(name), "").unwrap();
        }
        remove_leftovers(folder.path()).unwrap();
        assert_eq!(names_in(folder.path()), kept);
    }
}
