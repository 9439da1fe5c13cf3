//! What the tests share.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use pcae_train::data::{self, Picture};

/// The golden fixtures, written by the float64 PyTorch oracle of the method.
pub const FIXTURES: [&str; 6] = [
    "pcae_small",
    "pcae_gray_rect",
    "mae_small",
    "classify_ptr",
    "classify_dense",
    "encode",
];

/// The path of one of them.
pub fn fixture(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("fixtures")
        .join(format!("{name}.safetensors"))
}

/// Runs the command to its end.
///
/// # Panics
/// If it cannot be started.
pub fn pcae(binary: &str, args: &[&str]) -> Output {
    Command::new(binary)
        .args(args)
        .output()
        .expect("the command starts")
}

/// What it wrote to standard error.
pub fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// What it wrote to standard output.
pub fn stdout(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Writes real pictures, the first of the embedded Fashion-MNIST, as an IDX folder.
///
/// # Panics
/// If the disk fails.
pub fn idx_folder(folder: &Path, train: usize, held_out: usize) {
    let splits = data::open(None, None).expect("the embedded set opens");
    std::fs::create_dir_all(folder).expect("the folder can be made");
    for (part, dataset, count) in [
        ("train", &splits.train, train),
        ("t10k", &splits.held_out, held_out),
    ] {
        let mut pixels = Vec::new();
        let mut labels = Vec::new();
        let mut picture = Picture::default();
        for i in 0..count {
            dataset
                .picture(i, &mut picture)
                .expect("the picture is there");
            pixels.extend_from_slice(&picture.pixels);
            labels.push(dataset.label(i).expect("the label is there") as u8);
        }
        let write = |name: String, shape: &[u32], data: &[u8]| {
            let mut bytes = vec![0, 0, 8, shape.len() as u8];
            bytes.extend(shape.iter().flat_map(|size| size.to_be_bytes()));
            bytes.extend_from_slice(data);
            std::fs::write(folder.join(name), bytes).expect("the file can be written");
        };
        write(
            format!("{part}-images-idx3-ubyte"),
            &[count as u32, 28, 28],
            &pixels,
        );
        write(
            format!("{part}-labels-idx1-ubyte"),
            &[count as u32],
            &labels,
        );
    }
}

/// Settings of a model that trains in milliseconds.
pub const TINY: &[&str] = &[
    "--set",
    "embed_dim=16",
    "--set",
    "depth=3",
    "--set",
    "num_heads=2",
    "--set",
    "decoder_embed_dim=8",
    "--set",
    "decoder_depth=1",
    "--set",
    "decoder_num_heads=1",
];

/// A PNG of the given size.
///
/// # Panics
/// Never in practice: writing to memory does not fail.
pub fn png(width: u32, height: u32, pixel: impl Fn(u32, u32) -> [u8; 3]) -> Vec<u8> {
    let picture = image::RgbImage::from_fn(width, height, |x, y| image::Rgb(pixel(x, y)));
    let mut bytes = std::io::Cursor::new(Vec::new());
    picture
        .write_to(&mut bytes, image::ImageFormat::Png)
        .expect("memory can be written to");
    bytes.into_inner()
}
