//! Matrix products, by cuBLASLt where it has them.
//!
//! How a product is done is decided when it first comes, and kept by its sizes, operands and alignments: as a whole by cuBLASLt; by
//! cuBLASLt, added to a bias that a kernel has spread over the output; or by a kernel of ours (`product.cu`). An algorithm that
//! cuBLASLt offers and then refuses is passed over. The algorithm is the first that it offers, which is the same in every run on
//! the same device with the same library; or, if that is asked for, the fastest of some, timed.
//!
//! Of a teacher in fp8, products of e4m3 are cuBLASLt's alone: where it has none, that is an error.
//!
//! f32 is multiplied in f32 (`CUBLAS_COMPUTE_32F`, not TF32). bf16 is summed in f32, and rounded once, after bias and residual; where the
//! bias was spread, so is its sum with the residual.

mod plan;

use core::fmt;
use std::collections::HashMap;
use std::sync::Arc;

use cudarc::cublaslt::result::{self, CublasError};
use cudarc::cublaslt::sys;

use crate::Precision;
use crate::driver::{Context, DevicePtr, Event, Heap, Memory, Stream};
use crate::error::Error;
use crate::kernels::{self, Kernel};
use crate::queue::{Arg, Shape, UNCOUNTED};
use crate::warnings::Warnings;
use plan::Plan;

/// Bytes for sums of a product that is cut along its inner dimension: what NVIDIA recommends for its H100.
pub(crate) const WORKSPACE: usize = 32 << 20;

/// Of operands, in bytes: more does not matter to any algorithm.
const ALIGNED: u32 = 256;

/// What cuBLASLt wants of the place of a bias, in bytes. With less it goes by the place that was named first, or by none.
const BIAS_ALIGNED: u32 = 16;

/// Timings of an algorithm, of which the least counts.
const TIMINGS: usize = 3;

/// A row-major product, `out = op(a) @ op(b) (+ bias) (+ add)`, of operands in the backend's format, or in e4m3.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Matmul {
    /// Rows of `out`.
    pub(crate) m: usize,
    /// Columns of `out`.
    pub(crate) n: usize,
    /// What is summed over.
    pub(crate) k: usize,
    /// `[m, k]`, or `[k, m]` if it is transposed.
    pub(crate) a: DevicePtr,
    pub(crate) a_transposed: bool,
    /// Elements from one row of `a`, as it is stored, to the next.
    pub(crate) a_row: usize,
    /// `[k, n]`, or `[n, k]` if it is transposed.
    pub(crate) b: DevicePtr,
    pub(crate) b_transposed: bool,
    /// As `a_row`.
    pub(crate) b_row: usize,
    /// `[n]`, in the backend's format; only where `out` is in that too.
    pub(crate) bias: Option<DevicePtr>,
    /// `[m, n]`, as `out`; may be `out` itself, nothing else of it.
    pub(crate) add: Option<DevicePtr>,
    /// `[m, n]`
    pub(crate) out: DevicePtr,
    /// `out` and `add` are f32 whatever the operands are.
    pub(crate) out_f32: bool,
    /// `a` and `b` are e4m3, and this is an f32 that their product is multiplied with. `a` is not transposed then, and `b` is.
    pub(crate) scale: Option<DevicePtr>,
}

/// Words of a product on a tape.
const WORDS: usize = 12;

impl Matmul {
    pub(crate) fn to_words(self) -> [u64; WORDS] {
        let flags = u64::from(self.a_transposed)
            | u64::from(self.b_transposed) << 1
            | u64::from(self.bias.is_some()) << 2
            | u64::from(self.add.is_some()) << 3
            | u64::from(self.out_f32) << 4
            | u64::from(self.scale.is_some()) << 5;
        let place = |at: Option<DevicePtr>| at.map_or(0, |at| at.0);
        [
            self.m as u64,
            self.n as u64,
            self.k as u64,
            self.a_row as u64,
            self.b_row as u64,
            flags,
            self.a.0,
            self.b.0,
            place(self.bias),
            place(self.add),
            self.out.0,
            place(self.scale),
        ]
    }

    /// What is left of it where `out` holds the bias already, and what is added.
    fn onto_bias(self) -> Self {
        Self {
            bias: None,
            add: Some(self.out),
            ..self
        }
    }

    pub(crate) fn from_words(words: &[u64; WORDS]) -> Self {
        let [m, n, k, a_row, b_row, flags, a, b, bias, add, out, scale] = *words;
        let flag = |at: u32| flags >> at & 1 == 1;
        Self {
            m: m as usize,
            n: n as usize,
            k: k as usize,
            a: DevicePtr(a),
            a_transposed: flag(0),
            a_row: a_row as usize,
            b: DevicePtr(b),
            b_transposed: flag(1),
            b_row: b_row as usize,
            bias: flag(2).then_some(DevicePtr(bias)),
            add: flag(3).then_some(DevicePtr(add)),
            out: DevicePtr(out),
            out_f32: flag(4),
            scale: flag(5).then_some(DevicePtr(scale)),
        }
    }
}

impl fmt::Display for Matmul {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "[{}, {}] @ [{}, {}]", self.m, self.k, self.k, self.n)?;
        for (is, text) in [
            (self.a_transposed, ", left transposed"),
            (self.b_transposed, ", right transposed"),
            (self.bias.is_some(), ", bias"),
            (self.add.is_some(), ", added"),
            (self.out_f32, ", to f32"),
            (self.scale.is_some(), ", of e4m3"),
        ] {
            if is {
                f.write_str(text)?;
            }
        }
        Ok(())
    }
}

/// What an algorithm depends on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Key {
    m: usize,
    n: usize,
    k: usize,
    a_transposed: bool,
    b_transposed: bool,
    /// Of `a` and `b`.
    rows: [usize; 2],
    bias: bool,
    add: bool,
    out_f32: bool,
    e4m3: bool,
    /// Of `a`, `b`, `add`, `out`, `bias`, in bytes.
    alignments: [u32; 5],
}

/// The largest power of two that a place is a multiple of, up to [`ALIGNED`].
fn alignment(at: DevicePtr) -> u32 {
    1 << at.0.trailing_zeros().min(ALIGNED.trailing_zeros())
}

impl Key {
    fn of(matmul: &Matmul) -> Self {
        let Matmul {
            m,
            n,
            k,
            a,
            a_transposed,
            a_row,
            b,
            b_transposed,
            b_row,
            bias,
            add,
            out,
            out_f32,
            scale,
        } = *matmul;
        // cuBLASLt takes the bias's alignment from the place that the descriptor names when an algorithm is asked for; some
        // versions go by the output's.
        let bias_alignment = bias.map_or(ALIGNED, alignment);
        let store = alignment(out).min(bias_alignment);
        Self {
            m,
            n,
            k,
            a_transposed,
            b_transposed,
            rows: [a_row, b_row],
            bias: bias.is_some(),
            add: add.is_some(),
            out_f32,
            e4m3: scale.is_some(),
            alignments: [
                alignment(a),
                alignment(b),
                add.map_or(alignment(out), alignment),
                store,
                bias_alignment,
            ],
        }
    }
}

/// How a product is done.
#[derive(Debug)]
struct Way {
    /// By cuBLASLt; else by a kernel of ours.
    plan: Option<Plan>,
    /// A kernel has spread the bias over the output before.
    bias_apart: bool,
}

/// Products that cuBLASLt does not do as a whole. Each counts once, by what an algorithm depends on.
#[derive(Debug, Default)]
pub(crate) struct Fallbacks {
    /// By a kernel of ours.
    pub(crate) own: u64,
    /// By cuBLASLt, onto a bias that a kernel has spread.
    pub(crate) spread: u64,
    pub(crate) warnings: Warnings,
}

impl Fallbacks {
    fn note(&mut self, matmul: &Matmul, way: &Way) {
        let how = match (&way.plan, way.bias_apart) {
            (Some(_), false) => return,
            (Some(_), true) => {
                self.spread += 1;
                "cuBLASLt adds no such bias: a kernel writes it to the output before, one more pass over memory"
            }
            (None, _) => {
                self.own += 1;
                "cuBLASLt has no algorithm: a plain kernel computes it, many times slower"
            }
        };
        self.warnings.add(format!("product {matmul}: {how}"));
    }
}

struct Handle(sys::cublasLtHandle_t);

impl Drop for Handle {
    fn drop(&mut self) {
        // SAFETY: created by cuBLASLt, and dropped once.
        let _ = unsafe { result::destroy_handle(self.0) };
    }
}

/// Puts a kernel into the stream.
pub(crate) type Launch<'a> = dyn Fn(Kernel, Shape, usize, &[Arg]) -> Result<(), Error> + 'a;

/// Products, and cuBLASLt for them.
pub(crate) struct Gemm {
    precision: Precision,
    ways: HashMap<Key, Way>,
    pub(crate) fallbacks: Fallbacks,
    /// Times algorithms, instead of taking the first.
    timed: bool,
    workspace: Memory,
    heap: Arc<Heap>,
    context: Arc<Context>,
    handle: Handle,
}

// SAFETY: cuBLASLt's objects belong to no thread; they are used by one at a time, through `&mut self`.
unsafe impl Send for Gemm {}
// SAFETY: `&self` reaches none of them.
unsafe impl Sync for Gemm {}

impl fmt::Debug for Gemm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Gemm({} products)", self.ways.len())
    }
}

fn failed(call: &'static str, error: CublasError, product: String) -> Error {
    Error::Cublas {
        call,
        error: format!("{:?}", error.0),
        product,
    }
}

/// Whether a call has only said that it cannot do this. Libraries of CUDA 12 say of products of e4m3 that they are invalid where later ones do not
/// support them.
fn is_refusal(error: CublasError, matmul: &Matmul) -> bool {
    use sys::cublasStatus_t::{
        CUBLAS_STATUS_ARCH_MISMATCH, CUBLAS_STATUS_INVALID_VALUE, CUBLAS_STATUS_NOT_SUPPORTED,
    };
    match error.0 {
        CUBLAS_STATUS_NOT_SUPPORTED | CUBLAS_STATUS_ARCH_MISMATCH => true,
        CUBLAS_STATUS_INVALID_VALUE => matmul.scale.is_some(),
        _ => false,
    }
}

impl Gemm {
    pub(crate) fn new(
        context: &Arc<Context>,
        heap: &Arc<Heap>,
        precision: Precision,
    ) -> Result<Self, Error> {
        context.bind()?;
        Ok(Self {
            precision,
            ways: HashMap::new(),
            fallbacks: Fallbacks::default(),
            timed: false,
            workspace: heap.allocate(WORKSPACE)?,
            heap: Arc::clone(heap),
            context: Arc::clone(context),
            handle: Handle(
                result::create_handle()
                    .map_err(|error| failed("cublasLtCreate", error, String::new()))?,
            ),
        })
    }

    /// Whether products that come for the first time from now on time their algorithms.
    pub(crate) fn time(&mut self, timed: bool) {
        self.timed = timed;
    }

    /// Writes zeros over what products use as they go, to keep the device busy.
    pub(crate) fn spoil_workspace(&self, stream: &Stream) -> Result<(), Error> {
        // SAFETY: memory of this, which no product expects anything in.
        unsafe { stream.zero(self.workspace.at(), self.workspace.bytes()) }
    }

    /// Whether cuBLASLt has an algorithm for a product of e4m3, in the form of a layer of any model.
    pub(crate) fn has_fp8(&self) -> Result<bool, Error> {
        const SIZE: usize = 256;
        // Nothing is read there; aligned as buffers are.
        let at = self.workspace.at();
        let matmul = Matmul {
            m: SIZE,
            n: SIZE,
            k: SIZE,
            a: at,
            a_transposed: false,
            a_row: SIZE,
            b: at,
            b_transposed: true,
            b_row: SIZE,
            bias: Some(at),
            add: None,
            out: at,
            out_f32: false,
            scale: Some(at),
        };
        // By itself, or onto its bias.
        for matmul in [matmul, matmul.onto_bias()] {
            if Plan::new(self.handle.0, self.precision, &matmul)?.is_some() {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Puts a product, of at least one row and column, into a stream.
    pub(crate) fn run(
        &mut self,
        stream: &Stream,
        launch: &Launch<'_>,
        matmul: &Matmul,
    ) -> Result<(), Error> {
        if matmul.k == 0 {
            return self.empty(stream, matmul);
        }
        let key = Key::of(matmul);
        let Some(way) = self.ways.get(&key) else {
            let way = self.first(stream, launch, matmul)?;
            self.fallbacks.note(matmul, &way);
            self.ways.insert(key, way);
            return Ok(());
        };
        let part = match way.bias_apart {
            true => self.spread_bias(launch, matmul)?,
            false => *matmul,
        };
        match &way.plan {
            Some(plan) => self
                .launch(stream, plan, &part, 0)
                .map_err(|error| failed("cublasLtMatmul", error, part.to_string())),
            None => self.own(launch, &part),
        }
    }

    /// Puts a product that comes for the first time into a stream, and says how.
    fn first(&self, stream: &Stream, launch: &Launch<'_>, matmul: &Matmul) -> Result<Way, Error> {
        let is_aligned = |bias| alignment(bias) >= BIAS_ALIGNED;
        if matmul.bias.is_none_or(is_aligned)
            && let Some(plan) = Plan::new(self.handle.0, self.precision, matmul)?
            && let Some(plan) = self.try_all(stream, plan, matmul)?
        {
            return Ok(Way {
                plan: Some(plan),
                bias_apart: false,
            });
        }
        if matmul.bias.is_some()
            && let Some(plan) = Plan::new(self.handle.0, self.precision, &matmul.onto_bias())?
        {
            let part = self.spread_bias(launch, matmul)?;
            let plan = self.try_all(stream, plan, &part)?;
            if plan.is_none() {
                self.own(launch, &part)?;
            }
            return Ok(Way {
                plan,
                bias_apart: true,
            });
        }
        self.own(launch, matmul)?;
        Ok(Way {
            plan: None,
            bias_apart: false,
        })
    }

    /// Puts a product into a stream by the first algorithm of its plan that is not refused, which is the plan's first afterwards. `None`
    /// if all are: then nothing was queued.
    fn try_all(
        &self,
        stream: &Stream,
        mut plan: Plan,
        matmul: &Matmul,
    ) -> Result<Option<Plan>, Error> {
        if self.timed {
            self.sort(stream, &mut plan, matmul)?;
        }
        while plan.has_algorithm() {
            match self.launch(stream, &plan, matmul, 0) {
                Ok(()) => return Ok(Some(plan)),
                Err(error) if is_refusal(error, matmul) => plan.pass_over(),
                Err(error) => return Err(failed("cublasLtMatmul", error, matmul.to_string())),
            }
        }
        Ok(None)
    }

    /// Moves the fastest algorithm of a plan to its front. Afterwards `out` holds what it held before, if it is added to.
    fn sort(&self, stream: &Stream, plan: &mut Plan, matmul: &Matmul) -> Result<(), Error> {
        let out = matmul.out;
        let bytes = matmul.m * matmul.n * self.out_size(matmul);
        let kept = match matmul.add {
            Some(add) if add == out => match self.heap.allocate(bytes) {
                Ok(memory) => Some(memory),
                // The first one is right too.
                Err(Error::OutOfMemory { .. }) => return Ok(()),
                Err(error) => return Err(error),
            },
            _ => None,
        };
        if let Some(kept) = &kept {
            // SAFETY: just allocated, as large as the output, and freed behind this, here or by the queue.
            unsafe { stream.copy(kept.at(), out, bytes)? };
        }
        let clock = || Event::timed(&self.context);
        let (started, stopped) = (clock()?, clock()?);
        let mut times = Vec::new();
        while times.len() < plan.algorithms.len() {
            let mut least = f64::INFINITY;
            // The first does not count: its kernel is loaded then.
            for timing in 0..=TIMINGS {
                stream.record(&started)?;
                match self.launch(stream, plan, matmul, times.len()) {
                    Ok(()) => {}
                    Err(error) if is_refusal(error, matmul) => break,
                    Err(error) => return Err(failed("cublasLtMatmul", error, matmul.to_string())),
                }
                stream.record(&stopped)?;
                stopped.wait()?;
                if timing > 0 {
                    least = least.min(stopped.seconds_since(&started)?);
                }
            }
            times.push(least);
        }
        if let Some(kept) = kept {
            // SAFETY: as above.
            unsafe { stream.copy(out, kept.at(), bytes)? };
            // At once: copies of all outputs together would be more than any plan of memory has.
            stream.wait()?;
            self.heap.free_at_once(kept);
        }
        plan.prefer(&times);
        Ok(())
    }

    fn launch(
        &self,
        stream: &Stream,
        plan: &Plan,
        matmul: &Matmul,
        algorithm: usize,
    ) -> Result<(), CublasError> {
        // SAFETY: a plan for such a product; the operation that queued it has checked where operands lie; the workspace is as large
        // as plans are made for, and used by one product of this stream after the other.
        unsafe {
            plan.launch(
                self.handle.0,
                stream,
                matmul,
                algorithm,
                self.workspace.at(),
            )
        }
    }

    /// `out = bias (+ add)`, and the product that is then added to it.
    fn spread_bias(&self, launch: &Launch<'_>, matmul: &Matmul) -> Result<Matmul, Error> {
        let kernel = kernels::SPREAD_BIAS;
        let (rows, dim) = (small(kernel, matmul.m)?, small(kernel, matmul.n)?);
        let columns = dim.div_ceil(kernel.threads);
        // Some blocks for each multiprocessor, of which a thread takes several rows.
        let most = (8 * self.context.multiprocessors).div_ceil(columns);
        let shape = Shape {
            grid: [columns, rows.min(most), 1],
            block: kernel.threads,
            shared: 0,
        };
        launch(
            kernel,
            shape,
            matmul.m * matmul.n * self.out_size(matmul) * (1 + usize::from(matmul.add.is_some())),
            &[
                matmul.out.into(),
                matmul.add.into(),
                matmul.bias.into(),
                rows.into(),
                dim.into(),
                u32::from(matmul.out_f32).into(),
            ],
        )?;
        Ok(matmul.onto_bias())
    }

    /// All of a product by a kernel of ours.
    fn own(&self, launch: &Launch<'_>, matmul: &Matmul) -> Result<(), Error> {
        if matmul.scale.is_some() {
            return Err(Error::no_fp8_product(&self.context.name, matmul));
        }
        /// Rows and columns of a block.
        const TILE: u32 = 64;
        let kernel = kernels::PRODUCT;
        let (m, n) = (small(kernel, matmul.m)?, small(kernel, matmul.n)?);
        let flags = u32::from(matmul.a_transposed)
            | u32::from(matmul.b_transposed) << 1
            | u32::from(matmul.out_f32) << 2;
        let shape = Shape {
            grid: [m.div_ceil(TILE), n.div_ceil(TILE), 1],
            block: kernel.threads,
            shared: 0,
        };
        launch(
            kernel,
            shape,
            UNCOUNTED,
            &[
                matmul.out.into(),
                matmul.add.into(),
                matmul.bias.into(),
                matmul.a.into(),
                matmul.b.into(),
                m.into(),
                n.into(),
                small(kernel, matmul.k)?.into(),
                small(kernel, matmul.a_row)?.into(),
                small(kernel, matmul.b_row)?.into(),
                flags.into(),
            ],
        )
    }

    /// A sum over nothing.
    fn empty(&self, stream: &Stream, matmul: &Matmul) -> Result<(), Error> {
        match (matmul.add, matmul.bias) {
            (Some(add), None) if add == matmul.out => Ok(()),
            (None, None) => {
                let size = self.out_size(matmul);
                // SAFETY: as in `launch`.
                unsafe { stream.zero(matmul.out, matmul.m * matmul.n * size) }
            }
            _ => Err(failed(
                "cublasLtMatmul",
                CublasError(sys::cublasStatus_t::CUBLAS_STATUS_INVALID_VALUE),
                matmul.to_string(),
            )),
        }
    }

    fn out_size(&self, matmul: &Matmul) -> usize {
        if matmul.out_f32 {
            size_of::<f32>()
        } else {
            self.precision.size()
        }
    }
}

/// What kernels count in 32 bits.
fn small(kernel: Kernel, len: usize) -> Result<u32, Error> {
    u32::try_from(len).map_err(|_| Error::Launch {
        kernel: kernel.name,
        expected: "fewer than 2^32 rows and columns",
        found: len,
    })
}

#[cfg(test)]
mod tests;
