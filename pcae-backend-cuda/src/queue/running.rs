//! What is queued, on its way to the device: piece by piece, or as a graph.

use std::cell::Cell;
use std::collections::VecDeque;

use super::profile::{KernelTime, Profile};
use super::{Arg, GRAPHS, Known, Loaded, Queue, SEEN, Shape, UNCOUNTED, WORTH, word};
use crate::driver::{DevicePtr, Event, MAX_ARGS, Stream};
use crate::error::Error;
use crate::gemm::{Gemm, Matmul};
use crate::kernels::{KERNELS, Kernel, PRODUCT};

impl Queue {
    /// Runs what is queued, and does not wait for it.
    pub(crate) fn flush(&mut self) -> Result<(), Error> {
        if self.tape.is_empty() {
            return Ok(());
        }
        self.context.bind()?;
        let run = self.send_changing().and_then(|()| self.run());
        // After a failure too: what could not run once will not run the next time.
        self.clear();
        run
    }

    /// Forgets what is queued.
    pub(super) fn clear(&mut self) {
        self.tape.clear();
        self.pieces = 0;
        self.changing.clear();
    }

    /// Runs what is queued and waits for it, and returns the error of a fault.
    pub(crate) fn wait(&mut self) -> Result<(), Error> {
        self.read_u32(&mut [], self.fault_at.at())
    }

    /// Starts a clock on the device. Until it is stopped, work is issued piece by piece and not made into graphs.
    ///
    /// The device is given something to do before, of no use to anybody, during which the host comes with the work: else its way to the
    /// device would count. It pushes some of what was read and written before out of the cache, too.
    pub(crate) fn start_clock(&mut self) -> Result<(), Error> {
        self.wait()?;
        if self.clocks.is_none() {
            let clock = || Event::timed(&self.context);
            self.clocks = Some([clock()?, clock()?]);
        }
        self.gemm.spoil_workspace(&self.stream)?;
        if let Some([started, _]) = &self.clocks {
            self.stream.record(started)?;
        }
        self.clock_runs = true;
        Ok(())
    }

    /// Waits as [`Queue::wait`], and returns the seconds since [`Queue::start_clock`] by the device's clock.
    pub(crate) fn stop_clock(&mut self) -> Result<f64, Error> {
        let flushed = self.flush();
        self.clock_runs = false;
        flushed?;
        if let Some([_, stopped]) = &self.clocks {
            self.stream.record(stopped)?;
        }
        self.wait()?;
        match &self.clocks {
            Some([started, stopped]) => stopped.seconds_since(started),
            None => Ok(0.0),
        }
    }

    /// Times each kernel from now on, see [`Cuda::start_profile`](crate::Cuda::start_profile).
    pub(crate) fn start_profile(&mut self) -> Result<(), Error> {
        self.wait()?;
        self.profile = Some(Profile::new(&self.context));
        Ok(())
    }

    /// Waits as [`Queue::wait`], and returns what took how long since [`Queue::start_profile`].
    pub(crate) fn stop_profile(&mut self) -> Result<Vec<KernelTime>, Error> {
        let done = self.wait();
        let profile = self.profile.take();
        done?;
        profile.map_or(Ok(Vec::new()), Profile::times)
    }

    fn send_changing(&mut self) -> Result<(), Error> {
        if self.changing.is_empty() {
            return Ok(());
        }
        let (changing, to) = (&self.changing, self.changing_at.at());
        self.ring.send(&self.stream, to, changing, |x| *x)
    }

    fn run(&mut self) -> Result<(), Error> {
        if self.clock_runs || self.profile.is_some() {
            self.runs.issued += 1;
            return self.issue();
        }
        self.clock += 1;
        let sum = sum(&self.tape);
        let same = |known: &&mut Known| known.sum == sum && known.tape == self.tape;
        if let Some(known) = self.known.iter_mut().find(same) {
            known.used = self.clock;
            self.runs.graphs += 1;
            // SAFETY: its graph refers to what its tape does, and `forget` drops it with that.
            return unsafe { self.stream.run(&known.graph) };
        }
        if self.pieces >= WORTH && self.seen.contains(&sum) && !self.refused.contains(&sum) {
            match self.capture(sum) {
                Ok(()) => {
                    self.runs.graphs += 1;
                    let known = self.known.last();
                    // SAFETY: as above.
                    return known.map_or(Ok(()), |known| unsafe { self.stream.run(&known.graph) });
                }
                Err(error) => {
                    // It may still run piece by piece, and says so if not.
                    if self.runs.refused == 0 {
                        self.warnings.add(format!(
                            "work that comes again does not become a graph, and the host issues it piece by piece, slower: {error}"
                        ));
                    }
                    self.runs.refused += 1;
                    remember(&mut self.refused, sum);
                }
            }
        }
        remember(&mut self.seen, sum);
        self.runs.issued += 1;
        self.issue()
    }

    /// Makes a graph of the tape.
    fn capture(&mut self, sum: u64) -> Result<(), Error> {
        let Self {
            stream,
            tape,
            functions,
            gemm,
            ..
        } = self;
        let graph = stream.capture(|| issue(stream, functions, gemm, tape, None))?;
        self.runs.made += 1;
        if self.known.len() == GRAPHS {
            let oldest = (0..GRAPHS).min_by_key(|i| self.known[*i].used);
            self.known.swap_remove(oldest.unwrap_or(0));
        }
        self.known.push(Known {
            sum,
            tape: self.tape.clone(),
            graph,
            used: self.clock,
        });
        Ok(())
    }

    /// Puts the tape's pieces into the stream.
    pub(super) fn issue(&mut self) -> Result<(), Error> {
        self.issue_in(Lane::Work)
    }

    /// Puts the tape's pieces into one of the streams.
    pub(super) fn issue_in(&mut self, lane: Lane) -> Result<(), Error> {
        let stream = match lane {
            Lane::Work => &self.stream,
            Lane::Upload => &self.upload.stream,
        };
        if let Some(profile) = &self.profile {
            // By itself. What it is given first is of no use to anybody: while the device does that, the host comes with all the
            // pieces, so that none waits for it.
            self.upload.stream.wait()?;
            self.stream.wait()?;
            profile.prepare(self.pieces)?;
            for _ in 0..=self.pieces {
                self.gemm.spoil_workspace(stream)?;
            }
            profile.begin(stream)?;
        }
        issue(
            stream,
            &self.functions,
            &mut self.gemm,
            &self.tape,
            self.profile.as_ref(),
        )
    }
}

/// A stream of a [`Queue`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Lane {
    /// That of all operations.
    Work,
    /// That of copies of pictures.
    Upload,
}

/// Puts the pieces of `tape` into a stream.
fn issue(
    stream: &Stream,
    functions: &[Loaded],
    gemm: &mut Gemm,
    tape: &[u64],
    profile: Option<&Profile>,
) -> Result<(), Error> {
    let mark = |name, bytes| profile.map_or(Ok(()), |profile| profile.mark(stream, name, bytes));
    let mut rest = tape;
    while let [first, after @ ..] = rest {
        rest = match first & 0xff {
            word::LAUNCH => {
                let [xy, z_block, shared, bytes, after @ ..] = after else {
                    break;
                };
                let (args, after) = after.split_at((first >> 32) as usize);
                let low = |x: u64| x as u32;
                let id = usize::from((first >> 8) as u16);
                // SAFETY: `Queue::launch` has checked their number; where they point, the operation that queued it has.
                unsafe {
                    stream.launch(
                        functions[id].function,
                        [low(*xy), low(*xy >> 32), low(*z_block)],
                        low(*z_block >> 32),
                        low(*shared),
                        args,
                    )?;
                }
                mark(KERNELS[id].name, *bytes as usize)?;
                after
            }
            word::MATMUL => {
                let Some((words, after)) = after.split_first_chunk() else {
                    break;
                };
                let is_ours = Cell::new(false);
                let launch = |kernel: Kernel, shape: Shape, bytes: usize, args: &[Arg]| {
                    is_ours.set(kernel == PRODUCT);
                    let mut words = [0; MAX_ARGS];
                    let words = &mut words[..args.len()];
                    for (word, arg) in words.iter_mut().zip(args) {
                        *word = arg.0;
                    }
                    let function = functions[usize::from(kernel.id)].function;
                    // SAFETY: as below; `Gemm` passes what the kernel takes.
                    unsafe {
                        stream.launch(function, shape.grid, shape.block, shape.shared, words)?;
                    }
                    mark(kernel.name, bytes)
                };
                gemm.run(stream, &launch, &Matmul::from_words(words))?;
                if !is_ours.get() {
                    mark(KernelTime::PRODUCTS, UNCOUNTED)?;
                }
                after
            }
            word::COPY => {
                let [to, from, bytes, after @ ..] = after else {
                    break;
                };
                let bytes = *bytes as usize;
                // SAFETY: the operation that queued it has checked where both lie.
                unsafe { stream.copy(DevicePtr(*to), DevicePtr(*from), bytes)? };
                mark(KernelTime::COPY, bytes.saturating_mul(2))?;
                after
            }
            _ => {
                let [at, bytes, after @ ..] = after else {
                    break;
                };
                // SAFETY: the operation that queued it has checked where it lies.
                unsafe { stream.zero(DevicePtr(*at), *bytes as usize)? };
                mark(KernelTime::ZERO, *bytes as usize)?;
                after
            }
        };
    }
    Ok(())
}

fn remember(sums: &mut VecDeque<u64>, sum: u64) {
    if !sums.contains(&sum) {
        if sums.len() == SEEN {
            sums.pop_front();
        }
        sums.push_back(sum);
    }
}

/// Tells tapes apart; equal ones are compared word by word.
fn sum(tape: &[u64]) -> u64 {
    // The multiplier of FxHash, whose high bits depend on all words.
    tape.iter().fold(tape.len() as u64, |sum, word| {
        (sum.rotate_left(5) ^ word).wrapping_mul(0x517c_c1b7_2722_0a95)
    })
}
