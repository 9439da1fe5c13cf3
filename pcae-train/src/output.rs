//! Files that commands write where their flags say: what these must not replace.

use std::path::Path;

use crate::durable;
use crate::error::Error;
use crate::run_dir;

/// What is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Parameters.
    Safetensors,
    /// A network for other programs.
    Onnx,
    /// A picture.
    Png,
    /// A table.
    Csv,
    /// Figures.
    Json,
}

impl Kind {
    fn extension(self) -> &'static str {
        match self {
            Self::Safetensors => "safetensors",
            Self::Onnx => "onnx",
            Self::Png => "png",
            Self::Csv => "csv",
            Self::Json => "json",
        }
    }
}

/// Checks that a file of `kind` may be written to `path`, the value of `flag`, by a command that reads `inputs`, files or folders:
/// its name says what it is, its folder takes files, and it replaces nothing that is read, nor what a run directory holds of its
/// run. All that is known before the command's work, and not after hours of it.
///
/// # Errors
/// [`Error::Setting`] naming the flag.
pub(crate) fn check(
    flag: &str,
    path: &Path,
    kind: Kind,
    inputs: &[impl AsRef<Path>],
) -> Result<(), Error> {
    let extension = kind.extension();
    let fits = path
        .extension()
        .is_some_and(|found| found.eq_ignore_ascii_case(extension));
    if !fits {
        // What has another extension is likely to be something else, and would be lost.
        let expected = format!("a name that ends with .{extension}");
        return Err(wrong(flag, path, &expected));
    }
    if path.is_dir() {
        return Err(wrong(flag, path, "a file to write, no folder"));
    }
    if run_dir::is_own(path) {
        let expected = "another file than one of a run's own, which the run directory needs";
        return Err(wrong(flag, path, expected));
    }
    refuse_inputs(flag, path, inputs)?;
    durable::check_writable(path).map_err(|error| {
        let expected = format!("a place where a file can be written ({error})");
        wrong(flag, path, &expected)
    })
}

/// Refuses to replace a file that is read: one of `inputs`, or below a folder among them.
///
/// # Errors
/// [`Error::Setting`] naming the flag.
pub(crate) fn refuse_inputs(
    flag: &str,
    path: &Path,
    inputs: &[impl AsRef<Path>],
) -> Result<(), Error> {
    // What is not there yet replaces nothing.
    let Ok(there) = path.canonicalize() else {
        return Ok(());
    };
    let is_read = |input: &Path| {
        let input = input.canonicalize();
        input.is_ok_and(|input| input == there || (input.is_dir() && there.starts_with(&input)))
    };
    if inputs.iter().any(|input| is_read(input.as_ref())) {
        return Err(wrong(flag, path, "another file than one that is read"));
    }
    Ok(())
}

fn wrong(flag: &str, path: &Path, expected: &str) -> Error {
    Error::Setting {
        name: flag.to_owned(),
        reason: format!(
            "expected {expected}, found '{}'; choose another path",
            path.display()
        ),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn what_is_read_and_what_is_another_kind_stays() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path();
        let at = |name: &str| root.join(name);
        for name in ["run/checkpoints", "photos/deep", "folder.png"] {
            fs::create_dir_all(at(name)).unwrap();
        }
        for name in [
            "run/config.toml",
            "run/checkpoints/last.safetensors",
            "photos/deep/a.png",
            "old.png",
            "b.jpg",
        ] {
            fs::write(at(name), "content").unwrap();
        }
        let (photos, old) = (at("photos"), at("old.png"));
        let inputs = [&photos as &Path, &old, Path::new("nowhere")];
        for (name, kind, expected) in [
            ("b.jpg", Kind::Png, ".png"),
            ("table", Kind::Csv, ".csv"),
            ("model.onnx", Kind::Safetensors, ".safetensors"),
            ("old.png", Kind::Png, "another file"),
            // By another name.
            ("run/../old.png", Kind::Png, "another file"),
            ("photos/deep/a.png", Kind::Png, "another file"),
            ("folder.png", Kind::Png, "no folder"),
            ("old.png/new.png", Kind::Png, "can be written"),
            ("run/checkpoints/last.safetensors", Kind::Safetensors, "run"),
            // It would be what the run means from then on.
            ("run/checkpoints/best.safetensors", Kind::Safetensors, "run"),
            ("run/confusion.csv", Kind::Csv, "run"),
            ("run/checkpoints/../curves.png", Kind::Png, "run"),
        ] {
            let error = check("--out", &at(name), kind, &inputs).unwrap_err();
            assert!(error.is_usage(), "{name}: {error}");
            let error = error.to_string();
            for part in ["--out", "expected", expected, name] {
                assert!(error.contains(part), "{name}: {part} in {error}");
            }
        }
        for (name, kind) in [
            ("new.PNG", Kind::Png),
            ("photos/new.png", Kind::Png),
            ("run/encoder.onnx", Kind::Onnx),
            ("run/checkpoints/deployed.safetensors", Kind::Safetensors),
            ("run/other.csv", Kind::Csv),
            ("bench.json", Kind::Json),
        ] {
            check("--out", &at(name), kind, &inputs).unwrap();
        }
        // A file that is not read may be written anew.
        check("--out", &old, Kind::Png, &[&photos]).unwrap();
    }
}
