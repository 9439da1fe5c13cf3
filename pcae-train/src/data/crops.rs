//! Crops that are left as they are, for a backend to resize.

use pcae_kernel::resize::Crop;
use pcae_kernel::rng::Stream;

use super::augment::{Scratch, Transform};
use super::{DataError, Picture};

impl Transform {
    /// [`Transform::train`] but for mirroring, of which it returns whether it is to be done, normalisation, and the resize of a crop that
    /// [fits](Crop::fits). A larger one is resized here: it costs more to carry than to resize, and the result is the same.
    ///
    /// # Shapes
    /// `out: [crop.height, crop.width, channels]` at its front, in room for the largest crop that fits.
    ///
    /// # Errors
    /// If `picture` does not have the shape that its fields say.
    pub(super) fn cut(
        &self,
        picture: &Picture,
        stream: &mut Stream,
        scratch: &mut Scratch,
        out: &mut [u8],
        crop: &mut Crop,
    ) -> Result<bool, DataError> {
        self.check_shapes(picture, self.output_len())?;
        let (view, flip) = self.draw(picture, stream);
        (crop.height, crop.width) = (view.height, view.width);
        if crop.fits(self.dims()) {
            let row = view.width * self.channels;
            let rows = picture.pixels.chunks_exact(picture.width * self.channels);
            let rows = rows.skip(view.top).take(view.height);
            for (out, from) in out.chunks_exact_mut(row).zip(rows) {
                out.copy_from_slice(&from[view.left * self.channels..][..row]);
            }
        } else {
            self.resize(picture, view, (self.width, self.height), scratch)?;
            (crop.height, crop.width) = (self.height, self.width);
            out[..self.output_len()].copy_from_slice(&scratch.resized);
        }
        Ok(flip)
    }
}

#[cfg(test)]
mod tests {
    use pcae_kernel::reference::Reference;
    use pcae_kernel::resize::MAX_SHRINK;
    use pcae_kernel::rng::Purpose;
    use proptest::prelude::*;

    use super::*;
    use crate::data::images::{Format, Images, View};
    use crate::data::loader::{Batch, Loader, LoaderConfig};
    use crate::data::open;
    use crate::data::regularize::Augmentation;

    fn transform(height: usize, width: usize, channels: usize) -> Transform {
        Transform {
            height,
            width,
            channels,
            scale: (0.05, 1.0),
            ratio: (0.4, 3.0),
            flip: true,
            mean: vec![0.0; channels],
            std: vec![1.0 / 255.0; channels],
        }
    }

    /// Of extreme contrast where `hard`: sums beyond 0 and 255 are then frequent.
    fn picture(height: usize, width: usize, channels: usize, hard: bool) -> Picture {
        let mut stream = Stream::new(3, 0, 0, Purpose::Init);
        let mut pixel = || match hard {
            true => 255 * stream.below(2) as u8,
            false => stream.below(256) as u8,
        };
        Picture {
            width,
            height,
            channels,
            pixels: (0..height * width * channels).map(|_| pixel()).collect(),
        }
    }

    /// The sample resized by the library, and by the backends' formula where it is left to them; whether it was.
    fn both(transform: &Transform, picture: &Picture, sample: u64) -> (Vec<f32>, Vec<f32>, bool) {
        let stream = || Stream::new(8, 0, sample, Purpose::Augment);
        let mut scratch = Scratch::default();
        let mut resized = vec![0.0; transform.output_len()];
        transform
            .train(picture, &mut stream(), &mut scratch, &mut resized)
            .unwrap();
        let mut images = Images::default();
        images.prepare(transform, 1, Format::Crops);
        let Images::Bytes(bytes) = &mut images else {
            unreachable!("what was asked for")
        };
        let (out, crop) = (&mut bytes.values[..], &mut bytes.crops[0]);
        let flip = transform.cut(picture, &mut stream(), &mut scratch, out, crop);
        bytes.flips[0] = flip.unwrap();
        let size = (crop.height, crop.width);
        let (view, _) = transform.draw(picture, &mut stream());
        let left = size == (view.height, view.width);
        assert!(left || size == (transform.height, transform.width));
        (resized, images.values().into_owned(), left)
    }

    proptest! {
        /// Not a bit differs, whatever is drawn: a run may go on with a backend that resizes, and one that does not.
        #[test]
        fn backends_resize_as_the_library_does(
            height in 1_usize..140,
            width in 1_usize..140,
            out_height in 1_usize..40,
            out_width in 1_usize..90,
            is_grey: bool,
            hard: bool,
            sample: u64,
        ) {
            let channels = if is_grey { 1 } else { 3 };
            let transform = transform(out_height, out_width, channels);
            let picture = picture(height, width, channels, hard);
            let (library, formula, _) = both(&transform, &picture, sample);
            prop_assert!(library == formula);
        }
    }

    /// Photographs at the usual size: all scales that occur.
    #[test]
    fn photographs_are_resized_as_the_library_does() {
        let transform = transform(224, 224, 3);
        let mut left = 0;
        for (sample, (height, width)) in [(375, 500), (500, 333), (120, 160), (1800, 2600)]
            .into_iter()
            .enumerate()
        {
            let picture = picture(height, width, 3, sample == 1);
            let (library, formula, is_left) = both(&transform, &picture, sample as u64);
            assert!(library == formula, "{height} x {width}");
            left += usize::from(is_left);
        }
        assert_eq!(left, 3);
    }

    /// Crops up to four times the pixels of the result are left, with room for all of them, and larger ones are not.
    #[test]
    fn large_crops_are_resized_on_the_host() {
        let mut transform = transform(10, 12, 1);
        (transform.scale, transform.ratio) = ((1.0, 1.0), (0.01, 100.0));
        for (height, width, leaves) in [
            (20, 24, true),
            (40, 12, true),
            (10, 48, true),
            (21, 24, false),
            (41, 3, false),
            (2, 49, false),
        ] {
            // The whole of it is the only crop of that area, and is drawn where no other ratio fits.
            let picture = picture(height, width, 1, false);
            transform.ratio = (width as f64 / height as f64, width as f64 / height as f64);
            let (library, formula, left) = both(&transform, &picture, 0);
            assert_eq!(left, leaves, "{height} x {width}");
            assert!(library == formula && height * width <= MAX_SHRINK * 120 + 24);
        }
    }

    /// A few batches of the embedded pictures, with or without resizing them, from `start` on.
    fn batches(
        augmentation: &Augmentation,
        leaves: bool,
        workers: usize,
        start: u64,
    ) -> Vec<Batch> {
        let config = LoaderConfig {
            batch_size: 300,
            seed: 11,
            start,
            workers,
            leaves_crops: leaves,
        };
        let held_out = open(None, None).unwrap().held_out;
        let mut loader = Loader::new(held_out, augmentation.clone(), config).unwrap();
        (start..9)
            .map(|_| {
                let batch = loader.next().unwrap();
                let copy = batch.clone();
                loader.recycle(batch);
                copy
            })
            .collect()
    }

    /// Crops that are left to a backend become the same pictures, all at once or in parts, from whichever batch on and with any number of
    /// workers; where resized pixels are changed, none is left.
    #[test]
    fn a_loader_leaves_crops_and_the_pictures_are_the_same() {
        let transform = Transform {
            scale: (0.2, 1.0),
            ratio: (0.75, 4.0 / 3.0),
            ..transform(12, 10, 1)
        };
        let plain = Augmentation::from(transform);
        let (all, resized) = (batches(&plain, true, 0, 0), batches(&plain, false, 0, 0));
        for (left, resized) in all.iter().zip(&resized) {
            let values = left.images.values();
            assert!(values == resized.images.values());
            assert_eq!(left.samples, resized.samples);
            let parts: Vec<f32> = left.images.chunks(70, 120).flat_map(written).collect();
            assert!(parts == *values);
            let Images::Bytes(bytes) = &left.images else {
                unreachable!("nothing makes values of them")
            };
            // Of 28 x 28 pixels: some are too large, most are not.
            let is_left = |crop: &&Crop| (crop.height, crop.width) != (12, 10);
            let count = bytes.crops.iter().filter(is_left).count();
            assert!((100..300).contains(&count), "{count}");
        }
        assert_eq!(batches(&plain, true, 3, 0), all);
        assert_eq!(batches(&plain, true, 2, 5), all[5..]);
        let changed = Augmentation {
            rand_augment: 5.0,
            ..plain
        };
        assert!(batches(&changed, true, 0, 8) == batches(&changed, false, 0, 8));
    }

    fn written(view: View<'_>) -> Vec<f32> {
        let View::Bytes(dims, _) = view else {
            unreachable!("they are bytes")
        };
        let (mut reference, mut values) = (Reference::<f32, _>::owned(), vec![0.0; dims.len()]);
        view.write(&mut reference, &mut values).unwrap();
        values
    }
}
