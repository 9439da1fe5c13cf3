//! A sheet of pictures in rows and columns, with words to them.

use std::error::Error;
use std::io;
use std::path::Path;

use image::codecs::png::PngEncoder;
use image::{ExtendedColorType, ImageEncoder, ImageError};
use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use super::font::{self, FONT};
use crate::durable::atomic_write;

/// Width of the sheet in pixels.
pub const WIDTH: usize = 1200;

const MARGIN: usize = 20;
const GAP: usize = 10;
const TITLE_HEIGHT: usize = 56;
const HEADING_HEIGHT: usize = 34;
const LABEL_HEIGHT: usize = 32;
const CAPTION_HEIGHT: usize = 30;
const TITLE_SIZE: u32 = 28;
const TEXT_SIZE: u32 = 20;
const CAPTION_SIZE: u32 = 18;
const TEXT: RGBColor = RGBColor(0x33, 0x33, 0x33);

/// One picture and the words below it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cell {
    /// `[height, width, 3]` of the sheet's cells.
    pub pixels: Vec<u8>,
    /// May be empty.
    pub caption: String,
}

/// A row of cells and the words above it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Row {
    /// May be empty.
    pub label: String,
    /// At most as many as there are columns.
    pub cells: Vec<Cell>,
}

/// What to draw.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sheet {
    /// Over everything.
    pub title: String,
    /// The words above each column.
    pub columns: Vec<String>,
    /// Height and width of every cell.
    pub cell: [usize; 2],
    /// From top to bottom.
    pub rows: Vec<Row>,
}

/// The widest that a cell of `columns` columns can be.
pub fn cell_width(columns: usize) -> usize {
    let gaps = columns.saturating_sub(1) * GAP;
    (WIDTH - 2 * MARGIN).saturating_sub(gaps) / columns.max(1)
}

/// Draws `sheet` to a PNG of [`WIDTH`] pixels at `path`, atomically.
///
/// # Errors
/// If a cell has another size than it should have, or the file system fails; a previous picture is then intact.
pub fn write_png(path: &Path, sheet: &Sheet) -> io::Result<()> {
    let [height, width] = sheet.cell;
    let fits = sheet.rows.iter().flat_map(|row| &row.cells);
    if fits
        .clone()
        .any(|cell| cell.pixels.len() != 3 * height * width)
    {
        let what = "a cell of the sheet has another size than the sheet says";
        return Err(io::Error::new(io::ErrorKind::InvalidInput, what));
    }
    let tall = sheet.height();
    let mut pixels = vec![0xff; 3 * WIDTH * tall];
    for (row, top) in sheet.rows.iter().zip(sheet.tops()) {
        for (column, cell) in row.cells.iter().enumerate() {
            let left = sheet.left(column);
            for (y, line) in cell.pixels.chunks_exact(3 * width).enumerate() {
                let to = 3 * ((top + y) * WIDTH + left);
                pixels[to..to + line.len()].copy_from_slice(line);
            }
        }
    }
    words(&mut pixels, tall, sheet).map_err(|error| io::Error::other(error.to_string()))?;
    atomic_write(path, |out| {
        PngEncoder::new(out)
            .write_image(&pixels, WIDTH as u32, tall as u32, ExtendedColorType::Rgb8)
            .map_err(|error| match error {
                ImageError::IoError(error) => error,
                other => io::Error::other(other),
            })
    })
}

impl Sheet {
    fn left(&self, column: usize) -> usize {
        MARGIN + column * (self.cell[1] + GAP)
    }

    /// Where the cells of each row begin.
    fn tops(&self) -> impl Iterator<Item = usize> {
        let start = TITLE_HEIGHT + HEADING_HEIGHT;
        self.rows.iter().scan(start, |at, row| {
            let top = *at
                + if row.label.is_empty() {
                    0
                } else {
                    LABEL_HEIGHT
                };
            *at = top
                + self.cell[0]
                + if row.has_captions() {
                    CAPTION_HEIGHT
                } else {
                    GAP
                };
            Some(top)
        })
    }

    fn height(&self) -> usize {
        let last = self.tops().last().unwrap_or(TITLE_HEIGHT + HEADING_HEIGHT);
        last + self.cell[0] + CAPTION_HEIGHT + MARGIN
    }
}

impl Row {
    fn has_captions(&self) -> bool {
        self.cells.iter().any(|cell| !cell.caption.is_empty())
    }
}

type Area<'a> = DrawingArea<BitMapBackend<'a>, Shift>;

fn words<'a>(
    pixels: &'a mut [u8],
    tall: usize,
    sheet: &Sheet,
) -> Result<(), Box<dyn Error + Send + Sync + 'a>> {
    font::register()?;
    let root = BitMapBackend::with_buffer(pixels, (WIDTH as u32, tall as u32)).into_drawing_area();
    let width = sheet.cell[1];
    let all = WIDTH - 2 * MARGIN;
    write(
        &root,
        &sheet.title,
        TITLE_SIZE,
        [MARGIN, TITLE_HEIGHT / 2],
        all,
    )?;
    for (column, heading) in sheet.columns.iter().enumerate() {
        let at = [sheet.left(column), TITLE_HEIGHT + HEADING_HEIGHT / 2];
        write(&root, heading, TEXT_SIZE, at, width)?;
    }
    for (row, top) in sheet.rows.iter().zip(sheet.tops()) {
        let label = [MARGIN, top.saturating_sub(LABEL_HEIGHT / 2)];
        write(&root, &row.label, TEXT_SIZE, label, all)?;
        for (column, cell) in row.cells.iter().enumerate() {
            let at = [sheet.left(column), top + sheet.cell[0] + CAPTION_HEIGHT / 2];
            write(&root, &cell.caption, CAPTION_SIZE, at, width)?;
        }
    }
    root.present()?;
    Ok(())
}

/// Writes a line from `at` (left, middle) on, cut off with an ellipsis where it would be wider than `width`.
fn write<'a>(
    root: &Area<'a>,
    text: &str,
    size: u32,
    at: [usize; 2],
    width: usize,
) -> Result<(), Box<dyn Error + Send + Sync + 'a>> {
    let style = (FONT, size).into_text_style(root).color(&TEXT);
    let style = style.pos(Pos::new(HPos::Left, VPos::Center));
    let mut line: String = text.chars().filter(|c| !c.is_control()).collect();
    let mut cut = false;
    while !line.is_empty() {
        let shown = if cut {
            format!("{line}…")
        } else {
            line.clone()
        };
        if root.estimate_text_size(&shown, &style)?.0 as usize <= width {
            // The drawing library places text this much too high.
            root.draw_text(&shown, &style, (at[0] as i32, at[1] as i32 + 3))?;
            break;
        }
        line.pop();
        cut = true;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sheet(title: &str) -> Sheet {
        let cell = |value: u8, caption: &str| Cell {
            pixels: vec![value; 3 * 40 * 60],
            caption: caption.to_owned(),
        };
        Sheet {
            title: title.to_owned(),
            columns: vec!["a".to_owned(), "b".to_owned()],
            cell: [40, 60],
            rows: vec![
                Row {
                    label: "first".to_owned(),
                    cells: vec![cell(10, ""), cell(20, "caption")],
                },
                Row {
                    label: String::new(),
                    cells: vec![cell(30, "")],
                },
            ],
        }
    }

    fn drawn(sheet: &Sheet) -> image::RgbImage {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("sheet.png");
        write_png(&path, sheet).unwrap();
        image::open(&path).unwrap().into_rgb8()
    }

    #[test]
    fn cells_are_where_they_belong() {
        let picture = drawn(&sheet("title"));
        assert_eq!(picture.width() as usize, WIDTH);
        let count = |value: u8| picture.pixels().filter(|p| p.0 == [value; 3]).count();
        for value in [10, 20, 30] {
            assert!(count(value) >= 40 * 60, "{value}");
        }
        let first = TITLE_HEIGHT + HEADING_HEIGHT + LABEL_HEIGHT;
        let at = |x: usize, y: usize| picture.get_pixel(x as u32, y as u32).0[0];
        assert_eq!(at(MARGIN, first), 10);
        assert_eq!(at(MARGIN + 60 + GAP, first + 39), 20);
        assert_eq!(at(MARGIN, first + 40 + CAPTION_HEIGHT), 30);
        assert_eq!(at(MARGIN, first - 1), 0xff);
    }

    #[test]
    fn words_show_and_are_cut_to_their_place() {
        let dark = |sheet: &Sheet, columns: std::ops::Range<u32>, rows: std::ops::Range<u32>| {
            let picture = drawn(sheet);
            let mut count = 0;
            for (x, y, pixel) in picture.enumerate_pixels() {
                count += usize::from(
                    columns.contains(&x) && rows.contains(&y) && pixel.0.iter().all(|v| *v < 0x80),
                );
            }
            count
        };
        let title = 0..TITLE_HEIGHT as u32;
        assert_eq!(dark(&sheet(""), 0..1200, title.clone()), 0);
        assert!(dark(&sheet("title"), 0..1200, title.clone()) > 50);
        let long = sheet(&"long ".repeat(100));
        assert!(dark(&long, 900..1180, title.clone()) > 50);
        assert_eq!(dark(&long, 1181..1200, title), 0);
    }

    /// The longest that is said of a heat map, below one of the four cells of a step of pre-training.
    #[test]
    fn a_caption_fits_below_one_of_four_cells() {
        let dark = |columns| {
            let width = cell_width(columns);
            let cell = Cell {
                pixels: vec![0xff; 3 * 40 * width],
                caption: "-0.25 dark to -0.15 bright".to_owned(),
            };
            let picture = drawn(&Sheet {
                title: String::new(),
                columns: vec![String::new()],
                cell: [40, width],
                rows: vec![Row {
                    label: String::new(),
                    cells: vec![cell],
                }],
            });
            picture.pixels().filter(|pixel| pixel.0[0] < 0x80).count()
        };
        assert_eq!(dark(4), dark(1));
    }

    #[test]
    fn a_cell_of_another_size_is_an_error() {
        let mut sheet = sheet("");
        sheet.rows[0].cells[1].pixels.pop();
        let folder = tempfile::tempdir().unwrap();
        let error = write_png(&folder.path().join("sheet.png"), &sheet).unwrap_err();
        assert!(error.to_string().contains("another size"), "{error}");
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    }
}
