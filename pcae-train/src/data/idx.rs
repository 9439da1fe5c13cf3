//! The IDX format of MNIST: two zero bytes, the element type, the rank, the sizes as big-endian `u32`, the elements.

/// An array of unsigned bytes, borrowed from the file's bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Idx<'a> {
    /// Sizes, slowest first: `[n]` for labels, `[n, height, width]` for grey pictures. One to [`MAX_RANK`] of them.
    pub shape: Vec<usize>,
    /// The elements in row-major order, as many as the product of `shape`.
    pub data: &'a [u8],
}

/// The most dimensions a file may have: `[n, height, width, channels]`.
pub const MAX_RANK: usize = 4;

/// The code of unsigned bytes in the third byte of a file.
const UNSIGNED_BYTE: u8 = 0x08;

/// What is wrong with the bytes of an IDX file.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum IdxError {
    /// The bytes end within the header.
    #[error("expected a header of {expected} bytes, found {found} bytes in all")]
    Header {
        /// Length of the header, as far as it can be known.
        expected: usize,
        /// Length of the input.
        found: usize,
    },
    /// The first two bytes are not zero.
    #[error("expected an IDX file, which starts with the bytes 00 00, found {:02x} {:02x}", found[0], found[1])]
    Magic {
        /// The first two bytes.
        found: [u8; 2],
    },
    /// The elements are not unsigned bytes.
    #[error("expected elements of type 0x08 (unsigned byte), found type 0x{found:02x}")]
    Element {
        /// The third byte.
        found: u8,
    },
    /// The rank is not supported.
    #[error("expected 1 to {MAX_RANK} dimensions, found {found}")]
    Rank {
        /// The fourth byte.
        found: u8,
    },
    /// The product of the sizes overflows.
    #[error("expected sizes whose product can be addressed, found {found:?}")]
    Size {
        /// The sizes in the header.
        found: Vec<u32>,
    },
    /// More or fewer elements than the header says.
    #[error("expected {expected} elements for the shape {shape:?}, found {found}")]
    Elements {
        /// The sizes in the header.
        shape: Vec<usize>,
        /// Their product.
        expected: usize,
        /// Bytes after the header.
        found: usize,
    },
}

/// Reads an IDX file of unsigned bytes. Allocates nothing but the shape.
///
/// # Errors
/// If the header is not that of an IDX file of unsigned bytes of rank 1 to [`MAX_RANK`], or the number of elements is
/// not exactly the product of its sizes.
pub fn parse(bytes: &[u8]) -> Result<Idx<'_>, IdxError> {
    let short = |expected| IdxError::Header {
        expected,
        found: bytes.len(),
    };
    let (&[zero0, zero1, element, rank], rest) =
        bytes.split_first_chunk::<4>().ok_or_else(|| short(4))?;
    if [zero0, zero1] != [0, 0] {
        return Err(IdxError::Magic {
            found: [zero0, zero1],
        });
    }
    if element != UNSIGNED_BYTE {
        return Err(IdxError::Element { found: element });
    }
    let sizes = usize::from(rank);
    if sizes == 0 || sizes > MAX_RANK {
        return Err(IdxError::Rank { found: rank });
    }
    let (sizes, data) = rest
        .split_at_checked(4 * sizes)
        .ok_or_else(|| short(4 + 4 * sizes))?;
    let sizes: Vec<u32> = sizes
        .as_chunks::<4>()
        .0
        .iter()
        .map(|&size| u32::from_be_bytes(size))
        .collect();
    let addressable = || {
        let shape: Vec<usize> = sizes
            .iter()
            .map(|&size| usize::try_from(size).ok())
            .collect::<Option<_>>()?;
        let product = shape
            .iter()
            .try_fold(1_usize, |product, &size| product.checked_mul(size))?;
        Some((shape, product))
    };
    let Some((shape, expected)) = addressable() else {
        return Err(IdxError::Size { found: sizes });
    };
    if data.len() != expected {
        return Err(IdxError::Elements {
            shape,
            expected,
            found: data.len(),
        });
    }
    Ok(Idx { shape, data })
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The file that holds `data` in `shape`.
    pub(in crate::data) fn serialize(shape: &[usize], data: &[u8]) -> Vec<u8> {
        let mut bytes = vec![0, 0, UNSIGNED_BYTE, shape.len() as u8];
        for &size in shape {
            bytes.extend((size as u32).to_be_bytes());
        }
        bytes.extend(data);
        bytes
    }

    #[test]
    fn every_truncation_and_extension_is_an_error() {
        let mut bytes = serialize(&[2, 3, 5], &[7; 30]);
        for length in 0..bytes.len() {
            let error = parse(&bytes[..length]).unwrap_err();
            match error {
                IdxError::Header { expected, found } => {
                    assert!(length < 16 && found == length && expected > length);
                }
                IdxError::Elements {
                    expected, found, ..
                } => assert_eq!((expected, found), (30, length - 16)),
                other => panic!("{other}"),
            }
        }
        bytes.push(0);
        assert_eq!(
            parse(&bytes).unwrap_err().to_string(),
            "expected 30 elements for the shape [2, 3, 5], found 31"
        );
    }

    #[test]
    fn errors_name_what_was_found() {
        let message = |bytes: &[u8]| parse(bytes).unwrap_err().to_string();
        assert!(message(b"\x89PNG").contains("found 89 50"));
        assert!(message(&[0, 0, 0x0d, 1]).contains("type 0x0d"));
        assert!(message(&[0, 0, 8, 0]).contains("1 to 4 dimensions, found 0"));
        assert!(message(&[0, 0, 8, 5]).contains("found 5"));
        let mut huge = vec![0, 0, 8, 3];
        huge.extend([0xff; 12]);
        assert!(message(&huge).contains("4294967295, 4294967295, 4294967295"));
    }

    proptest! {
        #[test]
        fn round_trip(
            shape in prop::collection::vec(0_usize..5, 1..=MAX_RANK),
            seed in any::<u8>(),
        ) {
            let count: usize = shape.iter().product();
            let data: Vec<u8> = (0..count).map(|i| seed.wrapping_mul(31).wrapping_add(i as u8)).collect();
            let bytes = serialize(&shape, &data);
            prop_assert_eq!(parse(&bytes), Ok(Idx { shape, data: &data }));
        }

        /// Whatever is accepted says exactly what the bytes say.
        #[test]
        fn what_is_accepted_serialises_to_itself(
            start in prop::collection::vec(any::<u8>(), 0..3),
            rest in prop::collection::vec(0_u8..3, 0..24),
        ) {
            let mut bytes = vec![0, 0, UNSIGNED_BYTE];
            if start.len() < 2 {
                bytes.extend(rest);
            } else {
                bytes = start;
            }
            if let Ok(idx) = parse(&bytes) {
                prop_assert_eq!(serialize(&idx.shape, idx.data), bytes);
            }
        }
    }
}
