//! What a failed call says, and what to do about it.

use core::ffi::CStr;

use cudarc::driver::result::DriverError;
use cudarc::driver::sys::CUresult;

use crate::error::Error;

/// Names a failed call.
pub(super) fn check(call: &'static str, result: Result<(), DriverError>) -> Result<(), Error> {
    result.map_err(|error| failed(call, error))
}

pub(super) fn failed(call: &'static str, error: DriverError) -> Error {
    let mut text = meaning(error);
    if let Some(advice) = advice(error.0) {
        text += "; ";
        text += advice;
    }
    Error::Driver { call, error: text }
}

/// Names a failed call and what it was about.
pub(super) fn explained(call: &'static str, about: &str, error: DriverError) -> Error {
    Error::Driver {
        call,
        error: format!("{} ({about})", meaning(error)),
    }
}

fn meaning(error: DriverError) -> String {
    let text =
        |text: Result<&CStr, DriverError>| text.map(|text| text.to_string_lossy().into_owned());
    match (text(error.error_name()), text(error.error_string())) {
        (Ok(name), Ok(meaning)) => format!("{name}, {meaning}"),
        // A stub of the driver knows no texts.
        _ => format!("{:?}", error.0),
    }
}

/// What to do about an error whose cause lies outside of the call.
fn advice(error: CUresult) -> Option<&'static str> {
    use CUresult as E;
    Some(match error {
        E::CUDA_ERROR_STUB_LIBRARY => {
            "the toolkit's stub was loaded in place of the driver: remove the folder `stubs` from LD_LIBRARY_PATH"
        }
        E::CUDA_ERROR_SYSTEM_DRIVER_MISMATCH => {
            "libcuda and the kernel's module are of two versions: restart after an update of the driver, and in a container use the \
             libcuda of the machine, not the image's"
        }
        E::CUDA_ERROR_COMPAT_NOT_SUPPORTED_ON_DEVICE => {
            "CUDA's forward compatibility is for data centre devices alone: remove the folder `compat` from LD_LIBRARY_PATH, and \
             update the driver or take an older toolkit"
        }
        E::CUDA_ERROR_DEVICE_UNAVAILABLE => {
            "another process has it for itself, or nobody may compute on it: see `nvidia-smi` (Compute M.), wait for that process, or \
             name another device in CUDA_VISIBLE_DEVICES"
        }
        E::CUDA_ERROR_ILLEGAL_ADDRESS
        | E::CUDA_ERROR_ASSERT
        | E::CUDA_ERROR_HARDWARE_STACK_ERROR
        | E::CUDA_ERROR_ILLEGAL_INSTRUCTION
        | E::CUDA_ERROR_MISALIGNED_ADDRESS
        | E::CUDA_ERROR_INVALID_ADDRESS_SPACE
        | E::CUDA_ERROR_INVALID_PC
        | E::CUDA_ERROR_LAUNCH_FAILED => {
            "a kernel before this call failed, after which nothing runs in this process any more: end it, resume from its last \
             checkpoint, and run the same command under `compute-sanitizer` to find the kernel"
        }
        E::CUDA_ERROR_LAUNCH_TIMEOUT => {
            "a kernel before this call ran longer than a device with a display allows, after which nothing runs in this process any \
             more: end it, and take a device without a display or a smaller batch"
        }
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_with_a_cause_elsewhere_say_what_to_do() {
        use CUresult as E;
        for (error, word) in [
            (E::CUDA_ERROR_STUB_LIBRARY, "LD_LIBRARY_PATH"),
            (E::CUDA_ERROR_SYSTEM_DRIVER_MISMATCH, "restart"),
            (E::CUDA_ERROR_COMPAT_NOT_SUPPORTED_ON_DEVICE, "compat"),
            (E::CUDA_ERROR_DEVICE_UNAVAILABLE, "CUDA_VISIBLE_DEVICES"),
            (E::CUDA_ERROR_ILLEGAL_ADDRESS, "compute-sanitizer"),
            (E::CUDA_ERROR_LAUNCH_FAILED, "compute-sanitizer"),
            (E::CUDA_ERROR_LAUNCH_TIMEOUT, "display"),
        ] {
            let said = advice(error).unwrap_or_default();
            assert!(said.contains(word), "{error:?}: {said}");
        }
        assert_eq!(advice(CUresult::CUDA_ERROR_INVALID_VALUE), None);
    }
}
