//! What the tests share.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use pcae_train::data::{self, Picture};
use serde_json::Value;

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

/// The command under test, by its path.
#[derive(Clone, Copy)]
pub struct Program(pub &'static str);

impl Program {
    /// Runs it to its end.
    ///
    /// # Panics
    /// If it cannot be started.
    pub fn run(self, args: &[&str]) -> Output {
        pcae(self.0, args)
    }

    /// Runs it, to success.
    ///
    /// # Panics
    /// If it fails.
    pub fn succeeds(self, args: &[&str]) -> Output {
        let output = self.run(args);
        assert!(output.status.success(), "{args:?}: {}", stderr(&output));
        output
    }

    /// What it prints with `--json`.
    ///
    /// # Panics
    /// If it fails, or prints something else.
    pub fn json(self, args: &[&str]) -> Value {
        let output = self.succeeds(&[args, &["--json"]].concat());
        serde_json::from_str(&stdout(&output)).expect("it prints JSON")
    }

    /// Runs it, to an exit with this code and a message that says each of `expected`, and gives that message.
    ///
    /// # Panics
    /// If it ends otherwise.
    pub fn fails(self, code: i32, args: &[&str], expected: &[&str]) -> String {
        let output = self.run(args);
        let text = stderr(&output);
        assert_eq!(output.status.code(), Some(code), "{args:?}: {text}");
        for expected in expected {
            assert!(text.contains(expected), "{args:?}: {expected:?} in {text}");
        }
        text
    }
}

/// `pcae finetune` of random weights.
pub fn from_scratch<'a>(data: &'a str, out: &'a str) -> [&'a str; 7] {
    [
        "finetune",
        "--weights",
        "none",
        "--data",
        data,
        "--out",
        out,
    ]
}

/// A folder of its own, with real pictures in `data`; gone when it is dropped.
pub struct Place {
    folder: tempfile::TempDir,
}

impl Place {
    /// With so many pictures to train on and held out.
    ///
    /// # Panics
    /// If the disk fails.
    pub fn new(train: usize, held_out: usize) -> Self {
        let place = Self {
            folder: tempfile::tempdir().expect("a folder can be made"),
        };
        idx_folder(Path::new(&place.path("data")), train, held_out);
        place
    }

    /// The path of what is called so in it.
    ///
    /// # Panics
    /// If the system's temporary folder has a name that is no text.
    pub fn path(&self, name: &str) -> String {
        let path = self.folder.path().join(name);
        path.to_str().expect("a path is text").to_owned()
    }
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
