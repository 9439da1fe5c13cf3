//! How long each kernel takes, by the device's clock.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::sync::Arc;

use crate::driver::{Context, Event, Stream};
use crate::error::Error;

/// All launches of a kernel while [`Cuda::start_profile`](crate::Cuda::start_profile) was in force.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct KernelTime {
    /// Its name; [`KernelTime::PRODUCTS`], [`KernelTime::COPY`] or [`KernelTime::ZERO`] for what the libraries do.
    pub name: &'static str,
    /// How often it was launched.
    pub launches: u64,
    /// Seconds from the end of what came before it to its own end, of all launches. What is recorded in between takes some microseconds
    /// each time, and counts.
    pub seconds: f64,
    /// Bytes that cross the bus of the device's memory at least, of all launches: each operand once, and without what other blocks, rows or
    /// steps find in a cache. None of kernels that something else bounds: arithmetic, or the way from one step to the next.
    pub bytes: Option<u64>,
}

impl KernelTime {
    /// The name of all matrix products of cuBLASLt.
    pub const PRODUCTS: &'static str = "products";
    /// The name of copies within the device.
    pub const COPY: &'static str = "copy";
    /// The name of setting bytes to zero.
    pub const ZERO: &'static str = "zero";
}

/// Points in the device's work, and what ended there.
#[derive(Debug)]
pub(super) struct Profile {
    context: Arc<Context>,
    // Products launch kernels through a shared reference.
    marks: RefCell<Vec<Mark>>,
    spare: RefCell<Vec<Event>>,
}

#[derive(Debug)]
struct Mark {
    reached: Event,
    /// Name and bytes of what was done since the mark before, unless this is where the work begins.
    work: Option<(&'static str, usize)>,
}

impl Profile {
    pub(super) fn new(context: &Arc<Context>) -> Self {
        Self {
            context: Arc::clone(context),
            marks: RefCell::default(),
            spare: RefCell::default(),
        }
    }

    /// Makes what so many `pieces` need: it takes longer than to record it.
    pub(super) fn prepare(&self, pieces: usize) -> Result<(), Error> {
        let mut spare = self.spare.borrow_mut();
        // A product may have a kernel before it.
        while spare.len() <= 2 * pieces {
            spare.push(Event::timed(&self.context)?);
        }
        Ok(())
    }

    /// Begins with what comes next in `stream`.
    pub(super) fn begin(&self, stream: &Stream) -> Result<(), Error> {
        self.record(stream, None)
    }

    /// Notes that `name` is what `stream` was given last.
    pub(super) fn mark(
        &self,
        stream: &Stream,
        name: &'static str,
        bytes: usize,
    ) -> Result<(), Error> {
        self.record(stream, Some((name, bytes)))
    }

    fn record(&self, stream: &Stream, work: Option<(&'static str, usize)>) -> Result<(), Error> {
        let spare = self.spare.borrow_mut().pop();
        let reached = match spare {
            Some(event) => event,
            None => Event::timed(&self.context)?,
        };
        stream.record(&reached)?;
        self.marks.borrow_mut().push(Mark { reached, work });
        Ok(())
    }

    /// What took how long, longest first; all of it is done.
    pub(super) fn times(self) -> Result<Vec<KernelTime>, Error> {
        let mut times: BTreeMap<&'static str, KernelTime> = BTreeMap::new();
        for pair in self.marks.into_inner().windows(2) {
            let [before, after] = pair else { continue };
            let Some((name, bytes)) = after.work else {
                continue;
            };
            let time = times.entry(name).or_insert(KernelTime {
                name,
                launches: 0,
                seconds: 0.0,
                bytes: None,
            });
            time.launches += 1;
            time.seconds += after.reached.seconds_since(&before.reached)?;
            if bytes > 0 {
                time.bytes = Some(time.bytes.unwrap_or(0).saturating_add(bytes as u64));
            }
        }
        let mut times: Vec<KernelTime> = times.into_values().collect();
        times.sort_by(|a, b| b.seconds.total_cmp(&a.seconds));
        Ok(times)
    }
}
