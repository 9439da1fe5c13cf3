//! Pictures of a batch on their way to a backend.

use std::borrow::Cow;

use pcae_kernel::backend::{Backend, PixelDims, Pixels};

use super::augment::Transform;

/// Pictures of a batch, all of one size.
#[derive(Clone, Debug, PartialEq)]
pub enum Images {
    /// Of 8 bits, which a backend mirrors and normalises itself.
    Bytes(Bytes),
    /// `[batch, channels, height, width]`, normalised: of pictures that are mixed, or have noise in them, there are no bytes.
    Values(Vec<f32>),
}

/// Pictures of 8 bits.
#[derive(Clone, Debug, PartialEq)]
pub struct Bytes {
    /// Of one picture.
    shape: PixelDims,
    /// `[batch, height, width, channels]`
    pub(super) values: Vec<u8>,
    /// `[batch]`: whether a picture is mirrored.
    pub(super) flips: Vec<bool>,
    mean: Vec<f32>,
    std: Vec<f32>,
}

impl Default for Images {
    fn default() -> Self {
        Self::Values(Vec::new())
    }
}

impl Images {
    /// Pictures as `transform` cuts them out, none of them mirrored.
    ///
    /// # Shapes
    /// `values: [batch, height, width, channels]`.
    pub fn of_bytes(transform: &Transform, values: Vec<u8>) -> Self {
        let flips = vec![false; values.len() / transform.output_len().max(1)];
        Self::Bytes(Bytes {
            shape: PixelDims {
                batch: 1,
                channels: transform.channels,
                height: transform.height,
                width: transform.width,
            },
            values,
            flips,
            mean: transform.mean.clone(),
            std: transform.std.clone(),
        })
    }

    /// Makes room for `batch` pictures of `transform`, as values or as bytes, in the memory that is there already.
    pub(super) fn prepare(&mut self, transform: &Transform, batch: usize, as_values: bool) {
        let len = batch * transform.output_len();
        if as_values {
            if matches!(self, Self::Bytes(_)) {
                *self = Self::default();
            }
        } else if matches!(self, Self::Values(_)) {
            *self = Self::of_bytes(transform, Vec::new());
        }
        match self {
            Self::Values(values) => values.resize(len, 0.0),
            Self::Bytes(bytes) => {
                bytes.values.resize(len, 0);
                bytes.flips.resize(batch, false);
            }
        }
    }

    /// All of them, as a backend takes them.
    pub fn view(&self) -> View<'_> {
        match self {
            Self::Values(values) => View::Values(values),
            Self::Bytes(bytes) => bytes.view(0, bytes.flips.len()),
        }
    }

    /// The pictures in batches of `count`, of which each has `len` values; the last may be shorter.
    ///
    /// # Panics
    /// If `count` or `len` is 0.
    pub fn chunks(&self, count: usize, len: usize) -> impl Iterator<Item = View<'_>> {
        let values = match self {
            Self::Values(values) => values.len(),
            Self::Bytes(bytes) => bytes.values.len(),
        };
        let batch = values / len;
        (0..batch).step_by(count).map(move |from| {
            let to = batch.min(from + count);
            match self {
                Self::Values(values) => View::Values(&values[from * len..to * len]),
                Self::Bytes(bytes) => bytes.view(from, to),
            }
        })
    }

    /// Normalised values, those that a backend in f32 makes of them.
    ///
    /// # Shapes
    /// `[batch, channels, height, width]`.
    pub fn values(&self) -> Cow<'_, [f32]> {
        match self {
            Self::Values(values) => Cow::Borrowed(values),
            Self::Bytes(bytes) => {
                let Bytes {
                    shape, mean, std, ..
                } = bytes;
                let plane = shape.height * shape.width;
                let pictures = bytes.values.chunks_exact(shape.len());
                let mut values = Vec::with_capacity(bytes.values.len());
                for (picture, flip) in pictures.zip(&bytes.flips) {
                    for c in 0..shape.channels {
                        let from = values.len();
                        let plane = picture[c..].iter().step_by(shape.channels).take(plane);
                        values.extend(plane.map(|&v| Pixels::normalise(v, mean[c], std[c])));
                        if *flip {
                            let rows = values[from..].chunks_exact_mut(shape.width);
                            rows.for_each(<[f32]>::reverse);
                        }
                    }
                }
                Cow::Owned(values)
            }
        }
    }
}

impl Bytes {
    fn view(&self, from: usize, to: usize) -> View<'_> {
        let len = self.shape.len();
        let dims = PixelDims {
            batch: to - from,
            ..self.shape
        };
        let pixels = Pixels {
            values: &self.values[from * len..to * len],
            flips: Some(&self.flips[from..to]),
            mean: &self.mean,
            std: &self.std,
        };
        View::Bytes(dims, pixels)
    }
}

/// Some of [`Images`].
#[derive(Clone, Copy, Debug)]
pub enum View<'a> {
    /// See [`Images::Bytes`].
    Bytes(PixelDims, Pixels<'a>),
    /// See [`Images::Values`].
    Values(&'a [f32]),
}

impl View<'_> {
    /// Copies them to the front of `to`, normalised, as `[batch, channels, height, width]`.
    ///
    /// # Errors
    /// What the backend reports.
    pub fn write<B: Backend>(self, backend: &mut B, to: &mut B::Buf) -> Result<(), B::Error> {
        match self {
            Self::Bytes(dims, pixels) => backend.write_pixels(dims, to, pixels),
            Self::Values(values) => backend.write(to, values),
        }
    }
}

impl<'a> From<&'a Images> for View<'a> {
    fn from(images: &'a Images) -> Self {
        images.view()
    }
}

impl<'a> From<&'a [f32]> for View<'a> {
    fn from(values: &'a [f32]) -> Self {
        Self::Values(values)
    }
}

#[cfg(test)]
mod tests {
    use pcae_kernel::reference::Reference;

    use super::*;

    fn images() -> Images {
        let transform = Transform {
            height: 3,
            width: 5,
            channels: 3,
            scale: (1.0, 1.0),
            ratio: (1.0, 1.0),
            flip: false,
            mean: vec![0.2, 0.4, 0.6],
            std: vec![0.5, 0.25, 0.125],
        };
        let values = (0..4 * 45).map(|i| (i * 89 % 256) as u8).collect();
        let mut images = Images::of_bytes(&transform, values);
        if let Images::Bytes(bytes) = &mut images {
            bytes.flips = vec![true, false, false, true];
        }
        images
    }

    fn written(view: View<'_>, len: usize) -> Vec<f32> {
        let mut reference = Reference::<f32, _>::owned();
        let mut buf = reference.buf(len).unwrap();
        view.write(&mut reference, &mut buf).unwrap();
        let mut values = vec![0.0; len];
        reference.read(&mut values, &buf).unwrap();
        values
    }

    /// On the host or by a backend, at once or in batches: the same bits.
    #[test]
    fn bytes_and_their_values_are_written_alike() {
        let images = images();
        let values = images.values().into_owned();
        assert_eq!(values.len(), 4 * 45);
        assert!(written(images.view(), values.len()) == values);
        let as_values = Images::Values(values.clone());
        for images in [&images, &as_values] {
            let parts = images.chunks(3, 45).zip([3, 1]);
            let parts: Vec<f32> = parts.flat_map(|(view, n)| written(view, n * 45)).collect();
            assert!(parts == values);
        }
        // The first picture is mirrored, its red channel comes first.
        let pixel = f32::from((4 * 3 * 89 % 256) as u8);
        assert_eq!(values[0], (pixel / 255.0 - 0.2) / 0.5);
    }
}
