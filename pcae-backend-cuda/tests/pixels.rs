//! Pictures on their way to the device, beside work that is running.
#![allow(
    clippy::unwrap_used,
    reason = "a test stops at what it does not expect"
)]

use pcae_backend_cuda::{Cuda, Precision};
use pcae_kernel::backend::{Backend, PatchDims, PixelDims, Pixels};
use pcae_kernel::reference::Reference;
use pcae_kernel::resize::{Crop, MAX_SHRINK};
use pcae_kernel::rng::{Purpose, Stream};

mod emulated;

#[test]
fn on_the_emulator() {
    emulated::run_again();
}

/// Whether pictures have the size of the output, or each another one; or are values already.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Sizes {
    One,
    Many,
    Values,
}
use Sizes::{Many, One, Values};

/// A batch, where its pictures are, and which of it is mirrored.
fn batch(dims: PixelDims, sizes: Sizes, seed: u64) -> (Vec<u8>, Vec<Crop>, Vec<bool>) {
    let mut rng = Stream::new(seed, 0, 0, Purpose::Init);
    let mut len = 0;
    let mut crops: Vec<Crop> = (0..dims.batch)
        .map(|b| {
            let most = MAX_SHRINK as u32;
            let mut side = |len: usize| 1 + rng.below(most * len as u32) as usize;
            let crop = loop {
                let (height, width) = match (sizes, b % 5) {
                    // As it is, and the largest there are.
                    (One | Values, _) | (Many, 1) => (dims.height, dims.width),
                    (Many, 2) => (2 * dims.height, 2 * dims.width),
                    (Many, 3) => (dims.height, 4 * dims.width),
                    (Many, _) => (side(dims.height), side(dims.width)),
                };
                let crop = Crop {
                    start: len,
                    height,
                    width,
                };
                if crop.fits(dims) {
                    break crop;
                }
            };
            // With a gap behind it.
            len += crop.height * crop.width * dims.channels + b % 7 * usize::from(sizes == Many);
            crop
        })
        .collect();
    if sizes == Many {
        // No place follows from the one before.
        let half = crops.len() / 2;
        crops.rotate_left(half);
    }
    let values = (0..len).map(|_| rng.below(256) as u8).collect();
    let flips = (0..dims.batch).map(|_| rng.below(2) == 1).collect();
    (values, crops, flips)
}

fn write<B: Backend>(backend: &mut B, to: &mut B::Buf, dims: PixelDims, sizes: Sizes, seed: u64) {
    let (values, crops, flips) = batch(dims, sizes, seed);
    if sizes == Values {
        let values: Vec<f32> = values.iter().map(|x| f32::from(*x) / 99.0 - 1.0).collect();
        return backend.write_values(dims, to, &values).unwrap();
    }
    let pixels = Pixels {
        values: &values,
        crops: (sizes == Many).then_some(&crops),
        flips: Some(&flips),
        mean: &[0.485, 0.456, 0.406][..dims.channels],
        std: &[0.229, 0.224, 0.225][..dims.channels],
    };
    backend.write_pixels(dims, to, pixels).unwrap();
}

/// What the reference makes of it in f32, as a backend of `precision` holds it.
fn expected(dims: PixelDims, sizes: Sizes, seed: u64, precision: Precision) -> Vec<f32> {
    let mut reference = Reference::<f32, _>::owned();
    let mut buf = reference.buf(dims.len()).unwrap();
    write(&mut reference, &mut buf, dims, sizes, seed);
    let mut values = vec![0.0; dims.len()];
    reference.read(&mut values, &buf).unwrap();
    if precision == Precision::Bf16 {
        for x in &mut values {
            // To nearest even.
            let bits = x.to_bits();
            *x = f32::from_bits((bits + 0x7fff + (bits >> 16 & 1)) & 0xffff_0000);
        }
    }
    values
}

/// The same bits as the reference, by words of 16 bytes and one by one.
#[test]
fn values_are_those_of_the_reference_to_the_bit() {
    if !emulated::has_device() {
        return;
    }
    for precision in [Precision::F32, Precision::Bf16] {
        let mut cuda = Cuda::new(0, precision).unwrap();
        for (batch, channels, height, width) in [
            // The first, while there is no room but for these: each crop takes a word, though it has four bytes at most.
            (33, 1, 1, 1),
            (3, 3, 7, 48),
            (2, 1, 9, 32),
            (5, 3, 3, 16),
            (2, 3, 5, 17),
            (3, 1, 28, 28),
            (1, 2, 3, 16),
            // More than one tile of rows, and of columns; what is left over of both.
            (4, 3, 20, 70),
            (3, 1, 16, 64),
        ] {
            let dims = PixelDims {
                batch,
                channels,
                height,
                width,
            };
            let mut buf = cuda.buf(dims.len()).unwrap();
            for sizes in [One, Many, Values] {
                write(&mut cuda, &mut buf, dims, sizes, 1);
                let mut values = vec![0.0; dims.len()];
                cuda.read(&mut values, &buf).unwrap();
                let expected = expected(dims, sizes, 1, precision);
                assert!(values == expected, "{dims:?}, {sizes:?}");
            }
        }
    }
}

/// Batch after batch, of crops, whole pictures and values, into the same buffer, with work on each behind it that nobody waits for: each is read as it was, and the next comes
/// into no stage that is still read.
#[test]
fn batches_do_not_overtake_the_work_on_those_before() {
    if !emulated::has_device() {
        return;
    }
    for kinds in [
        [Many, Many, Many, One, Many],
        [Values, Values, Values, One, Values],
        [One; 5],
    ] {
        in_order(kinds);
    }
}

fn in_order(kinds: [Sizes; 5]) {
    const BATCHES: usize = 40;
    let dims = PixelDims {
        batch: 2,
        channels: 3,
        height: 8,
        width: 16,
    };
    let patches = PatchDims {
        batch: dims.batch,
        channels: dims.channels,
        height: dims.height,
        width: dims.width,
        patch_size: 8,
        taken: 2,
    };
    let mut cuda = Cuda::new(0, Precision::F32).unwrap();
    let mut reference = Reference::<f32, _>::owned();
    let mut images = cuda.buf(dims.len()).unwrap();
    let mut outs: Vec<_> = (0..BATCHES)
        .map(|_| cuda.buf(dims.len()).unwrap())
        .collect();
    let mut taken = 0;
    let sizes = |seed: usize| kinds[seed % kinds.len()];
    for (seed, out) in outs.iter_mut().enumerate() {
        write(&mut cuda, &mut images, dims, sizes(seed), seed as u64);
        cuda.gather_patches(patches, out, &images, None).unwrap();
        if seed == 0 {
            taken = cuda.taken();
        }
    }
    assert_eq!(cuda.taken(), taken, "a batch allocates: {kinds:?}");
    let mut want = reference.buf(dims.len()).unwrap();
    let mut out = reference.buf(dims.len()).unwrap();
    for (seed, on_device) in outs.iter().enumerate() {
        write(&mut reference, &mut want, dims, sizes(seed), seed as u64);
        reference
            .gather_patches(patches, &mut out, &want, None)
            .unwrap();
        let mut values = vec![0.0; dims.len()];
        cuda.read(&mut values, on_device).unwrap();
        assert!(values == out, "batch {seed} of {kinds:?}");
    }
}

/// Stages grow, and what was on its way in the smaller ones arrives.
#[test]
fn a_larger_batch_may_follow() {
    if !emulated::has_device() {
        return;
    }
    let mut cuda = Cuda::new(0, Precision::F32).unwrap();
    let sizes = [3, 16, 64, 5].map(|width| PixelDims {
        batch: 2,
        channels: 1,
        height: 3,
        width,
    });
    let mut bufs: Vec<_> = sizes
        .iter()
        .map(|dims| cuda.buf(dims.len()).unwrap())
        .collect();
    for kind in [One, Many, Values] {
        for (dims, buf) in sizes.iter().zip(&mut bufs) {
            write(&mut cuda, buf, *dims, kind, 9);
        }
        for (dims, buf) in sizes.iter().zip(&bufs) {
            let mut values = vec![0.0; dims.len()];
            cuda.read(&mut values, buf).unwrap();
            assert_eq!(values, expected(*dims, kind, 9, Precision::F32));
        }
    }
}

/// Crops of more bytes than one copy takes: some begin in one and end in the next.
#[test]
fn crops_may_lie_in_several_copies() {
    if !emulated::has_device() {
        return;
    }
    let dims = PixelDims {
        batch: 9,
        channels: 3,
        height: 256,
        width: 250,
    };
    let (values, _, _) = batch(dims, Many, 3);
    assert!(values.len() > 4 << 20, "{}", values.len());
    let mut cuda = Cuda::new(0, Precision::F32).unwrap();
    let mut buf = cuda.buf(dims.len()).unwrap();
    write(&mut cuda, &mut buf, dims, Many, 3);
    let mut values = vec![0.0; dims.len()];
    cuda.read(&mut values, &buf).unwrap();
    assert!(values == expected(dims, Many, 3, Precision::F32));
}

/// The largest crop there is, whose last row begins in the midst of a word and ends with the memory of crops: 1280 bytes, 5 of the grains in which it is
/// handed out. The emulator has a page behind it that cannot be touched.
#[test]
fn no_word_behind_the_last_crop_is_read() {
    if !emulated::has_device() {
        return;
    }
    let dims = PixelDims {
        batch: 1,
        channels: 1,
        height: 8,
        width: 11,
    };
    let (height, width) = (2 * dims.height, 2 * dims.width);
    let values: Vec<u8> = (0..height * width).map(|i| (i * 37 % 256) as u8).collect();
    let start = 0;
    let crops = [Crop {
        start,
        height,
        width,
    }];
    let pixels = Pixels {
        values: &values,
        crops: Some(&crops),
        flips: None,
        mean: &[0.5],
        std: &[0.25],
    };
    let mut cuda = Cuda::new(0, Precision::F32).unwrap();
    let mut reference = Reference::<f32, _>::owned();
    let mut buf = cuda.buf(dims.len()).unwrap();
    let mut want = reference.buf(dims.len()).unwrap();
    cuda.write_pixels(dims, &mut buf, pixels).unwrap();
    reference.write_pixels(dims, &mut want, pixels).unwrap();
    let mut values = vec![0.0; dims.len()];
    cuda.read(&mut values, &buf).unwrap();
    assert!(values == want);
}
