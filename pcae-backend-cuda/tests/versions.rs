//! What is said of a driver and libraries that do not go together, by an emulated driver that says it is older than it is.

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

/// In a process of its own, whose libraries say what the variables of the test below tell them.
#[test]
#[ignore = "run by the test below"]
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
            &[
                "works; Err",
                "the CUDA driver: expected at least 12.8",
                "--tune",
            ],
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
        let output = Command::new(std::env::current_exe().expect("this test"))
            .args(["what_is_said", "--ignored", "--nocapture"])
            .env("LD_LIBRARY_PATH", &folder)
            .env("PCAE_CACHE", folder.join("images"))
            .env("PCAE_EMULATED_DRIVER", driver)
            .env("PCAE_EMULATED_NVRTC", nvrtc)
            .env("PCAE_EMULATED_CUBLASLT", cublas)
            .output()
            .expect("this test can be started");
        let said = String::from_utf8_lossy(&output.stdout).into_owned()
            + &String::from_utf8_lossy(&output.stderr);
        for word in words {
            assert!(
                said.contains(word),
                "driver {driver}, NVRTC {nvrtc}, cuBLASLt {cublas}: no {word:?} in {said}"
            );
        }
    }
}
