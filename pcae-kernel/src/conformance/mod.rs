//! What a backend must compute: every operation against [`Reference<f64>`](crate::reference::Reference).
//!
//! A case is one call of one operation. It is described once, for any backend, and runs:
//!
//! 1. on the reference and on the backend under test, whose outputs must agree, beyond their used front too;
//! 2. on the backend once per argument with that argument spoiled (a buffer or span one element short, an index out of
//!    range), which must be refused with every output as it was, or at the latest by the next read.
//!
//! A block is an operation, too: a backend may run its layers as one. It is called with parameters of each kind there is, of which a teacher's
//! may be of a lower precision. What it has added to the stream before it refuses something is not looked at.
//!
//! Outputs start from noise, so that what is added to something and what is overwritten differ. Sizes are small, odd and
//! pairwise different, so that swapped dimensions show.

mod calls;
mod cases;
mod stage;

use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use core::fmt;

use crate::backend::TrainBackend;
use crate::layout::Layout;
use crate::reference::Reference;

/// How far an output may be from the reference: `atol + rtol * |expected|`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Tolerance {
    /// Absolute part.
    pub atol: f64,
    /// Relative part.
    pub rtol: f64,
}

impl Tolerance {
    /// For backends that compute in f32.
    ///
    /// The longest sums here, over 701 rows, have terms of standard deviation 1.4: partial sums grow to some 37, and 701
    /// roundings of at most half a unit in the last place of that, 2^-20, at random signs make `26 * 2^-20 = 2.5e-5`.
    /// Other chains (softmax, norms, losses) are shorter. Measured: 0.83 of it for the scalar reference in f32, which adds
    /// one term after the other, and 0.3 with sums in vectors.
    pub const F32: Self = Self {
        atol: 3e-5,
        rtol: 1e-5,
    };

    /// For backends that round the operands of linear layers to bf16 and sum in f32.
    ///
    /// Two operands rounded to 8 bits move a product by at most 2^-8 of itself, by 2^-9 * sqrt(2 / 3) = 1.6e-3 in the
    /// mean square. Over the longest sums, 701 terms of standard deviation 1.4, that makes 0.06, and the largest of some
    /// thousand outputs is four times that away.
    pub const BF16: Self = Self {
        atol: 0.25,
        rtol: 4e-3,
    };
}

/// An output of a case beside the reference's.
#[derive(Clone, Copy, Debug)]
pub struct Compared<'a> {
    /// The call.
    pub case: &'a str,
    /// Number of the output among those of the call.
    pub output: usize,
    /// What the backend gave.
    pub got: &'a [f32],
    /// What the reference gave.
    pub want: &'a [f32],
    /// Largest error, as a fraction of what the tolerance allows.
    pub worst: f64,
}

/// Why a backend does not conform.
#[derive(Clone, Debug, PartialEq)]
pub struct Failure {
    /// The call.
    pub case: String,
    /// What is wrong.
    pub kind: FailureKind,
}

/// What is wrong.
#[derive(Clone, Debug, PartialEq)]
pub enum FailureKind {
    /// An element is off.
    Value {
        /// Number of the output.
        output: usize,
        /// Number of the element.
        at: usize,
        /// What the backend gave.
        got: f32,
        /// What the reference gave.
        want: f32,
    },
    /// A call was refused that the reference takes.
    Refused {
        /// The backend's reason.
        error: String,
    },
    /// A call was taken that must be refused.
    Accepted {
        /// The argument that was spoiled; `None` where the call itself is wrong.
        argument: Option<&'static str>,
    },
    /// A call was refused after something had been written.
    Written {
        /// The argument that was spoiled; `None` where the call itself is wrong.
        argument: Option<&'static str>,
        /// Number of the output.
        output: usize,
    },
    /// A buffer could not be made, filled or read.
    Buffer {
        /// The backend's reason.
        error: String,
    },
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { case, kind } = self;
        let spoiled = |argument: &Option<&'static str>| match argument {
            Some(argument) => format!(" with `{argument}` spoiled"),
            None => String::new(),
        };
        match kind {
            FailureKind::Value {
                output,
                at,
                got,
                want,
            } => {
                write!(
                    f,
                    "{case}: output {output} is {got} at {at}, expected {want}"
                )
            }
            FailureKind::Refused { error } => write!(f, "{case}: refused: {error}"),
            FailureKind::Accepted { argument } => {
                write!(f, "{case}: taken{}, expected an error", spoiled(argument))
            }
            FailureKind::Written { argument, output } => write!(
                f,
                "{case}: refused{}, but output {output} had been written",
                spoiled(argument)
            ),
            FailureKind::Buffer { error } => write!(f, "{case}: buffer: {error}"),
        }
    }
}

impl core::error::Error for Failure {}

/// Runs every case on `backend` and gives each output to `report`, in an order that does not change.
///
/// # Errors
/// The first [`Failure`].
pub fn run<B: TrainBackend>(
    backend: &mut B,
    tolerance: Tolerance,
    mut report: impl FnMut(Compared<'_>),
) -> Result<(), Failure> {
    for layout in cases::layouts() {
        run_cases(
            backend,
            &layout,
            &cases::all(&layout),
            tolerance,
            &mut report,
        )?;
    }
    run_teacher(backend, tolerance, report)
}

/// Runs the cases of a teacher's block alone, as [`run`]: for a backend whose teacher multiplies in a lower precision than the rest.
///
/// Widths of these teachers are multiples of 16.
///
/// # Errors
/// The first [`Failure`].
pub fn run_teacher<B: TrainBackend>(
    backend: &mut B,
    tolerance: Tolerance,
    mut report: impl FnMut(Compared<'_>),
) -> Result<(), Failure> {
    for layout in cases::teachers() {
        run_cases(
            backend,
            &layout,
            &cases::of_teacher(&layout),
            tolerance,
            &mut report,
        )?;
    }
    Ok(())
}

fn run_cases<B: TrainBackend>(
    backend: &mut B,
    layout: &Layout,
    ops: &[cases::Op],
    tolerance: Tolerance,
    report: &mut impl FnMut(Compared<'_>),
) -> Result<(), Failure> {
    let mut reference = Reference::<f64, _>::owned();
    let coarse = stage::is_narrow(backend).map_err(|kind| Failure {
        case: "Write, Read".to_string(),
        kind,
    })?;
    for op in ops {
        let case = op.to_string();
        let fail = |kind| Failure {
            case: case.clone(),
            kind,
        };
        let want = stage::call(&mut reference, layout, op, None, coarse).map_err(fail)?;
        let got = stage::call(backend, layout, op, None, coarse).map_err(fail)?;
        compare(&case, &got, &want, tolerance, report).map_err(fail)?;
        if want.error.is_some() {
            unchanged(&got, None).map_err(fail)?;
            continue;
        }
        if cases::is_large(layout, op) {
            continue;
        }
        for fault in 0..got.arguments.len() {
            let spoiled = stage::call(backend, layout, op, Some(fault), coarse).map_err(fail)?;
            unchanged(&spoiled, got.arguments.get(fault).copied()).map_err(fail)?;
        }
    }
    Ok(())
}

/// What came of one call.
struct Outcome {
    /// Why it was refused.
    error: Option<String>,
    /// Whether outputs are undefined then: it came with the first read after the call, or in the midst of a block.
    is_undefined: bool,
    /// Each output before and after.
    outputs: Vec<(Vec<f32>, Vec<f32>)>,
    /// Arguments that can be spoiled.
    arguments: Vec<&'static str>,
}

fn compare(
    case: &str,
    got: &Outcome,
    want: &Outcome,
    tolerance: Tolerance,
    report: &mut impl FnMut(Compared<'_>),
) -> Result<(), FailureKind> {
    match (&got.error, &want.error) {
        (Some(error), None) => {
            return Err(FailureKind::Refused {
                error: error.clone(),
            });
        }
        (None, Some(_)) => return Err(FailureKind::Accepted { argument: None }),
        (Some(_), Some(_)) if got.is_undefined => return Ok(()),
        _ => {}
    }
    for (output, ((_, got), (_, want))) in got.outputs.iter().zip(&want.outputs).enumerate() {
        let mut worst = 0.0f64;
        for (at, (&got, &want)) in got.iter().zip(want).enumerate() {
            let allowed = tolerance.atol + tolerance.rtol * f64::from(want).abs();
            let share = (f64::from(got) - f64::from(want)).abs() / allowed;
            if share.is_nan() || share > 1.0 {
                return Err(FailureKind::Value {
                    output,
                    at,
                    got,
                    want,
                });
            }
            worst = worst.max(share);
        }
        report(Compared {
            case,
            output,
            got,
            want,
            worst,
        });
    }
    Ok(())
}

/// The call was refused, and nothing had been written.
fn unchanged(outcome: &Outcome, argument: Option<&'static str>) -> Result<(), FailureKind> {
    if outcome.error.is_none() {
        return Err(FailureKind::Accepted { argument });
    }
    if outcome.is_undefined {
        return Ok(());
    }
    match outcome
        .outputs
        .iter()
        .position(|(before, after)| before != after)
    {
        Some(output) => Err(FailureKind::Written { argument, output }),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    extern crate std;

    use super::*;

    #[test]
    fn the_reference_in_f32_conforms() {
        let (mut outputs, mut worst) = (0, (0.0, String::new()));
        let result = run(
            &mut Reference::<f32, _>::owned(),
            Tolerance::F32,
            |compared| {
                outputs += 1;
                if compared.worst > worst.0 {
                    worst = (
                        compared.worst,
                        format!("{} {}", compared.case, compared.output),
                    );
                }
            },
        );
        std::println!("{outputs} outputs, worst {worst:?}");
        if let Err(failure) = result {
            panic!("{failure}");
        }
        assert!(outputs > 500);
    }
}
