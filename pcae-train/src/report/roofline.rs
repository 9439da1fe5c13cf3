//! Measurements under the limits of the machine: how fast registers and memory let anything be that moves so many bytes
//! for its operations. (Williams, Waterman and Patterson, "Roofline", 2009.)

use std::io;
use std::path::Path;

use image::codecs::png::PngEncoder;
use image::{ExtendedColorType, ImageEncoder};
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use super::curves::CurvesError;
use super::font::{self, FONT};
use crate::durable::atomic_write;

/// Width of the picture in pixels.
pub const WIDTH: u32 = 1200;
/// Height of the picture in pixels.
pub const HEIGHT: u32 = 900;

const TITLE_SIZE: u32 = 28;
const TEXT_SIZE: u32 = 22;
const LABEL_SIZE: u32 = 18;

const TEXT: RGBColor = RGBColor(0x33, 0x33, 0x33);
const GRID: RGBColor = RGBColor(0xe4, 0xe4, 0xe4);
/// One for each precision.
const COLORS: [RGBColor; 4] = [
    RGBColor(0x1f, 0x5f, 0xa8),
    RGBColor(0xd9, 0x6c, 0x0a),
    RGBColor(0x1f, 0x7a, 0x3d),
    RGBColor(0x77, 0x77, 0x77),
];

/// A limit: what can be computed, and what memory can deliver.
#[derive(Clone, Debug, PartialEq)]
pub struct Ceiling {
    /// Written on the line.
    pub name: String,
    /// Which colour: that of its points.
    pub series: usize,
    /// 10^9 operations per second.
    pub gflops: f64,
    /// 10^9 bytes per second.
    pub gbytes_per_s: f64,
}

/// A measurement.
#[derive(Clone, Debug, PartialEq)]
pub struct Point {
    /// Written beside it, where there is room.
    pub name: String,
    /// Which colour.
    pub series: usize,
    /// A whole (a large dot), or a part of one.
    pub is_whole: bool,
    /// Operations per byte.
    pub flops_per_byte: f64,
    /// 10^9 operations per second.
    pub gflops: f64,
}

/// What to draw. What is not a positive number is left out.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Roofline {
    /// Over everything.
    pub title: String,
    /// Names of the series.
    pub series: Vec<String>,
    /// The limits.
    pub ceilings: Vec<Ceiling>,
    /// The measurements, those first whose names matter most.
    pub points: Vec<Point>,
}

/// Draws to a PNG of [`WIDTH`] × [`HEIGHT`] pixels at `path`, atomically.
///
/// # Errors
/// [`CurvesError`]; a previous picture is then intact.
pub fn write_png(path: &Path, roofline: &Roofline) -> Result<(), CurvesError> {
    let mut pixels = vec![0; 3 * (WIDTH * HEIGHT) as usize];
    draw(&mut pixels, roofline).map_err(|error| CurvesError::Draw {
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

type Drawn<'a> = Result<(), Box<dyn std::error::Error + Send + Sync + 'a>>;

/// A rectangle that a name takes: left, top, right, bottom.
type Taken = [i32; 4];

fn is_drawable(x: f64) -> bool {
    (1e-6..1e9).contains(&x)
}

fn draw<'a>(pixels: &'a mut [u8], roofline: &Roofline) -> Drawn<'a> {
    font::register()?;
    let root = BitMapBackend::with_buffer(pixels, (WIDTH, HEIGHT)).into_drawing_area();
    root.fill(&WHITE)?;
    let title = (FONT, TITLE_SIZE).into_text_style(&root).color(&TEXT);
    let centre = title.pos(Pos::new(HPos::Center, VPos::Center));
    root.draw_text(&roofline.title, &centre, (WIDTH as i32 / 2, 28))?;
    legend(&root, &roofline.series)?;

    let points: Vec<&Point> = (roofline.points.iter())
        .filter(|point| is_drawable(point.flops_per_byte) && is_drawable(point.gflops))
        .collect();
    let ceilings: Vec<&Ceiling> = (roofline.ceilings.iter())
        .filter(|ceiling| is_drawable(ceiling.gflops) && is_drawable(ceiling.gbytes_per_s))
        .collect();
    // Both sides of the corners of all ceilings, and all points.
    let corners = ceilings.iter().map(|c| c.gflops / c.gbytes_per_s);
    let xs = points.iter().map(|point| point.flops_per_byte);
    let (left, right) = range(corners.chain(xs), 3.0);
    let peaks = ceilings.iter().map(|c| c.gflops);
    let ys = points.iter().map(|point| point.gflops);
    let (bottom, top) = range(peaks.chain(ys), 1.6);

    let mut chart = ChartBuilder::on(&root)
        .margin_top(96)
        .margin_right(30)
        .margin_left(20)
        .margin_bottom(10)
        .x_label_area_size(64)
        .y_label_area_size(100)
        .build_cartesian_2d((left..right).log_scale(), (bottom..top).log_scale())?;
    let text = (FONT, TEXT_SIZE).into_text_style(&root).color(&TEXT);
    // Numbers between these stand too close on a logarithmic axis.
    let number = |value: &f64| {
        let digit = value / 10_f64.powf(value.log10().floor());
        match [1.0, 2.0, 5.0]
            .iter()
            .any(|d| (digit / d - 1.0).abs() < 1e-6)
        {
            true => format!("{value}"),
            false => String::new(),
        }
    };
    chart
        .configure_mesh()
        .light_line_style(TRANSPARENT)
        .bold_line_style(GRID)
        .axis_style(COLORS[3])
        .label_style(text)
        .x_label_formatter(&number)
        .y_label_formatter(&number)
        .x_desc("operations per byte")
        .y_desc("GFLOP/s")
        .draw()?;

    // Names and lines keep clear of each other, and small names of dots too.
    let (mut taken, mut dots): (Vec<Taken>, Vec<Taken>) = (Vec::new(), Vec::new());
    let style = (FONT, LABEL_SIZE).into_text_style(&root);
    for ceiling in &ceilings {
        let color = COLORS[ceiling.series % COLORS.len()];
        let corner = ceiling.gflops / ceiling.gbytes_per_s;
        // Memory's part, from where it enters the picture, and the registers'.
        let start = left.max(bottom / ceiling.gbytes_per_s);
        let line = [
            (start, start * ceiling.gbytes_per_s),
            (corner, ceiling.gflops),
            (right, ceiling.gflops),
        ];
        chart.draw_series(LineSeries::new(line, color.stroke_width(3)))?;
        let (x, y) = chart.backend_coord(&(right, ceiling.gflops));
        let (width, height) = root.estimate_text_size(&ceiling.name, &style)?;
        // Above its line, at the right end.
        let place = [x - width as i32 - 6, y - height as i32 - 8, x - 6, y - 4];
        root.draw_text(&ceiling.name, &style.color(&color), (place[0], place[1]))?;
        let (from, _) = chart.backend_coord(&(corner, ceiling.gflops));
        taken.extend([place, [from, y - 3, x, y + 3]]);
    }
    for point in &points {
        let color = COLORS[point.series % COLORS.len()];
        let at = (point.flops_per_byte, point.gflops);
        let (x, y) = chart.backend_coord(&at);
        let radius = if point.is_whole { 8 } else { 4 };
        chart.draw_series([Circle::new(at, radius, color.filled())])?;
        dots.push([x - radius, y - radius, x + radius, y + radius]);
    }
    for point in &points {
        let color = COLORS[point.series % COLORS.len()];
        let (x, y) = chart.backend_coord(&(point.flops_per_byte, point.gflops));
        let (width, height) = root.estimate_text_size(&point.name, &style)?;
        let (width, height) = (width as i32, height as i32);
        // To the right, to the left, below, above: the first that is free, or nowhere.
        let middle = (x - width / 2, y - height / 2);
        let places = [
            (x + 12, middle.1),
            (x - 12 - width, middle.1),
            (middle.0, y + 10),
            (middle.0, y - 12 - height),
        ];
        let free = |beside_dots: bool| {
            places.iter().find_map(|&(x, y)| {
                let place = [x, y, x + width, y + height];
                let inside = place[0] > 120 && place[1] > 96;
                let inside =
                    inside && place[2] < WIDTH as i32 - 20 && place[3] < HEIGHT as i32 - 74;
                let clear = |taken: &[Taken]| taken.iter().all(|taken| !overlap(taken, &place));
                (inside && clear(&taken) && (!beside_dots || clear(&dots))).then_some(place)
            })
        };
        let free = free(true).or_else(|| free(false).filter(|_| point.is_whole));
        if let Some(place) = free {
            root.draw_text(&point.name, &style.color(&color), (place[0], place[1]))?;
            taken.push(place);
        }
    }
    root.present()?;
    Ok(())
}

/// Samples of the dots and the names of the series, in a row under the title.
fn legend<'b>(
    root: &DrawingArea<BitMapBackend<'b>, plotters::coord::Shift>,
    series: &[String],
) -> Drawn<'b> {
    let style = (FONT, TEXT_SIZE).into_text_style(root).color(&TEXT);
    let style = style.pos(Pos::new(HPos::Left, VPos::Center));
    let mut x = 130;
    let mut entry = |name: &str, radius: i32, color: RGBColor| -> Drawn<'b> {
        root.draw(&Circle::new((x, 70), radius, color.filled()))?;
        root.draw_text(name, &style, (x + 16, 72))?;
        let (width, _) = root.estimate_text_size(name, &style)?;
        x += 16 + width as i32 + 40;
        Ok(())
    };
    for (i, name) in series.iter().enumerate() {
        entry(name, 8, COLORS[i % COLORS.len()])?;
    }
    entry("one operation", 4, COLORS[3])?;
    entry("all of a run", 8, COLORS[3])
}

fn overlap(a: &Taken, b: &Taken) -> bool {
    a[0] < b[2] && b[0] < a[2] && a[1] < b[3] && b[1] < a[3]
}

/// From the least to the greatest, `room` times more on both sides.
fn range(values: impl Iterator<Item = f64>, room: f64) -> (f64, f64) {
    let (low, high) = values.fold((f64::INFINITY, 0.0_f64), |(low, high), value| {
        (low.min(value), high.max(value))
    });
    if low > high {
        return (0.1, 1000.0);
    }
    (low / room, high * room)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn picture(roofline: &Roofline) -> image::RgbImage {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("roofline.png");
        write_png(&path, roofline).unwrap();
        image::open(&path).unwrap().into_rgb8()
    }

    fn count(picture: &image::RgbImage, color: RGBColor) -> usize {
        let color = [color.0, color.1, color.2];
        picture.pixels().filter(|pixel| pixel.0 == color).count()
    }

    fn roofline(values: [f64; 2]) -> Roofline {
        let point = |series| Point {
            name: "step".to_owned(),
            series,
            is_whole: true,
            flops_per_byte: values[0],
            gflops: values[1],
        };
        Roofline {
            title: "vit".to_owned(),
            series: vec!["f32".to_owned(), "bf16".to_owned()],
            ceilings: vec![Ceiling {
                name: "peak".to_owned(),
                series: 0,
                gflops: 100.0,
                gbytes_per_s: 10.0,
            }],
            points: vec![point(1), point(0)],
        }
    }

    #[test]
    fn limits_and_points_are_drawn() {
        let full = picture(&roofline([20.0, 50.0]));
        assert_eq!(full.dimensions(), (WIDTH, HEIGHT));
        let empty = picture(&Roofline {
            ceilings: Vec::new(),
            points: Vec::new(),
            ..roofline([20.0, 50.0])
        });
        // A line across the picture, and a dot of radius 8.
        assert!(count(&full, COLORS[0]) > count(&empty, COLORS[0]) + 1000);
        assert!(count(&full, COLORS[1]) > count(&empty, COLORS[1]));
    }

    #[test]
    fn odd_values_are_drawn_without_panic() {
        for x in [f64::NAN, f64::INFINITY, 0.0, -1.0, 1e300, 1e-300, 1.0] {
            picture(&roofline([x, 1.0]));
            picture(&roofline([1.0, x]));
        }
        picture(&Roofline::default());
    }

    #[test]
    fn names_do_not_overlap() {
        assert!(overlap(&[0, 0, 10, 10], &[9, 9, 20, 20]));
        assert!(!overlap(&[0, 0, 10, 10], &[10, 0, 20, 10]));
    }
}
