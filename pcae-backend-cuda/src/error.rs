//! What can go wrong in this backend.

use core::fmt;

/// A refused operation or constructor, or a failure of the device.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Error {
    /// An operation was called with arguments that do not fit, or met values that it cannot work on.
    Kernel(pcae_kernel::error::Error),
    /// A library of CUDA is not on this machine.
    Library {
        /// What it is.
        what: &'static str,
        /// The names that were looked for.
        names: String,
        /// What to do.
        advice: &'static str,
    },
    /// A library that does not go with the driver, or is older than this program.
    Version {
        /// What it is.
        what: &'static str,
        /// Its version.
        found: String,
        /// Which would do.
        needed: String,
        /// What to do.
        advice: String,
    },
    /// The driver sees fewer devices than were asked for.
    Device {
        /// The device's number.
        asked: usize,
        /// How many there are.
        found: usize,
    },
    /// A device whose instructions do not suffice.
    TooOld {
        /// Its name.
        name: String,
        /// Its compute capability, as `75` for 7.5.
        capability: u32,
    },
    /// A device, or its libraries, that cannot have a teacher in fp8.
    NoFp8 {
        /// Its name.
        device: String,
        /// What it takes.
        needed: &'static str,
        /// What there is.
        found: String,
    },
    /// There is no memory left on the device.
    OutOfMemory {
        /// Bytes asked for.
        bytes: usize,
        /// Bytes that the device has left.
        free: usize,
    },
    /// A call of the driver failed.
    Driver {
        /// The function that said so. Kernels run later than they are launched, so that the cause may lie before it.
        call: &'static str,
        /// Its error by name, and what that means.
        error: String,
    },
    /// A call of NVRTC failed.
    Nvrtc {
        /// The function.
        call: &'static str,
        /// Its error by name.
        error: String,
    },
    /// NVRTC refused a kernel's source.
    Compile {
        /// The file.
        file: &'static str,
        /// What for.
        architecture: String,
        /// What it said.
        log: String,
    },
    /// A call of cuBLASLt failed.
    Cublas {
        /// The function.
        call: &'static str,
        /// Its error by name.
        error: String,
        /// The product, if it was for one.
        product: String,
    },
    /// A buffer of another [`Cuda`](crate::Cuda), on the same device or not.
    Foreign {
        /// The operation that was asked for.
        op: &'static str,
        /// The argument's name.
        what: &'static str,
        /// The name of the device that the operation is for.
        expected: String,
        /// That of the one where the buffer lies.
        found: String,
    },
    /// A kernel that cannot be launched with this shape.
    Launch {
        /// The kernel.
        kernel: &'static str,
        /// What must hold.
        expected: &'static str,
        /// The offending value.
        found: usize,
    },
}

impl Error {
    /// cuBLASLt has no algorithm for a product of e4m3.
    pub(crate) fn no_fp8_product(device: &str, product: &impl fmt::Display) -> Self {
        Self::NoFp8 {
            device: device.to_owned(),
            needed: "a cuBLASLt with an algorithm for each product of e4m3",
            found: format!("none for {product}"),
        }
    }
}

impl From<pcae_kernel::error::Error> for Error {
    fn from(error: pcae_kernel::error::Error) -> Self {
        Self::Kernel(error)
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Kernel(error) => error.fmt(f),
            Self::Library {
                what,
                names,
                advice,
            } => write!(f, "no {what}: looked for {names}; {advice}"),
            Self::Version {
                what,
                found,
                needed,
                advice,
            } => write!(f, "{what}: expected {needed}, found {found}; {advice}"),
            Self::Device { found: 0, .. } => f.write_str(
                "the CUDA driver is there, but sees no device; check `nvidia-smi` and CUDA_VISIBLE_DEVICES, or use --backend cpu",
            ),
            Self::Device { asked, found } => write!(
                f,
                "expected a CUDA device below {found}, found {asked}; devices are counted from 0"
            ),
            Self::TooOld { name, capability } => write!(
                f,
                "{name} has compute capability {}.{}, expected at least 8.0 (Ampere); use --backend cpu",
                capability / 10,
                capability % 10
            ),
            Self::NoFp8 {
                device,
                needed,
                found,
            } => write!(
                f,
                "a teacher in fp8 on {device}: expected {needed}, found {found}; use --teacher-precision bf16"
            ),
            Self::OutOfMemory { bytes, free } => write!(
                f,
                "no memory on the device for {bytes} bytes, {free} are free; try a smaller batch or model"
            ),
            Self::Driver { call, error } => write!(f, "CUDA driver, {call}: {error}"),
            Self::Nvrtc { call, error } => write!(f, "NVRTC, {call}: {error}"),
            Self::Compile {
                file,
                architecture,
                log,
            } => write!(
                f,
                "NVRTC refused kernels/{file} for {architecture}:\n{log}"
            ),
            Self::Cublas {
                call,
                error,
                product,
            } if product.is_empty() => write!(f, "cuBLASLt, {call}: {error}"),
            Self::Cublas {
                call,
                error,
                product,
            } => write!(f, "cuBLASLt, {call}: {error}, for {product}"),
            Self::Foreign {
                op,
                what,
                expected,
                found,
            } => write!(
                f,
                "{op}: `{what}`: expected a buffer that this backend has made (on {expected}), found one of another backend (on {found})"
            ),
            Self::Launch {
                kernel,
                expected,
                found,
            } => write!(f, "kernel {kernel}: expected {expected}, found {found}"),
        }
    }
}

impl core::error::Error for Error {
    fn source(&self) -> Option<&(dyn core::error::Error + 'static)> {
        match self {
            Self::Kernel(error) => Some(error),
            _ => None,
        }
    }
}
