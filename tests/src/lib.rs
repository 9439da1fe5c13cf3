//! What the tests share.

use std::path::PathBuf;

/// The golden fixtures, written by the float64 PyTorch oracle of the method.
pub fn fixtures() -> Vec<PathBuf> {
    let names = [
        "pcae_small",
        "pcae_gray_rect",
        "mae_small",
        "classify_ptr",
        "classify_dense",
        "encode",
    ];
    names.iter().map(|name| fixture(name)).collect()
}

/// One of them.
pub fn fixture(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("fixtures")
        .join(format!("{name}.safetensors"))
}
