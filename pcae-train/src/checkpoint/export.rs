//! Parameters alone, for deployment: no optimizer, in f32 or in half the space.
//!
//! The file has the names of timm's `state_dict` and the metadata of a checkpoint: `format` (`pcae`), `version`, `step`,
//! `task` (`encode` or `classify`), `weights` (`student` or `teacher`), `classes` of a classifier, and `config`, the recipe with
//! every size of the encoder filled in, so that nothing has to be told to read it again, and without the folder of the pictures.

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;

use half::{bf16, f16};
use pcae_kernel::layout::Layout;

use super::file::{self, TensorData};
use super::{FORMAT, VERSION, tensors};
use crate::error::Error;

/// Number format of stored parameters.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
#[value(rename_all = "lowercase")]
pub enum Storage {
    /// 32 bits: the parameters as they are.
    #[default]
    F32,
    /// 16 bits, 11 of them significant, up to 65504.
    F16,
    /// 16 bits, 8 of them significant, with the range of f32.
    Bf16,
}

impl fmt::Display for Storage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
        })
    }
}

/// What was written.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Written {
    /// Tensors.
    pub tensors: usize,
    /// Parameters, fixed positions included.
    pub elements: usize,
    /// Norm of the rounding error over the norm of the parameters.
    pub rounding: f64,
}

impl fmt::Display for Written {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let millions = self.elements as f64 / 1e6;
        write!(f, "{} tensors, {millions:.2} M parameters", self.tensors)?;
        if self.rounding > 0.0 {
            write!(f, ", relative rounding error {:.1e}", self.rounding)?;
        }
        Ok(())
    }
}

/// Writes the parameters of a model to `path`, atomically, under the names of its layout and with `metadata` besides format and
/// version; each parameter is rounded to the nearest of `storage`, halfway cases to the even one. `source` is the file that they
/// are of.
///
/// # Errors
/// [`Error::Checkpoint`] naming the tensor and the value, if one is beyond the largest of `storage`; [`Error::File`] if the
/// disk fails. A previous file at `path` is then intact.
pub fn write(
    path: &Path,
    source: &Path,
    (layout, values): (&Layout, &[f32]),
    mut metadata: BTreeMap<String, String>,
    storage: Storage,
) -> Result<Written, Error> {
    metadata.insert("format".to_owned(), FORMAT.to_owned());
    metadata.insert("version".to_owned(), VERSION.to_owned());
    let (mut halves, mut brains) = (Vec::new(), Vec::new());
    match storage {
        Storage::F32 => {}
        Storage::F16 => halves.extend(values.iter().map(|&value| f16::from_f32(value))),
        Storage::Bf16 => brains.extend(values.iter().map(|&value| bf16::from_f32(value))),
    }
    let rounded = |index: usize| match storage {
        Storage::F32 => values[index],
        Storage::F16 => halves[index].to_f32(),
        Storage::Bf16 => brains[index].to_f32(),
    };
    let (mut views, mut error, mut norm) = (Vec::new(), 0.0, 0.0);
    for tensor in tensors(layout) {
        let range = tensor.span.start..tensor.span.end();
        for index in range.clone() {
            let (value, rounded) = (values[index], rounded(index));
            if !rounded.is_finite() {
                let wider = if storage == Storage::F16 {
                    "bf16"
                } else {
                    "f32"
                };
                let reason = format!(
                    "tensor {}: {value} is beyond the largest number of {storage}; use --dtype {wider}",
                    tensor.name
                );
                return Err(Error::Checkpoint {
                    path: source.to_owned(),
                    reason,
                });
            }
            error += (f64::from(rounded) - f64::from(value)).powi(2);
            norm += f64::from(value).powi(2);
        }
        views.push(file::Tensor {
            name: tensor.name.to_string(),
            shape: tensor.shape().to_vec(),
            data: match storage {
                Storage::F32 => TensorData::F32(&values[range]),
                Storage::F16 => TensorData::F16(&halves[range]),
                Storage::Bf16 => TensorData::BF16(&brains[range]),
            },
        });
    }
    file::write(path, &metadata, &views)?;
    Ok(Written {
        tensors: views.len(),
        elements: values.len(),
        // Where all parameters are 0, so are all errors.
        rounding: if norm > 0.0 {
            (error / norm).sqrt()
        } else {
            0.0
        },
    })
}
