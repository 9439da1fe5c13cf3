//! What is said of a driver and libraries that do not go together, by an emulated driver that says it is older than it is.

use std::path::Path;
use std::process::Command;

use pcae_backend_cuda::{Cuda, Precision};
use pcae_kernel::backend::TrainBackend;

mod emulated;

#[test]
fn on_the_emulator() {
    emulated::run_again();
}

#[test]
fn what_is_there_goes_together() {
    if emulated::has_device() {
        Cuda::new(0, Precision::F32).expect("driver and libraries that go together");
    }
}

/// As on the machine of a device, where the programs of the tests are without these sources.
#[test]
fn without_sources_there_is_no_emulator_and_no_failure() {
    let sources = Path::new(env!("CARGO_TARGET_TMPDIR")).join("no sources");
    assert_eq!(emulated::libraries_of(&sources), None);
}

/// In a process of its own, whose libraries say what the variables of the test below tell them.
#[test]
#[ignore = "a child process: the test below runs it, and says so where it cannot"]
fn what_is_said() {
    match Cuda::new(0, Precision::F32) {
        Ok(mut cuda) => {
            cuda.start_clock().expect("a clock that starts");
            println!(
                "works; {:?}",
                cuda.stop_clock().map_err(|error| error.to_string())
            );
        }
        Err(error) => println!("refused: {error}"),
    }
}

#[test]
fn what_does_not_go_together_is_refused_with_what_was_found() {
    if !cfg!(all(target_os = "linux", target_pointer_width = "64")) {
        println!("skipped: the emulator is for Linux");
        return;
    }
    let Some(folder) = emulated::libraries() else {
        return;
    };
    let cases: [(&str, &str, &str, &[&str]); 6] = [
        ("13000", "13", "130000", &["works; Ok(Some("]),
        ("12080", "12", "120800", &["works; Ok(Some("]),
        (
            "12080",
            "13",
            "120800",
            &[
                "refused",
                "NVRTC: expected at most 12",
                "CUDA 12.8",
                "LD_LIBRARY_PATH",
            ],
        ),
        (
            "12040",
            "12",
            "120400",
            // By the older of the driver's clocks: the newer one fails there.
            &["works; Ok(Some("],
        ),
        (
            "12040",
            "12",
            "130000",
            &[
                "refused",
                "cuBLASLt: expected at most 12",
                "CUDA 12.4",
                "LD_LIBRARY_PATH",
            ],
        ),
        (
            "11080",
            "12",
            "120400",
            &[
                "refused",
                "the CUDA driver: expected at least 12.0, found 11.8",
                "update",
            ],
        ),
    ];
    for (driver, nvrtc, cublas, words) in cases {
        let versions = [
            ("PCAE_EMULATED_DRIVER", driver),
            ("PCAE_EMULATED_NVRTC", nvrtc),
            ("PCAE_EMULATED_CUBLASLT", cublas),
        ];
        says(&folder, &versions, words);
    }
}

/// Whether a process on libraries that `variables` make says all of `words`.
fn says(folder: &Path, variables: &[(&str, &str)], words: &[&str]) {
    let output = Command::new(std::env::current_exe().expect("this test"))
        .args(["what_is_said", "--ignored", "--nocapture"])
        .env("LD_LIBRARY_PATH", folder)
        .env("PCAE_CACHE", folder.join("images"))
        .envs(variables.iter().copied())
        .output()
        .expect("this test can be started");
    let said = String::from_utf8_lossy(&output.stdout).into_owned()
        + &String::from_utf8_lossy(&output.stderr);
    for word in words {
        assert!(said.contains(word), "{variables:?}: no {word:?} in {said}");
    }
}

/// Errors whose cause lies outside of this program: by name even of a library that knows no names, and with what to do.
#[test]
fn a_driver_that_does_not_start_says_what_to_do() {
    if !cfg!(all(target_os = "linux", target_pointer_width = "64")) {
        println!("skipped: the emulator is for Linux");
        return;
    }
    let Some(folder) = emulated::libraries() else {
        return;
    };
    for (code, words) in [
        ("34", ["CUDA_ERROR_STUB_LIBRARY", "`stubs`"]),
        ("803", ["CUDA_ERROR_SYSTEM_DRIVER_MISMATCH", "restart"]),
    ] {
        let words = [&["refused: CUDA driver, cuInit"], &words[..]].concat();
        says(&folder, &[("PCAE_EMULATED_INIT", code)], &words);
    }
}
