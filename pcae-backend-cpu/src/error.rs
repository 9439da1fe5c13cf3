//! What can go wrong in this backend.

use core::fmt;

/// A refused operation or constructor. Nothing was written when it is returned, but by the layers of a `block` before the one that
/// was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Error {
    /// An operation was called with arguments that do not fit.
    Kernel(pcae_kernel::error::Error),
    /// There is no memory left for a buffer.
    OutOfMemory {
        /// Elements asked for.
        elements: usize,
    },
    /// Frozen parameters were given to what changes or reads them, to a backend with another instruction set, or for a layer
    /// of another shape than the one that was packed.
    Frozen {
        /// Which operation.
        op: &'static str,
    },
    /// An operation that reads f32 was given what another has stored in bf16, for products and attention alone to read.
    Narrow {
        /// Which operation.
        op: &'static str,
        /// Which argument.
        what: &'static str,
    },
    /// Parameters in a bf16 that this backend's instruction set has no unit for.
    Unit {
        /// The unit that was asked for.
        unit: crate::Bf16Unit,
        /// The backend's instruction set.
        isa: crate::Isa,
    },
    /// No instruction set has this name.
    UnknownIsa,
    /// This processor lacks an instruction set.
    MissingIsa {
        /// Its name.
        name: &'static str,
    },
    /// The threads cannot be had.
    Threads {
        /// How many were asked for.
        asked: usize,
    },
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
            Self::OutOfMemory { elements } => {
                write!(
                    f,
                    "no memory for {elements} elements; try a smaller batch or model"
                )
            }
            Self::Frozen { op } => write!(
                f,
                "{op}: expected parameters from `params`, or frozen ones for a forward of the same layers with the instruction set that froze them; found frozen ones"
            ),
            Self::Narrow { op, what } => write!(
                f,
                "{op}: expected `{what}` in f32, found bf16 of `BiasQkv`, `BiasGelu` or attention, which linear layers and attention of the same precision read; read it to the host and write it"
            ),
            Self::Unit { unit, isa } => write!(
                f,
                "expected a bf16 unit that works beside {isa}, found {unit}; take one from `Bf16Unit::available`"
            ),
            Self::UnknownIsa => f.write_str(
                "unknown instruction set; expected `avx512`, `avx2`, `neon` or `portable`",
            ),
            Self::MissingIsa { name } => {
                write!(
                    f,
                    "this processor lacks `{name}`; `portable` works everywhere"
                )
            }
            Self::Threads { asked: 0 } => f.write_str("expected at least 1 thread"),
            Self::Threads { asked } => write!(
                f,
                "cannot start {asked} threads; try fewer, or build with the feature `threads`"
            ),
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
