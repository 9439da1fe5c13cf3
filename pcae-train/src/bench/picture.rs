//! Measurements as points under the machine's limits.

use super::table::computes;
use super::{Measurement, Report, What};
use crate::report::roofline::{Ceiling, Point, Roofline};

/// What `--roofline` draws.
pub fn roofline(report: &Report) -> Roofline {
    let machine = &report.machine;
    let series: Vec<String> = machine.peak_gflops.keys().cloned().collect();
    let mut ceilings = Vec::new();
    for (series, (precision, peaks)) in machine.peak_gflops.iter().enumerate() {
        for (threads, &gflops) in peaks {
            if let Some(gbytes_per_s) = machine.bandwidth(threads) {
                ceilings.push(Ceiling {
                    name: format!("{precision}, {}", computes(threads.parse().ok())),
                    series,
                    gflops,
                    gbytes_per_s,
                });
            }
        }
    }
    let (mut wholes, mut parts) = (Vec::new(), Vec::new());
    for result in report
        .results
        .iter()
        .filter(|result| result.what != What::Peak)
    {
        let series = series.iter().position(|name| *name == result.precision);
        let series = series.unwrap_or(0);
        let is_product = result.layer.is_some();
        if let Some(flops_per_byte) = result.flops_per_byte {
            let to = if is_product { &mut parts } else { &mut wholes };
            to.push(Point {
                name: name(result),
                series,
                is_whole: !is_product,
                flops_per_byte,
                gflops: result.gflops,
            });
        }
        for part in &result.breakdown {
            // A product's only part is itself.
            if let (Some(gflops), Some(flops_per_byte), false) =
                (part.gflops, part.flops_per_byte, is_product)
            {
                parts.push(Point {
                    name: part.operation.to_owned(),
                    series,
                    is_whole: false,
                    flops_per_byte,
                    gflops,
                });
            }
        }
    }
    wholes.extend(parts);
    let models = report
        .results
        .iter()
        .find_map(|result| result.model.clone());
    let device = machine.device.as_deref().or(machine.cpu.as_deref());
    Roofline {
        title: format!(
            "{} on {}",
            models.unwrap_or_else(|| "multiply-adds".to_owned()),
            device.unwrap_or(&machine.arch)
        ),
        series,
        ceilings,
        points: wholes,
    }
}

fn name(result: &Measurement) -> String {
    match (result.layer, result.pass) {
        (Some(layer), Some(pass)) => format!("{layer} {pass}"),
        _ => {
            let what = format!("{:?}", result.what).to_lowercase();
            let method = result.method.as_deref().unwrap_or_default();
            let batch = result.batch.unwrap_or(0);
            let computes = computes(result.threads);
            let text = format!("{what} {method} batch {batch}, {computes}");
            text.replace("  ", " ")
        }
    }
}
