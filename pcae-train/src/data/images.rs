//! Pictures of a batch on their way to a backend.

use std::borrow::Cow;

use pcae_kernel::backend::{Backend, PixelDims, Pixels};
use pcae_kernel::reference::Reference;
use pcae_kernel::resize::{Crop, MAX_SHRINK};

use super::augment::Transform;

/// Pictures of a batch, all of one size.
#[derive(Clone, Debug, PartialEq)]
pub enum Images {
    /// Of 8 bits, which a backend mirrors and normalises itself, and resizes where they are crops.
    Bytes(Bytes),
    /// `[batch, channels, height, width]`, normalised: of pictures that are mixed, or have noise in them, there are no bytes.
    Values(Vec<f32>),
}

/// What pictures of a batch are made as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Format {
    /// [`Images::Values`]
    Values,
    /// [`Images::Bytes`]
    Bytes,
    /// Those too, of a picture's own size as long as they [fit](Crop::fits).
    Crops,
}

/// Pictures of 8 bits.
#[derive(Clone, Debug)]
pub struct Bytes {
    /// Of one picture, as a backend makes it.
    shape: PixelDims,
    /// `[batch, room]`, a picture at the front of each room: `[height, width, channels]`.
    pub(super) values: Vec<u8>,
    pub(super) room: usize,
    /// `[batch]`: where a picture lies, and its size.
    pub(super) crops: Vec<Crop>,
    /// `[batch]`: whether a picture is mirrored.
    pub(super) flips: Vec<bool>,
    mean: Vec<f32>,
    std: Vec<f32>,
}

impl PartialEq for Bytes {
    /// What lies between pictures says nothing.
    fn eq(&self, other: &Self) -> bool {
        (self.shape, self.room) == (other.shape, other.room)
            && (&self.crops, &self.flips) == (&other.crops, &other.flips)
            && (&self.mean, &self.std) == (&other.mean, &other.std)
            && self.pictures().eq(other.pictures())
    }
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
        let mut bytes = Bytes::new(transform, transform.output_len());
        bytes.values = values;
        bytes.lay_out(bytes.values.len() / bytes.room.max(1));
        Self::Bytes(bytes)
    }

    /// Makes room for `batch` pictures of `transform`, in the memory that is there already.
    pub(super) fn prepare(&mut self, transform: &Transform, batch: usize, format: Format) {
        let len = transform.output_len();
        let room = match format {
            Format::Values => {
                if matches!(self, Self::Bytes(_)) {
                    *self = Self::default();
                }
                if let Self::Values(values) = self {
                    values.resize(batch * len, 0.0);
                }
                return;
            }
            Format::Bytes => len,
            Format::Crops => MAX_SHRINK * len,
        };
        if !matches!(self, Self::Bytes(bytes) if bytes.room == room) {
            *self = Self::Bytes(Bytes::new(transform, room));
        }
        if let Self::Bytes(bytes) = self {
            if bytes.values.len() != batch * room {
                // Room that no crop ever fills is never touched.
                bytes.values = vec![0; batch * room];
            }
            bytes.lay_out(batch);
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
        let batch = match self {
            Self::Values(values) => values.len() / len,
            Self::Bytes(bytes) => bytes.flips.len(),
        };
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
                let len = bytes.flips.len() * bytes.shape.len();
                let (mut reference, mut values) = (Reference::<f32, _>::owned(), vec![0.0; len]);
                match self.view().write(&mut reference, &mut values) {
                    Ok(()) => Cow::Owned(values),
                    Err(error) => unreachable!("pictures fit their rooms: {error}"),
                }
            }
        }
    }
}

impl Bytes {
    fn new(transform: &Transform, room: usize) -> Self {
        Self {
            shape: transform.dims(),
            values: Vec::new(),
            room,
            crops: Vec::new(),
            flips: Vec::new(),
            mean: transform.mean.clone(),
            std: transform.std.clone(),
        }
    }

    /// `batch` pictures, one at the front of each room, none of them mirrored.
    fn lay_out(&mut self, batch: usize) {
        let PixelDims { height, width, .. } = self.shape;
        self.flips.clear();
        self.flips.resize(batch, false);
        self.crops.clear();
        self.crops.extend((0..batch).map(|b| Crop {
            start: b * self.room,
            height,
            width,
        }));
    }

    fn pictures(&self) -> impl Iterator<Item = &[u8]> {
        self.crops.iter().map(|crop| {
            let len = crop.height * crop.width * self.shape.channels;
            &self.values[crop.start..][..len]
        })
    }

    fn view(&self, from: usize, to: usize) -> View<'_> {
        let dims = PixelDims {
            batch: to - from,
            ..self.shape
        };
        let len = self.shape.len();
        let (values, crops) = if self.room == len {
            (&self.values[from * len..to * len], None)
        } else {
            (&self.values[..], Some(&self.crops[from..to]))
        };
        let pixels = Pixels {
            values,
            crops,
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
