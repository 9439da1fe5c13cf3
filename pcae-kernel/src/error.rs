//! What can go wrong in a kernel operation.

use core::fmt;

/// A refused operation. Nothing was written when it is returned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Error {
    /// A buffer is shorter than the dimensions ask.
    TooShort {
        /// The operation that was asked for.
        op: &'static str,
        /// The argument's name.
        what: &'static str,
        /// Elements needed; `usize::MAX` when the product of the dimensions overflows.
        expected: usize,
        /// Elements there are.
        found: usize,
    },
    /// An index points outside the sequence it indexes.
    IndexOutOfRange {
        /// The operation that was asked for.
        op: &'static str,
        /// The argument's name.
        what: &'static str,
        /// Indices must be below this.
        limit: usize,
        /// The offending index.
        found: usize,
    },
    /// Dimensions that do not fit each other.
    Dimensions {
        /// The operation that was asked for.
        op: &'static str,
        /// What must hold.
        expected: &'static str,
        /// The offending value.
        found: usize,
    },
    /// A value is not a number, so no order can be given.
    NotANumber {
        /// The operation that met it.
        op: &'static str,
        /// The argument's name.
        what: &'static str,
        /// Position of the first offending element.
        at: usize,
    },
    /// The arena that a backend carves its buffers from is used up.
    ArenaFull {
        /// Elements asked for.
        expected: usize,
        /// Elements left.
        found: usize,
    },
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::TooShort {
                op,
                what,
                expected,
                found,
            } => {
                write!(f, "{op}: `{what}` needs {expected} elements, has {found}")
            }
            Self::IndexOutOfRange {
                op,
                what,
                limit,
                found,
            } => {
                write!(
                    f,
                    "{op}: `{what}` holds index {found}, expected less than {limit}"
                )
            }
            Self::Dimensions {
                op,
                expected,
                found,
            } => {
                write!(f, "{op}: expected {expected}, found {found}")
            }
            Self::NotANumber { op, what, at } => {
                write!(
                    f,
                    "{op}: `{what}` is NaN at element {at}; the values before it diverged"
                )
            }
            Self::ArenaFull { expected, found } => {
                write!(f, "arena: {expected} more elements needed, {found} left")
            }
        }
    }
}

impl core::error::Error for Error {}

/// Checks that `found` elements are enough.
///
/// # Errors
/// [`Error::TooShort`] if they are not.
#[inline]
pub fn expect_len(
    op: &'static str,
    what: &'static str,
    found: usize,
    expected: usize,
) -> Result<(), Error> {
    if found < expected {
        Err(Error::TooShort {
            op,
            what,
            expected,
            found,
        })
    } else {
        Ok(())
    }
}

/// Product of dimensions; `usize::MAX` where it overflows, which no buffer satisfies.
#[inline]
pub const fn product(dims: &[usize]) -> usize {
    let mut total: usize = 1;
    let mut i = 0;
    while i < dims.len() {
        total = total.saturating_mul(dims[i]);
        i += 1;
    }
    total
}
