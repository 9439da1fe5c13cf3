//! The curves of a run in one picture: loss and spread of the teacher's features above, accuracy below.

use std::error::Error;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};

use image::codecs::png::PngEncoder;
use image::{ExtendedColorType, ImageEncoder};
use plotters::coord::Shift;
use plotters::coord::types::{RangedCoordf64, RangedCoordu64};
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use super::font::{self, FONT};
use crate::durable::atomic_write;

/// Width of the picture in pixels.
pub const WIDTH: u32 = 1200;
/// Height of the picture in pixels.
pub const HEIGHT: u32 = 900;

const TITLE_SIZE: u32 = 30;
const TEXT_SIZE: u32 = 24;
/// Height of the row above a panel that holds its legend.
const LEGEND_HEIGHT: u32 = 44;
/// Space left and right of everything.
const MARGIN: u32 = 24;
/// Width left of the panels for the numbers and the name of the axis.
const LEFT: u32 = 104;
/// The same on the right, where the names of the reference lines must fit too.
const RIGHT: u32 = 120;
/// The drawing library places text this much too high.
const TEXT_DROP: i32 = 4;
/// More points make a thick line ragged.
const MAX_POINTS: usize = 240;

const TEXT: RGBColor = RGBColor(0x33, 0x33, 0x33);
const GRID: RGBColor = RGBColor(0xe4, 0xe4, 0xe4);
const LOSS: RGBColor = RGBColor(0x1f, 0x5f, 0xa8);
const LOSS_RAW: RGBColor = RGBColor(0x8f, 0xb8, 0xe0);
const SPREAD: RGBColor = RGBColor(0xd9, 0x6c, 0x0a);
const KNN: RGBColor = RGBColor(0x1f, 0x7a, 0x3d);
const REFERENCE: RGBColor = RGBColor(0x77, 0x77, 0x77);

/// Why the picture was not made. The message is one line and says what to do.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CurvesError {
    /// The drawing library failed.
    #[error("cannot draw '{}': {reason}; the run itself is not affected", path.display())]
    Draw {
        /// The picture.
        path: PathBuf,
        /// What the library said.
        reason: String,
    },
    /// The file system failed; a previous picture is intact.
    #[error("cannot write '{}': {cause}; check permissions and free space", path.display())]
    Write {
        /// The picture.
        path: PathBuf,
        /// What the file system said.
        cause: io::Error,
    },
}

/// What to draw. Series are `(step, value)` in any order; values that are not finite are left out, and an empty
/// series is not drawn.
#[derive(Debug, Clone, Copy, Default)]
pub struct Curves<'a> {
    /// Over everything, for instance the name of the run.
    pub title: &'a str,
    /// The training loss, drawn raw and smoothed.
    pub loss: &'a [(u64, f64)],
    /// The spread of the teacher's features, 0 for a collapsed teacher; empty for methods without one.
    pub spread: &'a [(u64, f64)],
    /// What the accuracy is, such as `kNN top-1`.
    pub accuracy: &'a str,
    /// That accuracy as a fraction, 0 to 1.
    pub top1: &'a [(u64, f64)],
    /// The same of the pixels themselves, as a fraction.
    pub raw_pixels_top1: Option<f64>,
    /// The same of the network before training, as a fraction.
    pub untrained_top1: Option<f64>,
}

/// Draws `curves` to a PNG of [`WIDTH`] × [`HEIGHT`] pixels at `path`, atomically.
///
/// # Errors
/// [`CurvesError`]; a previous picture is then intact.
pub fn write_png(path: &Path, curves: &Curves<'_>) -> Result<(), CurvesError> {
    let mut pixels = vec![0; 3 * (WIDTH * HEIGHT) as usize];
    draw(&mut pixels, curves).map_err(|error| CurvesError::Draw {
        path: path.to_owned(),
        reason: error.to_string(),
    })?;
    atomic_write(path, |out| {
        PngEncoder::new(out)
            .write_image(&pixels, WIDTH, HEIGHT, ExtendedColorType::Rgb8)
            .map_err(io::Error::other)
    })
    .map_err(|cause| CurvesError::Write {
        path: path.to_owned(),
        cause,
    })
}

type Area<'a> = DrawingArea<BitMapBackend<'a>, Shift>;
type Panel<'a, 'b> =
    ChartContext<'a, BitMapBackend<'b>, Cartesian2d<RangedCoordu64, RangedCoordf64>>;
type Drawn<'a> = Result<(), Box<dyn Error + Send + Sync + 'a>>;
type Point = (u64, f64);

fn draw<'a>(pixels: &'a mut [u8], curves: &Curves<'_>) -> Drawn<'a> {
    font::register()?;
    let root = BitMapBackend::with_buffer(pixels, (WIDTH, HEIGHT)).into_drawing_area();
    root.fill(&WHITE)?;
    let title = (FONT, TITLE_SIZE).into_text_style(&root).color(&TEXT);
    let centre = title.pos(Pos::new(HPos::Center, VPos::Center));
    root.draw_text(curves.title, &centre, (WIDTH as i32 / 2, 28))?;

    let loss = drawable(curves.loss);
    let spread = drawable(curves.spread);
    let top1 = percent(drawable(curves.top1));
    // The same steps on both panels, at least one apart.
    let last_step = [&loss, &spread, &top1]
        .into_iter()
        .filter_map(|points| points.last())
        .map(|&(step, _)| step)
        .fold(1, u64::max);
    let (_, panels) = root.split_vertically(48);
    let (upper, lower) = panels.split_vertically((HEIGHT - 48) / 2);
    draw_loss(&upper, 0..last_step, &loss, &spread)?;
    let references = [
        ("raw pixels", curves.raw_pixels_top1),
        ("untrained", curves.untrained_top1),
    ];
    let accuracy = curves.accuracy;
    draw_accuracy(&lower, &root, 0..last_step, (accuracy, &top1), &references)?;
    root.present()?;
    Ok(())
}

fn draw_loss<'b>(
    area: &Area<'b>,
    steps: Range<u64>,
    loss: &[Point],
    spread: &[Point],
) -> Drawn<'b> {
    let values = padded(loss.iter().map(|&(_, value)| value), 1e-6);
    // From 0, where the features have collapsed.
    let spread_top = padded(spread.iter().map(|&(_, value)| value).chain([0.0]), 1e-6).end;

    let mut legend = vec![("loss", LOSS_RAW, 1), ("loss, smoothed", LOSS, 4)];
    if !spread.is_empty() {
        legend.push(("spread of teacher features", SPREAD, 3));
    }
    draw_legend(area, &legend)?;

    let mut panel = builder(area)
        .margin_right(MARGIN)
        .right_y_label_area_size(RIGHT)
        .build_cartesian_2d(steps.clone(), values.clone())?
        .set_secondary_coord(steps, 0.0..spread_top);
    draw_mesh(&mut panel, &values, "loss")?;
    if !spread.is_empty() {
        let decimals = decimals(&(0.0..spread_top));
        panel
            .configure_secondary_axes()
            .axis_style(GRID)
            .label_style((FONT, TEXT_SIZE).into_text_style(area).color(&SPREAD))
            .y_labels(6)
            .y_label_formatter(&|value| format!("{value:.decimals$}"))
            .y_desc("spread")
            .draw()?;
    }
    panel.draw_series(LineSeries::new(loss.iter().copied(), &LOSS_RAW))?;
    panel.draw_secondary_series(LineSeries::new(thinned(spread), SPREAD.stroke_width(3)))?;
    panel.draw_series(LineSeries::new(
        thinned(&smoothed(loss)),
        LOSS.stroke_width(4),
    ))?;
    Ok(())
}

fn draw_accuracy<'b>(
    area: &Area<'b>,
    root: &Area<'b>,
    steps: Range<u64>,
    (accuracy, points): (&str, &[Point]),
    references: &[(&str, Option<f64>)],
) -> Drawn<'b> {
    let mut references: Vec<_> = references
        .iter()
        .filter_map(|&(name, top1)| Some((name, 100.0 * top1.filter(|top1| top1.is_finite())?)))
        .collect();
    references.sort_by(|(_, a), (_, b)| b.total_cmp(a));
    let values = points.iter().map(|&(_, value)| value);
    // A point of accuracy at least, or the noise of the evaluation would fill the panel.
    let values = padded(
        values.chain(references.iter().map(|&(_, value)| value)),
        1.0,
    );

    draw_legend(area, &[(accuracy, KNN, 4)])?;
    let mut panel = builder(area)
        .margin_right(MARGIN + RIGHT)
        .build_cartesian_2d(steps.clone(), values.clone())?;
    draw_mesh(&mut panel, &values, &format!("{accuracy} (%)"))?;

    // Names stand at the right end of their lines, the highest first, each clear of the one before.
    let style = (FONT, TEXT_SIZE).into_text_style(root).color(&REFERENCE);
    let style = style.pos(Pos::new(HPos::Left, VPos::Center));
    let mut free_from = i32::MIN;
    for (name, value) in references {
        let line = [(steps.start, value), (steps.end, value)];
        panel.draw_series(DashedLineSeries::new(
            line,
            12,
            8,
            REFERENCE.stroke_width(2),
        ))?;
        let (x, y) = panel.backend_coord(&(steps.end, value));
        let y = y.max(free_from);
        root.draw_text(name, &style, (x + 8, y + TEXT_DROP))?;
        free_from = y + TEXT_SIZE as i32;
    }
    panel.draw_series(LineSeries::new(points.iter().copied(), KNN.stroke_width(4)))?;
    panel.draw_series(
        points
            .iter()
            .map(|&point| Circle::new(point, 5, KNN.filled())),
    )?;
    Ok(())
}

fn builder<'a, 'b, 'c>(area: &'a Area<'b>) -> ChartBuilder<'a, 'c, BitMapBackend<'b>> {
    let mut builder = ChartBuilder::on(area);
    builder
        .margin_top(LEGEND_HEIGHT)
        .margin_left(MARGIN)
        .x_label_area_size(64)
        .y_label_area_size(LEFT);
    builder
}

fn draw_mesh<'b>(panel: &mut Panel<'_, 'b>, values: &Range<f64>, name: &str) -> Drawn<'b> {
    let decimals = decimals(values);
    let text = (FONT, TEXT_SIZE)
        .into_text_style(panel.plotting_area())
        .color(&TEXT);
    panel
        .configure_mesh()
        .light_line_style(TRANSPARENT)
        .bold_line_style(GRID)
        .axis_style(REFERENCE)
        .label_style(text)
        .x_labels(8)
        .y_labels(6)
        .y_label_formatter(&|value| format!("{value:.decimals$}"))
        .x_desc("step")
        .y_desc(name)
        .draw()?;
    Ok(())
}

/// Draws samples of lines and their names in a row above a panel.
fn draw_legend<'b>(area: &Area<'b>, entries: &[(&str, RGBColor, u32)]) -> Drawn<'b> {
    let style = (FONT, TEXT_SIZE).into_text_style(area).color(&TEXT);
    let style = style.pos(Pos::new(HPos::Left, VPos::Center));
    let middle = LEGEND_HEIGHT as i32 / 2;
    let mut x = (MARGIN + LEFT) as i32;
    for &(name, color, width) in entries {
        let sample = vec![(x, middle), (x + 40, middle)];
        area.draw(&PathElement::new(sample, color.stroke_width(width)))?;
        area.draw_text(name, &style, (x + 50, middle + TEXT_DROP))?;
        let (text_width, _) = area.estimate_text_size(name, &style)?;
        x += 50 + text_width as i32 + 36;
    }
    Ok(())
}

/// The points that can be drawn, by step.
fn drawable(points: &[Point]) -> Vec<Point> {
    // Finite as f32, so that no sum or difference of them overflows.
    let finite = points
        .iter()
        .filter(|(_, value)| (*value as f32).is_finite());
    let mut points: Vec<_> = finite.copied().collect();
    points.sort_by_key(|&(step, _)| step);
    points
}

fn percent(mut points: Vec<Point>) -> Vec<Point> {
    for (_, value) in &mut points {
        *value *= 100.0;
    }
    points
}

/// The average over the neighbours in both directions, with weights that decay over a hundredth of the points: the
/// usual one-sided average would lag behind a falling loss.
fn smoothed(points: &[Point]) -> Vec<Point> {
    let decay = (-1.0 / (points.len() as f64 / 100.0).max(1.0)).exp();
    // Sums and weights of what lies before each point, itself included.
    let one_sided = |values: &mut dyn Iterator<Item = f64>| -> Vec<(f64, f64)> {
        values
            .scan((0.0, 0.0), |(sum, weight), value| {
                *sum = decay * *sum + value;
                *weight = decay * *weight + 1.0;
                Some((*sum, *weight))
            })
            .collect()
    };
    let values = points.iter().map(|&(_, value)| value);
    let before = one_sided(&mut values.clone());
    let after = one_sided(&mut values.rev());
    let both = before.iter().zip(after.iter().rev());
    both.zip(points)
        .map(|((before, after), &(step, value))| {
            // The point itself is in both.
            let sum = before.0 + after.0 - value;
            (step, sum / (before.1 + after.1 - 1.0))
        })
        .collect()
}

/// At most [`MAX_POINTS`] + 1 of the points, evenly taken, with the first and the last.
fn thinned(points: &[Point]) -> Vec<Point> {
    let every = points.len().div_ceil(MAX_POINTS).max(1);
    let last = points
        .last()
        .filter(|_| !(points.len() - 1).is_multiple_of(every));
    points.iter().step_by(every).chain(last).copied().collect()
}

/// A range with all `values` and some room on both sides, at least `min_room`; never empty.
fn padded(values: impl Iterator<Item = f64>, min_room: f64) -> Range<f64> {
    let (low, high) = values.fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), value| {
        (low.min(value), high.max(value))
    });
    if low > high {
        return 0.0..1.0;
    }
    // Equal values need room too, of their own magnitude.
    let magnitude = low.abs().max(high.abs());
    let room = (0.06 * (high - low)).max(1e-3 * magnitude).max(min_room);
    low - room..high + room
}

/// Decimals that tell the six or so ticks of a range apart.
fn decimals(range: &Range<f64>) -> usize {
    let tick = (range.end - range.start) / 6.0;
    (-tick.log10()).ceil().clamp(0.0, 5.0) as usize
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn pixels(curves: &Curves<'_>) -> image::RgbImage {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("curves.png");
        write_png(&path, curves).unwrap();
        let picture = image::open(&path).unwrap().into_rgb8();
        assert_eq!(picture.dimensions(), (WIDTH, HEIGHT));
        picture
    }

    fn count(picture: &image::RgbImage, color: RGBColor) -> usize {
        let color = [color.0, color.1, color.2];
        picture.pixels().filter(|pixel| pixel.0 == color).count()
    }

    #[test]
    fn every_series_is_drawn_if_present() {
        let full = Curves {
            title: "run",
            loss: &[(0, 1.0), (10, 0.5), (20, 0.4)],
            spread: &[(0, 0.5), (20, 0.8)],
            accuracy: "kNN top-1",
            top1: &[(0, 0.6), (20, 0.7)],
            raw_pixels_top1: Some(0.83),
            untrained_top1: Some(0.61),
        };
        let full = pixels(&full);
        let empty = pixels(&Curves::default());
        // A curve covers far more than its sample in the legend.
        for color in [LOSS, SPREAD, KNN, REFERENCE] {
            let (full, empty) = (count(&full, color), count(&empty, color));
            assert!(full > empty + 400, "{color:?}: {full}, {empty}");
        }
        assert!(count(&full, TEXT) > count(&empty, TEXT));
    }

    #[test]
    fn odd_values_are_drawn_without_panic() {
        let all_odd = [
            (0, f64::NAN),
            (1, f64::INFINITY),
            (2, f64::MAX),
            (3, f64::MIN),
            (4, 3e38),
            (5, -3e38),
        ];
        for points in [
            &all_odd[..],
            &[(7, 0.0)],
            &[(0, 0.0)],
            &[(0, -1e-300), (u64::MAX, 1e-300)],
            &[(5, 1.0), (5, 1.0), (2, 1.0)],
        ] {
            pixels(&Curves {
                title: "a\tb \u{1f600}",
                loss: points,
                spread: points,
                accuracy: "",
                top1: points,
                raw_pixels_top1: Some(points[0].1),
                untrained_top1: None,
            });
        }
    }

    #[test]
    fn a_failure_leaves_the_old_picture() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("curves.png");
        fs::create_dir(&path).unwrap();
        let error = write_png(&path, &Curves::default());
        assert!(matches!(error, Err(CurvesError::Write { .. })));
        assert!(path.is_dir());
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn smoothing_keeps_constants_and_lines() {
        let constant: Vec<Point> = (0..500).map(|step| (step, 3.0)).collect();
        for (_, value) in smoothed(&constant) {
            assert!((value - 3.0).abs() < 1e-12, "{value}");
        }
        // No lag: in the middle of a line, the average is the line.
        let line: Vec<Point> = (0..500).map(|step| (step, step as f64)).collect();
        assert!((smoothed(&line)[250].1 - 250.0).abs() < 1e-9);
        assert!(smoothed(&[]).is_empty());
    }

    #[test]
    fn thinning_keeps_the_ends() {
        for length in [0, 1, MAX_POINTS, MAX_POINTS + 1, 10 * MAX_POINTS - 1] {
            let points: Vec<Point> = (0..length as u64).map(|step| (step, 0.0)).collect();
            let thinned = thinned(&points);
            assert!(thinned.len() <= MAX_POINTS + 1);
            assert_eq!(thinned.first(), points.first());
            assert_eq!(thinned.last(), points.last());
        }
    }

    #[test]
    fn ticks_are_told_apart() {
        assert_eq!(decimals(&(60.0..84.0)), 0);
        assert_eq!(decimals(&(0.0..0.85)), 1);
        assert_eq!(decimals(&(0.4995..0.5007)), 4);
    }
}
