//! `--batch-size auto`: the largest batch whose planned memory fits.

use std::fmt;
use std::str::FromStr;

use pcae_kernel::config::VitConfig;
use serde::{Deserialize, Serialize};

use crate::backends::{self, Available};
use crate::error::Error;
use crate::settings::Machine;

/// As typed: a number of pictures, or `auto`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BatchSize {
    /// So many.
    Pictures(usize),
    /// As many as there is memory for when a run starts; from then on it is a number.
    Auto,
}

impl From<usize> for BatchSize {
    fn from(pictures: usize) -> Self {
        Self::Pictures(pictures)
    }
}

impl FromStr for BatchSize {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match (text, text.parse()) {
            ("auto", _) => Ok(Self::Auto),
            (_, Ok(pictures)) => Ok(Self::Pictures(pictures)),
            _ => Err(format!(
                "expected a number of pictures, or \"auto\" for as many as there is memory for, found {text:?}"
            )),
        }
    }
}

impl Serialize for BatchSize {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match *self {
            Self::Pictures(pictures) => pictures.serialize(serializer),
            Self::Auto => serializer.serialize_str("auto"),
        }
    }
}

impl<'de> Deserialize<'de> for BatchSize {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;

        impl serde::de::Visitor<'_> for Visitor {
            type Value = BatchSize;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a number of pictures, or \"auto\" for as many as there is memory for")
            }

            fn visit_i64<E: serde::de::Error>(self, pictures: i64) -> Result<BatchSize, E> {
                let found = serde::de::Unexpected::Signed(pictures);
                let pictures = pictures.try_into();
                pictures
                    .map(BatchSize::Pictures)
                    .map_err(|_| E::invalid_value(found, &self))
            }

            fn visit_u64<E: serde::de::Error>(self, pictures: u64) -> Result<BatchSize, E> {
                let found = serde::de::Unexpected::Unsigned(pictures);
                let pictures = pictures.try_into();
                pictures
                    .map(BatchSize::Pictures)
                    .map_err(|_| E::invalid_value(found, &self))
            }

            fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<BatchSize, E> {
                text.parse().map_err(E::custom)
            }
        }

        deserializer.deserialize_any(Visitor)
    }
}

impl BatchSize {
    /// The number, which a run has from its start on.
    ///
    /// # Errors
    /// [`Error::Setting`] if there is none yet.
    pub(crate) fn pictures(self) -> Result<usize, Error> {
        match self {
            Self::Pictures(pictures) => Ok(pictures),
            Self::Auto => Err(Error::Setting {
                name: "--batch-size".to_owned(),
                reason: "expected a number of pictures here, found \"auto\", which is for the start of a run"
                    .to_owned(),
            }),
        }
    }
}

/// What was chosen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Fitted {
    /// Pictures in a micro-batch.
    pub(crate) batch_size: usize,
    /// A line about it.
    pub(crate) line: String,
}

/// Steps of an epoch, below which a batch is rather too large than well chosen.
const FEW_STEPS: usize = 10;

/// The largest batch of at most `pictures` for which `plan`, of a batch, says no more bytes than `machine` has. Warns where `accum` of
/// them leave few steps in an epoch.
///
/// # Errors
/// [`Error::Unreachable`] if not even one picture fits, [`Error::Setting`] where nobody says how much memory there is, or what `plan`
/// and the backend report.
pub(crate) fn largest(
    machine: &Machine,
    vit: &VitConfig,
    pictures: usize,
    accum: u64,
    plan: impl FnMut(usize) -> Result<usize, Error>,
) -> Result<Fitted, Error> {
    // Kernels count the elements of a buffer in 32 bits, and of a picture the hidden layers, queries, keys and values have the most.
    let widest = vit.mlp_hidden().max(3 * vit.embed_dim);
    let elements = (vit.num_patches() + 1) * widest.max(vit.patch_len());
    let most = pictures.min((u32::MAX as usize / elements.max(1)).max(1));
    let fitted = choose(&backends::available(machine)?, most, plan)?;
    if let Some(warning) = few_steps(fitted.batch_size, accum, pictures) {
        log::warn!("{warning}");
    }
    Ok(fitted)
}

/// What to say if a batch leaves few steps in an epoch.
fn few_steps(batch_size: usize, accum: u64, pictures: usize) -> Option<String> {
    let steps =
        (pictures / batch_size.max(1)).div_ceil(usize::try_from(accum).unwrap_or(usize::MAX));
    (steps < FEW_STEPS).then(|| {
        format!(
            "--batch-size auto: {} of {} pictures are an epoch, and fewer than {FEW_STEPS} large steps may learn less than more \
             small ones would; a smaller --batch-size, as 64, or more --epochs may do better",
            backends::count(steps, "step"),
            batch_size.saturating_mul(usize::try_from(accum).unwrap_or(usize::MAX))
        )
    })
}

fn choose(
    available: &Available,
    most: usize,
    mut plan: impl FnMut(usize) -> Result<usize, Error>,
) -> Result<Fitted, Error> {
    let Available { free, margin, .. } = *available;
    let room = free.saturating_sub(margin);
    let sizes = sizes(most);
    // Those below the first fit, those from the second on do not.
    let (mut fits, mut too_large) = (0, sizes.len());
    let (mut planned, mut least) = (0, None);
    while fits < too_large {
        let middle = fits + (too_large - fits) / 2;
        let bytes = plan(sizes[middle])?;
        if bytes <= room {
            (fits, planned) = (middle + 1, bytes);
        } else {
            (too_large, least) = (middle, Some(bytes));
        }
    }
    let (free, margin) = (size(free), size(margin));
    let Some(&batch_size) = fits.checked_sub(1).and_then(|last| sizes.get(last)) else {
        return Err(Error::Unreachable {
            name: "--batch-size".to_owned(),
            reason: format!(
                "expected memory for one picture, which takes {}, found {free} free {}, of which {margin} are left for what is \
                 not planned; free some, or take a smaller --model",
                size(least.unwrap_or(0)),
                available.whose
            ),
        });
    };
    let reason = if fits == sizes.len() {
        "no more are of use"
    } else {
        "the most that fit of sizes with four significant bits"
    };
    Ok(Fitted {
        batch_size,
        line: format!(
            "batch     {}, {reason}: {} planned, {free} free {}, {margin} of it left for what is not planned",
            backends::count(batch_size, "picture"),
            size(planned),
            available.whose
        ),
    })
}

/// Bytes, to be read.
fn size(bytes: usize) -> String {
    match bytes {
        0..1_000_000_000 => format!("{:.0} MB", bytes as f64 / 1e6),
        _ => format!("{:.2} GB", bytes as f64 / 1e9),
    }
}

/// What a batch may have, in ascending order: all numbers of four significant bits, so that large ones are multiples of what tiles and warps
/// have, and at least seven eighths of what would fit.
fn sizes(most: usize) -> Vec<usize> {
    let mut sizes = Vec::new();
    let mut size = 1_usize;
    while size <= most {
        sizes.push(size);
        size += (1 << size.ilog2()).max(8) / 8;
    }
    sizes
}

#[cfg(test)]
mod tests {
    use super::*;

    fn available(free: usize, margin: usize) -> Available {
        Available {
            free,
            margin,
            whose: "here",
        }
    }

    #[test]
    fn sizes_have_four_significant_bits() {
        assert!(sizes(0).is_empty());
        assert_eq!(sizes(7), [1, 2, 3, 4, 5, 6, 7]);
        let sizes = sizes(100_000);
        for size in &sizes {
            assert!(size.ilog2() - size.trailing_zeros() < 4, "{size}");
        }
        assert!(
            sizes
                .windows(2)
                .all(|pair| 8 * (pair[1] - pair[0]) <= pair[0].max(8))
        );
        assert!(sizes.ends_with(&[90_112, 98_304]));
    }

    /// Whatever there is, the next larger one would not have fitted.
    #[test]
    fn the_largest_that_fits_is_chosen() {
        let plan = |batch: usize| Ok(1000 + 70 * batch);
        for free in 1470..9000 {
            let fitted = choose(&available(free, 400), 1000, plan).unwrap();
            let size = fitted.batch_size;
            let next = sizes(1000).into_iter().find(|next| *next > size).unwrap();
            assert!(1000 + 70 * size <= free - 400);
            assert!(1000 + 70 * next > free - 400, "{free}: {size}");
        }
    }

    #[test]
    fn there_may_be_room_for_all_or_none() {
        const MB: usize = 1_000_000;
        let plan = |batch: usize| Ok((1000 + 70 * batch) * MB);
        let all = choose(&available(9000 * MB, 0), 45, plan).unwrap();
        assert_eq!(all.batch_size, 44);
        let line = "batch     44 pictures, no more are of use: 4.08 GB planned, 9.00 GB free here, 0 MB of it left for what is not planned";
        assert_eq!(all.line, line);
        let none = choose(&available(1469 * MB, 400 * MB), 45, plan).unwrap_err();
        assert!(!none.is_usage());
        let text = "--batch-size: expected memory for one picture, which takes 1.07 GB, found 1.47 GB free here, of which 400 MB are left \
                    for what is not planned; free some, or take a smaller --model";
        assert_eq!(none.to_string(), text);
    }

    #[test]
    fn few_steps_an_epoch_are_said() {
        assert_eq!(few_steps(10, 1, 100), None);
        assert_eq!(few_steps(10, 2, 190), None);
        let said = few_steps(11, 1, 100).unwrap();
        assert!(said.contains("9 steps of 11 pictures"), "{said}");
        let said = few_steps(11, 9, 100).unwrap();
        assert!(said.contains("1 step of 99 pictures"), "{said}");
        assert!(said.contains("--batch-size auto"), "{said}");
    }

    #[test]
    fn numbers_and_auto_are_read() {
        assert_eq!("auto".parse(), Ok(BatchSize::Auto));
        assert_eq!("12".parse(), Ok(BatchSize::Pictures(12)));
        for wrong in ["some", "-1", "1.5", ""] {
            assert!(wrong.parse::<BatchSize>().unwrap_err().contains("\"auto\""));
        }
        let read = |text| toml::from_str::<std::collections::BTreeMap<String, BatchSize>>(text);
        assert_eq!(read("x = 7").unwrap()["x"], BatchSize::Pictures(7));
        assert_eq!(read("x = \"auto\"").unwrap()["x"], BatchSize::Auto);
        assert!(read("x = -7").is_err() && read("x = true").is_err());
    }
}
