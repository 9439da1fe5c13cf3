//! Cells of a sheet, drawn patch by patch.

use pcae_kernel::config::VitConfig;

use crate::data::Picture;
use crate::data::augment::{Scratch, Transform};
use crate::error::Error;
use crate::report::sheet::{self, Cell};

/// What is dropped or not seen.
const GREY: f32 = 214.0;
/// How much of a dropped patch's contrast is left.
const TRACE: f32 = 0.12;
/// Of small values, in between, of large ones: dark blue over green to yellow, distinct in grey too.
const MAP: [[f32; 3]; 5] = [
    [68.0, 1.0, 84.0],
    [59.0, 82.0, 139.0],
    [33.0, 145.0, 140.0],
    [94.0, 201.0, 98.0],
    [253.0, 231.0, 37.0],
];

/// The size of cells for a grid of patches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Canvas {
    grid: [usize; 2],
    /// Edge of a patch on the sheet.
    patch: usize,
}

impl Canvas {
    /// Cells for `columns` columns of pictures for `vit`.
    pub(super) fn new(vit: &VitConfig, columns: usize) -> Result<Self, Error> {
        let grid = vit.grid();
        let widest = sheet::cell_width(columns);
        let patch = widest / grid[1].max(1);
        if patch == 0 || grid[0] > 8 * grid[1] {
            return Err(Error::Setting {
                name: "--img-size".to_owned(),
                reason: format!(
                    "expected at most {widest} patches in a row, and a picture at most eight times as high as wide, found {}x{} \
                     patches",
                    grid[0], grid[1]
                ),
            });
        }
        Ok(Self { grid, patch })
    }

    /// Height and width of a cell.
    pub(super) fn cell(self) -> [usize; 2] {
        self.grid.map(|edge| edge * self.patch)
    }

    /// `picture`, cut as the model's input is cut: smoothly where it is large, in squares where it is smaller than a cell.
    pub(super) fn picture(self, picture: &Picture, vit: &VitConfig) -> Result<Vec<u8>, Error> {
        let [height, width] = self.cell();
        let small = vit.img_size[0] * 2 <= height;
        let size = if small { vit.img_size } else { [height, width] };
        let transform = plain(picture.channels, size);
        let mut planes = vec![0.0; transform.output_len()];
        transform.eval(picture, &mut Scratch::default(), &mut planes)?;
        Ok(self.planes(&planes, size))
    }

    /// Channels of values from 0 to 1 of any size, `[channels, height, width]`, as the pixels of a cell.
    pub(super) fn planes(self, planes: &[f32], size: [usize; 2]) -> Vec<u8> {
        let [height, width] = self.cell();
        let channels = planes.len() / (size[0] * size[1]);
        let mut pixels = Vec::with_capacity(3 * height * width);
        for y in 0..height {
            for x in 0..width {
                let at = (y * size[0] / height) * size[1] + x * size[1] / width;
                for channel in 0..3 {
                    let plane = channel.min(channels - 1) * size[0] * size[1];
                    pixels.push((255.0 * planes[plane + at]).round().clamp(0.0, 255.0) as u8);
                }
            }
        }
        pixels
    }

    /// Greys out the patches that are not among `kept`.
    pub(super) fn keep(self, pixels: &[u8], kept: &[u32]) -> Vec<u8> {
        let kept = self.mask(kept);
        let mut pixels = pixels.to_vec();
        self.for_each(&mut pixels, |patch, [r, g, b]| {
            if kept[patch] {
                return None;
            }
            let luma = 0.299 * f32::from(r) + 0.587 * f32::from(g) + 0.114 * f32::from(b);
            Some([(GREY + TRACE * (luma - 128.0)) as u8; 3])
        });
        pixels
    }

    /// The patches `ids` in the colours of `values`, from the least to the largest of them; the others grey.
    pub(super) fn heat(self, ids: &[u32], values: &[f32]) -> Cell {
        let (low, high) = values
            .iter()
            .fold((f32::INFINITY, f32::NEG_INFINITY), |(low, high), &value| {
                (low.min(value), high.max(value))
            });
        let mut shares = vec![None; self.grid[0] * self.grid[1]];
        for (&id, &value) in ids.iter().zip(values) {
            if let Some(share) = shares.get_mut(id as usize) {
                *share = Some((value - low) / (high - low).max(f32::MIN_POSITIVE));
            }
        }
        let [height, width] = self.cell();
        let mut pixels = vec![GREY as u8; 3 * height * width];
        self.for_each(&mut pixels, |patch, _| shares[patch].map(colour));
        Cell {
            pixels,
            caption: format!("{low:.2} dark to {high:.2} bright"),
        }
    }

    fn mask(self, ids: &[u32]) -> Vec<bool> {
        let mut mask = vec![false; self.grid[0] * self.grid[1]];
        for &id in ids {
            if let Some(is_there) = mask.get_mut(id as usize) {
                *is_there = true;
            }
        }
        mask
    }

    /// Gives `change` the patch and the colour of every pixel, for another colour.
    fn for_each(self, pixels: &mut [u8], change: impl Fn(usize, [u8; 3]) -> Option<[u8; 3]>) {
        let width = self.cell()[1];
        for (at, pixel) in pixels.as_chunks_mut::<3>().0.iter_mut().enumerate() {
            let patch = (at / width / self.patch) * self.grid[1] + at % width / self.patch;
            if let Some(new) = change(patch, *pixel) {
                *pixel = new;
            }
        }
    }
}

/// Evaluation's crop without normalisation.
pub(super) fn plain(channels: usize, size: [usize; 2]) -> Transform {
    Transform {
        height: size[0],
        width: size[1],
        channels,
        scale: (1.0, 1.0),
        ratio: (1.0, 1.0),
        flip: false,
        mean: vec![0.0; channels],
        std: vec![1.0; channels],
    }
}

fn colour(share: f32) -> [u8; 3] {
    let place = share.clamp(0.0, 1.0) * (MAP.len() - 1) as f32;
    let low = (place as usize).min(MAP.len() - 2);
    let part = place - low as f32;
    std::array::from_fn(|i| (MAP[low][i] + part * (MAP[low + 1][i] - MAP[low][i])).round() as u8)
}

#[cfg(test)]
mod tests {
    use super::*;

    const VIT: VitConfig = VitConfig {
        img_size: [8, 12],
        in_chans: 3,
        patch_size: 4,
        embed_dim: 8,
        depth: 1,
        num_heads: 1,
        mlp_ratio: 4.0,
    };

    #[test]
    fn dropped_patches_are_grey_and_others_untouched() {
        let canvas = Canvas::new(&VIT, 4).unwrap();
        let [height, width] = canvas.cell();
        assert_eq!((height * 3, width % 3), (width * 2, 0));
        let pixels: Vec<u8> = (0..3 * height * width).map(|i| (i % 251) as u8).collect();
        let out = canvas.keep(&pixels, &[4, 0]);
        for (at, (new, old)) in out.chunks(3).zip(pixels.chunks(3)).enumerate() {
            let (row, column) = (at / width * 2 / height, at % width * 3 / width);
            if [(0, 0), (1, 1)].contains(&(row, column)) {
                assert_eq!(new, old);
            } else {
                assert!(new[0] == new[1] && new[1] == new[2] && new[0].abs_diff(214) < 17);
            }
        }
    }

    #[test]
    fn heat_runs_from_dark_to_bright() {
        let canvas = Canvas::new(&VIT, 4).unwrap();
        let cell = canvas.heat(&[5, 1, 2], &[0.5, -0.25, 0.25]);
        assert_eq!(cell.caption, "-0.25 dark to 0.50 bright");
        let width = canvas.cell()[1];
        let at = |patch: usize| {
            let (y, x) = (patch / 3 * canvas.patch, patch % 3 * canvas.patch);
            &cell.pixels[3 * (y * width + x)..][..3]
        };
        assert_eq!(at(1), [68, 1, 84]);
        assert_eq!(at(5), [253, 231, 37]);
        assert_eq!(at(0), [214; 3]);
        assert!(at(2)[1] > at(1)[1] && at(2)[1] < at(5)[1]);
    }

    #[test]
    fn small_pictures_are_shown_in_squares() {
        let canvas = Canvas::new(&VIT, 4).unwrap();
        let picture = Picture {
            width: 12,
            height: 8,
            channels: 1,
            pixels: (0..96).map(|i| 2 * i as u8).collect(),
        };
        let pixels = canvas.picture(&picture, &VIT).unwrap();
        let [height, width] = canvas.cell();
        for (at, pixel) in pixels.chunks(3).enumerate() {
            let (y, x) = (at / width * 8 / height, at % width * 12 / width);
            assert_eq!(pixel, [picture.pixels[y * 12 + x]; 3]);
        }
    }
}
