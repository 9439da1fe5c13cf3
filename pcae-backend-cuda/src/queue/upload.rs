//! Pictures on their way to the device, beside the work that is running there.
//!
//! Their bytes go through pinned memory into one of two *stages*, on a stream of their own. What makes values of them waits for that
//! copy and runs in the queue's stream, behind all that was queued; the next copy into the same stage waits for it. So a copy of one batch
//! runs while the device works on the one before, and nobody waits on the host. Stages are no part of a tape: which of them it is
//! changes from batch to batch, and a step stays one graph.
//!
//! Crops go to a place of their own first, and are resized into the stage, all in the stream of copies: beside the step, too. That stream
//! alone orders what comes to that place, so there is only one.
//!
//! Pictures that are values already (mixed, or with erased rectangles) go through a stage as well, and are copied out of it on the device.
//!
//! Their pinned memory is the [ring](crate::ring) of all writes, whose parts are free again in the order in which they were handed out,
//! on whichever stream. That can hold the host up, and neither the device nor itself for ever: a part that is not free yet belongs to a copy
//! that was queued before, and such a copy waits for work alone that was queued before it, never for the host. A batch that fills the ring may
//! so wait for the small writes of the batch before, which come when the step before that is done; by then that batch's own step is queued,
//! and the device has it to do while the rest is copied.

use std::sync::Arc;

use pcae_kernel::backend::{PixelDims, Pixels};
use pcae_kernel::error::product;
use pcae_kernel::resize::{MAX_SHRINK, MAX_TAPS};

use super::running::Lane;
use super::{Queue, Shape, UNCOUNTED};
use crate::Precision;
use crate::checks::small;
use crate::driver::{Context, DevicePtr, Event, GRAIN, Memory, Priority, Stream};
use crate::error::Error;
use crate::kernels::{CROP_TAPS, NORMALISE_PIXELS, RESIZE_CROPS};
use crate::ring::to_bf16;
use crate::tokens::BLOCK;

/// Stages, so that one is filled while the other is read.
const STAGES: usize = 2;

/// Pixels that a thread takes at once.
const RUN: u32 = 16;

/// Blocks for each multiprocessor: all that run at once, each of which computes a table first.
const BLOCKS: u32 = 8;

/// What crops begin on a multiple of.
const WORD: usize = 16;

/// Bytes of `Crop` and `Taps` in `patches.cu`.
const CROP: usize = 16;
const TAPS: usize = 48;

/// Rows and columns that a block of `resize_crops` makes.
const TILE_ROWS: u32 = 16;
const TILE_COLUMNS: u32 = 64;

/// The stream of copies, and where they go.
#[derive(Debug)]
pub(super) struct Upload {
    pub(super) stream: Stream,
    /// All stages, each an equal part.
    pub(super) memory: Option<Memory>,
    /// Crops on their way into a stage, and what is computed of them: see [`Places`].
    crops: Option<Memory>,
    stages: [Stage; STAGES],
    /// The one that is filled next.
    pub(super) next: usize,
    /// What lies before the pixels.
    head: Vec<u8>,
}

/// What has become of a stage.
#[derive(Debug)]
struct Stage {
    /// Behind the copies into it, on their stream.
    filled: Event,
    /// Behind the kernel that read it, on the queue's.
    read: Event,
}

impl Upload {
    pub(super) fn new(context: &Arc<Context>) -> Result<Self, Error> {
        let stage = || {
            Ok::<_, Error>(Stage {
                filled: Event::new(context)?,
                read: Event::new(context)?,
            })
        };
        Ok(Self {
            // Blocks of `resize_crops` fill a device; a step's come between them.
            stream: Stream::new(context, Priority::Last)?,
            memory: None,
            crops: None,
            stages: [stage()?, stage()?],
            next: 0,
            head: Vec::new(),
        })
    }
}

/// Where a stage begins.
pub(super) fn place(memory: &Memory, stage: usize) -> DevicePtr {
    memory.at().plus(stage * (memory.bytes() / STAGES))
}

/// Bytes of mean, standard deviation and mirroring, up to where the pixels begin.
const fn head_len(dims: PixelDims) -> usize {
    product(&[dims.channels, 2 * size_of::<f32>()])
        .saturating_add(dims.batch)
        .div_ceil(16)
        .saturating_mul(16)
}

/// Bytes that all stages take.
pub(crate) const fn stages(dims: PixelDims) -> usize {
    stages_of(head_len(dims).saturating_add(dims.len()))
}

/// As [`stages`], for so many values in the format of activations.
pub(crate) const fn stages_of_values(values: usize, precision: Precision) -> usize {
    stages_of(values.saturating_mul(precision.size()))
}

const fn stages_of(stage: usize) -> usize {
    let grains = stage.div_ceil(GRAIN).saturating_mul(GRAIN);
    grains.saturating_mul(STAGES)
}

/// What lies behind each other where crops go, by where it begins.
#[derive(Clone, Copy, Debug)]
struct Places {
    taps: usize,
    pixels: usize,
    end: usize,
}

impl Places {
    const fn new(dims: PixelDims) -> Self {
        let taps = product(&[dims.batch, CROP]);
        let sides = dims.height.saturating_add(dims.width);
        let pixels = taps.saturating_add(product(&[dims.batch, sides, TAPS]));
        let picture = product(&[MAX_SHRINK, dims.channels, dims.height, dims.width]);
        let room = product(&[dims.batch, picture.div_ceil(WORD), WORD]);
        Self {
            taps,
            pixels,
            end: pixels.saturating_add(room),
        }
    }
}

/// Bytes that crops take on their way into a stage.
pub(crate) const fn crops(dims: PixelDims) -> usize {
    let bytes = Places::new(dims).end;
    bytes.div_ceil(GRAIN).saturating_mul(GRAIN)
}

impl Queue {
    /// Copies pictures to the device as values, see `Backend::write_pixels`. All lengths were checked, and none is 0.
    pub(crate) fn write_pixels(
        &mut self,
        dims: PixelDims,
        to: DevicePtr,
        pixels: Pixels<'_>,
    ) -> Result<(), Error> {
        let len = small("write_pixels", dims.len())?;
        // None is more than their product.
        let [batch, channels, height, width] =
            [dims.batch, dims.channels, dims.height, dims.width].map(|x| x as u32);
        let runs = len / RUN / channels;
        let at = self.stage(stages(dims))?;
        let crops_at = match pixels.crops {
            Some(_) => Some(self.place_of_crops(crops(dims))?),
            None => None,
        };
        // What is queued reads what was there before.
        self.flush()?;
        self.context.bind()?;
        if let Some(crops_at) = crops_at {
            self.send_crops(dims, crops_at, pixels)?;
        }
        self.fill_stage(dims, at, pixels)?;
        if let Some(crops_at) = crops_at {
            self.resize_crops(dims, at.plus(head_len(dims)), crops_at)?;
        }
        self.wait_for_stage()?;
        let blocks = BLOCKS * self.context.multiprocessors;
        self.launch(
            NORMALISE_PIXELS,
            Shape {
                grid: [runs.div_ceil(BLOCK).clamp(1, blocks), 1, 1],
                block: BLOCK,
                shared: 0,
            },
            dims.len() + self.act_bytes(dims.len()),
            &[
                to.into(),
                at.into(),
                batch.into(),
                channels.into(),
                height.into(),
                width.into(),
            ],
        )?;
        // By itself, as the next one is about another stage.
        let issued = self.issue();
        self.clear();
        issued?;
        self.leave_stage()
    }

    /// Copies values to the device in the format of activations, see `Backend::write_values`. There is at least one.
    pub(crate) fn write_values(&mut self, to: DevicePtr, values: &[f32]) -> Result<(), Error> {
        self.changes += 1;
        let at = self.stage(stages_of_values(values.len(), self.precision))?;
        // What is queued reads what was there before.
        self.flush()?;
        self.context.bind()?;
        let Upload {
            stream,
            stages,
            next,
            ..
        } = &self.upload;
        stream.wait_for(&stages[*next].read)?;
        match self.precision {
            Precision::F32 => self.ring.send(stream, at, values, |x| *x)?,
            Precision::Bf16 => self.ring.send(stream, at, values, |x| to_bf16(*x))?,
        }
        self.wait_for_stage()?;
        let bytes = values.len() * self.precision.size();
        // SAFETY: the caller has checked where `to` lies; the stage is as large.
        unsafe { self.stream.copy(to, at, bytes)? };
        self.leave_stage()
    }

    /// Lets the queue's stream wait for what was sent to the next stage.
    fn wait_for_stage(&self) -> Result<(), Error> {
        let stage = &self.upload.stages[self.upload.next];
        self.upload.stream.record(&stage.filled)?;
        self.stream.wait_for(&stage.filled)
    }

    /// Lets the stage be filled again once what reads it is done, and goes on to the other.
    fn leave_stage(&mut self) -> Result<(), Error> {
        let stage = &self.upload.stages[self.upload.next];
        self.stream.record(&stage.read)?;
        self.upload.next = (self.upload.next + 1) % STAGES;
        Ok(())
    }

    /// Where the next stage is. All of them are made at once, so that nothing is allocated in the steps to come.
    fn stage(&mut self, bytes: usize) -> Result<DevicePtr, Error> {
        let memory = match self.upload.memory.take() {
            Some(memory) if memory.bytes() >= bytes => memory,
            old => {
                // Old and new are never there together.
                drop(old);
                self.collect()?;
                self.heap.allocate(bytes)?
            }
        };
        let memory = self.upload.memory.insert(memory);
        Ok(place(memory, self.upload.next))
    }

    /// Where crops go, as [`Queue::stage`].
    fn place_of_crops(&mut self, bytes: usize) -> Result<DevicePtr, Error> {
        let memory = match self.upload.crops.take() {
            Some(memory) if memory.bytes() >= bytes => memory,
            old => {
                drop(old);
                self.collect()?;
                self.heap.allocate(bytes)?
            }
        };
        Ok(self.upload.crops.insert(memory).at())
    }

    /// Copies crops to `at`, one behind the other. Those of the batch before were resized: that comes earlier in the same stream.
    fn send_crops(
        &mut self,
        dims: PixelDims,
        at: DevicePtr,
        pixels: Pixels<'_>,
    ) -> Result<(), Error> {
        let Upload { stream, head, .. } = &mut self.upload;
        let crops = || (0..dims.batch).map(|b| pixels.crop(b, dims));
        let len = |height: usize, width: usize| product(&[height, width, dims.channels]);
        head.clear();
        let mut words = 0;
        for crop in crops() {
            // Each is below 2^32: a crop has at most four times the pixels of its result.
            for x in [words, crop.height, crop.width, 0] {
                head.extend_from_slice(&(x as u32).to_ne_bytes());
            }
            words += len(crop.height, crop.width).div_ceil(WORD);
        }
        self.ring.send(stream, at, head, |byte| *byte)?;
        let parts = crops().map(|crop| {
            let len = len(crop.height, crop.width);
            &pixels.values[crop.start..][..len]
        });
        let pixels_at = at.plus(Places::new(dims).pixels);
        self.ring.send_parts::<WORD>(stream, pixels_at, parts)
    }

    /// Makes the pixels of a stage of crops, in the stream of copies.
    fn resize_crops(&mut self, dims: PixelDims, to: DevicePtr, at: DevicePtr) -> Result<(), Error> {
        let queued = self.queue_crops(dims, to, at);
        let issued = queued.and_then(|()| self.issue_in(Lane::Upload));
        // After a refusal too: what was queued before it would run in the queue's stream, which nothing orders behind the copies.
        self.clear();
        issued
    }

    /// Queues what [`Queue::resize_crops`] issues.
    fn queue_crops(&mut self, dims: PixelDims, to: DevicePtr, at: DevicePtr) -> Result<(), Error> {
        let places = Places::new(dims);
        let [batch, channels, height, width] =
            [dims.batch, dims.channels, dims.height, dims.width].map(|x| x as u32);
        let grid = |blocks: u32| [batch.saturating_mul(blocks), 1, 1];
        let taps = at.plus(places.taps);
        self.launch(
            CROP_TAPS,
            Shape {
                grid: grid(2),
                block: BLOCK,
                shared: 0,
            },
            UNCOUNTED,
            &[taps.into(), at.into(), height.into(), width.into()],
        )?;
        let columns = MAX_SHRINK as u32 * width.min(TILE_COLUMNS) + MAX_TAPS as u32;
        let line = columns.saturating_mul(channels).saturating_add(3) / 4 * 4;
        self.launch(
            RESIZE_CROPS,
            Shape {
                grid: grid(height.div_ceil(TILE_ROWS) * width.div_ceil(TILE_COLUMNS)),
                block: BLOCK,
                shared: TILE_ROWS.saturating_mul(line),
            },
            // Some fifty integer instructions for each byte of the result: thrice the time of what it reads and writes.
            UNCOUNTED,
            &[
                to.into(),
                at.plus(places.pixels).into(),
                at.into(),
                taps.into(),
                channels.into(),
                height.into(),
                width.into(),
                line.into(),
            ],
        )
    }

    /// Copies a batch to `at`, the next stage: all of it, or what lies before the pixels where those are made of crops.
    fn fill_stage(
        &mut self,
        dims: PixelDims,
        at: DevicePtr,
        pixels: Pixels<'_>,
    ) -> Result<(), Error> {
        let Upload {
            stream,
            stages,
            next,
            head,
            ..
        } = &mut self.upload;
        head.clear();
        let (mean, std) = (&pixels.mean[..dims.channels], &pixels.std[..dims.channels]);
        for x in mean.iter().chain(std) {
            head.extend_from_slice(&x.to_ne_bytes());
        }
        head.extend((0..dims.batch).map(|b| u8::from(pixels.is_flipped(b))));
        head.resize(head_len(dims), 0);
        // What was there before has been read.
        stream.wait_for(&stages[*next].read)?;
        self.ring.send(stream, at, head, |byte| *byte)?;
        if pixels.crops.is_some() {
            return Ok(());
        }
        let values = &pixels.values[..dims.len()];
        self.ring
            .send(stream, at.plus(head.len()), values, |byte| *byte)
    }
}
