//! `pcae visualize`: what is drawn is what was computed.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::path::Path;

use image::RgbImage;
use pcae_tests::{TINY, pcae, png, stderr, stdout};

const BINARY: &str = env!("CARGO_BIN_EXE_pcae-under-test");
/// 4 x 3 patches.
const SIZE: &[&str] = &["--set", "img_size=[32,24]", "--set", "patch_size=8"];

/// A run of two steps on coloured pictures.
fn run(folder: &Path, method: &str) -> String {
    let data = folder.join("photos");
    fs::create_dir_all(&data).unwrap();
    for i in 0..12_u32 {
        let picture = png(32 + i, 40, |x, y| {
            [(x * 7) as u8, (y * 6) as u8, (i * 20) as u8]
        });
        fs::write(data.join(format!("{i}.png")), picture).unwrap();
    }
    let out = folder.join(method).to_str().unwrap().to_owned();
    let data = data.to_str().unwrap();
    let fixed = [
        "pretrain", "--data", data, "--method", method, "--out", &out,
    ];
    let few = [
        "--batch-size",
        "4",
        "--steps",
        "2",
        "--set",
        "drop_layers=0,1",
    ];
    let output = pcae(BINARY, &[&fixed[..], &few, SIZE, TINY].concat());
    assert!(output.status.success(), "{}", stderr(&output));
    out
}

fn draw(args: &[&str], out: &Path) -> RgbImage {
    let all = [&["visualize"], args, &["--out", out.to_str().unwrap()]].concat();
    let output = pcae(BINARY, &all);
    assert!(output.status.success(), "{}", stderr(&output));
    assert!(stdout(&output).contains("picture"), "{}", stdout(&output));
    let picture = image::open(out).unwrap().into_rgb8();
    assert_eq!(picture.width(), 1200);
    picture
}

/// Whole patches of grey in the sheet: those that were dropped. The drawn patches are colourful.
fn grey_share(picture: &RgbImage) -> f64 {
    let grey = picture.pixels().filter(|pixel| {
        let [r, g, b] = pixel.0;
        r == g && g == b && (195..=235).contains(&r)
    });
    grey.count() as f64
}

#[test]
fn stages_and_steps() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("sheet.png");
    let pcae_run = run(folder.path(), "pcae");
    let one = folder.path().join("photos/3.png");
    let one = one.to_str().unwrap();

    // Cells of three columns are 129 * 3 wide: patches of 127 x 127. 12 patches, 6 and 3 stay: 6 + 9 are grey.
    let patch = ((1200 - 40 - 20) / 3 / 3) as f64;
    let stages = draw(&[&pcae_run, one, "--keep-ratio", "0.5"], &out);
    let dropped = grey_share(&stages) / patch.powi(2);
    assert!((dropped - 15.0).abs() < 0.2, "{dropped}");
    // A classifier's stages, after all three blocks: ceil(12 * 0.75) = 9, ceil(9 * 0.75) = 7, ceil(7 * 0.75) = 6: 3 + 5 + 6.
    let smaller = ((1200 - 40 - 30) / 4 / 3) as f64;
    let stages = draw(&[&pcae_run, one, "--drop-ratio", "0.25"], &out);
    let dropped = grey_share(&stages) / smaller.powi(2);
    assert!((dropped - 14.0).abs() < 0.3, "{dropped}");
    // With heat: all of the first cell of its row, none of the second, the dropped of the third.
    let plain = draw(&[&pcae_run, one], &out);
    let heat = draw(&[&pcae_run, one, "--heat"], &out);
    assert!(heat.height() > plain.height() + 3 * patch as u32);
    let more = (grey_share(&heat) - grey_share(&plain)) / patch.powi(2);
    assert!((more - 18.0).abs() < 0.2, "{more}");

    // Four columns for a step: 3 of 12 seen, 2 of 9 retained, and the same two in the last.
    let patch = ((1200 - 40 - 30) / 4 / 3) as f64;
    let step = draw(&[&pcae_run, one, "--masked"], &out);
    let dropped = grey_share(&step) / patch.powi(2);
    assert!((dropped - (9.0 + 10.0 + 10.0)).abs() < 0.3, "{dropped}");
    let other = draw(&[&pcae_run, one, "--masked", "--seed", "1"], &out);
    assert_ne!(step, other);
    // Held-out pictures of the run's own data, and a whole folder.
    let own = draw(&[&pcae_run, "--masked", "--count", "1"], &out);
    assert_eq!(own.height(), step.height());
    let all = draw(
        &[&pcae_run, folder.path().join("photos").to_str().unwrap()],
        &out,
    );
    assert!(all.height() > 3 * plain.height());

    let mae = run(&folder.path().join("mae-run"), "mae");
    let patch = ((1200 - 40 - 20) / 3 / 3) as f64;
    let step = draw(&[&mae, one, "--masked"], &out);
    let dropped = grey_share(&step) / patch.powi(2);
    assert!((dropped - 9.0).abs() < 0.2, "{dropped}");
}

#[test]
fn what_cannot_be_drawn() {
    let folder = tempfile::tempdir().unwrap();
    let run = run(folder.path(), "pcae");
    let broken = folder.path().join("broken.png");
    fs::write(&broken, "no picture").unwrap();
    let broken = broken.to_str().unwrap();
    let empty = folder.path().join("empty");
    fs::create_dir(&empty).unwrap();
    let good = folder.path().join("photos/1.png");
    let (empty, good) = (empty.to_str().unwrap(), good.to_str().unwrap());
    let out = folder.path().join("sheet.png");
    let cases: [(&[&str], i32, &str); 7] = [
        (&["--count", "0"], 2, "--count"),
        (&["--count", "65"], 2, "--count"),
        (&["--drop-layers", "3"], 2, "--drop-layers"),
        (&["--keep-ratio", "0.1"], 2, "--keep-ratio"),
        (&["--masked", "--heat"], 2, "--heat"),
        (&[broken], 1, "broken.png"),
        (&[empty], 1, "empty"),
    ];
    for (more, code, named) in cases {
        let all = [&["visualize", &run, "--out", out.to_str().unwrap()], more].concat();
        let output = pcae(BINARY, &all);
        assert_eq!(
            output.status.code(),
            Some(code),
            "{more:?}: {}",
            stderr(&output)
        );
        assert!(
            stderr(&output).contains(named),
            "{more:?}: {}",
            stderr(&output)
        );
        assert!(!out.exists());
    }
    let output = pcae(
        BINARY,
        &[
            "visualize",
            &run,
            broken,
            good,
            "--out",
            out.to_str().unwrap(),
        ],
    );
    assert!(output.status.success() && stderr(&output).contains("left out"));
    assert!(
        stdout(&output).contains("1 picture "),
        "{}",
        stdout(&output)
    );
}
