//! A device for tests: a real one if there is one, and the emulator of `tests/emulator` in any case.
//!
//! The loader reads `LD_LIBRARY_PATH` when a process starts. So a test binary runs itself once more, with the emulated libraries
//! in that path: [`run_again`] is called by one test, which has to be named `on_the_emulator`.

use std::path::{Path, PathBuf};
use std::process::Command;

/// Set where the emulated libraries are: nothing may be skipped then.
const VARIABLE: &str = "PCAE_EMULATED";

/// Whether there is a device to test on; says so if there is none.
///
/// # Panics
/// On the emulator if it is not found, or not what is found.
pub(crate) fn has_device() -> bool {
    let emulated = std::env::var_os(VARIABLE).is_some();
    let found = pcae_backend_cuda::device_count();
    if emulated {
        assert_eq!(found.expect("the emulated driver is found"), 1);
        return true;
    }
    let found = match found {
        Ok(0) => Err("the driver finds none".to_owned()),
        Ok(_) => Ok(()),
        Err(error) => Err(error.to_string()),
    };
    if let Err(reason) = &found {
        println!("skipped: no CUDA device ({reason})");
    }
    found.is_ok()
}

/// Where the emulated libraries are, built where they are not there yet; `None` without their sources or a compiler for them.
///
/// # Panics
/// If they cannot be built.
pub(crate) fn libraries() -> Option<PathBuf> {
    libraries_of(&Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/emulator"))
}

/// As [`libraries`], of the emulator whose sources are in that folder.
pub(crate) fn libraries_of(sources: &Path) -> Option<PathBuf> {
    // A program that was copied to the machine of a device has no sources beside it.
    let build = sources.join("build");
    if !build.is_file() {
        println!("skipped: no sources of the emulator here");
        return None;
    }
    let into = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("emulator");
    let built = match Command::new("sh").arg(build).arg(into).output() {
        Ok(built) => built,
        Err(error) => {
            println!("skipped: no shell to build the emulator with ({error})");
            return None;
        }
    };
    let said = String::from_utf8_lossy(&built.stderr);
    if built.status.code() == Some(3) {
        println!("skipped: the emulator needs a C++ compiler: {said}");
        return None;
    }
    assert!(built.status.success(), "the emulator is not built: {said}");
    let path = String::from_utf8(built.stdout).expect("a path");
    Some(PathBuf::from(path.trim_end()))
}

/// Runs all other tests of this binary on the emulator.
///
/// # Panics
/// If one fails.
pub(crate) fn run_again() {
    if std::env::var_os(VARIABLE).is_some() {
        return;
    }
    if !cfg!(all(target_os = "linux", target_pointer_width = "64")) {
        println!("skipped: the emulator is for Linux");
        return;
    }
    let Some(folder) = libraries() else { return };
    let before = std::env::var_os("LD_LIBRARY_PATH").unwrap_or_default();
    let paths = std::iter::once(folder.clone()).chain(std::env::split_paths(&before));
    let output = Command::new(std::env::current_exe().expect("this test"))
        .args(["--skip", "on_the_emulator"])
        .env(VARIABLE, "1")
        .env(
            "LD_LIBRARY_PATH",
            std::env::join_paths(paths).expect("paths"),
        )
        // Images live and go with the emulator that made them.
        .env("PCAE_CACHE", folder.join("images"))
        .output()
        .expect("this test can be started");
    let said = String::from_utf8_lossy(&output.stdout).into_owned()
        + &String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success(),
        "on the emulator in {}:\n{said}",
        folder.display()
    );
    println!("{said}");
}
