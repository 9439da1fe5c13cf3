use pcae_train::data::idx::parse;

use crate::allocations::peak;

/// Parses the bytes as an IDX file.
///
/// Oracle: what is accepted, written out again by the format's definition, is the input; memory is bounded whatever
/// the header says.
pub fn idx(bytes: &[u8]) {
    let (parsed, memory) = peak(|| parse(bytes));
    assert!(memory <= 256, "{memory} bytes for a shape");
    match parsed {
        Ok(idx) => {
            let mut written = vec![0, 0, 8, idx.shape.len() as u8];
            for &size in &idx.shape {
                let size = u32::try_from(size).expect("the format stores sizes in four bytes");
                written.extend(size.to_be_bytes());
            }
            written.extend(idx.data);
            assert_eq!(written, bytes);
        }
        Err(error) => assert!(!error.to_string().is_empty()),
    }
}
